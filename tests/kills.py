"""Runs of a Learner that are killed at random moments and started again, until they are done, compared bit by bit with one that was left alone.

    python tests/kills.py FOLDER [--kills 25] [--seed 0] [--workers 0]

Everything is imported and run once before the first fork, so that an attempt begins at once, and kills (SIGKILL after a random time, up to that of the whole run) fall into steps, saves, sweeps and loads alike.
Prints a line of JSON: kills, finished runs, `places` (how many different numbers of checkpoints were there at a kill), `torn` (kills that left an unfinished save behind), and what differed (nothing, one hopes).
"""
import argparse, hashlib, json, os, random, signal, sys, time, warnings
from pathlib import Path

import torch
from lmnotes.batches import collate
from lmnotes.checkpoints import read_tensors
from lmnotes.core import seed_everything
from lmnotes.models import llama
from lmnotes.training import EMA, Learner, Validate, muon

STEPS = 40


class Noisy:
    "Rows that draw numbers when they are read: a random piece of a text."
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        length = random.randint(3, 12)
        return [(i * 7 + k * random.randint(1, 3)) % 50 for k in range(length)]


def learner(folder, workers=0):
    seed_everything(0)
    model = llama(50, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_len=16, dropout=.1)
    return Learner(model, Noisy(23), [[i, i + 1, i + 2] for i in range(6)], collate_fn=lambda r: collate(r, pad_id=0), batch_size=2, accumulate=2, opt=muon, lr=.01, precision='fp32', num_workers=workers,
                   cbs=[EMA(.9, swap=False), Validate(3, restore=False)], out_dir=folder, save_every=1, keep=3)


def run(folder, workers):
    "One attempt: in a fork, so that it can be killed."
    warnings.simplefilter('ignore')
    learner(folder, workers).fit(steps=STEPS, resume=True)


def fork(*args):
    pid = os.fork()
    if pid: return pid
    code = 1
    try: run(*args); code = 0
    except BaseException as e: print(f'{type(e).__name__}: {e}', file=sys.stderr, flush=True)
    finally: os._exit(code)


def wait(pid, seconds):
    "The exit status, None where it still runs after so long."
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end: return None
        time.sleep(.0005)


def result(folder):
    "What must be equal: every file of the last checkpoint, the clock's figures and memory's apart."
    last = folder/f'step-{STEPS:06d}'
    state = json.loads((last/'state.json').read_text())
    state.pop('seconds'); state['callbacks'].pop('Meter-0')
    history = {k: t.tolist() for k, t in read_tensors(last/'history.safetensors').items() if k != 'seconds'}
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(last.glob('*.safetensors')) if p.stem != 'history'}
    return dict(state=json.dumps(state, sort_keys=True), history=json.dumps(history), folders=sorted(p.name for p in folder.glob('step-*')), **files)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('folder', type=Path)
    ap.add_argument('--kills', type=int, default=25)
    ap.add_argument('--seed', type=int, default=0)
    ap.add_argument('--workers', type=int, default=0)
    a = ap.parse_args()
    torch.set_num_threads(1)
    run(a.folder/'warm', 0)                                        # imports and whatever torch loads at first use
    draw, start = random.Random(a.seed), time.monotonic()
    assert wait(fork(a.folder/'whole', a.workers), 120) == 0
    whole, want = time.monotonic() - start, result(a.folder/'whole')
    kills = torn = finished = 0
    places, wrong = set(), []
    while kills < a.kills or not finished:
        folder = a.folder/f'run-{finished}'
        pid = fork(folder, a.workers)
        code = wait(pid, draw.uniform(.02, .7) * whole if kills < a.kills else 600)
        if code is None:
            os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
            kills += 1
            places.add(max((int(p.name[5:]) for p in folder.glob('step-*') if (p/'manifest.json').exists()), default=0))
            torn += any(not (p/'manifest.json').exists() for p in folder.glob('*step-*') if p.is_dir())
        elif code: wrong.append(f'attempt after {kills} kills ended with {code}'); break
        else:
            got = result(folder)
            wrong += [f'run {finished}: {k} differs' for k in want if got.get(k) != want[k]]
            finished += 1
    print(json.dumps(dict(kills=kills, finished=finished, places=len(places), torn=torn, wrong=wrong, seconds=round(time.monotonic() - start, 1))))


if __name__ == '__main__': main()
