"""Make the bundled model `gpt-tiny`: a causal Transformer of 2.6 million parameters, pretrained on the World Factbook and the
King James Bible, never on Shakespeare.

    python nbs/recipes/gpt_tiny.py train --seed 0          resumable: the same command goes on after an interruption
    python nbs/recipes/gpt_tiny.py evaluate --seed 0       bits per byte on held-out text, beside a modified Kneser-Ney 5-gram
    python nbs/recipes/gpt_tiny.py publish --seed 0        weights (float16), configuration and card into lmnotes/assets/models/gpt-tiny

The tokenizer is trained first, if it is not there, by `python nbs/recipes/gpt_tiny.py tokenizer`.
"""
import itertools, json, math
import numpy as np
import torch
import tiny
from tiny import BLOCK, CORPORA, VOCAB, command_line, documents, halved, token_lists, write_config
from lmnotes.core import assets
from lmnotes.data import load_tokenizer, train_tokenizer
from lmnotes.hub import load_model
from lmnotes.lm import perplexity
from lmnotes.models import llama
from lmnotes.ngram import NGramLM

HOME, STEPS, LR = assets('models')/'gpt-tiny', 2200, .03
SHAPE = dict(d_model=192, n_layers=4, n_heads=3, d_ff=512, max_len=BLOCK)

def make_tokenizer():
    "Byte-level BPE on the training documents of both corpora."
    HOME.mkdir(parents=True, exist_ok=True)
    train_tokenizer((d for c in CORPORA for d in documents(c, 'train')), vocab_size=VOCAB).backend_tokenizer.save(str(HOME/'tokenizer.json'))
    write_config(HOME, bos_token='<|endoftext|>')

def batch(block): return dict(input_ids=(ids := halved(block)), labels=ids)

def train(seed, out, steps):
    end = load_tokenizer('gpt-tiny').eos_token_id
    tiny.train(lambda: llama(VOCAB, bos_id=end, eos_id=end, **SHAPE), batch, seed, out, steps, lr=LR)

def evaluate(seed, out):
    tokenizer, model, result = load_tokenizer('gpt-tiny'), load_model(out/'model'), {}
    train_ids = [np.array(d) for c in CORPORA for d in token_lists(tokenizer, c, 'train')]
    ngram = NGramLM(5, smoothing='modified_kneser_ney', vocab_size=VOCAB).fit(train_ids)
    for name, split in itertools.product(CORPORA, ('validation', 'test')):
        texts, docs = documents(name, split), token_lists(tokenizer, name, split)
        size = sum(len(t.encode()) for t in texts)
        ours = perplexity(model, [torch.tensor(d) for d in docs], stride=BLOCK // 2)
        scored = sum(float(ngram.log_prob(np.array(d))[1:].sum()) for d in docs)     # the opening token is given to both
        result[f'{name}/{split}'] = dict(bytes=size, tokens=ours.n_tokens, perplexity=round(float(ours), 3), bits_per_byte=round(ours.bits_per_byte(size), 4),
                                         bits_per_byte_5gram=round(-scored / math.log(2) / size, 4))
    for r in result.values(): r['below_5gram'] = round(1 - r['bits_per_byte'] / r['bits_per_byte_5gram'], 4)
    (out/'evaluation.json').write_text(json.dumps(result, indent=1) + '\n')
    print(json.dumps(result, indent=1))

LINE = '| {seed} | {text} | {perplexity:.2f} | {bits_per_byte:.4f} | {bits_per_byte_5gram:.4f} | {below_5gram:.1%} |'

def publish(seed, out): tiny.publish(HOME, seed, out, CARD, LINE, lr=LR, half=BLOCK // 2, **SHAPE)

CARD = """# gpt-tiny

A causal language model for these notes, small enough to be bundled: {parameters:,} parameters, float16, {bytes:,} bytes. It has the Llama layout (rotary positions, RMS
normalization, gated feed-forward layers, no biases, tied embedding), so `transformers` reads this folder as a `LlamaForCausalLM`.

- **Shape:** {n_layers} layers, width {d_model}, {n_heads} heads, feed-forward {d_ff}, context {max_len}; byte-level BPE of {vocab} tokens, trained on the same text.
- **Data:** the training splits of `factbook` and `kjv` (see their cards). Never Shakespeare: neither model nor tokenizer has seen a line of it.
- **Recipe:** `nbs/recipes/gpt_tiny.py`; {steps} steps of {rows} rows of {block} tokens ({tokens:,} scored tokens; three batches of four are cut into rows of {half}), Muon
  at {lr} and AdamW at a fifth of it for embeddings and gains, linear warmup and linear decay over the second half, seed {seed}, {precision} products. Documents are joined by
  `<|endoftext|>`, and a row may hold the end of one and the start of the next. It took {seconds} s on: {device}, beside other work.
- **Mean training loss** over 100 steps (nats per token), every 200 steps: {curve}.
- **Use:** teaching. It knows little and invents facts; it must not inform a decision.
- **Licence:** Apache-2.0, like the rest of this repository; its training text is in the public domain.
- **SHA-256** of model.safetensors: `{sha}`

## Held-out text

Whole documents, each token scored once with at least {half} tokens of context where there are that many; beside it a modified Kneser-Ney 5-gram with the same tokenizer, fitted on the
same training documents, on the same tokens.

| seed | text | perplexity | bits per byte | 5-gram, bits per byte | lower by |
| --- | --- | --- | --- | --- | --- |
{table}

The seed bundled here is {seed}. `training.json` has every run's loss curve and figures.
"""

if __name__ == '__main__': command_line(__doc__, HOME, STEPS, make_tokenizer, train, evaluate, publish)
