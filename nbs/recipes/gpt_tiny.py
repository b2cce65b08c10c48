"""Make the bundled model `gpt-tiny`: a causal Transformer of 2.6 million parameters, pretrained on the World Factbook and the
King James Bible, never on Shakespeare.

    python nbs/recipes/gpt_tiny.py train --seed 0          resumable: the same command goes on after an interruption
    python nbs/recipes/gpt_tiny.py evaluate --seed 0       bits per byte on held-out text, beside a modified Kneser-Ney 5-gram
    python nbs/recipes/gpt_tiny.py publish --seed 0        weights (float16), configuration and card into lmnotes/assets/models/gpt-tiny

The tokenizer is trained first, if it is not there, by `python nbs/recipes/gpt_tiny.py tokenizer`.
"""
import argparse, itertools, json, math, os, platform, time
from functools import lru_cache
from pathlib import Path
import numpy as np
import torch
from lmnotes.core import assets, best_dtype, best_device, seed_everything
from lmnotes.data import load_corpus, load_tokenizer, train_tokenizer
from lmnotes.hub import load_model
from lmnotes.lm import perplexity
from lmnotes.models import llama
from lmnotes.ngram import NGramLM
from lmnotes.training import Learner, Progress

CORPORA, HOME = ('factbook', 'kjv'), assets('models')/'gpt-tiny'
VOCAB, BLOCK, ROWS, STEPS, LR = 4096, 512, 8, 2200, .03
SHAPE = dict(d_model=192, n_layers=4, n_heads=3, d_ff=512, max_len=BLOCK)

def documents(name, split):
    "The corpus as documents: a country with its sections, a chapter with its title."
    rows = load_corpus(name, split).to_list()
    if name == 'kjv': return [f"{r['book']} {r['chapter']}\n\n{r['text']}\n" for r in rows]
    out = []
    for country, fields in itertools.groupby(rows, lambda r: r['country']):
        parts = [f'{country}\n']
        for section, entries in itertools.groupby(fields, lambda r: r['section']):
            parts += [f'\n{section}\n\n', *(f"{r['field']}: {r['text']}\n" for r in entries)]
        out.append(''.join(parts))
    return out

def make_tokenizer():
    "Byte-level BPE on the training documents of both corpora."
    HOME.mkdir(parents=True, exist_ok=True)
    train_tokenizer((d for c in CORPORA for d in documents(c, 'train')), vocab_size=VOCAB).backend_tokenizer.save(str(HOME/'tokenizer.json'))
    (HOME/'tokenizer_config.json').write_text(json.dumps(dict(tokenizer_class='PreTrainedTokenizerFast', bos_token='<|endoftext|>', eos_token='<|endoftext|>',
        clean_up_tokenization_spaces=False, model_max_length=BLOCK), indent=1) + '\n', encoding='utf-8')

def token_lists(tokenizer, name, split):
    "Each document's ids, opened and closed by the end-of-text token."
    end = tokenizer.eos_token_id
    return [[end, *ids, end] for ids in tokenizer(documents(name, split), add_special_tokens=False, verbose=False)['input_ids']]

def rows(tokenizer, seed):
    "Training documents in a random order, one end-of-text token between them, cut into rows of BLOCK tokens."
    docs = [d for c in CORPORA for d in token_lists(tokenizer, c, 'train')]
    order = np.random.default_rng(seed).permutation(len(docs))
    flat = torch.tensor([t for i in order for t in docs[i][:-1]])
    return flat[:len(flat) // BLOCK * BLOCK].view(-1, BLOCK)

def batch(block):
    "Three batches of four train on half rows: more and shorter texts a step learn faster, some long ones teach the full length."
    ids = torch.stack(block)
    if int(ids.sum()) % 4: ids = ids.view(-1, BLOCK // 2)
    return dict(input_ids=ids, labels=ids)

def train(seed, out, steps):
    tokenizer = load_tokenizer('gpt-tiny')
    seed_everything(seed)
    end = tokenizer.eos_token_id
    model = llama(VOCAB, bos_id=end, eos_id=end, **SHAPE)
    learn = Learner(model, rows(tokenizer, seed), collate_fn=batch, batch_size=ROWS, lr=LR, seed=seed, out_dir=out, save_every=200, cbs=[Progress()])
    learn.fit(steps=steps, resume=True)
    if not (out/'model').exists(): learn.save(out/'model')
    log = dict(seed=seed, steps=steps, tokens=learn.tokens, seconds=round(learn.seconds), tokens_per_second=round(learn.tokens / learn.seconds), device=device_name(), precision=str(learn.dtype),
               loss={str(h['step']): round(float(np.mean([k['loss'] for k in learn.history[max(0, h['step'] - 100):h['step']]])), 4) for h in learn.history if h['step'] % 100 == 0})
    (out/'train.json').write_text(json.dumps(log, indent=1) + '\n')

def device_name():
    d = best_device()
    return torch.cuda.get_device_name(d) if d.type == 'cuda' else f'{d.type}, {torch.get_num_threads()} threads, {platform.machine()}'

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

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', choices=['tokenizer', 'train', 'evaluate', 'publish'])
    ap.add_argument('--seed', type=int, default=0)
    ap.add_argument('--steps', type=int, default=STEPS)
    ap.add_argument('--out', type=Path, default=Path('out/gpt-tiny'))
    ap.add_argument('--threads', type=int)
    a = ap.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    run = a.out/f'seed-{a.seed}'
    if a.what == 'tokenizer' or not (HOME/'tokenizer.json').exists(): make_tokenizer()
    if a.what == 'train': train(a.seed, run, a.steps)
    if a.what == 'evaluate': evaluate(a.seed, run)
