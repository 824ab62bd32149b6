"""What is compared. Each system is a class with

    train(clock)        train until `clock.step` says stop; `clock.start`, `.loaded` and `.step` around every batch
    predict(cases)      classes of all cases, one array each, in the pixels of the image
    predict_all(cases)  the same in the way that its users predict, for the speed of prediction
    model, pretrained, about

so that clock, evaluation and tables are written once."""
import math

import numpy as np, torch, torch.nn.functional as F
from fastai.vision.all import (Callback, CancelFitException, DataBlock, ImageBlock, MaskBlock, Pipeline, PILImage,
                               PILMask,
                               RandTransform, Resize, aug_transforms, create_body, create_unet_model, default_device,
                               in_channels, resnet18, resnet34, unet_learner)
from monai.data import CacheDataset, DataLoader
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet, UNet
from monai.transforms import (Compose, NormalizeIntensityd, RandAdjustContrastd, RandAffined, RandFlipd,
                              RandGaussianNoised,
                              RandGaussianSmoothd, RandRotated, RandScaleIntensityd, RandScaleIntensityFixedMeand,
                              RandShiftIntensityd,
                              RandSimulateLowResolutiond, RandZoomd, Transform)
from monai.utils import set_determinism
from brainseg_fastai.core import DataError, need
from brainseg_fastai.images import read_image, read_mask
from brainseg_fastai.inference import Fit, own_pixels
from brainseg_fastai.networks import InBf16, LightUnet, class_shares, imagenet_weights, make_loss
from brainseg_fastai.runs import prepare_learner
from brainseg_fastai.segmentation import predict_cases, split_column
from brainseg_fastai.settings import RECIPES, Settings
from brainseg_fastai.training import InMemory, ReadMask, SquarePad, TensorScan, fit_recipe

PUBLISHED_ARCH = 'resnet34'  # encoder of the published recipe
BS = 8                       # of the systems that prescribe none
EVAL_BS = 8                  # of every system
FOREVER = 10_000             # epochs; the clock stops the run long before

def own_classes(
    scores, # Class scores (C,S,S) of a padded and scaled square
    h, w    # Of the image
)->np.ndarray: # Classes (h,w)
    "Classes in the image's own pixels"
    return own_pixels(scores[None], Fit((h,w), (h,w), max(h,w)))[0].argmax(0).byte().numpy()

# ---- systems that fastai trains

class Ticks(Callback):
    "Drives the clock from within fastai's training loop"
    order = -100 # first to see a batch: what comes after it counts as computing
    def __init__(self, clock, by_clock=False): self.clock,self.by_clock,self.few = clock,by_clock,None
    def before_fit(self):
        if self.clock.stopped: raise CancelFitException
    def before_train(self): self.clock.start()
    def before_batch(self):
        if not self.training: return
        self.clock.loaded()
        # the schedule spans its time
        if self.by_clock and self.n_epoch==FOREVER: self.learn.pct_train = self.clock.share()
    def after_train(self): self.clock.pause()
    # the harness evaluates; fastai's own pass over the validation images is cut to one image
    def before_validate(self):
        if self.few is None: self.few = [tuple(o[:1] for o in self.dls.valid.one_batch())]
        self.learn.dl = self.few

class Tocks(Callback):
    "A step is done when all callbacks are done with it"
    order = 1000
    def __init__(self, clock): self.clock = clock
    def after_batch(self):
        if self.training and self.clock.step(len(self.xb[0]), self.loss): raise CancelFitException

class Fastai:
    "A learner under the clock"
    by_clock = False
    def __init__(self, cases, codes, size, seed, pretrained, epochs=None):
        self.cases,self.codes,self.size,self.seed,self.epochs = cases,codes,size,seed,epochs
        self.learn = self.make(pretrained)
        self.pretrained = bool(self.learn.pretrained)
    @property
    def model(self): return self.learn.model
    def train(self, clock):
        watch = [Ticks(clock, self.by_clock), Tocks(clock)]
        with self.learn.no_bar(), self.learn.no_logging(), self.learn.added_cbs(watch): self.fit()
    def predict(self, cases): return [m.mask for _,m in predict_cases(self.learn, cases, flips=False)]
    def predict_all(self, cases): return self.predict(cases)

class Ours(Fastai):
    "What `train_run` does unless told otherwise: the same calls, without files"
    asked = {}
    def make(self, pretrained):
        given = Settings(size=self.size, seed=self.seed, pretrained=pretrained, epochs=self.epochs, **self.asked)
        self.settings = given.filled(int((self.cases['split']=='train').sum())) # whatever is the default is measured
        self.about = {k: getattr(self.settings, k) for k in ('recipe','arch','epochs','bs','schedule')}
        return prepare_learner(self.cases, self.settings, self.codes)
    def fit(self): fit_recipe(self.learn, self.settings)

# ---- ours with one thing changed: what does each bring?

class Reshape(Callback):
    "Change the batches of training after all else"
    order = 12
    def __init__(self, f, until=1.): self.f,self.until = f,until
    def before_batch(self):
        if self.training and self.pct_train<self.until: self.learn.xb,self.learn.yb = self.f(self.xb[0], self.yb[0])

def in_float32(learn): learn.model.forward = learn.model.scores # without autocast around it

def contiguous(learn):
    learn.fast_batches.before_fit = lambda: None
    learn.model.to(memory_format=torch.contiguous_format)
    def flat(x, y): return (x.clone(memory_format=torch.contiguous_format),), (y,) # a channel alone lies both ways
    learn.add_cb(Reshape(flat))

def full_decoder(learn):
    net = create_unet_model(resnet18, len(learn.frame.codes), (256,256), pretrained=False,
                            n_in=in_channels(learn.model.body))
    last = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    with torch.no_grad(): last.bias.copy_(learn.model.head[-1][0].bias) # both start at the same guess
    learn.model = InBf16(net).to(learn.dls.device)
    learn.splitter = lambda m: [list(m.parameters())]
    learn.fast_batches.before_fit()
    learn.create_opt()

def three_channels(learn):
    body,n = create_body(resnet18(), n_in=3, pretrained=False, cut=-3), len(learn.frame.codes)
    learn.model = LightUnet(body, n, shares=class_shares(learn.dls.train_ds, range(n))).to(learn.dls.device)
    one = learn.model.scores
    learn.model.scores = lambda x: one(x.expand(-1, 3, -1, -1))
    learn.fast_batches.before_fit()
    learn.create_opt()

def whole_images(learn): learn.fast_batches.window = 1.

def resized_images(learn):
    def smaller(x, y):
        size = [o*3//4//32*32 for o in x.shape[-2:]]
        x = F.interpolate(x, size=size, mode='bilinear', antialias=True).contiguous(memory_format=torch.channels_last)
        return (x,), (F.interpolate(y[:,None].float(), size=size)[:,0].long(),)
    whole_images(learn)
    learn.add_cb(Reshape(smaller, learn.fast_batches.until))

def guesses_alike(learn): torch.nn.init.zeros_(learn.model.head[-1][0].bias)

def cross_entropy(learn): learn.loss_func = make_loss('ce')

def usual_rate(learn): RECIPES['light'] = RECIPES['light'] | dict(lr=1e-3)

def read_each_time(learn): InMemory.__call__ = lambda self, case: self.read(case)

class OneByOne(RandTransform):
    "Apply a random transform of batches to each image of a batch alone"
    split_idx,order = 0,30
    def __init__(self, tfm): super().__init__(p=1); self.tfm = tfm
    def __call__(self, b, **kwargs):
        ones = [self.tfm(tuple(o[i:i+1] for o in b), **kwargs) for i in range(len(b[0]))]
        return tuple(torch.cat(o) for o in zip(*ones))

def one_by_one(learn):
    dl = learn.dls.train
    dl.after_batch = Pipeline([OneByOne(o) if isinstance(o, RandTransform) else o for o in dl.after_batch.fs],
                              split_idx=0)

def with_workers(learn): learn.dls.loaders[0] = learn.dls.train.new(num_workers=2)

def compiled(learn): learn.model.scores = torch.compile(learn.model.scores)

CHANGES = dict(float32=in_float32, contiguous=contiguous, decoder=full_decoder, three=three_channels,
               whole=whole_images,
               resize=resized_images, alike=guesses_alike, ce=cross_entropy, rate=usual_rate,
               batch=None,
               reading=read_each_time, single=one_by_one, workers=with_workers,
               compile=compiled)

def changed(name):
    "The class for ours with one thing changed"
    class Changed(Ours):
        asked = dict(bs=8) if name=='batch' else {}
        def make(self, pretrained):
            learn = super().make(pretrained)
            if CHANGES[name]: CHANGES[name](learn)
            return learn
    Changed.__name__ = name
    return Changed

class Published(Ours):
    "The published recipe, unchanged"
    asked = dict(recipe='published', arch=PUBLISHED_ARCH)

class ReadPicture:
    "Image of a case, as fastai's users open it: three channels of a picture"
    def __call__(self, case): return PILImage.create(case['image'])

class Stock(Fastai):
    "`unet_learner(dls, resnet34)` with fastai's defaults on images and masks"
    by_clock = True
    def make(self, pretrained):
        if pretrained: require_imagenet('stock')
        block = DataBlock((ImageBlock, MaskBlock(codes=np.array(self.codes))), get_x=ReadPicture(),
                          get_y=ReadMask(self.codes),
                          splitter=split_column, item_tfms=Resize(self.size, method='pad', pad_mode='zeros'),
                          batch_tfms=aug_transforms())
        n = int((self.cases['split']=='train').sum())
        learn = unet_learner(block.dataloaders(self.cases.reset_index(drop=True), bs=min(BS, n)), resnet34,
                             pretrained=pretrained)
        how = 'fine_tune' if pretrained else 'fit_one_cycle'
        self.about = dict(arch='resnet34', bs=learn.dls.bs, opt='Adam', lr=learn.lr,
                          schedule=f'{how}, the cycle spans the time cap',
                          workers=learn.dls.train.fake_l.num_workers)
        return learn
    def fit(self):
        if self.pretrained: self.learn.fine_tune(self.epochs or FOREVER)
        else: self.learn.fit_one_cycle(self.epochs or FOREVER)
    def predict(self, cases):
        dl,res = self.learn.dls.test_dl(cases, bs=EVAL_BS, num_workers=0), []
        for xb, in dl: res += list(self.model(xb.as_subclass(torch.Tensor)).float().cpu())
        return [own_classes(o, *hw) for o,hw in zip(res, sizes_of(cases))]
    def predict_all(self, cases):
        dl = self.learn.dls.test_dl(cases)
        with self.learn.no_bar(), self.learn.no_logging(): preds = self.learn.get_preds(dl=dl)[0]
        return [own_classes(o.as_subclass(torch.Tensor), *hw) for o,hw in zip(preds, sizes_of(cases))]

def sizes_of(cases): return [read_image(o).shape[:2] for o in cases['image']]

def require_imagenet(system):
    "One line where the ImageNet weights cannot be had, instead of a run from scratch under a wrong label"
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if imagenet_weights('resnet34'): return
    raise DataError(f'{system}: found no ImageNet weights of resnet34 in the cache of torch, and no way to download '
                    'them; expected them for --init pretrained. Take --init scratch.')

# ---- systems with a plain training loop, on MONAI's transforms, cache and loader

class ReadCase(Transform):
    "Image (C,S,S), 0 to 255, and classes (1,S,S) of a case"
    def __init__(self, codes, size): self.codes,self.fit = codes,SquarePad(size)
    def __call__(self, case):
        a = read_image(case['image'])
        x = self.fit(TensorScan(torch.from_numpy(np.ascontiguousarray(a[None]
                                                                      if a.ndim==2 else np.moveaxis(a, -1, 0)))))
        y = self.fit(PILMask.create(read_mask(case['mask'], self.codes)))
        return dict(image=x.as_subclass(torch.Tensor).float(), mask=torch.from_numpy(np.array(y)[None]).long(),
                    size=a.shape[:2])

KEYS,MODES = ('image','mask'),('bilinear','nearest')

def light_augmentation():
    "Flips left to right, small affine changes and changes of light, as far as heads differ"
    return [RandFlipd(KEYS, prob=.5, spatial_axis=1),
            RandAffined(KEYS, prob=.5, rotate_range=math.radians(8), scale_range=.1, translate_range=5, mode=MODES,
                        padding_mode='zeros'),
            RandScaleIntensityd('image', factors=.15, prob=.5), RandShiftIntensityd('image', offsets=.1, prob=.5)]

def nnunet_augmentation():
    "The probabilities and ranges of nnU-Net's trainer for square slices, with MONAI's transforms"
    return [RandRotated(KEYS, range_x=math.pi, prob=.2, mode=MODES, padding_mode='zeros'),
            RandZoomd(KEYS, prob=.2, min_zoom=.7, max_zoom=1.4, mode=MODES, padding_mode='constant'),
            RandGaussianNoised('image', prob=.1, std=math.sqrt(.1)),
            RandGaussianSmoothd('image', (.5,1.), (.5,1.), prob=.1),
            RandScaleIntensityd('image', factors=.25, prob=.15),
            RandScaleIntensityFixedMeand('image', factors=.25, preserve_range=True, prob=.15),
            RandSimulateLowResolutiond('image', prob=.125, zoom_range=(.5,1.), upsample_mode='bicubic'),
            RandAdjustContrastd('image', prob=.1, gamma=(.7,1.5), invert_image=True, retain_stats=True),
            RandAdjustContrastd('image', prob=.3, gamma=(.7,1.5), retain_stats=True),
            RandFlipd(KEYS, prob=.5, spatial_axis=0), RandFlipd(KEYS, prob=.5, spatial_axis=1)]

class Plain:
    "A network, a loss and an optimiser in a plain loop; subclasses say which"
    pretrained,bs = False,BS
    def __init__(self, cases, codes, size, seed, pretrained, epochs=None):
        set_determinism(seed) # of MONAI's random transforms
        self.codes,self.size,self.device = codes,size,default_device()
        train = cases[cases['split']=='train']
        self.n_cases,self.n_in = len(cases), (*read_image(cases['image'].iloc[0]).shape, 1)[2]
        self.about = {}
        self.model = self.network(pretrained).to(self.device)
        self.opt = self.optimiser()
        self.bs = min(self.bs, len(train))
        self.read = Compose([ReadCase(codes, size), NormalizeIntensityd('image', channel_wise=True)])
        tfms = Compose([*self.read.transforms, *self.augmentation()])
        ds = CacheDataset(train[['image','mask']].to_dict('records'), tfms, progress=False)
        self.dl = DataLoader(ds, batch_size=self.bs, shuffle=True, drop_last=True, num_workers=0)
        self.about |= dict(bs=self.bs, opt=type(self.opt).__name__, lr=self.opt.param_groups[0]['lr'],
                           schedule=self.schedule)
    schedule = 'constant'
    def optimiser(self): return torch.optim.Adam(self.model.parameters(), 1e-3)
    def augmentation(self): return light_augmentation()
    def set_lr(self, clock): pass
    def loss(self, x, y): return dice_ce(self.model(x), y)
    def scores(self, x): return self.model(x)

    def _steps(self, clock):
        "Optimiser steps, until the clock says stop"
        clock.start()
        while True:
            for batch in self.dl:
                x,y = (batch[k].as_tensor() if hasattr(batch[k], 'as_tensor') else batch[k] for k in KEYS)
                x,y = x.to(self.device), y.to(self.device)
                clock.loaded()
                self.set_lr(clock)
                loss = self.loss(x, y)
                self.opt.zero_grad(set_to_none=True)
                loss.backward()
                self.before_step()
                self.opt.step()
                if clock.step(len(x), loss.item()): return
    def before_step(self): pass
    def train(self, clock): self.model.train(); self._steps(clock)

    def predict(self, cases):
        res,rows = [],cases[['image','mask']].to_dict('records')
        for i in range(0, len(rows), EVAL_BS):
            some = [self.read(o) for o in rows[i:i+EVAL_BS]]
            x = torch.stack([torch.as_tensor(o['image']) for o in some]).as_subclass(torch.Tensor).to(self.device)
            res += [own_classes(s, *o['size']) for s,o in zip(self.scores(x).float().cpu(), some)]
        return res
    def predict_all(self, cases): return self.predict(cases)

dice_ce = DiceCELoss(to_onehot_y=True, softmax=True)

class Smp(Plain):
    "U-Net of segmentation_models.pytorch on a ResNet-34"
    def network(self, pretrained):
        import segmentation_models_pytorch as smp
        self.pretrained = pretrained
        try: return smp.Unet('resnet34', encoder_weights='imagenet' if pretrained else None, in_channels=self.n_in,
                             classes=len(self.codes))
        except Exception as e:
            if not pretrained: raise
            raise DataError(f'smp: found no ImageNet weights of resnet34 ({type(e).__name__}); expected them for '
                            '--init pretrained. Take --init scratch.') from e

class MonaiUNet(Plain):
    "MONAI's residual U-Net as in its tutorials"
    def network(self, pretrained): return UNet(2, self.n_in, len(self.codes), (16,32,64,128,256), (2,2,2,2),
                                               num_res_units=2)

class MonaiBasic(Plain):
    "MONAI's BasicUNet with its own defaults"
    def network(self, pretrained): return BasicUNet(2, self.n_in, len(self.codes))

# ---- the network that nnU-Net's planner plans

def nnunet_plan(
    size,   # Side of the images
    n,      # Images, training and validation: nnU-Net plans for all that it is given
    n_in=1, # Channels
    n_out=2 # Classes
)->dict: # arch (of `PlainConvUNet`), bs
    "The 2-D configuration of nnU-Net's default planner for square images of equal spacing, for its usual 8 GB"
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    side,pools = size,0
    while side>=8: side,pools = math.ceil(side/2),pools+1 # halved until the deepest map is 4 to 7 pixels wide
    need(size%2**pools==0, f'nnunet: found the size {size}; expected a multiple of {2**pools}. Take another --size.')
    stages = pools+1
    arch = dict(n_stages=stages, features_per_stage=[min(512, 32*2**i) for i in range(stages)],
                conv_op=torch.nn.Conv2d, kernel_sizes=3,
                strides=[1]+[2]*pools, n_conv_per_stage=2, n_conv_per_stage_decoder=2, conv_bias=True,
                norm_op=torch.nn.InstanceNorm2d,
                norm_op_kwargs=dict(eps=1e-5, affine=True), nonlin=torch.nn.LeakyReLU,
                nonlin_kwargs=dict(inplace=True))
    with torch.device('meta'): estimate = PlainConvUNet(n_in, num_classes=n_out,
                                                        **arch).compute_conv_feature_map_size((size, size))
    fits = round(85_000_000/estimate*12)             # the reference: 12 images of 85 million feature values fit
    return dict(arch=arch, bs=max(min(fits, round(.05*n)), 2)) # but no more than 5 % of the images, and 2 at least

class NnUNet(Plain):
    "That network with nnU-Net's loss, deep supervision, optimiser, schedule and augmentation"
    schedule = 'polynomial, over the time cap'
    def network(self, pretrained):
        from dynamic_network_architectures.architectures.unet import PlainConvUNet
        plan = nnunet_plan(self.size, self.n_cases, self.n_in, len(self.codes))
        self.bs = plan['bs']
        self.about = dict(stages=plan['arch']['n_stages'], features=plan['arch']['features_per_stage'])
        w = np.array([.5**i for i in range(plan['arch']['n_stages']-1)])
        w[-1] = 0 # the coarsest output counts nothing
        self.weights = w/w.sum()
        self.part = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=1e-5,
                               smooth_dr=1e-5)
        net = PlainConvUNet(self.n_in, num_classes=len(self.codes), deep_supervision=True, **plan['arch'])
        return net.apply(PlainConvUNet.initialize)
    def optimiser(self): return torch.optim.SGD(self.model.parameters(), 1e-2, momentum=.99, nesterov=True,
                                                weight_decay=3e-5)
    def augmentation(self): return nnunet_augmentation()
    def set_lr(self, clock): self.opt.param_groups[0]['lr'] = 1e-2*max(1-clock.share(), 1e-3)**.9
    def loss(self, x, y):
        return sum(float(w)*self.part(o, y[...,::2**i,::2**i]) for i,(w,o) in enumerate(zip(self.weights,
                                                                                            self.model(x))) if w)
    def before_step(self): torch.nn.utils.clip_grad_norm_(self.model.parameters(), 12)
    def scores(self, x):
        self.model.decoder.deep_supervision = False
        try: return self.model(x)
        finally: self.model.decoder.deep_supervision = True

SYSTEMS = dict(ours=Ours, published=Published, stock=Stock, smp=Smp, monai_unet=MonaiUNet, monai_basic=MonaiBasic,
               nnunet=NnUNet,
               **{f'ours-{k}': changed(k) for k in CHANGES})
