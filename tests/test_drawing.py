"Cases as pictures: outlines in their colours and places, odd images, and the whole of a small table"
import base64, io

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from brainseg_fastai.core import DataError
from brainseg_fastai.drawing import (PALETTE, PRED, TRUTH, case_tile, crop_box, data_uri, draw_case, marks, middle_slice, outline,
                                     rgb_of, show_cases)

def tile(image, truth, pred, px):
    "As in `case_tile`"
    return draw_case(image, [(truth, TRUTH, True), (pred, PRED, False)], crop_box((truth>0)|(pred>0)), px)

def near(im, colour): return np.abs(np.asarray(im).astype(int)-rgb_of(colour)).sum(-1)<60

def square(*where, code=1):
    m = np.zeros((64,64), np.uint8)
    m[where] = code
    return m

GREY = np.full((64,64), 100, np.uint8)

def test_outlines_have_their_colours_and_places():
    a = tile(GREY, square(slice(20,40), slice(10,30), code=255), square(slice(20,40), slice(34,54)), 128)
    (_,xt),(_,xp) = (near(a, c).nonzero() for c in (TRUTH, PRED))
    assert len(xt) and len(xp) and xt.max()<64<=xp.min()+1

def test_agreement_leaves_both_outlines_visible():
    m = square(slice(20,44), slice(20,44))
    a = tile(GREY, m, m, 160)
    assert all(near(a, c).sum()>100 for c in (TRUTH, PRED))

def test_every_class_has_its_colour():
    m = square(slice(5,25), slice(5,25)) + square(slice(35,60), slice(35,60), code=4)
    a = draw_case(GREY, [(m, {1:'#ff0000', 4:'#00ff00'}, False)])
    red,green = (np.argwhere(near(a, c)) for c in ('#ff0000','#00ff00'))
    assert red.min()==5 and red.max()==24 and green.min()==35 and green.max()==59 and not near(a, '#ff0000')[15,15]

@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 99), opacity=st.floats(.01, 1))
def test_fill_paints_the_mask_and_nothing_else(seed, opacity):
    rng = np.random.default_rng(seed)
    image,mask = rng.integers(0, 256, (9,7), np.uint8), rng.integers(0, 3, (9,7))
    rgb = np.array(draw_case(image, [(mask, {1:'#ff0000', 2:'#102030'}, False)], fill=opacity))
    assert rgb.dtype==np.uint8 and rgb.shape==(9,7,3) and (rgb[mask==0]==image[mask==0][:,None]).all()
    for c,colour in ((1,(255,0,0)), (2,(16,32,48))):
        want = (1-opacity)*image[mask==c][:,None]+opacity*np.array(colour)
        assert np.abs(rgb[mask==c]-want).max(initial=0)<=.51

@pytest.mark.parametrize('img', [np.zeros((40,64),np.uint8), np.full((64,40),7,np.uint16), np.zeros((50,50,3),np.uint8)])
def test_odd_images(img):
    none = np.zeros(img.shape[:2],np.uint8); every = none+1
    for t,p in ((none,none),(every,none),(none,every),(every,every)): assert tile(img,t,p,32).size==(32,32)

def test_pictures_are_fitted_and_colours_stay():
    assert draw_case(np.zeros((1024,512)), px=256).size==(128,256) and draw_case(np.zeros((40,30))).size==(30,40)
    red = np.zeros((40,30,3), np.uint8); red[...,0] = 200
    assert np.array_equal(np.array(draw_case(red)), red)

def test_a_layer_for_itself_lies_where_the_mask_is():
    m = np.zeros((60,90), int); m[20:40,30:60] = 3
    (here,rgb), = marks([(m, {3:'#12ab34'}, False)], (90,60))
    ys,xs = here.nonzero()
    assert (ys.min(),xs.min(),ys.max(),xs.max())==(20,30,39,59) and not here[30,45] and rgb.tolist()==[0x12,0xab,0x34]

def test_outline_inside_and_outside_share_nothing():
    rng = np.random.default_rng(0)
    for _ in range(20):
        m = rng.random((30,40))<.3
        a,b = outline(m), outline(m, True)
        assert not (a & b).any() and not (a & ~m).any() and not (b & m).any()

def test_other_sizes_are_refused():
    with pytest.raises(DataError, match='one size'): middle_slice(np.zeros((9,9)), np.zeros((9,9)), np.zeros((8,9)))

def test_crop_stays_square_and_holds_the_mask():
    rng = np.random.default_rng(1)
    for _ in range(200):
        m = np.zeros(rng.integers(8,90,2),bool); m[rng.integers(0,m.shape[0],3),rng.integers(0,m.shape[1],3)] = True
        l,t,r,b = crop_box(m); ys,xs = m.nonzero()
        assert r-l==b-t and l<=xs.min() and xs.max()<r and t<=ys.min() and ys.max()<b

def test_of_a_volume_the_slice_with_most_to_see():
    v = np.zeros((4,5,6), np.uint8); v[1:3,1:3,4] = 1; v[0,0,1] = 1
    im,m = middle_slice(np.stack([v*0,v*9,v*0], -1), v)
    assert np.array_equal(m, np.rot90(v[:,:,4])) and np.array_equal(im, 9*m) # the middle one of three channels
    assert middle_slice(np.arange(120).reshape(4,5,6), v*0)[0][-1,0]==3      # nothing marked: the middle

def test_data_addresses():
    for f,got in (('JPEG','jpeg'), ('PNG','png')):
        uri = data_uri(Image.fromarray(GREY), f)
        assert uri.startswith(f'data:image/{got};base64,')
        assert Image.open(io.BytesIO(base64.b64decode(uri.partition(',')[2]))).size==(64,64)

@pytest.fixture
def table(tmp_path):
    rows = []
    for i in range(5):
        f = dict(image=str(tmp_path/f'i{i}.png'), mask=tmp_path/f'm{i}.png')
        Image.fromarray(GREY).save(f['image']); Image.fromarray(square(slice(9,30), slice(9,30), code=1+i)).save(f['mask'])
        rows.append(dict(subject=f'00{i}_S', scan='I1', slice='ax3', inputs='brain', spacing=(2.,1.) if i else None, **f))
    return pd.DataFrame(rows)

def test_show_cases(table):
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    fig = show_cases(table, 3)
    assert [ax.get_title()[:5] for ax in fig.axes]==['000_S','002_S','004_S'] and plt.get_fignums()==before
    assert [ax.get_aspect() for ax in fig.axes]==[1,2,2]
    pics = [ax.images[0].get_array() for ax in fig.axes]
    assert all(near(p, c).any() for p,c in zip(pics, PALETTE)) and not near(pics[0], PALETTE[1]).any()

def test_show_cases_without_masks(table):
    assert len(show_cases(table.assign(mask=None)).axes)==5

def test_lost_files_are_named(table):
    with pytest.raises(DataError, match='lost.png'): case_tile(table.image[0], table['mask'][0], 'lost.png')
