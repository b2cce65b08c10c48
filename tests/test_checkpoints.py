"""lmnotes.checkpoints under faults: every call to the file system of a save fails or is the last before a kill, with renames whole and piecewise; random kills,
limits, flipped bits, hostile files, two writers. Faults come in below the code: by Python's audit events, os.fsync and the file's write."""
import builtins, errno, hashlib, io, json, os, pickle, random, re, resource, shutil, signal, stat, subprocess, sys, tempfile, time, types, warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load as library_load, load_file, save as library_save

from lmnotes import checkpoints as ck
from lmnotes.checkpoints import CheckpointError, checkpoints, load_checkpoint, lock, newest_good, prune, read_tensors, save_checkpoint, sweep, verify_checkpoint
from lmnotes.core import LmnotesError, LmnotesTypeError

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='the faults need fork and kill')
FILES = ['state.json', 'model.safetensors', 'optimizer.safetensors', 'manifest.json']

def some_tensors(n):
    "The tensors of step n: every number says so"
    return dict(model=dict(w=torch.full((5, 7), float(n)), b=torch.full((3,), n, dtype=torch.bfloat16)), optimizer={'0.0.step': torch.tensor(n)})

def save(run, n): return save_checkpoint(run/f'step-{n}', some_tensors(n), dict(step=n, loss=[n / 3] * 5))

def assert_step(folder):
    "A checkpoint holds what was saved under its number"
    n = int(folder.name[5:])
    tensors, state = load_checkpoint(folder)
    assert state == dict(step=n, loss=[n / 3] * 5) and tensors.keys() == some_tensors(n).keys()
    for file, named in some_tensors(n).items():
        assert named.keys() == tensors[file].keys() and all(t.dtype == tensors[file][k].dtype and t.equal(tensors[file][k]) for k, t in named.items())

def assert_run(run, least):
    "Whatever happened: each complete checkpoint is right, at least `least` are there, what else there is is swept, and the next save works"
    found = checkpoints(run)
    for p in found: assert_step(p)
    assert set(least) <= {int(p.name[5:]) for p in found}
    others = {p.name for p in run.iterdir()} - {p.name for p in found} - {'.lock'}
    with warnings.catch_warnings(record=True) as said: warnings.simplefilter('always'); gone = sweep(run)
    assert {p.name for p in gone} == others and len(said) == bool(others) and all(name in str(w.message) for w in said for name in others)
    assert checkpoints(run) == found
    for n in (2, 99):
        if not (run/f'step-{n}').exists(): assert_step(save(run, n))

# --- faults -----------------------------------------------------------------------------------------------------------------------

EVENTS = {'open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.listdir', 'os.scandir', 'os.truncate'}
active = None                                                     # an audit hook stays for ever; this switches it
sys.addaudithook(lambda event, args: active and event in EVENTS and active.call(event, args))

class Faults:
    "Count the calls to the file system below `root` and let something happen before some of them"
    def __init__(self, root, hit=lambda n, event: False, do=lambda: None): self.root, self.hit, self.do, self.seen = str(root), hit, do, []
    def call(self, event, args, half=lambda: None):
        global active
        if args and isinstance(args[0], (str, os.PathLike)) and not os.fspath(args[0]).startswith(self.root): return
        self.seen.append(event)
        if not self.hit(len(self.seen), event): return
        active, was = None, self                                  # what the fault itself does is not counted
        try: half(); self.do()
        finally: active = was

    @contextmanager
    def on(self, monkeypatch):
        global active
        fsync, faults = os.fsync, self
        class File:                                               # a file whose writes can fail half way
            def __init__(self, f): self.f = f
            def __getattr__(self, name): return getattr(self.f, name)
            def __enter__(self): return self
            def __exit__(self, *_): self.f.close()
            def write(self, data):
                data = memoryview(data).cast('B') if len(data) else b''
                faults.call('write', (), lambda: (self.f.write(data[:len(data)//2]), self.f.flush()))
                return self.f.write(data)
        with monkeypatch.context() as m:
            m.setattr(os, 'fsync', lambda fd: (faults.call('fsync', ()), fsync(fd))[1])
            m.setattr(ck, 'open', lambda path, mode: File(builtins.open(path, mode)) if 'x' in mode else builtins.open(path, mode), raising=False)
            active = self
            try: yield self
            finally: active = None

def fail(number):
    def do(): raise OSError(number, os.strerror(number))
    return do

def die(): os.kill(os.getpid(), signal.SIGKILL)

def in_child(f):
    "Run f in a process of its own; how it ended"
    if pid := os.fork(): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try: f()
    except BaseException as e: print(type(e), e, file=sys.stderr); os._exit(1)
    os._exit(0)

def piecewise(old, new):
    "A rename as on some mounted drives: copied, in no useful order, then removed"
    if Path(old).is_dir():
        os.mkdir(new)
        for p in sorted(Path(old).iterdir()): piecewise(p, Path(new)/p.name)
        return os.rmdir(old)
    data = Path(old).read_bytes()
    for part in (b'', data[:len(data)//2], data): Path(new).write_bytes(part)      # each an open, so a moment to die
    os.remove(old)

def n_calls(tmp_path, monkeypatch, what):
    with Faults(tmp_path).on(monkeypatch) as f: what()
    return len(f.seen)

@pytest.fixture
def run(tmp_path):
    save(tmp_path/'run', 1)
    return tmp_path/'run'

@pytest.fixture
def cost(tmp_path, monkeypatch):
    "Calls of one save"
    (tmp_path/'other').mkdir()
    with Faults(tmp_path).on(monkeypatch) as f: save(tmp_path/'other', 1)
    assert {'write', 'fsync', 'open', 'os.mkdir', 'os.rename'} <= set(f.seen) and f.seen.count('write') >= 6 and f.seen.count('os.rename') == 2
    return len(f.seen)

@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EEXIST, errno.ENOTEMPTY])
def test_every_call_fails(run, cost, monkeypatch, number):
    for k in range(1, cost + 1):
        with Faults(run, lambda n, e: n == k, fail(number)).on(monkeypatch), pytest.raises(OSError) as e: save(run, 2)
        assert e.value.errno == number and str(run/'step-2') in str(e.value) and re.search(r'needs [0-9,]+ bytes', str(e.value))
        assert [p.name for p in run.iterdir()] == ['step-1'], f'call {k} failed: something is left'
    assert_run(run, [1])

@pytest.mark.parametrize('removes', [True, False])
def test_every_call_fails_from_then_on(run, cost, monkeypatch, removes):
    "A disk that becomes read-only; or one that can still remove"
    for k in range(1, cost + 1):
        writing = {'write', 'fsync', 'os.mkdir', 'os.rename'} | ({'os.remove', 'os.rmdir'} if not removes else set())
        with Faults(run, lambda n, e: n >= k and e in writing, fail(errno.EIO)).on(monkeypatch) as f:
            try: save(run, 2)
            except OSError as e: assert e.errno == errno.EIO and 'needs' in str(e)
            else: assert not any(e in writing for e in f.seen[k - 1:])
        if removes: assert [p.name for p in run.iterdir() if p.name != 'step-2'] == ['step-1'] and (not (run/'step-2').exists() or (run/'step-2') in checkpoints(run))
        assert_step(run/'step-1')
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); sweep(run)
        for p in checkpoints(run)[1:]: assert_step(p); shutil.rmtree(p)
    assert_run(run, [1])

@pytest.mark.parametrize('rename', [os.rename, piecewise])
def test_killed_before_every_call(tmp_path, run, monkeypatch, rename):
    monkeypatch.setattr(os, 'rename', rename)
    cost, ended = n_calls(tmp_path, monkeypatch, lambda: save(tmp_path/'other', 1)), set()
    for k in range(1, cost + 2):
        def child():
            with Faults(run, lambda n, e: n == k, die).on(monkeypatch): save(run, 2)
        ended.add(in_child(child))
        done = (run/'step-2') in checkpoints(run)
        assert_run(run, [1, 2] if k > cost else [1])
        assert done or k <= cost
        for p in checkpoints(run)[1:]: shutil.rmtree(p)
    assert ended == {-signal.SIGKILL, 0}

@pytest.mark.parametrize('rename', [os.rename, piecewise])
def test_rename_fails_half_way(tmp_path, run, monkeypatch, rename):
    "An error, not a kill, within a rename: what was copied is removed"
    monkeypatch.setattr(os, 'rename', rename)
    (tmp_path/'other').mkdir()
    for k in range(1, n_calls(tmp_path, monkeypatch, lambda: save(tmp_path/'other', 1)) + 1):
        with Faults(run, lambda n, e: n == k, fail(errno.EIO)).on(monkeypatch), pytest.raises(OSError): save(run, 2)
        assert [p.name for p in run.iterdir()] == ['step-1'], k
    assert_run(run, [1])

@pytest.mark.parametrize('what', ['prune', 'sweep'])
def test_killed_while_removing(tmp_path, monkeypatch, what):
    def prepare(run):
        for n in (1, 2, 3): save(run, n)
        if what == 'sweep':
            for n in (1, 2): (run/f'step-{n}'/'manifest.json').unlink()
            (run/'step-1').rename(run/'.step-1.0123abcd.tmp')
    def act(run):
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); return prune(run, 1) if what == 'prune' else sweep(run)
    prepare(tmp_path/'count')
    cost = n_calls(tmp_path, monkeypatch, lambda: act(tmp_path/'count'))
    assert checkpoints(tmp_path/'count') == [tmp_path/'count'/'step-3'] and cost > 8
    for k in range(1, cost + 1):
        prepare(run := tmp_path/f'{k}')
        def child():
            with Faults(run, lambda n, e: n == k, die).on(monkeypatch): act(run)
        assert in_child(child) == -signal.SIGKILL
        assert_run(run, [3])

def test_interrupt(run, cost, monkeypatch):
    "Ctrl-C at any call: nothing is left, and the interrupt goes on"
    def interrupt(): raise KeyboardInterrupt
    for k in range(1, cost + 1):
        with Faults(run, lambda n, e: n == k, interrupt).on(monkeypatch), pytest.raises(KeyboardInterrupt): save(run, 2)
        assert [p.name for p in run.iterdir()] == ['step-1']

def test_power_cut(run, monkeypatch):
    "Names and contents that were not synced are lost: the marker is renamed only after every file and folder was"
    synced, order, fsync, rename = [], [], os.fsync, os.rename
    def note_sync(fd): synced.append(os.readlink(f'/proc/self/fd/{fd}')); fsync(fd)
    def note_rename(old, new): order.append((Path(new).name, [s.replace(f'{run}/', '') for s in synced])); synced.clear(); rename(old, new)
    if not Path('/proc/self/fd').exists(): pytest.skip('needs /proc')
    monkeypatch.setattr(os, 'fsync', note_sync); monkeypatch.setattr(os, 'rename', note_rename)
    save(run, 2)
    (first, before), (second, between) = order
    parts = FILES[:3] + ['manifest.part']
    assert first == 'step-2' and second == 'manifest.json'
    assert {re.sub(r'^\.step-2\.[0-9a-f]{8}\.tmp/?', '', s) for s in before} == {'', *parts}
    assert set(between) == {'step-2', str(run), *(f'step-2/{p}' for p in parts)} and synced == [str(run/'step-2')]

def test_folders_that_cannot_be_synced(run, monkeypatch):
    "Some mounted drives cannot; that is no reason not to save. A file that cannot be synced is"
    fsync = os.fsync
    for number in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
        def partly(fd): fail(number)() if stat.S_ISDIR(os.fstat(fd).st_mode) else fsync(fd)
        monkeypatch.setattr(os, 'fsync', partly)
        assert_step(save(run, number + 10))
    monkeypatch.setattr(os, 'fsync', lambda fd: fail(errno.EINVAL)())
    with pytest.raises(OSError, match='needs'): save(run, 2)

def train(run, report):
    "A run as a Learner makes it: goes on from the newest checkpoint, saves, says so, prunes"
    with lock(run), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        sweep(run)
        n = int(newest_good(run).name[5:]) if newest_good(run) else 0
        while True:
            n += 1
            save_checkpoint(run/f'step-{n}', {f: dict(w=torch.full((100, 300), float(n))) for f in 'abc'}, dict(step=n))
            os.write(report, b'%d\n' % n)
            prune(run, 2)

@pytest.mark.parametrize('rename', [os.rename, piecewise])
def test_random_kills(tmp_path, monkeypatch, rename):
    monkeypatch.setattr(os, 'rename', rename)
    start = time.perf_counter(); save(tmp_path/'other', 1)
    cost, rng, last, ended = time.perf_counter() - start, random.Random(0), 0, []
    for _ in range(20):
        out, report = os.pipe()
        if not (child := os.fork()):
            try: train(tmp_path/'run', report)
            finally: os._exit(1)
        os.close(report)
        with open(out) as f:
            reported = [f.readline() for _ in range(rng.randrange(3))]      # after so many, and then at a random moment of the next
            time.sleep(rng.random() * 2 * cost)
            os.kill(child, signal.SIGKILL)
            ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            last = max([last, *map(int, reported + f.readlines())])
        for p in checkpoints(tmp_path/'run'):
            tensors, state = load_checkpoint(p)
            assert p.name == f'step-{state["step"]}' and all((t['w'] == state['step']).all() for t in tensors.values())
        if last: assert int(newest_good(tmp_path/'run').name[5:]) >= last         # nothing that was finished is lost
    assert ended == [-signal.SIGKILL] * 20 and last >= 10

def test_file_size_limit(run):
    "A real limit of the kernel, at many sizes: the error is EFBIG, as ENOSPC would be on a full disk"
    total, ended = sum(p.stat().st_size for p in (run/'step-1').iterdir()), []
    for limit in range(0, total, 37):
        def child():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try: save(run, 2)
            except OSError as e: assert e.errno == errno.EFBIG and 'needs' in str(e) and [p.name for p in run.iterdir()] == ['step-1']
            else: assert_step(run/'step-2'); shutil.rmtree(run/'step-2')
        ended.append(in_child(child))
    assert set(ended) == {0} and len(ended) > 20
    assert_run(run, [1])

def test_read_only_folder():
    "As a user who may not write there; root becomes one"
    run = Path(tempfile.mkdtemp())/'run'
    save(run, 1)
    run.parent.chmod(0o755); run.chmod(0o555)
    def child():
        if os.geteuid() == 0: os.setuid(65534)
        with pytest.raises(PermissionError, match='needs'): save(run, 2)
        with pytest.raises(PermissionError), lock(run): pass
        with pytest.warns(UserWarning, match='step-1 could not be removed'): save_and_prune(run)
        assert_step(run/'step-1')
    def save_and_prune(run):
        with pytest.MonkeyPatch.context() as m: m.setattr(ck, 'checkpoints', lambda run: [run/'step-1', run/'step-2']); assert prune(run, 1) == []
    assert in_child(child) == 0 and [p.name for p in run.iterdir()] == ['step-1']
    run.chmod(0o755); shutil.rmtree(run.parent)

# --- damage -----------------------------------------------------------------------------------------------------------------------

def assert_damaged(run, file, n=2):
    "Loading step n names the file and offers step 1"
    with pytest.raises(CheckpointError) as e: load_checkpoint(run/f'step-{n}')
    assert str(run/f'step-{n}'/file) in str(e.value) and f'{run}/step-1 is whole' in str(e.value)
    with pytest.raises(CheckpointError): verify_checkpoint(run/f'step-{n}')
    assert newest_good(run) == run/'step-1'

@pytest.mark.parametrize('file', FILES)
def test_every_byte_flipped(run, file):
    path, rng = save(run, 2)/file, random.Random(file)
    good = path.read_bytes()
    for i in range(len(good)):
        bad = bytearray(good); bad[i] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError) as e: load_checkpoint(run/'step-2')
        assert str(path) in str(e.value) and f'{run}/step-1 is whole' in str(e.value)
    path.write_bytes(good)
    assert_step(run/'step-2')

@pytest.mark.parametrize('file', FILES)
def test_file_not_as_it_was(run, tmp_path, file):
    path = save(run, 2)/file
    good = path.read_bytes()
    for bad in (b'', good[:-1], good[:len(good)//2], good + b'\n', good + b'\0', bytes(len(good)), pickle.dumps({}), random.Random(0).randbytes(len(good))):
        path.write_bytes(bad); assert_damaged(run, file)
    path.unlink()
    (tmp_path/'good').write_bytes(good)
    for make in (lambda: path.symlink_to(tmp_path/'good'), lambda: path.symlink_to(tmp_path/'nowhere'), lambda: os.mkfifo(path)):
        make(); assert_damaged(run, file); path.unlink()
    path.mkdir(); assert_damaged(run, file); path.rmdir()
    (run/'step-2'/'manifest.part').touch(); path.write_bytes(good); assert_damaged(run, 'manifest.json'); (run/'step-2'/'manifest.part').unlink(); path.unlink()
    if file == 'manifest.json':                                             # without it the checkpoint is none
        assert checkpoints(run) == [run/'step-1'] and newest_good(run) == run/'step-1'
        with pytest.raises(CheckpointError, match='manifest.json.*step-1 is whole'): load_checkpoint(run/'step-2')
    else: assert_damaged(run, file)
    path.write_bytes(good); assert_step(run/'step-2')

def test_unreadable_disk(run, monkeypatch):
    "An error while reading names the file, as damage does"
    save(run, 2)
    for file in FILES:
        def broken(path, mode): return fail(errno.EIO)() if Path(path) == run/'step-2'/file else io.open(path, mode)
        with monkeypatch.context() as m: m.setattr(ck, 'open', broken, raising=False); assert_damaged(run, file)

def test_what_is_offered(run):
    for n in (2, 3, 10): save(run, n)
    (run/'step-2'/'state.json').write_text('{}'); (run/'step-3'/'state.json').unlink()
    with pytest.raises(CheckpointError, match='step-1 is whole'): load_checkpoint(run/'step-3')
    assert newest_good(run) == run/'step-10' and newest_good(run, before='step-10') == run/'step-1' and newest_good(run, before=run/'step-1') is None
    (run/'step-1'/'state.json').unlink()
    with pytest.raises(CheckpointError, match='No checkpoint before it is whole'): load_checkpoint(run/'step-3')
    for nothing in (run/'step-77', run/'nowhere'/'step-1', run/'step-10'/'state.json'):
        with pytest.raises(CheckpointError, match=re.escape(str(nothing))): load_checkpoint(nothing)

# --- hostile files ----------------------------------------------------------------------------------------------------------------

def forge(folder, change=lambda m: None, **contents):
    "A checkpoint by somebody who can make manifests: any content, sums that fit"
    shutil.rmtree(folder, ignore_errors=True); folder.mkdir(parents=True)
    contents = {'state.json': b'{}'} | {k.replace('__', '.'): v for k, v in contents.items()}
    for name, data in contents.items(): (folder/name).write_bytes(data)
    manifest = dict(format=1, versions={}, files={k: dict(bytes=len(v), sha256=hashlib.sha256(v).hexdigest()) for k, v in contents.items()})
    change(manifest)
    sealed = manifest | {'sha256': hashlib.sha256(json.dumps(manifest).encode()).hexdigest()}
    (folder/'manifest.json').write_bytes(json.dumps(sealed, indent=1).encode() + b'\n')
    return folder

def test_forged_is_read(tmp_path): assert load_checkpoint(forge(tmp_path/'step-1', model__safetensors=library_save({'w': torch.ones(3)})))[0]['model']['w'].sum() == 3

NAMES = ['../x', '..\\x', '/etc/passwd', 'C:\\x', 'c:x', 'a/b', 'a\\b', '', '.', '..', 'x.pkl', 'model.bin', 'con.safetensors', 'NUL.safetensors', 'com1.safetensors',
         '.x.safetensors', 'a\0.safetensors', 'é.safetensors', 'x.safetensors ', 'x.safetensors\n', 'x' * 300 + '.safetensors', 'manifest.json', 'x:y.safetensors', '٣.safetensors', 'ſtate.json', 'x.ſafetensors']

@pytest.mark.parametrize('name', NAMES)
def test_names(tmp_path, name):
    (tmp_path/'x').write_bytes(b'')
    entry = dict(bytes=0, sha256=hashlib.sha256(b'').hexdigest())
    with pytest.raises(CheckpointError, match='manifest.json.*must list'): load_checkpoint(forge(tmp_path/'step-1', lambda m: m['files'].update({name: entry})))
    stem = name.removesuffix('.safetensors')
    if stem != name or '.' not in name:
        with pytest.raises(LmnotesError, match='a file in tensors'): save_checkpoint(tmp_path/'step-2', {stem: {}}, {})
    assert not (tmp_path/'step-2').exists()

@pytest.mark.parametrize('change', [
    lambda m: m['files'].update({'A.safetensors': m['files']['a.safetensors']}), lambda m: m['files'].pop('state.json'), lambda m: m.update(files=[]), lambda m: m.update(files={}),
    lambda m: m.pop('files'), lambda m: m.update(format=2), lambda m: m.pop('format'), lambda m: m['files'].update({'a.safetensors': None}), lambda m: m['files'].update({'a.safetensors': {}}),
    lambda m: m['files']['a.safetensors'].update(bytes=-1), lambda m: m['files']['a.safetensors'].update(sha256=None), lambda m: m.update(versions='x' * 2_000_000)])
def test_manifests(tmp_path, change):
    with pytest.raises(CheckpointError, match='manifest.json|a.safetensors'): load_checkpoint(forge(tmp_path/'step-1', change, a__safetensors=library_save({})))

@pytest.mark.parametrize('text', [b'[]', b'3', b'null', b'', b'{"format": NaN}', b'{"format": 1, "format": 1}', b'\xff', b'[' * 100_000, b'{"a":' * 100_000, b'"\\ud800"', b'1' * 5000])
def test_json(tmp_path, text):
    folder = forge(tmp_path/'step-1')
    (folder/'manifest.json').write_bytes(text)
    with pytest.raises(CheckpointError, match='manifest.json'): load_checkpoint(folder)
    if text in (b'[]', b'3', b'null', b'"\\ud800"'): return
    with pytest.raises(CheckpointError, match='state.json'): load_checkpoint(forge(folder, state__json=text))

def header(text, data=b''): return len(text).to_bytes(8, 'little') + text + data
def one(**kw): return json.dumps(dict(w=dict(dtype='F32', shape=[2], data_offsets=[0, 8]) | kw)).encode()
class Canary:
    def __reduce__(self): return os.mkdir, ('canary',)

HOSTILE = dict(
    huge=b'\xff' * 8 + b'{}', long=(2**40).to_bytes(8, 'little') + b'{}', short=b'\x02', empty=b'', no_json=header(b'{nope'), utf8=header(b'{"\xff": 1}'), a_list=header(b'[]'),
    hole=header(one(data_offsets=[4, 12]), bytes(12)), trailing=header(one(), bytes(9)), cut=header(one(), bytes(7)), backwards=header(one(data_offsets=[8, 0]), bytes(8)),
    overlap=header(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}', bytes(3)),
    same=header(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', bytes(2)),
    twice=header(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', bytes(2)),
    dtype=header(one(dtype='F33'), bytes(8)), wide=header(one(dtype='F64'), bytes(8)), shape=header(one(shape=[3]), bytes(8)), overflow=header(one(shape=[2**62, 2**62, 8]), bytes(8)),
    wraps=header(one(shape=[2**61, 8]), bytes(8)), negative=header(one(shape=[-2, -1]), bytes(8)), nothing=header(one(shape=[0, 2**70], data_offsets=[0, 0])), text=header(one(shape='2'), bytes(8)),
    no_shape=header(b'{"w":{"dtype":"F32","data_offsets":[0,8]}}', bytes(8)), offsets=header(one(data_offsets=[0]), bytes(8)), deep=header(b'{"a":' * 50_000 + b'}' * 50_000), nan=header(one(shape=[float('nan')])),
    claims=header(one(dtype='U8', shape=[2**45], data_offsets=[0, 2**45]), bytes(8)), zero=header(one(shape=[0, -1], data_offsets=[0, 0])), pickle=pickle.dumps(Canary()), pickle0=pickle.dumps(Canary(), 0), zip=b'PK\3\4' + bytes(100))

@pytest.mark.parametrize('kind', HOSTILE)
def test_hostile_tensors(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'x').write_bytes(HOSTILE[kind])
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path/'x'))) as e: read_tensors(tmp_path/'x')
    assert ('pickle or zip' in str(e.value)) == (kind in ('pickle', 'zip'))
    assert kind != 'claims' or 'not all there' in str(e.value)              # before any memory is asked for
    with pytest.raises(CheckpointError, match='model.safetensors'): load_checkpoint(forge(tmp_path/'step-1', model__safetensors=HOSTILE[kind]))
    assert not Path('canary').exists()

def test_header_cap(tmp_path):
    "A header above the library's limit is not even read"
    with open(tmp_path/'x', 'wb') as f: f.write((150_000_000).to_bytes(8, 'little')); f.truncate(200_000_000)      # takes no room on the disk
    with pytest.raises(CheckpointError, match='its start is not of safetensors'): read_tensors(tmp_path/'x')

@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_more_than_the_library(tmp_path_factory, data):
    "A file with changed bytes: what we read, the library reads, and the same"
    good = library_save({'a': torch.arange(6.).view(2, 3), 'b': torch.ones(2, dtype=torch.int64)})
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))): bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'{}[]",:0123456789')))
    path = tmp_path_factory.getbasetemp()/'changed'
    path.write_bytes(bad)
    try: ours = read_tensors(path)
    except CheckpointError: return
    theirs = library_load(bytes(bad))
    assert ours.keys() == theirs.keys() and all(t.dtype == theirs[n].dtype and t.shape == theirs[n].shape and t.equal(theirs[n]) or t.isnan().any() for n, t in ours.items())

def test_what_cannot_be_stored(tmp_path):
    for state in ({'a': float('nan')}, {'a': [1, {'b': float('inf')}]}, {'a': {1: 2}}, {'a': {None: 2}}, {'a': b'x'}, {'a': torch.ones(1)}, {'a': {1, 2}}, {'a': 1j}, {'a': object()}):
        with pytest.raises(LmnotesError, match=r"^state\['a'\]"): save_checkpoint(tmp_path/'step-1', {}, state)
    for bad in (None, [], 'x', {1: 2}):
        with pytest.raises(LmnotesError, match='^state'): save_checkpoint(tmp_path/'step-1', {}, bad)
    for t in (None, 3., [1.], torch.ones(2, 2).to_sparse(), torch.ones(2, device='meta'), torch.ones(2, dtype=torch.complex64)):
        with pytest.raises(LmnotesTypeError, match=r"^tensors\['m'\]\['w'\]"): save_checkpoint(tmp_path/'step-1', {'m': {'w': t}}, {})
    for tensors in ({'m': {3: torch.ones(1)}}, {'m': {'__metadata__': torch.ones(1)}}, {'m': {}, 'M': {}}, {3: {}}):
        with pytest.raises(LmnotesError, match='tensors'): save_checkpoint(tmp_path/'step-1', tensors, {})
    assert list(tmp_path.iterdir()) == []

def test_what_is_there_stays(tmp_path):
    for name, make in dict(a=Path.touch, b=Path.mkdir, c=lambda p: p.symlink_to('nowhere')).items():
        make(tmp_path/name)
        with pytest.raises(LmnotesError, match='^folder'): save_checkpoint(tmp_path/name, {}, {})
    assert {p.name for p in tmp_path.iterdir()} == set('abc')

def test_a_folder_that_came_meanwhile(run, monkeypatch):
    "Two writers without a lock: the second fails and takes nothing away from the first"
    rename, once = os.rename, iter([1])
    def other_first(old, new):
        if next(once, 0): save(run, 2)
        rename(old, new)
    monkeypatch.setattr(os, 'rename', other_first)
    with pytest.raises(OSError): save_checkpoint(run/'step-2', {}, {'mine': 1})
    assert_run(run, [1, 2])

def test_every_kind_of_tensor(tmp_path):
    x = torch.arange(24.).view(2, 3, 4)
    named = {str(d): torch.arange(5).to(d) for d in ck._codes if not str(d).startswith('torch.float8')} | {'8': torch.ones(3).to(torch.float8_e4m3fn)}
    named |= dict(t=x.mT, part=x[:, 1:], wide=torch.ones(1).expand(4, 3), scalar=torch.tensor(2.), none=torch.zeros(0, 3), p=torch.nn.Parameter(torch.ones(3)), tied=x, **{'ü"\n': torch.ones(1)})
    (tensors, _), folder = load_checkpoint(save_checkpoint(tmp_path/'step-1', {'m': named}, {})), tmp_path/'step-1'
    theirs = library_load((folder/'m.safetensors').read_bytes())
    for n, t in named.items():
        for got in (tensors['m'][n], theirs[n]): assert got.dtype == t.dtype and got.shape == t.shape and got.contiguous().view(-1).view(torch.uint8).equal(t.detach().contiguous().view(-1).view(torch.uint8))
    assert len({t.untyped_storage().data_ptr() for t in tensors['m'].values() if t.numel()}) == len(named) - 1     # each owns its memory
    raw = (folder/'m.safetensors').read_bytes()
    start = 8 + int.from_bytes(raw[:8], 'little')
    spans = json.loads(raw[8:start]).items()
    assert start % 8 == 0 and all(t['data_offsets'][0] % named[n].element_size() == 0 for n, t in spans if n != '__metadata__')
    assert load_file(folder/'m.safetensors').keys() == named.keys()        # the library maps the file: all must lie aligned
    (tmp_path/'lib').write_bytes(library_save({n: t.detach().contiguous().clone() for n, t in named.items()}))
    assert read_tensors(tmp_path/'lib').keys() == named.keys()

def test_memory(tmp_path):
    "Loading takes the memory of the tensors once; saving that of few tensors; a file cut off later does no harm"
    if not Path('/proc/self/clear_refs').exists(): pytest.skip('needs Linux')
    code = '''
import os, sys, torch
from lmnotes.checkpoints import *
from pathlib import Path
def kb(what): return next(int(s.split()[1]) for s in open('/proc/self/status') if s.startswith(what))
def peak(f):
    open('/proc/self/clear_refs', 'w').write('5'); was = kb('VmRSS'); f(); return (kb('VmHWM') - was) / 1024
folder, n, kept = Path(sys.argv[1])/'step-1', 16, []
x = {str(i): torch.randn(n, 2**16) for i in range(16)}                      # 16 tensors of 4 MB
save_checkpoint(folder.with_name('first'), {'m': {'w': x['0']}}, {}); load_checkpoint(folder.with_name('first'))
print(peak(lambda: save_checkpoint(folder, {'m': {k: v.T for k, v in x.items()}}, {})))
print(peak(lambda: kept.append(load_checkpoint(folder))))
os.truncate(folder/'m.safetensors', 100)
assert all(v.T.equal(x[k]) for k, v in kept[0][0]['m'].items())
'''
    r = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True, env=os.environ | dict(MALLOC_MMAP_THRESHOLD_='65536'))
    assert r.returncode == 0, r.stderr
    saving, loading = map(float, r.stdout.split())
    assert saving < 16 and 60 < loading < 80                                # MB, of 64 MB

# --- a run's folder ---------------------------------------------------------------------------------------------------------------

def test_order_and_links(tmp_path):
    for n in (9, 10, 1_000_000): save(tmp_path, n)
    save_checkpoint(tmp_path/'step-000100', {}, {})
    for name in ('step-5', 'step-', 'step-x', 'step-1e3', 'step--1', 'step-7.tmp', 'xstep-8', 'step-²', 'STEP-8'): (tmp_path/name).mkdir()
    (tmp_path/'step-3').touch(); (tmp_path/'step-11').symlink_to(tmp_path/'step-10'); (tmp_path/'best').symlink_to(tmp_path/'step-10')
    assert [p.name for p in checkpoints(tmp_path)] == ['step-9', 'step-10', 'step-000100', 'step-1000000']
    assert checkpoints(tmp_path/'nowhere') == checkpoints(tmp_path/'step-3') == [] and newest_good(tmp_path/'nowhere') is None and sweep(tmp_path/'nowhere') == []
    assert load_checkpoint(tmp_path/'best')[1]['step'] == 10

def test_a_drive_that_answers_wrongly(run, monkeypatch):
    "Whether a checkpoint is complete is read from the folder's list of names: a look-up that fails removes nothing"
    monkeypatch.setattr(os.path, 'lexists', lambda p: False); monkeypatch.setattr(os.path, 'exists', lambda p: False)
    assert checkpoints(run) == [run/'step-1'] and sweep(run) == []
    monkeypatch.setattr(os, 'listdir', lambda p: fail(errno.EIO)())
    for look in (checkpoints, sweep, newest_good, lambda run: prune(run, 1)):
        with pytest.raises(OSError): look(run)
    monkeypatch.undo()
    assert_step(run/'step-1')

def test_default_device(run):
    with torch.device('meta'): tensors, _ = load_checkpoint(run/'step-1')
    assert tensors['model']['w'].sum() == 35

def tree(folder): return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob('*')}

def test_sweep_touches_nothing_else(tmp_path):
    save(tmp_path, 1)
    for path in ('notes.txt', 'step-2/config.json', 'step-2/model.safetensors', 'step-3/sub/state.json', 'step-x/state.json', '.step-4.tmp/x', '.step-4.12345.tmp/x', '.step-a.0123abcd.tmp/x', 'data/.step-4.0123abcd.tmp/x',
                 'step-final/state.json', '.lock', '.step-5.0123abcd.tmp', 'step-6', 'sub/step-7/state.json', 'step-8/pytorch_model.bin', 'other.tmp/x'):
        (tmp_path/path).parent.mkdir(parents=True, exist_ok=True); (tmp_path/path).write_text(path)
    (tmp_path/'data'/'step-1').mkdir(); (tmp_path/'step-9').symlink_to(tmp_path/'data'/'step-1'); (tmp_path/'.step-9.0123abcd.tmp').symlink_to(tmp_path/'data')
    (tmp_path/'step-10').mkdir(); (tmp_path/'step-10'/'model.safetensors').symlink_to(tmp_path/'notes.txt')
    before = tree(tmp_path)
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert sweep(tmp_path) == [] and tree(tmp_path) == before
    ours = ['.step-11.0123abcd.tmp', 'step-12', 'step-13']
    for name in ours: (tmp_path/name).mkdir()
    (tmp_path/'step-12'/'state.json').touch(); (tmp_path/'.step-11.0123abcd.tmp'/'x').touch()
    with pytest.warns(UserWarning, match='step-11.*step-12.*step-13') as said: assert [p.name for p in sweep(tmp_path)] == ours
    assert len(said) == 1 and tree(tmp_path) == before

def test_prune(tmp_path, monkeypatch):
    for n in range(1, 7): save(tmp_path, n)
    (tmp_path/'step-6'/'manifest.json').unlink(); (tmp_path/'mine').touch()
    assert [p.name for p in prune(tmp_path, 2, always=tmp_path/'step-1')] == ['step-2', 'step-3']
    assert [p.name for p in prune(str(tmp_path), 2, always=['step-1'])] == [] and prune(tmp_path, 9) == []
    assert {p.name for p in tmp_path.iterdir()} == {'step-1', 'step-4', 'step-5', 'step-6', 'mine'}
    for bad in (0, -1, None, 1.5, True and 'x'):
        with pytest.raises(LmnotesError, match='^keep'): prune(tmp_path, bad)
    with Faults(tmp_path, lambda n, e: e == 'os.remove', fail(errno.EBUSY)).on(monkeypatch), pytest.warns(UserWarning, match='step-1 could not be removed'): assert prune(tmp_path, 2) == []
    assert_step(tmp_path/'step-1')

HOLD = 'import sys, time\nfrom lmnotes.checkpoints import lock\nwith lock(sys.argv[1]):\n    {}print("held", flush=True)\n    time.sleep(60)'

@contextmanager
def held(run, extra=''):
    "Another process holds the lock; killed at the end"
    p = subprocess.Popen([sys.executable, '-c', HOLD.format(extra), str(run)], stdout=subprocess.PIPE, text=True)
    try: assert p.stdout.readline() == 'held\n'; yield p
    finally: p.kill(); p.wait(); p.stdout.close()

def test_lock(tmp_path):
    with held(tmp_path/'new'/'run') as p:
        for _ in range(2):
            with pytest.raises(LmnotesError, match=rf'process {p.pid} on '), lock(tmp_path/'new'/'run'): pass
        with lock(tmp_path/'other'): pass
    with lock(tmp_path/'new'/'run'):                                        # the holder was killed
        (tmp_path/'link').symlink_to(tmp_path/'new'/'run')
        for again in (tmp_path/'new'/'run', tmp_path/'new'/'..'/'new'/'run', tmp_path/'link'):
            with pytest.raises(LmnotesError, match='this process'), lock(again): pass
        r = subprocess.run([sys.executable, '-c', HOLD.format(''), str(tmp_path/'new'/'run')], capture_output=True, text=True)
        assert r.returncode == 1 and f'process {os.getpid()} on ' in r.stderr
    with pytest.raises(ZeroDivisionError), lock(tmp_path/'new'/'run'): raise ZeroDivisionError
    with lock(tmp_path/'link'): pass

def test_lock_of_a_killed_process_whose_children_live(tmp_path):
    "As the workers of a loader do, for a while"
    with held(tmp_path, 'import os; sys.stdout.flush(); c = os.fork(); c or (os.close(1), time.sleep(60), os._exit(0)); print(c, file=open(sys.argv[1] + "/child", "w"))\n    '): pass
    child = int((tmp_path/'child').read_text())
    os.kill(child, 0)                                                       # it lives
    try:
        with lock(tmp_path): assert (tmp_path/'.lock').read_text().startswith(f'process {os.getpid()} ')     # ours now, not the dead one's
    finally: os.kill(child, signal.SIGKILL)

def test_lock_where_there_are_none(tmp_path, monkeypatch):
    import fcntl
    monkeypatch.setattr(fcntl, 'lockf', lambda *_: fail(errno.ENOLCK)())
    with pytest.warns(UserWarning, match='no second run'), lock(tmp_path): save(tmp_path, 1)
    assert_step(tmp_path/'step-1')

def test_lock_follows_no_link(tmp_path):
    (tmp_path/'precious').write_text('x'); (tmp_path/'.lock').symlink_to(tmp_path/'precious')
    with pytest.raises(OSError), lock(tmp_path): pass
    assert (tmp_path/'precious').read_text() == 'x'

def test_lock_on_windows(tmp_path, monkeypatch):
    "The other branch, with a stand-in for msvcrt"
    calls = []
    def locking(fd, mode, n):
        calls.append((os.lseek(fd, 0, os.SEEK_CUR), mode, n))
        if len(calls) > 1: fail(errno.EACCES)()
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    monkeypatch.setitem(sys.modules, 'msvcrt', types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    with lock(tmp_path): ck._held.clear(); assert (tmp_path/'.lock').read_text().startswith(f'process {os.getpid()} ')
    with pytest.raises(LmnotesError, match=f'process {os.getpid()} on '), lock(tmp_path): pass
    assert calls == [(2**30, 2, 1)] * 2

def test_without_posix(tmp_path):
    "No fcntl, no resource, folders that cannot be opened: import, save and load work"
    code = '''
import os, sys
for m in ('fcntl', 'resource', 'pwd', 'grp'): sys.modules.setdefault(m, None)
import pathlib, torch
from lmnotes import checkpoints as ck
class OS:
    name = 'nt'
    def __getattr__(self, n): return getattr(os, n)
    def open(self, path, *a): assert not os.path.isdir(path); return os.open(path, *a)
ck.os = OS()
p = ck.save_checkpoint(pathlib.Path(sys.argv[1])/'step-1', dict(m=dict(w=torch.ones(2))), {})
assert ck.load_checkpoint(p)[0]['m']['w'].sum() == 2 and ck.prune(p.parent, 1) == []
'''
    r = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
