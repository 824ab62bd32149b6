"DataBlock, learner, scores and training runs, on tiny images"
import json, pickle, shutil, urllib.error, urllib.request, warnings
from pathlib import Path

import matplotlib; matplotlib.use('Agg')
import numpy as np, pandas as pd, pytest, torch
from fastai.layers import SelfAttention
from fastai.vision.all import (Callback, CrossEntropyLossFlat, DynamicUnet, Learner, Mish, TensorMask, load_learner, nn, resnet18, set_seed)
from PIL import Image
from torchvision.models import ResNet18_Weights

import brainseg_fastai.segmentation as seg
from brainseg_fastai.cases import DataError, adni_cases, mask_codes, read_image, read_mask
from brainseg_fastai.scores import score_mask
from brainseg_fastai.segmentation import (Checkpoint, MoveHeads, brainseg_block, brainseg_learner, dice_per_image, fit_recipe, load_run,
                                          make_learner, predict_cases, predict_ways, score_cases, split_cases, train_folds, train_run,
                                          with_split, written_beside)
from helpers import make_folder

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return make_folder(tmp_path_factory.mktemp('seg')/'data', 6, 2)

@pytest.fixture(scope='module')
def cases(folder):
    t = adni_cases(folder)
    return with_split(t, split_cases(t, 1, .2, .3, seed=1))

def tiny(cases, folder, **kwargs):
    "One short training run"
    return train_run(cases, folder, **{**dict(epochs=1, size=64, pretrained=False, arch=resnet18), **kwargs})

def test_a_training_that_found_nothing_says_so(cases, tmp_path, monkeypatch):
    score = seg.score_cases
    monkeypatch.setattr(seg, 'score_cases', lambda *args, **kwargs: score(*args, **kwargs).assign(area_pred=0.))
    with pytest.warns(UserWarning, match=r'^brain, seed 42: the network found nothing in any of its \d+ test cases\. Its training got stuck'):
        tiny(cases, tmp_path/'run')

def settings(**kwargs):
    "What `make_learner` needs to know"
    return {**dict(kind='brain', recipe='light', arch='resnet18', size=64, codes=(0,255), bs=2, pretrained=False), **kwargs}

def rewrite(folder, change, kinds=('brain','mask')):
    "Replace every image of these kinds by what `change(kind, array, number)` makes of it"
    for k in kinds:
        for i,f in enumerate(sorted((folder/k).iterdir())): Image.fromarray(change(k, np.array(Image.open(f)), i)).save(f)
    return folder

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

def watched(cases, epochs=3, size=128, **kwargs):
    set_seed(0, reproducible=True)
    learn = make_learner(cases, settings(size=size, **kwargs)).add_cb(Watch())
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2)
    return learn

def test_windows_first_whole_images_later(cases):
    learn = watched(cases)
    widths = {x.shape[-1] for share,x,_ in learn.watch.seen if share<learn.fast_batches.until}
    later = {x.shape[-1] for share,x,_ in learn.watch.seen if share>=learn.fast_batches.until}
    assert widths=={96} and later=={128}
    assert all(x.shape[-2:]==y.shape[-2:] and type(x) is torch.Tensor and x.is_contiguous(memory_format=torch.channels_last) for _,x,y in learn.watch.seen)

def test_a_window_is_the_same_piece_of_image_and_mask(cases):
    learn = make_learner(cases, settings(size=128))
    learn.create_mbar,learn.training,learn.pct_train,corners = False, True, 0., set()
    for _ in range(20):
        y = torch.arange(128*128).view(1,128,128)
        learn.xb,learn.yb = (seg.TensorScan(y[None].float()),), (y,)
        learn.fast_batches.before_batch()
        assert torch.equal(learn.xb[0][0].long(), learn.yb[0]) and learn.yb[0].shape==(1,96,96)
        corners.add(int(learn.yb[0][0,0,0]))
    assert len(corners)>10 # drawn anew each time

def test_the_average_is_validated_and_kept(cases):
    learn = watched(cases, epochs=2)
    steps,mean = learn.watch.weights,None
    for n,new in enumerate(steps):
        keep = min(learn.average_weights.decay, (1+n)/(10+n))
        mean = new if mean is None else [keep*a+(1-keep)*b for a,b in zip(mean, new)]
    close = lambda a,b: all(torch.allclose(x, y, atol=1e-5) for x,y in zip(a, b))
    assert close(learn.model.parameters(), mean) and close(learn.watch.valid[-1], mean) and not close(steps[-1], mean)
    before = [o.detach().clone() for o in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging(): learn.validate()
    assert all(torch.equal(a, b) for a,b in zip(learn.model.parameters(), before)) # validating again changes nothing

def test_images_are_read_once_while_there_is_room(tmp_path):
    t = adni_cases(make_folder(tmp_path, 3, 1))
    reads = []
    class Read(seg.ReadImage):
        def __call__(self, case): reads.append(str(case['image'])); return super().__call__(case)
    rows = t.to_dict('records')
    for mb,times in ((1,1), (0,2)):
        reads.clear(); keep = seg.InMemory(Read(), 'image', mb=mb)
        for case in rows+rows: assert np.array_equal(keep(case), read_image(case['image'])[None])
        assert len(reads)==times*len(rows)
    keep = seg.InMemory(Read(), 'image')
    keep(rows[0])
    Image.fromarray(255-read_image(rows[0]['image'])).save(rows[0]['image']) # written anew: read anew
    assert np.array_equal(keep(rows[0]), read_image(rows[0]['image'])[None])

def test_guesses_start_at_the_share_of_each_class_in_the_training_masks(cases):
    dls = make_learner(cases, settings()).dls
    train = cases[cases.split=='train']
    share = np.mean([np.array(dls.train_ds[i][1])>0 for i in range(len(train))])
    bias = make_learner(cases, settings()).model.head[-1][0].bias.detach().numpy()
    assert 0<share<1 and np.allclose(np.exp(bias), (1-share, share), rtol=1e-4)
    blank = cases.assign(mask=[o if p=='train' else None for o,p in zip(cases['mask'], cases['split'])])
    assert np.allclose(make_learner(blank, settings()).model.head[-1][0].bias.detach().numpy(), bias) # no other mask is looked at
    bias = make_learner(cases, settings(codes=(0,7,255))).model.head[-1][0].bias.detach().numpy()
    assert np.allclose(np.exp(bias), (1-share, 1e-3, share), rtol=1e-4) # a class that is in no training mask

# ---- DataBlock

@pytest.mark.parametrize('mask_value,raw', [(255,(0,255)), (1,(0,1)), (None,(0,50,200))], ids=['0/255','0/1','multi-class'])
def test_batch(tmp_path, mask_value, raw):
    make_folder(tmp_path, 5, 1, mask_value=mask_value or 1)
    if mask_value is None: rewrite(tmp_path, lambda k,a,i: np.array([0,[50,200][i%2]], np.uint8)[a], ['mask'])
    t = adni_cases(tmp_path)
    if mask_value is None: # a mask with all three codes
        a = np.array(Image.open(t['mask'][0])); a[32:][a[32:]>0] = 200; Image.fromarray(a).save(t['mask'][0])
    codes = mask_codes(t['mask'])
    assert codes==raw
    dls = brainseg_block('brain', codes, 64).dataloaders(with_split(t, split_cases(t, 1)), bs=2, num_workers=0)
    x,y = dls.one_batch()
    assert x.shape==(2,1,64,64) and y.shape==(2,64,64) and y.dtype==torch.int64
    assert x.mean((1,2,3)).abs().max() < 1e-4 and x.std((1,2,3)).sub(1).abs().max() < 1e-2
    for loader in dls: assert set(torch.cat([b[1].flatten() for b in loader]).tolist()) <= set(range(len(codes)))
    for case,(img,mask) in zip(dls.valid.items.itertuples(), dls.valid_ds):
        assert np.array_equal(np.array(mask), read_mask(case.mask, codes)) and np.array_equal(np.array(img)[0], read_image(case.image))
    rgb = brainseg_block('brain', codes, 64, rgb=True).dataloaders(with_split(t, split_cases(t, 1)), bs=2, num_workers=0)
    assert rgb.one_batch()[0].shape==(2,3,64,64)

def test_kind_picks_rows(folder, cases):
    both = pd.concat([cases, adni_cases(folder, 'orig').assign(split=cases.split)], ignore_index=True).sample(frac=1, random_state=0)
    for kind in 'brain','orig':
        ds = brainseg_block(kind, size=64).datasets(both)
        for t,part in ((ds.train,'train'), (ds.valid,'valid')):
            assert set(t.items.kind)=={kind} and set(t.items.subject)==set(cases.subject[cases.split==part])
        assert set(brainseg_block(kind, size=64).datasets(folder).items.kind)=={kind}
    with pytest.raises(DataError, match='flair'): brainseg_block('flair', size=64).datasets(both)

def test_block_pickles_and_shows(cases):
    block = pickle.loads(pickle.dumps(brainseg_block('brain', size=64)))
    dls = block.dataloaders(cases, bs=4, num_workers=0)
    dls.show_batch(max_n=4, vmin=0, vmax=1)
    fig = matplotlib.pyplot.gcf()
    assert sum(len(ax.images) for ax in fig.axes) >= 4
    matplotlib.pyplot.close('all')

def test_augment(cases):
    batches = lambda seed, dls: (set_seed(seed), [x for loader in dls for x,_ in loader])[1]
    make = lambda augment: brainseg_block('brain', size=64, augment=augment).dataloaders(cases, bs=2, num_workers=0, shuffle=False)
    plain,aug = make(False), make(True)
    assert all(torch.equal(a, b) for a,b in zip(batches(1, plain), batches(2, plain)))
    assert all(torch.equal(a, b) for a,b in zip(batches(1, aug), batches(1, aug)))
    a,b = batches(1, aug), batches(2, aug)
    n = len(aug.train)
    assert not any(torch.equal(x, y) for x,y in zip(a[:n], b[:n])) and all(torch.equal(x, y) for x,y in zip(a[n:], b[n:]))

def test_augmentation_moves_mask_with_image(folder, cases):
    t = cases.assign(image=cases['mask']) # the image is its own mask
    dls = brainseg_block('brain', size=64, max_lighting=0).dataloaders(t, bs=2, num_workers=0)
    seen = [(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for _ in range(3) for x,y in dls.train]
    assert np.mean([dice_per_image(Oracle()(x), y).item() for x,y in seen]) > .95
    assert all(len(set(y.sum((1,2)).tolist()))==2 for _,y in seen) # every time another size

# ---- scores

class Oracle(nn.Module):
    "Finds what is brighter than the middle between the darkest and the brightest pixel"
    def forward(self, x):
        x = x[:,:1]
        mid = (x.amin((2,3), keepdim=True)+x.amax((2,3), keepdim=True))/2
        return torch.cat([mid-x, x-mid], 1)

def oracle(table, size):
    learn = make_learner(with_split(table, split_cases(table, 1)), settings(codes=mask_codes(table['mask']), size=size))
    learn.model = Oracle()
    return learn

def cut(folder, shapes):
    "Crop images and masks to these shapes, and make the image show the mask and nothing else"
    def change(kind, a, i):
        h,w = shapes[i % len(shapes)]
        top,left = ((o-n)//2 for o,n in zip(a.shape, (h,w)))
        a = a[top:top+h, left:left+w]
        return a if kind=='mask' else a*0
    rewrite(folder, change)
    for f in (folder/'mask').iterdir():
        Image.fromarray(np.array(Image.open(f))//255*180+20).save(folder/'brain'/f.name.replace('mask','brain'))
    return folder

class Leftmost(torch.nn.Module):
    "Class 1 in the left half of the picture, whatever is in it, as sure of it as `yes` says"
    def __init__(self, yes): super().__init__(); self.yes = yes
    def forward(self, x):
        s = torch.linspace(1, -1, x.shape[-1]).expand(x.shape[0], 1, *x.shape[-2:])
        return torch.cat([0*s, torch.where(s>0, self.yes*s, s)], 1)

@pytest.mark.parametrize('size', [96, 64])
def test_mirrored_predictions(tmp_path, size):
    "What does not depend on left and right agrees with its mirror image; what does, does not"
    t = adni_cases(cut(make_folder(tmp_path, 6, 1, size=96), [(96,61),(45,96),(95,96)])); learn = oracle(t, size)
    for both,a,b in predict_ways(learn, t): assert (a!=b).mean()<.01 and (a!=both).mean()<.01 and a.any()
    assert score_cases(learn, t, quality=True).quality.min()>.95 and 'quality' not in score_cases(learn, t)
    learn.model = Leftmost(yes=.5)
    for both,a,b in predict_ways(learn, t):
        half = a.shape[1]//2
        assert not both[:,:half-1].any() and not both[:,half+2:].any(), 'the surer one wins'
        assert a[:,:half].all() and not a[:,half+1:].any() and not b[:,:half].any() and b[:,half+1:].all()
    assert score_cases(learn, t, quality=True).quality.max()<.05
    for both,a,b in predict_ways(learn, t, flips=False): assert both is a and b is None and a[:,:a.shape[1]//2].all()
    learn.model = Leftmost(yes=2)
    for both,_,_ in predict_ways(learn, t): assert both[:,:both.shape[1]//2-1].all() and both[:,both.shape[1]//2+2:].all()

@pytest.mark.parametrize('shapes,size,least', [([(96,61),(45,96),(96,96),(95,96)], 96, 1.), ([(61,44),(90,57),(33,60)], 128, .99),
                                                ([(128,96),(100,127),(99,75)], 64, .95)], ids=['same','enlarged','reduced'])
def test_perfect_prediction_in_own_pixels(tmp_path, shapes, size, least):
    t = adni_cases(cut(make_folder(tmp_path, 6, 1, size=max(map(max, shapes))), shapes))
    preds = predict_cases(oracle(t, size), t, bs=4)
    for case,p in zip(t.itertuples(), preds): assert p.shape==read_image(case.image).shape and p.dtype==np.uint8
    s = score_cases(oracle(t, size), t)
    assert (s.n_true>0).all() and s.dice.min() >= least and (s.hd95.max()==0 or least<1)
    if least==1: assert (s[['dice','jaccard','nsd']]==1).all(axis=None) and (s.area_true==s.area_pred).all()
    for case,p in zip(t.itertuples(), preds): # not shifted
        there = lambda a: np.argwhere(a).mean(0)
        assert abs(there(p)-there(read_mask(case.mask, (0,255)))).max() < .5

def test_score_table(tmp_path, folder, cases):
    learn = oracle(cases, 64)
    t = cases.sample(frac=1, random_state=1) # any index, any order
    s = score_cases(learn, t, save_to=tmp_path)
    for k in ('subject','scan','slice'): assert list(s[k])==list(t[k])
    assert {'image','dice','jaccard','hd95','nsd','area_true','area_pred','unit','n_true','n_pred','n_both','prediction'} <= set(s)
    assert list(s.image)==[p.relative_to(folder).as_posix() for p in t.image] and set(s.unit)=={'px'}
    for case,row in zip(t.itertuples(), s.itertuples()):
        p = np.array(Image.open(row.prediction))
        assert p.dtype==np.uint8 and set(np.unique(p)) <= {0,1}
        again = score_mask(p, read_mask(case.mask, (0,255)))
        assert all(getattr(row, k)==again[k] for k in ('dice','hd95','nsd','area_pred'))
    assert not leftovers(tmp_path)
    mm = score_cases(learn, t.assign(spacing=.5))
    assert set(mm.unit)=={'mm'} and np.allclose(mm.area_true, s.area_true/4) and np.allclose(mm.hd95, s.hd95/2)
    assert (score_cases(learn, t, tolerance=5).nsd >= s.nsd).all()

def test_same_file_name_in_subject_folders(tmp_path):
    make_folder(tmp_path, 4, 1)
    for k in 'brain','mask':
        for f in sorted((tmp_path/k).iterdir()):
            (tmp_path/k/f.name[:3]).mkdir(); f.rename(tmp_path/k/f.name[:3]/'slice1.png')
    t = adni_cases(tmp_path, subject='folder')
    s = score_cases(oracle(t, 64), t, save_to=tmp_path/'out')
    assert s.prediction.nunique()==4
    for row,p in zip(s.itertuples(), predict_cases(oracle(t, 64), t)): assert np.array_equal(np.array(Image.open(row.prediction)), p)

def test_cases_outside_the_layout(tmp_path, cases):
    "A table made by hand, whose images are not in a folder with the name of their kind"
    t = cases.assign(image=[Path(shutil.copy(p, tmp_path/f'{i}.png')) for i,p in enumerate(cases.image)])
    s = score_cases(oracle(t, 64), t, save_to=tmp_path/'out')
    assert s.prediction.nunique()==len(t) and sorted(s.image)==sorted(f'{i}.png' for i in range(len(t)))
    assert all((tmp_path/'out') in Path(o).parents for o in s.prediction)

def test_multi_class(tmp_path):
    make_folder(tmp_path, 4, 1, mask_value=1)
    two = np.arange(64)[:,None] > 32
    rewrite(tmp_path, lambda k,a,i: (a*np.where(two, 7, 3)).astype(np.uint8), ['mask'])
    t = adni_cases(tmp_path)
    learn = make_learner(with_split(t, split_cases(t, 1)), settings(codes=mask_codes(t['mask'])))
    s = score_cases(learn, t, save_to=tmp_path/'out')
    assert learn.model.eval()(torch.zeros(1,1,64,64)).shape==(1,3,64,64) and {'dice_1','dice_2'} <= set(s)
    assert all(set(np.unique(np.array(Image.open(o)))) <= {0,1,2} for o in s.prediction)

def test_dice_per_image_agrees_with_scores():
    g = torch.Generator().manual_seed(0)
    truth = (torch.rand(6,9,7, generator=g)>.6).long(); truth[4] = truth[5] = 0
    pred = torch.rand(6,2,9,7, generator=g); pred[5,1] = -1
    both = [(p.argmax(0).numpy(), t.numpy()) for p,t in zip(pred, truth)]
    assert float(dice_per_image(pred, truth)) == pytest.approx(np.mean([score_mask(p, t)['dice'] for p,t in both]))

# ---- training runs

def curve(run): return run['curve'].drop(columns='seconds')

@pytest.fixture(scope='module')
def whole(cases, tmp_path_factory):
    "An uninterrupted run"
    torch.set_num_threads(1)
    return tiny(cases, tmp_path_factory.mktemp('run')/'whole', epochs=3)

def test_run(whole, cases):
    s,folder = whole['scores'], whole['folder']
    assert set(s.subject)==set(cases.subject[cases.split=='test']) and len(s)==(cases.split=='test').sum()
    assert set(s.kind)==set(s.tested_on)=={'brain'} and s.dice.between(0, 1).all()
    assert list(whole['curve'].columns)==['epoch','seconds','train_loss','valid_loss','valid_dice']
    assert list(whole['curve'].epoch)==[0,1,2]
    assert whole['curve'].seconds.is_monotonic_increasing and whole['curve'].notna().all(axis=None)
    assert whole['settings']['imagenet'] is False and whole['settings']['environment']['threads']==1 and whole['settings']['epochs']==3
    assert not leftovers(folder) and not (folder/'checkpoint.pt').exists()
    again = score_cases(load_run(folder, cases), cases[cases.split=='test'])
    assert list(again.dice)==list(s.dice) and list(again.hd95)==list(s.hd95)

def test_same_seed_same_scores(whole, cases, tmp_path):
    a = tiny(cases, tmp_path/'a', epochs=3)
    for f in 'scores.csv','model.safetensors': assert (a['folder']/f).read_bytes()==(whole['folder']/f).read_bytes()
    pd.testing.assert_frame_equal(curve(a), curve(whole))
    b = tiny(cases, tmp_path/'b', epochs=3, seed=43)
    assert list(b['curve'].train_loss)!=list(whole['curve'].train_loss)
    assert (b['folder']/'scores.csv').read_bytes()!=(whole['folder']/'scores.csv').read_bytes()

class Stop(Callback):
    "Ctrl-C at the end of an epoch, or within the next one's first batch"
    order = 66
    def __init__(self, after, within=False): self.after,self.within = after,within
    def before_epoch(self): self.last = self.epoch
    def after_epoch(self):
        if not self.within and self.epoch==self.after: raise KeyboardInterrupt
    def after_pred(self):
        if self.within and self.training and self.epoch==self.after+1: raise KeyboardInterrupt

def interrupt(monkeypatch, stop):
    "Every learner made from now on is interrupted, and every epoch is saved"
    make,check = seg.make_learner, seg.Checkpoint
    monkeypatch.setattr(seg, 'make_learner', lambda *a, **k: make(*a, **k).add_cb(stop))
    monkeypatch.setattr(seg, 'Checkpoint', lambda path, **kwargs: check(path, every=0, **kwargs))

@pytest.mark.parametrize('after,within', [(0,False), (1,True)])
def test_interrupted_and_resumed(whole, cases, tmp_path, monkeypatch, capsys, after, within):
    with monkeypatch.context() as m:
        interrupt(m, Stop(after, within))
        with pytest.raises(KeyboardInterrupt): tiny(cases, tmp_path/'run', epochs=3)
    assert 'resume' in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path/'run').iterdir())==['checkpoint.pt','key.json']
    state = torch.load(tmp_path/'run'/'checkpoint.pt', weights_only=True) # nothing in it needs unpickling
    assert len(state['curve'])==after+1
    torch.rand(7); np.random.rand(7) # whatever happened in between
    fits = []
    monkeypatch.setattr(Checkpoint, 'after_batch', lambda self: fits.append(self.epoch) if self.training else None, raising=False)
    r = tiny(cases, tmp_path/'run', epochs=3)
    assert min(fits)==after+1 # not from the beginning
    for f in 'model.safetensors','scores.csv': assert (r['folder']/f).read_bytes()==(whole['folder']/f).read_bytes()
    pd.testing.assert_frame_equal(curve(r), curve(whole))
    assert r['curve'].seconds.is_monotonic_increasing and not (r['folder']/'checkpoint.pt').exists()

@pytest.mark.parametrize('after', [0, 1])
def test_resume_between_frozen_and_unfrozen(cases, tmp_path, monkeypatch, after):
    "The published recipe trains twice: stopped at the end of the first part, or of the second part's first epoch"
    block = brainseg_block('brain', size=64, rgb=True)
    def learner():
        set_seed(7, reproducible=True)
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1))
        learn = Learner(block.dataloaders(cases, bs=2, num_workers=0), net, CrossEntropyLossFlat(axis=1), metrics=dice_per_image,
                        splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())])
        learn.pretrained = False
        return learn
    def fit(path, stop=None):
        learn,ck = learner(), Checkpoint(path, every=0)
        if stop: learn.add_cb(stop)
        fit_recipe(learn, 'published', 4, ck)
        return learn,ck
    a,ck_a = fit(tmp_path/'a.pt')
    class At(Callback):
        order,n = 66,0
        def after_epoch(self):
            self.n += 1
            if self.n==after+2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(tmp_path/'b.pt', At())
    b,ck_b = fit(tmp_path/'b.pt')
    assert all(torch.equal(x, y) for x,y in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    plain = lambda ck: [{k: v for k,v in o.items() if k!='seconds'} for o in ck.curve]
    assert plain(ck_a)==plain(ck_b) and [o['epoch'] for o in ck_b.curve]==[0,1,2,3]

def test_fit_without_checkpoint(cases):
    learn = make_learner(cases, settings())
    fit_recipe(learn, epochs=1)
    assert len(learn.recorder.values)==1

def test_interrupt_leaves_no_autocast(cases, monkeypatch):
    monkeypatch.setattr(seg, 'fast_bf16', lambda device: True)
    learn = make_learner(cases, settings())
    first = next(m for m in learn.model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        with pytest.raises(KeyboardInterrupt): fit_recipe(learn, epochs=1, checkpoint=Checkpoint(Path('none.pt'), every=float('inf')))
        assert not torch.is_autocast_enabled('cpu') # it would change the rounding of everything that follows
    finally: torch.set_autocast_enabled('cpu', False)

def test_complete_run_is_kept(cases, tmp_path, monkeypatch):
    a = tiny(cases, tmp_path/'run')
    times = {p: p.stat().st_mtime_ns for p in a['folder'].rglob('*') if p.is_file()}
    def no(*args, **kwargs): raise AssertionError('trained again')
    with monkeypatch.context() as m:
        m.setattr(seg, 'fit_recipe', no)
        b = tiny(cases, tmp_path/'run')
        assert times=={p: p.stat().st_mtime_ns for p in a['folder'].rglob('*') if p.is_file()}
        pd.testing.assert_frame_equal(a['scores'], b['scores']); pd.testing.assert_frame_equal(a['curve'], b['curve'])
        shutil.move(tmp_path/'run', tmp_path/'moved')
        assert all(Path(o).is_file() for o in tiny(cases, tmp_path/'moved')['scores'].prediction)
        swapped = cases.assign(split=cases.split.replace({'valid':'train', 'train':'valid'}))
        changes = dict(epochs=2), dict(seed=1), dict(size=96), dict(test_sets={'brain': cases[:1]}), dict(cases=swapped)
        for i,change in enumerate(changes):
            copy = shutil.copytree(tmp_path/'moved', tmp_path/f'copy{i}')
            with pytest.raises(AssertionError, match='trained again'): tiny(**{**dict(cases=cases, folder=copy), **change})

def test_changed_images_are_noticed(tmp_path, monkeypatch):
    t = adni_cases(make_folder(tmp_path/'data', 4, 1))
    t = with_split(t, split_cases(t, 1))
    other = adni_cases(make_folder(tmp_path/'other', 3, 1, seed=5))
    run = lambda: tiny(t, tmp_path/'run', epochs=12, test_sets={'brain': t[t.split=='test'], 'external': other}) # until something is found
    run()
    Image.fromarray(255-np.array(Image.open(other.image[0]))).save(other.image[0])
    old = (tmp_path/'run'/'scores.csv').read_bytes()
    run()
    assert (tmp_path/'run'/'scores.csv').read_bytes()!=old

def test_nothing_half_written(cases, tmp_path, monkeypatch):
    def broken(*args, **kwargs): raise RuntimeError('disk full')
    with monkeypatch.context() as m:
        m.setattr(seg, 'score_cases', broken)
        with pytest.raises(RuntimeError, match='disk full'): tiny(cases, tmp_path/'run')
    assert not (tmp_path/'run'/'run.json').exists() and not (tmp_path/'run'/'scores.csv').exists() and not leftovers(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(pd.DataFrame, 'to_csv', lambda self, path, **k: (Path(path).write_text('half'), broken()))
        with pytest.raises(RuntimeError, match='disk full'): tiny(cases, tmp_path/'run')
    assert not (tmp_path/'run'/'run.json').exists() and not leftovers(tmp_path)
    assert tiny(cases, tmp_path/'run')['settings']['epochs']==1 and not leftovers(tmp_path)

def test_written_beside(tmp_path):
    f = tmp_path/'a.txt'; f.write_text('old')
    with pytest.raises(KeyboardInterrupt):
        with written_beside(f) as tmp: tmp.write_text('half'); raise KeyboardInterrupt
    assert f.read_text()=='old' and [o.name for o in tmp_path.iterdir()]==['a.txt']

def test_other_peoples_folders_are_safe(cases, tmp_path):
    (tmp_path/'thesis.txt').write_text('three years of work')
    with pytest.raises(DataError, match=tmp_path.name): tiny(cases, tmp_path)
    assert (tmp_path/'thesis.txt').exists()

@pytest.mark.parametrize('part', ['train','valid','test'])
def test_nothing_to_train_or_test(cases, tmp_path, part):
    with pytest.raises(DataError, match=part): tiny(cases[cases.split!=part], tmp_path/'run')
    assert not (tmp_path/'run').exists()

def test_bad_recipe(cases, tmp_path):
    with pytest.raises(DataError, match='heavy.*light'): tiny(cases, tmp_path/'run', recipe='heavy')
    assert not (tmp_path/'run').exists()

def test_folds(folder, tmp_path):
    cases,orig = adni_cases(folder), adni_cases(folder, 'orig')
    split,lines = split_cases(cases, 3, seed=2), []
    r = train_folds(cases, split, tmp_path/'out', seed=5, others={'orig': orig}, announce=lambda *a: lines.append(a),
                    epochs=1, size=64, arch=resnet18, pretrained=False)
    s = r['scores']
    assert list(s.columns[:14])==['kind','fold','seed','subject','scan','slice','image','dice','jaccard','hd95','nsd',
                                  'area_true','area_pred','unit']
    assert sorted(s.image)==sorted(split.image[split.split=='test']) and set(s.kind)=={'brain'}
    tests = split[split.split=='test'].set_index('image').fold
    assert (s.fold.values==tests[s.image].values).all() and lines==[('brain',0,5), ('brain',1,6), ('brain',2,7)]
    every = r['all_scores']
    assert sorted(every.tested_on.value_counts().items())==[('brain',12), ('orig',12)] and set(every.kind)=={'brain'}
    assert all((tmp_path/'out'/o).is_file() and '\\' not in o for o in every.prediction) and every.prediction.is_unique
    assert r['curves'].groupby(['kind','fold','seed']).size().tolist()==[1,1,1]
    ax = seg.plot_curves(r['curves']); assert len(ax.lines)==3; matplotlib.pyplot.close('all')

def test_export_and_load(whole, cases, tmp_path):
    learn = load_run(whole['folder'], cases)
    learn.export(tmp_path/'model.pkl')
    loaded = load_learner(tmp_path/'model.pkl')
    t = cases[cases.split=='test']
    assert all(np.array_equal(a, b) for a,b in zip(predict_cases(learn, t), predict_cases(loaded, t)))
    x = torch.randn(1,1,64,64)
    with torch.inference_mode(): assert torch.equal(loaded.model.eval()(x), learn.model.eval()(x)) # masks after three epochs say little
    assert list(score_cases(loaded, t).dice)==list(whole['scores'].dice)
    mask,*_ = loaded.predict(t.iloc[0])
    assert mask.shape==(64,64)

# ---- recipes and ImageNet weights

class Enough(Exception): pass

def test_published_recipe(tmp_path, monkeypatch):
    t = adni_cases(make_folder(tmp_path/'data', 12, 2))
    calls = []
    def fit(learn, n, lr=None, **kwargs):
        calls.append((n, lr, learn.opt.frozen_idx, learn.dls.bs, learn))
        if len(calls)==2: raise Enough
    monkeypatch.setattr(Learner, 'fit_one_cycle', fit)
    with pytest.raises(Enough): tiny(with_split(t, split_cases(t, 1, .1, .1)), tmp_path/'run', recipe='published', epochs=None)
    (n1,lr1,frozen1,bs,learn),(n2,lr2,frozen2,*_) = calls
    assert (n1, n2, lr1, lr2, bs)==(8, 8, 5e-5, slice(5e-5/400, 5e-5/4), 16) and frozen1 > 0 and frozen2==0
    layers = list(learn.model.modules())
    assert isinstance(learn.model, DynamicUnet) and any(isinstance(o, SelfAttention) for o in layers) and any(isinstance(o, Mish) for o in layers)
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)
    x,y = learn.dls.one_batch()
    assert x.shape==(16,3,64,64) and learn.model(x[:2].as_subclass(torch.Tensor)).shape==(2,2,64,64)

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty weights cache and no network"
    def offline(*args, **kwargs): raise urllib.error.URLError('no network')
    monkeypatch.setattr(urllib.request, 'urlopen', offline)
    monkeypatch.setattr(torch.hub, 'urlopen', offline)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path/'hub'))
    (tmp_path/'hub'/'checkpoints').mkdir(parents=True)
    return tmp_path/'hub'/'checkpoints'

def test_no_imagenet_weights(cases, tmp_path, hub):
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        r = tiny(cases, tmp_path/'run', pretrained=True)
    told = [str(w.message) for w in ws if 'ImageNet' in str(w.message)]
    assert len(told)==1 and 'resnet18' in told[0] and 'random' in told[0] and str(hub) in told[0]
    assert r['settings']['imagenet'] is False and r['settings']['pretrained'] is True

def test_no_warning_where_none_are_wanted(cases, hub):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert not make_learner(cases, settings()).pretrained

@pytest.mark.parametrize('recipe', ['light','published'])
def test_cached_imagenet_weights(cases, hub, recipe):
    set_seed(99)
    weights = resnet18(weights=None).state_dict()
    torch.save(weights, hub/ResNet18_Weights.DEFAULT.url.rsplit('/', 1)[-1])
    learn = make_learner(cases, settings(recipe=recipe, pretrained=True))
    have = [p for p in learn.model.parameters()]
    inside = [k for k,w in weights.items() if k.startswith(('layer1','layer2')) and k.endswith('conv2.weight')]
    assert learn.pretrained and inside and all(any(p.shape==weights[k].shape and torch.equal(p, weights[k]) for p in have) for k in inside)

# ---- what a GPU would do, as far as a processor can show it

def test_augmentation_happens_where_the_batch_is():
    "Nothing but the random numbers is made on the processor: tensors without data would refuse to meet one that has some"
    x,y = torch.zeros(3,1,64,64, device='meta'), torch.zeros(3,64,64, dtype=torch.long, device='meta')
    a,b = MoveHeads(bend=.1)((seg.TensorScan(x), TensorMask(y)), split_idx=0)
    assert a.device.type==b.device.type=='meta' and a.shape==x.shape and b.shape==y.shape
    z = seg.ImageZScore()(seg.TensorScan(x))
    assert z.device.type=='meta' and z.shape==x.shape

@pytest.mark.parametrize('device', ['cpu','cuda'])
def test_batches_are_pinned_for_a_gpu(device, cases, monkeypatch):
    got = []
    class Block:
        def dataloaders(self, t, **kw): got.append(kw['pin_memory'])
    monkeypatch.setattr(seg, 'default_device', lambda *a: torch.device(device))
    monkeypatch.setattr(seg, 'brainseg_block', lambda *a, **kw: Block())
    seg._slice_dls(with_split(cases, split_cases(cases, 1)), settings(sampling='uniform'), None)
    assert got==[device=='cuda']

@pytest.mark.parametrize('able', [True,False])
def test_bfloat16_where_the_hardware_has_it(able, monkeypatch):
    monkeypatch.setattr(seg, 'fast_bf16', lambda device: able)
    seen = []
    class Net(torch.nn.Module):
        def __init__(self): super().__init__(); self.conv = torch.nn.Conv2d(1, 1, 1)
        def forward(self, x): seen.append((y := self.conv(x)).dtype); return y
    seg.InBf16(Net())(torch.zeros(1,1,8,8))
    assert seen==[torch.bfloat16 if able else torch.float32]
