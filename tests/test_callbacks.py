"Callbacks on a Learner: killed and resumed runs, finished and stopped ones, several processes, consoles, trackers, and who is named for a NaN."
import importlib.util, math, os, random, signal, subprocess, sys
from pathlib import Path

import pytest, torch
from torch import nn

from lmnotes.callbacks import EMA, LiveCurve, Progress, Validate
from lmnotes.core import LmnotesError
from lmnotes.diagnosis import ActivationStats, GradientStats, first_bad_module
from lmnotes.distributed import full
from lmnotes.loggers import TensorBoard, Trackio, WandB
from lmnotes.lm import nll
from lmnotes.models import llama
from lmnotes.optimizers import adamw
from lmnotes.training import Learner

SCRIPT = Path(__file__)


def tiny(seed=0, **kwargs):
    torch.manual_seed(seed)
    return llama(64, **dict(d_model=16, n_layers=2, n_heads=2, d_ff=32, max_len=32, dropout=.1) | kwargs)


def texts(n, seed):
    "Rows of unequal length"
    r = random.Random(seed)
    return [{'input_ids': [r.randrange(64) for _ in range(r.randint(4, 16))]} for _ in range(n)]


def learner(cbs=(), model=None, **kwargs):
    kwargs = dict(batch_size=4, opt=adamw, lr=2e-2, precision='fp32', schedule=lambda step, total: 1.) | kwargs
    return Learner(model or tiny(), texts(32, 0), texts(12, 1), cbs=list(cbs), **kwargs)


def stats(): return [GradientStats(2), ActivationStats(3)]


def averaged(*more, ema=.8, every=2, patience=None): return [*stats(), EMA(ema), Validate(every, patience=patience), *more]


def assert_same(a, b):
    "Two learners ended alike, bit by bit: weights, history but for the clock, and what their callbacks remember."
    for (n, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True): assert torch.equal(full(p), full(q)), n
    def timeless(rows): return [{k: v for k, v in r.items() if k != 'seconds'} for r in rows]
    assert a.step == b.step and timeless(a.history) == timeless(b.history)
    for kind in (GradientStats, ActivationStats, EMA, Validate):
        mine, theirs = of(a, kind), of(b, kind)
        assert (mine is None) == (theirs is None)
        if mine is None: continue
        assert mine.state_dict() == theirs.state_dict()
        if kind is EMA:
            averages, others = mine.tensors(), theirs.tensors()           # all processes gather, the first one has them
            for n in averages: assert torch.equal(averages[n], others[n]), n


def of(learn, kind): return next((cb for cb in learn.cbs if isinstance(cb, kind)), None)


class At:
    "Calls `act` at an event of a step."
    def __init__(self, step, act, event='after_step'): setattr(self, event, lambda learn: act(learn) if learn.step == step else None)


def power_cut(learn): raise RuntimeError('power cut')


def run_here(folder, step=None, event=None):
    "What a child process of the next test runs: it kills itself where it is told to."
    kill = [At(int(step), lambda learn: os.kill(os.getpid(), signal.SIGKILL), event)] if step else []
    return learner(averaged(*kill, patience=6), out_dir=folder, save_every=3).fit(steps=16, resume=True)


def child(*args, **env):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=300,
                          env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(SCRIPT.parent.parent)) | env)


def test_killed_and_resumed_is_bit_identical(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                             # as the child has
    try: peace = run_here(tmp_path/'peace')
    finally: torch.set_num_threads(threads)
    for step, event in ((2, 'after_backward'), (5, 'after_step'), (11, 'before_update')):
        done = child(SCRIPT, 'run', tmp_path/'war', step, event)
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = child(SCRIPT, 'run', tmp_path/'war')
    assert done.returncode == 0, done.stderr
    assert_same(peace, run_here(tmp_path/'war'))                         # finished: loads and does nothing more


@pytest.mark.parametrize('swap', [True, False])
@pytest.mark.parametrize('restore', [True, False])
@pytest.mark.parametrize('patience', [None, 2])
def test_folder_and_memory_end_alike(tmp_path, swap, restore, patience):
    def cbs(): return [EMA(.8, swap=swap), Validate(1, patience=patience, restore=restore)]
    memory = learner(cbs()).fit(steps=12)
    folder = learner(cbs(), out_dir=tmp_path, keep=1).fit(steps=12)
    assert_same(memory, folder)
    validate = of(memory, Validate)
    assert (memory.step < 12) == bool(patience), 'a constant large rate on 32 rows must stop improving'
    assert validate.best_step < memory.step
    loss = (score := memory.validate()).nll / score.n_tokens
    assert loss == (validate.best if restore else validate.losses[-1]['loss'])
    kept = {int(p.name[5:]) for p in tmp_path.glob('step-*')}
    assert kept == {validate.best_step, memory.step}
    again = learner(cbs(), out_dir=tmp_path, keep=1).fit(steps=12, resume=True)      # stopped or finished: does nothing more
    assert_same(memory, again)


def test_an_interrupt_is_not_the_end(tmp_path):
    "Averages and best weights are put in place at the end of a run, not where it is interrupted; going on is exact."
    def interrupt(learn): signal.raise_signal(signal.SIGINT)
    stopped = learner([*averaged(ema=.5), At(7, interrupt)], out_dir=tmp_path)
    stopped.fit(steps=12)
    assert stopped.step == 7
    raw = learner([At(7, lambda learn: setattr(learn, 'stop', True))]).fit(steps=12)
    for p, q in zip(stopped.model.parameters(), raw.model.parameters()): assert torch.equal(p, q)
    whole = learner(averaged(ema=.5)).fit(steps=12)
    assert_same(learner(averaged(ema=.5), out_dir=tmp_path).fit(steps=12, resume=True), whole)


def test_going_on_after_the_end_starts_from_the_trained_weights():
    plain = learner().fit(steps=10)
    ema = EMA(.8)
    two = learner([ema]).fit(steps=6)
    assert not torch.equal(two.model.head.weight, plain.model.head.weight)
    two.fit(steps=10)
    for (n, p), q in zip(plain.model.named_parameters(), two.model.parameters()):
        assert torch.equal(q, ema.averages[n]) and torch.equal(p, ema.aside[n])


def test_stats_watch_training_only():
    "Hooks are off while Validate scores, after the run, and after an error; norms make up the norm that the learner reports."
    seen = ActivationStats(1)
    def rows(learn): return [len(m._forward_hooks) for m in learn.model.modules()]
    class Look:
        def after_step(self, learn): assert not any(rows(learn))
    gradients = GradientStats(1)
    learn = learner([Look(), Validate(1), seen, gradients], clip=None).fit(steps=4)
    assert not any(rows(learn)) and seen.steps == [1, 2, 3, 4] == gradients.steps
    for i, h in enumerate(learn.history):
        assert math.sqrt(sum(row[i]**2 for row in gradients.values['gradient'].values())) == pytest.approx(h['norm'], rel=1e-4)
    with pytest.raises(RuntimeError, match='power cut'): learner([seen, At(2, power_cut, 'before_step')], model=learn.model).fit(steps=4)
    assert not any(rows(learn))


def test_activation_stats_count_each_value_once():
    "Two micro-batches are as one batch, to rounding; a module that never runs is an error."
    def run(batch_size, accumulate):
        watch = ActivationStats(1, modules=['decoder.norm', nn.Embedding])
        learner([watch], model=tiny(dropout=0.), batch_size=batch_size, accumulate=accumulate, collate_fn=same_length).fit(steps=2)
        return watch.values
    def same_length(rows):
        ids = torch.tensor([(r['input_ids'] * 4)[:16] for r in rows])
        return dict(input_ids=ids, labels=ids)
    one, two = run(8, 1), run(2, 4)
    assert list(one['mean']) == ['embed', 'decoder.norm']
    for kind in one:
        for name in one[kind]: assert one[kind][name][0] == pytest.approx(two[kind][name][0], rel=1e-4, abs=1e-6)
    with pytest.raises(LmnotesError, match='none did'): learner([ActivationStats(1, modules=[nn.ModuleList])]).fit(steps=1)
    with pytest.raises(LmnotesError, match='decoder.blokcs'): learner([ActivationStats(1, modules=['decoder.blokcs'])]).fit(steps=1)


class Poison(torch.autograd.Function):
    "The identity, with NaN on the way forward or back."
    @staticmethod
    def forward(ctx, x, back): ctx.back = back; return x.clone() if back else x * math.nan
    @staticmethod
    def backward(ctx, g): return g * math.nan if ctx.back else g, None


def poison(module, back, after=True):
    "Spoil what a module returns, or takes."
    forward = module.forward
    def spoiled(x, *args, **kwargs):
        if not after: return forward(Poison.apply(x, back), *args, **kwargs)
        out = forward(x, *args, **kwargs)
        return (Poison.apply(out[0], back), *out[1:]) if isinstance(out, tuple) else Poison.apply(out, back)
    module.forward = spoiled


def families():
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
    small = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return {'ours': tiny, 'gpt2': lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)),
            'llama': lambda: LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=2)), 'bert': lambda: BertForMaskedLM(BertConfig(**small)),
            't5': lambda: T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0))}


def padded():
    ids = torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))


@pytest.mark.parametrize('family', ['ours', 'gpt2', 'llama', 'bert', 't5'])
def test_the_first_bad_module_is_named(family):
    "For linear layers and norms all over the model: forward and back, before and after. Nothing is left behind."
    torch.manual_seed(0)
    model = families()[family]()
    assert first_bad_module(model.train(), nll, padded()) is None
    names = [n for n, m in model.named_modules() if not isinstance(m, nn.Embedding) and any(True for _ in m.parameters(recurse=False))]
    owned = {id(p) for p in model.parameters()}
    for name in random.Random(0).sample([n for n in names if n not in ('head', 'lm_head')], 6):
        for back in (False, True):
            for after in (True, False):
                module = model.get_submodule(name)
                poison(module, back, after)
                torch.manual_seed(7)
                state, before = torch.get_rng_state(), {n: t.clone() for n, t in model.state_dict().items()}
                found = first_bad_module(model, nll, padded())
                del module.forward                                       # the class's again
                assert found == (name, 'gradient' if back else 'forward'), (back, after)
                assert torch.equal(state, torch.get_rng_state()) and model.training
                assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert {id(p) for p in model.parameters()} == owned and all(p.grad is None and not p._backward_hooks for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bad_weights_and_losses_are_named():
    model = tiny()
    assert first_bad_module(model, lambda m, b: (nll(m, b)[0] * math.inf, 1), padded()) == ('loss', 'loss')
    assert first_bad_module(model, lambda m, b: (Poison.apply(nll(m, b)[0], True), 1), padded()) == ('loss', 'gradient')
    model.decoder.blocks[1].ff.down.weight.data[3, 1] = -math.inf
    assert first_bad_module(model, nll, padded()) == ('decoder.blocks.1.ff.down.weight', 'weight')


def test_the_first_bad_module_of_a_compiled_and_of_a_recomputed_model():
    for change in (lambda m: m.compile(backend='eager'), lambda m: importlib.import_module('lmnotes.precision').recompute(m)):
        model = tiny()
        poison(model.decoder.blocks[1].ff, False)
        change(model)
        assert first_bad_module(model, nll, padded()) == ('decoder.blocks.1.ff', 'forward')
        model = tiny()
        poison(model.decoder.blocks[1].ff, True)
        change(model)
        assert first_bad_module(model, nll, padded()) == ('decoder.blocks.1.ff', 'gradient')


def test_a_learner_names_the_module_where_a_run_breaks():
    learn = learner([At(3, lambda learn: poison(learn.model.decoder.blocks[0].attention, False))])
    with pytest.raises(LmnotesError, match=r'(?s)step 3.*decoder\.blocks\.0\.attention'): learn.fit(steps=8)
    assert learn.step == 3 and all(p.isfinite().all() for p in learn.model.parameters())


SHOWN = [Progress, lambda: LiveCurve(every=.05)]


def show(console):
    "What a child process shows on a console."
    assert console
    learner([f() for f in SHOWN] + [Validate(5)]).fit(steps=10)


@pytest.mark.parametrize('encoding', ['utf-8', 'ascii'])
def test_consoles(encoding):
    done = child(SCRIPT, 'show', encoding, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith('step 10/10  loss ') and 'validation ' in last and (encoding == 'ascii' or '▁' in last)
    assert '10/10' in done.stderr and 'tokens/s' in done.stderr


def processes(folder, shard):
    "What each of two processes runs: in peace, broken off, and gone on with."
    def make(name, *more):
        cbs = [GradientStats(1), EMA(.8), Validate(2), *more]
        return learner(cbs, batch_size=2, out_dir=f'{folder}/{name}', save_every=4, shard=shard == 'shard')
    peace = make('peace', *(f() for f in SHOWN)).fit(steps=8)
    assert peace.processes == 2 and of(peace, Validate).best_step < 8
    with pytest.raises(RuntimeError, match='power cut'): make('war', At(6, power_cut)).fit(steps=8)
    assert_same(peace, make('war').fit(steps=8, resume=True))
    score = peace.validate()
    assert score.nll / score.n_tokens == pytest.approx(of(peace, Validate).best, rel=1e-6)
    print(f'process {peace.rank} done', flush=True)


@pytest.mark.parametrize('shard', ['whole', 'shard'])
def test_two_processes(tmp_path, shard):
    done = child('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, SCRIPT, 'processes', tmp_path, shard)
    assert done.returncode == 0, done.stderr[-4000:]
    assert 'process 0 done' in done.stdout and 'process 1 done' in done.stdout
    assert done.stdout.count('step 8/8') == 1 and (tmp_path/'war'/'step-000008').exists()


def loggers(kind, tmp_path):
    return {'tensorboard': lambda: TensorBoard(tmp_path/'curves'), 'wandb': lambda: WandB(mode='offline', dir=str(tmp_path)),
            'trackio': lambda: Trackio(project='test')}[kind]


@pytest.mark.parametrize('package', ['tensorboard', 'wandb', 'trackio'])
def test_trackers(package, tmp_path, monkeypatch):
    "Where the package is installed a run is written and gone on with, and no secret is; elsewhere the error says what to install."
    make, secret = loggers(package, tmp_path), 'planted-secret-0123456789'
    if importlib.util.find_spec(package) is None:
        with pytest.raises(LmnotesError, match=f'pip install {package}'): make()
        return
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path/'trackio'))
    monkeypatch.setenv('SOME_TOKEN', secret)
    monkeypatch.setattr(sys, 'argv', [*sys.argv, f'--key={secret}'])
    first = make()
    with pytest.raises(RuntimeError, match='power cut'): learner([Validate(3), first, At(7, power_cut)], out_dir=tmp_path/'run', save_every=4).fit(steps=10)
    again = make()
    learner([Validate(3), again], out_dir=tmp_path/'run', save_every=4).fit(steps=10, resume=True)
    if package != 'tensorboard': assert again.id == first.id
    written = [p for p in tmp_path.rglob('*') if p.is_file() and 'run' not in p.relative_to(tmp_path).parts]
    assert written and not [p for p in written if secret.encode() in p.read_bytes()]


def test_missing_packages_are_named(monkeypatch, tmp_path):
    for package in ('tensorboard', 'wandb', 'trackio'):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(LmnotesError, match=f'pip install {package}'): loggers(package, tmp_path)()


def test_tensorboard_hides_what_a_killed_run_wrote_after_its_checkpoint(tmp_path):
    reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    def run(*more, **kwargs): return learner([Validate(3), TensorBoard(tmp_path/'curves'), *more], out_dir=tmp_path/'run', save_every=4).fit(steps=10, **kwargs)
    with pytest.raises(RuntimeError, match='power cut'): run(At(7, power_cut))
    learn = run(resume=True)
    events = reader.EventAccumulator(str(tmp_path/'curves')).Reload()
    losses = [(e.step, e.value) for e in events.Scalars('train/loss')]
    assert losses == [(h['step'], pytest.approx(h['loss'])) for h in learn.history]
    assert [e.step for e in events.Scalars('valid/loss')] == [3, 6, 9, 10]


if __name__ == '__main__': dict(run=run_here, show=show, processes=processes)[sys.argv[1]](*sys.argv[2:])
