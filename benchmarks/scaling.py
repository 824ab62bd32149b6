"""Does the cost grow as the work does? Cases, check, split and score at 1×, 4× and 16×, each in a fresh process

    python benchmarks/scaling.py [--out benchmarks/results] [--quick]

Two made data sets, in a temporary folder: slices as pictures in the layout `adni` (250, 1,000 and 4,000 images, each
with a mask), and volumes in the layout `brats` (3,600, 14,400 and 57,000 axial slices). The volumes are gzipped NIfTI
files with four sequences and labels 0, 1, 2, 4, but of 48×48 instead of 240×240 pixels: native ones would take 25
times the room. What a slice costs beyond its pixels is real, the cost of pixels is that of smaller ones. Making the
data is not measured, nor is any network: predictions are the true masks, shifted.
"""
import argparse, gzip, json, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np, pandas as pd
from PIL import Image

from brainseg_fastai.core import write_text

SIZES = dict(adni=(250, 1000, 4000), brats=(3600, 14400, 57000)) # images; slices
QUICK = dict(adni=(24, 48, 96), brats=(64, 128, 256))
SLICES = dict(full=155, quick=8)                 # of a volume
TASKS = 'cases', 'check', 'split', 'score'
COLUMNS = ['data', 'task', 'workers', 'size', 'factor', 'seconds', 'seconds_per_item', 'cpu_seconds', 'peak_mb',
           'machine']

def ball(shape, centre, radii):
    "Distance from a centre, 1 on the ellipsoid"
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing='ij', sparse=True)
    return sum(((a-c)/r)**2 for a,c,r in zip(axes, centre, radii))**.5

def make_adni(root, n, side=256, seed=0):
    "`n` distinct noisy pictures of a head with dark ventricles, one to nine for each subject; masks are links to a few"
    rng = np.random.default_rng(seed)
    for d in ('orig', 'mask', '.base'): (root/d).mkdir(parents=True)
    base = []
    for i in range(16):
        c,r = rng.uniform(-.1, .1, 2), rng.uniform(.15, .3, 2)
        m,head = ball((side, side), c, r) < 1, ball((side, side), (0, 0), (.9, .75)) < 1
        base.append(np.where(head, 120, 0)-70*m+rng.normal(8, 5, m.shape)*head)
        Image.fromarray(m.astype(np.uint8)*255).save(root/'.base'/f'{i}.png')
    person = np.repeat(np.arange(n), rng.integers(1, 10, n))[:n]
    for i,s in enumerate(person):
        name = '{:03d}_S_{:04d}-I{}-{}-ax{}.png'.format(s//1000, s%1000, 30000+i, '{}', i%3)
        a = (base[i%16]+rng.integers(0, 3, side)).clip(0, 255).astype(np.uint8)   # another grey level in each column
        Image.fromarray(a).save(root/'orig'/name.format('orig'), compress_level=1)
        os.link(root/'.base'/f'{i%16}.png', root/'mask'/name.format('mask'))

def make_brats(root, n, slices, side=48, seed=0):
    "At least `n` axial slices in volumes of `slices`, all with brain; segmentations are links to a few"
    import nibabel as nib
    rng,shape,names = np.random.default_rng(seed), (side, side, slices), ('flair', 't1', 't1ce', 't2')
    def save(a, path):
        with gzip.open(path, 'wb', compresslevel=1) as f: f.write(nib.Nifti1Image(a,
                                                                                  np.diag([-1., -1, 1, 1])).to_bytes())
    (root/'.base').mkdir(parents=True)
    brain,base = ball(shape, (0, 0, 0), (.9, .8, 9)) < 1, []
    for i in range(8):
        t = ball(shape, rng.uniform(-.3, .3, 3), rng.uniform(.3, .5, 3))
        seg = (np.where(t<.3, 1, np.where(t<.6, 4, np.where(t<1, 2, 0)))*brain).astype(np.uint8)
        save(seg, root/'.base'/f'{i}.nii.gz')
        base.append([(np.choose(np.searchsorted((0, 1, 2, 4), seg), v)+rng.normal(0, 25, shape)).clip(1)*brain
                     for v in ((300, 420, 600, 520), (400, 260, 330, 300), (400, 240, 330, 900),
                               (300, 560, 520, 480))])
    for s in range(-(-n//slices)):
        d = root/'MICCAI_BraTS2020_TrainingData'/f'BraTS20_Training_{s+1:03d}'
        d.mkdir(parents=True)
        for k,a in zip(names, base[s%8]): save((a+brain*rng.integers(0, 9, (side, 1, 1))).astype(np.int16),
                                               d/f'{d.name}_{k}.nii.gz')
        os.link(root/'.base'/f'{s%8}.nii.gz', d/f'{d.name}_seg.nii.gz')

def task_of(name, layout, root):
    "What is timed, as a function of nothing, after all that is not"
    from brainseg_fastai.cli import find_layout
    lay,inputs = find_layout(layout), 'orig' if layout=='adni' else None
    if name=='cases': return lambda: lay.cases(root, inputs)
    if name=='check': return lambda: lay.check(root)
    cases = lay.cases(root, inputs)
    if name=='split':
        from brainseg_fastai.segmentation import split_cases
        return lambda: (split_cases(cases, 1), split_cases(cases, 5))
    from brainseg_fastai.images import read_mask
    from brainseg_fastai.scores import score_mask
    codes = tuple(lay.labels or (0, 255))
    regions = {k: tuple(map(codes.index, v)) for k,v in (lay.regions or {}).items()}
    def score():
        for o in cases.itertuples():
            truth = read_mask(o.mask, codes)
            score_mask(np.roll(truth, 1, axis=0), truth, spacing=o.spacing, n_codes=len(codes), regions=regions)
    return score

def one(name, layout, root, workers):
    "Time one task in this process; prints JSON"
    if workers: os.cpu_count = lambda: workers # the pool of threads has no more of them than the machine has cores
    f = task_of(name, layout, Path(root))
    t,c = time.perf_counter(), time.process_time()
    f()
    print(json.dumps(dict(seconds=time.perf_counter()-t, cpu_seconds=time.process_time()-c, peak_mb=peak_mb())))

def peak_mb():
    "Largest resident size of this process so far"
    # Linux: there, `getrusage` begins with the size of the process that started this one
    status = Path('/proc/self/status')
    if status.exists(): return int(next(l.split()[1] for l in status.read_text().splitlines()
                                        if l.startswith('VmHWM')))/2**10
    try: import resource
    except ImportError: return float('nan') # Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20 # macOS counts bytes

def fresh(name, layout, root, cache, workers=None):
    "The same in a fresh process"
    cmd = [sys.executable, __file__, '--task', name, '--layout', layout, '--data', str(root),
           *(['--workers', str(workers)] if workers else [])]
    r = subprocess.run(cmd, env={**os.environ, 'BRAINSEG_CACHE': str(cache)}, capture_output=True, text=True)
    if r.returncode: raise SystemExit(f'{" ".join(cmd)}\n{r.stderr}')
    return json.loads(r.stdout.splitlines()[-1])

def machine():
    name = next((l.split(':', 1)[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines()
                 if l.startswith('model name')),
                None) if Path('/proc/cpuinfo').exists() else None
    import platform
    return f'{name or platform.processor() or platform.machine()}, {os.cpu_count()} cores'

def measure(layout, sizes, slices, tmp):
    "Rows of the table for one layout, as they are ready; the check also with one worker, except at the smallest size"
    make = dict(adni=make_adni, brats=lambda r,n: make_brats(r, n, slices))[layout]
    for n in sizes:
        root,cache = tmp/layout, tmp/'cache'
        first,factor = n==sizes[0], round(n/sizes[0])
        make(root, n)
        if layout=='brats': n = -(-n//slices)*slices
        for name in TASKS:
            for w in (None, 1) if name=='check' and not first else (None,):
                # nothing is known of the files yet
                if name in ('cases', 'check'): shutil.rmtree(cache, ignore_errors=True)
                d = fresh(name, layout, root, cache, w)
                each = f'{1e3*d["seconds"]/n:.2f} ms each'
                print(f'{layout} {name} {n}: {d["seconds"]:.2f} s, {each}, {d["peak_mb"]:.0f} MB', flush=True)
                yield dict(data=layout, task=name, workers=w or '', size=n, factor=factor,
                           seconds_per_item=d['seconds']/n, **d)
        for d in (root, cache): shutil.rmtree(d, ignore_errors=True)

def markdown(t):
    "The table for people"
    lines = ['# Cost that grows as the work does', '',
             f'{t["machine"].iloc[0]}. Each figure from a fresh process that knows nothing of the files '
             'before `cases` and `check`. Making the data, imports and networks are not measured. A ratio of 1 is '
             'linear. Processor time counts all threads and does not suffer when other programs run beside; where it '
             'grows less than the seconds, they did.', '']
    for data,what in (('adni', 'images with masks, 256×256 PNG'),
                      ('brats', 'axial slices of gzipped volumes, 48×48 pixels, four sequences')):
        d = t[t['data']==data]
        sizes = sorted(d['size'].unique())
        if not len(d): continue
        lines += [f'## {" / ".join(f"{n:,}" for n in sizes)} {what}', '',
                  '| | seconds | ms each | processor ms each | ratio, largest to smallest | peak MB |',
                  '|---|---|---|---|---|---|']
        for (task,w),g in d.groupby(['task','workers'], sort=False):
            g = g.sort_values('size')
            ms,cpu = 1e3*g['seconds_per_item'], 1e3*g['cpu_seconds']/g['size']
            def cell(v, n): return ' / '.join(f'{o:{n}}' for o in v)
            name = f'{task}, {w} worker' if w else task
            ratio = f'{ms.iloc[-1]/ms.iloc[0]:.2f}, processor {cpu.iloc[-1]/cpu.iloc[0]:.2f}'
            cells = cell(g['seconds'], '.2f'), cell(ms, '.3f'), cell(cpu, '.3f'), ratio, cell(g['peak_mb'], '.0f')
            lines.append(f'| {name} | {" | ".join(cells)} |')
        lines.append('')
    return '\n'.join(lines)

def write(rows, out):
    "scaling.csv and scaling.md of what was measured so far"
    t = pd.DataFrame(rows).assign(machine=machine())[COLUMNS]
    write_text(out/'scaling.csv', t.to_csv(index=False, lineterminator='\n', float_format='%.6g'))
    write_text(out/'scaling.md', markdown(t).rstrip()+'\n')
    return t

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'results',
                   help='folder for scaling.csv and scaling.md')
    p.add_argument('--quick', action='store_true', help='tiny sizes, to see that it works')
    p.add_argument('--only', choices=[*SIZES], help='one of the two data sets')
    for o in ('--task','--layout','--data'): p.add_argument(o, help=argparse.SUPPRESS)
    p.add_argument('--workers', type=int, help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.task: return one(a.task, a.layout, a.data, a.workers)
    rows,key = [], 'quick' if a.quick else 'full'
    for layout,sizes in (QUICK if a.quick else SIZES).items():
        if a.only in (None, layout):
            with tempfile.TemporaryDirectory() as d:
                for o in measure(layout, sizes, SLICES[key], Path(d)):
                    rows.append(o)
                    t = write(rows, a.out)
    print(markdown(t))

if __name__ == '__main__': main()
