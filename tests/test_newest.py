"The library in a second environment with the newest fastai, beside the one that these tests run in"
import os, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEWEST = 'fastai==2.8.12'
PROOF = """
import sys; from pathlib import Path
import fastai, fastcore, torch
from fastai.vision.all import *
from helpers import make_folder
from brainseg_fastai.adni import adni_cases
from brainseg_fastai.segmentation import brainseg_block, brainseg_learner, score_cases, split_cases
from brainseg_fastai.splits import with_split
root = make_folder(Path(sys.argv[1])/'data', 4, 2)
cases = adni_cases(root, 'brain')
block = brainseg_block('brain', size=64)
save_pickle(Path(sys.argv[1])/'block.pkl', block); block = load_pickle(Path(sys.argv[1])/'block.pkl')
learn = brainseg_learner(block.dataloaders(with_split(cases, split_cases(cases, 1)), bs=2, num_workers=0), pretrained=False)
with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=ShortEpochCallback(pct=2/len(learn.dls.train)))
assert len(learn.recorder.losses) >= 2, 'two batches'
learn.export(Path(sys.argv[1])/'learner.pkl')
scores = score_cases(learn, cases)
assert len(scores)==len(cases) and scores.dice.between(0, 1).all()
print('proved with fastai', fastai.__version__, 'fastcore', fastcore.__version__)
"""

def prove(python, tmp_path):
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join((str(ROOT), str(ROOT/'tests')))}
    r = subprocess.run([str(python), '-W', 'ignore', '-c', PROOF, str(tmp_path)], capture_output=True, text=True,
                       timeout=600, env=env)
    assert r.returncode==0, r.stderr[-3000:]
    return r.stdout

def test_this_environment(tmp_path): assert 'proved with fastai' in prove(sys.executable, tmp_path)

@pytest.mark.slow
def test_newest_fastai(tmp_path):
    if os.environ.get('BRAINSEG_OFFLINE'): pytest.skip('BRAINSEG_OFFLINE is set: the second environment is not installed')
    uv = shutil.which('uv', path=str(Path(sys.executable).parent)) or shutil.which('uv')
    assert uv, 'uv comes with the dev extra'
    env = {k: v for k,v in os.environ.items() if k not in ('VIRTUAL_ENV','PYTHONPATH')}
    python = tmp_path/'env'/('Scripts/python.exe' if os.name=='nt' else 'bin/python')
    for args in (['venv', '-q', '--python', sys.executable, tmp_path/'env'],
                 ['pip', 'install', '-q', '--python', python, ROOT, NEWEST]):
        r = subprocess.run([uv, *map(str, args)], capture_output=True, text=True, timeout=1500, env=env)
        assert r.returncode==0, r.stderr[-3000:]
    try: out = prove(python, tmp_path)
    finally: shutil.rmtree(tmp_path/'env', ignore_errors=True)
    assert f'fastai {NEWEST.split("==")[1]}' in out and 'fastcore 2.' in out, out
