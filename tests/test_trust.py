"Trust: flags that speak up when they should and only then; intervals that hold as often as they say"
import hashlib, json, re, subprocess, sys

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st

from brainseg_fastai import trust as T
from brainseg_fastai.adni import adni_cases
from brainseg_fastai.core import DataError
from brainseg_fastai.images import read_image
from brainseg_fastai.demo import demo_cohort
from helpers import dataset

def features(cases): return [T.scan_features(read_image(p), mm)|dict(subject=s) for p,mm,s in zip(cases.image, cases.spacing, cases.subject)]

@pytest.fixture(scope='module')
def demo(): return {k: adni_cases(demo_cohort(n_subjects=12, progress=False), k) for k in ('brain','orig')}

@pytest.fixture(scope='module')
def seen(demo): return {k: features(t) for k,t in demo.items()}

@pytest.fixture(scope='module')
def references(seen): return {k: T.fit_reference(f) for k,f in seen.items()}

def test_no_torch():
    code = "import sys, brainseg_fastai.trust; sys.exit('torch' in sys.modules or 'fastai' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], timeout=120).returncode==0

# --- agreement

classes = st.integers(1, 4).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, n-1), min_size=12, max_size=12)]*2, st.just(n)))

@settings(max_examples=200, deadline=None)
@given(classes)
def test_agreement_is_the_mean_dice_of_what_is_there(abn):
    a,b,n = np.array(abn[0]).reshape(3,4),np.array(abn[1]).reshape(3,4),abn[2]
    want = [2*((a==c)&(b==c)).sum()/((a==c).sum()+(b==c).sum()) for c in range(1, n) if (a==c).any() or (b==c).any()]
    assert T.agreement(a, b, n)==pytest.approx(np.mean(want) if want else 1)
    assert T.agreement(a, b, n)==T.agreement(b, a, n) and T.agreement(a, a, n)==1

@pytest.mark.parametrize('dtype', [bool,np.uint8,np.int64])
def test_agreement_takes_any_dtype(dtype): assert T.agreement(np.eye(4).astype(dtype), np.eye(4).astype(dtype))==1

def test_agreement_refuses_what_cannot_be_compared():
    with pytest.raises(DataError, match='the shapes'): T.agreement(np.zeros((2,3), int), np.zeros((3,2), int))
    with pytest.raises(DataError, match='class 255'): T.agreement(np.full(3, 255), np.zeros(3, int))

# --- flags

def test_features_are_plain_numbers_whatever_the_unit(demo):
    a = read_image(demo['orig'].image[0])
    f = T.scan_features(a, (1,1))
    assert all(type(v) is float and np.isfinite(v) for v in f.values()) and json.loads(json.dumps(f))==f
    for b in (a.astype(np.uint16)*200, a/255., a*3.-50): assert T.scan_features(b, 1.)==pytest.approx(f, abs=1e-3)
    assert T.scan_features(a.T, 1.)['rim']==pytest.approx(f['rim'], abs=.02)

@pytest.mark.parametrize('a', [np.zeros((9,9)), np.full((64,64), 7), np.full((8,8), np.nan)])
def test_empty_pictures(a, references): assert T.find_flags(T.scan_features(a), references['brain'])==[T.TEXTS['empty']]

def test_numbers_that_are_none_count_as_dark(demo):
    a = read_image(demo['brain'].image[0]).astype(float); f = T.scan_features(a)
    a[a==0] = np.nan
    assert T.scan_features(a)['share']==pytest.approx(f['share'], abs=.02)

@pytest.mark.parametrize('shape', [(1,1), (2,3), (5,5,5), (3,40), (64,64,3), (20,16,12,2)])
def test_odd_shapes_do_not_break(shape): assert 'empty' in T.scan_features(np.random.default_rng(0).random(shape), 1.)

def test_shapes_that_are_no_image():
    for a in (np.zeros(5), np.zeros((0,4)), np.zeros((4,4,4,4,4))):
        with pytest.raises(DataError, match='neither a slice nor a volume'): T.scan_features(a)

@pytest.mark.parametrize('kind,other,say', [('brain','orig','remove the skull'), ('orig','brain','give the scan with its skull')])
def test_mix_up_is_flagged_always(kind, other, say, references, seen):
    for f in seen[other]: assert any(say in o for o in T.find_flags(f, references[kind]))

@pytest.mark.parametrize('kind', ['brain','orig'])
def test_people_like_those_trained_on_are_rarely_flagged(kind, seen):
    "Half of the subjects make the reference, the other half is looked at"
    names = sorted({f['subject'] for f in seen[kind]})
    ref = T.fit_reference([f for f in seen[kind] if f['subject'] in names[::2]])
    new = [bool(T.find_flags(f, ref)) for f in seen[kind] if f['subject'] not in names[::2]]
    assert len(new)>8 and np.mean(new)<=.15
    assert ref['own_rate']<=.2 and ref['n_subjects']==len(names[::2])

@pytest.mark.parametrize('kind', ['brain','orig'])
@pytest.mark.parametrize('spoil,say', [
    (lambda a: 255-a, 'background is brighter'),
    (lambda a: np.random.default_rng(0).integers(0, 256, a.shape), 'little in common'),
    (lambda a: a[80:176,80:176], 'not cut off'),
    (lambda a: np.pad(a, 200), 'field of view'),
    (lambda a: np.where(a>0, 255*(a/255.)**4, 0), 'same kind of sequence|skull')])
def test_spoilt_scans_are_flagged(kind, spoil, say, demo, references):
    a = read_image(demo[kind].image[3])
    assert not T.find_flags(T.scan_features(a), references[kind])
    assert any(re.search(say, o) for o in T.find_flags(T.scan_features(spoil(a)), references[kind]))

@pytest.mark.parametrize('factor', [2,.5])
def test_spacing(factor, demo, references):
    c = demo['brain'].loc[0]; a = read_image(c.image)
    assert not T.find_flags(T.scan_features(a, c.spacing), references['brain'])
    flags = T.find_flags(T.scan_features(a, factor*c.spacing), references['brain'])
    assert len(flags)==1 and 'A pixel is' in flags[0]
    assert not T.find_flags(T.scan_features(a, float('nan')), references['brain']) # unknown is not wrong

def test_sentences_say_what_was_seen_expected_and_to_be_done(demo, references):
    a = read_image(demo['orig'].image[0])
    for s in T.find_flags(T.scan_features(a, 3.), references['brain']):
        assert 'in the training images' in s and ': ' in s and s.endswith('.') and len(s)<250

def test_channels_are_named(demo):
    a = read_image(demo['brain'].image[0])
    ref = T.fit_reference([T.scan_features(np.stack([read_image(p)]*2, -1)) for p in demo['brain'].image[:9]])
    dim = np.stack([a, (255*(a/255.)**4).astype(np.uint8)], -1)
    assert any(o.startswith('Channel 2: ') for o in T.find_flags(T.scan_features(dim), ref))

def test_a_model_without_reference_says_so():
    for r in (None, {}): assert T.find_flags(dict(empty=0.), r)==[T.TEXTS['no_reference']]

def test_reference_goes_through_json_and_minds_no_order(seen):
    fs = seen['brain']; ref = T.fit_reference(fs)
    assert json.loads(json.dumps(ref))==ref
    assert T.fit_reference(fs[::-1])['features']['rim']==pytest.approx(ref['features']['rim'])
    one = T.fit_reference(fs[:1])
    assert one['own_rate'] is None and one['margin']==T.MARGINS[-1] and T.find_flags(fs[0], one)==[]
    with pytest.raises(DataError, match='0 images'): T.fit_reference([])

def test_own_rate_leaves_subjects_out():
    "Two subjects far apart: each is flagged by the other, although each image has its like in its own subject"
    fs = [dict(empty=0., share=s, subject=n) for s,n in ((.1,'a'),(.1,'a'),(.9,'b'),(.9,'b'))]
    assert T.fit_reference(fs)['own_rate']==1 and T.fit_reference(fs, [*'abcd'])['own_rate']==0

def test_adni_like_mix_up():
    root = dataset('adni_like')
    some = {k: features(adni_cases(root, k).groupby('subject').head(3)) for k in ('brain','orig')}
    refs = {k: T.fit_reference(f) for k,f in some.items()}
    assert all(any('remove the skull' in o for o in T.find_flags(f, refs['brain'])) for f in some['orig'])
    assert all(any('give the scan with its skull' in o for o in T.find_flags(f, refs['orig'])) for f in some['brain'])
    assert all(r['own_rate']<=.1 for r in refs.values())

def test_colin27_mix_up(references):
    import nibabel as nib
    root = dataset('colin27')
    vols = {k: np.asarray(nib.load(root/f'colin27_T1w_{k}.nii.gz').dataobj) for k in ('brain','head')}
    for z in range(78, 96, 3):
        brain,head = (T.scan_features(np.rot90(vols[k][:,:,z]), 1.) for k in ('brain','head'))
        assert any('remove the skull' in o for o in T.find_flags(head, references['brain']))
        assert any('give the scan with its skull' in o for o in T.find_flags(brain, references['orig']))
        assert not any('skull' in o for o in T.find_flags(brain, references['brain'])+T.find_flags(head, references['orig']))
    a,b = (T.scan_features(vols[k], (1,1,1))['rim'] for k in ('brain','head')) # whole volumes as well
    assert a<T.SKULL<b

# --- predicted Dice

def invented(n, seed=0, images=(1,4)):
    r = np.random.default_rng(seed)
    k = r.integers(images[0], images[1]+1, n); hard = np.repeat(r.gamma(1.5, .05, n), k)
    dice,quality = (np.clip(1-hard*r.uniform(.5,1.5,len(hard))-r.gamma(1, s, len(hard)), 0, 1) for s in (.01,.02))
    return pd.DataFrame(dict(subject=np.repeat([f's{i}' for i in range(n)], k), dice=dice, quality=quality))

@pytest.mark.parametrize('n,images,level', [(7,(1,1),.8), (12,(1,1),.9), (24,(1,20),.9)])
def test_coverage_holds(n, images, level):
    "At least the level, and with one image each at most 1/(n+1) more, up to three standard errors"
    inside = []
    for seed in range(400):
        t = invented(n+1, seed, images)
        c,new = T.calibrate(t[t.subject!=f's{n}'], level),t[t.subject==f's{n}']
        one = new.iloc[np.random.default_rng([seed,1]).integers(len(new))]
        p = T.predicted_dice(c, one.quality)
        inside.append(p['low']-1e-12<=one.dice<=p['high']+1e-12)
    se = (level*(1-level)/400)**.5
    assert np.mean(inside)>=level-3*se
    if images==(1,1): assert np.mean(inside)<=level+1/(n-3+1)+3*se

def test_half_width_is_the_conformal_quantile():
    s = invented(40, images=(1,1)); c = T.calibrate(s)
    names = sorted(s.subject, key=lambda o: hashlib.sha256(o.encode()).hexdigest())
    rest = s[s.subject.isin(names[10:])]
    errors = np.sort(np.abs(rest.dice-np.clip(c['slope']*rest.quality+c['height'], 0, 1)))
    assert c['half_width']==pytest.approx(errors[int(np.ceil(31*.9))-1]) and (c['n_line'],c['n_errors'])==(10,30)

def test_copies_of_an_image_change_nothing():
    "A subject counts once, however often it was scanned"
    s = invented(20, images=(1,1)); c = T.calibrate(s)
    more = T.calibrate(pd.concat([s]+[s[s.subject=='s3']]*30))
    assert all(more[k]==pytest.approx(c[k]) for k in ('slope','height','half_width'))

@pytest.mark.parametrize('n,level', [(0,None), (6,None), (7,.8), (11,.8), (12,.9), (60,.9)])
def test_levels_by_number_of_subjects(n, level):
    c = T.calibrate(invented(n) if n else invented(1).iloc[:0])
    assert c.get('level')==level and c['calibrated']==(level is not None) and c['n_subjects']==n
    p = T.predicted_dice(c, .9)
    assert json.loads(json.dumps(c))==c and p['calibrated']==c['calibrated']
    if level is None:
        assert p['text']=='uncalibrated' and [p[k] for k in ('dice','low','high','level')]==[None]*4 and 'at least 7' in c['why']
    else: assert p['text']==f'{p["dice"]:.2f} ({100*level:.0f} % interval {p["low"]:.2f} to {p["high"]:.2f})'

def test_a_higher_level_is_wider(): assert T.calibrate(invented(60), .95)['half_width']>T.calibrate(invented(60), .8)['half_width']

@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from('abcdefghijkl'), st.floats(0,1), st.floats(0,1)), min_size=1, max_size=40), st.floats(0,1), st.floats(0,1))
def test_intervals_are_ordered_clipped_and_monotone(rows, q1, q2):
    c = T.calibrate(pd.DataFrame(rows, columns=['subject','dice','quality']))
    a,b = (T.predicted_dice(c, q) for q in sorted((q1,q2)))
    if c['calibrated']:
        for p in (a,b): assert 0<=p['low']<=p['dice']<=p['high']<=1
        assert a['dice']<=b['dice']+1e-12 and a['low']<=b['low']+1e-12

def test_no_number_without_quality():
    c = T.calibrate(invented(20))
    for q in (None, float('nan')): assert T.predicted_dice(c, q)['text']=='uncalibrated'
    assert T.predicted_dice(None, .9)['dice'] is None

@pytest.mark.parametrize('spoil,say', [
    (lambda t: t.drop(columns='quality'), 'no column quality'), (lambda t: t.assign(dice=1.99), "'dice': 1.99"),
    (lambda t: t.assign(quality=np.nan), 'numbers from 0 to 1')])
def test_bad_scores(spoil, say):
    with pytest.raises(DataError, match=say): T.calibrate(spoil(invented(9)))

def test_bad_level():
    with pytest.raises(DataError, match='level=90'): T.calibrate(invented(9), 90)

# --- rank correlation

# --- review list

def test_worst_first():
    t = pd.DataFrame(dict(name=list('abcdef'), quality=[.9,.5,.99,.8,None,.9], predicted_dice=[.9,.5,.97,.8,None,.9],
                          flags=['', [], ['x'], 'one\ntwo', None, float('nan')]))
    r = T.review_list(t)
    assert [*r.name]==['d','c','e','b','a','f'] and list(r.index)==list(range(6)) and set(r)==set(t)
    assert [*T.review_list(t.drop(columns=['predicted_dice','flags'])).name]==['e','b','d','a','f','c']

def test_rows_of_several_labels_are_one_scan_and_namesakes_are_two():
    t = pd.DataFrame(dict(name=['a','a','a'], path=['1/a','1/a','2/a'], quality=[.9]*3, label=[1,2,1], flags=[[]]*3))
    assert [*T.review_list(t).path]==['1/a','2/a'] and len(t)==3

def test_review_list_of_nothing(): assert len(T.review_list(pd.DataFrame(columns=['name','quality','flags'])))==0
def test_review_list_names_what_lacks():
    with pytest.raises(DataError, match='name and quality'): T.review_list(pd.DataFrame(dict(name=['a'])))
