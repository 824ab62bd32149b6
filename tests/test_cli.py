"The command end to end on tiny folders, and what it says to bad input"
import json, os, re, shlex, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd, pytest
from PIL import Image

from brainseg_fastai.cli import find_layout, main, parser
from brainseg_fastai.core import DataError
from brainseg_fastai.settings import Settings, from_flags
from helpers import dataset, make_folder

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, '-W', 'ignore', '-c', 'import sys; from brainseg_fastai.cli import main; sys.exit(main())']
TINY = ['--size','64','--epochs','1','--no-pretrained']

def brainseg(*args, cwd=None, timeout=300, **env):
    "The command in a process of its own"
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **env}
    return subprocess.run([*COMMAND, *map(str, args)], cwd=cwd, env=env, timeout=timeout,
                          capture_output=True, text=True, encoding='utf-8')

@pytest.fixture(scope='module')
def data(tmp_path_factory): return make_folder(tmp_path_factory.mktemp('data')/'slices', 6, 2)

@pytest.fixture(scope='module')
def report(data, tmp_path_factory):
    "One comparison with its defaults, three folds by itself"
    out = tmp_path_factory.mktemp('out')/'report'
    r = brainseg('compare', data, '--out', out, *TINY)
    assert r.returncode==0, r.stderr[-3000:]
    return out,r.stdout

def test_help_is_quick_to_import_nothing_heavy():
    code = 'import sys; from brainseg_fastai.cli import main\ntry: main(["--help"])\nexcept SystemExit: pass\n' \
           'assert not {"torch","fastai","pandas","matplotlib","monai"} & set(sys.modules)'
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                       env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert r.returncode==0 and 'examples:' in r.stdout, r.stderr

@pytest.mark.parametrize('page', ['README.md','data_README.md'])
def test_every_command_that_is_promised_is_understood(page):
    text = (ROOT/page).read_text(encoding='utf-8')
    blocks = '\n'.join(re.findall('```bash\n(.*?)```', text, re.S))
    lines = [l.split('#')[0] for l in blocks.splitlines() if l.startswith('brainseg ')]
    assert lines
    for l in lines: assert parser().parse_args(shlex.split(l)[1:]).run

def test_flags_are_the_fields_of_the_settings():
    for command in (['compare','x','--out','o'], ['train','x','--out','o'], ['plan','x'], ['demo']):
        a = parser().parse_args(command)
        assert from_flags(a)==Settings()
        a = parser().parse_args([*command, '--kind', 'orig', '--patch', '32,48,64', '--no-pretrained', '--steps',
                                 'n4,nyul'])
        assert from_flags(a)==Settings(inputs='orig', patch=(32,48,64), pretrained=False, steps='n4,nyul')

def test_layouts_have_names_on_the_command_line_alone():
    assert find_layout('adni').name=='adni'
    with pytest.raises(DataError, match='one of adni, figshare'): find_layout('bids')

def test_redirected_output_has_no_bars(report):
    assert 'Training 1 of' in report[1] and not {'\r','█'} & set(report[1]) and 'train_loss' not in report[1]

def test_compare_leaves_everything(report, data):
    out,said = report
    names = {o.name for o in out.iterdir()}
    assert {'report.html','scores.csv','comparison.json','split.csv','swap.csv','curves.csv','control.csv',
            'settings.json','runs','bundles'} <= names
    assert sorted(o.relative_to(out/'bundles').as_posix() for o in (out/'bundles').rglob('*') if o.is_file())==[
        f'{k}/{o}' for k in ('brain','orig') for o in ('README.md','config.json','model.safetensors')]
    assert not [o for o in out.rglob('.*') if o.is_file()], 'temporary files are left'
    assert 'Training 7 of 7' in said and 'report.html' in said

def test_scores_are_the_variants_own_test_rows(report):
    s = pd.read_csv(report[0]/'scores.csv', dtype={'subject': str})
    assert list(s.columns[:8])==['variant','fold','seed','subject','scan','slice','image','mask']
    assert {'dice','jaccard','hd95','nsd','size_true','size_pred','prediction'} <= set(s)
    assert (s.image.str.split('/').str[0]==s.variant).all() and (s['mask'].str.split('/').str[0]=='mask').all()
    split = pd.read_csv(report[0]/'split.csv', dtype={'subject': str}).query('split=="test"')
    assert sorted(zip(s.image, s.fold))==sorted(zip(split.image, split.fold))
    assert s.groupby('variant').subject.nunique().tolist()==[6,6] and s.groupby(['variant','image']).size().max()==1
    assert all((report[0]/o).is_file() for o in s.prediction)

def test_comparison_keys(report):
    c = json.loads((report[0]/'comparison.json').read_text(encoding='utf-8'))
    assert {'verdict','n_subjects','metrics','difference','ci95','p_value','margin','subjects_needed','folds',
            'repeats','control','simulated'} <= set(c)
    s = pd.read_csv(report[0]/'scores.csv').groupby(['variant','subject']).dice.mean().unstack(0)
    assert c['difference']==pytest.approx((s.brain-s.orig).mean()) and c['n_subjects']==6 and c['folds']==3
    assert c['control']['variant']=='brain' and c['simulated'] is False
    assert len(pd.read_csv(report[0]/'swap.csv'))==4

def test_report_speaks_of_this_run(report):
    html = (report[0]/'report.html').read_text(encoding='utf-8')
    c = json.loads((report[0]/'comparison.json').read_text(encoding='utf-8'))
    assert html.index('<h1>') < html.index('<svg') and c['verdict'].split()[0].lower() in html.lower()
    assert 'http://' not in html.replace('http://www.w3.org', '') and 'src="http' not in html

def test_the_same_seed_gives_the_same_scores(report, data, tmp_path):
    r = brainseg('compare', data, '--out', tmp_path/'again', *TINY)
    assert r.returncode==0, r.stderr[-3000:]
    for f in ('scores.csv','swap.csv',
              'split.csv'): assert (tmp_path/'again'/f).read_bytes()==(report[0]/f).read_bytes(), f
    r = brainseg('compare', data, '--out', tmp_path/'other', '--seed', 7, '--folds', 2, '--no-control', *TINY)
    assert r.returncode==0 and (tmp_path/'other'/'scores.csv').read_bytes()!=(report[0]/'scores.csv').read_bytes()

def test_train_one_kind_with_an_external_folder(tmp_path):
    a,b = make_folder(tmp_path/'a', 4, 1, kinds=('brain',)), make_folder(tmp_path/'b', 2+3, 1, kinds=('brain',),
                                                                         seed=5)
    for o in (b/'brain').parent.rglob('*.png'): o.rename(o.with_name('9'+o.name)) # other people
    r = brainseg('train', a, '--kind', 'brain', '--out', tmp_path/'m', '--folds', 2, '--external', b, *TINY)
    assert r.returncode==0, r.stderr[-3000:]
    assert {'report.html','scores.csv','summary.json','external.csv'} <= {o.name for o in (tmp_path/'m').iterdir()}
    assert pd.read_csv(tmp_path/'m'/'external.csv').subject.nunique()==5
    assert (tmp_path/'m'/'runs'/'brain-fold0-seed42'/'model.safetensors').is_file()

@pytest.mark.skipif(os.name=='nt', reason='Ctrl-C is sent as a POSIX signal')
def test_interrupted_and_resumed(data, tmp_path):
    args = ['compare', str(data), '--out', str(tmp_path/'r'), '--size','64','--epochs','2','--no-pretrained',
            '--folds','2','--no-control']
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    p = subprocess.Popen([*COMMAND, *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         # tests run in the background inherit that it is ignored
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    end = time.time()+240
    while not list((tmp_path/'r').rglob('config.json')) and time.time()<end and p.poll() is None: time.sleep(.05)
    p.send_signal(signal.SIGINT)
    _,err = p.communicate(timeout=120)
    assert p.returncode==130 and '--resume' in err and 'Traceback' not in err, err
    done = {o: o.stat().st_mtime_ns for o in (tmp_path/'r').rglob('config.json')}
    assert done and not (tmp_path/'r'/'scores.csv').exists()
    assert brainseg(*args).returncode==2, 'a begun run is not overwritten'
    r = brainseg(*args, '--resume')
    assert r.returncode==0 and all(o.stat().st_mtime_ns==t for o,t in done.items()), r.stderr[-2000:]
    assert len(pd.read_csv(tmp_path/'r'/'scores.csv'))==24

# Bad input: one message, an exit code, nothing written

def _breaks(root, how):
    brain = sorted((root/'brain').iterdir())
    if how=='missing mask':
        next((root/'mask').iterdir()).unlink()
    if how=='truncated': brain[0].write_bytes(brain[0].read_bytes()[:200])
    if how=='size': Image.new('L', (32,32)).save(next((root/'mask').iterdir()))
    if how=='two people': brain[-1].write_bytes(brain[0].read_bytes())
    if how=='anti-aliased':
        m = next((root/'mask').iterdir()); Image.open(m).resize((48,48), Image.BILINEAR).resize((64,64),
                                                                                                Image.BILINEAR).save(m)
    if how=='name': brain[0].rename(root/'brain'/'nodash.png')
    if how=='few':
        for o in root.rglob('*.png'):
            if not o.name.startswith(('000','001')): o.unlink()

@pytest.mark.parametrize('how,word', [('missing mask','no mask'), ('truncated','cannot be read'),
                                      ('size','same size'), ('two people','same pixels'),
                                      ('anti-aliased','anti-aliased'), ('name','nodash.png'), ('few','subjects')])
def test_a_bad_folder_is_refused_before_anything_is_written(tmp_path, capsys, how, word):
    root = make_folder(tmp_path/'d', 5, 1)
    _breaks(root, how)
    assert main(['check', str(root)])==1
    assert word in capsys.readouterr().out
    for args in (['compare', str(root), '--out', str(tmp_path/'o'), *TINY],
                 ['train', str(root), '--kind', 'brain', '--out', str(tmp_path/'o'), *TINY]):
        assert main(args)==2
        err = capsys.readouterr().err
        assert word in err and 'Traceback' not in err and not (tmp_path/'o').exists(), err

def test_one_kind_alone_is_told_about_train(tmp_path, capsys):
    root = make_folder(tmp_path/'d', 4, 1, kinds=('brain',))
    assert main(['compare', str(root), '--out', str(tmp_path/'o')])==2
    err = capsys.readouterr().err
    assert 'brainseg train' in err and '--inputs brain' in err and not (tmp_path/'o').exists()
    assert main(['train', str(root), '--inputs', 'orig', '--out', str(tmp_path/'o')])==2
    assert 'brain' in capsys.readouterr().err

@pytest.mark.parametrize('make,word', [(lambda d: (d/'o').write_text('mine'), 'a file'),
                                       (lambda d: ((d/'o').mkdir(), (d/'o'/'thesis.txt').write_text('mine')),
                                        'other things')])
def test_a_folder_of_others_is_never_touched(tmp_path, capsys, data, make, word):
    make(tmp_path)
    before = sorted((str(o), o.read_text() if o.is_file() else '') for o in tmp_path.rglob('*'))
    for extra in ([], ['--overwrite'], ['--resume']):
        assert main(['compare', str(data), '--out', str(tmp_path/'o'), *extra])==2
        assert word in capsys.readouterr().err
    assert before==sorted((str(o), o.read_text() if o.is_file() else '') for o in tmp_path.rglob('*'))

def test_an_earlier_run_is_refused_and_other_settings_are_not_resumed(report, data, capsys):
    assert main(['compare', str(data), '--out', str(report[0]), *TINY])==2
    assert '--overwrite' in capsys.readouterr().err
    assert main(['compare', str(data), '--out', str(report[0]), *TINY, '--seed', '9', '--resume'])==2
    assert 'other settings' in capsys.readouterr().err

@pytest.mark.parametrize('args', [['compare','x','--out','o','--size','100'],
                                  ['compare','x','--out','o','--epochs','0'], ['compare','x'], ['train','x'],
                                  ['nonsense'], ['compare','x','--out','o','--resume','--overwrite'],
                                  ['compare','x','--out','o','--seed','a']])
def test_wrong_arguments(args, capsys):
    with pytest.raises(SystemExit) as e: main(args)
    assert e.value.code==2 and 'usage:' in capsys.readouterr().err

def test_train_asks_for_the_kind(tmp_path, capsys):
    assert main(['train', str(make_folder(tmp_path/'d', 3, 1)), '--out', str(tmp_path/'o')])==2
    assert '--inputs is missing' in (said := capsys.readouterr().err) and 'brain, orig' in said and not (tmp_path/'o').exists()

def test_missing_folder(tmp_path, capsys, data):
    gone,out = str(tmp_path/'nowhere'), ['--out', str(tmp_path/'o')]
    for args in (['compare', gone, *out], ['plan', gone], ['compare', str(data), *out, '--external', gone]):
        assert main(args)==2
        line, = capsys.readouterr().err.strip().splitlines()
        assert 'nowhere' in line and 'Give the path' in line and not (tmp_path/'o').exists()

def test_pictures_have_no_patches(data, tmp_path, capsys):
    assert main(['train', str(data), '--inputs', 'brain', '--mode', 'patch', '--out', str(tmp_path/'o')])==2
    line, = capsys.readouterr().err.strip().splitlines()
    assert '--mode patch' in line and 'adni' in line and not (tmp_path/'o').exists()

def test_too_many_folds(data, tmp_path, capsys):
    assert main(['compare', str(data), '--folds', '99', '--out', str(tmp_path/'o')])==2
    assert 'Take fewer folds' in capsys.readouterr().err and not (tmp_path/'o').exists()

@pytest.mark.parametrize('name', ['adni_like','oasis_slices'])
def test_the_development_data_pass(name, capsys): assert main(['check', str(dataset(name))])==0
