"What do these pixels mean? How a file stores its values is not what they say"
import nibabel as nib, numpy as np, pytest
from PIL import Image

from brainseg_fastai.adni import adni_cases, check_cases
from brainseg_fastai.checks import mask_codes
from brainseg_fastai.core import DataError
from brainseg_fastai.images import load_volume, raw_mask, read_image, read_mask, volume_facts, write_mask
from brainseg_fastai.prediction import predict_scan, predict_scans
from brainseg_fastai.scans import read_scan
from helpers import make_folder
from scan_files import draw_volume, save, write_dicom
from test_prediction import rule

MASK = np.zeros((32,40), np.uint8); MASK[8:20,10:30] = 255

# ---------------------------------------------------------------- pictures

@pytest.mark.parametrize('order', [(0,255), (255,0), (255,0,7)])
def test_greys_of_a_palette_count(tmp_path, order):
    "White may be at index 0, and entries that nothing uses may be there"
    im = Image.fromarray(np.array([order.index(v) for v in MASK.ravel()], np.uint8).reshape(MASK.shape), 'P')
    im.putpalette(np.repeat(order, 3).tolist())
    im.save(tmp_path/'m.png')
    assert (raw_mask(tmp_path/'m.png')==MASK).all()

def test_a_quantised_mask_is_the_mask(tmp_path):
    Image.fromarray(MASK).quantize(2).save(tmp_path/'m.png')
    assert (raw_mask(tmp_path/'m.png')==MASK).all()

@pytest.mark.parametrize('palette', [[0,0,0, 200,30,30, 30,200,30], [0,0,0]*3])
def test_indices_count_where_colours_only_show_classes(tmp_path, palette):
    a = (MASK>0).astype(np.uint8); a[:4] = 2
    im = Image.fromarray(a, 'P'); im.putpalette(palette); im.save(tmp_path/'m.png')
    assert (raw_mask(tmp_path/'m.png')==a).all()

def test_a_folder_of_palette_masks_is_trained_on_as_it_looks(tmp_path):
    root = make_folder(tmp_path/'d', 3, 1)
    want = {p.name: np.array(Image.open(p)) for p in (root/'mask').iterdir()}
    for p in (root/'mask').iterdir(): Image.open(p).quantize(2).save(p)
    assert not (check_cases(root).level=='error').any()
    for o in adni_cases(root, 'brain').itertuples(): assert (read_mask(o.mask, (0,255))==(want[o.mask.name]>0)).all()

@pytest.mark.parametrize('bits', [8,16])
def test_white_at_zero_in_tiff(tmp_path, bits):
    import struct
    a = (np.arange(48).reshape(6,8)*5).astype(f'<u{bits//8}')
    stored = (2**bits-1-a).astype(a.dtype).tobytes()
    tags = [(256,3,8),(257,3,6),(258,3,bits),(259,3,1),(262,3,0),(273,4,8),(277,3,1),(278,3,6),(279,4,len(stored))]
    ifd = struct.pack('<H', len(tags)) + b''.join(struct.pack('<HHII', t, k, 1, v) for t,k,v in tags) + bytes(4)
    (tmp_path/'a.tif').write_bytes(struct.pack('<2sHI', b'II', 42, 8+len(stored))+stored+ifd)
    assert (read_image(tmp_path/'a.tif')==a).all()

@pytest.mark.parametrize('dtype', [np.uint16, np.int32, np.float32])
def test_pictures_of_the_same_numbers_are_the_same(tmp_path, dtype):
    a = np.random.default_rng(0).integers(3, 180, (20,24)).astype(np.uint8)
    Image.fromarray(a).save(tmp_path/'a.tif'); Image.fromarray(a.astype(dtype)).save(tmp_path/'b.tif')
    assert (read_image(tmp_path/'b.tif')==a).all()==(read_image(tmp_path/'a.tif')==a).all()

# ---------------------------------------------------------------- volumes

def bytes_volume(): return (draw_volume()/4).round().astype(np.uint8)

@pytest.mark.parametrize('dtype', [np.int16, np.uint16, np.float32, np.float64])
def test_the_same_numbers_in_another_type_get_the_same_mask(tmp_path, dtype):
    a = bytes_volume()
    one,two = (predict_scan(rule(), save(tmp_path/f'{n}.nii.gz', a.astype(t))) for n,t in (('a',np.uint8), ('b',dtype)))
    assert one.mask.any() and (one.mask==two.mask).all() and one.rows==[two.rows[0] | dict(name='a')]

def with_slope(path, a, slope):
    "Labels as other tools save them: integers and a slope that does not hit whole numbers exactly"
    h = nib.Nifti1Header()
    h.set_data_dtype(np.int16); h.set_data_shape(a.shape); h.set_slope_inter(slope, 0); h['vox_offset'] = 352; h['magic'] = b'n+1'
    h.set_sform(np.eye(4), 1)
    path.write_bytes(h.binaryblock+bytes(4)+np.round(a/slope).astype('<i2').tobytes('F'))
    return path

def test_labels_saved_through_floats_are_labels(tmp_path):
    a = np.zeros((12,12,6)); a[3:8,3:8] = 1; a[5:7,5:7,2:4] = 2
    p = with_slope(tmp_path/'m.nii', a, 2/32767*1.0000153)
    assert abs(np.asarray(nib.load(p).dataobj)-a).max()>0
    assert mask_codes([p])==(0,1,2) and (read_mask(p, (0,1,2))==a).all()
    q = save(tmp_path/'f.nii', (a*(1+1.53e-5)).astype(np.float32))
    assert mask_codes([q])==(0,1,2) and (read_mask(q, (0,1,2))==a).all()

def test_smoothed_labels_are_none(tmp_path):
    a = np.zeros((12,12,6), np.float32); a[3:8,3:8] = 1; a[3,3:8] = .5
    with pytest.raises(DataError, match='values that are no labels'): mask_codes([save(tmp_path/'m.nii', a)])

def header_of(path, unit=None, affine=np.diag([-1.,1,1.2,1])):
    im = nib.Nifti1Image(draw_volume(), affine)
    if affine is None: im.header.set_zooms((1,1,1.2))
    if unit: im.header.set_xyzt_units(unit)
    nib.save(im, path)
    return path

@pytest.mark.parametrize('unit,mm', [('meter',1e-3), ('micron',1e3)])
def test_spacing_is_in_mm_whatever_the_unit_of_the_header(tmp_path, unit, mm):
    scale = np.diag([mm,mm,mm,1])
    a = header_of(tmp_path/'a.nii.gz'); b = header_of(tmp_path/'b.nii.gz', unit, affine=scale@np.diag([-1.,1,1.2,1]))
    assert volume_facts(b)['spacing']==volume_facts(a)['spacing']==[1,1,1.2]
    p,q = (predict_scan(rule(), o) for o in (a,b))
    assert p.rows[0]['area_mm2']==q.rows[0]['area_mm2'] and (p.native()==q.native()).all()
    predict_scans(rule(), b, tmp_path/'out', progress=False)
    m = nib.load(tmp_path/'out/b_dseg.nii.gz')
    assert m.header.get_xyzt_units()[0]=='mm' and np.allclose(m.affine, nib.load(a).affine)

@pytest.mark.parametrize('size', [.0009, .01, 25.])
def test_impossible_spacing_is_refused_with_its_unit(tmp_path, size):
    p = save(tmp_path/'a.nii', draw_volume(), np.diag([size,1,1,1]))
    with pytest.raises(DataError, match=r'a.nii: found voxels of .*unit in the header.*xyzt_units'): read_scan(p)

def test_a_file_that_places_nothing_is_taken_as_it_is_stored(tmp_path):
    p = header_of(tmp_path/'a.nii.gz', affine=None)
    s = read_scan(p)
    assert not s.oriented and 'which way is up' in s.notes[0] and (read_image(p)==s.image).all()
    predict_scans(rule(), p, tmp_path/'out', progress=False)
    m = nib.load(tmp_path/'out/a_dseg.nii.gz')
    assert m.header['sform_code']==m.header['qform_code']==0
    assert (np.asarray(m.dataobj)>0).any() and (np.asarray(m.dataobj)==predict_scan(rule(), p).native()).all()
    b = save(tmp_path/'b.nii.gz', draw_volume(), np.diag([1,1,1.2,1])) # the same numbers, stored from left to right
    assert (predict_scan(rule(), b).native()==predict_scan(rule(), p).native()).all()

def test_a_header_that_places_twice_is_told(tmp_path):
    im = nib.Nifti1Image(draw_volume(), np.eye(4))
    im.set_sform(np.eye(4), 1); im.set_qform(np.diag([1,1,1,1.])+np.array([[0,0,0,9],[0]*4,[0]*4,[0]*4]), 1)
    nib.save(im, tmp_path/'a.nii.gz')
    assert any('9 mm apart' in o for o in read_scan(tmp_path/'a.nii.gz').notes)
    assert not read_scan(save(tmp_path/'b.nii', draw_volume())).notes

def test_gz_that_is_not_compressed_is_told(tmp_path):
    p = save(tmp_path/'a.nii', draw_volume()); p = p.rename(tmp_path/'a.nii.gz')
    with pytest.raises(DataError, match='a.nii.gz: found a file that is not compressed'): load_volume(p)

@pytest.mark.parametrize('shape', [(40,44), (40,44,1), (40,44,1,1)])
def test_a_single_slice_as_a_volume(tmp_path, shape):
    a = (draw_volume((40,44,9))[:,:,4]).reshape(shape)
    p = save(tmp_path/'a.nii.gz', a)
    assert read_image(p).shape==(40,44,1)
    q = predict_scan(rule(None, whole=True), p)
    assert q.native().shape==shape

def test_pairs_of_header_and_image_are_told(tmp_path):
    nib.save(nib.Nifti1Pair(draw_volume(), np.eye(4)), tmp_path/'a.img')
    for f in ('a.hdr','a.img'):
        with pytest.raises(DataError, match=f'{f}: found .*ending'): read_scan(tmp_path/f)

# ---------------------------------------------------------------- what is written

@pytest.mark.parametrize('codes', [(0,70_000), (-1,0,1)])
def test_codes_that_a_picture_cannot_hold_are_refused(tmp_path, codes):
    with pytest.raises(DataError, match='codes that the format can hold'): write_mask(np.zeros((4,4), np.uint8), tmp_path/'m.png', codes)
    assert not list(tmp_path.iterdir())

def test_minus_one_is_no_background(tmp_path):
    a = np.zeros((12,12,6), np.int16); a[3:8,3:8] = 1; a[:2] = -1
    with pytest.raises(DataError, match='m.nii: found the negative'): mask_codes([save(tmp_path/'m.nii', a)])

# ---------------------------------------------------------------- DICOM

@pytest.mark.parametrize('tags', [dict(PhotometricInterpretation='MONOCHROME1'), dict(PresentationLUTShape='INVERSE'),
                                  dict(PhotometricInterpretation='MONOCHROME1', PresentationLUTShape='INVERSE')])
def test_inverse_dicom_is_turned(tmp_path, tags):
    a = draw_volume().astype(np.uint16)
    one = read_scan(write_dicom(tmp_path/'a', a)).image
    two = read_scan(write_dicom(tmp_path/'b', 65535-a, **tags)).image
    assert (one==two).all()

def test_dicom_without_preamble(tmp_path):
    a = draw_volume().astype(np.uint16)
    one = read_scan(write_dicom(tmp_path/'a', a)).image
    d = write_dicom(tmp_path/'b', a)
    import pydicom
    for f in d.iterdir():
        ds = pydicom.dcmread(f)
        bare = pydicom.Dataset(); bare.update(ds)
        bare.save_as(f, implicit_vr=True, little_endian=True, enforce_file_format=False)
        assert f.read_bytes()[128:132]!=b'DICM'
    assert (read_scan(d).image==one).all()

@pytest.mark.parametrize('kind', ['JPEGLosslessProcess14_1', 'JPEGLSLossless', 'JPEG2000Lossless'])
def test_compressed_dicom(tmp_path, kind):
    "Scanners and archives send lossless JPEG"
    gdcm = pytest.importorskip('gdcm', reason='the extra dicom is not installed')
    a = draw_volume().astype(np.uint16)
    one = read_scan(write_dicom(tmp_path/'a', a, RescaleSlope=1, RescaleIntercept=0)).image
    d = write_dicom(tmp_path/'b', a, RescaleSlope=1, RescaleIntercept=0)
    for f in d.iterdir():
        r = gdcm.ImageReader(); r.SetFileName(str(f)); assert r.Read()
        c = gdcm.ImageChangeTransferSyntax()
        c.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, kind))); c.SetInput(r.GetImage()); assert c.Change()
        w = gdcm.ImageWriter(); w.SetFileName(str(f)); w.SetFile(r.GetFile()); w.SetImage(c.GetOutput()); assert w.Write()
    assert (read_scan(d).image==one).all()

# ---------------------------------------------------------------- names and labels of BraTS

def test_brats_since_2023(tmp_path):
    "Other names of the sequences, label 3 instead of 4, and visits of one subject"
    from brainseg_fastai.brats import NEWER
    from brainseg_fastai.cli import find_layout
    NEWER.standin(tmp_path, 4, np.random.default_rng(0))
    d = tmp_path/'MICCAI_BraTS2020_TrainingData'
    for f in (d/'BraTS-GLI-00001-000').iterdir():
        p = d/'BraTS-GLI-00000-001'/f.name.replace('00001-000', '00000-001')
        p.parent.mkdir(exist_ok=True); p.write_bytes(f.read_bytes()+b'') # a second visit of the first subject
    t = NEWER.cases(tmp_path, unit='volume')
    assert find_layout('brats2023') is NEWER and t[['subject','scan']].values.tolist()[:2]==[['BraTS-GLI-00000','000'],['BraTS-GLI-00000','001']]
    assert mask_codes(t['mask'])==(0,1,2,3) and t.inputs.unique().tolist()==['t2f+t1n+t1c+t2w']
    assert 'the same pixels' in NEWER.check(tmp_path).found.to_string() # of the copy
