"""Training on a GPU: formats, fp16 that overflows, memory that runs out, recomputation, fused optimizers, the report.
Needs torch, numpy, pytest, safetensors, fastcore and accelerate with the checkout on the path:

    python -m pytest tests/gpu/test_training_gpu.py -q
"""
import gc, math, warnings

import pytest, torch

from lmnotes.models import gpt2, llama
from lmnotes.optimizers import adamw, muon, sgd
from lmnotes.precision import LossScaler, autocast, choose_precision, free_memory, out_of_memory, recompute, tensor_peak

pytestmark = pytest.mark.gpu
assert_close = torch.testing.assert_close


def rows(n=64, T=64, V=512):
    "Rows of a language that can be learned: each id is three more than the one before"
    first = torch.randint(1, V, (n, 1), generator=torch.Generator().manual_seed(0))
    return list((first + 3 * torch.arange(T)) % (V - 1) + 1)


def model(L=2, D=128, V=512, T=64, make=llama, **kwargs):
    torch.manual_seed(0)
    return make(V, d_model=D, n_layers=L, n_heads=4, max_len=T, **kwargs)


def learner(m=None, data=None, **kwargs):
    pytest.importorskip('accelerate')
    from lmnotes.training import Learner
    return Learner(model() if m is None else m, rows() if data is None else data,
                   **dict(batch_size=8, opt=adamw, lr=2e-3, precision='fp32') | kwargs)


def losses(learn): return [h['loss'] for h in learn.history]


def test_choice_by_hardware():
    ampere = torch.cuda.get_device_capability() >= (8, 0)
    assert choose_precision(model(), 'cuda') == ('bf16' if ampere else 'fp16')
    assert [choose_precision(model(), 'cuda', p) for p in ('fp32', 'fp16')] == ['fp32', 'fp16']


@pytest.mark.parametrize('precision,bound', [('bf16', .05), ('fp16', .02)])
@pytest.mark.parametrize('opt,lr', [(adamw, 2e-3), (muon, .02)])
def test_half_precision_learns_as_float32(precision, bound, opt, lr):
    exact, half = (learner(precision=p, opt=opt, lr=lr).fit(steps=60) for p in ('fp32', precision))
    assert losses(exact)[-1] < .6 * losses(exact)[0]
    assert max(abs(a - b) for a, b in zip(losses(exact)[:20], losses(half))) < bound * losses(exact)[0]
    assert losses(half)[-1] < .7 * losses(half)[0]
    assert all(p.dtype == torch.float32 for p in half.model.parameters())


def test_fp16_overflow_is_counted_and_is_no_step():
    learn, steps_of_opt = learner(precision='fp16'), []
    learn.scaler = LossScaler(2.**40)
    for o in learn.opts: o.register_step_post_hook(lambda *_: steps_of_opt.append(learn.step))
    learn.fit(steps=10)
    assert learn.scaler.skipped > 5 and learn.step == len(learn.history) == 10
    assert steps_of_opt == [s for s in range(10) for _ in learn.opts]
    assert [h['lr'] for h in learn.history] == [h['lr'] for h in learner().fit(steps=10).history]
    assert all(math.isfinite(h['norm']) for h in learn.history)


def test_fp16_without_end_is_an_error():
    from lmnotes.core import LmnotesError
    m = model()
    m.decoder.norm.weight.register_hook(lambda g: g * math.inf)
    learn = learner(m, precision='fp16')
    before = [p.detach().clone() for p in m.parameters()]
    with pytest.raises(LmnotesError, match='in a row'): learn.fit(steps=5)
    for a, b in zip(before, m.parameters()): assert_close(a, b, rtol=0, atol=0)


def test_small_gradients_survive_by_scaling():
    w, x = torch.full((1, 64), 1e-3, device='cuda', requires_grad=True), torch.full((64, 64), 1e-4, device='cuda')
    grads = []
    for scale in (1., 2.**16):
        with autocast('cuda', 'fp16'): y = (w @ x).float().sum() * 1e-5
        grads.append(torch.autograd.grad(y * scale, w)[0] / scale)
    exact = 64 * 1e-4 * 1e-5
    assert grads[0].abs().max() < .999 * exact or grads[0].abs().max() > 1.001 * exact
    assert_close(grads[1], torch.full_like(w, exact), rtol=2e-3, atol=0)


def test_real_out_of_memory_is_known_and_freed():
    free_memory()
    before = torch.cuda.memory_allocated()
    def fails():
        held = [torch.empty(2**28, dtype=torch.uint8, device='cuda')]
        while True: held.append(torch.empty(2**34, dtype=torch.uint8, device='cuda'))
    try: fails()
    except RuntimeError as e:
        assert out_of_memory(e)
        free_memory(e)
        assert torch.cuda.memory_allocated() == before
    assert torch.cuda.memory_reserved() < before + 2**27


def peak_of(batch_size, data):
    "Bytes reserved at the peak of two steps"
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    learner(model(4, 256, 4096, 256), data, batch_size=batch_size, accumulate=32 // batch_size).fit(steps=2)
    return torch.cuda.max_memory_reserved()


def test_memory_runs_out_and_the_step_stays_the_same():
    data = rows(64, 256, 4096)
    whole, few = peak_of(32, data), peak_of(8, data)
    assert few < .7 * whole
    make = lambda: learner(model(4, 256, 4096, 256), data, batch_size=32)
    expected = make().fit(steps=4)
    exact, weights = losses(expected), [p.detach().cpu() for p in expected.model.parameters()]
    del expected
    gc.collect(); free_memory()
    torch.cuda.set_per_process_memory_fraction((few + whole) / 2 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            learn = make().fit(steps=4)
    finally: torch.cuda.set_per_process_memory_fraction(1.)
    assert any('memory ran out in step' in str(w.message) for w in said)
    assert_close(losses(learn), exact, rtol=1e-4, atol=1e-5)
    for p, q in zip(learn.model.parameters(), weights): assert_close(p.detach().cpu(), q, rtol=1e-2, atol=2e-3)
    free_memory()
    held = sum(p.nbytes for p in learn.model.parameters()) * 3
    assert torch.cuda.memory_allocated() < held + 64e6


@pytest.mark.parametrize('make', [llama, gpt2])
def test_recompute(make):
    found = {}
    ids = torch.stack(rows(16, 256)).cuda()
    for on in (False, True):
        m = recompute(model(8, 256, 512, 256, make).cuda().double().train(), on)
        def step(): m.zero_grad(); m(input_ids=ids, labels=ids).loss.backward()
        step()
        peak = tensor_peak(step, *m.parameters())
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        found[on] = torch.cuda.max_memory_allocated() - before, peak, [p.grad.clone() for p in m.parameters()]
    for a, b in zip(found[True][2], found[False][2]): assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert found[True][0] < .5 * found[False][0] and found[True][1] < .5 * found[False][1]


def test_recompute_in_a_learner_under_bf16_with_dropout():
    plain, less = (learner(model(make=gpt2, dropout=.1), precision='bf16', recompute=on).fit(steps=8) for on in (False, True))
    assert_close(losses(less), losses(plain), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('opt', [adamw, sgd])
def test_optimizers_are_fused(opt):
    m = model().cuda()
    opts = opt(m, 1e-3)
    assert opts and all(g['fused'] for o in opts for g in o.param_groups)
    before = [p.detach().clone() for p in m.parameters()]
    for p in m.parameters(): p.grad = torch.ones_like(p)
    for o in opts: o.step()
    assert all((a != b).any() for a, b in zip(before, m.parameters()))


def test_compiled_equals_plain():
    plain, compiled = (learner(compile=on, precision='bf16').fit(steps=10) for on in (False, True))
    assert_close(losses(compiled), losses(plain), rtol=2e-2, atol=2e-2)
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())


def test_workers_change_nothing():
    assert_close(losses(learner(num_workers=2).fit(steps=6)), losses(learner().fit(steps=6)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_resume(tmp_path, precision):
    whole = learner(precision=precision, out_dir=tmp_path/'a').fit(steps=8)
    def part(): return learner(precision=precision, out_dir=tmp_path/'b', save_every=4)
    class Fail:
        def after_step(self, learn):
            if learn.step == 6: raise OSError('pulled the plug')
    first = part()
    first.cbs.append(Fail())
    with pytest.raises(OSError, match='plug'): first.fit(steps=8)
    second = part().fit(steps=8, resume=True)
    assert second.step == 8
    assert_close(losses(second), losses(whole), rtol=1e-5, atol=1e-6)
    for p, q in zip(second.model.parameters(), whole.model.parameters()): assert_close(p, q, rtol=1e-4, atol=1e-5)
    if precision == 'fp16': assert second.scaler.state_dict() == whole.scaler.state_dict()


def test_report():
    from lmnotes.report import Meter, run_report
    found = run_report(learner(model(4, 256, 4096, 256), rows(64, 256, 4096), precision='auto', cbs=[Meter()]).fit(steps=20))
    assert 0 < found.mfu < 1 and found.device == torch.cuda.get_device_name()
    assert found.peak_memory > 4 * 4 * found.parameters and found.memory[-1][2] == found.peak_memory
    predicted, measured = found.memory[-1][1:]
    assert .4 < predicted / measured < 1.6, found
    assert all(j > 0 for j in found.joules.values())
