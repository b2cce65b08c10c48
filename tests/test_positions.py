"""Position encodings against the reference library, on random settings: every rotary scaling, T5's buckets, ALiBi's slopes."""
import math, random

import pytest
import torch
from torch.testing import assert_close

from lmnotes.attention import attention, causal_mask
from lmnotes.core import LmnotesError
from lmnotes.positions import (alibi, alibi_slopes, apply_rope, relative_buckets, rope, rope_angles, rope_layout, rope_speeds,
                               sinusoidal)

rng = random.Random(0)

def random_scaling(kind):
    "Fields as a published configuration would have them, with odd numbers in"
    factor, original = rng.choice([1., 1.5, 2, 3.7, 8., 40.]), rng.choice([5, 16, 100, 333, 2048, 4096, 8192])
    s = dict(rope_type=kind)
    if kind != 'default': s['factor'] = factor
    if kind in ('dynamic', 'llama3', 'yarn'): s['original_max_position_embeddings'] = original
    if kind == 'llama3': s.update(low_freq_factor=(low := rng.choice([.5, 1., 1.3])), high_freq_factor=low + rng.choice([.25, 3., 7.]))
    if kind == 'yarn':
        if rng.random() < .5: s.update(beta_slow=(slow := rng.choice([1, .7, 2.])), beta_fast=slow + rng.choice([0, .5, 31., 60.]))
        if rng.random() < .3: s['truncate'] = rng.random() < .5
        if rng.random() < .3: s['attention_factor'] = rng.choice([.8, 1., 1.3])
        if rng.random() < .3: s['mscale'] = rng.choice([.7, 1.])
        if rng.random() < .5: s['mscale_all_dim'] = rng.choice([.5, 1.])
    return s

def reference_angles(scaling, theta, width, positions):
    "What transformers' Llama turns by: cosines and sines (B,T,K/2) in float32"
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    original = scaling.get('original_max_position_embeddings', 2048)
    given = {k: v for k, v in scaling.items() if scaling['rope_type'] != 'dynamic' or k != 'original_max_position_embeddings'}
    longest = original if scaling['rope_type'] == 'dynamic' else int(original * scaling.get('factor', 1)) + 1
    config = LlamaConfig(hidden_size=3 * width, num_attention_heads=3, head_dim=width, max_position_embeddings=longest,
                         rope_parameters=dict(given, rope_theta=theta))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    return cos.chunk(2, -1)[0], sin.chunk(2, -1)[0]

@pytest.mark.parametrize('kind', ['default', 'linear', 'dynamic', 'llama3', 'yarn'])
def test_rotary_scalings_equal_llama(kind):
    for _ in range(40):
        scaling, theta = random_scaling(kind), rng.choice([10_000., 500_000., 1234.5])
        width = rng.choice([4, 6, 10, 32, 64, 128, 66])
        positions = torch.tensor([sorted(rng.sample(range(9000), 12)), list(range(12))])
        cos, sin = rope_angles(positions, width, theta, scaling)
        for ours, theirs in zip((cos[:, 0], sin[:, 0]), reference_angles(scaling, theta, width, positions)):
            assert_close(ours, theirs, atol=1e-6, rtol=0, msg=lambda m: f'{m}\n{scaling} {theta} {width}')
        again, _ = rope_angles(positions, width, None, dict(scaling, rope_theta=theta))          # the base from the configuration
        assert_close(again, cos, atol=0, rtol=0)

def test_a_change_of_any_field_changes_the_angles():
    "The comparison above would notice: each field of each type matters"
    base = dict(linear=dict(factor=4.), dynamic=dict(factor=4., original_max_position_embeddings=256),
                llama3=dict(factor=4., original_max_position_embeddings=256, low_freq_factor=1., high_freq_factor=4.),
                yarn=dict(factor=4., original_max_position_embeddings=4096, beta_fast=32., beta_slow=1.))
    p = torch.arange(0, 9000, 13)
    for kind, fields in base.items():
        before = rope_angles(p, 64, 1e4, dict(fields, rope_type=kind))[0]
        assert not torch.allclose(before, rope_angles(p, 64, 1e4)[0], atol=.1)
        for name, value in fields.items():
            after = rope_angles(p, 64, 1e4, dict(fields, rope_type=kind, **{name: value * 2}))[0]
            assert not torch.allclose(before, after, atol=.01), (kind, name)

def test_turn_equals_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k = (torch.randn(2, 3, 7, 10).to(dtype) for _ in range(2))
        positions = torch.randint(300, (2, 7))
        cos, sin = rope_angles(positions, 10)
        theirs = apply_rotary_pos_emb(q, k, *(torch.cat((c, c), -1)[:, 0].to(dtype) for c in (cos, sin)))
        for x, y in zip((q, k), theirs):
            ours = rope(x, positions)
            assert ours.dtype == dtype
            assert_close(ours, y, atol=1e-6 if dtype == torch.float32 else .02, rtol=1e-5 if dtype == torch.float32 else .02)

def test_turn_equals_the_complex_product_of_the_interleaved_layout():
    "Meta's own code multiplies neighboring numbers, read as complex ones"
    x, p = torch.randn(2, 3, 9, 14, dtype=torch.float64), torch.arange(9, dtype=torch.float64)
    speeds, _ = rope_speeds(14, dtype=torch.float64)
    unit = torch.polar(torch.ones(9, 7, dtype=torch.float64), p[:, None] * speeds)
    theirs = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (7, 2))) * unit).flatten(-2)
    ours = rope_layout(rope(rope_layout(x, None, 'half-split'), p), None, 'interleaved')
    assert_close(ours, theirs, atol=1e-12, rtol=0)

def test_layout_of_weights():
    for heads, width in ((1, 2), (3, 8), (4, 10)):
        w = torch.randn(heads * width, 5)
        for a, b in (('half-split', 'interleaved'), ('interleaved', 'half-split')):
            assert torch.equal(rope_layout(rope_layout(w, heads, a), heads, b), w)
            assert torch.equal(rope_layout(w[:, 0], heads, a), rope_layout(w, heads, a)[:, 0])             # a bias
        x = torch.randn(2, 6, 5)
        split = lambda w: (x @ w.T).view(2, 6, heads, width).transpose(1, 2)
        assert_close(split(rope_layout(w, heads, 'interleaved')), rope_layout(split(w), None, 'interleaved'))
    meta = torch.arange(24.)[:, None].expand(24, 5)                  # the permutation of the script that converts Llama's weights
    permuted = meta.view(3, 4, 2, 5).transpose(1, 2).reshape(24, 5)
    assert torch.equal(rope_layout(meta, 3, 'half-split'), permuted)

def test_precision_of_long_places():
    p = torch.tensor([0, 1, 1000, 100_000, 1_000_000])
    exact, single = rope_angles(p.double(), 64)[0], rope_angles(p, 64)[0]
    assert exact.dtype == torch.float64 and single.dtype == torch.float32
    reference = torch.tensor([[math.cos(m * 10_000. ** (-2 * i / 64)) for i in range(32)] for m in p.tolist()], dtype=torch.float64)
    assert_close(exact, reference, atol=1e-9, rtol=0)
    error = (single.double() - exact).abs().amax(-1)
    assert error[1] < 1e-6 and error[2] < 2e-4 and error[3] < 2e-2 and error[4] < .2

def test_sinusoidal_is_exact_far_out():
    table = sinusoidal(100_001, 6)
    for place in (0, 1, 17, 65_537, 99_999, 100_000):
        want = [f(place / 10_000 ** (2 * i / 6)) for i in range(3) for f in (math.sin, math.cos)]
        assert_close(table[place], torch.tensor(want), atol=6e-8, rtol=0)

def test_sinusoidal_equals_marian():
    "There the sines stand in the first half, the cosines in the second"
    from transformers import MarianConfig, MarianModel
    c = MarianConfig(vocab_size=11, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                     encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=70, pad_token_id=10, decoder_start_token_id=10)
    theirs = MarianModel(c).encoder.embed_positions(torch.empty(1, 70).shape)
    assert_close(rope_layout(sinusoidal(70, 24), None, 'half-split'), theirs, atol=1e-6, rtol=0)

@pytest.mark.parametrize('bidirectional', [True, False])
def test_buckets_equal_t5(bidirectional):
    "T5's own attention hands out the biases: with a table that holds its row numbers, they are the buckets"
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention
    for n, far in ((32, 128), (8, 20), (6, 9), (33, 100), (4, 300), (16, 17), (64, 2000)):
        config = T5Config(d_model=4, d_kv=2, num_heads=2, relative_attention_num_buckets=n, relative_attention_max_distance=far,
                          is_decoder=not bidirectional)
        layer = T5Attention(config, has_relative_attention_bias=True)
        with torch.no_grad(): layer.relative_attention_bias.weight.copy_(torch.arange(n)[:, None])
        sizes = [(S - rng.randrange(S), S) for S in (rng.randrange(1, 300) for _ in range(300))] + [(1, 3000), (1200, 1200)]
        for T, S in sizes:
            theirs = layer.compute_bias(T, S, past_seen_tokens=S - T)[0, 0].long()
            assert torch.equal(relative_buckets(T, S, n, far, bidirectional), theirs), (T, S, n, far)

def test_alibi_equals_bloom():
    "BLOOM adds slope times key place; after the softmax that is the same as the penalty of the distance, under the causal mask"
    from transformers import BloomConfig, BloomModel
    for heads in (1, 2, 3, 5, 6, 7, 8, 12, 16, 17, 25, 32, 71, 112):
        model = BloomModel(BloomConfig(vocab_size=9, hidden_size=heads, n_head=heads, n_layer=1))
        theirs = model.build_alibi_tensor(torch.ones(1, 11, dtype=torch.long), heads, torch.float32).view(1, heads, 1, 11)
        assert_close(alibi_slopes(heads), theirs[0, :, 0, 1], atol=0, rtol=1e-6)
        q, k, v = (torch.randn(1, heads, 11, 4) for _ in range(3))
        out = attention(q, k, v, causal_mask(11), alibi(heads, 11))[0]
        assert_close(out, attention(q, k, v, causal_mask(11), theirs)[0], atol=1e-5, rtol=1e-5)

def test_last_rows_are_those_of_the_whole():
    "With a cache the queries are the last T of S places"
    for T, S in ((1, 1), (1, 7), (3, 9), (9, 9)):
        assert torch.equal(alibi(3, T, S), alibi(3, S)[:, :, S - T:])
        for both in (True, False): assert torch.equal(relative_buckets(T, S, 8, 20, both), relative_buckets(S, S, 8, 20, both)[S - T:])

def test_dynamic_scaling_needs_a_longer_text_to_act():
    s = dict(rope_type='dynamic', factor=4., original_max_position_embeddings=64)
    p = torch.arange(64)
    assert torch.equal(rope_angles(p, 16, 1e4, s)[0], rope_angles(p, 16)[0])
    longer = rope_angles(torch.arange(65), 16, 1e4, s)[0]
    assert not torch.equal(longer[:64], rope_angles(p, 16)[0])

@pytest.mark.parametrize('call, words', [
    (lambda: rope_angles(torch.arange(4), 7), 'width is 7'),
    (lambda: rope_angles(torch.zeros(1, 2, 3), 8), 'positions is (1, 2, 3)'),
    (lambda: rope_angles(torch.arange(4).bfloat16(), 8), 'torch.bfloat16'),
    (lambda: rope_angles(torch.arange(4), 8, -1.), 'theta is -1'),
    (lambda: rope_angles(torch.arange(4), 8, float('nan')), 'theta is nan'),
    (lambda: rope_angles(torch.arange(4), 8, 1e4, dict(rope_theta=5e5)), 'rope_theta of scaling, 500000'),
    (lambda: rope_angles(torch.arange(4), 8, None, dict(rope_type='longrope', short_factor=[1.], long_factor=[2.])), 'longrope'),
    (lambda: rope_angles(torch.arange(4), 8, None, dict(rope_type='proportional')), 'proportional'),
    (lambda: rope_angles(torch.arange(4), 8, None, dict(type='mrope', mrope_section=[1, 1, 2])), 'mrope'),
    (lambda: rope_angles(torch.arange(4), 8, None, dict(rope_type='default', mrope_section=[1, 1, 2])), 'mrope_section'),
    (lambda: rope_angles(torch.arange(4), 8, None, dict(full_attention=dict(rope_type='default'))), 'full_attention'),
    (lambda: rope_angles(torch.arange(4), 8, None, dict(partial_rotary_factor=.5)), 'partial_rotary_factor is 0.5'),
    (lambda: rope_angles(torch.arange(4), 8, None, dict(rope_type='linear')), 'with factor'),
    (lambda: rope_angles(torch.arange(4), 8, None, dict(rope_type='linear', factor=.5)), 'factor is 0.5'),
    (lambda: rope_angles(torch.arange(4), 8, None, dict(rope_type='linear', factor='2')), "factor is '2'"),
    (lambda: rope_angles(torch.arange(4), 8, None, dict(rope_type='yarn', factor=2.)), 'original_max_position_embeddings'),
    (lambda: rope_angles(torch.arange(4), 8, None, dict(rope_type='yarn', factor=2., original_max_position_embeddings=9, beta_fast=1, beta_slow=2)), 'beta_fast is 1'),
    (lambda: rope_angles(torch.arange(4), 8, None, dict(rope_type='llama3', factor=2., original_max_position_embeddings=9, low_freq_factor=4, high_freq_factor=4)), 'high_freq_factor is 4'),
    (lambda: rope_angles(torch.arange(4), 2, None, dict(rope_type='dynamic', factor=2., original_max_position_embeddings=2)), 'width is 2'),
    (lambda: rope_angles([0, 1], 8), 'positions is [0, 1]'),
    (lambda: rope_angles(torch.arange(4), 8, None, 'linear'), "scaling is 'linear'"),
    (lambda: rope_angles(torch.arange(4), 8, None, dict(rope_type=['yarn'])), 'rope_type'),
    (lambda: rope(torch.zeros(2, 3, 5, 8), torch.arange(1)), 'positions is (1,)'),
    (lambda: rope(torch.zeros(2, 5, 8), torch.zeros(2, 5)), 'positions is (2, 5)'),
    (lambda: rope(torch.zeros(2, 3, 5, 8), torch.zeros(3, 5)), 'positions is (3, 5)'),
    (lambda: relative_buckets(3, 3, n_buckets=32.), 'n_buckets is 32.0'),
    (lambda: rope_layout(torch.zeros(9, 2), 2, 'interleaved'), 'n_heads is 2'),
    (lambda: rope_layout(torch.zeros(6, 2), 2, 'interleaved'), 'even head width'),
    (lambda: rope_layout(torch.zeros(8), 2, 'halves'), "to is 'halves'"),
    (lambda: sinusoidal(0, 8), 'T is 0'),
    (lambda: sinusoidal(4, 7), 'd is 7'),
    (lambda: alibi(0, 4), 'n_heads is 0'),
    (lambda: alibi(2, 4, 3), 'S is 3'),
    (lambda: relative_buckets(4, 3), 'S is 3'),
    (lambda: relative_buckets(3, 3, n_buckets=2), 'n_buckets is 2'),
    (lambda: relative_buckets(3, 3, n_buckets=32, max_distance=8), 'max_distance is 8'),
])
def test_bad_input_is_named(call, words):
    with pytest.raises(LmnotesError, match='.*') as e: call()
    assert words in str(e.value), str(e.value)

def test_inputs_are_left_as_they_were():
    x, p, s = torch.randn(1, 2, 5, 8), torch.arange(5), dict(type='linear', factor=2., rope_theta=1e4)
    copies = x.clone(), p.clone(), dict(s)
    rope(x, p, None, s)
    assert torch.equal(x, copies[0]) and torch.equal(p, copies[1]) and s == copies[2]
    x.requires_grad_()
    cos, sin = rope_angles(p, 8)
    apply_rope(x, cos, sin).square().sum().backward()
    assert_close(x.grad, 2 * x.detach(), atol=1e-5, rtol=1e-5)       # a turn keeps lengths, so the gradient of the squared length is 2x
