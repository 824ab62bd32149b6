"A run that never happened, to try reports on: images, predictions, and the tables that a real run writes"
from pathlib import Path

import numpy as np, pandas as pd
from PIL import Image

from brainseg_fastai.stats import compare_scores
from helpers import draw_case

def write(path, a):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a.astype(np.uint8)).save(path)
    return path

def toy_case(root, i, j, rng, size):
    "Rows of the score table of one slice, with and without skull; predictions are the truth, moved"
    case,subject,scan = draw_case(rng, size), f'{i:03d}_S_{1000+7*i}', f'I{100*i+j}'
    truth = case['mask']>0
    mask = write(root/f'data/mask/{subject}-{scan}-mask-ax3.png', 255*truth)
    for variant,error in (('brain',1), ('orig',1.6)):
        name = f'{subject}-{scan}-{variant}-ax3.png'
        pred = np.roll(truth, 1+rng.normal(0, error*(1+i%3), 2).round().astype(int), (0,1))
        dice = 2*(truth&pred).sum()/(truth.sum()+pred.sum())
        write(root/'out/predictions'/name, pred)
        yield dict(variant=variant, fold=i%3, seed=0, subject=subject, scan=scan, slice='ax3', image=str(write(root/'data'/variant/name, case[variant])),
                   mask=str(mask), dice=dice, jaccard=dice/(2-dice), size_true=truth.sum(), size_pred=pred.sum(), unit='px',
                   prediction=f'predictions/{name}')

def toy_run(root, n=6, scans=2, size=64, seed=0):
    "Arguments of `compare_report`"
    root,rng = Path(root),np.random.default_rng(seed)
    scores = pd.DataFrame([r for i in range(n) for j in range(scans) for r in toy_case(root, i, j, rng, size)])
    a,b = (scores[scores.variant==v] for v in ('brain','orig'))
    e = np.arange(8)
    curves = pd.concat([pd.DataFrame(dict(variant=v, fold=f, seed=seed, epoch=e, valid_dice=.9-.7*(.5+.04*f)**e))
                        for v in ('brain','orig') for f in range(3)])
    split = pd.concat([a[['image','subject']].assign(fold=f, split=[('test','valid','train')[(g-f)%3] for g in a.fold]) for f in range(3)])
    comparison = {**compare_scores(a, b, simulated=True).to_dict(), 'control': None}
    return dict(comparison=comparison, scores=scores, curves=curves, split=split, out=root/'out')
