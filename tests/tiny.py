"Tiny data sets in every native format, for tests to look at and to damage"
import gzip, importlib, shutil
from pathlib import Path

import nibabel as nib, numpy as np
from brainseg_fastai.cases import Layout, standin

def layout_of(name):
    "The layout of a story's module, such as 'brats'"
    m = importlib.import_module(f'brainseg_fastai.{name}')
    return m.ADNI if name=='adni' else m.LAYOUT

def tiny(layout, root, n=6):
    "A copy of the stand-in of a layout, or of that of this name, in the folder `root`, to do with as one likes"
    layout = layout if isinstance(layout, Layout) else layout_of(layout)
    return Path(shutil.copytree(standin(layout, n=n), root))

def cut(path, n=400):
    "Take `n` bytes from the end of a file"
    path.write_bytes(path.read_bytes()[:-n])

def change(path, f, affine=None):
    "Replace a volume's array by `f(array)`, and its affine if one is given"
    im = nib.load(path)
    nib.save(nib.Nifti1Image(f(np.array(im.dataobj)), im.affine if affine is None else affine), path)

def unzip(path):
    "`x.nii.gz` becomes `x.nii`"
    out = path.with_suffix('')
    out.write_bytes(gzip.decompress(path.read_bytes())); path.unlink()
    return out
