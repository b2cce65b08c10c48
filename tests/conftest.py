"What the tests share: the folders of the tools they test, and the rule that GPU tests wait for a GPU."
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT/'docs'), str(ROOT/'tests'/'bench')]           # docs/notebooks.py, docs/environment.py, the bench harness


def pytest_collection_modifyitems(items):
    "Skip tests marked gpu where torch sees no CUDA."
    waiting = [item for item in items if item.get_closest_marker('gpu')]
    if not waiting: return
    import torch
    if torch.cuda.is_available(): return
    for item in waiting: item.add_marker(pytest.mark.skip(reason='needs CUDA; docs/NOT_RUN.md has the command'))
