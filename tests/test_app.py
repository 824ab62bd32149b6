"The app: its parts, and the whole of it in a real browser"
import base64, contextlib, io, os, re, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import nibabel as nib, numpy as np, pytest
from hypothesis import given, strategies as st
from PIL import Image

import brainseg_fastai.app as A
from brainseg_fastai.adni import adni_cases
from brainseg_fastai.cli import main
from brainseg_fastai.core import DataError
from brainseg_fastai.prediction import Prediction, predict_scan
from brainseg_fastai.runs import load_bundle, pool_bundle, train_run
from brainseg_fastai.scans import Scan
from brainseg_fastai.settings import Settings
from brainseg_fastai.segmentation import split_cases
from brainseg_fastai.splits import with_split
from helpers import make_folder

ROOT = Path(__file__).resolve().parent.parent
LOOPBACK = {'127.0.0.1','localhost','::1'}

# the parts

def fake(scan, mask, **more):
    "A prediction of one structure"
    usual = dict(codes=(0,255), rows=[dict(label='ventricles', area_px=int((mask>0).sum()))], quality=.9, predicted={}, flags=[], notes=[], slices=(0,))
    return Prediction(**dict(scan=scan, mask=mask, **usual) | more)

MODEL = SimpleNamespace(config=dict(labels=[dict(code=255, name='ventricles', colour='#ff0000')]))

def looked(monkeypatch, folder, scan, mask, **more):
    "What the page shows of a prediction"
    monkeypatch.setattr(A, 'predict_scan', lambda *a, **k: fake(scan, mask, **more))
    monkeypatch.setattr(A, 'write_prediction', lambda p, out: Path(out)/'mask.nii.gz')
    return A.look_at(MODEL, folder/'scan.png')

def test_slices_lie_as_the_page_says(tmp_path, monkeypatch):
    a = np.zeros((4,5,3), np.uint8); a[3,4,2] = 10; a[0,0,0] = 20 # right front top; left back bottom
    like = nib.Nifti1Image(a, np.diag([1.,3,9,1]))
    v = looked(monkeypatch, tmp_path, Scan('s', tmp_path, a, (1,3,9), like), (a==10).astype(np.uint8))
    assert (v['n'],v['start'],v['volume'],v['aspect'])==(3,2,True,3)
    top,bottom = (pixels(A.draw(v, k, 0))[...,0] for k in (3,1))
    assert top.shape==(5,4) and top[0,3]==10 and bottom[4,0]==20 and 'right of the person' in A.draw(v, 1)
    assert pixels(A.draw(v, 3, 1))[0,3].tolist()==[255,0,0] and pixels(A.draw(v, 99, .5))[0,3].tolist()==[132,5,5]

def test_a_slice_of_several_channels_shows_the_middle_one(tmp_path, monkeypatch):
    a = np.zeros((4,6,3), np.uint8); a[...,1] = 77
    v = looked(monkeypatch, tmp_path, Scan('s', tmp_path, a, (2,1)), np.zeros((4,6), np.uint8))
    assert v['n']==1 and v['aspect']==2 and (pixels(A.draw(v, 1))==77).all() and 'right of' not in A.draw(v, 1)

def measured(label, colour='#ff0000', **row): return str(A.piece('measured', [(colour, label, A.measures(row))]))

def test_nothing_from_a_file_becomes_part_of_the_page():
    bad = '<script>alert(1)</script>'
    for h in (measured(bad, area_px=3), A.piece('trust', .5, dict(text=bad), [bad], [bad]), A.problem_html(bad)):
        assert '<script' not in str(h) and '&lt;script' in str(h)

def test_measures_leave_out_what_is_not_known():
    nan = float('nan')
    h = measured('ventricles', area_mm2=nan, area_px=12, volume_ml=nan, evans_index=nan)
    assert 'pixels' in h and '12' in h and 'mm²' not in h and 'mL' not in h and 'nan' not in h
    h = measured('ventricles', area_mm2=1234.5, area_px=12, volume_ml=31.25)
    assert 'mm²' in h and '1,234' in h and '31.25' in h and 'pixels' not in h
    assert 'nan' not in A.piece('trust', nan, dict(text='uncalibrated'), [], [])
    assert 'Nothing is known' in A.piece('trust', nan, {}, [], [])

def test_colours_of_a_bundle_stay_colours():
    assert 'url' not in measured('a', 'red;background:url(x)', area_px=1)

@given(session=st.text())
def test_no_visitor_gets_out_of_the_folder(session):
    f = A.visitor_folder(session)
    assert f.resolve().parent==A.visitor_folder('x').resolve().parent and f!=A.visitor_folder(session+'x')

def test_an_upload_takes_the_place_of_the_one_before(tmp_path):
    def upload(name):
        f = tmp_path/name; f.write_bytes(b'x'); return f
    a = A.take_upload(upload('a.png'), 'me'); other = A.take_upload(upload('a.png'), 'you')
    b = A.take_upload(upload('B.NII.GZ'), 'me')
    assert b.is_file() and other.is_file() and not a.exists() and not list(tmp_path.iterdir())
    with pytest.raises(DataError, match='PNG') as e: A.take_upload(upload('c.exe'), 'me')
    assert not list(tmp_path.iterdir()) and not b.exists() and str(tmp_path) not in str(e.value)
    with pytest.raises(DataError, match='once more'): A.take_upload(tmp_path/'gone.png', 'me')
    A.forget('me'); A.forget('you')
    assert not other.exists()
    if os.name=='posix': assert Path(A.store().name).stat().st_mode & 0o77==0

def test_errors_become_messages(tmp_path, monkeypatch, capsys):
    f = tmp_path/'scan.png'; f.write_bytes(b'x')
    def fails(e):
        def g(*a, **k): raise e
        monkeypatch.setattr(A, 'predict_scan', g)
        return A.try_look(None, f)
    v,text = fails(DataError.of(f, 'noise', 'a head', 'Try again.'))
    assert v is None and 'scan.png: found noise; expected a head. Try again.' in text and str(tmp_path) not in text
    v,text = fails(MemoryError(f'secret {tmp_path}'))
    assert v is None and 'MemoryError' in text and 'secret' not in text and 'Traceback' not in text
    assert 'Traceback' in capsys.readouterr().err
    assert 'mm per pixel' in A.try_look(None, f, -1)[1]

def test_a_scan_that_is_gone_is_asked_for_again(tmp_path):
    assert 'once more' in A.draw(dict(folder=str(tmp_path), n=1, volume=False, name='a.png', colours={}, aspect=1), 1)

def test_a_visitor_who_leaves_during_the_prediction_leaves_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path/'scan.png').write_bytes(b'x'); f = A.take_upload(tmp_path/'scan.png', 'me')
    def leave(*a, **k):
        A.forget('me')
        return fake(Scan('scan', f, np.zeros((4,4), np.uint8)), np.zeros((4,4), np.uint8))
    monkeypatch.setattr(A, 'predict_scan', leave)
    v,text = A.try_look(MODEL, f)
    assert v is None and 'once more' in text and not A.visitor_folder('me').exists() and capsys.readouterr().err==''

def test_a_model_of_several_sequences_is_refused():
    with pytest.raises(DataError, match='brainseg predict'): A.need_one_file('b', dict(channels=['flair','t1'], packed=False))
    A.need_one_file('b', dict(channels=['pre','flair','post'], packed=True)) # in one picture
    A.need_one_file('b', dict(channels=['orig'], packed=False))

def test_the_command_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    for args in (['app'], ['app','b','--port','0'], ['app','b','--port','65536']):
        with pytest.raises(SystemExit) as e: main(args)
        assert e.value.code==2
    monkeypatch.setitem(sys.modules, 'gradio', None); capsys.readouterr()
    assert main(['app', str(tmp_path), '--no-browser'])==2 and "brainseg_fastai[app]" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, 'gradio', SimpleNamespace())
    assert main(['app', str(tmp_path), '--no-browser'])==2 and 'config.json' in capsys.readouterr().err

# the model that the rest uses

@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    "A tiny model that has seen slices of 1 mm, from 5 to 30 mm below the top of the brain"
    d = tmp_path_factory.mktemp('bundle')
    t = adni_cases(make_folder(d/'d', 6, 2), 'brain')
    run = train_run(with_split(t, split_cases(t, 3)), d/'r', Settings(epochs=8, size=64, pretrained=False, arch='unet', depth=3, width=4))
    return pool_bundle(run, d/'bundle', run.scores, spacing=[1.,1.], slab=dict(below_top_mm=[5,30]))

@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    "Two different slices of one name, a volume in an unusual orientation, and files that are no scans"
    d = tmp_path_factory.mktemp('scans'); rng = np.random.default_rng(1)
    def put(name, data): (d/name).parent.mkdir(exist_ok=True); (d/name).write_bytes(data)
    pngs = [o.read_bytes() for o in sorted((make_folder(d/'f', 2, 1)/'brain').iterdir())]
    put('a/scan.png', pngs[0]); put('b/scan.png', pngs[1])
    x,y,z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (44,52,40)), indexing='ij')
    head = np.where(x**2+y**2+z**2<.8, 700+100*x+rng.normal(0, 9, x.shape), 0); head[(x/.3)**2+(y/.4)**2+(z/.5)**2<1] = 200
    im = nib.Nifti1Image(head.astype(np.int16), np.array([[0,0,-1.,20],[-1.1,0,0,7],[0,1.2,0,-30],[0,0,0,1]]))
    nib.save(im, d/'head.nii.gz')
    put('cut.nii.gz', (d/'head.nii.gz').read_bytes()[:9000]); put('notes.txt', b'not a scan'); put('text.png', b'not a scan either')
    put('big.nii', b'0'*(2**20+2**18))
    return d

def test_a_volume_looked_at(bundle, scans, tmp_path):
    model = load_bundle(bundle, 'cpu'); f = shutil.copy(scans/'head.nii.gz', tmp_path)
    v = A.look_at(model, f); p = predict_scan(model, f); m = nib.load(v['mask'])
    assert v['volume'] and v['n']==p.mask.shape[2] and m.shape==nib.load(f).shape and np.allclose(m.affine, nib.load(f).affine)
    assert np.array_equal(np.asarray(m.dataobj), p.native()) and all(o['label'] in v['text'] for o in p.rows)
    assert v['aspect']==pytest.approx(p.scan.spacing[1]/p.scan.spacing[0]) and v['aspect']!=1
    shown = pixels(A.draw(v, v['start']+1, 0))
    assert np.array_equal(shown[...,0], np.rot90(p.scan.image[:,:,v['start']])) and p.mask[:,:,v['start']].any()==p.mask.any()

def test_spacing_that_a_slice_does_not_say(bundle, scans, tmp_path):
    model = load_bundle(bundle, 'cpu'); f = shutil.copy(scans/'a/scan.png', tmp_path)
    v,w = A.look_at(model, f), A.look_at(model, f, 1.)
    assert v['spacing'] is None and 'pixels' in v['text'] and '--spacing' not in v['text'] and 'pixel spacing' in v['text']
    assert w['spacing']==(1.,1.) and 'mm²' in w['text'] and 'pixels' not in w['text']

def pixels(html):
    "The picture in a piece of a page"
    return np.array(Image.open(io.BytesIO(base64.b64decode(re.search('base64,([^"]+)', html)[1]))))

# the whole of it

def chromium():
    "Where the system's Chromium is"
    return next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome','google-chrome-stable'))), None)

@pytest.fixture(scope='module')
def server(bundle, tmp_path_factory):
    "`brainseg app` in a process of its own, in an environment that would have Gradio open up; address, folder for its files, log of addresses"
    pytest.importorskip('gradio', reason='the app needs the extra app')
    d = tmp_path_factory.mktemp('server'); (d/'tmp').mkdir()
    with contextlib.closing(socket.socket()) as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), 'OMP_NUM_THREADS': '1', 'TMPDIR': str(d/'tmp'),
           'GRADIO_SHARE': 'True', 'GRADIO_SERVER_NAME': '0.0.0.0', 'GRADIO_ANALYTICS_ENABLED': 'True', 'GRADIO_HEARTBEAT_INTERVAL': '1'}
    with (d/'said').open('w') as said:
        p = subprocess.Popen([sys.executable, '-W', 'ignore', str(ROOT/'tests/watched_app.py'), str(d/'log'), 'app', str(bundle), '--port', str(port),
                              '--no-browser'], env=env, stdout=said, stderr=subprocess.STDOUT)
    try:
        while 'The app is at' not in (d/'said').read_text():
            assert p.poll() is None, (d/'said').read_text()
            time.sleep(.2)
        yield SimpleNamespace(url=f'http://127.0.0.1:{port}/', port=port, tmp=d/'tmp', log=d/'log', said=d/'said', process=p)
    finally: p.kill(); p.wait()

@pytest.fixture(scope='module')
def browser():
    "The system's Chromium; nothing is downloaded"
    api = pytest.importorskip('playwright.sync_api', reason='the browser test needs playwright, of the extra dev')
    exe = chromium()
    if exe is None: pytest.skip('no Chromium on this machine: apt-get update && apt-get install -y chromium')
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=['--no-sandbox','--disable-dev-shm-usage'])
        yield b
        b.close()

@pytest.fixture
def visit(server, browser):
    "Open the page as a new visitor; every request of the page is noted, and one to elsewhere fails the test"
    asked,contexts = [], []
    def go():
        contexts.append(c := browser.new_context(accept_downloads=True)); c.set_default_timeout(60_000)
        c.on('request', lambda r: asked.append(r.url))
        page = c.new_page(); page.goto(server.url); page.wait_for_selector('#scan input[type=file]', state='attached')
        return page
    yield go
    for c in contexts: c.close()
    assert asked and not [u for u in asked if urlsplit(u).scheme not in ('data','blob') and urlsplit(u).hostname not in LOOPBACK]

def drop(page, f): page.set_input_files('#scan input[type=file]', str(f))
def shown(page): return page.locator('#picture img').get_attribute('src')
def result(page, name): page.wait_for_selector(f'#picture img[alt^="{name}"]')
def problem(page): page.wait_for_selector('#message [role=alert]'); return page.locator('#message').inner_text()

def move(page, which, value):
    "Set a slider by its number, and wait for another picture"
    before,box = shown(page), page.locator(f'#{which} input[type=number]')
    box.fill(str(value)); box.press('Enter')
    page.wait_for_function('s => document.querySelector("#picture img").src!=s', arg=before)
    return pixels(f'base64,{shown(page).split("base64,")[1]}"')

def download(page, folder):
    with page.expect_download() as d: page.locator('#download').click()
    f = Path(folder)/d.value.suggested_filename; d.value.save_as(f)
    return f

@pytest.mark.slow
def test_volume_in_the_browser(visit, bundle, scans, tmp_path):
    model = load_bundle(bundle, 'cpu'); v = A.look_at(model, shutil.copy(scans/'head.nii.gz', tmp_path))
    page = visit(); drop(page, scans/'head.nii.gz'); result(page, 'head.nii.gz')
    assert 'Not a medical device' in page.content() and 'ventricles' in page.locator('#text').inner_text()
    assert f'slice {v["start"]+1} of {v["n"]}' in page.locator('#picture').inner_text() and not page.locator('#spacing').is_visible()
    assert np.array_equal(move(page, 'slice', v['start']+4), pixels(A.draw(v, v['start']+4)))
    assert np.array_equal(move(page, 'opacity', 1), pixels(A.draw(v, v['start']+4, 1)))
    got,scan = nib.load(download(page, tmp_path)), nib.load(scans/'head.nii.gz')
    assert got.shape==scan.shape and np.allclose(got.affine, scan.affine)
    assert np.array_equal(np.asarray(got.dataobj), np.asarray(nib.load(v['mask']).dataobj))

@pytest.mark.slow
def test_bad_files_get_one_message_and_the_app_goes_on(visit, scans, server):
    page = visit()
    for name,word in (('notes.txt','PNG'), ('cut.nii.gz','cut.nii.gz'), ('text.png','text.png')):
        drop(page, scans/name); page.wait_for_selector(f'#message [role=alert]:has-text("{name}")'); text = problem(page)
        assert word in text and str(server.tmp) not in text and 'Traceback' not in page.content(), text
        assert not page.locator('#picture img').is_visible() and not page.locator('#download').is_visible()
    drop(page, scans/'big.nii')
    page.wait_for_selector('text=/maximum|exceed|too large/i')
    page.reload(); page.wait_for_selector('#scan input[type=file]', state='attached')
    drop(page, scans/'a/scan.png'); result(page, 'scan.png')
    box = page.locator('#picture img').bounding_box()
    assert box['width']==pytest.approx(box['height'], rel=.01), 'a square slice is shown as a square'
    assert not page.locator('#slice').is_visible() and not page.locator('#message [role=alert]').count()
    page.locator('#spacing input').fill('0.5'); page.locator('#again').click()
    page.wait_for_selector('#text th:has-text("mm²")')
    assert 'Traceback' not in server.said.read_text()

@pytest.mark.slow
def test_two_at_once_and_nothing_is_left(visit, bundle, scans, server, tmp_path):
    model,pages = load_bundle(bundle, 'cpu'), {o: visit() for o in 'ab'}
    for o,page in pages.items(): drop(page, scans/o/'scan.png') # both before either is done
    for o,page in pages.items():
        result(page, 'scan.png'); f = scans/o/'scan.png'
        assert np.array_equal(move(page, 'opacity', 0)[...,0], np.array(Image.open(f)))
        assert np.array_equal(np.array(Image.open(download(page, tmp_path))), predict_scan(model, f).native())
    def size(f): return os.path.getsize(f) if os.path.exists(f) else 0
    def left(): return [Path(d)/f for d,_,fs in os.walk(server.tmp) for f in fs if size(Path(d)/f)] # bears that folders go meanwhile
    assert [o for o in left() if o.name=='scan.png']
    for page in pages.values(): page.context.close()
    end = time.time()+60
    while left() and time.time()<end: time.sleep(.5)
    assert not left(), 'files of a visitor who left'

@pytest.mark.slow
def test_the_server_speaks_to_nobody_else(server, browser):
    "After all of the above: no address but this machine's was connected to, looked up or bound, and a polite end leaves no folder"
    assert server.process.poll() is None and set(o.split()[-1] for o in server.log.read_text().splitlines()) <= LOOPBACK, server.log.read_text()
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as s:
        try: s.connect(('192.0.2.1', 9)); own = s.getsockname()[0] # sends nothing, only asks which of our addresses would be used
        except OSError: own = None
    if own and own not in LOOPBACK:
        with pytest.raises(OSError): socket.create_connection((own, server.port), timeout=5)
    server.process.send_signal(signal.SIGTERM); server.process.wait(60)
    assert not list(server.tmp.glob('brainseg-app-*')) and 'Traceback' not in server.said.read_text(), server.said.read_text()

@pytest.mark.slow
@pytest.mark.parametrize('colab', [False, True])
def test_in_a_notebook_it_opens_no_link_either(bundle, colab, monkeypatch):
    "One cell shows the page and returns; on Colab through Colab's own way, though Gradio by itself would open a public link there"
    gr = pytest.importorskip('gradio', reason='the app needs the extra app'); shown = []
    for k in ('GRADIO_ANALYTICS_ENABLED','GRADIO_SERVER_NAME','GRADIO_TEMP_DIR','HF_HUB_DISABLE_TELEMETRY','NO_PROXY','no_proxy'):
        monkeypatch.setenv(k, os.environ.get(k, '')) # put back afterwards
    monkeypatch.setattr(gr.utils, 'colab_check', lambda: colab); monkeypatch.setattr(gr.utils, 'is_hosted_notebook', lambda: colab)
    monkeypatch.setattr('IPython.display.display', shown.append)
    monkeypatch.setattr(gr.networking, 'setup_tunnel', lambda **k: pytest.fail('a public link'))
    app = A.launch_app(bundle, inline=True)
    try:
        assert app.share is False and app.share_url is None and app.server_name=='127.0.0.1' and app.is_running
        assert len(shown)==1 and ('proxyPort' if colab else app.local_url) in shown[0].data
    finally: app.close()
