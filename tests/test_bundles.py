"What goes into a bundle comes out of it, and nothing else is taken for one"
import hashlib, json, os, pickle, shutil, subprocess, sys

import numpy as np, pandas as pd, pytest, torch

from brainseg_fastai.bundles import KEYS, label_table, load_bundle, pool_bundle, read_config, save_bundle, training_slab, training_spacing, with_onnx
from brainseg_fastai.cases import DataError, adni_cases, read_image
from brainseg_fastai.cli import main
from brainseg_fastai.datasets import LAYOUTS, standin
from brainseg_fastai.segmentation import load_run, predict_cases, split_cases, train_run, with_split
from helpers import make_folder

def cases_of(layout, unit='slice'):
    t = LAYOUTS[layout].cases(standin(layout), unit=unit)
    return with_split(t, split_cases(t, 3))

def trained(tmp_path, layout='adni', unit='slice', **kw):
    if layout=='adni':
        t = adni_cases(make_folder(tmp_path/'d', 6, 2), 'brain')
        t = with_split(t, split_cases(t, 3))
    else: t = cases_of(layout, unit)
    lay = LAYOUTS[layout]
    few = 12 if layout=='adni' else 1 # until something is found, where masks are asked for
    r = train_run(t, tmp_path/'r', epochs=few, size=64, pretrained=False, layout=layout, codes=lay.codes, regions=lay.regions, **kw)
    return r, t

@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    r,t = trained(tmp_path_factory.mktemp('b'))
    return pool_bundle(r, r['folder'].parent/'bundle', r['scores']), r, t

SMALL = dict(arch='unet', depth=3, width=4)

@pytest.mark.parametrize('layout,unit,kw', [('adni','slice',{}), ('adni','slice',dict(steps='match,zscore', **SMALL)), ('lgg','slice',SMALL),
    ('brats','slice',SMALL), ('ibsr','volume',dict(mode='volume', arch='unetr', width=4)), ('brats','volume',dict(mode='patch', patch=(32,32,32), arch='unet3d', depth=2, width=4))])
def test_the_same_masks_before_and_after(layout, unit, kw, tmp_path):
    for o in ('torchio','skimage','SimpleITK'): pytest.importorskip(o, reason='volumes and steps need the extra all')
    r,t = trained(tmp_path, layout, unit, **kw)
    test = t[t['split']=='test']
    learn = load_bundle(r['folder'])
    assert [o['code'] for o in learn.bundle['labels']]==list(learn.codes)[1:] and learn.bundle['layout']==layout
    assert all(np.array_equal(a, b) for a,b in zip(predict_cases(load_run(r['folder'], t), test), predict_cases(learn, test)))
    if unit=='slice' and layout=='adni':
        saved = [read_image(o) for o in r['scores']['prediction']]
        assert all(np.array_equal(a, b) for a,b in zip(saved, predict_cases(learn, test))) # in the run itself
        assert any(o.any() for o in saved)

def test_the_config_says_what_there_is_to_know(bundle):
    c = read_config(bundle[0])
    assert set(KEYS) <= set(c) and c['channels']==['brain'] and c['spacing'] is None and c['slab'] is None and c['whole'] is False
    assert c['settings']['size']==64 and c['settings']['seed']==42 and c['settings']['epochs']==12 and c['settings']['arch']=='resnet18'
    assert c['scores']['metrics']['dice']['ci95'][0] <= c['scores']['metrics']['dice']['mean'] <= c['scores']['metrics']['dice']['ci95'][1]
    assert c['scores']['metrics']['dice']['mean']==pytest.approx(bundle[1]['scores'].groupby('subject').dice.mean().mean(), abs=1e-4)
    assert c['data']['subjects']['test']==bundle[2].query('split=="test"').subject.nunique() and {'torch','fastai'} <= set(c['versions'])
    card = (bundle[0]/'README.md').read_text(encoding='utf-8')
    for o in ('Not a medical device','reference standard','Out of scope','ventricles','CLAIM 2024','per image'): assert o in card, o

def test_names_slab_and_spacing():
    assert [o['name'] for o in label_table((0,1,2,4), 'brats')]==['necrotic core','oedema','enhancing tumour']
    assert [o['name'] for o in label_table((0,3,7))]==['label 3','label 7'] # nobody said what they are
    t = pd.DataFrame(dict(spacing=[.9, float('nan'), 1.1], slice=['ax1']*3, below_top=[60, 70, float('nan')]))
    assert training_slab(t)=={'below_top_mm': [60, 70]} and training_spacing(t)==[1., 1.]
    t = pd.DataFrame(dict(spacing=[(1,2,3), (1,2,3)], slice=['','']))
    assert training_slab(t) is None and training_spacing(t)==[1, 2, 3]

def copy(bundle, tmp_path): return shutil.copytree(bundle[0], tmp_path/'b')

def sign(b, **change):
    "Change a config and make its hashes fit again, as somebody would who means to deceive"
    import brainseg_fastai.bundles as B
    c = {**json.loads((b/'config.json').read_text(encoding='utf-8')), **change}
    c['sha256'] = {'model.safetensors': hashlib.sha256((b/'model.safetensors').read_bytes()).hexdigest(), 'config': B._config_hash(c)}
    (b/'config.json').write_text(json.dumps(c), encoding='utf-8')

def refused(b, *words):
    with pytest.raises(DataError) as e: load_bundle(b)
    for o in words: assert o in str(e.value), (o, str(e.value))

def test_tampered_files_are_refused(bundle, tmp_path):
    b = copy(bundle, tmp_path); f = b/'model.safetensors'
    a = bytearray(f.read_bytes()); a[-5] ^= 1; f.write_bytes(a)
    refused(b, 'model.safetensors', 'SHA-256')
    b = shutil.rmtree(b) or copy(bundle, tmp_path)
    c = json.loads((b/'config.json').read_text()); c['labels'][0]['name'] = 'tumour'; (b/'config.json').write_text(json.dumps(c))
    refused(b, 'config.json', 'changed')
    (b/'config.json').write_text('{'); refused(b, 'broken JSON')
    (b/'config.json').unlink(); refused(b, 'no config.json')
    refused(tmp_path/'nowhere', 'no config.json')

def test_mismatches_are_refused_even_with_fitting_hashes(bundle, tmp_path):
    b = copy(bundle, tmp_path); s = read_config(b)['settings']
    for change,word in ((dict(arch='vgg99'), 'vgg99'), (dict(arch='resnet34'), 'the weights of resnet34'), (dict(codes=[0,1,2]), 'model.safetensors'),
                        (dict(steps='sharpen'), 'sharpen'), (dict(loss='hinge'), 'hinge')):
        sign(b, settings={**s, **change}); refused(b, word)
    sign(b, settings=s, version=99); refused(b, '99')

class Canary:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')

@pytest.mark.parametrize('how', ['pickle','torch'])
def test_a_pickle_is_never_opened(bundle, tmp_path, how):
    canary,b = tmp_path/'canary', copy(bundle, tmp_path)
    bad = b/'model.safetensors'
    if how=='pickle': bad.write_bytes(pickle.dumps(Canary(canary)))
    else: torch.save(Canary(canary), bad)
    for name in ('export.pkl','model.pth','data.pkl'): shutil.copy(bad, b/name)
    assert pickle.loads(pickle.dumps(Canary(canary))) and canary.exists(), 'the canary sings when it is let out'
    canary.unlink()
    refused(b, 'SHA-256')
    sign(b); refused(b, 'model.safetensors', 'weights of resnet18')
    assert not canary.exists()

def test_other_folders_are_not_replaced(bundle, tmp_path):
    (tmp_path/'x').mkdir(); (tmp_path/'x'/'thesis.txt').write_text('mine')
    with pytest.raises(DataError, match='no bundle'): save_bundle(bundle[0]/'model.safetensors', tmp_path/'x', read_config(bundle[0]))
    assert [o.name for o in (tmp_path/'x').iterdir()]==['thesis.txt']
    with pytest.raises(KeyError): save_bundle(bundle[0]/'model.safetensors', tmp_path/'y', {})
    assert not (tmp_path/'y').exists() and not [o for o in tmp_path.iterdir() if o.name.startswith('.')]

def test_weights_of_a_gpu_load_on_a_cpu(bundle):
    from safetensors import safe_open
    learn = load_bundle(bundle[0], device='cpu') # safetensors keep no device
    assert {p.device.type for p in learn.model.parameters()}=={'cpu'} and learn.dls.device.type=='cpu'
    with safe_open(bundle[0]/'model.safetensors', 'pt') as f: assert 'cuda' not in str(f.metadata())

def test_a_bundle_is_small_and_complete(bundle):
    assert sorted(o.name for o in bundle[0].iterdir())==['README.md','config.json','model.safetensors']
    code = f'import sys; from brainseg_fastai.bundles import load_bundle; print(load_bundle({str(bundle[0])!r}).codes)'
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode==0 and r.stdout.strip()=='(0, 255)', r.stderr[-2000:]

def test_export(bundle, tmp_path, capsys, monkeypatch):
    ort = pytest.importorskip('onnxruntime', reason='ONNX needs the extra onnx'); pytest.importorskip('onnx')
    out = tmp_path/'m.onnx'
    assert main(['export', str(bundle[0]), '--onnx', str(out)])==0
    assert 'largest difference' in capsys.readouterr().out.lower()
    x = np.random.default_rng(0).normal(size=(3,1,64,64)).astype(np.float32)
    got = ort.InferenceSession(str(out)).run(None, {'image': x})[0]
    with torch.inference_mode(): want = load_bundle(bundle[0], 'cpu').model.scores(torch.from_numpy(x)).numpy()
    assert got.shape==(3,2,64,64) and np.abs(got-want).max()<1e-3
    assert main(['export', str(bundle[0]), '--onnx', str(tmp_path/'m.txt')])==2 and '.onnx' in capsys.readouterr().err
    real = ort.InferenceSession.run
    monkeypatch.setattr(ort.InferenceSession, 'run', lambda *a: [real(*a)[0]+.01])
    assert main(['export', str(bundle[0]), '--onnx', str(tmp_path/'n.onnx')])==2 and 'differ' in capsys.readouterr().err
    assert sorted(o.name for o in tmp_path.iterdir())==['m.onnx']

def test_predicting_with_onnx(bundle, tmp_path, monkeypatch):
    ort = pytest.importorskip('onnxruntime', reason='ONNX needs the extra onnx'); pytest.importorskip('onnx')
    there,plain = with_onnx(load_bundle(bundle[0], 'cpu')), load_bundle(bundle[0], 'cpu')
    x,runs,real = torch.randn(2,1,64,64), [], ort.InferenceSession.run
    monkeypatch.setattr(ort.InferenceSession, 'run', lambda *a: runs.append(1) or real(*a))
    with torch.inference_mode():
        assert (there.model(x)-plain.model.scores(x)).abs().max()<1e-3 and len(runs)==1
        assert there.model(torch.randn(1,1,96,96)).shape==(1,2,96,96) and len(runs)==1 # another size: PyTorch
    test = bundle[2][bundle[2]['split']=='test']
    assert all((a!=b).mean()<.02 for a,b in zip(predict_cases(there, test), predict_cases(plain, test))) and len(runs)>1
    n = len(runs)
    assert main(['predict', str(bundle[0]), str(test['image'].iloc[0]), '--out', str(tmp_path/'o'), '--onnx'])==0
    assert len(runs)>n and list((tmp_path/'o').rglob('*.png'))
