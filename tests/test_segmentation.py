"DataBlock, learner and scores, on tiny images"
import pickle, shutil
from pathlib import Path

import matplotlib; matplotlib.use('Agg')
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import nn, set_seed
from PIL import Image

from brainseg_fastai.adni import adni_cases
from brainseg_fastai.checks import mask_codes
from brainseg_fastai.core import DataError
from brainseg_fastai.images import raw_mask, read_image, read_mask
from brainseg_fastai.inference import Frame, Model
from brainseg_fastai.runs import prepare_learner
from brainseg_fastai.scores import score_mask
from brainseg_fastai.segmentation import brainseg_block, predict_cases, score_cases, split_cases
from brainseg_fastai.settings import Settings
from brainseg_fastai.splits import with_split
from brainseg_fastai.training import dice_per_image
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

def learner(cases, codes=(0,255), **kwargs):
    "An untrained learner"
    s = Settings(**{**dict(inputs='brain', size=64, bs=2, pretrained=False), **kwargs})
    return prepare_learner(cases, s.filled(int((cases['split']=='train').sum())), codes)

def rewrite(folder, change, kinds=('brain','mask')):
    "Replace every image of these kinds by what `change(kind, array, number)` makes of it"
    for k in kinds:
        for i,f in enumerate(sorted((folder/k).iterdir())): Image.fromarray(change(k, np.array(Image.open(f)), i)).save(f)
    return folder

def leftovers(folder): return [p.name for p in Path(folder).rglob('*') if p.name.startswith('.') or 'tmp' in p.suffix]

# ---- DataBlock

@pytest.mark.parametrize('mask_value,raw', [(255,(0,255)), (1,(0,1)), (None,(0,50,200))], ids=['0/255','0/1','multi-class'])
def test_batch(tmp_path, mask_value, raw):
    make_folder(tmp_path, 5, 1, mask_value=mask_value or 1)
    if mask_value is None: rewrite(tmp_path, lambda k,a,i: np.array([0,[50,200][i%2]], np.uint8)[a], ['mask'])
    t = adni_cases(tmp_path)
    if mask_value is None: # a mask with all three codes
        a = np.array(Image.open(t['mask'][0])); a[32:][a[32:]>0] = 200; Image.fromarray(a).save(t['mask'][0])
    codes = mask_codes(t['mask'])
    assert codes==raw
    dls = brainseg_block('brain', codes, 64).dataloaders(with_split(t, split_cases(t, 1)), bs=2, num_workers=0)
    x,y = dls.one_batch()
    assert x.shape==(2,1,64,64) and y.shape==(2,64,64) and y.dtype==torch.int64
    assert x.mean((1,2,3)).abs().max() < 1e-4 and x.std((1,2,3)).sub(1).abs().max() < 1e-2
    for loader in dls: assert set(torch.cat([b[1].flatten() for b in loader]).tolist()) <= set(range(len(codes)))
    for case,(img,mask) in zip(dls.valid.items.itertuples(), dls.valid_ds):
        assert np.array_equal(np.array(mask), read_mask(case.mask, codes)) and np.array_equal(np.array(img)[0], read_image(case.image))
    rgb = brainseg_block('brain', codes, 64, rgb=True).dataloaders(with_split(t, split_cases(t, 1)), bs=2, num_workers=0)
    assert rgb.one_batch()[0].shape==(2,3,64,64)

def test_inputs_pick_rows(folder, cases):
    both = pd.concat([cases, adni_cases(folder, 'orig').assign(split=cases.split)], ignore_index=True).sample(frac=1, random_state=0)
    for kind in 'brain','orig':
        ds = brainseg_block(kind, size=64).datasets(both)
        for t,part in ((ds.train,'train'), (ds.valid,'valid')):
            assert set(t.items.inputs)=={kind} and set(t.items.subject)==set(cases.subject[cases.split==part])
        assert set(brainseg_block(kind, size=64).datasets(folder).items.inputs)=={kind}
    with pytest.raises(DataError, match='flair'): brainseg_block('flair', size=64).datasets(both)

def test_block_pickles_and_shows(cases):
    block = pickle.loads(pickle.dumps(brainseg_block('brain', size=64)))
    dls = block.dataloaders(cases, bs=4, num_workers=0)
    dls.show_batch(max_n=4, vmin=0, vmax=1)
    fig = matplotlib.pyplot.gcf()
    assert sum(len(ax.images) for ax in fig.axes) >= 4
    matplotlib.pyplot.close('all')

def test_augment(cases):
    batches = lambda seed, dls: (set_seed(seed), [x for loader in dls for x,_ in loader])[1]
    make = lambda augment: brainseg_block('brain', size=64, augment=augment).dataloaders(cases, bs=2, num_workers=0, shuffle=False)
    plain,aug = make(False), make(True)
    assert all(torch.equal(a, b) for a,b in zip(batches(1, plain), batches(2, plain)))
    assert all(torch.equal(a, b) for a,b in zip(batches(1, aug), batches(1, aug)))
    a,b = batches(1, aug), batches(2, aug)
    n = len(aug.train)
    assert not any(torch.equal(x, y) for x,y in zip(a[:n], b[:n])) and all(torch.equal(x, y) for x,y in zip(a[n:], b[n:]))

def test_augmentation_moves_mask_with_image(folder, cases):
    t = cases.assign(image=cases['mask']) # the image is its own mask
    dls = brainseg_block('brain', size=64, max_lighting=0).dataloaders(t, bs=2, num_workers=0)
    seen = [(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for _ in range(3) for x,y in dls.train]
    assert np.mean([dice_per_image(Oracle()(x), y).item() for x,y in seen]) > .95
    assert all(len(set(y.sum((1,2)).tolist()))==2 for _,y in seen) # every time another size

# ---- scores

class Oracle(nn.Module):
    "Finds what is brighter than the middle between the darkest and the brightest pixel"
    def forward(self, x):
        x = x[:,:1]
        mid = (x.amin((2,3), keepdim=True)+x.amax((2,3), keepdim=True))/2
        return torch.cat([mid-x, x-mid], 1)

def oracle(table, size):
    return Model(Oracle(), Frame(mask_codes(table['mask']), size))

def cut(folder, shapes):
    "Crop images and masks to these shapes, and make the image show the mask and nothing else"
    def change(kind, a, i):
        h,w = shapes[i % len(shapes)]
        top,left = ((o-n)//2 for o,n in zip(a.shape, (h,w)))
        a = a[top:top+h, left:left+w]
        return a if kind=='mask' else a*0
    rewrite(folder, change)
    for f in (folder/'mask').iterdir():
        Image.fromarray(np.array(Image.open(f))//255*180+20).save(folder/'brain'/f.name.replace('mask','brain'))
    return folder

class Leftmost(torch.nn.Module):
    "Class 1 in the left half of the picture, whatever is in it, as sure of it as `yes` says"
    def __init__(self, yes): super().__init__(); self.yes = yes
    def forward(self, x):
        s = torch.linspace(1, -1, x.shape[-1]).expand(x.shape[0], 1, *x.shape[-2:])
        return torch.cat([0*s, torch.where(s>0, self.yes*s, s)], 1)

@pytest.mark.parametrize('size', [96, 64])
def test_mirrored_predictions(tmp_path, size):
    "What does not depend on left and right agrees with its mirror image; what does, does not"
    t = adni_cases(cut(make_folder(tmp_path, 6, 1, size=96), [(96,61),(45,96),(95,96)])); learn = oracle(t, size)
    for _,(both,a,b) in predict_cases(learn, t): assert (a!=b).mean()<.01 and (a!=both).mean()<.01 and a.any()
    assert score_cases(learn, t, quality=True).quality.min()>.95 and 'quality' not in score_cases(learn, t)
    learn.net = Leftmost(yes=.5)
    for _,(both,a,b) in predict_cases(learn, t):
        half = a.shape[1]//2
        assert not both[:,:half-1].any() and not both[:,half+2:].any(), 'the surer one wins'
        assert a[:,:half].all() and not a[:,half+1:].any() and not b[:,:half].any() and b[:,half+1:].all()
    assert score_cases(learn, t, quality=True).quality.max()<.05
    for _,(both,a,b) in predict_cases(learn, t, flips=False): assert np.array_equal(both, a) and b is None and a[:,:a.shape[1]//2].all()
    learn.net = Leftmost(yes=2)
    for _,(both,_,_) in predict_cases(learn, t): assert both[:,:both.shape[1]//2-1].all() and both[:,both.shape[1]//2+2:].all()

@pytest.mark.parametrize('shapes,size,least', [([(96,61),(45,96),(96,96),(95,96)], 96, 1.), ([(61,44),(90,57),(33,60)], 128, .99),
                                                ([(128,96),(100,127),(99,75)], 64, .95)], ids=['same','enlarged','reduced'])
def test_perfect_prediction_in_own_pixels(tmp_path, shapes, size, least):
    t = adni_cases(cut(make_folder(tmp_path, 6, 1, size=max(map(max, shapes))), shapes))
    preds = [m.mask for _,m in predict_cases(oracle(t, size), t)]
    for case,p in zip(t.itertuples(), preds): assert p.shape==read_image(case.image).shape and p.dtype==np.uint8
    s = score_cases(oracle(t, size), t)
    assert (s.n_true>0).all() and s.dice.min() >= least and (s.hd95.max()==0 or least<1)
    if least==1: assert (s[['dice','jaccard','nsd']]==1).all(axis=None) and (s.size_true==s.size_pred).all()
    for case,p in zip(t.itertuples(), preds): # not shifted
        there = lambda a: np.argwhere(a).mean(0)
        assert abs(there(p)-there(read_mask(case.mask, (0,255)))).max() < .5

def test_score_table(tmp_path, folder, cases):
    learn = oracle(cases, 64)
    t = cases.sample(frac=1, random_state=1) # any index, any order
    s = score_cases(learn, t, save_to=tmp_path)
    for k in ('subject','scan','slice'): assert list(s[k])==list(t[k])
    assert {'image','dice','jaccard','hd95','nsd','size_true','size_pred','unit','n_true','n_pred','n_both','prediction'} <= set(s)
    assert list(s.image)==list(t.image) and list(s['mask'])==list(t['mask']) and set(s.unit)=={'px'}
    for case,row in zip(t.itertuples(), s.itertuples()):
        p = np.array(Image.open(row.prediction))
        assert p.dtype==np.uint8 and set(np.unique(p)) <= {0,255}
        again = score_mask(p//255, read_mask(case.mask, (0,255)))
        assert all(getattr(row, k)==again[k] for k in ('dice','hd95','nsd','size_pred'))
    assert not leftovers(tmp_path)
    mm = score_cases(learn, t.assign(spacing=.5))
    assert set(mm.unit)=={'mm'} and np.allclose(mm.size_true, s.size_true/4) and np.allclose(mm.hd95, s.hd95/2)
    assert (score_cases(learn, t, tolerance=5).nsd >= s.nsd).all()

def test_same_file_name_in_subject_folders(tmp_path):
    make_folder(tmp_path, 4, 1)
    for k in 'brain','mask':
        for f in sorted((tmp_path/k).iterdir()):
            (tmp_path/k/f.name[:3]).mkdir(); f.rename(tmp_path/k/f.name[:3]/'slice1.png')
    t = adni_cases(tmp_path, subject='folder')
    s = score_cases(oracle(t, 64), t, save_to=tmp_path/'out')
    assert s.prediction.nunique()==4
    for row,(_,m) in zip(s.itertuples(), predict_cases(oracle(t, 64), t)): assert np.array_equal(read_mask(row.prediction, (0,255)), m.mask)

def test_cases_outside_the_layout(tmp_path, cases):
    "A table made by hand, whose images are not in a folder with the name of their kind"
    t = cases.assign(image=[Path(shutil.copy(p, tmp_path/f'{i}.png')) for i,p in enumerate(cases.image)])
    s = score_cases(oracle(t, 64), t, save_to=tmp_path/'out')
    assert s.prediction.nunique()==len(t) and sorted(Path(o).name for o in s.prediction)==sorted(f'{i}.png' for i in range(len(t)))
    assert all((tmp_path/'out') in Path(o).parents for o in s.prediction)

def test_multi_class(tmp_path):
    make_folder(tmp_path, 4, 1, mask_value=1)
    two = np.arange(64)[:,None] > 32
    rewrite(tmp_path, lambda k,a,i: (a*np.where(two, 7, 3)).astype(np.uint8), ['mask'])
    t = adni_cases(tmp_path)
    learn = learner(with_split(t, split_cases(t, 1)), mask_codes(t['mask']))
    s = score_cases(learn, t, save_to=tmp_path/'out')
    assert learn.model.eval()(torch.zeros(1,1,64,64)).shape==(1,3,64,64) and {'dice_1','dice_2'} <= set(s)
    assert all(set(np.unique(raw_mask(o))) <= {0,3,7} for o in s.prediction)

def test_dice_per_image_agrees_with_scores():
    g = torch.Generator().manual_seed(0)
    truth = (torch.rand(6,9,7, generator=g)>.6).long(); truth[4] = truth[5] = 0
    pred = torch.rand(6,2,9,7, generator=g); pred[5,1] = -1
    both = [(p.argmax(0).numpy(), t.numpy()) for p,t in zip(pred, truth)]
    assert float(dice_per_image(pred, truth)) == pytest.approx(np.mean([score_mask(p, t)['dice'] for p,t in both]))

