"The lmnotes command as a process: exit codes, what it says, Ctrl-C, an installed package"
import os, shutil, signal, subprocess, sys, time
from pathlib import Path
import nbformat, pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from lmnotes.cli import Progress, cell_titles, main, metrics_table, notebooks_dir, tour_dir
from lmnotes.core import LmnotesError

ROOT = Path(__file__).parent.parent
RUN = 'import sys; from lmnotes.cli import main; sys.exit(main())'
TOUR = 'import sys; from lmnotes.cli import tour; sys.exit(tour(sys.argv[1], notebook=sys.argv[2]))'
SAVE = '''import json, os, pathlib
out = pathlib.Path(os.environ['LMNOTES_OUT']); (out/'index.html').write_text('page'); (out/'metrics.json').write_text(json.dumps(dict(perplexity_after=12.3456, seconds=1.5)))'''

def run(*args, code=RUN, **kw): return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, timeout=120, **kw)

def notebook(path, *cells):
    nbformat.write(new_notebook(cells=[new_markdown_cell('# A tour'), *[c if isinstance(c, dict) else new_code_cell(c) for c in cells]]), path)
    return path

# --- grammar --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('args', [[], ['tuor'], ['notebooks'], ['tour', '--out'], ['doctor', 'x'], ['--what']])
def test_wrong_commands_end_in_2_and_one_line(args, capsys):
    with pytest.raises(SystemExit) as e: main(args)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and not out and err.count('\n') == 1 and '--help' in err

def test_version_and_help(capsys):
    from lmnotes import __version__
    for args, said in ((['--version'], f'lmnotes {__version__}'), (['--help'], 'notebooks'), (['tour', '--help'], '--out DIR')):
        with pytest.raises(SystemExit) as e: main(args)
        assert e.value.code == 0 and said in capsys.readouterr().out

def test_doctor_exit_code(monkeypatch, capsys):
    from lmnotes import cli, core
    report = core.Report(); monkeypatch.setattr(cli, 'doctor', lambda: report)
    assert main(['doctor']) == 0 and 'no problems found' in capsys.readouterr().out
    report.check(False, 'no GPU', 'buy one')
    assert main(['doctor']) == 1 and 'buy one' in capsys.readouterr().out

# --- copying --------------------------------------------------------------------------------------------------------------------

def test_copies_chapters_once(tmp_path, capsys):
    assert main(['notebooks', str(tmp_path/'new')]) == 0
    names = {p.name for p in (tmp_path/'new').glob('*.ipynb')}
    assert {'00_core.ipynb', '01_data.ipynb', '02_lm.ipynb'} <= names == {p.name for p in notebooks_dir().glob('*.ipynb')}
    (tmp_path/'new/00_core.ipynb').write_text('mine'); (tmp_path/'new/01_data.ipynb').unlink()
    assert main(['notebooks', str(tmp_path/'new')]) == 2 and '--overwrite' in capsys.readouterr().err
    assert (tmp_path/'new/00_core.ipynb').read_text() == 'mine' and not (tmp_path/'new/01_data.ipynb').exists(), 'refused before the first write'
    assert main(['notebooks', str(tmp_path/'new'), '--overwrite']) == 0 and (tmp_path/'new/00_core.ipynb').read_bytes() == (notebooks_dir()/'00_core.ipynb').read_bytes()
    (tmp_path/'file').touch()
    assert main(['notebooks', str(tmp_path/'file')]) == 2

def test_copies_from_an_installed_package(tmp_path):
    "No checkout around it: the chapters lie in lmnotes/notebooks, and an nbs folder of somebody else beside it is not taken"
    site = tmp_path/'site'; (site/'nbs').mkdir(parents=True); (site/'nbs/other.ipynb').touch()
    shutil.copytree(ROOT/'lmnotes', site/'lmnotes', ignore=shutil.ignore_patterns('assets', '__pycache__', 'notebooks'))
    env = {**os.environ, 'PYTHONPATH': str(site)}
    r = run('notebooks', tmp_path/'a', env=env, cwd=tmp_path)
    assert r.returncode == 2 and 'reinstall' in r.stderr
    notebook((site/'lmnotes/notebooks').mkdir() or site/'lmnotes/notebooks/00_core.ipynb', '1'); (site/'lmnotes/notebooks/tasks').mkdir()
    notebook(site/'lmnotes/notebooks/tasks/t.ipynb', '1')
    r = run('notebooks', tmp_path/'a', env=env, cwd=tmp_path)
    assert r.returncode == 0 and sorted(p.relative_to(tmp_path/'a').as_posix() for p in (tmp_path/'a').rglob('*.ipynb')) == ['00_core.ipynb', 'tasks/t.ipynb'], r.stderr

def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    import errno
    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    assert main(['notebooks', str(tmp_path/'n')]) == 1
    err = capsys.readouterr().err
    assert 'No space left' in err and '.ipynb' in err and err.count('\n') == 1 and not list((tmp_path/'n').rglob('*.*'))

# --- the tour's machinery ---------------------------------------------------------------------------------------------------------

def test_titles():
    nb = new_notebook(cells=[new_markdown_cell('# T\n> x'), new_code_cell('#| hide\nimport a\n1'), new_code_cell('# note\n%time\n2'), new_markdown_cell('text\n### Sub\n#not a heading'), new_code_cell('3'), new_code_cell('')])
    assert cell_titles(nb.cells) == ['T', 'T', 'T (2)', 'Sub', 'Sub', 'Sub (2)'] and cell_titles(nb.cells[1:3]) == ['import a', '2']

def test_progress_in_a_log(tmp_path, monkeypatch):
    "One line a cell; a long one is repeated with its last output"
    now = [0.]; monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    with open(tmp_path/'log', 'w') as f:
        p = Progress(12, f); p.start('Short'); p.note('hidden'); p.done(); p.start('L' * 100)
        for i in range(40): now[0] += 1; p.note(f'\rstep {i}'); p.show()
        p.done('failed')
    lines = (tmp_path/'log').read_text().splitlines()
    assert lines[0] == f'[ 1/12] {"Short":<44}    0.0 s' and len(lines) == 4 and lines[1].endswith('15.0 s  step 14') and lines[3].endswith('40.0 s  failed') and '\r' not in ''.join(lines)

def test_table():
    table = metrics_table(dict(perplexity_before=1234.5678, loss=0.00123456, tokens=1234567, big=123456.7, ok=True, device='cpu', curve=[1], nothing=None))
    assert [l.split()[-1] for l in table.splitlines()] == ['1,235', '0.001235', '1,234,567', '123,457', 'True', 'cpu'] and metrics_table({}) == ''

def test_tour_dir(tmp_path):
    out = tour_dir(tmp_path/'a'/'tour')
    for n in ('index.html', 'metrics.json', 'mine.txt'): (out/n).write_text('x')
    assert tour_dir(out) == out and sorted(os.listdir(out)) == ['.lmnotes-tour', 'mine.txt']
    (tmp_path/'b').mkdir(); (tmp_path/'b/x').touch()
    with pytest.raises(LmnotesError, match='holds something'): tour_dir(tmp_path/'b')
    assert sorted(os.listdir(tmp_path/'b')) == ['x']
    tour_dir(tmp_path/'b', overwrite=True)

def test_a_good_run(tmp_path):
    nb = notebook(tmp_path/'n.ipynb', new_markdown_cell('## Save'), SAVE, '#| eval: false\n1/0', 'import sys; print(sys.executable, os.getcwd())')
    r = run(tmp_path/'out', nb, code=TOUR)
    assert r.returncode == 0 and not r.stderr, r.stderr
    assert '[1/2] Save' in r.stdout and '12.35' in r.stdout and str(tmp_path/'out/index.html') in r.stdout
    done = nbformat.read(tmp_path/'out/tour.ipynb', 4)
    assert done.cells[-1].outputs[0].text.split() == [sys.executable, str(tmp_path/'out')]
    assert run(tmp_path/'out', nb, code=TOUR).returncode == 0, 'a second run may use the same folder'

def test_progress_of_a_running_cell(tmp_path):
    "What a cell prints, and tqdm's bar as a widget, show behind its title while it runs"
    said = []
    class Listening(Progress):
        def note(self, text): said.append(text); super().note(text)
    import asyncio
    from lmnotes.cli import run_cells
    nb = new_notebook(cells=[new_code_cell('print("loss 3.2")'), new_code_cell('from tqdm.notebook import tqdm\nfor i in tqdm(range(7), mininterval=0): pass')])
    with open(tmp_path/'log', 'w') as log: asyncio.run(run_cells(nb, Listening(2, log), tmp_path))
    assert 'loss 3.2\n' in said and any('7/7' in t for t in said), said

@pytest.mark.parametrize('cells, said', [(['x = 0', '1/x'], 'cell 2 of 2, A tour (2), failed: ZeroDivisionError'), (['import no_such_module'], "pip install 'lmnotes[viz,notebooks]'"),
                                         (['import os; os._exit(9)'], 'the kernel died'), (['1'], 'metrics.json'), (['(("'], 'SyntaxError')])
def test_a_failing_run(tmp_path, cells, said):
    r = run(tmp_path/'out', notebook(tmp_path/'n.ipynb', *cells), code=TOUR)
    assert r.returncode == 1 and said in r.stderr and len(r.stderr.splitlines()) < 8, r.stderr
    assert not (tmp_path/'out/metrics.json').exists() and nbformat.read(tmp_path/'out/tour.ipynb', 4).cells

@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_stopped(tmp_path, signum):
    "Ctrl-C and kill: 130 and 143, one line, and the kernel is gone"
    nb = notebook(tmp_path/'n.ipynb', 'import os, pathlib, time; pathlib.Path("pid").write_text(str(os.getpid())); time.sleep(100)')
    p = subprocess.Popen([sys.executable, '-c', TOUR, tmp_path/'out', nb], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not ((tmp_path/'out/pid').exists() and (tmp_path/'out/pid').read_text()): assert time.time() < deadline and p.poll() is None; time.sleep(.1)
    p.send_signal(signum)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 128 + signum and 'stopped' in out and err == f'lmnotes: stopped by {signum.name}; the kernel is shut down\n'
    with pytest.raises(ProcessLookupError): os.kill(int((tmp_path/'out/pid').read_text()), 0)

def test_tour_without_its_extra(tmp_path):
    r = run(tmp_path/'out', 'x', code="import sys; sys.modules['nbclient'] = None\n" + "from lmnotes.cli import main; sys.exit(main(['tour', '--out', sys.argv[1]]))")
    assert r.returncode == 2 and "pip install 'lmnotes[viz,notebooks]'" in r.stderr and not (tmp_path/'out').exists()

# --- the home page ----------------------------------------------------------------------------------------------------------------

def test_the_table_of_chapters_is_whole():
    "index.ipynb links to every chapter that exists and to nothing that does not; symbols.ipynb too"
    import re
    for page, whole in (('index', True), ('symbols', False)):
        text = '\n'.join(c.source for c in nbformat.read(ROOT/f'nbs/{page}.ipynb', 4).cells if c.cell_type == 'markdown')
        linked = set(re.findall(r'\]\(([\w/]+\.ipynb)', text))
        chapters = {p.name for p in (ROOT/'nbs').glob('*.ipynb')} - {'index.ipynb'}
        assert linked <= chapters, f'{page}: {linked - chapters}'
        assert not whole or linked == chapters, f'not in the table: {chapters - linked}'
        assert all((ROOT/'nbs'/f).exists() for f in re.findall(r'!\[[^\]]*\]\((?!https:)([^)]+)\)', text)), 'a picture is missing'
