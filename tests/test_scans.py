"Scans however they are stored: one frame and the way back, what is refused, what is found, where the brain is"
import gzip, sys, tracemalloc

import nibabel as nib, numpy as np, pytest
from hypothesis import example, given, settings, strategies as st
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from PIL import Image
from scipy import ndimage as ndi

from brainseg_fastai.core import DataError
from brainseg_fastai.scans import (dark_rim, find_scans_to_predict, has_skull, read_scan, scan_names, slab_slices,
                                   top_of_brain)
from helpers import dataset
from scan_files import AXES, draw_volume, head_volume, huge_header, save, write_dicom, write_enhanced_dicom

@settings(max_examples=12, deadline=None)
@given(axes=AXES)
def test_a_reoriented_copy_is_the_same_scan(tmp_path_factory, axes):
    d = tmp_path_factory.mktemp('o')
    aff = np.diag([1.,1.2,1.5,1])
    aff[:3,3] = -20,3,7
    a,b = (read_scan(save(d/f'{n}.nii.gz', draw_volume(), aff, o)) for n,o in (('a',None),('b',axes)))
    assert (a.image==b.image).all() and a.spacing==b.spacing==(1,1.2,1.5)
    there = ornt_transform(io_orientation(a.like.affine), io_orientation(b.like.affine))
    assert (apply_orientation(a.to_native(a.image), there)==b.to_native(b.image)).all()
    assert b.to_native(b.image).shape==nib.load(d/'b.nii.gz').shape

def test_slices_go_back_to_where_they_were(tmp_path):
    s = read_scan(save(tmp_path/'a.nii', draw_volume()))
    ks = [3,17,30]
    back = s.volume(s.pictures(ks), ks)
    assert (back[:,:,ks]==s.image[:,:,ks]).all() and not np.delete(back, ks, 2).any()
    assert s.pictures().shape==(40,52,44)

@pytest.mark.parametrize('axes', [None, 'PIL'])
def test_a_strongly_tilted_scan_is_turned_upright_and_back(tmp_path, axes):
    "Turned by 30 degrees about two axes it reads nearly as the upright one, and a mask finds back to its own grid"
    a,ang = draw_volume((60,64,60)), np.radians(30)
    c,s = np.cos(ang), np.sin(ang)
    turn = np.array([[c,-s,0],[s,c,0],[0,0,1]]) @ np.array([[1,0,0],[0,c,-s],[0,s,c]])
    mid = (np.array(a.shape)-1)/2
    turned = ndi.affine_transform(a.astype(float), turn, mid-turn@mid, order=1).astype(np.int16)
    aff = nib.affines.from_matvec(turn, mid-turn@mid) # places every voxel of `turned` where it was taken from
    up,tilt = read_scan(save(tmp_path/'up.nii', a)), read_scan(save(tmp_path/'tilt.nii', turned, aff, axes))
    assert any('tilted' in o for o in tilt.notes) and not up.notes
    got = tilt.to_native((tilt.image>100).astype(np.uint8))>0
    assert got.shape==nib.load(tmp_path/'tilt.nii').shape
    want = ndi.affine_transform((up.image>100).astype(float), turn, mid-turn@mid, order=1)>.5
    if axes: want = apply_orientation(want, ornt_transform(io_orientation(aff), io_orientation(tilt.like.affine)))
    assert 2*(got&want).sum()/(got.sum()+want.sum())>.95

def test_mgz_and_a_trailing_axis(tmp_path):
    a = draw_volume(dtype=np.float32)
    nib.save(nib.MGHImage(a, np.eye(4)), tmp_path/'a.mgz')
    p,q = read_scan(tmp_path/'a.mgz'), read_scan(save(tmp_path/'b.nii.gz', a[...,None]))
    assert (p.image==q.image).all() and q.to_native(q.image).shape==(*a.shape, 1) and p.oriented

def test_a_file_that_does_not_say_which_way_is_up(tmp_path):
    im = nib.Nifti1Image(draw_volume(), None)
    im.header['sform_code'] = im.header['qform_code'] = 0
    nib.save(im, tmp_path/'a.nii')
    s = read_scan(tmp_path/'a.nii')
    assert not s.oriented and 'which way is up' in s.notes[0]

@pytest.mark.parametrize('name,make,says', [
    ('text.nii.gz', lambda p: p.write_text('hello', encoding='utf-8'), 'cannot be read'),
    ('huge.nii', lambda p: huge_header(p, (100_000,)*3), 'claims 100000×100000×100000'),
    ('large.nii', lambda p: huge_header(p, (900,900,900)), 'claims 900×900×900'),
    ('fmri.nii.gz', lambda p: save(p, np.zeros((9,9,9,3), np.int16)), '9×9×9×3'),
    ('nan.nii.gz', lambda p: save(p, np.full((9,9,9), np.nan, np.float32)), 'NaN'),
    ('photo.png', lambda p: Image.fromarray(np.random.default_rng(0).integers(0, 255, (64,64,3), dtype=np.uint8)).save(p), 'colour picture'),
    ('text.png', lambda p: p.write_text('hello', encoding='utf-8'), 'cannot be read'),
    ('note.txt', lambda p: p.write_text('hello', encoding='utf-8'), 'the ending .txt'),
    ('nothing.png', lambda p: None, 'no such file')])
def test_what_is_no_scan_is_refused_by_name(tmp_path, name, make, says):
    make(tmp_path/name)
    with pytest.raises(DataError, match=says) as e: read_scan(tmp_path/name)
    assert name in str(e.value)

def test_truncated_and_swollen_files(tmp_path):
    f = save(tmp_path/'a.nii.gz', np.random.default_rng(0).integers(0, 900, (30,30,30)).astype(np.int16))
    b = f.read_bytes()
    for n in (len(b)-9, len(b)//2, 100):
        f.write_bytes(b[:n])
        with pytest.raises(DataError, match='cannot be read|claims'): read_scan(f)
    plain = save(tmp_path/'a.nii', draw_volume())
    plain.write_bytes(plain.read_bytes()[:-50])
    with pytest.raises(DataError, match='claims|cannot be read'): read_scan(plain)
    f.write_bytes(gzip.compress(gzip.decompress(b)+bytes(2**25)))
    with pytest.raises(DataError, match='more data than the header says'): read_scan(f)

def test_a_claim_costs_no_memory(tmp_path):
    f = huge_header(tmp_path/'huge.nii', (100_000,)*3)
    tracemalloc.start()
    with pytest.raises(DataError): read_scan(f)
    assert tracemalloc.get_traced_memory()[1]<2**24
    tracemalloc.stop()

def test_a_dicom_series_is_the_volume_that_it_was(tmp_path):
    a = draw_volume(dtype=np.uint16)+5
    d = write_dicom(tmp_path/'series', a, (1.,1.2,1.5), (-20.,10.,5.))
    aff = np.diag([-1.,-1.2,1.5,1])
    aff[:3,3] = 20,-10,5
    p,q = read_scan(d), read_scan(save(tmp_path/'same.nii.gz', (2*a.astype(np.int16)-10), aff))
    assert np.allclose(p.like.affine, aff) and p.like.shape==a.shape and (p.image==q.image).all()
    assert (p.to_native(p.image)==q.to_native(q.image)).all() and len(p.files)==40
    assert find_scans_to_predict(tmp_path)==[tmp_path/'same.nii.gz', d] and scan_names([d])==['series']

def test_one_dicom_file_of_many_frames_is_that_volume_too(tmp_path):
    a,how = draw_volume(dtype=np.uint16)+5, ((1.,1.2,1.5), (-20.,10.,5.))
    p,q = (read_scan(f(tmp_path/f.__name__, a, *how)) for f in (write_enhanced_dicom, write_dicom))
    assert np.allclose(p.like.affine, q.like.affine) and (p.image==q.image).all() and p.spacing==q.spacing
    assert [o.name for o in p.files]==['frames']
    twice = write_enhanced_dicom(tmp_path/'echoes', a, places=[*range(20)]*2) # two echoes, or two times
    with pytest.raises(DataError, match='two images at one place'): read_scan(twice)

def test_a_dicom_series_with_a_gap_or_a_stranger(tmp_path):
    a = draw_volume((20,22,12), dtype=np.uint16)
    with pytest.raises(DataError, match='mm apart'): read_scan(write_dicom(tmp_path/'gap', a, skip=(5,)))
    write_dicom(tmp_path/'two', a)
    write_dicom(tmp_path/'two', a, uid='1.2.9', names='B{:04d}')
    with pytest.raises(DataError, match='2 DICOM series'): read_scan(tmp_path/'two')
    write_dicom(tmp_path/'twice', a)
    write_dicom(tmp_path/'twice', a, names='B{:04d}')
    with pytest.raises(DataError, match='two images at one place'): read_scan(tmp_path/'twice')
    with pytest.raises(DataError, match='the folder of its series'): read_scan(next((tmp_path/'gap').iterdir()))
    write_dicom(tmp_path/'wide', a, spacing=(1.,2.,1.))
    write_dicom(tmp_path/'wide', a, origin=(0.,0.,99.), names='B{:04d}')
    with pytest.raises(DataError, match='another size or direction'): read_scan(tmp_path/'wide')
    f = write_dicom(tmp_path/'cut', a)/'IM0003'
    f.write_bytes(f.read_bytes()[:-300])
    with pytest.raises(DataError, match='IM0003.*cannot be read'): read_scan(tmp_path/'cut')
    (tmp_path/'none').mkdir()
    with pytest.raises(DataError, match='no DICOM series'): read_scan(tmp_path/'none')

@pytest.mark.parametrize('tags,says', [(dict(NumberOfFrames=3), 'several frames'), (dict(SamplesPerPixel=3), 'colours'),
                                       (dict(PixelSpacing=None), 'no PixelSpacing')])
def test_a_dicom_file_that_is_no_grey_slice(tmp_path, tags, says):
    d = write_dicom(tmp_path/'s', draw_volume((20,22,12), dtype=np.uint16), **tags)
    with pytest.raises(DataError, match=says): read_scan(d)

def test_dicom_without_pydicom_names_the_extra(tmp_path, monkeypatch):
    d = write_dicom(tmp_path/'s', draw_volume((20,22,12), dtype=np.uint16))
    monkeypatch.setitem(sys.modules, 'pydicom', None)
    with pytest.raises(DataError, match=r'brainseg_fastai\[dicom\]'): read_scan(d)

def test_sequences_of_a_case_become_channels(tmp_path):
    d,a = tmp_path/'BraTS20_007', draw_volume()
    d.mkdir()
    for s,f in (('flair',1),('t1',2),('t1ce',3),('t2',4),('seg',0)):
        save(d/f'BraTS20_007_{s}.nii.gz', (a*f).clip(0, 3000).astype(np.int16))
    every = 'flair','t1','t1ce','t2'
    assert find_scans_to_predict(tmp_path, ['flair','t1ce'], every)==[d]
    assert find_scans_to_predict(tmp_path, ['t2'], every)==[d/'BraTS20_007_t2.nii.gz']
    s = read_scan(d, channels=['flair','t1ce'])
    assert s.image.shape==(*a.shape, 2) and [o.name for o in s.files]==['BraTS20_007_flair.nii.gz','BraTS20_007_t1ce.nii.gz']
    with pytest.raises(DataError, match='a folder with one volume for each of flair, t1ce'):
        read_scan(d/'BraTS20_007_flair.nii.gz', channels=['flair','t1ce'])
    (d/'BraTS20_007_t1ce.nii.gz').unlink()
    with pytest.raises(DataError, match='no volume that ends in _t1ce'): read_scan(d, channels=['flair','t1ce'])
    save(d/'BraTS20_007_t1ce.nii.gz', a[:-1])
    with pytest.raises(DataError, match='another grid'): read_scan(d, channels=['flair','t1ce'])

def test_inputs_that_are_channels_of_one_picture(tmp_path):
    a = np.random.default_rng(0).integers(0, 255, (40,50,3), dtype=np.uint8)
    Image.fromarray(a).save(tmp_path/'a.png')
    Image.fromarray(a[...,0]).save(tmp_path/'grey.png')
    every = 'pre','flair','post'
    assert (read_scan(tmp_path/'a.png', channels=every, packed=every).image==a).all()
    assert (read_scan(tmp_path/'a.png', channels=['flair'], packed=every).image==a[...,1]).all()
    assert (read_scan(tmp_path/'grey.png', channels=['flair'], packed=every).image==a[...,0]).all()
    with pytest.raises(DataError, match='3 channels; expected 2, as in training'): read_scan(tmp_path/'a.png', channels=['x','y'])

def test_spacing_of_a_picture_is_told_or_known(tmp_path):
    for o in ('brain','mask'): (tmp_path/o).mkdir()
    for o in ('7-a-brain-1','8-b-brain-1'): Image.fromarray(np.eye(30, dtype=np.uint8)).save(tmp_path/'brain'/f'{o}.png')
    f,g = sorted((tmp_path/'brain').iterdir())
    (tmp_path/'cohort.json').write_text('{"spacing": 0.9, "scans": [{"subject": "7", "scan": "a", "spacing": 0.5}]}')
    assert read_scan(f).spacing==(.5,.5) and read_scan(g).spacing==(.9,.9) and read_scan(f, (1,2)).spacing==(1,2)
    assert read_scan(f).pixel==(.5,.5)

def test_names_that_clash(tmp_path):
    assert scan_names(['s1/t1.nii','s2/t1.nii.gz','b.png'])==['s1_t1','s2_t1','b']
    assert len(set(scan_names(['a/x.png','b/a/x.png','c/a/x.png','a/x.nii'])))==4

def test_masks_and_earlier_outputs_are_no_scans(tmp_path):
    for n in ('a','a_seg','b_dseg','c_mask'): save(tmp_path/f'{n}.nii.gz', draw_volume((8,8,8)))
    (tmp_path/'func').mkdir()
    save(tmp_path/'func'/'bold.nii.gz', draw_volume((8,8,8)))
    assert [p.name for p in find_scans_to_predict(tmp_path)]==['a.nii.gz']
    (tmp_path/'e').mkdir()
    with pytest.raises(DataError, match='a folder without scans'): find_scans_to_predict(tmp_path/'e')
    with pytest.raises(DataError, match='no such file or folder'): find_scans_to_predict(tmp_path/'nowhere')

def test_of_a_data_folder_the_inputs_of_the_model_are_taken(tmp_path):
    for o in ('brain','orig','mask'):
        (tmp_path/o).mkdir()
        Image.fromarray(np.eye(30, dtype=np.uint8)).save(tmp_path/o/f'7-a-{o}-1.png')
    assert find_scans_to_predict(tmp_path, ['orig'])==[tmp_path/'orig'/'7-a-orig-1.png']
    assert len(find_scans_to_predict(tmp_path))==2

@example(20., 19, .4, .5, .5)
@given(st.floats(20, 60), st.integers(1, 80), st.floats(.4, 6), st.floats(0, 60), st.floats(0, 20))
def test_slab_slices_are_those_within_half_a_slice(top, n, mm, lo, width):
    ks,inside = slab_slices(top, n, mm, (lo, lo+width))
    below = (top-np.arange(n))*mm
    far = np.minimum(below-(lo-mm/2), lo+width+mm/2-below) # inside from 0 up; rounding decides about ties
    assert all((far[k]>0)==(k in ks) for k in range(n) if abs(far[k])>1e-9)
    if inside: assert len(ks)*mm>=width-1e-6

def test_skull_is_seen_in_real_slices():
    root = dataset('adni_like')
    for kind in ('brain','orig'):
        rims = [dark_rim(np.array(Image.open(p))) for p in sorted((root/kind).glob('*.png'))[::9]]
        assert all((r>.23)==(kind=='orig') for r in rims), (kind, rims)

def test_the_top_of_the_brain_below_the_top_of_the_head():
    a,brain = head_volume()
    top,skull = top_of_brain(a, (1,1,1))
    true = np.flatnonzero(brain.sum((0,1))>=100)[-1]
    assert skull and abs(top-true)<=4 # these shells are 16 mm thick
    assert top_of_brain(a*brain, (1,1,1))==(true, False)
    assert has_skull(a, (1,1,1)) and not has_skull(a*brain, (1,1,1)) and not has_skull(a*0, (1,1,1))
    with pytest.raises(DataError, match='without contrast'): top_of_brain(a*0, (1,1,1))

def test_colin27_with_its_skull():
    "The top of the brain, found through the skull, is near that of the stripped brain"
    d = dataset('colin27')
    head,brain = (read_scan(d/f'colin27_T1w_{o}.nii.gz') for o in ('head','brain'))
    (top,skull),(true,none) = (top_of_brain(o.image, o.spacing) for o in (head, brain))
    assert skull and not none and abs(top-true)<=3
