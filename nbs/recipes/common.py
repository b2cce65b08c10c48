"""What the data recipes share: writing a corpus and its card, always the same bytes from the same rows."""
import hashlib, re
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2]/'lmnotes'/'assets'/'data'
CONTROL = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufffd\ufeff\ud800-\udfff]')   # all but tab and newline

def sha256(path) -> str:
    "The SHA-256 of a file, as 64 hexadecimal digits."
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

def check_rows(name, rows):
    "Refuse a row with a missing value, an empty text, a control character or a character that was lost on the way."
    if not rows: raise ValueError(f'{name}: no rows')
    columns = list(rows[0])
    for i, row in enumerate(rows):
        if list(row) != columns: raise ValueError(f'{name} row {i}: columns {list(row)}, but the first row has {columns}')
        for column, value in row.items():
            if value is None or value == '' and column == 'text': raise ValueError(f'{name} row {i}: {column} is {value!r}')
            if isinstance(value, str) and (bad := CONTROL.search(value)):
                raise ValueError(f'{name} row {i}: {column} holds {bad[0]!r} in {value[max(0, bad.start()-20):bad.end()+20]!r}')

def write_corpus(name:str, # folder to make under out
    splits:dict[str, list[dict]], # train, validation and test: one dict a row, the same columns in each
    card:str, # Markdown: title line, what it is, source, version, licence, how it was made
    out=ASSETS): # folder the corpora live in
    "Write out/name/{train,validation,test}.parquet at zstd level 19 and the card with counts and checksums as README.md."
    import pyarrow as pa, pyarrow.parquet as pq
    folder = Path(out)/name
    folder.mkdir(parents=True, exist_ok=True)
    table = ['| file | rows | characters | bytes on disk | SHA-256 |', '| --- | ---: | ---: | ---: | --- |']
    for split, rows in splits.items(): check_rows(f'{name}/{split}', rows)
    for split, rows in splits.items():
        path, t = folder/f'{split}.parquet', pa.Table.from_pylist(rows)
        pq.write_table(t, path, compression='zstd', compression_level=19, row_group_size=1 << 20, store_schema=False, write_page_checksum=True)
        chars = sum(len(v) for row in rows for k, v in row.items() if k in ('text', 'original', 'modern'))
        table.append(f'| {path.name} | {len(rows):,} | {chars:,} | {path.stat().st_size:,} | `{sha256(path)}` |')
    columns = ', '.join(f'`{c}`' for c in next(iter(splits.values()))[0])
    (folder/'README.md').write_text('\n'.join([card.strip(), '', '## Files', '', f'Columns: {columns}. Parquet, zstd level 19, with a checksum on every page.', '', *table, '',
        f'Made by `python nbs/recipes/data.py {name}`, which gives the same bytes again with the same version of pyarrow ({pa.__version__}).', '']), encoding='utf-8')
    for line in table[2:]: print(name, line)
    return folder
