"The fused loss on a GPU: right in float32 and bfloat16, compiled with inductor, and far below the memory of all logits."
import pytest, torch
import torch.nn.functional as F

from lmnotes.costs import linear_cross_entropy

pytestmark = pytest.mark.gpu


def problem(N, D, V, dtype):
    gen = torch.Generator('cuda').manual_seed(0)
    h, w = (torch.randn(s, generator=gen, device='cuda', dtype=dtype) for s in ((N, D), (V, D)))
    labels = torch.randint(V, (N,), generator=gen, device='cuda')
    labels[::5] = -100
    return h.requires_grad_(), w.mul_(D**-.5).requires_grad_(), labels


def full(h, w, y): return F.cross_entropy(F.linear(h, w).float(), y)


def results(f, h, w, y): return (loss := f(h, w, y)), *torch.autograd.grad(loss, (h, w))


@pytest.mark.parametrize('dtype,bound', [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('compiled', [False, True])
def test_equals_full_logits(dtype, bound, compiled):
    args = problem(3000, 128, 5000, dtype)
    f = torch.compile(linear_cross_entropy, fullgraph=True) if compiled else lambda *a: linear_cross_entropy(*a, rows=512)
    for a, b in zip(results(f, *args), results(full, *args)): assert (a - b).abs().max() <= bound * b.abs().max()


def test_peak_memory():
    args, peaks = problem(8192, 576, 49_152, torch.bfloat16), []
    for f in (linear_cross_entropy, full):
        results(f, *args)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results(f, *args)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] > 4 * peaks[0], peaks


def test_cuda_graphs_do_not_break():
    f = torch.compile(linear_cross_entropy, mode='reduce-overhead')
    args = problem(3000, 128, 5000, torch.float32)
    for _ in range(3): torch.testing.assert_close(f(*args).clone(), full(*args), atol=1e-4, rtol=1e-4)
