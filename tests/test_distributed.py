"Two processes against one: losses, checkpoints, faults. Each test starts real processes by torchrun, on gloo, and asserts their number."
import hashlib, json, os, signal, subprocess, sys
from functools import partial
from pathlib import Path

import pytest
import torch

from lmnotes.checkpoints import checkpoints
from lmnotes.core import LmnotesError, seed_everything
from lmnotes.distributed import is_first, setup, whole_state
from lmnotes.hub import load_model
from lmnotes.loaders import in_order
from lmnotes.models import llama
from lmnotes.optimizers import adafactor, adamw, muon, sgd
from lmnotes.training import Learner

pytestmark = pytest.mark.slow
ROWS = [[5 + (7 * i + j * j) % 50 for j in range(n)] for i, n in enumerate((3, 17, 8, 30, 2, 11, 25, 4, 9, 21, 6, 13, 19))]
UNSEEN = [r[::-1] for r in ROWS[:7]]


def learner(out_dir=None, *, rows=ROWS, seed=0, dropout=0., batch_size=2, accumulate=1, opt=adamw, lr=1e-3, **kwargs):
    "A small model on 13 rows of unequal length; the seed of its first weights may differ from process to process"
    seed_everything(seed)
    model = llama(61, d_model=24, n_layers=3, n_heads=2, n_kv_heads=1, d_ff=37, max_len=64, dropout=dropout)
    return Learner(model, rows, UNSEEN, batch_size=batch_size, accumulate=accumulate, opt=opt, lr=lr, precision='fp32', out_dir=out_dir, **kwargs)


def seen(learn):
    "What a run came to: losses, norms, validation and a hash of the weights"
    state = whole_state(learn.model)
    digest = hashlib.sha256(b''.join(state[n].contiguous().numpy().tobytes() for n in sorted(state))).hexdigest()
    score = learn.validate()
    return dict(world=learn.processes, losses=[h['loss'] for h in learn.history], norms=[h['norm'] for h in learn.history], tokens=learn.tokens,
                valid=score.nll / score.n_tokens, scored=score.n_tokens, weights=digest)


def worker(case, out, shard):
    "What each of the processes does"
    rank, out, shard = int(os.environ.get('RANK', 0)), Path(out), shard == 'shard'
    make = partial(learner, shard=shard)
    if case == 'alone': found = dict(world=setup(int(os.environ.get('WANTED', 0)) or None).num_processes)
    elif case == 'killed':
        cbs = [Kill(3)] if rank == 1 and not (out/'run').exists() else []
        found = dict(run=seen(make(out/'run', dropout=.2, save_every=1, cbs=cbs).fit(steps=6, resume=True)))
    else:
        found = {f'equal {a}': seen(make(seed=rank, accumulate=a).fit(steps=4)) for a in (1, 2)}
        found['unscored'] = seen(make(rows=ROWS[:3] + [[5]], batch_size=1, order=in_order).fit(steps=4))
        found |= {f.__name__: seen(make(opt=f, lr=1e-2).fit(steps=3)) for f in (sgd, adamw, muon)}
        try: make(opt=adafactor).fit(steps=1)
        except LmnotesError as e: found['refused'] = str(e)
        found['straight'] = seen(make(dropout=.2).fit(steps=6))
        make(out/'run', dropout=.2, save_every=3, cbs=[Stop(4)]).fit(steps=6)
        assert [p.name for p in checkpoints(out/'run')] == ['step-000003', 'step-000004']
        resumed = make(out/'run', dropout=.2, seed=9).fit(steps=6, resume=True)
        resumed.save(out/'model')
        found |= dict(resumed=seen(resumed), finished=seen(make(out/'run', dropout=.2).fit(steps=6, resume=True)))
    if is_first(): (out/f'{case}.json').write_text(json.dumps(found))


class Stop:
    "Ends a run as an interrupt would, in one process only: the others have to follow"
    def __init__(self, at): self.at = at
    def before_step(self, learn):
        if learn.step + 1 == self.at and learn.rank == 0: signal.raise_signal(signal.SIGINT)


class Kill:
    def __init__(self, at): self.at = at
    def after_backward(self, learn):
        if learn.step + 1 == self.at: os.kill(os.getpid(), signal.SIGKILL)


def torchrun(case, out, shard, n=2):
    "Start the processes; the exit code, and what they said"
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), __file__, case, str(out), shard]
    done = subprocess.run(cmd, capture_output=True, text=True, timeout=240, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    return done.returncode, done.stdout + done.stderr


def two(case, out, shard):
    "What two processes found, after asserting that there were two"
    code, said = torchrun(case, out, shard)
    assert code == 0, said[-6000:]
    found = json.loads((out/f'{case}.json').read_text())
    assert all(run['world'] == 2 for run in found.values() if isinstance(run, dict))
    return found


def assert_same(a, b, tolerance=1e-5):
    assert a['tokens'] == b['tokens'] and a['scored'] == b['scored']
    for name in ('losses', 'norms', 'valid'): torch.testing.assert_close(torch.tensor(a[name]), torch.tensor(b[name]), atol=tolerance, rtol=tolerance)


@pytest.fixture(scope='module', params=['copy', 'shard'])
def found(request, tmp_path_factory):
    "One start of two processes for many questions, with a copy of the model in each and with the model cut between them"
    out = tmp_path_factory.mktemp(request.param)
    return two('many', out, request.param) | dict(out=out, shard=request.param)


def test_two_processes_equal_one(found):
    "13 ragged rows, steps of 4 and of 8: the epoch's last step is short and odd, and one process has a micro-batch less"
    for a in (1, 2): assert_same(found[f'equal {a}'], seen(learner(accumulate=2 * a).fit(steps=4)))


def test_a_process_without_anything_to_score(found):
    assert_same(found['unscored'], seen(learner(rows=ROWS[:3] + [[5]], batch_size=1, accumulate=2, order=in_order).fit(steps=4)))


def test_optimizers(found):
    "Adafactor adds over whole rows and columns, which no process has of a sharded matrix"
    assert ('Adafactor' in found.get('refused', '')) == (found['shard'] == 'shard')
    for f, tolerance in ((sgd, 1e-5), (adamw, 1e-4), (muon, 1e-4)): assert_same(found[f.__name__], seen(learner(opt=f, lr=1e-2, accumulate=2).fit(steps=3)), tolerance)


def test_two_resume_bit_by_bit_and_one_goes_on(found):
    "Stopped by a signal in one process, after step 4; the other follows"
    assert len(found['straight']['losses']) == 6
    assert found['resumed'] == found['straight'] == found['finished']
    alone = learner(found['out']/'run', dropout=.2, accumulate=2).fit(steps=6, resume=True, allow_change=('processes', 'accumulate'))
    assert alone.processes == 1 and seen(alone)['weights'] == found['straight']['weights']
    saved = load_model(found['out']/'model').state_dict()
    assert all(torch.equal(t, saved[n]) for n, t in alone.model.state_dict().items())


def test_one_process_killed_ends_all_and_the_run_goes_on(found, tmp_path):
    code, said = torchrun('killed', tmp_path, found['shard'])
    assert code != 0 and 'SIGKILL' in said and not (tmp_path/'killed.json').exists()
    assert [p.name for p in checkpoints(tmp_path/'run')] == ['step-000001', 'step-000002']
    assert two('killed', tmp_path, found['shard'])['run'] == found['straight']


def test_a_launcher_that_starts_one_process_is_noticed(tmp_path):
    "accelerate launch --cpu --num_processes 2 starts one, without a word; torchrun starts two"
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '2', __file__, 'alone', str(tmp_path), 'copy']
    done = subprocess.run(launch, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and json.loads((tmp_path/'alone.json').read_text())['world'] == 1, done.stderr
    done = subprocess.run(launch, capture_output=True, text=True, timeout=120, env={**os.environ, 'WANTED': '2'})
    assert done.returncode != 0 and 'processes is 1, but must be 2' in done.stderr
    assert torchrun('alone', tmp_path, 'copy')[0] == 0 and json.loads((tmp_path/'alone.json').read_text())['world'] == 2


if __name__ == '__main__': worker(*sys.argv[1:])
