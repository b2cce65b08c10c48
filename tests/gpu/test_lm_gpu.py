"""lmnotes.lm on a GPU: the same numbers as on the CPU, in float32 and from bfloat16 logits."""
import math

import pytest, torch

from lmnotes.lm import nll, perplexity, token_logps

pytestmark = pytest.mark.gpu


def tiny():
    from lmnotes.models import Transformer, TransformerConfig
    torch.manual_seed(0)
    return Transformer(TransformerConfig(vocab_size=97, d_model=64, n_layers=2, n_heads=4, d_ff=128, max_len=64))


def test_perplexity_equals_cpu():
    docs = [torch.randint(97, (n,), generator=torch.Generator().manual_seed(n)) for n in (150, 2, 64, 31)]
    model = tiny()
    cpu = perplexity(model, docs, window=32, stride=8)
    gpu = perplexity(model.cuda(), docs, window=32, stride=8)
    assert gpu.n_tokens == cpu.n_tokens and math.isclose(gpu.nll, cpu.nll, rel_tol=1e-4)
    assert all(p.device.type == 'cpu' for p in token_logps(model, docs))


def test_nll_and_gradients_equal_cpu():
    model, batch = tiny(), dict(input_ids=torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(1)))
    s, n = nll(model, batch)
    expected = torch.autograd.grad(s / n, list(model.parameters()))
    model.cuda()
    t, m = nll(model, {k: v.cuda() for k, v in batch.items()})
    assert n == m
    torch.testing.assert_close(t.cpu(), s, rtol=1e-4, atol=1e-3)
    for a, b in zip(torch.autograd.grad(t / m, list(model.parameters())), expected): torch.testing.assert_close(a.cpu(), b, rtol=1e-2, atol=1e-4)


def test_bfloat16_is_summed_in_float32():
    model = tiny().cuda().bfloat16()
    s, n = nll(model, dict(input_ids=torch.randint(97, (8, 64), generator=torch.Generator().manual_seed(2)).cuda()))
    assert s.dtype == torch.float32 and math.isclose(s.item() / n, math.log(97), rel_tol=.1)
