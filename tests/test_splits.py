"Splits: whole subjects on one side, shares as close as they can be, and old subjects where they were"
from collections import Counter
from itertools import combinations

import numpy as np, pandas as pd, pytest
from fastai.vision.all import DataBlock, ImageBlock, PILImageBW, get_image_files
from hypothesis import given, settings, strategies as st

from brainseg_fastai.adni import adni_cases, subject_id
from brainseg_fastai.cases import case_name
from brainseg_fastai.core import DataError
from brainseg_fastai.segmentation import ENOUGH_SUBJECTS, PrefixSplitter, SubjectSplitter, brainseg_block, split_cases
from brainseg_fastai.splits import assert_apart, closest_subset, image_split, read_split, with_split
from helpers import make_folder

def case_table(counts, inputs='brain'):
    "Case table of so many images per subject; `counts` is a dict, or a list for subjects with made-up names"
    if not isinstance(counts, dict): counts = {f'{i:03d}_S_{i*37%1000:04d}': n for i,n in enumerate(counts)}
    return pd.DataFrame([dict(subject=s, scan=f'I{i}', slice='ax3', inputs=inputs, image=f'/data/{inputs}/{s}-I{i}-{inputs}-ax3.png',
                              mask=f'/data/mask/{s}-I{i}-mask-ax3.png', spacing=np.nan) for s,n in counts.items() for i in range(n)])

def sides(split, fold=0): return dict(split.loc[split.fold==fold, ['subject','split']].itertuples(index=False))
def images(split, part): return (split.split==part).sum()

counts = lambda lo=3, hi=12: st.lists(st.integers(1,6), min_size=lo, max_size=hi)
seeds = st.integers(0, 2**31)
pcts = st.floats(.01, .6)

# ---- one split

@given(counts(1,10), st.floats(0,70))
def test_closest_subset_is_the_best_of_all(ns, target):
    d = dict(enumerate(ns))
    got = closest_subset(d, target)
    best = min(abs(sum(d[o] for o in c)-target) for k in range(1, len(d)+1) for c in combinations(d, k))
    assert got and got <= set(d) and abs(sum(d[o] for o in got)-target) == pytest.approx(best)

@given(counts(), pcts, pcts, seeds)
def test_no_subject_on_two_sides(ns, valid, test, seed):
    cases = case_table(ns)
    split = split_cases(cases, 1, valid, test, seed)
    assert list(split.columns) == ['image','subject','split','fold'] and len(split)==len(cases)
    assert (split.groupby('subject')['split'].nunique()==1).all() and set(split.split)=={'train','valid','test'}

@given(counts(3,8), st.floats(.01,.95), st.floats(.01,.95), seeds)
@settings(max_examples=60)
def test_shares_are_as_close_as_subjects_allow(ns, valid, test, seed):
    n = dict(case_table(ns).subject.value_counts())
    got = SubjectSplitter(valid, test, seed).assign(case_table(ns).subject)
    def check(part, pct, pool, keep): # `keep` subjects must be left for the other parts
        of = lambda c: abs(sum(n[s] for s in c) - pct*sum(ns))
        best = min(of(c) for k in range(1, len(pool)-keep+1) for c in combinations(pool, k))
        assert of([s for s in got if got[s]==part]) == pytest.approx(best)
    check('test', test, list(n), 2)
    check('valid', valid, [s for s in n if got[s]!='test'], 1)

@given(counts(), pcts, seeds)
def test_train_and_valid_alone(ns, valid, seed):
    cases = case_table(ns)
    train,val = SubjectSplitter(valid, seed=seed)(cases)
    assert train and val and sorted([*train, *val])==list(range(len(cases)))
    assert not set(cases.subject[train]) & set(cases.subject[val])

@given(counts(4), seeds, st.integers(1,3), st.randoms())
@settings(max_examples=40)
def test_seed_decides_and_order_does_not(ns, seed, folds, rnd):
    cases = case_table(ns)
    try: a = split_cases(cases, folds, seed=seed)
    except DataError: assert folds==2; return # one subject outweighs all others
    pd.testing.assert_frame_equal(a, split_cases(cases, folds, seed=seed))
    rows = list(cases.index); rnd.shuffle(rows)
    b = split_cases(cases.loc[rows], folds, seed=seed)
    for f in range(folds): assert sides(a, f)==sides(b, f)

def test_other_seeds_other_subjects():
    cases = case_table([2,1,3,1,2,2,4,1,1,2,3,1])
    for folds in 1,3: assert len({frozenset(sides(split_cases(cases, folds, seed=s)).items()) for s in range(12)}) > 6

def test_every_subject_is_tested_by_some_seed():
    cases = case_table([1]*8)
    tested = Counter(s for seed in range(60) for s,p in sides(split_cases(cases, 1, seed=seed)).items() if p=='test')
    assert len(tested)==8 and max(tested.values()) < 4*min(tested.values())

def test_three_subjects():
    for ns in (1,1,1), (3,1,2), (9,1,1):
        for seed in range(5): assert sorted(sides(split_cases(case_table(ns), 1, seed=seed)).values())==['test','train','valid']
        split = split_cases(case_table(ns))
        assert all(sorted(sides(split, f).values())==['test','train','valid'] for f in range(3))

@pytest.mark.parametrize('ns,folds', [((5,),1), ((5,5),1), ((5,5),None), ((5,5),3), ((1,1,1),4), ((1,1,1),2)])
def test_too_few_subjects(ns, folds):
    with pytest.raises(DataError, match='subject.*(fold|split)'): split_cases(case_table(ns), folds)

def test_too_few_for_validation():
    with pytest.raises(DataError, match='too few'): SubjectSplitter(.2)(case_table([7]))

def test_the_library_asserts():
    split = split_cases(case_table([2]*6), 3)
    assert_apart(split)
    split.loc[(split.fold==1) & (split.subject==split.subject[0]), 'split'] = ['train','test']
    with pytest.raises(AssertionError, match=split.subject[0]): assert_apart(split)

# ---- folds

@given(counts(3,12), st.integers(3,5), seeds)
@settings(max_examples=50)
def test_folds_test_each_subject_once(ns, folds, seed):
    if len(ns) < folds: ns = ns + [1]*folds
    cases = case_table(ns)
    split = split_cases(cases, folds, seed=seed)
    assert (split[split.split=='test'].groupby('subject').fold.nunique()==1).all()
    assert sorted(split[split.split=='test'].image)==sorted(map(case_name, cases.itertuples()))
    assert (split.groupby(['fold','subject']).split.nunique()==1).all() and (split.groupby('fold').size()==len(cases)).all()
    assert all(set(g.split)=={'train','valid','test'} for _,g in split.groupby('fold'))
    tested = split[split.split=='test'].fold.value_counts()
    assert tested.max()-tested.min() <= max(ns) # of images

def test_validation_differs_between_folds():
    split = split_cases(case_table([1]*12), 3)
    assert len({frozenset(split.subject[(split.fold==f) & (split.split=='valid')]) for f in range(3)})==3

def test_folds_chosen_by_number_of_test_subjects():
    assert set(split_cases(case_table([1,2]*3*ENOUGH_SUBJECTS)).fold)=={0}
    small = case_table([1]*(ENOUGH_SUBJECTS+2))
    assert set(split_cases(small).fold)=={0,1,2} and set(split_cases(small, 1).fold)=={0}
    heavy = case_table([40]*4 + [1]*16) # a quarter of the images is one large subject and four small ones
    assert split_cases(heavy, 1).query('split=="test"').subject.nunique()==5 and set(split_cases(heavy).fold)=={0,1,2}
    one = split_cases(case_table([1,2]*3*ENOUGH_SUBJECTS))
    assert one[one.split=='test'].subject.nunique() >= ENOUGH_SUBJECTS and abs(images(one, 'test')/len(one)-.25) < .01

# ---- an earlier split

@given(counts(3,8), counts(0,6), st.sampled_from([1,3]), seeds, seeds)
@settings(max_examples=50)
def test_old_subjects_stay(old, more, folds, seed1, seed2):
    before = split_cases(case_table(old), folds, seed=seed1)
    names = list(case_table(old).subject.unique())
    grown = {**{s: n+1 for s,n in zip(names, old)}, **{f'9{i:02d}_S_new': n for i,n in enumerate(more)}}
    after = split_cases(case_table(grown), folds, seed=seed2, previous=before)
    for f in range(folds):
        was,now = sides(before, f), sides(after, f)
        assert {s: now[s] for s in was}==was and set(now)==set(grown)
    if folds>1: assert (after[after.split=='test'].groupby('subject').fold.nunique()==1).all()
    assert set(after[after.split=='test'].subject)>=set(before[before.split=='test'].subject)

def test_new_subjects_restore_the_share():
    old = split_cases(case_table([2]*8), 1, .25, .25)
    new = split_cases(case_table([2]*24), 1, .25, .25, previous=old)
    assert images(new, 'test')==images(new, 'valid')==12
    folds = split_cases(case_table([1]*18), 3, previous=split_cases(case_table([1]*6), 3))
    assert folds[folds.split=='test'].fold.value_counts().tolist()==[6,6,6]

def test_subjects_that_left():
    old,cases = split_cases(case_table([1]*12), 1, .25, .25), case_table([1]*12)
    gone = list(old.subject[old.split=='test'])
    new = split_cases(cases[~cases.subject.isin(gone[1:])], 1, previous=old)
    assert len(gone)==3 and all(sides(old)[s]==p for s,p in sides(new).items()) and gone[0] in sides(new)
    with pytest.raises(DataError, match='subjects.*test'): split_cases(cases[~cases.subject.isin(gone)], 1, previous=old) # or it would have to move some

@pytest.mark.parametrize('names', [['007','010','0100','3','1e5','12'], ['NA','null','nan','None','N/A','x']], ids=['numbers','words'])
def test_split_from_csv(tmp_path, names):
    cases = case_table(dict.fromkeys(names, 2))
    file = tmp_path/'split.csv'
    split = split_cases(cases, 1, .3, .3, seed=5)
    split.to_csv(file, index=False)
    assert list(read_split(file).subject)==list(split.subject)
    for seed in range(4): assert sides(split_cases(cases, 1, .3, .3, seed=seed, previous=file))==sides(split)
    assert SubjectSplitter(.3, .3, 8, previous=str(file)).assign(cases.subject)==sides(split)
    folds = split_cases(cases, 3, seed=5); folds.to_csv(file, index=False)
    again = split_cases(cases, 3, seed=6, previous=file)
    assert all(sides(again, f)==sides(folds, f) for f in range(3))

def test_split_from_a_spreadsheet(tmp_path):
    file,cases = tmp_path/'split.csv', case_table(dict(a=1, b=1, c=1, d=1))
    file.write_text('subject,split\r\na,test\r\nb,valid\r\nc,train\r\n', encoding='utf-8-sig') # as Excel saves it, and without images
    assert sides(split_cases(cases, 1, previous=file)) | dict(d=None)==dict(a='test', b='valid', c='train', d=None)

def test_an_earlier_split_keeps_its_design():
    cases = case_table([2]*12)
    for folds in 1,3,4:
        old = split_cases(cases, folds, seed=1)
        pd.testing.assert_frame_equal(split_cases(cases, seed=2, previous=old), old)
    for a,b in ((1,3),(3,5),(5,3)):
        with pytest.raises(DataError, match='fold'): split_cases(cases, b, previous=split_cases(cases, a))
    with pytest.raises(DataError, match='fold'): SubjectSplitter(previous=split_cases(cases, 3))(cases)

@pytest.mark.parametrize('text,word', [('image,subject\na,b\n', 'split'), ('image,split\na,test\n', 'subject'), ('', 'column'),
    ('subject,split\ns1,train\ns2,Test\n', 'Test'), ('subject,split\ns1,train\ns2,\n', 'train, valid or test'),
    ('subject,split\ns1,train\ns1,test\ns2,valid\n', 's1'), ('fold,subject,split\n0,s1,train\n1,s2,test\n1,s2,valid\n', 's2'),
    ('subject,split\ns1,train,3,4\ns2,"test\n', 'split.csv')])
def test_bad_split_file(tmp_path, text, word):
    file = tmp_path/'split.csv'
    file.write_text(text, encoding='utf-8')
    with pytest.raises(DataError, match=word): read_split(file)
    with pytest.raises(DataError, match=r'split\.csv'): split_cases(case_table([1]*5), 1, previous=file)

def test_no_split_file(tmp_path):
    (tmp_path/'picture.csv').write_bytes(bytes(range(256))*4)
    for f in 'none.csv','picture.csv',tmp_path.name:
        with pytest.raises(DataError, match=f): SubjectSplitter(previous=tmp_path/f if '.' in f else tmp_path)(case_table([1]*5))

# ---- other splitters, and fastai

def test_prefix():
    cases = case_table({'127_S_1':3, '027_S_1':4, '1':1, '0100':2})
    train,valid = PrefixSplitter('1')(cases)
    assert set(cases.subject[valid])=={'127_S_1','1'} and len(train)+len(valid)==10
    assert PrefixSplitter('1')(list(cases.image))==(train, valid)
    assert PrefixSplitter('x')(cases)[1]==[] and PrefixSplitter('')(cases)[0]==[]

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return make_folder(tmp_path_factory.mktemp('splits')/'data', 8, 3)

def test_data_block_on_paths(folder):
    splitter = SubjectSplitter(.25, seed=3)
    ds = DataBlock(ImageBlock(PILImageBW), get_items=get_image_files, splitter=splitter).datasets(folder/'brain')
    train,valid = ({subject_id(o) for o in t.items} for t in (ds.train, ds.valid))
    assert not train & valid and len(train)==6 and len(valid)==2 and len(ds.train)==18 and len(ds.valid)==6
    assert valid=={s for s,p in splitter.assign(adni_cases(folder).subject).items() if p=='valid'} # files come in any order
    part = DataBlock(ImageBlock(PILImageBW), get_items=get_image_files, splitter=SubjectSplitter(.25, .25)).datasets(folder/'brain')
    assert len(part.train)==12 and len(part.valid)==6
    with pytest.raises(DataError, match='notes'): splitter([folder/'brain'/'notes.png'])

def test_data_block_on_cases(folder):
    cases = adni_cases(folder)
    ds = brainseg_block('brain', size=64, splitter=SubjectSplitter(.25, .25, seed=3)).datasets(cases)
    parts = SubjectSplitter(.25, .25, seed=3).assign(cases.subject)
    for t,part in ((ds.train,'train'), (ds.valid,'valid')): assert set(t.items.subject)=={s for s,p in parts.items() if p==part}

def test_with_split(folder):
    cases = adni_cases(folder)
    split = split_cases(cases, 3)
    for f in range(3): assert dict(zip(with_split(cases, split, f).subject, with_split(cases, split, f).split))==sides(split, f)
    assert 'split' not in cases
    assert set(split.image)=={p.relative_to(folder).as_posix() for p in (folder/'brain').iterdir()}

# ---- leakage meter

@given(st.lists(st.integers(2,5), min_size=8, max_size=14), seeds)
@settings(max_examples=30)
def test_leakage_meter(ns, seed):
    cases = case_table(ns)
    wrong,right = image_split(cases, split_cases(cases, 1, seed=seed), seed)
    of = lambda t,part,col='image': set(t.loc[t.split==part, col])
    assert of(wrong, 'test')==of(right, 'test') and of(wrong, 'valid')==of(right, 'valid')
    assert len(of(wrong, 'train'))==len(of(right, 'train'))==(right.split=='train').sum()==(wrong.split=='train').sum()
    assert of(wrong, 'test', 'subject') <= of(wrong, 'train', 'subject') # other slices of everybody tested
    assert not of(right, 'test', 'subject') & (of(right, 'train', 'subject') | of(right, 'valid', 'subject'))
    for t in wrong,right: assert t.image.is_unique and not of(t, 'train') & of(t, 'test') and not of(t, 'valid') & of(t, 'test')
