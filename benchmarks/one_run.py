"One system, one seed, in a process of its own: split, clock, evaluation, and the figures as one JSON file"
import json, sys, time

STARTED = time.perf_counter() # imports are part of the setup

import numpy as np, pandas as pd, torch
from fastai.torch_core import default_device, set_seed
from fastcore.basics import store_attr
from brainseg_fastai.adni import adni_cases
from brainseg_fastai.cases import case_name
from brainseg_fastai.checks import mask_codes
from brainseg_fastai.core import write_json
from brainseg_fastai.images import data_fingerprint, read_mask
from brainseg_fastai.plan import peak_mb
from brainseg_fastai.scores import empty_score, overlap
from brainseg_fastai.segmentation import SubjectSplitter
from brainseg_fastai.splits import assert_apart
from brainseg_fastai.training import environment

from curves import TARGETS, next_point
from systems import SYSTEMS

VALID_PCT,SPLIT_SEED = .3, 42 # the same split for every system and seed
EVAL_PAUSE = .5               # training between two evaluations, as a share of what the last one took

def split_of(
    cases:pd.DataFrame # Case table
)->pd.DataFrame: # The same with the column `split`: train or valid, by subject
    "The one split of the benchmark"
    res = cases.assign(split=SubjectSplitter(valid_pct=VALID_PCT, seed=SPLIT_SEED).split(cases))
    assert_apart(res)
    return res

def mean_dice(
    preds,  # Predicted classes, one array per case
    truths  # True classes
)->float:
    "Mean per-image foreground Dice; images where truth and prediction are both empty count 1"
    def one(p, t):
        o = overlap(p>0, t>0)
        empty = empty_score(not o['n_true'], not o['n_pred'], 1.)
        return (empty or o)['dice']
    return float(np.mean([one(p, t) for p,t in zip(preds, truths)]))

class Clock:
    "Counts seconds of training only; evaluates on the grid, and says when to stop"
    def __init__(self,
        evaluate,       # Function without arguments that gives the Dice
        at_least=0.,    # Training seconds before which nothing is stopped
        at_most=np.inf, # Training seconds at which everything is
        compare_at=None,# Training seconds by which others are compared: evaluated just before
        max_steps=None, # Steps at which everything is stopped
        each_step=False,# Evaluate after each step?
        show=None,      # Function of seconds and Dice
        now=None        # The time; None: of this machine, its device's work done
    ):
        store_attr('evaluate,at_least,at_most,compare_at,max_steps,each_step')
        self.show,self.now = show or (lambda *args: None), now or now_done
        self.seconds = self.waited = self.evaluating = self.last_step = 0.
        self.steps = self.images = 0
        self.curve,self.losses,self.stopped = [],[],False
        self.since,self.first,self.due = None,None,next_point(0.)

    def share(self): return min(1., self.seconds/self.at_most) # of the time that it may train: for learning rates
    def start(self):
        "Training goes on: from here, the time counts"
        if self.first is None: self.first = self.now()
        self.since = self.asked = self.now()
    def pause(self):
        if self.since is not None: self.seconds += self.now()-self.since
        self.since = None
    def loaded(self):
        "A batch has come: the time since the last step was spent waiting for it"
        self.waited += self.now()-self.asked

    def step(self,
        images, # In the batch
        loss    # Of the batch
    )->bool: # Stop now?
        "A step is done: the clock stands still while it is decided whether to evaluate and to stop"
        before = self.seconds
        self.pause()
        self.last_step = self.seconds-before
        self.steps += 1
        self.images += images
        self.losses.append(float(loss.detach() if hasattr(loss, 'detach') else loss))
        at = self.compare_at
        last_chance = at is not None and self.seconds<=at<self.seconds+self.last_step
        self.stopped = self.seconds>=self.at_most or bool(self.max_steps and self.steps>=self.max_steps)
        if self.each_step or self.stopped or last_chance or self.seconds>=self.due: self.look()
        done = any(d>=max(TARGETS) for _,d in self.curve) and self.seconds>=self.at_least and self.at_most<np.inf
        self.stopped = self.stopped or done
        if not self.stopped: self.start()
        return self.stopped

    def look(self):
        "Evaluate, with the clock standing still"
        start = self.now()
        dice = self.evaluate()
        took = self.now()-start
        self.evaluating += took
        self.curve.append((round(self.seconds, 3), dice))
        self.due = max(next_point(self.seconds), self.seconds+EVAL_PAUSE*took)
        self.show(self.seconds, dice)

    def finish(self):
        "Training is over"
        self.pause()
        if self.steps and (not self.curve or self.curve[-1][0]<round(self.seconds, 3)): self.look()

def now_done():
    "The time, when the device has done its work"
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter()

def undisturbed(
    model, # Network
    f      # Function without arguments
):
    "The value of `f`, called without gradients in evaluation mode; modes and random numbers are afterwards as before"
    import random
    modes,state,py = [(m, m.training) for m in model.modules()], np.random.get_state(), random.getstate()
    with torch.random.fork_rng(), torch.no_grad():
        model.eval()
        try: return f()
        finally:
            for m,o in modes: m.training = o
            np.random.set_state(state)
            random.setstate(py)

def prediction_speed(predict, cases, seconds=2.):
    "Images per second from files to masks: passes over `cases` until `seconds` are over"
    n,start = 0, now_done()
    while n==0 or now_done()-start<seconds:
        predict(cases)
        n += len(cases)
    return n/(now_done()-start)

def machine_name(
    env # From `environment`
)->str:
    "What figures are labelled with"
    return f"{env['device']}, {env['threads']} threads{', bf16 in hardware'*env['bf16']}"

def run(
    spec # dict: data, inputs, size, system, seed, init, threads, and if wanted the limits of `Clock`, epochs, speed_s
)->dict: # What is kept of the run
    "Train one system under the clock"
    torch.set_num_threads(spec['threads'])
    cases = split_of(adni_cases(spec['data'], spec['inputs']))
    valid,codes = cases[cases['split']=='valid'].reset_index(drop=True), list(mask_codes(cases['mask']))
    set_seed(spec['seed'], reproducible=True)
    system = SYSTEMS[spec['system']](cases, codes, spec['size'], spec['seed'], spec['init']=='pretrained',
                                     spec.get('epochs'))
    truths = [read_mask(o, codes) for o in valid['mask']]
    def look(): return undisturbed(system.model, lambda: mean_dice(system.predict(valid), truths))
    def show(seconds, dice):
        if sys.stderr.isatty(): print(f'\r    {seconds:7.1f} s   Dice {dice:.3f} ', end='', file=sys.stderr,
                                      flush=True)
    limits = {k: spec[k] for k in ('at_least','at_most','compare_at','max_steps','each_step')
              if spec.get(k) is not None}
    clock,begin = Clock(look, show=show, **limits), time.perf_counter()
    system.train(clock)
    clock.finish()
    speed = undisturbed(system.model, lambda: prediction_speed(system.predict_all, valid, spec.get('speed_s', 2.)))
    return figures(spec, system, clock, speed, begin, cases)

def figures(spec, system, clock, speed, begin, cases):
    "What is kept of a run"
    env,mb = environment(default_device()), peak_mb()
    return dict(
        spec=spec, system=spec['system'], seed=spec['seed'], init='pretrained' if system.pretrained else 'scratch',
        end=clock.seconds, curve=clock.curve, best=max(d for _,d in clock.curve), steps=clock.steps,
        images=clock.images,
        losses=clock.losses, about=system.about, parameters=sum(p.numel() for p in system.model.parameters()),
        setup_s=(clock.first or begin)-STARTED, train_images_per_s=clock.images/clock.seconds,
        predict_images_per_s=speed,
        wait_share=clock.waited/clock.seconds, evaluation_s=clock.evaluating, memory_mb=None if np.isnan(mb) else mb,
        machine=machine_name(env), environment=env, split=dict(zip(map(case_name, cases.itertuples()),
                                                                   cases['split'])),
        sides={p: sorted(set(g['subject'])) for p,g in cases.groupby('split')}, data=data_fingerprint(cases))

if __name__=='__main__':
    with open(sys.argv[1], encoding='utf-8') as f: spec = json.load(f)
    write_json(sys.argv[2], run(spec))
    if sys.stderr.isatty(): print('\r'+' '*40+'\r', end='', file=sys.stderr)
