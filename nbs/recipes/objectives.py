"""What a model learns from each objective at the same small budget: the rows behind the table and the figure of chapter 5.

    python nbs/recipes/objectives.py                    nine objectives, three seeds; goes on where it stopped; stores lmnotes/assets/runs/objectives.json
    python nbs/recipes/objectives.py --steps 20 --seeds 1 --only clm mlm --out /tmp/objectives.json        a quick look
    python nbs/recipes/objectives.py --size gpu         larger models on more text, for a GPU; rows of their own in objectives_gpu.json

Every run reads the same rows of factbook and kjv in the same order, as often, with a model of about the same number of parameters (ELECTRA's generator comes on top of its
discriminator, and is said so). Then all answer the same questions on held-out text:

- bits per byte, where the model gives a probability of a whole text; for masked models a pseudo-likelihood, each token given all others, which is something else;
- cloze: one hidden token, everything else seen, as far as the model can see it;
- infilling: a hole of five tokens, filled greedily from the left;
- probe: the section of the factbook that a field is from, by logistic regression on the mean of the last hidden states.
"""
import argparse, datetime, json, math, multiprocessing, platform, subprocess, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tiny import CORPORA, token_lists
from lmnotes.batches import collate
from lmnotes.core import assets, atomic_write, cpus, seed_everything
from lmnotes.data import load_corpus, load_tokenizer
from lmnotes.lm import evaluating
from lmnotes.models import Transformer, TransformerConfig
from lmnotes.objectives import (Electra, TwoStream, as_collate, clm, denoise, electra_loss, factorize, mass, mlm, permutation_lm, prefix_lm, span_corruption, unilm)
from lmnotes.scoring import token_loss
from lmnotes.training import Learner

TOKENS = 4096                                               # of gpt-tiny's tokenizer; id 0 ends a text
MASK, PAD, SENTINELS = TOKENS, TOKENS + 1, list(range(TOKENS + 2, TOKENS + 34))
V, LENGTH, HOLE = TOKENS + 34, 128, 5
LR = {'one stack': .02, 'encoder-decoder': .006}             # at .02 an encoder-decoder's loss stands still
SIZES = dict(cpu=dict(d_model=128, n_heads=4, n_layers=4, d_ff=384, rows=32, steps=500), gpu=dict(d_model=512, n_heads=8, n_layers=8, d_ff=1536, rows=256, steps=4000))
KNOWN = torch.arange(TOKENS)                                # random replacements are ordinary tokens

def transformer(size, kind, **fields):
    "A model of the budget. An encoder-decoder has half of the layers on each side, and thinner feed-forward layers, which pay for reading the encoder."
    s = dict(size)
    for k in ('rows', 'steps'): s.pop(k)
    if kind == 'encoder-decoder': s |= dict(n_layers=s['n_layers'] // 2, n_decoder_layers=s['n_layers'] // 2, d_ff=s['d_ff'] * 3 // 4, start_id=PAD, pad_id=PAD, eos_id=0)
    return TransformerConfig(V, kind=kind, max_len=4 * LENGTH, **s | fields)

def electra(size):
    "A discriminator of the budget, and a generator with a quarter of its layers."
    small = dict(size, n_layers=max(1, size['n_layers'] // 4))
    return Electra(Transformer(transformer(small, 'encoder')), Transformer(transformer(size, 'encoder', head='tagging', n_labels=2)))

hidden = dict(mask_id=MASK, vocab_size=V)
OBJECTIVES = dict(
    clm=(lambda s: Transformer(transformer(s, 'decoder')), as_collate(clm)),
    prefix_lm=(lambda s: Transformer(transformer(s, 'encoder')), as_collate(prefix_lm)),
    mlm=(lambda s: Transformer(transformer(s, 'encoder')), as_collate(mlm, **hidden, random_ids=KNOWN)),
    unilm=(lambda s: Transformer(transformer(s, 'encoder', n_segments=6)), as_collate(unilm, **hidden)),
    permutation_lm=(lambda s: TwoStream(transformer(s, 'encoder')), as_collate(permutation_lm)),
    replaced_token_detection=(electra, as_collate(mlm, **hidden, replace=(1., 0., 0.))),
    span_corruption=(lambda s: Transformer(transformer(s, 'encoder-decoder')), as_collate(span_corruption, sentinel_ids=SENTINELS, eos_id=0, pad_id=PAD)),
    denoise=(lambda s: Transformer(transformer(s, 'encoder-decoder')), as_collate(denoise, **hidden, random_ids=KNOWN, pad_id=PAD)),
    mass=(lambda s: Transformer(transformer(s, 'encoder-decoder')), as_collate(mass, **hidden, random_ids=KNOWN)))

# ---------------------------------------------------------------- one question for all: what stands at place `at`, where places start to last are hidden and those before `at` are known
def masked(ids, first, last):
    x = ids.clone()
    x[:, first:last + 1] = MASK
    return x

def logits_at(out, row, at): return F.linear(out.hidden[row, at], out.weight, out.bias)       # these places' alone: all of them would take most of the time

def ask_clm(model, ids, start, at, last): return logits_at(model(input_ids=ids[:, :at]), slice(None), -1)

def ask_prefix(model, ids, start, at, last):
    "All before the hole is the prefix; its last place, or the last place filled, says what comes next."
    B = len(ids)
    batch = prefix_lm(ids[:, :at + 1], prefix_lengths=torch.full((B,), start, device=ids.device))
    return logits_at(model(input_ids=batch['input_ids'][:, :at], attention_mask=batch['attention_mask'][..., :at, :at]), slice(None), -1)

def ask_masked(model, ids, start, at, last, **more): return logits_at(model(input_ids=masked(ids, at, last), **more), slice(None), at)

def ask_unilm(model, ids, start, at, last): return ask_masked(model, ids, start, at, last, token_type_ids=torch.zeros_like(ids))

def ask_electra(model, ids, start, at, last): return ask_masked(model.generator, ids, start, at, last)

def ask_permutation(model, ids, start, at, last):
    "The hidden places come last in the order, from left to right."
    rank = torch.zeros_like(ids)
    rank[:, at:last + 1] = torch.arange(1, last - at + 2, device=ids.device)
    batch = factorize(ids, rank)
    return logits_at(model(**{k: v for k, v in batch.items() if k != 'labels'}), slice(None), 0)

def seq2seq(model, encoder, written):
    start = torch.full((len(encoder), 1), PAD, device=encoder.device)
    return logits_at(model(input_ids=encoder, decoder_input_ids=torch.cat([start, written], 1)), slice(None), -1)

def ask_spans(model, ids, start, at, last):
    sentinel = torch.full_like(ids[:, :1], SENTINELS[0])
    end = torch.zeros_like(sentinel)
    return seq2seq(model, torch.cat([ids[:, :start], sentinel, ids[:, last + 1:], end], 1), torch.cat([sentinel, ids[:, start:at]], 1))

def ask_denoise(model, ids, start, at, last): return seq2seq(model, torch.cat([ids[:, :start], torch.full_like(ids[:, :1], MASK), ids[:, last + 1:]], 1), ids[:, :at])

def ask_mass(model, ids, start, at, last):
    earlier, inside = torch.full_like(ids, MASK), torch.zeros_like(ids, dtype=torch.bool)
    earlier[:, start + 1:at + 1], inside[:, start:at + 1] = ids[:, start:at], True
    return logits_at(model(input_ids=masked(ids, start, last), decoder_input_ids=earlier, decoder_attention_mask=inside), slice(None), at)

ASK = dict(clm=ask_clm, prefix_lm=ask_prefix, mlm=ask_masked, unilm=ask_unilm, permutation_lm=ask_permutation, replaced_token_detection=ask_electra, span_corruption=ask_spans,
           denoise=ask_denoise, mass=ask_mass)

def holes(rows): return [(some, (2 * i + 1) * (LENGTH - 40) // 16 + 16) for i, some in enumerate(rows.chunk(8))]         # each eighth of the rows has its hole elsewhere

def cloze(ask, model, rows):
    "Share of hidden tokens that are the model's first choice, and their mean -ln p."
    right = nats = 0
    for ids, at in holes(rows):
        logp = ask(model, ids, at, at, at)[:, :TOKENS].float().log_softmax(-1)
        right, nats = right + (logp[:, 1:].argmax(-1) + 1 == ids[:, at]).sum().item(), nats - logp.gather(1, ids[:, at, None]).sum().item()
    return right / len(rows), nats / len(rows)

def infill(ask, model, rows):
    "Share of the tokens of a hole that come back."
    right = 0
    for ids, start in holes(rows):
        x, last = ids.clone(), start + HOLE - 1
        for at in range(start, last + 1): x[:, at] = ask(model, x, start, at, last)[:, 1:TOKENS].argmax(-1) + 1
        right += (x[:, start:last + 1] == ids[:, start:last + 1]).sum().item()
    return right / (HOLE * len(rows))

# ---------------------------------------------------------------- the probability of whole rows, where there is one
def chain(name, model, rows):
    "Sum of -ln p of all tokens but each row's first, given what the model may see; None where the objective gives none."
    total = 0.
    for ids in rows.split(8):
        if name == 'clm': out, asked = model(input_ids=ids), ids[:, 1:]
        elif name == 'prefix_lm':
            batch = prefix_lm(ids, prefix_lengths=torch.ones(len(ids), dtype=torch.long, device=ids.device))
            out, asked = model(**{k: batch[k] for k in ('input_ids', 'attention_mask', 'position_ids')}), ids[:, 1:]
        elif name == 'permutation_lm':
            batch = factorize(ids, torch.arange(LENGTH, device=ids.device).expand_as(ids))
            out, asked = model(**{k: v for k, v in batch.items() if k != 'labels'}), batch['labels'][:, :LENGTH - 1]
        elif name in ('mlm', 'replaced_token_detection', 'unilm'):
            total += one_at_a_time(name, model, ids)
            continue
        else: return None
        logp = F.linear(out.hidden[:, :LENGTH - 1], out.weight, out.bias)[..., :TOKENS].float().log_softmax(-1)
        total -= logp.gather(-1, asked[..., None]).sum().item()
    return total

def one_at_a_time(name, model, ids):
    "Hide each token in turn. UniLM reads from the left, which is a likelihood; the others read both sides, a pseudo-likelihood."
    at, total = torch.arange(1, LENGTH, device=ids.device), 0.
    left = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=ids.device).tril()[None, None]
    more = lambda x: dict(attention_mask=left.expand(len(x), 1, -1, -1), token_type_ids=torch.full_like(x, 2)) if name == 'unilm' else {}
    for row in ids:
        x = row.repeat(LENGTH - 1, 1)
        x[at - 1, at] = MASK
        out = (model.generator if name == 'replaced_token_detection' else model)(input_ids=x, **more(x))
        logp = logits_at(out, at - 1, at)[:, :TOKENS].float().log_softmax(-1)
        total -= logp.gather(1, row[at, None]).sum().item()
    return total

# ---------------------------------------------------------------- what the hidden states know
def features(model, texts):
    "Mean of the last hidden states over a text's tokens: the decoder's of a causal model, the encoder's of all others."
    model = getattr(model, 'discriminator', model)
    stack = model.decoder if model.config.kind == 'decoder' else model.encoder
    device, order = next(model.parameters()).device, sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = torch.empty(len(texts), model.config.d_model)
    for some in torch.tensor(order).split(64):
        batch = {k: v.to(device) for k, v in collate([texts[i] for i in some.tolist()], pad_id=0).items()}
        segments = torch.zeros_like(batch['input_ids']) if model.config.n_segments else None
        x, real = stack(model.embed(batch['input_ids']), batch['attention_mask'], None, segments), batch['attention_mask'][..., None]
        out[some] = (x.masked_fill(~real, 0).sum(1) / real.sum(1)).float().cpu()
    return out.numpy()

def topics(tokenizer, split, most):
    "Texts of the factbook and the section each is from."
    rows = [r for r in load_corpus('factbook', split).to_list() if len(r['text']) > 60]
    rows = [rows[i] for i in torch.linspace(0, len(rows) - 1, min(most, len(rows))).long().tolist()]
    return [ids[:LENGTH] for ids in tokenizer([r['text'] for r in rows], add_special_tokens=False, verbose=False)['input_ids']], [r['section'] for r in rows]

def probe(model, data):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    (train, y), (test, z) = data
    scale = StandardScaler().fit(a := features(model, train))
    return float(LogisticRegression(C=.1, max_iter=300).fit(scale.transform(a), y).score(scale.transform(features(model, test)), z))

# ---------------------------------------------------------------- a run
def held_out(tokenizer, n):
    "Rows of LENGTH tokens from the validation documents of both corpora, and their bytes but for each row's first token."
    docs = [d for c in CORPORA for d in token_lists(tokenizer, c, 'validation')]
    rows = torch.tensor([d[i:i + LENGTH] for d in docs for i in range(0, len(d) - LENGTH + 1, LENGTH)])
    rows = rows[torch.linspace(0, len(rows) - 1, n).long()]
    return rows, [len(tokenizer.decode(r[1:].tolist()).encode()) for r in rows]

def train_rows(tokenizer, seed):
    "Whole rows of LENGTH tokens of the training documents, joined in a random order."
    docs = [d for c in CORPORA for d in token_lists(tokenizer, c, 'train')]
    order = torch.randperm(len(docs), generator=torch.Generator().manual_seed(seed)).tolist()
    flat = torch.tensor([t for i in order for t in docs[i][:-1]])
    return flat[:len(flat) // LENGTH * LENGTH].view(-1, LENGTH)

def flops_of(model, collate_fn, rows, loss, device):
    "Floating-point operations of a step, forward and backward, counted."
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in collate_fn(list(rows)).items()}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH): loss(model, batch)[0].backward()      # of fused attention nothing is counted on a CPU
    model.zero_grad()
    return counter.get_total_flops()

def run(name, seed, size, data):
    began = time.perf_counter()
    make, collate_fn = OBJECTIVES[name]
    loss = electra_loss if name == 'replaced_token_detection' else token_loss
    seed_everything(seed)
    model = make(size)
    learn = Learner(model, data['train'](seed), collate_fn=collate_fn, batch_size=size['rows'], loss=loss, lr=(lr := LR['encoder-decoder' if name in ('span_corruption', 'denoise', 'mass') else 'one stack']), seed=seed)
    learn.fit(steps=size['steps'])
    if learn.step < size['steps']: raise KeyboardInterrupt    # no row of half a run
    flops = flops_of(model, collate_fn, data['train'](seed)[:size['rows']], loss, learn.device)
    rows, sizes = data['held_out']
    rows, ask, some = rows.to(learn.device), ASK[name], torch.linspace(0, len(rows) - 1, 48).long().tolist()          # of both corpora
    with evaluating(model):
        nats = chain(name, model, rows[some])
        (right, surprise), filled, known = cloze(ask, model, rows), infill(ask, model, rows), probe(model, data['topics'])
    bits = None if nats is None else round(nats / math.log(2) / sum(sizes[i] for i in some), 4)
    d = learn.device
    device = torch.cuda.get_device_name(d) if d.type == 'cuda' else f'{d.type}, {(n := torch.get_num_threads())} thread{"s"[:n - 1]}, {platform.machine()}'
    return dict(objective=name, seed=seed, lr=lr, bits_per_byte=bits, pseudo=name in ('mlm', 'replaced_token_detection'), cloze=round(right, 4), cloze_nats=round(surprise, 4), infilling=round(filled, 4), probe=round(known, 4),
                parameters=sum(p.numel() for p in model.parameters()), tokens_read=size['steps'] * size['rows'] * LENGTH, tokens_scored=learn.tokens, flops=flops * size['steps'],
                loss=round(sum(h['loss'] for h in learn.history[-50:]) / len(learn.history[-50:]), 4), train_seconds=round(learn.seconds, 1), seconds=round(time.perf_counter() - began, 1),
                precision=learn.precision, device=device, torch=torch.__version__, date=str(datetime.date.today()))

def prepare(n_rows=512, n_texts=1500):
    "What all runs share."
    tokenizer = load_tokenizer('gpt-tiny')
    return dict(train=partial(train_rows, tokenizer), held_out=held_out(tokenizer, n_rows), topics=(topics(tokenizer, 'train', n_texts), topics(tokenizer, 'validation', 600)))

def baselines(size, data):
    "What can be had without learning: guesses by frequency in the training text, and the probe on models as they are drawn."
    counts = data['train'](0).flatten().bincount(minlength=TOKENS).double()
    counts[0] = 0                                           # the end of a text is never an answer
    common, logp = counts.argmax(), (counts + 1).div((counts + 1).sum()).log()
    rows, sizes = data['held_out']
    cloze_at = torch.cat([ids[:, at] for ids, at in holes(rows)])
    hole_at = torch.cat([ids[:, at:at + HOLE] for ids, at in holes(rows)])
    (_, y), (_, z) = data['topics']
    drawn = {}
    for kind in ('decoder', 'encoder', 'encoder-decoder'):
        seed_everything(0)
        with evaluating(model := Transformer(transformer(size, kind))): drawn[kind] = round(probe(model, data['topics']), 4)
    share = lambda hit: round(hit.double().mean().item(), 4)
    return dict(bits_per_byte=round(-logp[rows[:, 1:]].sum().item() / math.log(2) / sum(sizes), 4), cloze=share(cloze_at == common), cloze_nats=round(-logp[cloze_at].mean().item(), 4), infilling=share(hole_at == common),
                probe_majority=round(z.count(max(set(y), key=y.count)) / len(z), 4), probe_untrained=drawn, n_cloze=len(rows), n_infilling=HOLE * len(rows), n_probe=len(z))

def start(threads):
    "A worker reads the texts once."
    global data
    torch.set_num_threads(threads)
    data = prepare()

def work(name, seed, size): return run(name, seed, size, data)

def main(out, size, seeds, only, jobs):
    "The runs that are not there yet, one on each core (all cores on one run are slower: the model is small); on a GPU one after the other."
    settings = json.loads(json.dumps(dict(corpora=CORPORA, length=LENGTH, hole=HOLE, lr=LR, optimizer='muon', vocabulary=V, size=size)))
    stored = json.loads(out.read_text()) if out.exists() else dict(settings=settings, baselines=baselines(size, prepare()), runs=[])
    if stored['settings'] != settings: raise SystemExit(f'{out} holds runs of other settings: move it away first')
    done = {(r['objective'], r['seed']) for r in stored['runs']}
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context('spawn'), start, (max(1, cpus() // jobs),))
    try:
        todo = [pool.submit(work, name, seed, size) for seed in range(seeds) for name in only or OBJECTIVES if (name, seed) not in done]
        for future in as_completed(todo):
            stored['runs'].append(row := dict(future.result(), commit=commit))
            with atomic_write(out, 'w') as f: f.write(json.dumps(stored, indent=1) + '\n')
            print(row['objective'], row['seed'], {k: row[k] for k in ('bits_per_byte', 'cloze', 'infilling', 'probe', 'loss', 'parameters', 'train_seconds', 'seconds')}, flush=True)
    finally: pool.shutdown(cancel_futures=True)

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--size', choices=list(SIZES), default='cpu')
    ap.add_argument('--steps', type=int)
    ap.add_argument('--seeds', type=int, default=3)
    ap.add_argument('--only', nargs='+', choices=list(OBJECTIVES), metavar='OBJECTIVE', help=f'of {", ".join(OBJECTIVES)}')
    ap.add_argument('--out', type=Path)
    ap.add_argument('--jobs', type=int, default=1 if torch.cuda.is_available() else cpus(), help='runs at a time')
    a = ap.parse_args()
    size = dict(SIZES[a.size], **{'steps': a.steps} if a.steps else {})
    main(a.out or assets('runs')/('objectives.json' if a.size == 'cpu' else 'objectives_gpu.json'), size, a.seeds, a.only, a.jobs)
