"The parts that the app builds on, played by a threshold, so that its tests need no training: put in place of `bundles` and `prediction`"
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nibabel as nib, numpy as np
from PIL import Image
from brainseg_fastai.cases import DataError

BUNDLE = dict(labels=[dict(code=255, name='bright', colour='#ff8c00')], settings=dict(kind='orig', mode='slice'), channels=['orig'], spacing=[1,1])

def load_bundle(path): return SimpleNamespace(bundle=BUNDLE)

@dataclass
class Prediction:
    name:str; path:Path; scan:object; mask:np.ndarray; source:object; spacing:object
    quality, predicted, notes = .9, dict(text='0.91 (90 % interval 0.82 to 0.97)'), ['One note.']
    @property
    def flags(self): return ['Very bright.'] if self.scan.image.mean()>100 else []
    @property
    def rows(self):
        n = int(self.mask.sum()); mm = self.scan.spacing
        return [dict(name=self.name, label='bright', code=255, area_px=n if self.mask.ndim==2 else None, area_mm2=float(n*np.prod(mm)) if mm and self.mask.ndim==2 else None,
                     volume_ml=float(n*np.prod(mm)/1000) if self.mask.ndim==3 else None, slices=None)]

def predict_scan(learn, path, spacing=None):
    "Everything brighter than 128"
    path = Path(path)
    try:
        if path.name.endswith(('.nii','.nii.gz')):
            source = nib.load(path); im = nib.as_closest_canonical(source)
            image,mm = np.asarray(im.dataobj), tuple(map(float, im.header.get_zooms()))
        else: source,image,mm = None, np.array(Image.open(path).convert('L')), (spacing,spacing) if spacing else None
    except Exception as e: raise DataError.of(path, f'a file that cannot be read ({type(e).__name__})', 'a scan', 'Copy it again.') from e
    if path.name.startswith('boom'): raise RuntimeError('nobody foresaw this')
    return Prediction(path.stem, path, SimpleNamespace(image=image, spacing=mm), (image>128).astype(np.uint8), source, spacing)

def write_prediction(p, out):
    "The mask in the geometry of the scan"
    out = Path(out); out.mkdir(parents=True)
    if p.source is None:
        Image.fromarray(p.mask*255).save(out/f'{p.name}_mask.png'); return out/f'{p.name}_mask.png'
    f = out/(p.path.name.split('.')[0]+'_dseg.nii.gz')
    nib.save(nib.Nifti1Image((np.asarray(p.source.dataobj)>128).astype(np.uint8)*255, p.source.affine), f)
    return f

def put_in_place():
    "From now on `import brainseg_fastai.bundles` and `.prediction` give what is here"
    for name,keys in (('bundles', ['load_bundle']), ('prediction', ['predict_scan','write_prediction'])):
        m = ModuleType(f'brainseg_fastai.{name}'); vars(m).update({k: globals()[k] for k in keys}); sys.modules[m.__name__] = m
