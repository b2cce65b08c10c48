"""Our Transformer against itself, in random configurations of every kind: cached equals whole, padded equals alone, packed equals
separate, nothing leaks from where the mask forbids, and wrong input is refused by name."""
import random

import pytest
import torch
from torch.testing import assert_close

from lmnotes.attention import KVCache, segment_mask
from lmnotes.core import LmnotesError
from lmnotes.decoding import generate
from lmnotes.models import Transformer, TransformerConfig, bart, bert, gpt2, llama, t5, unilm

POSITIONS = ['rotary', 'learned', 'sinusoidal', 'alibi', 'relative', None]


def draw(seed, kind):
    "A random small model whose outputs depend on everything."
    r = random.Random(seed)
    heads, width, layers = r.choice([1, 2, 3, 4]), 2 * r.randint(1, 5), r.randint(1, 3)
    fields = dict(kind=kind, d_model=2 * heads * r.randint(2, 5), n_layers=layers, n_heads=heads, d_head=r.choice([None, width]), n_kv_heads=r.choice([g for g in range(1, heads + 1) if heads % g == 0]),
                  d_ff=r.choice([7, 24]), max_len=32, positions=r.choice(POSITIONS), norm=r.choice(['rms', 'layer']), norm_first=r.random() < .6, embed_norm=r.random() < .3,
                  activation=r.choice(['relu', 'gelu', 'gelu_tanh', 'silu']), gated=r.random() < .5, bias=r.random() < .5, qk_norm=r.random() < .3, tie=r.random() < .5, init_std=.4,
                  embed_scale=r.choice([1., 3.]), logit_scale=r.choice([1., .5]), head_transform=r.random() < .3, head_bias=r.random() < .5, start_id=1, pad_id=0, eos_id=2)
    if fields['d_head'] is None and (fields['d_model'] // heads) % 2: fields['d_head'] = 2
    if kind == 'decoder' and r.random() < .4: fields |= dict(window=r.randint(2, 6), window_layers=r.choice([None, (0,)]))
    if kind == 'encoder-decoder': fields |= dict(n_decoder_layers=r.choice([None, 1, 3]))
    if fields['positions'] == 'rotary' and r.random() < .3: fields |= dict(rope_layers=(0,))
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(41, **fields)).eval()


def assert_near(a, b): assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('grow', [True, False])
@pytest.mark.parametrize('kind', ['decoder', 'encoder-decoder'])
def test_cached_equals_whole_with_left_padding(kind, grow):
    for seed in range(25):
        model, r = draw(seed, kind), random.Random(seed)
        ids, mask = torch.randint(3, 41, (3, 12)), torch.ones(3, 12, dtype=torch.bool)
        for row, n in enumerate([0, r.randint(1, 5), r.randint(1, 9)]): mask[row, :n] = False
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        cache, outs, at = KVCache(None if grow else 12), [], 0
        if kind == 'decoder':
            step = lambda a, b, c: model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=c, use_cache=True)
        else:
            source, keep = torch.randint(3, 41, (3, 9)), torch.arange(9) < torch.tensor([[9], [4], [7]])
            memory = model(source, attention_mask=keep, decoder_input_ids=ids[:, :1]).encoder_last_hidden_state
            step = lambda a, b, c: model(encoder_outputs=memory, attention_mask=keep, decoder_input_ids=ids[:, a:b], decoder_attention_mask=mask[:, :b], past_key_values=c, use_cache=True)
        with torch.no_grad():
            whole = model(ids, attention_mask=mask, position_ids=positions) if kind == 'decoder' else model(source, attention_mask=keep, decoder_input_ids=ids, decoder_attention_mask=mask)
            while at < 12:                                                # some tokens at a time
                n = min(r.choice([1, 1, 2, 5]), 12 - at)
                outs.append(step(at, at + n, cache).logits)
                at += n
            assert_near(torch.cat(outs, 1)[mask], whole.logits[mask])


@pytest.mark.parametrize('kind', ['decoder', 'encoder', 'encoder-decoder'])
def test_padded_rows_equal_single_ones(kind):
    for seed in range(25):
        model, r = draw(seed, kind), random.Random(seed)
        ids = torch.randint(3, 41, (3, 12))
        more = dict(decoder_input_ids=torch.randint(3, 41, (3, 6))) if kind == 'encoder-decoder' else {}
        for side in ('left', 'right'):
            lengths = [12, r.randint(1, 11), r.randint(1, 11)]
            mask = torch.stack([torch.arange(12) >= 12 - n if side == 'left' else torch.arange(12) < n for n in lengths])
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            with torch.no_grad():
                batch = model(ids, attention_mask=mask, position_ids=positions, **more).logits
                for row in range(3):
                    one = model(ids[row:row + 1, mask[row]], **{k: v[row:row + 1] for k, v in more.items()}).logits[0]
                    assert_near(batch[row] if more else batch[row, mask[row]], one)


@pytest.mark.parametrize('kind', ['decoder', 'encoder'])
def test_packed_rows_equal_separate_ones(kind):
    for seed in range(25):
        model = draw(seed, kind)
        ids, segments = torch.randint(3, 41, (1, 12)), torch.tensor([[0] * 4 + [1] * 5 + [2] * 3])
        places = torch.tensor([[*range(4), *range(5), *range(3)]])
        with torch.no_grad():
            packed = model(ids, attention_mask=segment_mask(segments), position_ids=places).logits
            for s in range(3): assert_near(packed[:, segments[0] == s], model(ids[:, segments[0] == s]).logits)


def test_decoders_do_not_look_ahead():
    for seed in range(25):
        for kind in ('decoder', 'encoder-decoder'):
            model = draw(seed, kind)
            ids = torch.randint(3, 40, (1, 10))
            run = (lambda x: model(x).logits) if kind == 'decoder' else (lambda x: model(torch.arange(3, 9)[None], decoder_input_ids=x).logits)
            with torch.no_grad():
                changed = ids.clone()
                changed[0, 6] = 40
                a, b = run(ids), run(changed)
            assert torch.equal(a[:, :6], b[:, :6]) and not torch.allclose(a[:, 6], b[:, 6])


def test_window_reaches_so_far_and_no_further():
    torch.manual_seed(0)
    model = llama(41, d_model=16, n_layers=1, n_heads=2, window=3, init_std=.5).eval()
    ids = torch.randint(3, 40, (1, 10))
    with torch.no_grad():
        base = model(ids).logits[0, 9]
        for t in range(10):
            moved = not torch.allclose(base, model(ids.clone().index_fill_(1, torch.tensor(t), 40)).logits[0, 9], atol=1e-6)
            assert moved == (t >= 7), t


def test_fully_masked_rows_are_finite():
    for seed in range(10):
        model = draw(seed, 'decoder').train()
        ids, mask = torch.randint(3, 41, (2, 6)), torch.zeros(2, 6, dtype=torch.bool)
        mask[0] = True
        out = model(ids, attention_mask=mask, labels=ids)
        out.loss.backward()
        assert out.logits.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_dropout_and_modes():
    torch.manual_seed(0)
    model = bert(41, d_model=16, n_heads=2, dropout=.3, attention_dropout=.2, ff_dropout=.1)
    ids = torch.randint(3, 41, (2, 9))
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_inputs_stay_as_they_are():
    model, ids, mask = gpt2(41, d_model=16, n_heads=2), torch.randint(3, 41, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    labels, before = ids.clone(), (ids.clone(), mask.clone())
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1]) and torch.equal(labels, before[0])


def test_state_survives_saving(tmp_path):
    from safetensors.torch import load_model, save_model
    model = t5(41, d_model=16, n_heads=2)
    save_model(model, tmp_path/'x.safetensors')
    other = t5(41, d_model=16, n_heads=2)
    load_model(other, tmp_path/'x.safetensors')
    ids = torch.randint(3, 41, (2, 5))
    with torch.no_grad(): assert torch.equal(model(ids, labels=ids).logits, other(ids, labels=ids).logits)
    assert other.head.weight is other.embed.weight


ids = torch.randint(3, 41, (2, 5))
SMALL = dict(d_model=16, n_heads=2, n_layers=1)
BAD = {                                               # what is tried: a word that the message must hold
    'n_heads': lambda: llama(41, d_model=16, n_heads=3), 'n_kv_heads': lambda: llama(41, d_model=16, n_heads=4, n_kv_heads=3), 'vocab_size': lambda: gpt2(0),
    'positions': lambda: gpt2(41, positions='absolute'), 'dropout': lambda: bert(41, dropout=1.), 'd_model': lambda: gpt2(41, d_model=-4), 'd_head': lambda: llama(41, d_model=9, n_heads=3),
    'max_len': lambda: gpt2(41, max_len=None), 'window': lambda: bert(41, window=3, **SMALL), 'rope_type': lambda: llama(41, rope_scaling=dict(rope_type='ntk'), **SMALL),
    'kind': lambda: Transformer(TransformerConfig(41, kind='both')), 'head': lambda: t5(41, head='tagging', **SMALL), 'activation': lambda: gpt2(41, activation='swish'),
    'input_ids': lambda: gpt2(41, **SMALL)(ids[0]), 'at most max_len = 4': lambda: gpt2(41, max_len=4, **SMALL)(ids), 'an id in input_ids is 41': lambda: gpt2(41, **SMALL)(torch.full((1, 2), 41)),
    'an id in input_ids is -1': lambda: gpt2(41, **SMALL)(-torch.ones(1, 2, dtype=torch.long)), 'torch.float32': lambda: gpt2(41, **SMALL)(ids.float()),
    'attention_mask': lambda: gpt2(41, **SMALL)(ids, attention_mask=torch.ones(2, 5, 5)), '(B,S) = (2, 5)': lambda: gpt2(41, **SMALL)(ids, attention_mask=torch.ones(2, 4)),
    'torch.bool': lambda: gpt2(41, **SMALL)(ids, attention_mask=torch.ones(2, 1, 5, 5)), 'labels': lambda: gpt2(41, **SMALL)(ids, labels=ids[:, :3]),
    'each of the': lambda: gpt2(41, **SMALL)(ids, labels=torch.full_like(ids, -100)), 'cannot decode': lambda: bert(41, **SMALL)(ids, use_cache=True),
    'decoder_input_ids': lambda: gpt2(41, **SMALL)(ids, decoder_input_ids=ids), 'decoder_input_ids is None': lambda: t5(41, **SMALL)(ids), 'token_type_ids': lambda: gpt2(41, **SMALL)(ids, token_type_ids=ids),
    'an id in token_type_ids': lambda: bert(41, **SMALL)(ids, token_type_ids=ids), 'of shape (B,S) in an encoder-decoder': lambda: bart(41, **SMALL)(ids, attention_mask=torch.ones(2, 1, 5, 5).bool(), labels=ids),
    'start_id': lambda: t5(41, start_id=None, **SMALL)(ids, labels=ids), 'causal': lambda: generate(unilm(41, **SMALL), ids), 'without a head': lambda: bert(41, head=None, **SMALL)(ids, labels=ids),
}


@pytest.mark.parametrize('word', BAD)
def test_bad_input_is_refused_by_name(word):
    with pytest.raises(LmnotesError) as e: BAD[word]()
    assert word in str(e.value), str(e.value)


def test_compiles_in_one_graph():
    "No graph break in a forward with mask, labels and positions (traced, not compiled: no compiler is needed)."
    ids, mask = torch.randint(3, 41, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    for build in (gpt2, llama, bert, t5, bart):
        model = build(41, d_model=16, n_heads=2, n_layers=2)
        want = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        traced = torch.compile(model, fullgraph=True, backend='aot_eager')
        got = traced(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        assert_close(got, want, atol=1e-5, rtol=1e-5)
