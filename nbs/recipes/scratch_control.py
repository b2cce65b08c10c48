"""Make the tour's second control: the same Transformer trained on the same plays from random weights, for the same number of steps.

    python nbs/recipes/scratch_control.py          runs nbs/tour.ipynb with `pretrained = False`, stores lmnotes/assets/runs/tour_scratch.json
"""
import datetime, json, os, subprocess, tempfile
from pathlib import Path
import nbformat
from lmnotes.cli import tour
from lmnotes.core import assets

if __name__ == '__main__':
    root = Path(__file__).resolve().parents[2]
    nb = nbformat.read(root/'nbs'/'tour.ipynb', as_version=4)
    cells = [c for c in nb.cells if 'pretrained = True' in c.source]
    assert len(cells) == 1, 'the tour must set `pretrained = True` in one cell'
    cells[0].source = cells[0].source.replace('pretrained = True', 'pretrained = False')
    with tempfile.TemporaryDirectory() as tmp:
        nbformat.write(nb, Path(tmp)/'tour.ipynb')
        if tour(Path(tmp)/'out', notebook=Path(tmp)/'tour.ipynb'): raise SystemExit('the tour failed')
        m = json.loads((Path(tmp)/'out'/'metrics.json').read_text())
    assert not m['pretrained']
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, cwd=root).stdout.strip()
    row = dict(perplexity=m['perplexity_after'], bits_per_byte=m['bits_per_byte_after'], by_play=m['by_play'], steps=m['steps'], tokens_trained=m['tokens_trained'],
               seconds=m['seconds'], device=f"{m['device']}, {os.cpu_count()} cores", seed=m['seed'], commit=commit, date=str(datetime.date.today()))
    assets('runs').mkdir(exist_ok=True)
    (assets('runs')/'tour_scratch.json').write_text(json.dumps(row, indent=1) + '\n')
    print(row)
