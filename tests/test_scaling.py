"Cost grows as the work does: operations are counted, nothing is timed"
import csv, os, subprocess, sys
from collections import Counter
from pathlib import Path

import numpy as np, pytest, torch
from brainseg_fastai import scores, splits
from brainseg_fastai.inference import Frame, Model, predict
from helpers import make_folder
from tiny import tiny

HERE = Path(__file__).parent

def counted(monkeypatch, module, name):
    "Calls of a function by its first argument"
    n,f = Counter(), getattr(module, name)
    def g(*args, **kwargs):
        n[str(args[0])] += 1
        return f(*args, **kwargs)
    monkeypatch.setattr(module, name, g)
    return n

# --- work in proportion to the rows ---

class Asked(dict):
    "A dict that counts how often it is asked"
    n = 0
    def __getitem__(self, k):
        self.n += 1
        return dict.__getitem__(self, k)

@pytest.mark.parametrize('groups', [1, 3])
def test_folds_are_filled_with_a_fixed_number_of_steps_per_subject(groups):
    def steps(n):
        counts,group = Asked({f'S{i}': 1+i%7 for i in range(n)}), Asked({f'S{i}': i%groups for i in range(n)})
        res = splits.fill_folds(counts, group, 5, list(counts))
        load = np.bincount(list(res.values()), weights=[counts[s] for s in res])
        assert len(res)==n and np.ptp(load)<=7*groups
        return counts.n+group.n
    assert steps(1600)==4*steps(400)

def subset_of_old(counts, target):
    "`closest_subset` as it was: every sum up to the last, at every step"
    names,ns = list(counts), list(counts.values())
    last = np.full(sum(ns)+1, len(ns))
    last[0] = -1
    for i,n in enumerate(ns):
        sums = np.flatnonzero(last[:-n] < i) + n
        last[sums[last[sums]==len(ns)]] = i
    sums = np.flatnonzero(last < len(ns))[1:]
    s,res = int(sums[np.abs(sums-target).argmin()]), set()
    while s:
        i = last[s]
        res.add(names[i])
        s -= ns[i]
    return res

def test_the_subset_is_the_one_that_a_search_through_all_sums_finds():
    r = np.random.default_rng(0)
    for _ in range(400):
        n = r.integers(1, 40)
        counts = dict(zip(map(str, range(n)), r.integers(1, r.choice([2, 9, 200]), n).tolist()))
        target = r.choice([1, .5, r.uniform(0, 1.2)*sum(counts.values())])
        assert splits.closest_subset(counts, target)==subset_of_old(counts, target)

def test_the_search_for_a_subset_ends_when_nothing_can_come_closer(monkeypatch):
    looked,f = [0], np.flatnonzero
    def g(a):
        looked[0] += len(a)
        return f(a)
    monkeypatch.setattr(splits.np, 'flatnonzero', g)
    counts = {str(i): 1+i%9 for i in range(2000)}
    total = sum(counts.values())
    splits.closest_subset(counts, .15*total)
    # all sums at every step would be 1, those that could be reached so far .5
    assert looked[0] < .03*total*len(counts)

def test_a_mask_is_scored_with_one_search_per_direction_and_structure(monkeypatch):
    n,a = counted(monkeypatch, scores, 'KDTree'), np.zeros((40,40), np.uint8)
    a[5:20,5:20] = 1
    a[8:12,8:12] = 2
    for k in range(5): scores.score_mask(np.roll(a, k, 1), a, n_codes=3)
    assert sum(n.values())==5*2*2

class Net(torch.nn.Module):
    "Says where it is brighter than the mean, and keeps what it saw"
    def __init__(self):
        super().__init__()
        self.seen = []
    def forward(self, x):
        flat = x.is_contiguous(memory_format=torch.channels_last)
        self.seen.append((len(x), torch.is_inference_mode_enabled(), flat))
        return torch.cat([-x, x], 1)

@pytest.mark.parametrize('n', [1, 16, 40])
def test_pictures_are_predicted_in_batches_without_gradients_in_channels_last(n):
    pics = np.random.default_rng(0).integers(0, 256, (n,64,64)).astype(np.uint8)
    net = Net()
    masks = predict(Model(net, Frame(size=64)), pics)
    bright = pics > pics.mean((1,2), keepdims=True)
    assert all((o==bright).all() for o in masks)
    assert len(net.seen)==2*-(-n//8) and all(i and c for _,i,c in net.seen) # once more for the mirror image
    assert sum(k for k,*_ in net.seen)==2*n

# --- nothing heavy is imported for light work ---

def imported(code, *names, **env):
    "Which of the modules a fresh process has imported after the code"
    code = f'{code}\nimport sys; print("|".join(m for m in {names!r} if m in sys.modules))'
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=HERE.parent,
                       env={**os.environ, **env})
    assert r.returncode==0, r.stderr
    return r.stdout.splitlines()[-1]

HEAVY = 'torch', 'fastai', 'monai', 'torchvision', 'matplotlib', 'nibabel', 'scipy'

def test_the_package_and_its_help_import_nothing_heavy():
    assert imported('import brainseg_fastai', *HEAVY, 'numpy', 'pandas')==''
    assert imported('from brainseg_fastai import cli\ntry: cli.main(["--help"])\nexcept SystemExit: pass', *HEAVY,
                    'numpy', 'pandas')==''

def test_checking_slices_imports_nothing_heavy(tmp_path):
    root = make_folder(tmp_path/'d', 3, 1)
    assert imported(f'from brainseg_fastai import cli\nassert cli.main(["check", {str(root)!r}])==0', *HEAVY)==''

def test_checking_volumes_imports_no_deep_learning(tmp_path):
    root,deep = tiny('brats', tmp_path/'d', 3), ('torch', 'fastai', 'monai', 'torchvision', 'matplotlib')
    assert imported(f'from brainseg_fastai import cli\nassert cli.main(["check", {str(root)!r}, "--layout", "brats"])==0', *deep,
                    BRAINSEG_CACHE=str(tmp_path/'cache'))==''

# --- the benchmark itself ---

@pytest.mark.slow
def test_the_benchmark_runs_and_writes_what_it_says(tmp_path):
    r = subprocess.run([sys.executable, 'benchmarks/scaling.py', '--quick', '--only', 'adni', '--out', str(tmp_path)],
                       capture_output=True,
                       text=True, cwd=HERE.parent)
    assert r.returncode==0, r.stderr
    rows = list(csv.DictReader((tmp_path/'scaling.csv').open()))
    assert {o['task'] for o in rows}=={'cases', 'check', 'split', 'score'} and {o['factor'] for o in rows}=={'1', '2',
                                                                                                             '4'}
    assert all(float(o['seconds'])>0 and float(o['peak_mb'])>0 and o['machine'] for o in rows)
    assert abs(float(rows[0]['seconds'])/int(rows[0]['size'])-float(rows[0]['seconds_per_item']))<1e-4
    assert '| score |' in (tmp_path/'scaling.md').read_text()
