"A volume seen through windows is the volume seen at once, for a network that looks at single voxels"
import numpy as np, pytest, torch

from brainseg_fastai.core import DataError
from brainseg_fastai.inference import Frame, Model, predict, window_scores

class Pointwise(torch.nn.Module):
    def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.ones(1))
    def forward(self, x): return torch.cat([x*self.w, torch.sin(3*x[:,:1]), x[:,:1]**2-1], 1)

def model_for(patch=None): return Model(Pointwise(), Frame(codes=(0,1,4), mode='patch' if patch else 'volume', patch=patch))

def smooth(shape):
    g = torch.meshgrid(*(torch.linspace(0, 4, n) for n in shape), indexing='ij')
    return (torch.sin(g[0])*torch.cos(g[1])+.3*g[2])[None]

@pytest.mark.parametrize('shape', [(32,32,32),(37,29,21),(11,40,8)])
@pytest.mark.parametrize('patch', [(16,16,16),(24,10,12),(7,9,5),(64,16,16)])
def test_no_seams(shape, patch):
    f = smooth(shape)
    with torch.inference_mode():
        want = Pointwise()(f[None])[0]
        assert torch.equal(window_scores(model_for(), f), want)
        for overlap in (0,.25,.5):
            got = window_scores(model_for(patch), f, overlap)
            assert got.shape==want.shape and (got-want).abs().max()<=1e-4

@pytest.mark.parametrize('shape', [(40,36,24),(33,50,20)])
def test_patches_agree_with_the_whole(shape):
    a = (255*np.random.default_rng(0).random(shape)).astype(np.uint8)
    models = [model_for(), model_for((16,16,16))]
    for m in models: m.net.train()
    whole,parts = (predict(m, a).mask for m in models)
    assert models[0].net.training, 'left in the mode that it was in'
    assert whole.dtype==np.uint8 and whole.shape==shape
    assert (whole!=parts).mean()<1e-4 # equal scores may be told apart by rounding
    with pytest.raises(DataError, match='3 classes, expected 2'):
        predict(Model(Pointwise(), Frame(codes=(0,1), mode='volume')), a)
