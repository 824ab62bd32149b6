"Heads of every kind: repeatable, within their ranges, and with a truth that fits what is seen"
import numpy as np, pytest, torch
from dataclasses import replace
from hypothesis import given, settings, strategies as st
from scipy import ndimage as ndi
from brainseg_fastai.core import DataError
from brainseg_fastai.simulator import BOX, HeadRanges, Lattice, draw, draw_planes, rotation, simulated_head, simulated_slices, smooth

plain = HeadRanges(regions_sd=0., regions_mm=0., upside_down=0., turn_sd=(0.,0.,0.), scale_sd=0., bend=(0.,0.), crumple=(0.,0.), t1_share=1., choroid_share=0.,
    cap_share=0., lesion_share=0., septum_share=0., noise_within=(0.,0.), bias_sd=(0.,0.), gamma_sd=0., noise=(0.,0.), blur=(.25,.3),
    coarse=(1.,1.), slab=(1.,1.), spacing=(1.,1.), whole_share=0., exact_share=1., cut_share=0.)

def ml(growth, seed=0): return simulated_head(seed, 192, (-30,60), replace(plain, growth=(growth,growth)))[1].sum()/1000

def test_the_same_seed_gives_the_same_pixels_and_another_seed_others():
    one,same,other = (simulated_slices(o, 4, 96) for o in (7,7,8))
    assert all((a==b).all() for a,b in zip(one, same)) and (one[0]!=other[0]).mean()>.1

def test_ventricles_grow_with_the_growth_that_is_asked_for():
    sizes = [ml(o) for o in (-1.5,0.,4.,12.)]
    assert 0<sizes[0]<.8*sizes[1] and 1.5*sizes[1]<sizes[2]<.5*sizes[3], sizes
    assert 10<sizes[1]<40, sizes # the template's have 18 ml

def test_a_wall_moves_about_as_far_as_is_said():
    "From the side wall of the body outwards, along the axis to the right"
    row = [simulated_head(0, 192, (19,23), replace(plain, growth=(o,o)))[1][:,:,2] for o in (0.,6.)]
    reach = [np.flatnonzero(o.any(1)).max() for o in row]
    assert 3<=reach[1]-reach[0]<=9, reach # beside it the flow bends

def test_ventricles_lie_in_the_brain_and_are_dark_in_a_t1_head():
    image,mask = simulated_head(1, 192, (-30,60), replace(plain, growth=(3.,3.)))
    brain = ndi.binary_fill_holes(image>0)
    inner = ndi.binary_erosion(mask, iterations=2)
    assert mask[~brain].sum()<.001*mask.sum() and inner.any()
    assert image[inner].mean()<.6*image[brain & ~mask].mean()

def test_slices_of_a_head_share_one_scale():
    "Beside the brain there is no more noise above it than within it"
    image,_ = simulated_head(1, 192, (0,100), replace(plain, whole_share=1., exact_share=0., noise=(.05,.05)))
    corner = image[:9,:9].astype(float).mean((0,1))
    assert corner[-10:].mean()<1.3*corner[:10].mean()

def test_skulls_are_on_or_off():
    whole,brain = (simulated_head(2, 192, (20,40), replace(plain, whole_share=o, exact_share=1.-o))[0] for o in (1.,0.))
    assert (whole>0).sum()>1.15*(brain>0).sum() and (whole>0)[brain>9].all()

def test_bad_strips_differ_from_the_exact_one():
    exact,bad = (simulated_head(3, 192, (20,40), replace(plain, exact_share=o, strip=(8.,8.)))[0]>0 for o in (1.,0.))
    assert bad.sum()>1.1*exact.sum()

def test_no_two_heads_of_a_batch_are_one():
    images,_ = simulated_slices(0, 8, 96)
    assert len({o.tobytes() for o in images if o.any()})>=7

@given(seed=st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_what_is_drawn_lies_in_its_ranges(seed):
    r,g = HeadRanges(spacing=(.9,1.2), coarse=(1.5,2.)), torch.Generator().manual_seed(seed)
    h,p = draw(g, 6, r), draw_planes(g, 6, r)
    assert ((p['mm']>=.9-1e-6) & (p['mm']<=1.2+1e-6)).all() and h['regions'].abs().max()<=.9
    assert all(o==0 or 1.5<=o<=2 for o in h['coarse'].tolist()) and (h['means']>=0).all()

@given(angles=st.tuples(*[st.floats(-180, 180)]*3))
@settings(deadline=None)
def test_turns_keep_lengths(angles):
    m = rotation(torch.tensor([angles], dtype=torch.float32))[0]
    assert torch.allclose(m@m.T, torch.eye(3), atol=1e-5)

def test_a_smooth_field_takes_its_values_at_its_places():
    values = torch.randn(1, 1, 9, 9, 9)
    at = BOX[0]+30*torch.tensor([[1.,2,3]])-30
    assert torch.allclose(smooth(values, 30, at.reshape(1,1,1,3)), values[:,:,1,2,3].reshape(1,1,1,1), atol=1e-4)
    assert Lattice(values, (0,0,0), 1.)(torch.full((1,1,1,3), 99.)).item()==pytest.approx(values[0,0,-1,-1,-1].item())

@pytest.mark.parametrize('how', [dict(n=0), dict(size=63), dict(size=32)])
def test_sizes_that_make_no_slice_are_refused(how):
    with pytest.raises(DataError, match='expected one or more'): simulated_slices(0, **how)
