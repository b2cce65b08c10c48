"The files around the package agree with each other and with settings.ini."
import re, subprocess
from pathlib import Path

import pytest, yaml
from packaging.requirements import Requirement

import notebooks as tool

ROOT = Path(__file__).resolve().parent.parent
CFG = tool.settings()
TARGETS = set(re.findall(r'^([a-z]+):', (ROOT/'Makefile').read_text(encoding='utf-8'), re.M))
EXTRAS = ('', 'viz_', 'metrics_', 'notebooks_', 'dev_')


def tracked():
    done = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if done.returncode: pytest.skip('not a git checkout')
    return [ROOT/f for f in done.stdout.split('\0') if f and (ROOT/f).is_file()]


def test_every_requirement_is_pinned_for_development():
    lines = [s for s in (ROOT/'constraints.txt').read_text(encoding='utf-8').splitlines() if s and s[0] != '#']
    assert all(re.fullmatch(r'[A-Za-z0-9._-]+==[A-Za-z0-9.]+', s) for s in lines), 'pins only: no build tags, addresses or ranges'
    pins = {re.sub(r'[._-]+', '-', n).lower(): v for n, v in (s.split('==') for s in lines)}
    for extra in EXTRAS:
        for r in map(Requirement, CFG[f'{extra}requirements'].split()):
            assert r.specifier.contains(pins[re.sub(r'[._-]+', '-', r.name).lower()]), r


def test_nothing_published_is_held_back():
    for extra in EXTRAS[:-1]:
        for r in map(Requirement, CFG[f'{extra}requirements'].split()): assert all(s.operator == '>=' for s in r.specifier), r


def test_version_and_addresses_agree():
    citation = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    assert (citation['version'], citation['repository-code'], citation['url']) == (CFG['version'], CFG['git_url'], CFG['doc_host'] + CFG['doc_baseurl'])
    assert f"\n## {CFG['version']} " in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')
    assert f'__version__ = "{CFG["version"]}"' in (ROOT/'lmnotes/__init__.py').read_text(encoding='utf-8')
    assert 'Apache License' in (ROOT/'LICENSE').read_text(encoding='utf-8')


def test_promised_targets_exist():
    assert TARGETS >= set('help tour test lab docs serve notebooks bench data models experiments browser'.split())


def test_texts_name_targets_that_exist():
    for f in [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), *ROOT.glob('.github/**/*.yml'), *ROOT.glob('.github/*.md'), ROOT/'.ci/run']:
        named = set(re.findall(r'(?:`|^|run: )make ([a-z]+)\b', f.read_text(encoding='utf-8'), re.M))
        assert named <= TARGETS, (f.name, named - TARGETS)


def test_texts_name_files_that_exist():
    for f in [ROOT/'CONTRIBUTING.md', ROOT/'docs/NOT_RUN.md']:
        for path in re.findall(r'`((?:nbs|docs|tests|lmnotes)/[\w./*-]*)`', f.read_text(encoding='utf-8')):
            assert list(ROOT.glob(path.rstrip('/'))) or path.startswith('docs/_site'), (f.name, path)


def test_workflows_are_well_formed():
    for f in ROOT.glob('.github/**/*.yml'): assert isinstance(yaml.safe_load(f.read_text(encoding='utf-8')), dict), f.name
    for f in ROOT.glob('.github/workflows/*.yml'):
        for job in yaml.safe_load(f.read_text(encoding='utf-8'))['jobs'].values():
            assert 'timeout-minutes' in job or 'needs' in job, f.name
            for step in job['steps']: assert ('uses' in step) != ('run' in step), (f.name, step)


def test_ci_runs_without_a_terminal():
    assert subprocess.run(['bash', '-n', ROOT/'.ci/run'], capture_output=True).returncode == 0
    done = subprocess.run(['make', '-n', 'test', 'browser'], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and 'pytest' in done.stdout


def test_budgets():
    "Bundled data at most 8 MB, a model at most 5.3 MB, each with its card."
    data, models = ROOT/'lmnotes/assets/data', ROOT/'lmnotes/assets/models'
    def size(folder): return sum(f.stat().st_size for f in folder.rglob('*') if f.is_file())
    assert size(data) <= 8e6
    for model in models.iterdir(): assert (model/'model.safetensors').stat().st_size <= 5.3e6, model.name
    for folder in [*data.iterdir(), *models.iterdir()]: assert (folder/'README.md').exists(), f'{folder.name} has no card'


def test_tracked_text_names_no_machine():
    "No folder of somebody's machine, no token; nothing that can run code when loaded."
    for f in tracked():
        assert f.suffix not in {'.pkl', '.pt', '.bin', '.joblib', '.npy'}, f
        if f.suffix in {'.parquet', '.safetensors', '.woff2', '.png', '.ipynb', '.arpa'} or 'vendor' in f.parts or f.parent.name == 'tests': continue
        text = f.read_text(encoding='utf-8')
        assert not tool.HOME.search(text), f
        assert not any(p.search(text) for p in tool.SECRETS[:-2]), f


def test_only_expected_top_level():
    top = {f.relative_to(ROOT).parts[0] for f in tracked()}
    expected = set('.ci .github docs lmnotes nbs tests .gitattributes .gitignore CHANGELOG.md CITATION.cff CONTRIBUTING.md LICENSE MANIFEST.in Makefile README.md '
                   'constraints.txt pyproject.toml settings.ini setup.py'.split())
    assert top <= expected, top - expected
