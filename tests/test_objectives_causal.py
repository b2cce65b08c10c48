"clm, prefix_lm and fim on thousands of random batches: what is scored, what comes back, how often, and whether anything leaks."
import numpy as np, pytest, torch
import transformers as t
from torch.testing import assert_close

from lmnotes.batches import collate, pack
from lmnotes.causal import clm, fim, fim_places, prefix_lm
from lmnotes.core import LmnotesError
from lmnotes.draws import Draws
from lmnotes.inputs import model_inputs, n_scored
from lmnotes.lm import causal_targets
from lmnotes.models import Transformer, TransformerConfig, bart, bert, gpt2, llama, t5
from lmnotes.scoring import token_loss

t.logging.set_verbosity_error()
S = dict(prefix_id=90, suffix_id=91, middle_id=92)
SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=256)
THEIRS = dict(GPT2=(t.GPT2LMHeadModel, t.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=None)),
              Llama=(t.LlamaForCausalLM, t.LlamaConfig(**SMALL)), BERT=(t.BertForMaskedLM, t.BertConfig(**SMALL)),
              T5=(t.T5ForConditionalGeneration, t.T5Config(vocab_size=97, d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48, decoder_start_token_id=0)))
OURS = dict(gpt2=lambda: gpt2(97, d_model=32, n_heads=4), llama=lambda: llama(97, d_model=32, n_heads=4))


def theirs(name, attention='eager'):
    "A tiny random model of transformers, without dropout"
    torch.manual_seed(0)
    cls, config = THEIRS[name]
    config._attn_implementation = attention
    return cls(config).eval()


def texts(rng, B, T, bos=1, eos=2):
    "A padded batch of texts with ends: ids, what is real, what is special; padding by the end's id"
    n = rng.integers(0, T - 1, B)                                      # tokens between the two ends
    rows = [[bos, *rng.integers(5, 89, k).tolist(), eos] for k in n]
    ids = torch.tensor([r + [eos] * (T - len(r)) for r in rows])
    at, n = torch.arange(T), torch.from_numpy(n)[:, None] + 2
    return rows, ids, at < n, (at == 0) | (at == n - 1)


def moved_left(x, real, fill):
    "The same rows, padded on the left"
    T = x.shape[1]
    return torch.stack([torch.cat([row.new_full((T - int(r.sum()),), fill), row[r]]) for row, r in zip(x, real)])


def by_hand(logits, labels, shift):
    "Mean loss, from logits: a plain loop over rows and places"
    total, n = 0., 0
    for z, y in zip(logits.double().log_softmax(-1), labels.tolist()):
        for place, label in enumerate(y):
            if label == -100 or place < shift: continue
            total, n = total - z[place - shift, label], n + 1
    return total / n, n


# ---------------------------------------------------------------- clm

def test_clm_place_by_place():
    rng = np.random.default_rng(0)
    for _ in range(300):
        B, T = rng.integers(1, 5), rng.integers(1, 12)
        _, ids, real, special = texts(rng, B, max(T, 3))
        segments = torch.from_numpy(rng.integers(0, 2, ids.shape)).cumsum(1)
        for g in (None, segments):
            batch = clm(ids, real, special, g)
            for b in range(B):
                place = -1
                for s in range(ids.shape[1]):
                    first = g is not None and (s == 0 or g[b, s] != g[b, s - 1])
                    place = 0 if first else place + 1
                    scored = real[b, s] and not special[b, s] and not first
                    assert batch['labels'][b, s] == (ids[b, s] if scored else -100)
                    assert not real[b, s] or batch['position_ids'][b, s] == place


def test_clm_labels_packed_rows_as_pack_does():
    rng = np.random.default_rng(1)
    for _ in range(200):
        docs = [rng.integers(3, 90, rng.integers(1, 30)).tolist() for _ in range(rng.integers(1, 9))]
        row = collate(pack(docs, block_size=int(rng.integers(1, 40)), eos_id=2), pad_id=2)
        batch = clm(row['input_ids'], row['attention_mask'], segment_ids=row['segment_ids'])
        assert batch.keys() == row.keys() and all(torch.equal(batch[k], row[k]) for k in row)


@pytest.mark.parametrize('name', ['GPT2', 'Llama', 'gpt2', 'llama'])
def test_packed_texts_have_the_losses_that_they_have_alone(name):
    "A long one between short ones, in several rows, with padding at the end"
    torch.manual_seed(0)
    model, g = (OURS[name]() if name in OURS else theirs(name)).eval(), torch.Generator().manual_seed(0)
    docs = [torch.randint(3, 90, (n,), generator=g).tolist() for n in (5, 150, 1, 20, 3, 2)]
    row = collate(pack(docs, block_size=200, eos_id=2), pad_id=2)
    batch = clm(row['input_ids'], row['attention_mask'], segment_ids=row['segment_ids'])
    with torch.no_grad():
        for dtype, atol in ((torch.float32, 1e-6), (torch.float64, 1e-9)):
            model.to(dtype)
            s, n = token_loss(model, batch)
            alone = [token_loss(model, clm(torch.tensor([d + [2]]))) for d in docs]
            assert n == n_scored(model, batch) == sum(m for _, m in alone) == sum(map(len, docs))      # an end for each, a first token less
            assert abs(s / n - sum(a for a, _ in alone) / n) < atol


@pytest.mark.parametrize('name', ['GPT2', 'Llama'])
def test_clm_loss_of_transformers_by_hand(name):
    model, (_, ids, real, special) = theirs(name), texts(np.random.default_rng(2), 6, 20)
    for batch in (clm(ids, real), clm(ids, real, special)):
        with torch.no_grad(): out = model(**model_inputs(model, batch))
        mean, n = by_hand(out.logits, batch['labels'], 1)
        s, count = token_loss(model, batch)
        assert_close(out.loss.double(), mean, atol=1e-6, rtol=0); assert_close((s / count).double(), mean, atol=1e-6, rtol=0)
        assert count == n


# ---------------------------------------------------------------- prefix_lm

def test_prefix_lm_place_by_place():
    rng = np.random.default_rng(3)
    for i in range(300):
        B, T = rng.integers(1, 5), rng.integers(2, 12)
        _, ids, real, special = texts(rng, B, max(T, 3))
        n, T = real.sum(1), ids.shape[1]
        P = torch.from_numpy(rng.integers(0, T + 1, B))
        batch = prefix_lm(ids, prefix_lengths=P, attention_mask=real, special_mask=special)
        for b in range(B):
            for a in range(T):
                reads = [s < n[b] and (s <= a or s < P[b]) for s in range(T)]
                assert batch['attention_mask'][b, 0, a].tolist() == reads
                asked = a + 1 < n[b] and a + 1 >= P[b] and not special[b, a + 1]
                assert batch['labels'][b, a] == (ids[b, a + 1] if asked else -100)
        left = prefix_lm(moved_left(ids, real, 2), prefix_lengths=P, attention_mask=real.flip(1), special_mask=moved_left(special, real, 0))
        for b in range(B):                                            # padding on the left: the same, further right
            k = int(n[b])
            assert torch.equal(left['labels'][b, T - k:], batch['labels'][b, :k]) and (left['labels'][b, :T - k] == -100).all()
            assert torch.equal(left['attention_mask'][b, 0, T - k:, T - k:], batch['attention_mask'][b, 0, :k, :k])
            assert torch.equal(left['position_ids'][b, T - k:], batch['position_ids'][b, :k])


def test_prefix_lengths_are_evenly_spread():
    n = torch.arange(100_000) % 9 + 2                                  # 2 to 10 real tokens
    real = torch.arange(10) < n[:, None]
    for how in (dict(seeds=torch.arange(100_000)), dict(generator=torch.Generator().manual_seed(0))):
        batch = prefix_lm(torch.ones(100_000, 10, dtype=torch.long), attention_mask=real, **how)
        P = batch['attention_mask'][:, 0, 0].sum(1)                    # what the first place reads
        assert (P >= 1).all() and (P < n).all() and torch.equal((batch['labels'] != -100).sum(1), n - P)
        for k in range(2, 11):
            counts, want = P[n == k].bincount(minlength=k)[1:], (n == k).sum() / (k - 1)
            assert ((counts - want)**2 / want).sum() < 40              # chi-squared of at most 8 degrees of freedom


def test_prefix_lm_split_for_an_encoder_decoder():
    rng = np.random.default_rng(4)
    for i in range(300):
        rows, ids, real, _ = texts(rng, 4, 12)
        seeds = torch.arange(4) + 4 * i
        whole, split = prefix_lm(ids, attention_mask=real, seeds=seeds), prefix_lm(ids, attention_mask=real, seeds=seeds, decoder=True)
        left = prefix_lm(moved_left(ids, real, 2), attention_mask=real.flip(1), seeds=seeds, decoder=True)
        assert all(torch.equal(split[k], left[k]) for k in split)
        for b, r in enumerate(rows):
            read, write = split['input_ids'][b][split['attention_mask'][b]].tolist(), split['labels'][b]
            write = write[write != -100].tolist()
            assert read + write == r and len(read) == whole['attention_mask'][b, 0, 0].sum()      # the same prefix both ways
            assert split['attention_mask'][b, :len(read)].all() and (split['labels'][b, :len(write)] != -100).all()


@pytest.mark.parametrize('make', [t5, bart])
def test_split_prefixes_train_ours(make):
    _, ids, real, _ = texts(np.random.default_rng(5), 5, 12)
    torch.manual_seed(0)
    model, batch = make(97, d_model=32, n_layers=1, n_heads=4).eval(), prefix_lm(ids, attention_mask=real, decoder=True, seeds=torch.arange(5))
    s, n = token_loss(model, batch)
    with torch.no_grad(): mean, count = by_hand(model(**model_inputs(model, batch)).logits, batch['labels'], 0)
    assert n == count; assert_close((s / n).double(), mean, atol=1e-6, rtol=0)


def test_split_prefixes_in_T5_of_transformers():
    _, ids, real, _ = texts(np.random.default_rng(6), 5, 12)
    model, batch = theirs('T5'), prefix_lm(ids, attention_mask=real, decoder=True, seeds=torch.arange(5))
    with torch.no_grad(): out = model(**model_inputs(model, batch))
    mean, n = by_hand(out.logits, batch['labels'], 0)
    s, count = token_loss(model, batch)
    assert count == n; assert_close(out.loss.double(), mean, atol=1e-6, rtol=0); assert_close((s / count).double(), mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
def test_prefix_lm_in_BERT_of_transformers(attention):
    _, ids, real, special = texts(np.random.default_rng(7), 6, 20)
    model, batch = theirs('BERT', attention), prefix_lm(ids, attention_mask=real, special_mask=special, seeds=torch.arange(6))
    with torch.no_grad(): out = model(**model_inputs(model, batch))
    mean, n = by_hand(out.logits, batch['labels'], 0)
    s, count = token_loss(model, batch)
    assert count == n; assert_close(out.loss.double(), mean, atol=1e-6, rtol=0); assert_close((s / count).double(), mean, atol=1e-6, rtol=0)


def encoder(**more):
    torch.manual_seed(0)
    return Transformer(TransformerConfig(97, kind='encoder', d_model=32, n_layers=3, n_heads=4, d_ff=48, **more)).double().eval()


@pytest.mark.parametrize('make', [encoder, lambda: bert(97, d_model=32, n_layers=3, n_heads=4).double().eval()])
@torch.no_grad()
def test_prefix_lm_leaks_nothing(make):
    "An output moves exactly where the mask says that it may: so never for the token that it predicts, or a later one"
    model, g = make(), torch.Generator().manual_seed(0)
    ids, real = torch.randint(97, (3, 9), generator=g), torch.arange(9) < torch.tensor([9, 7, 4])[:, None]
    batch = {**prefix_lm(ids, attention_mask=real, seeds=torch.arange(3)), 'labels': None}
    a = model(**model_inputs(model, batch)).logits
    for s in range(9):
        x = ids.clone(); x[:, s] = (x[:, s] + 1) % 97
        moves = (model(**model_inputs(model, {**batch, 'input_ids': x})).logits != a).any(-1)
        assert torch.equal(moves & real, batch['attention_mask'][:, 0, :, s] & real)


@pytest.mark.parametrize('make', [lambda: theirs('GPT2'), lambda: theirs('Llama'), *OURS.values()])
def test_a_prefix_batch_is_refused_by_causal_models(make):
    "They would move its labels once more, and not read the prefix both ways; packed rows of clm stay as they were"
    model, ids = make(), torch.randint(97, (2, 9))
    for given in (dict(prefix_lengths=torch.tensor([1, 3])), dict(seeds=torch.arange(2))):
        with pytest.raises(LmnotesError, match='attention_mask'): token_loss(model, prefix_lm(ids, **given))
    assert token_loss(model, clm(ids, segment_ids=torch.arange(9).expand(2, 9) // 5))[1] == 2 * 7


def test_a_prefix_of_one_is_next_token_prediction():
    torch.manual_seed(0)
    shape = dict(d_model=32, n_layers=2, n_heads=4, d_ff=48)
    decoder = Transformer(TransformerConfig(97, **shape)).double()
    encoder = Transformer(TransformerConfig(97, kind='encoder', **shape)).double()
    encoder.load_state_dict({k.replace('decoder.', 'encoder.'): v for k, v in decoder.state_dict().items()})
    _, ids, real, _ = texts(np.random.default_rng(8), 8, 20)
    (a, n), (b, m) = token_loss(decoder, clm(ids, real)), token_loss(encoder, prefix_lm(ids, prefix_lengths=torch.ones(8, dtype=torch.long), attention_mask=real))
    assert n == m; assert_close(a, b, atol=1e-9, rtol=0)


# ---------------------------------------------------------------- fim

def restore(x, tail=1):
    if S['prefix_id'] not in x: return x
    x, last = x[:len(x) - tail], x[len(x) - tail:]
    p, s, m = (x.index(S[k]) for k in ('prefix_id', 'suffix_id', 'middle_id'))
    return x[:p] + x[p+1:s] + x[m+1:] + x[s+1:m] + last


def fim_naive(row, u, p, spm):
    "One row with its two ends, by the published algorithm for one example, with these four random numbers"
    head, text, tail = row[:1], row[1:-1], row[-1:]
    if not text or u[0] >= p: return row
    i, j = sorted(int(x * (len(text) + 1)) for x in u[2:])
    prefix, middle, suffix = text[:i], text[i:j], text[j:]
    if u[1] < spm: text = [S['prefix_id'], S['suffix_id'], *suffix, S['middle_id'], *prefix, *middle]
    else: text = [S['prefix_id'], *prefix, S['suffix_id'], *suffix, S['middle_id'], *middle]
    return head + text + tail


def test_fim_row_by_row_and_back():
    rng = np.random.default_rng(9)
    for i in range(400):
        rows, ids, real, special = texts(rng, 8, 14)
        kept, seeds = [x.clone() for x in (ids, real, special)], torch.arange(8) + 8 * i
        p, spm = rng.choice([0., .3, 1.]), rng.choice([0., .5, 1.])
        batch = fim(ids, **S, p=p, spm=spm, attention_mask=real, special_mask=special, seeds=seeds)
        left = fim(moved_left(ids, real, 2), **S, p=p, spm=spm, attention_mask=real.flip(1), special_mask=moved_left(special, real, 0), seeds=seeds)
        assert all(torch.equal(batch[k], left[k]) for k in batch) and all(map(torch.equal, kept, (ids, real, special)))
        u, x, y = Draws(ids, seeds=seeds).uniform(4).tolist(), batch['input_ids'], batch['labels']
        assert x.shape == (8, 17) and torch.equal(y, x.masked_fill(~batch['attention_mask'], -100))
        for b, r in enumerate(rows):
            out = x[b][batch['attention_mask'][b]].tolist()
            assert out == fim_naive(r, u[b], p, spm) and restore(out) == r and batch['attention_mask'][b, :len(out)].all()
            assert batch['position_ids'][b, :len(out)].tolist() == list(range(len(out)))


def test_fim_places_are_a_permutation():
    for m in range(8):
        for i in range(m + 1):
            for j in range(i, m + 1):
                to, marks = fim_places(torch.arange(-2, m + 2)[None], *torch.tensor([[m], [i], [j]]))
                assert sorted(to[0].tolist() + marks[0].tolist()) == list(range(-2, m + 5))


def test_fim_rates_on_a_million_tokens():
    B, T = 8000, 128
    ids, p, spm = torch.full((B, T), 5), .7, .3
    for how in (dict(seeds=torch.arange(B)), dict(generator=torch.Generator().manual_seed(0))):
        x = fim(ids, **S, p=p, spm=spm, **how)['input_ids']
        moved = x[:, 0] == S['prefix_id']
        s, m = (x == S['suffix_id']).int().argmax(1), (x == S['middle_id']).int().argmax(1)
        empty = (T / (T + 1))**2                                      # chance that both cuts are above 0
        assert abs(moved.float().mean() - p) < .02
        assert abs((s == 1)[moved].float().mean() - (1 - (1 - spm) * empty)) < .02
        psm = moved & (s > 1)
        assert abs((T + 2 - m)[psm].float().mean() / T - 1 / 3) < .02   # a third, about, in the middle,
        assert abs((s - 1)[psm].float().mean() / T - 1 / 3) < .02       # before it
        assert abs((m - s - 1)[psm].float().mean() / T - 1 / 3) < .02   # and after it


def test_fim_cuts_are_any_two_places():
    "All pairs i <= j of a text of three tokens: i = j once, i < j twice as often"
    x = fim(torch.tensor([[5, 6, 7]]).expand(64_000, 3), **S, p=1., spm=0., seeds=torch.arange(64_000))['input_ids']
    found, times = x.unique(dim=0, return_counts=True)
    want = {tuple(fim_naive([0, 5, 6, 7, 0], [0, 1, i / 4, j / 4], 1, 0)[1:-1]): 4000 * (1 + (i < j)) for i in range(4) for j in range(i, 4)}
    assert {tuple(r) for r in found.tolist()} == set(want)
    assert all(abs(n - want[tuple(r)]) < 5 * want[tuple(r)]**.5 for r, n in zip(found.tolist(), times.tolist()))


@pytest.mark.parametrize('name', ['GPT2', 'Llama'])
def test_fim_loss_of_transformers_by_hand(name):
    _, ids, real, special = texts(np.random.default_rng(10), 6, 20)
    model, batch = theirs(name), fim(ids, **S, p=1., attention_mask=real, special_mask=special, seeds=torch.arange(6))
    with torch.no_grad(): out = model(**model_inputs(model, batch))
    mean, n = by_hand(out.logits, batch['labels'], 1)
    s, count = token_loss(model, batch)
    assert count == n; assert_close(out.loss.double(), mean, atol=1e-6, rtol=0); assert_close((s / count).double(), mean, atol=1e-6, rtol=0)


def test_fim_leaves_special_tokens_inside_where_they_are_in_the_text():
    ids = torch.tensor([[1, 5, 6, 3, 7, 8, 2]])                        # 3 divides the text; it moves with its neighbors
    special = torch.tensor([[1, 0, 0, 1, 0, 0, 1]])
    for seed in range(50):
        x = fim(ids, **S, p=1., special_mask=special, seeds=torch.tensor([seed]))['input_ids'][0].tolist()
        assert x[0] == 1 and x[-1] == 2 and restore(x) == ids[0].tolist()


# ---------------------------------------------------------------- all of them

CALLS = dict(prefix_lm=prefix_lm, split=lambda ids, special_mask=None, **k: prefix_lm(ids, decoder=True, **k),
             fim=lambda ids, **k: fim(ids, **S, **k))

@pytest.mark.parametrize('name', CALLS)
def test_equal_seeds_give_equal_batches_and_rows_do_not_depend_on_others(name):
    f, rng = CALLS[name], np.random.default_rng(11)
    for i in range(100):
        _, ids, real, special = texts(rng, 6, 12)
        more = dict(attention_mask=real, special_mask=special)
        a, b = (f(ids, **more, generator=torch.Generator().manual_seed(i)) for _ in range(2))
        assert all(torch.equal(a[k], b[k]) for k in a)
        seeds = torch.arange(6) + 6 * i
        a = f(ids, **more, seeds=seeds)
        one = int(rng.integers(6))
        alone = f(ids[one:one+1], **{k: v[one:one+1] for k, v in more.items()}, seeds=seeds[one:one+1])
        assert all(torch.equal(a[k][one:one+1], alone[k]) for k in a)
        pad = torch.nn.functional.pad                                 # padded to another width
        wide = f(pad(ids, (0, 5)), **{k: pad(v, (0, 5)) for k, v in more.items()}, seeds=seeds)
        T = a['input_ids'].shape[1]
        assert torch.equal(wide['labels'][:, :T], a['labels']) and (wide['labels'][:, T:] == -100).all()
        assert torch.equal(wide['attention_mask'][..., :T] if name != 'prefix_lm' else wide['attention_mask'][:, :, :T, :T], a['attention_mask'])
        real_now = a['attention_mask'] if name != 'prefix_lm' else real
        assert torch.equal(wide['input_ids'][:, :T][real_now], a['input_ids'][real_now])


@pytest.mark.parametrize('name', [*CALLS, 'clm'])
def test_nothing_waits_for_the_device(name):
    "Tensors without values: whatever had to be looked at would fail"
    ids = torch.ones(3, 8, dtype=torch.long, device='meta')
    batch = {**CALLS, 'clm': lambda ids, **k: clm(ids, segment_ids=ids, **k)}[name](ids, attention_mask=ids, **({} if name == 'split' else dict(special_mask=ids)))
    assert all(v.device.type == 'meta' for v in batch.values())


def test_rows_without_anything_to_predict_add_nothing():
    ids, real = torch.tensor([[1, 2, 0, 0], [5, 0, 0, 0], [5, 6, 7, 2]]), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    special = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
    batch = prefix_lm(ids, attention_mask=real, special_mask=special, seeds=torch.arange(3))
    assert (batch['labels'][:2] == -100).all()
    model = bert(97, d_model=32, n_layers=2, n_heads=4)
    s, n = token_loss(model, {k: v[2:] for k, v in batch.items()})
    s2, n2 = token_loss(model, batch)                                  # a row that nobody reads is no NaN
    assert n == n2; assert_close(s, s2, atol=1e-5, rtol=0)
    s2.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    out = fim(ids, **S, p=1., attention_mask=real, special_mask=special, seeds=torch.arange(3))
    assert out['input_ids'][0, :2].tolist() == [1, 2] and out['attention_mask'].sum(1).tolist() == [2, 0, 7]
    assert (causal_targets(out) != -100).sum(1).tolist() == [1, 0, 6]
    assert token_loss(llama(97, d_model=32, n_heads=4), clm(ids, real, torch.ones(3, 4, dtype=torch.bool))) == (0., 0)


ROW = torch.ones(2, 4, dtype=torch.long)
BAD = {
    'ids.shape': [lambda: clm(ROW[0]), lambda: prefix_lm(ROW[:, :1]), lambda: fim(ROW[:0], **S)], 'attention_mask': [lambda: clm(ROW, torch.ones(2, 3)), lambda: fim(ROW, **S, attention_mask=torch.ones(4))],
    'special_mask': [lambda: clm(ROW, special_mask=torch.ones(2, 1, 4)), lambda: prefix_lm(ROW, decoder=True, special_mask=ROW)], 'segment_ids': [lambda: clm(ROW, segment_ids=[1, 1]), lambda: clm(ROW, segment_ids=ROW[:1])],
    'prefix_lengths': [lambda: prefix_lm(ROW, prefix_lengths=3), lambda: prefix_lm(ROW, prefix_lengths=torch.tensor([1, 5])), lambda: prefix_lm(ROW, prefix_lengths=torch.tensor([-1, 2])),
                       lambda: prefix_lm(ROW, prefix_lengths=torch.tensor([1, 2]), generator=torch.Generator()), lambda: prefix_lm(ROW, prefix_lengths=torch.tensor([1., 2.]))],
    'p is': [lambda: fim(ROW, **S, p=p) for p in (-.1, 1.1, float('nan'), float('inf'), None, '1', True)], 'spm is': [lambda: fim(ROW, **S, spm=2)],
    '_id is': [lambda: fim(ROW, **{**S, 'suffix_id': x}) for x in (None, -1, 90, 1.5, True)], 'seeds': [lambda: fim(ROW, **S, seeds=torch.ones(3, dtype=torch.long)), lambda: prefix_lm(ROW, seeds=torch.ones(2))]}

@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_named(name):
    for call in BAD[name]:
        with pytest.raises(LmnotesError, match=name): call()
    with pytest.raises(TypeError): fim(ROW, prefix_id=1, middle_id=2)
