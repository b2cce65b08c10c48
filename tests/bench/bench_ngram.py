"""n-gram models against nltk.lm: fitting, and scoring with Kneser-Ney, on the Shakespeare plays, split into words.

Both count the same n-grams of the same documents (a play's scenes). nltk takes words, ours their ids; turning one into the other is not timed.
"""
import re

import numpy as np
from harness import Row, Skip

ORDER, DISCOUNT, WORDS = 3, .1, 20     # WORDS: what nltk scores in one call, at some ten words a second


def scenes(rows):
    "The words of each scene: a list of lists of str."
    docs = {}
    for r in rows: docs.setdefault((r['play'], r['act'], r['scene']), []).append(f"{(r['speaker'] or '').upper()}\n{r['text']}\n\n")
    return [re.findall(r"\w+(?:['’]\w+)*|[^\w\s]|\n", ''.join(doc)) for doc in docs.values()]


def rows():
    try:
        from nltk.lm import KneserNeyInterpolated
        from nltk.util import everygrams
    except ImportError: raise Skip('nltk is not installed')
    from lmnotes.data import load_corpus
    from lmnotes.ngram import NGramLM
    corpus = load_corpus('shakespeare')
    train, test = scenes(corpus['train']), scenes(corpus['test'])
    vocabulary = sorted({w for doc in train for w in doc})
    index = {w: i for i, w in enumerate(vocabulary)}
    train_ids = [np.array([index[w] for w in doc]) for doc in train]
    V, n_tokens = len(vocabulary), sum(map(len, train))
    text = [w for doc in test for w in doc if w in index]         # nltk gives 0 to words it has not seen
    ids = np.array([index[w] for w in text])

    def ours(): return NGramLM(ORDER, 'kneser_ney', vocab_size=V, discount=DISCOUNT, base=None).fit(train_ids)
    def peer():
        lm = KneserNeyInterpolated(ORDER, discount=DISCOUNT)
        lm.fit((everygrams(doc, max_len=ORDER) for doc in train), vocabulary)
        return lm
    model, lm = ours(), peer()
    at = np.sort(np.random.default_rng(0).choice(np.arange(ORDER, len(text)), WORDS, replace=False))
    contexts = [tuple(text[i - ORDER + 1:i]) for i in at]

    def same_counts():
        mine, theirs = model.log_prob(train_ids[0][:ORDER]), sum(len(c) for c in lm.counts[ORDER].values())
        assert np.isfinite(mine).all() and theirs == len(model._fitted[1][-1].keys), 'not the same n-grams'
    def same_scores():
        theirs = [lm.score(text[i], h) for i, h in zip(at, contexts)]
        np.testing.assert_allclose(np.exp(model.log_prob(ids)[at]), theirs, rtol=1e-9)

    yield Row(f'n-gram fit, order {ORDER}, {n_tokens / 1e6:.2f}M tokens', ours=ours, peer=peer, target=50, check=same_counts, note='nltk.lm; ours from ids, nltk from words')
    yield Row('Kneser-Ney score, per word', ours=lambda: model.log_prob(ids), ours_items=len(ids),
              peer=lambda: [lm.score(text[i], h) for i, h in zip(at, contexts)], peer_items=WORDS, target=10_000, check=same_scores,
              note=f'nltk.lm scores {WORDS} of the {len(ids):,} words')
