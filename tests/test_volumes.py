"Volumes and patches on files with any orientation: loaders, samplers, augmentation, and slices put together again"
import random, sys

import nibabel as nib, numpy as np, pandas as pd, pytest, torch

pytest.importorskip('torchio', reason="volumes need the extra 'volumes'")
from brainseg_fastai import volumes
from brainseg_fastai.core import DataError
from brainseg_fastai.images import Pixels, read_image, read_mask
from brainseg_fastai.volumes import (
    KINDS, SAMPLERS, VolumeItems, augment_subject, patch_sampler, slices_to_volume, to_subject, volume_dls)
from helpers import dataset

CODES = (0,1,4)

@pytest.fixture(autouse=True, scope='module')
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('BRAINSEG_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield

def draw(rng, shape):
    "Two channels and classes: an ellipsoid with a box (1) and a few voxels (2) near its top"
    g = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing='ij')
    head = sum(o**2 for o in g)<.9
    mask = np.zeros(shape, np.uint8); c = [n//2 for n in shape]
    mask[c[0]-5:c[0]+2, c[1]-4:c[1]+5, c[2]-3:c[2]+4] = 1
    mask[c[0]:c[0]+3, c[1]:c[1]+3, -4:-2] = 2; mask *= head
    a = np.where(head, 400+100*g[0]+300.*mask+rng.normal(0, 20, shape), 0)
    return [a.astype(np.float32), np.where(head, 900-a, 0).astype(np.float32)], mask

def place(a, axes, flips, affine=None):
    "A canonical array as a NIfTI image with permuted and flipped axes, in the same place"
    affine = np.diag([1,1.5,2,1.]) if affine is None else affine
    ornt = np.array([[axes.index(i), -1 if flips[axes.index(i)] else 1] for i in range(3)])
    im = nib.Nifti1Image(a, affine).as_reoriented(ornt)
    im.header.set_xyzt_units('mm'); return im

def write(root, n, shapes=((40,36,24),), axes=(0,1,2), flips=(True,True,False)):
    "Case table of `n` scans, every fourth for validation"
    rng,rows = np.random.default_rng(0), []
    for i in range(n):
        chans,mask = draw(rng, shapes[i%len(shapes)])
        fs = [root/f's{i}_{k}.nii' for k in 'abm']
        for f,a in zip(fs, [*chans, np.array(CODES, np.uint8)[mask]]): nib.save(place(a, axes, flips), f)
        rows.append(dict(subject=f's{i}', scan='1', slice='', inputs='a+b', image=Pixels(fs[:2]), mask=Pixels(fs[2]), spacing=(1,1.5,2),
                         split='valid' if i%4==3 else 'train'))
    return pd.DataFrame(rows)

@pytest.fixture(scope='module')
def cases(tmp_path_factory): return write(tmp_path_factory.mktemp('scans'), 4)

@pytest.fixture(scope='module')
def mixed(tmp_path_factory): return write(tmp_path_factory.mktemp('mixed'), 8, [(40,36,24),(33,50,20)])

def loaders(cases, **kwargs): return volume_dls(cases, CODES, **(dict(patch=(16,16,12), samples_per_volume=3, device='cpu')|kwargs))

def first(cases): return to_subject(next(cases.itertuples()), CODES)

def same(a, b): return all(torch.equal(x,u) and torch.equal(y,v) for (x,y),(u,v) in zip(a, b, strict=True))

# --- loaders

@pytest.mark.parametrize('sampler', SAMPLERS)
def test_the_seed_alone_decides(cases, sampler):
    one,two,other = (loaders(cases, sampler=sampler, seed=s) for s in (1,1,2))
    a = list(one.train); torch.manual_seed(5); random.seed(5); np.random.seed(5)
    assert same(a, list(two.train)), 'same seed'
    second = list(two.train); assert not same(a, second), 'the second epoch is another one'
    assert same(list(one.train), second) and not same(a, list(other.train))

def test_random_numbers_outside_are_left_alone(cases):
    state,items = torch.get_rng_state(), loaders(cases, sampler='label').train_ds
    for o in items.order(random.Random(0)): items[o]
    assert torch.equal(torch.get_rng_state(), state)

def test_batches_are_plain_and_complete(mixed):
    dls = loaders(mixed, bs=4)
    batches = list(dls.train); x,y = batches[0]
    assert type(x) is type(y) is torch.Tensor and x.dtype==torch.float32 and y.dtype==torch.int64
    assert x.shape==(4,2,16,16,12) and y.shape==(4,16,16,12)
    assert sum(len(x) for x,_ in batches)==len(dls.train_ds)==6*3 and len(batches)==len(dls.train)==5
    assert set(torch.cat([y.unique() for _,y in batches]).tolist()) <= {0,1,2}

def test_goes_on_where_it_stopped(cases):
    "The loader's own generator is all that a checkpoint has to keep"
    dls = loaders(cases); list(dls.train); state = dls.train.rng.getstate(); want = list(dls.train)
    fresh = loaders(cases, seed=77); fresh.train.rng.setstate(state)
    assert same(want, list(fresh.train))

@pytest.mark.skipif(sys.platform!='linux', reason='fastai uses no workers elsewhere')
def test_workers_change_nothing(cases): assert same(list(loaders(cases).train), list(loaders(cases, num_workers=2).train))

def test_each_volume_is_read_once_and_few_are_kept(mixed, monkeypatch):
    seen = []
    monkeypatch.setattr(volumes, 'read_image', lambda o: (seen.append(str(o)), read_image(o))[1])
    dls = loaders(mixed, augment=False); list(dls.train)
    assert len(seen)==len(set(seen))==6 and len(dls.train_ds.kept)==4
    assert all(len(o)==3 and o[0].spatial_shape==(16,16,12) for o in dls.train_ds.kept.values()), 'patches are kept, not volumes'

def test_validation_covers_each_volume_and_repeats(mixed):
    dls = loaders(mixed, bs=1); a = list(dls.valid)
    assert same(a, list(dls.valid)) and same(a, list(loaders(mixed, bs=1, seed=3).valid))
    valid = mixed[mixed.split=='valid']
    assert len(a)==len(dls.valid)==sum(int(np.prod([-(-n//p) for n,p in zip(read_image(o).shape, (16,16,12))])) for o in valid['image'])
    for v in range(len(valid)):
        grid = dls.valid_ds.items(v, 0)
        seen = np.zeros(read_image(valid['image'].iloc[v]).shape[:3], int)
        for x0,y0,z0,x1,y1,z1 in grid.locations: seen[x0:x1,y0:y1,z0:z1] += 1
        assert seen.min()>=1

def test_whole_volumes_in_one_batch(mixed):
    dls = loaders(mixed, patch=None, bs=6, augment=False)
    (x,y), = dls.train
    assert x.shape==(6,2,48,64,32) and y.shape==(6,48,64,32), 'multiples of 16, common to all'
    for a,b in zip(x, y): # all of every mask is there, and what was added is air
        assert (b==1).sum()==7*9*7 and all(c[0,0,0]==c.min() for c in a)
    assert same(list(dls.valid), list(loaders(mixed, patch=None, bs=6).valid))

def test_patches_larger_than_the_volume(cases):
    dls = loaders(cases, patch=(48,40,32))
    (x,y),*_ = dls.train; assert x.shape[2:]==y.shape[1:]==(48,40,32)
    assert len(dls.valid)==len(list(dls.valid))==1

def test_a_step_that_scales_is_not_scaled_again(cases):
    class Fixed:
        scaled = True
        def __call__(self, a, channels): assert a.ndim==4 and channels; return np.float32(a/50)
    s = to_subject(next(cases.itertuples()), CODES, Fixed())
    np.testing.assert_allclose((s.image.data+s['floor'])[1], read_image(cases['image'][0])[...,1]/50, rtol=1e-6)

def test_every_channel_is_scaled_over_the_head(cases):
    s,raw = first(cases), read_image(cases['image'][0])
    x = s.image.data+s['floor']
    for c in range(2):
        head = x[c].numpy()[raw[...,c]>0]
        assert abs(head.mean())<1e-4 and abs(head.std()-1)<1e-4
        assert not s.image.data[c].numpy()[raw[...,c]==0].any(), 'air is 0'

def test_learns(cases):
    "Two epochs with fastai's own Learner: the loss falls"
    from fastai.basics import Learner
    import fastai.callback.progress # noqa: F401, brings `no_bar`
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv3d(2, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(8, 3, 1))
    learn = Learner(loaders(cases, sampler='label', samples_per_volume=8, augment=False), net, loss_func=torch.nn.CrossEntropyLoss(), lr=.02)
    with learn.no_bar(), learn.no_logging():
        before = learn.validate()[0]; learn.fit(2)
    assert learn.recorder.values[-1][1] < before

@pytest.mark.parametrize('change,message', [
    (dict(cases=lambda t: t.assign(split='train')), "split is 'valid'"), (dict(cases=lambda t: t.assign(mask=None)), 'no mask'),
    (dict(cases=lambda t: t.assign(mask=t['mask'].where(t.index<0))), 'no mask')])
def test_what_cannot_work_is_said_at_once(cases, change, message):
    with pytest.raises(DataError, match=message):
        loaders(change.pop('cases', lambda t: t)(cases), **change)

def test_slices_are_refused_as_volumes(cases):
    row = dict(cases.iloc[0], slice='z003', image=Pixels(cases['image'][0].files, 3))
    with pytest.raises(DataError, match="unit='volume'"): first(pd.DataFrame([row]))

def test_a_mask_of_another_shape(cases, tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((40,36,23), np.uint8), np.eye(4)), tmp_path/'m.nii')
    with pytest.raises(DataError, match='m.nii.*23'): first(pd.DataFrame([dict(cases.iloc[0], mask=tmp_path/'m.nii')]))

def test_without_torchio_there_is_a_hint(cases, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchio', None)
    with pytest.raises(DataError, match=r'brainseg_fastai\[volumes\]'): loaders(cases)

# --- samplers

def test_samplers_find_the_foreground(cases):
    "Small patches around a structure of 2.3 % and one of 0.05 % of the volume"
    s,share = first(cases), {}
    for how in SAMPLERS:
        torch.manual_seed(0)
        at = np.array([o.mask.data[0,2,2,2].item() for o in patch_sampler(s, (4,4,4), how)(s, 400)])
        share[how] = np.bincount(at, minlength=3)/400
    assert share['uniform'][0]>.95
    assert abs(share['foreground'][0]-1/3)<.07
    assert np.abs(share['label']-1/3).max()<.07
    assert share['label'][2] > share['foreground'][2] > share['uniform'][2]

@pytest.mark.parametrize('how', SAMPLERS)
@pytest.mark.parametrize('classes', [np.zeros((9,7,8)), np.ones((9,7,8)), np.eye(9)[:,:7,None]*np.ones(8)])
def test_patches_of_any_mask_lie_within(how, classes):
    import torchio as tio
    y = torch.from_numpy(classes.astype(np.uint8))[None]
    s = tio.Subject(image=tio.ScalarImage(tensor=y.float()), mask=tio.LabelMap(tensor=y))
    for o in patch_sampler(s, (9,3,4), how)(s, 20):
        assert o.spatial_shape==(9,3,4) and (o['location'][:3]>=0).all() and (o['location'][3:].numpy()<=(9,7,8)).all()

# --- augmentation

@pytest.mark.parametrize('kind', KINDS)
def test_augmentation_keeps_classes_and_alignment(cases, kind):
    s = first(cases)
    s.image.set_data(torch.cat([(s.mask.data==1).float(), s.image.data])) # the mask as a channel
    before = s.image.data.clone(), s.mask.data.clone()
    for seed in range(3):
        a = augment_subject(s, seed, {kind: 1})
        assert set(a.mask.data.unique().tolist()) <= {0,1,2} and a.image.data.isfinite().all()
        assert (a.mask.data==1).any() and a.image.shape==s.image.shape
        p,t = a.image.data[0]>(0 if kind=='bias' else .5), a.mask.data[0]==1
        assert 2*(p&t).sum()/(p.sum()+t.sum()) > .93, 'image and mask moved together'
        assert not torch.equal(a.image.data, s.image.data)
        assert (kind=='bias')==torch.equal(a.mask.data, s.mask.data)
        assert torch.equal(augment_subject(s, seed, {kind: 1}).image.data, a.image.data)
    assert torch.equal(before[0], s.image.data) and torch.equal(before[1], s.mask.data), 'the original is left alone'

@pytest.mark.parametrize('shape', [(12,14,10),(40,36,24),(64,64,64)])
def test_elastic_deformation_does_not_fold(shape, recwarn):
    import torchio as tio
    x = torch.rand(1, *shape)
    s = tio.Subject(image=tio.ScalarImage(tensor=x), mask=tio.LabelMap(tensor=(x>.5).byte()))
    for seed in range(3): augment_subject(s, seed, dict(elastic=1))
    assert not [w for w in recwarn if 'folding' in str(w.message)]

def test_bias_field_leaves_air_alone(cases):
    s = first(cases)
    air = s.image.data==0
    a = augment_subject(s, 0, dict(bias=1))
    assert not a.image.data[air].any() and (a.image.data>=-1e-6).all()

def test_the_margin_keeps_air_out_of_patches(cases):
    import torchio as tio
    margin = VolumeItems(cases, CODES, (32,32,32), 'uniform', augment=True).margin.tolist()
    assert margin==[4,4,4]
    one = torch.ones(1, *(32+2*m for m in margin))
    s = tio.Subject(image=tio.ScalarImage(tensor=one), mask=tio.LabelMap(tensor=one))
    tissue = [augment_subject(s, k, dict(affine=1)).image.data for k in range(10)]
    def air(ts): return np.mean([(o<.5).float().mean() for o in ts])
    assert air([o[:,4:-4,4:-4,4:-4] for o in tissue]) < .25*air(tissue)

# --- slices

def as_slices(case, ks):
    return pd.DataFrame([dict(case, slice=f'z{k:03d}', image=Pixels(case['image'].files, k), mask=Pixels(case['mask'].files, k)) for k in ks])

@pytest.mark.parametrize('axes,flips', [((0,1,2),(1,1,0)), ((2,0,1),(0,1,1)), ((1,2,0),(1,0,0))])
def test_slices_and_volumes_are_inverse(tmp_path, axes, flips):
    case = dict(write(tmp_path, 1, [(20,18,16)], axes, flips).iloc[0]); truth = read_mask(case['mask'], CODES)
    rows = as_slices(case, range(16)).sample(frac=1, random_state=0)
    pics = [read_mask(o, CODES) for o in rows['mask']]
    assert pics[0].shape==(18,20) and np.array_equal(slices_to_volume(pics, rows), truth)
    part = rows['image'].map(lambda o: o.index%3==0).values; got = slices_to_volume([p for p,k in zip(pics, part) if k], rows[part])
    assert np.array_equal(got[:,:,::3], truth[:,:,::3]) and not got[:,:,1::3].any() and got.dtype==np.uint8

def test_slices_that_make_no_volume(cases):
    a,b = (as_slices(cases.iloc[i], [3,4]) for i in (0,1)); pics = [np.zeros((36,40), np.uint8)]*2
    for ps,rows,message in [(pics, pd.concat([a[:1],b[1:]]), 'several scans'), (pics, a.iloc[[0,0]], 'twice'),
                            ([p.T for p in pics], a, 'as the slice has'), (pics[:1], cases[:1], 'no slice'), ([], a[:0], 'no slice')]:
        with pytest.raises(DataError, match=message): slices_to_volume(ps, rows)

# --- development data

def brats():
    root = dataset('brats2020')/'MICCAI_BraTS2020_TrainingData'/'BraTS20_Training_001'
    f = lambda k: root/f'BraTS20_Training_001_{k}.nii.gz'
    return pd.DataFrame([dict(subject='001', scan='1', slice='', inputs='flair+t1', image=Pixels([f('flair'),f('t1')]), mask=Pixels(f('seg')),
                              spacing=(1,1,1), split=o) for o in ('train','valid')])

def test_brats_patches(tmp_path):
    dls = volume_dls(brats(), (0,1,2,4), patch=(64,64,64), sampler='label', samples_per_volume=4, augment=False, device='cpu')
    ys = torch.cat([y for _,y in dls.train]); plain = torch.cat([y for _,y in volume_dls(brats(), (0,1,2,4), samples_per_volume=4, augment=False, device='cpu').train])
    assert (ys>0).float().mean() > 2*(plain>0).float().mean() and set(ys.unique().tolist())=={0,1,2,3}
    assert len(dls.valid_ds)==4*4*3
