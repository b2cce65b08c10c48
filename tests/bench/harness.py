"""`make bench`: a contestant and its peer, timed alternately in one process.

Each file `tests/bench/bench_NAME.py` has a function `rows()` that yields `Row`s (or raises `Skip('why')`, at any point):

    def rows():
        ids = load_the_input()                                  # made once, outside the timing
        yield Row('fit a 5-gram', ours=lambda: fit(ids), peer=lambda: nltk_fit(ids), target=50)
        yield Row('score', ours=lambda: score(ids), ours_items=len(ids), peer=lambda: nltk_score(ids[:50]), peer_items=50,
                  target=10_000, check=lambda: assert_same_scores(ids[:50]))
        yield Row('import lmnotes', ours=seconds_of_a_fresh_import, limit=.1)
        yield Row('fit, memory', unit='B', ours=lambda: peak_memory(setup, 'fit(ids)'), peer=lambda: peak_memory(setup, 'nltk_fit(ids)'), target=6)

`ours` and `peer` take no arguments. A call is timed from outside, unless it returns `Seconds(x)`: then that is its time (for
what must be measured in another process). With `unit='B'` both return `Bytes(x)`, and what is said of time holds for memory;
`peak_memory` measures it. Where the peer is too slow for the whole input it gets a part, and the `..._items` say how much work each call did: times are compared per item. `check` runs once, before any timing, and raises
where the two do not compute the same thing.

Method: one warm-up call each; then pairs (at least seven), the order within a pair swapped each time; a call shorter than 20 ms is
repeated until it fills them; no garbage collection while the clock runs. The ratio of a pair is the peer's time per item
over ours. A `target` counts as reached when the lower quartile of the ratios reaches it; a `limit` (seconds) when the
upper quartile of our times stays below it. The table goes to the screen, everything to `out/bench/NAME.json`.

    python tests/bench/harness.py [NAME ...] [--pairs 7]
"""
import argparse, gc, importlib.util, json, os, platform, subprocess, sys, time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MIN_PAIRS, MIN_SECONDS = 7, .02


class Skip(Exception):
    "Raised by a bench file for what cannot be timed here; the message says why."


class Seconds(float):
    "A time that a call measured itself."


class Bytes(Seconds):
    "Memory that a call measured itself, for a row with unit='B'."


@dataclass
class Row:
    name: str                             # what is timed, as the table shows it
    ours: Callable                        # the contestant
    peer: Callable | None = None          # what it is compared with
    ours_items: float = 1                 # work done by one call of ours
    peer_items: float = 1                 # work done by one call of peer
    target: float | None = None           # the ratio to reach
    limit: float | None = None            # the seconds to stay below (without a peer)
    check: Callable | None = None         # raises where ours and peer disagree
    note: str = ''                        # what a reader of the table must know
    unit: str = 's'                       # s: seconds; B: bytes, which both calls return

    def __post_init__(self):
        if (self.peer is None) != (self.target is None) or (self.peer is None) != (self.limit is not None):
            raise ValueError(f'{self.name}: a row has either a peer and a target, or a limit')


def once(call, repeats=1):
    "Seconds of one call, the mean over `repeats`."
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(repeats): result = call()
        return result if isinstance(result, Seconds) else (time.perf_counter() - start) / repeats
    finally: gc.enable()


def peak_memory(setup, call):
    "Bytes that the statement `call` adds at its peak to the memory of a new Python that ran `setup`: the largest resident set minus that before."
    code = f"""{setup}
import gc as _gc
def _resident(key): return next(int(s.split()[1]) * 1024 for s in open('/proc/self/status') if s.startswith(key))
_gc.collect()
with open('/proc/self/clear_refs', 'w') as _file: _file.write('5')  # the peak starts anew
_before = _resident('VmRSS')
{call}
print(_resident('VmHWM') - _before)"""
    if not os.path.exists('/proc/self/clear_refs'): raise Skip('peak memory is read from /proc, which only Linux has')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    if done.returncode: raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return Bytes(done.stdout.split()[-1])


def repeats_for(call):
    "How often a call must run to fill the shortest time worth measuring; this is its warm-up too."
    start = time.perf_counter()
    if isinstance(call(), Seconds): return 1
    return max(1, round(MIN_SECONDS / max(time.perf_counter() - start, 1e-9)))


def spread(xs):
    "Lower quartile, median, upper quartile."
    low, _, high = quantiles(xs, n=4, method='inclusive')
    return dict(low=low, median=median(xs), high=high)


def measure(row, pairs=MIN_PAIRS):
    "Time a row; returns what the table and the JSON file show of it."
    if pairs < MIN_PAIRS: raise ValueError(f'pairs is {pairs}, but must be {MIN_PAIRS} or more')
    if row.check: row.check()
    sides = dict(ours=(row.ours, row.ours_items)) | (dict(peer=(row.peer, row.peer_items)) if row.peer else {})
    repeats = {side: repeats_for(call) for side, (call, _) in sides.items()}
    times = {side: [] for side in sides}
    for i in range(pairs):
        for side in sorted(sides, reverse=bool(i % 2)):
            call, items = sides[side]
            x = once(call, repeats[side])
            if isinstance(x, Bytes) != (row.unit == 'B'): raise TypeError(f'{row.name}: {side} returned no {row.unit}')
            times[side].append(x / items)
    result = dict(name=row.name, note=row.note, pairs=pairs, target=row.target, limit=row.limit, unit=row.unit,
                  **{'seconds' if row.unit == 's' else 'bytes': times},
                  **{side: spread(ts) for side, ts in times.items()})
    if row.peer:
        result['ratio'] = spread([p / o for o, p in zip(times['ours'], times['peer'])])
        result['reached'] = result['ratio']['low'] >= row.target
    else: result['reached'] = result['ours']['high'] <= row.limit
    return result


UNITS = dict(s=(('s', 1), ('ms', 1e-3), ('µs', 1e-6), ('ns', 1e-9)), B=(('GB', 1e9), ('MB', 1e6), ('kB', 1e3), ('B', 1)))


def short(x, unit='s'):
    name, size = next((u for u in UNITS[unit] if x >= u[1]), UNITS[unit][-1])
    return f'{x / size:.3g} {name}'


def line(r):
    "A row of the table."
    say = partial(short, unit=r['unit'])
    peer, ratio, goal = '', '', f"under {say(r['limit'])}" if r['limit'] else f"{r['target']:,g} times"
    if 'ratio' in r:
        peer = say(r['peer']['median'])
        ratio = f"{r['ratio']['median']:,.4g} ({r['ratio']['low']:,.4g} to {r['ratio']['high']:,.4g})"
    else: ratio = f"({say(r['ours']['low'])} to {say(r['ours']['high'])})"
    return f"{r['name']:44} {say(r['ours']['median']):>10} {peer:>10}   {ratio:34} {goal:14} {'reached' if r['reached'] else 'MISSED'}"


HEAD = f"{'':44} {'ours':>10} {'peer':>10}   {'peer/ours: median (quartiles)':34} {'target':14}"


def machine():
    "What a reader needs to judge the numbers."
    from importlib.metadata import PackageNotFoundError, version
    def installed(name):
        try: return version(name)
        except PackageNotFoundError: return None
    git = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True)
    cpu = next((s.split(':')[1].strip() for s in open('/proc/cpuinfo') if s.startswith('model name')), None) if os.path.exists('/proc/cpuinfo') else platform.processor()
    return dict(commit=git.stdout.strip() or None, time=time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()), python=platform.python_version(), system=platform.system(),
                cpu=cpu, cores=os.cpu_count(), load=[round(x, 2) for x in os.getloadavg()] if hasattr(os, 'getloadavg') else None,
                versions={n: installed(n) for n in ('lmnotes', 'torch', 'numpy', 'transformers', 'tokenizers', 'datasets', 'nltk', 'kenlm')})


def load(name):
    "The module of tests/bench/bench_NAME.py."
    path = HERE/f'bench_{name}.py'
    if not path.exists(): raise SystemExit(f"no bench {name!r}; there are: {', '.join(names())}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules['harness'] = sys.modules[__name__]                 # so that `from harness import Row` gives these very classes
    spec.loader.exec_module(module)
    return module


def names(): return sorted(p.stem.removeprefix('bench_') for p in HERE.glob('bench_*.py'))


def bench(name, pairs=MIN_PAIRS, out=ROOT/'out'/'bench', show=print):
    "Time every row of one bench file, print them, write out/bench/NAME.json; returns the results."
    results, skipped = [], None
    try:
        for row in load(name).rows():
            results.append(measure(row, pairs))
            show(line(results[-1]))
            if row.note: show(f'    {row.note}')
    except Skip as e:
        skipped = str(e)
        show(f'{name}: skipped: {e}')
    out.mkdir(parents=True, exist_ok=True)
    (out/f'{name}.json').write_text(json.dumps(dict(bench=name, machine=machine(), skipped=skipped, rows=results), indent=1) + '\n', encoding='utf-8')
    return results


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('names', nargs='*', help=f"of {', '.join(names())} (default: all)")
    ap.add_argument('--pairs', type=int, default=MIN_PAIRS, help='at least 7')
    a = ap.parse_args(argv)
    print(HEAD)
    rows = [r for name in a.names or names() for r in bench(name, a.pairs, show=lambda s: print(s, flush=True))]
    print(f"{sum(r['reached'] for r in rows)} of {len(rows)} targets reached")


if __name__ == '__main__': main()
