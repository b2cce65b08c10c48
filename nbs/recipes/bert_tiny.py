"""Make the bundled model `bert-tiny`: a masked language model of 2.5 million parameters, pretrained on the text of `gpt-tiny`, the World
Factbook and the King James Bible, never on Shakespeare.

    python nbs/recipes/bert_tiny.py train --seed 0         resumable: the same command goes on after an interruption
    python nbs/recipes/bert_tiny.py evaluate --seed 0      masked accuracy and pseudo-perplexity on held-out text, beside a unigram model
    python nbs/recipes/bert_tiny.py publish --seed 0       weights (float16), configuration and card into lmnotes/assets/models/bert-tiny

Its tokenizer is that of `gpt-tiny` with four special tokens more; it is written first, if it is not there, by `python nbs/recipes/bert_tiny.py tokenizer`.
"""
import itertools, json, math
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
import tiny
from tiny import BLOCK, CORPORA, VOCAB, command_line, halved, token_lists, write_config
from lmnotes.core import assets
from lmnotes.data import load_tokenizer
from lmnotes.hub import load_model
from lmnotes.masking import mlm
from lmnotes.models import bert
from lmnotes.optimizers import muon
from lmnotes.positions import sinusoidal

HOME = assets('models')/'bert-tiny'
SPECIAL = dict(pad_token='<|pad|>', mask_token='<|mask|>', cls_token='<|cls|>', sep_token='<|sep|>')
PAD, MASK, CLS, SEP = range(VOCAB, VOCAB + 4)
STEPS, LR, P = 3600, .03, .2
SHORT, SAMPLE = 126, 20
SHAPE = dict(d_model=192, n_layers=4, n_heads=3, d_ff=640, max_len=BLOCK)

def make_tokenizer():
    "The tokenizer of gpt-tiny; its ids stay, the special tokens follow. Texts get BERT's frame: <|cls|> text <|sep|>, or two texts, each with its own end."
    HOME.mkdir(parents=True, exist_ok=True)
    tok = Tokenizer.from_file(str(assets('models')/'gpt-tiny'/'tokenizer.json'))
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False, lstrip=t == SPECIAL['mask_token']) for t in SPECIAL.values()])    # the mask takes the space before it
    cls, sep = SPECIAL['cls_token'], SPECIAL['sep_token']
    tok.post_processor = TemplateProcessing(single=f'{cls} $A {sep}', pair=f'{cls} $A {sep} $B:1 {sep}:1', special_tokens=[(cls, CLS), (sep, SEP)])
    assert [tok.token_to_id(t) for t in SPECIAL.values()] == [PAD, MASK, CLS, SEP]
    tok.save(str(HOME/'tokenizer.json'))
    write_config(HOME, bos_token='<|endoftext|>', **SPECIAL, model_input_names=['input_ids', 'token_type_ids', 'attention_mask'])

def framed(ids):
    "(B,T) ids with <|cls|> before and <|sep|> after each row, and which tokens are special"
    ids = torch.nn.functional.pad(torch.nn.functional.pad(ids, (1, 0), value=CLS), (0, 1), value=SEP)
    return ids, (ids == CLS) | (ids == SEP) | (ids == 0)                # 0 parts documents; a text cannot hold these ids

def masked(ids, **how):
    "A batch for the model from rows of plain ids; random tokens are never special ones."
    ids, special = framed(ids)
    return mlm(ids, mask_id=MASK, vocab_size=VOCAB + 4, special_mask=special, random_ids=torch.arange(1, VOCAB), **how)

def batch(block): return masked(halved(block), p=P)

@torch.no_grad()
def local_start(model):
    """Positions begin as waves, and two heads of the first block look at the place before and after: a wave moved by a place is a wave turned
    by an angle, so keys read the 32 fastest waves as they are, and queries read them turned. Without this the loss stands still for a long
    time where only the other words of the row are used, and not their places (5.7 after 650 steps; with it that is passed before step 200)."""
    D, K, n = model.config.d_model, model.config.head_width, 32
    model.encoder.positions.weight.copy_(.15 * sinusoidal(BLOCK, D))
    w, i = model.encoder.blocks[0].attention.qkv.weight, torch.arange(n)
    angle = 10_000 ** (-2 * i / D)
    for head, step in enumerate((-1, 1)):
        query, key = torch.zeros(2, K, D)
        key[2 * i, 2 * i] = key[2 * i + 1, 2 * i + 1] = 1.5
        query[2 * i, 2 * i] = query[2 * i + 1, 2 * i + 1] = 1.5 * torch.cos(step * angle)
        query[2 * i, 2 * i + 1], query[2 * i + 1, 2 * i] = 1.5 * torch.sin(step * angle), -1.5 * torch.sin(step * angle)
        w[head * K:(head + 1) * K], w[D + head * K:D + (head + 1) * K] = query, key

def optimizers(model, lr):
    "Muon and AdamW, with a small rate for the positions: at the common one they would soon be noise"
    opts, table = muon(model, lr), model.encoder.positions.weight
    group = next(g for g in opts[1].param_groups if any(p is table for p in g['params']))
    group['params'] = [p for p in group['params'] if p is not table]
    opts[1].add_param_group({**group, 'params': [table], 'lr': group['lr'] / 50})
    return opts

def fresh():
    model = bert(VOCAB + 4, pad_id=PAD, **SHAPE)
    local_start(model)
    return model

def train(seed, out, steps): tiny.train(fresh, batch, seed, out, steps, width=BLOCK - 2, opt=optimizers, lr=LR)

def lines(name, split, width):
    "All tokens of a split in rows of this width, documents parted by <|endoftext|>; the rest is left out"
    flat = torch.tensor([t for d in token_lists(load_tokenizer('gpt-tiny'), name, split) for t in d[:-1]])
    return flat[:len(flat) // width * width].view(-1, width)

@torch.no_grad()
def scored_logits(model, batch):
    "Logits of the scored places alone, 16 rows at a time, and their labels"
    for i in range(0, len(batch['labels']), 16):
        at = batch['labels'][i:i + 16] != -100
        out = model(input_ids=batch['input_ids'][i:i + 16])
        yield torch.nn.functional.linear(out.hidden[at], out.weight, out.bias).float(), batch['labels'][i:i + 16][at]

def score(pairs):
    "Mean negative log-probability in nats, and how often the right token is first, or among the first five"
    rows = [torch.stack([(l := z.log_softmax(-1)).gather(1, y[:, None])[:, 0], (r := (l > l.gather(1, y[:, None])).sum(-1)) < 1, r < 5], 1) for z, y in pairs]
    logp, first, five = torch.cat(rows).double().mean(0).tolist()
    return -logp, first, five, sum(map(len, rows))

def one_at_a_time(row):
    "A text as a batch in which each row hides one token"
    n = len(row)
    ids, special = framed(row.expand(n, -1))
    hide = torch.nn.functional.pad(torch.eye(n, dtype=torch.bool), (1, 1)) & ~special
    return dict(input_ids=ids.masked_fill(hide, MASK), labels=ids.masked_fill(~hide, -100))

def evaluate(seed, out):
    model, result = load_model(out/'model'), {}
    counts = torch.cat([lines(c, 'train', 1).flatten().bincount(minlength=VOCAB + 4) for c in CORPORA]).view(len(CORPORA), -1).sum(0)
    unigram = ((counts + 1) / (counts + 1).sum()).log()
    for name, split in itertools.product(CORPORA, ('validation', 'test')):
        text, short = lines(name, split, BLOCK - 2), lines(name, split, SHORT)
        test = masked(text, p=.15, exact=True, replace=(1., 0., 0.), seeds=torch.arange(len(text)))
        loss, first, five, n = score(scored_logits(model, test))
        base, base1, base5, _ = score([(unigram.expand(n, -1), test['labels'][test['labels'] != -100])])
        some = short[torch.randperm(len(short), generator=torch.Generator().manual_seed(0))[:SAMPLE]]
        pseudo, _, _, m = score(pair for row in some for pair in scored_logits(model, one_at_a_time(row)))
        result[f'{name}/{split}'] = dict(masked_tokens=n, masked_perplexity=math.exp(loss), top1=first, top5=five, unigram_perplexity=math.exp(base), unigram_top1=base1, unigram_top5=base5,
                                         pseudo_tokens=m, pseudo_perplexity=math.exp(pseudo))
        print(name, split, result[f'{name}/{split}'], flush=True)
    result = {k: {f: v if isinstance(v, int) else round(v, 4) for f, v in r.items()} for k, r in result.items()}
    (out/'evaluation.json').write_text(json.dumps(result, indent=1) + '\n')

LINE = ('| {seed} | {text} | {top1:.1%} | {top5:.1%} | {unigram_top1:.1%} | {unigram_top5:.1%} | {masked_perplexity:.1f} | {unigram_perplexity:.0f} | {masked_tokens:,} '
        '| {pseudo_perplexity:.1f} | {pseudo_tokens:,} |')

def publish(seed, out): tiny.publish(HOME, seed, out, CARD, LINE, every=400, lr=LR, half=BLOCK // 2 + 1, p=P, short=SHORT, sample=SAMPLE, **SHAPE)

CARD = """# bert-tiny

A masked language model for these notes, small enough to be bundled: {parameters:,} parameters, float16, {bytes:,} bytes. It has BERT's layout (learned positions, layer
normalization after each addition, GELU, biases, two segments, tied embedding), so `transformers` reads this folder as a `BertForMaskedLM`.

- **Shape:** {n_layers} layers, width {d_model}, {n_heads} heads, feed-forward {d_ff}, context {max_len}. The byte-level BPE of `gpt-tiny` ({vocab} ids, the same), then `<|pad|>`, `<|mask|>`, `<|cls|>`,
  `<|sep|>`. The tokenizer frames a text as `<|cls|> text <|sep|>`; the mask takes the space before it, so that a masked word is asked for with its space.
- **Data:** the training splits of `factbook` and `kjv` (see their cards). Never Shakespeare: neither model nor tokenizer has seen a line of it.
- **Recipe:** `nbs/recipes/bert_tiny.py`; {steps} steps of {rows} rows of {block} tokens (three batches of four are cut into rows of {half}), {p:.0%} of the ordinary tokens asked for, by
  the 80/10/10 rule: {tokens:,} scored tokens. Muon at {lr} and AdamW at a fifth of it for embeddings and gains (a fiftieth
  of that for positions), linear warmup and linear decay over the second half, seed {seed}, {precision} products. Positions begin as sinusoids, and two heads of the first layer look at the
  places before and after: so the long plateau at the beginning of masked training is short. Documents are parted by `<|endoftext|>`, and a row may hold the end of one and the start of the next. All rows are of segment 0, so segment 1 is as it was drawn. It took
  {seconds} s on: {device}, beside other work.
- **Mean training loss** over 100 steps (nats per scored token, part of them replaced or kept rather than hidden), every 400 steps: {curve}.
- **Use:** teaching. It knows little and invents facts; it must not inform a decision.
- **Licence:** Apache-2.0, like the rest of this repository; its training text is in the public domain.
- **SHA-256** of model.safetensors: `{sha}`

## Held-out text

*Masked*: rows of {block} tokens, exactly 15% of the ordinary tokens hidden, all by the mask, row i by seed i; how often the right token comes first, or among the first five, and the perplexity of these
tokens given the rest. *Unigram*: the same guesses by frequency in the training text alone. *Pseudo-perplexity* ([Salazar et al. 2020](https://arxiv.org/abs/1910.14659)): {sample} rows of
{short} tokens a split, drawn by seed 0, each token hidden once, alone. It is no perplexity and not comparable with one: every token is guessed from both sides, and the product of these
probabilities is not the probability of a text.

| seed | text | first | first five | unigram, first | unigram, first five | masked perplexity | unigram perplexity | tokens | pseudo-perplexity | tokens |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}

The seed bundled here is {seed}. `training.json` has every run's loss curve and figures.
"""

if __name__ == '__main__': command_line(__doc__, HOME, STEPS, make_tokenizer, train, evaluate, publish)
