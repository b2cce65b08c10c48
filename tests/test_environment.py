"Set-up on a bare machine: what can go wrong there ends in one line that says what to do."
import os, shutil, subprocess, sys
from pathlib import Path

import pytest

import environment

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def clone(tmp_path):
    "A folder with what set-up reads, and no .venv."
    (tmp_path/'docs').mkdir()
    shutil.copy(ROOT/'docs/environment.py', tmp_path/'docs')
    for f in ('Makefile', 'settings.ini', 'setup.py', 'constraints.txt'): shutil.copy(ROOT/f, tmp_path)
    return tmp_path


def set_up(clone, before=''):
    "Run docs/environment.py in a fresh Python after the statements `before`; returns the exit status and the last line."
    code = f'import sys\n{before}\nimport runpy; runpy.run_path("docs/environment.py", run_name="__main__")'
    done = subprocess.run([sys.executable, '-c', code], cwd=clone, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.returncode, done.stderr.strip().splitlines()


@pytest.mark.parametrize('before, said', [
    ('sys.version_info = (3, 10, 9)', 'Python 3.10.9 is too old, 3.11 or newer is needed'),
    ('sys.modules["ensurepip"] = None', 'sudo apt install python3-venv'),
    ('import shutil; shutil.disk_usage = lambda p: type("U", (), dict(free=1e9))', 'set-up needs 3 GB in this folder, 1.0 GB are free'),
])
def test_one_line(clone, before, said):
    status, lines = set_up(clone, before)
    assert status == 1 and len(lines) == 1 and lines[0].startswith('lmnotes: ') and said in lines[0]
    assert not (clone/'.venv').exists()


def test_a_broken_venv_is_named(clone):
    folder = clone/'.venv'/'bin'
    folder.mkdir(parents=True)
    (folder/'python').write_text('#!/bin/sh\nexit 1\n')
    (folder/'python').chmod(0o755)
    status, lines = set_up(clone)
    assert status == 1 and len(lines) == 1 and 'remove the folder' in lines[0] and (folder/'python').exists()


@pytest.mark.parametrize('printed, said', [
    ('ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device', 'the disk is full'),
    ("WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(...)'\nERROR: No matching distribution found for torch", 'no package index can be reached'),
    ('ERROR: Cannot install a and b because these package versions have conflicting dependencies.\nERROR: ResolutionImpossible', 'installing failed: ERROR: Cannot install a and b'),
    ('', 'installing failed: no message'),
])
def test_what_pip_says_becomes_one_line(monkeypatch, tmp_path, printed, said):
    monkeypatch.setattr(environment, 'VENV', str(tmp_path))
    monkeypatch.setattr(environment, 'LOG', str(tmp_path/'setup.log'))
    with pytest.raises(SystemExit) as e: environment.explain(printed, 'installing failed')
    assert said in str(e.value) and '\n' not in str(e.value)


def test_set_up_is_not_repeated(clone):
    "Once .venv/ready is newer than what it depends on, make does nothing; a changed requirement makes it again."
    (clone/'.venv').mkdir()
    (clone/'.venv'/'ready').touch()
    def planned(): return subprocess.run(['make', '-n', '.venv/ready'], cwd=clone, capture_output=True, text=True).stdout
    assert 'environment.py' not in planned()
    later = (clone/'.venv'/'ready').stat().st_mtime + 10
    os.utime(clone/'constraints.txt', (later, later))
    assert 'environment.py' in planned()


def test_chromium_prefers_the_one_named(monkeypatch, tmp_path):
    (tmp_path/'mine').touch()
    monkeypatch.setenv('BROWSER_PATH', str(tmp_path/'mine'))
    assert environment.chromium() == str(tmp_path/'mine')
