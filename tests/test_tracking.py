"Result folders as MLflow runs, in a local store and on a server, without secrets"
import base64, html, importlib.util, json, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from brainseg_fastai.core import DataError
from brainseg_fastai.scores import summarise_scores
from brainseg_fastai.tracking import (check_track, curve_points, flat_numbers, flat_params, hide_secrets, local_store, log_run, tracking_uri)

def needs_mlflow(f):
    "To import MLflow and to make a store take some ten seconds"
    return pytest.mark.slow(pytest.mark.skipif(importlib.util.find_spec('mlflow') is None, reason='needs the extra `track`')(f))

SECRET = 'tok-Zz81/+q?&"ü'

def result_folder(out, single=False, note=''):
    "A folder as a comparison (or a single training) leaves it"
    out,rng,variants = Path(out), np.random.default_rng(0), ['brain'] if single else ['brain','orig']
    cfg = dict(data='tiny data', variants=variants, folds=2, seed=42, arch='unet', external=None, fingerprint={k: 64*k[0] for k in variants}, note=note)
    subjects = [f'{i:03d}' for i in range(6)]
    rows = [(k, f, s) for k in variants for f in (0,1) for s in subjects]
    split = pd.DataFrame([dict(image=f'{k}/{s}.png', subject=s, split='test' if int(s)%2==f else 'train', fold=f) for k,f,s in rows])
    curves = pd.DataFrame([dict(variant=k, fold=f, seed=42+f, epoch=e, seconds=2.*e+1, train_loss=1/(e+1),
                                valid_loss=np.nan if e==1 else 2/(e+1), valid_dice=.1*e)
                           for k in variants for f in (0,1) for e in range(3)])
    scores = pd.DataFrame([dict(variant=k, fold=f, seed=42, subject=s, scan='I1', slice='ax3', image=f'{k}/{s}.png', dice=rng.uniform(.5,1), jaccard=.5,
                                hd95=np.nan if k=='orig' else 2., nsd=.9, size_true=9., size_pred=8., unit='px') for k,f,s in rows if int(s)%2==f])
    out.mkdir(parents=True)
    for k,t in dict(split=split, curves=curves, scores=scores).items(): t.to_csv(out/f'{k}.csv', index=False)
    result = dict(variant='brain', simulated=True, scores=dict(dice=dict(mean=.8, low=.7, high=None))) if single else \
        dict(verdict='inconclusive', sentence='No difference was shown.', difference=.01, ci95=[-.02,.04], p_value=.4, simulated=False, control=None)
    (out/'settings.json').write_text(json.dumps(cfg), encoding='utf-8')
    (out/f'{"summary" if single else "comparison"}.json').write_text(json.dumps(result), encoding='utf-8')
    (out/'report.html').write_text(f'<p>Bericht für {html.escape(note)}</p>', encoding='utf-8')
    (out/'.hidden').write_text('x'); (out/'predictions').mkdir(); (out/'predictions/a.png').write_bytes(b'x')
    for k in variants:
        d = out/f'runs/{k}-fold0-seed42'; d.mkdir(parents=True)
        (d/'model.safetensors').write_bytes(b'w'*1000); (d/'config.json').write_text('{}'); (d/'checkpoint.pt').write_bytes(b'c')
    return out, scores

@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for k in ('URI','USERNAME','PASSWORD','TOKEN'): monkeypatch.delenv(f'MLFLOW_TRACKING_{k}', raising=False)

@pytest.fixture(scope='module')
def place(tmp_path_factory): return tmp_path_factory.mktemp('a place ü')

# ---------------------------------------------------------------- the local store

@needs_mlflow
def test_a_comparison_is_logged_beside_its_folder(place, monkeypatch):
    monkeypatch.chdir(place.parent) # nothing may land in the working directory
    before = sorted(place.parent.iterdir())
    monkeypatch.setenv('SOME_API_KEY', SECRET)
    out,scores = result_folder(place/'first', note=f'--uri https://anna:{SECRET}@host.org, key {SECRET}')
    here = {p: p.read_bytes() for p in out.rglob('*') if p.is_file()}
    r = log_run('mlflow', out)
    assert r['uri']==local_store(place) and r['experiment']=='tiny data' and r['uri'] in r['look']
    assert sorted(p.name for p in place.iterdir())==['first','mlartifacts','mlflow.db'] and sorted(place.parent.iterdir())==before
    assert here=={p: p.read_bytes() for p in out.rglob('*') if p.is_file()}
    from mlflow import MlflowClient
    c = MlflowClient(r['uri'])
    run = c.get_run(r['run_id'])
    assert run.info.status=='FINISHED' and run.info.run_name=='first'
    p = run.data.params
    assert p['arch']=='unet' and p['variants']=='brain, orig' and p['fingerprint.brain']==64*'b' and 'external' not in p
    assert p['split.fold0.train_subjects']=='3' and p['split.fold1.test_subjects']=='3'
    m = run.data.metrics
    for k,g in scores.groupby('variant'):
        d = summarise_scores(g[['subject','dice']]).loc['dice']
        assert (m[f'scores/{k}/dice'], m[f'scores/{k}/dice_low'], m[f'scores/{k}/dice_high'])==pytest.approx((d['mean'], d['low'], d['high']))
    assert m['scores/brain/subjects']==6 and 'scores/orig/hd95' not in m # no number is better than NaN
    assert (m['result/difference'], m['result/ci95_low'], m['result/ci95_high'])==(.01,-.02,.04)
    assert run.data.tags['verdict']=='inconclusive' and run.data.tags['mlflow.note.content']=='No difference was shown.'
    h = c.get_metric_history(r['run_id'], 'curve/orig/fold1/seed43/valid_dice')
    assert [(o.step, o.value) for o in h]==[(0,0.),(1,.1),(2,.2)] and [o.timestamp-h[0].timestamp for o in h]==[0,2000,4000]
    assert [o.step for o in c.get_metric_history(r['run_id'], 'curve/orig/fold1/seed43/valid_loss')]==[0,2]
    files = {p.relative_to(place/'mlartifacts').as_posix().split('artifacts/')[1]: p for p in (place/'mlartifacts').rglob('*') if p.is_file()}
    assert set(files)=={'settings.json','split.csv','scores.csv','curves.csv','comparison.json','report.html',
                        *(f'runs/{k}-fold0-seed42/{o}' for k in ('brain','orig') for o in ('model.safetensors','config.json'))}
    assert files['runs/brain-fold0-seed42/model.safetensors'].read_bytes()==b'w'*1000
    assert files['scores.csv'].read_bytes()==(out/'scores.csv').read_bytes()
    stored = [p.read_bytes() for p in place.rglob('*') if p.is_file() and out not in p.parents] # the database and every logged file
    assert len(stored) > 10 and not any(o.count(b'tok-Zz81') or b'anna' in o for o in stored)
    assert 'Bericht für' in files['report.html'].read_text(encoding='utf-8') and '***' in p['note']

@needs_mlflow
def test_a_single_training_joins_the_store(place):
    out,_ = result_folder(place/'second', single=True)
    r = log_run('mlflow', out, name='mine', experiment='other')
    from mlflow import MlflowClient
    c = MlflowClient(r['uri'])
    run = c.get_run(r['run_id'])
    assert run.info.run_name=='mine' and c.get_experiment(run.info.experiment_id).name=='other'
    assert run.data.metrics['result/scores/dice/mean']==.8 and 'result/scores/dice/high' not in run.data.metrics
    assert run.data.tags['simulated']=='True' and 'verdict' not in run.data.tags

@needs_mlflow
def test_the_environment_names_the_store_and_an_argument_goes_before_it(place, tmp_path, monkeypatch):
    out,_ = result_folder(tmp_path/'r')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', local_store(place))
    r = log_run('mlflow', out)
    assert r['uri']==local_store(place) and not (tmp_path/'mlflow.db').exists()
    monkeypatch.setenv('MLFLOW_TRACKING_URI', 'sqlite:////nowhere/at/all/mlflow.db')
    assert log_run('mlflow', out, uri=local_store(place))['uri']==local_store(place)

@needs_mlflow
def test_what_goes_wrong_half_way_is_told_and_marked(place, tmp_path):
    out,_ = result_folder(tmp_path/'broken')
    (out/'comparison.json').write_text('{', encoding='utf-8')
    with pytest.raises(DataError, match='results in .*broken are complete; to log them later: log_run'):
        log_run('mlflow', out, uri=local_store(place))
    from mlflow import MlflowClient
    c = MlflowClient(local_store(place))
    runs = c.search_runs([e.experiment_id for e in c.search_experiments()], "attributes.run_name='broken'")
    assert [r.info.status for r in runs]==['FAILED']

@needs_mlflow
def test_not_a_result_folder(tmp_path):
    with pytest.raises(DataError, match='no settings.json'): log_run('mlflow', tmp_path)
    assert not list(tmp_path.iterdir())

# ---------------------------------------------------------------- a server

@pytest.fixture
def server():
    "A server that speaks as much of MLflow's protocol as a run needs and remembers what it was told"
    heard = []
    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
            heard.append((self.command, self.path, dict(self.headers), body))
            what = self.path.split('?')[0].split('mlflow/')[-1]
            rid = f'run{self.server.server_port}' # MLflow remembers where a run's files go
            run = dict(info=dict(run_id=rid, run_uuid=rid, experiment_id='7', status='RUNNING',
                                 artifact_uri=f'mlflow-artifacts:/7/{rid}/artifacts'), data={})
            replies = {'experiments/create': dict(experiment_id='7'), 'runs/create': dict(run=run), 'runs/get': dict(run=run),
                       'runs/update': dict(run_info=run['info'])}
            missing = what in ('experiments/get-by-name','server-info')
            reply = dict(error_code='RESOURCE_DOES_NOT_EXIST', message='none') if missing else replies.get(what, {})
            self.send_response(404 if missing else 200); self.end_headers(); self.wfile.write(json.dumps(reply).encode())
        do_GET = do_POST = do_PUT = do_PATCH = answer
        def log_message(self, *a): pass
    s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}', heard
    s.shutdown()

@needs_mlflow
@pytest.mark.parametrize('in_address', [False,True])
def test_a_server_gets_all_but_the_password(server, tmp_path, monkeypatch, capfd, in_address):
    uri,heard = server
    for o in ('HTTP_PROXY','http_proxy','ALL_PROXY','all_proxy'): monkeypatch.delenv(o, raising=False)
    if in_address: monkeypatch.setenv('MLFLOW_TRACKING_URI', uri.replace('//', '//somebody:pass-word-17@'))
    else:
        for k,v in dict(URI=uri, USERNAME='somebody', PASSWORD='pass-word-17').items(): monkeypatch.setenv(f'MLFLOW_TRACKING_{k}', v)
    out,_ = result_folder(tmp_path/'r', note='brainseg … somebody:pass-word-17@… pass-word-17')
    r = log_run('mlflow', out)
    paths = [p for _,p,_,_ in heard]
    assert any('log-batch' in p for p in paths) and any('mlflow-artifacts' in p and p.endswith('model.safetensors') for p in paths)
    bodies = b''.join(b for *_,b in heard) + ''.join(paths).encode()
    assert b'fingerprint.brain' in bodies and b'valid_dice' in bodies and b'"FINISHED"' in bodies
    assert b'pass-word-17' not in bodies and 'pass-word-17' not in repr(r) + ''.join(capfd.readouterr()) # MLflow would print its address
    auth = {h.get('Authorization') for _,p,h,_ in heard if 'mlflow' in p}
    assert auth=={'Basic ' + base64.b64encode(b'somebody:pass-word-17').decode()}

# ---------------------------------------------------------------- without MLflow

def test_off_means_nothing_is_touched(tmp_path):
    assert log_run(None, tmp_path/'none') is None and log_run('', tmp_path/'none') is None and check_track(None) is False

def test_importing_brings_no_mlflow():
    r = subprocess.run([sys.executable, '-c', 'import sys, brainseg_fastai.tracking as t; t.log_run(None, "x"); '
                        'assert not {"mlflow","torch"} & set(sys.modules)'],
                       capture_output=True, text=True)
    assert r.returncode==0, r.stderr

def test_an_absent_package_gives_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'mlflow', None)
    for f in (lambda: log_run('mlflow', tmp_path), lambda: check_track('mlflow')):
        with pytest.raises(DataError, match=r"^mlflow is not installed; .*pip install 'brainseg_fastai\[track\]'$"): f()

def test_unknown_trackers():
    with pytest.raises(DataError, match='expected mlflow'): check_track('wandb')

@needs_mlflow
def test_a_server_that_does_not_answer():
    with pytest.raises(DataError, match=r'http://127\.0\.0\.1:9: found no MLflow server answers'): check_track('mlflow', uri='http://127.0.0.1:9')

@pytest.mark.parametrize('uri', ['https://anna:geheim77@host.org/x', 'https://geheim77@host.org', 'postgresql://anna:geheim77@host/db'])
def test_passwords_are_not_taken_as_arguments(uri, monkeypatch):
    with pytest.raises(DataError, match='environment variables MLFLOW_TRACKING_USERNAME') as e: tracking_uri('.', uri)
    assert 'geheim77' not in str(e.value)
    monkeypatch.setenv('MLFLOW_TRACKING_URI', uri)
    assert tracking_uri('.')==uri # from the environment they are welcome
    assert 'geheim77' not in hide_secrets(f'cannot reach {uri}')

@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec='utf-8', exclude_characters='\0', exclude_categories=['Cs']), min_size=6, max_size=30),
       st.text(max_size=20), st.sampled_from(['DAGSHUB_USER_TOKEN','MLFLOW_TRACKING_PASSWORD','AWS_SECRET_ACCESS_KEY','MLFLOW_TRACKING_USERNAME','WANDB_API_KEY']))
def test_no_value_of_a_credential_survives(value, text, name):
    with pytest.MonkeyPatch.context() as m:
        m.setenv(name, value)
        shown = hide_secrets(f'{text}{value}{text}')
        assert value not in shown or value in f'{text}***{text}'

def test_the_address_of_a_local_store(tmp_path):
    assert local_store(tmp_path/'a b ü')==f'sqlite:///{tmp_path.resolve().as_posix()}/a b ü/mlflow.db'
    assert local_store(tmp_path/'50%?#').endswith('/50%25%3F%23/mlflow.db')

def test_plain_text_stays():
    text = 'epochs 20, https://host.org/a@b, mail me@host.org, 3 // 2 @ noon'
    assert hide_secrets(text)==text

def test_names_that_mlflow_takes():
    assert flat_params({'a+b': {'c(d)': [1,2]}, 'x': None, 'y': False})=={'a_b.c_d_': '1, 2', 'y': 'False'}
    assert len(flat_params(dict(a='x'*900))['a'])==500
    assert flat_numbers({'t1+t2': dict(a=[1,2], b=[1,2,3], c=True, d=float('inf'), e=None)})=={'t1_t2/a_low': 1, 't1_t2/a_high': 2}
    t = pd.DataFrame(dict(epoch=[0,1], seconds=[1.,2.], loss=[3.,4.]))
    assert curve_points(t, end=10)==[('curve/loss', 3., 9000, 0), ('curve/loss', 4., 10000, 1)]
