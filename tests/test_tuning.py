"A search that is killed at any moment, or interrupted, ends with the trials of one that was left alone."
import os, random, signal, subprocess, sys, time

import pytest

pytest.importorskip('optuna')

TRIALS, STEPS = 5, 6


def make(trial):
    from lmnotes.core import seed_everything
    from lmnotes.models import llama
    from lmnotes.optimizers import adamw
    from lmnotes.training import Learner
    seed_everything(0)
    rows = [[(3 * i + j * (1 + i % 4)) % 31 for j in range(12)] for i in range(32)]
    model = llama(31, d_model=16, n_layers=1, n_heads=2, d_ff=32, max_len=16, dropout=trial.suggest_float('dropout', 0., .3))
    return Learner(model, rows, rows[:8], batch_size=8, opt=adamw, lr=trial.suggest_float('lr', 1e-4, 1., log=True))


def finished(study):
    return [(t.params, t.value, t.intermediate_values) for t in study.trials if t.state.name in ('COMPLETE', 'PRUNED')]


@pytest.fixture(scope='module')
def left_alone():
    from lmnotes.tuning import search
    return finished(search(make, TRIALS, STEPS))


def test_killed_at_random_moments(tmp_path, left_alone):
    "kill -9 while trials run: no trial is lost, none is made twice, and the rest are what they would have been"
    from lmnotes.tuning import search
    rng, kills = random.Random(0), 0
    command = [sys.executable, '-u', __file__, str(tmp_path)]
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
        line = process.stdout.readline()                        # a trial has ended: the next one is under way
        time.sleep(rng.random() * .1)
        process.kill()
        kills += process.wait() == -signal.SIGKILL and bool(line)
        process.stdout.close()
    study = search(make, TRIALS, STEPS, folder=tmp_path)
    assert kills >= 1 and finished(study) == left_alone
    assert not [t for t in study.trials if t.state.name == 'RUNNING']


def test_interrupted_in_a_trial(tmp_path, left_alone):
    "Ctrl-C ends the trial under way and the search, and the trial is made again"
    from lmnotes.tuning import search
    class Interrupt:
        def after_step(self, learn): signal.raise_signal(signal.SIGINT)
    asked = []
    def interrupted(trial):
        learner = make(trial)
        asked.append(trial.number)
        if len(asked) == 2: learner.cbs.append(Interrupt())
        return learner
    with pytest.raises(KeyboardInterrupt): search(interrupted, TRIALS, STEPS, folder=tmp_path)
    assert len(asked) == 2
    assert finished(search(make, TRIALS, STEPS, folder=tmp_path)) == left_alone


def test_one_search_at_a_time(tmp_path):
    "A second search on the same folder is refused, and the first one's trial goes on"
    from lmnotes.core import LmnotesError
    from lmnotes.tuning import search
    def nested(trial):
        with pytest.raises(LmnotesError, match='one in this process does'): search(make, 1, STEPS, folder=tmp_path)
        return make(trial)
    assert len(search(nested, 1, STEPS, folder=tmp_path).trials) == 1


if __name__ == '__main__':
    from lmnotes.tuning import search
    search(make, TRIALS, STEPS, folder=sys.argv[1])
