"""Create or reuse .venv, the one environment of every make target.

    python3 docs/environment.py              what make calls when settings.ini, setup.py or constraints.txt changed;
                                             with TORCH_INDEX=ADDRESS torch, and torch alone, comes from another index
    .venv/bin/python docs/environment.py kenlm | browser       what only the tests and benchmarks use

Versions come from constraints.txt, requirements from settings.ini. Everything that can go wrong on a bare machine (an old Python,
no venv module, a full disk, no network) ends in one line that says what to do. This file must parse on any Python 3.
"""
import os, re, shutil, subprocess, sys, threading, time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, '.venv')
PYTHON = os.path.join(VENV, 'Scripts' if os.name == 'nt' else 'bin', 'python')
LOG = os.path.join(VENV, 'setup.log')
NEEDS_GB = 3                                    # without CUDA; with it pip says what is missing


def stop(message): sys.exit('lmnotes: ' + message)


def check_python():
    if sys.version_info >= (3, 11): return
    newer = [p for p in ('python3.14', 'python3.13', 'python3.12', 'python3.11') if shutil.which(p)]
    hint = 'run the command again with PYTHON=%s' % newer[-1] if newer else 'install a newer one and name it: make ... PYTHON=python3.12'
    stop('Python %s is too old, 3.11 or newer is needed; %s' % ('.'.join(map(str, sys.version_info[:3])), hint))


def check_disk():
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < NEEDS_GB: stop('set-up needs %d GB in this folder, %.1f GB are free; make room and run the same command again' % (NEEDS_GB, free))


def make_venv():
    if os.path.exists(PYTHON):
        ask = subprocess.run([PYTHON, '-c', 'import sys, pip; print(sys.version_info >= (3, 11))'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if ask.stdout.strip() == b'True': return
        stop('.venv is there but does not work (its Python moved, is older than 3.11, or lacks pip); remove the folder and run the same command again')
    try: import ensurepip, venv  # noqa: F401
    except ImportError:
        stop('this Python has no venv module; on Debian and Ubuntu: sudo apt install python3-venv, then run the same command again')
    print('Making .venv (once; a few minutes, mostly downloads)', flush=True)
    check_disk()
    done = subprocess.run([sys.executable, '-m', 'venv', VENV], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    if done.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        explain(done.stdout, 'making .venv failed')


def explain(said, what):
    "End with one line for what a failed command printed."
    lines = [s.strip() for s in said.splitlines() if s.strip()]
    if 'No space left on device' in said or 'Errno 28' in said or 'Disk quota' in said:
        stop('the disk is full (this folder or the temporary one); make room and run the same command again')
    if re.search(r'ensurepip is not\s+available|No module named .?(ensurepip|venv)', said):
        stop('this Python has no venv module; on Debian and Ubuntu: sudo apt install python3-venv, then run the same command again')
    if re.search(r'NewConnectionError|NameResolutionError|Connection ?(refused|reset|error)|ReadTimeout|ConnectTimeout|ProxyError', said):
        stop('no package index can be reached; check the network and run the same command again')
    errors = [s for s in lines if s.lower().startswith('error')] or lines[-1:] or ['no message']
    if not os.path.isdir(VENV): stop('%s: %s' % (what, errors[0]))
    with open(LOG, 'w') as f: f.write(said)
    stop('%s: %s (more in .venv/setup.log)' % (what, errors[0]))


def pip(title, *args):
    "Run pip behind one line of progress; returns what it printed, with its exit status."
    command = [PYTHON, '-m', 'pip', 'install', '--disable-pip-version-check', '-c', os.path.join(ROOT, 'constraints.txt')] + list(args)
    tty, start, count, said, now = sys.stdout.isatty(), time.time(), 0, [], ''
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, errors='replace')

    def show():
        while process.poll() is None:
            if tty: print('\r\x1b[K%s: %d s%s' % (title, time.time() - start, (', ' + now if now else '')[:70]), end='', flush=True)
            time.sleep(1)
    threading.Thread(target=show, daemon=True).start()
    if not tty: print(title + ' ...', flush=True)
    for line in process.stdout:
        word = line.split()
        if word[:1] != ['Progress']: said.append(line)
        if word[:1] == ['Collecting']:
            count += 1
            now = 'package %d, %s' % (count, word[1])
            if not tty and count % 25 == 0: print('  ' + now, flush=True)
        elif word[:1] == ['Downloading'] and '(' in line: now = 'package %d, %s' % (count, ' '.join(word[1:]))
        elif word[:1] == ['Progress'] and len(word) == 4 and int(word[3]) > 5e6: now = 'package %d, %d of %d MB' % (count, int(word[1]) / 1e6, int(word[3]) / 1e6)
        elif word[:2] == ['Installing', 'collected']: now = 'installing %d packages' % count
    status = process.wait()
    print('%s%s: %s, %d s' % ('\r\x1b[K' if tty else '', title, 'failed' if status else 'done', time.time() - start), flush=True)
    return ''.join(said), status


def need(title, *args):
    "pip that must work."
    said, status = pip(title, *args)
    if status: explain(said, title[0].lower() + title[1:] + ' failed')


def touch(name): open(os.path.join(VENV, name), 'w').close()


def environment():
    check_python()
    make_venv()
    need('Updating pip', 'pip')
    index = os.environ.get('TORCH_INDEX')
    need('Installing torch', '--progress-bar', 'raw', '--no-deps', 'torch', *(['--index-url', index] if index else []))
    need('Installing the other packages', '--progress-bar', 'raw', '-e', '.[all,dev]')
    touch('ready')


def kenlm():
    "An optional peer of the n-gram chapter's checks; it has to be compiled."
    _, status = pip('Compiling kenlm (optional)', 'kenlm')
    if status: print('kenlm cannot be built here (it needs a C++ compiler and cmake): the one check that uses it will say it was skipped', flush=True)
    touch('kenlm')


def chromium():
    "The path of a Chromium or Chrome: BROWSER_PATH, else one on PATH, else playwright's own; None if there is none."
    names = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')
    found = [os.environ.get('BROWSER_PATH')] + [shutil.which(n) for n in names]
    try:
        from playwright.sync_api import sync_playwright
        if not any(found):
            with sync_playwright() as p: found.append(p.chromium.executable_path)
    except ImportError: pass
    return next((f for f in found if f and os.path.exists(f)), None)


def browser():
    "Install Chromium: Debian's where we are root there, playwright's elsewhere."
    if chromium():
        print('Chromium is there: ' + chromium())
        return
    release = open('/etc/os-release').read() if os.path.exists('/etc/os-release') else ''
    debian = re.search(r'^ID="?debian', release, re.M) and shutil.which('apt-get')
    if debian and os.geteuid() != 0: stop('run this once: sudo apt-get install chromium')
    env = dict(os.environ, DEBIAN_FRONTEND='noninteractive')
    if debian: commands = [['apt-get', 'update', '-q'], ['apt-get', 'install', '-qy', '--no-install-recommends', 'chromium', 'fonts-dejavu-core']]
    else: commands = [[PYTHON, '-m', 'playwright', 'install', '--with-deps', 'chromium']]
    for command in commands:
        if subprocess.run(command, env=env, stdin=subprocess.DEVNULL).returncode: stop('installing Chromium failed, see above: ' + ' '.join(command))
    if not chromium(): stop('Chromium was installed but is not found; set BROWSER_PATH to it')


if __name__ == '__main__': dict(kenlm=kenlm, browser=browser).get(sys.argv[1] if len(sys.argv) > 1 else '', environment)()
