"""Denoising objectives against a slow version with the same random numbers, their rates on a million tokens, and what no noise may touch"""
import math

import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from lmnotes.core import LmnotesError
from lmnotes.denoising import denoise, mass, poisson_lengths, span_budget, stop_table
from lmnotes.draws import Draws
from lmnotes.models import bart, t5
from lmnotes.scoring import token_loss
from lmnotes.spans import iid_denoising, span_corruption, ul2

MASK, PAD, V = 3, 1, 500


def texts(B, T, gen, left=False):
    "Rows of unequal length, all ids different within a row; some special tokens anywhere; sentences end anywhere"
    ids = torch.stack([torch.randperm(V - 10, generator=gen)[:T] + 10 for _ in range(B)])
    n = torch.randint(0, T + 1, (B, 1), generator=gen)
    real = torch.arange(T) >= T - n if left else torch.arange(T) < n
    return ids, real, (torch.rand(B, T, generator=gen) < .15) & real, torch.rand(B, T, generator=gen) < .2


def slow(row, special, ends, seed, T, *, sentences, rotate, infill, poisson, mask, random, delete):
    "One row as lists: the same random numbers in the same order, everything else by loops"
    draws = Draws(torch.zeros(1, T), seeds=torch.tensor([seed]))
    free = [i for i, s in enumerate(special) if not s]
    x, n, R, real = [row[i] for i in free], len(free), len(row), [ends[i] for i in free]
    def budget(p): return max(0, math.ceil(n * p - 1e-9))
    if sentences:
        u, found = draws.uniform(T)[0].tolist(), [[]]
        for token, end in zip(x, real):
            found[-1].append(token)
            if end: found.append([])
        x = [t for _, s in sorted(zip(u, found), key=lambda pair: pair[0]) for t in s]
    if rotate:
        r = int(draws.uniform(1).double().item() * n)
        x = x[r:] + x[:r]
    items, width = [(t, i, False) for i, t in enumerate(x)], T                    # token, free tokens before it, whether a span
    if infill:
        (m, most), (m_R, most_R), (m_T, J) = ([int(k) for k in span_budget(torch.tensor(k), infill, poisson)] for k in (n, R, T))
        lengths, width = poisson_lengths(draws.uniform(J), poisson)[0].tolist(), T + max(0, J - m_T)
        u, spans, hidden = draws.uniform(width)[0].tolist(), [], 0
        for l in lengths[:min(most, m + max(0, most_R - m_R))]:
            if hidden >= m: break
            spans.append(min(l, m - hidden)); hidden += spans[-1]
        if hidden < m: spans[-1] += m - hidden
        size = n - m + len(spans)
        span_at, items, at = dict(zip(sorted(range(size), key=lambda s: u[s]), spans)), [], 0
        for s in range(size):
            items.append((MASK, at, True) if s in span_at else (x[at], at, False))
            at += span_at.get(s, 1)
    if mask or random or delete:
        u, words = draws.uniform(width)[0].tolist(), draws.integers(V, width)[0].tolist()
        order = sorted((s for s, it in enumerate(items) if not it[2]), key=lambda s: u[s])
        a, b, c = budget(mask), budget(random), budget(delete)
        for s in order[:a]: items[s] = (MASK, *items[s][1:])
        for s in order[a:a + b]: items[s] = (words[s], *items[s][1:])
        gone = set(order[a + b:a + b + c])
        items = [it for s, it in enumerate(items) if s not in gone]
    out, k, others = [], 0, [row[i] for i, s in enumerate(special) if s]
    for token, before, _ in items:                                                 # a special token stands behind as many free ones as before
        while k < sum(special[:free[min(before, n - 1)]]): out.append(others[k]); k += 1
        out.append(token)
    return out + others[k:]


HOW = [dict(infill=.3), dict(infill=0., sentences=True), dict(infill=0., rotate=True), dict(infill=0., mask=.3, random=.2, delete=.2), dict(infill=.9, poisson=.4),
       dict(infill=.2, poisson=12., sentences=True, rotate=True, mask=.1, random=.1, delete=.3), dict(infill=1.), dict(infill=0., delete=1.)]


@pytest.mark.parametrize('how', HOW, ids=str)
@pytest.mark.parametrize('left', [False, True])
def test_equals_the_slow_version(how, left):
    how = dict(sentences=False, rotate=False, poisson=3., mask=0., random=0., delete=0.) | how
    gen = torch.Generator().manual_seed(0)
    for T in (1, 2, 7, 30):
        ids, real, special, ends = texts(60, T, gen, left)
        kept, seeds = ids.clone(), torch.randint(-2**62, 2**62, (60,), generator=gen)
        batch = denoise(ids, mask_id=MASK, vocab_size=V, pad_id=PAD, attention_mask=real, special_mask=special, seeds=seeds,
                        sentence_ends=ends if how['sentences'] else None, **{k: v for k, v in how.items() if k != 'sentences'})
        assert torch.equal(ids, kept)
        for b in range(60):
            row = [t[b][real[b]].tolist() for t in (ids, special, ends)]
            want = slow(*row, int(seeds[b]), T, **how)
            size = len(want)
            assert batch['input_ids'][b].tolist() == want + [PAD] * (batch['input_ids'].shape[1] - size)
            assert batch['attention_mask'][b].tolist() == [t < size for t in range(batch['attention_mask'].shape[1])]
            assert batch['labels'][b].tolist() == row[0] + [-100] * (T - len(row[0]))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**40), T=st.integers(1, 40), p=st.floats(0, 1), poisson=st.floats(.1, 30), rates=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)))
def test_what_every_noise_keeps(seed, T, p, poisson, rates):
    gen = torch.Generator().manual_seed(seed)
    ids, real, special, ends = texts(20, T, gen)
    mask, random, delete = (r / 3.001 * (1 - p) for r in rates)
    batch = denoise(ids, mask_id=MASK, vocab_size=V, pad_id=PAD, infill=p, poisson=poisson, mask=mask, random=random, delete=delete, random_ids=torch.tensor([2]),
                    sentence_ends=ends, rotate=True, attention_mask=real, special_mask=special, generator=gen)
    out, there = batch['input_ids'], batch['attention_mask']
    assert (out[~there] == PAD).all() and torch.equal(there, there.sort(dim=1, descending=True, stable=True).values)
    for b in range(20):
        row, text = out[b, there[b]].tolist(), ids[b, real[b]]
        kept, n = [t for t in row if t >= 10], int((real & ~special)[b].sum())
        assert len(set(kept)) == len(kept) and set(kept) <= set(text.tolist())                       # nothing twice, nothing invented
        others = ids[b, special[b]].tolist()
        assert [t for t in row if t in others] == others                                             # special tokens: all, in their order
        m, a, r, d = (math.ceil(n * x - 1e-9) for x in (p, mask, random, delete))
        left = max(0, n - m)
        a, r, d = min(a, left), min(r, max(0, left - a)), min(d, max(0, left - a - r))
        assert len(kept) - len(others) == left - a - r - d and row.count(2) == r                     # exactly so many
        assert torch.equal(batch['labels'][b, :len(text)], text)


def test_no_float64_on_the_device():
    "Apple's GPUs have none. On the meta device everything runs but the numbers"
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **kwargs or {})
            for t in tree_leaves(out): assert not (isinstance(t, torch.Tensor) and t.is_meta and t.dtype == torch.float64), op
            return out
    ids = torch.zeros(3, 20, dtype=torch.long, device='meta')
    masks = dict(attention_mask=ids == 0, special_mask=ids == 1)
    with Watch():
        for draw in (dict(seeds=torch.arange(3)), {}):
            batch = denoise(ids, mask_id=MASK, vocab_size=V, sentence_ends=ids == 2, rotate=True, mask=.1, random=.1, delete=.1, **masks, **draw)
            assert batch['labels'].shape == (3, 20) and batch['input_ids'].is_meta
            assert mass(ids, mask_id=MASK, vocab_size=V, **masks, **draw)['labels'].is_meta
            kwargs = dict(sentinel_ids=range(400, 500), eos_id=1, **masks, **draw)
            assert span_corruption(ids, **kwargs)['labels'].is_meta and iid_denoising(ids, style='spans', **kwargs)['labels'].is_meta
            assert ul2(ids, mode_ids=dict(R=7, S=8, X=9), **kwargs)['labels'].is_meta


def test_budgets_by_whole_numbers():
    "As by float64, where the product is a whole number, too, such as 30% of 10"
    n = torch.arange(3000)
    for p in (0., .1, .15, .29, .3, .5, .7, .1 + .2, 1 / 3, .9, 1., *torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist()):
        assert torch.equal(span_budget(n, p, 3.)[0], (n.double() * p - 1e-9).ceil().long().clamp(min=0))
        if p: assert [int((mass(torch.ones(1, k, dtype=torch.long), mask_id=MASK, vocab_size=V, share=p)['labels'] != -100).sum()) for k in (5, 10, 15, 50)] == [
            max(1, math.floor(k * p + .5 + 1e-6)) for k in (5, 10, 15, 50)]


def test_rates_and_lengths_on_a_million_tokens():
    ids = (torch.arange(500) + 10).expand(2000, 500)
    batch = denoise(ids, mask_id=MASK, vocab_size=V + 100, pad_id=PAD, generator=torch.Generator().manual_seed(1))
    out, there = batch['input_ids'], batch['attention_mask']
    assert ((out >= 10).sum(1) == 350).all()                                                         # 30% of each row, not on average
    masks = (out == MASK) & there
    assert abs(masks.sum().item() / 2000 - 150 / 3 - .5) < .6                                        # m / lambda, and the last one is cut
    before, after = torch.nn.functional.pad(out[:, :-1], (1, 0), value=9), torch.nn.functional.pad(out[:, 1:], (0, 1), value=PAD)
    alone = masks & (before != MASK) & (after >= 10)
    share = (after - before - 1)[alone].bincount(minlength=10)[:10] / alone.sum()
    assert (share - torch.distributions.Poisson(3.).log_prob(torch.arange(10.)).exp()).abs().max() < .01
    hidden = torch.ones(2000, 600, dtype=torch.bool).scatter_(1, out, False)[:, 10:510].double().mean(0)
    assert (hidden[12:-12] - .3).abs().max() < .05 and abs(hidden[0] - 50 / 400) < .03              # no place is favored; no span runs into the text from outside


def test_every_arrangement_is_as_likely():
    "Four tokens, half of them in spans of one: a mask for each, and every pair of tokens as often"
    ids = torch.arange(10, 14).expand(60000, 4)
    out = denoise(ids, mask_id=MASK, vocab_size=V, infill=.5, poisson=100., seeds=torch.arange(60000))['input_ids']      # one span of 2: three places
    rows, times = out[:, :3].unique(dim=0, return_counts=True)
    assert rows.tolist() == [[MASK, 12, 13], [10, MASK, 13], [10, 11, MASK]] and (times - 20000).abs().max() < 600
    orders = denoise(ids, mask_id=MASK, vocab_size=V, infill=0., sentence_ends=torch.ones_like(ids).bool(), seeds=torch.arange(60000))['input_ids']
    rows, times = orders.unique(dim=0, return_counts=True)
    assert len(rows) == 24 and (times - 2500).abs().max() < 250
    first = denoise(ids, mask_id=MASK, vocab_size=V, infill=0., rotate=True, seeds=torch.arange(60000))['input_ids']
    rows, times = first.unique(dim=0, return_counts=True)
    assert len(rows) == 4 and (times - 15000).abs().max() < 500 and ((first[:, 1:] - first[:, :-1]) % 4 == 1).all()


@pytest.mark.parametrize('make', [lambda *a, **k: denoise(*a, sentence_ends=torch.arange(V) % 5 == 0, rotate=True, mask=.1, random=.1, delete=.1, pad_id=PAD, **k), mass])
def test_seeds(make):
    gen = torch.Generator().manual_seed(2)
    ids, real, special, _ = texts(30, 20, gen)
    how, seeds = dict(mask_id=MASK, vocab_size=V), torch.arange(30) * 7
    batch = make(ids, attention_mask=real, special_mask=special, seeds=seeds, **how)
    again = make(ids, attention_mask=real, special_mask=special, seeds=seeds, **how)
    assert all(torch.equal(batch[k], again[k]) for k in batch)
    pad = lambda x: torch.nn.functional.pad(x, (0, 17))
    order = torch.randperm(30, generator=gen)
    other = make(pad(ids)[order], attention_mask=pad(real)[order], special_mask=pad(special)[order], seeds=seeds[order], **how)
    for b, i in enumerate(order.tolist()):                                     # other rows beside it, and more padding: the same row
        there = batch['attention_mask'][i]
        assert torch.equal(other['input_ids'][b, other['attention_mask'][b]], batch['input_ids'][i, there])
        assert torch.equal(other['labels'][b, :20], batch['labels'][i]) and (other['labels'][b, 20:] == -100).all()
    one, two, three = (make(ids, attention_mask=real, generator=torch.Generator().manual_seed(s), **how) for s in (5, 5, 6))
    assert all(torch.equal(one[k], two[k]) for k in one) and not torch.equal(one['input_ids'], three['input_ids'])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**40), T=st.integers(2, 40), share=st.floats(.01, 1), left=st.booleans())
def test_mass(seed, T, share, left):
    gen = torch.Generator().manual_seed(seed)
    ids, real, special, _ = texts(20, T, gen, left)
    batch = mass(ids, mask_id=MASK, vocab_size=V, share=share, random_ids=torch.tensor([2]), attention_mask=real, special_mask=special, generator=gen)
    scored, inside, free = batch['labels'] != -100, batch['decoder_attention_mask'], real & ~special
    assert torch.equal(batch['input_ids'].where(~scored, batch['labels']), ids) and not (scored & ~free).any()         # the original comes back
    for b in range(20):
        n, places = int(free[b].sum()), scored[b].nonzero()[:, 0]
        assert len(places) == (max(1, math.floor(n * share + .5 + 1e-6)) if n else 0)
        if not n: assert not inside[b].any(); continue
        first, last = int(places[0]), int(places[-1])
        assert torch.equal(free[b, first:last + 1], scored[b, first:last + 1])                                        # one span
        assert inside[b].nonzero()[:, 0].tolist() == [t for t in range(first, last + 1) if real[b, t]]
        assert batch['decoder_input_ids'][b].tolist() == [int(ids[b, t - 1]) if first < t <= last else MASK for t in range(T)]


def test_mass_replaces_by_the_rule():
    ids = torch.randint(10, V, (2000, 500), generator=torch.Generator().manual_seed(3))
    batch = mass(ids, mask_id=MASK, vocab_size=V, random_ids=torch.tensor([2]), generator=torch.Generator().manual_seed(4))
    scored, x = batch['labels'] != -100, batch['input_ids']
    assert scored.sum() == 500_000
    for found, share in ((x == MASK, .8), (x == 2, .1), (x == ids, .1)): assert abs((found & scored).sum().item() / 500_000 - share) < .003


def families():
    torch.manual_seed(0)
    shape = dict(d_model=32, n_layers=2, n_heads=2)
    yield 'bart', bart(V, max_len=64, **shape)
    yield 't5', t5(V, **shape)
    for attention in ('eager', 'sdpa'):
        yield f'theirs, bart, {attention}', transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=V, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, attn_implementation=attention))
        yield f'theirs, t5, {attention}', transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=V, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
            decoder_start_token_id=0, attn_implementation=attention))


@pytest.mark.parametrize('name,model', list(families()), ids=lambda x: x if isinstance(x, str) else '')
def test_losses_in_models(name, model):
    model, gen = model.eval().double(), torch.Generator().manual_seed(5)
    ids, real, special, ends = texts(8, 24, gen)
    real[0], special[0] = False, False
    real[0, 0] = special[0, 0] = True                                           # a row with nothing to predict in mass
    start, pad = (model.config.start_id, model.config.pad_id) if hasattr(model.config, 'kind') else (model.config.decoder_start_token_id, model.config.pad_token_id)
    how = dict(mask_id=MASK, vocab_size=V, attention_mask=real, special_mask=special, generator=gen)
    for batch in (denoise(ids, sentence_ends=ends, pad_id=PAD, delete=.1, **how), mass(ids, **how)):
        labels = batch['labels']
        shifted = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=start)
        inputs = {'decoder_input_ids': shifted.where(shifted != -100, pad), **{k: v for k, v in batch.items() if k != 'labels'}}
        logits = model(**inputs).logits
        want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction='sum')
        (s, n), own = token_loss(model, batch), model(**batch).loss
        assert n == int((labels != -100).sum())
        assert_close(s, want, rtol=1e-6, atol=0); assert_close(own, want / n, rtol=1e-6, atol=0)
        s.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        model.zero_grad()


def test_nothing_leaks():
    torch.manual_seed(6)
    model, x, seeds = bart(V, d_model=32, n_layers=2, n_heads=2, max_len=64).double().eval(), torch.randint(10, V, (4, 12)), torch.arange(4)
    for make in (lambda i: mass(i, mask_id=MASK, vocab_size=V, replace=(1., 0., 0.), seeds=seeds), lambda i: denoise(i, mask_id=MASK, vocab_size=V, infill=1., seeds=seeds),
                 lambda i: denoise(i, mask_id=MASK, vocab_size=V, infill=0., delete=1., mask=0., seeds=seeds)):
        scored = make(x)['labels'] != -100
        with torch.no_grad():
            before = model(**make(x)).logits
            for j in range(12):
                moved = (model(**make(x.index_fill(1, torch.tensor([j]), 5))).logits - before).abs().amax(-1)
                hidden = scored[:, j]
                assert moved[hidden, :j + 1][scored[hidden, :j + 1]].abs().sum() < 1e-10
                if hidden.any() and j < 11: assert moved[hidden, j + 1][scored[hidden, j + 1]].gt(1e-9).all()


@pytest.mark.parametrize('how,name', [(dict(mask_id=None), 'mask_id'), (dict(mask_id=V), 'mask_id'), (dict(mask_id=True), 'mask_id'), (dict(vocab_size=0), 'vocab_size'),
    *((dict([(r, x)]), r) for r in ('infill', 'mask', 'random', 'delete') for x in (-.1, 1.1, float('nan'), float('inf'), '1', True)), (dict(infill=.5, mask=.3, delete=.3), 'delete'),
    *((dict(poisson=x), 'poisson') for x in (0, 0., -1., float('nan'), 1000, None)), (dict(pad_id=None), 'pad_id'), (dict(pad_id=V), 'pad_id'), (dict(random_ids=[1]), 'random_ids'),
    (dict(sentence_ends=torch.ones(2, 5)), 'sentence_ends'), (dict(sentence_ends=torch.ones(2, 4).bool()), 'sentence_ends'), (dict(sentence_ends=[3]), 'sentence_ends'),
    (dict(special_mask=torch.ones(2, 4)), 'special_mask'), (dict(seeds=torch.arange(3)), 'seeds'), (dict(generator=torch.Generator(), seeds=torch.arange(2)), 'seeds')], ids=str)
def test_errors_of_denoise(how, name):
    with pytest.raises(LmnotesError, match=name): denoise(torch.ones(2, 5, dtype=torch.long), **dict(mask_id=MASK, vocab_size=V) | how)


@pytest.mark.parametrize('how,name', [(dict(mask_id=None), 'mask_id'), *((dict(share=x), 'share') for x in (0, 0., -1., 1.5, float('nan'))), (dict(replace=(.8, .1)), 'replace'),
    (dict(attention_mask=torch.ones(2, 4)), 'attention_mask')], ids=str)
def test_errors_of_mass(how, name):
    with pytest.raises(LmnotesError, match=name): mass(torch.ones(2, 5, dtype=torch.long), **dict(mask_id=MASK, vocab_size=V) | how)
    with pytest.raises(LmnotesError, match='ids'): mass(torch.ones(2, 1, dtype=torch.long), mask_id=MASK, vocab_size=V)


def test_sentences_by_a_table():
    from lmnotes.data import load_tokenizer
    tokenizer = load_tokenizer('gpt-tiny')
    table, ids = stop_table(tokenizer), torch.tensor([tokenizer.encode('It rained. Was it cold?? Yes!')])
    ends = torch.isin(ids, torch.tensor([tokenizer.encode(s)[-1] for s in ('.', '?', '!')]))
    assert table.sum() >= 3 and torch.equal(table[ids], ends)
    ends[0, ends[0].nonzero()[1]] = ends[0, ends[0].nonzero()[1] + 1]            # of two question marks the second
    seeds, how = torch.tensor([3]), dict(mask_id=MASK, vocab_size=len(tokenizer), infill=0.)
    found = {tokenizer.decode(denoise(ids, sentence_ends=table, seeds=torch.tensor([s]), **how)['input_ids'][0]) for s in range(60)}
    assert len(found) == 6 and all('Was it cold??' in f for f in found)
    assert denoise(ids, sentence_ends=table, seeds=seeds, **how)['input_ids'].shape == ids.shape
