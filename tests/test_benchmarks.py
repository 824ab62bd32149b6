"The benchmark: its arithmetic, its clock, and one quick run of all systems"
import csv, json, math, os, subprocess, sys
from pathlib import Path

import numpy as np, pandas as pd, pytest
from helpers import make_folder

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT/'benchmarks'
sys.path.insert(0, str(BENCH))

import curves as C, time_to_dice as T
from brainseg_fastai.core import DataError
from report import csv_text, read_run, same_for_all

# ---- one curve

def test_grid():
    at,points = 0.,[]
    while at<100: at = C.next_point(at); points.append(at)
    assert points[:30]==[2.*i for i in range(1, 31)]                 # every 2 s up to a minute
    assert points[30:33]==pytest.approx([62.4, 64.896, 67.49184])    # then 4 % at a time
    assert C.next_point(3.7)==4 and C.next_point(4.)==6 and C.next_point(59.9)==60

def test_time_to():
    curve = [(2,.5),(4,.91),(6,.89),(8,.95)]
    assert C.time_to(curve, .90, 9)==(4, True)   # the first time, though it falls again
    assert C.time_to(curve, .91, 9)==(4, True)   # reaching is enough
    assert C.time_to(curve, .951, 9)==(9, False) # the end of the run, not of the curve
    assert C.time_to([], .9, 5)==(5, False)

def test_best_by():
    curve = [(2,.5),(4,.9),(6,.8),(8,.95)]
    assert [C.best_by(curve, s) for s in (1,2,5,7,8)]==[0,.5,.9,.9,.95]

def test_caps():
    assert C.caps('ours', 30, 50)==(0, math.inf)
    assert C.caps('published', 30, 50)==(0, 930)
    assert C.caps('stock', 30, 50)==(50, 315)
    assert C.caps('stock', 3, 50)==(50, 50)       # never less than ours' end
    assert C.caps('nnunet', 30, 50)==(50, 125)
    assert C.caps('ours-whole', 30, 50)==(125, 125) # to its own end

# ---- several runs

def run(system, seed, curve, end, init='scratch', **kwargs):
    return dict(system=system, seed=seed, init=init, machine='a machine', curve=curve, end=end,
                best=max(d for _,d in curve), setup_s=8.,
                train_images_per_s=10.+seed, predict_images_per_s=20., wait_share=.05, memory_mb=1000.) | kwargs

def test_median_of_stopped_runs():
    assert C.median_time([(10,True),(30,True),(20,True)])==(20, False)
    assert C.median_time([(10,True),(20,True),(90,False)])==(20, False)  # one was stopped later: the median stands
    assert C.median_time([(10,True),(90,False),(80,False)])==(80, True)  # it is one of those that were stopped
    # one was stopped before: it might have needed longer
    assert C.median_time([(10,False),(20,True),(30,True)])==(20, True)

def test_ratio():
    ours = {0:(10,True), 1:(20,True), 2:(12,True)}
    # only the seeds that both have: 31 times 10, not times 12
    assert C.ratio_to({0:(310,False)}, ours)==(31, True)
    assert C.ratio_to({0:(30,True), 1:(40,True), 2:(36,True)}, ours)==(3, False)
    assert C.ratio_to({0:(30,True)}, {0:(10,False)})==(None, False) # ours did not get there: no ratio
    assert C.ratio_to({5:(30,True)}, ours)==(None, False)
    assert C.ratio_text(31, True)=='more than 31×' and C.ratio_text(3.04, False)=='3.0×' and C.ratio_text(None,
                                                                                                          False)=='–'
    assert C.ratio_text(10.57, True)=='more than 10×' and C.ratio_text(9.29,
                                                                       True)=='more than 9.2×' and C.ratio_text(10.57,
                                                                                                                False)=='11×' # no more than was seen
    late = dict(runs=1, t090=121.94, t090_at_least=True, t090_reached=0)
    assert C.time_text(late, '090')=='more than 121, 0 of 1 got there' and C.time_text({**late,
                                                                                        't090_at_least': False,
                                                                                        't090_reached': 1}, '090')=='122'

@pytest.fixture
def runs():
    ours = [run('ours', k, [(10,.86),(10+2*k,.91),(30,.95)], 30) for k in range(3)]
    slow = [run('published', 0, [(200,.4),(310,.7)], 310)]
    smp  = [run('smp', k, [(29,.80),(31,.86),(60,.92),(180,.925)], 180, init='pretrained') for k in range(3)]
    return [*ours, *slow, *smp]

def test_summary(runs):
    ours,slow,smp = C.summarise(runs)
    assert (ours['t090'], ours['t090_min'], ours['t090_max'], ours['t090_reached'], ours['ratio090'])==(12, 10, 14, 3,
                                                                                                        1)
    assert (slow['t090'], slow['t090_at_least'], slow['t090_reached'], slow['ratio090'],
            slow['ratio090_at_least'])==(310, True, 0, 31, True)
    assert (smp['t085'], smp['t090'], smp['ratio090'], smp['ratio090_at_least'])==(31, 60, 5, False)
    assert (smp['t093'], smp['t093_at_least'], smp['ratio093'], smp['ratio093_at_least'])==(180, True, 6, True)
    # 0.86 came after ours was done
    assert (ours['best_at_our_end'], slow['best_at_our_end'], smp['best_at_our_end'])==(.95, 0, .80)
    assert (smp['ratio_init'], slow['ratio_init'])==('pretrained / from scratch', 'from scratch / from scratch')
    assert (ours['train_images_per_s'], ours['train_images_per_s_min'], ours['train_images_per_s_max'])==(11, 10, 12)

def test_markdown(runs):
    about = dict(machine='Some CPU, 2 threads', data='folder, orig', size=256, train=57, valid=24, train_subjects=10,
                 valid_subjects=5)
    text = C.markdown(C.summarise(runs), about)
    assert 'Some CPU, 2 threads' in text and '57 training and 24 validation images' in text
    row = {l.split(' | ')[0].strip('| '): l for l in text.splitlines()[2:7]} # of the first of the two tables
    assert 'more than 31×' in row['published recipe'] and 'from scratch / from scratch' in row['published recipe']
    assert '| 5.0× | pretrained / from scratch |' in row['SMP U-Net resnet34'] and '0 of 3 got there' in row['SMP U-Net resnet34']
    assert all(l.count('|')==text.splitlines()[2].count('|') for l in text.splitlines()[2:7])

def test_ablations(runs):
    "Each change beside ours with the same seed, while ours trains and at its own end"
    assert C.ablations(runs)==[]
    # one seed is yet to come
    ce = [dict(run('ours-ce', k, [(20,.80),(29,.90-.01*k),(40,.96)], 40), train_images_per_s=5.) for k in (0,2)]
    d, = C.ablations([*runs, *ce])
    assert (d['runs'], d['ratio090'])==(2, 34.5/12) # seed 2 got to 0.90 after 40 s
    assert [d[f'time_per_image{o}'] for o in ('_min','','_max')]==[2., 2.2, 2.4]
    assert [round(d[k], 3) for k in ('then','then_min','then_max','last','last_min')]==[-.06, -.07, -.05, .01, .01]
    text = C.ablation_markdown([*runs, *ce])
    assert '12 (10–14) s to 0.90, Dice 0.950 (0.950–0.950) when it is done; 3 trainings' in text
    assert text.splitlines()[-1]==f"| {C.ABLATIONS['ours-ce']} | 2.20 (2.00–2.40) | 2.9× | -0.060 (-0.070 to -0.050) | +0.010 (+0.010 to +0.010) |"

def test_rows_and_csv(runs):
    rows = list(csv.DictReader(csv_text(C.target_rows(runs), C.COLUMNS).splitlines()))
    assert list(rows[0])==['system','seed','target','seconds','reached','init','machine'] and len(rows)==7*3
    slow = [(r['target'], r['seconds'], r['reached']) for r in rows if r['system']=='published']
    assert slow==[(t, '310.0', 'False') for t in ('0.85','0.9','0.93')]

# ---- the clock, with a time of our own

def test_clock():
    from one_run import Clock
    time = [0.]
    dices = iter([.2, .5, .9, .94])
    def wait(s): time[0] += s
    def evaluate(): wait(.6); return next(dices) # must not count
    c = Clock(evaluate, at_least=7, at_most=50, compare_at=None, now=lambda: time[0])
    wait(5)                                       # setup
    c.start()
    def step(load, work): wait(load); c.loaded(); wait(work); return c.step(4, 1.)
    assert not step(.5, .6) and c.curve==[]                     # 1.1 s: nothing is due before 2 s
    assert not step(.5, .9) and c.curve==[(2.5,.2)]
    assert not step(.5, 1.) and [s for s,_ in c.curve]==[2.5, 4.]
    c.pause(); wait(30); c.start()                              # fastai's own validation
    assert not step(1., 1.) and c.curve[-1]==(6.,.9)
    assert step(1., 1.) and c.curve[-1]==(8.,.94) and c.stopped # 0.93 is reached, and 7 s are over
    c.finish()
    assert (c.seconds, c.waited, c.images, c.evaluating, len(c.curve))==(8., pytest.approx(3.5), 20,
                                                                         pytest.approx(2.4), 4)

def test_slow_evaluations_are_rare():
    from one_run import EVAL_PAUSE, Clock
    time = [0.]
    def evaluate(): time[0] += 20; return .5
    c = Clock(evaluate, max_steps=40, now=lambda: time[0])
    c.start()
    for _ in range(40): time[0] += 1; c.loaded(); c.step(1, 1.)
    assert [s for s,_ in c.curve]==[2, 12, 22, 32, 40] and c.seconds==40 and EVAL_PAUSE==.5

def test_clock_limits():
    from one_run import Clock
    def times(**kwargs):
        time = [0.]
        c = Clock(lambda: .99, now=lambda: time[0], **kwargs)
        c.start()
        for i in range(1, 100):
            time[0] += 1.5; c.loaded()
            if c.step(1, 1.): break
        c.finish()
        return c.seconds, c.curve[-1][0], [s for s,_ in c.curve]
    assert times(at_most=20, at_least=99)[:2]==(21, 21)    # stopped at the cap, and evaluated there
    assert times(at_most=20, at_least=9)[:2]==(9, 9)       # nothing stops before `at_least`
    assert times(max_steps=3)[:2]==(4.5, 4.5)
    assert times()[0]==1.5*99                              # ours has no cap and does not stop at 0.93 either
    assert 67.5 in times(compare_at=68)[2] and 67.5 not in times()[2] # the last step before ours was done counts

def test_mean_dice():
    from one_run import mean_dice
    a,b,o = np.array([[1,1],[0,0]]), np.array([[1,0],[0,0]]), np.zeros((2,2), int)
    assert mean_dice([a,a,o,a], [a,b,o,o])==pytest.approx((1+2/3+1+0)/4)

def test_evaluation_disturbs_nothing():
    import random, torch
    from one_run import undisturbed
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    net[0].eval()
    def draw(): return torch.rand(1).item(), np.random.rand(), random.random()
    def look(): assert not net.training and not net[1].training; draw(); return 7
    torch.manual_seed(1); np.random.seed(1); random.seed(1)
    assert undisturbed(net, look)==7 and [m.training for m in net.modules()]==[True,False,True]
    got = draw()
    torch.manual_seed(1); np.random.seed(1); random.seed(1)
    assert draw()==got

# ---- systems

def test_own_pixels():
    import torch
    from systems import PILMask, SquarePad, own_classes
    m = np.zeros((40,64), np.uint8); m[10:30,20:50] = 1
    seen = torch.from_numpy(np.array(SquarePad(32)(PILMask.create(m)))).long()
    back = own_classes(torch.nn.functional.one_hot(seen).movedim(-1, 0).float(), 40, 64)
    assert back.shape==m.shape and (back!=m).mean()<.06 and (back & m).sum()*2/(back.sum()+m.sum()) > .93

def test_nnunet_plan():
    pytest.importorskip('dynamic_network_architectures', reason="the extra `bench` is not installed")
    from systems import nnunet_plan
    p = nnunet_plan(256, 81)
    assert p['arch']['features_per_stage']==[32,64,128,256,512,512,512] and p['bs']==4 # 5 % of 81 images
    assert nnunet_plan(256, 10)['bs']==2 and 30<nnunet_plan(256, 10**6)['bs']<70
    assert nnunet_plan(64, 81)['arch']['n_stages']==5
    with pytest.raises(DataError, match='multiple of 64'): nnunet_plan(288, 81)

def test_order():
    assert T.planned(('smp','ours','published'), 2)==[(0,'ours'),(0,'published'),(0,'smp'),(1,'ours'),(1,'smp')]

def test_time_left():
    ours = run('ours', 0, [(10,.91)], 30, wall_s=50.)
    assert T.time_left([(0,'smp')], []) is None
    assert T.time_left([(1,'ours'),(0,'smp')], [ours])==pytest.approx(50 + 75*1.4 + 8)

@pytest.mark.slow
def test_every_change_of_ours_trains(tmp_path, monkeypatch):
    "What is left out in an ablation is left out, and it still learns"
    import systems as S
    from fastai.torch_core import set_seed
    from brainseg_fastai.adni import adni_cases
    from one_run import split_of
    cases = split_of(adni_cases(make_folder(tmp_path, 6, 1), 'brain'))
    assert {f'ours-{k}' for k in S.CHANGES}==set(C.ABLATIONS)
    monkeypatch.setitem(S.RECIPES, 'light', S.RECIPES['light'])
    monkeypatch.setattr(S.InMemory, '__call__', S.InMemory.__call__)
    light = S.RECIPES['light']
    def losses(name):
        class Once:
            seconds,stopped,got = 0.,False,[]
            def start(self): pass
            def pause(self): pass
            def loaded(self): pass
            def step(self, n, loss): self.got = self.got+[loss.item()]; return len(self.got)==2
        set_seed(1, reproducible=True)
        s,clock = S.SYSTEMS[name](cases, (0,255), 128, 1, False, epochs=2), Once()
        s.train(clock)
        S.RECIPES['light'] = light
        return s, clock.got
    usual = losses('ours')[1]
    for name in C.ABLATIONS:
        if name=='ours-compile': continue # minutes, and only with a compiler; run where there is time
        s,got = losses(name)
        assert np.isfinite(got).all() and len(got)==2, name
        if name in ('ours-last','ours-reading'): # they change what is done, not what is learnt
            assert got==pytest.approx(usual, rel=1e-3), name
        else: assert got!=usual, name

# ---- what goes wrong

def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(T.NEEDS, 'smp', ('no_such_module','no-such-package'))
    with pytest.raises(DataError,
                       match=r"^found no no-such-package; expected .* extra `bench`\. Install them: pip install -e '\.\[bench\]'$"):
        T.main([str(tmp_path), '--systems', 'ours', 'smp', '--out', str(tmp_path/'out')])
    assert not (tmp_path/'out').exists()

def test_damaged_and_foreign_runs(tmp_path):
    (tmp_path/'a.json').write_text('{"spec":')
    with pytest.raises(DataError, match='a damaged file'): read_run(tmp_path/'a.json')
    spec = dict(inputs='orig', size=256, init='scratch', threads=2, quick=False, data='d')
    (tmp_path/'b.json').write_text(json.dumps(dict(spec=spec | dict(size=64))))
    with pytest.raises(DataError, match='a run with size 64; expected size 256'): T.finished(tmp_path/'b.json', spec)
    assert T.finished(tmp_path/'none.json', spec) is None

def test_runs_must_be_comparable():
    spec = dict(inputs='orig', size=64, threads=1, init='scratch')
    a = run('ours', 0, [(1,.5)], 1, spec=spec, split=dict(a='train', b='valid'), sides=dict(train=['a'], valid=['b']),
            data='x')
    same_for_all([a, a])
    for other,what in ((dict(split=dict(a='valid', b='train')), 'another split'), (dict(data='y'), 'another data'),
                       (dict(machine='z'), 'another machine'), (dict(spec=spec | dict(size=32)), 'found size 32'),
                       (dict(sides=dict(train=['a','b'], valid=['b'])), "subjects ['b']")):
        with pytest.raises(DataError) as e: same_for_all([a, {**a, **other}])
        assert what in str(e.value)

def test_stock_in_bf16():
    import torch
    from types import SimpleNamespace
    import out_of_fold as O
    from brainseg_fastai.networks import fast_bf16
    net,x = torch.nn.Conv2d(3, 2, 3), torch.rand(2, 3, 9, 9)
    full = net(x)
    O.in_bf16(SimpleNamespace(model=net))
    res = net(x)
    res.sum().backward()
    assert res.dtype==net.weight.grad.dtype==torch.float32
    assert 0 <= (res-full).abs().max() < .02 and (res.bfloat16().float()==res).all()==fast_bf16(x.device)

@pytest.mark.slow
def test_out_of_fold(tmp_path, monkeypatch, capsys):
    import out_of_fold as O
    import systems as S
    monkeypatch.setattr(O.torch, 'set_num_threads', lambda n: None)
    monkeypatch.setitem(S.RECIPES, 'light', dict(S.RECIPES['light'], views=4, min_epochs=1))
    data,out = make_folder(tmp_path/'data', 6, 1), tmp_path/'out'
    args = [str(data), '--inputs', 'brain', '--size', '64', '--epochs', '2', '--folds', '2', '--bf16', '--out',
            str(out)]
    assert O.main(args)==0
    r = json.loads((out/'out_of_fold.json').read_text(encoding='utf-8'))
    tables = sorted((out/'runs'/'out_of_fold').glob('*fold?of2.csv'))
    assert r['subjects']==6 and set(r['dice'])=={'ours',
                                                 'stock'} and r['ci90'][0]<=r['difference']<=r['ci90'][1] and len(tables)==4
    got = [row for o in tables if 'stock' in o.name for row in csv.DictReader(o.open())]
    assert len(got)==len({o['subject'] for o in got})==6 # everybody once
    assert r['dice']['stock']==pytest.approx(np.mean([float(o['dice']) for o in got]))
    assert np.mean([o['ours']-o['stock'] for o in r['by_subject']])==pytest.approx(r['difference'],
                                                                                   abs=1e-5) and len(r['by_subject'])==6
    new,rest = [o['ours']-o['stock'] for o in r['by_subject'] if not o['helped']], r['without_helped']
    assert 0<len(new)==rest['subjects']<6 and np.mean(new)==pytest.approx(rest['difference'], abs=1e-5)
    assert len(r['loss']['stock'])==2 and r['machine']
    for o in tables:
        loss = pd.read_csv(o.with_suffix('.loss.csv'))
        assert loss['epoch'].tolist()==list(range(1,
                                                  len(loss)+1)) and np.isfinite(loss['loss']).all() and (len(loss)==2
                                                                                                         or 'ours' in o.name)
    monkeypatch.setattr(O, 'tested', None) # nothing is trained twice
    assert O.main(args)==0 and 'ours minus stock' in capsys.readouterr().out

# ---- all of it, quickly

def quick(data, out, *args):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}
    call = [sys.executable, str(BENCH/'time_to_dice.py'), str(data), '--quick', '--out', str(out), *args]
    return subprocess.run(call, capture_output=True, encoding='utf-8', env=env, timeout=1500)

@pytest.mark.slow
def test_quick(tmp_path):
    lacking = T.missing(T.ORDER)
    if lacking: pytest.skip(f"the extra `bench` is not installed: {', '.join(lacking)}")
    data,out = make_folder(tmp_path/'data', 6, 1), tmp_path/'out'
    r = quick(data, out)
    assert r.returncode==0, r.stdout+r.stderr
    runs = {o.stem: json.loads(o.read_text(encoding='utf-8')) for o in (out/'runs').glob('*.json')}
    assert set(runs)=={f'{s}-seed0' for s in T.ORDER} and not list((out/'runs').glob('.*'))
    first = runs['ours-seed0']
    for r in runs.values():
        assert r['split']==first['split'] and not set(r['sides']['train']) & set(r['sides']['valid'])
        assert r['steps']==len(r['losses'])==3 and np.isfinite(r['losses']).all() and r['images']>=3
        assert len(r['curve'])==3 and all(0<=d<=1 for _,
                                          d in r['curve']) and r['curve'][-1][0]==pytest.approx(r['end'], abs=1e-3)
        assert 0<=r['wait_share']<=1 and r['predict_images_per_s']>0 and r['setup_s']>0 and r['init']=='scratch'
    with open(out/'time_to_dice.csv', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    assert list(rows[0])==list(C.COLUMNS)
    assert {(o['system'], o['seed'], o['target']) for o in rows}=={(s,'0',t) for s in T.ORDER
                                                                   for t in ('0.85','0.9','0.93')}
    for o in rows:
        curve = runs[f"{o['system']}-seed0"]['curve']
        assert (o['reached']=='True')==(max(d for _,
                                            d in curve)>=float(o['target'])) and o['init']=='scratch' and 'threads' in o['machine']
    with open(out/'summary.csv', encoding='utf-8') as f: assert [o['system']
                                                                 for o in csv.DictReader(f)]==list(T.ORDER)
    text = (out/'time_to_dice.md').read_text(encoding='utf-8')
    assert all(C.NAMES[o] in text for o in T.ORDER) and first['machine'] in text and str(tmp_path) not in text
    assert (out/'time_to_dice.png').read_bytes()[:4]==b'\x89PNG'
    before = {o: o.stat().st_mtime_ns for o in (out/'runs').glob('*.json')}
    again = quick(data, out)
    assert again.returncode==0 and again.stdout.count('finished earlier')==7
    assert {o: o.stat().st_mtime_ns for o in (out/'runs').glob('*.json')}==before
    other = quick(data, out, '--size', '96')
    assert other.returncode==2 and 'size 64' in other.stderr and len(other.stderr.strip().splitlines())==1

def test_the_readme_shows_what_was_measured():
    measured = (BENCH/'results'/'time_to_dice.md').read_text(encoding='utf-8')
    shown = (BENCH/'README.md').read_text(encoding='utf-8').split('<!-- benchmark -->')[1].split('<!-- end of benchmark -->')[0]
    assert shown.strip()==measured.strip()
    with open(BENCH/'results'/'time_to_dice.csv', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    assert {'ours','stock'} <= {o['system'] for o in rows} <= set(T.ORDER) and len({o['machine']
                                                                                    for o in rows})==1 and rows[0]['machine'] in shown
