"Cost grows as the work does: operations are counted, nothing is timed"
import csv, os, subprocess, sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from brainseg_fastai import cases as C, datasets, prediction, scores, segmentation
from brainseg_fastai.cases import Pixels, adni_cases, check_cases, data_fingerprint, read_mask
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

@pytest.fixture
def fresh(tmp_path, monkeypatch):
    "Nothing is known of any file"
    monkeypatch.setenv('BRAINSEG_CACHE', str(tmp_path/'cache'))
    for f in (C._look_at, C._facts_at, C._volume_at): f.cache_clear()

# --- files are opened once, however many rows refer to them ---

def test_check_decodes_every_picture_once_although_two_kinds_share_the_masks(fresh, tmp_path, monkeypatch):
    root = make_folder(tmp_path/'d', 4, 3); n = counted(monkeypatch, C, '_decode')
    check_cases(root)
    assert len(n)==3*12 and set(n.values())=={1}
    for kind in ('brain', 'orig'): data_fingerprint(adni_cases(root, kind))
    assert set(n.values())=={1}

def test_volumes_are_unpacked_once_to_check_and_once_to_read_them_by_slices(fresh, tmp_path, monkeypatch):
    root = tiny('brats', tmp_path/'d', 3); n,opened = counted(monkeypatch, C, '_whole'), counted(monkeypatch, C, '_header')
    datasets.find_layout('brats').check(root)
    assert len(n)>=5*3 and set(n.values())=={1}
    t = datasets.brats_cases(root); assert len(t)>3*20 # many rows to a file
    data_fingerprint(t)
    assert set(n.values())=={1} # all is known already
    for o in t['mask']: read_mask(o, (0,1,2,4))
    masks = {o.files[0] for o in t['mask']}
    assert len(masks)==3 and {n[o] for o in masks}=={2}, n # looked at; then unpacked to a file that is memory-mapped
    assert {opened[o] for o in masks}=={3}, opened

def test_what_is_kept_of_a_volume_is_small_however_many_voxels_it_has(fresh, tmp_path):
    root = tiny('brats', tmp_path/'d', 3)
    facts = C._look_jobs([(p, 'seg' in p.name) for p in root.rglob('*.nii.gz')])
    def numbers(o): return sum(map(numbers, o.values() if isinstance(o, dict) else o)) if isinstance(o, (dict, list, tuple)) else 1
    assert all(not isinstance(o, np.ndarray) for f in facts.values() for o in f.values())
    assert max(map(numbers, facts.values())) < 200 # 73,728 voxels each

def test_no_more_volumes_are_in_memory_at_once_than_there_are_workers(fresh, tmp_path, monkeypatch):
    import threading
    root,most,now,lock = tiny('brats', tmp_path/'d', 3), [0], [0], threading.Lock(); f = C._measure
    def g(path):
        with lock: now[0] += 1; most[0] = max(most[0], now[0])
        try: return f(path)
        finally:
            with lock: now[0] -= 1
    monkeypatch.setattr(C, '_measure', g); monkeypatch.setattr(C.os, 'cpu_count', lambda: 2)
    datasets.find_layout('brats').check(root)
    assert 1<=most[0]<=2 and now[0]==0

def test_a_folder_is_listed_without_a_question_about_every_file(tmp_path, monkeypatch):
    root = make_folder(tmp_path/'d', 5, 4); n = counted(monkeypatch, C.os, 'scandir')
    monkeypatch.setattr(Path, 'is_file', None) # the listing itself must tell
    assert len(C._files(root))==60 and sum(n.values())==4

@pytest.mark.skipif(os.name=='nt', reason='links take rights on Windows')
def test_the_walk_finds_what_pathlib_finds(tmp_path):
    for o in ('b/x.png', 'b/.hid/y.png', '.z/w.png', 'a.b/c d/é.png', 'B/x.png', '.dot.png', 'b-1/q.png'):
        (tmp_path/'d'/o).parent.mkdir(parents=True, exist_ok=True); (tmp_path/'d'/o).write_bytes(b'')
    (tmp_path/'d'/'link').symlink_to(tmp_path/'d'/'b'); (tmp_path/'d'/'f.png').symlink_to(tmp_path/'d'/'b'/'x.png')
    (tmp_path/'d'/'dead.png').symlink_to(tmp_path/'nothing')
    want = [p for p in (tmp_path/'d').rglob('*') if p.is_file() and 'link' not in p.parts
            and not any(o.startswith('.') for o in p.relative_to(tmp_path/'d').parts)]
    assert C._files(tmp_path/'d')==sorted(want, key=lambda p: p.as_posix()) and len(want)==5
    assert C._files(tmp_path/'none')==[]

# --- work in proportion to the rows ---

class Asked(dict):
    "A dict that counts how often it is asked"
    n = 0
    def __getitem__(self, k): self.n += 1; return dict.__getitem__(self, k)

@pytest.mark.parametrize('groups', [1, 3])
def test_folds_are_filled_with_a_fixed_number_of_steps_per_subject(groups):
    def steps(n):
        counts,group = Asked({f'S{i}': 1+i%7 for i in range(n)}), Asked({f'S{i}': i%groups for i in range(n)})
        res = segmentation._fill_folds(list(counts), {}, counts, group, 5)
        load = np.bincount(list(res.values()), weights=[counts[s] for s in res])
        assert len(res)==n and np.ptp(load)<=7*groups
        return counts.n+group.n
    assert steps(1600)==4*steps(400)

def subset_of_old(counts, target):
    "`closest_subset` as it was: every sum up to the last, at every step"
    names,ns = list(counts), list(counts.values()); last = np.full(sum(ns)+1, len(ns)); last[0] = -1
    for i,n in enumerate(ns):
        sums = np.flatnonzero(last[:-n] < i) + n
        last[sums[last[sums]==len(ns)]] = i
    sums = np.flatnonzero(last < len(ns))[1:]; s = int(sums[np.abs(sums-target).argmin()]); res = set()
    while s: i = last[s]; res.add(names[i]); s -= ns[i]
    return res

def test_the_subset_is_the_one_that_a_search_through_all_sums_finds():
    r = np.random.default_rng(0)
    for _ in range(400):
        n = r.integers(1, 40); counts = dict(zip(map(str, range(n)), r.integers(1, r.choice([2, 9, 200]), n).tolist()))
        target = r.choice([1, .5, r.uniform(0, 1.2)*sum(counts.values())])
        assert segmentation.closest_subset(counts, target)==subset_of_old(counts, target)

def test_the_search_for_a_subset_ends_when_nothing_can_come_closer(monkeypatch):
    looked,f = [0], np.flatnonzero
    def g(a): looked[0] += len(a); return f(a)
    monkeypatch.setattr(segmentation.np, 'flatnonzero', g)
    counts = {str(i): 1+i%9 for i in range(2000)}; total = sum(counts.values())
    segmentation.closest_subset(counts, .15*total)
    assert looked[0] < .03*total*len(counts) # all sums at every step would be 1, those that could be reached so far .5

def test_many_copies_of_one_picture_are_compared_with_the_first_only():
    def steps(n):
        rows = [Asked(subject='AB'[i==n//2], kind='brain', image=f'{i}.png') for i in range(n)]
        facts = {o['image']: dict(error=None, constant=False, sha='1') for o in rows}
        ps = list(C._duplicate_problems(rows, str, facts))
        assert len(ps)==n-1 and {p['level'] for p in ps}=={'error'}
        return sum(o.n for o in rows)
    assert steps(800) < 4.2*steps(200)

def test_a_mask_is_scored_with_one_search_per_direction_and_structure(monkeypatch):
    import scipy.spatial
    n = counted(monkeypatch, scipy.spatial, 'KDTree')
    a = np.zeros((40,40), np.uint8); a[5:20,5:20] = 1; a[8:12,8:12] = 2
    for k in range(5): scores.score_mask(np.roll(a, k, 1), a, n_codes=3)
    assert sum(n.values())==5*2*2

class Net(torch.nn.Module):
    "Says where it is bright, and keeps what it saw"
    def __init__(self): super().__init__(); self.seen = []
    def forward(self, x):
        self.seen.append((x.shape, torch.is_inference_mode_enabled(), x.is_contiguous(memory_format=torch.channels_last)))
        return torch.cat([0*x+100, x], 1)

def learner(net, size=64):
    return SimpleNamespace(model=net, steps=None, bundle=dict(settings=dict(size=size)),
                           dls=SimpleNamespace(device=torch.device('cpu'), valid=SimpleNamespace(after_batch=SimpleNamespace(fs=[]))))

@pytest.mark.parametrize('n', [1, 16, 40])
def test_pictures_are_predicted_in_batches_without_gradients_in_channels_last(n):
    pics = np.random.default_rng(0).integers(0, 256, (n,64,64)).astype(np.uint8); net = Net()
    both,plain,mirrored = prediction.predict_slices(learner(net), pics)
    assert (both==(pics>100)).all() and (plain==both).all() and (mirrored==both).all()
    assert len(net.seen)==2*-(-n//16) and all(i and c for _,i,c in net.seen) # once more for the mirror image
    assert sum(s[0] for s,*_ in net.seen)==2*n

def test_widths_are_those_of_every_column_by_itself():
    r = np.random.default_rng(0)
    for p in (.02, .3, 1.1):
        m = r.random((30,20,5)) < p; w = prediction._widths(m)
        for y in range(20):
            for k in range(5):
                on = np.flatnonzero(m[:,y,k]); assert w[y,k]==(np.ptp(on)+1 if len(on) else 0)

# --- nothing heavy is imported for light work ---

def imported(code, *names, **env):
    "Which of the modules a fresh process has imported after the code"
    code = f'{code}\nimport sys; print("|".join(m for m in {names!r} if m in sys.modules))'
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=HERE.parent, env={**os.environ, **env})
    assert r.returncode==0, r.stderr
    return r.stdout.splitlines()[-1]

HEAVY = 'torch', 'fastai', 'monai', 'torchvision', 'matplotlib', 'nibabel', 'scipy'

def test_the_package_and_its_help_import_nothing_heavy():
    assert imported('import brainseg_fastai', *HEAVY, 'numpy', 'pandas')==''
    assert imported('from brainseg_fastai import cli\ntry: cli.main(["--help"])\nexcept SystemExit: pass', *HEAVY, 'numpy', 'pandas')==''

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
    r = subprocess.run([sys.executable, 'benchmarks/scaling.py', '--quick', '--only', 'adni', '--out', str(tmp_path)], capture_output=True,
                       text=True, cwd=HERE.parent)
    assert r.returncode==0, r.stderr
    rows = list(csv.DictReader((tmp_path/'scaling.csv').open()))
    assert {o['task'] for o in rows}=={'cases', 'check', 'split', 'score'} and {o['factor'] for o in rows}=={'1', '2', '4'}
    assert all(float(o['seconds'])>0 and float(o['peak_mb'])>0 and o['machine'] for o in rows)
    assert abs(float(rows[0]['seconds'])/int(rows[0]['size'])-float(rows[0]['seconds_per_item']))<1e-4
    assert '| score |' in (tmp_path/'scaling.md').read_text()

def test_the_made_volumes_have_as_many_slices_as_they_say(tmp_path, monkeypatch):
    monkeypatch.setenv('BRAINSEG_CACHE', str(tmp_path/'cache')); monkeypatch.syspath_prepend(HERE.parent/'benchmarks')
    import scaling
    scaling.make_brats(tmp_path/'d', 20, 8, side=24)
    assert len(datasets.brats_cases(tmp_path/'d'))==24
    ps = datasets.find_layout('brats').check(tmp_path/'d')
    assert not (ps['level']=='error').any(), ps
    scaling.make_adni(tmp_path/'a', 24, 64)
    assert len(adni_cases(tmp_path/'a', 'orig'))==24 and not (check_cases(tmp_path/'a')['level']=='error').any()
