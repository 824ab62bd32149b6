"The case table, reading of images and masks, and one test for each thing that may be wrong with a folder"
import shutil, subprocess, sys
from pathlib import Path

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from brainseg_fastai.adni import ADNI, adni_cases, check_cases, kinds_in, subject_id
from brainseg_fastai.cases import case_name, data_folder, is_simulated, pair_cases, standin
from brainseg_fastai.checks import format_problems, mask_codes, refuse_errors
from brainseg_fastai.core import DataError
from brainseg_fastai.drawing import show_cases
from brainseg_fastai.images import data_fingerprint, read_image, read_mask
from helpers import dataset, draw_case, make_folder

@pytest.fixture(scope='module')
def good(tmp_path_factory): return make_folder(tmp_path_factory.mktemp('good')/'data', 4, 2)

@pytest.fixture
def root(good, tmp_path): return Path(shutil.copytree(good, tmp_path/'data'))

def name(subject, scan, kind): return f'{kind}/{subject:03d}_S_{1000+subject}-I{30000+10*subject+scan}-{kind}-ax3.png'
def save(a, path): Image.fromarray(a).save(path)

B00,B01,B10,M00,M01,O00 = (name(0,0,'brain'), name(0,1,'brain'), name(1,0,'brain'), name(0,0,'mask'), name(0,1,'mask'),
                           name(0,0,'orig'))

# ---- a good folder

def test_good_folder(good):
    assert kinds_in(good) == ['brain','orig']
    t = adni_cases(good, 'orig')
    assert list(t.columns) == ['subject','scan','slice','inputs','image','mask','spacing']
    assert len(t)==8 and t.subject.nunique()==4 and t.spacing.isna().all()
    assert t.loc[0, ['subject','scan','slice','inputs']].tolist() == ['000_S_1000','I30000','ax3','orig']
    assert t.image[0] == (good/O00).resolve() and t['mask'][0] == (good/M00).resolve()
    assert check_cases(good).empty and format_problems(check_cases(good)) == 'No problems found.'
    refuse_errors(check_cases(good))

def test_order_and_pairs(root):
    (root/B00).unlink(); (root/name(0,1,'orig')).unlink()
    a,b = pair_cases(adni_cases(root, 'brain'), adni_cases(root, 'orig').sample(frac=1, random_state=1))
    assert len(a)==len(b)==6 and set(a.inputs)=={'brain'} and set(b.inputs)=={'orig'}
    assert a[['subject','scan','slice']].equals(b[['subject','scan','slice']]) and a.subject.is_monotonic_increasing
    with pytest.raises(DataError, match='second image'): pair_cases(pd.concat([a, a]), b)

def test_cohort(root):
    assert not is_simulated(root)
    (root/'cohort.json').write_text('{"simulated": true, "spacing": 0.94}', encoding='utf-8')
    assert is_simulated(root) and (adni_cases(root).spacing==.94).all()
    assert 'below_top' not in adni_cases(root, 'brain')
    (root/'cohort.json').write_text('{"below_top": 63}', encoding='utf-8')
    assert set(adni_cases(root, 'brain').below_top)=={63.}
    (root/'cohort.json').write_text('{"simul', encoding='utf-8')
    with pytest.raises(DataError, match='cohort.json.*JSON'): is_simulated(root)

HEAVY = 'torch','fastai','monai','torchvision','fastcore','matplotlib','nibabel','scipy'

def test_listing_and_checking_import_nothing_heavy(good):
    code = ('import sys; from brainseg_fastai.adni import adni_cases, check_cases; '
            f'assert check_cases({str(good)!r}).empty and len(adni_cases({str(good)!r}))==8; print([m for m in {HEAVY} if m in sys.modules])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

# ---- bad input: what to break, then the level, the file and a word of what was found

def drop(*fs): return lambda r: [(r/f).unlink() for f in fs]
def write(f, a): return lambda r: save(a, r/f)
def copy(a, b): return lambda r: shutil.copy(r/a, r/b)
def cut(f, n): return lambda r: (r/f).write_bytes((r/f).read_bytes()[:n])
def move(a, b): return lambda r: (r/a).rename(r/b)
def wipe(*fs): return lambda r: [shutil.rmtree(r/f) for f in fs]
def keep(n): return lambda r: [p.unlink() for p in r.rglob('*.png') if int(p.name[:3])>=n]
def many(*fs): return lambda r: [f(r) for f in fs]
def resave(a, b): return lambda r: Image.open(r/a).convert('RGB').save(r/b)

def soften(r): Image.open(r/M00).rotate(7, Image.Resampling.BILINEAR).save(r/M00)
def as_ones(r): save(np.asarray(Image.open(r/M00))//255, r/M00)
def stray(r):
    a = np.array(Image.open(r/M00)); a[2,2] = 77; save(a, r/M00)
def jpeg_masks(r):
    for p in list((r/'mask').iterdir()): Image.open(p).save(p.with_suffix('.jpg'), quality=80); p.unlink()
def pages(r):
    a,b = (Image.open(r/f).copy() for f in (B00, B01)); (r/B00).unlink()
    a.save((r/B00).with_suffix('.tif'), save_all=True, append_images=[b])
def holiday(r): save(np.random.default_rng(0).integers(0, 255, (64,64,3)).astype(np.uint8), r/B00)
def all_empty(r):
    for p in (r/'mask').iterdir(): save(np.zeros((64,64), np.uint8), p)
def one_kind_each(r):
    for s in range(6): (r/name(s, 0, 'brain' if s<3 else 'orig')).unlink()
def other_pictures(r): (r/'old').mkdir(); save(np.eye(64, dtype=np.uint8), r/'old/a.png')

empty,small = np.zeros((64,64), np.uint8), np.pad(np.full((30,30), 255, np.uint8), 9)
odd_name,tif = O00.replace('orig/','brain/'), B10.replace('.png','.tif')
bad = {
    'mask missing':          (drop(M00), 'error', B00, 'no mask'),
    'mask missing (orig)':   (drop(M00), 'error', O00, 'no mask'),
    'orphan mask':           (drop(B00, O00), 'warning', M00, 'without an image'),
    'one kind only':         (drop(O00), 'warning', B00, 'no image of the same name in orig'),
    'one kind, no mask':     (drop(O00, M00), 'warning', B00, 'no mask'),
    'size mismatch':         (write(M00, small), 'error', B00, '64×64 pixels with a mask of 48×48'),
    'truncated image':       (cut(B00, 900), 'error', B00, 'cannot be read'),
    'truncated mask':        (cut(M00, 60), 'error', M00, 'cannot be read'),
    'empty file':            (cut(B00, 0), 'error', B00, 'cannot be read'),
    'unreadable, unused':    (many(drop(B00, O00), cut(M00, 60)), 'warning', M00, 'cannot be read'),
    'colour photograph':     (holiday, 'error', B00, 'colour'),
    'stack of pages':        (pages, 'error', B00.replace('.png','.tif'), '2 pages'),
    'unparsable name':       (move(B00, 'brain/slice12.png'), 'error', 'brain/slice12.png', 'does not tell the subject'),
    'name of another kind':  (move(B00, odd_name), 'error', odd_name, 'does not tell the subject'),
    'two files of a name':   (resave(B00, B00.replace('.png','.bmp')), 'error', B00, 'the same subject, scan and slice'),
    'anti-aliased mask':     (soften, 'error', M00, 'anti-aliased'),
    'JPEG masks':            (jpeg_masks, 'error', M00.replace('.png','.jpg'), 'anti-aliased'),
    'stray value':           (stray, 'error', M00, '77'),
    'codes mixed':           (as_ones, 'error', M00, 'foreground of 1'),
    'empty masks':           (many(write(M00, empty), write(M01, empty)), 'note', M00, '2 of 8 masks empty'),
    'only empty masks':      (all_empty, 'error', 'mask', 'all of them empty'),
    'pixels of two subjects':(copy(B00, B10), 'error', B10, f'the same pixels as {B00}'),
    'copy in another format':(many(resave(B00, tif), drop(B10)), 'error', tif, 'the same pixels'),
    'pixels twice in one':   (copy(B00, B01), 'warning', B01, f'the same pixels as {B00}'),
    'two subjects':          (keep(2), 'error', 'brain', '2 subjects'),
    'too few in common':     (many(keep(3), drop(O00, name(0,1,'orig'))), 'error', 'orig', '2 subjects'),
    'empty mask folder':     (many(wipe('mask'), lambda r: (r/'mask').mkdir()), 'error', '', 'no image in mask'),
    'no mask folder':        (wipe('mask'), 'error', '', 'no subfolder mask (subfolders: brain, orig)'),
    'masks alone':           (wipe('brain','orig'), 'error', '', 'no images beside mask'),
    'empty folder':          (wipe('brain','orig','mask'), 'error', '', 'an empty folder'),
    'other files':           (lambda r: (r/'brain/notes.txt').write_text('x'), 'note', 'brain', 'notes.txt'),
    'other pictures':        (other_pictures, 'warning', 'old', 'none of which has a mask'),
}

@pytest.mark.parametrize('case', bad)
def test_bad_input(case, root):
    breaks,level,file,found = bad[case]
    breaks(root)
    before = sorted(p.relative_to(root) for p in root.rglob('*'))
    ps = check_cases(root); file = file or str(root.resolve())
    hit = ps[(ps.level==level) & (ps.file==file) & ps.found.str.contains(found, regex=False)]
    assert len(hit)==1, format_problems(ps)
    assert all(len(o)>3 for c in ('found','expected','remedy') for o in ps[c])
    assert all(o in format_problems(ps, n=99) for o in (file, found, hit.remedy.iloc[0]))
    if (ps.level=='error').any():
        with pytest.raises(DataError, match='brainseg check'): refuse_errors(ps)
    else: refuse_errors(ps)
    assert sorted(p.relative_to(root) for p in root.rglob('*')) == before, 'a check writes nothing'

@pytest.mark.parametrize('case', [k for k,v in bad.items() if v[1]!='error'])
def test_training_may_go_on(case, root):
    bad[case][0](root)
    ps = check_cases(root)
    assert len(ps)==(2 if case=='unreadable, unused' else 1) and not (ps.level=='error').any()

def test_no_subjects_in_common(tmp_path):
    root = make_folder(tmp_path/'data', 6, 1); one_kind_each(root)
    ps = check_cases(root)
    assert ps.level.tolist()==['error']+['warning']*6 and ps.file[0]=='brain, orig'
    assert '0 subjects with images in every kind' in ps.found[0]
    assert check_cases(root, inputs='orig').level.tolist()==['warning']*3

def test_not_a_folder(tmp_path, good):
    (tmp_path/'void').mkdir()
    for p in (tmp_path/'nowhere', good/B00, tmp_path/'void'):
        ps = check_cases(p)
        assert ps.level.tolist()==['error'] and ps.file[0]==str(p.resolve())
        with pytest.raises(DataError, match='expected a folder'): adni_cases(p)

def test_near_miss_is_named(good):
    assert check_cases(good.parent).remedy[0] == check_cases(good/'brain').remedy[0] == f'Did you mean {good.resolve()}?'

def test_unknown_kind(good):
    assert check_cases(good, 'flair').remedy[0] == 'This folder has: brain, orig.'
    with pytest.raises(DataError, match='This folder has: brain, orig'): adni_cases(good, 'flair')

def test_kinds_are_checked_alone(root):
    (root/O00).unlink()
    assert check_cases(root).level.tolist()==['warning'] and check_cases(root, inputs='brain').empty
    assert check_cases(root, inputs=['orig']).found.tolist()==['a mask without an image']

def test_constant_slices_are_no_duplicates(root):
    for f in (B00, B01, B10): save(np.full((64,64), 9, np.uint8), root/f)
    assert check_cases(root).empty

def test_same_pixels_in_two_kinds_are_no_duplicates(root):
    for p in (root/'brain').iterdir(): shutil.copy(p, root/'orig'/p.name.replace('-brain-','-orig-'))
    assert check_cases(root).empty

def test_hidden_files_are_passed_over(root):
    (root/'brain/._x.png').write_bytes(b'junk'); (root/'.cache').mkdir(); shutil.copy(root/B00, root/'.cache')
    assert check_cases(root).empty and kinds_in(root)==['brain','orig']

def test_progress(good):
    seen = []
    check_cases(good, progress=lambda i,n: seen.append((i,n)))
    assert seen == [(i,24) for i in range(1,25)]

def test_long_lists_are_shortened(root):
    shutil.rmtree(root/'mask'); (root/'mask').mkdir(); save(np.eye(64, dtype=np.uint8), root/'mask/a.png')
    ps = check_cases(root); text = format_problems(ps, n=2)
    assert (ps.level=='error').sum()==18 and '16 times' in text and '… and 14 more' in text
    with pytest.raises(DataError, match='18 errors(.|\n)*and 15 more'): refuse_errors(ps)

# ---- other ways of naming

def rename(root, f):
    "Rename every file to `f(subject, scan, kind)` inside its folder"
    for k in ('brain','orig','mask'):
        for s in range(4):
            for i in range(2):
                p = root/k/f(s, i, k); p.parent.mkdir(exist_ok=True)
                (root/name(s, i, k)).rename(p)

@pytest.mark.parametrize('f, subject', [
    (lambda s,i,k: f'sub{s}_t1_{k}_{i}.png', r'(sub\d+)'), (lambda s,i,k: f'{k}_{i}_sub{s}.png', r'(sub\d+)'),
    (lambda s,i,k: f'sub{s}_{i}.png', r'^(sub\d+)_'),      (lambda s,i,k: f'sub{s}_{i}{"_mask"*(k=="mask")}.png', r'(sub\d+)'),
    (lambda s,i,k: f'sub{s}/{i}.png', 'folder'),           (lambda s,i,k: f'sub{s}/{k}-{i}.png', 'folder')])
def test_other_names(f, subject, root):
    rename(root, f)
    t,here = adni_cases(root, 'brain', subject), root.resolve()
    assert t.subject.tolist()==[f'sub{s}' for s in range(4) for _ in range(2)]
    assert [p.relative_to(here).as_posix() for p in t['mask']] == ['mask/'+f(s, i, 'mask') for s in range(4) for i in range(2)]
    assert len(pair_cases(t, adni_cases(root, 'orig', subject))[0])==8
    assert check_cases(root, subject=subject).empty and (check_cases(root).level=='error').any()

@pytest.mark.parametrize('listed', ['brain/{}', '{}', 'orig/{}', '.\\brain\\{}'])
def test_csv_of_subjects(listed, root, tmp_path):
    rename(root, lambda s,i,k: f'x{2*s+i}.png')
    csv = tmp_path/'who.csv'
    csv.write_text('image,subject\n' + ''.join(f'{listed.format(f"x{n}.png")},p{n//2}\n' for n in range(7)), encoding='utf-8-sig')
    for k in ('brain','orig'): assert adni_cases(root, k, csv).subject.tolist()==['p0','p0','p1','p1','p2','p2','p3']
    ps = check_cases(root, subject=str(csv))
    assert ps.file.tolist()==['brain/x7.png','orig/x7.png'] and 'who.csv' in ps.expected[0]

@pytest.mark.parametrize('kind', ['brain','orig'])
def test_csv_serves_every_kind(kind, good, tmp_path):
    t = adni_cases(good, 'brain')
    rows = [f'{p.name},{s[:3]}\n' for p,s in zip(t.image, t.subject)]
    (tmp_path/'who.csv').write_text('image,subject\n' + ''.join(rows), encoding='utf-8')
    assert adni_cases(good, kind, tmp_path/'who.csv').subject.tolist()==t.subject.str[:3].tolist()

@pytest.mark.parametrize('subject, word', [('(', 'regular expression'), ('sub', 'one group'), ('(a)(b)', 'one group'),
                                           ('none.csv', 'none.csv'), ('{}/cols.csv', 'image, subject'), ('{}/two.csv', 'two subjects')])
def test_bad_subject_rule(subject, word, good, tmp_path):
    (tmp_path/'cols.csv').write_text('file,person\na,b\n', encoding='utf-8')
    (tmp_path/'two.csv').write_text('image,subject\nbrain/a.png,p\nbrain/a.png,q\n', encoding='utf-8')
    for f in (adni_cases, check_cases):
        with pytest.raises(DataError, match=word): f(good, subject=subject.format(tmp_path))

def test_no_name_fits(good):
    with pytest.raises(DataError, match=r'\(nobody\).*brainseg check'): adni_cases(good, subject='(nobody)')

chars = st.characters(exclude_categories=('Cs','Cc'), exclude_characters='-/\\:')
word = st.text(chars, min_size=1).filter(lambda s: s.strip('. '))

@given(word, word)
def test_subject_id(s, rest): assert subject_id(f'some-where/{s}-{rest}.png') == subject_id(Path(f'{s}-{rest}-{s}.png')) == s

@pytest.mark.parametrize('path', ['holiday.png', '-x.png', 'a-b/holiday.png'])
def test_no_subject_id(path):
    with pytest.raises(DataError, match='SUBJECT-SCAN-KIND-SLICE'): subject_id(path)

# ---- codes

def test_thin_classes_with_small_codes_are_believed(tmp_path):
    a = np.zeros((32,32), np.uint8); a[8:24,8:24] = 1; a[9:23,9:23] = 2
    save(a, tmp_path/'a.png'); save(a*100, tmp_path/'b.png')
    assert mask_codes([tmp_path/'a.png'])==(0,1,2)
    with pytest.raises(DataError, match='b.png.*100 fill no region.*stored as 0, 1, 2'): mask_codes([tmp_path/'b.png'])

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(3, 87), st.sampled_from(['BILINEAR','BICUBIC']))
def test_rotated_masks_are_reported(tmp_path_factory, seed, angle, how):
    f = tmp_path_factory.mktemp('s')/'m.png'
    m = Image.fromarray(draw_case(np.random.default_rng(seed))['mask']*255)
    m.rotate(angle, getattr(Image.Resampling, how)).save(f)
    with pytest.raises(DataError, match='anti-aliased'): mask_codes([f])
    m.rotate(angle, Image.Resampling.NEAREST).save(f)
    assert mask_codes([f])==(0,255)

@pytest.mark.parametrize('scale', [.4, .5, .75, 1.5, 2, 3, 4])
def test_scaled_masks_are_reported(scale, tmp_path):
    m = Image.fromarray(draw_case(np.random.default_rng(3))['mask']*255); size = (round(64*scale),)*2
    m.resize(size, Image.Resampling.BILINEAR).save(tmp_path/'m.png')
    with pytest.raises(DataError, match='anti-aliased'): mask_codes([tmp_path/'m.png'])

def test_read_mask_refuses_other_codes(good):
    with pytest.raises(DataError, match='values 255.*codes 0, 1'): read_mask(good/M00, (0,1))

# ---- layouts and stand-ins

def test_case_name(good):
    o = next(adni_cases(good, 'orig').itertuples())
    assert case_name(o)==O00

def test_the_layout_reads_and_checks_as_its_functions_do(good):
    assert ADNI.cases(good).equals(adni_cases(good, 'brain')) and ADNI.check(good, 'orig', progress=False).empty
    with pytest.raises(DataError, match="expected 'slice'"): ADNI.cases(good, 'brain', unit='volume')

def test_stand_in_of_slices(tmp_path, monkeypatch):
    monkeypatch.setenv('BRAINSEG_CACHE', str(tmp_path/'cache'))
    root = standin(ADNI, n=3)
    assert root.parent==tmp_path/'cache' and is_simulated(root) and ADNI.cases(root).subject.nunique()==3
    assert standin(ADNI, n=3)==root and read_image(ADNI.cases(root).image[0]).shape==(128,128)
    with pytest.raises(DataError, match='a new or an empty folder'): standin(ADNI, root, n=4)

def test_data_folder(good, monkeypatch):
    monkeypatch.setenv('BRAINSEG_DATA', str(good.parent))
    assert data_folder(good.name, ADNI)==good.resolve() and data_folder('other', ADNI)==good.parent.resolve()

# ---- fingerprint and pictures

def test_fingerprint(good, root):
    here = data_fingerprint(adni_cases(good))
    assert len(here)==64 and int(here, 16) and here==data_fingerprint(adni_cases(root).sample(frac=1, random_state=0))
    assert len({here, data_fingerprint(adni_cases(good, 'orig')), data_fingerprint(adni_cases(good)[1:])})==3
    a = np.array(Image.open(root/M00)); a[0,0] = 255; save(a, root/M00)
    assert data_fingerprint(adni_cases(root))!=here

def test_fingerprint_sees_names(good, root):
    for k in ('brain','mask'): (root/name(0,0,k)).rename(root/name(0,5,k))
    assert data_fingerprint(adni_cases(root))!=data_fingerprint(adni_cases(good))

def test_show_cases(good):
    import matplotlib; matplotlib.use('Agg')
    fig = show_cases(adni_cases(good), 3)
    pictures = [np.asarray(ax.images[0].get_array()).astype(int) for ax in fig.axes]
    assert len(pictures)==3 and all(np.ptp(a[...,:3], axis=2).max()>50 for a in pictures), 'an outline in colour'
    assert fig.axes[0].get_title().startswith('000_S_1000')

# ---- development data

@pytest.mark.parametrize('data, kinds, subjects, images', [
    ('adni_like', ['brain','orig'], 15, 82), ('oasis_slices', ['brain'], 11, 11)])
def test_development_data(data, kinds, subjects, images):
    root = dataset(data)
    assert kinds_in(root)==kinds and not (check_cases(root).level=='error').any()
    for k in kinds:
        t = adni_cases(root, k)
        assert (t.subject.nunique(), len(t), mask_codes(t['mask'])) == (subjects, images, (0,255))
        assert read_image(t.image[0]).shape==read_mask(t['mask'][0], (0,255)).shape==(256,256)
