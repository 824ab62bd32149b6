"""Files that are not as they were written: whatever is in them, the answer is right or there is one message that names
the file, an exit code other than 0, no traceback, and nothing half-written"""
import json, shutil, warnings
from pathlib import Path

import numpy as np, pandas as pd, pytest
from PIL import Image

from brainseg_fastai.adni import adni_cases
from brainseg_fastai.cases import cohort
from brainseg_fastai.cli import main
from brainseg_fastai.comparison import result_folder
from brainseg_fastai.core import DataError
from brainseg_fastai.images import in_cache, open_volume, read_image, volume_facts
from brainseg_fastai.prediction import predict_scans
from brainseg_fastai.runs import Run, load_bundle, train_run
from brainseg_fastai.segmentation import split_cases
from brainseg_fastai.settings import Settings
from brainseg_fastai.splits import read_split, with_split
from helpers import make_folder
from scan_files import draw_volume, save, write_dicom
from test_prediction import rule
from tiny import tiny

def damages(data, seed=0):
    "A file's bytes, damaged in every way that a disk, a mail program or an editor knows"
    rng,n = np.random.default_rng(seed), len(data)
    yield 'nothing', b''
    yield 'text', b'hello\n'
    yield 'zeros', bytes(n)
    yield 'noise', rng.bytes(n)
    yield 'twice', data+data
    for k in (1, 2, 3): yield f'cut {k}', data[:n*k//4]
    yield 'last byte', data[:-1]
    yield 'head lost', data[min(64, n//2):]
    for k in range(4):
        a = bytearray(data)
        for i in rng.integers(0, n, 1+3*k): a[i] ^= int(rng.integers(1, 256))
        yield f'{1+3*k} bytes', bytes(a)
    yield 'utf-16', data.decode('latin-1').encode('utf-16')

VALUES = None, True, -1, 1e400, 'x', [], [1], {}, {'a': {}}

def odd_json(text, seed=0):
    "A JSON object without one of its keys, or with a value that is not what it was"
    d,rng = json.loads(text), np.random.default_rng(seed)
    yield 'list', '[]'
    yield 'number', '7'
    yield 'empty', '{}'
    for k in d: yield f'no {k}', json.dumps({o: v for o,v in d.items() if o!=k})
    for k in d: # two other values for each
        for i in rng.permutation(len(VALUES))[:2]: yield f'{k}: {VALUES[i]!r}', json.dumps(d | {k: VALUES[i]})

def each(path, mutants):
    "Write every mutant into the file, one after the other, and put the file back in the end"
    data = path.read_bytes()
    try:
        for name,new in mutants:
            path.write_bytes(new if isinstance(new, bytes) else new.encode())
            yield name
    finally: path.write_bytes(data)

def listing(root): return {p: p.read_bytes() for p in Path(root).rglob('*') if p.is_file()} if Path(root).exists() else {}

def told(capsys, argv, *names):
    "Run a command: it succeeds, or it says what is wrong with one of `names`"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        code = main([*map(str, argv)])
    out,err = capsys.readouterr()
    assert code in (0,1,2) and 'Traceback' not in out+err
    assert code==0 or any(n in out+err for n in names), (code, out, err)
    return code

# ---------------------------------------------------------------- what people bring

@pytest.fixture
def folder(tmp_path):
    root = make_folder(tmp_path/'adni', 4, 1)
    scans = [dict(subject=f'{s:03d}_S_{1000+s}', scan=f'I{30000+10*s}', spacing=1.) for s in range(4)]
    (root/'cohort.json').write_text(json.dumps(dict(simulated=True, scans=scans, spacing=1.)))
    return root

@pytest.mark.parametrize('kind', ['brain','mask'])
def test_pictures(folder, kind, capsys):
    f = sorted((folder/kind).iterdir())[1]
    codes = [told(capsys, ['check', folder], f.name) for _ in each(f, damages(f.read_bytes()))]
    assert codes.count(1)>=10

def test_cohort_json(folder, capsys):
    f = folder/'cohort.json'
    for mutants in (damages(f.read_bytes()), odd_json(f.read_text())):
        for _ in each(f, mutants): told(capsys, ['check', folder], 'cohort.json')
    for bad in (dict(spacing='1'), dict(spacing=-1), dict(scans=[7]), dict(scans=[dict(subject='a', scan='b', spacing=[1])])):
        f.write_text(json.dumps(bad))
        with pytest.raises(DataError, match='cohort.json'): cohort(folder)

@pytest.mark.parametrize('layout,pattern', [('brats','*_seg.nii.gz'), ('brats','*_t1.nii.gz'), ('ibsr','*_seg.nii.gz'), ('figshare','1.mat'),
                                            ('figshare','cvind.mat'), ('lgg','*_3.tif'), ('lgg','*_3_mask.tif'), ('lgg','data.csv')])
def test_data_sets(tmp_path, layout, pattern, capsys):
    if layout=='figshare': pytest.importorskip('h5py')
    root = tiny(layout, tmp_path/'d', 4)
    f = sorted(root.rglob(pattern))[0]
    for _ in each(f, damages(f.read_bytes())): told(capsys, ['check', root, '--layout', layout], f.name, f.stem)

def test_tables_of_subjects_and_splits(folder, tmp_path):
    cases = adni_cases(folder, 'brain')
    split,table = tmp_path/'split.csv', tmp_path/'who.csv'
    split_cases(cases, 1).to_csv(split, index=False)
    pd.DataFrame(dict(image=[f'brain/{p.name}' for p in cases.image.map(Path)], subject=cases.subject)).to_csv(table, index=False)
    for f,read in ((split, lambda: read_split(split, cases.subject)), (table, lambda: adni_cases(folder, 'brain', table))):
        for _ in each(f, damages(f.read_bytes())):
            try: read()
            except DataError as e: assert f.name in str(e) or 'no image whose name tells' in str(e)

# ---------------------------------------------------------------- bundles and runs

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    d = tmp_path_factory.mktemp('trained')
    cases = adni_cases(make_folder(d/'data', 6, 1), 'brain')
    cases = with_split(cases, split_cases(cases, 1))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        train_run(cases, d/'run', Settings(size=64, epochs=1), progress=False)
    return d, cases

@pytest.mark.parametrize('name', ['config.json','model.safetensors','scores.csv','curve.csv'])
def test_a_bundle_that_changed_is_refused(trained, name, capsys):
    d,_ = trained
    f,scan = d/'run'/name, next((d/'data/brain').iterdir())
    for what in each(f, damages(f.read_bytes())):
        if (name,what)==('config.json','last byte'): continue # an end of line
        assert told(capsys, ['predict', d/'run', scan, '--out', d/'out'], 'run')==2, what
        with pytest.raises(DataError, match='run'): Run(d/'run')
        assert not (d/'out').exists()
    f.rename(d/'away')
    with pytest.raises(DataError): Run(d/'run')
    (d/'away').rename(f)
    load_bundle(d/'run')

def test_a_config_with_other_values_is_refused(trained):
    f = trained[0]/'run/config.json'
    was = json.loads(f.read_text())
    for what in each(f, odd_json(f.read_text())):
        if json.loads(f.read_text())==was: continue
        with pytest.raises(DataError): load_bundle(f.parent)

def test_a_checkpoint_of_something_else_is_refused_or_left(trained, tmp_path):
    import torch
    _,cases = trained
    s = Settings(size=64, epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        whole = train_run(cases, tmp_path/'whole', s, progress=False).scores.dice.tolist()
        half = tmp_path/'half'
        half.mkdir()
        shutil.copy(tmp_path/'whole/key.json', half)
        for k,bad in enumerate([dict(), dict(phase=0, curve=[], loader=None, epoch=0), dict(phase=0, curve=[], loader=None, epoch=0, model={}, opt={}, smooth=(), random={})]):
            torch.save(bad, half/'checkpoint.pt')
            try: assert train_run(cases, half, s, progress=False).scores.dice.tolist()==whole
            except DataError as e: assert 'checkpoint.pt' in str(e)
            for p in [*half.iterdir()]:
                if p.name!='key.json': shutil.rmtree(p) if p.is_dir() else p.unlink()

def test_settings_of_a_folder(tmp_path):
    asked = dict(data='d', layout='adni', variants=dict(brain='', orig=''), folds=3)
    out = result_folder(tmp_path/'o', asked)
    f = out/'settings.json'
    for mutants in (damages(f.read_bytes()), odd_json(f.read_text())):
        for what in each(f, mutants):
            try: result_folder(out, asked, resume=True)
            except DataError as e: assert 'settings.json' in str(e) or str(out) in str(e), what

# ---------------------------------------------------------------- scans and predictions

@pytest.mark.parametrize('name', ['a.nii','a.nii.gz','a.mgz','a.png','dicom'])
def test_scans(trained, tmp_path, name, capsys):
    a = draw_volume()
    if name=='dicom': f = sorted(write_dicom(tmp_path/'in/dicom', a.astype(np.uint16)).iterdir())[3]
    elif name=='a.png':
        f = tmp_path/'in/a.png'; f.parent.mkdir(); Image.fromarray((a[...,20]/4).astype(np.uint8)).save(f)
    else: f = save(tmp_path/'in'/name, a.astype(np.int16))
    given = f.parent if name=='dicom' else f
    for what in each(f, damages(f.read_bytes())):
        out = tmp_path/'out'
        code = told(capsys, ['predict', trained[0]/'run', given, '--out', out, '--slab', '0,40', *['--no-flips']], name, f.name) \
            if name!='a.png' else told(capsys, ['predict', trained[0]/'run', given, '--out', out, '--no-flips'], name)
        left = [p.name for p in out.rglob('*') if p.is_file()] if out.exists() else []
        assert code==0 or not left, what
        shutil.rmtree(out, ignore_errors=True)

def test_sidecars(tmp_path):
    out = tmp_path/'out'
    scans = [save(tmp_path/f'{k}.nii.gz', np.roll(draw_volume(), i, 1)) for i,k in enumerate('ab')]
    first = predict_scans(rule(), scans, out, progress=False)
    f = out/'a_dseg.json'
    for mutants in (damages(f.read_bytes()), odd_json(f.read_text())):
        for what in each(f, mutants):
            try: t = predict_scans(rule(), scans, out, progress=False)
            except DataError as e: assert 'another model' in str(e) and 'bundle' in what; continue
            assert t.area_px.tolist()==first.area_px.tolist(), what

def test_facts_and_volumes_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('BRAINSEG_CACHE', str(tmp_path/'cache'))
    p = save(tmp_path/'a.nii.gz', draw_volume())
    a,facts = read_image(p), volume_facts(p)
    for suffix in ('.json','.nii'):
        f = in_cache(p, suffix)
        mutants = [*damages(f.read_bytes())] + ([*odd_json(f.read_text())] if suffix=='.json' else [])
        for what in each(f, [m for m in mutants if suffix=='.json' or 'bytes' not in m[0] and m[0]!='noise']):
            volume_facts.cache_clear(); open_volume.cache_clear()
            assert (read_image(p)==a).all() and volume_facts(p)==facts, what

# ---------------------------------------------------------------- what check passes, training accepts

@pytest.mark.parametrize('seed', range(4))
def test_what_the_check_passes_can_be_trained_on(tmp_path, seed, capsys):
    "Folders with something odd in them: either the check has an error, or a training comes to its end"
    rng = np.random.default_rng(seed)
    root = make_folder(tmp_path/'d', 5, 1, mask_value=int(rng.choice([1,2,255])))
    files = sorted(root.rglob('*.png'))
    for f in rng.choice(files, 3, replace=False):
        a = np.array(Image.open(f))
        how = rng.integers(6)
        if how==0: f.unlink()
        elif how==1: Image.fromarray(a*0).save(f)
        elif how==2: Image.fromarray(np.stack([a]*3, -1)).save(f)
        elif how==3: Image.fromarray(a.astype(np.uint16)*7).save(f)
        elif how==4: Image.fromarray(a[:40]).save(f)
        else: Image.fromarray(a).quantize(4).save(f)
    code = main(['check', str(root)])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trained = main(['train', str(root), '--inputs', 'brain', '--out', str(tmp_path/'o'), '--size', '64', '--epochs', '1', '--folds', '1'])
    out,err = capsys.readouterr()
    assert trained==0 if code==0 else trained in (0,2)
    assert 'Traceback' not in out+err

# ---------------------------------------------------------------- arguments

@pytest.mark.parametrize('flags', [['--seed','-1'], ['--seed','1'+'0'*30], ['--size','1'+'0'*9], ['--epochs','9'*12], ['--margin','nan'], ['--margin','-1'],
                                   ['--steps',','], ['--mode','patch'], ['--threads','100000'], ['--track','http://host'], ['--bs','1e3'], ['--depth','99']])
def test_arguments_are_told_before_anything_is_trained(folder, tmp_path, flags, capsys):
    try: code = main(['compare', str(folder), '--out', str(tmp_path/'o'), *flags])
    except SystemExit as e: code = e.code
    err = capsys.readouterr().err
    assert code==2 and 'Traceback' not in err and flags[0].strip('-') in err and not (tmp_path/'o').exists()
