"""Is the speed paid for in quality? Ours against fastai's `unet_learner`, trained until it no longer gets better

    python benchmarks/out_of_fold.py DATA --epochs 20 --bf16

Every subject is tested once. The validation subjects of time_to_dice.py, by which the recipe was found, are marked,
and the comparison is made without them, too. Each training leaves its scores and its losses in OUT/runs/out_of_fold,
so that the same command goes on after an interruption."""
import argparse, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import numpy as np, pandas as pd, torch
from fastai.torch_core import default_device, set_seed
from brainseg_fastai.adni import adni_cases
from brainseg_fastai.cases import is_simulated
from brainseg_fastai.checks import mask_codes
from brainseg_fastai.core import DataError, write_csv, write_json
from brainseg_fastai.images import read_mask
from brainseg_fastai.networks import autocast_of
from brainseg_fastai.scores import score_mask
from brainseg_fastai.segmentation import split_cases
from brainseg_fastai.splits import with_split
from brainseg_fastai.stats import compare_scores
from brainseg_fastai.training import environment
from one_run import machine_name, split_of
from systems import SYSTEMS

class Progress:
    "Stands in for the benchmark's clock: nothing is stopped, and the time left is shown"
    stopped = False
    def __init__(self, steps, name): self.steps,self.name,self.n,self.began,self.losses = steps,name,0,time.time(),[]
    def start(self): pass
    def pause(self): pass
    def loaded(self): pass
    def step(self, images, loss):
        self.n += 1
        self.losses.append(float(loss.detach()))
        left = (time.time()-self.began)*(self.steps/self.n-1)
        if sys.stderr.isatty(): print(f'\r{self.name}: step {self.n} of {self.steps}, about {left/60:.0f} min left ',
                                      end='', file=sys.stderr)
        return False

def in_bf16(learn):
    "Let a learner compute as ours: in bfloat16 where the hardware has it, channels last; weights and loss in 32 bits"
    forward = learn.model.to(memory_format=torch.channels_last).forward
    def compute(x):
        x = x.as_subclass(torch.Tensor).contiguous(memory_format=torch.channels_last)
        with autocast_of(x.device): y = forward(x)
        return y.float()
    learn.model.forward = compute

def tested(
    system,    # Name, as in `SYSTEMS`
    cases,     # Case table with the column `split`
    size, seed,
    epochs,    # None: as many as the system takes by itself
    bf16=False # Let it compute in bfloat16?
)->tuple: # Scores of the test rows, and the mean loss of every epoch
    "Train a system on one fold, and score its test subjects"
    codes = list(mask_codes(cases['mask']))
    set_seed(seed, reproducible=True)
    s = SYSTEMS[system](cases, codes, size, seed, False, epochs)
    if bf16: in_bf16(s.learn)
    steps,n = len(s.learn.dls.train), epochs or s.about['epochs']
    s.train(p := Progress(n*steps, system))
    test = cases[cases['split']=='test'].reset_index(drop=True)
    s.model.eval()
    with torch.no_grad(): preds = s.predict_all(test)
    keys = test[['subject','scan','slice']].to_dict('records')
    rows = [dict(k, **score_mask(a, read_mask(m, codes), n_codes=len(codes)))
            for k,m,a in zip(keys, test['mask'], preds)]
    losses = pd.DataFrame(dict(epoch=np.arange(n)+1, loss=np.reshape(p.losses, (n, steps)).mean(1)))
    return pd.DataFrame(rows).assign(variant=system, seed=seed), losses

def parse(args=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('data', type=Path, help='folder with mask/ and the images')
    p.add_argument('--out', default=HERE/'results', type=Path, help='folder for results (default benchmarks/results)')
    p.add_argument('--inputs', '--kind', default='orig',
                   help='folder of the images within DATA (default orig, the full skull)')
    p.add_argument('--size', type=int, default=256, help='pixels (default 256)')
    p.add_argument('--folds', type=int, default=3)
    p.add_argument('--epochs', type=int, default=20, help='of stock; ours takes its own number (default 20)')
    p.add_argument('--bf16', action='store_true',
                   help='let stock compute in bfloat16, as ours does where the hardware has it: '
                   'the same training in less time')
    p.add_argument('--threads', type=int, default=2)
    return p.parse_args(args)

def tables_of(a, cases, split, system):
    "Scores and losses of one system on every fold; what is there already is read"
    epochs,bf16 = (a.epochs, a.bf16) if system=='stock' else (None, False)
    scores,losses = [],[]
    for fold in sorted(split['fold'].unique()):
        name = f"{a.inputs}-{a.size}-{system}{'-bf16'*bf16}-{epochs or 'own'}-fold{fold}of{a.folds}.csv"
        path = a.out/'runs'/'out_of_fold'/name
        if not path.exists():
            print(f'{system}, fold {fold+1} of {a.folds}', flush=True)
            table,loss = tested(system, with_split(cases, split, fold), a.size, 42+int(fold), epochs, bf16)
            write_csv(path.with_suffix('.loss.csv'), loss)
            write_csv(path, table.assign(fold=fold))
        scores.append(pd.read_csv(path, dtype=dict(subject=str, scan=str, slice=str)))
        losses.append(pd.read_csv(path.with_suffix('.loss.csv')))
    mean_loss = pd.concat(losses).groupby('epoch')['loss'].mean().round(5).tolist()
    return pd.concat(scores, ignore_index=True), mean_loss

def compared(ours, stock, data, without=()):
    "Ours against stock, perhaps without some subjects"
    pair = [o[~o['subject'].isin(without)] for o in (ours, stock)]
    c = compare_scores(*pair, names=('ours','stock'), what='setting', simulated=is_simulated(data))
    return dict(subjects=c.n_subjects, dice={k: v['dice'] for k,v in c.metrics.items()}, difference=c.difference,
                ci90=c.ci90, ci95=c.ci95, verdict=c.verdict)

def main(args=None):
    a = parse(args)
    torch.set_num_threads(a.threads)
    cases = adni_cases(a.data, a.inputs)
    split = split_cases(cases, a.folds)
    (ours,ours_loss),(stock,stock_loss) = (tables_of(a, cases, split, o) for o in ('ours','stock'))
    helped = set(split_of(cases).query('split=="valid"')['subject'])
    res = dict(compared(ours, stock, a.data), without_helped=compared(ours, stock, a.data, helped))
    dice = {k: o.groupby('subject')['dice'].mean() for k,o in (('ours',ours), ('stock',stock))}
    by_subject = pd.DataFrame(dice).round(5).rename_axis('subject')
    by_subject['helped'] = by_subject.index.isin(helped)
    write_json(a.out/'out_of_fold.json', dict(
        data=a.data.name, inputs=a.inputs, size=a.size, epochs=a.epochs, bf16=a.bf16, folds=a.folds, **res,
        machine=machine_name(environment(default_device())), loss=dict(ours=ours_loss, stock=stock_loss),
        by_subject=by_subject.sort_values('stock').to_dict('records')))
    for r,who in ((res, 'subjects'), (res['without_helped'], 'that did not help to find the recipe')):
        numbers = '{:+.4f} (90 % {:+.4f} to {:+.4f})'.format(r['difference'], *r['ci90'])
        print(f'Mean over subjects of per-image Dice, ours minus stock: {numbers}, {r["subjects"]} {who}, '
              f'{a.folds} folds, {a.epochs} epochs of stock')
    return 0

if __name__=='__main__':
    try: sys.exit(main())
    except DataError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('\nInterrupted. Finished trainings are kept; the same command goes on.', file=sys.stderr)
        sys.exit(130)
