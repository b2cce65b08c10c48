"Pairs: labels that are right, rows that hold what they say, on thousands of random sets of documents; losses against transformers'."
import random

import numpy as np
import pytest
import torch
import transformers
from torch.testing import assert_close

from lmnotes.core import LmnotesError
from lmnotes.hub import from_hf
from lmnotes.masking import mlm
from lmnotes.models import bert
from lmnotes.pairs import PairModel, lay_out, not_next, nsp, pair_loss, read_documents, sentence_order, truncated

CLS, SEP, PAD = 1, 2, 0
FORM = dict(cls_id=CLS, sep_id=SEP, pad_id=PAD)


def documents(rnd, texts=30, most=6, least=2):
    "Documents that repeat one another: sentences drawn from a few texts"
    pool = [[rnd.randint(10, 40) for _ in range(rnd.randint(1, 8))] for _ in range(texts)]
    return [[rnd.choice(pool) for _ in range(rnd.randint(least, most))] for _ in range(rnd.randint(2, 6))]


def marked(rnd, least=2):
    "Each sentence says which it is: document, place, then filler, all of it in its tokens"
    return [[[1000 + 20 * d + s] * rnd.randint(1, 9) for s in range(rnd.randint(least, 7))] for d in range(rnd.randint(2, 6))]


def sentences_of(batch):
    "Sentences of each row, read back from the ids between the marks"
    out = []
    for ids, real in zip(batch['input_ids'], batch['attention_mask']):
        ids = ids[real].tolist()
        assert ids[0] == CLS and ids[-1] == SEP
        row = [[]]
        for t in ids[1:]: row[-1].append(t) if t != SEP else row.append([])
        out.append(row[:-1])
    return out


def check_form(batch, k, max_len):
    ids, real, special, types = (batch[n] for n in ('input_ids', 'attention_mask', 'special_mask', 'token_type_ids'))
    assert ids.shape[1] <= max_len and real.dtype == special.dtype == torch.bool and bool(real.any(0).all())
    assert torch.equal(real, real.sum(1, keepdim=True) > torch.arange(ids.shape[1]))                 # padded on the right, no wider than needed
    assert torch.equal(special, (ids == CLS) | (ids == SEP)) and (special.sum(1) == k + 1).all()
    assert (ids[~real] == PAD).all() and (types[~real] == 0).all()
    before = (ids == SEP).cumsum(1) - (ids == SEP).long()
    assert torch.equal(types[real], (before % 2)[real])


def truncated_naive(lengths, room):
    kept = list(lengths)
    while sum(kept) > room: kept[max(range(len(kept)), key=lambda i: (kept[i], i))] -= 1
    return kept


def test_truncation_is_token_by_token():
    rnd = random.Random(0)
    for _ in range(1500):
        k = rnd.randint(2, 5)
        room = rnd.randint(k, 40)
        rows = [[rnd.randint(1, 25) for _ in range(k)] for _ in range(4)]
        assert truncated(torch.tensor(rows), room).tolist() == [truncated_naive(r, room) for r in rows]


def test_next_sentences_are_right_and_half():
    rnd, g = random.Random(1), torch.Generator().manual_seed(0)
    for _ in range(1500):
        docs = documents(rnd)
        neighbors = {(tuple(a), tuple(b)) for d in docs for a, b in zip(d, d[1:])}
        try: batch = nsp(docs, max_len=64, generator=g, **FORM)
        except LmnotesError as e:
            assert 'repeating one another' in str(e)
            continue
        y, rows = batch['next_sentence_label'], sentences_of(batch)
        check_form(batch, 2, 64)
        assert 2 * int(y.sum()) == len(y) and len(y) == sum(len(d) - 1 for d in docs) // 2 * 2
        for (a, b), label in zip(rows, y.tolist()): assert ((tuple(a), tuple(b)) in neighbors) == (label == 0)


def test_negatives_come_from_other_documents():
    rnd, g = random.Random(2), torch.Generator().manual_seed(0)
    for _ in range(1000):
        batch, max_len = nsp(marked(rnd), max_len=(n := rnd.randint(5, 24)), generator=g, **FORM), n
        check_form(batch, 2, max_len)
        for (a, b), label in zip(sentences_of(batch), batch['next_sentence_label'].tolist()):
            (doc_a, at_a), (doc_b, at_b) = divmod(a[0] - 1000, 20), divmod(b[0] - 1000, 20)
            assert (doc_a != doc_b) if label else (doc_a == doc_b and at_b == at_a + 1)


def test_negatives_are_even_over_all_that_may_be():
    docs = [[[11], [12]], [[12], [13], [14]], [[15], [12]], [[16], [17]]]
    s = read_documents(docs, 2)
    found, times = not_next(s, torch.zeros(60_000, dtype=torch.long), torch.Generator().manual_seed(0)).unique(return_counts=True)
    assert found.tolist() == [3, 4, 5, 7, 8]                             # not 2 and 6, which say what follows
    assert (times - 12_000).abs().max() < 5 * (60_000 * .2 * .8)**.5


def test_every_first_sentence_once_and_n_of_them():
    docs = marked(random.Random(3))
    total = sum(len(d) - 1 for d in docs)
    rows = sentences_of(nsp(docs, max_len=64, **FORM))
    assert len({a[0] for a, _ in rows}) == len(rows) == total // 2 * 2
    assert len(nsp(docs, n=4, max_len=64, **FORM)['input_ids']) == 4


def test_order_comes_back():
    rnd, g = random.Random(4), torch.Generator().manual_seed(0)
    for i in range(1500):
        k = 2 + i % 4
        docs = marked(rnd, least=k + (k == 2))
        batch = sentence_order(docs, k=k, max_len=(m := rnd.randint(2 * k + 1, 50)), generator=g, **FORM)
        check_form(batch, k, m)
        y = batch['sentence_order_label']
        if k == 2:
            assert 2 * int(y.sum()) == len(y)
            y = torch.stack([y, 1 - y], 1)
        else: assert (batch['input_ids'].gather(1, batch['sentence_places']) == SEP).all() and len(y) == sum(len(d) - k + 1 for d in docs)
        for row, places in zip(sentences_of(batch), y.tolist()):
            first = [s[0] for _, s in sorted(zip(places, row))]
            assert first == list(range(first[0], first[0] + k))


def test_equal_neighbors_have_no_order():
    a, b = [5, 6], [7]
    batch = sentence_order([[a, a, b], [b, b, a]], max_len=9, **FORM)
    assert all(x != y for x, y in sentences_of(batch)) and len(batch['input_ids']) == 2
    with pytest.raises(LmnotesError, match='0 runs'): sentence_order([[a, a], [b, b]], **FORM)


def test_orders_are_even():
    docs = [[[10 + i] for i in range(4)] for _ in range(20_000)]
    orders, times = sentence_order(docs, k=3, max_len=8, generator=torch.Generator().manual_seed(0), **FORM)['sentence_order_label'].unique(dim=0, return_counts=True)
    assert len(orders) == 6 and times.sum() == 40_000 and (times - 40_000 / 6).abs().max() < 5 * (40_000 * 5 / 36)**.5


def test_equal_generators_give_equal_batches_and_documents_stay():
    docs = documents(random.Random(5), texts=500)
    copy = [[list(s) for s in d] for d in docs]
    for f in (nsp, sentence_order):
        a, b, c = (f(docs, max_len=20, generator=torch.Generator().manual_seed(s), **FORM) for s in (1, 1, 2))
        assert all(torch.equal(a[k], b[k]) for k in a) and any(a[k].shape != c[k].shape or not torch.equal(a[k], c[k]) for k in a)
    assert docs == copy
    tensors = [[torch.tensor(s) for s in d] for d in docs]
    assert torch.equal(nsp(tensors, generator=torch.Generator().manual_seed(1), **FORM)['input_ids'], nsp(docs, generator=torch.Generator().manual_seed(1), **FORM)['input_ids'])


def test_short_documents():
    docs = [[[5], [6]], [[7]], [[8], [9]]]
    for f in (nsp, sentence_order):
        with pytest.raises(LmnotesError, match=r'documents\[1\] is .1 sentence'): f(docs, **FORM)
        rows = sentences_of(f(docs, skip_short=True, **FORM))
        assert len(rows) == 2 and [7] not in sum(rows, [])
    with pytest.raises(LmnotesError, match=r'documents\[0\].*3 sentences or more'): sentence_order([[[5], [6]]], k=3, **FORM)


@pytest.mark.parametrize('how', [dict(cls_id=None), dict(sep_id=-1), dict(pad_id=1.5), dict(max_len=4), dict(n=3), dict(n=0), dict(n=100), dict(n=True), dict(generator=3)])
def test_bad_arguments(how):
    name = next(iter(how))
    with pytest.raises(LmnotesError, match=name): nsp([[[5], [6]], [[7], [8]]], **(FORM | how))


@pytest.mark.parametrize('docs', [5, 'text', [[[5], [6]]], [[[5], []], [[7], [8]]], [[5, 6], [7, 8]], [[[.5], [6]], [[7], [8]]], [],
                                  [1, 2], [[[[5]], [6]], [[7], [8]]], [[[2**70], [6]], [[7], [8]]], [[[-1], [6]], [[7], [8]]],
                                  [[[True], [6]], [[7], [8]]], [['ab', 'c'], ['d', 'e']], [None, [[7], [8]]]])
def test_bad_documents(docs):
    with pytest.raises(LmnotesError, match='documents'): nsp(docs, **FORM)


def pretraining(k, seed=0):
    rnd = random.Random(seed)
    docs = [[[rnd.randint(10, 59) for _ in range(rnd.randint(2, 9))] for _ in range(5)] for _ in range(5)]
    f = nsp if k is None else sentence_order
    batch = f(docs, max_len=24, generator=torch.Generator().manual_seed(seed), **FORM, **({} if k is None else dict(k=k)))
    return batch | mlm(batch['input_ids'], mask_id=3, vocab_size=60, p=.3, attention_mask=batch['attention_mask'], special_mask=batch['special_mask'])


SIZE = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_position_embeddings=32)


def test_bert_for_pretraining():
    torch.manual_seed(0)
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SIZE)).eval()
    plain = transformers.BertForMaskedLM(theirs.config)
    plain.load_state_dict({n: w for n, w in theirs.state_dict().items() if n in plain.state_dict()})
    ours = PairModel(from_hf(plain)).eval()
    ours.pool.load_state_dict(theirs.bert.pooler.dense.state_dict())
    ours.classify.load_state_dict(theirs.cls.seq_relationship.state_dict())
    batch = pretraining(None)
    out = theirs(**{k: v for k, v in batch.items() if k != 'special_mask'})
    for model in (theirs, ours):
        loss, n = pair_loss(model, batch)
        assert_close(loss / n, out.loss)
        assert n == int((batch['labels'] != -100).sum())
    out.loss.backward()
    (loss / n).backward()
    assert_close(ours.pool.weight.grad, theirs.bert.pooler.dense.weight.grad, rtol=1e-4, atol=1e-6)
    assert_close(ours.get_input_embeddings().weight.grad, theirs.bert.embeddings.word_embeddings.weight.grad, rtol=1e-4, atol=1e-5)


def test_albert_for_pretraining():
    torch.manual_seed(0)
    model = transformers.AlbertForPreTraining(transformers.AlbertConfig(**SIZE, embedding_size=16)).eval()
    batch = pretraining(2)
    out = model(**{k: v for k, v in batch.items() if k != 'special_mask'})
    loss, n = pair_loss(model, batch)
    assert_close(loss / n, out.loss)


def test_sum_and_count():
    torch.manual_seed(0)
    model, batch = PairModel(bert(60, d_model=32, n_layers=1, n_heads=2, max_len=32), n_labels=3).double().eval(), pretraining(3)
    out = model(batch['input_ids'], batch['attention_mask'], token_type_ids=batch['token_type_ids'], sentence_places=batch['sentence_places'])
    y, n = batch['sentence_order_label'], int((batch['labels'] != -100).sum())
    pairs = -out.pair_logits.log_softmax(-1).gather(-1, y[..., None])
    tokens = out.nll(batch['labels'])
    assert_close(pair_loss(model, batch, weight=.5)[0] / n, tokens / n + .5 * pairs.mean())
    assert_close(pair_loss(model, batch, tokens_per_pair=4.)[0], tokens + 4 * pairs.sum())
    alone, m = pair_loss(model, {k: v for k, v in batch.items() if k != 'labels'})
    assert m == y.numel()
    assert_close(alone / m, pairs.mean())
    parts = [pair_loss(model, {k: v[i:i + 2] for k, v in batch.items()}, tokens_per_pair=4.) for i in range(0, len(y), 2)]
    assert_close(sum(s for s, _ in parts), tokens + 4 * pairs.sum())
    with pytest.raises(LmnotesError, match='batch'): pair_loss(model, dict(input_ids=batch['input_ids']))


def test_rows_do_not_read_their_padding():
    torch.manual_seed(0)
    model, batch = PairModel(bert(60, d_model=32, n_layers=2, n_heads=2, max_len=32)).double().eval(), pretraining(2)
    keep = ('input_ids', 'attention_mask', 'token_type_ids')
    with torch.no_grad():
        together = model(**{k: batch[k] for k in keep}).pair_logits
        for i in range(len(together)):
            n = int(batch['attention_mask'][i].sum())
            assert_close(model(**{k: batch[k][i:i + 1, :n] for k in keep}).pair_logits[0], together[i])


def test_only_an_encoder_with_a_head():
    for other in (bert(20, d_model=8, n_layers=1, n_heads=1, max_len=8, head=None), torch.nn.Linear(2, 2)):
        with pytest.raises(LmnotesError, match='model'): PairModel(other)
    with pytest.raises(LmnotesError, match='n_labels'): PairModel(bert(20, d_model=8, n_layers=1, n_heads=1, max_len=8), n_labels=1)


def test_layout_of_many_sentences():
    docs = [[[10 + i] * (i + 1) for i in range(5)]]
    batch = lay_out(read_documents(docs, 2), torch.tensor([[4, 0, 2], [1, 1, 1]]), max_len=30, **FORM)
    assert sentences_of(batch) == [[[14] * 5, [10], [12] * 3], [[11] * 2] * 3]


def test_numbers_of_numpy_are_ids():
    docs = [[[np.int64(10 * d + 3 * s + t) for t in range(3)] for s in range(3)] for d in range(3)]
    plain = [[[int(t) for t in s] for s in d] for d in docs]
    a, b = (nsp(x, max_len=12, **FORM, generator=torch.Generator().manual_seed(0)) for x in (docs, plain))
    assert all(torch.equal(a[k], b[k]) for k in a)
