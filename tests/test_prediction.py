"Predictions on new scans: the geometry there and back, what is measured, what is written, what is done again"
import json

import nibabel as nib, numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from PIL import Image
from scipy import ndimage as ndi

from brainseg_fastai.cli import main
from brainseg_fastai.core import DataError
from brainseg_fastai.inference import Frame, Model
from brainseg_fastai.prediction import (evans_index, inner_width, predict_pictures, predict_scan, predict_scans,
                                        widths, write_labels)
from brainseg_fastai.scans import read_scan, top_of_brain
from brainseg_fastai.settings import Settings
from helpers import dataset, make_folder
from scan_files import AXES, draw_volume, head_volume, save, write_dicom

class DarkInside(torch.nn.Module):
    "A rule instead of a network: class 1 where a pixel is dark and everything around it belongs to the head"
    def forward(self, x):
        x = x.mean(1, keepdim=True)
        head = (x>x.amin((-2,-1), keepdim=True)+.2).float()
        score = torch.minimum(.5-x, 50*(F.avg_pool2d(head, 21, 1, 10)-.97))
        return torch.cat([-score, score], 1)

class Bright(torch.nn.Module):
    "Class 1 where it is bright"
    def forward(self, x):
        s = x.mean(1, keepdim=True)-.2
        return torch.cat([-s, s], 1)

def rule(slab=(10,30), size=64, inputs='brain', net=None, spacing=(1.,1.), frame=None, **more):
    "What `load_bundle` gives, with a rule in the place of a network"
    config = dict(channels=[inputs], inputs_all=[], packed=False, whole=False, labels=[dict(code=255, name='ventricles', colour='#e0402a')],
                  slab=slab and dict(below_top_mm=list(slab)), reference=None, calibration=None, sha256='x') | more
    return Model(net or DarkInside(), Frame(**dict(size=size, spacing=spacing) | (frame or {})), config)

@settings(max_examples=12, deadline=None)
@given(axes=AXES)
def test_a_reoriented_copy_gets_the_reoriented_mask(tmp_path_factory, axes):
    d,aff = tmp_path_factory.mktemp('o'), np.diag([1.,1.2,1.5,1])
    aff[:3,3] = -20,3,7
    p,q = (predict_scan(rule(), save(d/f'{n}.nii.gz', draw_volume(), aff, o)) for n,o in (('a',None),('b',axes)))
    assert p.mask.any() and (p.mask==q.mask).all()
    there = ornt_transform(io_orientation(p.scan.like.affine), io_orientation(q.scan.like.affine))
    assert (apply_orientation(p.native(), there)==q.native()).all()
    assert q.native().shape==nib.load(d/'b.nii.gz').shape and set(np.unique(q.native()))=={0,255}
    assert [r['area_mm2'] for r in p.rows]==[r['area_mm2'] for r in q.rows] and p.quality==q.quality

def test_a_tilted_affine_below_the_limit_is_exact(tmp_path):
    c,s = np.cos(.2), np.sin(.2)
    aff = np.array([[c,-s,0,4],[s,c,0,-9],[0,0,2.,1],[0,0,0,1]])
    p,q = (predict_scan(rule(), save(tmp_path/f'{n}.nii', draw_volume(), aff, o)) for n,o in (('a',None),('b','PIR')))
    assert (p.mask==q.mask).all() and not any('tilted' in o for o in p.notes)
    a,b = (nib.affines.apply_affine(o.scan.like.affine, np.argwhere(o.native()>0)).mean(0) for o in (p, q))
    assert np.allclose(a, b)

@pytest.mark.parametrize('axes', [None, 'PIL'])
def test_a_strongly_tilted_scan_is_predicted_upright(tmp_path, axes):
    "The volume turned by 30 degrees about two axes gets nearly the mask of the upright one, in its own grid"
    a,ang = draw_volume((60,64,60)), np.radians(30)
    c,s = np.cos(ang), np.sin(ang)
    turn = np.array([[c,-s,0],[s,c,0],[0,0,1]]) @ np.array([[1,0,0],[0,c,-s],[0,s,c]])
    mid = (np.array(a.shape)-1)/2
    turned = ndi.affine_transform(a.astype(float), turn, mid-turn@mid, order=1).astype(np.int16)
    aff = nib.affines.from_matvec(turn, mid-turn@mid) # places every voxel of `turned` where it was taken from
    p,q = predict_scan(rule(), save(tmp_path/'up.nii', a)), predict_scan(rule(), save(tmp_path/'tilt.nii', turned, aff, axes))
    assert any('tilted' in o for o in q.notes) and q.native().shape==nib.load(tmp_path/'tilt.nii').shape
    want = ndi.affine_transform(p.native().astype(float), turn, mid-turn@mid, order=1)>127
    if axes: want = apply_orientation(want, ornt_transform(io_orientation(aff), io_orientation(q.scan.like.affine)))
    got = q.native()>0
    assert 2*(got&want).sum()/(got.sum()+want.sum())>.9
    predict_scans(rule(), tmp_path/'tilt.nii', tmp_path/'out', progress=False)
    assert (np.asarray(nib.load(tmp_path/'out'/'tilt_dseg.nii.gz').dataobj)==q.native()).all()

def test_pixels_of_other_sizes(tmp_path):
    "A scan with pixels of another size is brought to the size of the training and back; the area stays"
    a,big = draw_volume((48,56,40)), rule(size=96)
    def area(a, mm): return predict_scan(big, save(tmp_path/'a.nii', a, np.diag([*mm,1]))).rows[0]['area_mm2']
    want = area(a, (1,1,1))
    assert area(np.repeat(np.repeat(a, 2, 0), 2, 1), (.5,.5,1))==pytest.approx(want, rel=.04)
    assert area(np.repeat(a, 2, 1), (1,.5,1))==pytest.approx(want, rel=.04)

def test_the_slab_and_what_is_said_of_it(tmp_path):
    f = save(tmp_path/'a.nii.gz', draw_volume())
    p = predict_scan(rule((10,20)), f)
    top,skull = top_of_brain(p.scan.image, p.scan.spacing)
    assert not skull and list(p.slices)==[k for k in range(40) if 10<=top-k<=20] and 'were left empty' in ' '.join(p.notes)
    assert not np.delete(p.mask, p.slices, 2).any() and p.mask[:,:,list(p.slices)].any(axis=(0,1)).all()
    assert predict_scan(rule((10,20)), f, slab=(15,15)).slices==(top-15,)
    with pytest.raises(DataError, match='--slab LO,HI'): predict_scan(rule(None), f)
    with pytest.raises(DataError, match='no slice 90 to 99 mm below'): predict_scan(rule((90,99)), f)
    with pytest.raises(DataError, match='smaller number first'): predict_scan(rule(), f, slab=(9,3))
    assert np.isnan(p.rows[0]['volume_ml']) and 'no volume in mL' in ' '.join(p.notes)

def test_millilitres_need_the_whole_extent(tmp_path):
    f = save(tmp_path/'a.nii.gz', draw_volume(), np.diag([1,1,2,1.]))
    p = predict_scan(rule(None, whole=True), f)
    assert p.rows[0]['volume_ml']==pytest.approx((p.mask>0).sum()*2/1000) and p.rows[0]['slices']==40
    assert predict_scan(rule((0,60), whole=True), f).rows[0]['volume_ml']>0
    assert np.isnan(predict_scan(rule((0,90), whole=True), f).rows[0]['volume_ml']) # the scan ends above

def test_evans_index_of_a_drawn_head():
    a,brain = head_volume()
    x,y,z = np.mgrid[:170,:170,:170]
    m = (abs(x-85)<22)&(abs(y-95)<25)&(abs(z-85)<10)
    a[m] = 15
    inner = max(np.ptp(np.flatnonzero(c))+1 for c in brain[:,:,85].T if c.any())
    e = evans_index(a, m, (1,1,1), range(80,90))
    assert e*inner_width(a[:,:,89], m[:,:,89], (1,1))==pytest.approx(43) and e==pytest.approx(43/inner, rel=.05)
    assert np.isnan(evans_index(a*brain, m, (1,1,1), range(80,90))) # no skull in view
    assert np.isnan(evans_index(a, m & False, (1,1,1), range(80,90)))

def test_widths_are_those_of_every_column_by_itself():
    r = np.random.default_rng(0)
    for p in (.02, .3, 1.1):
        m = r.random((30,20,5)) < p
        for (y,k),w in np.ndenumerate(widths(m)):
            on = np.flatnonzero(m[:,y,k])
            assert w==(np.ptp(on)+1 if len(on) else 0)

def test_a_ventricle_is_compared_with_the_brain_or_the_skull(tmp_path):
    "Whether the skull is there decides, in slices and in volumes, for models of either"
    a,brain = head_volume(100)
    a[50:] += 20*(a[50:]==150).astype(np.uint8) # something to see
    for mode,mm in dict(slice=(1.,1.), volume=(1.,1.,1.)).items():
        m = rule(None, whole=True, net=Bright(), spacing=mm, frame=dict(mode=mode))
        with_skull,without = (predict_scan(m, save(tmp_path/'a.nii', o.astype(np.uint8))).rows[0] for o in (a, a*brain))
        assert np.isnan(with_skull['ventricle_brain_ratio']) and without['ventricle_brain_ratio']>0

@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    "A small network, trained for two epochs: its folder and its data"
    from brainseg_fastai.adni import adni_cases
    from brainseg_fastai.runs import train_run
    d = tmp_path_factory.mktemp('bundle')
    cases = adni_cases(make_folder(d/'data', 4, 2), 'brain')
    table = cases.assign(split=np.repeat(['train','train','valid','test'], 2))
    train_run(table, d/'run', Settings(inputs='brain', arch='unet', size=64, width=4, depth=3, epochs=2, pretrained=False))
    return d/'run', d/'data'

def test_a_symmetrical_picture_gets_a_symmetrical_mask(bundle):
    from brainseg_fastai.runs import load_bundle
    model,scan = load_bundle(bundle[0]), read_scan(next((bundle[1]/'brain').iterdir()))
    scan.image = np.concatenate([scan.image[:,:32], scan.image[:,:32][:,::-1]], 1)
    p,plain = predict_scan(model, scan), predict_scan(model, scan, flips=False)
    assert (p.mask==p.mask[:,::-1]).mean()>.995 and np.isnan(plain.quality)
    both,n = ((plain.mask>0)&(plain.mask[:,::-1]>0)).sum(), (plain.mask>0).sum()
    assert p.quality==pytest.approx(both/n, abs=.02) and both<n

def test_pictures_of_several_sizes_keep_their_order():
    pics = [np.pad(draw_volume()[:,:,15+k].astype(np.uint8), k%3) for k in range(5)]
    from brainseg_fastai.scans import Scan
    scans = [Scan(str(i), None, a) for i,a in enumerate(pics)]
    ps = predict_pictures(rule(), scans)
    assert [p.scan.name for p in ps]==[*'01234'] and all(p.mask.shape==a.shape for p,a in zip(ps, pics))
    assert all((p.mask==predict_scan(rule(), s).mask).all() for p,s in zip(ps, scans))

def test_the_command_from_a_folder_to_a_table(bundle, tmp_path, capsys):
    run,data = map(str, bundle)
    out,bad = tmp_path/'out', tmp_path/'bad.png'
    bad.write_text('no picture', encoding='utf-8')
    def command(*scans, mm='0.5'): return main(['predict', run, *map(str, scans), '--out', str(out), '--spacing', mm])
    assert command(data, bad)==1
    said,t = capsys.readouterr(), pd.read_csv(out/'volumes.csv')
    assert '8 scans' in said.out and 'bad.png' in said.err and '1 of 9' in said.err
    assert len(t)==8 and np.allclose(t.area_mm2, t.area_px/4) and t.volume_ml.isna().all() and t.quality.between(0, 1).all()
    assert {o.name for o in out.iterdir()} >= {'dseg.tsv','labels.txt','labels.ctbl','volumes.csv'} and not list(out.glob('.*'))
    m = np.array(Image.open(out/t['mask'][0]))
    assert m.shape==(64,64) and set(np.unique(m))<={0,255} and (m>0).sum()==t.area_px[0]
    before = {o: o.stat().st_mtime_ns for o in out.glob('*_dseg.*')}
    assert command(data)==0 and before=={o: o.stat().st_mtime_ns for o in out.glob('*_dseg.*')}
    assert command(data, mm='0.25')==0 # another spacing is another prediction
    assert np.allclose(pd.read_csv(out/'volumes.csv').area_mm2, t.area_px/16)
    assert command(tmp_path/'nowhere.png')==2
    for more in (['--slab', '9,3'], ['--slab', '5'], ['--spacing', '0'], ['--spacing', 'x']):
        with pytest.raises(SystemExit): main(['predict', run, data, '--out', str(out), *more])

def test_bids_in_bids_out(tmp_path):
    root,out = tmp_path/'ds', tmp_path/'out'
    d = root/'sub-01'/'ses-1'
    for o in ('anat','func'): (d/o).mkdir(parents=True)
    f = save(d/'anat'/'sub-01_ses-1_T1w.nii.gz', draw_volume(), axes='LPI')
    save(d/'func'/'sub-01_ses-1_bold.nii.gz', draw_volume())
    t = predict_scans(rule(), root, out, progress=False)
    m = out/'sub-01'/'ses-1'/'anat'/'sub-01_ses-1_desc-T1w_dseg.nii.gz'
    assert not t.attrs['failed'] and m.is_file() and len(t)==1
    assert nib.load(m).shape==nib.load(f).shape and np.allclose(nib.load(m).affine, nib.load(f).affine)
    side = json.loads((m.parent/'sub-01_ses-1_desc-T1w_dseg.json').read_text(encoding='utf-8'))
    desc = json.loads((out/'dataset_description.json').read_text(encoding='utf-8'))
    assert desc['DatasetType']=='derivative' and desc['GeneratedBy'][0]['Name']=='brainseg_fastai' and desc['BIDSVersion']
    assert side['Sources']==[f.name] and pd.read_csv(out/'dseg.tsv', sep='\t')['index'].tolist()==[0,255]

def test_label_files(tmp_path):
    write_labels([dict(code=1, name='necrotic core', colour='#ff8000'), dict(code=4, name='enhancing', colour='#0000ff')], tmp_path)
    assert '    1  255  128    0        1  1  1    "necrotic core"' in (tmp_path/'labels.txt').read_text()
    assert '1 necrotic_core 255 128 0 255' in (tmp_path/'labels.ctbl').read_text().splitlines()
    assert pd.read_csv(tmp_path/'dseg.tsv', sep='\t').color.tolist()==['#000000','#ff8000','#0000ff']

@pytest.mark.parametrize('name,make,says', [
    ('text.nii.gz', lambda p: p.write_text('hello', encoding='utf-8'), 'cannot be read'),
    ('flat.nii.gz', lambda p: save(p, np.zeros((30,30,30), np.int16)), 'without contrast'),
    ('text.png', lambda p: p.write_text('hello', encoding='utf-8'), 'cannot be read'),
    ('note.txt', lambda p: p.write_text('hello', encoding='utf-8'), 'the ending .txt')])
def test_bad_input_is_told_and_leaves_nothing(tmp_path, name, make, says):
    f,out = tmp_path/name, tmp_path/'out'
    make(f)
    t = predict_scans(rule(), f, out, progress=False)
    why = t.attrs['failed'][0][1]
    assert says in why and name in why and 'partners' not in why and len(t)==0 and not list(out.rglob('*'))

def test_what_cannot_be_asked_is_refused_at_once(tmp_path):
    f = save(tmp_path/'a.nii', draw_volume())
    with pytest.raises(DataError, match='mm per pixel'): predict_scans(rule(), f, spacing=-1)
    with pytest.raises(DataError, match='found a file where a folder is needed'): predict_scans(rule(), f, f)
    with pytest.raises(DataError, match='smaller number first'): predict_scans(rule(), f, slab=(9,3))
    Image.fromarray(np.zeros((20,20), np.uint8)).save(tmp_path/'a.png')
    with pytest.raises(DataError, match='Leave out --slab'): predict_scans(rule(), tmp_path/'a.png', slab=(5,30))
    with pytest.raises(DataError, match='a file where a folder is needed'): predict_scans(rule(), f, f/'out')
    assert len(list(tmp_path.iterdir()))==2
    m = rule()
    with pytest.raises(DataError, match='without a config'): predict_scan(Model(m.net, m.frame), f)

def test_a_dicom_series_gets_a_mask_in_its_own_place(tmp_path):
    a = draw_volume(dtype=np.uint16)+5
    d = write_dicom(tmp_path/'series', a, (1.,1.2,1.5), (-20.,10.,5.))
    aff = np.diag([-1.,-1.2,1.5,1])
    aff[:3,3] = 20,-10,5
    q = predict_scan(rule(), save(tmp_path/'same.nii.gz', (2*a.astype(np.int16)-10), aff))
    predict_scans(rule(), d, tmp_path/'out', progress=False)
    m = nib.load(tmp_path/'out'/'series_dseg.nii.gz')
    assert np.allclose(m.affine, aff) and (np.asarray(m.dataobj)==q.native()).all() and q.mask.any()
    assert len(predict_scans(rule(), d, tmp_path/'out', progress=False))==1

def test_sequences_of_a_case_are_one_scan(tmp_path):
    d,a = tmp_path/'BraTS20_007', draw_volume()
    d.mkdir()
    for s,f in (('flair',1),('t1',2),('t1ce',3),('t2',4),('seg',0)):
        save(d/f'BraTS20_007_{s}.nii.gz', (a*f).clip(0, 3000).astype(np.int16))
    model = rule(None, whole=True, channels=['flair','t1ce'], inputs_all=['flair','t1','t1ce','t2'])
    p = predict_scan(model, d)
    assert p.scan.image.shape==(*a.shape, 2) and p.mask.shape==a.shape and p.mask.any()
    t = predict_scans(model, tmp_path, tmp_path/'out', progress=False)
    assert list(t['name'])==['BraTS20_007'] and (tmp_path/'out'/'BraTS20_007_dseg.nii.gz').is_file()
    with pytest.raises(DataError, match='a folder with one volume for each of flair, t1ce'):
        predict_scan(model, d/'BraTS20_007_flair.nii.gz')

def test_inputs_packed_in_one_picture(tmp_path):
    a = (np.repeat(draw_volume()[:,:,20,None]//4, 3, -1)//[1,2,3]).astype(np.uint8)
    Image.fromarray(a).save(tmp_path/'a.png')
    model = rule(channels=['flair','post'], inputs_all=['pre','flair','post'], packed=True)
    assert predict_scan(model, tmp_path/'a.png').scan.image.shape==(*a.shape[:2], 2)
    with pytest.raises(DataError, match='3 channels; expected 1|colour picture'): predict_scan(rule(), tmp_path/'a.png')

@pytest.mark.parametrize('mode', ['patch','volume'])
def test_volume_models_keep_the_geometry(tmp_path, mode):
    pytest.importorskip('torchio')
    a = draw_volume((40,36,32))
    model = rule(None, net=Bright(), inputs='t1', spacing=(1.,1.,1.), whole=True,
                 frame=dict(mode=mode, patch=(16,16,16) if mode=='patch' else None))
    p,q = (predict_scan(model, save(tmp_path/f'{n}.nii.gz', a, axes=o)) for n,o in (('a',None),('b','SLP')))
    assert (p.mask==q.mask).all() and p.mask.any() and p.quality>.99
    assert p.rows[0]['volume_ml']==pytest.approx((p.mask>0).sum()/1000)
    r = predict_scan(model, save(tmp_path/'c.nii.gz', np.repeat(a, 2, 2), np.diag([1,1,.5,1])))
    twice = np.repeat(p.mask, 2, 2)>0
    assert r.mask.shape==(40,36,64) and 2*((r.mask>0)&twice).sum()/((r.mask>0).sum()+twice.sum())>.95
    Image.fromarray(np.zeros((30,30), np.uint8)).save(tmp_path/'s.png')
    with pytest.raises(DataError, match='a single slice'): predict_scan(model, tmp_path/'s.png')

def test_mgz_and_a_trailing_axis(tmp_path):
    a,out = draw_volume(dtype=np.float32), tmp_path/'out'
    nib.save(nib.MGHImage(a, np.eye(4)), tmp_path/'a.mgz')
    save(tmp_path/'b.nii.gz', a[...,None])
    t = predict_scans(rule(), [tmp_path/'a.mgz', tmp_path/'b.nii.gz'], out, progress=False)
    assert t.attrs['failed']==[] and t.area_mm2.nunique()==1 and nib.load(out/'b_dseg.nii.gz').shape==(*a.shape, 1)
    assert np.allclose(nib.load(out/'a_dseg.nii.gz').affine, nib.load(tmp_path/'a.mgz').affine)

def test_names_that_clash(tmp_path):
    for s in ('s1','s2'):
        (tmp_path/s).mkdir()
        save(tmp_path/s/'t1.nii.gz', draw_volume())
    t = predict_scans(rule(), tmp_path, tmp_path/'out', progress=False)
    assert sorted(t['name'])==['s1_t1','s2_t1'] and (tmp_path/'out'/'s2_t1_dseg.nii.gz').is_file()

def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    f,out = save(tmp_path/'a.nii.gz', draw_volume()), tmp_path/'out'
    def fail(im, path):
        path.write_bytes(b'half')
        raise OSError('disk full')
    monkeypatch.setattr(nib.Nifti1Image, 'to_filename', fail)
    t = predict_scans(rule(), f, out, progress=False)
    assert 'disk full' in t.attrs['failed'][0][1] and not [o for o in out.rglob('*') if o.is_file()]

def test_colin27_however_it_is_stored(tmp_path):
    "One real head as it is, in LPI and with sagittal slices: the same measure, the same mask, and the whole of the slab"
    im = nib.load(dataset('colin27')/'colin27_T1w_brain.nii.gz')
    files = [save(tmp_path/f'{o}.nii', np.asarray(im.dataobj), im.affine, o) for o in ('RAS','LPI','ASR')]
    ps = [predict_scan(rule((55,70), size=256), f) for f in files]
    first = ps[0].rows[0]
    assert first['area_mm2']>300 and .01<first['ventricle_brain_ratio']<.3
    for p in ps:
        assert p.rows[0]['area_mm2']==pytest.approx(first['area_mm2'], rel=.005) and (p.mask==ps[0].mask).all()
        assert p.native().shape==nib.load(p.scan.path).shape

def test_a_head_for_a_model_of_brains_is_flagged():
    from brainseg_fastai.trust import fit_reference, scan_features
    pics = [np.array(Image.open(p)) for p in sorted((dataset('adni_like')/'brain').glob('*.png'))]
    model = rule((60,66), size=256, reference=fit_reference([scan_features(a, 1.) for a in pics]))
    p = predict_scan(model, dataset('colin27')/'colin27_T1w_head.nii.gz')
    assert any('skull' in o for o in p.flags), p.flags

def test_the_inner_width_of_the_skull_is_that_of_the_stripped_brain():
    d = dataset('colin27')
    head,brain = (read_scan(d/f'colin27_T1w_{o}.nii.gz') for o in ('head','brain'))
    for k in (75, 85, 95):
        want = widths(brain.image[:,:,k]>0).max()
        hole = np.zeros(head.extent[:2], bool)
        hole[85:95,100:120] = True
        assert inner_width(head.image[:,:,k], hole, (1,1))==pytest.approx(want, rel=.04)
