"""What the recipes of the bundled models share: their text, a run, what is published, and the command line."""
import argparse, hashlib, itertools, json, platform, shutil, tempfile
from pathlib import Path
import numpy as np
import torch
from lmnotes.core import best_device, seed_everything
from lmnotes.data import load_corpus, load_tokenizer
from lmnotes.hub import load_model
from lmnotes.training import Learner, Progress

CORPORA, VOCAB, BLOCK, ROWS = ('factbook', 'kjv'), 4096, 512, 8

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

def halved(block):
    "Three batches of four train on half rows: more and shorter texts a step learn faster, some long ones teach the full length."
    ids = torch.stack(block)
    return ids.view(-1, ids.shape[1] // 2) if int(ids.sum()) % 4 else ids

def write_config(home, **more):
    (home/'tokenizer_config.json').write_text(json.dumps(dict(tokenizer_class='PreTrainedTokenizerFast', eos_token='<|endoftext|>', **more,
        clean_up_tokenization_spaces=False, model_max_length=BLOCK), indent=1) + '\n', encoding='utf-8')

def device_name():
    d = best_device()
    return torch.cuda.get_device_name(d) if d.type == 'cuda' else f'{d.type}, {(n := torch.get_num_threads())} thread{"s"[:n - 1]}, {platform.machine()}'

def train(make, batch, seed, out, steps, width=BLOCK, **settings):
    "A run of one seed, resumed if it was interrupted; its model and its log."
    seed_everything(seed)
    flat = rows(load_tokenizer('gpt-tiny'), seed).flatten()
    model = make()
    learn = Learner(model, flat[:len(flat) // width * width].view(-1, width), collate_fn=batch, batch_size=ROWS, seed=seed, out_dir=out, save_every=200, keep=2, cbs=[Progress()], **settings)
    learn.fit(steps=steps, resume=True)
    if learn.step < steps: return                           # interrupted: the same command goes on
    shutil.rmtree(out/'model', ignore_errors=True)          # of a shorter run
    learn.save(out/'model')
    log = dict(seed=seed, steps=steps, tokens=learn.tokens, seconds=round(learn.seconds), tokens_per_second=round(learn.tokens / learn.seconds), device=device_name(), precision=str(learn.precision),
               loss={str(h['step']): round(float(np.mean([k['loss'] for k in learn.history[max(0, h['step'] - 100):h['step']]])), 4) for h in learn.history if h['step'] % 100 == 0})
    (out/'train.json').write_text(json.dumps(log, indent=1) + '\n')

def publish(home, seed, out, card, line, every=200, **fields):
    "Copy one seed's model into the package as float16, with a card that shows every seed that was evaluated, one table line a text."
    runs = {int(p.parent.name.split('-')[1]): dict(json.loads((p.parent/'train.json').read_text()), evaluation=json.loads(p.read_text())) for p in sorted(out.glob('seed-*/evaluation.json'))}
    model = load_model(out/f'seed-{seed}'/'model')
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(Path(tmp)/'m', dtype=torch.float16)
        for f in (Path(tmp)/'m').iterdir(): shutil.copy(f, home/f.name)
    (home/'training.json').write_text(json.dumps(list(runs.values()), indent=1) + '\n', encoding='utf-8')
    one, n, weights = runs[seed], sum(p.numel() for p in model.parameters()), home/'model.safetensors'
    assert weights.stat().st_size <= 5_300_000, weights.stat().st_size
    table = '\n'.join(line.format(seed=s, text=key.replace('/', ', '), **r) for s, run in runs.items() for key, r in run['evaluation'].items())
    curve = ', '.join(f'{v:.2f}' for k, v in one['loss'].items() if int(k) % every == 0)
    (home/'README.md').write_text(card.format(parameters=n, bytes=weights.stat().st_size, sha=hashlib.sha256(weights.read_bytes()).hexdigest(), table=table, curve=curve, rows=ROWS, block=BLOCK, vocab=VOCAB,
        **fields, **{k: one[k] for k in ('seed', 'steps', 'tokens', 'seconds', 'device', 'precision')}), encoding='utf-8')
    print(table)

def command_line(doc, home, steps, make_tokenizer, train, evaluate, publish):
    ap = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', choices=['tokenizer', 'train', 'evaluate', 'publish'])
    ap.add_argument('--seed', type=int, default=0)
    ap.add_argument('--steps', type=int, default=steps)
    ap.add_argument('--out', type=Path, default=Path('out')/home.name)
    ap.add_argument('--threads', type=int)
    a = ap.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    run = a.out/f'seed-{a.seed}'
    if a.what == 'tokenizer' or not (home/'tokenizer.json').exists(): make_tokenizer()
    if a.what == 'train': train(a.seed, run, a.steps)
    if a.what == 'evaluate': evaluate(a.seed, run)
    if a.what == 'publish': publish(a.seed, a.out)
