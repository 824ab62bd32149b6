"Files are opened once, however many rows refer to them; a folder is listed once; operations are counted, nothing is timed"
import os, threading
from collections import Counter
from pathlib import Path

import numpy as np, pandas as pd, pytest

from brainseg_fastai import core, images
from brainseg_fastai.adni import adni_cases, check_cases
from brainseg_fastai.brats import LABELS, brats_cases, brats_check
from brainseg_fastai.checks import duplicates
from brainseg_fastai.images import data_fingerprint, facts_of, list_files, read_mask
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
    for f in (images.look, images.volume_facts, images.open_volume): f.cache_clear()

def test_check_decodes_every_picture_once_although_two_inputs_share_the_masks(fresh, tmp_path, monkeypatch):
    root,n = make_folder(tmp_path/'d', 4, 3), counted(monkeypatch, images, 'decode')
    check_cases(root)
    assert len(n)==3*12 and set(n.values())=={1}
    for inputs in ('brain', 'orig'): data_fingerprint(adni_cases(root, inputs))
    assert set(n.values())=={1}

def test_volumes_are_unpacked_once_to_check_and_once_to_read_them_by_slices(fresh, tmp_path, monkeypatch):
    root = tiny('brats', tmp_path/'d', 3)
    n,opened = counted(monkeypatch, images, 'load_volume'), counted(monkeypatch, images, 'volume_header')
    brats_check(root)
    assert len(n)>=5*3 and set(n.values())=={1}
    t = brats_cases(root)
    assert len(t)>3*20 # many rows to a file
    data_fingerprint(t)
    assert set(n.values())=={1} # all is known already
    for o in t['mask']: read_mask(o, tuple(LABELS))
    masks = {o.files[0] for o in t['mask']}
    assert len(masks)==3 and {n[o] for o in masks}=={2}, n # looked at; then unpacked to a file that is memory-mapped
    assert {opened[o] for o in masks}=={3}, opened

def test_what_is_kept_of_a_volume_is_small_however_many_voxels_it_has(fresh, tmp_path):
    files = sorted(tiny('brats', tmp_path/'d', 3).rglob('*.nii.gz'))
    facts = facts_of([p for p in files if 'seg' not in p.name], [p for p in files if 'seg' in p.name])
    def numbers(o): return sum(map(numbers, o.values() if isinstance(o, dict) else o)) if isinstance(o, (dict, list, tuple)) else 1
    assert len(facts)==len(files) and all(not isinstance(o, np.ndarray) for f in facts.values() for o in f.values())
    assert max(map(numbers, facts.values())) < 200 # 73,728 voxels each

def test_no_more_volumes_are_in_memory_at_once_than_there_are_workers(fresh, tmp_path, monkeypatch):
    root,now,most,lock,f = tiny('brats', tmp_path/'d', 3), [0], [0], threading.Lock(), images.measure_volume
    def measure(path):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        try: return f(path)
        finally:
            with lock: now[0] -= 1
    monkeypatch.setattr(images, 'measure_volume', measure)
    monkeypatch.setattr(core.os, 'cpu_count', lambda: 2)
    brats_check(root)
    assert 1<=most[0]<=2 and now[0]==0

def test_a_folder_is_listed_without_a_question_about_every_file(tmp_path, monkeypatch):
    root,n = make_folder(tmp_path/'d', 5, 4), counted(monkeypatch, images.os, 'scandir')
    monkeypatch.setattr(Path, 'is_file', None) # the listing itself must tell
    assert len(list_files(root))==60 and sum(n.values())==4

@pytest.mark.skipif(os.name=='nt', reason='links take rights on Windows')
def test_the_walk_finds_what_pathlib_finds(tmp_path):
    d = tmp_path/'d'
    for o in ('b/x.png', 'b/.hid/y.png', '.z/w.png', 'a.b/c d/é.png', 'B/x.png', '.dot.png', 'b-1/q.png'):
        (d/o).parent.mkdir(parents=True, exist_ok=True)
        (d/o).write_bytes(b'')
    (d/'link').symlink_to(d/'b'); (d/'f.png').symlink_to(d/'b'/'x.png'); (d/'dead.png').symlink_to(tmp_path/'nothing')
    want = [p for p in d.rglob('*') if p.is_file() and 'link' not in p.parts
            and not any(o.startswith('.') for o in p.relative_to(d).parts)]
    assert list_files(d)==sorted(want, key=lambda p: p.as_posix()) and len(want)==5
    assert list_files(tmp_path/'none')==[]

class Compared(str):
    "A text that counts how often it is compared"
    n = 0
    __hash__ = str.__hash__
    def __ne__(self, o): Compared.n += 1; return str.__ne__(self, o)
    def __eq__(self, o): Compared.n += 1; return str.__eq__(self, o)

def test_many_copies_of_one_picture_are_compared_with_the_first_only():
    def steps(n):
        Compared.n = 0
        subjects = pd.Series([Compared('AB'[i==n//2]) for i in range(n)], dtype=object)
        t = pd.DataFrame(dict(file=[f'{i}.png' for i in range(n)], subject=subjects, inputs='brain', sha='1', error=None,
                              constant=False, is_mask=False))
        ps = list(duplicates(t))
        assert len(ps)==n-1 and {p['level'] for p in ps}=={'error'}
        return Compared.n
    assert 0 < steps(800) < 4.2*steps(200)

def test_the_made_volumes_have_as_many_slices_as_they_say(tmp_path, monkeypatch):
    monkeypatch.setenv('BRAINSEG_CACHE', str(tmp_path/'cache')); monkeypatch.syspath_prepend(HERE.parent/'benchmarks')
    import scaling
    scaling.make_brats(tmp_path/'d', 20, 8, side=24)
    assert len(brats_cases(tmp_path/'d'))==24
    ps = brats_check(tmp_path/'d')
    assert not (ps['level']=='error').any(), ps
    scaling.make_adni(tmp_path/'a', 24, 64)
    assert len(adni_cases(tmp_path/'a', 'orig'))==24 and not (check_cases(tmp_path/'a')['level']=='error').any()
