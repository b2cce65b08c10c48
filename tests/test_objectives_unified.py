"unilm on thousands of random rows: masks, segments, rates, what comes back, and that nothing leaks under any of the four masks."
import numpy as np, pytest, torch
import transformers as t
from torch.testing import assert_close

from lmnotes.core import LmnotesError
from lmnotes.inputs import model_inputs, n_scored
from lmnotes.masks import padding_mask, unilm_mask
from lmnotes.models import bert, unilm as unilm_model
from lmnotes.scoring import token_loss
from lmnotes.unified import KINDS, check_proportions, mixed_mask, six_segments, unilm

t.logging.set_verbosity_error()
V, MASK = 97, 96
one_kind = [tuple(float(i == k) for i in range(4)) for k in range(4)]


def texts(rng, B, T):
    "Padded texts with ends: ids, what is real, what is special; padding by the end's id"
    n = torch.from_numpy(rng.integers(2, T + 1, B))[:, None]
    at, ids = torch.arange(T), torch.from_numpy(rng.integers(5, MASK, (B, T)))
    return ids.masked_fill(at == 0, 1).masked_fill(at >= n - 1, 2), at < n, (at == 0) | (at == n - 1)


def call(ids, **more): return unilm(ids, **dict(mask_id=MASK, vocab_size=V) | more)


def test_mixed_kinds_are_refused_by_a_causal_model_and_kinds_are_no_argument_of_one():
    from lmnotes.models import gpt2
    batch = unilm(torch.randint(0, 90, (8, 9)), mask_id=MASK, vocab_size=V, seeds=torch.arange(8))
    with pytest.raises(LmnotesError, match='attention_mask'): token_loss(gpt2(V, d_model=32, n_heads=4), batch)
    assert 'kinds' not in model_inputs(unilm_model(V, d_model=32, n_heads=4), batch)


def test_masks_and_segments_place_by_place():
    rng = np.random.default_rng(0)
    for i in range(300):
        B, T = int(rng.integers(1, 6)), int(rng.integers(2, 11))
        ids, real, special = texts(rng, B, T)
        S = torch.from_numpy(rng.integers(0, T + 1, B))
        batch = call(ids, source_lengths=S, proportions=(.25,) * 4, attention_mask=real, special_mask=special, seeds=torch.arange(B) + 10 * i)
        for b, k in enumerate(batch['kinds'].tolist()):
            one = unilm_mask(KINDS[k], T, S[b:b+1]) if k == 3 else unilm_mask(KINDS[k], T)
            assert torch.equal(batch['attention_mask'][b], (one & padding_mask(real[b:b+1].sum(1), T))[0])
            n = int(real[b].sum())
            types = {0: [0] * T, 1: [2] * T, 2: [3] * T, 3: [4] * T}[k]
            types = [c + (k in (0, 3) and s >= S[b]) for s, c in enumerate(types)]
            assert batch['token_type_ids'][b, :n].tolist() == types[:n] and 0 <= batch['token_type_ids'].min() and batch['token_type_ids'].max() <= 5
            assert batch['position_ids'][b, :n].tolist() == list(range(n))


def test_padding_on_the_left_changes_nothing_but_the_place():
    rng = np.random.default_rng(1)
    for k in range(4):
        ids, real, _ = texts(rng, 20, 9)
        n, S = real.sum(1), torch.from_numpy(rng.integers(1, 9, 20))
        right = call(ids, source_lengths=S, p=0., proportions=one_kind[k], attention_mask=real)
        turned = torch.stack([x.roll(int(9 - m)) for x, m in zip(ids, n)])
        left = call(turned, source_lengths=S, p=0., proportions=one_kind[k], attention_mask=real.flip(1))
        for b, m in enumerate(n.tolist()):
            assert torch.equal(left['attention_mask'][b, 0, -m:, -m:], right['attention_mask'][b, 0, :m, :m]) and not left['attention_mask'][b, ..., :-m].any()
            assert all(torch.equal(left[name][b, -m:], right[name][b, :m]) for name in ('input_ids', 'token_type_ids', 'position_ids'))


def test_the_original_comes_back_and_special_tokens_are_never_chosen():
    rng = np.random.default_rng(2)
    for i in range(1000):
        ids, real, special = texts(rng, 8, 16)
        kept = [x.clone() for x in (ids, real, special)]
        batch = call(ids, p=float(rng.choice([0., .15, .5, 1.])), attention_mask=real, special_mask=special, seeds=torch.arange(8) + 8 * i)
        chosen = batch['labels'] != -100
        assert not (chosen & (special | ~real)).any()
        assert torch.equal(batch['labels'].where(chosen, batch['input_ids']), ids) and torch.equal(batch['input_ids'][~chosen], ids[~chosen])
        assert all(map(torch.equal, kept, (ids, real, special)))


@pytest.mark.parametrize('how', ['seeds', 'generator'])
def test_rates_on_a_million_tokens(how):
    B, T = 8192, 128
    ids = torch.randint(5, MASK, (B, T), generator=torch.Generator().manual_seed(0))
    batch = call(ids, **(dict(seeds=torch.arange(B)) if how == 'seeds' else dict(generator=torch.Generator().manual_seed(1))))
    kinds, chosen = batch['kinds'], batch['labels'] != -100
    for k, share in enumerate((1/3, 1/6, 1/6, 1/3)):
        assert abs((kinds == k).float().mean() - share) < .02
        assert abs(chosen[kinds == k].float().mean() - .15) < .003        # as many under each kind: drawn apart
    x, y = batch['input_ids'][chosen], ids[chosen]
    assert abs((x == MASK).float().mean() - .8 - .1 / V) < .006 and abs((x == y).float().mean() - .1 - .1 / V) < .004
    assert abs(chosen.float().mean(0) - .15).max() < .025                 # no place is preferred
    S = ((batch['token_type_ids'] == 0) | (batch['token_type_ids'] == 4)).sum(1)[(kinds == 0) | (kinds == 3)]
    assert S.min() >= 1 and S.max() <= T - 1 and abs(S.float().mean() / T - .5) < .02


def test_proportions_are_kept_where_some_are_0():
    ids = torch.full((3000, 4), 7)
    for shares in (*one_kind, (.5, .5, 0., 0.), (0., .2, .8, 0), (.7, .2, .1, 0)):
        kinds = call(ids, proportions=shares, seeds=torch.arange(3000))['kinds'].bincount(minlength=4) / 3000
        assert all((a == 0) if b == 0 else abs(a - b) < .05 for a, b in zip(kinds.tolist(), shares))
    assert check_proportions([.25] * 4) == [.25, .5, .75]


@pytest.mark.parametrize('k', range(4))
@torch.no_grad()
def test_an_output_moves_exactly_where_the_mask_allows(k):
    torch.manual_seed(0)
    model, g = unilm_model(V, d_model=32, n_layers=3, n_heads=4).double().eval(), torch.Generator().manual_seed(k)
    ids, real = torch.randint(MASK, (3, 9), generator=g), torch.arange(9) < torch.tensor([9, 7, 4])[:, None]
    batch = {**call(ids, proportions=one_kind[k], attention_mask=real, p=.3, seeds=torch.arange(3)), 'labels': None}
    a = model(**model_inputs(model, batch)).logits
    for s in range(9):
        x = batch['input_ids'].clone(); x[:, s] = (x[:, s] + 1) % V
        moves = (model(**model_inputs(model, {**batch, 'input_ids': x})).logits != a).any(-1)
        assert torch.equal(moves & real, batch['attention_mask'][:, 0, :, s] & real)


@torch.no_grad()
def test_a_hidden_token_does_not_change_what_predicts_it():
    torch.manual_seed(0)
    model, g = unilm_model(V, d_model=32, n_layers=2, n_heads=4).double().eval(), torch.Generator().manual_seed(0)
    ids, seeds = torch.randint(5, MASK, (40, 12), generator=g), torch.arange(40)
    batch = call(ids, p=.4, seeds=seeds)
    hidden = (batch['labels'] != -100) & (batch['input_ids'] != ids)      # masked, or another token; not those that are kept
    other = call(torch.where(hidden, (ids - 4) % (MASK - 5) + 5, ids), p=.4, seeds=seeds)
    still = hidden & (other['input_ids'] == batch['input_ids'])           # a random token can be the new one: then it is kept
    assert torch.equal(still, hidden) and (other['labels'] != batch['labels'])[hidden].all()
    a, b = (model(**model_inputs(model, {**x, 'labels': None})).logits for x in (batch, other))
    assert torch.equal(a[hidden], b[hidden])


@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
def test_the_loss_of_BERT_of_transformers_by_hand(attention):
    torch.manual_seed(0)
    config = t.BertConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64,
                          type_vocab_size=6, attn_implementation=attention)
    model = t.BertForMaskedLM(config).eval()
    ids, real, special = texts(np.random.default_rng(3), 12, 20)
    batch = call(ids, p=.3, attention_mask=real, special_mask=special, seeds=torch.arange(12))
    assert len(batch['kinds'].unique()) == 4
    with torch.no_grad(): out = model(**model_inputs(model, batch))
    y, logp = batch['labels'], out.logits.double().log_softmax(-1)
    picked = [-logp[b, s, y[b, s]] for b in range(12) for s in range(20) if y[b, s] != -100]
    mean = sum(picked) / len(picked)
    s, n = token_loss(model, batch)
    assert n == len(picked) == n_scored(model, batch)
    assert_close(out.loss.double(), mean, atol=1e-6, rtol=0); assert_close((s / n).double(), mean, atol=1e-6, rtol=0)


def test_the_kinds_of_a_batch_are_its_rows_apart():
    torch.manual_seed(0)
    model, (ids, real, special) = unilm_model(V, d_model=32, n_layers=2, n_heads=4).double().eval(), texts(np.random.default_rng(4), 24, 16)
    batch = call(ids, attention_mask=real, special_mask=special, seeds=torch.arange(24))
    s, n = token_loss(model, batch)
    parts = [token_loss(model, {name: x[batch['kinds'] == k] for name, x in batch.items()}) for k in range(4)]
    assert n == sum(m for _, m in parts); assert_close(s, sum(a for a, _ in parts), atol=1e-9, rtol=0)


def test_equal_seeds_give_equal_batches_and_rows_do_not_depend_on_others():
    rng = np.random.default_rng(5)
    for i in range(200):
        ids, real, special = texts(rng, 6, 12)
        more = dict(attention_mask=real, special_mask=special)
        a, b = (call(ids, **more, p=.4, generator=torch.Generator().manual_seed(i)) for _ in range(2))
        assert all(torch.equal(a[k], b[k]) for k in a)
        seeds, j, pad = torch.arange(6) + 6 * i, int(rng.integers(6)), torch.nn.functional.pad
        a = call(ids, **more, p=.4, seeds=seeds)
        alone = call(ids[j:j+1], **{k: v[j:j+1] for k, v in more.items()}, p=.4, seeds=seeds[j:j+1])
        wide = call(pad(ids, (0, 5)), **{k: pad(v, (0, 5)) for k, v in more.items()}, p=.4, seeds=seeds)
        assert all(torch.equal(a[k][j:j+1], alone[k]) for k in a) and torch.equal(wide['kinds'], a['kinds'])
        assert torch.equal(wide['attention_mask'][:, :, :12, :12], a['attention_mask']) and not wide['attention_mask'][..., 12:].any()
        assert torch.equal(wide['labels'][:, :12], a['labels']) and (wide['labels'][:, 12:] == -100).all()
        assert all(torch.equal(wide[k][:, :12][real], a[k][real]) for k in ('input_ids', 'position_ids', 'token_type_ids'))


def test_source_lengths_of_the_caller_change_masks_and_segments_only():
    ids, real, special = texts(np.random.default_rng(6), 50, 12)
    a, b = (call(ids, attention_mask=real, special_mask=special, seeds=torch.arange(50), source_lengths=S) for S in (None, torch.full((50,), 3)))
    assert all(torch.equal(a[k], b[k]) for k in ('input_ids', 'labels', 'kinds', 'position_ids')) and not torch.equal(a['attention_mask'], b['attention_mask'])


def test_nothing_waits_for_the_device():
    "Tensors without values: whatever had to be looked at would fail"
    ids = torch.ones(3, 8, dtype=torch.long, device='meta')
    batch = call(ids, attention_mask=ids, special_mask=ids)
    assert all(v.device.type == 'meta' for v in batch.values())


def test_nothing_to_predict_and_rows_of_padding():
    ids, real = torch.tensor([[1, 2, 0], [0, 0, 0], [1, 5, 2]]), torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]])
    special = (ids == 1) | (ids == 2)
    model = unilm_model(V, d_model=32, n_layers=2, n_heads=4)
    for seed in range(20):
        batch = call(ids, p=1., attention_mask=real, special_mask=special, seeds=torch.arange(3) + 3 * seed)
        s, n = token_loss(model, batch)
        assert n == 1 and s.isfinite()
        model.zero_grad(); s.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert token_loss(model, call(ids, p=0.)) == (0., 0)


ROW = torch.full((2, 4), 7)
BAD = {'ids.shape': [lambda: call(ROW[0]), lambda: call(ROW[:, :1])], 'mask_id': [lambda: call(ROW, mask_id=None), lambda: call(ROW, mask_id=V), lambda: call(ROW, mask_id=-1)],
       'p is': [lambda: call(ROW, p=p) for p in (-.1, 1.5, float('nan'), None)], 'replace': [lambda: call(ROW, replace=(.8, .1, .2))],
       'proportions': [lambda: call(ROW, proportions=x) for x in ((.5, .5), (.5, .5, .5, .5), (1.5, -.5, 0., 0.), None, (float('nan'),) * 4, 'abcd')],
       'source_lengths': [lambda: call(ROW, source_lengths=x) for x in (2, torch.tensor([1, 5]), torch.tensor([-1, 2]), torch.tensor([1.]), torch.tensor([True, False]))],
       'attention_mask': [lambda: call(ROW, attention_mask=torch.ones(2, 1, 4, 4))], 'seeds': [lambda: call(ROW, seeds=torch.ones(3, dtype=torch.long))]}

@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_named(name):
    for bad in BAD[name]:
        with pytest.raises(LmnotesError, match=name): bad()


def test_a_model_with_two_token_types_says_so():
    with pytest.raises(LmnotesError, match='token_type_ids'): token_loss(bert(V, d_model=32, n_heads=4), call(ROW, p=1., proportions=one_kind[3]))
    assert six_segments(torch.tensor([3]), torch.tensor([[True, False]])).tolist() == [[4, 5]]
    assert mixed_mask(torch.tensor([2]), torch.tensor([[True, False]]), torch.tensor([[True, True]])).tolist() == [[[[True, True], [False, True]]]]
