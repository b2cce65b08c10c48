"""Make the bundled model `t5-tiny`: an encoder-decoder of 2.6 million parameters, pretrained by span corruption on the text of `gpt-tiny`, the World
Factbook and the King James Bible, never on Shakespeare.

    python nbs/recipes/t5_tiny.py train --seed 0           resumable: the same command goes on after an interruption
    python nbs/recipes/t5_tiny.py evaluate --seed 0        held-out text: nats per target token, and spans filled in exactly, beside baselines
    python nbs/recipes/t5_tiny.py publish --seed 0         weights (float16), configuration and card into lmnotes/assets/models/t5-tiny

Its tokenizer is that of `gpt-tiny` with padding and 100 sentinels more; it is written first, if it is not there, by `python nbs/recipes/t5_tiny.py tokenizer`.
"""
import itertools, json
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import pad
import tiny
from tiny import BLOCK, CORPORA, VOCAB, command_line, token_lists, write_config
from lmnotes.core import assets
from lmnotes.data import load_tokenizer
from lmnotes.hub import load_model
from lmnotes.models import t5
from lmnotes.scoring import token_loss
from lmnotes.spans import span_corruption

HOME, EOS, PAD, N = assets('models')/'t5-tiny', 0, VOCAB, 100
V = VOCAB + 1 + N
SENTINELS = range(V - 1, VOCAB, -1)                         # <extra_id_0> has the last id, as in T5
STEPS, LR, P, SPAN = 2400, .006, .15, 3.
SHAPE = dict(d_model=128, n_layers=3, n_heads=4, d_ff=384)

def make_tokenizer():
    "The tokenizer of gpt-tiny; its ids stay, padding and the sentinels follow. A text is closed by <|endoftext|>."
    HOME.mkdir(parents=True, exist_ok=True)
    tok = Tokenizer.from_file(str(assets('models')/'gpt-tiny'/'tokenizer.json'))
    more = [AddedToken('<|pad|>', special=True, normalized=False)]
    more += [AddedToken(f'<extra_id_{i}>', special=True, normalized=False, lstrip=True) for i in reversed(range(N))]     # a sentinel takes the space before it
    tok.add_special_tokens(more)
    end = '<|endoftext|>'
    tok.post_processor = TemplateProcessing(single=f'$A {end}', pair=f'$A {end} $B {end}', special_tokens=[(end, EOS)])
    assert tok.token_to_id(end) == EOS and tok.token_to_id('<|pad|>') == PAD and [tok.token_to_id(f'<extra_id_{i}>') for i in range(N)] == list(SENTINELS)
    tok.save(str(HOME/'tokenizer.json'))
    write_config(HOME, pad_token='<|pad|>', model_input_names=['input_ids', 'attention_mask'])

def corrupted(ids, **how):
    "A batch for the model; an end-of-text token within a row, between two documents, is never dropped."
    return span_corruption(ids, sentinel_ids=SENTINELS, eos_id=EOS, pad_id=PAD, special_mask=ids == EOS, **how)

def batch(block):
    "Three batches of four train on quarters of rows: with few holes in a row the decoder sooner learns which one it is filling."
    ids = torch.stack(block)
    return corrupted(ids.view(-1, BLOCK // 4) if int(ids.sum()) % 4 else ids, p=P, mean_span=SPAN)

def fresh():
    "T5 1.1's choices. Queries start small, as in T5, which does not divide scores by the root of the head's width."
    model = t5(V, activation='gelu_tanh', gated=True, tie=False, pad_id=PAD, start_id=PAD, eos_id=EOS, **SHAPE)
    K = model.config.head_width
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            for block in stack.blocks:
                block.attention.qkv.weight[:K * SHAPE['n_heads']] *= K**-.5
                if stack is model.decoder: block.cross.q.weight *= K**-.5
        local_start(model, K)
    return model

def local_start(model, K):
    """Two heads of the encoder begin by reading the positions before and after, and one of the decoder the position before, by the table of relative positions; one head
    of the first cross-attention begins by looking for the token it stands at, so that a sentinel finds itself, and through it what was around the hole. So that
    layers do not drown which token it is, embeddings begin with a standard deviation of 1, as T5's do."""
    model.embed.weight.normal_()
    model.encoder.relative.weight[1, 0] = model.encoder.relative.weight[17, 1] = model.decoder.relative.weight[1, 0] = 6.
    same = torch.nn.init.orthogonal_(torch.empty(K, SHAPE['d_model'])) * 1.5
    cross = model.decoder.blocks[0].cross
    cross.q.weight[:K], cross.kv.weight[:K] = same, same

def train(seed, out, steps): tiny.train(fresh, batch, seed, out, steps, lr=LR)

# ---- held-out text

WIDTH, SAMPLE = 256, 128                                   # tokens of a row; rows of each text that are filled in by greedy decoding

def held_out(name, split):
    "(R,WIDTH) rows of the documents, padded, and their masks; ends of less than 16 tokens are left out"
    pieces = [d[i:i + WIDTH] for d in token_lists(load_tokenizer('gpt-tiny'), name, split) for i in range(1, len(d) - 1, WIDTH)]
    pieces = [torch.tensor([t for t in p if t != EOS]) for p in pieces]
    pieces = [p for p in pieces if len(p) >= 16]
    return torch.stack([pad(p, (0, WIDTH - len(p)), value=PAD) for p in pieces]), torch.stack([torch.arange(WIDTH) < len(p) for p in pieces])

@torch.no_grad()
def greedy(model, b):
    "What the model writes, as many tokens as the target has"
    ids, n = torch.full((len(b['input_ids']), 1), PAD), b['labels'].shape[1]
    out, written = model(input_ids=b['input_ids'], attention_mask=b['attention_mask'], decoder_input_ids=ids, use_cache=True), []
    for _ in range(n):
        written.append(out.logits[:, -1].argmax(-1, keepdim=True))
        out = model(attention_mask=b['attention_mask'], encoder_outputs=out.encoder_last_hidden_state, decoder_input_ids=written[-1], past_key_values=out.past_key_values, use_cache=True)
    return torch.cat(written, 1)

def spans(target):
    "{sentinel: tokens after it}, up to the end"
    found, at = {}, None
    for t in target:
        if t == EOS or t == -100: break
        if t > PAD: at = found.setdefault(t, [])
        elif at is not None: at.append(t)
    return {s: tuple(x) for s, x in found.items()}

def copied(visible, sentinel, length, common):
    "A baseline: what follows the last earlier place of the token before the gap, as long as the gap; the commonest token where there is none"
    at = visible.index(sentinel)
    before = [i for i in range(at - 1) if visible[i] == visible[at - 1] and visible[i + 1] < VOCAB] if at else []
    guess = visible[before[-1] + 1:before[-1] + 1 + length] if before else []
    return tuple((guess + [common] * length)[:length])

@torch.no_grad()
def measure(model, name, split, unigram):
    "Nats per target token of the model, and of a unigram model on the same tokens; spans that are filled in exactly"
    ids, real = held_out(name, split)
    common, right, copies, n, total = int(unigram.argmax()), 0, 0, 0, np.zeros(5)
    for i in range(0, len(ids), 64):
        b = corrupted(ids[i:i + 64], attention_mask=real[i:i + 64], seeds=torch.arange(i, min(i + 64, len(ids))))
        y = b['labels']
        text = (y != -100) & (y != EOS) & (y < VOCAB)
        (nll, scored), (words, k) = token_loss(model, b), token_loss(model, b | dict(labels=y.masked_fill(~text, -100), decoder_input_ids=model.prepare_decoder_input_ids_from_labels(y)))
        total += [float(nll), scored, float(words), k, -float(unigram[y[text]].sum())]
        if i >= SAMPLE: continue
        for visible, said, wanted in zip(b['input_ids'].tolist(), greedy(model, b).tolist(), y.tolist()):
            said = spans(said)
            for s, tokens in spans(wanted).items():
                n, right, copies = n + 1, right + (said.get(s) == tokens), copies + (copied(visible, s, len(tokens), common) == tokens)
    return dict(rows=len(ids), target_tokens=int(total[1]), nats=round(total[0] / total[1], 4), text_tokens=int(total[3]), nats_text=round(total[2] / total[3], 4),
                nats_text_unigram=round(total[4] / total[3], 4), spans=n, exact=round(right / n, 4), exact_copy=round(copies / n, 4))

def evaluate(seed, out):
    model = load_model(out/'model')
    train_ids = torch.tensor([t for c in CORPORA for d in token_lists(load_tokenizer('gpt-tiny'), c, 'train') for t in d if t != EOS])
    counts = train_ids.bincount(minlength=VOCAB).double() + 1
    result = {f'{name}/{split}': measure(model, name, split, (counts / counts.sum()).log()) for name, split in itertools.product(CORPORA, ('validation', 'test'))}
    (out/'evaluation.json').write_text(json.dumps(result, indent=1) + '\n')
    print(json.dumps(result, indent=1))

LINE = '| {seed} | {text} | {nats:.3f} | {nats_text:.3f} | {nats_text_unigram:.3f} | {exact:.1%} of {spans:,} | {exact_copy:.1%} |'

def publish(seed, out):
    tiny.publish(HOME, seed, out, CARD, LINE, lr=LR, part=BLOCK // 4, sentinels=N, pad=PAD, first=SENTINELS[0], p=P, span=SPAN, width=WIDTH, sample=SAMPLE, **SHAPE)

CARD = """# t5-tiny

A sequence-to-sequence model for these notes, small enough to be bundled: {parameters:,} parameters, float16, {bytes:,} bytes. It has T5 1.1's layout (relative positions, RMS
normalization, gated feed-forward layers with GELU, no biases, tables of its own for input and output), so `transformers` reads this folder as a `T5ForConditionalGeneration`
(some versions print a warning that both tables are not tied, which they are not).

- **Shape:** {n_layers} layers on either side, width {d_model}, {n_heads} heads, feed-forward {d_ff}; trained on up to {block} tokens.
- **Tokenizer:** that of `gpt-tiny`, byte-level BPE of {vocab} tokens; after them `<|pad|>` (id {pad}, which also starts the decoder) and {sentinels} sentinels, `<extra_id_0>` with the
  highest id, {first}, as in T5. `<|endoftext|>` (id 0) ends inputs and targets. A sentinel takes the space before it: write `The <extra_id_0> of Chile`.
- **Data:** the training splits of `factbook` and `kjv` (see their cards). Never Shakespeare: neither model nor tokenizer has seen a line of it.
- **Recipe:** `nbs/recipes/t5_tiny.py`; span corruption with {p:.0%} of the tokens in spans of {span:g} on average, new ones in every step; {steps} steps of {rows} rows of {block} tokens
  ({tokens:,} scored target tokens; three batches of four are cut into rows of {part}), Muon at {lr} and AdamW at a fifth of it for tables and gains, linear warmup and linear
  decay over the second half, seed {seed}, {precision} products. Some heads begin by looking at neighbors, and one of the cross-attention by looking for the token it
  stands at; without this start, at a rate of 0.02 and on longer rows, the loss stood still near 5 for two thousand steps. It took {seconds} s on: {device}, beside other work.
- **Mean training loss** over 100 steps (nats per target token), every 200 steps: {curve}.
- **Use:** teaching. It knows little and invents facts; it must not inform a decision.
- **Licence:** Apache-2.0, like the rest of this repository; its training text is in the public domain.
- **SHA-256** of model.safetensors: `{sha}`

## Held-out text

Documents cut into rows of {width} tokens, {p:.0%} of them dropped in spans of {span:g} on average, with a fixed seed for each row. Nats per target token, sentinels and the end
included; nats per token of text alone, and those of a unigram model of the training text on the same tokens. Then the first {sample} rows of each text: the model writes the whole target
greedily, and a span counts if it is filled in exactly. Beside it a baseline that is told the length of the gap, and copies what followed when the token before the gap last occurred.

| seed | text | nats, all | nats, text | unigram, nats, text | spans exact | copying |
| --- | --- | --- | --- | --- | --- | --- |
{table}

The seed bundled here is {seed}. `training.json` has every run's loss curve and figures.
"""

if __name__ == '__main__': command_line(__doc__, HOME, STEPS, make_tokenizer, train, evaluate, publish)
