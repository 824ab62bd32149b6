"What models of ventricles do on real heads: Dice, volume, and whether what is said of a mask without a label holds"
import argparse, os
from pathlib import Path

import nibabel as nib, numpy as np, pandas as pd
from nibabel.processing import resample_from_to
from brainseg_fastai.core import DataError
from brainseg_fastai.images import read_image
from brainseg_fastai.prediction import predict_scan
from brainseg_fastai.runs import load_bundle
from brainseg_fastai.scans import read_scan
from brainseg_fastai.trust import agreement

VENTRICLES = 4, 5, 14, 15, 43, 44 # FreeSurfer's lateral ventricles with lower horns, the third and the fourth
CLAIMED = 4, 5, 14, 43, 44
HEADS = { # scan: labels
    'real_heads/ecog/mri/T1.mgz': 'real_heads/ecog/mri/aseg.mgz',
    'real_heads/ecog/mri/brainmask.mgz': 'real_heads/ecog/mri/aseg.mgz',
    'real_heads/bert/mri/brainmask.mgz': 'real_heads/bert/mri/aseg.mgz',
    'real_heads/mrtrix_fs/mri/norm.mgz': 'real_heads/mrtrix_fs/mri/aparc+aseg.mgz',
    'real_heads/mrtrix_bids/sub-01_T1w.nii.gz': 'real_heads/mrtrix_bids/aparc+aseg.mgz',
    'colin27/colin27_T1w_head.nii.gz': None, 'colin27/colin27_T1w_brain.nii.gz': None}

def truth_of(file, scan, codes=CLAIMED):
    "The label's ventricles on the grid of a scan"
    im,to = (nib.as_closest_canonical(o) for o in (nib.load(file), scan.like))
    m = nib.Nifti1Image(np.isin(np.asanyarray(im.dataobj), codes).astype(np.float32), im.affine)
    return np.asanyarray(resample_from_to(m, (to.shape[:3], to.affine), order=1).dataobj)>.5

def scans(data):
    "Scan, and true mask or None"
    for name,label in HEADS.items():
        scan = read_scan(data/name)
        yield name, scan, truth_of(data/label, scan) if label else None
    for f in sorted((data/'oasis_slices'/'brain').glob('*.png')):
        scan = read_scan(f, 1.)
        yield f.name, scan, read_image(f.parents[1]/'mask'/f.name.replace('brain', 'mask'))>0

def row(model, scan, truth):
    try: p = predict_scan(model, scan)
    except DataError as e: return dict(refused=str(e))
    here,r = list(p.slices) if scan.is_volume else ..., p.rows[0]
    res = dict(ml=r['volume_ml'], quality=p.quality, expected=p.predicted['text'], flags=len(p.flags))
    if truth is None: return res
    if scan.is_volume and not np.isnan(r['volume_ml']): res['true_ml'] = truth.sum()*np.prod(scan.spacing)/1000
    m,t = (o[:,:,here] if scan.is_volume else o for o in (p.mask, truth))
    dice,said = agreement(m, t.astype(np.uint8)), p.predicted
    return res | dict(dice=dice, holds=None if said['dice'] is None else said['low']<=dice<=said['high'])

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('bundles', nargs='*', default=['ventricles'], help='bundles; the ready model if none is named')
    p.add_argument('--out', type=Path, default=Path('real_heads.csv'), help='table to write')
    a = p.parse_args()
    data = Path(os.environ.get('BRAINSEG_DATA', ''))
    if not (data/'real_heads').is_dir():
        p.error('BRAINSEG_DATA names no folder with real_heads, oasis_slices and colin27')
    models = {str(o): load_bundle(o, 'cpu') for o in a.bundles}
    t = pd.DataFrame([dict(bundle=k, scan=name) | row(m, scan, truth)
        for name,scan,truth in scans(data) for k,m in models.items()]).round(3)
    t.to_csv(a.out, index=False)
    print(t.to_string())
    some = t[t['dice'].notna()]
    given,bad,good = some['holds'].dropna(), some['dice']<.7, some['dice']>.85
    silent,flagged = (some['flags']==0)[bad].sum(), (some['flags']>0)[good].sum()
    print(f'{given.mean():.0%} of {len(given)} intervals hold')
    print(f'{silent} of {bad.sum()} scans below 0.7 are not flagged; {flagged} of {good.sum()} above 0.85 are flagged')

if __name__=='__main__': main()
