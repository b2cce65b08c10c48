"Span corruption and its relatives on many random batches: counts, order of the sentinels, the way back, rates, seeds, leaks."
import math, random
from functools import partial

import numpy as np
import pytest, torch

from lmnotes.core import LmnotesError
from lmnotes.spans import UL2, _plan, deshuffling, iid_denoising, restore, span_corruption, ul2

SENTINELS, EOS, MODES = range(999, 799, -1), 1, dict(R=1000, S=1001, X=1002)


def counts(n, p, mean_span):
    "Tokens and spans that T5's scheme drops of n"
    if n < 2: return 0, 0
    m = min(max(round(np.float32(n) * np.float32(p)), 1), n - 1)                                 # float32, as T5's code
    return m, min(max(round(np.float32(m) / np.float32(mean_span)), 1), m, n - m)


def batches(n, seed):
    "Random batches: ids from 2 to 799, padded on the right, on the left, with holes, or not at all; with special tokens or without"
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(n):
        B, T = rng.randint(1, 6), rng.randint(2, 65)
        ids, mask, special = torch.randint(2, 800, (B, T), generator=g), None, None
        kind = rng.choice(['full', 'right', 'left', 'holes'])
        if kind in ('right', 'left'): mask = torch.arange(T) < torch.randint(0, T + 1, (B, 1), generator=g)
        if kind == 'left': mask = mask.flip(1)
        if kind == 'holes': mask = torch.rand(B, T, generator=g) < .8
        if rng.random() < .5: special = torch.rand(B, T, generator=g) < rng.choice([.03, .2, .9])
        p = rng.choice([.15, .5, .02, .97, rng.uniform(.01, .99)])
        mean_span = rng.choice([1, 3, 8, 64, math.inf, rng.uniform(1, 10)])
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        yield rng, ids, dict(attention_mask=mask, special_mask=special), real, real if special is None else real & ~special, p, mean_span


def texts(ids, real): return [row[k].tolist() for row, k in zip(ids, real)]
def targets(batch): return [[t for t in row if t != -100] for row in batch['labels'].tolist()]
def inputs(batch): return texts(batch['input_ids'], batch['attention_mask'])


def check_shape(batch):
    assert batch['attention_mask'].dtype == torch.bool and batch['attention_mask'].shape == batch['input_ids'].shape
    assert all(x.is_contiguous() for x in batch.values())
    for real in (batch['attention_mask'], batch['labels'] != -100): assert not (real[:, 1:] & ~real[:, :-1]).any()       # text first, then padding


def test_span_corruption_on_random_batches():
    for rng, ids, masks, real, free, p, mean_span in batches(1500, 0):
        close, input_eos, before = rng.random() < .5, rng.random() < .5, ids.clone()
        kwargs = dict(seeds=torch.randint(1 << 40, (len(ids),))) if rng.random() < .5 else dict(generator=torch.Generator().manual_seed(rng.randrange(99)))
        b = span_corruption(ids, sentinel_ids=SENTINELS, eos_id=EOS, p=p, mean_span=mean_span, close=close, input_eos=input_eos, pad_id=7, **masks, **kwargs)
        check_shape(b)
        assert torch.equal(ids, before) and (b['input_ids'][~b['attention_mask']] == 7).all()
        back = restore(b, sentinel_ids=SENTINELS, input_eos=input_eos)
        assert texts(*back) == texts(ids, real)
        for r, (x, y) in enumerate(zip(inputs(b), targets(b))):
            (m, s), kept = counts(int(free[r].sum()), p, mean_span), [t for t in x if t < 800]
            if input_eos: assert kept.pop() == EOS
            if m == 0:
                assert y == [] and kept == ids[r][real[r]].tolist()
                continue
            assert y.pop() == EOS
            used = [t for t in y if t >= 800]
            assert used == list(SENTINELS[:len(used)]) and y[0] == SENTINELS[0]
            if close: assert y.pop() == used.pop()
            assert [t for t in x if t >= 800] == used and len(y) - len(used) == m
            assert s <= len(used) <= s + int((real & ~free)[r].sum()) and (masks['special_mask'] is not None or len(used) == s)
            assert all(b in (0, 1) or a < 800 or b < 800 for a, b in zip(y, y[1:]))               # no empty span
            special = [int(t) for t in ids[r][(real & ~free)[r]]]
            assert is_part_of(special, kept)


def is_part_of(some, all):
    "Whether these are among those, in this order"
    rest = iter(all)
    return not [t for t in some if t not in rest]


def test_special_and_padding_are_never_dropped():
    for rng, ids, masks, real, free, p, mean_span in batches(500, 1):
        ids = torch.where(free, ids, torch.where(real, 2, 3))                      # special: 2, padding: 3
        ids = torch.where(free, ids.clamp(min=4), ids)
        for b in (span_corruption(ids, sentinel_ids=SENTINELS, eos_id=EOS, p=p, mean_span=mean_span, **masks),
                  iid_denoising(ids, style='spans', sentinel_ids=SENTINELS, eos_id=EOS, p=p, **masks),
                  iid_denoising(ids, style='drop', eos_id=EOS, p=p, **masks), ul2(ids, mode_ids=MODES, sentinel_ids=SENTINELS, eos_id=EOS, **masks)):
            y, x = b['labels'], b['input_ids'][b['attention_mask']]
            assert not ((y == 2) | (y == 3)).any() and (x == 2).sum() == (real & ~free).sum() and not (x == 3).any()


def test_the_others_on_random_batches():
    for rng, ids, masks, real, free, p, _ in batches(500, 2):
        b = ul2(ids, mode_ids=MODES, sentinel_ids=SENTINELS, eos_id=EOS, **masks)
        check_shape(b)
        assert texts(*restore(b, sentinel_ids=SENTINELS, n_modes=1)) == texts(ids, real)
        assert (b['input_ids'][:, 0] >= 1000).all()
        c = iid_denoising(ids, style='spans', sentinel_ids=SENTINELS, eos_id=EOS, p=p, **masks)
        check_shape(c)
        assert texts(*restore(c, sentinel_ids=SENTINELS)) == texts(ids, real)
        for style, more in (('bert', dict(vocab_size=800)), ('mass', {}), ('drop', {})):
            c = iid_denoising(ids, style=style, sentinel_ids=[] if style == 'drop' else [900], eos_id=EOS, p=p, **more, **masks)
            check_shape(c)
            for x, y, text in zip(inputs(c), targets(c), texts(ids, real)):
                if style == 'drop': assert len(x) + len(y) == len(text) + 1 + bool(y) and is_part_of(x[:-1], text) and is_part_of(y[:-1], text)
                else: assert y == (text + [EOS] if text else []) and len(x) == len(text) + 1
                if style == 'mass': assert all(a in (b, 900) for a, b in zip(x, y))
        d = deshuffling(ids, eos_id=EOS, **masks)
        check_shape(d)
        for x, y, text in zip(inputs(d), targets(d), texts(ids, real)): assert sorted(x) == sorted(text + [EOS]) and y == (text + [EOS] if text else [])
        n = real.sum(1).tolist()
        fixed = (real & ~free)
        for r, x in enumerate(inputs(d)): assert [t for t, k in zip(x, fixed[r][real[r]].tolist()) if k] == ids[r][fixed[r]].tolist() and len(x) == n[r] + 1


def test_seeds_give_rows_that_do_not_depend_on_the_batch():
    def make(kind, ids, mask, seeds):
        kwargs = dict(eos_id=EOS, attention_mask=mask, seeds=seeds)
        if kind == 'deshuffling': return deshuffling(ids, **kwargs)
        if kind == 'ul2': return ul2(ids, mode_ids=MODES, sentinel_ids=SENTINELS, **kwargs)
        if kind == 'iid': return iid_denoising(ids, style='spans', sentinel_ids=SENTINELS, **kwargs)
        return span_corruption(ids, sentinel_ids=SENTINELS, **kwargs)
    g = torch.Generator().manual_seed(0)
    for kind in ('spans', 'ul2', 'iid', 'deshuffling'):
        for _ in range(40):
            B, T = int(torch.randint(2, 6, (1,), generator=g)), int(torch.randint(2, 80, (1,), generator=g))
            ids, real = torch.randint(2, 800, (B, T), generator=g), torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
            seeds = torch.randint(-1 << 60, 1 << 60, (B,), generator=g)
            b = make(kind, ids, real, seeds)
            again = make(kind, ids, real, seeds)
            assert all(torch.equal(b[k], again[k]) for k in b)
            for r in range(B):
                pad = int(torch.randint(0, 20, (1,), generator=g))
                alone = make(kind, torch.nn.functional.pad(ids[r:r + 1], (0, pad)), torch.nn.functional.pad(real[r:r + 1], (0, pad)), seeds[r:r + 1])
                assert inputs(alone)[0] == inputs(b)[r] and targets(alone)[0] == targets(b)[r]


def test_equal_generators_give_equal_batches_and_others_do_not():
    ids = torch.randint(2, 800, (4, 200))
    def make(seed): return span_corruption(ids, sentinel_ids=SENTINELS, eos_id=EOS, generator=torch.Generator().manual_seed(seed))
    a, b, c = make(0), make(0), make(1)
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a['labels'], c['labels'])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    make(0)
    assert torch.equal(before, torch.get_rng_state())


def test_all_masks_are_equally_likely():
    "Eleven tokens, 4 dropped in 2 spans: 3 ways to cut the spans and 6 to cut the rest"
    n, ids = 36_000, torch.arange(2, 13).expand(36_000, 11)
    for draw in (dict(generator=torch.Generator().manual_seed(0)), dict(seeds=torch.arange(n))):
        b = span_corruption(ids, sentinel_ids=SENTINELS, eos_id=EOS, p=.4, mean_span=2, **draw)
        kinds, times = b['labels'].unique(dim=0, return_counts=True)
        assert len(kinds) == 18 and ((times - 2000)**2 / 2000).sum() < 40.8                     # 17 degrees of freedom: once in a thousand


def test_shape_follows_from_the_arguments_alone():
    for T in (2, 3, 31, 128, 568):
        shapes = {tuple(tuple(v.shape) for v in span_corruption(torch.randint(2, 800, (3, T)), sentinel_ids=SENTINELS, eos_id=EOS,
                  attention_mask=torch.arange(T) < torch.randint(0, T + 1, (3, 1))).values()) for _ in range(10)}
        assert len(shapes) == 1
    assert shapes == {((3, 512), (3, 512), (3, 114))}                                            # as T5 makes of 568 tokens


def test_counts_are_rounded_as_in_t5():
    "Of 2 to 1200 tokens eight round otherwise in float64: 15% of 190 is 28.5, which T5's float32 makes 29"
    n = torch.arange(2, 1201)
    table, _ = _plan(1200, ((.15, 3.), (.3, 8.)), 0, n.device)
    for row, p, mean_span in zip(table, (.15, .3), (3., 8.)): assert row[2:].tolist() == [list(counts(k, p, mean_span)) for k in n.tolist()]
    assert [k for k in n.tolist() if table[0, k, 0] != max(1, round(k * .15))][:3] == [190, 350, 390]
    b = span_corruption(torch.randint(2, 800, (3, 190)), sentinel_ids=SENTINELS, eos_id=EOS)
    assert (((b['labels'] > 1) & (b['labels'] < 800)).sum(1) == 29).all()


def test_rates_on_a_million_tokens():
    g, ids = torch.Generator().manual_seed(0), torch.randint(2, 800, (2000, 512))
    b = span_corruption(ids, sentinel_ids=SENTINELS, eos_id=EOS, generator=g)
    y = b['labels']
    tokens, spans = ((y > 1) & (y < 800)).sum(1), (y >= 800).sum(1)
    assert (tokens == 77).all() and (spans == 26).all()
    b = iid_denoising(ids, style='bert', sentinel_ids=[900], vocab_size=800, eos_id=EOS, generator=g)['input_ids'][:, :-1]
    assert abs((b == 900).float().mean() - .135) < .0015 and abs((b != ids).float().mean() - (.15 - .015 / 800)) < .0015
    modes = ul2(ids, mode_ids=MODES, sentinel_ids=SENTINELS, eos_id=EOS, generator=g, denoisers=[('R', .15, 3, 1), ('S', .25, math.inf, 2), ('X', .5, 3, 1)])['input_ids'][:, 0]
    assert (torch.bincount(modes - 1000) / 2000 - torch.tensor([.25, .5, .25])).abs().max() < .05


def test_one_span_is_prefix_lm():
    ids = torch.randint(2, 800, (3, 40))
    b = span_corruption(ids, sentinel_ids=SENTINELS, eos_id=EOS, p=.25, mean_span=math.inf)
    assert inputs(b) == [row[:30] + [999, EOS] for row in ids.tolist()] and targets(b) == [[999] + row[30:] + [EOS] for row in ids.tolist()]


def test_nothing_leaks():
    from lmnotes.models import t5
    torch.manual_seed(0)
    model = t5(1000, d_model=24, n_heads=2, n_layers=2, d_ff=32).double().eval()
    ids, seeds = torch.randint(2, 800, (3, 40)), torch.arange(3)
    def make(ids): return span_corruption(ids, sentinel_ids=SENTINELS, eos_id=EOS, p=.3, seeds=seeds)
    places = make(torch.arange(2, 42).expand(3, 40))['labels']                                 # which places are dropped
    other = ids.clone()
    for r in range(3):
        dropped = [t - 2 for t in places[r].tolist() if 2 <= t < 42]
        other[r, dropped] = (ids[r, dropped] - 1) % 798 + 2
    a, b = make(ids), make(other)
    assert torch.equal(a['input_ids'], b['input_ids']) and not torch.equal(a['labels'], b['labels'])
    with torch.no_grad():
        one = model(**a).logits
        for j in range(a['labels'].shape[1]):
            y = a['labels'].clone()
            y[:, j] = torch.where(y[:, j] == 5, 6, 5)
            torch.testing.assert_close(model(**a | dict(labels=y)).logits[:, :j + 1], one[:, :j + 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize('kwargs, words', [
    (dict(p=0), 'p is 0'), (dict(p=1.), 'p is 1.0'), (dict(p=math.nan), 'p is nan'), (dict(p='x'), "p is 'x'"), (dict(mean_span=0), 'mean_span is 0'),
    (dict(mean_span=.5), 'mean_span is 0.5'), (dict(mean_span=math.nan), 'mean_span is nan'), (dict(sentinel_ids=range(900, 902)), '8 or more'),
    (dict(sentinel_ids=range(900, 908), close=True), '9 or more'), (dict(sentinel_ids=[900] * 9), 'differ'), (dict(sentinel_ids=[1, *range(900, 910)]), 'differ'),
    (dict(eos_id=True), 'eos_id is True'), (dict(eos_id=1.), 'eos_id is 1.0'), (dict(mean_span=True), 'mean_span is True'), (dict(sentinel_ids='abc'), 'sentinel_ids'),
    *((dict(pad_id=x), 'pad_id') for x in (None, 'x', -1, 1.5, 10**12, True)), (dict(sentinel_ids=[-1]), 'sentinel_ids'), (dict(sentinel_ids=900), 'sentinel_ids'), (dict(eos_id=None), 'eos_id is None'),
    (dict(ids=torch.zeros(2, 1, dtype=torch.long)), 'ids.shape'), (dict(attention_mask=torch.ones(2, 3)), 'attention_mask'),
    (dict(generator=torch.Generator(), seeds=torch.zeros(2, dtype=torch.long)), 'seeds')])
def test_errors(kwargs, words):
    kwargs = dict(ids=torch.randint(2, 800, (2, 160)), sentinel_ids=SENTINELS, eos_id=EOS) | kwargs
    with pytest.raises(LmnotesError, match=words): span_corruption(**kwargs)


def test_enough_sentinels_is_exactly_enough():
    for T in (2, 10, 100, 512):
        for p, mean_span in ((.15, 3), (.5, 1), (.9, 2)):
            ids = torch.randint(2, 800, (2, T))
            needed = max(counts(n, p, mean_span)[1] for n in range(T + 1))
            span_corruption(ids, sentinel_ids=range(1000, 1000 + needed), eos_id=EOS, p=p, mean_span=mean_span)
            with pytest.raises(LmnotesError, match=f'{needed} or more'):
                span_corruption(ids, sentinel_ids=range(1000, 999 + needed), eos_id=EOS, p=p, mean_span=mean_span)


def test_errors_of_the_others():
    ids, good = torch.randint(2, 800, (2, 512)), dict(sentinel_ids=SENTINELS, eos_id=EOS)
    for bad in (lambda: iid_denoising(ids, style='bart', **good), lambda: iid_denoising(ids, style='mass', **good), lambda: iid_denoising(ids, style='drop', **good),
                lambda: iid_denoising(ids, style='bert', sentinel_ids=[900], eos_id=EOS), lambda: iid_denoising(ids, style='spans', vocab_size=9, **good),
                lambda: iid_denoising(ids, style='spans', p=.5, sentinel_ids=range(900, 950), eos_id=EOS), lambda: ul2(ids, mode_ids=dict(R=1, S=2), **good),
                lambda: ul2(ids, mode_ids=MODES, denoisers=[], **good), lambda: ul2(ids, mode_ids=MODES, denoisers=[('R', .15, 0, 1)], **good),
                lambda: ul2(ids, mode_ids=MODES, denoisers=[('R', .15, 3, 0)], **good), lambda: deshuffling(ids, eos_id=-1), lambda: deshuffling(ids[:, :1], eos_id=EOS),
                partial(deshuffling, ids, eos_id=EOS, pad_id=None), partial(iid_denoising, ids, style='drop', eos_id=EOS, pad_id=-1),
                *(partial(iid_denoising, ids, style='bert', sentinel_ids=[900], eos_id=EOS, vocab_size=x) for x in (True, 0, -1, 8.)),
                *(partial(ul2, ids, mode_ids=MODES | dict(R=x), **good) for x in (-1, 999, EOS, 1001, 1.5, True, None)), partial(ul2, ids, mode_ids=None, **good),
                *(partial(ul2, ids, mode_ids=MODES, denoisers=x, **good) for x in (None, [1], ['RSXX'], [('R', .15, 3, '1')], [('R', .15, 3, math.nan)])),
                *(partial(restore, span_corruption(ids, **good), sentinel_ids=x) for x in (None, 'abc', 100, [5, 5]))):
        with pytest.raises(LmnotesError): bad()
    deshuffling(ids, eos_id=2)
    with pytest.raises(LmnotesError): deshuffling(ids, eos_id=2.)                                 # equal to 2, and no token id all the same
    assert len({d[0] for d in UL2}) == 3
