"The page of predictions: alone in one file, nothing from a file taken as markup, worst first, small, sortable, usable without scripts"
import base64, hashlib, io, json, re, shutil, subprocess
from pathlib import Path

import numpy as np, pytest
from PIL import Image

from brainseg_fastai import qc as Q
from brainseg_fastai.core import DataError
from test_report import Tags

EVIL = '<script>alert("x")</script>'

def row(i, **kw):
    "A grey square with a marked one"
    image,mask = np.full((64,48), 40+i, np.uint8),np.zeros((64,48), np.uint8)
    image[10:50,8:40] = 120; mask[20:40,12:20+i%9] = 1+i%2
    p = dict(dice=.9-.01*i, low=.8-.01*i, high=.95, level=.9, calibrated=True, text=f'{.9-.01*i:.2f} (90 % interval …)')
    return dict(name=f'scan {i}.png', image=image, mask=mask, colours={1:'#ff9f1c',2:'#00aaff'}, names={1:'ventricles',2:'cyst'},
                measures={'area, mm²':100.5+i, 'slices':i}, quality=.95-.01*i, predicted=p, flags=[], notes=[f'note {i}']) | kw

@pytest.fixture(scope='module')
def page(): return Q.qc_page([row(i, flags=['There is a bright rim.'] if i==2 else []) for i in range(6)])

def names(html): return re.findall(r'<th [^>]*scope="row"[^>]*>([^<]*)<', html)

def test_worst_first(page):
    assert names(page.html)==[f'scan {i}.png' for i in (2,5,4,3,1,0)]

def test_self_contained(page):
    t = Tags(page.html)
    assert not re.search(r'https?:|[\'"(]//|@import|url\((?!#)', page.html)
    assert not {'link','iframe','object','embed','form'} & {o for o,_ in t.tags}
    assert [o for o,_ in t.tags].count('script')==1 and not any(k=='src' or k.startswith('on') for tag,a in t.tags if tag!='img' for k in a)
    imgs = [a for o,a in t.tags if o=='img']
    assert len(imgs)==12 and all(a['src'].startswith(('data:image/jpeg;base64,','data:image/png;base64,')) for a in imgs)

def test_policy_lets_only_this_script_run(page):
    script = re.search(r'<script>(.*)</script>', page.html, re.S)[1]
    want = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a['content'] for o,a in Tags(page.html).tags if o=='meta' and 'http-equiv' in a)
    assert "default-src 'none'" in policy and f"script-src 'sha256-{want}'" in policy and 'unsafe-inline' not in policy.split('script-src')[1]

def test_markup_is_well_formed_and_accessible(page):
    t = Tags(page.html)
    assert t.bad==[] and t.stack==[]
    assert all(a.get('alt') for o,a in t.tags if o=='img') and all(a.get('scope') in ('row','col') for o,a in t.tags if o=='th')
    assert [a['aria-sort'] for o,a in t.tags if 'aria-sort' in a]==['ascending'] and ('html',{'lang':'en'}) in t.tags
    alts = [a['alt'] for o,a in t.tags if o=='img']
    assert 'Slice of scan 2.png' in alts and 'Contour of the prediction: ventricles' in alts
    flips = [a['aria-label'] for o,a in t.tags if o=='button' and a.get('class')=='flip']
    assert len(set(flips))==6

def test_without_scripts_the_contour_is_there(page):
    assert not any('hidden' in a for o,a in Tags(page.html).tags if o=='img')
    assert '.flip { display: none' in page.html and '.js .flip' in page.html # a button that could do nothing is not shown

@pytest.mark.parametrize('key', ['name','measures','names','notes','flags','predicted','colours','title'])
def test_nothing_from_files_becomes_markup(key):
    evil = dict(name=EVIL, measures={EVIL:EVIL}, names={1:EVIL}, notes=[EVIL], flags=[EVIL], colours={1:'red;}</style>'+EVIL},
                predicted=dict(dice=.9, low=.8, calibrated=True, text=EVIL)).get(key)
    html = Q.qc_page([row(0)|({key:evil} if evil else {})], **(dict(title=EVIL) if key=='title' else {})).html
    t = Tags(html)
    assert [o for o,_ in t.tags].count('script')==1 and t.bad==[]
    assert (EVIL in html) is False and ('&lt;script&gt;' in html) is (key!='colours')

def test_quotes_in_names_stay_in_their_attribute():
    t = Tags(Q.qc_page([row(0, name='" onerror="alert(1)" x="\'')]).html)
    assert not any('onerror' in a for _,a in t.tags)

def test_values_to_sort_by(page):
    first = re.search('<tbody>(<tr.*?</tr>)', page.html)[1]
    assert re.findall(r'data-v="([^"]*)"', first)[2:4]==['102.5','2'] and first.startswith('<tr class="flagged">')
    html = Q.qc_page([dict(name='a', image=np.zeros((8,8)), quality=float('nan'))]).html
    assert 'data-v="nan"' not in html and 'uncalibrated' in html and 'The mask of this picture is empty.' in html

def test_interval_is_not_for_flagged_scans(page): assert page.html.split('<tbody>')[1].count('not for flagged scans')==1

def test_measures_may_differ():
    html = Q.qc_page([row(0), row(1, measures={'volume, mL':21.5})]).html
    assert re.findall('<th scope="col"[^>]*>([^<]*)<', html)==['Review','Scan','Picture','volume, mL','area, mm²','slices','Quality','Predicted Dice','Flags']

def test_contour_lies_where_the_mask_is():
    m = np.zeros((60,90), int); m[20:40,30:60] = 3
    im = Image.open(io.BytesIO(base64.b64decode(Q.contour_uri(m, {3:'#12ab34'}, (45,30)).partition(',')[2]))).convert('RGBA')
    a = np.array(im); ys,xs = np.nonzero(a[...,3])
    assert a.shape==(60,90,4) and (ys.min(),xs.min())==(20,30) and (ys.max(),xs.max())==(39,59)
    assert set(map(tuple, a[a[...,3]>0]))=={(0x12,0xab,0x34,255)} and not a[30,45,3]

def test_large_pictures_are_reduced_and_small_ones_stay():
    def size(shape): return [(int(a['width']), int(a['height'])) for o,a in Tags(Q.qc_page([dict(name='a', image=np.zeros(shape, np.uint8))], px=256).html).tags if 'width' in a]
    assert size((1024,512))==[(128,256)] and size((40,30))==[(30,40)] and size((40,30,3))==[(30,40)]

@pytest.mark.parametrize('bad', [dict(mask=np.zeros((9,9))), dict(image=np.zeros(9)), dict(image=np.zeros((9,9,7)))])
def test_bad_rows_are_named(bad):
    with pytest.raises(DataError, match='scan 0.png: found an image of'): Q.qc_page([row(0, **bad)])

def test_no_rows(): assert 'No scan was predicted' in Q.qc_page([]).html

def test_namesakes_are_all_there(): assert len(names(Q.qc_page([row(0), row(0), row(0)]).html))==3

def test_two_hundred_noisy_scans_in_20_mb(tmp_path):
    "Noise is what JPEG likes least; simulated heads with 6 % of it, the most of the demo cohort"
    rng = np.random.default_rng(0); y,x = np.mgrid[-1:1:256j,-1:1:256j]; r = np.hypot(x/.8, y/.95)
    head = 150*(r<.8)+230*((r>.9)&(r<1))
    heads = [np.hypot(head+rng.normal(0, 14, r.shape), rng.normal(0, 14, r.shape)).clip(0, 255).astype(np.uint8) for _ in range(20)]
    rows = [row(0, image=np.roll(heads[i%20], i, 0), mask=((x-.1)**2/.02+y**2/(.05+.001*i)<1).astype(int), name=f'sub-{i:03d}') for i in range(200)]
    size = Q.qc_page(rows).save(tmp_path/'qc.html').stat().st_size
    assert 4e6<size<=20e6 and [o.name for o in tmp_path.iterdir()]==['qc.html']

def test_save_is_whole_or_not_at_all(page, tmp_path, monkeypatch):
    f = page.save(tmp_path/'new'/'qc.html')
    assert f.read_text(encoding='utf-8')==page.html
    def full_disk(self, *a, **k): open(self,'w').close(); raise OSError('No space left on device')
    monkeypatch.setattr(Path, 'write_text', full_disk)
    with pytest.raises(DataError, match='no room'): Q.qc_page([]).save(f)
    assert f.read_text(encoding='utf-8')==page.html and [o.name for o in f.parent.iterdir()]==['qc.html']

def test_the_frame_in_a_notebook_holds_the_whole_page(page):
    (tag,a), = Tags(page._repr_html_()).tags[:1]
    assert tag=='iframe' and a['srcdoc']==page.html

def in_browser(page, tmp_path, script):
    "What `script` writes into the title, after the page was opened in a headless Chromium"
    exe = shutil.which('chromium') or shutil.which('google-chrome')
    if not exe: pytest.skip('no Chromium on this machine')
    html = page.html.replace("script-src 'sha256-", "script-src 'unsafe-inline' 'x-", 1) # lets the test's own script in
    f = tmp_path/'page.html'
    f.write_text(html.replace('</body>', f'<script>document.title = JSON.stringify((() => {{ {script} }})())</script></body>'), encoding='utf-8')
    args = [exe, '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', f'--user-data-dir={tmp_path/"profile"}', '--dump-dom', f.as_uri()]
    out = subprocess.run(args, capture_output=True, text=True, timeout=300, encoding='utf-8').stdout
    from html import unescape
    return json.loads(unescape(re.search('<title>(.*?)</title>', out, re.S)[1]))

def test_sorting_and_flicker_in_a_browser(page, tmp_path):
    got = in_browser(page, tmp_path, '''
        const names = () => [...document.querySelectorAll('tbody th')].map(o => o.firstChild.textContent);
        const head = t => [...document.querySelectorAll('thead th')].find(o => o.textContent === t);
        const shown = () => [...document.querySelectorAll('.over')].filter(o => getComputedStyle(o).display !== 'none').length;
        const press = o => document.dispatchEvent(new KeyboardEvent('keydown', {key: 'c', ...o}));
        const res = {start: names(), shown: [shown()]};
        head('Scan').querySelector('button').click(); res.up = names(); res.aria = head('Scan').getAttribute('aria-sort');
        head('Scan').querySelector('button').click(); res.down = names(); res.other = head('Review').getAttribute('aria-sort');
        head('Flags').querySelector('button').click(); res.flags = names()[0];
        press({}); res.shown.push(shown()); press({ctrlKey: true}); res.shown.push(shown()); press({}); res.shown.push(shown());
        document.querySelector('.flip').click(); res.shown.push(shown());
        res.pressed = document.querySelector('.flip').getAttribute('aria-pressed'); res.say = document.getElementById('say').textContent;
        return res;''')
    up = [f'scan {i}.png' for i in range(6)]
    assert got['start']==names(page.html) and got['up']==up and got['down']==up[::-1] and got['aria']=='ascending' and got['other']=='none'
    assert got['flags']=='scan 2.png' and got['shown']==[6,0,0,6,5] and got['pressed']=='false' and got['say']=='Sorted by Flags, descending'

def test_policy_is_obeyed_in_a_browser(page, tmp_path):
    "The page's own script runs under its policy, one that came in does not"
    exe = shutil.which('chromium') or shutil.which('google-chrome')
    if not exe: pytest.skip('no Chromium on this machine')
    f = tmp_path/'page.html'
    f.write_text(page.html.replace('</body>', '<script>document.title = "broken in"</script></body>'), encoding='utf-8')
    args = [exe, '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', f'--user-data-dir={tmp_path/"profile"}', '--dump-dom', f.as_uri()]
    out = subprocess.run(args, capture_output=True, text=True, timeout=300, encoding='utf-8').stdout
    assert 'class="js"' in out and '<title>Predicted masks' in out

# --- three dimensions

def test_a_volume_and_its_mask_can_be_turned_and_cut(tmp_path):
    "What story 7 shows: the widget takes the files as they are"
    NiiVue = pytest.importorskip('ipyniivue', reason='the widget is not installed').NiiVue
    import nibabel as nib
    files = [tmp_path/'head.nii.gz', tmp_path/'head_dseg.nii.gz']
    for f in files: nib.save(nib.Nifti1Image(np.ones((9,8,7), np.uint8), np.eye(4)), f)
    w = NiiVue()
    w.load_volumes([dict(path=files[0]), dict(path=files[1], colormap='red', opacity=.5)])
    assert [Path(o.path).name for o in w.volumes]==[f.name for f in files]
