import numpy as np, pandas as pd, pytest
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial.distance import cdist
from brainseg_fastai.core import DataError
from brainseg_fastai.scores import (EMPTY_POLICY, NSD_TOLERANCE, TOLERANCE_POLICY, empty_score, overlap, pooled_dice, score_mask,
                                    summarise_scores)

SPACINGS = [None, (1., 1.), .9375, (.9375, 1.5), (.5, 3.)]

def random_masks(seed, n=24):
    "Two non-empty masks: blobs, thin noise, single pixels, often touching the border"
    r = np.random.default_rng(seed)
    def one():
        m = gaussian_filter(r.normal(size=(n, n)), r.choice([.01, 1, 2, 4]))
        m = m > np.quantile(m, r.choice([.3, .8, .95, .995]))
        return m if m.any() else one()
    return one(), one()

def brute(p, t, spacing, tol=NSD_TOLERANCE):
    "HD95 and NSD from every pair of edge pixels"
    a, b = (np.argwhere(m ^ binary_erosion(m))*spacing for m in (p, t))
    d = cdist(a, b)
    da, db = d.min(1), d.min(0)
    near = lambda o: (o <= tol*(1 + 1e-6)).sum()
    return max(np.percentile(da, 95), np.percentile(db, 95)), (near(da) + near(db))/(len(da) + len(db))

def test_distances_of_a_thousand_random_masks_agree_with_brute_force():
    for i in range(1000):
        p, t = random_masks(i)
        sp = SPACINGS[i % len(SPACINGS)]
        s = score_mask(p, t, sp)
        hd, nsd = brute(p, t, np.broadcast_to(1. if sp is None else sp, 2))
        assert abs(s['hd95'] - hd) < 1e-6 and abs(s['nsd'] - nsd) < 1e-6, (i, s, hd, nsd)

def test_dice_and_jaccard_of_a_thousand_agree_with_monai_and_sklearn():
    import torch
    from sklearn.metrics import f1_score, jaccard_score
    from monai.metrics import compute_dice, compute_iou
    pairs = [random_masks(i) for i in range(1000)]
    p, t = (torch.tensor(np.stack(o))[:, None].double() for o in zip(*pairs))
    dice, iou = compute_dice(p, t)[:, 0].numpy(), compute_iou(p, t)[:, 0].numpy()
    sk = [o.reshape(1000, -1).numpy().astype(int).T for o in (t, p)] # one label per mask: all thousand at once
    ours = pd.DataFrame([overlap(*o) for o in pairs])
    np.testing.assert_allclose(ours.dice, f1_score(*sk, average=None), atol=1e-6, rtol=0)
    np.testing.assert_allclose(ours.jaccard, jaccard_score(*sk, average=None), atol=1e-6, rtol=0)
    np.testing.assert_allclose(ours.dice, dice, atol=1e-6, rtol=0)
    np.testing.assert_allclose(ours.jaccard, iou, atol=1e-6, rtol=0)

@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_distances_agree_with_monai_to_single_precision():
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice
    for i in range(40):
        p, t = random_masks(i, 40)
        sp = [(1., 1.), (.9375, 1.5)][i % 2]
        a, b = (torch.tensor(m)[None, None].float() for m in (p, t))
        s = score_mask(p, t, sp)
        assert abs(s['hd95'] - compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=list(sp)).item()) < 1e-4
        assert abs(s['nsd'] - compute_surface_dice(a, b, [NSD_TOLERANCE], include_background=True, spacing=list(sp)).item()) < 1e-6

def test_volumes_agree_with_brute_force():
    r = np.random.default_rng(0)
    for sp in [(1, 1, 1), (3., .9, .9)]:
        p, t = (gaussian_filter(r.normal(size=(8, 12, 12)), 1.5) > .05 for _ in range(2))
        s = score_mask(p, t, sp)
        np.testing.assert_allclose((s['hd95'], s['nsd']), brute(p, t, sp), atol=1e-6)
        assert np.isclose(s['size_true'], t.sum()*np.prod(sp))

def test_symmetry_and_far_padding_change_nothing():
    p, t = random_masks(3)
    a, b = score_mask(p, t), score_mask(t, p)
    c = score_mask(np.pad(p, 30), np.pad(t, 30))
    for k in ('dice', 'jaccard', 'hd95', 'nsd'): assert a[k] == b[k] == c[k]

def test_units():
    p, t = random_masks(1)
    px, mm, nan = score_mask(p, t), score_mask(p, t, 2.), score_mask(p, t, float('nan'))
    assert (px['unit'], mm['unit'], nan['unit']) == ('px', 'mm', 'px') and nan == px
    assert np.isclose(mm['hd95'], 2*px['hd95']) and np.isclose(mm['size_true'], 4*px['size_true']) and mm['dice'] == px['dice']
    assert score_mask(p, t, tolerance=1e3)['nsd'] == 1

def test_empty_policy():
    z, t = np.zeros((30, 40), int), np.zeros((30, 40), int)
    t[5:9, 5:9] = 1
    assert [score_mask(z, z)[k] for k in ('dice', 'jaccard', 'hd95', 'nsd')] == [1, 1, 0, 1]
    for a, b in ((z, t), (t, z)):
        s = score_mask(a, b, (1., 2.))
        assert [s[k] for k in ('dice', 'jaccard', 'nsd')] == [0, 0, 0] and np.isclose(s['hd95'], np.hypot(30, 80))
    assert empty_score(False, False, 1) is None
    assert 'Dice 1' in EMPTY_POLICY and 'HD95 the image diagonal' in EMPTY_POLICY and '1 mm' in TOLERANCE_POLICY

def test_several_structures():
    t = np.zeros((20, 20), int)
    t[2:8, 2:8], t[10:18, 10:18] = 1, 2
    p = np.where(t == 2, 0, t)
    s = score_mask(p, t, n_codes=4)
    assert (s['dice_1'], s['dice_2'], s['dice']) == (1, 0, .5) and np.isnan(s['dice_3'])
    assert (s['n_true'], s['n_pred'], s['n_both']) == (100, 36, 36) and np.isclose(s['hd95'], np.hypot(20, 20)/2)
    z = score_mask(t*0, t*0, n_codes=4)
    assert z['dice'] == 1 and np.isnan(z['dice_1'])

@pytest.mark.parametrize('p,t,kw,say', [
    (np.ones((4, 4), np.uint8)*255, np.ones((4, 4), int), {}, '0/255 becomes 0/1'),
    (np.ones((4, 4), int), np.ones((4, 4)), {}, 'float64'),
    (np.ones((4, 4), int), np.ones((4, 5), int), {}, r'\(4, 5\)'),
    (np.ones(4, int), np.ones(4, int), {}, r'\(H,W\)'),
    (-np.ones((4, 4), int), np.ones((4, 4), int), {}, 'integer codes'),
    (np.ones((4, 4), int), np.ones((4, 4), int), dict(spacing=0), 'positive'),
])
def test_wrong_input_is_refused(p, t, kw, say):
    with pytest.raises(DataError, match=say): score_mask(p, t, **kw)

def test_pooled_dice_and_summary_weigh_differently():
    big, small = np.ones((60, 60), int), np.zeros((60, 60), int)
    small[:3, :3] = 1
    s = pd.DataFrame([score_mask(big, big), score_mask(small*0, small)]).assign(subject=['a', 'b'])
    assert pooled_dice(s) > .99 and s.dice.mean() == .5
    assert np.isclose(pooled_dice(s.drop(columns=['n_both'])), pooled_dice(s))
    assert np.isnan(pooled_dice(s[['dice']]))
    many = pd.concat([s] + [s[s.subject == 'a']]*9) # a subject with ten images weighs as much as one with one
    out = summarise_scores(many)
    assert out.loc['dice', 'mean'] == .5 and out.loc['dice', 'n'] == 2 and np.isnan(out.loc['pooled_dice', 'low'])
    with pytest.raises(DataError, match='rows'): summarise_scores(s.iloc[:0])
    with pytest.raises(DataError, match="no column 'site'"): summarise_scores(s, by='site')

def test_intervals_stay_where_scores_can_be():
    s = pd.DataFrame(dict(subject=list('abcde'), dice=[.01,.99,.99,1,1], jaccard=.5, hd95=[90,1,1,1,0.], nsd=[0,1,1,1,1.], dice_WT=[np.nan]*4+[.5]))
    t = summarise_scores(s)
    assert t.loc['dice','high']==1 and t.loc['hd95','low']>=0 and t.loc['dice_WT','n']==1
