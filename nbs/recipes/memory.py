"""What each kind of model remembers, and what it costs: the rows behind the table and the plots of chapter 04d.

    python nbs/recipes/memory.py            every row that is not yet in lmnotes/assets/runs/memory.json; may be interrupted at any time
    python nbs/recipes/memory.py TASK ...   only tune, agreement, copy, kjv or cost

The tasks and the training are the chapter's own cells, those that begin with the comment `# shared with nbs/recipes/memory.py`.
Everything runs on the CPU with one thread.
"""
import datetime, itertools, json, os, platform, re, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import nbformat, numpy as np, torch
from torch import nn
from lmnotes.batches import collate, pack
from lmnotes.cache import KVCache
from lmnotes.core import assets, atomic_write
from lmnotes.data import load_corpus, train_tokenizer
from lmnotes.lm import evaluating, token_logps
from lmnotes.models import llama
from lmnotes.ngram import NGramLM
from lmnotes.recurrent import NNLM, RNNLM, RecurrentState
from lmnotes.training import Learner

ROOT, PATH = Path(__file__).resolve().parents[2], assets('runs', 'memory.json')
MARK = '# shared with nbs/recipes/memory.py'
SEEDS, LENGTHS = (0, 1, 2), (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32)
TRIED = dict(copy=(.005, .02, .05), kjv=(.02, .04, .08))     # learning rates
STEPS = dict(copy=1500, agreement=300)

def shared(notebook=ROOT/'nbs'/'04d_recurrent.ipynb'):
    "The names that the chapter's shared cells define"
    cells = [c.source for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == 'code' and c.source.startswith(MARK)]
    space = dict(np=np, torch=torch, nn=nn, re=re, time=time, chain=itertools.chain, SimpleNamespace=SimpleNamespace, collate=collate, pack=pack,
        KVCache=KVCache, load_corpus=load_corpus, train_tokenizer=train_tokenizer, evaluating=evaluating, token_logps=token_logps, llama=llama,
        NGramLM=NGramLM, NNLM=NNLM, RNNLM=RNNLM, RecurrentState=RecurrentState, Learner=Learner)
    for source in cells: exec(source, space)
    return SimpleNamespace(**{k: v for k, v in space.items() if not k.startswith('__')})

class Rows:
    "The stored rows. A row is written as soon as it is made"
    def __init__(self, path=PATH):
        self.path, self.rows = path, json.loads(path.read_text()) if path.exists() else []
        self.commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    def find(self, **key): return [r for r in self.rows if all(r.get(k) == v for k, v in key.items())]
    def make(self, f, **key):
        if self.find(**key): return
        start = time.perf_counter()
        row = key | f()
        row |= dict(total_seconds=round(time.perf_counter() - start, 1), commit=self.commit, date=str(datetime.date.today()),
                    device=f'cpu, {platform.machine()}, 1 thread', torch=torch.__version__)
        self.rows.append(row)
        self.path.parent.mkdir(exist_ok=True)
        with atomic_write(self.path, 'w') as f: f.write('[\n' + ',\n'.join(json.dumps(r) for r in self.rows) + '\n]\n')
        print(json.dumps(row)[:300], flush=True)

def trained(s, model, learn, **more):
    "What is stored of every trained model"
    if learn is None: return more
    return dict(params=s.count(model), lr=learn.lr, steps=learn.step, tokens=learn.tokens, seconds=round(learn.seconds, 1)) | more

def main(tasks):
    torch.set_num_threads(1)
    s, rows, data = shared(), Rows(), None
    def wanted(task): return not tasks or task in tasks
    if wanted('tune') or wanted('kjv') or wanted('cost'): data = s.bible()
    pairs = s.found_pairs(data) if data else None

    def tune(task, kind, lr):
        "Mean loss of the last quarter of a short run; each row is seen once, so that nothing is learned by heart"
        learn = (s.learn_copying(kind, 300, lr) if task == 'copy' else s.learn_bible(kind, data, 100, lr))[1]
        last = [h['loss'] for h in learn.history[-len(learn.history) // 4:]]
        return dict(loss=round(float(np.mean(last)), 4), steps=learn.step, params=s.count(learn.model))

    def best(task, kind):
        if kind == 'n-gram': return None
        tried = rows.find(task='tune', of=task, model=kind)
        assert len(tried) == len(TRIED[task]), f'python nbs/recipes/memory.py tune comes first ({task}, {kind})'
        return min(tried, key=lambda r: r['loss'])['lr']

    def agreement(kind, seed):
        model, learn = s.learn_agreement(kind, STEPS['agreement'], .02, seed)
        right = {name: [round(s.agreement(model, k, opposite), 4) for k in range(9)] for name, opposite in (('opposite', True), ('same', False))}
        return trained(s, model, learn, **right)

    def copy(kind, seed):
        model, learn = s.learn_copying(kind, STEPS['copy'], best('copy', kind), seed)
        n = 50 if kind == 'n-gram' else 200
        return trained(s, model, learn, lengths=LENGTHS, recall=[round(s.recall(model, k, n), 4) for k in LENGTHS])

    def kjv(kind, seed, passes=1):
        model, learn = s.learn_bible(kind, data, passes * (len(data.rows) // 8), best('kjv', kind), seed)
        start = time.perf_counter()
        docs = s.surprisals(model, data, data.test)
        total, n = sum(d.sum() for d in docs), sum(map(len, docs))
        edges = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
        places = [float(np.concatenate([d[a:b] for d in docs if len(d) > a]).mean()) for a, b in zip(edges, edges[1:])]
        return trained(s, model, learn, perplexity=round(float(np.exp(total / n)), 3), bits_per_byte=round(float(total / np.log(2) / data.test_bytes), 4),
            tokens_tested=n, seconds_testing=round(time.perf_counter() - start, 1), edges=edges, nats_by_place=[round(p, 4) for p in places],
            pairs=[int(x) for x in s.judge_pairs(model, pairs)])

    def cost(kind, length):
        model, _ = s.learn_bible(kind, data, 1, .001)
        ids = torch.tensor([data.end, *itertools.chain(*data.train)][:length])
        step, kept = s.cost_of_next(model, ids)
        row = dict(params=s.count(model) if kind != 'n-gram' else None, seconds_next=step, bytes_kept=kept)
        if kind == 'n-gram': return row | dict(entries=sum(len(t.keys) for t in model._fitted[1]))
        step, kept = s.cost_of_training(model, ids)
        return row | dict(seconds_train=step, bytes_train=round(kept))

    neural = s.KINDS[1:]
    if wanted('tune'):
        for task, kind in itertools.product(('copy', 'kjv'), neural):
            for lr in TRIED[task]: rows.make(lambda: tune(task, kind, lr), task='tune', of=task, model=kind, lr=lr, seed=0)
    def each(name, f, seed):
        for kind in s.KINDS if wanted(name) else ():
            if seed and kind == 'n-gram' and name == 'kjv': continue          # nothing in it is random
            rows.make(lambda: f(kind, seed), task=name, model=kind, seed=seed, **dict(passes=1) if name == 'kjv' else {})
    for seed in SEEDS: each('agreement', agreement, seed)
    each('copy', copy, 0)
    each('kjv', kjv, 0)
    for kind, length in itertools.product(s.KINDS, (64, 256, 1024, 4096) if wanted('cost') else ()):
        rows.make(lambda: cost(kind, length), task='cost', model=kind, length=length, seed=0)
    def longer(kind):
        if wanted('kjv'): rows.make(lambda: kjv(kind, 0, 4), task='kjv', model=kind, seed=0, passes=4)
    longer('LSTM')
    for seed in SEEDS[1:]: each('copy', copy, seed)
    for kind in ('NNLM', 'Transformer'): longer(kind)
    for seed in SEEDS[1:]: each('kjv', kjv, seed)

if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    main(sys.argv[1:])
