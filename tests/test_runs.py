"Training runs: the same scores again, interrupted or not; what is kept in their folder, and bundles that others may use"
import json, os, pickle, shutil, subprocess, sys, urllib.error, urllib.request, warnings
from dataclasses import replace
from pathlib import Path

import matplotlib; matplotlib.use('Agg')
import numpy as np, pandas as pd, pytest, torch
from fastai.layers import SelfAttention
from fastai.vision.all import Callback, DynamicUnet, Learner, Mish, load_learner, nn, resnet18, set_seed
from PIL import Image
from torchvision.models import ResNet18_Weights

import brainseg_fastai.networks
import brainseg_fastai.runs as R
from brainseg_fastai.adni import ADNI, adni_cases
from brainseg_fastai.brats import LAYOUT as BRATS
from brainseg_fastai.cases import standin
from brainseg_fastai.cli import main
from brainseg_fastai.core import DataError
from brainseg_fastai.ibsr import LAYOUT as IBSR
from brainseg_fastai.images import raw_mask
from brainseg_fastai.inference import training_spacing
from brainseg_fastai.lgg import LAYOUT as LGG
from brainseg_fastai.runs import (hashes, label_table, load_bundle, pool_bundle, prepare_learner, read_config, train_folds,
                                  train_run, training_slab, with_onnx)
from brainseg_fastai.segmentation import predict_cases, score_cases, split_cases
from brainseg_fastai.settings import Settings
from brainseg_fastai.splits import with_split
from brainseg_fastai.training import Checkpoint, fit_recipe
from helpers import make_folder

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return make_folder(tmp_path_factory.mktemp('seg')/'data', 6, 2)

@pytest.fixture(scope='module')
def cases(folder):
    t = adni_cases(folder)
    return with_split(t, split_cases(t, 1, .2, .3, seed=1))

QUICK = Settings(inputs='brain', epochs=1, size=64, pretrained=False)

def tiny(cases, folder, test_sets=None, **kwargs):
    "One short training run"
    return train_run(cases, folder, replace(QUICK, **kwargs), test_sets=test_sets)

def learner(cases, codes=(0,255), **kwargs):
    "An untrained learner"
    s = Settings(**{**dict(inputs='brain', size=64, bs=2, pretrained=False), **kwargs})
    return prepare_learner(cases, s.filled(int((cases['split']=='train').sum())), codes)

def leftovers(folder): return [p.name for p in Path(folder).rglob('*') if p.name.startswith('.') or 'tmp' in p.suffix]

def test_a_training_that_found_nothing_says_so(cases, tmp_path, monkeypatch):
    score = R.score_cases
    monkeypatch.setattr(R, 'score_cases', lambda *args, **kwargs: score(*args, **kwargs).assign(size_pred=0.))
    with pytest.warns(UserWarning, match=r'^brain, seed 42: the network found nothing in any of its \d+ test cases\. Its training got stuck'):
        tiny(cases, tmp_path/'run')

# ---- training runs

def curve(run): return run.curve.drop(columns='seconds')

@pytest.fixture(scope='module')
def whole(cases, tmp_path_factory):
    "An uninterrupted run"
    torch.set_num_threads(1)
    return tiny(cases, tmp_path_factory.mktemp('run')/'whole', epochs=3)

def test_run(whole, cases):
    s,folder = whole.scores, whole.folder
    assert set(s.subject)==set(cases.subject[cases.split=='test']) and len(s)==(cases.split=='test').sum()
    assert set(s.tested_on)=={'brain'} and s.dice.between(0, 1).all()
    assert list(whole.curve.columns)==['epoch','seconds','train_loss','valid_loss','valid_dice']
    assert list(whole.curve.epoch)==[0,1,2]
    assert whole.curve.seconds.is_monotonic_increasing and whole.curve.notna().all(axis=None)
    assert whole.config['start']=='random' and whole.config['versions']['threads']==1 and whole.settings.epochs==3
    assert not leftovers(folder) and not (folder/'checkpoint.pt').exists()
    again = score_cases(whole.model(), cases[cases.split=='test'])
    assert list(again.dice)==list(s.dice) and list(again.hd95)==list(s.hd95)

def test_same_seed_same_scores(whole, cases, tmp_path):
    a = tiny(cases, tmp_path/'a', epochs=3)
    for f in 'scores.csv','model.safetensors': assert (a.folder/f).read_bytes()==(whole.folder/f).read_bytes()
    pd.testing.assert_frame_equal(curve(a), curve(whole))
    b = tiny(cases, tmp_path/'b', epochs=3, seed=43)
    assert list(b.curve.train_loss)!=list(whole.curve.train_loss)
    assert (b.folder/'scores.csv').read_bytes()!=(whole.folder/'scores.csv').read_bytes()

class Stop(Callback):
    "Ctrl-C at the end of an epoch, or within the next one's first batch"
    order = 66
    def __init__(self, after, within=False): self.after,self.within = after,within
    def before_epoch(self): self.last = self.epoch
    def after_epoch(self):
        if not self.within and self.epoch==self.after: raise KeyboardInterrupt
    def after_pred(self):
        if self.within and self.training and self.epoch==self.after+1: raise KeyboardInterrupt

def interrupt(monkeypatch, stop):
    "Every learner made from now on is interrupted, and every epoch is saved"
    make,check = R.prepare_learner, R.Checkpoint
    monkeypatch.setattr(R, 'prepare_learner', lambda *a, **k: make(*a, **k).add_cb(stop))
    monkeypatch.setattr(R, 'Checkpoint', lambda path, **kwargs: check(path, every=0, **kwargs))

@pytest.mark.parametrize('after,within', [(0,False), (1,True)])
def test_interrupted_and_resumed(whole, cases, tmp_path, monkeypatch, capsys, after, within):
    with monkeypatch.context() as m:
        interrupt(m, Stop(after, within))
        with pytest.raises(KeyboardInterrupt): tiny(cases, tmp_path/'run', epochs=3)
    assert 'resume' in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path/'run').iterdir())==['checkpoint.pt','key.json']
    state = torch.load(tmp_path/'run'/'checkpoint.pt', weights_only=True) # nothing in it needs unpickling
    assert len(state['curve'])==after+1
    torch.rand(7); np.random.rand(7) # whatever happened in between
    fits = []
    monkeypatch.setattr(Checkpoint, 'after_batch', lambda self: fits.append(self.epoch) if self.training else None, raising=False)
    r = tiny(cases, tmp_path/'run', epochs=3)
    assert min(fits)==after+1 # not from the beginning
    for f in 'model.safetensors','scores.csv': assert (r.folder/f).read_bytes()==(whole.folder/f).read_bytes()
    pd.testing.assert_frame_equal(curve(r), curve(whole))
    assert r.curve.seconds.is_monotonic_increasing and not (r.folder/'checkpoint.pt').exists()

def test_fit_without_checkpoint(cases):
    learn = learner(cases)
    fit_recipe(learn, replace(QUICK, bs=2))
    assert len(learn.recorder.values)==1

def test_interrupt_leaves_no_autocast(cases, monkeypatch):
    monkeypatch.setattr(brainseg_fastai.networks, 'fast_bf16', lambda device: True)
    learn = learner(cases)
    first = next(m for m in learn.model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        with pytest.raises(KeyboardInterrupt): fit_recipe(learn, replace(QUICK, bs=2), Checkpoint(Path('none.pt'), every=float('inf')))
        assert not torch.is_autocast_enabled('cpu') # it would change the rounding of everything that follows
    finally: torch.set_autocast_enabled('cpu', False)

def test_complete_run_is_kept(cases, tmp_path, monkeypatch):
    a = tiny(cases, tmp_path/'run')
    times = {p: p.stat().st_mtime_ns for p in a.folder.rglob('*') if p.is_file()}
    def no(*args, **kwargs): raise AssertionError('trained again')
    with monkeypatch.context() as m:
        m.setattr(R, 'fit_recipe', no)
        b = tiny(cases, tmp_path/'run')
        assert times=={p: p.stat().st_mtime_ns for p in a.folder.rglob('*') if p.is_file()}
        pd.testing.assert_frame_equal(a.scores, b.scores); pd.testing.assert_frame_equal(a.curve, b.curve)
        shutil.move(tmp_path/'run', tmp_path/'moved')
        assert all(Path(o).is_file() for o in tiny(cases, tmp_path/'moved').scores.prediction)
        swapped = cases.assign(split=cases.split.replace({'valid':'train', 'train':'valid'}))
        changes = dict(epochs=2), dict(seed=1), dict(size=96), dict(test_sets={'brain': cases[:1]}), dict(cases=swapped)
        for i,change in enumerate(changes):
            copy = shutil.copytree(tmp_path/'moved', tmp_path/f'copy{i}')
            with pytest.raises(AssertionError, match='trained again'): tiny(**{**dict(cases=cases, folder=copy), **change})

def test_changed_images_are_noticed(tmp_path, monkeypatch):
    t = adni_cases(make_folder(tmp_path/'data', 4, 1))
    t = with_split(t, split_cases(t, 1))
    other = adni_cases(make_folder(tmp_path/'other', 3, 1, seed=5))
    run = lambda: tiny(t, tmp_path/'run', epochs=12, test_sets={'brain': t[t.split=='test'], 'external': other}) # until something is found
    run()
    Image.fromarray(255-np.array(Image.open(other.image[0]))).save(other.image[0])
    old = (tmp_path/'run'/'scores.csv').read_bytes()
    run()
    assert (tmp_path/'run'/'scores.csv').read_bytes()!=old

def test_nothing_half_written(cases, tmp_path, monkeypatch):
    def broken(*args, **kwargs): raise RuntimeError('disk full')
    with monkeypatch.context() as m:
        m.setattr(R, 'score_cases', broken)
        with pytest.raises(RuntimeError, match='disk full'): tiny(cases, tmp_path/'run')
    assert not (tmp_path/'run'/'config.json').exists() and not (tmp_path/'run'/'scores.csv').exists() and not leftovers(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(pd.DataFrame, 'to_csv', lambda self, path, **k: (Path(path).write_text('half'), broken()))
        with pytest.raises(RuntimeError, match='disk full'): tiny(cases, tmp_path/'run')
    assert not (tmp_path/'run'/'config.json').exists() and not leftovers(tmp_path)
    assert tiny(cases, tmp_path/'run').settings.epochs==1 and not leftovers(tmp_path)

def test_other_peoples_folders_are_safe(cases, tmp_path):
    (tmp_path/'thesis.txt').write_text('three years of work')
    with pytest.raises(DataError, match=tmp_path.name): tiny(cases, tmp_path)
    assert (tmp_path/'thesis.txt').exists()

@pytest.mark.parametrize('part', ['train','valid','test'])
def test_nothing_to_train_or_test(cases, tmp_path, part):
    with pytest.raises(DataError, match=part): tiny(cases[cases.split!=part], tmp_path/'run')
    assert not (tmp_path/'run').exists()

def test_bad_recipe(cases, tmp_path):
    with pytest.raises(DataError, match='heavy.*light'): tiny(cases, tmp_path/'run', recipe='heavy')
    assert not (tmp_path/'run').exists()

def test_folds(folder, tmp_path):
    cases,orig = adni_cases(folder), adni_cases(folder, 'orig')
    split,lines = split_cases(cases, 3, seed=2), []
    r = train_folds(cases, split, tmp_path/'out', replace(QUICK, seed=5), others={'orig': orig}, announce=lambda *a: lines.append(a))
    s = r['scores']
    assert list(s.columns[:14])==['variant','fold','seed','subject','scan','slice','image','mask','dice','jaccard','hd95','nsd',
                                  'size_true','size_pred']
    assert sorted(f'brain/{Path(o).name}' for o in s.image)==sorted(split.image[split.split=='test']) and set(s.variant)=={'brain'}
    tests = split[split.split=='test'].set_index('image').fold
    assert (s.fold.values==tests[[f'brain/{Path(o).name}' for o in s.image]].values).all() and lines==[('brain',0,5), ('brain',1,6), ('brain',2,7)]
    every = r['all_scores']
    assert sorted(every.tested_on.value_counts().items())==[('brain',12), ('orig',12)] and set(every.variant)=={'brain'}
    assert all((tmp_path/'out'/o).is_file() and '\\' not in o for o in every.prediction) and every.prediction.is_unique
    assert r['curves'].groupby(['variant','fold','seed']).size().tolist()==[1,1,1]

def test_export_and_load(whole, cases, tmp_path):
    learn = learner(cases, epochs=3)
    learn.fast_batches.before_fit() # the order of the weights decides about last bits
    R.load_weights(learn.model, whole.folder/'model.safetensors')
    learn.export(tmp_path/'model.pkl')
    loaded = load_learner(tmp_path/'model.pkl')
    t = cases[cases.split=='test']
    assert all(np.array_equal(a.mask, b.mask) for (_,a),(_,b) in zip(predict_cases(learn, t), predict_cases(loaded, t)))
    x = torch.randn(1,1,64,64)
    with torch.inference_mode(): assert torch.equal(loaded.model.eval()(x), learn.model.eval()(x)) # masks after three epochs say little
    assert list(score_cases(loaded, t).dice)==list(whole.scores.dice)
    mask,*_ = loaded.predict(t.iloc[0])
    assert mask.shape==(64,64)

class Enough(Exception): pass

def test_published_recipe(tmp_path, monkeypatch):
    t = adni_cases(make_folder(tmp_path/'data', 12, 2))
    calls = []
    def fit(learn, n, lr=None, **kwargs):
        calls.append((n, lr, learn.opt.frozen_idx, learn.dls.bs, learn))
        if len(calls)==2: raise Enough
    monkeypatch.setattr(Learner, 'fit_one_cycle', fit)
    with pytest.raises(Enough): tiny(with_split(t, split_cases(t, 1, .1, .1)), tmp_path/'run', recipe='published', epochs=None)
    (n1,lr1,frozen1,bs,learn),(n2,lr2,frozen2,*_) = calls
    assert (n1, n2, lr1, lr2, bs)==(8, 8, 5e-5, slice(5e-5/400, 5e-5/4), 16) and frozen1 > 0 and frozen2==0
    layers = list(learn.model.modules())
    assert isinstance(learn.model, DynamicUnet) and any(isinstance(o, SelfAttention) for o in layers) and any(isinstance(o, Mish) for o in layers)
    assert learn.loss_func.terms==[(1., 'ce')]
    x,y = learn.dls.one_batch()
    assert x.shape==(16,3,64,64) and learn.model(x[:2].as_subclass(torch.Tensor)).shape==(2,2,64,64)

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty weights cache and no network"
    def offline(*args, **kwargs): raise urllib.error.URLError('no network')
    monkeypatch.setattr(urllib.request, 'urlopen', offline)
    monkeypatch.setattr(torch.hub, 'urlopen', offline)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path/'hub'))
    (tmp_path/'hub'/'checkpoints').mkdir(parents=True)
    return tmp_path/'hub'/'checkpoints'

def test_no_imagenet_weights(cases, tmp_path, hub):
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        r = tiny(cases, tmp_path/'run', pretrained=True, start='imagenet')
    told = [str(w.message) for w in ws if 'ImageNet' in str(w.message)]
    assert len(told)==1 and 'resnet18' in told[0] and 'random' in told[0] and str(hub) in told[0]
    assert r.config['start']=='random' and r.settings.pretrained is True

def test_no_warning_where_none_are_wanted(cases, hub):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert not learner(cases).pretrained

@pytest.mark.parametrize('recipe', ['light','published'])
def test_cached_imagenet_weights(cases, hub, recipe):
    set_seed(99)
    weights = resnet18(weights=None).state_dict()
    torch.save(weights, hub/ResNet18_Weights.DEFAULT.url.rsplit('/', 1)[-1])
    learn = learner(cases, recipe=recipe, pretrained=True, start='imagenet')
    have = [p for p in learn.model.parameters()]
    inside = [k for k,w in weights.items() if k.startswith(('layer1','layer2')) and k.endswith('conv2.weight')]
    assert learn.pretrained=='ImageNet' and inside and all(any(p.shape==weights[k].shape and torch.equal(p, weights[k]) for p in have) for k in inside)

@pytest.mark.parametrize('device', ['cpu','cuda'])
def test_batches_are_pinned_for_a_gpu(device, cases, monkeypatch):
    got = []
    class Block:
        def dataloaders(self, t, **kw): got.append(kw['pin_memory'])
    monkeypatch.setattr(R, 'default_device', lambda *a: torch.device(device))
    monkeypatch.setattr(R, 'brainseg_block', lambda *a, **kw: Block())
    R.slice_dls(with_split(cases, split_cases(cases, 1)), QUICK.filled(8), (0,255), None)
    assert got==[device=='cuda']

# ---- bundles

def trained(tmp_path, layout=ADNI, unit='slice', **kw):
    t = adni_cases(make_folder(tmp_path/'d', 6, 2), 'brain') if layout is ADNI else layout.cases(standin(layout), unit=unit)
    t = with_split(t, split_cases(t, 3))
    few = 12 if layout is ADNI else 1 # until something is found, where masks are asked for
    return train_run(t, tmp_path/'r', Settings(epochs=few, size=64, pretrained=False, **kw), layout), t

@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    r,t = trained(tmp_path_factory.mktemp('b'))
    return pool_bundle(r, r.folder.parent/'bundle', r.scores), r, t

SMALL = dict(arch='unet', depth=3, width=4)

@pytest.mark.parametrize('layout,unit,kw', [(ADNI,'slice',{}), (ADNI,'slice',dict(steps='match,zscore', **SMALL)), (LGG,'slice',SMALL),
    (BRATS,'slice',SMALL), (IBSR,'volume',dict(mode='volume', arch='unetr', width=4)), (BRATS,'volume',dict(mode='patch', patch=(32,32,32), arch='unet3d', depth=2, width=4))])
def test_the_same_masks_before_and_after(layout, unit, kw, tmp_path):
    for o in ('torchio','skimage','SimpleITK'): pytest.importorskip(o, reason='volumes and steps need the extra all')
    r,t = trained(tmp_path, layout, unit, **kw)
    test = t[t['split']=='test']
    model = load_bundle(r.folder)
    assert [o['code'] for o in model.config['labels']]==list(model.codes)[1:] and model.config['layout']==layout.name
    again = score_cases(model, test, regions=layout.regions, per=layout.per, save_to=tmp_path/'again')
    assert all(np.array_equal(raw_mask(a), raw_mask(b)) for a,b in zip(r.scores['prediction'], again['prediction'])) and len(again)==len(r.scores)
    if layout is ADNI: assert any(raw_mask(o).any() for o in r.scores['prediction'])

def test_the_config_says_what_there_is_to_know(bundle):
    c = read_config(bundle[0])
    assert c['channels']==['brain'] and c['spacing'] is None and c['slab'] is None and c['whole'] is False
    assert c['settings']['size']==64 and c['settings']['seed']==42 and c['settings']['epochs']==12 and c['settings']['arch']=='resnet18'
    assert c['scores']['metrics']['dice']['ci95'][0] <= c['scores']['metrics']['dice']['mean'] <= c['scores']['metrics']['dice']['ci95'][1]
    assert c['scores']['metrics']['dice']['mean']==pytest.approx(bundle[1].scores.groupby('subject').dice.mean().mean(), abs=1e-4)
    assert c['data']['subjects']['test']==bundle[2].query('split=="test"').subject.nunique() and {'torch','fastai'} <= set(c['versions'])
    card = (bundle[0]/'README.md').read_text(encoding='utf-8')
    for o in ('Not a medical device','reference standard','Out of scope','ventricles','CLAIM 2024','per image'): assert o in card, o

def test_names_slab_and_spacing():
    assert [o['name'] for o in label_table((0,1,2,4), BRATS)]==['necrotic core','oedema','enhancing tumour']
    assert [o['name'] for o in label_table((0,3,7))]==['label 3','label 7'] # nobody said what they are
    t = pd.DataFrame(dict(spacing=[.9, float('nan'), 1.1], slice=['ax1']*3, below_top=[60, 70, float('nan')]))
    assert training_slab(t)=={'below_top_mm': [60, 70]} and training_spacing(t)==(1., 1.)
    t = pd.DataFrame(dict(spacing=[(1,2,3), (1,2,3)], slice=['','']))
    assert training_slab(t) is None and training_spacing(t)==(1, 2, 3)

def copy(bundle, tmp_path): return shutil.copytree(bundle[0], tmp_path/'b')

def sign(b, **change):
    "Change a config and make its hashes fit again, as somebody would who means to deceive"
    c = {**json.loads((b/'config.json').read_text(encoding='utf-8')), **change}
    c['sha256'] = hashes(b, c)
    (b/'config.json').write_text(json.dumps(c), encoding='utf-8')

def refused(b, *words):
    with pytest.raises(DataError) as e: load_bundle(b)
    for o in words: assert o in str(e.value), (o, str(e.value))

@pytest.mark.parametrize('told', [None, 'abc', [], {}])
def test_a_config_without_its_hashes_is_refused(bundle, tmp_path, told):
    b = copy(bundle, tmp_path)
    c = json.loads((b/'config.json').read_text(encoding='utf-8'))
    (b/'config.json').write_text(json.dumps(c | dict(sha256=told)), encoding='utf-8')
    refused(b, 'SHA-256')

def test_tampered_files_are_refused(bundle, tmp_path):
    b = copy(bundle, tmp_path); f = b/'model.safetensors'
    a = bytearray(f.read_bytes()); a[-5] ^= 1; f.write_bytes(a)
    refused(b, 'model.safetensors', 'SHA-256')
    b = shutil.rmtree(b) or copy(bundle, tmp_path)
    c = json.loads((b/'config.json').read_text()); c['labels'][0]['name'] = 'tumour'; (b/'config.json').write_text(json.dumps(c))
    refused(b, 'another config than was written')
    (b/'config.json').write_text('{'); refused(b, 'broken JSON', 'Copy the bundle again')
    (b/'config.json').write_text('{}'); refused(b, 'no bundle that this release can read (format None)', 'Copy the bundle again')
    (b/'config.json').unlink(); refused(b, 'no config.json')
    refused(tmp_path/'nowhere', 'no config.json')

def test_mismatches_are_refused_even_with_fitting_hashes(bundle, tmp_path):
    b = copy(bundle, tmp_path); s = read_config(b)['settings']
    for change,word in ((dict(arch='vgg99'), 'vgg99'), (dict(arch='resnet34'), 'the weights of resnet34'), 
                        (dict(steps='sharpen'), 'sharpen'), (dict(loss='hinge'), 'hinge')):
        sign(b, settings={**s, **change}); refused(b, word)
    sign(b, settings=s, codes=[0,1,2]); refused(b, 'model.safetensors')
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
    run = bundle[1]
    with pytest.raises(DataError, match='no bundle'): pool_bundle(run, tmp_path/'x', run.scores)
    assert [o.name for o in (tmp_path/'x').iterdir()]==['thesis.txt']
    with pytest.raises(KeyError): pool_bundle(run, tmp_path/'y', run.scores.drop(columns='unit'))
    assert not (tmp_path/'y').exists() and not [o for o in tmp_path.iterdir() if o.name.startswith('.')]

def test_weights_of_a_gpu_load_on_a_cpu(bundle):
    from safetensors import safe_open
    model = load_bundle(bundle[0], device='cpu') # safetensors keep no device
    assert {p.device.type for p in model.net.parameters()}=={'cpu'}==set([model.device.type])
    with safe_open(bundle[0]/'model.safetensors', 'pt') as f: assert 'cuda' not in str(f.metadata())

def test_a_bundle_is_small_and_complete(bundle):
    assert sorted(o.name for o in bundle[0].iterdir())==['README.md','config.json','model.safetensors']
    code = f'import sys; from brainseg_fastai.runs import load_bundle; print(load_bundle({str(bundle[0])!r}).codes)'
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode==0 and r.stdout.strip()=='(0, 255)', r.stderr[-2000:]

def test_export(bundle, tmp_path, capsys, monkeypatch):
    ort = pytest.importorskip('onnxruntime', reason='ONNX needs the extra onnx'); pytest.importorskip('onnx')
    out = tmp_path/'m.onnx'
    assert main(['export', str(bundle[0]), '--onnx', str(out)])==0
    assert 'largest difference' in capsys.readouterr().out.lower()
    x = np.random.default_rng(0).normal(size=(3,1,64,64)).astype(np.float32)
    got = ort.InferenceSession(str(out)).run(None, {'image': x})[0]
    with torch.inference_mode(): want = R.InFloat32(load_bundle(bundle[0], 'cpu').net)(torch.from_numpy(x)).numpy()
    assert got.shape==(3,2,64,64) and np.abs(got-want).max()<1e-3
    assert main(['export', str(bundle[0]), '--onnx', str(tmp_path/'m.txt')])==2 and 'Name a file that ends in .onnx.' in capsys.readouterr().err
    assert main(['export', str(bundle[0]), '--onnx', str(out/'x.onnx')])==2 and 'Choose another place' in capsys.readouterr().err
    real = ort.InferenceSession.run
    monkeypatch.setattr(ort.InferenceSession, 'run', lambda *a: [real(*a)[0]+.01])
    assert main(['export', str(bundle[0]), '--onnx', str(tmp_path/'n.onnx')])==2 and 'differ' in capsys.readouterr().err
    assert sorted(o.name for o in tmp_path.iterdir())==['m.onnx']

def test_predicting_with_onnx(bundle, tmp_path, monkeypatch):
    ort = pytest.importorskip('onnxruntime', reason='ONNX needs the extra onnx'); pytest.importorskip('onnx')
    there,plain = with_onnx(load_bundle(bundle[0], 'cpu')), load_bundle(bundle[0], 'cpu')
    assert not there.net.net.training # the exporter leaves a network as it found what it was given
    x,runs,real = torch.randn(2,1,64,64), [], ort.InferenceSession.run
    monkeypatch.setattr(ort.InferenceSession, 'run', lambda *a: runs.append(1) or real(*a))
    with torch.inference_mode():
        assert (there.net(x)-R.InFloat32(plain.net)(x)).abs().max()<1e-3 and len(runs)==1
        assert there.net(torch.randn(1,1,96,96)).shape==(1,2,96,96) and len(runs)==1 # another size: PyTorch
    test = bundle[2][bundle[2]['split']=='test']
    assert all((a.mask!=b.mask).mean()<.02 for (_,a),(_,b) in zip(predict_cases(there, test), predict_cases(plain, test))) and len(runs)>1
    n = len(runs)
    assert main(['predict', str(bundle[0]), str(test['image'].iloc[0]), '--out', str(tmp_path/'o'), '--onnx'])==0
    assert len(runs)>n and list((tmp_path/'o').rglob('*.png'))
