"The model that ships: made again bit for bit, the same whatever the file looks like, and honest where it cannot tell"
import json, shutil
from functools import cache
from pathlib import Path

import nibabel as nib, numpy as np, pytest, torch
from brainseg_fastai.cli import main
from brainseg_fastai.core import DataError
from brainseg_fastai.prediction import predict_scan
from brainseg_fastai.ready import FEW, bytes_of, kind_of_processor, pretrain, train_ready
from brainseg_fastai.runs import bundle_folder, load_bundle
from brainseg_fastai.simulator import HeadRanges, simulated_head
from brainseg_fastai.trust import agreement

USUAL = HeadRanges(growth=(1.,3.), t1_share=1., noise=(0.,.03), bias_sd=(0.,.1), coarse=(1.,1.), slab=(1.,1.), lesion_share=0.)

@cache
def ready(): return load_bundle('ventricles', 'cpu')

@cache
def head(whole=1.):
    from dataclasses import replace
    return simulated_head(11, 192, (-70,90), replace(USUAL, whole_share=whole, exact_share=1-whole))

def saved(folder, a, spacing=1., name='head.nii.gz'):
    file = folder/name
    nib.save(nib.Nifti1Image(a, np.diag([*np.broadcast_to(spacing, 3), 1.])), file)
    return file

def test_it_finds_the_ventricles_of_a_head_with_and_without_skull(tmp_path):
    for whole in (1.,0.):
        a,truth = head(whole)
        p = predict_scan(ready(), saved(tmp_path, a))
        assert agreement(p.mask, truth.astype(np.uint8))>.85
        assert p.rows[0]['volume_ml']==pytest.approx(truth.sum()/1000, rel=.2)
        assert not p.flags and p.predicted['low']<=agreement(p.mask, truth.astype(np.uint8))<=p.predicted['high']

@pytest.mark.slow
def test_file_and_grid_do_not_matter(tmp_path):
    from nibabel.processing import resample_to_output
    a,_ = head()
    ml = predict_scan(ready(), saved(tmp_path, a)).rows[0]['volume_ml']
    im = nib.load(tmp_path/'head.nii.gz')
    turned = nib.Nifti1Image(np.ascontiguousarray(a.transpose(1, 2, 0)[::-1]), im.affine[:,[1,2,0,3]]@np.array(
        [[-1,0,0,len(a[0])-1],[0,1,0,0],[0,0,1,0],[0,0,0,1]]))
    others = dict(turned=turned, sixteen=nib.Nifti1Image(a.astype(np.int16)*100, im.affine))
    others |= {f'mm{o}': resample_to_output(nib.Nifti1Image(a.astype(np.float32), im.affine), (o,)*3, order=1) for o in (.7,1.5)}
    for k,o in others.items():
        nib.save(o, tmp_path/f'{k}.nii.gz')
        assert predict_scan(ready(), tmp_path/f'{k}.nii.gz').rows[0]['volume_ml']==pytest.approx(ml, rel=.06), k

def slab_bundle(tmp_path):
    "A bundle of slices 4 to 19 mm below the top of the ventricles, whose network is the ready one"
    from brainseg_fastai.runs import write_config
    shutil.copytree(bundle_folder('ventricles'), tmp_path/'slab')
    c = json.loads((tmp_path/'slab'/'config.json').read_text())
    c |= dict(axes=False, whole=False, slab=dict(below_top_mm=[55.,70.]), pictures=None)
    write_config(tmp_path/'slab', c)
    return load_bundle(tmp_path/'slab', 'cpu')

def test_a_slab_is_found_in_a_head_that_is_cut_off(tmp_path):
    "By the ventricles, not by counting from a top that is not there"
    a,_ = head(1.)
    model = slab_bundle(tmp_path)
    whole = predict_scan(model, saved(tmp_path, a))
    assert any('top of the ventricles' in o for o in whole.notes)
    for mm in (15,30):
        p = predict_scan(model, saved(tmp_path, a[:,:,:-mm], name=f'{mm}.nii.gz'))
        assert agreement(p.mask, whole.mask[:,:,:-mm])>.9 and not any('cut' in o or 'ends within' in o for o in p.flags)

def test_a_mask_elsewhere_is_doubted(tmp_path):
    "A model that is wrong in a head that the ready one knows"
    a,_ = head(1.)
    model = slab_bundle(tmp_path)
    wrong = type('Wrong', (torch.nn.Module,), dict(forward=lambda self, x: torch.stack([x[:,0]-1, 1-x[:,0]], 1)))()
    model.net = wrong # what is dark
    p = predict_scan(model, saved(tmp_path, a))
    assert any('elsewhere' in o for o in p.flags) and p.predicted['text']=='cannot tell'

def test_a_picture_may_be_upside_down(tmp_path):
    from PIL import Image
    a,truth = head(0.)
    k = int(truth.sum((0,1)).argmax())
    one = np.rot90(a[:,:,k])
    for i,o in enumerate((one, one[::-1])):
        Image.fromarray(np.ascontiguousarray(o)).save(tmp_path/f'{i}.png')
    up,down = (predict_scan(ready(), tmp_path/f'{i}.png', spacing=1.) for i in (0,1))
    assert agreement(up.mask, np.rot90(truth[:,:,k]).astype(np.uint8))>.8 and agreement(up.mask, down.mask[::-1])>.85
    assert 'volume_ml' in up.rows[0] and np.isnan(up.rows[0]['volume_ml'])

def test_noise_is_no_head(tmp_path):
    a = np.random.default_rng(0).integers(0, 255, (96,96,96), dtype=np.uint8)
    p = predict_scan(ready(), saved(tmp_path, a))
    assert p.flags and p.predicted['dice'] is None

def test_it_has_no_slab(tmp_path):
    with pytest.raises(DataError, match='whole volume'): predict_scan(ready(), saved(tmp_path, head()[0]), slab=(50,60))

def test_from_a_terminal_by_its_name(tmp_path, capsys):
    file = saved(tmp_path, head()[0])
    assert main(['predict', 'ventricles', str(file), '--out', str(tmp_path/'out')])==0
    table = (tmp_path/'out'/'volumes.csv').read_text()
    assert 'ventricles' in table and (tmp_path/'out'/'head_dseg.nii.gz').is_file()

def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bundle_folder('ventricles').parent.name=='assets'
    Path('ventricles').mkdir()
    assert bundle_folder('ventricles')==Path('ventricles')
    with pytest.raises(DataError, match='no config.json'): load_bundle('ventricles')

def test_it_is_small_and_says_what_it_is():
    folder = bundle_folder('ventricles')
    c = json.loads((folder/'config.json').read_text())
    assert (folder/'model.safetensors').stat().st_size<7e6
    assert c['data']['simulated'] and 'imulated' in (folder/'README.md').read_text() and c['axes'] and c['whole']

def test_what_is_interrupted_goes_on_as_if_nothing_had_been(tmp_path):
    for o in 'ab': (tmp_path/o).mkdir()
    train_ready(tmp_path/'a', 40, stop=2, progress=False)
    one = train_ready(tmp_path/'a', 40, stop=4, progress=False)
    other = train_ready(tmp_path/'b', 40, stop=4, progress=False)
    assert bytes_of(one)==bytes_of(other)

def test_an_interrupted_training_is_not_continued_as_another(tmp_path):
    train_ready(tmp_path, 40, seed=1, stop=1, progress=False)
    with pytest.raises(DataError, match='same --seed'): train_ready(tmp_path, 40, seed=2, stop=2, progress=False)

def test_it_does_not_write_into_a_folder_of_others(tmp_path):
    (tmp_path/'mine.txt').write_text('mine')
    with pytest.raises(DataError, match='other files'): pretrain(tmp_path)

@pytest.mark.slow
def test_its_first_minute_made_again(tmp_path):
    told = ready().config
    made = told['made_on'], told['versions']['torch']
    if made!=(kind_of_processor(), torch.__version__):
        pytest.skip(f'the weights were made on another kind of processor ({made[0]}), or with another PyTorch ({made[1]})')
    train_ready(tmp_path, seed=told['settings']['seed'], stop=FEW, progress=False)
    assert torch.load(tmp_path/'checkpoint.pt', weights_only=True)['first']==told['first']

@pytest.mark.slow
def test_a_small_one_is_a_bundle(tmp_path):
    pretrain(tmp_path/'m', batches=3, heads=1, progress=False)
    model = load_bundle(tmp_path/'m', 'cpu')
    p = predict_scan(model, saved(tmp_path, head()[0]))
    assert p.predicted['text'] in ('uncalibrated','cannot tell')
    with pytest.raises(DataError, match='other files'): pretrain(tmp_path/'m')
