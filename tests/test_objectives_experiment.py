"The questions that nbs/recipes/objectives.py asks of every model: they see what they may see, and no answer."
import sys
from pathlib import Path

import pytest
import torch

from lmnotes.lm import evaluating

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/'nbs'/'recipes'))
recipe = pytest.importorskip('objectives')
SIZE = dict(d_model=32, n_heads=4, n_layers=4, d_ff=48, rows=4, steps=1)
START, LAST = 40, 44
READS_BEHIND = set(recipe.OBJECTIVES) - {'clm', 'prefix_lm'}          # the others see what follows the hole


def model_of(name):
    torch.manual_seed(0)
    return recipe.OBJECTIVES[name][0](SIZE).double()


def changed(ids, at, by=7):
    out = ids.clone()
    out[:, at] = (out[:, at] + by) % 4000 + 1
    return out


@pytest.mark.parametrize('name', recipe.OBJECTIVES)
def test_no_question_shows_its_answer(name):
    "In a hole from START to LAST the tokens before `at` are known; `at` and those behind it in the hole never are."
    ids, ask, model = torch.randint(1, 4000, (3, recipe.LENGTH)), recipe.ASK[name], model_of(name)
    with evaluating(model):
        for at in (START, START + 2, LAST):
            def logits(x, at=at): return ask(model, x, START, at, LAST)
            base = logits(ids)
            for hidden in range(at, LAST + 1): torch.testing.assert_close(logits(changed(ids, hidden)), base, rtol=0, atol=1e-12)
            seen = [START - 3, *([at - 1] if at > START else []), *([LAST + 3] if name in READS_BEHIND else [])]
            for place in seen: assert (logits(changed(ids, place)) - base).abs().max() > 1e-9, (at, place)


@pytest.mark.parametrize('name', ['clm', 'prefix_lm', 'unilm', 'mlm', 'replaced_token_detection'])
def test_bits_are_sums_of_the_right_log_probabilities(name):
    "Against each token asked for alone."
    ids, ask, model = torch.randint(1, 4000, (2, recipe.LENGTH)), recipe.ASK[name], model_of(name)
    with evaluating(model):
        got, one = recipe.chain(name, model, ids), 0.
        for at in range(1, recipe.LENGTH):
            if name == 'prefix_lm': row = ask(model, ids, 1, at, at)
            elif name == 'unilm':                                     # its left-to-right mask, and the segment that goes with it
                left = torch.ones(at + 1, at + 1, dtype=torch.bool).tril().expand(2, 1, -1, -1)
                row = recipe.ask_masked(model, ids[:, :at + 1], at, at, at, attention_mask=left, token_type_ids=torch.full_like(ids[:, :at + 1], 2))
            else: row = ask(model, ids, at, at, at)
            one -= row[:, :recipe.TOKENS].float().log_softmax(-1).gather(1, ids[:, at, None]).sum().item()
    assert abs(got - one) < 1e-4 * one, (got, one)
