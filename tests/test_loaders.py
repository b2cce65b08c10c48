"Rows and streams across processes, start methods, datasets and the Learner: the same batches everywhere."
import json, os, random, subprocess, sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lmnotes.batches import collate
from lmnotes.core import seed_everything
from lmnotes.loaders import Rows, Stream, by_length, fingerprint, in_order, kept_randomness, mix, row_order, seed_all
from lmnotes.models import llama
from lmnotes.optimizers import adamw
from lmnotes.training import Learner

LENGTHS = [5, 9, 12, 1, 7, 14, 2, 8, 11, 4, 3, 6, 13]
ROWS = [[1 + (7 * i + 3 * j) % 40 for j in range(n)] for i, n in enumerate(LENGTHS)]
pad = partial(collate, pad_id=0)


class Noisy(Dataset):
    "Rows of tokens, one of which is drawn by each of the three generators"
    def __init__(self, n=13): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, j): return [1 + j, random.randrange(1, 40), int(np.random.randint(1, 40)), int(torch.randint(1, 40, ()))]


def noisy_pad(rows):
    "A collate function that draws"
    random.shuffle(rows)
    return collate([r + [int(np.random.randint(1, 40))] * int(torch.randint(1, 3, ())) for r in rows], pad_id=0)


def batches(source, start, stop, **kwargs):
    return [batch and batch['input_ids'] for step in source.read(start, stop, **kwargs) for _, batch in step]


def assert_equal(a, b):
    assert len(a) == len(b) > 0 and all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in zip(a, b))


def elsewhere():
    "What another process finds; it is started as macOS, Windows and newer Pythons start their workers"
    source = Rows(Noisy(), noisy_pad, 2, 2, seed=5, order=by_length(LENGTHS, 2, pool=2))
    read = [b.tolist() for b in batches(source, 1, 5, num_workers=2) if b is not None]
    return dict(mix=mix(3, 1, 4), order=row_order(20, 1, 5).tolist(), data=fingerprint(ROWS), read=read)


def here():
    source = Rows(Noisy(), noisy_pad, 2, 2, seed=5, order=by_length(LENGTHS, 2, pool=2))
    return dict(mix=mix(3, 1, 4), order=row_order(20, 1, 5).tolist(), data=fingerprint(ROWS), read=[b.tolist() for b in batches(source, 1, 5) if b is not None])


def test_another_process_with_spawned_workers_reads_the_same(tmp_path):
    run = subprocess.run([sys.executable, __file__, str(tmp_path/'found.json')], env=os.environ | dict(PYTHONHASHSEED='7', OMP_NUM_THREADS='1'),
                         capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads((tmp_path/'found.json').read_text()) == here()


@pytest.mark.parametrize('seed', range(30))
def test_any_split_of_steps_among_processes(seed):
    "Random sizes: each row once an epoch, processes disjoint, their union the step, going on anywhere"
    draw = random.Random(seed)
    n, B, accumulate, P = draw.randint(1, 40), draw.randint(1, 5), draw.randint(1, 3), draw.randint(1, 4)
    order = draw.choice([row_order, in_order, by_length([draw.randint(1, 9) for _ in range(n)], B, draw.randint(1, 4))])
    source = Rows([[j + 1] for j in range(n)], pad, B, accumulate * P, seed, order)
    per = source.steps_per_epoch
    names = lambda start, **kw: [[j for found, _ in step for j in found] for step in source.read(start, 3 * per, **kw)]
    whole, parts = names(0), [names(0, rank=r, processes=P) for r in range(P)]
    for e in range(3): assert sorted(j for step in whole[e * per:(e + 1) * per] for j in step) == list(range(n))
    for s, step in enumerate(whole):
        assert sorted(j for p in parts for j in p[s]) == sorted(step) and len(set(step)) == len(step)
    turns = {len(micros) for r in range(P) for micros in source.read(0, per, r, P)}
    assert turns == {accumulate}                                                   # equal numbers, None included
    start = draw.randrange(3 * per)
    assert names(start) == whole[start:]


@pytest.mark.parametrize('workers', [0, 2])
def test_a_datasets_dataset(workers):
    "Plain, formatted, and with a transform that draws"
    import datasets
    plain = datasets.Dataset.from_dict(dict(input_ids=ROWS))
    straight = batches(Rows(ROWS, pad, 3, 2), 0, 6)
    assert_equal(batches(Rows(plain, pad, 3, 2), 0, 6, num_workers=workers), straight)
    noisy = plain.with_transform(lambda rows: dict(input_ids=[[*r, 1 + np.random.randint(30)] for r in rows['input_ids']]))
    source = Rows(noisy, pad, 3, 2)
    whole = batches(source, 0, 6)
    np.random.seed(9)
    assert_equal(batches(source, 2, 6, num_workers=workers), whole[4:])
    assert not source.plain and Rows(plain, pad, 3, 2).plain


def test_rows_differ_from_epoch_to_epoch_and_draw_apart():
    source = Rows(Noisy(13), noisy_pad, 1, 1, order=in_order)
    first, second = batches(source, 0, 13), batches(source, 13, 26)
    assert all(not torch.equal(a[0, 1:4], b[0, 1:4]) for a, b in zip(first, second))
    class Lazy(list):
        def __getitem__(self, j): return [1, 1 + np.random.randint(39)]
    assert not Rows(Lazy(ROWS), pad, 2, 1).plain                                     # a list, but not a plain one


def test_a_worker_that_fails_is_heard():
    class Bad(Noisy):
        def __getitem__(self, j): raise OSError(f'row {j} cannot be read')
    with pytest.raises(OSError, match='cannot be read'): batches(Rows(Bad(), pad, 2, 1), 0, 3, num_workers=2)


def learner(data, **more):
    seed_everything(0)
    model = llama(48, d_model=16, n_layers=1, n_heads=2, d_ff=24, max_len=32, dropout=.2)
    return Learner(model, data, opt=adamw, lr=.01, precision='fp32', **more)


def drawing_loader(): return DataLoader(Noisy(), batch_size=3, shuffle=True, collate_fn=noisy_pad)


@pytest.mark.parametrize('make', [
    lambda: dict(data=Noisy(), collate_fn=noisy_pad, batch_size=3, accumulate=2),
    lambda: dict(data=Noisy(), collate_fn=noisy_pad, batch_size=3, accumulate=2, num_workers=2),
    lambda: dict(data=drawing_loader(), accumulate=2),
    lambda: dict(data=DataLoader(Noisy(), batch_size=3, shuffle=True, collate_fn=noisy_pad, num_workers=2), accumulate=2)],
    ids=['rows', 'rows and workers', 'loader', 'loader with workers'])
def test_a_run_over_data_that_draws_goes_on_bit_by_bit(make, tmp_path):
    "The model draws, too (dropout): what the data draws must not depend on that"
    straight = learner(**make()).fit(steps=8)
    saved = learner(**make(), out_dir=tmp_path, save_every=4).fit(steps=8)
    seed_all(99)
    back = learner(**make(), out_dir=tmp_path).fit(steps=8, resume=tmp_path/'step-000004')
    assert [h['loss'] for h in straight.history] == [h['loss'] for h in saved.history] == [h['loss'] for h in back.history]
    assert all(torch.equal(a, b) for a, b in zip(straight.model.parameters(), back.model.parameters()))


def test_epochs_reach_whatever_shuffles():
    "set_epoch of an iterable dataset, of a sampler, and of the dataset in a loader"
    import datasets
    stream = datasets.Dataset.from_dict(dict(input_ids=ROWS)).to_iterable_dataset().shuffle(seed=0, buffer_size=20)
    order = lambda source, n: [tuple(b['input_ids'].flatten().tolist()) for step in source.read(0, n) for _, b in step if b]
    found = order(Stream(stream, pad, 1, 1), 26)
    assert sorted(found[:13]) == sorted(found[13:]) and found[:13] != found[13:]
    sampler = DistributedSampler(ROWS, num_replicas=1, rank=0, shuffle=True)
    found = order(Stream(DataLoader(ROWS, batch_size=1, sampler=sampler, collate_fn=pad), None, 1, 1), 26)
    assert sorted(found[:13]) == sorted(found[13:]) and found[:13] != found[13:]
    found = order(Stream(DataLoader(stream, batch_size=1, collate_fn=pad), None, 1, 1), 26)
    assert sorted(found[:13]) == sorted(found[13:]) and found[:13] != found[13:]


def test_reading_leaves_the_readers_randomness_where_it_is_kept():
    torch.manual_seed(4); np.random.seed(4); random.seed(4)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with kept_randomness(): batches(Rows(Noisy(), noisy_pad, 2, 2), 0, 5, num_workers=2)
    fingerprint(Noisy())
    assert torch.equal(before[0], torch.get_rng_state()) and before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_padding_that_lengths_save():
    draw = random.Random(0)
    lengths = [int(draw.lognormvariate(3, 1)) + 1 for _ in range(2000)]
    places = lambda order: sum(len(b) * max(lengths[j] for j in b) for b in order(2000, 0, 0).split(16))
    assert sum(lengths) > .85 * places(by_length(lengths, 16)) and sum(lengths) < .45 * places(row_order)


if __name__ == '__main__':
    import torch.multiprocessing
    torch.multiprocessing.set_start_method('spawn')
    Path(sys.argv[1]).write_text(json.dumps(elsewhere()))
