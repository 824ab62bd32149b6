"What Dice curves say: when to evaluate, time to a target, best Dice by a time, medians, ratios, tables; plain numbers"
import math
from statistics import median

TARGETS = .85, .90, .93                     # per-image foreground Dice on validation subjects
# evaluate every 2 s up to 60 s of training, then every 4 % of the time so far
FINE,FINE_UNTIL,GROWTH = 2., 60., 1.04
COLUMNS = 'system','seed','target','seconds','reached','init','machine'

# ---- one curve: a list of (seconds, dice)

def next_point(
    seconds # Training seconds at the last evaluation
)->float: # Training seconds at which the next one is due
    "The next point of the grid of evaluations"
    if seconds < FINE_UNTIL: return min(FINE_UNTIL, FINE*(math.floor(seconds/FINE+1e-9)+1))
    return seconds*GROWTH

def time_to(
    curve,  # Pairs (seconds, dice)
    target, # Dice
    end     # Training seconds at which the run stopped
)->tuple: # (seconds, reached); the end of the run where it was not reached
    "When a curve first reaches a Dice"
    hit = next((s for s,d in curve if d>=target), None)
    return (float(end), False) if hit is None else (float(hit), True)

def best_by(
    curve,  # Pairs (seconds, dice)
    seconds # Training seconds
)->float:
    "Best Dice of the evaluations up to a time; 0 before the first evaluation"
    return max((d for s,d in curve if s<=seconds+1e-6), default=0.)

# ---- caps

CAP_PUBLISHED,CAP_STOCK,CAP_OTHERS = 31., 10.5, 2.5 # times ours' time to 0.90, the same, times ours' end

def caps(
    system,
    t90, # Seconds that ours needed to 0.90 in the same seed (its end, where it did not get there)
    end  # Seconds that ours trained in the same seed
)->tuple: # (at least, at most) training seconds
    "How long a system trains: until it has reached the highest target, but within these limits"
    if system=='ours': return 0., math.inf
    if system=='published': return 0., CAP_PUBLISHED*t90
    if system in ABLATIONS: return CAP_OTHERS*end, CAP_OTHERS*end # to its own end, which comes first if it is as fast
    return end, max(CAP_STOCK*t90, end) if system=='stock' else CAP_OTHERS*end

# ---- many runs: dicts with system, seed, init, machine, end, curve, and figures

def label(init): return {'scratch': 'from scratch', 'pretrained': 'pretrained'}.get(init, init)

def target_rows(runs)->list: # Dicts with `COLUMNS`
    "One row per run and target"
    res = []
    for r in runs:
        for t in TARGETS:
            s,ok = time_to(r['curve'], t, r['end'])
            res.append(dict(zip(COLUMNS, (r['system'], r['seed'], t, round(s, 2), ok, r['init'], r['machine']))))
    return res

def median_time(
    pairs # (seconds, reached) of several runs
)->tuple: # (median, at_least): is the true median perhaps later?
    "Median of times of which some were cut off; it is a lower bound if a run was stopped at or before it"
    m = median(s for s,_ in pairs)
    return m, any(not ok and s<=m for s,ok in pairs)

def ratio_to(
    theirs, # (seconds, reached) by seed
    ours    # The same
)->tuple: # (ratio, at_least), or (None, False) where there is none
    "Ratio of median times over the seeds that both have; none where ours did not get there"
    both = [k for k in theirs if k in ours]
    if not both: return None, False
    (a,low),(b,unknown) = median_time([theirs[k] for k in both]), median_time([ours[k] for k in both])
    return (None, False) if unknown or b<=0 else (a/b, low)

FIGURES = ('best','train_images_per_s','predict_images_per_s','wait_share','memory_mb','setup_s')

def _spread(name, xs):
    xs = [x for x in xs if x is not None]
    if not xs: return {name: None, f'{name}_min': None, f'{name}_max': None}
    return {name: median(xs), f'{name}_min': min(xs), f'{name}_max': max(xs)}

def summarise(runs)->list: # One dict per system, in the order of `runs`
    "Medians with their range, and ratios to ours labelled with how both were initialised"
    ours = {r['seed']: r for r in runs if r['system']=='ours'}
    res = []
    for name in dict.fromkeys(r['system'] for r in runs):
        mine = [r for r in runs if r['system']==name]
        d = dict(system=name, init=mine[0]['init'], runs=len(mine))
        for t in TARGETS:
            k = f'{round(100*t):03d}'
            pairs = {r['seed']: time_to(r['curve'], t, r['end']) for r in mine}
            base = {s: time_to(r['curve'], t, r['end']) for s,r in ours.items()}
            m,low = median_time(list(pairs.values()))
            ratio,more = ratio_to(pairs, base)
            d |= {f't{k}': m, **{f't{k}_{o.__name__}': o(s for s,_ in pairs.values()) for o in (min,max)},
                  f't{k}_at_least': low,
                  f't{k}_reached': sum(ok for _,ok in pairs.values()), f'ratio{k}': ratio, f'ratio{k}_at_least': more}
        d['ratio_init'] = f"{label(d['init'])} / {label(next(iter(ours.values()))['init'])}" if ours else ''
        at = [best_by(r['curve'], ours[r['seed']]['end']) if r['seed'] in ours else None for r in mine]
        d |= _spread('best_at_our_end', at)
        for f in FIGURES: d |= _spread(f, [r.get(f) for r in mine])
        res.append(d)
    return res

# ---- tables in Markdown

ABLATIONS = { # ours with one thing changed, see `CHANGES` in systems.py
    'ours-float32':    '32-bit floats, no bfloat16',
    'ours-contiguous': 'channels first in memory',
    'ours-decoder':    "fastai's U-Net decoder on the same encoder, the image at full size",
    'ours-three':      'three channels, as pictures have, instead of one',
    'ours-whole':      'whole images from the start, no windows',
    'ours-resize':     'progressive resizing (images of 3/4 of the side) in place of windows',
    'ours-alike':      'first guesses alike for all classes, not at their share of the pixels',
    'ours-ce':         'cross-entropy alone, without Dice',
    'ours-rate':       "largest learning rate 1e-3, fastai's default",
    'ours-batch':      'batches of 8',
    'ours-reading':    'images read from the file each time',
    'ours-single':     'augmentation of one image at a time, not of the batch',
    'ours-workers':    'two processes that load, instead of none',
    'ours-compile':    '`torch.compile`'}

DROPPED = { # brought nothing and is gone; its results are kept
    'ours-fastai_aug': "fastai's `aug_transforms` of the same strength",
    'ours-last':       'no average of the weights'}

NAMES = dict(ours='ours', published='published recipe', stock='fastai `unet_learner` resnet34, defaults',
             smp='SMP U-Net resnet34', monai_unet='MONAI UNet', monai_basic='MONAI BasicUNet',
             nnunet='network that nnU-Net plans') | ABLATIONS | DROPPED

def _number(x, digits=2, sign=''): return '–' if x is None else f'{x:{sign}.{digits}f}'

def _range(d, k, digits, sign=''):
    text,lo,hi = (_number(d[o], digits, sign) for o in (k, f'{k}_min', f'{k}_max'))
    return text if d['runs']==1 or d[f'{k}_min'] is None else f"{text} ({lo}{' to ' if sign else '–'}{hi})"

def _at_least(x, at_least, digits=0):
    "A number, or `more than` it, rounded down then so as not to say too much"
    if not at_least: return f'{x:.{digits}f}'
    return f'more than {math.floor(x*10**digits+1e-9)/10**digits:.{digits}f}'

def ratio_text(ratio, at_least)->str:
    "Such as `12×`, or `more than 12×` where runs were stopped"
    if ratio is None: return '–'
    return _at_least(ratio, at_least, 1 if ratio<10 else 0) + '×'

def time_text(d, k)->str:
    "Median and range of the seconds to a target, and how many runs got there"
    text = _at_least(d[f't{k}'], d[f't{k}_at_least'])
    if d['runs']>1: text += f" ({d[f't{k}_min']:.0f}–{d[f't{k}_max']:.0f})"
    return text if d[f't{k}_reached']==d['runs'] else f"{text}, {d[f't{k}_reached']} of {d['runs']} got there"

def _table(head, rows):
    line = lambda o: '| ' + ' | '.join(o) + ' |'
    return '\n'.join([line(head), line(['---']*len(head)), *map(line, rows)])

def markdown(
    summary, # From `summarise`
    about    # dict: machine, data, size, images, subjects, threads
)->str:
    "The tables for the README"
    times = [[NAMES.get(d['system'], d['system']), label(d['init']), *(time_text(d, k) for k in ('085','090','093')),
              ratio_text(d['ratio090'], d['ratio090_at_least']), d['ratio_init'], _range(d, 'best_at_our_end', 3)]
              for d in summary]
    def cost(d):
        share,memory = d['wait_share'],d['memory_mb']
        return [NAMES.get(d['system'], d['system']), _range(d, 'train_images_per_s', 1),
                _range(d, 'predict_images_per_s', 1),
                '–' if share is None else f'{100*share:.0f} %', '–' if memory is None else f'{memory/1000:.1f} GB',
                _range(d, 'setup_s', 1)]
    return (f"Measured on {about['machine']}: {about['data']}, {about['train']} training and "
            f"{about['valid']} validation images ({about['train_subjects']} and {about['valid_subjects']} subjects), "
            f"{about['size']} px. Median over seeds (range). Seconds of training, evaluation not counted; "
            'Dice is the mean per-image foreground Dice on validation subjects.\n\n' +
            _table(['system','weights','s to 0.85','s to 0.90','s to 0.93','0.90: times ours',
                    'weights, theirs / ours',
                    'best Dice when ours is done'], times) + '\n\n' +
            _table(['system','images/s in training','images/s in prediction','waiting for data','peak memory',
                    's of setup'],
                   map(cost, summary)) + '\n')

# ---- what each piece brings

def ablations(runs)->list: # One dict for each change, in the order of `ABLATIONS`
    "Ours with one thing changed beside ours with the same seed: time for an image, differences in Dice, over seeds"
    ours,summary = {r['seed']: r for r in runs if r['system']=='ours'}, {d['system']: d for d in summarise(runs)}
    res = []
    for name in ABLATIONS | DROPPED:
        pairs = [(r, ours[r['seed']]) for r in runs if r['system']==name and r['seed'] in ours]
        if not pairs: continue
        res.append(dict(system=name, name=NAMES[name], runs=len(pairs), ratio090=summary[name]['ratio090'],
                        ratio090_at_least=summary[name]['ratio090_at_least'],
                        **_spread('time_per_image', [o['train_images_per_s']/r['train_images_per_s']
                                                     for r,o in pairs]),
                        **_spread('then', [best_by(r['curve'], o['end'])-best_by(o['curve'], o['end'])
                                           for r,o in pairs]),
                        **_spread('last', [r['curve'][-1][1]-o['curve'][-1][1] for r,o in pairs])))
    return res

def ablation_markdown(
    runs # Finished runs, those of ours among them
)->str:
    "The table for the story: what is lost without each piece"
    our = next(d for d in summarise(runs) if d['system']=='ours')
    rows = [[d['name'], _range(d, 'time_per_image', 2), ratio_text(d['ratio090'], d['ratio090_at_least']),
             _range(d, 'then', 3, '+'), _range(d, 'last', 3, '+')]
            for d in ablations(runs)]
    return (f"Ours as it is: {time_text(our, '090')} s to 0.90, Dice {_range(our, 'best_at_our_end', 3)} when it is "
            f"done; {our['runs']} trainings. Below, ours with "
            'one thing changed, each beside ours with the same seed. Median over seeds (range).\n\n' +
            _table(['changed','time per image, times ours','time to 0.90, times ours',
                    'Dice when ours is done, minus ours','Dice at its own end, minus ours'], rows) + '\n')
