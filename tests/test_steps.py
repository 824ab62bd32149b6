"Preprocessing: what each step promises, for every shape of image, and that nothing but training scans is fitted"
import json, pickle, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from brainseg_fastai import steps as S
from brainseg_fastai.cases import DataError
from brainseg_fastai.steps import STEPS, Steps, brain_mask, make_steps
from helpers import dataset

NAMES = sorted(STEPS)
quick = settings(max_examples=25, deadline=None, derandomize=True)

def need(*names):
    for o in names: pytest.importorskip(o, reason=f'{o} is an optional package')

@pytest.fixture(autouse=True)
def packages(): need('skimage', 'SimpleITK')

def head(seed=0, n=48, skull=False, gain=1.):
    "A brain of two tissues and a dark ventricle, on black or within skull and noisy air"
    rng = np.random.default_rng(seed)
    y,x = np.mgrid[-1:1:n*1j, -1:1:n*1j]; r = np.hypot(x*1.1, y)
    a = np.where(r<.25, 35, np.where(r<.5, 150, 95))+rng.normal(0, 6, r.shape)
    brain = np.where(r<.7, a*gain, 0).clip(0, 255)
    if not skull: return np.where(r<.7, brain.clip(1), 0).astype(np.uint8)
    return np.where(r<.7, brain, np.where((r>.8)&(r<.92), 200+2*(a-95), abs(rng.normal(0, 4, r.shape)))).clip(0, 255).astype(np.uint8)

@pytest.fixture
def table(tmp_path):
    "Six pictures, four for training"
    rows = []
    for i in range(6):
        p = tmp_path/f'{i}.png'; Image.fromarray(head(i, gain=.7+.1*i)).save(p)
        rows.append(dict(subject=f's{i}', image=p, split='train' if i<4 else ('valid','test')[i-4]))
    return pd.DataFrame(rows)

def by_hand(name, *values):
    "A fitted step without files: fitted on the given grey levels"
    s = make_steps({'n4': 'n4:iterations=5'}.get(name, name)).steps[0]
    return replace(s, **{s.fitted: [s.learn([s.look(np.asarray(v, np.float32)) for v in values])]}) if s.fitted else s

def ready(name, a, channels=1):
    s = by_hand(name, a[brain_mask(a)])
    return replace(s, **{s.fitted: getattr(s, s.fitted)*channels}) if s.fitted else s

# -- specification

def test_a_specification_comes_back():
    for spec in ('', 'n4,nyul,zscore', 'clip:lo=1:hi=99,clahe:clip_limit=0.0123456789,zscore:limit=3', *NAMES):
        assert str(make_steps(spec))==spec and make_steps(str(make_steps(spec)))==make_steps(spec)
    assert make_steps(['clip', S.ZScore(3)])==make_steps('clip, zscore:limit=3')==make_steps(make_steps('clip,zscore:limit=3.0'))
    assert len(make_steps(None))==0 and make_steps('zscore').scaled and not make_steps('n4,nyul').scaled
    assert make_steps(S.Clip())==make_steps('clip')

@pytest.mark.parametrize('spec,words', [('gamma', 'clip, zscore, equalise, clahe, match, nyul, n4'), ('nyul,zscor', "'zscor'"),
    ('clip:low=3', 'lo, hi'), ('equalise:x=1', 'no option'), ('clip:lo', "lo=''"), ('clip:lo=a', 'a number'), ('clip:lo=60', 'from 0 to 50'),
    ('clahe:clip_limit=0', 'clip_limit'), ('n4:shrink=1.5', 'whole'), ('zscore:limit=nan', 'limit'), ('zscore,clip', 'at the end'),
    ('zscore,zscore', 'at the end'), ('match:reference=1', 'no option'), ('nyul:landmarks=1', 'lo, hi')])
def test_a_wrong_specification_names_what_is_known(spec, words):
    with pytest.raises(DataError, match='steps?') as e: make_steps(spec)
    assert words in str(e.value)

def test_step_objects_are_refused_unless_they_are_steps():
    with pytest.raises(DataError): make_steps([3])

# -- brain mask

def test_brain_of_a_stripped_image_is_what_is_not_zero():
    for i in range(4): assert (brain_mask(head(i))==(head(i)>0)).all()

def test_brain_of_a_full_head_holds_the_ventricles_and_no_air():
    a = head(skull=True); y,x = np.mgrid[-1:1:48j, -1:1:48j]; r = np.hypot(x*1.1, y); m = brain_mask(a)
    assert (m==(a>0))[r<.9].all() and m[r<.25].all() and not m[r>.97].any()
    vol = np.stack([a, a, head(1, skull=True)], axis=2)
    assert (brain_mask(vol)[...,:2]==m[...,None]).mean()>.99 # one threshold for all slices of a volume

def test_brain_of_what_has_no_brain():
    assert not brain_mask(np.zeros((8,8))).any() and brain_mask(np.full((8,8), 7)).all()
    a = np.zeros((8,8)); a[2:5,2:5] = 9
    assert (brain_mask(a)==(a>0)).all()

def test_type_makes_no_difference():
    for a in (head(), head(skull=True)): assert (brain_mask(a)==brain_mask(a.astype(np.float32))).all()

@pytest.mark.parametrize('kind', ['brain','orig'])
def test_stripped_and_full_are_told_apart_on_development_data(kind):
    ps = sorted((dataset('adni_like')/kind).glob('*.png'))[::9]
    for p in ps:
        a = np.array(Image.open(p)); m = brain_mask(a)
        assert (m==(a>0)).all() == (kind=='brain') and .1<m.mean()<.6, p.name

# -- every step

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('skull', [False,True], ids=['brain','orig'])
def test_every_step_keeps_shape_range_and_black(name, skull):
    a = head(skull=skull); s = ready(name, a); keep = a.copy(); b = s(a)
    assert b.dtype==np.float32 and b.shape==a.shape and np.isfinite(b).all() and (a==keep).all()
    if not s.scaled:
        assert b.min()>=0 and b.max()<=255 and (b[a==0]==0).all()
    assert (s(a.astype(np.float32))==b).all() and (s(a)==b).all() # type of the input does not matter, and it repeats
    assert not np.array_equal(b, a)

@pytest.mark.parametrize('name', NAMES)
def test_constant_and_empty_images_pass_unchanged(name):
    s = ready(name, head())
    for v in (0, 1, 137, 255):
        for shape in ((16,16), (12,10,9)):
            a = np.full(shape, v, np.uint8); b = s(a)
            assert b.dtype==np.float32 and (b==a).all()
    flat = np.zeros((16,16), np.uint8); flat[4:12,4:12] = 90
    b = s(flat)
    if s.scaled: assert set(b[flat>0])=={0.} and set(b[flat==0])=={-5.}
    else: assert (b==flat).all()

@pytest.mark.parametrize('name', NAMES)
def test_channels_are_treated_one_by_one(name):
    a,b = head(0), head(1, gain=1.2); s = ready(name, a, 2); one = ready(name, a)
    both = s(np.stack([a, b], axis=-1), channels=True)
    assert both.shape==(48,48,2)
    assert (both[...,0]==one(a)).all() and (both[...,1]==one(b)).all()
    vols = [np.stack([head(i, 24, gain=g) for i in range(20)], axis=2) for g in (1, 1.2)]
    both = s(np.stack(vols, axis=-1), channels=True)
    assert both.shape==(24,24,20,2)
    for c,v in enumerate(vols): assert (both[...,c]==one(v)).all()

def test_an_empty_channel_passes_beside_a_full_one():
    a = np.stack([head(), np.zeros((48,48), np.uint8)], axis=-1)
    b = ready('nyul', head(), 2)(a, channels=True)
    assert (b[...,1]==0).all() and b[...,0].any()

def test_pointwise_steps_on_a_volume_and_its_slices():
    "What is fitted fixes a curve per image, so one slice repeated is a volume with the same curve"
    a = head()
    for name in ('clip','equalise','match','nyul','zscore'):
        s = ready(name, a)
        np.testing.assert_allclose(s(np.stack([a]*3, axis=2))[...,1], s(a), atol=2) # quantiles of thrice as many pixels

@pytest.mark.parametrize('a,kw,words', [(np.zeros(5), {}, 'shape'), (np.zeros((4,4,4,2)), {}, 'channels=True'), (np.zeros((4,4)), dict(channels=True), 'shape'),
    (np.zeros((0,4)), {}, 'shape'), (np.full((4,4), -1.), {}, 'from 0 to 255'), (np.full((4,4), 300), {}, 'from 0 to 255'),
    (np.full((4,4), np.nan), {}, 'from 0 to 255'), (np.array([['a']]), {}, 'type <U1')])
def test_what_is_no_image_is_refused(a, kw, words):
    with pytest.raises(DataError, match='image') as e: make_steps('clip')(a, **kw)
    assert words in str(e.value)

def test_no_step_is_the_identity(): assert (make_steps('')(head())==head()).all() and make_steps('')(head()).dtype==np.float32

def test_preprocessing_twice_is_refused():
    s = make_steps('zscore')
    with pytest.raises(DataError, match='once only'): s(s(head()))

# -- single steps

images = hnp.arrays(np.uint8, st.tuples(st.integers(6,16), st.integers(6,16)))

@quick
@given(images, st.sampled_from(['clip','equalise','match','nyul']))
def test_curves_are_monotone(a, name):
    "A darker pixel never becomes the brighter one, in the brain or out of it; black stays black"
    b = ready(name, head())(a); i = np.argsort(a, axis=None, kind='stable'); x,y = a.ravel()[i],b.ravel()[i]
    assert (np.diff(y)>=-1e-3).all() and (b[a==0]==0).all() and b.min()>=0 and b.max()<=255
    for v in np.unique(x): assert np.ptp(y[x==v])<1e-4

@quick
@given(images)
def test_zscore_before_clipping(a):
    m = brain_mask(a); v = a[m]
    if v.size<2 or np.ptp(v)==0: return
    b = make_steps('zscore:limit=1000')(a)
    np.testing.assert_allclose([b[m].mean(dtype=float), b[m].std(dtype=float)], [0,1], atol=1e-4)
    c = make_steps('zscore:limit=0.5')(a)
    assert c.min()>=-.5 and c.max()<=.5

def test_zscore_of_the_background():
    a,f = head(), head(skull=True)
    z = make_steps('zscore:limit=4')(a)
    assert (z[a==0]==-4).all() and z[a>0].min()>-4 # darker than any brain
    zf = make_steps('zscore')(f); v = f[brain_mask(f)].astype(float)
    np.testing.assert_allclose(zf, ((f-v.mean())/v.std()).clip(-5,5), atol=1e-4) # air is as dark as it is

def test_clip_keeps_percentiles():
    a = head().astype(np.float32); a[24,24] = 255; b = make_steps('clip:lo=2:hi=98')(a); lo,hi = np.percentile(a[a>0], (2,98))
    assert b.max()==pytest.approx(hi) and b[a>0].min()==pytest.approx(lo)
    inside = (a>lo)&(a<hi)
    assert (b[inside]==a[inside]).all()

def test_equalise_makes_a_flat_histogram():
    a = head().astype(np.float32); a[a>0] += np.random.default_rng(0).uniform(0, .5, (a>0).sum()).astype(np.float32)
    h,_ = np.histogram(make_steps('equalise')(a)[a>0], 8, (0,255))
    assert h.max()/h.min()<1.6 and np.ptp(np.histogram(a[a>0], 8)[0])>5*np.ptp(h)

def test_clahe_is_that_of_scikit_image_and_obeys_its_limit():
    from skimage.exposure import equalize_adapthist
    a = head(); mild,strong = (make_steps(f'clahe:clip_limit={o}')(a) for o in (.01,.2))
    np.testing.assert_allclose(strong[a>0], 255*equalize_adapthist(a.astype(np.float32)/255, clip_limit=.2)[a>0], atol=1e-3)
    tissue = (a>70)&(a<120) # one tissue: more contrast within it with the higher limit
    assert strong[tissue].std()>1.5*mild[tissue].std()

@pytest.mark.parametrize('skull', [False,True], ids=['brain','orig'])
def test_n4_finds_a_known_field(skull):
    a = head(n=192, skull=skull).astype(np.float32)*.6; y,x = np.mgrid[-1:1:192j, -1:1:192j]
    field = np.exp(.4*x+.2*y-.2*x*x); m = head(n=192)>60
    s = make_steps('n4'); ratio = s(a*field)[m]/s(a)[m]
    assert np.log(field[m]).std()>.12 and np.log(ratio).std()<.02

def test_n4_keeps_the_mean_logarithm_and_takes_any_shape():
    a = head(n=64).astype(np.float32)*.7; s = make_steps('n4')
    np.testing.assert_allclose(np.log(s(a)[a>15]).mean(), np.log(a[a>15]).mean(), atol=1e-3)
    s = make_steps('n4:iterations=5')
    for shape in ((5,7), (20,3), (9,8,2), (24,20,17)):
        b = np.random.default_rng(0).integers(1, 200, shape).astype(np.uint8)
        assert s(b).shape==shape and np.isfinite(s(b)).all()
    lone = np.zeros((64,64), np.uint8); lone[1,1:3] = 5,9 # nothing left on the coarse copy
    assert np.isfinite(s(lone)).all()

def test_match_of_the_reference_to_itself():
    a = head(); b = ready('match', a)(a)
    d = abs(b-a)[a>0]
    assert np.percentile(d, 99)<1 and d.mean()<.4 and d.max()<12 # the lone brightest pixels move most

def test_match_gives_another_scan_the_histogram():
    a,b = head(0), head(3, gain=.6); c = ready('match', a)(b); q = (5,25,50,75,95)
    assert abs(np.percentile(b[b>0], q)-np.percentile(a[a>0], q)).max()>40
    np.testing.assert_allclose(np.percentile(c[b>0], q), np.percentile(a[a>0], q), atol=2)

def test_reference_is_the_mean_of_quantiles():
    v,w = np.linspace(10,100,5000), np.linspace(50,200,3000)
    np.testing.assert_allclose(by_hand('match', v, w).reference[0], np.linspace(30,150,1024), atol=.1)

# -- Nyúl

levels = st.lists(st.floats(1, 255, width=32), min_size=30, max_size=200)

@quick
@given(st.lists(levels, min_size=1, max_size=5))
def test_nyul_landmarks_are_standard_and_monotone(scans):
    if not any(np.percentile(v, 99)>np.percentile(v, 1) for v in scans): return
    lm = np.array(by_hand('nyul', *scans).landmarks[0])
    assert lm[0]==pytest.approx(5) and lm[-1]==pytest.approx(200) and (np.diff(lm)>=-1e-6).all()

@quick
@given(st.integers(0, 1000), st.floats(.3, 1.))
def test_nyul_moves_landmarks_to_the_standard_ones(seed, gain):
    rng = np.random.default_rng(seed); v = rng.gamma(4, 20, 4000).clip(1, 250).astype(np.float32)
    n = by_hand('nyul', v, v*.8); w = (v*gain)[rng.permutation(len(v))]
    got = np.interp(n.look(w), np.sort(w), np.sort(n.curve(w)))
    np.testing.assert_allclose(got, n.landmarks[0], atol=.05)

def test_nyul_undoes_gain():
    a = head().astype(np.float32); n = ready('nyul', a)
    np.testing.assert_allclose(n(a*.5), n(a), atol=.05)

def test_nyul_agrees_with_torchio(tmp_path):
    tio = pytest.importorskip('torchio', reason='torchio is an optional package'); import torch
    rng = np.random.default_rng(0); vols = [rng.gamma(4, 12*g, (20,20,10)).clip(1, 255).astype(np.float32) for g in (.8,1,1.3)]
    ps = [tmp_path/f'{i}.nii.gz' for i in range(3)]
    for p,v in zip(ps, vols): tio.ScalarImage(tensor=torch.as_tensor(v)[None]).save(p)
    theirs = tio.HistogramStandardization.train(ps, progress=False)[[0,1,2,4,5,6,7,8,10,11,12]] # they drop the quartiles, too
    ours = by_hand('nyul', *map(np.ravel, vols)); lm = np.array(ours.landmarks[0])
    np.testing.assert_allclose((lm-5)/195*100, theirs, atol=1e-3)
    h = tio.HistogramStandardization({'t1': tio.HistogramStandardization.train(ps, progress=False)})
    new = rng.gamma(5, 15, (20,20,10)).clip(1, 255).astype(np.float32); inside = (new>np.percentile(new, 1)) & (new<np.percentile(new, 99))
    got = h(tio.Subject(t1=tio.ScalarImage(tensor=torch.as_tensor(new)[None])))['t1'].numpy()[0]
    np.testing.assert_allclose(ours.curve(new.ravel()).reshape(new.shape)[inside], 5+195*got[inside]/100, atol=.02)

def test_nyul_of_a_nearly_constant_brain_is_finite():
    a = head(); flat = np.where(a>0, 90, 0).astype(np.uint8); flat[24,24] = 200
    b = ready('nyul', a)(flat)
    assert np.isfinite(b).all() and (b==flat).all()

# -- fitting

def test_only_training_rows_are_read(table, monkeypatch):
    read = []
    real = S.read_image
    monkeypatch.setattr(S, 'read_image', lambda p: (read.append(p), real(p))[1])
    make_steps('nyul').fit(table)
    assert read==list(table.image[:4])
    read.clear(); make_steps('n4,clip').fit(table)
    assert not read # nothing to fit, nothing to read

@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), row=st.sampled_from([4,5]))
def test_pixels_of_validation_and_test_scans_change_nothing(tmp_path_factory, seed, row):
    d = tmp_path_factory.mktemp('leak'); t = pd.DataFrame(dict(image=[d/f'{i}.png' for i in range(6)], split=['train']*4+['valid','test']))
    for i,p in enumerate(t.image): Image.fromarray(head(i, 24)).save(p)
    was = make_steps('clip,match,nyul,zscore').fit(t).state()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24,24)).astype(np.uint8)).save(t.image[row])
    assert make_steps('clip,match,nyul,zscore').fit(t).state()==was
    Image.fromarray(head(99, 24, gain=.5)).save(t.image[0]) # the test itself can tell: a training scan does change it
    assert make_steps('clip,match,nyul,zscore').fit(t).state()!=was

def test_fitting_twice_and_rows_in_another_order(table):
    s = make_steps('n4:iterations=2,match,nyul'); one = s.fit(table).state()
    assert s.fit(table).state()==one==make_steps('n4:iterations=2,match,nyul').fit(table).state()
    other = make_steps('n4:iterations=2,match,nyul').fit(table.iloc[::-1]).state()['steps']
    for a,b in zip(one['steps'], other):
        for k in a:
            if isinstance(a[k], list): np.testing.assert_allclose(a[k], b[k], atol=1e-3)

def test_without_split_every_row_counts(table):
    every = make_steps('nyul').fit(table.drop(columns='split')); train = make_steps('nyul').fit(table)
    assert every!=train and make_steps('nyul').fit(table[table.split=='train'].drop(columns='split'))==train

def test_no_training_rows(table):
    for t in (table.assign(split='test'), table.iloc[:0], table.assign(split=None)):
        for spec in ('nyul','clip'):
            with pytest.raises(DataError, match='training scans only'): make_steps(spec).fit(t)
    with pytest.raises(DataError, match='column image'): make_steps('nyul').fit(table.drop(columns='image'))

def test_before_fit(table):
    s = make_steps('clip,nyul')
    with pytest.raises(DataError, match=r'nyul.*no fit yet.*Call fit\(cases\)'): s(head())
    assert s.fit(table) is s and s(head()).shape==head().shape
    with pytest.raises(DataError, match='2 channels'): s(np.stack([head()]*2, axis=-1), channels=True)

def test_at_most_so_many_images(table, monkeypatch):
    read = []; real = S.read_image
    monkeypatch.setattr(S, 'read_image', lambda p: (read.append(p.name), real(p))[1])
    make_steps('nyul').fit(table.drop(columns='split'), most=3)
    assert len(read)==3 and read[0]=='0.png' and read[-1]=='5.png'

def test_a_fitted_step_sees_what_the_steps_before_it_leave(table):
    s = make_steps('clip:lo=20:hi=80,match').fit(table); one = make_steps('clip:lo=20:hi=80')
    q = [np.quantile(one(np.array(Image.open(p)))[np.array(Image.open(p))>0], np.linspace(0,1,1024)) for p in table.image[:4]]
    np.testing.assert_allclose(s.steps[1].reference[0], np.mean(q, axis=0), atol=1e-3)

def test_images_without_contrast_are_passed_over(table):
    Image.fromarray(np.zeros((48,48), np.uint8)).save(table.image[1])
    assert make_steps('nyul').fit(table)==make_steps('nyul').fit(table.drop(index=1))
    for p in table.image[:4]: Image.fromarray(np.zeros((48,48), np.uint8)).save(p)
    for n in ('match','nyul'):
        with pytest.raises(DataError, match='no contrast in channel 0'): make_steps(n).fit(table)

def test_fit_on_channels_and_on_volumes(table, monkeypatch):
    a = [np.stack([head(i), head(i+9, gain=.5)], axis=-1) for i in range(6)]
    monkeypatch.setattr(S, 'read_image', lambda p: a[int(Path(p).stem)])
    s = make_steps('match,nyul').fit(table)
    assert len(s.steps[0].reference)==len(s.steps[1].landmarks)==2 and s.steps[0].reference[0]!=s.steps[0].reference[1]
    assert s(a[0], channels=True).shape==a[0].shape
    vol = [np.stack([head(10*i+k, 24) for k in range(12)], axis=2) for i in range(6)]
    monkeypatch.setattr(S, 'read_image', lambda p: vol[int(Path(p).stem)])
    assert len(make_steps('nyul').fit(table).steps[0].landmarks)==1
    assert len(make_steps('nyul').fit(table, channels=True).steps[0].landmarks)==12 # told otherwise
    monkeypatch.setattr(S, 'read_image', lambda p: head() if Path(p).stem=='0' else a[0])
    with pytest.raises(DataError, match='2 channels'): make_steps('nyul').fit(table)

# -- state

@pytest.mark.parametrize('spec', ['n4:iterations=3,match,nyul:lo=10,clip:lo=1,zscore', 'clahe:clip_limit=0.02', 'equalise', ''])
def test_state_is_json_and_comes_back_exactly(table, spec):
    s = make_steps(spec).fit(table); d = json.loads(json.dumps(s.state(), allow_nan=False)); back = Steps.from_state(d)
    assert back==s and back.state()==s.state()==d and str(back)==spec and hash(back)==hash(s)
    assert (back(head())==s(head())).all() and (pickle.loads(pickle.dumps(s))(head())==s(head())).all()

@pytest.mark.parametrize('d', [{}, [], None, dict(steps=[{}]), dict(steps=[dict(name='clip', low=1)]), dict(steps=[dict(name='nyul', landmarks=3)]),
                               dict(steps=[dict(name='gamma')]), dict(steps=[dict(name=['clip'])]), dict(steps=[dict(name='clip', lo='1')])])
def test_a_broken_state_is_refused(d):
    with pytest.raises(DataError): Steps.from_state(d)

def test_unfitted_state_stays_unfitted():
    s = Steps.from_state(json.loads(json.dumps(make_steps('nyul').state())))
    with pytest.raises(DataError, match='no fit yet'): s(head())

# -- packages

def test_an_absent_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'skimage.exposure', None); monkeypatch.setitem(sys.modules, 'SimpleITK', None)
    with pytest.raises(DataError, match=r"skimage.exposure is not installed.*brainseg_fastai\[steps\]"): make_steps('equalise')(head())
    with pytest.raises(DataError, match=r'SimpleITK is not installed'): make_steps('n4')(head())
    assert make_steps('clip,zscore')(head()).any() # these need neither

def test_importing_needs_no_optional_package():
    code = "import sys, brainseg_fastai.steps; print([o for o in ('skimage','SimpleITK','torchio','torch','monai') if o in sys.modules])"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(S.__file__).parents[1])
    assert r.stdout.strip()=='[]', r.stderr
