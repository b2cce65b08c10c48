"The bench harness itself, on contestants whose times are known. No timing is asserted."
import json, os

import harness, pytest
from harness import Row, Seconds, measure, spread


def fixed(*seconds):
    "A contestant that reports these times in turn, the first as its warm-up."
    times = iter(seconds)
    return lambda: Seconds(next(times))


def test_ratio_and_quartiles():
    peer = [8., 8, 9, 10, 11, 12, 13, 14]
    r = measure(Row('x', ours=fixed(*[1.] * 8), peer=fixed(*peer), target=9))
    assert r['seconds']['peer'] == peer[1:] and r['ratio'] == dict(low=9.5, median=11, high=12.5) and r['reached']
    assert not measure(Row('x', ours=fixed(*[1.] * 8), peer=fixed(*peer), target=9.6))['reached']         # the lower quartile counts, not the median


def test_times_are_per_item():
    r = measure(Row('x', ours=fixed(*[2.] * 8), ours_items=100, peer=fixed(*[3.] * 8), peer_items=5, target=30))
    assert r['ratio']['median'] == pytest.approx((3 / 5) / (2 / 100)) and r['reached']


def test_limit():
    ours = fixed(.5, .1, .1, .1, .1, .2, .3, .3)
    r = measure(Row('x', ours=ours, limit=.26))
    assert r['ours'] == pytest.approx(dict(low=.1, median=.1, high=.25)) and r['reached'] and 'ratio' not in r


def test_pairs_alternate():
    calls = []
    measure(Row('x', ours=lambda: calls.append('o') or Seconds(1), peer=lambda: calls.append('p') or Seconds(1), target=1))
    assert ''.join(calls) == 'op' + 'op' + 'po' + 'op' + 'po' + 'op' + 'po' + 'op'
    with pytest.raises(ValueError, match='pairs is 6'): measure(Row('x', ours=lambda: Seconds(1), peer=lambda: Seconds(1), target=1), pairs=6)


def test_short_calls_are_repeated():
    calls = []
    r = measure(Row('x', ours=lambda: calls.append(1), peer=lambda: Seconds(1), target=1))
    assert len(calls) > 100 and 0 < r['ours']['median'] < harness.MIN_SECONDS


def test_a_float_that_a_call_returns_is_no_time():
    r = measure(Row('x', ours=lambda: 1e6, peer=lambda: Seconds(1), target=1))
    assert r['ours']['median'] < 1e3


def test_check_comes_first():
    def wrong(): raise AssertionError('they disagree')
    with pytest.raises(AssertionError, match='disagree'): measure(Row('x', ours=lambda: Seconds(1), peer=lambda: Seconds(1), target=1, check=wrong))


def test_a_row_needs_a_peer_or_a_limit():
    for wrong in (dict(), dict(target=2), dict(peer=print), dict(peer=print, target=2, limit=1)):
        with pytest.raises(ValueError, match='either a peer'): Row('x', ours=print, **wrong)


def test_table_and_file(tmp_path, monkeypatch):
    (tmp_path/'bench_toy.py').write_text('''
from harness import Row, Seconds, Skip
def rows():
    yield Row('toy', ours=lambda: Seconds(.5), peer=lambda: Seconds(2), target=3, note='of wood')
    raise Skip('no bricks')
''')
    monkeypatch.setattr(harness, 'HERE', tmp_path)
    said = []
    harness.bench('toy', out=tmp_path/'out', show=said.append)
    stored = json.loads((tmp_path/'out'/'toy.json').read_text())
    assert stored['rows'][0]['ratio']['median'] == 4 and stored['skipped'] == 'no bricks' and stored['machine']['python']
    assert said[0].startswith('toy') and said[0].endswith('reached') and said[1:] == ['    of wood', 'toy: skipped: no bricks']


def test_spread(): assert spread([1, 2, 3, 4, 5]) == dict(low=2, median=3, high=4)


def test_memory_rows():
    r = measure(Row('x', unit='B', ours=lambda: harness.Bytes(2e6), peer=lambda: harness.Bytes(26e6), target=12))
    assert r['ratio']['median'] == 13 and r['unit'] == 'B' and 'seconds' not in r and '2 MB' in harness.line(r) and '26 MB' in harness.line(r)
    with pytest.raises(TypeError, match='returned no B'): measure(Row('x', unit='B', ours=lambda: Seconds(1), peer=lambda: harness.Bytes(1), target=1))
    with pytest.raises(TypeError, match='returned no s'): measure(Row('x', ours=lambda: harness.Bytes(1), peer=lambda: Seconds(1), target=1))


@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='peak memory is read from /proc')
def test_peak_memory_sees_what_comes_and_goes():
    peak = harness.peak_memory('setup = bytearray(100 * 2**20)', 'x = bytearray(50 * 2**20); del x')
    assert 49 * 2**20 < peak < 60 * 2**20
