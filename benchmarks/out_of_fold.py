"""Is the speed paid for in quality? Ours as it is against fastai's `unet_learner` trained until it no longer gets better, on unseen subjects

    python benchmarks/out_of_fold.py DATA --epochs 20 --bf16

Every subject is tested once. The validation subjects of time_to_dice.py, by which the recipe was found, are marked, and the comparison is made without them,
too. Each training leaves its scores and its losses in OUT/runs/out_of_fold, so that the same command goes on after an interruption."""
import argparse, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import numpy as np, pandas as pd, torch
from fastai.torch_core import default_device, set_seed
from brainseg_fastai.cases import DataError, adni_cases, is_simulated, mask_codes, read_mask
from brainseg_fastai.scores import score_mask
from brainseg_fastai.segmentation import autocast_of, environment, split_cases, with_split, write_csv, write_json
from brainseg_fastai.stats import compare_scores
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
        self.n += 1; self.losses.append(float(loss.detach()))
        left = (time.time()-self.began)*(self.steps/self.n-1)
        if sys.stderr.isatty(): print(f'\r{self.name}: step {self.n} of {self.steps}, about {left/60:.0f} min left ', end='', file=sys.stderr)
        return False

def in_bf16(learn):
    "Let a learner compute as ours does: in bfloat16 where the hardware has it, channels last. Weights and loss stay in 32 bits"
    forward = learn.model.to(memory_format=torch.channels_last).forward
    def compute(x):
        with autocast_of(x.device): y = forward(x.as_subclass(torch.Tensor).contiguous(memory_format=torch.channels_last))
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
    def row(o, p): return dict(subject=o.subject, scan=o.scan, slice=o.slice, **score_mask(p, read_mask(o.mask, codes), n_codes=len(codes)))
    return pd.DataFrame([row(o, p) for o,p in zip(test.itertuples(), preds)]).assign(kind=system, seed=seed), \
        pd.DataFrame(dict(epoch=np.arange(n)+1, loss=np.reshape(p.losses, (n, steps)).mean(1)))

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('data', type=Path, help='folder with mask/ and the images')
    p.add_argument('--out', default=HERE/'results', type=Path, help='folder for results (default benchmarks/results)')
    p.add_argument('--kind', default='orig', help='folder of the images within DATA (default orig, the full skull)')
    p.add_argument('--size', type=int, default=256, help='pixels (default 256)')
    p.add_argument('--folds', type=int, default=3)
    p.add_argument('--epochs', type=int, default=20, help="of stock; ours takes its own number (default 20)")
    p.add_argument('--bf16', action='store_true', help='let stock compute in bfloat16, as ours does where the hardware has it: the same training in less time')
    p.add_argument('--threads', type=int, default=2)
    a = p.parse_args(args)
    torch.set_num_threads(a.threads)
    cases = adni_cases(a.data, a.kind)
    split,tables,losses = split_cases(cases, a.folds), {'ours': [], 'stock': []}, {'ours': [], 'stock': []}
    for fold in sorted(split['fold'].unique()):
        for system,done in tables.items():
            epochs,bf16 = (a.epochs,a.bf16) if system=='stock' else (None,False)
            path = a.out/'runs'/'out_of_fold'/f"{a.kind}-{a.size}-{system}{'-bf16'*bf16}-{epochs or 'own'}-fold{fold}of{a.folds}.csv"
            if not path.exists():
                print(f'{system}, fold {fold+1} of {a.folds}', flush=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                scores,loss = tested(system, with_split(cases, split, fold), a.size, 42+int(fold), epochs, bf16)
                write_csv(path.with_suffix('.loss.csv'), loss)
                write_csv(path, scores.assign(fold=fold))
            done.append(pd.read_csv(path, dtype=dict(subject=str, scan=str, slice=str)))
            losses[system].append(pd.read_csv(path.with_suffix('.loss.csv')))
    ours,stock = (pd.concat(o, ignore_index=True) for o in tables.values())
    helped = set(split_of(cases).query('split=="valid"')['subject'])
    def compared(without=()):
        pair = [o[~o['subject'].isin(without)] for o in (ours,stock)]
        c = compare_scores(*pair, names=('ours','stock'), what='setting', simulated=is_simulated(a.data))
        return dict(subjects=c.n_subjects, dice={k: v['dice'] for k,v in c.metrics.items()}, difference=c.difference, ci90=c.ci90, ci95=c.ci95, verdict=c.verdict)
    res = dict(compared(), without_helped=compared(helped))
    by_subject = pd.DataFrame({k: o.groupby('subject')['dice'].mean() for k,o in (('ours',ours), ('stock',stock))}).round(5)
    by_subject['helped'] = by_subject.index.isin(helped)
    loss = {k: pd.concat(o).groupby('epoch')['loss'].mean().round(5).tolist() for k,o in losses.items()} # mean over folds
    write_json(a.out/'out_of_fold.json', dict(data=a.data.name, kind=a.kind, size=a.size, epochs=a.epochs, bf16=a.bf16, folds=a.folds, **res,
               machine=machine_name(environment(default_device())), by_subject=by_subject.sort_values('stock').to_dict('records'), loss=loss))
    for r,who in ((res, 'subjects'), (res['without_helped'], 'that did not help to find the recipe')):
        print('Mean over subjects of per-image Dice, ours minus stock: {:+.4f} (90 % {:+.4f} to {:+.4f}), '.format(r['difference'], *r['ci90']) +
              f"{r['subjects']} {who}, {a.folds} folds, {a.epochs} epochs of stock")
    return 0

if __name__=='__main__':
    try: sys.exit(main())
    except DataError as e: print(e, file=sys.stderr); sys.exit(2)
    except KeyboardInterrupt: print('\nInterrupted. Finished trainings are kept; the same command goes on.', file=sys.stderr); sys.exit(130)
