"Settings on every layout: what they change is trained, scored, kept and resumed"
import nibabel as nib, numpy as np, pandas as pd, pytest
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from PIL import Image

import brainseg_fastai.runs as runs
from brainseg_fastai.cases import standin
from brainseg_fastai.core import DataError
from brainseg_fastai.images import pixels_of
from brainseg_fastai.networks import ARCHS
from brainseg_fastai.runs import prepare_learner, train_run
from brainseg_fastai.segmentation import predict_cases, split_cases
from brainseg_fastai.settings import Settings
from brainseg_fastai.splits import with_split
from brainseg_fastai.training import Checkpoint, fit_recipe
from helpers import dataset
from tiny import layout_of

FOLDERS = dict(figshare='figshare_mat', ibsr='ibsr18_like')
SMALL = dict(epochs=1, size=64, arch='unet', depth=3, width=4)

@pytest.fixture(autouse=True)
def extras():
    for o in ('h5py','torchio','skimage','SimpleITK'): pytest.importorskip(o, reason='the other data sets need the extra all')

def cases_of(name, unit='slice', root=None):
    layout = layout_of(name)
    t = layout.cases(root or standin(layout), unit=unit)
    return with_split(t, split_cases(t, 3, stratify=layout.stratify))

def test_splits_are_balanced_by_tumour_type():
    t = pd.DataFrame([dict(subject=f's{i}', scan='-', slice=str(j), inputs='t1c', image=f's{i}-{j}.mat', label='abc'[i%3])
                      for i in range(18) for j in range(3)])
    s = split_cases(t, 3, stratify='label').merge(t[['image','label']], on='image')
    assert (s.query('split=="test"').groupby(['fold','label']).subject.nunique()==2).all()
    one = split_cases(t, 1, stratify='label').merge(t[['image','label']], on='image')
    assert one.query('split=="test"').label.nunique()==3

@pytest.mark.parametrize('key,value,word', [
    ('mode','cube','slice, patch, volume'), ('schedule','linear','one-cycle'), ('loss','hinge','expected'),
    ('steps','sharpen','n4'), ('arch','vgg','unet'), ('sampling','half','uniform')])
def test_unknown_settings_are_told(key, value, word):
    with pytest.raises(DataError, match=word): Settings(**{key: value})

def test_best_weights_cosine_and_exact_resume(tmp_path, monkeypatch):
    t,s = cases_of('figshare'), Settings(**SMALL | dict(epochs=4), pick='best', schedule='cosine', seed=3)
    whole = train_run(t, tmp_path/'a', s)
    class Stop(Callback):
        order = 99
        def before_epoch(self):
            if self.epoch==2: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(runs, 'prepare_learner', lambda *a: prepare_learner(*a).add_cb(Stop()))
        with pytest.raises(KeyboardInterrupt): train_run(t, tmp_path/'b', s)
    assert (tmp_path/'b'/'checkpoint.pt').exists() and not (tmp_path/'b'/'config.json').exists()
    again = train_run(t, tmp_path/'b', s)
    pd.testing.assert_frame_equal(*(r.curve.drop(columns='seconds') for r in (whole, again)))
    weights = [(tmp_path/o/'model.safetensors').read_bytes() for o in 'ab']
    assert weights[0]==weights[1] and [*whole.curve.epoch]==[0,1,2,3]
    assert not (tmp_path/'b'/'best.safetensors').exists()

def test_steps_are_fitted_on_training_images_and_come_back(tmp_path):
    t = cases_of('figshare')
    s = Settings(**SMALL, steps='match,zscore', loss='weighted_ce+dice', sampling='foreground')
    r = train_run(t, tmp_path/'r', s)
    again = [m.mask for _,m in predict_cases(r.model(), t[t.split=='test'])]
    saved = [np.array(Image.open(o)) for o in r.scores.prediction]
    assert r.config['steps_state'] and all(np.array_equal(a, b) for a,b in zip(saved, again))

def test_slices_are_scored_as_the_volume_that_they_are(tmp_path):
    t = cases_of('brats')
    s = train_run(t, tmp_path/'r', Settings(**SMALL), layout_of('brats')).scores
    assert len(s)==t[t.split=='test'].subject.nunique() and {*s.unit}=={'mm'}
    assert {'dice_ET','dice_TC','dice_WT','hd95_WT','volume_diff_ET'} <= {*s}
    pred,true = nib.load(s.prediction[0]), nib.load(pixels_of(s['mask'][0]).files[0])
    assert pred.shape==true.shape and np.allclose(pred.affine, true.affine) and {*np.unique(pred.dataobj)} <= {0,1,2,4}
    a,b = (np.isin(np.asarray(o.dataobj), (1,2,4)) for o in (pred, true))
    assert np.isclose(s.dice_WT[0], 2*(a&b).sum()/(a.sum()+b.sum()))

def setting_of(arch):
    "Data and settings to try a network with"
    if 2 in np.atleast_1d(ARCHS[arch].dims): return 'figshare', dict()
    return 'ibsr', dict(mode='patch', patch=(32,32,32))

@pytest.mark.slow
@pytest.mark.parametrize('arch', ARCHS)
def test_every_network_learns(arch, tmp_path):
    name,more = setting_of(arch)
    t = cases_of(name, 'volume' if more else 'slice')
    r = train_run(t, tmp_path/'r', Settings(arch=arch, epochs=2, size=64, pretrained=False, **more), layout_of(name))
    loss = r.curve.train_loss
    assert np.isfinite(loss).all() and loss.iloc[-1] < loss.iloc[0]

@pytest.mark.slow
@pytest.mark.parametrize('arch', ARCHS)
def test_every_network_learns_on_a_sample(arch):
    "The same on development data; without scoring, which takes most of the time there"
    name,more = setting_of(arch)
    t = cases_of(name, 'volume' if more else 'slice', dataset(FOLDERS[name]))
    s = Settings(arch=arch, epochs=2, size=128, pretrained=False, **more, **dict(bs=1) if more else {})
    s = s.filled(int((t['split']=='train').sum()))
    set_seed(1, reproducible=True)
    learn,ck = prepare_learner(t, s, tuple(layout_of(name).labels)), Checkpoint()
    fit_recipe(learn, s, checkpoint=ck)
    first,last = (o['train_loss'] for o in ck.curve)
    assert np.isfinite([first,last]).all() and last<first
