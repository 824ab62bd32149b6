"Which scan is this? A mask, a row and a name belong to one scan, whatever two files have in common"
import os, shutil
from pathlib import Path

import nibabel as nib, numpy as np, pandas as pd, pytest

from brainseg_fastai.core import DataError
from brainseg_fastai.images import volume_facts
from brainseg_fastai.prediction import predict_scans
from brainseg_fastai.scans import find_scans_to_predict
from scan_files import draw_volume, save
from test_prediction import rule

def mask_of(out, row): return np.asarray(nib.load(out/row['mask']).dataobj)

def agrees(out, n):
    "The table of a folder: `n` rows, each with a mask of its own that has the area it tells of"
    t = pd.read_csv(out/'volumes.csv')
    masks = sorted(p.relative_to(out).as_posix() for p in out.rglob('*_dseg.nii.gz'))
    assert len(t)==n==t['mask'].nunique() and sorted(t['mask'])==masks
    for r in t.to_dict('records'):
        assert (mask_of(out, r)>0).sum((0,1)).max()==r['area_px'], r['name']
    return t.set_index('mask')

@pytest.fixture
def twins(tmp_path):
    "Two subjects' files of one name, size and time"
    paths = []
    for k,grow in (('subA',1), ('subB',1.3)):
        a = draw_volume()
        if grow>1: a = np.roll(a, 3, 1); a[20:30,20:30] = 0
        p = tmp_path/k/'T1.nii'
        p.parent.mkdir()
        save(p, a.astype(np.int16))
        os.utime(p, ns=(10**18, 10**18))
        paths.append(p)
    a,b = (p.stat() for p in paths)
    assert (a.st_size, a.st_mtime_ns)==(b.st_size, b.st_mtime_ns)
    return paths

def test_two_scans_of_one_name_one_after_the_other(twins, tmp_path):
    out = tmp_path/'out'
    one,two = (predict_scans(rule(), p, out, progress=False).area_px.item() for p in twins)
    assert one!=two
    t = agrees(out, 2)
    assert set(t.area_px)=={one, two}
    again = predict_scans(rule(), twins, out, progress=False)
    assert again.area_px.tolist()==[one, two] and len(agrees(out, 2))==2

def test_a_scan_that_was_replaced_is_predicted_anew(twins, tmp_path):
    "Size and time are the same as before, as after `rsync -t` or from an archive"
    a,b = twins
    out = tmp_path/'out'
    one = predict_scans(rule(), a, out, progress=False).area_px.item()
    two = predict_scans(rule(), b, tmp_path/'other', progress=False).area_px.item()
    facts = volume_facts(a)['sha']
    a.write_bytes(b.read_bytes()); os.utime(a, ns=(10**18, 10**18))
    assert volume_facts(a)['sha']!=facts
    assert predict_scans(rule(), a, out, progress=False).area_px.item()==two!=one
    agrees(out, 1)

def test_scans_that_were_moved_keep_their_names(twins, tmp_path):
    "Also two of the same bytes: each has a mask and a row of its own"
    out = tmp_path/'out'
    predict_scans(rule(), twins[0], out, progress=False)
    (tmp_path/'new').mkdir()
    moved = [tmp_path/'new/T1.nii', tmp_path/'new/copy.nii']
    shutil.copy(twins[0], moved[1]); twins[0].rename(moved[0])
    t = predict_scans(rule(), moved, out, progress=False)
    assert t['name'].tolist()==['T1','copy'] and len(agrees(out, 2))==2

def test_images_named_by_uids_keep_apart(tmp_path):
    from brainseg_fastai.segmentation import save_prediction
    from types import SimpleNamespace as Case
    names = [f'1.2.840.113619.{i}.{s}' for i in range(4) for s in ('1','2','3')] + ['a#z1','a#z2']
    files = {save_prediction(np.zeros((4,4), np.uint8), Case(image=tmp_path/'brain'/f'{n}.png', inputs='brain'), tmp_path/'p', (0,255)) for n in names}
    assert len(files)==len(names)

def test_a_second_model_does_not_mix_with_the_first(twins, tmp_path):
    out = tmp_path/'out'
    predict_scans(rule(), twins[0], out, progress=False)
    before = {p: p.read_bytes() for p in out.rglob('*') if p.is_file()}
    with pytest.raises(DataError, match='another model'): predict_scans(rule(sha256='y'), twins[1], out, progress=False)
    assert before=={p: p.read_bytes() for p in out.rglob('*') if p.is_file()}

def test_a_lost_picture_or_mask_is_made_again(twins, tmp_path):
    out = tmp_path/'out'
    predict_scans(rule(), twins, out, progress=False)
    next((out/'qc').glob('*.png')).unlink()
    predict_scans(rule(), twins[1], out, progress=False)
    predict_scans(rule(), twins, out, progress=False)
    assert len([*(out/'qc').glob('*.png')])==2
    next(out.glob('*_dseg.nii.gz')).unlink()
    predict_scans(rule(), twins, out, progress=False)
    agrees(out, 2)

def test_another_flag_and_a_deleted_scan_leave_a_table_that_is_right(twins, tmp_path):
    out = tmp_path/'out'
    predict_scans(rule(), twins, out, progress=False)
    t = predict_scans(rule(), twins[0], out, slab=(5,8), progress=False) # one of them with another flag
    table = agrees(out, 2).set_index('name')
    assert table.loc[t['name'].item(), 'area_px']==t.area_px.item() and table.loc[t['name'].item(), 'slices']==t.slices.item()
    twins[1].unlink() # its mask stays, and so does its row
    predict_scans(rule(), twins[0].parent, out, progress=False)
    agrees(out, 2)

def test_results_are_no_scans(twins, tmp_path, monkeypatch):
    "`predict . --out results`, again and again"
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        t = predict_scans(rule(), Path('.'), Path('results'), progress=False)
        assert len(t)==2
    assert len(find_scans_to_predict('.', ('brain',)))==2 # results from elsewhere are none either

def freesurfer(root, subject):
    "The `mri` folder of a subject, as FreeSurfer leaves it"
    names = 'T1 orig nu brain brainmask norm aseg aparc+aseg ribbon wmparc wm filled lh.ribbon rh.ribbon orig_nu rawavg wm.seg'.split()
    for n in names: save(root/subject/'mri'/f'{n}.mgz', draw_volume().astype(np.int16))
    save(root/subject/'mri/orig/001.mgz', draw_volume().astype(np.int16))
    return root/subject

@pytest.mark.parametrize('inputs,file', [('orig','T1.mgz'), ('brain','brain.mgz')])
def test_a_freesurfer_subject_is_one_scan(tmp_path, inputs, file):
    for k in 'ab': freesurfer(tmp_path/'subjects', k)
    for where in ('subjects', 'subjects/a', 'subjects/a/mri'):
        found = find_scans_to_predict(tmp_path/where, (inputs,))
        assert [p.name for p in found]==[file]*(2 if where=='subjects' else 1)
    t = predict_scans(rule(inputs=inputs), tmp_path/'subjects', tmp_path/'out', progress=False)
    assert t['name'].tolist()==['a','b']
    agrees(tmp_path/'out', 2)

def test_label_maps_are_no_scans(tmp_path):
    names = ('x_T1w.nii.gz','x_desc-brain_mask.nii.gz','x_label-GM_probseg.nii.gz','x_brainmask.nii.gz','x_segTRI_fill_ana.nii.gz','aseg.nii.gz')
    for n in names: save(tmp_path/'d'/n, draw_volume().astype(np.int16))
    assert [p.name for p in find_scans_to_predict(tmp_path/'d', ('brain',))]==['x_T1w.nii.gz']

def test_bids_trees_are_found(tmp_path):
    for s in ('01','02'):
        for e in ('a','b'):
            d = tmp_path/f'sub-{s}/ses-{e}/anat'
            for k in ('T1w','T2w','FLAIR'): save(d/f'sub-{s}_ses-{e}_{k}.nii.gz', draw_volume().astype(np.int16))
    save(tmp_path/'sub-01/ses-a/dwi/sub-01_ses-a_dwi.nii.gz', draw_volume().astype(np.int16))
    assert [p.name for p in find_scans_to_predict(tmp_path, ('brain',))]==[f'sub-{s}_ses-{e}_T1w.nii.gz' for s in ('01','02') for e in 'ab']
