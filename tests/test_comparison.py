"Preparing a comparison: pairing, one split for both kinds, result folders"
import json

import numpy as np, pandas as pd, pytest

from brainseg_fastai.cases import DataError
from brainseg_fastai.comparison import Announce, both_kinds, check_out, prepare, result_folder, swap_table
from helpers import make_folder

KINDS = 'brain','orig'

@pytest.fixture
def root(tmp_path): return make_folder(tmp_path/'d', 6, 2)

def test_both_kinds_are_paired_and_split_alike(root):
    r = prepare(root, KINDS, progress=False)
    a,b = (r['tables'][k] for k in KINDS)
    assert (a[['subject','scan','slice']].values==b[['subject','scan','slice']].values).all() and r['codes']==(0,255)
    parts = r['split'].assign(kind=r['split'].image.str.split('/').str[0]).drop_duplicates(['kind','fold','subject'])
    wide = parts.pivot(index=['fold','subject'], columns='kind', values='split')
    assert (wide.brain==wide.orig).all() and set(r['split'].fold)=={0,1,2}

def test_an_image_of_one_kind_only_is_left_out_with_a_warning(root):
    extra = next((root/'orig').iterdir()); extra.unlink()
    r = prepare(root, KINDS, progress=False)
    assert len(r['tables']['brain'])==len(r['tables']['orig'])==11
    assert r['problems'].level.tolist()==['warning'] and extra.name.replace('orig','brain') in r['problems'].file[0]

def test_an_earlier_split_is_kept_when_people_are_added(root, tmp_path):
    old = prepare(root, KINDS, folds=1, progress=False)['split']
    old.to_csv(tmp_path/'split.csv', index=False)
    make_folder(root, 9, 2, seed=0) # the same six and three more
    new = prepare(root, KINDS, folds=1, seed=99, previous=tmp_path/'split.csv', progress=False)['split']
    was,now = (dict(zip(o.subject, o.split)) for o in (old, new))
    assert len(now)==9 and all(now[s]==p for s,p in was.items())

def test_an_external_folder_of_the_same_people_is_refused(root):
    from brainseg_fastai.comparison import _external
    with pytest.raises(DataError, match='all subjects are also in the training folder'):
        _external(root, 'brain', None, {f'{i:03d}_S_{1000+i}' for i in range(6)})

def test_one_kind_alone(tmp_path):
    with pytest.raises(DataError, match='brainseg train'): both_kinds(make_folder(tmp_path/'o', 3, 1, kinds=('orig',)))
    with pytest.raises(DataError): both_kinds(tmp_path/'nowhere')

def test_result_folder(tmp_path):
    out = result_folder(tmp_path/'r', dict(seed=1, kinds=['brain']))
    assert json.loads((out/'settings.json').read_text())=={'seed': 1, 'kinds': ['brain']}
    assert result_folder(out, dict(seed=1, kinds=['brain']), resume=True)==out
    (out/'runs').mkdir(); (out/'scores.csv').write_text('old'); (out/'notes.txt').write_text('mine')
    with pytest.raises(DataError, match='other settings'): result_folder(out, dict(seed=2, kinds=['brain']), resume=True)
    assert (out/'scores.csv').read_text()=='old'
    result_folder(out, dict(seed=2), overwrite=True)
    assert sorted(o.name for o in out.iterdir())==['notes.txt','settings.json'], 'what others put there stays'
    with pytest.raises(DataError, match='earlier run'): check_out(out)

def test_swap_table_is_the_mean_over_subjects():
    rng,rows = np.random.default_rng(0), []
    for kind in KINDS:
        for on in KINDS:
            for s in 'abcdef':
                for i in range(1+(s=='a')*5): # one subject with many images must not count more
                    rows.append(dict(kind=kind, tested_on=on, subject=s, dice=(.2 if s=='a' else .9), jaccard=.5, hd95=1., nsd=1.,
                                     n_true=10, n_pred=10, n_both=9))
    t = swap_table(pd.DataFrame(rows))
    assert len(t)==4 and (t.n_subjects==6).all() and np.allclose(t.dice, (.2+5*.9)/6) and (t.low<t.dice).all() and (t.dice<t.high).all()

def test_time_left_is_announced():
    said = []
    a = Announce(2, said.append)
    a('brain', 0, 42); a('orig', 0, 42)
    assert said[0].startswith('Training 1 of 2') and 'min left' in said[1] and 'full skull' in said[1]
