"Any two settings on any of the five layouts, from preparation to verdict"
import json, os

import nibabel as nib, numpy as np, pandas as pd, pytest, torch
from fastai.torch_core import set_seed

from brainseg_fastai.cases import DataError, Pixels
from brainseg_fastai.cli import main
from brainseg_fastai.comparison import QUESTIONS, compare_variants, named_variants, parse_variant, prepare
from brainseg_fastai.datasets import LAYOUTS, standin
from brainseg_fastai.networks import ARCHS
from brainseg_fastai.segmentation import (Checkpoint, _run_settings, fit_recipe, load_run, make_learner, predict_cases, split_cases, train_run,
                                          training_defaults, with_split)
from helpers import dataset, make_folder

NATIVE = [o for o in LAYOUTS if o!='adni']
SMALL = dict(epochs=1, size=64, patch=(32,32,32), progress=False, folds=3)
FOLDERS = dict(adni='adni_like', figshare='figshare_mat', brats='brats2020', ibsr='ibsr18_like', lgg='lgg')

@pytest.fixture(autouse=True)
def extras():
    for o in ('h5py','torchio','skimage','SimpleITK'): pytest.importorskip(o, reason='the other data sets need the extra all')

def cases_of(layout, unit='slice', n=6):
    t = LAYOUTS[layout].cases(standin(layout, n=n), unit=unit)
    return with_split(t, split_cases(t, 3, stratify=LAYOUTS[layout].stratify))

def test_variants_from_text():
    assert parse_variant('arch=unet depth=4 steps=none patch=32,48,64')==dict(arch='unet', depth=4, steps='', patch=(32,48,64))
    for text in ('arch','archi=unet','depth=four','folder=x','seed=1'):
        with pytest.raises(DataError, match='expected'): parse_variant(text)
    for layout,(a,b) in QUESTIONS.items(): assert len(named_variants('.', layout))==2 and parse_variant(a)!=parse_variant(b)
    with pytest.raises(DataError, match='two that differ'): named_variants('.', 'lgg', 'arch=unet', 'arch=unet')

@pytest.mark.parametrize('layout', NATIVE)
def test_both_variants_have_the_same_people_on_the_same_side(layout):
    r = prepare(standin(layout), named_variants(None, layout), 3, progress=False, layout=layout)
    sides = [{(f,s,p) for f,s,p in r['split'][r['split'].subject.isin(t.subject)][['fold','subject','split']].itertuples(index=False)}
             for t in r['tables'].values()]
    assert sides[0]==sides[1] and r['split'].groupby(['fold','subject']).split.nunique().eq(1).all()
    assert set(r['split'].query('split=="test"').subject)==set().union(*(t.subject for t in r['tables'].values()))

def test_splits_are_balanced_by_tumour_type():
    t = pd.DataFrame([dict(subject=f's{i}', scan='-', slice=str(j), kind='t1c', image=f's{i}-{j}.mat', label='abc'[i%3]) for i in range(18) for j in range(3)])
    s = split_cases(t, 3, stratify='label').merge(t[['image','label']], on='image')
    assert (s.query('split=="test"').groupby(['fold','label']).subject.nunique()==2).all()
    one = split_cases(t, 1, stratify='label').merge(t[['image','label']], on='image')
    assert one.query('split=="test"').label.nunique()==3

@pytest.mark.parametrize('key,value,word', [('mode','cube','slice, patch, volume'), ('schedule','linear','one-cycle'), ('loss','hinge','expected'),
                                            ('steps','sharpen','n4'), ('arch','vgg','unet'), ('sampling','half','uniform')])
def test_unknown_settings_are_told(tmp_path, key, value, word):
    with pytest.raises(DataError, match=word): train_run(cases_of('figshare'), tmp_path/'r', epochs=1, size=64, **{key: value})

def test_best_weights_cosine_and_exact_resume(tmp_path, monkeypatch):
    t = cases_of('figshare'); kw = dict(epochs=4, size=64, pick='best', schedule='cosine', arch='unet', depth=3, width=4, seed=3)
    whole = train_run(t, tmp_path/'a', **kw)
    import brainseg_fastai.segmentation as seg
    from fastai.callback.core import Callback
    class Stop(Callback):
        order = 99
        def before_epoch(self):
            if self.epoch==2: raise KeyboardInterrupt
    make = seg.make_learner
    monkeypatch.setattr(seg, 'make_learner', lambda *a: make(*a).add_cb(Stop()))
    with pytest.raises(KeyboardInterrupt): train_run(t, tmp_path/'b', **kw)
    assert (tmp_path/'b'/'checkpoint.pt').exists() and not (tmp_path/'b'/'run.json').exists()
    monkeypatch.setattr(seg, 'make_learner', make)
    again = train_run(t, tmp_path/'b', **kw)
    drop = lambda c: c.drop(columns='seconds')
    pd.testing.assert_frame_equal(drop(whole['curve']), drop(again['curve']))
    assert (tmp_path/'a'/'model.safetensors').read_bytes()==(tmp_path/'b'/'model.safetensors').read_bytes()
    assert list(whole['curve'].epoch)==[0,1,2,3] and not (tmp_path/'b'/'best.safetensors').exists()

def test_steps_are_fitted_on_training_images_and_come_back(tmp_path):
    t = cases_of('figshare')
    r = train_run(t, tmp_path/'r', epochs=1, size=64, arch='unet', depth=3, width=4, steps='match,zscore', loss='weighted_ce+dice', sampling='foreground')
    learn = load_run(tmp_path/'r', t)
    again = predict_cases(learn, t[t.split=='test'])
    from PIL import Image
    saved = [np.array(Image.open(o)) for o in r['scores'].prediction]
    assert r['settings']['steps_state'] and all(np.array_equal(a, b) for a,b in zip(saved, again))

def test_slices_are_scored_as_the_volume_that_they_are(tmp_path):
    t = cases_of('brats'); raw = LAYOUTS['brats']
    r = train_run(t, tmp_path/'r', epochs=1, size=64, arch='unet', depth=3, width=4, codes=raw.codes, regions=raw.regions, per='volume')
    s = r['scores']
    assert len(s)==t[t.split=='test'].subject.nunique() and {'dice_ET','dice_TC','dice_WT','hd95_WT','volume_diff_ET'} <= set(s) and set(s.unit)=={'mm'}
    case = next(o for o in t.itertuples() if o.subject==s.subject[0])
    pred,true = nib.load(s.prediction[0]), nib.load(case.mask.files[0])
    assert pred.shape==true.shape and np.allclose(pred.affine, true.affine) and set(np.unique(pred.dataobj)) <= {0,1,2,4}
    a,b = (np.isin(np.asarray(o.dataobj), (1,2,4)) for o in (pred, true))
    assert np.isclose(s.dice_WT[0], 2*(a&b).sum()/(a.sum()+b.sum()))

def run(*args): return main([str(o) for o in args])

@pytest.mark.slow
@pytest.mark.parametrize('layout', LAYOUTS)
def test_the_commands_on_every_layout(layout, tmp_path, capsys, real=False):
    root = dataset(FOLDERS[layout]) if real else make_folder(tmp_path/'d', 6, 1) if layout=='adni' else standin(layout)
    assert run('check', root, '--layout', layout)==0
    small = ['--epochs', 1, '--size', 64, '--patch', '64,64,64' if real else '32,32,32', '--folds', 3, '--no-control', '--no-pretrained']
    assert run('compare', root, '--layout', layout, '--out', tmp_path/'r', *small)==0
    c = json.loads((tmp_path/'r'/'comparison.json').read_text())
    assert c['n_subjects']==len(pd.read_csv(tmp_path/'r'/'scores.csv', dtype=str).subject.unique()) and c['folds']==3
    assert c['sentence'] in capsys.readouterr().out and (tmp_path/'r'/'report.html').stat().st_size > 10_000
    assert c['simulated'] == (not real and layout!='adni')

@pytest.mark.slow
@pytest.mark.parametrize('layout', [o for o in LAYOUTS if o!='adni'])
def test_the_commands_on_the_samples(layout, tmp_path, capsys): test_the_commands_on_every_layout(layout, tmp_path, capsys, real=True)

@pytest.mark.slow
@pytest.mark.parametrize('arch', ARCHS)
def test_every_network_learns(arch, tmp_path):
    flat = 2 in np.atleast_1d(ARCHS[arch].dims)
    t = cases_of('figshare') if flat else cases_of('ibsr', 'volume')
    more = dict(size=64) if flat else dict(mode='patch', patch=(32,32,32))
    r = train_run(t, tmp_path/'r', arch=arch, epochs=2, pretrained=False, **more)
    loss = r['curve'].train_loss
    assert np.isfinite(loss).all() and loss.iloc[-1] < loss.iloc[0]

@pytest.mark.slow
@pytest.mark.parametrize('arch', ARCHS)
def test_every_network_learns_on_a_sample(arch):
    "The same on development data; without scoring, which takes most of the time there"
    flat = 2 in np.atleast_1d(ARCHS[arch].dims)
    layout = 'figshare' if flat else 'ibsr'
    t = LAYOUTS[layout].cases(dataset(FOLDERS[layout]), unit='slice' if flat else 'volume')
    t = with_split(t, split_cases(t, 3, stratify=LAYOUTS[layout].stratify))
    more = dict(size=128) if flat else dict(mode='patch', patch=(32,32,32), bs=1)
    s = _run_settings(t, {**training_defaults(), 'arch': arch, 'epochs': 2, 'pretrained': False, 'codes': LAYOUTS[layout].codes, **more})
    set_seed(1, reproducible=True)
    learn,ck = make_learner(t, s), Checkpoint()
    fit_recipe(learn, epochs=2, checkpoint=ck)
    first,last = (o['train_loss'] for o in ck.curve)
    assert np.isfinite([first,last]).all() and last<first

def test_tracking_is_off_unless_asked_for(tmp_path, monkeypatch):
    import brainseg_fastai.tracking as tracking
    asked = []
    monkeypatch.setattr(tracking, 'log_run', lambda track, out: asked.append((track, out)))
    monkeypatch.setattr(tracking, 'check_track', lambda track, out: None)
    v = {k: dict(arch='unet', depth=3, width=w) for k,w in (('narrow',4), ('wide',8))}
    kw = dict(layout='figshare', epochs=1, size=64, folds=3, control=False, progress=False)
    compare_variants(standin('figshare'), tmp_path/'a', v, **kw)
    assert asked==[]
    compare_variants(standin('figshare'), tmp_path/'a', v, track='mlflow', resume=True, **kw)
    assert asked==[('mlflow', tmp_path/'a')]

@pytest.mark.parametrize('args', [('--arch','vgg'), ('--mode','patch','--patch','40,40,40','--arch','unetr'), ('--loss','hinge'), ('--steps','sharpen'),
                                  ('--steps','clahe'), ('--a','arch=unet'), ('--a','arch=unet','size=100','--b','arch=attention_unet')])
def test_settings_are_refused_before_anything_is_written(args, tmp_path, capsys):
    if args==('--a','arch=unet'): args = ('--a','arch=unet','--b','arch=unet')
    assert run('compare', standin('figshare'), '--layout', 'figshare', '--out', tmp_path/'r', *args)==2
    said = capsys.readouterr().err
    assert said.startswith('brainseg: ') and 'Traceback' not in said
    assert not (tmp_path/'r').exists()

def test_a_mode_for_both_variants_asks_for_volumes(tmp_path):
    v = {k: dict(arch='unet3d', depth=2, width=w) for k,w in (('narrow',2), ('wide',4))}
    r = compare_variants(standin('ibsr'), tmp_path/'r', v, layout='ibsr', mode='volume', epochs=1, folds=3, control=False, progress=False)
    assert all((t['slice']=='').all() for t in r['tables'].values()) and r['comparison'].n_subjects==6
