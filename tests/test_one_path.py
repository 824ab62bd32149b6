"The masks that a training was scored with are those that `brainseg predict` gives a user of its bundle, pixel for pixel"
import shutil
from pathlib import Path

import nibabel as nib, numpy as np, pytest, torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from brainseg_fastai.adni import ADNI
from brainseg_fastai.brats import LAYOUT as BRATS
from brainseg_fastai.cases import standin
from brainseg_fastai.ibsr import LAYOUT as IBSR
from brainseg_fastai.images import Pixels, raw_mask
from brainseg_fastai.lgg import LAYOUT as LGG
from brainseg_fastai.prediction import predict_scans
from brainseg_fastai.runs import train_run
from brainseg_fastai.settings import Settings
from helpers import make_folder

def change(root, axes='PSR'):
    "Store all volumes below a folder in another order of axes; those of every other folder are smaller, of larger voxels"
    for i,d in enumerate(sorted({f.parent for f in root.rglob('*.nii*')})):
        for f in sorted(d.glob('*.nii*')):
            im = nib.load(f)
            if i%2==0: im = nib.Nifti1Image(np.asarray(im.dataobj)[2:-4,3:], im.affine @ np.diag([1.07,1.07,1,1]))
            im = im.as_reoriented(ornt_transform(io_orientation(im.affine), axcodes2ornt(axes)))
            nib.save(nib.Nifti1Image(np.array(im.dataobj), im.affine), f)

def trained(layout, root, folder, unit='slice', **settings):
    "A run of a few epochs, and its cases"
    cases = layout.cases(root, settings['inputs']) if layout is ADNI else layout.cases(root, settings['inputs'], unit=unit)
    if unit=='slice' and layout in (BRATS, IBSR): # where there is something to find
        cases = cases[[raw_mask(o).any() for o in cases['mask']]].groupby('subject').head(6)
    people = list(dict.fromkeys(cases['subject']))
    sides = dict(zip(people, ['test','test','valid']))
    cases = cases.assign(split=[sides.get(o, 'train') for o in cases['subject']]).reset_index(drop=True)
    small = Settings(**dict(arch='unet', depth=2, width=4, size=64, epochs=3, pretrained=False, loss='dice_ce') | settings)
    return train_run(cases, folder, small, layout), cases

def scan_of(image):
    "The file, or the folder of several, that a user would give for the scan of a case"
    files = image.files if isinstance(image, Pixels) else [image]
    return files[0] if len(files)==1 else str(Path(files[0]).parent)

WAYS = dict(
    slices=(ADNI, dict(inputs='brain')),
    channels=(LGG, dict(inputs='flair+post')),
    volume_slices=(IBSR, dict(inputs='t1')),
    sequences=(BRATS, dict(inputs='flair+t1ce')),
    patches=(IBSR, dict(inputs='t1', mode='patch', arch='unet3d', patch=(16,16,16))),
    volumes=(IBSR, dict(inputs='t1', mode='volume', arch='unet3d')))

PUT_TOGETHER = 'volume_slices','sequences' # slices that are scored as the volumes that they come from

@pytest.mark.parametrize('way', WAYS)
def test_what_was_scored_is_what_one_gets(tmp_path, way):
    torch.set_num_threads(1)
    layout,settings = WAYS[way]
    if settings.get('mode'): pytest.importorskip('torchio')
    root = make_folder(tmp_path/'data', 5, 2) if layout is ADNI else shutil.copytree(standin(layout, n=4), tmp_path/'data')
    change(root)
    run,cases = trained(layout, root, tmp_path/'run', 'volume' if settings.get('mode') else 'slice', **settings)
    scans = list(dict.fromkeys(map(scan_of, run.scores['image'])))
    out = tmp_path/'out'
    t = predict_scans(run.folder, scans, out, progress=False)
    assert not t.attrs['failed'], t.attrs['failed']
    masks = {f: next(out.glob(f'{n}_dseg.*[zg]')) for f,n in zip(scans, dict.fromkeys(t['name']))}
    known = {f: [o.index for o in g] for f,g in cases['image'].groupby(cases['image'].map(scan_of))} if way in PUT_TOGETHER else {}
    found = 0
    for image,scored in zip(run.scores['image'], run.scores['prediction']):
        ks = known.get(scan_of(image), slice(None)) # slices that were not in the table were not scored
        got,want = (raw_mask(o)[...,ks] for o in (masks[scan_of(image)], scored))
        assert got.shape==want.shape and (got==want).all(), (image, (got!=want).mean())
        found += (want>0).sum()
    assert found, 'empty masks prove nothing'
