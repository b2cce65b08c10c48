"""n-gram models on random texts: against the chapter's dictionary version, nltk and KenLM; large ids, many documents, hostile input.

The dictionary version is the notebook's own: its `..._naive` cells are executed here, so that there is only one.
"""
import ast
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmnotes.core import LmnotesError
from lmnotes.ngram import SMOOTHINGS, NGramLM, count_ngrams

CHAPTER = Path(__file__).resolve().parent.parent/'nbs'/'02b_ngram.ipynb'
MODELS = [dict(smoothing=s, base=b) for s in SMOOTHINGS for b in ('uniform', None)] + [
    dict(smoothing=s, base=b, discount=d) for s in ('interpolated', 'kneser_ney') for b in ('uniform', None) for d in (0, .4, 1)]
V = 6
documents = st.lists(st.lists(st.integers(0, V - 2), min_size=1, max_size=12), min_size=1, max_size=5).filter(lambda docs: max(map(len, docs)) > 1)
texts = st.lists(st.integers(0, V - 1), min_size=1, max_size=12)
orders = st.integers(1, 5)


def naive():
    "Every function of the chapter whose name ends in _naive."
    cells = [''.join(c['source']) for c in json.loads(CHAPTER.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    found = [node for source in cells if '_naive(' in source and '!' != source.strip()[:1] for node in ast.parse(source).body
             if isinstance(node, ast.FunctionDef) and node.name.endswith('_naive') and not node.name.startswith('check')]
    space = dict(Counter=Counter, defaultdict=defaultdict)
    exec(compile(ast.Module(found, []), str(CHAPTER), 'exec'), space)
    return space

lm_naive = naive()['lm_naive']


@pytest.mark.parametrize('kw', MODELS, ids=lambda kw: '-'.join(map(str, kw.values())))
@settings(max_examples=25, deadline=None)
@given(docs=documents, text=texts, order=orders)
@example(docs=[[0, 1], [2, 1, 0], [2]], text=[1, 1, 0], order=3)                         # "0 1" has nothing on its left
@example(docs=[[0] * 12], text=[0, 0, 5, 0], order=5)
def test_equals_dictionaries(kw, docs, text, order):
    "log_prob, next_probs and match_lengths are those of the dictionary version; distributions sum to 1; nothing is changed in place."
    before = json.dumps([docs, text])
    model, p = NGramLM(order, vocab_size=V, **kw).fit(docs), lm_naive(docs, order, V=V, **kw)
    wanted = [p(w, text[max(0, i - order + 1):i]) for i, w in enumerate(text)]
    np.testing.assert_allclose(np.exp(model.log_prob(text)), wanted, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(model.next_probs(text), [p(w, text) for w in range(V)], rtol=1e-9, atol=1e-300)
    known = {tuple(d[i:i + k]) for d in docs for k in range(1, order + 1) for i in range(len(d) - k + 1)}
    assert model.match_lengths(text).tolist() == [max([k for k in range(1, min(order, i + 1) + 1) if tuple(text[i + 1 - k:i + 1]) in known], default=0) for i in range(len(text))]
    total, h = model.next_probs(text).sum(), tuple(text[max(0, len(text) - order + 1):])
    followed = not h or any(g[:-1] == h for g in known)
    assert np.isclose(total, 1, atol=1e-12) if followed or kw['smoothing'] != 'mle' else total == 0
    assert json.dumps([docs, text]) == before


@settings(max_examples=60, deadline=None)
@given(docs=documents, text=texts, order=orders, discount=st.sampled_from([.1, .5, .75, 1.]))
def test_equals_nltk(docs, text, order, discount):
    "The same probability as nltk, or nltk's distribution is none: it divides by zero or sums to more than 1 (Kneser-Ney only)."
    lm = pytest.importorskip('nltk.lm')
    from nltk.util import everygrams
    kinds = sorted({w for d in docs for w in d})
    text = [w for w in text if w in kinds]
    cases = [('mle', lm.MLE, {}), ('laplace', lambda order: lm.Laplace(order), {}), ('interpolated', lm.WittenBellInterpolated, {}),
             ('interpolated', lm.AbsoluteDiscountingInterpolated, dict(discount=discount)), ('kneser_ney', lm.KneserNeyInterpolated, dict(discount=discount))]
    for smoothing, cls, kw in cases:
        theirs = cls(order=order, **kw)
        theirs.fit([everygrams([str(w) for w in d], max_len=order) for d in docs], [str(w) for w in kinds])
        model = NGramLM(order, smoothing, vocab_size=max(len(theirs.vocab), V) if smoothing != 'laplace' else None, base=None, **kw)
        if smoothing == 'laplace':                                                        # the same V: ranks of the words, and one more for <UNK>
            model.vocab_size = len(theirs.vocab)
            ours = np.exp(model.fit([np.searchsorted(kinds, d) for d in docs]).log_prob(np.searchsorted(kinds, text))) if text else []
        else: ours = np.exp(model.fit(docs).log_prob(text)) if text else []
        for i, p in enumerate(ours):
            h = [str(w) for w in text[max(0, i - order + 1):i]]
            try: q = theirs.score(str(text[i]), h)
            except ZeroDivisionError:
                assert smoothing == 'kneser_ney'
                continue
            if not np.isclose(p, q, rtol=1e-9, atol=1e-15):
                assert smoothing == 'kneser_ney' and sum(theirs.score(str(w), h) for w in kinds) > 1 + 1e-9


@settings(max_examples=15, deadline=None)
@given(docs=documents, text=texts, order=st.integers(2, 5), smoothing=st.sampled_from(SMOOTHINGS[2:]), base=st.sampled_from(['uniform', None]))
def test_equals_kenlm(tmp_path_factory, docs, text, order, smoothing, base):
    kenlm = pytest.importorskip('kenlm')
    if max(map(len, docs)) < order: docs = docs + [[0] * order]                           # KenLM wants n-grams of every length
    model = NGramLM(order, smoothing, vocab_size=V, base=base).fit(docs)
    path = model.to_arpa(tmp_path_factory.mktemp('arpa')/'model.arpa', list('abcdef'))
    quiet = kenlm.Config()
    quiet.show_progress, quiet.arpa_complain = False, kenlm.ARPALoadComplain.NONE
    theirs = list(kenlm.Model(str(path), quiet).full_scores(' '.join('abcdef'[w] for w in text), bos=False, eos=False))
    ours, p = model.log_prob(text) / np.log(10), np.array([t[0] for t in theirs])
    np.testing.assert_allclose(p[ours > -50], ours[ours > -50], atol=1e-4)
    assert (p[~np.isfinite(ours)] < -50).all()


@settings(max_examples=40, deadline=None)
@given(docs=documents, order=orders, scale=st.sampled_from([1, 10**6, 2**60 // V]))
def test_counts_with_large_ids(docs, order, scale):
    "Ids up to 2**60 give the same n-grams: keys are made of ranks and cannot overflow."
    words, levels = count_ngrams([[w * scale for w in d] for d in docs], order)
    small, wanted = count_ngrams(docs, order)
    assert (words == small * scale).all() and all((a == b).all() for g, w in zip(levels, wanted) for a, b in zip(g, w))
    model, other = NGramLM(order, vocab_size=2**62).fit([[w * scale for w in d] for d in docs]), NGramLM(order, vocab_size=2**62).fit(docs)
    assert (model.log_prob([w * scale for w in docs[0]]) == other.log_prob(docs[0])).all()


def test_documents_in_every_form():
    "Lists, arrays of any integer type, rows of a matrix and a generator are the same text; log_prob goes document by document."
    docs = [[1, 2, 3], [2, 3, 1], [3, 3, 2]]
    wanted = NGramLM(3, vocab_size=5).fit(docs).log_prob(docs)
    forms = [np.array(docs), np.array(docs, np.uint16), [np.array(d, np.int8) for d in docs], tuple(map(tuple, docs)), (d for d in docs)]
    for form in forms: assert (NGramLM(3, vocab_size=5).fit(form).log_prob(docs) == wanted).all()
    assert (np.concatenate([NGramLM(3, vocab_size=5).fit(docs).log_prob(d) for d in docs]) == wanted).all()
    torch = pytest.importorskip('torch')
    assert (NGramLM(3, vocab_size=5).fit(torch.tensor(docs)).log_prob(torch.tensor(docs)) == wanted).all()
    assert (NGramLM(3, vocab_size=5).fit(torch.tensor(docs[0])).log_prob(docs[1]) == NGramLM(3, vocab_size=5).fit(docs[0]).log_prob(docs[1])).all()


def test_sampling():
    "Frequencies of sampled tokens are next_probs; one seed, one text; a Generator goes on where it was."
    rng = np.random.default_rng(0)
    model = NGramLM(2, vocab_size=4).fit(rng.integers(0, 3, 50))
    draws = model.sample(20_000, seed=1)
    for h in range(3):
        after = np.bincount(draws[1:][draws[:-1] == h], minlength=4)
        p = model.next_probs([h])
        assert (np.abs(after / after.sum() - p) < 4.5 * np.sqrt(p * (1 - p) / after.sum()) + 1e-9).all()
    assert (model.sample(30, seed=7) == model.sample(30, seed=7)).all() and (model.sample(30, seed=7) != model.sample(30, seed=8)).any()
    assert (model.sample(30, seed=np.random.default_rng(7)) == model.sample(30, seed=7)).all()
    assert NGramLM(3, 'mle').fit([0, 1, 2]).sample(9, seed=0).shape == (9,)               # the last word has no follower: a shorter context
    assert set(NGramLM(1, 'mle', vocab_size=9).fit([4, 4]).sample(5)) == {4}


BAD_IDS = [None, 3, 'rose', b'rose', {}, {1, 2}, [], [[]], [[1, 2], []], [1.], [1, 2.5], [True, False], [1, None], ['a', 'b'], [[1, 2], 3], [1, [2, 3]], [[[1, 2]]], np.zeros((2, 2, 2), int),
           np.array(3), np.array([]), [float('nan')], [-1, 0], [0, 99], [[0, 1], [2, 99]], [2**63], [10**30], [1 + 2j], np.array(['1'])]


@pytest.mark.parametrize('ids', BAD_IDS, ids=lambda x: repr(x)[:20])
def test_bad_ids(ids):
    model = NGramLM(2, vocab_size=5).fit([0, 1, 2])
    for call in (NGramLM(2, vocab_size=5).fit, model.log_prob, model.perplexity, model.match_lengths):
        with pytest.raises(LmnotesError, match=r'^ids'): call(ids)


@pytest.mark.parametrize('args', [(0,), (-1,), (2.,), ('2',), (None,), (True,), (2, 'kn'), (2, None), (2, 'mle', 0), (2, 'mle', 2.5), (2, 'mle', 5, .5), (2, 'modified_kneser_ney', 5, .5),
                                  (2, 'kneser_ney', 5, -.1), (2, 'kneser_ney', 5, float('nan')), (2, 'kneser_ney', 5, '.5'), (2, 'mle', 5, None, 'flat')])
def test_bad_arguments(args):
    with pytest.raises(LmnotesError): NGramLM(*args)


def test_one_token_and_no_pairs():
    for order, docs in ((1, [3]), (2, [3]), (2, [[1], [2], [3]])):
        with pytest.raises(LmnotesError, match='two or more tokens'): NGramLM(order).fit(docs)
    assert NGramLM(1, 'mle').fit([[1], [1]]).perplexity([1]) == 1
    assert np.isfinite(NGramLM(9, vocab_size=5).fit([1, 2]).log_prob([2, 1, 4])).all()     # a text shorter than the order


def test_arpa_files(tmp_path):
    "Nothing is written where anything is wrong; a file that is there stays unless asked."
    model, path = NGramLM(2, vocab_size=3).fit([0, 1, 2, 0]), tmp_path/'m.arpa'
    for words in (['a', 'b'], ['a', 'b', 'b'], ['a', 'b', ''], ['a', 'b', 'c d'], ['a', 'b', 'c\n'], ['a', 'b', 3], ['a', 'b', 'c\u00a0d']):
        with pytest.raises(LmnotesError, match='^words'): model.to_arpa(path, words)
    assert not list(tmp_path.iterdir())
    model.to_arpa(path)
    kept = path.read_bytes()
    with pytest.raises(LmnotesError, match='^path'): model.to_arpa(path, list('abc'))
    assert path.read_bytes() == kept
    model.to_arpa(path, list('abc'), overwrite=True)
    assert path.read_bytes() != kept and len(list(tmp_path.iterdir())) == 1


def test_refit_starts_anew():
    model = NGramLM(2).fit([0, 1, 2, 3])
    assert model.fit([0, 1, 0]).V == 2
    with pytest.raises(LmnotesError): model.log_prob([3])
