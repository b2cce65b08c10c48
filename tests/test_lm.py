"""lmnotes.lm across chapters: perplexity against brute force on models of lmnotes and of transformers, whatever the batching, padding and stride."""
import math
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lmnotes.core import LmnotesError
from lmnotes.lm import (bits_per_byte, causal_targets, evaluating, is_causal, log_probs, model_kind, nll, perplexity, strided_windows, token_logps)

V = 30
CAUSAL = ('ours', 'GPT2LMHeadModel', 'LlamaForCausalLM', 'BloomForCausalLM', 'OPTForCausalLM')


def build(name, **extra):
    "A tiny random model"
    torch.manual_seed(0)
    if name == 'ours':
        from lmnotes.models import Transformer, TransformerConfig
        return Transformer(TransformerConfig(vocab_size=V, d_model=24, n_layers=2, n_heads=2, d_ff=32, max_len=48))
    import transformers
    size = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=48)
    size |= {'GPT2LMHeadModel': dict(n_embd=24, n_layer=2, n_head=2, n_positions=48), 'BloomForCausalLM': dict(n_layer=2, n_head=2),
             'OPTForCausalLM': dict(ffn_dim=32, word_embed_proj_dim=24), 'T5ForConditionalGeneration': dict(d_model=24, d_kv=12, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)}.get(name, {})
    cls = getattr(transformers, name)
    return cls(cls.config_class(vocab_size=V, bos_token_id=0, eos_token_id=1, pad_token_id=1, **size, **extra))


@lru_cache
def shared(name): return build(name)


def brute_force(model, ids, window, stride, bos=None):
    "Log-probability of each token, one run per token, in the context that the strided windows give it; None for the first without a start token"
    x = ([] if bos is None else [bos]) + list(ids)
    n, out = len(x) - 1, [None] * len(x)
    begin = done = 0
    with evaluating(model):
        while done < n:
            for t in range(done, min(begin + window, n)):
                out[t + 1] = model(input_ids=torch.tensor([x[begin:t + 1]])).logits[0, -1].log_softmax(-1)[x[t + 1]].item()
            done, begin = min(begin + window, n), begin + stride
    return out if bos is None else out[1:]


docs_of = st.lists(st.lists(st.integers(2, V - 1), min_size=2, max_size=40), min_size=1, max_size=4)


@settings(max_examples=15, deadline=None)
@given(docs=docs_of, data=st.data(), name=st.sampled_from(CAUSAL), bos=st.sampled_from([None, 0]), batch_size=st.integers(1, 7))
def test_perplexity_is_brute_force(docs, data, name, bos, batch_size):
    window = data.draw(st.integers(1, 44))
    stride = data.draw(st.integers(1, window))
    slow = [p for d in docs for p in brute_force(shared(name), d, window, stride, bos) if p is not None]
    r = perplexity(shared(name), docs, window=window, stride=stride, bos_id=bos, batch_size=batch_size)
    assert r.n_tokens == len(slow) == sum(map(len, docs)) - (bos is None) * len(docs)
    assert math.isclose(r.nll, -sum(slow), rel_tol=1e-5)
    assert math.isclose(r, math.exp(-sum(slow) / len(slow)), rel_tol=1e-5)
    fast = torch.cat(token_logps(shared(name), docs, window=window, stride=stride, bos_id=bos))
    assert torch.allclose(fast[~fast.isnan()], torch.tensor(slow, dtype=torch.float64), atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(docs=docs_of, side=st.sampled_from(['left', 'right']), pad=st.integers(0, V - 1), name=st.sampled_from(CAUSAL), cut=st.integers(1, 4))
def test_padding_and_batching_do_not_count(docs, side, pad, name, cut):
    def batch(part):
        T = max(map(len, part)) + 1                                             # at least one place of padding in every row
        rows = [[pad] * (T - len(d)) + d if side == 'left' else d + [pad] * (T - len(d)) for d in part]
        mask = [[False] * (T - len(d)) + [True] * len(d) if side == 'left' else [True] * len(d) + [False] * (T - len(d)) for d in part]
        return dict(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask))
    whole = perplexity(shared(name), docs)
    r = perplexity(shared(name), (batch(docs[i:i + cut]) for i in range(0, len(docs), cut)))
    assert r.n_tokens == whole.n_tokens and math.isclose(r.nll, whole.nll, rel_tol=1e-5)


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 200), data=st.data())
def test_windows_score_each_prediction_once(n, data):
    window = data.draw(st.integers(1, 60))
    stride = data.draw(st.integers(1, window))
    todo = strided_windows(n, window, stride)
    assert [i for _, first, end in todo for i in range(first, end)] == list(range(n))
    for begin, first, end in todo:
        assert begin <= first < end <= begin + window
        assert begin == 0 or first - begin >= window - stride                    # the promised context


@pytest.mark.parametrize('name', [*CAUSAL, 'BertForMaskedLM', 'T5ForConditionalGeneration'])
def test_nll_is_the_models_own_loss(name):
    model = build(name).eval()
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(2, V, (3, 11), generator=g), torch.randint(2, V, (3, 11), generator=g)
    y[0, :5] = y[2] = -100
    s, n = nll(model, dict(input_ids=x, labels=y))
    assert n == (6 + 10 if name in CAUSAL else 6 + 11)
    torch.testing.assert_close(s / n, model(input_ids=x, labels=y).loss, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(s / n, list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(model(input_ids=x, labels=y).loss, list(model.parameters()), allow_unused=True)
    for a, b in zip(ours, theirs): assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-7))


def test_packed_documents_are_not_scored_across_the_seam():
    place = torch.tensor([[0, 1, 2, 0, 1]])
    assert causal_targets(dict(input_ids=torch.tensor([[5, 6, 7, 8, 9]]), position_ids=place)).tolist() == [[6, 7, -100, 9, -100]]


@pytest.mark.parametrize('name, kind', [('ours', 'causal'), ('GPT2LMHeadModel', 'causal'), ('LlamaForCausalLM', 'causal'), ('BertForMaskedLM', 'masked'), ('T5ForConditionalGeneration', 'seq2seq')])
def test_kinds(name, kind):
    model = build(name)
    assert model_kind(model) == kind
    if kind != 'seq2seq': assert is_causal(model) == (kind == 'causal')


@pytest.mark.parametrize('name, extra', [('BertForMaskedLM', {}), ('RobertaForCausalLM', {'is_decoder': False}), ('BertLMHeadModel', {'is_decoder': False}), ('T5ForConditionalGeneration', {})])
def test_models_that_read_ahead_are_refused_by_name(name, extra):
    model = build(name, **extra)
    with pytest.raises(LmnotesError, match=name): perplexity(model, [3, 4, 5])
    if 'T5' not in name:
        with pytest.raises(LmnotesError, match=name): perplexity(model, [dict(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]]))])


def test_a_sequence_to_sequence_model_is_scored_on_batches():
    model = build('T5ForConditionalGeneration').eval()
    batch = dict(input_ids=torch.tensor([[3, 4, 5]]), attention_mask=torch.ones(1, 3).long(), labels=torch.tensor([[6, 7, 1]]))
    assert math.isclose(perplexity(model, [batch]), model(**batch).loss.exp().item(), rel_tol=1e-6)


def test_bidirectional_reading_would_have_looked_perfect():
    "Why the refusal matters: a model that may look at the next token gets a perplexity of almost 1 on anything"
    from types import SimpleNamespace

    class Peeks(torch.nn.Module):
        def forward(self, input_ids, **_): return SimpleNamespace(logits=50. * torch.nn.functional.one_hot(input_ids.roll(-1, 1), V).double())
    ids = torch.tensor([[3, 9, 4, 4, 20]])
    assert -log_probs(Peeks()(ids).logits[:, :-1], ids[:, 1:]).mean() < 1e-9
    with pytest.raises(LmnotesError, match='Peeks'): perplexity(Peeks(), ids[0])


@pytest.mark.parametrize('ids', [[], [7], torch.tensor([7]), [[3, 4], []], [[3, 4], [5]], None, 'text', b'text', 5, [[3, V]], [[3, -1]], [[.5, 1.]], torch.zeros(2, 3, dtype=torch.long), [None]])
def test_bad_documents(ids):
    with pytest.raises(LmnotesError): perplexity(shared('GPT2LMHeadModel'), ids)


@pytest.mark.parametrize('kw', [dict(stride=0), dict(stride=-1), dict(window=0), dict(window=8, stride=9), dict(window=49), dict(batch_size=0), dict(window=2.5), dict(stride=1.), dict(bos_id=3), dict(bos_id=V), dict(bos_id=-1)])
def test_bad_options(kw):
    name = next(iter(kw)) if len(kw) == 1 else 'stride'
    with pytest.raises(LmnotesError, match=name if name != 'bos_id' else 'bos_id|id'): perplexity(shared('GPT2LMHeadModel'), [3, 4, 5, 6], **kw)


def test_nothing_scored_is_an_error_that_names_labels():
    x = torch.tensor([[3, 4, 5]])
    for y in (torch.full_like(x, -100), torch.tensor([[7, -100, -100]])):        # the first label of a row has no prediction
        with pytest.raises(LmnotesError, match='labels'): nll(shared('GPT2LMHeadModel'), dict(input_ids=x, labels=y))


def test_a_measurement_leaves_no_trace():
    model = build('GPT2LMHeadModel').train()
    model.transformer.h[1].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    assert perplexity(model, [3, 4, 5, 6]) == perplexity(model, [3, 4, 5, 6])
    with pytest.raises(LmnotesError): perplexity(model, [3, 4, V])
    assert modes == [m.training for m in model.modules()] and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_nan_logits_are_an_error():
    from types import SimpleNamespace

    class Broken(torch.nn.Module):
        def forward(self, input_ids, **_): return SimpleNamespace(logits=torch.full((*input_ids.shape, V), math.nan))
    with pytest.raises(LmnotesError, match='nan'): perplexity(Broken(), [3, 4, 5])


def test_half_precision_is_scored_in_float32():
    z, y = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.tensor([[1, 2, -100], [4, 5, 6]])
    assert log_probs(z, y).dtype == torch.float32
    torch.testing.assert_close(log_probs(z, y), log_probs(z.double(), y).float())


def test_a_wrapped_model_is_seen_through():
    class Wrapper(torch.nn.Module):                                              # as DistributedDataParallel
        def __init__(self, module):
            super().__init__()
            self.module = module
        def forward(self, *args, **kw): return self.module(*args, **kw)
    for name in CAUSAL:
        assert model_kind(Wrapper(shared(name))) == 'causal'
        assert perplexity(Wrapper(shared(name)), [3, 4, 5]) == perplexity(shared(name), [3, 4, 5])


def test_bits_per_byte():
    assert bits_per_byte(8 * math.log(2), 4) == 2
    for n in (0, -1):
        with pytest.raises(LmnotesError, match='n_bytes'): bits_per_byte(1., n)
