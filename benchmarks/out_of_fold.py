"""Is the speed paid for in quality? Ours as it is against fastai's `unet_learner` trained until it no longer gets better, on unseen subjects

    python benchmarks/out_of_fold.py DATA --epochs 20

Every subject is tested once. Each training leaves one table in OUT/out_of_fold, so that the same command goes on after an interruption."""
import argparse, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pandas as pd, torch
from fastai.torch_core import set_seed
from brainseg_fastai.cases import DataError, adni_cases, is_simulated, mask_codes, read_mask
from brainseg_fastai.scores import score_mask
from brainseg_fastai.segmentation import split_cases, with_split, write_csv, write_json
from brainseg_fastai.stats import compare_scores
from systems import SYSTEMS

class Progress:
    "Stands in for the benchmark's clock: nothing is stopped, and the time left is shown"
    stopped = False
    def __init__(self, steps, name): self.steps,self.name,self.n,self.began = steps,name,0,time.time()
    def start(self): pass
    def pause(self): pass
    def loaded(self): pass
    def step(self, images, loss):
        self.n += 1
        left = (time.time()-self.began)*(self.steps/self.n-1)
        if sys.stderr.isatty(): print(f'\r{self.name}: step {self.n} of {self.steps}, about {left/60:.0f} min left ', end='', file=sys.stderr)
        return False

def tested(
    system, # Name, as in `SYSTEMS`
    cases,  # Case table with the column `split`
    size, seed,
    epochs  # None: as many as the system takes by itself
)->pd.DataFrame: # Scores of the test rows
    "Train a system on one fold, and score its test subjects"
    codes = list(mask_codes(cases['mask']))
    set_seed(seed, reproducible=True)
    s = SYSTEMS[system](cases, codes, size, seed, False, epochs)
    s.train(Progress((epochs or s.about['epochs'])*len(s.learn.dls.train), system))
    test = cases[cases['split']=='test'].reset_index(drop=True)
    s.model.eval()
    with torch.no_grad(): preds = s.predict_all(test)
    def row(o, p): return dict(subject=o.subject, scan=o.scan, slice=o.slice, **score_mask(p, read_mask(o.mask, codes), n_codes=len(codes)))
    return pd.DataFrame([row(o, p) for o,p in zip(test.itertuples(), preds)]).assign(kind=system, seed=seed)

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('data', type=Path, help='folder with mask/ and the images')
    p.add_argument('--out', default=HERE/'results', type=Path, help='folder for results (default benchmarks/results)')
    p.add_argument('--kind', default='orig', help='folder of the images within DATA (default orig, the full skull)')
    p.add_argument('--size', type=int, default=256, help='pixels (default 256)')
    p.add_argument('--folds', type=int, default=3)
    p.add_argument('--epochs', type=int, default=20, help="of stock; ours takes its own number (default 20)")
    p.add_argument('--threads', type=int, default=2)
    a = p.parse_args(args)
    torch.set_num_threads(a.threads)
    cases = adni_cases(a.data, a.kind)
    split,tables = split_cases(cases, a.folds), {'ours': [], 'stock': []}
    for fold in sorted(split['fold'].unique()):
        for system,done in tables.items():
            epochs = a.epochs if system=='stock' else None
            path = a.out/'out_of_fold'/f"{a.kind}-{a.size}-{system}-{epochs or 'own'}-fold{fold}of{a.folds}.csv"
            if not path.exists():
                print(f'{system}, fold {fold+1} of {a.folds}', flush=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_csv(path, tested(system, with_split(cases, split, fold), a.size, 42+int(fold), epochs).assign(fold=fold))
            done.append(pd.read_csv(path, dtype=dict(subject=str, scan=str, slice=str)))
    ours,stock = (pd.concat(o, ignore_index=True) for o in tables.values())
    c = compare_scores(ours, stock, names=('ours','stock'), what='setting', simulated=is_simulated(a.data))
    write_json(a.out/'out_of_fold.json', dict(data=a.data.name, kind=a.kind, size=a.size, epochs=a.epochs, folds=a.folds, subjects=c.n_subjects,
               dice={k: v['dice'] for k,v in c.metrics.items()}, difference=c.difference, ci90=c.ci90, ci95=c.ci95, verdict=c.verdict))
    print(f"Mean over subjects of per-image Dice, ours minus stock: {c.difference:+.4f} (90 % {c.ci90[0]:+.4f} to {c.ci90[1]:+.4f}), "
          f'{c.n_subjects} subjects, {a.folds} folds, {a.epochs} epochs of stock')
    return 0

if __name__=='__main__':
    try: sys.exit(main())
    except DataError as e: print(e, file=sys.stderr); sys.exit(2)
    except KeyboardInterrupt: print('\nInterrupted. Finished trainings are kept; the same command goes on.', file=sys.stderr); sys.exit(130)
