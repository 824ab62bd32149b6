"Slices from volumes: the same picture however a volume is stored, and nothing written when something is wrong"
import itertools, json, re

import nibabel as nib, numpy as np, pandas as pd, pytest
from PIL import Image
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from brainseg_fastai import slices as S
from brainseg_fastai.adni import adni_cases, check_cases, subject_id
from brainseg_fastai.cases import is_simulated, pair_cases
from brainseg_fastai.core import DataError
from brainseg_fastai.slices import choose_slices, find_scans, make_slices, scan_of

AFFINE = np.array([[1.,0,0,-18],[0,1,0,-21],[0,0,2,-20],[0,0,0,1]])
names = 'T1','brainmask','aseg'

def draw(seed=0):
    "T1, brainmask and aseg on a grid of 36×42×24 voxels of 1×1×2 mm, RAS+; no symmetry in any axis"
    rng = np.random.default_rng(seed)
    x,y,z = np.meshgrid(*(np.arange(n) for n in (36,42,24)), indexing='ij')
    r = np.sqrt(((x-17)/14)**2+((y-20)/17)**2+((z-11)/9.5)**2)
    brain = r<1; aseg = np.where(brain, 2, 0)
    aseg[brain & (abs(x-13)<3) & (abs(y-22)<6-abs(z-13)) & (abs(z-13)<5)] = 4
    aseg[brain & (abs(x-21)<2) & (abs(y-22)<6-abs(z-13)) & (abs(z-13)<5)] = 43
    aseg[13,22,12:15] = 31; aseg[21,22,13] = 63
    t1 = np.where(brain, np.where((aseg!=2)&brain, 30, 100+y/2), np.where(r<1.1, 15, np.where(r<1.2, 200, 2)))+rng.normal(0, 3, r.shape)
    t1 = t1.clip(0, 255).astype(np.uint8); t1[brain] = t1[brain].clip(2)
    return dict(T1=t1, brainmask=t1*brain, aseg=aseg.astype(np.int32))

def store(a, path, axes='LIA', affine=AFFINE):
    "Save an RAS+ array with its axes in another order and direction"
    im = nib.Nifti1Image(a, affine, dtype=a.dtype).as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(axes)))
    path.parent.mkdir(parents=True, exist_ok=True); data = np.ascontiguousarray(im.dataobj)
    nib.save(nib.MGHImage(data, im.affine) if path.suffix=='.mgz' else nib.Nifti1Image(data, im.affine, dtype=data.dtype), path)

def subject(root, name='001_S_0001-I1', seed=0, axes='LIA', end='.mgz', sub='mri', **change):
    for k,a in {**draw(seed), **change}.items():
        if a is not None: store(a, root/name/sub/f'{k}{end}', axes)
    return root/name

@pytest.fixture
def root(tmp_path):
    for i,s in enumerate(('001_S_0001-I1','001_S_0001-I2','002_S_0002-I7','sub-03_ses-1')): subject(tmp_path/'fs', s, i)
    return tmp_path/'fs'

def png(out, kind): return {p.name: np.array(Image.open(p)) for p in sorted((out/kind).glob('*.png'))}
def left(d): return sorted(p.name for p in d.iterdir())

def test_the_folder_passes_the_check_and_pairs(root, tmp_path):
    out = tmp_path/'out'; t = make_slices(root, out, n=3, gap=4)
    assert not len(check_cases(out)), check_cases(out).to_string()
    a,b = pair_cases(adni_cases(out, 'brain'), adni_cases(out, 'orig'))
    assert len(a)==len(b)==len(t)==12 and not is_simulated(out)
    assert set(a.subject)=={'001_S_0001','002_S_0002','sub_03'} and set(a.spacing)=={1.}
    for p in a.image: assert subject_id(p) in set(t.subject) and re.fullmatch(r'[^-]+-[^-]+-brain-z\d{3}\.png', p.name)
    assert left(tmp_path)==['fs','out'] and left(out)==['brain','cohort.json','mask','orig','slices.csv']

def test_every_case_knows_where_it_lies_below_the_top_of_the_brain(root, tmp_path):
    t = make_slices(root, tmp_path/'out', n=3, gap=4); c = adni_cases(tmp_path/'out', 'orig')
    want = {(o.subject, o.scan, o.slice): o.mm_below_top for o in t.itertuples()}
    assert len(c)==len(t) and c.below_top.tolist()==[want[o.subject, o.scan, o.slice] for o in c.itertuples()] and c.below_top.nunique()>2

def test_pixels_are_those_of_the_volumes(root, tmp_path):
    make_slices(root, tmp_path/'out'); v = draw(0); seg = np.isin(v['aseg'], [4,43]); k = int(seg.sum((0,1)).argmax())
    o,b,m = (png(tmp_path/'out', kind)[f'001_S_0001-I1-{kind}-z{k:03d}.png'] for kind in ('orig','brain','mask'))
    assert (o==np.rot90(v['T1'][:,:,k])).all() and (b==np.rot90(v['brainmask'][:,:,k])).all()
    assert (m==255*np.rot90(seg[:,:,k])).all() and o.dtype==b.dtype==m.dtype==np.uint8
    assert (b[b>0]==o[b>0]).all() and (o>0).sum()>(b>0).sum()>0
    tissue = np.where(b>60, b, 0) # the front is at the top: the tissue gets brighter that way
    assert np.mean(tissue[8:15][tissue[8:15]>0])>np.mean(tissue[26:33][tissue[26:33]>0])+4

@pytest.mark.parametrize('axes', [''.join(a) for o in itertools.permutations(('RL','AP','SI')) for a in itertools.product(*o)])
def test_however_a_volume_is_stored(axes, tmp_path):
    subject(tmp_path/'a', axes='RAS'); subject(tmp_path/'b', axes=axes)
    for o in 'ab': make_slices(tmp_path/o, tmp_path/f'out_{o}', n=2, gap=4, workers=1)
    for kind in ('orig','brain','mask'):
        a,b = png(tmp_path/'out_a', kind), png(tmp_path/'out_b', kind)
        assert list(a)==list(b) and len(a)==2 and all((a[n]==b[n]).all() for n in a)
    assert (tmp_path/'out_a/slices.csv').read_bytes()==(tmp_path/'out_b/slices.csv').read_bytes()

def test_the_three_volumes_may_be_stored_differently(tmp_path):
    d = subject(tmp_path/'fs', axes='LIA'); store(draw()['aseg'], d/'mri'/'aseg.mgz', 'RAS'); store(draw()['brainmask'], d/'mri'/'brainmask.mgz', 'PSL')
    subject(tmp_path/'ref'); make_slices(tmp_path/'fs', tmp_path/'a'); make_slices(tmp_path/'ref', tmp_path/'b')
    for k in ('orig','brain','mask'): assert all((x==y).all() for x,y in zip(png(tmp_path/'a', k).values(), png(tmp_path/'b', k).values()))

@pytest.mark.parametrize('end,sub', [('.nii.gz','mri'), ('.nii','.'), ('.mgz','.')])
def test_nifti_triples_give_the_same(end, sub, tmp_path):
    subject(tmp_path/'fs'); subject(tmp_path/'nii', end=end, sub=sub)
    for o in ('fs','nii'): make_slices(tmp_path/o, tmp_path/f'out_{o}')
    for k in ('orig','brain','mask'): assert all((x==y).all() for x,y in zip(png(tmp_path/'out_fs', k).values(), png(tmp_path/'out_nii', k).values()))

def test_nifti_files_side_by_side_under_other_names(tmp_path):
    other = 'head','brain','labels'; v = draw()
    for s in ('anna-1','anna-2','ben-1'):
        for k,o in zip(names, other): store(v[k], tmp_path/'nii'/f'{s}_{o}.nii.gz', 'RAS')
    t = make_slices(tmp_path/'nii', tmp_path/'out', names=other, subject='^([a-z]+)-')
    assert list(zip(t.subject, t.scan))==[('anna','1'),('anna','2'),('ben','1')] and list(t.folder)==['anna-1_','anna-2_','ben-1_']
    with pytest.raises(DataError, match='no anna-1_labels|anna-1_labels'):
        (tmp_path/'nii'/'anna-1_labels.nii.gz').unlink(); make_slices(tmp_path/'nii', tmp_path/'o2', names=other)

# -- grey levels and labels

def test_other_numbers_get_one_window_for_both_kinds(tmp_path):
    v = draw(); big = (v['T1'].astype(np.int16)*12); subject(tmp_path/'fs', T1=big, brainmask=(v['brainmask']>0).astype(np.uint8), end='.nii.gz')
    make_slices(tmp_path/'fs', tmp_path/'out')
    (o,),(b,) = (list(png(tmp_path/'out', k).values()) for k in ('orig','brain')); k = int(find_index(tmp_path/'out'))
    lo,hi = np.percentile(big[big>0], (.1,99.9)); want = ((big[:,:,k].astype(float)-lo)*255/(hi-lo)).clip(0,255)
    assert abs(o-np.rot90(want)).max()<=.51 and o.max()>240
    inside = np.rot90(v['brainmask'][:,:,k]>0)
    assert (b[inside]==o[inside]).all() and not b[~inside].any()

def find_index(out): return pd.read_csv(out/'slices.csv')['index'].iloc[0]

def test_only_where_the_brain_is_counts_of_brainmask(tmp_path):
    "Grey levels of a re-normalised mask do not come through; voxels set to 1 by hand are no brain"
    v = draw(); odd = (v['brainmask']//2); odd[v['brainmask']>0] = odd[v['brainmask']>0].clip(2); odd[10:14] = np.minimum(odd[10:14], 1)
    subject(tmp_path/'fs', brainmask=odd); make_slices(tmp_path/'fs', tmp_path/'out')
    (o,),(b,) = (list(png(tmp_path/'out', k).values()) for k in ('orig','brain'))
    assert (b[b>0]==o[b>0]).all() and not b[:,10:14].any() and b.any()

def test_choroid_plexus_and_other_labels(tmp_path):
    subject(tmp_path/'fs'); n = {}
    for name,kw in dict(plain={}, choroid=dict(choroid=True), other=dict(labels=[43])).items():
        t = make_slices(tmp_path/'fs', tmp_path/name, rule='height', height=12, **kw); n[name] = t.area_mm2[0]
        assert (png(tmp_path/name, 'mask').popitem()[1]>0).sum()==n[name]
    assert n['choroid']==n['plain']+2 and 0<n['other']<n['plain']
    assert json.loads((tmp_path/'choroid/cohort.json').read_text(encoding='utf-8'))['labels']==[4,5,14,15,43,44,31,63]

# -- which slice

def test_rules():
    v = draw(); b,m = v['brainmask']>0, np.isin(v['aseg'], [4,43]); mm = (1,1,2.); zs = np.flatnonzero(b.sum((0,1))>=100); top = zs[-1]
    at = lambda *a,**k: choose_slices(b, m, mm, *a, **k)[0].tolist()
    assert at()==[m.sum((0,1)).argmax()] and at('height', 10)==[top-5] and at('fraction', .25)==[int(np.floor(zs[0]+.25*np.ptp(zs)+.5))]
    assert at('height', 10, n=3, gap=4)==[top-7,top-5,top-3] and at('height', 10, n=2, gap=4)==[top-5,top-3] and at('height', 10, n=2, gap=.1)==[top-5,top-4]
    stray = b.copy(); stray[0,0,23] = True # a lone voxel is no top of a brain
    assert choose_slices(stray, m, mm, 'height', 10)[0].tolist()==[top-5]

def test_the_rule_is_recorded(root, tmp_path):
    t = make_slices(root, tmp_path/'out', rule='fraction', height=.55, n=2, gap=2); d = json.loads((tmp_path/'out/cohort.json').read_text(encoding='utf-8'))
    assert d['rule']=={**d['rule'], 'rule':'fraction', 'height':.55, 'n':2, 'gap':2.} and '2 axial slices 2 mm apart' in d['rule']['sentence'] and '0.55' in d['rule']['sentence']
    assert [(o['subject'],o['scan'],o['spacing']) for o in d['scans']]==[(s,c,1.) for s,c in dict.fromkeys(zip(t.subject, t.scan))]
    assert d['scans'][0]['files']==[f'001_S_0001-I1/mri/{o}.mgz' for o in names] and len(d['scans'][0]['slices'])==2
    assert str(tmp_path) not in (tmp_path/'out/cohort.json').read_text(encoding='utf-8')
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/'out/slices.csv', dtype={'scan':str}), t)
    assert (t.mm_below_top>0).all() and (t.area_mm2>0).all() and (t.brain_mm2>t.area_mm2).all()

def test_the_result_repeats(root, tmp_path):
    for o,w in (('a',1),('b',4)): make_slices(root, tmp_path/o, workers=w)
    fs = [p.relative_to(tmp_path/'a') for p in (tmp_path/'a').rglob('*') if p.is_file()]
    assert len(fs)==14 and all((tmp_path/'a'/f).read_bytes()==(tmp_path/'b'/f).read_bytes() for f in fs)

@pytest.mark.parametrize('kw,words', [(dict(rule='mid'), 'largest, height, fraction'), (dict(height=5), 'for the rule largest'), (dict(rule='fraction', height=40), 'between 0 and 1'),
    (dict(rule='height', height=-1), 'mm below'), (dict(rule='height', height=200), 'Ask for others'), (dict(rule='height', height=2), 'nothing of the structure'),
    (dict(n=0), 'whole number'), (dict(n=1.5), 'whole number'), (dict(n=9, gap=20), 'Ask for others'), (dict(gap=0), 'above 0'), (dict(subject='('), 'regular expression'),
    (dict(subject='x'), 'one group'), (dict(subject='(zzz)'), 'does not tell'), (dict(folders='nix*'), 'no scan'), (dict(labels=[99]), '99')])
def test_impossible_wishes(kw, words, root, tmp_path):
    with pytest.raises(DataError) as e: make_slices(root, tmp_path/'out', **kw)
    assert words in str(e.value) and left(tmp_path)==['fs']

# -- names

def test_subject_and_scan_from_names():
    for name,want in {'027_S_0307-I34159':('027_S_0307','I34159'), '027_S_0307_I34159':('027_S_0307','I34159'), '027_S_0307':('027_S_0307','T1'), 'sub-01':('sub_01','T1'),
                      'sub-01_ses-2':('sub_01','ses_2'), 'a-b c':('a_b_c','T1'), 'm06.long.p1':('p1','m06'), '002_S_0413-m06.long.002_S_0413':('002_S_0413','m06'),
                      '027_S_03071':('027_S_03071','T1')}.items():
        assert scan_of(name)==want, name
    assert scan_of('P7-visit2', '(P[0-9]+)')==('P7','visit2')

def test_two_folders_of_one_name_are_refused(tmp_path):
    subject(tmp_path/'fs', 'a-b'); subject(tmp_path/'fs', 'a_b', 1)
    with pytest.raises(DataError, match='the same as in a-b'): make_slices(tmp_path/'fs', tmp_path/'out')

def test_averages_and_strange_folders_are_passed_over(root, tmp_path):
    subject(root, 'fsaverage'); base = subject(root, '002_S_0002'); (base/'base-tps').write_text('x\n', encoding='utf-8')
    (root/'logs').mkdir(); (root/'logs'/'a.txt').write_text('x', encoding='utf-8'); (root/'readme.txt').write_text('x', encoding='utf-8')
    assert len(find_scans(root))==4

def test_a_scan_and_its_longitudinal_twin(tmp_path):
    for i,s in enumerate(('p1_m00','p1_m00.long.p1','p1_m06.long.p1')): subject(tmp_path/'fs', s, i)
    with pytest.raises(DataError, match=r"folders='\*\.long\.\*'"): make_slices(tmp_path/'fs', tmp_path/'out')
    t = make_slices(tmp_path/'fs', tmp_path/'out', folders='*.long.*')
    assert list(zip(t.subject, t.scan))==[('p1','m00'),('p1','m06')]

# -- bad input

def change(d, name, f):
    p = d/'mri'/f'{name}.mgz'; im = nib.load(p); a,aff = f(np.asarray(im.dataobj).copy(), im.affine.copy()); nib.save(nib.MGHImage(a, aff), p)

def cut(p): p.write_bytes(p.read_bytes()[:len(p.read_bytes())//2])
def put(value): 
    def f(a, aff): a = a.astype(np.float32); a[3,3,3] = value; return a,aff
    return f
def shift(a, aff): aff[0,3] += 1; return a,aff
def wide(a, aff): return a,aff@np.diag([1,1,1.5,1])

@pytest.mark.parametrize('harm,words', [
    (lambda d: (d/'mri/T1.mgz').unlink(), ['no T1', 'recon-all']), (lambda d: (d/'mri/aseg.mgz').unlink(), ['no aseg']),
    (lambda d: (d/'mri/brainmask.mgz').rename(d/'mri/brain.mgz'), ['brain.mgz', 'normalised again', 'brainmask.mgz']),
    (lambda d: cut(d/'mri/T1.mgz'), ['T1.mgz', 'damaged']), (lambda d: cut(d/'mri/aseg.mgz'), ['aseg.mgz', 'damaged']),
    (lambda d: change(d, 'aseg', lambda a,f: (a[:-1],f)), ['aseg.mgz', 'shape', 'as in T1.mgz']), (lambda d: change(d, 'brainmask', shift), ['brainmask.mgz', 'affine']),
    (lambda d: change(d, 'aseg', lambda a,f: (np.where(a>2, 2, a).astype(np.int32),f)), ['aseg.mgz', 'none of the labels 4, 5']),
    (lambda d: change(d, 'brainmask', lambda a,f: (a*0,f)), ['brainmask.mgz', 'no voxel above 0']), (lambda d: change(d, 'T1', put(np.nan)), ['T1.mgz', 'NaN']),
    (lambda d: change(d, 'aseg', put(.5)), ['aseg.mgz', 'whole numbers']), (lambda d: [change(d, o, wide) for o in names], ['T1.mgz', 'square pixels'])],
    ids='no_T1 no_aseg brain.mgz cut_T1 cut_aseg shape affine no_ventricle no_brain nan half oblong'.split())
def test_bad_scans_are_named_and_nothing_is_written(harm, words, root, tmp_path):
    harm(root/'002_S_0002-I7')
    with pytest.raises(DataError) as e: make_slices(root, tmp_path/'out')
    assert all(w in str(e.value) for w in [*words, '1 of 4 scans', '002_S_0002-I7', 'nothing was written']), str(e.value)
    assert left(tmp_path)==['fs']
    t = make_slices(root, tmp_path/'out', skip=True); d = json.loads((tmp_path/'out/cohort.json').read_text(encoding='utf-8'))
    assert len(t)==3 and [o['folder'] for o in d['left_out']]==['002_S_0002-I7'] and words[0] in d['left_out'][0]['why']
    assert not [p for p in (tmp_path/'out').rglob('*.png') if p.name.startswith('002')]

def test_every_bad_scan_is_named(root, tmp_path):
    for d in root.iterdir(): (d/'mri/aseg.mgz').unlink()
    with pytest.raises(DataError, match='4 of 4 scans') as e: make_slices(root, tmp_path/'out', skip=True)
    assert all(d.name in str(e.value) for d in root.iterdir()) and left(tmp_path)==['fs']

def test_where_it_goes(root, tmp_path):
    (tmp_path/'full').mkdir(); (tmp_path/'full/x').write_text('x', encoding='utf-8'); (tmp_path/'file').write_text('x', encoding='utf-8'); (tmp_path/'empty').mkdir()
    for o in ('full','file'):
        with pytest.raises(DataError, match='new or an empty folder'): make_slices(root, tmp_path/o)
    make_slices(root, tmp_path/'empty'); make_slices(root, tmp_path/'deep/er')
    assert left(tmp_path/'full')==['x'] and len(adni_cases(tmp_path/'empty'))==len(adni_cases(tmp_path/'deep/er'))==4

def test_a_crash_leaves_nothing(root, tmp_path, monkeypatch):
    real,seen = S.load_scan,[]
    def crash(scan, labels):
        seen.append(scan)
        if len(seen)==3: raise MemoryError
        return real(scan, labels)
    monkeypatch.setattr(S, 'load_scan', crash)
    with pytest.raises(MemoryError): make_slices(root, tmp_path/'out', workers=1)
    assert left(tmp_path)==['fs']

@pytest.mark.parametrize('where', ['nowhere', 'empty', 'file'])
def test_no_subjects(where, tmp_path):
    (tmp_path/'empty').mkdir(); (tmp_path/'file').write_text('x', encoding='utf-8')
    with pytest.raises(DataError): make_slices(tmp_path/where, tmp_path/'out')
    assert left(tmp_path)==['empty','file']
