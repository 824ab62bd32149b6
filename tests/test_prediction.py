"Predictions on new scans: the geometry there and back, what is refused, what is written"
import gzip, json, sys, tracemalloc
from types import SimpleNamespace

import nibabel as nib, numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image
from scipy import ndimage as ndi
from fastai.data.transforms import IntToFloatTensor

from brainseg_fastai.cases import DataError
from brainseg_fastai.cli import main
from brainseg_fastai.prediction import evans_index, fit_of, network_input, own_pixels, predict, predict_pictures, predict_scan, write_labels
from brainseg_fastai.scans import dark_rim, find_scans_to_predict, otsu, read_scan, scan_names, slab_slices, top_of_brain
from brainseg_fastai.segmentation import ImageZScore, predict_cases, train_run
from helpers import dataset, make_folder

class DarkInside(torch.nn.Module):
    "A rule instead of a network: class 1 where a pixel is dark and everything around it belongs to the head"
    def forward(self, x):
        x = x.mean(1, keepdim=True); head = (x>x.amin((-2,-1), keepdim=True)+.2).float()
        score = torch.minimum(.5-x, 50*(F.avg_pool2d(head, 21, 1, 10)-.97))
        return torch.cat([-score, score], 1)

def stand_in(slab=(10,30), whole=False, spacing=(1.,), size=64, kind='brain', layout='adni', model=None, **more):
    "What `load_bundle` gives, as far as prediction asks for it"
    cfg = dict(settings=dict(mode='slice', size=size, recipe='light', kind=kind), layout=layout, channels=[kind], spacing=list(spacing), whole=whole,
               labels=[dict(code=255, name='ventricles', colour='#e0402a')], slab=slab and dict(below_top_mm=list(slab)), reference=None,
               calibration=None, sha256='x') | more
    dls = SimpleNamespace(valid=SimpleNamespace(after_batch=SimpleNamespace(fs=[IntToFloatTensor(), ImageZScore()])), device=torch.device('cpu'))
    return SimpleNamespace(bundle=cfg, codes=(0,255), steps=None, model=model or DarkInside(), dls=dls)

def draw_volume(shape=(44,52,40), centre=(.1,-.15), dtype=np.int16):
    "A lopsided brain with a dark, lopsided hole in it"
    x,y,z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing='ij')
    r = np.sqrt(x**2+y**2+z**2)
    a = np.select([r<.86, r<.9], [700+150*x+80*y, 40], 0)
    a[((x-centre[0])/.25)**2+((y-centre[1])/.3)**2+((z-.1)/.5)**2<1] = 300
    return a.astype(dtype)

def save(path, a, affine=None, axes=None):
    im = nib.Nifti1Image(a, np.diag([1.,1,1,1]) if affine is None else affine)
    if axes: im = im.as_reoriented(ornt_transform(io_orientation(im.affine), axcodes2ornt(axes)))
    nib.save(im, path)
    return path

AXES = st.permutations([0,1,2]).flatmap(lambda p: st.tuples(*(st.sampled_from([('L','R'),('P','A'),('I','S')][i]) for i in p)))

@settings(max_examples=12, deadline=None)
@given(axes=AXES)
def test_a_reoriented_copy_gets_the_reoriented_mask(tmp_path_factory, axes):
    d = tmp_path_factory.mktemp('o'); a = draw_volume(); aff = np.diag([1.,1.2,1.5,1]); aff[:3,3] = -20,3,7
    p,q = (predict_scan(stand_in(), save(d/f'{n}.nii.gz', a, aff, o)) for n,o in (('a',None),('b',axes)))
    assert p.mask.any() and (p.mask==q.mask).all()
    there = ornt_transform(io_orientation(p.scan.affine), io_orientation(q.scan.affine))
    assert (nib.orientations.apply_orientation(p.native(), there)==q.native()).all()
    assert q.native().shape==nib.load(d/'b.nii.gz').shape and set(np.unique(q.native()))=={0,255}
    assert [r['area_mm2'] for r in p.rows]==[r['area_mm2'] for r in q.rows] and p.quality==q.quality

@settings(max_examples=10, deadline=None)
@given(axes=AXES, shear=st.floats(-.2, .2), angle=st.floats(-.2, .2))
def test_a_tilted_affine_below_the_limit_is_exact(tmp_path_factory, axes, shear, angle):
    d = tmp_path_factory.mktemp('t'); c,s = np.cos(angle), np.sin(angle)
    aff = np.array([[c,-s,0,4],[s,c,0,-9],[0,0,2.,1],[0,0,0,1]])
    p,q = (predict_scan(stand_in(), save(d/f'{n}.nii', draw_volume(), aff, o)) for n,o in (('a',None),('b',axes)))
    assert (p.mask==q.mask).all() and not any('tilted' in o for o in p.notes)
    assert np.allclose(nib.affines.apply_affine(q.scan.affine, np.argwhere(q.native()>0)).mean(0),
                       nib.affines.apply_affine(p.scan.affine, np.argwhere(p.native()>0)).mean(0))

@pytest.mark.parametrize('axes', [None, 'PIL'])
def test_a_strongly_tilted_scan_is_predicted_upright(tmp_path, axes):
    "The volume turned by 30 degrees about two axes gets nearly the mask of the upright one, in its own grid"
    a = draw_volume((60,64,60)); ang = np.radians(30); c,s = np.cos(ang), np.sin(ang)
    turn = np.array([[c,-s,0],[s,c,0],[0,0,1]]) @ np.array([[1,0,0],[0,c,-s],[0,s,c]])
    mid = (np.array(a.shape)-1)/2; turned = ndi.affine_transform(a.astype(float), turn, mid-turn@mid, order=1).astype(np.int16)
    aff = np.eye(4); aff[:3,:3] = turn; aff[:3,3] = mid-turn@mid # places every voxel of `turned` where it was taken from
    p = predict_scan(stand_in(), save(tmp_path/'up.nii.gz', a)); q = predict_scan(stand_in(), save(tmp_path/'tilt.nii.gz', turned, aff, axes))
    assert any('tilted' in o for o in q.notes) and q.native().shape==nib.load(tmp_path/'tilt.nii.gz').shape
    want = ndi.affine_transform(p.native().astype(float), turn, mid-turn@mid, order=1)>127
    if axes: want = nib.orientations.apply_orientation(want, ornt_transform(io_orientation(aff), io_orientation(q.scan.affine)))
    got = q.native()>0
    assert 2*(got&want).sum()/(got.sum()+want.sum())>.9

def test_pixels_of_other_sizes(tmp_path):
    "A scan with pixels of another size is brought to the size of the training and back; the area stays"
    a = draw_volume((48,56,40)); p = predict_scan(stand_in(size=96), save(tmp_path/'a.nii', a))
    big = np.repeat(np.repeat(a, 2, 0), 2, 1); q = predict_scan(stand_in(size=96), save(tmp_path/'b.nii', big, np.diag([.5,.5,1,1])))
    assert q.mask.shape==big.shape and q.rows[0]['area_mm2']==pytest.approx(p.rows[0]['area_mm2'], rel=.04)
    r = predict_scan(stand_in(size=96), save(tmp_path/'c.nii', np.repeat(a, 2, 1), np.diag([1,.5,1,1])))
    assert r.rows[0]['area_mm2']==pytest.approx(p.rows[0]['area_mm2'], rel=.04)

def test_a_field_is_cut_to_but_never_into_the_head():
    pics = np.zeros((2,100,100), np.uint8); pics[:,30:70,30:70] = 200
    assert fit_of(pics, (1,1), stand_in(field=64).bundle, True).side==64
    pics[:,5:95,30:70] = 200
    assert fit_of(pics, (1,1), stand_in(field=64).bundle, True).side==90
    f = fit_of(pics, (1,1), stand_in(field=[40,64]).bundle, True); scores = torch.rand(2, 3, 64, 64); scores[:,0] -= 5
    res = own_pixels(scores, f)
    assert res.shape==(2,3,100,100) and (res.argmax(1)[:,:,:4]==0).all() and (res.argmax(1)[:,40:60,40:60]>0).all()

def test_the_slab_and_what_is_said_of_it(tmp_path):
    f = save(tmp_path/'a.nii.gz', draw_volume())
    p = predict_scan(stand_in((10,20)), f); top,skull = top_of_brain(p.scan.image, p.scan.spacing)
    assert not skull and list(p.slices)==[k for k in range(40) if 10<=top-k<=20] and 'were left empty' in ' '.join(p.notes)
    outside = [k for k in range(40) if k not in p.slices]
    assert not p.mask[:,:,outside].any() and p.mask[:,:,list(p.slices)].any(axis=(0,1)).all()
    assert predict_scan(stand_in((10,20)), f, slab=(15,15)).slices==(top-15,)
    with pytest.raises(DataError, match='--slab LO,HI'): predict_scan(stand_in(None), f)
    with pytest.raises(DataError, match='no slice 90 to 99 mm below'): predict_scan(stand_in((90,99)), f)
    with pytest.raises(DataError, match='smaller number first'): predict_scan(stand_in(), f, slab=(9,3))
    assert np.isnan(p.rows[0]['volume_ml']) and 'no volume in mL' in ' '.join(p.notes)

def test_millilitres_need_the_whole_extent(tmp_path):
    a = draw_volume(); f = save(tmp_path/'a.nii.gz', a, np.diag([1,1,2,1.]))
    p = predict_scan(stand_in(None, whole=True), f)
    assert p.rows[0]['volume_ml']==pytest.approx((p.mask>0).sum()*2/1000) and p.rows[0]['slices']==40
    assert predict_scan(stand_in((0,60), whole=True), f).rows[0]['volume_ml']>0
    assert np.isnan(predict_scan(stand_in((0,90), whole=True), f).rows[0]['volume_ml']) # the scan ends above

@given(st.floats(20, 60), st.integers(1, 80), st.floats(.4, 6), st.floats(0, 60), st.floats(0, 20))
def test_slab_slices_are_those_within_half_a_slice(top, n, mm, lo, width):
    ks,inside = slab_slices(top, n, mm, (lo, lo+width)); below = (top-np.arange(n))*mm
    assert all((lo-mm/2-1e-9<=below[k]<=lo+width+mm/2+1e-9)==(k in ks) for k in range(n)) or len(ks)==0
    if inside: assert len(ks)*mm>=width-1e-6

def test_otsu_as_scikit_image_has_it():
    filters = pytest.importorskip('skimage.filters'); rng = np.random.default_rng(0)
    for _ in range(20):
        a = np.concatenate([rng.normal(rng.uniform(20,90), 12, 500), rng.normal(rng.uniform(120,220), 15, rng.integers(100,900))]).clip(0,255).astype(np.uint8)
        t = filters.threshold_otsu(a)
        assert ((a>otsu(a))==(a>t)).mean()>.995

def test_skull_is_seen_in_real_slices():
    root = dataset('adni_like')
    for kind in ('brain','orig'):
        rims = [dark_rim(np.array(Image.open(p))) for p in sorted((root/kind).glob('*.png'))[::9]]
        assert all((r>.23)==(kind=='orig') for r in rims), (kind, rims)

def head_volume(n=170):
    "Scalp, bone, fluid and brain as shells, from below the top of the volume"
    z = np.mgrid[:n,:n,:n]; r = np.sqrt(((z[0]-n/2)/(n*.42))**2+((z[1]-n/2)/(n*.46))**2+((z[2]-n/2)/(n*.46))**2)
    return np.select([r<.8, r<.9, r<1], [150, 15, 220], 0).astype(np.uint8), r<.8

def test_the_top_of_the_brain_below_the_top_of_the_head():
    a,brain = head_volume(); top,skull = top_of_brain(a, (1,1,1))
    true = np.flatnonzero(brain.sum((0,1))>=100)[-1]
    assert skull and abs(top-true)<=4 # these shells are 16 mm thick
    assert top_of_brain(a*brain, (1,1,1))==(true, False)

def test_evans_index_of_a_drawn_head():
    a,brain = head_volume(); x,y,z = np.mgrid[:170,:170,:170]; m = (abs(x-85)<22)&(abs(y-95)<25)&(abs(z-85)<10)
    a[m] = 15; inner = max(np.ptp(np.flatnonzero(c))+1 for c in brain[:,:,85].T if c.any())
    e = evans_index(a, m, (1,1,1), range(80,90))
    assert e['horns_mm']==43 and e['index']==pytest.approx(43/inner, rel=.05)
    assert evans_index(a*brain, m, (1,1,1), range(80,90))=={} # no skull in view
    assert evans_index(a, m & False, (1,1,1), range(80,90))=={}

def test_pictures_as_the_training_sees_them(bundle):
    "The same masks as `predict_cases`; with the mirror image, symmetry"
    learn,cases,_ = bundle; paths = [str(o) for o in cases['image']]
    want = predict_cases(learn, cases, flips=False); got = predict_pictures(learn, [read_scan(p) for p in paths], flips=False)
    assert any(w.any() for w in want) # fastai's augmentations pass the image through an identity, which costs the last bits
    assert all((p.mask==w).mean()>.995 for p,w in zip(got, want))
    xb, = learn.dls.test_dl(cases, bs=8, num_workers=0).one_batch(); pics = np.stack([read_scan(p).image for p in paths])
    assert torch.allclose(network_input(learn, pics, fit_of(pics, None, learn.bundle)), xb.as_subclass(torch.Tensor), atol=1e-3)
    ps = predict_pictures(learn, [read_scan(p) for p in paths])
    assert all((p.mask==w).mean()>.995 for p,w in zip(ps, predict_cases(learn, cases))) # what was scored is what one gets
    assert all(0<=p.quality<=1 for p in ps) and np.isnan(got[0].quality)
    a = np.array(Image.open(paths[0])); a = np.concatenate([a[:,:32], a[:,:32][:,::-1]], 1)
    im = read_scan(paths[0]); im.image = a
    p,plain = predict_scan(learn, im), predict_scan(learn, im, flips=False)
    assert (p.mask==p.mask[:,::-1]).mean()>.995 # a symmetrical picture gets a symmetrical mask, whatever the network
    both,n = ((plain.mask>0)&(plain.mask[:,::-1]>0)).sum(), (plain.mask>0).sum()
    assert p.quality==pytest.approx(both/n, abs=.02) and both<n

@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    "A small network, trained for two epochs, as its bundle gives it back"
    from brainseg_fastai.bundles import load_bundle
    from brainseg_fastai.cases import adni_cases
    d = tmp_path_factory.mktemp('bundle'); cases = adni_cases(make_folder(d/'data', 4, 2), 'brain')
    table = cases.assign(split=np.repeat(['train','train','valid','test'], 2))
    train_run(table, d/'run', arch='unet', size=64, width=4, depth=3, epochs=2, pretrained=False)
    return load_bundle(d/'run'), cases, d

def test_the_command_from_a_folder_to_a_table(bundle, tmp_path, capsys):
    _,cases,d = bundle; out = tmp_path/'out'; (tmp_path/'bad.png').write_text('no picture', encoding='utf-8')
    args = ['predict', str(d/'run'), str(d/'data'), str(tmp_path/'bad.png'), '--out', str(out), '--spacing', '0.5']
    assert main(args)==1
    said = capsys.readouterr(); t = pd.read_csv(out/'volumes.csv')
    assert '8 scans' in said.out and 'bad.png' in said.err and '1 of 9' in said.err
    assert len(t)==8 and np.allclose(t.area_mm2, t.area_px/4) and t.volume_ml.isna().all() and t.quality.between(0, 1).all()
    assert {o.name for o in out.iterdir()} >= {'dseg.tsv','labels.txt','labels.ctbl','volumes.csv'} and not list(out.glob('.*'))
    m = np.array(Image.open(out/t['mask'][0])); assert m.shape==(64,64) and set(np.unique(m))<={0,255} and (m>0).sum()==t.area_px[0]
    before = {o: o.stat().st_mtime_ns for o in out.glob('*_dseg.*')}
    assert main(args[:3]+args[4:])==0 and before=={o: o.stat().st_mtime_ns for o in out.glob('*_dseg.*')}
    assert main([*args[:3], *args[4:-1], '0.25'])==0 # another spacing is another prediction
    assert np.allclose(pd.read_csv(out/'volumes.csv').area_mm2, t.area_px/16)
    assert main(['predict', str(d/'run'), str(tmp_path/'nowhere.png'), '--out', str(out)])==2
    for bad in (['--slab', '9,3'], ['--slab', '5'], ['--spacing', '0'], ['--spacing', 'x']):
        with pytest.raises(SystemExit): main([*args, *bad])

def test_bids_in_bids_out(tmp_path):
    root = tmp_path/'ds'; d = root/'sub-01'/'ses-1'/'anat'; d.mkdir(parents=True); (root/'sub-01'/'ses-1'/'func').mkdir()
    save(d/'sub-01_ses-1_T1w.nii.gz', draw_volume(), axes='LPI'); save(root/'sub-01'/'ses-1'/'func'/'sub-01_ses-1_bold.nii.gz', draw_volume())
    out = tmp_path/'out'; t = predict(stand_in(), root, out, progress=False)
    m = out/'sub-01'/'ses-1'/'anat'/'sub-01_ses-1_desc-T1w_dseg.nii.gz'
    assert not t.attrs['failed'] and m.is_file() and len(t)==1
    assert nib.load(m).shape==nib.load(d/'sub-01_ses-1_T1w.nii.gz').shape and np.allclose(nib.load(m).affine, nib.load(d/'sub-01_ses-1_T1w.nii.gz').affine)
    side = json.loads(m.with_name(m.name.replace('.nii.gz', '.json')).read_text(encoding='utf-8'))
    desc = json.loads((out/'dataset_description.json').read_text(encoding='utf-8'))
    assert desc['DatasetType']=='derivative' and desc['GeneratedBy'][0]['Name']=='brainseg_fastai' and desc['BIDSVersion']
    assert side['Sources']==['sub-01_ses-1_T1w.nii.gz'] and pd.read_csv(out/'dseg.tsv', sep='\t')['index'].tolist()==[0,255]

def test_label_files(tmp_path):
    write_labels([dict(code=1, name='necrotic core', colour='#ff8000'), dict(code=4, name='enhancing', colour='#0000ff')], tmp_path)
    assert '    1  255  128    0        1  1  1    "necrotic core"' in (tmp_path/'labels.txt').read_text()
    assert '4 enhancing 0 0 255 255' in (tmp_path/'labels.ctbl').read_text().splitlines()
    assert pd.read_csv(tmp_path/'dseg.tsv', sep='\t').color.tolist()==['#000000','#ff8000','#0000ff']

def header(path, shape, dtype=np.int16):
    h = nib.Nifti2Header(); h.set_data_shape(shape); h.set_data_dtype(dtype); h['vox_offset'] = 544
    path.write_bytes(h.binaryblock+bytes(600)); return path

@pytest.mark.parametrize('name,make,says', [
    ('text.nii.gz', lambda p: p.write_text('hello', encoding='utf-8'), 'cannot be read'),
    ('huge.nii', lambda p: header(p, (100_000,)*3), 'claims 100000×100000×100000'),
    ('large.nii', lambda p: header(p, (900,900,900)), 'claims 900×900×900'),
    ('fmri.nii.gz', lambda p: save(p, np.zeros((9,9,9,3), np.int16)), '9×9×9×3'),
    ('nan.nii.gz', lambda p: save(p, np.full((9,9,9), np.nan, np.float32)), 'NaN'),
    ('flat.nii.gz', lambda p: save(p, np.zeros((30,30,30), np.int16)), 'without contrast'),
    ('photo.png', lambda p: Image.fromarray(np.random.default_rng(0).integers(0, 255, (64,64,3), dtype=np.uint8)).save(p), 'colour picture'),
    ('text.png', lambda p: p.write_text('hello', encoding='utf-8'), 'cannot be read'),
    ('note.txt', lambda p: p.write_text('hello', encoding='utf-8'), 'the ending .txt')])
def test_bad_input_is_told_and_leaves_nothing(tmp_path, name, make, says):
    f = tmp_path/name; make(f); out = tmp_path/'out'
    t = predict(stand_in(), f, out, progress=False)
    assert says in t.attrs['failed'][0][1] and name in t.attrs['failed'][0][1] and len(t)==0 and not list(out.rglob('*'))

def test_truncated_and_swollen_files(tmp_path):
    f = save(tmp_path/'a.nii.gz', np.random.default_rng(0).integers(0, 900, (30,30,30)).astype(np.int16)); b = f.read_bytes()
    for n in (len(b)-9, len(b)//2, 100):
        f.write_bytes(b[:n])
        with pytest.raises(DataError, match='cannot be read|claims'): read_scan(f)
    plain = save(tmp_path/'a.nii', draw_volume()); plain.write_bytes(plain.read_bytes()[:-50])
    with pytest.raises(DataError, match='claims|cannot be read'): read_scan(plain)
    f.write_bytes(gzip.compress(gzip.decompress(b)+bytes(2**25)))
    with pytest.raises(DataError, match='more data than the header says'): read_scan(f)

def test_empty_folder_and_a_claim_costs_no_memory(tmp_path):
    (tmp_path/'e').mkdir()
    with pytest.raises(DataError, match='an empty folder'): predict(stand_in(), tmp_path/'e', tmp_path/'out')
    f = header(tmp_path/'huge.nii', (100_000,)*3); tracemalloc.start()
    with pytest.raises(DataError): read_scan(f)
    assert tracemalloc.get_traced_memory()[1]<2**24; tracemalloc.stop()

def write_dicom(folder, a, spacing=(1.,1.,1.), origin=(0.,0.,0.), skip=(), uid='1.2.3', names='IM{:04d}'):
    "Axial DICOM slices of a volume in LPS order of axes, in files whose names say nothing of their place"
    pydicom = pytest.importorskip('pydicom'); from pydicom.uid import ExplicitVRLittleEndian
    folder.mkdir(parents=True, exist_ok=True); order = np.random.default_rng(0).permutation(a.shape[2])
    for k in range(a.shape[2]):
        if k in skip: continue
        m = pydicom.dataset.FileMetaDataset(); m.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.4'; m.TransferSyntaxUID = ExplicitVRLittleEndian
        m.MediaStorageSOPInstanceUID = f'{uid}.{k+1}'
        ds = pydicom.dataset.FileDataset('', {}, file_meta=m, preamble=bytes(128)); ds.SOPClassUID,ds.SOPInstanceUID = m.MediaStorageSOPClassUID,f'{uid}.{k+1}'
        ds.SeriesInstanceUID = uid; ds.Rows,ds.Columns = a.shape[1],a.shape[0]; ds.PixelSpacing = [spacing[1],spacing[0]]
        ds.ImageOrientationPatient = [1,0,0,0,1,0]; ds.ImagePositionPatient = [origin[0],origin[1],origin[2]+spacing[2]*k]
        ds.SamplesPerPixel,ds.PhotometricInterpretation,ds.BitsAllocated,ds.BitsStored,ds.HighBit,ds.PixelRepresentation = 1,'MONOCHROME2',16,16,15,0
        ds.RescaleSlope,ds.RescaleIntercept = 2,-10; ds.PixelData = np.ascontiguousarray(a[:,:,k].T, '<u2').tobytes()
        ds.save_as(folder/names.format(int(order[k])), enforce_file_format=True)
    return folder

def test_a_dicom_series_is_the_volume_that_it_was(tmp_path):
    a = draw_volume(dtype=np.uint16)+5; d = write_dicom(tmp_path/'series', a, (1.,1.2,1.5), (-20.,10.,5.))
    aff = np.diag([-1.,-1.2,1.5,1]); aff[:3,3] = 20,-10,5
    f = save(tmp_path/'same.nii.gz', (2*a.astype(np.int16)-10), aff)
    p,q = predict_scan(stand_in(), d), predict_scan(stand_in(), f)
    assert np.allclose(p.scan.affine, aff) and (p.native()==q.native()).all() and p.mask.any()
    assert find_scans_to_predict(tmp_path)==[tmp_path/'same.nii.gz', d] and scan_names([d])==['series']
    out = tmp_path/'out'; predict(stand_in(), d, out, progress=False)
    assert np.allclose(nib.load(out/'series_dseg.nii.gz').affine, aff) and (np.asarray(nib.load(out/'series_dseg.nii.gz').dataobj)==q.native()).all()

def test_a_dicom_series_with_a_gap_or_a_stranger(tmp_path):
    a = draw_volume((20,22,12), dtype=np.uint16)
    with pytest.raises(DataError, match='mm apart'): read_scan(write_dicom(tmp_path/'gap', a, skip=(5,)))
    write_dicom(tmp_path/'two', a); write_dicom(tmp_path/'two', a, uid='1.2.9', names='B{:04d}')
    with pytest.raises(DataError, match='2 DICOM series'): read_scan(tmp_path/'two')
    write_dicom(tmp_path/'twice', a); write_dicom(tmp_path/'twice', a, names='B{:04d}')
    with pytest.raises(DataError, match='two images at one place'): read_scan(tmp_path/'twice')
    with pytest.raises(DataError, match='the folder of its series'): read_scan(next((tmp_path/'gap').iterdir()))
    f = write_dicom(tmp_path/'cut', a)/'IM0003'; f.write_bytes(f.read_bytes()[:-300])
    with pytest.raises(DataError, match='IM0003.*cannot be read'): read_scan(tmp_path/'cut')

def test_dicom_without_pydicom_names_the_extra(tmp_path, monkeypatch):
    d = write_dicom(tmp_path/'s', draw_volume((20,22,12), dtype=np.uint16))
    monkeypatch.setitem(sys.modules, 'pydicom', None)
    with pytest.raises(DataError, match=r'brainseg_fastai\[dicom\]'): read_scan(d)

def test_sequences_of_a_case_become_channels(tmp_path):
    d = tmp_path/'BraTS20_007'; d.mkdir(); a = draw_volume()
    for s,f in (('flair',1),('t1',2),('t1ce',3),('t2',4),('seg',0)): save(d/f'BraTS20_007_{s}.nii.gz', (a*f).clip(0, 3000).astype(np.int16))
    learn = stand_in(None, True, channels=['flair','t1ce'], layout='brats')
    assert find_scans_to_predict(tmp_path, ['flair','t1ce'])==[d] and find_scans_to_predict(tmp_path, ['t2'])==[d/'BraTS20_007_t2.nii.gz']
    p = predict_scan(learn, d)
    assert p.scan.image.shape==(*a.shape, 2) and p.mask.shape==a.shape and [o.name for o in p.scan.files]==['BraTS20_007_flair.nii.gz','BraTS20_007_t1ce.nii.gz']
    out = tmp_path/'out'; predict(learn, tmp_path, out, progress=False); assert (out/'BraTS20_007_dseg.nii.gz').is_file()
    with pytest.raises(DataError, match='a folder with one for each of flair, t1ce'): predict_scan(learn, d/'BraTS20_007_flair.nii.gz')
    (d/'BraTS20_007_t1ce.nii.gz').unlink()
    with pytest.raises(DataError, match='no volume that ends in _t1ce'): predict_scan(learn, d)
    save(d/'BraTS20_007_t1ce.nii.gz', a[:-1])
    with pytest.raises(DataError, match='another grid'): predict_scan(learn, d)

class Bright(torch.nn.Module):
    "Class 1 of a volume where it is bright"
    def forward(self, x): s = x.mean(1, keepdim=True)-.2; return torch.cat([-s, s], 1)

@pytest.mark.parametrize('mode', ['patch','volume'])
def test_volume_models_keep_the_geometry(tmp_path, mode):
    pytest.importorskip('torchio'); a = draw_volume((40,36,32)); s = dict(mode=mode, patch=[16,16,16], size=64, recipe='light', kind='t1')
    learn = stand_in(None, True, (1.,1.,1.), model=Bright(), settings=s, layout='ibsr')
    p,q = (predict_scan(learn, save(tmp_path/f'{n}.nii.gz', a, axes=o)) for n,o in (('a',None),('b','SLP')))
    assert (p.mask==q.mask).all() and p.mask.any() and p.quality>.99 and p.rows[0]['volume_ml']==pytest.approx((p.mask>0).sum()/1000)
    r = predict_scan(learn, save(tmp_path/'c.nii.gz', np.repeat(a, 2, 2), np.diag([1,1,.5,1])))
    twice = np.repeat(p.mask, 2, 2)>0; assert r.mask.shape==(40,36,64) and 2*((r.mask>0)&twice).sum()/((r.mask>0).sum()+twice.sum())>.95
    with pytest.raises(DataError, match='a single slice'):
        Image.fromarray(np.zeros((30,30), np.uint8)).save(tmp_path/'s.png'); predict_scan(learn, tmp_path/'s.png')

def test_mgz_and_a_trailing_axis(tmp_path):
    a = draw_volume(dtype=np.float32); nib.save(nib.MGHImage(a, np.eye(4)), tmp_path/'a.mgz'); save(tmp_path/'b.nii.gz', a[...,None])
    out = tmp_path/'out'; t = predict(stand_in(), [tmp_path/'a.mgz', tmp_path/'b.nii.gz'], out, progress=False)
    assert t.attrs['failed']==[] and t.area_mm2.nunique()==1 and nib.load(out/'b_dseg.nii.gz').shape==(*a.shape, 1)
    assert np.allclose(nib.load(out/'a_dseg.nii.gz').affine, nib.load(tmp_path/'a.mgz').affine)

def test_names_that_clash(tmp_path):
    for s in ('s1','s2'): (tmp_path/s).mkdir(); save(tmp_path/s/'t1.nii.gz', draw_volume())
    t = predict(stand_in(), tmp_path, tmp_path/'out', progress=False)
    assert sorted(t['name'])==['s1_t1','s2_t1'] and (tmp_path/'out'/'s2_t1_dseg.nii.gz').is_file()
    assert len(set(scan_names(['a/x.png','b/a/x.png','c/a/x.png','a/x.nii'])))==4

def test_masks_and_earlier_outputs_are_no_scans(tmp_path):
    for n in ('a','a_seg','b_dseg','c_mask'): save(tmp_path/f'{n}.nii.gz', draw_volume((8,8,8)))
    assert [p.name for p in find_scans_to_predict(tmp_path)]==['a.nii.gz']

def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    import brainseg_fastai.prediction as m
    f = save(tmp_path/'a.nii.gz', draw_volume()); out = tmp_path/'out'
    def fail(im, path): path.write_bytes(b'half'); raise OSError('disk full')
    monkeypatch.setattr(m.nib, 'save', fail)
    t = predict(stand_in(), f, out, progress=False)
    assert 'disk full' in t.attrs['failed'][0][1] and not [o for o in out.rglob('*') if o.is_file()]

def test_colin27_however_it_is_stored(tmp_path):
    "One real head as it is, in LPI and with sagittal slices: the same measure, the same mask, and the whole of the slab"
    f = dataset('colin27')/'colin27_T1w_brain.nii.gz'; im = nib.load(f); ps = []
    learn = stand_in((55,70), size=256)
    for name,o in (('RAS',None),('LPI','LPI'),('sagittal','ASR')):
        g = tmp_path/f'{name}.nii'; save(g, np.asarray(im.dataobj), im.affine, o); ps.append(predict_scan(learn, g))
    first = ps[0].rows[0]
    assert first['area_mm2']>300 and .01<first['ventricle_brain_ratio']<.3
    for p in ps:
        assert p.rows[0]['area_mm2']==pytest.approx(first['area_mm2'], rel=.005) and (p.mask==ps[0].mask).all()
        assert p.native().shape==nib.load(p.path).shape

def test_a_head_for_a_model_of_brains_is_flagged():
    from brainseg_fastai.trust import fit_reference, scan_features
    pics = [np.array(Image.open(p)) for p in sorted((dataset('adni_like')/'brain').glob('*.png'))]
    learn = stand_in((60,66), size=256, reference=fit_reference([scan_features(a, 1.) for a in pics]))
    p = predict_scan(learn, dataset('colin27')/'colin27_T1w_head.nii.gz')
    assert any('skull' in o for o in p.flags), p.flags

def test_colin27_with_its_skull():
    "The top of the brain, found through the skull, is near that of the stripped brain; so is the inner width of the skull"
    from brainseg_fastai.prediction import _inner_width
    d = dataset('colin27'); head,brain = (read_scan(d/f'colin27_T1w_{o}.nii.gz') for o in ('head','brain'))
    (top,skull),(true,none) = top_of_brain(head.image, head.spacing), top_of_brain(brain.image, brain.spacing)
    assert skull and not none and abs(top-true)<=3
    for k in (75, 85, 95):
        cols = [np.ptp(np.flatnonzero(c))+1 for c in (brain.image[:,:,k]>0).T if c.any()]
        hole = np.zeros(head.extent[:2], bool); hole[85:95,100:120] = True
        assert _inner_width(head.image[:,:,k], hole, (1,1))==pytest.approx(max(cols), rel=.04)
