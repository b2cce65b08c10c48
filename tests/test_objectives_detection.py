"Replaced token detection on random batches: what is replaced, what is labeled, what gets which gradient, and ELECTRA in a Learner."
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lmnotes.core import LmnotesError
from lmnotes.detection import Electra, detection_loss, electra_loss, replaced_token_detection, sample_ids
from lmnotes.masking import mlm, original
from lmnotes.models import bert

V, MASK = 41, 40
SIZE = dict(d_model=16, n_heads=2, max_len=32)


def some_batch(seed, B=None):
    g = torch.Generator().manual_seed(seed)
    B, T = B or int(torch.randint(1, 6, (1,), generator=g)), int(torch.randint(1, 33, (1,), generator=g))
    ids = torch.randint(0, MASK, (B, T), generator=g)
    real = torch.arange(T) < torch.randint(0, T + 1, (B, 1), generator=g)
    special = torch.rand(B, T, generator=g) < .1
    batch = mlm(ids, mask_id=MASK, vocab_size=V, p=.4, attention_mask=real, special_mask=special, generator=g)
    logits = torch.randn(B, T, V, generator=g) * 2 + 3 * F.one_hot(ids, V) * (seed % 2)
    return ids, real, special, batch, logits


def electra(**more):
    torch.manual_seed(0)
    return Electra(bert(V, n_layers=1, **SIZE), bert(V, n_layers=2, head='tagging', **SIZE), **more)


@pytest.mark.parametrize('block', range(4))
def test_thousands_of_batches(block):
    for seed in range(block * 500, block * 500 + 500):
        ids, real, special, batch, logits = some_batch(seed)
        masked, seeds = batch['labels'] != -100, torch.arange(len(ids)) + seed
        kept = [x.clone() for x in (ids, logits, masked)]
        how = dict(masked=masked, attention_mask=real, special_mask=special)
        out = replaced_token_detection(ids, logits, seeds=seeds, **how)
        few = replaced_token_detection(ids, logits[masked], seeds=seeds, **how)
        labels, read = out['labels'], out['input_ids']
        assert all(torch.equal(out[k], few[k]) for k in out) and torch.equal(out['attention_mask'], real)
        assert torch.equal(read[~masked], ids[~masked]) and torch.equal(labels != -100, real & ~special)
        # the text comes back where labels are 0; the rest is known to be wrong
        assert torch.equal(labels == 1, read != ids)
        assert torch.equal(original(batch), ids)
        for x, y in zip((ids, logits, masked), kept): assert torch.equal(x, y)
        b = seed % len(ids)
        alone = replaced_token_detection(ids[b:b + 1], logits[b:b + 1], seeds=seeds[b:b + 1],
                                         **{k: v[b:b + 1] for k, v in how.items()})
        assert all(torch.equal(out[k][b], alone[k][0]) for k in out)
        pair = [replaced_token_detection(ids, logits, generator=torch.Generator().manual_seed(3),
                                         **how)['input_ids'] for _ in range(2)]
        assert torch.equal(*pair)


def test_a_million_draws_follow_the_generator():
    torch.manual_seed(0)
    logits = torch.randn(V) * 2
    ids = torch.full((2000, 500), 7)
    for seeds in (None, torch.arange(2000)):
        out = replaced_token_detection(ids, logits.expand(2000, 500, V),
                                       masked=torch.ones_like(ids, dtype=torch.bool), seeds=seeds)
        assert_close(out['input_ids'].flatten().bincount(minlength=V) / 1e6, logits.softmax(0), atol=.002, rtol=0)
        assert abs((out['labels'] == 0).float().mean() - logits.softmax(0)[7]) < .002


def test_rates_are_exact():
    "As many of 65,536 evenly spaced numbers as the probability says, to one; a probability of 0 is never drawn"
    u = torch.arange(2**16) / 2**16
    for seed in range(20):
        logits = torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 3
        logits[seed::5] = -math.inf
        counts = sample_ids(logits.expand(2**16, V), u).bincount(minlength=V)
        assert (counts - logits.double().softmax(0) * 2**16).abs().max() < 1.01 and counts[seed::5].sum() == 0
    many = sample_ids(torch.zeros(2**12, 3000), torch.arange(2**12) / 2**12).bincount(minlength=3000)      # 1.4 each
    assert set(many.tolist()) == {1, 2}


def test_no_sum_depends_on_an_order():
    "Running sums of floats are refused on a GPU under torch.use_deterministic_algorithms: ours are of whole numbers"
    from torch.utils._python_dispatch import TorchDispatchMode
    from lmnotes.diffusion import diffusion_sample
    seen = []
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if 'cumsum' in func.__name__: seen.append(args[0].dtype)
            return func(*args, **kwargs or {})
    with Watch():
        sample_ids(torch.randn(3, V), torch.rand(3))
        diffusion_sample(bert(V, n_layers=1, **SIZE), torch.full((2, 5), MASK), mask_id=MASK)
    assert seen and not any(d.is_floating_point for d in seen)


def test_draws_at_the_edges():
    inf = float('inf')
    assert sample_ids(torch.tensor([[0., -inf, -inf], [-inf, 0., -inf], [-inf, -inf, 0.]]).repeat(2, 1),
                      torch.tensor([0.] * 3 + [1 - 2**-24] * 3)).tolist() == [0, 1, 2] * 2
    wide = torch.randn(3, 50_000, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    found = sample_ids(wide, torch.tensor([0., .5, 1 - 2**-24]))
    assert found.dtype == torch.int64 and found.min() >= 0 and found.max() < 50_000
    assert sample_ids(torch.zeros(0, 5), torch.zeros(0)).shape == (0,)
    assert not sample_ids(torch.randn(4, 5, requires_grad=True), torch.rand(4)).requires_grad


@pytest.mark.parametrize('x', [math.nan, math.inf, -math.inf])
def test_ids_of_the_vocabulary_where_nothing_looks(x, monkeypatch):
    "On a GPU NaN is not looked for; an id of V would end in an assertion on the device, which spoils the process."
    monkeypatch.setattr('lmnotes.detection.require', lambda *args: None)
    for n in (V, V + 1): assert sample_ids(torch.full((50, n), x), torch.rand(50)).max() < n


@pytest.mark.parametrize('x', [math.nan, math.inf])
@pytest.mark.parametrize('n', [2, 7, 4096])
def test_one_bad_logit_is_found(x, n):
    "The check reads the sums of whole numbers: NaN among them makes none that is above 0, whatever their number."
    logits = torch.zeros(3, n)
    logits[1, n // 2] = x
    with pytest.raises(LmnotesError, match='logits'): sample_ids(logits, torch.rand(3))
    logits[1, n // 2] = -math.inf
    assert sample_ids(logits, torch.rand(3))[1] != n // 2


def test_loss_by_hand_and_padding():
    logits, labels = torch.tensor([[1.5, -2., .3, 9.]]), torch.tensor([[1, 0, 1, -100]])
    by_hand = math.log1p(math.exp(-1.5)) + math.log1p(math.exp(-2)) + math.log1p(math.exp(-.3))
    total, n = detection_loss(logits, labels)
    assert n == 3 and abs(total.item() - by_hand) < 1e-5
    assert_close(detection_loss(logits[..., None], labels)[0], total)
    assert_close(detection_loss(torch.stack([torch.zeros_like(logits), logits], -1), labels)[0], total)
    nothing, n = detection_loss(logits, torch.full_like(labels, -100))
    assert (nothing.item(), n.item()) == (0., 0)


def test_loss_of_transformers():
    import transformers
    torch.manual_seed(0)
    config = transformers.ElectraConfig(vocab_size=V, embedding_size=16, hidden_size=16, num_hidden_layers=1,
                                        num_attention_heads=2, intermediate_size=32)
    model = transformers.ElectraForPreTraining(config).eval()
    for seed in range(30):
        ids, real, _, batch, logits = some_batch(seed)
        real = real | (torch.arange(ids.shape[1]) == 0)  # attention over nothing is not defined
        out = replaced_token_detection(ids, logits, masked=batch['labels'] != -100, attention_mask=real)
        with torch.no_grad(): theirs = model(**out)
        total, n = detection_loss(theirs.logits, out['labels'])
        assert n == real.sum()
        assert_close(theirs.loss, total / n, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('family', ['ours', 'transformers'])
def test_electra_adds_up(family):
    "Its sums are those of the two models run by hand on what it sampled"
    import transformers
    torch.manual_seed(0)
    if family == 'ours': model = electra()
    else:
        config = transformers.ElectraConfig(vocab_size=V, embedding_size=16, hidden_size=16, num_hidden_layers=1,
                                            num_attention_heads=2, intermediate_size=32)
        model = Electra(transformers.ElectraForMaskedLM(config), transformers.ElectraForPreTraining(config)).eval()
    _, _, _, batch, _ = some_batch(12, B=5)
    out = model(**batch)
    G = model.generator(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits
    assert_close(out.generator_nll, F.cross_entropy(G.flatten(0, 1), batch['labels'].flatten(), reduction='sum'))
    D = model.discriminator(input_ids=out.batch['input_ids'], attention_mask=batch['attention_mask']).logits
    total, n = detection_loss(D, out.batch['labels'])
    assert_close(out.detection_nll, total)
    assert out.n_masked == (batch['labels'] != -100).sum() and out.n_scored == n == batch['attention_mask'].sum()
    ids = original(batch)
    assert torch.equal(out.batch['labels'] == 1, (out.batch['input_ids'] != ids) & batch['attention_mask'])
    torch.manual_seed(1); s, n = electra_loss(model, batch)
    torch.manual_seed(1); out = model(**batch)
    assert_close(s / n, out.generator_nll / out.n_masked + 50 * out.detection_nll / n)


@pytest.mark.parametrize('p', [.15, .3])
@pytest.mark.parametrize('given', [False, True])
def test_the_mean_over_masked_positions_weighs_one(p, given):
    "Whatever the rate, and with special tokens scored or not: ELECTRA's own sum of two means"
    torch.manual_seed(1)
    model, ids = electra(), torch.randint(0, MASK, (40, 8))
    special = (torch.arange(8) % 7 == 0).expand(40, 8)                       # [CLS] 6 tokens [SEP]
    batch = mlm(ids, mask_id=MASK, vocab_size=V, p=p, exact=True, special_mask=special, seeds=torch.arange(40))
    if given: batch |= dict(special_mask=special)
    torch.manual_seed(2); out = model(**batch)
    torch.manual_seed(2); s, n = electra_loss(model, batch)
    scored = out.batch['labels'] != -100
    assert torch.equal(scored, ~special if given else torch.ones_like(special)) and n == scored.sum() == (240 if given else 320)
    masked = batch['labels'] != -100
    G = model.generator(input_ids=batch['input_ids']).logits[masked]
    assert_close(s / n, F.cross_entropy(G, batch['labels'][masked]) + 50 * out.detection_nll / n)


def test_gradients_stay_apart():
    model = electra()
    batch = some_batch(12, B=5)[3]
    def gradients(which):
        torch.manual_seed(0)
        model.zero_grad()
        getattr(model(**batch), which).backward()
        return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    of_generator, of_detection = gradients('generator_nll'), gradients('detection_nll')
    assert not any(n.startswith('discriminator') for n in of_generator)
    assert {n for n in of_detection if n.startswith('generator')} == {'generator.embed.weight'} == of_generator & of_detection


def test_sharing():
    model, apart = electra(), electra(share=False)
    assert model.discriminator.embed.weight is model.generator.embed.weight is model.generator.head.weight is model.get_input_embeddings().weight
    assert apart.discriminator.embed.weight is not apart.generator.embed.weight
    with pytest.raises(LmnotesError, match='share'): Electra(bert(V, n_layers=1, d_model=8, n_heads=1),
        model.discriminator)
    assert Electra(bert(V, n_layers=1, d_model=8, n_heads=1), model.discriminator,
                   share=False)(**some_batch(1)[3]).n_scored >= 0


def test_no_masks_and_no_text():
    model = electra()
    ids = torch.ones(2, 6, dtype=torch.long)
    out = model(input_ids=ids, labels=torch.full_like(ids, -100))
    assert out.n_masked == 0 and out.generator_nll == 0 and out.n_scored == 12 and not (out.batch['labels'] != 0).any()
    total, n = electra_loss(model, dict(input_ids=ids, labels=torch.full_like(ids, -100)))
    total.backward()
    assert n == 12 and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_discriminator_sees_no_original():
    "Where a token was replaced, another original changes no logit, in float64: the labels change at most"
    torch.manual_seed(0)
    model = electra().double().eval()
    for seed in range(30):
        ids, _, _, batch, logits = some_batch(2 * seed, B=3)
        masked, seeds = batch['labels'] != -100, torch.arange(3)
        out = replaced_token_detection(ids, logits, masked=masked, seeds=seeds)
        other = replaced_token_detection(torch.where(masked, (ids + 1) % MASK, ids), logits, masked=masked,
                                         seeds=seeds)
        with torch.no_grad(): a, b = (model.discriminator(input_ids=x['input_ids']).logits for x in (out, other))
        assert torch.equal(out['input_ids'], other['input_ids']) and torch.equal(a, b)


def test_learner_trains_both_and_goes_on(tmp_path):
    from lmnotes.optimizers import adamw
    from lmnotes.training import Learner
    rows = (torch.arange(16)[None] + torch.arange(64)[:, None]) % 40
    def hide(r): return mlm(torch.stack(list(r)), mask_id=MASK, vocab_size=V, replace=(1., 0., 0.))
    def learner(model, folder): return Learner(model, rows, collate_fn=hide, loss=electra_loss, opt=adamw, lr=5e-3,
                                               batch_size=16, out_dir=folder, save_every=15)
    whole = learner(electra(), tmp_path / 'a').fit(steps=30)
    assert whole.history[-1]['loss'] < .8 * whole.history[0]['loss']
    class Stop:
        def after_step(self, learn): learn.stop = learn.step == 15
    half = learner(electra(), tmp_path / 'b')
    half.cbs.append(Stop())
    half.fit(steps=30)
    rest = learner(electra(), tmp_path / 'b')
    rest.fit(steps=30, resume=True, allow_change=('callbacks', 'stop'))
    for (name, a), (_, b) in zip(whole.model.named_parameters(),
                                 rest.model.named_parameters()): assert torch.equal(a, b), name
    assert rest.model.discriminator.embed.weight is rest.model.generator.embed.weight


@pytest.mark.parametrize('bad, named', [(dict(masked=torch.ones(2, 3)), 'masked'), (dict(masked=None), 'masked'),
                                        (dict(generator_logits=torch.zeros(2, 4, V)), 'generator_logits'),
                                        (dict(generator_logits=torch.zeros(3, V)), 'generator_logits'),
                                        (dict(generator_logits=None), 'generator_logits'),
                                        (dict(generator_logits=torch.full((2, 3, V), float('nan'))), 'logits'),
                                        (dict(special_mask=torch.ones(3)), 'special_mask'),
                                        (dict(ids=torch.ones(2, 3)), 'ids')], ids=str)
def test_refused(bad, named):
    good = dict(ids=torch.ones(2, 3, dtype=torch.long), generator_logits=torch.zeros(2, 3, V),
                masked=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(LmnotesError, match=named): replaced_token_detection(**good | bad)
