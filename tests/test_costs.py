"Costs across chapters: the fused loss on odd shapes and under the compiler, LMOutput beside transformers' outputs, the card on random configurations."
import copy, random

import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lmnotes.cache import KVCache  # noqa: F401  (the class that the card's cache row is about)
from lmnotes.core import LmnotesError, LmnotesTypeError
from lmnotes.costs import LMOutput, linear_cross_entropy, model_card
from lmnotes.models import TransformerConfig, bart, bert, gpt2, llama, t5, unilm

BOUNDS = {torch.float64: 1e-8, torch.float32: 1e-5}


def full(h, w, y, b=None, reduction='mean'):
    z = F.linear(h, w, b).flatten(0, -2)
    return F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), y.flatten().long(), reduction=reduction)


def problem(seed, dtype=torch.float32, shape=None):
    "Random sizes, with labels of which some are -100 and at least one is not."
    r, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    shape, D, V = shape or r.choice([(1,), (5,), (3, 7), (2, 3, 11), (130,)]), r.choice([1, 3, 16]), r.choice([2, 17, 300])
    h, w, b = (torch.randn(s, generator=gen, dtype=torch.float64).to(dtype).requires_grad_() for s in ((*shape, D), (V, D), (V,)))
    y = torch.randint(V, shape, generator=gen)
    y.flatten()[1:] = y.flatten()[1:].where(torch.rand(y.numel() - 1, generator=gen) > .3, -100)
    return h, w, y, b if r.random() < .5 else None


def results(f, h, w, y, b, **kwargs):
    loss = f(h, w, y, b, **kwargs)
    return loss, *torch.autograd.grad(3 * loss, [t for t in (h, w, b) if t is not None])


@pytest.mark.parametrize('dtype', BOUNDS)
@pytest.mark.parametrize('seed', range(20))
def test_equals_full_logits(seed, dtype):
    h, w, y, b = problem(seed, dtype)
    for reduction in ('mean', 'sum'):
        want = results(full, h, w, y, b, reduction=reduction)
        for rows in (None, 1, 4, 64):
            for a, c in zip(results(linear_cross_entropy, h, w, y, b, reduction=reduction, rows=rows), want):
                assert a.dtype == c.dtype and a.shape == c.shape
                assert (a - c).abs().max() <= BOUNDS[dtype] * max(1, c.abs().max())


@pytest.mark.parametrize('wanted', [(True, False, False), (False, True, False), (False, False, True), (True, False, True)])
def test_only_what_is_wanted(wanted):
    h, w, y, b = (t.detach() for t in (*problem(1, shape=(9,))[:3], torch.zeros(1)))
    b = torch.randn(len(w))
    tensors = [t.clone().requires_grad_(ok) for t, ok in zip((h, w, b), wanted)]
    other = [t.detach().clone().requires_grad_(ok) for t, ok in zip((h, w, b), wanted)]
    linear_cross_entropy(tensors[0], tensors[1], y, tensors[2], rows=2).backward()
    full(other[0], other[1], y, other[2]).backward()
    for a, c, ok in zip(tensors, other, wanted):
        assert (a.grad is not None) == ok
        if ok: torch.testing.assert_close(a.grad, c.grad, atol=1e-6, rtol=1e-5)


def test_backward_twice_and_the_gradients_handed_out_are_nobody_elses():
    h, w, y, _ = problem(3, shape=(40,))
    loss = linear_cross_entropy(h, w, y, rows=8)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(2 * loss, (h, w))
    for a, b, c in zip(first, kept, second):
        assert torch.equal(a, b)
        torch.testing.assert_close(2 * a, c)


def test_gradient_of_a_gradient():
    "A penalty on gradients, as in sharpness-aware training: right, not silently without effect."
    h, w, y, _ = problem(3, torch.float64, shape=(40,))
    def penalty(loss):
        g, = torch.autograd.grad(loss, h, create_graph=True)
        return torch.autograd.grad(g.square().sum() + loss, (h, w))
    for a, b in zip(penalty(linear_cross_entropy(h, w, y, rows=8)), penalty(full(h, w, y))): torch.testing.assert_close(a, b)


def test_large_logits_and_extreme_labels():
    h, w = torch.tensor([[1e4], [-1e4]]), torch.tensor([[1.], [-1.], [0.]])
    y = torch.tensor([1, 1])
    for rows in (None, 1): torch.testing.assert_close(linear_cross_entropy(h, w, y, rows=rows, reduction='sum'), torch.tensor(2e4))
    bias = torch.tensor([0., float('-inf'), 0.])
    assert linear_cross_entropy(h, w, y, bias, rows=1).item() == float('inf')
    assert linear_cross_entropy(h, w, torch.tensor([0, 2]), bias, rows=1).isfinite()
    assert linear_cross_entropy(h * float('nan'), w, y, rows=1).isnan()


@pytest.mark.parametrize('dtype,bound', [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_autocast(dtype, bound):
    h, w, y, _ = problem(4, shape=(130,))
    with torch.autocast('cpu', dtype):
        for rows in (None, 16):
            for a, c in zip(results(lambda *x, **k: linear_cross_entropy(*x, rows=rows), h, w, y, None), results(full, h, w, y, None)):
                assert a.dtype == torch.float32 and (a - c).abs().max() <= bound * max(1, c.abs().max())


def test_small_float16_gradients_do_not_vanish():
    "A mean over many tokens is divided after the product, not before."
    h, w, y, _ = problem(5, shape=(3000,))
    h, w = (t.detach().half().requires_grad_() for t in (h, w))
    ours, = torch.autograd.grad(linear_cross_entropy(h, w, y, rows=100) * 2**14, w)
    exact, = torch.autograd.grad(full(h.double(), w.double(), y) * 2**14, w)
    assert (ours.double() - exact).abs().max() < .01 * exact.abs().max()


@pytest.mark.parametrize('backend', ['aot_eager', 'inductor'])
def test_compiles_whole(backend):
    torch._dynamo.reset()
    f = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend)
    h, w, y, _ = problem(6, shape=(3, 50))
    b = torch.randn(len(w), requires_grad=True)
    for bias in (None, b):
        for a, c in zip(results(f, h, w, y, bias), results(full, h, w, y, bias)): torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-4)
    with torch.no_grad(): torch.testing.assert_close(f(h, w, y), full(h, w, y))
    with torch.autocast('cpu', torch.bfloat16): assert f(h, w, y).dtype == torch.float32
    for bad, name in ((torch.full_like(y, -100), 'scored labels'), (torch.full_like(y, len(w)), 'a label in labels')):
        with pytest.raises(LmnotesError, match=name): f(h, w, bad)


def test_compiled_model_returns_lazy_logits():
    torch._dynamo.reset()
    model, ids = gpt2(53, d_model=16, n_layers=1, n_heads=2, max_len=16), torch.randint(53, (2, 9))
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    out, plain = compiled(input_ids=ids, labels=ids), model(input_ids=ids, labels=ids)
    assert isinstance(out, LMOutput) and out._logits is None
    torch.testing.assert_close(out.loss, plain.loss)
    torch.testing.assert_close(out.logits, plain.logits)
    with torch.no_grad(): assert not compiled(input_ids=ids).logits.requires_grad


@pytest.mark.parametrize('seed', range(6))
def test_bad_input(seed):
    h, w, y, b = problem(seed, shape=(4, 5))
    V, D = w.shape
    cases = [(lambda: linear_cross_entropy(h, w, y.where(y < 0, V)), 'label'), (lambda: linear_cross_entropy(h, w, y.where(y < 0, -1)), 'label'),
             (lambda: linear_cross_entropy(h, w, torch.full_like(y, -100)), 'labels'), (lambda: linear_cross_entropy(h, w, y[:, 1:]), 'labels.shape'),
             (lambda: linear_cross_entropy(h, torch.randn(V, D + 1), y), 'weight.shape'), (lambda: linear_cross_entropy(h, w, y, torch.zeros(V + 1)), 'bias.shape'),
             (lambda: linear_cross_entropy(h[:0], w, y[:0]), 'labels.shape'), (lambda: linear_cross_entropy(h, w, y, reduction='none'), 'reduction')]
    for rows in (None, 3):
        for bad, name in cases[:3]:
            with pytest.raises(LmnotesError, match=name): bad()
    for bad, name in cases:
        with pytest.raises(LmnotesError, match=name): bad()
    for bad in (lambda: linear_cross_entropy(h, w.half(), y), lambda: linear_cross_entropy(h, w, y.bool()), lambda: linear_cross_entropy(h.long(), w, y)):
        with pytest.raises(LmnotesTypeError, match='dtype'): bad()


def test_output_like_transformers():
    h, w = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    out = LMOutput(h, w, loss=torch.tensor(1.), past_key_values='cache')
    assert out[0] is out.loss and out[2] == 'cache' and out._logits is None
    assert out[1] is out.logits and out['logits'] is out.logits and out.logits.shape == (2, 3, 7) and out.logits.requires_grad
    with pytest.raises(IndexError): out[3]
    for key in ('nothing', '_logits', 'nll_'):
        with pytest.raises(KeyError): out[key]
    assert LMOutput(h, w)[0].shape == (2, 3, 7)                            # without a loss the logits come first
    with torch.no_grad(): later = LMOutput(h, w)
    assert not later.logits.requires_grad                                   # the mode of the forward pass, not of the look
    out = LMOutput(h, w)
    with torch.no_grad(): assert out.logits.requires_grad
    with torch.autocast('cpu', torch.bfloat16): low = LMOutput(h, w)
    assert low.logits.dtype == torch.bfloat16
    with torch.autocast('cpu', torch.bfloat16):
        assert LMOutput(h, w).logits.dtype == torch.bfloat16 and LMOutput(h.double(), w.double()).logits.dtype == torch.float64
        assert out.logits.dtype == torch.float32
        torch.testing.assert_close(low.logits, F.linear(h, w))
    early = LMOutput(h, w)
    with torch.autocast('cpu', torch.bfloat16): assert early.logits.dtype == torch.float32
    half = LMOutput(h.bfloat16(), w)
    half._dtype = torch.bfloat16                                            # as made under autocast from a half-precision stream
    assert half.logits.dtype == torch.bfloat16
    with torch.inference_mode(): frozen = LMOutput(h.detach() * 1, w)
    assert frozen.logits.shape == (2, 3, 7)
    with pytest.raises(LmnotesError, match='head'): LMOutput(h)['logits']
    with pytest.raises(LmnotesError, match='head'): LMOutput(h).nll(torch.zeros(2, 3, dtype=torch.long))
    same = LMOutput(h.detach(), w.detach())
    for copied in (copy.deepcopy(same), copy.copy(same)): torch.testing.assert_close(copied.logits, same.logits)


def test_stale_logits_are_refused():
    model, ids = gpt2(53, d_model=16, n_layers=1, n_heads=2, max_len=16), torch.randint(53, (2, 9))
    opt = torch.optim.AdamW(model.parameters())
    out, looked = model(input_ids=ids, labels=ids), model(input_ids=ids)
    before = looked.logits
    out.loss.backward()
    opt.step()
    assert looked.logits is before
    with pytest.raises(LmnotesError, match='weights have changed'): out['logits']


def random_model(r):
    name = r.choice([llama, gpt2, bert, t5, bart, unilm])
    H = r.choice([2, 4, 6])
    fields = dict(d_model=12 * r.choice([2, 4]) * (2 if H == 4 else 1), d_ff=r.choice([40, 64]), n_layers=r.choice([1, 2, 3]), n_heads=H, max_len=r.choice([32, 64]))
    for field, value, chance in (('n_kv_heads', H // 2, .5), ('d_head', 10, .3), ('qk_norm', True, .3), ('gated', r.random() < .5, .4), ('bias', r.random() < .5, .4),
                                 ('tie', False, .3), ('norm', r.choice(['rms', 'layer']), .3), ('norm_first', r.random() < .5, .3), ('qkv_bias', True, .2), ('ff_bias', True, .2)):
        if r.random() < chance: fields[field] = value
    if name in (t5, bart): fields['n_decoder_layers'] = r.choice([1, 2, 4])
    elif r.random() < .4: fields['head'] = r.choice(['classification', 'tagging', None])
    return name(r.choice([101, 300]), **fields)


@pytest.mark.parametrize('seed', range(40))
def test_card_counts_parameters_and_operations(seed):
    r = random.Random(seed)
    model = random_model(r)
    c, (B, T) = model.config, (r.choice([1, 3]), r.choice([7, 31]))
    card, ids = model_card(c, B, T), torch.randint(3, c.vocab_size, (B, T))
    assert card.parameters == sum(p.numel() for p in model.parameters()) == sum(p.parameters for p in card.parts.values())
    labels = {'lm': ids, 'classification': torch.zeros(B, dtype=torch.long), 'tagging': torch.zeros(B, T, dtype=torch.long)}.get(c.head)
    more = dict(decoder_input_ids=ids) if c.kind == 'encoder-decoder' else {}
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward: out = model(input_ids=ids, labels=labels, **more)
        with FlopCounterMode(display=False) as backward: (out.hidden.sum() if labels is None else out.loss).backward()
    assert (card.flops['forward'], card.flops['backward']) == (forward.get_total_flops(), backward.get_total_flops())
    matrices = sum(p.numel() for n, p in model.named_parameters() if '.blocks.' in n and n.endswith('weight') and p.ndim == 2)
    assert card.bytes['optimizer, Muon'] == 8 * card.parameters - 4 * matrices
    if c.kind != 'encoder':
        with torch.no_grad(): cache = model(input_ids=ids, use_cache=True, **more).past_key_values
        assert card.bytes['cache'] == sum(t.nbytes for pair in [*cache.layers, *cache.cross.values()] for t in pair)


def test_card_of_published_models():
    known = {'GPT-2': (gpt2, dict(vocab_size=50_257, d_model=768, n_layers=12, n_heads=12, max_len=1024), 124_439_808),
             'BERT base with its head': (bert, dict(vocab_size=30_522, d_model=768, n_layers=12, n_heads=12, max_len=512), 109_514_298),
             'T5 small': (t5, dict(vocab_size=32_128, d_model=512, n_layers=6, n_heads=8, d_ff=2048), 60_506_624),
             'SmolLM2 135M': (llama, dict(vocab_size=49_152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_ff=1536), 134_515_008)}
    with torch.device('meta'):
        for name, (family, fields, n) in known.items(): assert model_card(family(**fields).config, 1, 16).parameters == n, name


def test_card_shows():
    card = model_card(TransformerConfig(97), 2, 16)
    assert 'feed-forward' in repr(card) and 'AdamW' in repr(card) and '<table>' in card._repr_html_()
    half = model_card(TransformerConfig(97), 2, 16, torch.bfloat16)
    assert half.bytes['weights'] * 2 == card.bytes['weights'] and half.bytes['optimizer, AdamW'] == card.bytes['optimizer, AdamW']
    assert model_card(TransformerConfig(97)).length == 512


def test_frozen_head_under_lora():
    "A frozen output matrix, a trained layer before it: the gradient arrives, the matrix gets none."
    torch.manual_seed(0)
    layer, head, ids = nn.Linear(8, 8), torch.randn(300, 8), torch.randint(300, (200,))
    x = torch.randn(200, 8)
    linear_cross_entropy(layer(x), head, ids, rows=32).backward()
    got = layer.weight.grad.clone()
    layer.zero_grad()
    full(layer(x), head, ids).backward()
    torch.testing.assert_close(got, layer.weight.grad, atol=1e-6, rtol=1e-5)
