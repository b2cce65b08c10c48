"Masked language modeling on thousands of random batches: what comes back, what is chosen, how often, and what depends on what."
import random

import pytest
import torch
from torch.testing import assert_close

from lmnotes.core import LmnotesError
from lmnotes.draws import Draws, choose
from lmnotes.masking import corrupt, lay_spans, mlm, original, span_lengths, units, word_starts, word_table
from lmnotes.models import bert
from lmnotes.scoring import token_loss

V, MASK = 100, 99


def some_batch(seed):
    "Random ids, masks and ways to choose"
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    B, T = rng.randint(1, 6), rng.randint(1, 40)
    ids = torch.randint(0, V - 1, (B, T), generator=g)
    n = torch.randint(0, T + 1, (B, 1), generator=g)
    # padded on the right or on the left
    real = torch.arange(T) < n if rng.random() < .5 else torch.arange(T) >= T - n
    special = torch.rand(B, T, generator=g) < rng.choice([0, .1, .5, 1])
    how = dict(p=rng.choice([0, .01, .15, .5, .9, 1]), replace=rng.choice([(.8, .1, .1), (1, 0, 0), (0, 1, 0),
        (0, 0, 1), (.2, .5, .3)]))
    if rng.random() < .5: how['words'] = torch.rand(B, T, generator=g) < .5
    if rng.random() < .4: how |= dict(spans=rng.choice([.01, .2, .7, 1]), max_span=rng.choice([1, 3, 10, 100]))
    elif rng.random() < .3: how['exact'] = True
    return ids, real, special, how


@pytest.mark.parametrize('block', range(8))
def test_thousands_of_batches(block):
    for seed in range(block * 400, block * 400 + 400):
        ids, real, special, how = some_batch(seed)
        before = [x.clone() for x in (ids, real, special)]
        out = mlm(ids, mask_id=MASK, vocab_size=V, attention_mask=real, special_mask=special,
                  generator=torch.Generator().manual_seed(seed), **how)
        chosen, free = out['labels'] != -100, real & ~special
        assert torch.equal(original(out), ids) and torch.equal(out['attention_mask'], real)
        assert not (chosen & ~free).any() and torch.equal(out['input_ids'][~chosen], ids[~chosen])
        for x, y in zip((ids, real, special), before): assert torch.equal(x, y)
        again = mlm(ids, mask_id=MASK, vocab_size=V, attention_mask=real, special_mask=special,
                    generator=torch.Generator().manual_seed(seed), **how)
        assert all(torch.equal(out[k], again[k]) for k in out)
        if how['p'] == 0: assert not chosen.any()
        if how['p'] == 1: assert torch.equal(chosen, free)
        if how['replace'] == (1, 0, 0): assert (out['input_ids'][chosen] == MASK).all()
        if how['replace'] == (0, 0, 1): assert torch.equal(out['input_ids'], ids)
        number, n = units(free, how.get('words'))
        for b in range(len(ids)):  # a word is chosen whole or not at all
            for w in range(int(n[b])): assert chosen[b][free[b] & (number[b] == w)].unique().numel() == 1
        if 'spans' in how or 'exact' in how:
            hidden = torch.tensor([number[b][chosen[b]].unique().numel() for b in range(len(ids))])
            assert torch.equal(hidden, (n * how['p']).round().long().clamp(min=1 if how['p'] else 0).minimum(n))


@pytest.mark.parametrize('block', range(4))
def test_a_row_does_not_depend_on_its_batch(block):
    for seed in range(block * 200, block * 200 + 200):
        ids, _, special, how = some_batch(seed)
        B, T = ids.shape
        real = torch.arange(T) < torch.randint(1, T + 1, (B, 1))
        seeds, words = torch.arange(B) + 1000 * seed, how.pop('words', None)
        whole = mlm(ids, mask_id=MASK, vocab_size=V, attention_mask=real, special_mask=special, words=words,
                    seeds=seeds, **how)
        b, n = seed % B, int(real[seed % B].sum())
        cut = [None if x is None else x[b:b + 1, :n] for x in (ids, special, words)]
        alone = mlm(cut[0], mask_id=MASK, vocab_size=V, special_mask=cut[1], words=cut[2], seeds=seeds[b:b + 1],
                    **how)
        for key in ('input_ids', 'labels'): assert torch.equal(whole[key][b, :n], alone[key][0])


@pytest.mark.parametrize('how', [dict(), dict(exact=True), dict(words=True), dict(spans=.2),
                                 dict(spans=.2, words=True), dict(words=True, exact=True)], ids=str)
@pytest.mark.parametrize('seeded', [False, True])
def test_rates_on_a_million_tokens(how, seeded):
    torch.manual_seed(1)
    ids, how = torch.randint(0, V - 1, (2000, 500)), dict(how)
    if 'words' in how: how['words'] = torch.rand(ids.shape) < .6
    out = mlm(ids, mask_id=MASK, vocab_size=V, seeds=torch.arange(2000) if seeded else None, **how)
    chosen = out['labels'] != -100
    assert ids.numel() == 1_000_000
    assert abs(chosen.float().mean() - .15) < .002
    read = out['input_ids'][chosen]
    assert abs((read == MASK).float().mean() - (.8 + .1 / V)) < .005 and abs((read == ids[chosen]).float().mean() - (.1 + .1 / V)) < .004
    others = read[(read != MASK) & (read != ids[chosen])]
    # random ids are evenly spread
    assert torch.bincount(others, minlength=V)[:MASK].min() > 0 and abs(others.float().mean() - 49) < 1


def test_random_ids_and_their_default():
    ids = torch.zeros(50, 50, dtype=torch.long)
    def found(**how): return mlm(ids, mask_id=MASK, vocab_size=V, p=1, replace=(0, 1, 0), **how)['input_ids'].unique()
    assert found().tolist() == list(range(V))
    assert found(random_ids=torch.tensor([3, 50])).tolist() == [3, 50]


def test_nothing_leaks():
    "At masked and replaced places the original is nowhere: another one changes no logit of a model, in float64"
    torch.manual_seed(0)
    model = bert(V, d_model=16, n_layers=2, n_heads=2, max_len=40).double().eval()
    for seed in range(40):
        ids = torch.randint(0, V - 1, (3, 30))
        same = dict(mask_id=MASK, vocab_size=V, p=.4, seeds=torch.arange(3) + seed,
                    **[{}, dict(spans=.2), dict(exact=True), dict(words=torch.rand(3, 30) < .5)][seed % 4])
        out = mlm(ids, **same)
        gone = (out['labels'] != -100) & (out['input_ids'] != ids)
        other = mlm(torch.where(gone, (ids + 1) % (V - 1), ids), **same)
        with torch.no_grad(): a, b = (model(input_ids=x['input_ids']).logits for x in (out, other))
        assert gone.any() and torch.equal(a, b) and not torch.equal(out['labels'], other['labels'])


def test_a_span_shares_its_fate_and_a_word_does_not():
    torch.manual_seed(0)
    # two hidden in a row
    out = mlm(torch.zeros(2000, 20, dtype=torch.long), mask_id=MASK, vocab_size=V, spans=.2, p=.1,
              replace=(.5, 0, .5))
    masked, chosen = out['input_ids'] == MASK, out['labels'] != -100
    adjacent = (chosen[:, 1:] & chosen[:, :-1]).any(1)  # one span, or (seldom) two that touch
    differ = masked.sum(1)[adjacent] == 1
    assert (chosen.sum(1) == 2).all() and adjacent.sum() > 1400 and differ.float().mean() < .03
    ids = torch.zeros(400, 60, dtype=torch.long)
    words = (torch.arange(60) % 6 == 0).expand(400, 60)
    out = mlm(ids, mask_id=MASK, vocab_size=V, words=words, replace=(.5, 0, .5), p=1)
    per_word = (out['input_ids'] == MASK).view(400, 10, 6).sum(-1).flatten().bincount(minlength=7) / 4000
    assert_close(per_word, torch.tensor([1, 6, 15, 20, 15, 6, 1.]) / 64, atol=.03, rtol=0)  # each token by itself


def spans_one_by_one(lengths, budget, n, u):
    "lay_spans for one row: which of the pieces are spans, then piece after piece"
    used, cut = 0, []
    for length in lengths:
        length = min(length, budget - used)
        if length > 0: cut.append(length); used += length
    pieces = n - budget + len(cut)
    order = sorted(range(pieces), key=lambda i: u[i])[:len(cut)]
    hidden = []
    for i in range(pieces): hidden += [True] * cut.pop(0) if i in order else [False]
    return hidden


def test_spans_against_a_loop():
    g = torch.Generator().manual_seed(0)
    for _ in range(800):
        T = int(torch.randint(1, 50, (1,), generator=g))
        n = torch.randint(0, T + 1, (3,), generator=g)
        budget = (torch.rand(3, generator=g) * (n + 1)).long().minimum(n)
        lengths = span_lengths(torch.rand(3, T + 1, generator=g), .3, 8)
        u = torch.rand(3, T, generator=g)
        hidden, piece = lay_spans(lengths, budget, n, u)
        for b in range(3):
            assert hidden[b].tolist() == spans_one_by_one(lengths[b].tolist(), int(budget[b]), int(n[b]),
                                                          u[b].tolist()) + [False] * (T - int(n[b]))
        assert (hidden.sum(1) == budget).all() and 0 <= piece.min() and piece.max() < T


@pytest.mark.parametrize('s, longest', [(.2, 10), (.5, 3), (.05, 30), (.9, 10), (1, 10)])
def test_lengths_of_spans(s, longest):
    k = torch.arange(longest, dtype=torch.float64)
    share = s * (1 - s)**k
    found = span_lengths(torch.rand(400_000, generator=torch.Generator().manual_seed(0)), s, longest)
    assert_close(found.bincount(minlength=longest + 1)[1:] / 400_000, (share / share.sum()).float(), atol=.004,
                 rtol=0)
    assert span_lengths(torch.tensor([0.]), s, longest).tolist() == [1] and found.max() <= longest


@pytest.mark.parametrize('s', [1e-6, 1e-9, 1e-20, 1e-300])
def test_spans_that_hardly_ever_end_have_even_lengths(s):
    found = span_lengths(torch.rand(100_000, generator=torch.Generator().manual_seed(0)), s, 10)
    assert_close(found.bincount(minlength=11)[1:] / 100_000, torch.full((10,), .1), atol=.005, rtol=0)


def test_every_arrangement_is_as_likely():
    "n = 5, two spans of lengths 2 and 1: four pieces, six arrangements"
    N = 12_000
    hidden, _ = lay_spans(torch.tensor([[2, 1]]).expand(N, 2), torch.full((N,), 3), torch.full((N,), 5),
                          torch.rand(N, 5, generator=torch.Generator().manual_seed(0)))
    sets, counts = hidden.int().unique(dim=0, return_counts=True)
    assert len(sets) == 6 and (counts / N - 1 / 6).abs().max() < .02


def test_corrupt_is_the_rule():
    ids, chosen = torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.bool)
    class Given:
        def uniform(self, n): return torch.tensor([[0., .79, .81, .89, .91]])
        def integers(self, high, n): return torch.arange(n)[None] + 10
    out, labels = corrupt(ids, chosen, Given(), mask_id=MASK, vocab_size=V)
    assert out.tolist() == [[MASK, MASK, 12, 13, 0]] and labels.tolist() == [[0] * 5]
    together, _ = corrupt(ids, chosen, Given(), mask_id=MASK, vocab_size=V, group=torch.tensor([[0, 2, 2, 2, 4]]))
    assert together.tolist() == [[MASK, 11, 12, 13, 0]]


def test_words_of_wordpiece_and_of_bytes():
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    from lmnotes.data import load_corpus, load_tokenizer
    texts = load_corpus('factbook', 'train')['text'][:400]
    made = BertWordPieceTokenizer()
    made.train_from_iterator(texts, vocab_size=1500, show_progress=False)
    for tokenizer, allowed in ((BertTokenizerFast(tokenizer_object=made._tokenizer), 0),
                               (load_tokenizer('gpt-tiny'), .01)):
        table, differ, n = word_table(tokenizer), 0, 0
        for text in texts[:100]:
            e = tokenizer(text[:1000], add_special_tokens=False)
            truth = torch.tensor([a != b for a, b in zip([None, *e.word_ids()], e.word_ids())])
            differ, n = differ + int((word_starts(torch.tensor([e['input_ids']]),
                                                  table)[0] != truth).sum()), n + len(truth)
        assert n > 4000 and differ <= allowed * n
    with pytest.raises(LmnotesError): word_table(object())


def test_models_of_transformers_score_the_same():
    import transformers
    torch.manual_seed(0)
    tiny = dict(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                max_position_embeddings=64, pad_token_id=0)
    for name in ('Bert', 'Electra', 'Roberta'):
        model = getattr(transformers, f'{name}ForMaskedLM')(getattr(transformers, f'{name}Config')(**tiny)).eval()
        ids = torch.randint(1, V - 1, (5, 30))
        batch = mlm(ids, mask_id=MASK, vocab_size=V, attention_mask=torch.arange(30) < torch.tensor([[30], [12],
            [3], [30], [7]]), p=.3)
        total, n = token_loss(model, batch)
        assert n == (batch['labels'] != -100).sum() > 10
        assert_close(model(**batch).loss, total / n, atol=1e-5, rtol=1e-5)


def test_nothing_to_predict_adds_nothing():
    model, ids = bert(V, d_model=8, n_layers=1, n_heads=1, max_len=20), torch.ones(2, 9, dtype=torch.long)
    batch = mlm(ids, mask_id=MASK, vocab_size=V, special_mask=torch.ones(2, 9, dtype=torch.bool), spans=.2)
    assert token_loss(model, batch) == (0., 0)
    assert choose(Draws(ids).uniform(9), torch.zeros(2, 9, dtype=torch.bool), torch.ones(2)).sum() == 0


@pytest.mark.parametrize('bad, named', [
    (dict(p=-.1), 'p'), (dict(p=1.01), 'p'), (dict(p=float('inf')), 'p'), (dict(p=None), 'p'),
                                        (dict(mask_id=None), 'mask_id'), (dict(mask_id=-1), 'mask_id'),
                                        (dict(mask_id=V), 'mask_id'),
    (dict(mask_id=True), 'mask_id'), (dict(vocab_size=None), 'vocab_size'), (dict(vocab_size=0), 'vocab_size'),
                                        (dict(replace=(.8, .1)), 'replace'), (dict(replace=(.8, .1, .05)), 'replace'),
    (dict(replace=(1.2, -.1, -.1)), 'replace'), (dict(spans=0.), 'spans'), (dict(spans=2), 'spans'),
                                        (dict(spans=.2, max_span=0), 'max_span'), (dict(spans=.2, max_span=True), 'max_span'),
                                        (dict(words=torch.ones(2, 4)), 'words'), (dict(words=[1]), 'words'),
    (dict(random_ids=torch.tensor([5, V])), 'random_ids'), (dict(random_ids=torch.tensor([-1])), 'random_ids'),
    (dict(random_ids=[1]), 'random_ids'), (dict(attention_mask=torch.ones(1, 5)), 'attention_mask'),
                                        (dict(seeds=torch.ones(2, dtype=torch.long), generator=torch.Generator()),
                                         'seeds')], ids=str)
def test_refused(bad, named):
    with pytest.raises(LmnotesError, match=named): mlm(torch.ones(2, 5, dtype=torch.long),
                                                       **dict(mask_id=MASK, vocab_size=V) | bad)


def test_learner_takes_it():
    from lmnotes.training import Learner
    torch.manual_seed(0)
    rows, model = torch.arange(8).repeat(64, 2), bert(V, d_model=16, n_layers=1, n_heads=2, max_len=16)
    learn = Learner(model, rows, collate_fn=lambda r: mlm(torch.stack(list(r)), mask_id=MASK, vocab_size=V, p=.3),
                    batch_size=32).fit(steps=60)
    assert learn.history[-1]['loss'] < .7 * learn.history[0]['loss']
