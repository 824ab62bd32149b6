"Reading pictures, slices and volumes, a reader of one's own, writing masks; test_files.py counts how often files are opened"
import gzip, os, subprocess, sys
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib, numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from brainseg_fastai.checks import damaged, duplicates, file_table, mask_codes, odd_masks, unequal_sizes
from brainseg_fastai.core import DataError
from brainseg_fastai.images import (
    Pixels, data_fingerprint, facts_of, foreground, image_size, load_volume, open_volume, otsu, raw_mask, read_image,
    read_mask, stem_of, to_bytes, volume_facts, write_mask)
from helpers import draw_case

CODES = 0,1,4

def save(a, path): Image.fromarray(a).save(path)

# ---- pictures

def test_read_image(tmp_path):
    a = draw_case(np.random.default_rng(0))['brain']; rgb = np.stack([a]*3, -1)
    save(a, tmp_path/'a.png'); save(rgb, tmp_path/'b.png'); save(np.dstack([rgb, np.full_like(a, 255)]), tmp_path/'c.png')
    Image.fromarray(a).convert('P').save(tmp_path/'d.png')
    for f in 'abcd': assert (read_image(tmp_path/f'{f}.png')==a).all()
    save(a.astype(np.uint16)*13, tmp_path/'e.png'); save(a.astype(np.float32)/255, tmp_path/'f.tif')
    for f in ('e.png','f.tif'):
        b = read_image(tmp_path/f)
        assert b.dtype==np.uint8 and b.max()==255 and np.abs(b - a*(255/a.max())).max()<.501
    save(a.astype(np.uint16), tmp_path/'h.png'); assert (read_image(tmp_path/'h.png')==a).all(), 'what fits in 8 bits stays'
    save(np.zeros((8,8), np.float32), tmp_path/'i.tif'); assert not read_image(tmp_path/'i.tif').any()
    save(rgb, tmp_path/'g.jpg'); b = read_image(tmp_path/'g.jpg')
    assert b.shape==a.shape and np.abs(b.astype(float)-a).mean()<10

def test_bad_numbers(tmp_path):
    save(np.full((8,8), np.nan, np.float32), tmp_path/'a.tif'); save(np.full((8,8), .5, np.float32), tmp_path/'b.tif')
    with pytest.raises(DataError, match='a.tif.*not numbers'): read_image(tmp_path/'a.tif')
    with pytest.raises(DataError, match='b.tif.*whole numbers'): mask_codes([tmp_path/'b.tif'])
    with pytest.raises(DataError, match='none.png'): read_image(tmp_path/'none.png')
    with pytest.raises(DataError, match='no mask'): mask_codes([])

def test_channels(tmp_path):
    a = np.random.default_rng(0).integers(0, 255, (9,8,4)).astype(np.uint8)
    save(a, tmp_path/'a.tif')
    assert (read_image(Pixels(tmp_path/'a.tif', channels=(2,0)))==a[...,[2,0]]).all()
    assert (read_image(Pixels(tmp_path/'a.tif', channels=(3,)))==a[...,3]).all()
    assert (read_image(Pixels(tmp_path/'a.tif', channels=()))==a).all() and image_size(tmp_path/'a.tif')==(9,8)
    with pytest.raises(DataError, match='a.tif: found 4 channels; expected at least 5'): read_image(Pixels(tmp_path/'a.tif', channels=(4,)))
    with pytest.raises(DataError, match='a colour picture'): read_image(tmp_path/'a.tif')

def test_to_bytes():
    a = np.random.default_rng(0).integers(0, 4000, (9,8,7)).astype(np.int16)
    lo,hi = np.percentile(a[a!=0], [.1,99.9])
    assert np.abs(to_bytes(a)-((a-lo)/(hi-lo)*255).clip(0, 255)).max()<.51
    b = a.astype(np.uint8); assert (to_bytes(b)==b).all() and to_bytes(b) is not b
    for t in (np.int16, np.float32, np.float64): assert (to_bytes(b.astype(t))==b).all() # whatever the type
    assert not to_bytes(np.zeros((3,3), np.float32)).any() and (to_bytes(np.full((3,3), 700, np.int16))==255).all()

def test_the_foreground_is_the_largest_part_with_what_it_encloses():
    a = np.zeros((40,40), np.uint8)
    a[5:30,5:30] = 200; a[10:15,10:15] = 0; a[35:38,35:38] = 220
    want = np.zeros_like(a, bool); want[5:30,5:30] = True
    assert 0<=otsu(a)<200 and (foreground(a)==want).all()
    v = np.stack([a]*3, -1); v[...,0] = a*(a==220) # a hole that is open to below is filled all the same
    assert (foreground(v)[...,1]==want).all() and not foreground(v)[...,0].any()

# ---- volumes

@pytest.mark.parametrize('axes', ['LPS','RAS','PIR','SAL','ARI'])
def test_any_orientation_reads_and_writes_the_same(axes, tmp_path):
    a = np.random.default_rng(0).integers(1, 900, (12,10,8)).astype(np.int16); ras = nib.Nifti1Image(a, np.diag([1,2,3,1.]))
    seg = np.random.default_rng(1).integers(0, 3, a.shape).astype(np.uint8)
    to = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt('RAS'), nib.orientations.axcodes2ornt(axes))
    for p in ('a.nii','a.nii.gz','a.mgz'): # MGH has the same affine, its axes as they come
        im = ras.as_reoriented(to); im = nib.MGHImage(np.asarray(im.dataobj), im.affine) if p.endswith('mgz') else im
        nib.save(im, tmp_path/p); v = open_volume(tmp_path/p)
        assert (np.asarray(v.dataobj)==a).all() and np.allclose(v.affine, ras.affine)
        assert image_size(Pixels(tmp_path/p, 0))==(10,12) and read_image(Pixels(tmp_path/p, 2)).shape==(10,12)
        out = nib.load(write_mask(seg, tmp_path/'seg.nii.gz', CODES, tmp_path/p))
        assert np.allclose(out.affine, im.affine) and out.shape==im.shape and out.get_data_dtype()==np.uint8
        assert (read_mask(tmp_path/'seg.nii.gz', CODES)==seg).all()
    fs = [read_image(tmp_path/p) for p in ('a.nii','a.nii.gz','a.mgz')]
    assert (fs[0]==fs[1]).all() and (fs[1]==fs[2]).all()

def test_scaled_and_memory_mapped(tmp_path):
    a = np.random.default_rng(0).normal(50, 9, (9,8,7)); im = nib.Nifti1Image(a, np.eye(4))
    im.set_data_dtype(np.int16); nib.save(im, tmp_path/'a.nii')
    assert nib.load(tmp_path/'a.nii').dataobj.slope!=1
    v = np.asanyarray(open_volume(tmp_path/'a.nii').dataobj); assert isinstance(v, np.memmap) and np.abs(v-a).max()<.01
    with pytest.raises((ValueError, OSError)): v[0] = 0
    nib.save(nib.Nifti1Image((a*3).astype(np.uint8), np.eye(4)), tmp_path/'b.nii.gz')
    assert (read_image(tmp_path/'b.nii.gz')==(a*3).astype(np.uint8)).all() # 8 bits stay as they are
    w = load_volume(tmp_path/'a.nii'); assert w.get_data_dtype()==np.float32 and np.abs(np.asarray(w.dataobj)-a).max()<.01

def test_changed_file_is_read_again(tmp_path):
    f = tmp_path/'a.nii.gz'
    for v in (1,2):
        nib.save(nib.Nifti1Image(np.full((6,6,6), v, np.int16), np.eye(4)), f); os.utime(f, ns=(v*10**9, v*10**9))
        assert np.asarray(open_volume(f).dataobj).max()==v and mask_codes([f])==(v,)

def test_values_not_types_make_the_hash(tmp_path):
    a = np.random.default_rng(0).integers(0, 900, (9,8,7))
    for k,t in enumerate((np.int16, np.int32, np.uint16, np.float32, np.float64)):
        nib.save(nib.Nifti1Image(a.astype(t), np.eye(4)), tmp_path/f'{k}.nii.gz')
    assert len({volume_facts(tmp_path/f'{k}.nii.gz')['sha'] for k in range(5)})==1

def nan(a): a = a.astype(np.float32); a[3,3,3] = np.nan; return a

@pytest.mark.parametrize('end', ['.nii','.nii.gz'])
@pytest.mark.parametrize('case, word', [('cut','cannot be read to its end'), ('junk','cannot be read'), ('nan','1 voxels that are NaN'),
                                        ('four','20×18×12×2'), ('claim','claims'), ('affine','places no voxels')])
def test_damaged_volumes_are_refused(case, word, end, tmp_path):
    a,f = np.random.default_rng(0).integers(0, 900, (20,18,12)).astype(np.int16), tmp_path/f'a{end}'
    a = dict(nan=nan(a), four=np.stack([a,a], -1)).get(case, a)
    nib.save(nib.Nifti1Image(a, np.eye(4)), f)
    if case=='cut': f.write_bytes(f.read_bytes()[:-400])
    if case=='junk': f.write_bytes(b'x'*999)
    if case in ('claim','affine'):
        h = nib.load(f).header.copy(); h.set_data_shape((900,900,900) if case=='claim' else a.shape)
        if case=='affine': h['srow_x'] = 0
        plain = tmp_path/'p.nii'; nib.save(nib.Nifti1Image(a, np.eye(4)), plain); b = h.binaryblock + plain.read_bytes()[348:]
        f.write_bytes(gzip.compress(b) if end=='.nii.gz' else b)
    for g in (open_volume, load_volume, read_image, lambda p: read_image(Pixels(p, 3)), lambda p: mask_codes([p])):
        with pytest.raises(DataError, match=f.name) as e: g(f)
        assert word in str(e.value) and e.value.parts['remedy']
    assert word in str(facts_of([f])[str(f),False]['error'])

def test_a_slice_that_is_not_there(tmp_path):
    a,b = tmp_path/'large.nii.gz', tmp_path/'small.nii'
    for f,n in ((a,12), (b,4)): nib.save(nib.Nifti1Image(np.ones((n,n,n), np.int16), np.eye(4)), f)
    with pytest.raises(DataError, match='12 slices.*slice 40'): read_image(Pixels(a, 40))
    with pytest.raises(DataError, match='small.nii.*same grid'): read_image(Pixels([a, b]))

# ---- a reader of one's own

@dataclass(frozen=True)
class Npz(Pixels):
    "Image and mask in one NumPy archive"
    def values(self, mask=False):
        try: return np.load(self.files[0])['mask' if mask else 'image']
        except ValueError as e: raise DataError.of(self.files[0], str(e), 'a NumPy archive', 'Write it again.') from e
    def window(self, a): return a.min(), a.max()

def test_a_subclass_reads_its_own_files_everywhere(tmp_path):
    rng,rows = np.random.default_rng(0), []
    for i in range(4):
        f = tmp_path/f'{i}.npz'
        np.savez(f, image=rng.integers(-50, 900, (30,20)), mask=np.pad(np.full((9,9), i>0, np.uint8), ((3,18),(3,8))))
        rows.append(dict(subject=f's{i}', scan='-', slice='-', inputs='t1', image=Npz(f), mask=Npz(f)))
    x,a = rows[1]['image'], np.load(tmp_path/'1.npz')['image']
    assert np.abs(read_image(x)-(a-a.min())/(a.max()-a.min())*255).max()<.51
    assert image_size(x)==(30,20) and mask_codes([o['mask'] for o in rows])==(0,1) and read_mask(x, (0,1)).sum()==81
    assert x.whole()==x and isinstance(x.whole(), Npz) and str(x)==str(tmp_path/'1.npz')
    assert len(data_fingerprint(pd.DataFrame(rows)))==64 and raw_mask(rows[0]['mask']).max()==0
    (tmp_path/'2.npz').write_bytes(b'junk'); (tmp_path/'3.npz').write_bytes((tmp_path/'1.npz').read_bytes())
    t = file_table(rows, tmp_path)
    assert [o['file'] for o in damaged(t)]==['2.npz']*2 and [o['file'] for o in duplicates(t)]==['3.npz']
    assert not [*unequal_sizes(t)] and [o['level'] for o in odd_masks(t)]==['note']

# ---- writing masks

def test_masks_are_written_with_their_codes(tmp_path):
    m = np.random.default_rng(0).integers(0, 3, (9,8)).astype(np.uint8)
    for codes in ((0,1,255), (0,1,4000)):
        assert (raw_mask(write_mask(m, tmp_path/'deep/a.png', codes))==np.array(codes)[m]).all()
        assert (read_mask(tmp_path/'deep/a.png', codes)==m).all()
    with pytest.raises(DataError, match='a.png.*codes -1, 0, 1'): write_mask(m, tmp_path/'a.png', (-1,0,1))

def test_trailing_axis_scaling_and_large_codes(tmp_path):
    m = np.zeros((20,18,16), np.uint8); m[3:9,4:9,5:9] = 1; m[3:5] *= 2
    im = nib.Nifti1Image(np.ones((20,18,16,1), np.int16), np.diag([-1,1,1,1])); im.header.set_slope_inter(2, 5); nib.save(im, tmp_path/'a.nii.gz')
    got = nib.load(write_mask(m, tmp_path/'b.nii.gz', (0,1000,70000), tmp_path/'a.nii.gz'))
    assert got.shape==(20,18,16,1) and got.get_data_dtype()==np.int32 and np.unique(got.dataobj).tolist()==[0,1000,70000]
    assert np.array_equal(np.asarray(got.dataobj)[::-1,...,0]>0, m>0)
    assert nib.load(write_mask(m, tmp_path/'c.nii', (0,1,1000), tmp_path/'a.nii.gz')).get_data_dtype()==np.int16
    assert write_mask(m, tmp_path/'d.nii', (0,1,2), nib.load(tmp_path/'a.nii.gz')).is_file(), 'an image will do'

def test_nothing_half_written(tmp_path, monkeypatch):
    m,like = np.zeros((20,18,16), np.uint8), tmp_path/'a.nii'
    nib.save(nib.Nifti1Image(np.ones((20,18,16), np.int16), np.eye(4)), like)
    for mask,path,message in [(m[1:], 'b.nii', 'does not fit'), (m+5, 'b.nii', 'found class 5'), (m, 'b.mhd', '.nii or .nii.gz')]:
        with pytest.raises(DataError, match=message): write_mask(mask, tmp_path/path, CODES, like)
    def half(im, path): Path(path).write_bytes(b'half'); raise OSError('disk full')
    monkeypatch.setattr(nib.Nifti1Image, 'to_filename', half)
    with pytest.raises(OSError): write_mask(m, tmp_path/'b.nii', CODES, like)
    assert [o.name for o in tmp_path.iterdir()]==['a.nii']

def test_names_without_their_ending():
    assert [stem_of(o) for o in ('a/b.c.nii.gz','b.MGZ','x.y.png','plain')]==['b.c','b','x.y','plain']

# ---- codes

@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, 255), min_size=1, max_size=9), st.integers(0, 2**32-1), st.booleans())
def test_codes_map_back(tmp_path_factory, codes, seed, palette):
    "Classes that fill regions are found whatever their codes, and position in `codes` is the class"
    rng,f,codes = np.random.default_rng(seed), tmp_path_factory.mktemp('m')/'m.png', np.array(sorted(codes), np.uint8)
    classes = rng.permutation(np.arange(36) % len(codes)).reshape(6,6).repeat(5,0).repeat(5,1)
    im = Image.fromarray(codes[classes])
    if palette: im.putpalette(rng.integers(0, 255, 768).tolist())
    im.save(f)
    assert mask_codes([f, f]) == tuple(codes.tolist())
    m = read_mask(f, mask_codes([f]))
    assert m.dtype==np.uint8 and (m==classes).all()

@pytest.mark.parametrize('codes', [(0,1), (0,255), (0,1,2), (0,1,2,4), (0,85,170,255), (0,40000,65535)])
def test_rare_codes_are_found_in_any_mask(codes, tmp_path):
    fs = [tmp_path/f'{i}.png' for i in range(9)]
    for f in fs: save(np.zeros((32,32), np.uint16), f)
    a = np.zeros((32,32), np.uint16)
    for i,c in enumerate(codes): a[:, 6*i:6*i+6] = c
    save(a, fs[-1])
    assert mask_codes(fs)==codes and read_mask(fs[-1], codes).max()==len(codes)-1

# ---- nothing heavy for light work

def test_light_import():
    code = ('import sys, brainseg_fastai.adni; '
            'print([m for m in ("torch","fastai","fastcore","matplotlib","scipy","nibabel","monai") if m in sys.modules])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
