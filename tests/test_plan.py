"Plans: what is measured, what is multiplied, what is said, and that nothing is written"
import pandas as pd, pytest, torch

from brainseg_fastai.cases import adni_cases
from brainseg_fastai.cli import main
from brainseg_fastai.datasets import LAYOUTS, standin
from brainseg_fastai.plan import Stopwatch, advice, measure_training, peak_mb, plan_variants, step_seconds
from brainseg_fastai.segmentation import _run_settings, make_learner, split_cases, training_defaults, with_split
from helpers import make_folder

SMALL = dict(arch='unet', depth=3, width=4, size=64, pretrained=False)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return make_folder(tmp_path_factory.mktemp('plan')/'data', 6, 2)

@pytest.fixture(scope='module')
def cases(folder): return with_split((t := adni_cases(folder, 'brain')), split_cases(t, seed=1))

def test_the_median_leaves_out_the_first_steps():
    w = Stopwatch(1.)
    w.steps = [9.,7.,1.,3.,2.]
    assert w.median()==2
    w.steps = [9.,7.]
    assert w.median()==7 # stopped before there was more

def test_steps_are_measured_and_nothing_is_left_behind(cases):
    learn = make_learner(cases, _run_settings(cases, {**training_defaults(), 'size': 64, 'pretrained': False}))
    fast,cbs = learn.fast_batches, list(learn.cbs)
    before = fast.window,fast.until
    sides = []
    class See(Stopwatch):
        order = 12
        def before_batch(self): sides.append(self.x.shape[-1])
        def after_batch(self): pass
        def before_validate(self): pass
    with learn.added_cbs(See(0)):
        fast.window = .5; whole = step_seconds(learn, .2)
        assert set(sides)=={64}
        sides.clear(); windows = step_seconds(learn, .2, whole=False)
        assert set(sides)=={32} and fast.window==.5
        fast.window = before[0]
    assert min(whole, windows)>0 and (fast.window,fast.until)==before and {type(o) for o in learn.cbs}=={type(o) for o in cbs}

def test_a_training_is_as_long_as_its_parts(cases):
    d = measure_training(cases, seconds=.3, bs=2, epochs=7, **SMALL)
    n = cases['split'].value_counts()
    assert d['epochs']==7 and d['steps']==n['train']//2 and d['epoch_s']>d['steps']*d['step_s']>0 and d['score_s']>0
    assert peak_mb()>=d['memory_mb']>50 # of torch alone

@pytest.mark.parametrize('patch', [(32,32,32), (16,48,24)])
def test_volumes_of_patches_are_counted_not_predicted(patch, monkeypatch):
    tio = pytest.importorskip('torchio', reason='volumes need the extra all')
    import brainseg_fastai.plan as plan
    from brainseg_fastai.volumes import to_subject, volume_scores
    t = LAYOUTS['brats'].cases(standin('brats'), unit='volume')
    t,seen = with_split(t, split_cases(t, 3)), []
    def timed(f, *args): seen.append((f, args)); return 1000.
    monkeypatch.setattr(plan, '_timed', timed)
    d = measure_training(t, seconds=.1, codes=LAYOUTS['brats'].codes, mode='patch', patch=patch, arch='unet3d', depth=2, width=4, pretrained=False)
    (f,(model,two,size)),test = seen[0], t[t['split']=='test']
    assert len(seen)==2 and f is volume_scores and tuple(size)==patch
    def patches(x): return len(tio.GridSampler(tio.Subject(image=tio.ScalarImage(tensor=x)), patch, [o//4*2 for o in patch]))
    whole = to_subject(test.iloc[0]).image.data
    whole = torch.nn.functional.pad(whole, [o for a,b in zip(whole.shape[:0:-1], patch[::-1]) for o in (0, max(0, b-a))])
    assert patches(two)==2 and int(d['score_s']/len(test)/1000)==patches(whole)

def test_trainings_are_counted(folder, monkeypatch):
    import brainseg_fastai.plan as plan
    measure,scores = plan.measure_training,[]
    def measured(*args, **kwargs):
        d = measure(*args, **kwargs)
        scores.append(d['score_s'])
        return d
    monkeypatch.setattr(plan, 'measure_training', measured)
    def counts(**kwargs):
        scores.clear()
        t = plan_variants(folder, {k: dict(inputs=k) for k in ('brain','orig')}, seconds=.1, progress=False, **{**SMALL, **kwargs})
        assert t.score_s.tolist()==pytest.approx([2*o for o in scores]) # each model is tested on both kinds
        one = t.setup_s + t.epochs*t.epoch_s + t.score_s
        assert (t.minutes*60).tolist()==pytest.approx((t.trainings*one).tolist())
        return t.trainings.tolist()
    assert counts(folds=2)==[3,2]                # the control is one more of the first
    assert counts(folds=2, control=False)==[2,2]
    assert counts(folds=2, repeats=2)==[4,4]     # repeats are a control of their own

def test_advice():
    t = pd.DataFrame([dict(variant='a', trainings=2, minutes=60., epochs=100, steps=9, step_s=.5, setup_s=30., score_s=30., memory_mb=3072.)])
    first,total = advice(t)
    assert first=='a: 2 trainings of 100 epochs, 9 steps of 500 ms each: about 60 min' and total.startswith('In all about 60 min, 3.0 GB')
    assert advice(t, minutes=61, memory=3.1)==[first,total]
    lines = advice(t, minutes=31, memory=2)      # 2 of the 60 minutes are there whatever the epochs: half of the other 58 are 29
    assert '--epochs 50 ' in lines[2] and '--size' in lines[3] and '2 GB' in lines[4]
    assert 'Fewer epochs alone will not do' in advice(t, minutes=1)[2]

def test_command(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ['--arch','unet','--depth','3','--width','4','--size','64','--epochs','3']
    before = sorted(folder.rglob('*'))
    assert main(['plan', str(folder), '--folds', '2', '--minutes', '1000', *small]) in (0,None)
    out = capsys.readouterr().out
    assert 'brain: 3 trainings of 3 epochs' in out and 'orig: 2 trainings of 3 epochs' in out and 'In all about' in out and 'more than' not in out
    assert main(['plan', str(folder), '--kind', 'orig', '--folds', '2', '--memory', '.01', *small]) in (0,None)
    out = capsys.readouterr().out
    assert 'orig: 2 trainings' in out and 'brain:' not in out and 'more than 0.01 GB' in out
    assert sorted(folder.rglob('*'))==before and not list(tmp_path.iterdir())

@pytest.mark.parametrize('args,why', [(['nowhere'], 'nowhere'), (['DATA','--minutes','0'], 'above 0'), (['DATA','--arch','resnet9'], 'resnet9'),
                                      (['DATA','--kind','flair'], 'flair'), (['DATA','--kind','orig','--a','loss=ce','--b','loss=dice'], 'Leave one'),
                                      (['DATA','--out','x'], '--out')])
def test_what_cannot_be_planned(folder, args, why, capsys):
    with pytest.raises(SystemExit) as e: raise SystemExit(main(['plan', *(str(folder) if o=='DATA' else o for o in args)]))
    err = capsys.readouterr().err
    assert e.value.code not in (0,None) and why in err and 'Traceback' not in err
