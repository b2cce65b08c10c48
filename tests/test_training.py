"The loop: sums and counts, order, resuming, interrupts, faults. Each fault is injected; none is assumed."
import json, math, os, random, signal, subprocess, sys, weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmnotes.batches import collate
from lmnotes.checkpoints import CheckpointError, checkpoints
from lmnotes.core import LmnotesError, seed_everything
from lmnotes.lm import evaluating, nll
from lmnotes.models import bert, gpt2, llama, t5
from lmnotes.training import EMA, Learner, Validate, adafactor, adamw, by_length, constant, in_order, muon, sgd, token_loss

HERE = Path(__file__).resolve().parent
LENGTHS = [5, 9, 12, 1, 7, 14, 2, 8, 11, 4, 3, 6, 13, 2, 10, 1, 5, 9, 4, 7, 3, 12, 8]                     # 23 ragged rows, two of one token


def rows(seed=0, vocab=50):
    draw = random.Random(seed)
    return [[draw.randrange(1, vocab) for _ in range(n)] for n in LENGTHS]


def pad(rows): return collate(rows, pad_id=0)


def learner(data=None, model=None, **more):
    seed_everything(0)
    model = model() if callable(model) and not isinstance(model, nn.Module) else model or llama(50, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_len=16, dropout=more.pop('dropout', 0.))
    options = dict(collate_fn=pad, batch_size=4, opt=adamw, lr=.01, precision='fp32') | more
    return Learner(model, rows() if data is None else data, rows(1), **options)


def double(): return MODELS['llama']().double()


def losses(learn): return [h['loss'] for h in learn.history]


def weights(learn): return {n: p.detach().clone() for n, p in learn.model.named_parameters()}


def assert_same(a, b):
    "Weights, optimizers, history: equal to the last bit."
    assert losses(a) == losses(b) and [h['norm'] for h in a.history] == [h['norm'] for h in b.history] and a.tokens == b.tokens
    assert all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values()))
    for o, p in zip(a.opts, b.opts):
        x, y = o.state_dict()['state'], p.state_dict()['state']
        assert x.keys() == y.keys() and all(torch.equal(x[i][k], y[i][k]) for i in x for k in x[i])


# ---- sums and counts

def tiny_models():
    import transformers as tf
    small = dict(vocab_size=50, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    drop = dict(resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.)
    yield 'llama', lambda: llama(50, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_len=16)
    yield 'gpt2', lambda: gpt2(50, d_model=16, n_layers=2, n_heads=2, max_len=16)
    yield 'bert', lambda: bert(50, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_len=16)
    yield 't5', lambda: t5(50, d_model=16, n_layers=2, n_heads=2, d_ff=24)
    yield 'GPT2LMHeadModel', lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **small, **drop))
    yield 'LlamaForCausalLM', lambda: tf.LlamaForCausalLM(tf.LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **small))
    yield 'BertForMaskedLM', lambda: tf.BertForMaskedLM(tf.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, hidden_dropout_prob=0, attention_probs_dropout_prob=0))
    yield 'T5', lambda: tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=50, d_model=16, num_layers=2, num_heads=2, d_ff=24, d_kv=8, dropout_rate=0, decoder_start_token_id=0))


MODELS = dict(tiny_models())


@pytest.mark.parametrize('name', MODELS)
def test_any_split_is_the_same_step(name, steps=2):
    "23 ragged rows, the last window short: in float64 the same losses and weights, whether a step is one batch, three or twelve."
    out = {}
    for batch_size, accumulate in ((12, 1), (1, 12), (5, 3), (15, 1)):
        seed_everything(3)
        model = MODELS[name]().double()
        per_step = batch_size * accumulate
        learn = Learner(model, rows(), collate_fn=pad, batch_size=batch_size, accumulate=accumulate, opt=sgd, lr=.1, precision='fp32', schedule=constant, clip=.5).fit(steps=steps)
        out.setdefault(per_step, []).append(learn)
    for same in out.values():
        for other in same[1:]:
            assert_close(losses(other), losses(same[0]), atol=1e-12, rtol=1e-12)
            assert [h['tokens'] for h in other.history] == [h['tokens'] for h in same[0].history]
            for a, b in zip(weights(other).values(), weights(same[0]).values()): assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_a_mean_of_means_is_noticed():
    "The comparison above fails with the usual bug, each micro-batch divided by its own count."
    def wrong(model, batch):
        s, n = token_loss(model, batch)
        return (s / n, 1) if n else (0., 0)
    a, b = (learner(model=double, batch_size=n, accumulate=12 // n, loss=wrong, opt=sgd).fit(steps=1) for n in (12, 1))
    assert abs(losses(a)[0] - losses(b)[0]) > 1e-3


def test_count_and_loss_are_those_of_the_rows():
    learn = learner(batch_size=23, lr=1e-9).fit(steps=1)
    assert learn.tokens == sum(n - 1 for n in LENGTHS)
    seed_everything(0)
    s, n = nll(learner().model.eval(), pad(rows()))
    assert_close(losses(learn)[0], s.item() / n, atol=1e-5, rtol=0)


def test_clipping_and_the_norm():
    "The norm is that of the mean's gradient; a step is as long as the clipped gradient says."
    learn = learner(opt=sgd, lr=1., schedule=lambda step, total: 1., clip=.25, batch_size=23)
    learn.opts = [torch.optim.SGD(learn.params, lr=1.)]
    before = weights(learn)
    seed_everything(0)
    s, n = token_loss(learn.model, pad(rows()))
    norm = torch.stack([g.norm() for g in torch.autograd.grad(s / n, learn.params)]).norm()
    learn.fit(steps=1)
    moved = torch.stack([(a - b).norm() for a, b in zip(weights(learn).values(), before.values())]).norm()
    assert_close(learn.history[0]['norm'], norm.item(), atol=1e-5, rtol=1e-5)
    assert norm > .25 and abs(moved.item() - .25) < 1e-5
    assert learner(clip=None).fit(steps=1).step == 1


def test_nothing_scored_is_an_error_by_name():
    short = [[3]] * 4 + rows()
    with pytest.raises(LmnotesError, match=r'labels: nothing is scored in step 0, rows 0, 1, 2, 3'):
        learner(short, order=in_order).fit(steps=2)
    assert learner(short, order=in_order, accumulate=2).fit(steps=1).tokens == sum(n - 1 for n in LENGTHS[:4])


def test_learns_and_beats_the_untrained():
    learn = learner([[k % 7 + 1 for k in range(i, i + 10)] for i in range(40)], lr=.02, opt=muon, batch_size=8).fit(steps=80)
    assert losses(learn)[-1] < .3 * losses(learn)[0]


@pytest.mark.parametrize('opt', [sgd, adamw, adafactor, muon])
def test_every_optimizer_resumes(opt, tmp_path):
    whole = learner(opt=opt, out_dir=tmp_path/'a', dropout=.1).fit(steps=7)
    learner(opt=opt, out_dir=tmp_path/'b', dropout=.1, cbs=[StopAt(4)], save_every=2).fit(steps=7)
    (tmp_path/'b'/'step-000004').rename(tmp_path/'b'/'x')                                          # as if it had been killed
    again = learner(opt=opt, out_dir=tmp_path/'b', dropout=.1, save_every=2).fit(steps=7, resume=True)
    assert_same(whole, again)


class StopAt:
    def __init__(self, step): self.step = step
    def after_step(self, learn): learn.stop = learn.step == self.step


# ---- data

class Noisy:
    "A dataset that draws with all three generators."
    def __len__(self): return 11
    def __getitem__(self, i): return [1 + i, random.randrange(50), int(np.random.randint(50)), int(torch.randint(50, ())), 1]


def noisy_collate(rows):
    batch = pad(rows)
    batch['input_ids'] = torch.where(torch.rand(batch['input_ids'].shape) < .2, 49 - random.randrange(5), batch['input_ids'])
    return batch


@pytest.mark.parametrize('num_workers', [1, 2])
def test_workers_change_nothing(num_workers):
    a, b = (learner(Noisy(), collate_fn=noisy_collate, num_workers=n, dropout=.1).fit(steps=7) for n in (0, num_workers))
    assert_same(a, b)
    assert len(set(losses(a))) == 7


def test_draws_differ_between_epochs_and_resume_exactly(tmp_path):
    whole = learner(Noisy(), collate_fn=noisy_collate, out_dir=tmp_path/'a').fit(steps=8)
    part = learner(Noisy(), collate_fn=noisy_collate, out_dir=tmp_path/'b', cbs=[StopAt(4)], save_every=3).fit(steps=8)
    (tmp_path/'b'/'step-000004').rename(tmp_path/'b'/'x')
    assert_same(whole, learner(Noisy(), collate_fn=noisy_collate, out_dir=tmp_path/'b', num_workers=2).fit(steps=8, resume=True))
    assert losses(part) == losses(whole)[:4]


def seen_rows(learn, start, stop): return [[n for names, _ in step for n in names] for step in learn.source.read(start, stop)]


def test_each_row_once_an_epoch_also_after_a_restart():
    learn = learner(batch_size=3, accumulate=2)
    whole, rest = seen_rows(learn, 0, 8), seen_rows(learner(batch_size=3, accumulate=2), 5, 8)
    assert learn.source.steps_per_epoch == 4 and rest == whole[5:]
    for epoch in (whole[:4], whole[4:]): assert sorted(n for step in epoch for n in step) == list(range(23))
    assert whole[:4] != whole[4:] and seen_rows(learner(batch_size=3, accumulate=2, seed=1), 0, 4) != whole[:4]


def test_kinds_of_data():
    "Lists, tensors, datasets, iterables of batches, a DataLoader, with or without a collate function."
    import datasets
    even = torch.arange(48).view(8, 6) % 50
    data = datasets.Dataset.from_dict(dict(input_ids=even.tolist()))
    batches = [dict(input_ids=even[i:i + 4], labels=even[i:i + 4]) for i in (0, 4)]
    torch_data = torch.utils.data.DataLoader([dict(input_ids=r, labels=r) for r in even], batch_size=4, shuffle=True)
    def endless():
        while True: yield batches[0]
    class Endless:
        def __iter__(self): return endless()
    for train, more in ((even, dict(collate_fn=lambda r: dict(input_ids=torch.stack(r)))), (even.tolist(), dict(collate_fn=None)), (data, dict(collate_fn=None)), (batches, dict(collate_fn=None)),
                        (torch_data, dict(collate_fn=None)), (data.to_iterable_dataset(), {'collate_fn': lambda r: pad([x['input_ids'] for x in r])}), (Endless(), dict(collate_fn=None))):
        a, b = (learner(train, **more).fit(steps=5) for _ in range(2))
        assert_same(a, b)
        assert a.tokens == 5 * 4 * 5
    with pytest.raises(LmnotesError, match='epochs'): learner(Endless(), collate_fn=None).fit(epochs=1)
    with pytest.raises(LmnotesError, match='read again'): learner(iter(batches), collate_fn=None).fit(steps=5)
    assert learner(batches, collate_fn=None, accumulate=2).fit(epochs=3).step == 3


def test_buckets_and_packed_rows():
    from lmnotes.batches import pack
    plain, bucketed = learner(), learner(order=by_length(LENGTHS, 4, pool=6))
    def padding(learn): return sum((~b['attention_mask']).sum().item() for step in learn.source.read(0, 6) for _, b in step if b)
    assert padding(bucketed) < .3 * padding(plain)
    assert sorted(n for s in seen_rows(bucketed, 0, 6) for n in s) == list(range(23))
    packed = learner(pack(rows(), block_size=16, eos_id=None), batch_size=2).fit(epochs=1)
    cuts = sum(LENGTHS) // 16                                                                      # a text cut between two rows scores one token less
    assert sum(n - 1 for n in LENGTHS) - cuts <= packed.tokens <= sum(n - 1 for n in LENGTHS)
    apart = learner(model=lambda: llama(50, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_len=64))
    s, n = token_loss(apart.model.eval(), pad(pack([r for r in rows()[:4]], block_size=64, eos_id=None)))
    with torch.no_grad(): alone = [token_loss(apart.model, pad([r])) for r in rows()[:4]]
    assert n == sum(k for _, k in alone) and abs(s.item() - sum(float(x) for x, _ in alone)) < 1e-4


def test_user_randomness_is_given_back():
    random.seed(1); np.random.seed(1); torch.manual_seed(1)
    want = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1); np.random.seed(1); torch.manual_seed(1)
    learn = learner(Noisy(), collate_fn=noisy_collate, dropout=.1)                                 # making it seeds, in this test
    random.seed(1); np.random.seed(1); torch.manual_seed(1)
    learn.fit(steps=3); learn.validate()
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == want


# ---- validation

def test_validation_leaves_training_alone():
    "Dropout off, two equal scores, modes and random states back, also where it fails; a run with validation equals one without."
    learn = learner(dropout=.3)
    learn.model.train(); learn.model.decoder.blocks[0].eval()
    modes = [m.training for m in learn.model.modules()]
    a, b = learn.validate(), learn.validate()
    assert a == b and [m.training for m in learn.model.modules()] == modes
    with evaluating(learn.model): s, n = nll(learn.model, pad(rows(1)))
    assert_close(a.nll, s.item(), atol=1e-3, rtol=0)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match='no'): learn.validate(Failing())
    assert [m.training for m in learn.model.modules()] == modes and torch.equal(state, torch.get_rng_state())
    class Look:
        def after_step(self, learn): learn.validate()
    assert_same(learner(dropout=.3).fit(steps=4), learner(dropout=.3, cbs=[Look()]).fit(steps=4))


class Failing(list):
    def __len__(self): return 5
    def __getitem__(self, i):
        if i == 4: raise RuntimeError('no')
        return [1, 2, 3]


@pytest.mark.parametrize('batch_size', [1, 5, 23])
def test_validation_does_not_depend_on_batches(batch_size):
    learn = learner(batch_size=batch_size, model=double)
    assert_close(learn.validate().nll, learner(batch_size=7, model=double).validate().nll, atol=1e-9, rtol=1e-12)


# ---- resuming

def test_finished_does_nothing_more(tmp_path):
    learn = learner(out_dir=tmp_path).fit(steps=3)
    calls = []
    def counted(model, batch): calls.append(1); return token_loss(model, batch)
    counted.__qualname__ = token_loss.__qualname__
    again = learner(out_dir=tmp_path, loss=counted).fit(steps=3, resume=True)
    assert not calls and again.step == 3 and len(checkpoints(tmp_path)) == 1
    assert_same(learn, again)


def test_a_stopped_run_stays_stopped(tmp_path):
    learner(out_dir=tmp_path, cbs=[StopAt(2)]).fit(steps=5)
    assert learner(out_dir=tmp_path).fit(steps=5, resume=True).step == 2


def test_nothing_is_overwritten(tmp_path):
    learner(out_dir=tmp_path, save_every=1).fit(steps=2)
    def files(): return {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file() and p.name != '.lock'}
    before = files()
    with pytest.raises(LmnotesError, match='resume=True'): learner(out_dir=tmp_path).fit(steps=4)
    assert files() == before


CHANGES = dict(batch_size=dict(batch_size=2), accumulate=dict(accumulate=2), seed=dict(seed=5), lr=dict(lr=.02), clip=dict(clip=.3), precision=dict(precision='bf16'), optimizer=dict(opt=partial(adamw, weight_decay=.2)),
               schedule=dict(schedule=lambda step, total: .5), loss=dict(loss=lambda m, b: nll(m, b)), order=dict(order=in_order), rows=dict(data=rows()[:-1]), data=dict(data=[[2, *r[1:]] for r in rows()]), callbacks=dict(cbs=[EMA()]))


@pytest.mark.parametrize('name', CHANGES)
def test_a_changed_setting_is_named(name, tmp_path, capsys):
    learner(out_dir=tmp_path).fit(steps=2)
    with pytest.raises(LmnotesError, match=rf'\b{name} was .*, now ') as e: learner(out_dir=tmp_path, **CHANGES[name]).fit(steps=4, resume=True)
    assert 'allow_change' in str(e.value)
    differ = [n for n in (*CHANGES, 'processes') if f'{n} was ' in str(e.value)]
    assert learner(out_dir=tmp_path, **CHANGES[name]).fit(steps=4, resume=True, allow_change=differ).step == 4
    assert 'the schedule was laid out for 2 steps' in capsys.readouterr().out


def test_another_model_or_name_is_refused(tmp_path):
    learner(out_dir=tmp_path).fit(steps=2)
    wide = llama(50, d_model=32, n_layers=2, n_heads=2, d_ff=24, max_len=16)
    before = [p.clone() for p in wide.parameters()]
    with pytest.raises(LmnotesError, match='tensors'): learner(out_dir=tmp_path, model=wide).fit(steps=4, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(before, wide.parameters()))
    with pytest.raises(LmnotesError, match='allow_change'): learner(out_dir=tmp_path).fit(steps=2, resume=True, allow_change=['sede'])


@pytest.mark.parametrize('file', ['model.safetensors', 'optimizer.safetensors', 'state.json', 'EMA-0.safetensors'])
@pytest.mark.parametrize('how', ['flip', 'remove', 'cut'])
def test_damage_is_named_and_the_previous_offered(file, how, tmp_path):
    def make(): return learner(out_dir=tmp_path, save_every=2, cbs=[EMA(.9)], dropout=.1)
    whole = make().fit(steps=6)
    path = tmp_path/'step-000006'/file
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    if how == 'flip': path.write_bytes(raw)
    if how == 'cut': path.write_bytes(raw[:-3])
    if how == 'remove': path.unlink()
    with pytest.raises(CheckpointError) as e: make().fit(steps=6, resume=True)
    assert file in str(e.value) and 'step-000004' in str(e.value)
    again = make().fit(steps=6, resume=tmp_path/'step-000004')
    assert_same(whole, again)
    assert [p.name for p in checkpoints(tmp_path)][-1] == 'step-000006' and any('step-000006' in p.name and p.name != 'step-000006' for p in tmp_path.iterdir())
    assert make().fit(steps=6, resume=True).step == 6


def test_two_writers(tmp_path):
    class Second:
        def after_step(self, learn):
            with pytest.raises(LmnotesError, match='out_dir|lock'): learner(out_dir=tmp_path).fit(steps=3, resume=True)
    assert learner(out_dir=tmp_path, cbs=[Second()]).fit(steps=2).step == 2


def test_full_disk(tmp_path, monkeypatch):
    "A save that fails says so; the last good checkpoint is there, nothing half-written, and the run goes on from it."
    import errno
    def make(): return learner(out_dir=tmp_path, save_every=2)
    real, armed = os.fsync, []
    def fsync(fd):
        if armed: raise OSError(errno.ENOSPC, 'No space left on device')
        return real(fd)
    class Arm:
        def before_step(self, learn):
            if learn.step == 3: armed.append(1)
    monkeypatch.setattr(os, 'fsync', fsync)
    with pytest.raises(OSError, match='step-000004'): learner(out_dir=tmp_path, save_every=2, cbs=[Arm()]).fit(steps=6)
    assert [p.name for p in checkpoints(tmp_path)] == ['step-000002'] and not [p for p in tmp_path.iterdir() if 'step-000004' in p.name]
    armed.clear()
    assert_same(make().fit(steps=6, resume=True), learner().fit(steps=6))


def test_by_steps_minutes_and_the_last_n(tmp_path):
    learner(out_dir=tmp_path/'n', save_every=1, keep=2).fit(steps=6)
    assert [p.name for p in checkpoints(tmp_path/'n')] == ['step-000005', 'step-000006']
    learner(out_dir=tmp_path/'m', save_minutes=1e-9).fit(steps=3)
    assert len(checkpoints(tmp_path/'m')) == 3
    validate = Validate(1)
    learn = learner(out_dir=tmp_path/'b', save_every=1, keep=1, lr=3., cbs=[validate], schedule=constant).fit(steps=5)
    assert {p.name for p in checkpoints(tmp_path/'b')} == {'step-000005', f'step-{validate.best_step:06d}'} and validate.best_step < 5
    assert_close(learn.validate().nll / learn.validate().n_tokens, validate.best, atol=1e-6, rtol=1e-6)


# ---- numbers that are no numbers, memory that is not there

def poison(at):
    class Poison:
        def before_step(self, learn):
            if learn.step == at:
                with torch.no_grad(): learn.model.decoder.blocks[1].ff.down.weight[0, 0] = math.nan
    return Poison()


def test_nan_is_stopped_and_named(tmp_path):
    with pytest.raises(LmnotesError) as e: learner(out_dir=tmp_path, save_every=1, cbs=[poison(3)]).fit(steps=6)
    said = str(e.value)
    assert 'step 3' in said and 'rows ' in said and 'decoder.blocks.1.ff.down' in said and 'last finite loss was 3.' in said
    assert [p.name for p in checkpoints(tmp_path)][-1] == 'step-000003'
    assert all(p.isfinite().all() for p in learner(out_dir=tmp_path).fit(steps=6, resume=True).params)


def test_fp16_overflow_skips_counts_and_ends():
    learn = learner(precision='fp16')
    seen = []
    class Overflow:
        def after_backward(self, learn):
            seen.append((learn.step, learn.scaler.scale))
            if len(seen) in (3, 4): learn.params[0].grad[0] = math.inf
    learn.cbs.append(Overflow())
    learn.fit(steps=5)
    assert learn.skipped == 2 and learn.step == 5 and [s for s, _ in seen] == [0, 1, 2, 2, 2, 3, 4]     # the step waits, and its schedule
    assert seen[4][1] == seen[0][1] / 4 and [h['lr'] for h in learn.history] == [h['lr'] for h in learner().fit(steps=5).history]
    plain = learner().fit(steps=5)
    assert_close([h['norm'] for h in learn.history], [h['norm'] for h in plain.history], atol=.05, rtol=.05)
    class Always:
        def after_backward(self, learn): learn.params[0].grad[0] = math.inf
    with pytest.raises(LmnotesError, match='in a row'): learner(precision='fp16', cbs=[Always()]).fit(steps=5)


def test_out_of_memory_halves_and_frees(recwarn):
    "The step and its losses stay the same; what the failed attempt held is gone."
    held = []
    def hungry(model, batch):
        s, n = token_loss(model, batch)
        if len(batch['input_ids']) > 3:
            big = torch.zeros(1000)
            held.append(weakref.ref(big))
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
        return s, n
    a, b = (learner(model=double, batch_size=12, loss=f).fit(steps=4) for f in (hungry, token_loss))
    assert_close(losses(a), losses(b), atol=1e-12, rtol=1e-12)
    assert held and all(r() is None for r in held) and a.parts.n == 4 and len(held) == 2
    assert any('memory ran out' in str(w.message) and '(12, ' in str(w.message) for w in recwarn)
    def never(model, batch): raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
    with pytest.raises(LmnotesError, match=r'batch_size: memory ran out in step 0.*one row at a time') as e: learner(loss=never).fit(steps=2)
    assert e.value.__cause__ is None and e.value.__context__ is None


# ---- interrupts

SCRIPT = '''
import sys, time
sys.path.insert(0, {here!r})
from test_training import *
torch.set_num_threads({threads})                          # sums of floats depend on how many add them up
class Slow:
    def before_step(self, learn): print('step', learn.step, flush=True); time.sleep(.05)
learn = learner(out_dir=sys.argv[1], dropout=.1, cbs=[Slow(), EMA(.9, swap=False), Validate(2, restore=False)]).fit(steps=int(sys.argv[2]), resume=True)
print('returned', learn.step, flush=True)
'''


def start(folder, steps):
    script = SCRIPT.format(here=str(HERE), threads=torch.get_num_threads())
    return subprocess.Popen([sys.executable, '-c', script, str(folder), str(steps)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize('number, code', [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_interrupted_saves_returns_and_goes_on(number, code, tmp_path):
    process = start(tmp_path/'a', 40)
    for line in process.stdout:
        if line.startswith('step 5'): process.send_signal(number); break
    said, error = process.communicate(timeout=120)
    assert process.returncode == code, error
    assert 'interrupted after step' in said and 'resume=True' in said and ('returned' in said) == (code == 0)
    at = int(checkpoints(tmp_path/'a')[-1].name[5:])
    assert 6 <= at < 40
    def make(folder): return learner(out_dir=folder, dropout=.1, cbs=[EMA(.9, swap=False), Validate(2, restore=False)])
    again, whole = make(tmp_path/'a').fit(steps=40, resume=True), make(tmp_path/'b').fit(steps=40)
    assert_same(whole, again)
    assert [v['loss'] for v in whole.cbs[2].losses] == [v['loss'] for v in again.cbs[2].losses] and torch.equal(*(next(iter(x.cbs[1].averages.values())) for x in (whole, again)))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
def test_killed_at_random_moments(tmp_path):
    done = subprocess.run([sys.executable, str(HERE/'kills.py'), str(tmp_path), '--kills', '25'], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found['kills'] == 25 and found['finished'] >= 1 and not found['wrong'], (found, done.stderr[-2000:])
    assert found['places'] >= 5, found                             # kills fell into the run, not before it


# ---- arguments

BAD = dict(batch_size=0, accumulate=1.5, save_every=0, keep=0, lr=math.nan, clip=-1, seed=-1, num_workers=-1, precision='fp8', save_minutes=0)


@pytest.mark.parametrize('name', BAD)
def test_bad_arguments_are_named(name):
    with pytest.raises((ValueError, TypeError), match=name): learner(**{name: BAD[name]})


@pytest.mark.parametrize('call, name', [(dict(), 'steps'), (dict(steps=1, epochs=1), 'steps'), (dict(steps=0), 'steps'), (dict(steps=1.5), 'steps'), (dict(epochs=math.inf), 'epochs'), (dict(steps=2, resume=True), 'resume')])
def test_bad_calls_are_named(call, name):
    with pytest.raises((ValueError, TypeError), match=name): learner().fit(**call)


def test_what_is_no_model_or_data():
    with pytest.raises((ValueError, TypeError), match='model'): Learner(3, rows())
    with pytest.raises((ValueError, TypeError), match='train'): learner([])
    with pytest.raises((ValueError, TypeError), match='train'): Learner(MODELS['llama'](), None)
    with pytest.raises((ValueError, TypeError), match='valid'): Learner(MODELS['llama'](), rows()).validate()
    with pytest.raises((ValueError, TypeError), match='loss'): learner(loss=lambda m, b: token_loss(m, b)[0]).fit(steps=1)
    frozen = MODELS['llama']().requires_grad_(False)
    with pytest.raises((ValueError, TypeError), match='model'): learner(model=frozen)


def test_any_module_with_a_loss():
    class Small(nn.Module):
        def __init__(self): super().__init__(); self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)
        def forward(self, input_ids, labels, attention_mask=None, position_ids=None):
            return dict(loss=nn.functional.cross_entropy(self.head(self.embed(input_ids)).flatten(0, 1), labels.flatten()))
    a, b = (learner(model=lambda: Small().double(), batch_size=n, accumulate=12 // n, opt=sgd).fit(steps=3) for n in (12, 3))
    assert_close(losses(a), losses(b), atol=1e-12, rtol=1e-12)


def test_compiled_and_recomputed():
    plain = learner().fit(steps=3)
    assert_close(losses(learner(recompute=True).fit(steps=3)), losses(plain), atol=1e-6, rtol=0)


def test_report():
    learn = learner().fit(steps=3)
    report = learn.report().to_dict()
    assert report['steps'] == 3 and report['tokens'] == learn.tokens and report['peak_memory'] > 0 and report['seed'] == 0


# ---- what a careful reader tried

class Counting(torch.optim.SGD):
    "Keeps a count in its groups, as schedule-free optimizers do."
    def step(self, closure=None):
        for g in self.param_groups:
            g['k'] = g.get('k', 0) + 1
            for p in g['params']:
                if p.grad is not None: p.data.sub_(p.grad, alpha=g['lr'] / g['k'])


def test_counts_in_groups_travel(tmp_path):
    def make(name, *cbs): return learner(opt=lambda m, lr: Counting(m.parameters(), lr), out_dir=tmp_path/name, save_every=2, cbs=cbs)
    whole = make('a').fit(steps=7)
    make('b', StopAt(4)).fit(steps=7)
    again = make('b').fit(steps=7, resume=True, allow_change='stop')
    assert again.step == 7 and losses(whole) == losses(again)


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    class Spoil:
        def after_step(self, learn):
            if learn.step == 3: learn.params[0].data[0] = math.inf
    with pytest.raises(LmnotesError, match='weights are not finite after step 3'): learner(out_dir=tmp_path, save_every=1, keep=1, cbs=[Spoil()]).fit(steps=5)
    assert [p.name for p in checkpoints(tmp_path)] == ['step-000002']
    with pytest.raises(LmnotesError, match='not finite'): learner(cbs=[Spoil()]).fit(steps=3)
    with pytest.raises(LmnotesError, match=r'schedule\(2, 4\)'): learner(schedule=lambda s, t: math.nan if s == 2 else 1.).fit(steps=4)
    assert learner(schedule=lambda s, t: np.float32(.5), out_dir=tmp_path/'x').fit(steps=2).step == 2


def test_callbacks_and_optimizers_in_other_forms():
    class Count:
        n = 0
        def after_step(self, learn): self.n += 1
    count = Count()
    learner(cbs=(c for c in [count])).fit(steps=3)
    assert count.n == 3
    with pytest.raises((ValueError, TypeError), match='cbs'): learner(cbs=EMA())
    with pytest.raises((ValueError, TypeError), match='cbs'): learner(cbs=[EMA])
    assert learner(opt=lambda m, lr: torch.optim.SGD(m.parameters(), lr=torch.tensor(lr))).fit(steps=1).step == 1
    for bad in (lambda m, lr: [], lambda m, lr: 3, 'adamw'):
        with pytest.raises((ValueError, TypeError), match='opt'): learner(opt=bad)
    for name, bad in dict(schedule=5, order=3, loss=3, collate_fn=3, out_dir=5, batch_size=True).items():
        with pytest.raises((ValueError, TypeError), match=name): learner(**{name: bad})
    with pytest.raises((ValueError, TypeError), match='out_dir'): learner(out_dir='')
    assert learner(batch_size=np.int64(4)).fit(steps=np.int64(2)).step == 2


def test_bad_losses_are_named():
    for bad in (lambda m, b: (torch.tensor(3.), 5), lambda m, b: (3., 5), lambda m, b: (torch.ones(1, requires_grad=True), 5)):
        with pytest.raises((ValueError, TypeError), match='loss'): learner(loss=bad).fit(steps=1)


def test_weighted_counts():
    "A count need not be whole."
    def half(model, batch):
        s, n = token_loss(model, batch)
        return s * .5, n * .5
    a, b = (learner(model=double, batch_size=n, accumulate=12 // n, loss=half, opt=sgd).fit(steps=2) for n in (12, 1))
    assert_close(losses(a), losses(b), atol=1e-12, rtol=1e-12)


def test_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'other').mkdir()
    class Move:
        def after_step(self, learn): os.chdir(tmp_path/'other')
    learner(out_dir='run', save_every=1, cbs=[Move()]).fit(steps=2)
    assert len(checkpoints(tmp_path/'run')) == 2 and not list((tmp_path/'other').iterdir())


def test_an_error_leaves_weights_as_they_were_trained(tmp_path):
    class Fail:
        def after_step(self, learn):
            if learn.step == 4: raise RuntimeError('no')
    closed = []
    class Late:
        def after_fit(self, learn): closed.append(learn.model.training)
    broken = learner(cbs=[Late(), EMA(.5), Fail()])
    with pytest.raises(RuntimeError, match='no'): broken.fit(steps=4)
    whole = learner(cbs=[EMA(.5, swap=False)]).fit(steps=4)
    assert closed == [False] and all(torch.equal(a, b) for a, b in zip(weights(broken).values(), weights(whole).values()))


def test_draws_of_callbacks_do_not_depend_on_workers():
    def drawn(num_workers):
        found = []
        class Draw:
            def before_fit(self, learn): found.append(torch.rand(()).item())
            def before_step(self, learn): found.append((torch.rand(()).item(), random.random(), np.random.rand()))
        learner(Noisy(), cbs=[Draw()], num_workers=num_workers).fit(steps=3)
        return found
    torch.manual_seed(5); a = drawn(0)
    torch.manual_seed(6); b = drawn(1)
    assert a == b and len(set(a)) == 4


def test_parameters_freed_on_the_way_are_zeroed():
    "A frozen embedding that is freed at step 2 gets the gradient of one step, not of all since."
    model = MODELS['llama']()
    model.embed.requires_grad_(False)
    class Free:
        def before_step(self, learn):
            if learn.step == 2: learn.model.embed.requires_grad_(True)
    norms = []
    class Look:
        def before_update(self, learn): norms.append(learn.model.embed.weight.grad.norm().item() if learn.model.embed.weight.grad is not None else 0.)
    learner(model=model, opt=lambda m, lr: torch.optim.SGD(m.parameters(), lr=1e-6), cbs=[Free(), Look()]).fit(steps=6)
    assert norms[:2] == [0., 0.] and max(norms[2:]) <= 1.001                                        # clipped to 1, as all


def test_streams_in_one_kernel(tmp_path):
    "The same DataLoader with a generator of its own, used again after an interrupt: the order goes on."
    data = [dict(input_ids=torch.arange(i, i + 5), labels=torch.arange(i, i + 5)) for i in range(12)]
    def loader(): return torch.utils.data.DataLoader(data, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(1))
    whole = learner(loader(), collate_fn=None).fit(steps=10)
    same = loader()
    learner(same, collate_fn=None, out_dir=tmp_path, save_every=1, cbs=[StopAt(6)]).fit(steps=10)
    again = learner(same, collate_fn=None, out_dir=tmp_path, save_every=1).fit(steps=10, resume=True, allow_change='stop')
    assert losses(again) == losses(whole)
    class Sized(torch.utils.data.IterableDataset):
        def __len__(self): return 4
        def __iter__(self): return iter([dict(input_ids=torch.arange(5)[None])] * 4)
    assert learner(Sized(), collate_fn=None, accumulate=2).fit(epochs=2).step == 4


def test_torch_formatted_rows():
    import datasets
    data = datasets.Dataset.from_dict(dict(input_ids=rows()[:8], attention_mask=[[1] * len(r) for r in rows()[:8]], labels=rows()[:8])).with_format('torch')
    assert learner(data, collate_fn=None).fit(steps=2).tokens == sum(n - 1 for n in LENGTHS[:8])


def test_late_signal_is_heard(tmp_path):
    class Late:
        def after_fit(self, learn): os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as e: learner(out_dir=tmp_path, cbs=[Late()]).fit(steps=2)
    assert e.value.code == 143 and len(checkpoints(tmp_path)) == 1


def test_memory_that_runs_out_in_the_update_is_named():
    class Greedy(torch.optim.SGD):
        def step(self, closure=None): raise torch.OutOfMemoryError('CUDA out of memory')
    with pytest.raises(LmnotesError, match='opt: memory ran out in the update of step 0'): learner(opt=lambda m, lr: Greedy(m.parameters(), lr)).fit(steps=2)


def test_state_wider_than_its_parameter_resumes(tmp_path):
    "Masters in float32 of weights in bf16 come back in float32."
    class Masters(torch.optim.SGD):
        def step(self, closure=None):
            for g in self.param_groups:
                for p in g['params']:
                    if p.grad is None: continue
                    master = self.state[p].setdefault('master', p.detach().float().clone())
                    master.sub_(p.grad.float(), alpha=g['lr'])
                    p.data.copy_(master)
    def make(name): return learner(model=lambda: MODELS['llama']().bfloat16(), opt=lambda m, lr: Masters(m.parameters(), lr), out_dir=tmp_path/name, save_every=2)
    whole = make('a').fit(steps=6)
    (tmp_path/'b').mkdir()
    (tmp_path/'a'/'step-000002').rename(tmp_path/'b'/'step-000002')
    again = make('b').fit(steps=6, resume=True)
    assert all(s['master'].dtype == torch.float32 for s in again.opts[0].state.values())
    assert_same(whole, again)
