"The four other data sets: reading against nibabel and h5py directly, and one test for each thing that may be wrong"
import os, shutil, subprocess, sys
from pathlib import Path

import nibabel as nib, numpy as np, pandas as pd, pytest
from PIL import Image

from brainseg_fastai import images as I
from brainseg_fastai.brats import brats_cases
from brainseg_fastai.cases import is_simulated, standin
from brainseg_fastai.checks import format_problems, mask_codes, refuse_errors
from brainseg_fastai.core import DataError, need_package
from brainseg_fastai.drawing import show_cases
from brainseg_fastai.figshare import MatSlice, TUMOURS, figshare_cases, figshare_folds, write_mat
from brainseg_fastai.ibsr import ibsr_cases
from brainseg_fastai.images import Pixels, data_fingerprint, image_size, open_volume, read_image, read_mask
from brainseg_fastai.lgg import lgg_cases
from helpers import dataset
from tiny import change, cut, layout_of, tiny, unzip

h5py = pytest.importorskip('h5py')
four = ['figshare','brats','ibsr','lgg']

@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    mp = pytest.MonkeyPatch(); mp.setenv('BRAINSEG_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield
    I.open_volume.cache_clear(); mp.undo()

@pytest.fixture
def brats(tmp_path): return tiny('brats', tmp_path/'data')
@pytest.fixture
def ibsr(tmp_path): return tiny('ibsr', tmp_path/'data')
@pytest.fixture
def lgg(tmp_path): return tiny('lgg', tmp_path/'data')
@pytest.fixture
def figshare(tmp_path): return tiny('figshare', tmp_path/'data')

def b(s, seq): return f'MICCAI_BraTS2020_TrainingData/BraTS20_Training_{s:03d}/BraTS20_Training_{s:03d}_{seq}.nii.gz'
def i(s, end=''): return f'Training_Set/IBSR_{s:02d}/IBSR_{s:02d}{end}.nii.gz'
def g(s, k): return f'kaggle_3m/TCGA_XX_{s:04d}_20000101/TCGA_XX_{s:04d}_20000101_{k}.tif'

def made(layout, *args, **kwargs): return standin(layout_of(layout), *args, **kwargs)
def check(root, layout, inputs=None): return layout_of(layout).check(root, inputs)
def clean(root, layout, inputs=None): return set(check(root, layout, inputs).level) <= {'note'}

# ---- all layouts alike

@pytest.mark.parametrize('layout', four)
def test_good(layout):
    root,lay = made(layout), layout_of(layout)
    ps,t,codes = lay.check(root), lay.cases(root), tuple(lay.labels)
    assert clean(root, layout), format_problems(ps)
    refuse_errors(ps); assert is_simulated(root) and lay.name==layout
    assert list(t.columns)[:7] == ['subject','scan','slice','inputs','image','mask','spacing'] and t.subject.nunique()==6
    assert not t.duplicated(['subject','scan','slice']).any() and set(lay.inputs) >= set(t.inputs[0].split('+'))
    assert mask_codes(t['mask'])==codes==tuple(sorted(codes)) and set(sum(lay.regions.values(), ())) <= set(codes)
    for o in t.iloc[::9].itertuples():
        im,m = read_image(o.image), read_mask(o.mask, codes)
        assert im.dtype==m.dtype==np.uint8 and im.shape[:2]==m.shape==image_size(o.image) and m.max()<len(codes)
    assert len({str(o) for o in t.image})==len(t)
    assert len(show_cases(t, 2).axes)==2

@pytest.mark.parametrize('layout', four)
def test_standin_repeats(layout, tmp_path):
    cases = layout_of(layout).cases
    a,b = cases(made(layout, tmp_path/'a')), cases(made(layout))
    assert data_fingerprint(a)==data_fingerprint(b.sample(frac=1, random_state=0)) != data_fingerprint(a[1:])
    with pytest.raises(DataError, match='new or an empty folder'): made(layout, tmp_path/'a', n=7)

def test_fingerprint_sees_channels_and_voxels(brats):
    a = data_fingerprint(brats_cases(brats)); assert a!=data_fingerprint(brats_cases(brats, 't1+t1ce+t2+flair'))
    def one(v): v[20,20,15] += 1; return v
    change(brats/b(1,'t2'), one)
    assert a!=data_fingerprint(brats_cases(brats))

@pytest.mark.parametrize('layout', four)
def test_wrong_folder_and_options(layout, tmp_path):
    (tmp_path/'void').mkdir(); lay = layout_of(layout)
    for p,word in [(tmp_path/'nowhere','no such folder'), (tmp_path/'void','an empty folder')]:
        ps = lay.check(p)
        assert ps.level.tolist()==['error'] and word in ps.found[0] and ps.file[0]==str(p)
        with pytest.raises(DataError, match='expected .*folder'): lay.cases(p)
    with pytest.raises(DataError, match='pet'): lay.cases(made(layout), inputs='pet')
    with pytest.raises(DataError, match='unit'): lay.cases(made(layout), unit='voxel')

def test_light_import():
    code = ("import sys; from brainseg_fastai import adni, brats, figshare, ibsr, lgg; "
            "print([m for m in ('torch','fastai','matplotlib','scipy','h5py','nibabel','torchio') if m in sys.modules])")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()=='[]'

def test_hint_for_missing_package(monkeypatch):
    root = made('figshare')
    monkeypatch.setitem(sys.modules, 'h5py', None)
    for f in (figshare_cases, lambda r: check(r, 'figshare')):
        with pytest.raises(DataError, match=r"h5py is not installed.*pip install 'brainseg_fastai\[mat\]'"): f(root)
    with pytest.raises(DataError, match='volumes'): need_package('not_there', 'volumes')

def test_listing_decodes_each_volume_once(brats, monkeypatch):
    calls,load = [],I.load_volume
    monkeypatch.setattr(I, 'load_volume', lambda p, *a: calls.append(p) or load(p, *a))
    monkeypatch.setenv('BRAINSEG_CACHE', str(brats.parent/'cache'))
    t = brats_cases(brats); assert len(calls)==6 and len(t)==156 # the first sequence of each patient
    check(brats, 'brats'); data_fingerprint(t); mask_codes(t['mask'])
    assert len(calls)==7*5-1 and len(set(calls))==len(calls)
    I.volume_facts.cache_clear(); brats_cases(brats); assert len(calls)==34 # a later process reads its notes
    assert sum(p.suffix=='.json' for p in (brats.parent/'cache/volumes').iterdir())==34

# ---- volumes

def test_agrees_with_nibabel(brats):
    t = brats_cases(brats, 't1ce'); o = t.iloc[40]; f = o.image.files[0]
    v = nib.as_closest_canonical(nib.load(f)); a = v.get_fdata()
    lo,hi = np.percentile(a[a!=0], [.1,99.9]); k = o.image.index
    assert np.abs(read_image(o.image)-np.rot90(((a-lo)/(hi-lo)*255).clip(0,255))[:,:,k]).max() < .51
    seg = nib.as_closest_canonical(nib.load(o['mask'].files[0])).get_fdata()
    assert (np.array((0,1,2,4))[read_mask(o['mask'], (0,1,2,4))]==np.rot90(seg[:,:,k])).all()
    w = brats_cases(brats, 't1ce', 'volume').iloc[1]
    assert (np.rot90(read_image(w.image)[:,:,k])==read_image(Pixels(w.image.files, k))).all()
    assert w.spacing==(1,1,1) and (open_volume(f).affine==v.affine).all()
    assert t.slice.tolist()[:2]==['z003','z004'] and t[t.subject==t.subject[0]].image.map(lambda p: a[:,:,p.index].any()).all()

def test_unpacking_leaves_no_scraps(brats):
    t = brats_cases(brats); [read_image(p) for p in t.image[:3]]
    assert not [p for p in (Path(os.environ['BRAINSEG_CACHE'])/'volumes').iterdir() if p.name.startswith('.')]

# ---- BraTS

def test_brats_files(brats):
    t = brats_cases(brats); unzip(brats/b(1,'flair'))
    seg = unzip(brats/b(2,'seg')); seg.rename(seg.parent/'W39_1998.09.19_Segm.nii')
    (brats/b(1,'t1')).with_name('._x_t1.nii.gz').write_bytes(b'junk')
    u = brats_cases(brats); assert len(t)==len(u) and u.image[0].files[0].endswith('_flair.nii')
    for k in (0,12,40): assert (read_image(t.image[k].files and u.image[k])).shape==(48,48,4)
    assert u['mask'][30].files[0].endswith('Segm.nii') and clean(brats, 'brats')
    assert (read_image(u.image[12])[...,1]==read_image(Pixels(u.image[12].files[1], u.image[12].index))).all()

@pytest.mark.parametrize('inputs', ['t2', 'flair+t1ce', ['t1','t2','flair']])
def test_brats_subsets(inputs, brats):
    names = inputs.split('+') if isinstance(inputs, str) else inputs
    if 't1' not in names: [p.unlink() for p in brats.rglob('*_t1.nii.gz')]
    t = brats_cases(brats, inputs); assert t.inputs[0]=='+'.join(names)
    assert [Path(f).name.split('_')[-1] for f in t.image[0].files]==[f'{o}.nii.gz' for o in names]
    assert clean(brats, 'brats', inputs)
    if 't1' not in names:
        with pytest.raises(DataError, match='no t1.*Add the file'): brats_cases(brats)

def test_prediction_only():
    brats,ibsr = made('brats'), made('ibsr')
    assert brats_cases(brats, None, 'volume', labelled=False)[['subject','mask']].values.tolist()==[['BraTS20_Validation_001',None]]
    assert ibsr_cases(ibsr, labelled=False).subject.unique().tolist()==['IBSR_07']
    with pytest.raises(DataError, match='leave out labelled'): lgg_cases(made('lgg'), labelled=False)

def test_empty_slices(brats):
    t = brats_cases(brats, skip_empty=False); assert len(t)==6*32 and t.slice.iloc[-1]=='z031'
    assert not read_image(t.image[0]).any() and not len(check(brats, 'brats').query("level!='note'"))

# ---- IBSR

def test_ibsr_older_archive(ibsr):
    new = ibsr_cases(ibsr, unit='volume'); want = [read_image(p) for p in new.image]
    for s in range(1,7):
        for end,to in (('','_ana_strip'), ('_seg','_segTRI_fill_ana')):
            change(ibsr/i(s,end), lambda a: a[...,None]); (ibsr/i(s,end)).rename(ibsr/i(s,to))
        nib.save(nib.Nifti1Image(np.full((48,32,48), 41, np.uint8), np.eye(4)), ibsr/i(s,'_seg_ana'))
    t = ibsr_cases(ibsr, unit='volume')
    assert len(t)==6 and all(p.files[0].endswith('_ana_strip.nii.gz') for p in t.image) and mask_codes(t['mask'])==(0,1,2,3)
    assert all((read_image(p)==w).all() for p,w in zip(t.image, want)) and clean(ibsr, 'ibsr')

def test_ibsr_spacing(ibsr):
    assert ibsr_cases(ibsr).spacing[0]==(1.5,.9375) and ibsr_cases(ibsr, unit='volume').spacing[0]==(.9375,1.5,.9375)

# ---- LGG

def test_lgg_agrees_with_pillow(lgg):
    t = lgg_cases(lgg); o = t[t.slice=='z004'].iloc[2]; a = np.array(Image.open(lgg/g(2,4)))
    assert o.subject=='TCGA_XX_0002' and o.scan=='20000101' and (read_image(o.image)==a).all() and np.isnan(o.spacing)
    assert (read_mask(o['mask'], (0,255))==np.array(Image.open((lgg/g(2,'4_mask'))))//255).all()
    p = lgg_cases(lgg, 'post+pre'); assert (read_image(p[p.slice=='z004'].iloc[2].image)==a[...,[2,0]]).all()
    assert (read_image(lgg_cases(lgg, 'flair').image[3])==read_image(t.image[3])[...,1]).all()

def test_lgg_genomics_and_nested_copy(lgg):
    t = lgg_cases(lgg); csv = pd.read_csv(lgg/'kaggle_3m/data.csv').set_index('Patient')
    assert t.tumor_location.tolist()==csv.loc[t.subject, 'tumor_location'].tolist()
    shutil.copytree(lgg/'kaggle_3m', lgg/'lgg-mri-segmentation/kaggle_3m')
    u = lgg_cases(lgg); assert u.image.tolist()==t.image.tolist() and clean(lgg, 'lgg')
    (lgg/'kaggle_3m/data.csv').write_text('a,b\n1,2\n'); assert check(lgg, 'lgg').file[0].endswith('data.csv')
    (lgg/'kaggle_3m/data.csv').unlink(); (lgg/'lgg-mri-segmentation/kaggle_3m/data.csv').unlink()
    assert 'gender' not in lgg_cases(lgg)

# ---- figshare

def test_figshare_agrees_with_h5py(figshare):
    t = figshare_cases(figshare)
    assert t.slice.tolist()==[str(k) for k in range(1,19)] and set(t.label)=={'meningioma','glioma','pituitary'}
    with h5py.File(figshare/'4.mat') as h: im,m = h['cjdata/image'][()].T.astype(float), h['cjdata/tumorMask'][()].T
    o = t.iloc[3]; assert o.subject=='100001' and o.label=='glioma' and (read_mask(o['mask'], (0,1))==m).all()
    assert np.abs(read_image(o.image)-(im-im.min())/(im.max()-im.min())*255).max()<.51
    assert figshare_cases(figshare, spacing=.49).spacing.tolist()==[.49]*18

def test_storage_may_be_upright(figshare):
    "A file written again from Python, not transposed, comes out the same way up"
    t = figshare_cases(figshare); want = read_image(t.image[3]), read_mask(t['mask'][3], (0,1))
    with h5py.File(figshare/'4.mat', 'r+') as h:
        for k in ('image','tumorMask'): a = h['cjdata'][k][()].T; del h['cjdata'][k]; h['cjdata'][k] = a
    got = read_image(t.image[3]), read_mask(t['mask'][3], (0,1))
    assert (got[0]==want[0]).all() and (got[1]==want[1]).all() and (want[1]!=want[1].T).any()

def test_figshare_folds(figshare):
    t = figshare_cases(figshare); s = figshare_folds(figshare, t)
    assert list(s.columns)==['image','subject','split','fold'] and s.fold.nunique()==5 and len(s)==5*18
    assert (s.groupby(['fold','subject']).split.nunique()==1).all() and (s[s.split=='test'].image.value_counts()==1).all()
    assert set(s.split)=={'train','valid','test'} and all(set(o.split)=={'train','valid','test'} for _,o in s.groupby('fold'))
    with h5py.File(figshare/'cvind.mat', 'r+') as h: h['cvind'][0,0] = 3
    with pytest.raises(DataError, match=r'cvind.mat.*1 patient in more than one fold: 100000'): figshare_folds(figshare, t)
    assert len(figshare_folds(figshare, t, force=True))==90
    ps = check(figshare, 'figshare'); assert ps.level.tolist()==['warning'] and ps.file[0]=='cvind.mat'
    from scipy.io import savemat
    savemat(figshare/'cvind.mat', dict(cvind=np.arange(18)//3%5+1)); assert figshare_folds(figshare, t).equals(s)
    savemat(figshare/'cvind.mat', dict(cvind=np.ones(4)))
    with pytest.raises(DataError, match='4 folds, none for 5.mat'): figshare_folds(figshare, t)
    (figshare/'cvind.mat').unlink(); assert check(figshare, 'figshare').empty
    with pytest.raises(DataError, match='no cvind.mat'): figshare_folds(figshare, t)

# ---- bad input: layout, what to break, level, file, a word of what was found

def old_mat(r):
    from scipy.io import savemat
    savemat(r/'1.mat', dict(cjdata=dict(PID='1')))
def other_mat(r):
    with h5py.File(r/'1.mat', 'w') as h: h['x'] = [1]
def lost_field(r):
    with h5py.File(r/'1.mat', 'r+') as h: del h['cjdata/tumorMask']
def other_size(r):
    with h5py.File(r/'1.mat', 'r+') as h: del h['cjdata/tumorMask']; h['cjdata/tumorMask'] = np.ones((9,9), np.uint8)
def relabel(r):
    with h5py.File(r/'1.mat', 'r+') as h: h['cjdata/label'][...] = 7
def twice(r): p = MatSlice(r/'18.mat'); write_mat(r/'1.mat', p.values(), p.values(mask=True), '100000', 1)
def nan(v, x=np.nan): v = v.astype(np.float32); v[3,3,3] = x; return v
def relabelled(v): v[10,10,10] = 3; return v
def tif(r, a): Image.fromarray(a).save(r/g(0,1))
def small_mask(r): Image.fromarray(np.zeros((32,32), np.uint8)).save(r/g(0,'1_mask'))
def drop_masks(r): [(r/g(0, f'{k}_mask')).unlink() for k in range(1,7)]
def soft(r): Image.open(r/g(1,'3_mask')).rotate(9, Image.Resampling.BILINEAR).save(r/g(1,'3_mask'))
def same(r): shutil.copy(r/b(1,'t1'), r/b(2,'t1'))
def keep_two(r): [shutil.rmtree(r/Path(b(s,'t1')).parent) for s in (3,4,5,6)]
def second(r): shutil.copytree((r/b(1,'t1')).parent, r/'again/BraTS20_Training_001')
first = Path(b(1,'t2')).parent.as_posix()
moved = np.diag([-1.,-1,1,1]); moved[:3,3] = 5,47,0

bad = {
    'older mat':        ('figshare', old_mat, 'error', '1.mat', 'cannot be read'),
    'no cjdata':        ('figshare', other_mat, 'error', '1.mat', 'cjdata'),
    'lost field':       ('figshare', lost_field, 'error', '1.mat', 'tumorMask'),
    'other mask size':  ('figshare', other_size, 'error', '1.mat', '128×128 with a mask of 9×9'),
    'not a mat':        ('figshare', lambda r: (r/'1.mat').write_bytes(b'hello'*99), 'error', '1.mat', 'cannot be read'),
    'truncated mat':    ('figshare', lambda r: cut(r/'1.mat', 30000), 'error', '1.mat', 'cannot be read'),
    'unknown type':     ('figshare', relabel, 'error', '1.mat', 'the label 7'),
    'two patients':     ('figshare', twice, 'error', '18.mat', 'the same pixels as 1.mat'),
    'truncated gz':     ('brats', lambda r: cut(r/b(1,'t1')), 'error', b(1,'t1'), 'cannot be read to its end'),
    'cut in the CRC':   ('brats', lambda r: cut(r/b(1,'t1'), 4), 'error', b(1,'t1'), 'cannot be read to its end'),
    'truncated nii':    ('brats', lambda r: cut(unzip(r/b(1,'t1'))), 'error', b(1,'t1')[:-3], 'cannot be read to its end'),
    'not NIfTI':        ('brats', lambda r: (r/b(1,'t1')).write_bytes(b'x'*999), 'error', b(1,'t1'), 'cannot be read'),
    'truncated seg':    ('brats', lambda r: cut(r/b(1,'seg')), 'error', b(1,'seg'), 'cannot be read to its end'),
    'NaN':              ('brats', lambda r: change(r/b(1,'t1'), nan), 'error', b(1,'t1'), '1 voxels that are NaN or infinite'),
    'infinite':         ('ibsr', lambda r: change(r/i(1), lambda v: nan(v, np.inf)), 'error', i(1), 'NaN or infinite'),
    'four dimensions':  ('ibsr', lambda r: change(r/i(1), lambda v: np.stack([v,v], -1)), 'error', i(1), '48×32×48×2'),
    'seg shape':        ('brats', lambda r: change(r/b(1,'seg'), lambda v: v[2:]), 'error', b(1,'seg'), '46×48×32'),
    'seg affine':       ('brats', lambda r: change(r/b(1,'seg'), lambda v: v, moved), 'error', b(1,'seg'), '5.0 mm elsewhere'),
    'sequence affine':  ('brats', lambda r: change(r/b(1,'t2'), lambda v: v, moved), 'error', b(1,'t2'), '5.0 mm elsewhere'),
    'missing sequence': ('brats', lambda r: (r/b(1,'t2')).unlink(), 'error', first, 'no t2'),
    'missing image':    ('ibsr', lambda r: (r/i(1)).unlink(), 'error', 'Training_Set/IBSR_01', 'no t1'),
    'missing seg':      ('brats', lambda r: (r/b(1,'seg')).unlink(), 'error', first, 'no segmentation'),
    'unknown label':    ('brats', lambda r: change(r/b(1,'seg'), relabelled), 'error', b(1,'seg'), 'the label 3'),
    'image as seg':     ('ibsr', lambda r: change(r/i(1,'_seg'), lambda v: v+.5), 'error', i(1,'_seg'), 'no labels'),
    'same volume':      ('brats', same, 'error', b(2,'t1'), 'the same pixels as '+b(1,'t1')),
    'two folders':      ('brats', second, 'error', 'again/BraTS20_Training_001', 'a second folder'),
    'two subjects':     ('brats', keep_two, 'error', 'images', '2 subjects'),
    'empty seg':        ('brats', lambda r: change(r/b(1,'seg'), lambda v: v*0), 'note', b(1,'seg'), '1 of 6 masks empty'),
    'two channels':     ('lgg', lambda r: tif(r, np.full((64,64,2), 9, np.uint8)), 'error', g(0,1), '2 channels'),
    'one channel':      ('lgg', lambda r: tif(r, np.eye(64, dtype=np.uint8)), 'error', g(0,1), '1 channel'),
    'truncated TIFF':   ('lgg', lambda r: cut(r/g(0,1), 6000), 'error', g(0,1), 'cannot be read'),
    'no mask':          ('lgg', lambda r: (r/g(0,'1_mask')).unlink(), 'error', g(0,1), 'no mask'),
    'no masks':         ('lgg', drop_masks, 'error', 'kaggle_3m/TCGA_XX_0000_20000101', 'no mask'),
    'orphan mask':      ('lgg', lambda r: (r/g(0,1)).unlink(), 'warning', g(0,'1_mask'), 'without an image'),
    'smoothed mask':    ('lgg', soft, 'error', g(1,'3_mask'), 'the labels'),
    'size of mask':     ('lgg', small_mask, 'error', g(0,1), '64×64 pixels with a mask of 32×32'),
}

@pytest.mark.parametrize('case', bad)
def test_bad_input(case, tmp_path):
    layout,breaks,level,file,found = bad[case]
    root = tiny(layout, tmp_path/'data'); before = check(root, layout); breaks(root)
    names = sorted(p.relative_to(root) for p in root.rglob('*'))
    for _ in range(2): # what is remembered says the same
        ps = check(root, layout)
        hit = ps[(ps.level==level) & (ps.file==file) & ps.found.str.contains(found, regex=False)]
        assert len(hit)==1, format_problems(ps)
    assert all(len(o)>3 for c in ('found','expected','remedy') for o in ps[c]) and len(before[before.level!='note'])==0
    if level=='error':
        with pytest.raises(DataError, match='brainseg check'): refuse_errors(ps)
    else: refuse_errors(ps)
    assert sorted(p.relative_to(root) for p in root.rglob('*'))==names, 'a check writes nothing'

@pytest.mark.parametrize('case', ['truncated gz','truncated nii','not NIfTI','NaN','infinite','four dimensions'])
def test_reading_refuses_too(case, tmp_path):
    layout,breaks,_,file,found = bad[case]; root = tiny(layout, tmp_path/'data'); breaks(root)
    for f in (open_volume, read_image, lambda p: read_image(Pixels(p, 3)), lambda p: mask_codes([p])):
        with pytest.raises(DataError, match=Path(file).name) as e: f(root/file)
        assert found in str(e.value) and e.value.parts['remedy']
    with pytest.raises(DataError, match=r'32 slices.*slice 40'): read_image(Pixels(made('brats')/b(1,'t1'), 40))

# ---- development data

def test_real_figshare():
    root = dataset('figshare_mat'); t = figshare_cases(root)
    assert (len(t), t.subject.nunique(), set(t.label))==(32, 8, set(TUMOURS.values()))
    assert clean(root, 'figshare')
    for p in t.image: # the border lies on the edge of the mask, and the mask in the head
        with h5py.File(p) as h: x,y = h['cjdata/tumorBorder'][0].reshape(-1,2).T.astype(int)-1
        m = np.pad(read_mask(p, (0,1)), 3); near = np.array([np.ptp(m[b:b+7, a:a+7]) for a,b in zip(x,y)])
        assert near.mean()>.9
    with pytest.raises(DataError, match='no cvind'): figshare_folds(root, t)

def test_real_brats():
    root = dataset('brats2020'); t = brats_cases(root); v = brats_cases(root, unit='volume')
    assert len(v)==4 and mask_codes(v['mask'])==(0,1,2,4) and 4*125<len(t)<4*145
    assert clean(root, 'brats')
    o = t.iloc[60]; a = np.asarray(nib.as_closest_canonical(nib.load(o.image.files[2])).dataobj)[:,:,o.image.index]
    assert np.corrcoef(np.rot90(a).ravel(), read_image(o.image)[...,2].ravel())[0,1]>.99 and image_size(o.image)==(240,240)

def test_real_ibsr():
    root = dataset('ibsr18_like'); t = ibsr_cases(root); assert t.subject.nunique()==4 and t.spacing[0]==(1.5,.9375)
    assert mask_codes(t['mask'])==(0,1,2,3) and clean(root, 'ibsr')

def test_real_lgg():
    root = dataset('lgg'); t = lgg_cases(root)
    assert (len(t), t.subject.nunique())==(66, 3) and mask_codes(t['mask'])==(0,255)
    assert clean(root, 'lgg') and read_image(t.image[0]).shape==(256,256,3)
