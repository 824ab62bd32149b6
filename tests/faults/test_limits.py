"Limits, slabs of heads that end early, quiet logs, and who may ask the app"
import asyncio, os, struct, subprocess, sys, zlib

import numpy as np, pytest

from brainseg_fastai import app as A
from brainseg_fastai.adni import check_cases
from brainseg_fastai.cli import main
from brainseg_fastai.core import DataError
from brainseg_fastai.prediction import predict_scan
from brainseg_fastai.scans import read_scan, top_of_brain
from helpers import make_folder
from scan_files import draw_volume, head_volume, save
from test_prediction import rule
from tiny import tiny

def bomb(path, side=13_000):
    "A picture that claims to be large; its data are a few bytes"
    def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    path.write_bytes(b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0))+chunk(b'IDAT', zlib.compress(b''))+chunk(b'IEND', b''))

def test_pictures_that_no_scanner_makes(tmp_path):
    root = make_folder(tmp_path/'d', 4, 1)
    f = sorted((root/'brain').iterdir())[0]
    bomb(f)
    t = check_cases(root)
    assert '13000×13000' in t[t.file==f'brain/{f.name}'].found.item()
    with pytest.raises(DataError, match='13000×13000'): read_scan(f)

@pytest.mark.parametrize('kind', ['link','storage'])
def test_matlab_files_that_show_other_files(tmp_path, kind):
    h5py = pytest.importorskip('h5py')
    from brainseg_fastai.figshare import figshare_cases, figshare_check
    root = tiny('figshare', tmp_path/'d', 4)
    secret = tmp_path/'secret'; secret.write_bytes(bytes(range(256))*64)
    with h5py.File(root/'1.mat', 'r+') as f:
        g = f['cjdata']; shape = g['image'].shape
        del g['image']
        if kind=='link':
            with h5py.File(tmp_path/'o.h5', 'w') as o: o['a'] = np.zeros(shape, np.int16)
            g['image'] = h5py.ExternalLink(str(tmp_path/'o.h5'), 'a')
        else: g.create_dataset('image', shape, 'u1', external=[(str(secret), 0, shape[0]*shape[1])])
    with pytest.raises(DataError, match='1.mat: found a link or data outside'): figshare_cases(root)
    assert 'outside of the file' in figshare_check(root).found.to_string()

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes here')
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path/'a.nii')
    for f in (read_scan, lambda p: predict_scan(rule(), p)):
        with pytest.raises(DataError, match='a.nii'): f(tmp_path/'a.nii')

def test_an_expression_that_never_ends_is_stopped(tmp_path, capsys):
    root = make_folder(tmp_path/'d', 3, 1)
    for k in ('brain','mask'): (root/k/f'{"a"*40}-I1-{k}-ax3.png').write_bytes(next((root/k).iterdir()).read_bytes())
    assert main(['check', str(root), '--subject', '^((?:a|aa)+)$'])==2 and 'does not come to an end' in capsys.readouterr().err
    for n in ('T1','brainmask','aseg'): save(tmp_path/f'fs/{"a"*40}!/mri/{n}.nii', draw_volume())
    assert main(['slices', str(tmp_path/'fs'), '--subject', '^((?:a|aa)+)$', '--out', str(tmp_path/'o')])==2

@pytest.mark.parametrize('what', ['check','slices'])
def test_a_gzip_that_unpacks_to_gigabytes(tmp_path, what, capsys):
    "A few kilobytes that claim a volume which no machine has room for"
    import gzip
    import nibabel as nib
    h = nib.Nifti1Header(); h.set_data_shape((1000,1000,3000)); h.set_data_dtype(np.int16); h['vox_offset'] = 352; h['magic'] = b'n+1'; h.set_sform(np.eye(4), 1)
    data = gzip.compress(h.binaryblock+bytes(10**6))
    if what=='check':
        root = tiny('brats', tmp_path/'d', 3); f = sorted(root.rglob('*_t1.nii.gz'))[0]
        argv = ['check', root, '--layout', 'brats']
    else:
        for n in ('T1','brainmask','aseg'): save(tmp_path/f'fs/a/mri/{n}.nii.gz', draw_volume())
        f = tmp_path/'fs/a/mri/T1.nii.gz'
        argv = ['slices', tmp_path/'fs', '--out', tmp_path/'o']
    f.write_bytes(data)
    assert main([*map(str, argv)])>0
    assert '1000×1000×3000' in ''.join(capsys.readouterr()) and not (tmp_path/'o').exists()

# ---------------------------------------------------------------- heads that end early

@pytest.mark.parametrize('mm', [0, 5, 15, 25])
def test_a_head_that_is_cut_off_is_flagged(tmp_path, mm):
    a,_ = head_volume(); n = a.shape[2]
    top = np.flatnonzero(a.any((0,1)))[-1]
    p = save(tmp_path/'a.nii.gz', a[:,:,:top+1-mm] if mm else np.pad(a, ((0,0),(0,0),(0,9))))
    flags = predict_scan(rule(), p).flags
    assert any('ends within the head' in o for o in flags)==bool(mm), (n, flags)
    if mm: assert not any('ends within' in o for o in predict_scan(rule(), p, slab=(10,30)).flags)

def test_voxels_that_an_editor_took_out_are_outside():
    a = (draw_volume()/4).astype(np.uint8)
    b = a.copy(); b[10:30,10:30,36:39] = np.maximum(b[10:30,10:30,36:39], 1)
    assert top_of_brain(a, (1,1,1))==top_of_brain(b, (1,1,1))

# ---------------------------------------------------------------- logs

def test_a_log_has_a_line_for_each_epoch_and_no_bars(tmp_path):
    root = make_folder(tmp_path/'d', 6, 1)
    code = 'import sys; from brainseg_fastai.cli import main; sys.exit(main())'
    argv = ['train', str(root), '--inputs', 'brain', '--out', str(tmp_path/'o'), '--size', '64', '--epochs', '3', '--folds', '1', '--threads', '1']
    r = subprocess.run([sys.executable, '-c', code, *argv], capture_output=True, text=True, encoding='utf-8')
    assert r.returncode==0 and r.stdout.count('epoch ')==3 and 'epoch 2 of 3: validation Dice ' in r.stdout and ' min left' in r.stdout
    assert '█' not in r.stdout+r.stderr and '\r' not in r.stdout+r.stderr and len(r.stdout.splitlines())<20

def test_no_hint_names_a_flag_that_is_not_there(tmp_path, monkeypatch, capsys):
    from brainseg_fastai import slices
    def stop(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(slices, 'make_slices', stop)
    assert main(['slices', str(tmp_path), '--out', str(tmp_path/'o')])==130
    err = capsys.readouterr().err
    assert f'brainseg slices {tmp_path} --out {tmp_path}/o' in err and '--resume' not in err

# ---------------------------------------------------------------- the app

@pytest.mark.parametrize('host,origin,ok', [('127.0.0.1:7860', None, True), ('localhost:7860', 'http://localhost:7860', True), ('evil.org', None, False),
    ('127.0.0.1:7860', 'https://evil.org', False), ('127.0.0.1:7860', 'null', False), ('127.0.0.1.evil.org', None, False)])
def test_the_app_answers_its_own_pages_alone(host, origin, ok):
    pytest.importorskip('starlette')
    said = []
    async def inner(scope, receive, send): said.append('inside')
    async def send(m): said.append(m.get('status'))
    headers = [(b'host', host.encode())] + ([(b'origin', origin.encode())] if origin else [])
    asyncio.run(A.OwnPagesOnly(inner)(dict(type='http', method='GET', path='/', headers=headers), None, send))
    assert said[0]==('inside' if ok else 403)

def test_what_a_killed_app_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(A.tempfile, 'tempdir', str(tmp_path))
    dead = subprocess.Popen([sys.executable, '-c', '']); dead.wait()
    for pid in (dead.pid, os.getpid()): (tmp_path/f'brainseg-app-{pid}-x').mkdir()
    A.store.cache_clear()
    try:
        A.store()
        assert not (tmp_path/f'brainseg-app-{dead.pid}-x').exists() and (tmp_path/f'brainseg-app-{os.getpid()}-x').exists()
    finally: A.store().cleanup(); A.store.cache_clear()
