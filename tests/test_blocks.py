"lmnotes.blocks against torch and transformers, over random sizes and number formats; checks that fail when the formula is changed."
import copy, io, random

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lmnotes.blocks import ACTIVATIONS, FeedForward, RMSNorm, layer_norm, rms_norm
from lmnotes.core import LmnotesError, UnknownNameError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 2, 3, 8, 33, 64, 577]


def drawn(seed, *shape, dtype=torch.float32, scale=1.):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def reference_rms(d, eps, dtype, weight):
    "The RMS norm of a tiny Llama."
    config = transformers.LlamaConfig(vocab_size=8, hidden_size=d, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=2, rms_norm_eps=eps, pad_token_id=0)
    norm = transformers.LlamaModel(config).norm.to(dtype)
    with torch.no_grad(): norm.weight.copy_(weight)
    return norm


# ---------------------------------------------------------------- norms

@pytest.mark.parametrize('dtype', DTYPES[1:])
@pytest.mark.parametrize('d', WIDTHS)
def test_rms_norm_is_bit_equal_to_llama(d, dtype):
    for seed, (scale, eps) in enumerate([(1., 1e-6), (5., 1e-5), (1e-3, 1e-6), (300., 1e-5)]):
        x, w = drawn(seed, 3, 5, d, dtype=dtype, scale=scale), drawn(seed + 50, d, dtype=dtype)
        ours, theirs = RMSNorm(d, eps).to(dtype), reference_rms(d, eps, dtype, w)
        ours.load_state_dict(theirs.state_dict())
        want = theirs(x)
        assert want.isfinite().all()
        assert torch.equal(ours(x), want) and torch.equal(rms_norm(x, w, eps), want)


@pytest.mark.parametrize('dtype', DTYPES[1:])
def test_gradients_of_rms_norm_equal_llamas(dtype):
    w, ours, theirs = drawn(1, 24, dtype=dtype), RMSNorm(24, 1e-5).to(dtype), reference_rms(24, 1e-5, dtype, drawn(1, 24, dtype=dtype))
    ours.load_state_dict({'weight': w})
    a, b = (drawn(2, 4, 6, 24, dtype=dtype).requires_grad_() for _ in range(2))
    up = drawn(3, 4, 6, 24, dtype=dtype)
    ours(a).backward(up); theirs(b).backward(up)
    assert_close(a.grad, b.grad); assert_close(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize('d', WIDTHS)
def test_norms_in_float64(d):
    x, w, b = drawn(0, 4, d, dtype=torch.float64), drawn(1, d, dtype=torch.float64), drawn(2, d, dtype=torch.float64)
    exact = lambda c, g, h: g * c / (c.square().mean(-1, keepdim=True) + 1e-5).sqrt() + h
    assert_close(rms_norm(x, w, 1e-5), exact(x, w, 0), atol=1e-13, rtol=1e-13)
    assert_close(RMSNorm(d, 1e-5).double()(x), exact(x, 1, 0), atol=1e-13, rtol=1e-13)
    assert_close(layer_norm(x, w, b, 1e-5), exact(x - x.mean(-1, keepdim=True), w, b), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('d', WIDTHS[1:])
def test_layer_norm_equals_torch(d, dtype):
    x, w, b = drawn(0, 3, 5, d, dtype=dtype, scale=4) + 1, drawn(1, d, dtype=dtype), drawn(2, d, dtype=dtype)
    for weight, bias in ((w, b), (w, None), (None, b), (None, None)): assert_close(layer_norm(x, weight, bias), F.layer_norm(x, (d,), weight, bias))
    assert_close(rms_norm(x), F.rms_norm(x, (d,), eps=1e-6))


def test_gradcheck():
    x, w, b = (drawn(s, *shape, dtype=torch.float64).requires_grad_() for s, shape in enumerate([(2, 5), (5,), (5,)]))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, w))
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm(x, w, b, 1e-5), (x, w, b))
    for name in ACTIVATIONS:
        for gated in (True, False):
            ff = FeedForward(5, 3, name, gated, bias=True).double()
            assert torch.autograd.gradcheck(ff, x + .1)


def test_zero_vectors_and_large_ones():
    for norm in (lambda x: rms_norm(x, torch.ones(6)), lambda x: layer_norm(x, torch.ones(6)), RMSNorm(6)):
        assert torch.equal(norm(torch.zeros(2, 6)), torch.zeros(2, 6))
        assert norm(torch.zeros(0, 6)).shape == (0, 6)
    x = torch.tensor([[60000., 1., -2., 0.]], dtype=torch.float16)             # its square overflows float16
    for norm in (lambda x: rms_norm(x, torch.ones(4).half()), RMSNorm(4).half()):
        assert_close(norm(x)[0, 0].item(), 2., atol=1e-2, rtol=0)


@pytest.mark.parametrize('weight', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('stream', DTYPES)
def test_result_keeps_the_dtype_of_x(stream, weight):
    x = drawn(0, 2, 8, dtype=stream)
    w = drawn(1, 8).to(weight)
    m = RMSNorm(8).to(weight)
    assert rms_norm(x, w).dtype == layer_norm(x, w).dtype == m(x).dtype == stream
    m.load_state_dict({'weight': w})
    assert_close(m(x), rms_norm(x, w))


def test_norm_does_not_mind_layout_and_leaves_its_arguments_alone():
    x = drawn(0, 6, 4, 5).transpose(0, 2)                                      # not contiguous
    w = drawn(1, 6); before = x.clone(), w.clone()
    m = RMSNorm(6); m.load_state_dict({'weight': w})
    assert_close(m(x), m(x.contiguous())); assert_close(rms_norm(x, w), m(x)); layer_norm(x, w)
    assert torch.equal(x, before[0]) and torch.equal(w, before[1])


# ---------------------------------------------------------------- feed-forward

def reference_ff(family, d, f, bias):
    "A tiny model's feed-forward layer, and the arguments of ours."
    c, one = transformers, dict(num_hidden_layers=1, num_attention_heads=1)
    if family == 'llama':
        config = c.LlamaConfig(vocab_size=8, hidden_size=d, intermediate_size=f, head_dim=2, mlp_bias=bias, pad_token_id=0, **one)
        return c.LlamaModel(config).layers[0].mlp, dict(activation='silu', bias=bias)
    if family == 'gpt2':
        config = c.GPT2Config(vocab_size=8, n_embd=d, n_inner=f, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
        return c.GPT2Model(config).h[0].mlp, dict(activation='gelu_tanh', gated=False, bias=True)
    if family == 'bert':
        layer = c.BertModel(c.BertConfig(vocab_size=8, hidden_size=d, intermediate_size=f, **one)).encoder.layer[0]
        return nn.Sequential(layer.intermediate, layer.output.dense), dict(activation='gelu', gated=False, bias=True)
    kind = dict(t5='relu', t5_gated='gated-gelu', t5_silu='gated-silu')[family]
    config = c.T5Config(vocab_size=8, d_model=d, d_ff=f, d_kv=2, num_heads=1, num_layers=1, feed_forward_proj=kind, decoder_start_token_id=0)
    activation = dict(t5='relu', t5_gated='gelu_tanh', t5_silu='silu')[family]
    return c.T5EncoderModel(config).encoder.block[0].layer[1].DenseReluDense, dict(activation=activation, gated=family != 't5')


PARTS = dict(llama=(['gate_proj', 'up_proj'], 'down_proj'), gpt2=(['c_fc'], 'c_proj'), bert=(['0.dense'], '1'), t5=(['wi'], 'wo'), t5_gated=(['wi_0', 'wi_1'], 'wo'),
             t5_silu=(['wi_0', 'wi_1'], 'wo'))


def pair(family, seed, order=1, **change):
    "The reference with random weights, ours with the same weights, and an input; odd sizes. order=-1 swaps gate and up."
    r, g = random.Random(f'{family}{seed}'), torch.Generator().manual_seed(seed)
    d, f = r.randint(2, 40), r.randint(2, 70)
    theirs, kwargs = reference_ff(family, d, f, bias=bool(seed % 2))
    ours = FeedForward(d, f, **kwargs | change).eval()
    up, down = PARTS[family]
    with torch.no_grad():
        for p in theirs.parameters(): p.copy_(torch.randn(p.shape, generator=g) * d**-.5)
        p = {n: w.T if family == 'gpt2' and w.ndim == 2 else w for n, w in theirs.named_parameters()}
        for kind in ('weight', 'bias') if kwargs.get('bias') else ('weight',):
            getattr(ours.up, kind).copy_(torch.cat([p[f'{n}.{kind}'] for n in up[::order]]))
            getattr(ours.down, kind).copy_(p[f'{down}.{kind}'])
    return ours, theirs.eval(), torch.randn(2, 3, d, generator=g)


def apart(ours, theirs, x):
    "Largest difference, as a part of the largest number."
    with torch.no_grad(): a, b = ours(x), theirs(x)
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('family', PARTS)
def test_feed_forward_equals_transformers(family, seed):
    ours, theirs, x = pair(family, seed)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = ours(a), theirs(b)
    assert_close(y, want, atol=1e-5, rtol=1e-5)
    y.square().sum().backward(); want.square().sum().backward()
    assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)
    assert apart(ours.bfloat16(), theirs.bfloat16(), x.bfloat16()) < 2e-2


@pytest.mark.parametrize('family,bug', [('gpt2', dict(activation='gelu')), ('bert', dict(activation='gelu_tanh')), ('llama', dict(activation='gelu')), ('llama', dict(order=-1)),
                                        ('t5', dict(activation='gelu')), ('t5_gated', dict(activation='gelu')), ('t5_gated', dict(order=-1)), ('t5_silu', dict(activation='relu'))])
def test_the_comparison_sees_a_wrong_layer(family, bug):
    assert max(apart(*pair(family, seed, **bug)) for seed in range(20)) > 1e-4


def test_activations_equal_transformers():
    from transformers.activations import ACT2FN
    z = torch.linspace(-8, 8, 4001)
    for ours, theirs in dict(relu='relu', gelu='gelu', gelu_tanh='gelu_new', silu='silu').items(): assert_close(ACTIVATIONS[ours](z), ACT2FN[theirs](z), atol=1e-6, rtol=1e-5)
    assert_close(ACTIVATIONS['gelu_tanh'](z), ACT2FN['gelu_pytorch_tanh'](z))
    assert 4.7e-4 < (ACTIVATIONS['gelu'](z) - ACTIVATIONS['gelu_tanh'](z)).abs().max() < 4.8e-4


def test_gated_layer_at_two_thirds_has_as_many_weights():
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(FeedForward(48, 128)) == count(FeedForward(48, 192, gated=False))
    assert {n: tuple(p.shape) for n, p in FeedForward(8, 5, bias=True).named_parameters()} == {'up.weight': (10, 8), 'up.bias': (10,), 'down.weight': (8, 5), 'down.bias': (8,)}


def test_dropout_only_in_training_and_at_its_rate():
    ff = FeedForward(4, 20_000, 'relu', gated=False, dropout=.3)
    with torch.no_grad(): ff.up.weight.fill_(1), ff.down.weight.fill_(1)
    x = torch.full((1, 4), .25)                                                # every inner unit is 1, so the output counts those kept
    torch.manual_seed(0)
    kept = ff(x)[0, 0].item() * .7
    assert abs(kept - 14_000) < 5 * (20_000 * .3 * .7)**.5
    assert not torch.equal(ff(x), ff(x))
    ff.eval()
    assert torch.equal(ff(x), ff(x)) and ff(x)[0, 0] == 20_000
    plain = FeedForward(4, 8)
    assert plain.training and torch.equal(plain(x), plain(x))                  # no dropout asked for, none in training


def test_copies_and_files():
    ff, norm = FeedForward(6, 4, 'gelu_tanh', dropout=.1).eval(), RMSNorm(6, 1e-3)
    x, file = torch.randn(2, 6), io.BytesIO()
    assert torch.equal(copy.deepcopy(ff)(x), ff(x)) and torch.equal(copy.deepcopy(norm)(x), norm(x))
    torch.save({'ff': ff.state_dict(), 'norm': norm.state_dict()}, file); file.seek(0)
    back = torch.load(file, weights_only=True)
    other = FeedForward(6, 4, 'gelu_tanh'); other.load_state_dict(back['ff'])
    assert torch.equal(other.eval()(x), ff(x))
    assert 'gelu_tanh' in repr(ff) and '0.001' in repr(norm)


def test_autocast_keeps_the_stream_in_float32():
    ff, norm, x = FeedForward(16, 24), RMSNorm(16), torch.randn(2, 16)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert norm(x).dtype == torch.float32 and (x + ff(norm(x))).dtype == torch.float32
        assert_close(norm(x), rms_norm(x, norm.weight))


@pytest.mark.parametrize('bad,said', [
    (lambda: FeedForward(8, 16, 'swish'), 'Known: gelu, gelu_tanh, relu, silu'), (lambda: FeedForward(8, 16, None), 'activation'), (lambda: FeedForward(0, 16), 'd_model is 0'),
    (lambda: FeedForward(8, -1), 'd_ff is -1'), (lambda: FeedForward(8, 16, dropout=1.), 'dropout is 1.0'), (lambda: FeedForward(8, 16, dropout=-.1), 'dropout is -0.1'),
    (lambda: FeedForward(8, 16, dropout=float('nan')), 'dropout is nan'), (lambda: RMSNorm(0), 'd_model is 0'), (lambda: RMSNorm(4, eps=-1.), 'eps is -1.0'),
    (lambda: RMSNorm(4, eps=float('nan')), 'eps is nan'), (lambda: rms_norm(torch.ones(2, 8), torch.ones(4)), 'weight is (4,)'),
    (lambda: rms_norm(torch.ones(2, 8), torch.ones(8), -1e-6), 'eps is'), (lambda: layer_norm(torch.ones(2, 8), torch.ones(8), torch.ones(1)), 'bias is (1,)'),
    (lambda: layer_norm(torch.ones(2, 8), torch.ones(2, 8)), 'weight is (2, 8)')])
def test_bad_arguments(bad, said):
    with pytest.raises(LmnotesError) as e: bad()
    assert said in str(e.value)
    with pytest.raises(UnknownNameError): FeedForward(8, 16, 'geluu')
