"""What a user installs: the wheel, built from the sdist, in a fresh environment whose only constraint is torch's version.

The steps share one environment and run in order: its base install, then the extras that a chapter needs.
"""
import email, json, os, re, shutil, subprocess, sys, venv, zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import notebooks as tool

ROOT = Path(__file__).resolve().parent.parent
CFG = tool.settings()
pytestmark = pytest.mark.slow

CHAPTER = '''
# Run a chapter as Colab would: google.colab is there, nbdev is not, the folder is empty.
import nbformat, sys
from nbclient import NotebookClient
nb = nbformat.read(sys.argv[1], 4)
fake = """
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
google, colab, output = (module_from_spec(ModuleSpec(n, None, is_package=True)) for n in ('google', 'google.colab', 'google.colab.output'))
google.colab, colab.output, output.enable_custom_widget_manager, output.register_callback = colab, output, lambda: None, lambda name, f: None
sys.modules |= {m.__name__: m for m in (google, colab, output)}
"""
nb.cells.insert(0, nbformat.v4.new_code_cell(fake))
for c in nb.cells:
    if c.cell_type == 'code' and ('# colab-setup' in c.source or '#| slow' in c.source or '#| gpu' in c.source): c.source = ''
NotebookClient(nb, timeout=600, kernel_name='python3', resources={'metadata': {'path': '.'}}).execute()
print(sum(bool(c.get('outputs')) for c in nb.cells), 'cells gave output')
'''


def run(*command, cwd=None, **env):
    "Run a command without this environment's variables; returns what it prints."
    keep = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'LMNOTES_', 'VIRTUAL_ENV', 'JUPYTER'))}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=keep | dict(LMNOTES_PROFILE='test', **env), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f'{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    return done.stdout


@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "The folder with the sdist and the wheel made from it, built from a copy of the tracked files."
    copy, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('dist')
    tracked = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode: pytest.skip('not a git checkout')
    for f in filter(None, tracked.stdout.split('\0')):
        if not (ROOT/f).exists(): continue
        (copy/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/f, copy/f)
    run(sys.executable, '-m', 'build', '--outdir', out, copy)
    return out


@pytest.fixture(scope='module')
def wheel(dist): return next(dist.glob('*.whl'))


@pytest.fixture(scope='module')
def python(wheel, tmp_path_factory):
    "The Python of a fresh environment with the wheel's base install."
    folder = tmp_path_factory.mktemp('fresh')
    venv.create(folder, with_pip=True)
    python = folder/('Scripts' if os.name == 'nt' else 'bin')/'python'
    torch = version('torch').split('+')[0]
    (folder/'constraints.txt').write_text(f'torch=={torch}\n')
    if index := os.environ.get('TORCH_INDEX'): run(python, '-m', 'pip', 'install', '-q', '--no-deps', f'torch=={torch}', '--index-url', index)
    run(python, '-m', 'pip', 'install', '-q', '-c', folder/'constraints.txt', wheel)
    return python


def test_sdist_and_wheel_files(dist, wheel):
    assert len(list(dist.iterdir())) == 2 and wheel.stat().st_size <= 30e6
    names = zipfile.ZipFile(wheel).namelist()
    chapters = {f'lmnotes/notebooks/{p.relative_to(ROOT/"nbs")}' for p in tool.notebooks('', 'tasks')}
    assets = {p.relative_to(ROOT).as_posix() for p in (ROOT/'lmnotes/assets').rglob('*') if p.is_file()}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT/'lmnotes').glob('*.py')}
    missing = (chapters | assets | modules | {'lmnotes/py.typed'}) - set(names)
    assert not missing, missing
    strange = [n for n in names if not n.startswith(('lmnotes/', f'lmnotes-{CFG["version"]}.dist-info/')) or 'recipes' in n or '.ipynb_checkpoints' in n or n.endswith('.pyc')]
    assert not strange, strange


def test_chapters_travel_without_outputs(wheel):
    with zipfile.ZipFile(wheel) as z:
        for n in z.namelist():
            if n.endswith('.ipynb'): assert not any(c.get('outputs') or c.get('execution_count') for c in json.loads(z.read(n))['cells']), n


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as z:
        meta = email.message_from_bytes(z.read(f'lmnotes-{CFG["version"]}.dist-info/METADATA'))
        points = z.read(f'lmnotes-{CFG["version"]}.dist-info/entry_points.txt').decode()
    assert meta['License-Expression'] == 'Apache-2.0' and meta['Requires-Python'] == f'>={CFG["min_python"]}' and 'LICENSE' in meta.get_all('License-File')
    assert set(meta.get_all('Provides-Extra')) == {'viz', 'metrics', 'notebooks', 'dev', 'all'}
    pinned = [r for r in meta.get_all('Requires-Dist') if re.search(r'==|<|~=', r.split(';')[0]) and 'extra == "dev"' not in r]
    assert not pinned, f'a published requirement holds others back: {pinned}'
    assert 'lmnotes = lmnotes.cli:main' in points
    links = re.findall(r'\]\(([^)]+)\)', meta.get_payload())
    assert all(re.match(r'https?:|#|mailto:', s) for s in links), 'the package index cannot follow relative links'


def test_imports(python, tmp_path):
    modules = [p.stem for p in (ROOT/'lmnotes').glob('*.py') if p.stem[0] != '_']
    said = run(python, '-c', f'''
import importlib, importlib.util, lmnotes
for m in {modules!r}: importlib.import_module('lmnotes.' + m)
assert importlib.util.find_spec('nbdev') is None and importlib.util.find_spec('plotly') is None
print(lmnotes.__version__, lmnotes.__file__)''', cwd=tmp_path)
    assert said.startswith(CFG['version']) and str(ROOT) not in said


def test_readme_code(python, tmp_path):
    "The README's Python, in an empty folder, on the base install."
    blocks = re.findall(r'^```python\n(.*?)^```', (ROOT/'README.md').read_text(encoding='utf-8'), re.M | re.S)
    assert blocks, 'README.md shows no Python'
    (tmp_path/'readme.py').write_text('\n'.join(blocks), encoding='utf-8')
    run(python, 'readme.py', cwd=tmp_path)


def test_command(python, tmp_path):
    lmnotes = Path(python).with_name('lmnotes')
    assert 'torch' in run(lmnotes, 'doctor', cwd=tmp_path)
    run(lmnotes, 'notebooks', tmp_path/'mine', cwd=tmp_path)
    assert {p.name for p in (tmp_path/'mine').glob('*.ipynb')} == {p.name for p in tool.notebooks('')}


def test_a_chapter_as_on_colab(python, wheel, tmp_path):
    run(python, '-m', 'pip', 'install', '-q', '-c', Path(python).parent.parent/'constraints.txt', f'lmnotes[viz,notebooks] @ {wheel.as_uri()}')
    run(Path(python).with_name('lmnotes'), 'notebooks', tmp_path/'mine')
    (tmp_path/'empty').mkdir()
    (tmp_path/'chapter.py').write_text(CHAPTER)
    said = run(python, tmp_path/'chapter.py', tmp_path/'mine'/'02_lm.ipynb', cwd=tmp_path/'empty')
    assert int(said.split()[-4]) > 5
