"Files made from finished runs: CSV, figure, Markdown"
import csv, io, json
from pathlib import Path

from brainseg_fastai.core import DataError, need, write_text, written
from curves import COLUMNS, NAMES, TARGETS, ablation_markdown, ablations, markdown, summarise, target_rows

COLOURS = dict(ours='#d55e00', published='#000000', stock='#0072b2', smp='#009e73', monai_unet='#cc79a7',
               monai_basic='#e69f00',
               nnunet='#56b4e9')

def csv_text(rows, columns)->str:
    buf = io.StringIO()
    w = csv.DictWriter(buf, columns, lineterminator='\n')
    w.writeheader()
    w.writerows(rows)
    return buf.getvalue()

def same_for_all(
    runs # Finished runs
):
    "Refuse runs that cannot be compared: another split, other data, another size, subjects on two sides"
    first = runs[0]
    for r in runs:
        name = f"{r['system']}-seed{r['seed']}"
        both = set(r['sides']['train']) & set(r['sides']['valid'])
        need(not both, f'{name}: found the subjects {sorted(both)[:5]} in training and validation; '
                       'expected each on one side.')
        for k in ('split','data','machine'):
            need(r[k]==first[k], f"{name}: found another {k} than in {first['system']}-seed{first['seed']}; "
                                 'expected the same for all runs. Delete what does not belong, or give another --out.')
        for k in ('inputs','size','threads','init'):
            need(r['spec'][k]==first['spec'][k], f"{name}: found {k} {r['spec'][k]}; expected {first['spec'][k]}.")

def plot(runs, path):
    "Dice over seconds of training, a thin line for each run"
    from matplotlib.figure import Figure # no display, no global state
    fig = Figure(figsize=(8,4.5), layout='constrained')
    ax = fig.subplots()
    for t in TARGETS: ax.axhline(t, color='#cccccc', lw=.7, zorder=0)
    for name in dict.fromkeys(r['system'] for r in runs):
        colour = COLOURS.get(name) or f'C{len(ax.lines)%10}'
        for i,r in enumerate(o for o in runs if o['system']==name):
            s,d = zip(*((max(s, .1), d) for s,d in r['curve']))
            ax.plot(s, d, color=colour, lw=1, label=NAMES[name].replace('`','') if i==0 else None)
            ax.plot(s[-1], d[-1], '.', color=colour, ms=4)
    ax.set(xscale='log', ylim=(0,1), xlabel='seconds of training', ylabel='per-image Dice, validation subjects',
           title=runs[0]['machine'])
    ax.xaxis.set_major_formatter(lambda x, pos: f'{x:g}')
    ax.legend(loc='center left', bbox_to_anchor=(1,.5), fontsize='small', frameon=False)
    with written(path) as tmp: fig.savefig(tmp, dpi=150, format='png')

def about(runs):
    r = runs[0]
    sides = list(r['split'].values())
    return dict(machine=r['machine'], data=f"{Path(r['spec']['data']).name}, {r['spec']['inputs']}",
                size=r['spec']['size'],
                **{k: sides.count(k) for k in ('train','valid')},
                **{f'{k}_subjects': len(r['sides'][k]) for k in ('train','valid')})

def write_report(
    runs, # Finished runs
    out   # Folder
):
    "All tables and the figure of finished runs"
    same_for_all(runs)
    order = [*NAMES]
    runs,out = sorted(runs, key=lambda r: (order.index(r['system']), r['seed'])), Path(out)
    summary = summarise(runs)
    write_text(out/'time_to_dice.csv', csv_text(target_rows(runs), COLUMNS))
    write_text(out/'summary.csv', csv_text(summary, list(summary[0])))
    points = [dict(system=r['system'], seed=r['seed'], seconds=s, dice=round(d, 5)) for r in runs
              for s,d in r['curve']]
    write_text(out/'curves.csv', csv_text(points, ('system','seed','seconds','dice')))
    write_text(out/'split.csv', csv_text([dict(image=k, split=v) for k,v in runs[0]['split'].items()],
                                         ('image','split')))
    write_text(out/'time_to_dice.md', markdown(summary, about(runs)))
    if ablations(runs): write_text(out/'ablation.md', ablation_markdown(runs))
    plot(runs, out/'time_to_dice.png')

def read_run(path):
    "A finished run, or None"
    try: return json.loads(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError: return None
    except ValueError as e: raise DataError.of(path, 'a damaged file', 'a finished run',
                                               'Delete it; it will be run again.') from e
