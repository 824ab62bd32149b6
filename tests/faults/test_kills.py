"""Killed, full, twice: the same command again gives the same bytes and leaves nothing over. A child of this process runs
the command and kills itself before the n-th rename, unlink, mkdir or opening for writing; before the next one is after this one"""
import contextlib, errno, io, os, signal, subprocess, sys, time, warnings
from pathlib import Path

import numpy as np, pytest

from brainseg_fastai import core
from brainseg_fastai.adni import adni_cases
from brainseg_fastai.cli import main
from brainseg_fastai.core import DataError, locked, written
from brainseg_fastai.runs import train_run
from brainseg_fastai.segmentation import split_cases
from brainseg_fastai.settings import Settings
from brainseg_fastai.splits import with_split
from helpers import make_folder
from scan_files import draw_volume, save

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='fork is what lets a child be killed at a given call')
QUIET = warnings.catch_warnings

def run(argv):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), QUIET():
        warnings.simplefilter('ignore')
        return main([*map(str, argv)])

def in_child(argv, where, kill_at=None):
    "Run a command in a child; how many calls it made that change something below `where`, and how it ended"
    r,w = os.pipe()
    pid = os.fork()
    if pid==0:
        count = [0]
        def hook(event, args):
            if event not in ('os.rename','os.remove','os.mkdir','os.rmdir','open'): return
            if event=='open' and not (isinstance(args[1], str) and set(args[1]) & set('wax+')): return
            if str(where) not in str(args[0]): return
            count[0] += 1
            if count[0]==kill_at: os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        try: code = run(argv)
        except BaseException: code = 99
        os.write(w, f'{count[0]} {code}'.encode())
        os._exit(0)
    os.close(w)
    with os.fdopen(r) as f: said = f.read()
    _,status = os.waitpid(pid, 0)
    return [*map(int, said.split())] if said else [None, -os.WTERMSIG(status)]

def results(out):
    "Everything in a folder but what tells the time"
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in Path(out).rglob('*') if p.is_file()}
    return {k: v for k,v in files.items() if not k.endswith(('report.html','curves.csv','curve.csv','config.json','key.json'))}

def killed_and_repeated(tmp_path, command, n_points, again=None, **more):
    "Kill at `n_points` calls spread evenly over a command; every time the same command, or `again`, must end in the same bytes"
    whole = tmp_path/'whole'/'out'
    whole.parent.mkdir()
    n,code = in_child(command(whole), whole.parent)
    assert code==0 and n>=n_points
    want,names = results(whole), sorted(p.relative_to(whole).as_posix() for p in whole.rglob('*'))
    for k in np.unique(np.linspace(1, n, n_points).round().astype(int)):
        out = tmp_path/f'k{k}'/'out'
        out.parent.mkdir()
        if 'before' in more: assert run(more['before'](out))==0
        _,how = in_child(command(out), out.parent, kill_at=k)
        assert how==-signal.SIGKILL, (k, how)
        assert run((again or command)(out))==0, k
        assert {k2 for k2 in results(out)}==set(want) and [o for o in want if results(out)[o]!=want[o]]==[], k
        assert sorted(p.relative_to(out).as_posix() for p in out.rglob('*'))==names, k
        assert [p.name for p in out.parent.iterdir()]==['out'], k

@pytest.fixture(scope='module')
def data(tmp_path_factory): return make_folder(tmp_path_factory.mktemp('d')/'data', 6, 1)

SMALL = ['--size','64','--epochs','1','--folds','1','--threads','1']

def test_slices(tmp_path):
    for s in ('a','b'):
        a = draw_volume()
        for n,v in (('T1',a), ('brainmask',a), ('aseg',np.where(a==300, 4, 0).astype(np.int16))): save(tmp_path/f'fs/{s}/mri/{n}.nii.gz', v)
    killed_and_repeated(tmp_path, lambda out: ['slices', tmp_path/'fs', '--out', out], 12)

def test_predict(tmp_path, data):
    cases = adni_cases(data, 'brain')
    with QUIET():
        warnings.simplefilter('ignore')
        train_run(with_split(cases, split_cases(cases, 1)), tmp_path/'run', Settings(size=64, epochs=1), progress=False)
    killed_and_repeated(tmp_path, lambda out: ['predict', tmp_path/'run', data/'brain', '--out', out], 12)

def resumed(command): return lambda out: command(out) + ['--resume']*(out/'settings.json').exists()

def test_train(tmp_path, data):
    def command(out): return ['train', data, '--inputs', 'brain', '--out', out, *SMALL]
    killed_and_repeated(tmp_path, command, 8, resumed(command))

def test_compare(tmp_path, data):
    def command(out): return ['compare', data, '--no-control', '--out', out, *SMALL]
    killed_and_repeated(tmp_path, command, 8, resumed(command))

def test_overwrite(tmp_path, data):
    def command(out): return ['train', data, '--inputs', 'brain', '--out', out, *SMALL]
    def over(out): return command(out) + ['--overwrite']
    killed_and_repeated(tmp_path, over, 8, before=lambda out: [*command(out), '--seed', '7'])

@pytest.mark.slow
def test_every_call_of_predict_and_train(tmp_path, data):
    def command(out): return ['train', data, '--inputs', 'brain', '--out', out, *SMALL]
    killed_and_repeated(tmp_path, command, 40, resumed(command))

# ---------------------------------------------------------------- twice

def test_two_processes_on_one_folder(tmp_path):
    code = f"from brainseg_fastai.core import locked\nwith locked({str(tmp_path/'out')!r}): print('in', flush=True); input()"
    p = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline()=='in\n'
    with pytest.raises(DataError, match='another process'), locked(tmp_path/'out'): pass
    p.kill(); p.wait() # a lock of a process that died is none
    with locked(tmp_path/'out') as d: assert [o.name for o in d.iterdir()]==['.brainseg.lock']
    assert not (tmp_path/'out').exists()

def test_another_number_of_threads_does_not_undo_a_training(tmp_path, data):
    import torch
    def command(n): return ['train', data, '--inputs', 'brain', '--out', tmp_path/'out', *SMALL[:-1], n]
    was = torch.get_num_threads()
    try:
        assert run(command(1))==0
        before = {p: p.stat().st_mtime_ns for p in (tmp_path/'out/runs').rglob('*') if p.is_file()}
        assert run([*command(2), '--resume'])==0
        assert before=={p: p.stat().st_mtime_ns for p in (tmp_path/'out/runs').rglob('*') if p.is_file()}
    finally: torch.set_num_threads(was)

# ---------------------------------------------------------------- full

def test_a_full_disk_is_one_message(tmp_path, monkeypatch):
    def fails(e):
        with written(tmp_path/'a.txt') as tmp:
            tmp.write_text('x')
            raise e
    with pytest.raises(DataError, match='a.txt: found no room'): fails(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(ValueError): fails(ValueError('something else'))
    monkeypatch.setattr(core.shutil, 'disk_usage', lambda p: type('U', (), dict(free=10)))
    with pytest.raises(DataError, match='a.txt: found no room'): fails(RuntimeError('PytorchStreamWriter failed writing file')) # torch says no more
    assert not list(tmp_path.iterdir())

# ---------------------------------------------------------------- stopped

@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_says_how_to_go_on(tmp_path, data, sig):
    out = tmp_path/'my results'
    p = subprocess.Popen([sys.executable, '-c', 'import sys; from brainseg_fastai.cli import main; sys.exit(main())', 'train', str(data), '--inputs', 'brain', '--out', str(out), '--size', '64',
                          '--epochs', '5000', '--threads', '1'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.time()+120
    while not list(out.glob('runs/*/checkpoint.pt')) and time.time()<end: time.sleep(.3)
    p.send_signal(sig)
    _,err = p.communicate(timeout=60)
    assert p.returncode==130 and 'Traceback' not in err
    assert f"brainseg train {data} --inputs brain --out '{out}' --size 64 --epochs 5000 --threads 1 --resume" in err
