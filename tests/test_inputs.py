"model_inputs on many families of transformers: packed and padded rows equal separate ones, or the family is refused by name."
import pytest, torch
import torch.nn as nn
import transformers as t

from lmnotes.core import LmnotesError
from lmnotes.inputs import _takes, model_inputs, n_scored
from lmnotes.lm import model_kind, nll
from lmnotes.models import bert, gpt2, llama, t5, unilm
from lmnotes.recurrent import NNLM, RNNLM

t.logging.set_verbosity_error()
S = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
G = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
B = dict(vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
         decoder_ffn_dim=48, max_position_embeddings=64)
KV = dict(num_key_value_heads=2)
PACK = {                                                    # these can keep packed texts apart
    'GPT2': (t.GPT2LMHeadModel, t.GPT2Config, G), 'Llama': (t.LlamaForCausalLM, t.LlamaConfig, S | KV), 'Qwen2': (t.Qwen2ForCausalLM, t.Qwen2Config, S | KV),
    'Qwen3': (t.Qwen3ForCausalLM, t.Qwen3Config, S | KV | dict(head_dim=8)), 'SmolLM3': (t.SmolLM3ForCausalLM, t.SmolLM3Config, S | KV | dict(pad_token_id=0)),
    'Mistral': (t.MistralForCausalLM, t.MistralConfig, S | KV | dict(sliding_window=None)), 'GPTNeo': (t.GPTNeoForCausalLM, t.GPTNeoConfig, dict(vocab_size=97, hidden_size=32,
    num_layers=2, num_heads=4, attention_types=[[['global', 'local'], 1]], max_position_embeddings=64, window_size=16)), 'GPTJ': (t.GPTJForCausalLM, t.GPTJConfig, G | dict(rotary_dim=4)),
    'OPT': (t.OPTForCausalLM, t.OPTConfig, dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32)),
    'Falcon': (t.FalconForCausalLM, t.FalconConfig, dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)),
    'MPT': (t.MptForCausalLM, t.MptConfig, dict(vocab_size=97, d_model=32, n_heads=4, n_layers=2, max_seq_len=64)), 'BERT': (t.BertForMaskedLM, t.BertConfig, S),
    'BERT decoder': (t.BertLMHeadModel, t.BertConfig, S | dict(is_decoder=True)), 'RoBERTa': (t.RobertaForMaskedLM, t.RobertaConfig, S),
    'ELECTRA': (t.ElectraForMaskedLM, t.ElectraConfig, S | dict(embedding_size=32)), 'XLNet': (t.XLNetLMHeadModel, t.XLNetConfig, dict(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=48))}
REFUSE = {                                                  # and these cannot
    'Bloom': (t.BloomForCausalLM, t.BloomConfig, dict(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)),
    'Mamba': (t.MambaForCausalLM, t.MambaConfig, dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)),
    'DeBERTa': (t.DebertaV2ForMaskedLM, t.DebertaV2Config, S | dict(relative_attention=True, pos_att_type=['c2p', 'p2c'])),
    'BART': (t.BartForConditionalGeneration, t.BartConfig, B), 'BART decoder': (t.BartForCausalLM, t.BartConfig, B),
    'T5': (t.T5ForConditionalGeneration, t.T5Config, dict(vocab_size=97, d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48, decoder_start_token_id=0)),
    'sliding window': (t.MistralForCausalLM, t.MistralConfig, S | KV | dict(sliding_window=4)),
    'mixed windows': (t.Gemma3ForCausalLM, t.Gemma3TextConfig, S | KV | dict(head_dim=8, sliding_window=4))}
OURS = dict(gpt2=lambda: gpt2(97, d_model=32, n_heads=4), llama=lambda: llama(97, d_model=32, n_heads=4), bert=lambda: bert(97, d_model=32, n_heads=4),
            unilm=lambda: unilm(97, d_model=32, n_heads=4))
IDS = torch.randint(20, 90, (2, 9), generator=torch.Generator().manual_seed(0))
SEGMENTS = torch.tensor([[1] * 4 + [2] * 5, [1] * 3 + [2] * 4 + [0] * 2])
TEXTS = [(0, 0, 4), (0, 4, 9), (1, 0, 3), (1, 3, 7)]


def make(recipe, attention='sdpa', std=.3):
    torch.manual_seed(0)
    cls, config, fields = recipe
    model = cls(config(**fields)).eval()
    for p in model.parameters(): nn.init.normal_(p, std=std) if p.ndim > 1 else None
    try: model.set_attn_implementation(attention)
    except ValueError: pytest.skip(f'no {attention} here')
    return model


def error_packed(model, inputs):
    with torch.no_grad():
        out = model(**inputs).logits
        return max((out[r, i:j] - model(input_ids=IDS[r:r + 1, i:j]).logits[0]).abs().max().item() for r, i, j in TEXTS)


@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
@pytest.mark.parametrize('name', PACK)
def test_packed_and_padded_rows_equal_separate_ones(name, attention):
    model = make(PACK[name], attention)
    inputs = model_inputs(model, dict(input_ids=IDS, segment_ids=SEGMENTS, labels=IDS))
    assert error_packed(model, {k: v for k, v in inputs.items() if k != 'labels'}) < 1e-4
    real = torch.tensor([[False] * 3 + [True] * 6, [True] * 9])
    with torch.no_grad():
        padded = model(**model_inputs(model, dict(input_ids=IDS, attention_mask=real))).logits
        torch.testing.assert_close(padded[0, 3:], model(input_ids=IDS[:1, 3:]).logits[0], atol=1e-4, rtol=1e-4)


def test_small_weights_are_no_excuse():
    "The trial sees the difference between positions, too, where random weights are as small as fresh models have them."
    for name in ('GPT2', 'RoBERTa', 'XLNet'): assert _takes(make(PACK[name], std=.02))['packs']
    assert _takes(make(PACK['RoBERTa'], std=.02))['shift'] == 2
    for name in ('Bloom', 'Mamba', 'DeBERTa', 'BART', 'BART decoder', 'T5'): assert not _takes(make(REFUSE[name], 'eager', std=.02))['packs']


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    for name in ('GPT2', 'Llama', 'BERT'):
        for attention in ('eager', 'sdpa'):
            model = make(PACK[name], attention, std=.1).to(dtype)
            inputs = model_inputs(model, dict(input_ids=IDS, segment_ids=SEGMENTS))
            assert inputs['attention_mask'].dtype == dtype and inputs['attention_mask'].isfinite().all()
            assert error_packed(model, inputs) < .05 * model(input_ids=IDS).logits.abs().max()


def test_under_autocast():
    model = make(PACK['GPT2'], 'sdpa', std=.1)
    inputs = model_inputs(model, dict(input_ids=IDS, attention_mask=torch.zeros(2, 1, 9, 9, dtype=torch.bool)))        # rows that read nothing
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad(): assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize('name', REFUSE)
def test_refused_by_name(name):
    model = make(REFUSE[name], 'eager')
    with pytest.raises(LmnotesError, match=type(model).__name__): model_inputs(model, dict(input_ids=IDS, segment_ids=SEGMENTS, labels=IDS))


def test_a_mask_that_is_not_heard_is_refused():
    "Mamba2 takes a mask of four dimensions without an error and does nothing with it."
    model = make((t.Mamba2ForCausalLM, t.Mamba2Config, dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=8, head_dim=8, n_groups=1)), 'eager')
    with pytest.raises(LmnotesError, match='Mamba2ForCausalLM'): model_inputs(model, dict(input_ids=IDS, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()))


def test_left_padding_is_refused_where_it_would_be_read_wrong():
    real = torch.tensor([[False] * 3 + [True] * 6, [True] * 9])
    for name in ('BART', 'BART decoder'):
        with pytest.raises(LmnotesError, match='position_ids'): model_inputs(make(REFUSE[name]), dict(input_ids=IDS, attention_mask=real))
        assert 'position_ids' not in model_inputs(make(REFUSE[name]), dict(input_ids=IDS, attention_mask=real.flip(1)))   # on the right it is fine
    model = make(REFUSE['T5'])
    with torch.no_grad():
        padded = model(**model_inputs(model, dict(input_ids=IDS, attention_mask=real, labels=IDS))).logits[0]
        torch.testing.assert_close(padded, model(input_ids=IDS[:1, 3:], labels=IDS[:1]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('name', OURS)
def test_ours(name):
    model = OURS[name]().eval()
    inputs = model_inputs(model, dict(input_ids=IDS, segment_ids=SEGMENTS))
    assert inputs['attention_mask'].dtype == torch.bool and error_packed(model, inputs) < 1e-4
    batch = dict(input_ids=IDS, labels=IDS.where(SEGMENTS > 0, -100), segment_ids=SEGMENTS)
    inputs = model_inputs(model, batch)
    with torch.no_grad(): loss, (total, n) = model(**inputs).loss, nll(model, inputs)
    assert n == n_scored(model, batch) == (12 if model_kind(model) == 'causal' else 16)
    torch.testing.assert_close(loss * n, total, rtol=1e-5, atol=0)


def test_models_without_attention_are_refused_and_padding_works():
    for model in (RNNLM(97), NNLM(97)):
        with pytest.raises(LmnotesError, match=type(model).__name__): model_inputs(model, dict(input_ids=IDS, segment_ids=SEGMENTS))
        assert model_inputs(model, dict(input_ids=IDS))['input_ids'] is IDS
    with pytest.raises(LmnotesError, match='Transformer'): model_inputs(t5(97, d_model=32, n_heads=4), dict(input_ids=IDS, segment_ids=SEGMENTS, labels=IDS))


def test_counts():
    causal, masked = make(PACK['GPT2']), make(PACK['BERT'])
    real = torch.tensor([[False] * 3 + [True] * 6, [True] * 9])
    assert n_scored(causal, dict(input_ids=IDS)) == 16 and n_scored(causal, dict(input_ids=IDS, attention_mask=real)) == 13
    assert n_scored(causal, dict(input_ids=IDS, labels=IDS.where(IDS > 50, -100))) == int((IDS[:, 1:] > 50).sum())
    assert n_scored(masked, dict(input_ids=IDS, labels=IDS.where(IDS > 50, -100))) == int((IDS > 50).sum())
    assert n_scored(causal, dict(input_ids=IDS, labels=torch.full_like(IDS, -100))) == 0
    tagger = t.GPT2ForTokenClassification(t.GPT2Config(**G))
    assert n_scored(tagger, dict(input_ids=IDS, labels=torch.zeros_like(IDS))) == 18
    chooser = gpt2(97, d_model=32, n_heads=4, head='classification')
    assert n_scored(chooser, dict(input_ids=IDS, labels=torch.tensor([0, 1]))) == 2
    with pytest.raises(LmnotesError, match='labels'): n_scored(masked, dict(input_ids=IDS))


def test_model_and_arguments_stay_as_they_were():
    model = make(PACK['GPT2']).train()
    batch, state = dict(input_ids=IDS, labels=IDS.clone(), segment_ids=SEGMENTS, note='kept out'), torch.get_rng_state()
    before = {k: v.clone() if torch.is_tensor(v) else v for k, v in batch.items()}
    inputs = model_inputs(model, batch)
    assert 'note' not in inputs and 'segment_ids' not in inputs and model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) if torch.is_tensor(v) else before[k] == v for k, v in batch.items()) and list(before) == list(batch)


def test_a_prefix_mask_in_an_encoder():
    "Any pattern: a masked model that reads a prefix both ways and the rest from left to right."
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None] | (torch.arange(9) < 4)
    model, other = make(PACK['BERT'], 'eager'), IDS.clone()
    other[:, 8] = 19
    with torch.no_grad(): a, b = (model(**model_inputs(model, dict(input_ids=x, attention_mask=mask.expand(2, 1, 9, 9)))).logits for x in (IDS, other))
    assert (a - b)[:, :8].abs().max() < 1e-5 and (a - b)[:, 8].abs().max() > 1e-2


@pytest.mark.parametrize('make_one', [lambda: make(PACK['GPT2'], 'eager'), lambda: llama(97, d_model=32, n_heads=4)])
def test_a_mask_that_reads_ahead_is_refused_by_causal_models(make_one):
    "Prefixes, both ways, another text's mask; not causal ones, padding, or packed texts by their segments"
    model, past, places = make_one(), torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9), torch.arange(9)
    ahead = [past | (places < 2), torch.ones_like(past), past.transpose(2, 3), past | ((places == 8) & (torch.arange(2) == 1)[:, None, None, None])]
    for mask in ahead:
        for more in ({}, dict(labels=IDS), dict(segment_ids=SEGMENTS)):
            with pytest.raises(LmnotesError, match='attention_mask'): model_inputs(model, dict(input_ids=IDS, attention_mask=mask, **more))
    for mask in (past, (places < 6).expand(2, 1, 1, 9), past & (places > 0)):
        for more in ({}, dict(segment_ids=SEGMENTS)): assert 'attention_mask' in model_inputs(model, dict(input_ids=IDS, attention_mask=mask, **more))


@pytest.mark.parametrize('bad,name', [
    (dict(input_ids=IDS[0]), 'batch'), (dict(labels=IDS), 'batch'), (dict(input_ids=IDS, attention_mask=torch.ones(2, 9, 9).bool()), 'attention_mask.shape'),
    (dict(input_ids=IDS, attention_mask=torch.ones(2, 1, 9, 9)), 'attention_mask.dtype'), (dict(input_ids=IDS, attention_mask=torch.ones(3, 9)), 'attention_mask.shape'),
    (dict(input_ids=IDS, attention_mask=torch.ones(2, 1, 8, 9).bool()), 'attention_mask.shape')])
def test_bad_batches(bad, name):
    with pytest.raises(LmnotesError, match=name): model_inputs(make(PACK['GPT2']), bad)
