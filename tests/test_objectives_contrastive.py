"Contrastive: the loss against loops over random batches, its bound, its gradient, what padding and equal texts do."
import math

import pytest
import torch
import transformers
from torch.testing import assert_close

from lmnotes.contrastive import alignment, embed_texts, info_nce, pooled, same_text, simcse, simcse_loss, uniformity
from lmnotes.core import LmnotesError
from lmnotes.models import bert, llama
from lmnotes.training import Learner


def naive(a, b, temperature, negatives, same):
    "A loop over rows, in Python's numbers"
    total = 0.
    for i in range(len(a)):
        rows = [b[j] for j in range(len(b)) if j == i or not same[i][j]] + list(negatives)
        right = sum(j < i and not same[i][j] for j in range(len(b)))
        s = [torch.cosine_similarity(a[i], r, dim=0).item() / temperature for r in rows]
        total -= s[right] - max(s) - math.log(sum(math.exp(x - max(s)) for x in s))
    return total


def test_against_a_loop():
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        B, N, D = (int(torch.randint(low, high, (), generator=g)) for low, high in ((2, 7), (0, 4), (1, 6)))
        a, b, more = (torch.randn(n, D, generator=g, dtype=torch.float64) for n in (B, B, N))
        same = torch.rand(B, B, generator=g) < .3
        same = same | same.T
        t = 10 ** float(torch.rand((), generator=g) * 3 - 2)
        loss, n = info_nce(a, b, temperature=t, negatives=more if N else None, same=same)
        assert n == B
        assert_close(loss.item(), naive(a, b, t, more, same.tolist()), rtol=1e-9, atol=1e-9)
        both, _ = info_nce(a, b, temperature=t, negatives=more if N else None, same=same, symmetric=True)
        assert_close(both.item(), (naive(a, b, t, more, same.tolist()) + naive(b, a, t, more, same.tolist())) / 2, rtol=1e-9, atol=1e-9)


def test_gradients():
    g = torch.Generator().manual_seed(0)
    a, b, more = (torch.randn(n, 4, generator=g, dtype=torch.float64, requires_grad=True) for n in (4, 4, 2))
    same = torch.eye(4, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    assert torch.autograd.gradcheck(lambda a, b, n: info_nce(a, b, temperature=.3, negatives=n, same=same, symmetric=True)[0], (a, b, more))
    loss, _ = info_nce(a, b, same=torch.ones(4, 4, dtype=torch.bool))            # no negatives at all: nothing to learn, and no NaN
    loss.backward()
    assert loss == 0 and (a.grad == 0).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_finite_at_any_temperature(dtype):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    for t in (.01 if dtype == torch.float16 else 1e-6, .05, 1e6):           # a gradient beyond float16 cannot be held in it
        loss, n = info_nce(x, -x, temperature=t)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite() and x.grad.isfinite().all()
    assert_close((loss / n).item(), math.log(8), rtol=1e-4, atol=0)              # at a huge temperature all are alike


def test_bound_is_never_above_the_log_of_rows():
    g = torch.Generator().manual_seed(0)
    for B in (2, 5, 64):
        for _ in range(50):
            x = torch.randn(B, 8, generator=g)
            loss, n = info_nce(x, x + .1 * torch.randn(B, 8, generator=g), temperature=.02)
            assert math.log(B) - loss / n <= math.log(B)
    x = torch.ones(6, 3)
    assert_close((info_nce(x, x)[0] / 6).item(), math.log(6))


def test_simcse_rows_and_equal_texts():
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        B, T = (int(torch.randint(1, 8, (), generator=g)) for _ in range(2))
        ids = torch.randint(1, 3, (B, T), generator=g)
        real = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
        special = torch.rand(B, T, generator=g) < .2
        before = ids.clone()
        batch = simcse(ids, attention_mask=real, special_mask=special)
        texts = [tuple(r[m].tolist()) for r, m in zip(ids, real)]
        assert batch['same'].tolist() == [[x == y for y in texts] for x in texts]
        for half in (slice(0, B), slice(B, 2 * B)):
            assert torch.equal(batch['input_ids'][half], ids) and torch.equal(batch['attention_mask'][half], real)
            assert torch.equal(batch['special_mask'][half], special & real)
        assert torch.equal(ids, before)


@pytest.mark.parametrize('side', ['left', 'right'])
def test_pooled_leaves_padding_and_special_tokens_out(side):
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        T = int(torch.randint(2, 9, (), generator=g))
        n = int(torch.randint(1, T + 1, (), generator=g))
        real = torch.arange(T) < n if side == 'right' else torch.arange(T) >= T - n
        h, special = torch.randn(1, T, 3, generator=g), torch.rand(1, T, generator=g) < .3
        kept = h[0, real & ~special[0]]
        assert_close(pooled(h, real[None], special)[0], kept.mean(0) if len(kept) else torch.zeros(3))
        assert_close(pooled(h, real[None], special, 'cls')[0], h[0, real][0])


def small(**how): return bert(40, **dict(d_model=32, n_layers=2, n_heads=2, max_len=12, head=None, dropout=.1) | how)


def test_vectors_do_not_depend_on_padding():
    torch.manual_seed(0)
    model, ids = small().double().eval(), torch.randint(1, 40, (4, 5))
    wide = torch.cat([ids, torch.full((4, 4), 7)], 1)
    mask = torch.arange(9).expand(4, 9) < 5
    for how in ('mean', 'cls'):
        assert_close(embed_texts(model, dict(input_ids=wide, attention_mask=mask), how), embed_texts(model, dict(input_ids=ids, attention_mask=mask[:, :5]), how))


def test_dropout_is_asked_for():
    ids = torch.randint(1, 40, (4, 5))
    for model in (small().eval(), small(dropout=0., attention_dropout=0.).train()):
        with pytest.raises(LmnotesError, match='dropout'): simcse_loss(model, simcse(ids))
        with torch.no_grad(): assert simcse_loss(model, simcse(ids))[0].isfinite()
    loss, n = simcse_loss(small().train(), simcse(ids))
    loss.backward()
    assert n == 4


def test_heads_are_refused():
    batch = simcse(torch.randint(1, 40, (4, 5)))
    for head in ('lm', 'classification'):
        with pytest.raises(LmnotesError, match='without a head'): embed_texts(small(head=head), batch)
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(LmnotesError, match='without a head'): embed_texts(theirs, batch)
    with pytest.raises(LmnotesError, match='rows'): simcse_loss(small(), dict(input_ids=torch.ones(3, 2, dtype=torch.long), attention_mask=torch.ones(3, 2)))
    for n in (1, 2, 4, 7):                                               # a part of a batch, as a loop short of memory would cut it
        with pytest.raises(LmnotesError, match='rows of input_ids'): simcse_loss(small().train(), {k: v[:n] for k, v in batch.items()})


def test_other_models_learn():
    "transformers' BERT, and a causal model of ours, through a Learner: the loss falls"
    torch.manual_seed(0)
    theirs = transformers.BertModel(transformers.BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    ours = llama(40, d_model=32, n_layers=1, n_heads=2, d_ff=32, head=None, dropout=.1)
    rows = [torch.randint(1, 40, (6,)) for _ in range(64)]
    for model in (theirs, ours):
        learn = Learner(model, rows, collate_fn=lambda r: simcse(torch.stack(r)), batch_size=16, lr=.01, loss=simcse_loss, precision='fp32')
        learn.fit(steps=12)
        assert learn.history[-1]['loss'] < learn.history[0]['loss'] and learn.tokens == 12 * 16


def test_alignment_and_uniformity():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(9, 4, generator=g, dtype=torch.float64), dim=-1) for _ in range(2))
    assert_close(alignment(5 * x, y), (x - y).square().sum(1).mean())
    pairs = [-2 * (x[i] - x[j]).square().sum().item() for i in range(9) for j in range(i)]
    assert_close(uniformity(3 * x).item(), math.log(sum(map(math.exp, pairs)) / len(pairs)))
    assert uniformity(torch.ones(5, 3)) == 0
    assert_close(uniformity(torch.tensor([[1., 0.], [-1., 0.]])).item(), -8.)


def test_same_text_ignores_padding():
    ids, real = torch.tensor([[1, 2, 9], [1, 2, 8], [1, 2, 2]]), torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1]]).bool()
    assert same_text(ids, real).tolist() == [[True, True, False], [True, True, False], [False, False, True]]


@pytest.mark.parametrize('how', [dict(temperature=0), dict(temperature=math.inf), dict(temperature=math.nan), dict(temperature=True), dict(negatives=torch.ones(2, 5)), dict(same=torch.ones(2, 2))])
def test_bad_arguments(how):
    with pytest.raises(LmnotesError, match=next(iter(how))): info_nce(torch.ones(3, 2), torch.ones(3, 2), **how)
    with pytest.raises(LmnotesError, match='rows of a'): info_nce(torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(LmnotesError, match='b.shape'): info_nce(torch.ones(3, 2), torch.ones(2, 2))


@pytest.mark.parametrize('bad', [[1], None, torch.ones(3), torch.ones(0, 2), torch.tensor([[math.nan, 1.]] * 3), torch.full((3, 2), math.inf)], ids=str)
def test_what_is_no_vector(bad):
    good = torch.ones(3, 2)
    with pytest.raises(LmnotesError, match='^a '): info_nce(bad, good)
    with pytest.raises(LmnotesError, match='^b '): info_nce(good, bad)
    if bad is not None:
        with pytest.raises(LmnotesError, match='^negatives '): info_nce(good, good, negatives=bad)
    with pytest.raises(LmnotesError, match='^negatives '): info_nce(good[:1], good[:1], negatives=torch.ones(0, 2))     # would be a loss of 0
