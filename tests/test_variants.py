"Any two settings on any of the five layouts, from preparation to verdict"
import json
from dataclasses import replace

import nibabel as nib, numpy as np, pandas as pd, pytest
from fastai.callback.core import Callback
from fastai.torch_core import set_seed

from brainseg_fastai import comparison, runs
from brainseg_fastai.cases import standin
from brainseg_fastai.cli import LAYOUTS, main
from brainseg_fastai.comparison import compare_variants, named_variants, prepare
from brainseg_fastai.core import DataError
from brainseg_fastai.images import raw_mask
from brainseg_fastai.networks import ARCHS
from brainseg_fastai.runs import Run, prepare_learner, train_run
from brainseg_fastai.segmentation import predict_cases, split_cases
from brainseg_fastai.settings import Settings, parse_settings
from brainseg_fastai.splits import with_split
from brainseg_fastai.training import Checkpoint, fit_recipe
from helpers import dataset, make_folder
from tiny import layout_of

NATIVE = [o for o in LAYOUTS if o!='adni']
FOLDERS = dict(adni='adni_like', figshare='figshare_mat', brats='brats2020', ibsr='ibsr18_like', lgg='lgg')
SMALL = Settings(arch='unet', depth=3, width=4, size=64, epochs=1)
FIGSHARE,BRATS,IBSR = map(layout_of, ('figshare','brats','ibsr'))

@pytest.fixture(autouse=True)
def extras():
    for o in ('h5py','torchio','skimage','SimpleITK'): pytest.importorskip(o, reason='the other data sets need the extra all')

def cases_of(layout, unit='slice', root=None):
    t = layout.cases(root or standin(layout), unit=unit)
    return with_split(t, split_cases(t, 3, stratify=layout.stratify))

def test_variants_from_text(tmp_path):
    s = parse_settings('arch=unet depth=4 steps=none patch=32,48,64')
    assert (s.arch, s.depth, s.steps, s.patch)==('unet', 4, '', (32,48,64))
    for text in ('arch','archi=unet','depth=four','folder=x'):
        with pytest.raises(DataError, match='expected'): parse_settings(text)
    for o in LAYOUTS:
        a,b = named_variants(tmp_path, layout_of(o)).values()
        assert isinstance(a, Settings) and a!=b
    with pytest.raises(DataError, match='two that differ'): named_variants(tmp_path, layout_of('lgg'), 'arch=unet', 'arch=unet')

@pytest.mark.parametrize('name', NATIVE)
def test_both_variants_have_the_same_people_on_the_same_side(name):
    layout = layout_of(name)
    r = prepare(standin(layout), named_variants(None, layout), layout, folds=3, progress=False)
    split = r['split']
    sides = [set(split[split.subject.isin(t.subject)][['fold','subject','split']].itertuples(index=False, name=None))
             for t in r['tables'].values()]
    assert sides[0]==sides[1] and split.groupby(['fold','subject']).split.nunique().eq(1).all()
    assert set(split.query('split=="test"').subject)==set().union(*(t.subject for t in r['tables'].values()))

def test_splits_are_balanced_by_tumour_type():
    t = pd.DataFrame([dict(subject=f's{i}', scan='-', slice=str(j), inputs='t1c', image=f's{i}-{j}.mat', label='abc'[i%3])
                      for i in range(18) for j in range(3)])
    s = split_cases(t, 3, stratify='label').merge(t[['image','label']], on='image')
    assert (s.query('split=="test"').groupby(['fold','label']).subject.nunique()==2).all()
    one = split_cases(t, 1, stratify='label').merge(t[['image','label']], on='image')
    assert one.query('split=="test"').label.nunique()==3

@pytest.mark.parametrize('key,value,word', [('mode','cube','slice, patch, volume'), ('schedule','linear','one-cycle'), ('loss','hinge','expected'),
                                            ('steps','sharpen','n4'), ('arch','vgg','unet'), ('sampling','half','uniform')])
def test_unknown_settings_are_told(key, value, word):
    with pytest.raises(DataError, match=word): replace(SMALL, **{key: value})

class Stop(Callback):
    "Interrupts the third epoch"
    order = 99
    def before_epoch(self):
        if self.epoch==2: raise KeyboardInterrupt

def test_best_weights_cosine_and_exact_resume(tmp_path, monkeypatch):
    t,make = cases_of(FIGSHARE), runs.prepare_learner
    s = replace(SMALL, epochs=4, pick='best', schedule='cosine', seed=3)
    whole = train_run(t, tmp_path/'a', s, FIGSHARE)
    with monkeypatch.context() as m:
        m.setattr(runs, 'prepare_learner', lambda *args: make(*args).add_cb(Stop()))
        with pytest.raises(KeyboardInterrupt): train_run(t, tmp_path/'b', s, FIGSHARE)
    assert (tmp_path/'b'/'checkpoint.pt').exists() and not (tmp_path/'b'/'config.json').exists()
    again = train_run(t, tmp_path/'b', s, FIGSHARE)
    pd.testing.assert_frame_equal(*(o.curve.drop(columns='seconds') for o in (whole, again)))
    assert (tmp_path/'a'/'model.safetensors').read_bytes()==(tmp_path/'b'/'model.safetensors').read_bytes()
    assert list(whole.curve.epoch)==[0,1,2,3]
    assert not {'checkpoint.pt','best.safetensors'} & {p.name for p in (tmp_path/'b').iterdir()}

def test_steps_are_fitted_on_training_images_and_come_back(tmp_path):
    t = cases_of(FIGSHARE)
    r = train_run(t, tmp_path/'r', replace(SMALL, steps='match,zscore', loss='weighted_ce+dice', sampling='foreground'), FIGSHARE)
    assert r.config['steps_state']
    again = predict_cases(Run(tmp_path/'r').model(), t[t.split=='test'])
    for path,(case,masks) in zip(r.scores.prediction, again, strict=True): assert np.array_equal(raw_mask(path), masks.mask)

def test_slices_are_scored_as_the_volume_that_they_are(tmp_path):
    t = cases_of(BRATS)
    s = train_run(t, tmp_path/'r', SMALL, BRATS).scores
    assert len(s)==t[t.split=='test'].subject.nunique() and set(s.unit)=={'mm'}
    assert {'dice_ET','dice_TC','dice_WT','hd95_WT','volume_diff_ET'} <= set(s)
    case = next(o for o in t.itertuples() if o.subject==s.subject[0])
    pred,true = nib.load(s.prediction[0]), nib.load(case.mask.files[0])
    assert pred.shape==true.shape and np.allclose(pred.affine, true.affine) and set(np.unique(pred.dataobj)) <= {0,1,2,4}
    a,b = (np.isin(np.asarray(o.dataobj), (1,2,4)) for o in (pred, true))
    assert np.isclose(s.dice_WT[0], 2*(a&b).sum()/(a.sum()+b.sum()))

def run(*args): return main([str(o) for o in args])

@pytest.mark.slow
@pytest.mark.parametrize('layout', LAYOUTS)
def test_the_commands_on_every_layout(layout, tmp_path, capsys, real=False):
    root = dataset(FOLDERS[layout]) if real else make_folder(tmp_path/'d', 6, 1) if layout=='adni' else standin(layout_of(layout))
    assert run('check', root, '--layout', layout)==0
    small = ['--epochs', 1, '--size', 64, '--patch', '64,64,64' if real else '32,32,32', '--folds', 3, '--no-control', '--no-pretrained']
    assert run('compare', root, '--layout', layout, '--out', tmp_path/'r', *small)==0
    c = json.loads((tmp_path/'r'/'comparison.json').read_text())
    assert c['n_subjects']==len(pd.read_csv(tmp_path/'r'/'scores.csv', dtype=str).subject.unique()) and c['folds']==3
    assert c['sentence'] in capsys.readouterr().out and (tmp_path/'r'/'report.html').stat().st_size > 10_000
    assert c['simulated'] == (not real and layout!='adni')

@pytest.mark.slow
@pytest.mark.parametrize('layout', NATIVE)
def test_the_commands_on_the_samples(layout, tmp_path, capsys): test_the_commands_on_every_layout(layout, tmp_path, capsys, real=True)

def flat(arch): return 2 in np.atleast_1d(ARCHS[arch].dims)

@pytest.mark.slow
@pytest.mark.parametrize('arch', ARCHS)
def test_every_network_learns(arch, tmp_path):
    layout = FIGSHARE if flat(arch) else IBSR
    how = dict(size=64) if flat(arch) else dict(mode='patch', patch=(32,32,32))
    t = cases_of(layout, 'slice' if flat(arch) else 'volume')
    loss = train_run(t, tmp_path/'r', Settings(arch=arch, epochs=2, pretrained=False, **how), layout).curve.train_loss
    assert np.isfinite(loss).all() and loss.iloc[-1] < loss.iloc[0]

@pytest.mark.slow
@pytest.mark.parametrize('arch', ARCHS)
def test_every_network_learns_on_a_sample(arch):
    "The same on development data; without scoring, which takes most of the time there"
    layout = FIGSHARE if flat(arch) else IBSR
    how = dict(size=128) if flat(arch) else dict(mode='patch', patch=(32,32,32), bs=1)
    t = cases_of(layout, 'slice' if flat(arch) else 'volume', dataset(FOLDERS[layout.name]))
    s = Settings(arch=arch, epochs=2, pretrained=False, **how).filled(int((t.split=='train').sum()))
    set_seed(1, reproducible=True)
    learn,ck = prepare_learner(t, s, tuple(layout.labels)), Checkpoint()
    fit_recipe(learn, s, ck)
    first,last = (o['train_loss'] for o in ck.curve)
    assert np.isfinite([first,last]).all() and last<first

def test_tracking_is_off_unless_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(comparison, 'log_run', lambda track, out: asked.append((track, out)) or dict(look=''))
    monkeypatch.setattr(comparison, 'check_track', lambda track, out: None)
    v = {k: replace(SMALL, width=w) for k,w in (('narrow',4), ('wide',8))}
    kw = dict(layout=FIGSHARE, folds=3, control=False, progress=False)
    compare_variants(standin(FIGSHARE), tmp_path/'a', v, **kw)
    assert asked==[]
    compare_variants(standin(FIGSHARE), tmp_path/'a', v, track='mlflow', resume=True, **kw)
    assert asked==[('mlflow', tmp_path/'a')]

@pytest.mark.parametrize('args', [('--arch','vgg'), ('--mode','patch','--patch','40,40,40','--arch','unetr'), ('--loss','hinge'), ('--steps','sharpen'),
                                  ('--steps','clahe'), ('--a','arch=unet','--b','arch=unet'), ('--a','arch=unet','size=100','--b','arch=attention_unet')])
def test_settings_are_refused_before_anything_is_written(args, tmp_path, capsys):
    assert run('compare', standin(FIGSHARE), '--layout', 'figshare', '--out', tmp_path/'r', *args)==2
    said = capsys.readouterr().err
    assert said.startswith('brainseg: ') and 'Traceback' not in said
    assert not (tmp_path/'r').exists()

def test_an_unknown_layout_is_told_all_that_there_are(capsys):
    with pytest.raises(SystemExit): run('check', '.', '--layout', 'bratz')
    said = capsys.readouterr().err
    assert all(o in said for o in ('adni','figshare','brats','ibsr','lgg'))

def test_a_mode_for_both_variants_asks_for_volumes(tmp_path):
    v = {k: Settings(mode='volume', arch='unet3d', depth=2, width=w, epochs=1) for k,w in (('narrow',2), ('wide',4))}
    r = compare_variants(standin(IBSR), tmp_path/'r', v, layout=IBSR, folds=3, control=False, progress=False)
    assert all((t['slice']=='').all() for t in r['tables'].values()) and r['comparison'].n_subjects==6
