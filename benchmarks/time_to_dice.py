"""Seconds of training until unseen subjects are segmented well: ours beside what one would otherwise take

    python benchmarks/time_to_dice.py DATA

Every run is a process of its own and leaves one file in OUT/runs: the same command goes on after an interruption."""
import argparse, hashlib, importlib.util, json, math, os, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from brainseg_fastai.core import DataError
from curves import ABLATIONS, caps, time_to
from report import read_run, write_report

# within a seed; the caps of all need ours
ORDER = 'ours','published','stock','smp','monai_unet','monai_basic','nnunet'
NEEDS = dict(smp=('segmentation_models_pytorch','segmentation-models-pytorch'),
             nnunet=('dynamic_network_architectures','dynamic-network-architectures'))
SAME = 'inputs','size','init','threads','quick'                               # for all runs of a folder
# does it work? Its times mean nothing
QUICK = dict(size=64, seeds=1, threads=1, max_steps=3, each_step=True, epochs=4, speed_s=0.)
CODE = ('one_run.py','systems.py','curves.py', *(f'../brainseg_fastai/{o}.py'
                                                 for o in ('settings','networks','training','inference',
                                                                                      'segmentation','runs')))

def parse(args=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('data', nargs='?',
                   help='folder with mask/ and the images; with --quick a small simulated one if left out')
    p.add_argument('--out', type=Path,
                   help='folder for results (default benchmarks/results, with --ablation benchmarks/results/ablation)')
    p.add_argument('--inputs', '--kind', default='orig',
                   help='folder of the images within DATA (default orig, the full skull)')
    p.add_argument('--size', type=int, help='pixels (default 256)')
    p.add_argument('--seeds', type=int, help='runs of each system; of the published recipe always one (default 3)')
    p.add_argument('--systems', nargs='+', choices=(*ORDER, *ABLATIONS), metavar='NAME',
                   help=f"of {', '.join(ORDER)} (default all); ours with one change: {', '.join(ABLATIONS)}")
    p.add_argument('--ablation', action='store_true',
                   help='compare ours with ours where one thing is changed, not with others')
    p.add_argument('--init', choices=('scratch','pretrained'), default='scratch',
                   help='ImageNet weights for none (default), or for all that have some')
    p.add_argument('--threads', type=int, help='of every run (default 2)')
    p.add_argument('--quick', action='store_true',
                   help='a few steps of each on 64 px: does the benchmark itself work?')
    a = p.parse_args(args)
    a.systems = a.systems or ['ours', *ABLATIONS] if a.ablation else a.systems or list(ORDER)
    a.out = a.out or (HERE/'results'/'ablation' if a.ablation else HERE/'results')
    usual = dict(size=256, seeds=3, threads=2) | {k: QUICK[k] for k in ('size','seeds','threads') if a.quick}
    for k,v in usual.items():
        if getattr(a, k) is None: setattr(a, k, v)
        if getattr(a, k)<1: p.error(f'--{k} {getattr(a, k)}: expected 1 or more')
    if a.size%32: p.error(f'--size {a.size}: expected a multiple of 32; networks here halve images five times')
    if not a.data and not a.quick: p.error('DATA: name a folder of slices and masks')
    if 'ours' not in a.systems: p.error('--systems: ours is always needed; the caps of the others depend on its time')
    return a

def missing(
    systems # Names
)->list: # Packages that these need and that are not installed
    return [pip for name,(module,pip) in NEEDS.items() if name in systems
            and importlib.util.find_spec(module) is None]

def planned(systems, seeds)->list: # (seed, system), in order
    "Seed by seed, all systems within a seed, ours first"
    return [(k, s) for k in range(seeds) for s in (*ORDER, *ABLATIONS) if s in systems and not (s=='published' and k)]

def code_version():
    h = hashlib.sha256()
    for o in CODE: h.update((HERE/o).read_bytes())
    return h.hexdigest()[:12]

def spec_of(a, seed, system, ours):
    "All that a run is told"
    spec = dict(data=str(Path(a.data).resolve()), system=system, seed=seed, **{k: getattr(a, k) for k in SAME})
    if a.quick: return spec | {k: QUICK[k] for k in ('max_steps','each_step','epochs','speed_s')}
    if ours is None: return spec
    low,high = caps(system, time_to(ours['curve'], .90, ours['end'])[0], ours['end'])
    return spec | dict(at_least=low, at_most=high, compare_at=ours['end'])

def finished(path, spec):
    "The run of an earlier call, if it is what would be run now"
    r = read_run(path)
    if r is None: return None
    for k in (*SAME, 'data'):
        if r['spec'].get(k)!=spec.get(k):
            raise DataError.of(path, f"a run with {k} {r['spec'].get(k)}", f'{k} {spec.get(k)}',
                               'Give another --out, or delete the old runs.')
    if r.get('code')!=code_version(): print(f'    {path.name} was made by other code; delete it to run it again')
    return r

def start(spec, path):
    "Run one system in a fresh process"
    path.parent.mkdir(parents=True, exist_ok=True)
    todo,res,log = (path.with_name(f'.{path.stem}-{os.getpid()}.{o}') for o in ('todo','part','log'))
    env = {**os.environ, **dict.fromkeys(('OMP_NUM_THREADS','MKL_NUM_THREADS','OPENBLAS_NUM_THREADS'),
                                         str(spec['threads'])),
           'PYTHONPATH': os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get('PYTHONPATH')]))}
    # else each process compiles the libraries anew, which is not what is measured
    env.pop('PYTHONDONTWRITEBYTECODE', None)
    todo.write_text(json.dumps(spec), encoding='utf-8')
    began = time.time()
    try:
        show = sys.stderr.isatty()
        call = [sys.executable, str(HERE/'one_run.py'), str(todo), str(res)]
        with open(log, 'w', encoding='utf-8') as f: code = subprocess.run(call, env=env, stdout=f,
                                                                          stderr=None if show else f).returncode
        if code:
            last = log.read_text(encoding='utf-8', errors='replace').strip().splitlines()[-1:] or ['see above']
            raise DataError(f"{spec['system']}, seed {spec['seed']}: the run stopped with code {code} ({last[0]}). "
                            f'What it wrote is in {log}.')
        r = json.loads(res.read_text(encoding='utf-8')) | dict(code=code_version(), wall_s=time.time()-began)
        res.write_text(json.dumps(r, ensure_ascii=False), encoding='utf-8')
        res.replace(path)
        log.unlink()
        return r
    finally:
        for o in (todo, res): o.unlink(missing_ok=True)

def time_left(
    todo, # (seed, system) still to run
    runs, # Finished ones
)->float|None: # Seconds, at the most, or None as long as nothing is known
    "What is left, from earlier runs of the same systems or else from their caps"
    ours = [r for r in runs if r['system']=='ours']
    if not ours: return None
    def one(system):
        walls = [r['wall_s'] for r in runs if r['system']==system]
        if walls: return max(walls)
        r = ours[-1]
        cap = caps(system, time_to(r['curve'], .90, r['end'])[0], r['end'])[1]
        return cap*1.4 + r['setup_s'] # evaluations and the start come on top
    return sum(one(s) for _,s in todo)

def took(s): return f'{s:.0f} s' if s<120 else f'{s/60:.0f} min'

def main(args=None):
    a = parse(args)
    lacking = missing(a.systems)
    if lacking: raise DataError(f"found no {' and no '.join(lacking)}; expected the packages of the extra `bench`. "
                                "Install them: pip install -e '.[bench]'")
    if not a.data:
        from brainseg_fastai.adni import ADNI
        from brainseg_fastai.cases import standin
        a.data = standin(ADNI)
    if not (Path(a.data)/a.inputs).is_dir():
        raise DataError.of(a.data, f'no folder {a.inputs}', 'images there and masks in mask/',
                           'Name the data folder, or give --inputs.')
    runs,ours,todo = [],{},planned(a.systems, a.seeds)
    for i,(seed,system) in enumerate(todo):
        path = a.out/'runs'/f'{system}-seed{seed}.json'
        spec = spec_of(a, seed, system, ours.get(seed))
        r,head = finished(path, spec), f'[{i+1}/{len(todo)}] seed {seed} · {system}'
        if r is None:
            left,most = time_left(todo[i:], runs), spec.get('at_most', math.inf)
            print(head + (f', at most {took(most)} of training' if most<math.inf else '') +
                  (f' · at most about {took(left)} left in all' if left and not a.quick else ''), flush=True)
            r = start(spec, path)
            t,ok = time_to(r['curve'], .90, r['end'])
            end = f'after {took(t)}' if ok else 'not reached'
            print(f"    {r['steps']} steps in {took(r['end'])}, best Dice {r['best']:.3f}, 0.90 {end}", flush=True)
        else: print(f'{head}: finished earlier', flush=True)
        runs.append(r)
        if system=='ours': ours[seed] = r
        write_report(runs, a.out) # whatever is there can be looked at
    print((a.out/'time_to_dice.md').read_text(encoding='utf-8'))
    return 0

if __name__=='__main__':
    try: sys.exit(main())
    except DataError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('\nInterrupted. Finished runs are kept; the same command goes on.', file=sys.stderr)
        sys.exit(130)
