"Preparing a comparison: variants, pairing, one split for both, result folders; from there to a verdict on every layout"
import json

import numpy as np, pandas as pd, pytest

import brainseg_fastai.comparison as comparison
from brainseg_fastai.cases import standin
from brainseg_fastai.cli import LAYOUTS, find_layout, main
from brainseg_fastai.comparison import (announcer, check_out, compare_variants, differs_in, named_variants, prepare,
                                        result_folder, swap_table, train_input, train_variants, trainings)
from brainseg_fastai.core import DataError
from brainseg_fastai.settings import Settings, parse_settings
from helpers import dataset, make_folder

FOLDERS = dict(adni='adni_like', figshare='figshare_mat', brats='brats2020', ibsr='ibsr18_like', lgg='lgg')
NATIVE = [o for o in LAYOUTS if o!='adni']
BOTH = {k: Settings(inputs=k) for k in ('brain','orig')}
TINY = Settings(size=64, epochs=1, arch='unet', depth=3, width=4)

@pytest.fixture
def root(tmp_path): return make_folder(tmp_path/'d', 6, 2)

def needs_extras():
    for o in ('h5py','torchio','skimage','SimpleITK'): pytest.importorskip(o,
                                                                           reason='the other data sets need the extra all')

# --- variants ---

def test_variants_from_text(root):
    v = named_variants(root, a='arch=unet depth=4 steps=none patch=32,48,64', b='inputs=orig')
    assert list(v)==['arch=unet depth=4 steps=none patch=32,48,64', 'orig']
    assert list(v.values())==[Settings(arch='unet', depth=4, steps='', patch=(32,48,64)), Settings(inputs='orig')]
    assert list(named_variants(root, b='loss=ce'))==['as usual','loss=ce']
    assert list(named_variants(root))==['brain','orig'] and differs_in(named_variants(root))==['inputs']
    for text in ('arch', 'archi=unet', 'depth=four', 'folder=x'):
        with pytest.raises(DataError, match='expected'): named_variants(root, a=text)
    with pytest.raises(DataError, match='two that differ'): named_variants(root, a='arch=unet', b='arch=unet')

def test_yes_and_no_are_read_as_such():
    assert parse_settings('pretrained=no').pretrained is False and parse_settings('pretrained=true').pretrained
    with pytest.raises(DataError, match='pretrained=maybe: expected true or false'): parse_settings('pretrained=maybe')

def test_every_layout_asks_a_question_of_its_own():
    needs_extras()
    for layout in map(find_layout, LAYOUTS):
        a,b = (parse_settings(o) for o in layout.question)
        assert a!=b

def test_what_both_variants_decide_is_not_passed_over_in_silence(root):
    named_variants(root, a='arch=unet', b='arch=attention_unet', base=Settings(epochs=3))
    with pytest.raises(DataError, match='--arch.*would not be used'):
        named_variants(root, a='arch=unet', b='arch=attention_unet', base=Settings(arch='resnet34'))
    v = named_variants(root, a='loss=ce', base=Settings(inputs='orig'))
    assert {s.inputs for s in v.values()}=={'orig'}

def test_one_kind_alone(tmp_path):
    with pytest.raises(DataError, match='brainseg train.*--inputs orig'):
        named_variants(make_folder(tmp_path/'o', 3, 1, kinds=('orig',)))
    with pytest.raises(DataError, match='nowhere'): prepare(tmp_path/'nowhere', named_variants(tmp_path/'nowhere'))

# --- the same people on the same side ---

def test_both_inputs_are_paired_and_split_alike(root):
    r = prepare(root, BOTH, progress=False)
    a,b = r.tables.values()
    on = ['subject','scan','slice']
    assert (a[on].values==b[on].values).all() and r.codes==(0,255) and r.what=='input' and r.few
    parts = r.split.assign(inputs=r.split.image.str.split('/').str[0]).drop_duplicates(['inputs','fold','subject'])
    wide = parts.pivot(index=['fold','subject'], columns='inputs', values='split')
    assert (wide.brain==wide.orig).all() and {*r.split.fold}=={0,1,2}

def test_an_image_of_one_kind_only_is_left_out_with_a_warning(root):
    extra = next((root/'orig').iterdir())
    extra.unlink()
    r = prepare(root, BOTH, progress=False)
    assert [len(t) for t in r.tables.values()]==[11,11]
    assert r.problems.level.tolist()==['warning'] and extra.name.replace('orig','brain') in r.problems.file[0]

def test_an_earlier_split_is_kept_when_people_are_added(root, tmp_path):
    old = prepare(root, BOTH, folds=1, progress=False).split
    old.to_csv(tmp_path/'split.csv', index=False)
    make_folder(root, 9, 2, seed=0) # the same six and three more
    other = {k: Settings(inputs=k, seed=99) for k in BOTH}
    new = prepare(root, other, folds=1, previous=tmp_path/'split.csv', progress=False).split
    was,now = (dict(zip(o.subject, o.split)) for o in (old, new))
    assert len(now)==9 and all(now[s]==p for s,p in was.items())

def test_an_external_folder_holds_other_people(root, tmp_path):
    with pytest.raises(DataError, match='only subjects that are also in the training folder'):
        prepare(root, BOTH, external=root, progress=False)
    other = make_folder(tmp_path/'e', 8, 1, mask_value=1)
    with pytest.raises(DataError, match='same codes|codes of the training folder'): prepare(root, BOTH,
                                                                                            external=other, progress=False)
    other = make_folder(tmp_path/'f', 8, 1)
    r = prepare(root, BOTH, external=other, progress=False)
    assert [sorted(set(t.subject)) for t in r.external.values()]==[['006_S_1006','007_S_1007']]*2

@pytest.mark.parametrize('layout', NATIVE)
def test_both_variants_have_the_same_people_on_the_same_side(layout):
    needs_extras()
    lay = find_layout(layout)
    data = standin(lay)
    r = prepare(data, named_variants(data, lay), lay, 3, progress=False)
    sides = []
    for t in r.tables.values():
        rows = r.split[r.split.subject.isin(t.subject)]
        sides.append(set(rows[['fold','subject','split']].itertuples(index=False, name=None)))
    assert sides[0]==sides[1] and r.split.groupby(['fold','subject']).split.nunique().eq(1).all()
    assert {*r.split.query('split=="test"').subject}==set().union(*(t.subject for t in r.tables.values()))

# --- trainings ---

def test_trainings_and_their_control(root):
    r = prepare(root, BOTH, progress=False)
    jobs = trainings(r)
    assert [(o['name'], o['settings'].seed, o['split'].fold.nunique()) for o in jobs]==[('brain',42,3), ('orig',42,3),
                                                                                        ('brain',542,1)]
    # models are tested on the other input as well
    assert [list(o['others']) for o in jobs]==[['orig'],['brain'],['orig']]
    assert len(trainings(r, control=False))==len(trainings(r, repeats=2))==2
    r = prepare(root, {k: Settings(inputs='brain', loss=k) for k in ('ce','dice')}, progress=False)
    assert r.what=='setting' and not any(o['others'] for o in trainings(r))

def test_time_left_is_announced():
    said = []
    jobs = [dict(split=pd.DataFrame(dict(fold=[0])), repeats=2)]
    a = announcer(jobs, said.append)
    a('brain', 0, 42)
    a('orig', 0, 42)
    assert said[0].startswith('Training 1 of 2') and 'min left' in said[1] and 'full skull' in said[1]

# --- folders for results ---

def test_result_folder(tmp_path):
    asked = dict(seed=1, inputs=['brain'])
    out = result_folder(tmp_path/'r', asked)
    assert json.loads((out/'settings.json').read_text())==asked
    assert result_folder(out, asked, resume=True)==out
    (out/'runs').mkdir()
    (out/'scores.csv').write_text('old')
    (out/'notes.txt').write_text('mine')
    with pytest.raises(DataError, match='other settings.*seed: 1, now 2'): result_folder(out,
                                                                                         dict(seed=2, inputs=['brain']), resume=True)
    assert (out/'scores.csv').read_text()=='old'
    result_folder(out, dict(seed=2), overwrite=True)
    assert sorted(o.name for o in out.iterdir())==['notes.txt','settings.json'], 'what others put there stays'
    with pytest.raises(DataError, match='earlier run'): check_out(out)

# --- results ---

def test_swap_table_is_the_mean_over_subjects():
    case = dict(jaccard=.5, hd95=1., nsd=1., n_true=10, n_pred=10, n_both=9)
    rows = [dict(case, variant=k, tested_on=on, subject=s, dice=.2 if s=='a' else .9)
            for k in BOTH for on in BOTH for s in 'abcdefaaaaa'] # one subject with many images must not count more
    t = swap_table(pd.DataFrame(rows))
    assert len(t)==4 and (t.n_subjects==6).all() and np.allclose(t.dice, (.2+5*.9)/6)
    assert (t.low<t.dice).all() and (t.dice<t.high).all()
    assert len(swap_table(pd.DataFrame(rows)[:0]))==0

def narrow_and_wide(**kwargs):
    return {k: Settings(**kwargs, width=w) for k,w in (('narrow',4), ('wide',8))}

def test_chance_in_training_is_told(root, tmp_path):
    "Two trainings of one variant that differ more than the two variants do"
    r = compare_variants(root, tmp_path/'r', narrow_and_wide(inputs='brain', size=64, epochs=1, arch='unet', depth=3),
                         progress=False)
    c = r.comparison
    told = any('chance in training' in o for o in c.warnings)
    assert told==(c.verdict!='equivalent' and abs(c.control['difference'])>=abs(c.difference))
    assert len(r.control)==2*len(r.scores.query('fold==0 and variant=="narrow"')) and c.control['variant']=='narrow'

def test_tracking_is_off_unless_asked_for(root, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(comparison, 'check_track', lambda track, out: asked.append('checked'))
    monkeypatch.setattr(comparison, 'log_run', lambda track, out: asked.append((track, out)) or dict(look=''))
    kw = dict(folds=3, progress=False)
    train_input(root, tmp_path/'a', TINY, **kw)
    assert asked==[]
    train_input(root, tmp_path/'a', TINY, track='mlflow', resume=True, **kw)
    assert asked==['checked', ('mlflow', tmp_path/'a')]

def test_volumes_where_both_variants_work_with_them(tmp_path):
    needs_extras()
    lay = find_layout('ibsr')
    v = {k: Settings(mode='volume', arch='unet3d', depth=2, width=w, epochs=1) for k,w in (('narrow',2), ('wide',4))}
    r = train_variants(standin(lay), tmp_path/'r', v, layout=lay, folds=3, control=False, progress=False)
    assert all((t['slice']=='').all() for t in r.tables.values()) and r.scores.subject.nunique()==6

def test_more_than_two_variants_are_trained_but_not_compared(root, tmp_path):
    v = {k: Settings(loss=k) for k in ('ce','dice','focal')}
    with pytest.raises(DataError, match='too many variants'): compare_variants(root, tmp_path/'r', v)
    assert not (tmp_path/'r').exists() and len(prepare(root, v, progress=False).tables)==3

# --- the commands on every layout ---

def run(*args): return main([str(o) for o in args])

@pytest.mark.slow
@pytest.mark.parametrize('layout', LAYOUTS)
def test_the_commands_on_every_layout(layout, tmp_path, capsys, real=False):
    needs_extras()
    root = dataset(FOLDERS[layout]) if real else make_folder(tmp_path/'d', 6,
                                                             1) if layout=='adni' else standin(find_layout(layout))
    assert run('check', root, '--layout', layout)==0
    small = ['--epochs', 1, '--size', 64, '--patch', '64,64,64' if real else '32,32,32', '--folds', 3, '--no-control',
             '--no-pretrained']
    assert run('compare', root, '--layout', layout, '--out', tmp_path/'r', *small)==0
    c = json.loads((tmp_path/'r'/'comparison.json').read_text())
    assert c['n_subjects']==pd.read_csv(tmp_path/'r'/'scores.csv', dtype=str).subject.nunique() and c['folds']==3
    assert c['sentence'] in capsys.readouterr().out and (tmp_path/'r'/'report.html').stat().st_size > 10_000
    assert c['simulated'] == (not real and layout!='adni')

@pytest.mark.slow
@pytest.mark.parametrize('layout', [o for o in NATIVE if o in FOLDERS]) # there is no sample of BraTS 2023
def test_the_commands_on_the_samples(layout, tmp_path, capsys): test_the_commands_on_every_layout(layout, tmp_path,
                                                                                                  capsys, real=True)

@pytest.mark.parametrize('args', [('--arch','vgg'), ('--mode','patch','--patch','40,40,40','--arch','unetr'),
                                  ('--loss','hinge'),
                                  ('--steps','sharpen'), ('--steps','clahe'), ('--a','arch=unet','--b','arch=unet'),
                                  ('--a','arch=unet','size=100','--b','arch=attention_unet')])
def test_settings_are_refused_before_anything_is_written(args, tmp_path, capsys):
    needs_extras()
    assert run('compare', standin(find_layout('figshare')), '--layout', 'figshare', '--out', tmp_path/'r', *args)==2
    said = capsys.readouterr().err
    assert said.startswith('brainseg: ') and 'Traceback' not in said and not (tmp_path/'r').exists()
