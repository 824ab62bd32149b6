"The demo cohort: anatomy that makes sense, files that repeat, and a cache that is whole or absent"
import json, os, subprocess, sys
from pathlib import Path

import numpy as np, pytest
from PIL import Image
from scipy import ndimage as ndi

from brainseg_fastai import core, demo
from brainseg_fastai.adni import adni_cases, check_cases
from brainseg_fastai.cases import is_simulated
from brainseg_fastai.core import DataError

N,KINDS = 6,('brain','orig','mask')

@pytest.fixture(scope='session')
def root(tmp_path_factory): return demo.demo_cohort(N, path=tmp_path_factory.mktemp('demo')/'cohort', progress=False, workers=2)

@pytest.fixture(scope='session')
def info(root): return json.loads((root/'cohort.json').read_text(encoding='utf-8'))

@pytest.fixture(scope='session')
def scans(root, info):
    read = lambda r,k: np.array(Image.open(root/demo.png_name(r, k)))
    return [(r, {k:read(r, k) for k in KINDS}) for r in info['scans']]

@pytest.fixture(scope='session')
def template(): return demo.load_template()

@pytest.fixture
def quick(monkeypatch, template):
    "The template is read once for all tests that make a cohort in this process"
    monkeypatch.setattr(demo, 'load_template', lambda: template)

def in_background(path, *args, code=''):
    "A second Python that makes a small cohort at `path`"
    call = f"demo_cohort(*{args!r}, path={str(path)!r}, size=64, progress=False, workers=1)"
    src = f"{code}\nfrom brainseg_fastai.demo import demo_cohort\n{call}"
    here = [str(Path(demo.__file__).parents[1]), os.environ.get('PYTHONPATH','')]
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':os.pathsep.join(here)}
    return subprocess.Popen([sys.executable, '-c', src], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def same_bytes(a, b):
    fa,fb = [sorted(p.relative_to(r).as_posix() for p in r.rglob('*') if p.is_file()) for r in (a,b)]
    return fa==fb and all((a/f).read_bytes()==(b/f).read_bytes() for f in fa)

# -- the label in the template

def test_label_is_ventricles_alone(template):
    lab = template.maps[5]>.5
    at = lambda x,y,z: lab[tuple(int(a-o) for a,o in zip((x,y,z), template.origin))]
    for p in [(5,10,12), (-5,10,12), (26,-42,8), (-26,-42,8), (12,-15,22), (-12,-15,22)]: assert at(*p), p
    cisterns = [(0,-25,12), (0,-22,15), (0,-45,4), (0,-35,3)]
    fissures = [(0,50,14), (0,-70,14), (45,-10,14), (-45,-10,14)]
    for p in cisterns+fissures: assert not at(*p), p
    assert 12<lab.sum()/1000<25 # mL; the temporal horns are not in the slab

def test_label_is_symmetric_and_not_at_the_surface(template):
    lab,brain = template.maps[5]>.5,template.maps[4]>.5
    mid = int(-template.origin[0])
    assert lab[:mid].sum()/lab[mid+1:].sum()==pytest.approx(1, abs=.05)
    inner = ndi.distance_transform_edt(brain[...,24:60]) # the slab's own faces are no surface
    assert inner[lab[...,24:60]].min()>10

def test_flow_is_gentle(template):
    "Neighbouring voxels never change places in one step of the walk, even with the largest ventricles"
    steps,growth = 4,6
    for i in range(3): assert np.abs(np.diff(template.flow[i], axis=i)).max()*growth/steps<1.3

# -- the pictures

def test_layout_and_facts(root, info):
    assert info['simulated'] is True and info['seed']==42 and info['n_subjects']==N and 'MNI152' in info['source']
    assert is_simulated(root)
    files = {k:sorted(p.name for p in (root/k).iterdir()) for k in KINDS}
    assert {k:len(v) for k,v in files.items()}==dict.fromkeys(KINDS, len(info['scans']))
    assert sorted(p.name for p in root.iterdir())==['brain','cohort.json','mask','orig']
    assert oct((root/'brain').stat().st_mode & 0o700)==oct(0o700)

def test_case_tables_are_clean(root, info):
    for kind in ('brain','orig'):
        df = adni_cases(root, kind)
        assert len(df)==len(info['scans']) and df.subject.nunique()==N
    probs = check_cases(root)
    assert not (probs.level=='error').any(), probs

def test_form(scans):
    for r,ims in scans:
        assert all(a.shape==(256,256) and a.dtype==np.uint8 for a in ims.values())
        assert set(np.unique(ims['mask']))=={0,255}

def test_brain_is_orig_without_its_surroundings(scans):
    for r,ims in scans:
        brain,orig = ims['brain'],ims['orig']
        inside = ndi.binary_fill_holes(brain>0)
        assert (brain[inside]==orig[inside])[brain[inside]>0].all()
        assert (brain[~inside]==0).all() and (orig[~inside]>0).mean()>.3 # noisy air, and a head
        ring = ndi.binary_dilation(inside, iterations=22) & ~inside
        assert np.percentile(orig[ring], 95)>2*np.percentile(orig[ring], 25) # bright scalp, dark bone
        edge = np.concatenate([orig[0], orig[-1], orig[:,0], orig[:,-1]])
        assert np.median(edge)<.2*np.median(brain[inside]) # the head ends within the picture

def test_masks_look_like_ventricles(scans):
    for r,ims in scans:
        m,brain = ims['mask']>0, ims['brain']
        inside = ndi.binary_closing(brain>0, iterations=3)
        assert .003<m.sum()/inside.sum()<.16, r
        lab,n = ndi.label(m, np.ones((3,3)))
        big = [c for c in ndi.sum(m, lab, range(1, n+1)) if c>=20]
        assert 1<=len(big)<=7 and sum(big)>.8*m.sum(), (r, n, big)
        assert ndi.distance_transform_edt(inside)[m].min()>12, r # far from the brain's outline
        mid = np.nonzero(inside)[1].mean()
        left = m[:,:int(mid)].sum()
        assert .2<left/m.sum()<.8, r

def test_masks_follow_dark_fluid(scans):
    "Marked pixels are dark; and each lies within 3 pixels of one as dark as fluid"
    for r,ims in scans:
        m,im = ims['mask']>0, ndi.gaussian_filter(ims['brain'].astype(float), .7)
        white = np.percentile(im[im>0], 80)
        rim = ndi.binary_dilation(m, iterations=4) & ~ndi.binary_dilation(m, iterations=2)
        assert np.median(im[m])<.8*np.median(im[rim]), r
        fluid = im<.62*white
        assert ndi.distance_transform_edt(~fluid)[m].max()<=3, r

def test_a_threshold_is_not_enough(scans):
    "Fluid as dark as the ventricles lies elsewhere in the brain as well: the task is more than a threshold"
    share = []
    for r,ims in scans:
        m,im = ims['mask']>0, ndi.gaussian_filter(ims['brain'].astype(float), .7)
        core = ndi.binary_erosion(ndi.binary_closing(im>5, iterations=3), iterations=6)
        pred = core & (im<np.percentile(im[m], 75))
        share.append(2*(pred&m).sum()/(pred.sum()+m.sum()))
    assert np.mean(share)<.85, share

def test_ventricles_grow_with_the_visits(info):
    g = {}
    for r in info['scans']: g.setdefault(r['subject'], []).append(r['growth'])
    assert all(a<b for v in g.values() for a,b in zip(v, v[1:])) and any(len(v)>1 for v in g.values())

# -- files

@pytest.mark.usefixtures('quick')
def test_same_bytes_whatever_the_threads(tmp_path):
    a,b = [demo.demo_cohort(3, path=tmp_path/str(w), size=96, progress=False, workers=w) for w in (1,2)]
    assert same_bytes(a, b)

@pytest.mark.usefixtures('quick')
def test_seed_and_size_matter(tmp_path):
    a,b = [demo.demo_cohort(1, seed=s, path=tmp_path/str(s), size=64, progress=False) for s in (1,2)]
    assert not same_bytes(a, b)

@pytest.mark.usefixtures('quick')
def test_second_call_reads_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('BRAINSEG_CACHE', str(tmp_path))
    a = demo.demo_cohort(1, size=64, progress=False)
    assert a==tmp_path/f'demo-v{demo.version}-1-42-64'
    def boom(*args): raise AssertionError('made again')
    monkeypatch.setattr(demo, 'write_cohort', boom)
    assert demo.demo_cohort(1, size=64)==a
    with pytest.raises(AssertionError, match='made again'): demo.demo_cohort(1, seed=43, size=64)

def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv('BRAINSEG_CACHE', str(tmp_path/'a'))
    assert core.cache_dir()==tmp_path/'a'
    monkeypatch.delenv('BRAINSEG_CACHE'); monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'b'))
    assert core.cache_dir()==tmp_path/'b'/'brainseg_fastai'
    monkeypatch.delenv('XDG_CACHE_HOME')
    for platform,part in [('linux','.cache'), ('darwin','Library'), ('win32','')]:
        monkeypatch.setattr(core.sys, 'platform', platform)
        assert core.cache_dir().name=='brainseg_fastai' and part in str(core.cache_dir())

@pytest.mark.usefixtures('quick')
def test_two_processes_at_once(tmp_path):
    path = tmp_path/'both'
    ps = [in_background(path, 2) for _ in range(2)]
    outs = [p.communicate(timeout=300) for p in ps]
    assert [p.returncode for p in ps]==[0,0], outs
    assert [p.name for p in tmp_path.iterdir()]==['both']
    alone = demo.demo_cohort(2, path=tmp_path/'alone', size=64, progress=False)
    assert same_bytes(path, alone)

@pytest.mark.usefixtures('quick')
def test_the_slower_one_takes_the_faster_ones(tmp_path, monkeypatch):
    "The rename is lost to a process that finished between our look and our rename"
    path,write = tmp_path/'raced',demo.write_cohort
    def slow(out, want, *args):
        write(out, want, *args)
        if out.name.startswith('.'): write(path, want, *args)
    monkeypatch.setattr(demo, 'write_cohort', slow)
    assert demo.demo_cohort(1, path=path, size=64, progress=False)==path
    assert [p.name for p in tmp_path.iterdir()]==['raced']

@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError('No space left on device')])
@pytest.mark.usefixtures('quick')
def test_interrupted_making_leaves_nothing(tmp_path, monkeypatch, error):
    make,n = demo.make_subject,[]
    def stop(i, *args):
        n.append(i)
        if i==1: raise error
        return make(i, *args)
    monkeypatch.setattr(demo, 'make_subject', stop)
    with pytest.raises((KeyboardInterrupt, OSError)):
        demo.demo_cohort(8, path=tmp_path/'c', size=64, progress=False, workers=1)
    assert list(tmp_path.iterdir())==[] and len(n)<8 # the rest was not made in vain
    monkeypatch.setattr(demo, 'make_subject', make)
    assert len(list((demo.demo_cohort(1, path=tmp_path/'c', size=64, progress=False)/'mask').iterdir()))>=1

@pytest.mark.usefixtures('quick')
def test_killed_making_does_not_count(tmp_path):
    "A process that dies without tidying up leaves a hidden folder at most, never the cohort's own"
    code = ("import os\nfrom brainseg_fastai import demo\nmake = demo.make_subject\n"
            "demo.make_subject = lambda i,*a: os._exit(9) if i==1 else make(i,*a)")
    p = in_background(tmp_path/'c', 3, code=code)
    p.communicate(timeout=300)
    assert p.returncode==9 and not (tmp_path/'c').exists()
    root = demo.demo_cohort(1, path=tmp_path/'c', size=64, progress=False)
    assert demo.is_complete(root, demo.wanted(1, 42, 64)) and not demo.is_complete(root, demo.wanted(3, 42, 64))

@pytest.mark.usefixtures('quick')
def test_foreign_and_damaged_folders_are_left_alone(tmp_path):
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.txt').write_text('dear', encoding='utf-8')
    with pytest.raises(DataError, match='new or an empty folder'): demo.demo_cohort(1, path=tmp_path/'mine', size=64)
    assert (tmp_path/'mine'/'thesis.txt').read_text(encoding='utf-8')=='dear'
    root = demo.demo_cohort(1, path=tmp_path/'c', size=64, progress=False)
    next((root/'mask').iterdir()).unlink()
    with pytest.raises(DataError, match='not the complete data set'): demo.demo_cohort(1, path=root, size=64)
    (root/'cohort.json').write_text('{', encoding='utf-8')
    assert not demo.is_complete(root, demo.wanted(1, 42, 64))

@pytest.mark.parametrize('kw', [dict(n_subjects=0), dict(n_subjects=2.5), dict(n_subjects=True), dict(seed=-1), dict(size=10)])
def test_bad_parameters(tmp_path, kw):
    with pytest.raises(DataError, match='expected a whole number from'): demo.demo_cohort(**kw, path=tmp_path/'c')
    assert list(tmp_path.iterdir())==[]

# -- the default cohort

def test_default_cohort_is_large_enough():
    "48 people with 1-4 visits each, drawn without making a picture"
    people = [demo.draw_subject(i) for i in range(48)]
    assert len({p['subject'] for p in people})==48
    assert {p['n_scans'] for p in people}=={1,2,3,4}
    assert .1<np.mean([p['subject'][0]=='1' for p in people])<.5
    scans = [demo.draw_scan(p, k) for p in people for k in range(p['n_scans'])]
    assert len(scans)>=96 and len({c['scan'] for c in scans})==len(scans)
    assert {demo.slice_tag(c['z']) for c in scans}=={'ax1','ax2','ax3','ax4','ax5'}
    assert np.ptp([c['growth'] for c in scans])>4

@pytest.mark.slow
def test_default_cohort_spreads():
    info = json.loads((demo.demo_cohort()/'cohort.json').read_text(encoding='utf-8'))
    px = np.array([r['ventricle_px'] for r in info['scans']])
    assert len({r['subject'] for r in info['scans']})==48 and px.min()>=40
    assert np.percentile(px, 90)>3*np.percentile(px, 10)
