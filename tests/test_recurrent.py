"NNLM and RNNLM behind the book's interfaces: any padding, packing and cutting of texts, training, checkpoints, decoding; the stored experiments."
import json, random, sys
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from torch import nn
from torch.testing import assert_close

from lmnotes.batches import collate, pack
from lmnotes.cache import KVCache
from lmnotes.core import LmnotesError, assets
from lmnotes.decoding import Sample, generate
from lmnotes.lm import is_causal, model_kind, nll, perplexity, token_logps
from lmnotes.recurrent import CELLS, NNLM, RNNLM, RecurrentState, unroll
from lmnotes.training import Learner

V = 23
ROOT = Path(__file__).resolve().parent.parent


def some(seed, **more):
    "A random small model in double precision."
    r = random.Random(seed)
    torch.manual_seed(seed)
    if seed % 4 == 0: model = NNLM(V, order=r.randint(2, 6), d_model=r.randint(1, 9), d_hidden=r.randint(1, 12), direct=r.random() < .5, **more)
    else:
        D, tie = r.randint(2, 9), r.random() < .6
        model = RNNLM(V, cell=list(CELLS)[seed % 4 - 1], d_model=D, d_hidden=r.choice([D, r.randint(1, 12)]), n_layers=r.randint(1, 3), tie=tie, **more)
    return model.double().eval(), r


@pytest.mark.parametrize('seed', range(24))
def test_any_layout_gives_what_single_texts_give(seed):
    "Texts scattered over rows with padding anywhere, cut into calls at random places."
    model, r = some(seed)
    B, T = r.randint(1, 4), r.randint(3, 24)
    ids, real = torch.randint(V, (B, T)), torch.rand(B, T) < .7
    start = real & (torch.rand(B, T) < .25)
    places, texts, where = torch.ones(B, T, dtype=torch.long), [], []
    for b in range(B):
        fresh = True
        for t in range(T):
            if not real[b, t]: places[b, t] = r.choice([0, 1, 7]); continue         # what stands there must not matter
            if fresh or start[b, t]:
                places[b, t], fresh = 0, False
                texts.append([]); where.append([])
            texts[-1].append(int(ids[b, t])); where[-1].append((b, t))
    cuts = sorted({0, T, *(r.randint(0, T) for _ in range(r.randint(0, 3)))})
    past, parts = None, []
    for a, b in zip(cuts, cuts[1:]):
        out = model(ids[:, a:b], attention_mask=real[:, :b], position_ids=places[:, a:b], past_key_values=past, use_cache=True)
        past, parts = out.past_key_values, [*parts, out.logits]
    logits = torch.cat(parts, 1)
    last = {}
    for text, at in zip(texts, where):
        one = model(torch.tensor([text]), use_cache=True)
        assert_close(logits[tuple(zip(*at))], one.logits[0])
        last[at[0][0]] = one.past_key_values
    for b, want in last.items():
        for x, y in zip(past.tensors, want.tensors): assert_close(x[b], y[0])
    assert past.get_seq_length() == T


@pytest.mark.parametrize('seed', range(8))
def test_gradients_do_not_depend_on_the_layout(seed):
    model, r = some(seed)
    texts = [torch.randint(V, (n,)).tolist() for n in (5, 2, 9, 4)]
    def gradients(batches):
        model.zero_grad()
        sums, counts = zip(*(nll(model, b) for b in batches))
        (sum(sums) / sum(counts)).backward()
        return [p.grad.clone() for p in model.parameters()]
    want = gradients([dict(input_ids=torch.tensor([t])) for t in texts])
    packed = collate(pack(texts, block_size=20, eos_id=None), pad_id=0)
    packed.pop('segment_ids')
    for batch in (collate(texts, pad_id=0), collate(texts, pad_id=0, side='left'), packed):
        for a, b in zip(gradients([batch]), want): assert_close(a, b)
        model.zero_grad()
        model(**batch).loss.backward()                                       # the model's own loss is the same one
        for p, b in zip(model.parameters(), want): assert_close(p.grad, b)


@pytest.mark.parametrize('seed', [s for s in range(16) if s % 4])
def test_own_cells_equal_torch(seed):
    model, _ = some(seed)
    ids = torch.randint(V, (2, 7))
    x = model.embed(ids) * (model.config.d_model**.5 if model.config.tie else 1)
    y, states = unroll(model.rnn, x)
    out = model(ids, use_cache=True)
    assert_close(model.head(y if model.down is None else model.down(y)), out.logits)
    for a, b in zip(states[-1], out.past_key_values.tensors): assert_close(a, b)


@pytest.mark.parametrize('seed', range(4))
def test_behaves_as_a_causal_model(seed):
    model, _ = some(seed)
    assert model_kind(model) == 'causal' and is_causal(model)
    ids = torch.randint(V, (40,))
    logp = model(ids[None]).logits[0].log_softmax(-1)
    assert_close(token_logps(model, ids)[1:], logp[:-1].gather(-1, ids[1:, None])[:, 0], check_dtype=False)
    loss = model(ids[None], labels=ids[None]).loss
    assert_close(perplexity(model, ids).nll / 39, loss.item())
    assert_close(loss, nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:]))
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == V
    before = ids.clone()
    model(ids[None]); assert torch.equal(ids, before)


@pytest.mark.parametrize('seed', range(8))
def test_generates_each_row_as_alone(seed):
    model, r = some(seed)
    model = model.float()
    texts = [torch.randint(V, (n,)).tolist() for n in (3, 1, 6)]
    batch = collate(texts, pad_id=0, side='left')
    many = generate(model, batch['input_ids'], attention_mask=batch['attention_mask'], max_new_tokens=7, eos_id=[1, 2, 3])
    for row, n, text in zip(many.sequences, many.lengths, texts):
        one = generate(model, torch.tensor([text]), max_new_tokens=7, eos_id=[1, 2, 3])
        assert one.lengths[0] == n and torch.equal(one.sequences[0, len(text):len(text) + n], row[6:6 + n])
    drawn = generate(model, batch['input_ids'], Sample(top_p=.9), attention_mask=batch['attention_mask'], max_new_tokens=3, generator=torch.Generator().manual_seed(0))
    assert drawn.sequences.shape[1] <= 9


def test_a_state_can_be_reordered_repeated_and_handed_on():
    for seed in range(4):
        model, _ = some(seed)
        ids = torch.randint(V, (3, 5))
        state = model(ids, use_cache=True).past_key_values
        tensors = [t.clone() for t in state.tensors]
        nxt = torch.randint(V, (3, 1))
        want = model(nxt, past_key_values=state, use_cache=True)
        assert want.past_key_values is not state and all(torch.equal(a, b) for a, b in zip(state.tensors, tensors))    # the old one is as it was
        rows = torch.tensor([2, 0, 0])
        state.reorder_cache(rows)
        assert_close(model(nxt[rows], past_key_values=state).logits, want.logits[rows])
        state = RecurrentState(tensors, 5)
        state.batch_repeat_interleave(2)
        assert_close(model(nxt.repeat_interleave(2, 0), past_key_values=state).logits, want.logits.repeat_interleave(2, 0))
        assert not any(t.requires_grad for t in want.past_key_values.detach().tensors)
        state.crop(5)
        with pytest.raises(LmnotesError, match='max_length'): state.crop(4)


@pytest.mark.parametrize('seed', range(4))
def test_the_learner_trains_and_resumes(seed, tmp_path):
    "Four steps at once equal two and two, bit by bit; in bf16 the loss stays finite."
    rows = [torch.randint(V, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(4, 20)]
    def learner(folder, **more):
        model, _ = some(seed)
        return Learner(model.float(), rows, collate_fn=lambda r: collate(r, pad_id=0), batch_size=4, lr=.01, out_dir=folder, precision='fp32', **more)
    whole = learner(tmp_path/'a').fit(steps=4)
    learner(tmp_path/'b', schedule=lambda s, t: min(1., (s + 1) / 20, (4 - s) / 2)).fit(steps=2)
    again = learner(tmp_path/'b', schedule=lambda s, t: min(1., (s + 1) / 20, (4 - s) / 2)).fit(steps=4, resume=True)
    for a, b in zip(whole.model.parameters(), again.model.parameters()): assert torch.equal(a, b)
    model, _ = some(seed)
    half = Learner(model.float(), rows, collate_fn=lambda r: collate(r, pad_id=0), batch_size=4, lr=.01, precision='bf16').fit(steps=3)
    assert all(torch.isfinite(torch.tensor(h['loss'])) for h in half.history)
    half.save(tmp_path/'saved')
    back = type(model).from_pretrained(tmp_path/'saved')
    ids = torch.tensor([rows[5]])
    assert torch.equal(back(ids).logits, half.model.cpu()(ids).logits) and back.config == model.config
    with pytest.raises(LmnotesError, match='model_type'): (RNNLM if isinstance(model, NNLM) else NNLM).from_pretrained(tmp_path/'saved')


def test_dropout_only_while_training():
    for seed in range(4):
        model, _ = some(seed, dropout=.5)
        ids = torch.randint(V, (2, 8))
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


def test_start_values():
    model = RNNLM(V, d_model=16, d_hidden=24, n_layers=2, forget_bias=1.5)
    for l in range(2):
        w_x, w_h, b_x, b_h = model.rnn.all_weights[l]
        forget = torch.arange(96) // 24 == 1
        assert (b_x + b_h)[forget].eq(1.5).all() and (b_x + b_h)[~forget].eq(0).all()
        for block in w_h.split(24): assert_close(block @ block.T, torch.eye(24), rtol=0, atol=1e-5)
    assert model.head.weight is model.embed.weight and model.down is not None
    assert RNNLM(V, d_model=16).down is None and RNNLM(V, tie=False).head.weight is not model.embed.weight


def test_a_foreign_cache_is_refused():
    with pytest.raises(LmnotesError, match='past_key_values'): RNNLM(V)(torch.zeros(1, 2, dtype=torch.long), past_key_values=KVCache())


# ---------------------------------------------------------------- the stored experiments

ROWS = json.loads(assets('runs', 'memory.json').read_text())
KINDS = 'n-gram', 'NNLM', 'RNN', 'LSTM', 'GRU', 'Transformer'


def test_every_row_says_where_it_comes_from():
    for r in ROWS: assert {'task', 'model', 'seed', 'commit', 'date', 'device', 'torch', 'total_seconds'} <= r.keys() and r['model'] in KINDS
    keys = [tuple(r.get(k) for k in ('task', 'of', 'model', 'seed', 'passes', 'lr' if r['task'] == 'tune' else 'length')) for r in ROWS]
    assert len(keys) == len(set(keys)), 'a run is stored twice'


@pytest.mark.parametrize('task', ['agreement', 'copy', 'kjv'])
def test_models_of_a_task_are_comparable(task):
    "Equal size, the same steps over the same tokens, and the learning rate that was best in the stored search."
    found = [r for r in ROWS if r['task'] == task]
    neural = [r for r in found if r['model'] != 'n-gram']
    assert {r['model'] for r in found if r['seed'] == 0} == set(KINDS)
    assert max(r['params'] for r in neural) / min(r['params'] for r in neural) < 1.03
    for seed, passes in {(r['seed'], r.get('passes')) for r in neural}:
        assert len({(r['steps'], r['tokens']) for r in neural if (r['seed'], r.get('passes')) == (seed, passes)}) == 1
    for r in neural:
        tried = [t for t in ROWS if t['task'] == 'tune' and t['of'] == task and t['model'] == r['model']]
        assert r['lr'] == (min(tried, key=lambda t: t['loss'])['lr'] if tried else .02)


def recipe():
    "What nbs/recipes/memory.py takes from the chapter."
    sys.path.insert(0, str(ROOT/'nbs'/'recipes'))
    try: import memory
    finally: sys.path.pop(0)
    return memory.shared()


def test_the_recipe_finds_the_cells_it_shares():
    "The chapter's shared cells define, by themselves, what the recipe calls; and none of them has changed its ways."
    s = recipe()
    assert s.KINDS == KINDS
    for kind in KINDS[1:]:
        sizes = [s.count(s.build(kind, *shape)) for shape in ((17, 60_000, 32), (48, 25_000, 32), (1024, 430_000, 96))]
        assert all(.97 * n < size <= n for size, n in zip(sizes, (60_000, 25_000, 430_000)))
    batch = s.copy_batch(3, 5, torch.Generator().manual_seed(0))
    assert batch['input_ids'].shape == (3, 12) and torch.equal(batch['input_ids'][:, 1:6], batch['input_ids'][:, 7:]) and (batch['labels'][:, :7] == -100).all()
    for row in s.sentences(200, 0):
        said = [s.words[i] for i in row]
        assert said[0] == said[-1] == '.' and (said[-3] in [v[said[2].endswith('s')] for v in s.verbs[:3]])


class Copier(nn.Module):
    "Knows the answer by counting places."
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
    def forward(self, input_ids, **_):
        length = input_ids.shape[1] // 2
        return SimpleNamespace(logits=nn.functional.one_hot(input_ids.roll(length - 1, 1), 17).float())


def test_the_measures_know_right_from_wrong():
    s = recipe()
    assert s.recall(Copier(), 9) == 1 and s.recall(RNNLM(17, d_model=8), 9) < .2
    class Last(nn.Module):                                        # goes with the last noun
        def forward(self, input_ids, **_):
            plural = torch.tensor([s.words[i].endswith('s') for i in range(len(s.words))])[input_ids]
            logits = torch.zeros(*input_ids.shape, len(s.words))
            for few, many in s.verbs[:3]: logits[..., s.word_id[many]] = plural * 2. - 1
            return SimpleNamespace(logits=logits)
    model = Last()
    assert s.agreement(model, 0) == 1 and s.agreement(model, 3) == 0 and s.agreement(model, 3, False) == 1
