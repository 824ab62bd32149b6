"Train on simulated heads alone, then meet real ones: Dice and volume of the ventricles, by the axis of the slices"
import argparse, math, os, time
from pathlib import Path

import nibabel as nib, numpy as np, pandas as pd, torch
from monai.losses import DiceCELoss
from nibabel.processing import resample_from_to
from scipy import ndimage as ndi
from torch.utils.data import DataLoader, Dataset
from brainseg_fastai.images import read_image
from brainseg_fastai.networks import build_model, load_weights, plain_batch, save_weights
from brainseg_fastai.scans import read_scan
from brainseg_fastai.settings import Settings
from brainseg_fastai.simulator import load_head, simulated_slices

VENTRICLES = 4, 5, 14, 43, 44 # FreeSurfer's lateral ventricles with lower horns, and the third
HEADS = { # scan: labels
    'real_heads/ecog/mri/T1.mgz': 'real_heads/ecog/mri/aseg.mgz',
    'real_heads/ecog/mri/brainmask.mgz': 'real_heads/ecog/mri/aseg.mgz',
    'real_heads/bert/mri/brainmask.mgz': 'real_heads/bert/mri/aseg.mgz',
    'real_heads/mrtrix_fs/mri/norm.mgz': 'real_heads/mrtrix_fs/mri/aparc+aseg.mgz',
    'real_heads/mrtrix_bids/sub-01_T1w.nii.gz': 'real_heads/mrtrix_bids/aparc+aseg.mgz',
    'colin27/colin27_T1w_head.nii.gz': None, 'colin27/colin27_T1w_brain.nii.gz': None}

class Slices(Dataset):
    "Batches of fresh heads, by number"
    def __init__(self, seed, n=8): self.seed,self.n = seed,n
    def __len__(self): return 10**6
    def __getitem__(self, i):
        torch.set_num_threads(1)
        images,masks = simulated_slices(self.seed*10**7+i, self.n)
        return torch.from_numpy(images).float()[:,None], torch.from_numpy(masks).long()[:,None]

def normalised(x):
    sd,mean = torch.std_mean(x, (2,3), keepdim=True)
    return plain_batch((x-mean)/sd.clamp(min=1e-6))

def train(net, minutes, seed, lr=4e-3, warm=.05):
    "One cosine over the time that there is; grey levels are shifted and scaled a little, as another background would"
    loss,g = DiceCELoss(to_onehot_y=True, softmax=True, batch=True), torch.Generator().manual_seed(seed)
    opt = torch.optim.AdamW(net.parameters(), lr, betas=(.9,.99), eps=1e-5, weight_decay=1e-2, fused=True)
    began = time.time()
    for i,(x,y) in enumerate(DataLoader(Slices(seed), batch_size=None, num_workers=1, prefetch_factor=8)):
        done = (time.time()-began)/60/minutes
        if done>=1: return i
        share = done/warm if done<warm else (1+math.cos(math.pi*(done-warm)/(1-warm)))/2
        for o in opt.param_groups: o['lr'] = lr*share
        change = torch.randn(2, len(x), 1, 1, 1, generator=g)
        l = loss(net(plain_batch(normalised(x)*(1+.15*change[0])+.2*change[1])).float(), y)
        opt.zero_grad()
        l.backward()
        opt.step()
        if i%100==0: print(f'{i} batches, {100*done:.0f} % of the time, loss {l.item():.3f}', flush=True)

@torch.inference_mode()
def margin(net, pictures, flips=True):
    "By how much ventricle outweighs background in each pixel (N,H,W)"
    res = []
    for x in torch.from_numpy(np.ascontiguousarray(pictures)).float()[:,None].split(8):
        x = normalised(x)
        y = net(x).float()
        if flips: y = y+net(x.flip(-1)).float().flip(-1)
        res.append(y[:,1]-y[:,0])
    return torch.cat(res).numpy()

def along_axes(net, a):
    "Margins of a volume at 1 mm, cut along each axis, and their mean"
    def axial(v): return np.rot90(np.moveaxis(margin(net, np.moveaxis(np.rot90(v), 2, 0)), 0, 2), -1)
    def coronal(v): return margin(net, v.transpose(1, 2, 0)[:,::-1])[:,::-1].transpose(2, 0, 1)
    def sagittal(v): return margin(net, v.transpose(0, 2, 1)[:,::-1], False)[:,::-1].transpose(0, 2, 1)
    res = dict(axial=axial(a), coronal=coronal(a), sagittal=sagittal(a))
    return res | dict(all=sum(res.values())/3)

def large_parts(m):
    parts,n = ndi.label(m)
    size = np.bincount(parts.ravel(), minlength=n+1)
    size[0] = 0
    return np.isin(parts, np.flatnonzero(size>=.05*max(1, size.max()))) & m

def dice(a, b): return 2*(a&b).sum()/max(1, a.sum()+b.sum())

def truth_of(file, scan):
    "The label's ventricles on the grid of a scan"
    im,to = (nib.as_closest_canonical(o) for o in (nib.load(file), scan.like))
    m = nib.Nifti1Image(np.isin(np.asanyarray(im.dataobj), VENTRICLES).astype(np.float32), im.affine)
    return np.asanyarray(resample_from_to(m, (to.shape[:3], to.affine), order=1).dataobj)>.5

def heads(net, data):
    for name,label in HEADS.items():
        scan = read_scan(data/name)
        mm = np.array(scan.spacing)
        a = scan.image if abs(mm-1).max()<.05 else ndi.zoom(scan.image.astype(np.float32), mm, order=1)
        truth = truth_of(data/label, scan) if label else None
        for axis,v in along_axes(net, a).items():
            if v.shape!=scan.extent: v = ndi.zoom(v, np.divide(scan.extent, v.shape), order=1)
            m,ml = large_parts(v>0), np.prod(mm)/1000
            more = {} if truth is None else dict(dice=dice(m, truth), truth_ml=truth.sum()*ml)
            yield dict(scan=name, axis=axis, ml=m.sum()*ml) | more

def slices(net, data):
    for f in sorted((data/'oasis_slices'/'brain').glob('*.png')):
        truth = read_image(f.parents[1]/'mask'/f.name.replace('brain', 'mask'))>0
        yield dict(scan=f.name, axis='axial', dice=dice(margin(net, read_image(f)[None])[0]>0, truth))

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--out', type=Path, default=Path('real_heads'), help='folder for weights and table')
    p.add_argument('--minutes', type=float, default=22, help='time to train')
    p.add_argument('--seed', type=int, default=2)
    a = p.parse_args()
    data = Path(os.environ.get('BRAINSEG_DATA', ''))
    if not (data/'real_heads').is_dir():
        p.error('BRAINSEG_DATA names no folder with real_heads, oasis_slices and colin27')
    torch.manual_seed(a.seed)
    net = build_model(Settings(pretrained=False), 1, 2).to(memory_format=torch.channels_last)
    weights = a.out/'model.safetensors'
    a.out.mkdir(parents=True, exist_ok=True)
    load_head() # once, before there are processes
    if weights.exists(): load_weights(net, weights)
    else:
        print(train(net.train(), a.minutes, a.seed), 'batches')
        save_weights(net, weights)
    table = pd.DataFrame([*slices(net.eval(), data), *heads(net, data)]).round(3)
    table.to_csv(a.out/'table.csv', index=False)
    print(table.to_string())

if __name__=='__main__': main()
