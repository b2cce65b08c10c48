"""Attention, masks and cache on random shapes: the formula, the fused kernel and a loop agree; caches change nothing; captured weights are the model's."""
import copy, math

import pytest, torch, torch.nn.functional as F, transformers
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

import lmnotes.attention as module
from lmnotes.attention import (KVCache, MultiHeadAttention, attention, attention_kernels, capture_attention, causal_mask, causal_mod, padding_mask, padding_mod,
                               prefix_lm_mask, prefix_lm_mod, sdpa, segment_mask, segment_mod, sliding_mask, sliding_mod, unilm_mask, unilm_mod)
from lmnotes.core import LmnotesError
from lmnotes.models import llama
from lmnotes.positions import apply_rope, rope_angles

quick = settings(max_examples=40, deadline=None)


def naive(q, k, v, mask=None, bias=None, scale=None):
    "Equation (3.1) with loops, in double precision: output and weights."
    B, H, T, K = q.shape
    G, S = k.shape[1:3]
    out, weights = torch.zeros(B, H, T, v.shape[3], dtype=torch.float64), torch.zeros(B, H, T, S, dtype=torch.float64)
    mask = torch.ones(B, H, T, S, dtype=torch.bool) if mask is None else mask.expand(B, H, T, S)
    bias = torch.zeros(B, H, T, S) if bias is None else bias.expand(B, H, T, S)
    for b in range(B):
        for h in range(H):
            g = h * G // H                                            # heads 0, 1, .. of a group stand together
            for t in range(T):
                e = {s: float(q[b, h, t].double() @ k[b, g, s].double()) * (1 / math.sqrt(K) if scale is None else scale) + float(bias[b, h, t, s])
                     for s in range(S) if mask[b, h, t, s]}
                top = max(e.values(), default=0)
                for s in e:
                    weights[b, h, t, s] = math.exp(e[s] - top) / sum(math.exp(x - top) for x in e.values())
                    out[b, h, t] += weights[b, h, t, s] * v[b, g, s].double()
    return out, weights


@st.composite
def cases(draw, dtype=torch.float64):
    "Random arguments of attention: grouped heads, values of another width, a mask of any broadcastable shape with empty rows, a bias, a scale."
    B, G, R, T, S, K, W = (draw(st.integers(1, n)) for n in (3, 3, 3, 5, 6, 6, 5))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rand = lambda *shape: torch.randn(*shape, dtype=dtype, generator=gen)
    shape = [draw(st.sampled_from([1, n])) for n in (B, G * R, T)] + [S]
    mask = torch.rand(shape, generator=gen) < draw(st.sampled_from([.2, .6, .9])) if draw(st.booleans()) else None
    bias = rand(*[draw(st.sampled_from([1, n])) for n in (B, G * R, T)], S) if draw(st.booleans()) else None
    scale = draw(st.sampled_from([None, .3, 1.]))
    return dict(q=rand(B, G * R, T, K), k=rand(B, G, S, K), v=rand(B, G, S, W), mask=mask, bias=bias, scale=scale)


def agree(case):
    "attention, sdpa and the loop on one case, gradients too."
    out, weights = attention(**case)
    want, want_weights = naive(**case)
    assert_close(weights, want_weights, atol=1e-12, rtol=1e-9)
    assert_close(out, want, atol=1e-12, rtol=1e-9)
    assert_close(sdpa(**case), want, atol=1e-9, rtol=1e-7)
    grads = []
    for f in (lambda **a: attention(**a)[0], sdpa):
        leaves = {n: x.clone().requires_grad_() for n, x in case.items() if n in ('q', 'k', 'v', 'bias') and x is not None}
        f(**case | leaves).square().sum().backward()
        grads.append([x.grad for x in leaves.values()])
    for a, b in zip(*grads): assert_close(a, b, atol=1e-9, rtol=1e-7)     # a NaN fails, too


@quick
@given(cases())
def test_formula_kernel_and_loop_agree(case):
    before = {n: x.clone() for n, x in case.items() if isinstance(x, torch.Tensor)}
    agree(case)
    assert all(torch.equal(case[n], x) for n, x in before.items())


MUTANTS = {
    'scale of d_k instead of its root': dict(scale=lambda K: 1 / K), 'no scale': dict(scale=lambda K: 1.),
    'mask dropped': dict(mask=lambda m: None), 'mask inverted': dict(mask=lambda m: ~m),
    'groups interleaved': dict(heads=lambda x, n: x.repeat(1, n, 1, 1)), 'keys reversed': dict(heads=lambda x, n: x.flip(2).repeat_interleave(n, 1)),
}


@pytest.mark.parametrize('name', MUTANTS)
def test_a_broken_kernel_is_noticed(name, monkeypatch):
    "The comparison above must fail where scale, mask or the order of the groups is wrong."
    bug, real = MUTANTS[name], F.scaled_dot_product_attention
    def broken(q, k, v, mask, dropout, is_causal, scale=None, enable_gqa=False):
        if 'scale' in bug: scale = bug['scale'](q.shape[-1])
        if 'mask' in bug: mask = bug['mask'](mask)
        if 'heads' in bug: k, v, enable_gqa = bug['heads'](k, q.shape[1] // k.shape[1]), (v if 'keys' in name else bug['heads'](v, q.shape[1] // v.shape[1])), False
        if v.shape[1] != k.shape[1]: v = v.repeat_interleave(k.shape[1] // v.shape[1], 1)
        return real(q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa)
    gen = torch.Generator().manual_seed(0)
    case = dict(q=torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=gen), k=torch.randn(2, 2, 6, 5, dtype=torch.float64, generator=gen),
                v=torch.randn(2, 2, 6, 5, dtype=torch.float64, generator=gen), mask=torch.rand(2, 1, 3, 6, generator=gen) < .6)
    agree(case)
    monkeypatch.setattr(module.F, 'scaled_dot_product_attention', broken)
    with pytest.raises(AssertionError): agree(case)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_that_read_nothing(dtype):
    "Zeros from the formula, the kernel and the module, also with a bias, dropout, grouped heads; every gradient finite."
    gen = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8, generator=gen), torch.randn(2, 2, 6, 8, generator=gen), torch.randn(2, 2, 6, 8, generator=gen)
    mask = torch.rand(2, 4, 5, 6, generator=gen) < .5
    mask[0, :, 2], mask[1] = False, False
    for bias in (None, torch.randn(1, 4, 5, 6, generator=gen)):
        for f in (lambda *a, **kw: attention(*a, **kw)[0], sdpa, lambda *a, **kw: sdpa(*a, **kw, dropout=.5)):
            leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
            extra = None if bias is None else bias.to(dtype).requires_grad_()
            out = f(*leaves, mask=mask, bias=extra)
            assert out.dtype == dtype
            assert (out[0, :, 2] == 0).all() and (out[1] == 0).all() and (out[0, :, 0] != 0).any()
            out.float().square().sum().backward()
            assert all(x.grad.isfinite().all() for x in leaves + ([] if extra is None else [extra]))
    if dtype == torch.float16: return                                  # a float16 layer is no use on the CPU
    mha = MultiHeadAttention(16, 4, n_kv_heads=2).to(dtype)
    x = torch.randn(2, 5, 16, generator=gen).to(dtype).requires_grad_()
    y = mha(x, mask[:, :, :, :5])
    assert (y[0, 2] == 0).all() and (y[1] == 0).all() and y[0, 0].any()
    y.float().square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in mha.parameters())


def test_minus_infinity_in_a_bias_is_a_mask():
    gen = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 8, generator=gen).unbind(0)
    mask = torch.rand(2, 1, 5, 5, generator=gen) < .5
    mask[0, 0, 1] = False
    bias = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    for a, b in zip(attention(q, k, v, mask), attention(q, k, v, bias=bias)): assert_close(a, b)
    assert_close(sdpa(q, k, v, bias=bias), attention(q, k, v, mask)[0])
    assert attention(q.fill_(math.nan), k, v)[0].isnan().all()           # a NaN that came in is not hidden


@pytest.mark.parametrize('dtype,atol', [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision(dtype, atol):
    gen = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 33, 16, generator=gen).unbind(0)
    want = attention(q, k, v, causal_mask(33))[0]
    for out in (attention(q.to(dtype), k.to(dtype), v.to(dtype), causal_mask(33))[0], sdpa(q.to(dtype), k.to(dtype), v.to(dtype), is_causal=True)):
        assert_close(out.float(), want, atol=atol, rtol=2e-2)


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    q = k = torch.zeros(1, 1, 4000, 1)
    v = torch.eye(20)[None, None].repeat(1, 1, 200, 1)                  # the output sums the weights of every twentieth key
    out = sdpa(q[:, :, :400], k, v, dropout=.25)
    assert abs(out.sum(-1).mean() - 1) < .01
    weights = sdpa(q[:, :, :400], k[:, :, :20], v[:, :, :20], dropout=.25)
    assert abs((weights == 0).float().mean() - .25) < .02 and torch.allclose(weights[weights > 0], torch.tensor(1 / 20 / .75))
    mha = MultiHeadAttention(16, 2, dropout=.5)
    x = torch.randn(1, 9, 16)
    assert not torch.equal(mha(x), mha(x)) and torch.equal(mha.eval()(x), mha(x))


# ---- masks

MASKS = {
    'causal': (lambda B, T: causal_mask(T), lambda B, T: causal_mod(T), lambda b, t, s: s <= t),
    'right padding': (lambda B, T: padding_mask(lengths(B, T), T), lambda B, T: padding_mod(lengths(B, T), T), lambda b, t, s: s < N[b]),
    'left padding': (lambda B, T: padding_mask(lengths(B, T), T, 'left'), lambda B, T: padding_mod(lengths(B, T), T, 'left'), lambda b, t, s: s >= len(SEG[b]) - N[b]),
    'prefix': (lambda B, T: prefix_lm_mask(lengths(B, T), T), lambda B, T: prefix_lm_mod(lengths(B, T), T), lambda b, t, s: s <= t or s < N[b]),
    'segments': (lambda B, T: segment_mask(segments(B, T)), lambda B, T: segment_mod(segments(B, T)), lambda b, t, s: SEG[b][t] == SEG[b][s]),
    'sliding': (lambda B, T: sliding_mask(T, 3), lambda B, T: sliding_mod(T, 3), lambda b, t, s: t - 3 < s <= t),
    'bidirectional': (lambda B, T: unilm_mask('bidirectional', T), lambda B, T: unilm_mod('bidirectional', T), lambda b, t, s: True),
    'left-to-right': (lambda B, T: unilm_mask('left-to-right', T), lambda B, T: unilm_mod('left-to-right', T), lambda b, t, s: s <= t),
    'right-to-left': (lambda B, T: unilm_mask('right-to-left', T), lambda B, T: unilm_mod('right-to-left', T), lambda b, t, s: s >= t),
    'sequence-to-sequence': (lambda B, T: unilm_mask('sequence-to-sequence', T, lengths(B, T)), lambda B, T: unilm_mod('sequence-to-sequence', T, lengths(B, T)),
                             lambda b, t, s: s < N[b] if t < N[b] else s <= t),   # the source reads the source, the target all before it
}
N, SEG = [], []

def lengths(B, T):
    N[:] = [(3 * b + 2) % (T + 1) for b in range(B)]
    return torch.tensor(N)

def segments(B, T):
    SEG[:] = [[(t + b) // 3 for t in range(T)] for b in range(B)]
    return torch.tensor(SEG)


@pytest.mark.parametrize('name', MASKS)
@pytest.mark.parametrize('B,T', [(1, 1), (3, 7), (4, 12)])
def test_masks_are_what_they_say_and_flex_agrees(name, B, T):
    from torch.nn.attention.flex_attention import create_mask
    dense, mod, rule = MASKS[name]
    lengths(B, T), segments(B, T)
    mask = dense(B, T)
    assert mask.dtype == torch.bool and mask.ndim == 4
    want = torch.tensor([[[[rule(b, t, s) for s in range(T)] for t in range(T)]] for b in range(B)])
    assert torch.equal(mask.expand(B, 1, T, T), want)
    assert torch.equal(create_mask(mod(B, T), B, 1, T, T, device='cpu'), want)


def test_shapes_of_masks():
    n = torch.tensor([2, 3])
    assert causal_mask(4).shape == (1, 1, 4, 4) and padding_mask(n, 4).shape == padding_mask(n, 4, 'left').shape == (2, 1, 1, 4)
    assert prefix_lm_mask(n, 4).shape == (2, 1, 4, 4) and segment_mask(torch.zeros(2, 4)).shape == (2, 1, 4, 4) and sliding_mask(4, 2).shape == (1, 1, 4, 4)


@pytest.mark.parametrize('T,S', [(1, 5), (3, 5), (5, 5)])
def test_the_queries_are_the_last_of_the_keys(T, S):
    from torch.nn.attention.flex_attention import create_mask
    assert torch.equal(causal_mask(T, S), causal_mask(S)[:, :, S - T:])
    assert torch.equal(sliding_mask(T, 2, S), sliding_mask(S, 2)[:, :, S - T:])
    for mod, mask in ((causal_mod(T, S), causal_mask(T, S)), (sliding_mod(T, 2, S), sliding_mask(T, 2, S))):
        assert torch.equal(create_mask(mod, 1, 1, T, S, device='cpu'), mask)


def test_sliding_window_is_that_of_mistral():
    "The width counts the position itself, as in transformers."
    config = transformers.MistralConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8, sliding_window=3)
    model = transformers.MistralModel(config).eval()
    with capture_attention(model) as seen, torch.no_grad(): model(torch.randint(0, 11, (1, 9)))
    assert torch.equal(seen.calls[0].weights[:, :1] > 0, sliding_mask(9, 3))


@pytest.mark.parametrize('name', ['causal', 'left padding', 'prefix', 'segments', 'sliding'])
def test_flex_attention_equals_sdpa(name):
    from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention
    B, T = 2, 16
    dense, mod, _ = MASKS[name]
    q, k, v = torch.randn(B, 4, T, 8), torch.randn(B, 2, T, 8), torch.randn(B, 2, T, 8)
    with torch.no_grad():
        block = create_block_mask(mod(B, T), B, 1, T, T, device='cpu')
        assert_close(flex_attention(q, k, v, block_mask=block, enable_gqa=True), sdpa(q, k, v, dense(B, T)), atol=1e-6, rtol=1e-5)
        block = create_block_mask(and_masks(causal_mod(T), mod(B, T)), B, 1, T, T, device='cpu')
        assert_close(flex_attention(q, k, v, block_mask=block, enable_gqa=True), sdpa(q, k, v, causal_mask(T) & dense(B, T)), atol=1e-6, rtol=1e-5)


def test_kernels_on_the_cpu():
    "Every mask form and grouped heads stay on the CPU's fused kernel; dropout does not."
    q, k = torch.randn(2, 4, 16, 8), torch.randn(2, 2, 16, 8)
    mask = causal_mask(16) & padding_mask(torch.tensor([16, 9]), 16)
    for kw in (dict(), dict(is_causal=True), dict(mask=mask), dict(bias=torch.randn(1, 4, 16, 16)), dict(mask=mask, bias=torch.randn(1, 4, 16, 16))):
        for keys in (k, k.repeat_interleave(2, 1)): assert attention_kernels(lambda: sdpa(q, keys, keys, **kw)) == ['flash'], kw
    assert attention_kernels(lambda: sdpa(q, k, k, dropout=.1)) == ['math']
    assert attention_kernels(lambda: attention(q, k, k)) == []
    assert attention_kernels(lambda: MultiHeadAttention(16, 4, n_kv_heads=2)(torch.randn(2, 5, 16), is_causal=True)) == ['flash']


# ---- the module against torch and transformers

def copy_linear(ours, *theirs):
    with torch.no_grad():
        ours.weight.copy_(torch.cat([m.weight for m in theirs]))
        if ours.bias is not None: ours.bias.copy_(torch.cat([m.bias for m in theirs]))


@pytest.mark.parametrize('cross', [False, True])
def test_module_equals_torchs(cross):
    "Output and gradients, also of the parameters, of nn.MultiheadAttention with the same weights."
    torch.manual_seed(0)
    ours, ref = MultiHeadAttention(24, 4, bias=True, cross=cross).double(), nn.MultiheadAttention(24, 4, batch_first=True).double()
    nn.init.normal_(ref.in_proj_bias)
    with torch.no_grad():
        q, kv = (ours.q, ours.kv) if cross else (ours.qkv, None)
        if cross:
            q.weight.copy_(ref.in_proj_weight[:24]); q.bias.copy_(ref.in_proj_bias[:24]); kv.weight.copy_(ref.in_proj_weight[24:]); kv.bias.copy_(ref.in_proj_bias[24:])
        else: q.weight.copy_(ref.in_proj_weight); q.bias.copy_(ref.in_proj_bias)
        ours.out.weight.copy_(ref.out_proj.weight); ours.out.bias.copy_(ref.out_proj.bias)
    x, memory = torch.randn(3, 7, 24, dtype=torch.float64), torch.randn(3, 5, 24, dtype=torch.float64)
    n = torch.tensor([5, 3, 1])
    if cross: a, b = ours(x, padding_mask(n, 5), memory=memory), ref(x, memory, memory, key_padding_mask=~padding_mask(n, 5)[:, 0, 0], need_weights=False)[0]
    else: a, b = ours(x, padding_mask(n, 7), is_causal=True), ref(x, x, x, key_padding_mask=~padding_mask(n, 7)[:, 0, 0], attn_mask=~causal_mask(7)[0, 0], need_weights=False)[0]
    assert_close(a, b, atol=1e-12, rtol=1e-9)
    a.square().sum().backward(); b.square().sum().backward()
    grad = torch.cat([q.weight.grad, kv.weight.grad]) if cross else q.weight.grad
    assert_close(grad, ref.in_proj_weight.grad, atol=1e-10, rtol=1e-8)
    assert_close(ours.out.bias.grad, ref.out_proj.bias.grad, atol=1e-10, rtol=1e-8)


def calls_of(layer, run):
    "What a layer of a transformers model was called with, and what it returned."
    seen = []
    hook = layer.register_forward_hook(lambda m, args, kwargs, out: seen.append((args, kwargs, out[0])), with_kwargs=True)
    with torch.no_grad(): run()
    hook.remove()
    return seen[-1]


@pytest.mark.parametrize('family,heads,groups,width,bias', [('llama', 4, 4, 6, False), ('llama', 6, 2, 4, False), ('llama', 4, 1, 8, False), ('qwen2', 4, 2, 6, True), ('qwen3', 4, 2, 10, False)])
def test_module_equals_a_layer_of_transformers(family, heads, groups, width, bias):
    "Grouped and multi-query heads, biases on q, k, v alone, heads wider than D / H, normalized queries and keys, rotary positions, left padding."
    torch.manual_seed(0)
    config, model = dict(llama=(transformers.LlamaConfig, transformers.LlamaModel), qwen2=(transformers.Qwen2Config, transformers.Qwen2Model), qwen3=(transformers.Qwen3Config, transformers.Qwen3Model))[family]
    extra = dict(head_dim=width) if family == 'qwen3' else {}
    ref = model(config(vocab_size=31, hidden_size=24 if extra else heads * width, num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=groups, intermediate_size=8, **extra)).eval()
    layer = ref.layers[0].self_attn
    for p in layer.parameters(): nn.init.normal_(p, std=.3)
    ours = MultiHeadAttention(ref.config.hidden_size, heads, groups, d_head=width, qkv_bias=bias, qk_norm=ref.config.rms_norm_eps if extra else None)
    copy_linear(ours.qkv, layer.q_proj, layer.k_proj, layer.v_proj); copy_linear(ours.out, layer.o_proj)
    if extra: ours.q_norm.load_state_dict(layer.q_norm.state_dict()); ours.k_norm.load_state_dict(layer.k_norm.state_dict())
    n, T = torch.tensor([9, 4]), 9
    real = padding_mask(n, T, 'left')[:, 0, 0]
    places = (real.long().cumsum(-1) - 1).clamp(min=0)
    args, kwargs, out = calls_of(layer, lambda: ref(torch.randint(0, 31, (2, T)), attention_mask=real.long(), position_ids=places))
    cos, sin = rope_angles(places, width)
    y = ours(kwargs.get('hidden_states', args[0] if args else None), padding_mask(n, T, 'left'), rotate=lambda t: apply_rope(t, cos, sin), is_causal=True)
    assert_close(y[real], out[real], atol=1e-5, rtol=1e-4)


def test_module_equals_bart_cross_attention():
    torch.manual_seed(0)
    ref = transformers.BartModel(transformers.BartConfig(vocab_size=31, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=8, decoder_ffn_dim=8)).eval()
    layer = ref.decoder.layers[0].encoder_attn
    for p in layer.parameters(): nn.init.normal_(p, std=.3)
    ours = MultiHeadAttention(24, 4, bias=True, cross=True)
    copy_linear(ours.q, layer.q_proj); copy_linear(ours.kv, layer.k_proj, layer.v_proj); copy_linear(ours.out, layer.out_proj)
    n = torch.tensor([7, 4])
    args, kwargs, out = calls_of(layer, lambda: ref(torch.randint(3, 31, (2, 7)), attention_mask=padding_mask(n, 7)[:, 0, 0].long(), decoder_input_ids=torch.randint(3, 31, (2, 5))))
    y = ours(kwargs.get('hidden_states', args[0] if args else None), padding_mask(n, 7), memory=kwargs['key_value_states'])
    assert_close(y, out, atol=1e-5, rtol=1e-4)


@quick
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_module_is_the_formula(G, R, T, causal, bias, seed):
    "Self-attention spelled out with `attention` from the module's own weights."
    torch.manual_seed(seed)
    H, K, D, B = G * R, 4, 10, 2
    mha, x = MultiHeadAttention(D, H, G, d_head=K, bias=bias, scale=.7).double(), torch.randn(B, T, D, dtype=torch.float64)
    q, k, v = (y.unflatten(-1, (-1, K)).transpose(1, 2) for y in mha.qkv(x).split([H * K, G * K, G * K], -1))
    extra = torch.randn(1, H, T, T, dtype=torch.float64)
    rows = torch.rand(B, 1, T, T) < .7
    for mask in (None, rows):
        for b in (None, extra):
            full = (torch.ones(1, 1, T, T, dtype=torch.bool) if mask is None else mask) & (causal_mask(T) if causal else True)
            want = mha.out(attention(q, k, v, full, b, .7)[0].transpose(1, 2).flatten(2))
            assert_close(mha(x, mask, b, is_causal=causal), want, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_cross_attention_is_the_formula(groups):
    "With normalized queries and keys, whose gains differ, biases, a scale and a padded memory."
    torch.manual_seed(0)
    mha = MultiHeadAttention(16, 4, groups, bias=True, cross=True, qk_norm=1e-5, scale=.6).double()
    for p in (mha.q_norm.weight, mha.k_norm.weight): nn.init.uniform_(p, .5, 2)
    x, memory, real = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 7, 16, dtype=torch.float64), padding_mask(torch.tensor([7, 3]), 7)
    def split(y): return y.unflatten(-1, (-1, 4)).transpose(1, 2)
    def normed(y, norm): return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    k, v = mha.kv(memory).chunk(2, -1)
    want = attention(normed(split(mha.q(x)), mha.q_norm), normed(split(k), mha.k_norm), split(v), real, scale=.6)[0]
    assert_close(mha(x, real, memory=memory), mha.out(want.transpose(1, 2).flatten(2)), atol=1e-10, rtol=1e-8)


# ---- the cache

@quick
@given(st.integers(1, 3), st.lists(st.integers(1, 3), min_size=1, max_size=5), st.sampled_from([None, 15, 40]), st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 1000))
def test_cached_equals_uncached(B, pieces, max_len, groups, rotary, seed):
    "In pieces of any length, with left padding, rotary positions and grouped heads, through either kind of cache; two layers."
    torch.manual_seed(seed)
    T = sum(pieces)
    layers = [MultiHeadAttention(16, 4, groups).double() for _ in range(2)]
    x = torch.randn(B, T, 16, dtype=torch.float64)
    n = torch.randint(0, T + 1, (B,))
    real = padding_mask(n, T, 'left')
    places = (real[:, 0, 0].long().cumsum(-1) - 1).clamp(min=0)
    def run(x, start, cache):
        end = start + x.shape[1]
        cos, sin = rope_angles(places[:, start:end], 4)
        for i, layer in enumerate(layers): x = layer(x, real[..., :end], rotate=(lambda t: apply_rope(t, cos.double(), sin.double())) if rotary else None, cache=cache, layer=i, is_causal=True)
        return x
    with torch.no_grad():
        want, cache, start, got = run(x, 0, None), KVCache(max_len), 0, []
        for p in pieces:
            got.append(run(x[:, start:start + p], start, cache))
            start += p
        assert cache.get_seq_length() == T
        assert_close(torch.cat(got, 1), want, atol=1e-10, rtol=1e-8)
        for i in range(B):                                              # and each row equals itself without the padding
            if not n[i]: continue
            y, cos, sin = x[i:i+1, T - n[i]:], *rope_angles(torch.arange(n[i]), 4)
            for layer in layers: y = layer(y, rotate=(lambda t: apply_rope(t, cos.double(), sin.double())) if rotary else None, is_causal=True)
            assert_close(want[i:i+1, T - n[i]:], y, atol=1e-10, rtol=1e-8)


@quick
@given(st.lists(st.sampled_from(['update', 'update', 'crop', 'crop back', 'reorder', 'fewer', 'repeat']), max_size=8), st.integers(0, 1000))
def test_both_caches_follow_the_same_story(story, seed):
    "Any sequence of updates, crops, reorderings and repetitions leaves a growing cache, a preallocated one and plain tensors alike."
    gen = torch.Generator().manual_seed(seed)
    caches, plain = [KVCache(), KVCache(64)], [torch.zeros(2, 3, 2, 0, 4) for _ in range(2)]     # per layer: k and v stacked
    crossed = torch.randn(2, 3, 2, 5, 4, generator=gen)
    for c in caches: c.cross[0] = tuple(crossed.unbind(0))
    for act in ['update', *story, 'update']:
        B, n = plain[0].shape[1], plain[0].shape[3]
        if act == 'update':
            T = int(torch.randint(1, 4, (), generator=gen))
            for layer in range(2):
                new = torch.randn(2, B, 2, T, 4, generator=gen)
                plain[layer] = torch.cat([plain[layer], new], 3)
                for c in caches:
                    for a, b in zip(c.update(*new, layer), plain[layer]): assert torch.equal(a, b)
        elif act == 'crop':
            keep = int(torch.randint(0, n + 3, (), generator=gen))
            plain = [p[:, :, :, :keep] for p in plain]
            for c in caches: c.crop(keep)
        elif act == 'crop back':
            drop = min(n, 2)
            plain = [p[:, :, :, :n - drop] for p in plain]
            for c in caches:
                if drop: c.crop(-drop)
        elif act == 'repeat' and B < 13:
            plain, crossed = [p.repeat_interleave(2, 1) for p in plain], crossed.repeat_interleave(2, 1)
            for c in caches: c.batch_repeat_interleave(2)
        elif act in ('reorder', 'fewer'):
            rows = torch.randint(0, B, (B if act == 'reorder' else max(1, B - 1),), generator=gen)
            plain, crossed = [p[:, rows] for p in plain], crossed[:, rows]
            for c in caches: c.reorder_cache(rows)
        for c in caches:
            assert c.get_seq_length() == plain[0].shape[3]
            assert all(torch.equal(a, b) for a, b in zip(c.cross[0], crossed))


def test_cache_names_are_those_of_transformers():
    "The same calls on DynamicCache give the same tensors."
    ours, theirs = KVCache(8), transformers.DynamicCache()
    for layer in range(2):
        k, v = torch.randn(2, 3, 2, 5, 4).unbind(0)
        for a, b in zip(ours.update(k, v, layer), theirs.update(k, v, layer)): assert torch.equal(a, b)
    rows = torch.tensor([2, 0, 0])
    ours.reorder_cache(rows), theirs.reorder_cache(rows)
    ours.batch_repeat_interleave(2), theirs.batch_repeat_interleave(2)
    ours.crop(-2), theirs.crop(-2)
    assert ours.get_seq_length() == theirs.get_seq_length() == 3
    new = torch.randn(6, 2, 1, 4)
    for a, b in zip(ours.update(new, new, 1), theirs.update(new, new, 1)): assert torch.equal(a, b)


def test_memory_is_projected_once():
    torch.manual_seed(0)
    mha, x, memory = MultiHeadAttention(16, 4, n_kv_heads=2, cross=True, qk_norm=1e-6), torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    calls = []
    mha.kv.register_forward_hook(lambda *a: calls.append(1))
    n, cache = torch.tensor([7, 3]), KVCache()
    with torch.no_grad():
        want = mha(x, padding_mask(n, 7), memory=memory)
        assert not torch.allclose(want, mha(x, memory=memory))
        steps = [mha(x[:, t:t+1], padding_mask(n, 7), cache=cache, layer=3, memory=memory) for t in range(5)]
        assert_close(torch.cat(steps, 1), want, atol=1e-6, rtol=1e-5)
        assert len(calls) == 3 and list(cache.cross) == [3] and cache.get_seq_length() == 0
        cache.reorder_cache(torch.tensor([1, 0]))
        assert_close(mha(x.flip(0), padding_mask(n.flip(0), 7), cache=cache, layer=3), want.flip(0), atol=1e-6, rtol=1e-5)


def test_growing_cache_keeps_gradients():
    torch.manual_seed(0)
    mha, x, cache = MultiHeadAttention(16, 4), torch.randn(1, 4, 16, requires_grad=True), KVCache()
    whole = torch.autograd.grad(mha(x, is_causal=True).square().sum(), x)[0]
    steps = torch.cat([mha(x[:, t:t+1], cache=cache, is_causal=True) for t in range(4)], 1)
    assert_close(torch.autograd.grad(steps.square().sum(), x)[0], whole, atol=1e-5, rtol=1e-4)


def test_prompt_in_full_then_steps_uses_the_fused_causal_kernel():
    mha, cache, x = MultiHeadAttention(16, 4, n_kv_heads=2).eval(), KVCache(32), torch.randn(2, 12, 16)
    with torch.inference_mode():
        assert attention_kernels(lambda: mha(x, cache=cache, is_causal=True)) == ['flash']
        assert attention_kernels(lambda: mha(x[:, :1], cache=cache, is_causal=True)) == ['flash']
    assert cache.get_seq_length() == 13


# ---- bad input

q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
BAD = {
    'rank of q': (lambda: attention(q[0], k, k), 'q is'), 'width of k': (lambda: attention(q, k[..., :4], k), 'k is'), 'length of v': (lambda: sdpa(q, k, k[:, :, :3]), 'v is'),
    'batch of k': (lambda: sdpa(q, k[:1], k[:1]), 'k is'), 'heads': (lambda: sdpa(q[:, :3], k, k), '3 heads'), 'no heads left': (lambda: attention(q, k.repeat(1, 4, 1, 1), k.repeat(1, 4, 1, 1)), '4 heads'),
    'float mask': (lambda: sdpa(q, k, k, torch.ones(2, 1, 5, 7)), 'torch.bool'), 'int mask': (lambda: attention(q, k, k, torch.ones(2, 1, 5, 7, dtype=torch.long)), 'torch.bool'),
    '(B,T,S) mask': (lambda: attention(q, k, k, torch.ones(2, 5, 7, dtype=torch.bool)), '4 dimensions'), '(B,S) mask': (lambda: sdpa(q, k, k, torch.ones(2, 7, dtype=torch.bool)), '4 dimensions'),
    'mask of another length': (lambda: sdpa(q, k, k, causal_mask(5)), r'\(2, 4, 5, 7\)'), 'boolean bias': (lambda: sdpa(q, k, k, bias=torch.ones(5, 7, dtype=torch.bool)), 'bias'),
    'shape of bias': (lambda: attention(q, k, k, bias=torch.ones(2, 5, 7)), 'bias'), 'causal with mask': (lambda: sdpa(q, q, q, causal_mask(5), is_causal=True), 'is_causal'),
    'causal, unequal': (lambda: sdpa(q, k, k, is_causal=True), 'is_causal'), 'dropout': (lambda: sdpa(q, k, k, dropout=1.), 'dropout'),
    'causal_mask': (lambda: causal_mask(3, 2), 'S is 2'), 'T of 0': (lambda: causal_mask(0), 'at least T'), 'window': (lambda: sliding_mask(4, 0), 'window is 0'), 'window 1.5': (lambda: sliding_mask(4, 1.5), 'window is 1.5'),
    'lengths': (lambda: padding_mask(torch.tensor([7]), 6), 'lengths'), 'float lengths': (lambda: padding_mask(torch.tensor([2.]), 6), 'lengths'), 'list of lengths': (lambda: padding_mask([2], 6), 'lengths'),
    'side': (lambda: padding_mask(torch.tensor([2]), 6, 'top'), 'side'), 'prefix': (lambda: prefix_lm_mask(torch.tensor([-1]), 6), 'prefix_lengths'), 'segments': (lambda: segment_mask(torch.zeros(4)), 'segment_ids'),
    'kind': (lambda: unilm_mask('s2s', 4), 's2s'), 'no source': (lambda: unilm_mask('sequence-to-sequence', 4), 'source_lengths'), 'needless source': (lambda: unilm_mask('bidirectional', 4, torch.tensor([1])), 'source_lengths'),
    'n_heads': (lambda: MultiHeadAttention(30, 4), 'n_heads is 4'), 'n_heads of 0': (lambda: MultiHeadAttention(32, 0), 'n_heads is 0'), 'n_kv_heads': (lambda: MultiHeadAttention(32, 4, 3), 'n_kv_heads is 3'),
    'n_kv_heads of 0': (lambda: MultiHeadAttention(32, 4, 0), 'n_kv_heads is 0'), 'd_head': (lambda: MultiHeadAttention(32, 4, d_head=0), 'd_head'), 'dropout of 1': (lambda: MultiHeadAttention(32, 4, dropout=1), 'dropout'),
    'x': (lambda: MultiHeadAttention(32, 4)(torch.zeros(2, 5, 31)), 'x is'), 'rank of x': (lambda: MultiHeadAttention(32, 4)(torch.zeros(5, 32)), 'x is'),
    'mask of module': (lambda: MultiHeadAttention(32, 4)(torch.zeros(2, 5, 32), torch.ones(2, 5, 5, dtype=torch.bool)), '4 dimensions'),
    'mask, causal': (lambda: MultiHeadAttention(32, 4)(torch.zeros(2, 5, 32), torch.ones(1, 5, 5, dtype=torch.bool), is_causal=True), '4 dimensions'),
    'no memory': (lambda: MultiHeadAttention(32, 4, cross=True)(torch.zeros(2, 5, 32)), 'memory'), 'memory of self': (lambda: MultiHeadAttention(32, 4)(torch.zeros(2, 5, 32), memory=torch.zeros(2, 5, 32)), 'memory'),
    'rows of memory': (lambda: MultiHeadAttention(32, 4, cross=True)(torch.zeros(2, 5, 32), memory=torch.zeros(3, 5, 32)), 'memory'), 'causal cross': (lambda: MultiHeadAttention(32, 4, cross=True)(torch.zeros(2, 5, 32), memory=torch.zeros(2, 5, 32), is_causal=True), 'is_causal'),
    'layer': (lambda: KVCache().update(k, k, 1), 'layer is 1'), 'max_len': (lambda: KVCache(0), 'max_len'), 'full': (lambda: KVCache(6).update(k, k, 0), 'max_len = 6'), 'crop': (lambda: KVCache().crop(-1), 'max_length'),
    'rows': (lambda: KVCache().reorder_cache(torch.tensor([.5])), 'rows'), 'repeats': (lambda: KVCache().batch_repeat_interleave(0), 'n is 0'), 'gradient': (lambda: KVCache(9).update(k.clone().requires_grad_(), k, 0), 'no_grad'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input(name):
    call, words = BAD[name]
    with pytest.raises(LmnotesError, match=words): call()


def test_a_refused_update_changes_nothing():
    cache = KVCache(8)
    cache.update(k, k, 0)
    for bad in (k, k[:1, :, :1]):
        with pytest.raises(LmnotesError): cache.update(bad, bad, 0)
        assert cache.get_seq_length() == 7
    one = torch.randn(2, 2, 1, 8)
    assert torch.equal(cache.update(one, one, 0)[0], torch.cat([k, one], 2))


def test_no_graph_break():
    "Prompt, masks, cross-attention and a cached step compile as one graph (checked with torch's own frontend, no compiler needed)."
    torch.manual_seed(0)
    mha, cross, x = MultiHeadAttention(16, 4, n_kv_heads=2, qk_norm=1e-6).eval(), MultiHeadAttention(16, 4, cross=True).eval(), torch.randn(2, 6, 16)
    mask = padding_mask(torch.tensor([6, 4]), 6)
    for f in (lambda x: mha(x, is_causal=True), lambda x: mha(x, mask, is_causal=True), lambda x: cross(x, memory=x), lambda x: mha(x, bias=x[:, None, :, :6])):
        torch._dynamo.reset()
        assert_close(torch.compile(f, backend='eager', fullgraph=True)(x), f(x), atol=1e-6, rtol=1e-5)
    for max_len in (None, 8):
        def two_steps(x):
            cache = KVCache(max_len)
            return mha(x[:, :5], cache=cache, is_causal=True), mha(x[:, 5:], cache=cache, is_causal=True)
        torch._dynamo.reset()
        with torch.no_grad(): assert_close(torch.compile(two_steps, backend='eager', fullgraph=True)(x), two_steps(x), atol=1e-6, rtol=1e-5)


# ---- captured weights

def tiny(family, **extra):
    torch.manual_seed(0)
    t, shape = transformers, dict(vocab_size=31, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    small = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=8)
    make = dict(
        ours=lambda: llama(vocab_size=31, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2),
        llama=lambda: t.LlamaForCausalLM(t.LlamaConfig(**shape, **small, num_key_value_heads=2, **extra)),
        gpt2=lambda: t.GPT2LMHeadModel(t.GPT2Config(**shape, n_embd=24, n_layer=2, n_head=4, **extra)),
        bert=lambda: t.BertModel(t.BertConfig(**shape, **small, **extra)),
        t5=lambda: t.T5ForConditionalGeneration(t.T5Config(**shape, d_model=24, d_kv=6, d_ff=8, num_layers=2, num_heads=4, decoder_start_token_id=0, **extra)),
        bart=lambda: t.BartForConditionalGeneration(t.BartConfig(**shape, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=8, decoder_ffn_dim=8, **extra)))
    return make[family]().eval()


def inputs(family, B=2, T=7):
    ids, real = torch.randint(3, 31, (B, T), generator=torch.Generator().manual_seed(0)), torch.ones(B, T, dtype=torch.long)
    real[0, :3] = 0
    return dict(input_ids=ids, attention_mask=real) | (dict(decoder_input_ids=ids[:, :5]) if family in ('t5', 'bart') else {})


def state(model):
    "What capturing must leave as it was."
    return ([m.config._attn_implementation for m in model.modules() if hasattr(m, 'set_attn_implementation')], [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()], model.training)


@pytest.mark.parametrize('family', ['ours', 'llama', 'gpt2', 'bert', 't5', 'bart'])
@pytest.mark.parametrize('mode', ['sdpa', 'eager'])
def test_captured_weights_are_the_models(family, mode):
    "They are those that the eager model returns, the output is the fused model's bit for bit, and the model is left as it was."
    model, batch = tiny(family), inputs(family)
    with torch.no_grad():
        if family != 'ours': model.set_attn_implementation('sdpa')
        want = model(**batch)
        if family != 'ours': model.set_attn_implementation(mode)
        before = state(model)
        with capture_attention(model) as seen: out = model(**batch)
        assert state(model) == before
        assert torch.equal(out.logits if hasattr(out, 'logits') else out[0], want.logits if hasattr(want, 'logits') else want[0])
        assert seen.difference < 1e-5
        if family == 'ours':
            assert len(seen.names()) == len(seen.calls) == 2 and all('attention' in n for n in seen.names())
            return
        model.set_attn_implementation('eager')
        eager = model(**batch, output_attentions=True)
    groups = dict(encoder=('encoder_attentions', 'encoder', 'self'), decoder=('decoder_attentions', 'decoder', 'self'), cross=('cross_attentions', 'decoder', 'cross')) if family in ('t5', 'bart') else dict(all=('attentions', '', 'self'))
    for field, part, kind in groups.values():
        ours = [c for c in seen.calls if c.kind == kind and part in c.name]
        assert len(ours) == len(eager[field]) == 2
        for c, w in zip(ours, eager[field]):
            rows = w.isfinite().all(-1) & (c.weights.sum(-1) > 0)           # rows of padding that read nothing are the mask's business
            assert rows.any() and (rows.any(1)).any(-1).all()
            assert_close(c.weights[rows], w[rows], atol=1e-5, rtol=1e-4)


def test_captured_from_our_model_are_the_formula():
    model, batch = tiny('ours'), inputs('ours')
    with torch.no_grad(), capture_attention(model) as seen: model(**batch)
    w = seen.calls[0].weights
    assert w.shape == (2, 4, 7, 7) and not w[0, :, 3:, :3].any() and not w.triu(1).any()
    assert_close(w[1].sum(-1), torch.ones(4, 7))


def test_layers_and_heads():
    model, batch = tiny('bart'), inputs('bart')
    with torch.no_grad():
        with capture_attention(model, layers=[1], heads=[2, 0]) as some: model(**batch)
        with capture_attention(model, layers=['model.encoder', 'model.decoder.layers.0.encoder_attn']) as named: model(**batch)
        with capture_attention(model) as every: model(**batch)
    assert [c.name for c in some.calls] == ['model.encoder.layers.1.self_attn', 'model.decoder.layers.1.self_attn', 'model.decoder.layers.1.encoder_attn']
    for c in some.calls: assert torch.equal(c.weights, every[c.name][:, [2, 0]])
    assert [(c.name.split('.')[1], c.kind) for c in named.calls] == [('encoder', 'self'), ('encoder', 'self'), ('decoder', 'cross')]
    assert 'difference' in repr(every) and len(repr(every).splitlines()) == 7


def test_generation_is_captured_step_by_step():
    model = tiny('llama')
    with torch.no_grad():
        ids = inputs('llama')['input_ids'][:1]
        want = model.generate(ids, max_new_tokens=4, do_sample=False)
        with capture_attention(model, layers=[0]) as seen: out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(out, want)
    assert [tuple(c.weights.shape[2:]) for c in seen.calls][:2] == [(7, 7), (1, 8)] and seen.difference < 1e-5


def test_capture_with_dropout_bf16_and_gradients():
    model, batch = tiny('gpt2', attn_pdrop=.1).train(), inputs('gpt2')
    with capture_attention(model) as seen: model(**batch).logits.sum().backward()
    assert math.isnan(seen.difference) and model.training and not seen.calls[0].weights.requires_grad
    assert model.transformer.h[0].attn.c_attn.weight.grad.abs().sum() > 0
    model = tiny('llama').bfloat16()
    with torch.no_grad(), capture_attention(model) as seen: model(**inputs('llama'))
    assert seen.calls[0].weights.dtype == torch.float32 and 0 < seen.difference < 1e-2


def test_restored_when_the_body_raises():
    model = tiny('t5')
    model.set_attn_implementation('eager')
    before = state(model)
    with pytest.raises(ZeroDivisionError), capture_attention(model): raise ZeroDivisionError
    assert state(model) == before
    broken = copy.deepcopy(model)
    broken.encoder.block[1].forward = lambda *a, **kw: 1 / 0
    with pytest.raises(ZeroDivisionError), capture_attention(broken): broken(**inputs('t5'))
    assert state(broken) == before
    with torch.no_grad(), capture_attention(model) as seen: model(**inputs('t5'))      # and it works again
    assert len(seen.calls) == 6


def test_what_cannot_be_captured_is_refused_by_name():
    class Plain(nn.Module):
        def forward(self, x): return x.softmax(-1)
    with pytest.raises(LmnotesError, match='Plain.*called inside'), capture_attention(Plain()): Plain()(torch.zeros(2))
    model = Plain()
    with pytest.raises(LmnotesError, match='Plain.*scaled_dot_product_attention'), capture_attention(model): model(torch.zeros(2))
    with pytest.raises(LmnotesError, match='called inside the block'), capture_attention(tiny('ours')): pass
    xlnet = transformers.XLNetModel(transformers.XLNetConfig(vocab_size=31, d_model=24, n_layer=1, n_head=4, d_inner=8))
    before = state(xlnet)
    with pytest.raises(LmnotesError, match='XLNetModel'), capture_attention(xlnet): xlnet(torch.ones(1, 3, dtype=torch.long))
    assert state(xlnet) == before
    ours, ids = tiny('ours'), torch.ones(1, 3, dtype=torch.long)
    for kw, words in ((dict(layers=[7]), 'layers is 7'), (dict(layers=['encoder']), 'encoder'), (dict(heads=[4]), 'heads is 4')):
        with pytest.raises(LmnotesError, match=words), capture_attention(ours, **kw): ours(ids)
    with pytest.raises(LmnotesError, match='compiled'), capture_attention(torch.compile(ours, backend='eager')): pass
    with torch.no_grad(), capture_attention(ours) as seen: ours(ids)
    with pytest.raises(LmnotesError, match='blocks.1.attention|decoder'): seen['nothing']
    with pytest.raises(LmnotesError, match='layers.*blocks.1.attention'), capture_attention(ours, layers=['embed']): ours(ids)


@pytest.mark.parametrize('max_len', [None, 9])
def test_autocast(max_len):
    "Mixed precision mixes dtypes of queries, values, masks and biases; outputs stay near those of float32, cached and not."
    torch.manual_seed(0)
    mha, x, bias = MultiHeadAttention(32, 4, 2, qk_norm=1e-6), torch.randn(2, 7, 32), torch.randn(1, 4, 7, 7)
    real, (cos, sin) = padding_mask(torch.tensor([7, 3]), 7), rope_angles(torch.arange(7)[None], 8)
    def run(t, cache=None):
        return mha(x[:, t], real[..., :t.stop], bias[:, :, t, :t.stop], lambda u: apply_rope(u, cos[..., t, :], sin[..., t, :]), cache, is_causal=True)
    with torch.no_grad():
        want = run(slice(0, 7))
        with torch.autocast('cpu', torch.bfloat16):
            cache = KVCache(max_len)
            for y in (run(slice(0, 7)), torch.cat([run(slice(t, t + 1), cache) for t in range(7)], 1)):
                assert y.dtype == torch.bfloat16
                assert_close(y.float(), want, atol=2e-2, rtol=2e-2)
