"Batches, augmentation, callbacks and training that can be interrupted, on tiny images"
import pickle
from pathlib import Path

import matplotlib; matplotlib.use('Agg')
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import (Callback, CrossEntropyLossFlat, DataBlock, ImageBlock, Learner, MaskBlock, PILMask, nn, set_seed)
from PIL import Image

from brainseg_fastai.images import read_image
from brainseg_fastai.networks import build_model, class_shares, make_loss
from brainseg_fastai.settings import Settings
from brainseg_fastai.steps import make_steps
from brainseg_fastai.training import (Bend, Checkpoint, FastBatches, ImageZScore, InMemory, ReadImage, ReadMask,
                                      SquarePad, TensorScan, adamw, augment_tfms, augmentation, dice_per_image, environment, fit_recipe, normaliser)
from helpers import make_folder

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def table(root, n=6, scans=2):
    "Case table of a tiny folder: the last two subjects are for validation"
    images = sorted((make_folder(root, n, scans)/'brain').iterdir())
    masks = [root/'mask'/o.name.replace('brain','mask') for o in images]
    return pd.DataFrame(dict(image=images, mask=masks, split=['train' if i<len(images)-2*scans else 'valid' for i in range(len(images))]))

@pytest.fixture(scope='module')
def cases(tmp_path_factory): return table(tmp_path_factory.mktemp('training')/'data')

def loaders(cases, size=64, bs=2, codes=(0,255), rgb=False, augment=True, **kwargs):
    "What story 1's DataBlock does, from this room's pieces"
    block = DataBlock((ImageBlock(TensorScan), MaskBlock(codes=np.array(codes))), get_items=lambda t: t.reset_index(drop=True),
                      splitter=lambda t: [np.flatnonzero(t['split']==o).tolist() for o in ('train','valid')],
                      get_x=InMemory(ReadImage(rgb), 'image'), get_y=InMemory(ReadMask(codes), 'mask'), item_tfms=SquarePad(size),
                      batch_tfms=[*(augment_tfms(**kwargs) if augment else []), normaliser(rgb)])
    return block.dataloaders(cases, bs=bs, num_workers=0)

def learner(cases, size=64, cbs=(), **kwargs):
    "A learner of the light recipe"
    dls = loaders(cases, size, **kwargs)
    s = Settings(size=size, pretrained=False)
    net = build_model(s, 1, 2, shares=class_shares(dls.train_ds, (0,255)))
    return Learner(dls, net, make_loss('dice_ce'), metrics=dice_per_image, opt_func=adamw, wd=s.how['wd'],
                   cbs=[FastBatches(window=.75), *cbs])

def leftovers(folder): return [p.name for p in Path(folder).rglob('*') if p.name.startswith('.') or 'tmp' in p.suffix]

# ---- What makes training quick

class Watch(Callback):
    "What the network gets, in which part of training, and its weights after each step"
    order = 70
    def before_fit(self): self.seen,self.weights,self.valid = [],[],[]
    def after_pred(self):
        if self.training: self.seen.append((float(self.pct_train), self.x.clone(), self.y.clone()))
    def after_batch(self):
        if self.training: self.weights.append([o.detach().clone() for o in self.model.parameters()])
    def after_validate(self): self.valid.append([o.detach().clone() for o in self.model.parameters()])

def watched(cases, epochs=3):
    set_seed(0, reproducible=True)
    learn = learner(cases, size=128, cbs=[Watch()])
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2)
    return learn

def test_windows_first_whole_images_later(cases):
    learn = watched(cases)
    until,seen = learn.fast_batches.until, learn.watch.seen
    widths = {x.shape[-1] for share,x,_ in seen if share<until}
    later = {x.shape[-1] for share,x,_ in seen if share>=until}
    assert widths=={96} and later=={128}
    assert all(x.shape[-2:]==y.shape[-2:] and type(x) is torch.Tensor and x.is_contiguous(memory_format=torch.channels_last) for _,x,y in seen)

def test_a_window_is_the_same_piece_of_image_and_mask(cases):
    learn = learner(cases, size=128)
    learn.create_mbar,learn.training,learn.pct_train,corners = False, True, 0., set()
    for _ in range(20):
        y = torch.arange(128*128).view(1,128,128)
        learn.xb,learn.yb = (TensorScan(y[None].float()),), (y,)
        learn.fast_batches.before_batch()
        assert torch.equal(learn.xb[0][0].long(), learn.yb[0]) and learn.yb[0].shape==(1,96,96)
        corners.add(int(learn.yb[0][0,0,0]))
    assert len(corners)>10 # drawn anew each time

def test_images_are_read_once_while_there_is_room(tmp_path):
    reads,rows = [],table(tmp_path, 3, 1).to_dict('records')
    class Read(ReadImage):
        def __call__(self, case): reads.append(str(case['image'])); return super().__call__(case)
    for mb,times in ((1,1), (0,2)):
        reads.clear(); keep = InMemory(Read(), 'image', mb=mb)
        for case in rows+rows: assert np.array_equal(keep(case), read_image(case['image'])[None])
        assert len(reads)==times*len(rows)
    keep = InMemory(Read(), 'image')
    keep(rows[0])
    Image.fromarray(255-read_image(rows[0]['image'])).save(rows[0]['image']) # written anew: read anew
    assert np.array_equal(keep(rows[0]), read_image(rows[0]['image'])[None])

# ---- what a network sees

@pytest.mark.parametrize('h,w,size', [(96,61,96), (45,96,64), (33,60,128), (64,64,64)])
def test_padding_keeps_the_middle_and_the_shape_of_things(h, w, size):
    a = np.zeros((h,w), np.uint8); a[h//4:h//2, w//4:w//2] = 255
    fit = SquarePad(size)
    x,y = fit(TensorScan.create(a[None])), np.array(fit(PILMask.create(a//255)))
    assert x.shape==(1,size,size) and y.shape==(size,size) and x.dtype==torch.uint8 and set(np.unique(y))=={0,1}
    side = max(h, w)
    if side==size:
        left,right,top,bottom = fit.pads(h, w)
        assert np.array_equal(np.pad(a, ((top,bottom), (left,right))), x[0].numpy())
    where = lambda m: np.argwhere(m).mean(0)
    assert abs(where(x[0].numpy()>127)-where(y)).max() < 1
    assert y.mean()==pytest.approx((h//2-h//4)*(w//2-w//4)/side**2, rel=.15) # scaled alike along both axes

def test_channels_and_z_scores(tmp_path):
    a = np.random.default_rng(0).integers(1, 255, (20,30), dtype=np.uint8)
    Image.fromarray(a).save(tmp_path/'a.png')
    case = dict(image=tmp_path/'a.png')
    assert ReadImage()(case).shape==(1,20,30) and np.array_equal(ReadImage(rgb=True)(case), np.stack([a]*3))
    steps = make_steps('zscore')
    x = ReadImage(steps=steps)(case)
    assert 0<=x.min() and x.max()<=255
    back = normaliser(steps=steps)(TensorScan(torch.from_numpy(x[None]/255).float()))
    np.testing.assert_allclose(back[0,0].numpy(), steps(a), atol=1e-4)
    three = ReadImage(rgb=True).channels(np.stack([a]*2, -1))
    assert three.shape==(2,20,30) # sequences are not repeated

def test_augmentation_is_random_in_training_alone(cases):
    batches = lambda seed, dls: (set_seed(seed), [x for loader in dls for x,_ in loader])[1]
    plain,aug = loaders(cases, augment=False), loaders(cases)
    plain.train.shuffle = aug.train.shuffle = False
    assert all(torch.equal(a, b) for a,b in zip(batches(1, plain), batches(2, plain)))
    assert all(torch.equal(a, b) for a,b in zip(batches(1, aug), batches(1, aug)))
    a,b = batches(1, aug), batches(2, aug)
    n = len(aug.train)
    assert not any(torch.equal(x, y) for x,y in zip(a[:n], b[:n])) and all(torch.equal(x, y) for x,y in zip(a[n:], b[n:]))

def test_augmentation_moves_mask_with_image(cases):
    dls = loaders(cases.assign(image=cases['mask']), max_lighting=0) # the image is its own mask
    def found(x): # brighter than the middle between the darkest and the brightest pixel
        mid = (x.amin((2,3), keepdim=True)+x.amax((2,3), keepdim=True))/2
        return torch.cat([mid-x, x-mid], 1)
    seen = [(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for _ in range(3) for x,y in dls.train]
    assert np.mean([dice_per_image(found(x), y).item() for x,y in seen]) > .95
    assert all(len(set(y.sum((1,2)).tolist()))==2 for _,y in seen) # every time another size

def test_few_images_are_changed_more():
    more = augmentation('light', 15)
    assert more['max_rotate'] > 8 and more['bend'] > 0
    assert augmentation('light', 16)=={} and augmentation('published', 3)=={}

def test_augmentation_happens_where_the_batch_is():
    "Nothing but the random numbers is made on the processor: tensors without data would refuse to meet one that has some"
    x = torch.zeros(3,1,64,64, device='meta')
    bend = Bend(.1)
    bend.before_call(x)
    assert bend.shifts.device.type=='meta' and bend.shifts.shape==(3,64,64,2)
    z = ImageZScore()(TensorScan(x))
    assert z.device.type=='meta' and z.shape==x.shape

def test_pieces_pickle_and_show(cases):
    pieces = ReadImage(), ReadMask((0,255)), SquarePad(64), ImageZScore(), FastBatches(), make_loss('dice+ce')
    assert [type(o) for o in pickle.loads(pickle.dumps(pieces))]==[type(o) for o in pieces]
    loaders(cases, bs=4).show_batch(max_n=4, vmin=0, vmax=1)
    assert sum(len(ax.images) for ax in matplotlib.pyplot.gcf().axes) >= 4
    matplotlib.pyplot.close('all')

# ---- trained, interrupted, resumed

class Stop(Callback):
    "Ctrl-C at the end of an epoch, or within the next one's first batch"
    order = 66
    def __init__(self, after, within=False): self.after,self.within = after,within
    def after_epoch(self):
        if not self.within and self.epoch==self.after: raise KeyboardInterrupt
    def after_pred(self):
        if self.within and self.training and self.epoch==self.after+1: raise KeyboardInterrupt

def fit(cases, path, settings=Settings(epochs=3), cbs=(), **kwargs):
    "Train with a checkpoint at every epoch; the learner and the checkpoint"
    set_seed(7, reproducible=True)
    learn,ck = learner(cases, cbs=cbs), Checkpoint(path, every=0, **kwargs)
    with learn.no_bar(), learn.no_logging(): fit_recipe(learn, settings, ck)
    return learn,ck

def same(a, b): return all(torch.equal(x, y) for x,y in zip(a.model.state_dict().values(), b.model.state_dict().values()))
def curve(ck): return pd.DataFrame(ck.curve).drop(columns='seconds')

@pytest.fixture(scope='module')
def whole(cases, tmp_path_factory):
    torch.set_num_threads(1)
    return fit(cases, tmp_path_factory.mktemp('whole')/'checkpoint.pt')

@pytest.mark.parametrize('after,within', [(0,False), (1,True)])
def test_interrupted_and_resumed(whole, cases, tmp_path, after, within):
    path,seen = tmp_path/'checkpoint.pt', []
    with pytest.raises(KeyboardInterrupt): fit(cases, path, cbs=[Stop(after, within)])
    assert len(torch.load(path, weights_only=True)['curve'])==after+1 # nothing in it needs unpickling
    assert not leftovers(tmp_path)
    torch.rand(7); np.random.rand(7) # whatever happened in between
    class Epochs(Callback):
        def after_batch(self): seen.append(self.epoch)
    learn,ck = fit(cases, path, cbs=[Epochs()])
    assert min(seen)==after+1 # not from the beginning
    assert same(learn, whole[0])
    pd.testing.assert_frame_equal(curve(ck), curve(whole[1]))
    assert pd.DataFrame(ck.curve).seconds.is_monotonic_increasing

def test_same_seed_same_weights(whole, cases, tmp_path):
    learn,ck = fit(cases, tmp_path/'a.pt')
    assert same(learn, whole[0])
    pd.testing.assert_frame_equal(curve(ck), curve(whole[1]))

@pytest.mark.parametrize('after', [0, 1])
def test_resume_between_frozen_and_unfrozen(cases, tmp_path, after):
    "The published recipe trains twice: stopped at the end of the first part, or of the second part's first epoch"
    def learner():
        set_seed(7, reproducible=True)
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1))
        return Learner(loaders(cases, rgb=True), net, CrossEntropyLossFlat(axis=1), metrics=dice_per_image,
                       splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())])
    def fit(path, stop=None):
        learn,ck = learner(), Checkpoint(path, every=0)
        if stop: learn.add_cb(stop)
        fit_recipe(learn, Settings(recipe='published', epochs=4), ck)
        return learn,ck
    a,ck_a = fit(tmp_path/'a.pt')
    class At(Callback):
        order,n = 66,0
        def after_epoch(self):
            self.n += 1
            if self.n==after+2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(tmp_path/'b.pt', At())
    b,ck_b = fit(tmp_path/'b.pt')
    assert same(a, b)
    pd.testing.assert_frame_equal(curve(ck_a), curve(ck_b))
    assert [o['epoch'] for o in ck_b.curve]==[0,1,2,3]

def test_a_damaged_checkpoint_is_told_and_left(cases, tmp_path):
    (tmp_path/'checkpoint.pt').write_bytes(b'no checkpoint')
    with pytest.warns(UserWarning, match='checkpoint.pt: a damaged checkpoint'): assert Checkpoint(tmp_path/'checkpoint.pt').start_epoch==0

def test_no_code_is_read_from_a_checkpoint(tmp_path):
    class Evil:
        def __reduce__(self): return (Path.touch, (tmp_path/'ran',))
    torch.save(dict(phase=0, curve=[], epoch=Evil()), tmp_path/'checkpoint.pt')
    with pytest.warns(UserWarning, match='damaged'): Checkpoint(tmp_path/'checkpoint.pt')
    assert not (tmp_path/'ran').exists()

def test_best_weights_are_those_of_the_best_epoch(cases, tmp_path):
    from brainseg_fastai.networks import load_weights
    learn,ck = fit(cases, tmp_path/'a.pt', best=tmp_path/'best.safetensors', settings=Settings(epochs=4))
    load_weights(learn.model, tmp_path/'best.safetensors')
    with learn.no_bar(), learn.no_logging(): _,dice = learn.validate()
    assert dice==pytest.approx(max(o['valid_dice'] for o in ck.curve), abs=1e-6)

def test_fit_without_checkpoint_and_epochs_of_the_recipe(cases, monkeypatch):
    learn,asked = learner(cases), []
    monkeypatch.setattr(Learner, 'fit_one_cycle', lambda self, n, lr, **kwargs: asked.append((n, lr, kwargs['pct_start'])))
    fit_recipe(learn, Settings())
    learn.model.pretrained = True
    fit_recipe(learn, Settings(epochs=3))
    n = len(learn.dls.train_ds)
    assert asked==[(Settings().filled(n).epochs, 5e-3, .1), (3, slice(5e-4, 5e-3), .1)]
    monkeypatch.undo()
    with learn.no_bar(), learn.no_logging(): fit_recipe(learn, Settings(epochs=1))
    assert len(learn.recorder.values)==1

def test_cosine_anneals_from_the_start(cases):
    learn,rates = learner(cases), []
    class Rate(Callback):
        def after_batch(self):
            if self.training: rates.append(float(self.opt.hypers[-1]['lr']))
    learn.add_cb(Rate())
    with learn.no_bar(), learn.no_logging(): fit_recipe(learn, Settings(epochs=2, schedule='cosine'))
    n,top = len(rates), Settings().how['lr']
    want = [top/1e3 + (top-top/1e3)*(1+np.cos(np.pi*i/n))/2 for i in range(n)]
    np.testing.assert_allclose(rates, want, rtol=1e-4)

def test_interrupt_leaves_no_autocast(cases, monkeypatch):
    monkeypatch.setattr('brainseg_fastai.networks.fast_bf16', lambda device: True)
    learn = learner(cases)
    first = next(m for m in learn.model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        with pytest.raises(KeyboardInterrupt): fit_recipe(learn, Settings(epochs=1), Checkpoint(Path('none.pt'), every=float('inf')))
        assert not torch.is_autocast_enabled('cpu') # it would change the rounding of everything that follows
    finally: torch.set_autocast_enabled('cpu', False)

# ---- what is told of a training

def test_environment():
    e = environment('cpu')
    assert torch.__version__.startswith(e['torch']) and e['threads']==1 and e['device'].startswith('cpu (') and isinstance(e['bf16'], bool)
