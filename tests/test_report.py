"The report: one self-contained page, nothing from a file taken as markup, the verdict first and the worst cases in sight"
import os, re, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np, pandas as pd, pytest
from PIL import Image

from brainseg_fastai import report as R
from brainseg_fastai.cases import DataError


@pytest.fixture(scope='module')
def toy(tmp_path_factory): return R.toy_run(tmp_path_factory.mktemp('toy'), n=5, scans=2, size=64)

@pytest.fixture(scope='module')
def full(toy):
    "Arguments with every optional piece, some of it hostile"
    c = {**toy['comparison'], 'warnings':['<b>bold</b> claim'], 'p_value':.03, 'subjects_needed':40,
         'control':dict(n_subjects=5, difference=.001, ci95=[-.002,.004], p_value=.4, seeds=[0,1], kind='brain')}
    swap = pd.DataFrame([(a,b,5,.9,.88,.92) for a in ('brain','orig') for b in ('brain','orig')],
                        columns=['trained_on','tested_on','n_subjects','dice','low','high'])
    problems = pd.DataFrame([dict(level='warning', file='<img src=x onerror=alert(1)>', found='a', expected='b', remedy='c')])
    info = dict(command='brainseg compare "A & B" --out run', seed=3, versions=dict(torch='2.15'), pretrained=False,
                fingerprint='abc123', definitions={'Empty masks':'As in the policy.'},
                training_longer=pd.DataFrame(dict(sentence=['Skull-stripped: No.','Full skull: Perhaps.'])))
    external = pd.DataFrame(dict(kind=['brain'], dice=[.777]))
    return {**toy, 'comparison':c, 'swap':swap, 'problems':problems, 'info':info, 'external':external}

@pytest.fixture(scope='module')
def html(full): return R.compare_report(**full).html


class Tags(HTMLParser):
    "Every tag with its attributes, and the close tags that match no open one"
    void = {'meta','img','br'}
    def __init__(self, text): super().__init__(); self.tags,self.stack,self.bad = [],[],[]; self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag,dict(attrs)))
        if tag not in self.void: self.stack.append(tag)
    def handle_startendtag(self, tag, attrs): self.tags.append((tag,dict(attrs)))
    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop()!=tag: self.bad.append(tag)


def test_self_contained(html):
    tags = Tags(html).tags
    assert not re.search(r'https?:|[\'"(]//|@import|url\((?!#)', html)
    assert not {'script','link','iframe','object','embed'} & {t for t,_ in tags}
    imgs = [a for t,a in tags if t=='img']
    assert imgs and all(a['src'].startswith('data:image/jpeg;base64,') for a in imgs)
    assert all(a['href'].startswith(('#','predictions/')) for _,a in tags if 'href' in a)

def test_markup_is_well_formed(html):
    t = Tags(html)
    assert t.bad==[] and t.stack==[]
    ids = {a['id'] for _,a in t.tags if 'id' in a}
    assert {a['href'][1:] for tag,a in t.tags if tag=='a' and a['href'].startswith('#')} <= ids

def test_accessible(html):
    tags = Tags(html).tags
    assert all(a.get('alt') for t,a in tags if t=='img')
    assert all(a.get('aria-label') for t,a in tags if t=='svg')
    assert all(a.get('scope') in ('row','col') for t,a in tags if t=='th')
    assert ('html',{'lang':'en'}) in tags

def test_predictions_are_where_the_links_point(html, full):
    links = [a['href'] for t,a in Tags(html).tags if t=='a' and a['href'].startswith('predictions/')]
    assert len(links)==len(full['scores']) and all((Path(full['out'])/h).is_file() for h in links)

def test_verdict_comes_first(html, full):
    s = html.index(full['comparison']['sentence'])
    assert html.index('<h1>') < s < html.index('</h1>')
    assert s < min(html.index(o) for o in ('<svg','<img','<table','<aside','<dl'))

@pytest.mark.parametrize('text', ['0.777', 'Please note', '+0.0010', 'p = 0.4000', 'p = 0.0300', 'about 40',
    'Trained on skull-stripped', 'Skull-stripped: No.', 'Full skull: Perhaps.', 'As in the policy.', 'abc123', 'versions torch',
    'How subjects were split', 'brainseg compare &quot;A &amp; B&quot; --out run', 'The mean over subjects of each',
    'Verdict rule'])
def test_every_piece_is_there(html, text): assert text in html

def test_control_or_how_to_get_it(toy, html):
    hint = '--repeats 2'
    assert hint not in html and hint in R.compare_report(**toy).html

@pytest.mark.parametrize('simulated', [True,False])
def test_simulated_data_say_so_and_real_data_ask_for_care(toy, simulated):
    s,c = toy['scores'].query('kind=="brain"'), {**toy['comparison'], 'simulated':simulated}
    for r in (R.compare_report(**{**toy,'comparison':c}),
              R.train_report(s, None, toy['split'], data_root=toy['data_root'], out=toy['out'], simulated=simulated)):
        assert ('Simulated cohort' in r.html) is simulated and ('images of people' in r.html) is not simulated

def test_nothing_from_files_becomes_markup(toy, html):
    evil = '<script>alert("x")</script>'
    sc = toy['scores'].replace(toy['scores'].subject[0], evil)
    sp = toy['split'].assign(split=lambda t: t.split.replace('test', evil))
    c = {**toy['comparison'], 'sentence':evil, 'warnings':[evil], 'verdict':evil}
    info = {evil:evil, 'command':evil, 'fingerprint':{evil:evil}, 'definitions':{evil:evil}, 'training_longer':evil}
    page = R.compare_report(c, sc, toy['curves'], sp, info=info, problems=pd.DataFrame({evil:[evil]}),
                            data_root=toy['data_root'], out=toy['out']).html
    assert '<script' not in page and page.count('&lt;script&gt;')>10
    assert '<img src=x' not in html and '<b>bold' not in html

def test_nothing_from_files_becomes_an_attribute_or_a_scheme(toy):
    sc = toy['scores'].assign(prediction='javascript:alert(1)', subject='" onmouseover="x')
    tags = Tags(R.contact_sheet(sc, toy['data_root'], toy['out'])).tags
    assert not any('onmouseover' in a or a.get('href','').startswith('javascript:') for _,a in tags)

def test_the_frame_in_a_notebook_holds_the_whole_page(toy):
    r = R.compare_report(**toy)
    (tag,a), = Tags(r._repr_html_()).tags[:1]
    assert tag=='iframe' and a['srcdoc']==r.html

def test_same_input_same_bytes(full, html): assert R.compare_report(**full).html==html

def test_arguments_stay_as_they_were(full):
    before = {k:v.copy() for k,v in full.items() if isinstance(v,pd.DataFrame)}
    R.compare_report(**full)
    for k,v in before.items(): pd.testing.assert_frame_equal(full[k], v)


def dices(sheet): return [float(d) for d in re.findall(r'<figcaption><b>([\d.]+)</b>', sheet)]

def test_sheet_has_every_case_worst_first(toy):
    s = toy['scores']
    parts = R.contact_sheet(s, toy['data_root'], toy['out'], first=4).split('<h3>')[1:]
    for k,part in zip(('brain','orig'), parts, strict=True):
        want = sorted(s[s.kind==k].dice)
        assert len(want)==10 and dices(part)==pytest.approx(want, abs=6e-4) and 'The other 6 cases' in part
    assert len(dices(R.contact_sheet(s, toy['data_root'], toy['out'], n=3)))==6

def test_repeats_show_each_case_once_at_its_worst(toy):
    s = toy['scores']
    w = R.worst_first(pd.concat([s, s.assign(seed=1, dice=s.dice/2)]))
    assert len(w)==len(s) and (w.seed==1).all()

def test_sheet_does_not_mind_repeated_row_labels(toy):
    s = toy['scores']
    odd = s.set_axis([0]*len(s))
    assert R.contact_sheet(odd, toy['data_root'], toy['out'])==R.contact_sheet(s, toy['data_root'], toy['out'])

def test_undefined_dice_comes_first(toy):
    s = toy['scores'].assign(dice=lambda t: t.dice.where(t.image!=t.image[4]))
    assert R.worst_first(s).image.iloc[0]==s.image[4] and '<b>–</b>' in R.contact_sheet(s, toy['data_root'], toy['out'])

def test_lost_files_are_named_in_their_place(toy, tmp_path):
    sheet = R.contact_sheet(toy['scores'], toy['data_root'], tmp_path)
    assert len(dices(sheet))==20 and '<img' not in sheet and sheet.count('cannot be read')==20

def test_size_of_a_large_sheet(tmp_path):
    rng,rows = np.random.default_rng(0),[]
    for d in ('brain','orig','mask'): (tmp_path/d).mkdir()
    y,x = np.mgrid[:256,:256]
    for i in range(120):
        m = ((x-100-i%30)/18)**2+((y-128)/40)**2<1
        Image.fromarray((m*255).astype(np.uint8)).save(tmp_path/f'mask/s{i}-I1-mask-ax3.png')
        for k in ('brain','orig'):
            name = f'{k}/s{i}-I1-{k}-ax3.png'
            Image.fromarray(np.clip(rng.normal(120,12,m.shape)-80*m,0,255).astype(np.uint8)).save(tmp_path/name)
            rows.append(dict(kind=k, subject=f's{i}', image=name, dice=.9, prediction=f'mask/s{i}-I1-mask-ax3.png'))
    sheet = R.contact_sheet(pd.DataFrame(rows), tmp_path, tmp_path)
    assert sheet.count('<img')==240 and len(sheet)<6e6

def test_contours_have_their_colours_and_places():
    img,t,p = np.full((64,64),100,np.uint8), np.zeros((64,64),np.uint8), np.zeros((64,64),np.uint8)
    t[20:40,10:30] = 255; p[20:40,34:54] = 1
    a = np.asarray(R.tile(img,t,p,128)).astype(int)
    near = lambda c: np.abs(a-R._rgb(c)).sum(-1)<60
    (_,xt),(_,xp) = near(R.TRUTH).nonzero(), near(R.PRED).nonzero()
    assert len(xt) and len(xp) and xt.max()<64<=xp.min()+1

def test_agreement_leaves_both_contours_visible():
    img,t = np.full((64,64),100,np.uint8), np.zeros((64,64),np.uint8); t[20:44,20:44] = 1
    a = np.asarray(R.tile(img,t,t,160)).astype(int)
    assert all((np.abs(a-R._rgb(c)).sum(-1)<60).sum()>100 for c in (R.TRUTH,R.PRED))

@pytest.mark.parametrize('img', [np.zeros((40,64),np.uint8), np.full((64,40),7,np.uint16), np.zeros((50,50,3),np.uint8)])
def test_tiles_of_odd_images(img):
    none = np.zeros(img.shape[:2],np.uint8); every = none+1
    for t,p in ((none,none),(every,none),(none,every),(every,every)): assert R.tile(img,t,p,32).size==(32,32)

def test_tile_refuses_other_sizes():
    with pytest.raises(DataError, match='must have one size'): R.tile(np.zeros((9,9)), np.zeros((9,9),int), np.zeros((8,9),int))

def test_crop_stays_square_and_holds_the_mask():
    rng = np.random.default_rng(1)
    for _ in range(200):
        m = np.zeros(rng.integers(8,90,2),bool); m[rng.integers(0,m.shape[0],3),rng.integers(0,m.shape[1],3)] = True
        l,t,r,b = R.crop_box(m); ys,xs = m.nonzero()
        assert r-l==b-t and l<=xs.min() and xs.max()<r and t<=ys.min() and ys.max()<b

def test_mask_column_wins_over_the_file_names(toy):
    s = toy['scores'].assign(mask='mask/other.png')
    assert set(R.mask_paths(s, toy['data_root']))=={Path(toy['data_root'])/'mask/other.png'}


def test_save_is_atomic(tmp_path, monkeypatch):
    f = tmp_path/'new'/'report.html'
    assert R.Report('a','<p>one</p>').save(f)==f and 'one' in f.read_text(encoding='utf-8')
    def full_disk(self, *a, **k): open(self,'w').close(); raise OSError('No space left on device')
    monkeypatch.setattr(Path, 'write_text', full_disk)
    with pytest.raises(OSError): R.Report('a','<p>two</p>').save(f)
    assert 'one' in f.read_text(encoding='utf-8') and [p.name for p in f.parent.iterdir()]==['report.html']

def test_split_table_counts():
    sp = pd.DataFrame(dict(image=list('abcdef'), subject=list('xxyyzw'), split=['test','test','train','train','train','valid']))
    t = R.split_table(sp).set_index('split')
    assert list(t.index)==['train','valid','test'] and list(t.subjects)==[2,1,1] and list(t.images)==[3,1,2]
    assert list(t['share of images'])==['50.0 %','16.7 %','33.3 %']

@pytest.mark.parametrize('f,drop', [(R.split_table,'subject'), (R.curves_plot,'valid_dice'), (R.paired_plot,'dice'),
                                    (R.worst_first,'prediction')])
def test_missing_columns_are_named(toy, f, drop):
    t = toy[{R.split_table:'split', R.curves_plot:'curves'}.get(f, 'scores')]
    with pytest.raises(DataError, match=f'no column {drop}'): f(t.drop(columns=drop))

def test_paired_plot_needs_both_kinds(toy):
    with pytest.raises(DataError, match='no column orig'): R.paired_plot(toy['scores'].query('kind=="brain"'))

def test_score_table_names_units_and_pooling():
    m = {'brain':dict(dice=.9, dice_ci95=[.8,.95], hd95=1.23, pooled_dice=.97), 'orig':dict(dice=.8, hd95=np.nan)}
    h = R.score_table_html(m, 'mm')
    assert 'Hausdorff distance, mm' in h and '0.900 <small>0.800 to 0.950' in h and 'Pooled Dice' in h and 'nan' not in h
    assert 'Jaccard' not in h and h.index('Pooled')>h.index('Hausdorff')

@pytest.mark.parametrize('unit', ['px','mm'])
def test_units_follow_the_scores(toy, unit):
    c = {**toy['comparison'], 'metrics':{k:dict(dice=.9,hd95=2.) for k in ('brain','orig')}}
    html = R.compare_report(**{**toy, 'comparison':c, 'scores':toy['scores'].assign(unit=unit)}).html
    assert f'Hausdorff distance, {unit} ' in html

@pytest.mark.parametrize('verdict', ['brain better','full skull better','equivalent','inconclusive'])
def test_each_verdict_has_its_words(toy, verdict):
    html = R.compare_report(**{**toy, 'comparison':{**toy['comparison'], 'verdict':verdict}}).html
    words = {'brain better':'Skull-stripped better'}.get(verdict, verdict[0].upper()+verdict[1:])
    assert f'{words}</span><h1>' in html

def test_paired_plot_shows_the_tables(toy):
    s,c = toy['scores'],toy['comparison']
    a,b = R.paired_plot(s,c).axes
    assert len(a.lines)==s.subject.nunique()
    d = s.pivot_table(index='subject', columns='kind', values='dice').eval('brain-orig').sort_values()
    assert np.allclose(b.collections[0].get_offsets()[:,0], d)
    assert any(len(l.get_xdata())==2 and np.allclose(l.get_xdata(), c['ci95']) for l in b.lines)

def test_curves_plot_has_a_line_per_training_and_their_mean(toy):
    assert len(R.curves_plot(toy['curves']).axes[0].lines)==2*(3+1)
    assert len(R.curves_plot(toy['curves'].query('epoch==0')).axes)==2  # a single epoch is a curve as well

def test_plots_leave_no_figure_open(toy):
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    R.svg(R.paired_plot(toy['scores'],toy['comparison']), 'x')
    assert plt.get_fignums()==before

def test_train_report_names_a_training_that_found_nothing(toy):
    s = toy['scores'].query('kind=="orig"')
    html = lambda s: R.train_report(s, toy['curves'], toy['split'], data_root=toy['data_root'], out=toy['out']).html
    trainings = len(s.groupby(['fold','seed'] if 'seed' in s else 'fold'))
    assert 'Please note' not in html(s) and html(s.assign(area_pred=0.)).count('found nothing in any of its')==trainings

def test_train_report(toy):
    s = toy['scores'].query('kind=="orig"')
    args = (s, toy['curves'].query('kind=="orig"'), toy['split'], None, dict(seed=1), toy['data_root'], toy['out'])
    html = R.train_report(*args).html
    mean = s.groupby('subject').dice.mean().mean()
    assert f'mean per-image Dice of {mean:.3f}.' in html and html.count('<img')==len(s) and 'Skull-stripped' not in html
    assert html.index('<h1>')<html.index('<svg') and not re.search('https?:', html) and Tags(html).bad==[]
    given = R.train_report(*args, metrics={'orig':dict(dice=.5, dice_ci95=[.4,.6])}).html
    assert 'Dice of 0.500 (95 % interval 0.400 to 0.600).' in given

def test_intervals_come_from_tables_as_well(toy):
    m = pd.DataFrame(dict(mean=[.912,.95], low=[.901,np.nan], high=[.923,np.nan]), index=['dice','pooled_dice'])
    html = R.compare_report(**toy, metrics=dict(brain=m, orig=m)).html
    assert html.count('0.901 to 0.923')==4 and 'Pooled Dice' in html

def test_a_comparison_without_interval_is_shown_as_such(toy):
    c = {**toy['comparison'], 'ci95':[None,None], 'p_value':None, 'wilcoxon_p':.5}
    html = R.compare_report(**{**toy, 'comparison':c}).html
    assert '(95 % interval unknown)' in html and 'Wilcoxon signed-rank test, p = 0.5000' in html
    assert 'nan' not in html.split('<img')[0]

def test_toy_run_repeats_itself(tmp_path):
    a,b = (R.toy_run(tmp_path/d, n=3, scans=1, size=48) for d in 'ab')
    pd.testing.assert_frame_equal(a['scores'], b['scores'])
    pngs = [p.relative_to(tmp_path/'a') for p in (tmp_path/'a').rglob('*.png')]
    assert len(pngs)==3*5 and all((tmp_path/'a'/p).read_bytes()==(tmp_path/'b'/p).read_bytes() for p in pngs)

def test_figures_of_a_report_do_not_hide_those_of_a_notebook():
    "A notebook's backend sets itself up with the first figure; inside a style context that would be undone"
    code = 'import matplotlib.pyplot as plt\nreal,seen = plt.rc_context,[]\n' \
           'def context(*a):\n    seen.append(plt._backend_mod is not None)\n    return real(*a)\nplt.rc_context = context\n' \
           'from brainseg_fastai.report import _subplots\n_subplots(1, 1)\nassert seen==[True]'
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env={**os.environ, 'MPLBACKEND': 'agg'})
    assert r.returncode==0, r.stderr[-2000:]
