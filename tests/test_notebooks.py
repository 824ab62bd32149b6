"Every notebook runs top to bottom, and the library is what the notebooks export"
import json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STORIES = sorted((ROOT/'nbs').glob('*.ipynb'))
ROOMS = sorted((ROOT/'nbs'/'library').glob('*.ipynb'))
pytest.importorskip('nbdev', reason='the notebooks are tested with the dev extra')

def nbdev(command, *args, cwd=ROOT, timeout=300, **env):
    "An nbdev command in a process of its own, on the package in `cwd`"
    exe = shutil.which(command, path=str(Path(sys.executable).parent))
    env = {**os.environ, 'PYTHONPATH': str(cwd), 'MPLBACKEND': 'agg', **env}
    return subprocess.run([exe, *args], cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True,
                          encoding='utf-8', errors='replace')

@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "What is committed or about to be, in a Git checkout of its own"
    d = tmp_path_factory.mktemp('clone')/'repo'
    if not shutil.which('git') or not (ROOT/'.git').exists(): pytest.skip('needs Git and a checkout')
    files = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.split('\n')
    for f in filter(None, files):
        if (ROOT/f).is_file():
            (d/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/f, d/f)
    git = ['git', '-c', 'user.name=test', '-c', 'user.email=test@localhost']
    for args in (['init', '-q'], ['add', '-A'], ['commit', '-qm', 'as it is']): subprocess.run([*git, *args], cwd=d,
                                                                                               check=True)
    return d

def cells(path): return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['source']]

def test_there_are_nine_stories_and_their_rooms():
    assert [o.stem[:2] for o in STORIES]==[f'{i}_' for i in range(1, 10)]
    assert {'00_core','02_cases','26_commands'} <= {o.stem for o in ROOMS} and len(ROOMS)>=25
    assert {*STORIES, *ROOMS}=={*(ROOT/'nbs').rglob('*.ipynb')}

def test_every_notebook_says_what_it_is():
    for p in STORIES+ROOMS:
        first = ''.join(cells(p)[0]['source'])
        assert first.startswith('# ') and '\n> ' in first, p.name

@pytest.mark.parametrize('notebook', STORIES+ROOMS, ids=lambda o: o.stem)
def test_links_to_other_pages_lead_somewhere(notebook):
    text = '\n'.join(''.join(c['source']) for c in cells(notebook) if c['cell_type']=='markdown')
    links = [o.split('#')[0] for o in re.findall(r'\]\(([^)\s]+)\)', text) if '://' not in o]
    assert not [o for o in links if o and not (notebook.parent/o).exists()]

@pytest.mark.parametrize('notebook', STORIES+ROOMS, ids=lambda o: o.stem)
def test_outputs_are_those_that_teach(notebook):
    "No warnings of a run, no place of the machine that it ran on"
    outputs = [o for c in cells(notebook) for o in c.get('outputs', [])]
    assert not [o for o in outputs if o.get('name')=='stderr']
    assert 'site-packages' not in json.dumps(outputs)

@pytest.mark.parametrize('command', ['nbdev_export', 'nbdev_clean'])
def test_a_clean_export_changes_nothing(clone, command):
    if command=='nbdev_export':
        for o in (clone/'brainseg_fastai').glob('*.py'): o.unlink() # a stale or hand-made module would not come back
    r = nbdev(command, cwd=clone)
    assert r.returncode==0, r.stderr
    status = subprocess.run(['git', 'status', '--porcelain'], cwd=clone, capture_output=True, text=True,
                            check=True).stdout
    diff = subprocess.run(['git', 'diff'], cwd=clone, capture_output=True, text=True, check=True).stdout
    assert status=='', f'{status}\n{diff[:3000]}'

def test_no_cell_stands_in_two_stories():
    def code(p): return {''.join(c['source']).strip() for c in cells(p) if c['cell_type']=='code'}
    def is_import(s): return all(l.startswith(('#|','%','import ','from ',' ')) or not l for l in s.split('\n'))
    for i,p in enumerate(STORIES):
        for q in STORIES[:i]:
            assert not [s for s in code(p)&code(q) if 'find_spec' not in s and not is_import(s)], (p.name, q.name)

@pytest.mark.slow
@pytest.mark.parametrize('notebook', STORIES+ROOMS, ids=lambda o: o.stem)
def test_notebook(notebook, tmp_path, monkeypatch):
    "`nbdev_test` runs each notebook; the count is what this parametrisation makes it"
    monkeypatch.delenv('BRAINSEG_DATA', raising=False) # by default the notebooks use the demo cohort
    r = nbdev('nbdev_test', '--path', str(notebook), '--do_print', '--n_workers', '0', timeout=1200,
              BRAINSEG_RUNS=str(tmp_path))
    assert r.returncode==0, (r.stdout[-2000:], r.stderr[-4000:])
    assert r.stdout.count('- Completed')==1 and 'Success.' in r.stdout, r.stdout[-2000:]
