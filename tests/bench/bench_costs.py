"""The fused loss against full logits: F.cross_entropy(F.linear(hidden, weight), labels), forward and backward, in float32 on the CPU.

Memory is the largest resident set of a fresh process during forward and backward, minus that before, when hidden states, matrix and labels
are there. It holds the gradients, which both must make: 122 MB of the large problem.
"""
import torch
import torch.nn.functional as F
from harness import Row, peak_memory

LARGE, SMALL = dict(V=49152, D=576, N=4096), dict(V=2048, D=192, N=256)

SETUP = """
import torch, torch.nn.functional as F
from lmnotes.costs import linear_cross_entropy
torch.manual_seed(0)
hidden, weight, labels = torch.randn({N}, {D}, requires_grad=True), torch.randn({V}, {D}).mul_(.02).requires_grad_(), torch.randint({V}, ({N},))
warm = torch.randn(64, 64, requires_grad=True)
F.cross_entropy(warm @ warm, torch.zeros(64, dtype=torch.long)).backward()      # what torch loads at first use is no part of either
del warm
"""
OURS, PEER = 'linear_cross_entropy(hidden, weight, labels).backward()', 'F.cross_entropy(F.linear(hidden, weight), labels).backward()'


def problem(V, D, N):
    "Hidden states, matrix and labels, and what computes loss and gradients from them in both ways."
    from lmnotes.costs import linear_cross_entropy
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(N, D, requires_grad=True), torch.randn(V, D).mul_(.02).requires_grad_(), torch.randint(V, (N,))
    def run(loss):
        hidden.grad = weight.grad = None
        out = loss()
        out.backward()
        return out.detach(), hidden.grad, weight.grad
    return lambda: run(lambda: linear_cross_entropy(hidden, weight, labels)), lambda: run(lambda: F.cross_entropy(F.linear(hidden, weight), labels))


def rows():
    ours, peer = problem(**LARGE)
    def same():
        for a, b in zip(ours(), peer()): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    what = 'V 49,152, D 576, 4,096 tokens'
    yield Row(f'fused loss, {what}', ours, peer, target=1, check=same, note='F.cross_entropy of full logits, forward and backward')
    setup = SETUP.format(**LARGE)
    yield Row('  its memory', lambda: peak_memory(setup, OURS), lambda: peak_memory(setup, PEER), target=6, unit='B', note='added at the peak, the gradients included')
    ours, peer = problem(**SMALL)
    yield Row('fused loss, small: V 2,048, 256 tokens', ours, peer, target=.9, note='all logits fit: nothing to gain, some tens of microseconds to lose')
