"""Attention on a GPU: the fused kernels are chosen, agree with the formula in bfloat16, leave rows that read nothing at zero, and compile without graph breaks."""
import pytest, torch
from torch.testing import assert_close

from lmnotes.attention import (KVCache, MultiHeadAttention, attention, attention_kernels, capture_attention, causal_mask, causal_mod, padding_mask, sdpa)

pytestmark = pytest.mark.gpu
FUSED = {'flash', 'efficient', 'cudnn'}


def qkv(dtype=torch.bfloat16, H=8, G=8, T=128, K=64):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, T, K, generator=gen).to('cuda', dtype) for n in (H, G, G)]


@pytest.mark.parametrize('G', [8, 2])
@pytest.mark.parametrize('form', ['plain', 'causal', 'mask', 'bias', 'mask and bias'])
def test_bf16_runs_a_fused_kernel(form, G):
    "No form falls back to the kernel that holds all weights, with grouped heads either."
    q, k, v = qkv(G=G)
    mask = causal_mask(128, device='cuda') & padding_mask(torch.tensor([128, 70], device='cuda'), 128)
    bias = torch.randn(1, 8, 128, 128, device='cuda', dtype=torch.bfloat16)
    kw = dict(plain={}, causal=dict(is_causal=True), mask=dict(mask=mask), bias=dict(bias=bias)).get(form, dict(mask=mask, bias=bias))
    kernels = attention_kernels(lambda: sdpa(q, k, v, **kw))
    assert kernels and set(kernels) <= FUSED, kernels
    full = dict(mask=causal_mask(128, device='cuda')) if form == 'causal' else kw
    want = attention(q.float(), k.float(), v.float(), **{n: x.float() if n == 'bias' else x for n, x in full.items()})[0]
    assert_close(sdpa(q, k, v, **kw).float(), want, atol=3e-2, rtol=2e-2)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('biased', [False, True])
def test_rows_that_read_nothing(dtype, biased):
    q, k, v = (x.requires_grad_() for x in qkv(dtype, T=32))
    mask = torch.rand(2, 8, 32, 32, device='cuda', generator=torch.Generator('cuda').manual_seed(0)) < .5
    mask[0, :, 3], mask[1] = False, False
    bias = torch.randn(1, 8, 32, 32, device='cuda', dtype=dtype) if biased else None
    out = sdpa(q, k, v, mask, bias)
    assert (out[0, :, 3] == 0).all() and (out[1] == 0).all() and out[0, :, 0].any()
    out.float().square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_module_compiles_without_graph_breaks():
    torch.manual_seed(0)
    mha, cross = MultiHeadAttention(256, 4, n_kv_heads=2, qk_norm=1e-6).to('cuda', torch.bfloat16), MultiHeadAttention(256, 4, cross=True).to('cuda', torch.bfloat16)
    x = torch.randn(2, 64, 256, device='cuda', dtype=torch.bfloat16)
    mask = padding_mask(torch.tensor([64, 40], device='cuda'), 64)
    for f in (lambda x: mha(x, is_causal=True), lambda x: mha(x, mask, is_causal=True), lambda x: cross(x, memory=x)):
        torch._dynamo.reset()
        assert_close(torch.compile(f, fullgraph=True)(x), f(x), atol=3e-2, rtol=3e-2)


def test_cached_equals_uncached():
    torch.manual_seed(0)
    mha, x = MultiHeadAttention(256, 4, n_kv_heads=2).cuda().eval(), torch.randn(2, 20, 256, device='cuda')
    real = padding_mask(torch.tensor([20, 13], device='cuda'), 20, 'left')
    with torch.inference_mode():
        want = mha(x, real, is_causal=True)
        for cache in (KVCache(), KVCache(32)):
            steps = [mha(x[:, :8], real[..., :8], cache=cache, is_causal=True)] + [mha(x[:, t:t+1], real[..., :t+1], cache=cache, is_causal=True) for t in range(8, 20)]
            assert_close(torch.cat(steps, 1), want, atol=1e-4, rtol=1e-4)


def test_flex_attention_compiled():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    q, k, v = qkv(T=256)
    block = create_block_mask(causal_mod(256), 1, 1, 256, 256, device='cuda')
    assert_close(torch.compile(flex_attention)(q, k, v, block_mask=block).float(), sdpa(q, k, v, is_causal=True).float(), atol=3e-2, rtol=2e-2)


def test_captured_weights():
    from lmnotes.models import llama
    torch.manual_seed(0)
    model = llama(vocab_size=61, d_model=64, n_layers=2, n_heads=4).to('cuda', torch.bfloat16).eval()
    with torch.no_grad(), capture_attention(model) as seen: model(input_ids=torch.randint(0, 61, (2, 33), device='cuda'))
    assert seen.calls[0].weights.dtype == torch.float32 and seen.difference < .1
    assert_close(seen.calls[0].weights.sum(-1), torch.ones(2, 4, 33, device='cuda'))
