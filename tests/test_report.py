"The report: one self-contained page, nothing from a file taken as markup, the verdict first and the worst cases in sight"
import os, re, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np, pandas as pd, pytest
from PIL import Image

from brainseg_fastai import report as R
from brainseg_fastai.core import DataError
from toys import toy_run


@pytest.fixture(scope='module')
def toy(tmp_path_factory): return toy_run(tmp_path_factory.mktemp('toy'), n=5)

@pytest.fixture(scope='module')
def full(toy):
    "Arguments with every optional piece, some of it hostile"
    c = {**toy['comparison'], 'warnings':['<b>bold</b> claim'], 'p_value':.03, 'subjects_needed':40,
         'control':dict(n_subjects=5, difference=.001, ci95=[-.002,.004], p_value=.4, seeds=[0,1], variant='brain')}
    swap = pd.DataFrame([(a,b,5,.9,.88,.92) for a in ('brain','orig') for b in ('brain','orig')],
                        columns=['trained_on','tested_on','n_subjects','dice','low','high'])
    problems = pd.DataFrame([dict(level='warning', file='<img src=x onerror=alert(1)>', found='a', expected='b', remedy='c')])
    info = dict(command='brainseg compare "A & B" --out run', seed=3, versions=dict(torch='2.15'), pretrained=False,
                fingerprint='abc123', definitions={'Empty masks':'As in the policy.'},
                training_longer=pd.DataFrame(dict(sentence=['Skull-stripped: No.','Full skull: Perhaps.'])))
    external = pd.DataFrame(dict(trained_on=['brain'], dice=[.777]))
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
    policy = next(a['content'] for t,a in tags if t=='meta' and 'http-equiv' in a)
    assert "default-src 'none'" in policy and "script-src 'none'" in policy
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
    'How subjects were split', 'brainseg compare &#34;A &amp; B&#34; --out run', 'every subject counts once',
    'Verdict rule'])
def test_every_piece_is_there(html, text): assert text in html

def test_control_or_how_to_get_it(toy, html):
    hint = '--repeats 2'
    assert hint not in html and hint in R.compare_report(**toy).html

@pytest.mark.parametrize('simulated', [True,False])
def test_simulated_data_say_so_and_real_data_ask_for_care(toy, simulated):
    s,c = toy['scores'].query('variant=="brain"'), {**toy['comparison'], 'simulated':simulated}
    for r in (R.compare_report(**{**toy,'comparison':c}), R.train_report(s, split=toy['split'], out=toy['out'], simulated=simulated)):
        assert ('Simulated cohort' in r.html) is simulated and ('images of people' in r.html) is not simulated

def test_nothing_from_files_becomes_markup(toy, html):
    evil = '<script>alert("x")</script>'
    sc = toy['scores'].replace(toy['scores'].subject[0], evil)
    sp = toy['split'].assign(split=lambda t: t.split.replace('test', evil))
    c = {**toy['comparison'], 'sentence':evil, 'warnings':[evil], 'verdict':evil}
    info = {evil:evil, 'command':evil, 'fingerprint':{evil:evil}, 'definitions':{evil:evil}, 'training_longer':evil}
    page = R.compare_report(c, sc, curves=toy['curves'], split=sp, info=info, problems=pd.DataFrame({evil:[evil]}), out=toy['out']).html
    assert '<script' not in page and page.count('&lt;script&gt;')>10
    assert '<img src=x' not in html and '<b>bold' not in html

def test_nothing_from_files_becomes_an_attribute_or_a_scheme(toy):
    sc = toy['scores'].assign(prediction='javascript:alert(1)', subject='" onmouseover="x')
    tags = Tags(str(R.contact_sheet(sc, toy['out']))).tags
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


def dices(sheet): return [float(d) for d in re.findall(r'<figcaption><b>([\d.]+)</b>', str(sheet))]

def test_sheet_has_every_case_worst_first(toy):
    s = toy['scores']
    parts = str(R.contact_sheet(s, toy['out'], first=4)).split('<h3>')[1:]
    for k,part in zip(('brain','orig'), parts, strict=True):
        want = sorted(s[s.variant==k].dice)
        assert len(want)==10 and dices(part)==pytest.approx(want, abs=6e-4) and 'The other 6 cases' in part
    assert len(dices(R.contact_sheet(s, toy['out'], n=3)))==6

def test_repeats_show_each_case_once_at_its_worst(toy):
    s = toy['scores']
    w = R.worst_first(pd.concat([s, s.assign(seed=1, dice=s.dice/2)]))
    assert len(w)==len(s) and (w.seed==1).all()

def test_sheet_does_not_mind_repeated_row_labels(toy):
    s = toy['scores']
    odd = s.set_axis([0]*len(s))
    assert str(R.contact_sheet(odd, toy['out']))==str(R.contact_sheet(s, toy['out']))

def test_undefined_dice_comes_first(toy):
    s = toy['scores'].assign(dice=lambda t: t.dice.where(t.image!=t.image[4]))
    assert R.worst_first(s).image.iloc[0]==s.image[4] and '<b>–</b>' in str(R.contact_sheet(s, toy['out']))

def test_lost_files_are_named_in_their_place(toy, tmp_path):
    sheet = str(R.contact_sheet(toy['scores'], tmp_path))
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
            rows.append(dict(variant=k, subject=f's{i}', image=tmp_path/name, dice=.9, mask=tmp_path/f'mask/s{i}-I1-mask-ax3.png',
                             prediction=f'mask/s{i}-I1-mask-ax3.png'))
    sheet = str(R.contact_sheet(pd.DataFrame(rows), tmp_path))
    assert sheet.count('<img')==240 and len(sheet)<6e6

def test_save_is_atomic(tmp_path, monkeypatch):
    f = tmp_path/'new'/'report.html'
    assert R.Report('a', R.Html('one')).save(f)==f and 'one' in f.read_text(encoding='utf-8')
    def full_disk(self, *a, **k): open(self,'w').close(); raise OSError('No space left on device')
    monkeypatch.setattr(Path, 'write_text', full_disk)
    with pytest.raises(DataError, match='no room'): R.Report('a', R.Html('two')).save(f)
    assert 'one' in f.read_text(encoding='utf-8') and [p.name for p in f.parent.iterdir()]==['report.html']

def test_split_table_counts():
    sp = pd.DataFrame(dict(image=list('abcdef'), subject=list('xxyyzw'), split=['test','test','train','train','train','valid']))
    t = R.split_table(sp).set_index('split')
    assert list(t.index)==['train','valid','test'] and list(t.subjects)==[2,1,1] and list(t.images)==[3,1,2]
    assert list(t['share of images'])==['50.0 %','16.7 %','33.3 %']

@pytest.mark.parametrize('f,drop', [(R.split_table,'subject'), (R.curves_plot,'valid_dice'), (R.per_subject,'dice'),
                                    (R.worst_first,'prediction')])
def test_missing_columns_are_named(toy, f, drop):
    t = toy[{R.split_table:'split', R.curves_plot:'curves'}.get(f, 'scores')]
    with pytest.raises(DataError, match=f'no column {drop}'): f(t.drop(columns=drop))

def test_paired_plot_needs_both_kinds(toy):
    with pytest.raises(DataError, match='no column orig'): R.paired_plot(toy['scores'].query('variant=="brain"'), toy['comparison'])

def means(**kw): return pd.DataFrame({k: dict(zip(('mean','low','high'), v)) for k,v in kw.items()}).T

def test_score_table_names_units_and_pooling():
    nan = float('nan')
    m = {'brain': means(dice=(.9,.8,.95), hd95=(1.23,nan,nan), pooled_dice=(.97,nan,nan)), 'orig': means(dice=(.8,nan,nan))}
    h = str(R.piece('means', m, 'mm', 'image'))
    assert 'Hausdorff distance, mm' in h and '0.900 <small>0.800 to 0.950' in h and 'Pooled Dice' in h and 'nan' not in h
    assert 'Jaccard' not in h and h.index('Pooled')>h.index('Hausdorff') and '–' in h

def test_scores_of_single_structures_and_of_volumes():
    h = str(R.piece('means', dict(flair=means(dice=(.9,.8,.95), dice_WT=(.8,.7,.9), hd95_WT=(3,2,4), volume_diff_WT=(-1,-2,1))), 'mm', 'volume'))
    for o in ('Dice, per volume', 'Dice, WT', '95 % Hausdorff distance, WT, mm', 'Volume, predicted minus true, WT, mL', '−1.00'): assert o in h

@pytest.mark.parametrize('unit', ['px','mm'])
def test_units_follow_the_scores(toy, unit):
    html = R.compare_report(**{**toy, 'scores': toy['scores'].assign(unit=unit, hd95=2.)}).html
    assert f'Hausdorff distance, {unit} ' in html

def test_intervals_are_those_of_the_scores(toy):
    from brainseg_fastai.scores import summarise_scores
    html = R.compare_report(**toy).html
    for _,s in toy['scores'].groupby('variant'):
        m = summarise_scores(s).loc['dice']
        assert html.count(f'{m["low"]:.3f} to {m["high"]:.3f}')>=2 # in the table and among the key figures

@pytest.mark.parametrize('verdict', ['brain better','full skull better','equivalent','inconclusive'])
def test_each_verdict_has_its_words(toy, verdict):
    html = R.compare_report(**{**toy, 'comparison':{**toy['comparison'], 'verdict':verdict}}).html
    words = {'brain better':'Skull-stripped better'}.get(verdict, verdict[0].upper()+verdict[1:])
    assert f'{words}</span><h1>' in html

def test_paired_plot_shows_the_tables(toy):
    s,c = toy['scores'],toy['comparison']
    a,b = R.paired_plot(s,c).axes
    assert len(a.lines)==s.subject.nunique()
    d = s.pivot_table(index='subject', columns='variant', values='dice').eval('brain-orig').sort_values()
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
    s = toy['scores'].query('variant=="orig"')
    html = lambda s: R.train_report(s, curves=toy['curves'], split=toy['split'], out=toy['out']).html
    trainings = len(s.groupby(['fold','seed']))
    assert 'Please note' not in html(s) and html(s.assign(size_pred=0.)).count('found nothing in any of its')==trainings

def test_train_report(toy):
    s = toy['scores'].query('variant=="orig"')
    html = R.train_report(s, curves=toy['curves'].query('variant=="orig"'), split=toy['split'], out=toy['out'], info=dict(seed=1)).html
    mean = s.groupby('subject').dice.mean().mean()
    assert f'mean per-image Dice of {mean:.3f} (95 % interval ' in html and html.count('<img')==len(s) and 'Skull-stripped' not in html
    assert html.index('<h1>')<html.index('<svg') and not re.search('https?:', html) and Tags(html).bad==[]

def test_groups_of_cases(toy):
    s = toy['scores'].assign(label=lambda t: np.where(t.scan.str.endswith('0'), 'glioma', 'other'))
    html = R.compare_report(**{**toy, 'scores': s}).html
    assert 'By type' in html and 'glioma' in html and 'groups are small' in html

def test_a_comparison_without_interval_is_shown_as_such(toy):
    c = {**toy['comparison'], 'ci95':[None,None], 'p_value':None, 'wilcoxon_p':.5}
    html = R.compare_report(**{**toy, 'comparison':c}).html
    assert '(95 % interval unknown)' in html and 'Wilcoxon signed-rank test, p = 0.5000' in html
    assert 'nan' not in html.split('<img')[0]

def test_figures_of_a_report_do_not_hide_those_of_a_notebook():
    "A notebook's backend sets itself up with the first figure; inside a style context that would be undone"
    code = 'import matplotlib.pyplot as plt\nreal,seen = plt.rc_context,[]\n' \
           'def context(*a):\n    seen.append(plt._backend_mod is not None)\n    return real(*a)\nplt.rc_context = context\n' \
           'from brainseg_fastai.report import panels\npanels(3, 1)\nassert seen==[True]'
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env={**os.environ, 'MPLBACKEND': 'agg'})
    assert r.returncode==0, r.stderr[-2000:]

def test_the_files_of_the_page_are_part_of_the_package():
    "An installed copy needs them"
    import tomllib
    root = Path(R.__file__).resolve().parent
    data = tomllib.loads((root.parent/'pyproject.toml').read_text(encoding='utf-8'))['tool']['setuptools']['package-data']['brainseg_fastai']
    kept = {o for pattern in data for o in root.glob(pattern)}
    assert {root/'assets'/o for o in ('page.html','report.css','report.toml')} <= kept
