"Tiny folders in the ADNI layout, and where to find the development data"
import os
from pathlib import Path

import numpy as np
from PIL import Image

def _ellipse(n, cx, cy, rx, ry):
    y,x = np.mgrid[-1:1:n*1j, -1:1:n*1j]
    return ((x-cx)/rx)**2 + ((y-cy)/ry)**2 < 1

def draw_case(rng, size=64):
    "A dark 'ventricle' with a bright rim on noise, as a skull-stripped slice, one with a skull, and a 0/1 mask"
    cx,cy,rx,ry = rng.uniform(-.2,.2), rng.uniform(-.2,.2), rng.uniform(.15,.3), rng.uniform(.2,.4)
    mask,rim,head = _ellipse(size,cx,cy,rx,ry), _ellipse(size,cx,cy,rx+.1,ry+.1), _ellipse(size,0,0,.8,.85)
    brain = np.where(head, 110, 10) + 90*(rim & ~mask) - 70*mask + rng.normal(0, 8, mask.shape)
    orig = np.where(_ellipse(size,0,0,.97,.99) & ~_ellipse(size,0,0,.88,.92), 230, brain)
    return dict(brain=brain.clip(0,255).astype(np.uint8), orig=orig.clip(0,255).astype(np.uint8), mask=mask.astype(np.uint8))

def make_folder(root, n_subjects, scans, kinds=('brain','orig'), size=64, mask_value=255, seed=0):
    "Write `n_subjects` × `scans` cases below `root`, named as in ADNI; returns `root`"
    root,rng = Path(root), np.random.default_rng(seed)
    for k in (*kinds, 'mask'): (root/k).mkdir(parents=True, exist_ok=True)
    for s in range(n_subjects):
        for i in range(scans):
            case = draw_case(rng, size); case['mask'] *= mask_value
            for k in (*kinds, 'mask'): Image.fromarray(case[k]).save(root/k/f'{s:03d}_S_{1000+s}-I{30000+10*s+i}-{k}-ax3.png')
    return root

def dataset(name):
    "Folder of a development data set, below `BRAINSEG_DATA` or that folder itself; the test is skipped where there is none"
    import pytest
    base = os.environ.get('BRAINSEG_DATA')
    if not base: pytest.skip('BRAINSEG_DATA does not point to the development data')
    root = next((d for d in (Path(base)/name, Path(base), Path(base).parent/name) if d.name==name and d.is_dir()), None)
    if root is None: pytest.skip(f'no data set {name} in BRAINSEG_DATA ({base})')
    return root
