"Networks by name, the memory they need, and losses by name"
import json, math, re, urllib.request, warnings

import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18
from brainseg_fastai.core import DataError
from brainseg_fastai.networks import (ARCHS, LOSSES, RESNETS, InBf16, LightUnet, build_model, check_size, class_shares, class_weights,
                                      light_splitter, load_weights, make_loss, memory_estimate, parse_loss, plain_batch, save_weights)
from brainseg_fastai.settings import Settings

def build_network(arch, n_in, n_out, size, dims=2, pretrained=False, **kw):
    "A network by name, without the automatic choice of number format"
    s = Settings(arch=arch, mode='slice' if dims==2 else 'volume', pretrained=pretrained, **kw)
    net = build_model(s, n_in, n_out, size)
    net.net.pretrained = net.pretrained
    return net.net

# every network, small enough for seconds: name, dims, size, options
SMALL = [('efficientnet_b0',2,64,{}), ('unet',2,32,dict(depth=3, width=8)), ('attention_unet',2,32,dict(depth=3, width=8)),
         ('segresnet',2,32,dict(depth=2, width=8)), ('unet3d',3,16,dict(depth=2, width=4)), ('unetr',3,16,dict(width=2)),
         ('segresnet',3,16,dict(depth=2, width=8))]
ids = [f'{a}-{d}d' for a,d,*_ in SMALL]

def test_every_name_is_tried():
    names = [k for k in ARCHS if k not in RESNETS and not re.search('b[1-7]$', k)]
    assert {(a,d) for a,d,*_ in SMALL} == {(k,d) for k in names for d in ARCHS[k].dims}

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1); torch.manual_seed(0)
    yield
    torch.set_num_threads(n)

@pytest.mark.parametrize('arch,dims,size,options', SMALL, ids=ids)
@pytest.mark.parametrize('n_in', [1,4])
def test_shape(arch, dims, size, options, n_in):
    net = build_network(arch, n_in, 3, size, dims, **options).eval()
    with torch.inference_mode(): out = net(torch.randn(2, n_in, *[size]*dims))
    assert type(out) is torch.Tensor and out.shape==(2, 3, *[size]*dims) and net.pretrained==''

@pytest.mark.parametrize('arch,dims,size', [('unet',2,(32,64)), ('attention_unet',2,(64,32)), ('segresnet',2,(16,32)), ('efficientnet_b0',2,(64,94)),
                                            ('unet3d',3,(32,32,64)), ('unetr',3,(32,16,48)), ('segresnet',3,(16,16,24))])
def test_sides_need_not_be_equal(arch, dims, size):
    net = build_network(arch, 1, 2, size, dims, width={'unetr':2,'segresnet':8,'unet3d':4,'unet':4,'attention_unet':4}.get(arch)).eval()
    with torch.inference_mode(): assert net(torch.randn(1,1,*size)).shape==(1,2,*size)

@pytest.mark.parametrize('arch,dims,size,options', SMALL, ids=ids)
def test_the_loss_falls(arch, dims, size, options):
    y = torch.zeros(2, *[size]*dims, dtype=torch.long)
    y[(slice(None), *[slice(size//4, size//2)]*dims)] = 1
    x = y[:,None].float() + .3*torch.randn(2, 1, *[size]*dims)
    net,loss = build_network(arch, 1, 2, size, dims, **options), make_loss('dice_ce')
    opt,losses = torch.optim.Adam(net.parameters(), 5e-3), []
    for _ in range(4): opt.zero_grad(); l = loss(net(x), y); l.backward(); opt.step(); losses.append(l.item())
    assert losses[-1] < .95*losses[0], losses
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad) or arch in ('efficientnet_b0','unetr') # unused tails of encoders

def test_depth_and_width():
    n = lambda **o: sum(p.numel() for p in build_network('unet', 1, 2, 64, **o).parameters())
    assert n(depth=2, width=8) < n(depth=3, width=8) < n(depth=3, width=16)
    convs = lambda net: [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.stride==(2,2)]
    net = build_network('unet', 1, 2, 64, depth=3, width=8)
    assert [m.out_channels for m in convs(net)]==[16,32,64]                                        # doubled at each halving
    with torch.device('meta'): assert convs(build_network('unet', 1, 2, 512, depth=7, width=16))[-1].out_channels==512 # and capped
    net = build_network('attention_unet', 1, 2, 64, depth=3, width=8)
    assert [m.out_channels for m in convs(net)]==[16,32,64]

def test_same_seed_same_network():
    def one(): torch.manual_seed(3); return build_network('unet', 1, 2, 32, depth=2, width=4).state_dict()
    a,b = one(), one()
    assert all(torch.equal(a[k], b[k]) for k in a)

BAD = [(('unet',250), {}, '240×240 or 256×256'), (('unet',(256,200)), {}, '256×192 or 256×208'), (('unet',16), {}, '32×32'),
    (('unet',64), dict(depth=6), '128×128; or keep the size with depth 5'),
    (('unetr',(128,128,155)), dict(dims=3), '128×128×144 or 128×128×160'),
    (('unetr',8), dict(dims=3), '16×16×16'), (('segresnet',(240,240,155)), dict(dims=3), '240×240×152 or 240×240×160'),
    (('efficientnet_b0',251), {}, '250×250 or 252×252'), (('efficientnet_b0',32), {}, '64×64'),
    (('unet3d',64), {}, 'none in 2-D; expected one of resnet18'), (('unet',64), dict(dims=3), 'unet3d, unetr, segresnet'),
    (('unetr',64), {}, '2-D'), (('unett',64), {}, "'unett': none"),
    (('unet',(64,64,64)), {}, 'expected 2 numbers'), (('unet3d',(64,64)), dict(dims=3), 'expected 3 numbers'),
    (('unet',64), dict(depth=0), 'depth'), (('unet',64), dict(width=1), 'width'), (('segresnet',64), dict(width=20), 'multiple of 8'),
    (('unetr',64), dict(dims=3, depth=2), 'its depth is fixed'), (('efficientnet_b0',64), dict(width=8), 'its width is fixed')]

@pytest.mark.parametrize('args,kw,words', BAD)
def test_what_cannot_work_is_refused_with_what_would(args, kw, words):
    with pytest.raises(DataError) as e: check_size(*args, **kw)
    assert words in str(e.value)

def test_settings_refuse_what_no_network_takes():
    for kw in (dict(arch='unet', size=250), dict(arch='segresnet', width=20), dict(arch='unetr', mode='patch', depth=3)):
        with pytest.raises(DataError, match=f"network {kw['arch']}"): Settings(**kw)

@settings(max_examples=100, deadline=None)
@given(st.sampled_from([a for a in ARCHS if a not in RESNETS]), st.lists(st.integers(1, 600), min_size=3, max_size=3), st.integers(2, 6))
def test_the_sizes_that_an_error_names_work(arch, size, depth):
    a = ARCHS[arch]; dims = a.dims[0]; depth = depth if a.depth else None; size = tuple(size[:dims])
    try: assert check_size(arch, size, dims, depth)==size
    except DataError as e:
        m = re.search(r'work: ([\d×]+)(?: or ([\d×]+))?(?:; or keep the size with depth (\d+))?$', str(e))
        near = [tuple(map(int, o.split('×'))) for o in m.groups()[:2] if o]
        for o in near: assert check_size(arch, o, dims, depth)==o
        div = a.divisor or 2**depth
        for s,*os in zip(size, *near): assert all(abs(o-s)<div or o==(a.minimum or 2*div) for o in os)
        if m[3]: assert check_size(arch, size, dims, int(m[3]))==size

# ---------------------------------------------------------------- pretrained weights

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty cache for weights, and no network"
    def refuse(*a, **k): raise OSError('no network')
    monkeypatch.setattr(urllib.request, 'urlopen', refuse)
    monkeypatch.setattr(torch.hub, 'urlopen', refuse)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    (tmp_path/'checkpoints').mkdir()
    return tmp_path/'checkpoints'

def test_without_weights_training_starts_from_random_ones_and_says_so(hub):
    with pytest.warns(UserWarning, match='efficientnet-b0-.*random weights'): net = build_network('efficientnet_b0', 1, 2, 64, pretrained=True)
    assert net.pretrained==''

@pytest.mark.parametrize('n_in', [1,4])
def test_weights_are_used_for_any_number_of_channels(hub, n_in):
    from monai.networks.nets.efficientnet import url_map
    rgb = build_network('efficientnet_b0', 3, 2, 64)
    file = {re.sub(r'(.+)\.\d+(\.\d+\..+)', r'\1\2', k): v for k,v in rgb.encoder.state_dict().items()} # as the published files are keyed
    torch.save(file, hub/url_map['efficientnet-b0'].rsplit('/', 1)[-1])
    net = build_network('efficientnet_b0', n_in, 2, 64, pretrained=True)
    assert net.pretrained=='ImageNet'
    grey = torch.randn(1,1,64,64)
    a,b = (o.encoder.eval()(grey.expand(-1, n, -1, -1))[-1] for o,n in ((net, n_in), (rgb, 3)))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

def test_other_networks_have_no_weights_and_do_not_mind(hub):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert build_network('unet', 1, 2, 32, depth=2, width=4, pretrained=True).pretrained==''

@pytest.mark.parametrize('recipe', ['light','published'])
def test_an_encoder_with_imagenet_weights(hub, recipe):
    settings = Settings(size=64, recipe=recipe)
    with pytest.warns(UserWarning, match=f'{hub}.resnet18-.*random weights') as told: net = build_model(settings, 3, 2)
    assert net.pretrained=='' and len(told)==1
    weights = resnet18(weights=None).state_dict()
    torch.save(weights, hub/ResNet18_Weights.DEFAULT.url.rsplit('/', 1)[-1])
    net = build_model(settings, 3, 2)
    inside = [k for k in weights if k.startswith(('layer1','layer2')) and k.endswith('conv2.weight')]
    assert net.pretrained=='ImageNet' and inside
    assert all(any(p.shape==weights[k].shape and torch.equal(p, weights[k]) for p in net.parameters()) for k in inside)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert build_model(Settings(size=64, recipe=recipe, pretrained=False), 3, 2).pretrained==''

def test_a_light_network_starts_from_the_model_that_ships(hub):
    "All of it for two classes; for others all but the last layer. Nothing is fetched"
    from brainseg_fastai.runs import load_bundle
    have = load_bundle('ventricles', 'cpu').net.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        nets = {n: build_model(Settings(), 1, n) for n in (2,4)}
    for n,net in nets.items():
        other = [k for k,v in net.state_dict().items() if v.shape!=have[k].shape or not torch.equal(v, have[k])]
        assert net.pretrained=='ready' and (not other if n==2 else other and all(k.startswith('head.1') for k in other)), other
    assert build_model(Settings(pretrained=False), 1, 2).pretrained==''
    with pytest.warns(UserWarning, match='random weights'): assert build_model(Settings(start='imagenet'), 1, 2).pretrained==''

# ---------------------------------------------------------------- from settings

def test_the_light_network_draws_as_fastai_s_unet_does():
    "Its encoder is the one that `create_unet_model` makes from the same seed, its decoder comes from the random numbers after that"
    from fastai.vision.learner import create_unet_model
    torch.manual_seed(7); net = build_model(Settings(size=96, pretrained=False), 1, 2)
    torch.manual_seed(7); body = create_unet_model(resnet18, 2, (96,96), pretrained=False, cut=-3, n_in=1)[0]
    light = LightUnet(body, 2)
    a,b = net.state_dict(), light.state_dict()
    assert list(a)==list(b) and all(torch.equal(a[k], b[k]) for k in a)

def test_the_published_network_is_fastai_s():
    from fastai.layers import Mish, SelfAttention
    from fastai.vision.models.unet import DynamicUnet
    net = build_model(Settings(recipe='published', size=64, pretrained=False), 3, 2)
    kinds = [type(o) for o in net.modules()]
    assert isinstance(net, DynamicUnet) and SelfAttention in kinds and Mish in kinds
    with torch.inference_mode(): assert net.eval()(torch.zeros(2,3,64,64)).shape==(2,2,64,64)

@pytest.mark.parametrize('text,shape', [('arch=unet depth=3 width=8 size=64',(64,64)), ('mode=patch arch=unetr patch=16,16,32 width=2',(16,16,32)),
                                        ('mode=volume arch=segresnet depth=2 width=8',(16,24,16))])
def test_a_network_by_name_from_settings(text, shape):
    from brainseg_fastai.settings import parse_settings
    net = build_model(parse_settings(text), 2, 3, shape).eval()
    with torch.inference_mode(): assert net(torch.zeros(1,2,*shape)).shape==(1,3,*shape)
    assert isinstance(net, InBf16) and net.pretrained==''

def test_settings_that_no_network_fits():
    with pytest.raises(DataError, match='published recipe has a ResNet encoder'): Settings(arch='unet', recipe='published')
    with pytest.raises(DataError, match='unet3d'): build_model(Settings(mode='patch'), 1, 2) # a ResNet for volumes

def test_guesses_start_at_the_share_of_each_class():
    masks = [np.zeros((16,16), np.uint8) for _ in range(4)]
    for m in masks: m[:4,:4] = 2
    shares = class_shares([(None, m) for m in masks], (0,7,255))
    net = build_model(Settings(size=64, pretrained=False), 1, 3, shares=shares)
    np.testing.assert_allclose(net.head[-1][0].bias.detach().exp(), (1-1/16, 1e-3, 1/16), rtol=1e-4) # the class 1 is in no mask
    body,rest = light_splitter(net)
    assert len(body)+len(rest)==len(list(net.parameters()))

@pytest.mark.parametrize('able', [True,False])
def test_bfloat16_where_the_hardware_has_it(able, monkeypatch):
    monkeypatch.setattr('brainseg_fastai.networks.fast_bf16', lambda device: able)
    seen = []
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(1, 1, 1)
        def forward(self, x): seen.append((y := self.conv(x)).dtype); return y
    InBf16(Net())(torch.zeros(1,1,8,8))
    assert seen==[torch.bfloat16 if able else torch.float32]

@pytest.mark.parametrize('arch,dims,size,options', SMALL, ids=ids)
def test_weights_come_back(arch, dims, size, options, tmp_path):
    last = torch.channels_last if dims==2 else torch.channels_last_3d
    def make(): return InBf16(build_network(arch, 1, 2, size, dims, **options)).to(memory_format=last).eval()
    a,b,x = make(), make(), torch.randn(1, 1, *[size]*dims)
    save_weights(a, tmp_path/'a.safetensors')
    load_weights(b, tmp_path/'a.safetensors')
    with torch.inference_mode(): assert torch.equal(a(x), b(x))
    save_weights(b, tmp_path/'b.safetensors')
    assert [o.name for o in sorted(tmp_path.iterdir())]==['a.safetensors','b.safetensors']
    assert (tmp_path/'a.safetensors').read_bytes()==(tmp_path/'b.safetensors').read_bytes()

# ---------------------------------------------------------------- memory

def profiled_mb(net, shape, train, tmp_path):
    "Highest memory beyond weights and gradients, from every real allocation that torch's profiler sees"
    from torch.profiler import ProfilerActivity, profile
    y = torch.zeros((shape[0], *shape[2:]), dtype=torch.long)
    net.train(train)
    def step():
        with torch.set_grad_enabled(train):
            out = net(torch.randn(shape))
            if train: F.cross_entropy(out, y).backward()
    step() # gradients exist from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: step()
    prof.export_chrome_trace(str(tmp_path/'t.json'))
    events = [e for e in json.loads((tmp_path/'t.json').read_text(encoding='utf-8'))['traceEvents'] if e['name']=='[memory]']
    return np.cumsum([e['args']['Bytes'] for e in sorted(events, key=lambda e: e['ts'])]).max()/1e6

@pytest.mark.parametrize('train', [True,False])
@pytest.mark.parametrize('arch,dims,size,options', SMALL, ids=ids)
def test_memory_is_what_a_real_step_takes(arch, dims, size, options, train, tmp_path):
    net = build_network(arch, 1, 3, size, dims, **options)
    shape = (2, 1, *[size]*dims)
    guess,real = memory_estimate(net, shape, train), profiled_mb(net, shape, train, tmp_path)
    weights = guess['parameters_mb']*(4 if train else 1)
    assert (.8 if train else .55) < guess['total_mb']/(real + weights) < 1.1, (guess, real) # scratch space of convolutions is not foreseen
    weights = sum(p.numel() for p in net.parameters())
    assert guess['parameters']==weights and guess['parameters_mb']==pytest.approx(weights*4e-6)
    buffers = sum(b.numel()*b.element_size() for b in net.buffers())/1e6
    assert guess['total_mb']==pytest.approx(guess['activations_mb'] + buffers + (4 if train else 1)*guess['parameters_mb'])

def test_memory_of_what_does_not_fit_here_and_nothing_changes():
    with torch.device('meta'): net = build_network('unet3d', 4, 4, 512, 3, depth=2)
    assert memory_estimate(net, (32,4,512,512,512))['total_mb'] > 1e6 # a terabyte
    net = build_network('unet', 1, 2, 32, depth=2, width=4)
    net.output_block.eval()
    for p in net.input_block.parameters(): p.requires_grad_(False)
    before = {k: v.clone() for k,v in net.state_dict().items()}
    frozen = memory_estimate(net, (1,1,32,32))
    assert all(torch.equal(v, before[k]) and v.device.type=='cpu' for k,v in net.state_dict().items())
    assert net.training and not net.output_block.training and all(p.grad is None for p in net.parameters())
    for p in net.parameters(): p.requires_grad_(True)
    assert frozen['total_mb'] < memory_estimate(net, (1,1,32,32))['total_mb']

def test_memory_of_a_network_with_hooks():
    from fastai.vision.all import create_unet_model, resnet18
    net = create_unet_model(resnet18, 2, (64,64), pretrained=False, n_in=1) # its building runs it, and its hooks keep feature maps
    a = memory_estimate(net, (2,1,64,64))
    assert a==memory_estimate(net, (2,1,64,64)) and 30e6 < a['parameters'] < 40e6 and 20 < a['activations_mb'] < 200
    with torch.inference_mode(): assert net.eval()(torch.randn(1,1,64,64)).device.type=='cpu'

# ---------------------------------------------------------------- losses

def batch(n_classes=3, shape=(9,7), seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, n_classes, *shape, generator=g, requires_grad=True), torch.randint(0, n_classes, (2,*shape), generator=g)

def by_hand(name, pred, targ, weights=None):
    "Each loss from its formula, in double precision"
    z = pred.detach().numpy().astype(float)
    p = np.exp(z - z.max(1, keepdims=True)); p /= p.sum(1, keepdims=True)
    t = np.moveaxis(np.eye(p.shape[1])[targ.numpy()], -1, 1)
    pt = (p*t).sum(1)
    if name=='ce':          return -np.log(pt).mean()
    if name=='weighted_ce': w = np.asarray(weights)[targ.numpy()]; return (w*-np.log(pt)).sum()/w.sum()
    if name=='focal':       return ((1-pt)**2*-np.log(pt)).mean()
    if name=='dice':
        axes = tuple(range(2, p.ndim))
        return (1-(2*(p*t).sum(axes)+1e-5)/(p.sum(axes)+t.sum(axes)+1e-5)).mean()
    return by_hand('dice', pred, targ) + by_hand('ce', pred, targ)

@pytest.mark.parametrize('shape', [(9,7), (5,6,4)])
@pytest.mark.parametrize('name', LOSSES)
def test_losses_are_their_formulas(name, shape):
    for n in (2,4):
        pred,targ = batch(n, shape, n)
        w = np.linspace(.2, 1.8, n)
        loss = make_loss(name, w)
        assert loss(pred, targ).item()==pytest.approx(by_hand(name, pred, targ, w), rel=1e-5)
        loss(pred, targ).backward()
        assert torch.isfinite(pred.grad).all() and pred.grad.abs().sum()>0

def test_dice_ce_is_monai_s():
    from monai.losses import DiceCELoss
    monai = DiceCELoss(to_onehot_y=True, softmax=True)
    def other(pred, targ): return monai(pred, targ[:,None])
    for seed in range(5):
        pred,targ = batch(seed=seed)
        assert torch.equal(make_loss('dice_ce')(pred, targ), other(pred, targ))
        a,b = (torch.autograd.grad(f(pred, targ), pred)[0] for f in (make_loss('dice_ce'), other))
        assert torch.equal(a, b)

def test_losses_work_for_fastai():
    from fastai.vision.core import TensorImage, TensorMask
    pred,targ = batch()
    for name in LOSSES:
        loss = make_loss(name, [1,1,1])
        assert type(loss(TensorImage(pred), TensorMask(targ))) is torch.Tensor
        assert loss(TensorImage(pred), TensorMask(targ)).item()==loss(pred, targ).item()
        assert loss(pred, targ.byte()).item()==loss(pred, targ).item()
        assert loss(pred.bfloat16(), targ).dtype==torch.float
    torch.testing.assert_close(loss.activation(pred).sum(1), torch.ones(2,9,7))
    assert torch.equal(loss.decodes(pred), pred.argmax(1))
    assert isinstance(loss, nn.Module) and not loss.state_dict()

def test_weighted_sums():
    pred,targ = batch()
    v = {k: make_loss(k, [1,2,3])(pred, targ).item() for k in LOSSES}
    for spec,want in {'dice+0.5*focal': v['dice']+.5*v['focal'], ' 2 * ce + .25*dice ': 2*v['ce']+.25*v['dice'], 'ce+ce': 2*v['ce'],
                      '3.*weighted_ce+dice+focal': 3*v['weighted_ce']+v['dice']+v['focal']}.items():
        assert make_loss(spec, [1,2,3])(pred, targ).item()==pytest.approx(want, rel=1e-6)

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.one_of(st.none(), st.decimals('.001', 1000, places=3)), st.sampled_from(list(LOSSES))), min_size=1, max_size=5),
       st.sampled_from(['','  ','\t']))
def test_any_sum_is_read_back(terms, gap):
    spec = f'{gap}+{gap}'.join(k if f is None else f'{f}{gap}*{gap}{k}' for f,k in terms)
    assert parse_loss(spec)==[(float(f or 1), k) for f,k in terms]

@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(alphabet='dicefoal_+*. -0159', max_size=25), st.text(max_size=10)))
def test_anything_else_is_refused_with_the_list(spec):
    try: terms = parse_loss(spec)
    except DataError as e: assert all(k in str(e) for k in LOSSES)
    else: assert all(k in LOSSES and 0 < f < math.inf for f,k in terms)

@pytest.mark.parametrize('spec', ['', 'fokal', 'dice+', '+dice', 'dice-ce', '-1*dice', '0*dice', 'dice*2', 'dice 2', '1e3*ce', 'nan*ce', '1*2*ce',
                                  None])
def test_bad_losses(spec):
    with pytest.raises(DataError, match='expected a sum of ce, weighted_ce, dice, focal, dice_ce'): make_loss(spec)

@pytest.mark.parametrize('weights', [None, [1.,-1.], [0.,0.], [[1.,2.]], [1.,float('nan')]])
def test_bad_weights(weights):
    with pytest.raises(DataError, match='weighted_ce'): make_loss('dice+weighted_ce', weights)

def test_weights_of_another_number_of_classes():
    with pytest.raises(DataError, match='2 class weights for 3 classes'): make_loss('weighted_ce', [1.,2.])(*batch())

# ---------------------------------------------------------------- class weights

def test_class_weights_are_inverse_frequencies_of_training_masks(tmp_path):
    rng = np.random.default_rng(0)
    def case(i, split):
        m = rng.choice([0,7,200], p=[.7,.25,.05], size=(20,30)).astype(np.uint8) if split=='train' else np.full((20,30), 200, np.uint8)
        Image.fromarray(m).save(tmp_path/f'{i}.png')
        return dict(mask=tmp_path/f'{i}.png', split=split), m
    rows,masks = zip(*(case(i, s) for i,s in enumerate(['train','test','train','valid'])))
    t = pd.DataFrame(rows)
    n = np.array([sum((m==c).sum() for m,s in zip(masks, t['split']) if s=='train') for c in (0,7,200)])
    want = (1/n)/(1/n).mean()
    np.testing.assert_allclose(class_weights(t, (0,7,200)), want, rtol=1e-12)
    np.testing.assert_allclose(class_weights(t.query('split=="train"').drop(columns='split'), (0,7,200)), want, rtol=1e-12)
    np.testing.assert_allclose(class_weights([np.searchsorted((0,7,200), m) for m in masks[::2]], (0,7,200)), want, rtol=1e-12)
    assert not np.allclose(class_weights(t.drop(columns='split'), (0,7,200)), want) # without a split, all masks count
    none = pd.concat([t, pd.DataFrame([dict(mask=None, split='train')])])            # cases that are only predicted have no mask
    np.testing.assert_allclose(class_weights(none, (0,7,200)), want, rtol=1e-12)

def test_absent_classes_weigh_one_and_drown_nobody():
    m = np.zeros((4,10,10), np.uint8); m[:,0] = 2
    with pytest.warns(UserWarning, match=r'\[1\] are in no training mask'): w = class_weights([m], (0,1,4))
    np.testing.assert_allclose(w, [.2, 1, 1.8])
    with pytest.warns(UserWarning): np.testing.assert_allclose(class_weights([m*0], (0,1,4)), 1)

def test_no_training_masks_or_unknown_classes():
    with pytest.raises(DataError, match='no training mask'): class_weights(pd.DataFrame(dict(mask=['a.png'], split=['test'])), (0,1))
    with pytest.raises(DataError, match='no training mask'): class_weights([], (0,1))
    with pytest.raises(DataError, match='holds the class 2'): class_weights([np.full((2,2), 2, np.uint8)], (0,1))

def test_gradients_do_not_hold_what_lay_in_memory():
    "In bfloat16, the weights' gradient at the 2×2×2 bottleneck of a 3-D network came out of memory that nothing had written to"
    net = InBf16(build_network('unet3d', 1, 2, (32,32,32), dims=3)).to(memory_format=torch.channels_last_3d)
    for i in range(6):
        rubbish = [torch.full((n,), float('nan')) for n in (1000, 10_000, 100_000, 1_000_000, 5_000_000) for _ in range(20)]
        del rubbish
        net(plain_batch(torch.randn(2, 1, 32, 32, 32))).float().square().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
        net.zero_grad()
