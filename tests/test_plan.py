"Plans: what is measured, what is multiplied, what is said, and that nothing is written"
import pandas as pd, pytest

import brainseg_fastai.plan as plan
from brainseg_fastai.adni import adni_cases
from brainseg_fastai.cases import standin
from brainseg_fastai.cli import find_layout, main
from brainseg_fastai.plan import Stopwatch, advice, measure_training, peak_mb, plan_variants, step_seconds, windows
from brainseg_fastai.runs import prepare_learner
from brainseg_fastai.segmentation import split_cases
from brainseg_fastai.settings import Settings
from brainseg_fastai.splits import with_split
from helpers import make_folder

CODES = 0,255
SMALL = dict(arch='unet', depth=3, width=4, size=64, pretrained=False)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return make_folder(tmp_path_factory.mktemp('plan')/'data', 6, 2)

@pytest.fixture(scope='module')
def cases(folder):
    t = adni_cases(folder, 'brain')
    return with_split(t, split_cases(t, seed=1))

def test_the_median_leaves_out_the_first_steps():
    w = Stopwatch(1.)
    w.steps = [9.,7.,1.,3.,2.]
    assert w.median()==2
    w.steps = [9.,7.]
    assert w.median()==7 # stopped before there was more

def test_steps_are_measured_and_nothing_is_left_behind(cases):
    learn = prepare_learner(cases, Settings(size=64, pretrained=False).filled(sum(cases.split=='train')), CODES)
    fast,cbs = learn.fast_batches, list(learn.cbs)
    before = fast.window,fast.until
    sides = []
    class See(Stopwatch):
        order = 12
        def before_batch(self): sides.append(self.x.shape[-1])
        def after_batch(self): pass
        def before_validate(self): pass
    with learn.added_cbs(See(0)):
        fast.window = .5
        whole = step_seconds(learn, .2)
        assert set(sides)=={64}
        sides.clear()
        parts = step_seconds(learn, .2, whole=False)
        assert set(sides)=={32} and fast.window==.5
        fast.window = before[0]
    assert min(whole, parts)>0 and (fast.window,fast.until)==before and {type(o) for o in learn.cbs}=={type(o)
                                                                                                       for o in cbs}

def test_a_training_is_as_long_as_its_parts(cases):
    d = measure_training(cases, Settings(bs=2, epochs=7, **SMALL), CODES, seconds=.3)
    n = cases['split'].value_counts()
    assert d['epochs']==7 and d['steps']==n['train']//2 and d['epoch_s']>d['steps']*d['step_s']>0 and d['score_s']>0
    assert peak_mb()>=d['memory_mb']>50 # of torch alone

@pytest.mark.parametrize('shape', [(64,64,64), (40,70,155), (240,240,155)])
@pytest.mark.parametrize('patch', [(32,32,32), (16,48,24)])
def test_windows_are_counted_as_they_are_predicted(shape, patch):
    from monai.data.utils import dense_patch_slices
    whole = [max(o) for o in zip(shape, patch)]
    steps = [p//2 if n>p else p for n,p in zip(whole, patch)] # as in MONAI's sliding_window_inference
    assert windows(shape, patch)==len(dense_patch_slices(whole, patch, steps))

def test_volumes_of_patches_are_counted_not_predicted(monkeypatch):
    pytest.importorskip('torchio', reason='volumes need the extra all')
    brats,patch,seen = find_layout('brats'), (16,16,16), []
    t = brats.cases(standin(brats), unit='volume')
    t = with_split(t, split_cases(t, 3))
    def timed(f):
        f()
        return 1000.
    monkeypatch.setattr(plan, 'timed', timed)
    monkeypatch.setattr(plan, 'predict', lambda model, image: seen.append(image.shape))
    s = Settings(mode='patch', patch=patch, arch='unet3d', depth=2, width=4, pretrained=False)
    d = measure_training(t, s, tuple(brats.labels), seconds=.1, layout=brats)
    test = t[t['split']=='test']
    assert {windows(o, patch) for o in seen}=={2} and len(seen)==2
    assert d['score_s']==1000.*len(test)*windows(brats_shape(test), patch)/2

def brats_shape(cases):
    from brainseg_fastai.images import image_size
    return image_size(cases['image'].iloc[0])

def test_trainings_are_counted(folder, monkeypatch):
    measure,scores = plan.measure_training,[]
    def measured(*args, **kwargs):
        d = measure(*args, **kwargs)
        scores.append(d['score_s'])
        return d
    monkeypatch.setattr(plan, 'measure_training', measured)
    def counts(**kwargs):
        scores.clear()
        both = {k: Settings(inputs=k, **SMALL) for k in ('brain','orig')}
        t = plan_variants(folder, both, seconds=.1, progress=False, **kwargs)
        assert t.score_s.tolist()==pytest.approx([2*o for o in scores]) # each model is tested on both inputs
        one = t.setup_s + t.epochs*t.epoch_s + t.score_s
        assert (t.minutes*60).tolist()==pytest.approx((t.trainings*one).tolist())
        return t.trainings.tolist()
    assert counts(folds=2)==[3,2]                # the control is one more of the first
    assert counts(folds=2, control=False)==[2,2]
    assert counts(folds=2, repeats=2)==[4,4]     # repeats are a control of their own

def test_advice():
    t = pd.DataFrame([dict(variant='a', trainings=2, minutes=60., epochs=100, steps=9, step_s=.5, setup_s=30.,
                           score_s=30., memory_mb=3072.)])
    first,total = advice(t)
    assert first=='a: 2 trainings of 100 epochs, 9 steps of 500 ms each: about 60 min' and total.startswith('In all about 60 min, 3.0 GB')
    assert advice(t, minutes=61, memory=3.1)==[first,total]
    # 2 of the 60 minutes are there whatever the epochs: half of the other 58 are 29
    lines = advice(t, minutes=31, memory=2)
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

@pytest.mark.parametrize('args,why', [(['nowhere'], 'nowhere'), (['DATA','--minutes','0'], 'above 0'),
                                      (['DATA','--arch','resnet9'], 'resnet9'),
                                      (['DATA','--kind','flair'], 'flair'),
                                      (['DATA','--kind','orig','--a','inputs=brain','--b','inputs=orig'],
                                       'Leave it out'),
                                      (['DATA','--out','x'], '--out')])
def test_what_cannot_be_planned(folder, args, why, capsys):
    given = ['plan', *(str(folder) if o=='DATA' else o for o in args)]
    with pytest.raises(SystemExit) as e: raise SystemExit(main(given))
    err = capsys.readouterr().err
    assert e.value.code not in (0,None) and why in err and 'Traceback' not in err
