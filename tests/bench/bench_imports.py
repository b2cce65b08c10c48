"What importing costs, each time in a fresh process and measured there."
import subprocess, sys

from harness import Row, Seconds


def fresh(statement, before=''):
    "Seconds that `statement` takes in a new Python after `before`."
    code = f'{before}\nimport time; t = time.perf_counter()\n{statement}\nprint(time.perf_counter() - t)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return Seconds(done.stdout.split()[-1])


def rows():
    yield Row('import lmnotes', lambda: fresh('import lmnotes'), limit=.1)
    yield Row('import lmnotes.core', lambda: fresh('import lmnotes.core'), limit=.1, note='without torch')
    yield Row('import lmnotes.ngram, after numpy', lambda: fresh('import lmnotes.ngram', 'import numpy'), limit=.1, note='without torch')
    for name in ('attention', 'data', 'lm', 'models', 'objectives', 'training', 'decoding'):
        yield Row(f'import lmnotes.{name}, after torch', lambda name=name: fresh(f'import lmnotes.{name}', 'import torch'), limit=.1)
