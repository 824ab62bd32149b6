"Who is this? Nobody is trained on and tested, and nobody is counted twice without a word"
import unicodedata, warnings

import numpy as np, pytest
from PIL import Image

from brainseg_fastai.adni import adni_cases, check_cases
from brainseg_fastai.cli import main
from brainseg_fastai.core import DataError
from brainseg_fastai.segmentation import SubjectSplitter, split_cases
from helpers import make_folder

@pytest.fixture
def root(tmp_path): return make_folder(tmp_path/'d', 8, 2)

def found(root, **kw): return check_cases(root, **kw).found.to_string()

# ---------------------------------------------------------------- a split made earlier

def test_a_split_of_other_ids_is_refused(root, tmp_path):
    cases = adni_cases(root, 'brain')
    split = split_cases(cases, 1)
    split.assign(subject=split.subject.str[:3].astype(int).astype(str)).to_csv(tmp_path/'split.csv', index=False) # zeros are lost
    says = dict(match=r'found subjects .*; expected .*000_S_1000')
    for previous in (tmp_path/'split.csv', split.assign(subject='sub-'+split.subject)):
        with pytest.raises(DataError, **says): split_cases(cases, 1, previous=previous)
        with pytest.raises(DataError, **says): SubjectSplitter(previous=previous)(cases)
    assert main(['compare', str(root), '--split', str(tmp_path/'split.csv'), '--out', str(tmp_path/'o')])==2 and not (tmp_path/'o').exists()

def test_a_split_of_some_subjects_says_how_many_are_new(root):
    cases = adni_cases(root, 'brain')
    old = split_cases(cases[cases.subject<'006'], 1)
    with pytest.warns(UserWarning, match='2 of 8 subjects are new'): new = split_cases(cases, 1, previous=old)
    both = old.drop_duplicates('subject').merge(new.drop_duplicates('subject'), on='subject')
    assert (both.split_x==both.split_y).all()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        split_cases(cases, 1, previous=new)

# ---------------------------------------------------------------- how many there are

def test_check_and_plan_tell_the_subjects(root, capsys):
    assert main(['check', str(root)])==0
    assert '8 subjects (000_S_1000, 001_S_1001, ' in capsys.readouterr().out
    assert main(['plan', str(root), '--inputs', 'brain', '--size', '64', '--folds', '1'])==0
    assert '8 subjects (000_S_1000, 001_S_1001, ' in capsys.readouterr().out

def test_a_leaf_folder_under_several_parents_is_told(tmp_path):
    for k in ('brain','mask'):
        for s in range(4):
            for e in (1,2):
                p = tmp_path/k/f'sub-{s}/ses-{e}/slice.png'
                p.parent.mkdir(parents=True); Image.fromarray(np.random.default_rng([s,e,k=='mask']).integers(0, 2, (40,40)).astype(np.uint8)*255).save(p)
    t = check_cases(tmp_path, subject='folder')
    assert 'one folder name in several folders' in t.found.to_string() and 'ses-1' in t.found.to_string()
    assert 'several folders' not in found(tmp_path, subject=r'(sub-\d)')

def test_as_many_subjects_as_images_are_told(tmp_path):
    root = make_folder(tmp_path/'d', 6, 2)
    assert 'as many subjects as images' in found(root, subject='^(.*)-[a-z]*-ax3')
    assert 'as many subjects as images' not in found(root)

@pytest.mark.parametrize('sep,name', [(';','a.csv'), ('\t','a.csv'), (', ','a.csv'), ('\t','a.tsv'), (',','a.csv')])
def test_tables_with_any_separator(root, tmp_path, sep, name):
    rows = [('image','subject')] + [(p.relative_to(root).as_posix(), f'p{p.name[:3]}') for p in sorted((root/'brain').iterdir())]
    (tmp_path/name).write_text('\n'.join(map(sep.join, rows)), encoding='utf-8')
    assert adni_cases(root, 'brain', subject=tmp_path/name).subject.unique().tolist()==[f'p00{i}' for i in range(8)]

def test_names_of_composed_and_decomposed_letters_match(tmp_path):
    root = make_folder(tmp_path/'d', 3, 1)
    for p in [*root.rglob('*.png')]:
        form = 'NFD' if p.parent.name=='mask' else 'NFC'
        p.rename(p.with_name(unicodedata.normalize(form, p.name.replace('_S_', '_é_'))))
    t = adni_cases(root, 'brain')
    assert len(t)==3 and not (check_cases(root).level=='error').any()

def test_dead_links_are_named(root):
    (root/'brain/009_S_1009-I1-brain-ax3.png').symlink_to(root/'nowhere.png')
    t = check_cases(root)
    assert 'a link to a file that is not there' in t.found.to_string() and 'brain/009_S_1009-I1-brain-ax3.png' in t.file.tolist()

# ---------------------------------------------------------------- masks

def test_inverted_masks_are_named(tmp_path):
    root = make_folder(tmp_path/'d', 20, 1)
    odd = sorted((root/'mask').iterdir())[3:5]
    for p in odd: Image.fromarray(255-np.array(Image.open(p))).save(p)
    t = check_cases(root)
    t = t[t.found.str.contains('inverted')]
    assert t.level.tolist()==['warning']*2 and t.file.tolist()==[f'mask/{p.name}' for p in odd]

def test_training_masks_without_foreground_are_told(tmp_path):
    from brainseg_fastai.runs import train_run
    from brainseg_fastai.settings import Settings
    from brainseg_fastai.splits import with_split
    root = make_folder(tmp_path/'d', 6, 1)
    cases = adni_cases(root, 'brain')
    cases = with_split(cases, split_cases(cases, 1))
    for p in cases['mask'][cases['split']=='train']: Image.fromarray(np.zeros((64,64), np.uint8)).save(p)
    with pytest.warns(UserWarning, match='nothing to find in any of the .* training masks'):
        train_run(cases, tmp_path/'run', Settings(size=64, epochs=1), codes=(0,255), progress=False)
