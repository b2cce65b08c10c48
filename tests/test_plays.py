"The plays: the bundled speeches and line pairs as they lie there, and the recipe's parser and alignment on small texts."
import csv, importlib.util, re, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES, DATA = ROOT/'nbs'/'recipes', ROOT/'lmnotes'/'assets'/'data'
SPLITS = 'train', 'validation', 'test'
CONTROL = re.compile('[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ufffd]')


@pytest.fixture(scope='module')
def plays():
    "The recipe, imported by its path"
    sys.path.insert(0, str(RECIPES))
    try:
        spec = importlib.util.spec_from_file_location('plays', RECIPES/'plays.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally: sys.path.remove(str(RECIPES))
    return module


def read(name):
    import pyarrow.parquet as pq
    return {s: pq.read_table(DATA/name/f'{s}.parquet').to_pylist() for s in SPLITS}


@pytest.fixture(scope='module')
def shakespeare(): return read('shakespeare')


@pytest.fixture(scope='module')
def folio(): return read('folio')


# ---------------------------------------------------------------- the bundled files

def test_no_play_in_two_splits(shakespeare, folio, plays):
    for corpus in shakespeare, folio:
        titles = [{r['play'] for r in corpus[s]} for s in SPLITS]
        assert not (titles[0] & titles[1] or titles[0] & titles[2] or titles[1] & titles[2])
        for p in plays.PLAYS: assert p.folio is None and corpus is folio or p.title in titles[SPLITS.index(p.split)]
    assert [len({r['play'] for r in shakespeare[s]}) for s in SPLITS] == [30, 3, 3]


@pytest.mark.parametrize('split', ['validation', 'test'])
def test_held_out_plays_are_of_every_genre(shakespeare, split):
    assert {r['genre'] for r in shakespeare[split]} == {'comedy', 'history', 'tragedy'}


def test_rows_follow_the_play(shakespeare, folio):
    for corpus in shakespeare, folio:
        for rows in corpus.values():
            order = list(dict.fromkeys(r['play'] for r in rows))
            places = [(order.index(r['play']), r['act'], r['scene']) for r in rows]
            assert places == sorted(places)
    assert {r['act'] for rows in shakespeare.values() for r in rows} == set(range(7))


def test_every_act_has_its_scenes(shakespeare):
    for rows in shakespeare.values():
        for play in {r['play'] for r in rows}:
            for act in range(1, 6):
                scenes = {r['scene'] for r in rows if (r['play'], r['act']) == (play, act)} - {0}
                assert scenes == set(range(1, len(scenes) + 1)), (play, act, scenes)


def test_speeches_hold_no_boilerplate_and_no_directions(shakespeare):
    for rows in shakespeare.values():
        for r in rows:
            text = r['text']
            assert text and text == text.strip() and not CONTROL.search(text), r
            assert not re.search(r'gutenberg|\betext|copyright|dramatis person|[\[\]{}@_]|&\w+;', text, re.I), r
            assert not re.search(r'^(ACT|SCENE) [IVX\d]|^(Exeunt|Exit)\b', text, re.M), r
            assert not re.search(r'\n\n| \n|\n |  ', text), r


def test_speech_texts_hold_no_labels(shakespeare):
    "No line of a speech is, or begins with, a name in capitals that speaks in the same play"
    for rows in shakespeare.values():
        names = {}
        for r in rows: names.setdefault(r['play'], set()).add(r['speaker'].upper())
        for r in rows:
            for line in r['text'].split('\n'):
                m = re.fullmatch(r"([A-Z][A-Z' ]+)(\.|\. .*|)", line)
                assert not (m and m[1] in names[r['play']]), r


def test_speakers_look_like_names(shakespeare):
    for rows in shakespeare.values():
        for name in {r['speaker'] for r in rows}:
            assert re.fullmatch(r"[A-Z][a-z]+(?:'s?)?,?(?:[ -](?:and|of|the|de|others|[A-Z][a-z]+)(?:'s?)?,?)*", name), name


def test_abbreviated_labels_are_expanded(shakespeare):
    speakers = {(r['play'], r['speaker']) for rows in shakespeare.values() for r in rows}
    for play, name in [('Hamlet', 'Hamlet'), ('King Lear', 'Cordelia'), ('Henry IV, Part 1', 'Hotspur'), ('The Merry Wives of Windsor', 'Mistress Page')]:
        assert (play, name) in speakers
    assert not {n for _, n in speakers} & {'Ham', 'Cor', 'Hot', 'Mrs. Page', 'Glou'}


def test_known_passages(shakespeare):
    rows = {s: {(r['play'], r['act'], r['scene'], r['speaker'], r['text'].split('\n')[0]) for r in rows} for s, rows in shakespeare.items()}
    assert ('Macbeth', 5, 5, 'Macbeth', 'She should have died hereafter;') in rows['test']
    assert ('Hamlet', 5, 1, 'First Clown', 'Is she to be buried in Christian burial when she wilfully') in rows['train']
    assert ('As You Like It', 2, 7, 'Amiens', 'Blow, blow, thou winter wind,') in rows['train']               # a song without a label
    assert ('Macbeth', 5, 8, 'Ross', 'Ay, and brought off the field: your cause of sorrow') in rows['test']   # the source gives it to Fleance


def test_pairs_are_of_one_line(shakespeare, folio, plays):
    lines = {(r['play'], r['act'], r['scene'], line) for rows in shakespeare.values() for r in rows for line in r['text'].split('\n')}
    for rows in folio.values():
        for r in rows:
            assert (r['play'], r['act'], r['scene'], r['modern']) in lines, r
            assert plays.MIN_SIMILARITY <= r['similarity'] <= 1 and r['original'].strip() == r['original'] != '', r
            assert '\n' not in r['original'] and not CONTROL.search(r['original']), r


def test_pairs_differ_in_spelling_and_little_else(folio):
    rows = [r for rows in folio.values() for r in rows]
    assert len(rows) > 90_000
    assert sum(r['similarity'] > .9 for r in rows) > .975*len(rows)
    assert sum(r['original'] != r['modern'] for r in rows) > .9*len(rows)
    longer = [r for r in rows if abs(len(r['original']) - len(r['modern'])) > 25]
    assert len(longer) < .001*len(rows)


@pytest.mark.parametrize('name, corpus, least, shown', [('shakespeare_200', 'shakespeare', 200, 'first_words'), ('folio_150', 'folio', 150, 'original')])
def test_hand_read_rows_are_those_bundled(name, corpus, least, shown, shakespeare, folio):
    "The sample that was read is in the data as it was read, and few of it were wrong"
    with open(RECIPES/'checks'/f'{name}.csv', encoding='utf-8', newline='') as f: checks = list(csv.DictReader(f))
    words = lambda r: ' '.join(r['text'].split()[:6]) if corpus == 'shakespeare' else r['original']
    rows = {(r['play'], str(r['act']), str(r['scene']), words(r)) for rows in (shakespeare if corpus == 'shakespeare' else folio).values() for r in rows}
    assert len(checks) >= least
    for c in checks: assert (c['play'], c['act'], c['scene'], c[shown]) in rows, c
    assert sum(c['verdict'] == 'wrong' for c in checks) <= .015*len(checks)


# ---------------------------------------------------------------- the parser, on one excerpt of each kind

def speeches(plays, body, **kwargs):
    return [(r['act'], r['scene'], r['speaker'], r['text']) for r in plays.parse_play('A PLAY\n\nPERSONS\n\nMAN, a man.\n\n' + body, **kwargs)]


def test_labels_on_their_own_line(plays):
    body = 'ACT I.\n\nSCENE I. A street.\n\n[Enter all.]\n\nMRS. PAGE.\nWell,\ngo!\n\nLE BEAU.\nMadam.\n\nJAQUES DE BOIS.\nNo.\n'
    assert speeches(plays, body, aliases={'MRS. PAGE.': 'Mistress Page'}) == [
        (1, 1, 'Mistress Page', 'Well,\ngo!'), (1, 1, 'Le Beau', 'Madam.'), (1, 1, 'Jaques de Bois', 'No.')]


def test_numbered_joint_and_bare_labels(plays):
    body = ('Act 2.\n\nScene 3. A hall.\n\n1 MURDERER.\nHa!\n\nI MURDERER.\nHo!\n\nSECOND LORD\nHm.\n\nMACBETH, LENNOX.\nWhat?\n\n'
            'CAESAR, ANTONY, and LEPIDUS.\nWe.\n\nVARRO. CLAUDIUS.\nMy lord.\n')
    assert [(s, t) for *_, s, t in speeches(plays, body)] == [
        ('First Murderer', 'Ha!'), ('First Murderer', 'Ho!'), ('Second Lord', 'Hm.'), ('Macbeth and Lennox', 'What?'),
        ('Caesar, Antony and Lepidus', 'We.'), ('Varro and Claudius', 'My lord.')]


def test_labels_before_words_and_inside_paragraphs(plays):
    body = 'ACT I\nSCENE 1\n\nOFFICER.\nHold.\n\nOFFICER. Good sir, be patient.\nAnd still.\n\nMAN.\nWhy?\nOFFICER.\nNo matter.\n'
    assert [(s, t) for *_, s, t in speeches(plays, body)] == [
        ('Officer', 'Hold.'), ('Officer', 'Good sir, be patient.\nAnd still.'), ('Man', 'Why?'), ('Officer', 'No matter.')]


def test_labels_in_small_letters_need_an_alias(plays):
    body = 'ACT I.\n\nScene I. A room.\n\nHam.\nWords.\n\nKing.\nKing.\n'
    assert speeches(plays, body, aliases={'Ham.': 'Hamlet', 'King.': None}) == [(1, 1, 'Hamlet', 'Words.'), (1, 1, 'King', 'King.')]


@pytest.mark.parametrize('text', ['[Aside.] Ay, sir.', 'Ay, [Aside.] sir.', 'Ay, sir. [Exit.]', 'Ay, sir.\n\n[Exeunt all but\nHim.]', 'Ay, sir. {Aside.]', 'Ay, sir.\n[Exit}',
                                  'Ay, sir.\n[Enter [an English] Herald.]', 'Ay, sir.\n[Exeunt all except [one.]'])
def test_directions_are_cut(plays, text):
    assert speeches(plays, f'ACT I.\n\nSCENE I.\n\nMAN.\n{text}\n') == [(1, 1, 'Man', 'Ay, sir.')]


def test_a_direction_does_not_end_a_speech_nor_run_over_a_blank_line(plays):
    body = 'ACT I.\n\nSCENE I.\n\nMAN.\nOne.\n\n[A cry within.]\n\nTwo.\n\nLADY.\n[Not closed\n\nMAN.\nThree.]\n'
    told = []
    rows = plays.parse_play(body, note=lambda *what: told.append(what))
    assert [r['text'] for r in rows] == ['One.\nTwo.', '[Not closed', 'Three.]']
    assert ('bracket', '[Not closed') in told and ('continues', 'Man', 'Two.') in told


def test_prologue_induction_chorus_epilogue(plays):
    body = ('INDUCTION.\n\nSCENE I. A heath.\n\nSLY.\nOff!\n\nACT I.\n\nPROLOGUE.\n\nCHORUS.\nNow.\n\nSCENE II. A camp; and\na tent.\n\nMAN.\nWell.\n\nTHE END\n\n'
            'EPILOGUE\n\nMAN.\nFarewell.\n')
    assert speeches(plays, body) == [(0, 1, 'Sly', 'Off!'), (1, 0, 'Chorus', 'Now.'), (1, 2, 'Man', 'Well.'), (6, 0, 'Man', 'Farewell.')]


def test_songs_and_stanza_numbers_are_no_labels(plays):
    body = 'ACT V.\n\nSCENE I.\n\nMAN.\nListen.\n\n     SONG.\n      I.\nHey ho,\n\n      II.\nthe rain.\n\nLADY.\nWho knows?\n\nMAN.\nI.\n'
    assert [(s, t) for *_, s, t in speeches(plays, body)] == [('Man', 'Listen.\nHey ho,\nthe rain.'), ('Lady', 'Who knows?'), ('Man', 'I.')]


def test_an_erratum_must_match_once(plays):
    assert speeches(plays, 'ACT I.\n\nSCENE I.\n\nMAN.\nTeh end.\n', errata=[('Teh', 'The')]) == [(1, 1, 'Man', 'The end.')]
    for old in 'Tho', 'e': 
        with pytest.raises(ValueError, match='times'): speeches(plays, 'ACT I.\n\nSCENE I.\n\nMAN.\nThe end.\n', errata=[(old, 'x')])


# ---------------------------------------------------------------- the alignment

def test_folio_text_keeps_what_is_spoken(plays):
    raw = ('The Tragedie\n\nActus Primus. Scoena Prima.\n\nEnter Macbeth,\nand others.\n\n  Macb. So foule & faire\na day I haue not seen\n\n   Mist.Page. Come\n\n'
           '   2 Worth six on him\n\n  Caes Sit\n\n   1.Lo. G. Nay\nExeunt.\n\nFINIS. THE TRAGEDIE.')
    assert plays.folio_text(raw).split('\n') == ['So foule & faire', 'a day I haue not seen', 'Come', 'Worth six on him', 'Sit', 'Nay']


@pytest.mark.parametrize('old, new', [('loue', 'love'), ('vpon', 'upon'), ('Iustice', 'justice'), ('shee', 'she'), ('onely', 'only'), ('sunne', 'sun'), ('Ile', "I'll"),
                                      ('mistris', 'mistress'), ('&', 'and'), ('wee\'l', "we'll")])
def test_spellings_meet(plays, old, new): assert plays.likeness(plays.spelling(old), plays.spelling(new)) > .85


def test_alignment_joins_parted_words_and_leaves_out_the_rest(plays):
    modern = 'to the field you yourself have not seen it'.split()
    folio = "toth' field Alarum you your selfe haue not seene it Exit".split()
    groups = plays.align([plays.spelling(w) for w in modern], [plays.spelling(w) for w in folio])
    assert [(modern[i:k], folio[j:l]) for i, k, j, l in groups] == [
        (['to', 'the'], ["toth'"]), (['field'], ['field']), (['you'], ['you']), (['yourself'], ['your', 'selfe']), (['have'], ['haue']), (['not'], ['not']),
        (['seen'], ['seene']), (['it'], ['it'])]


def test_long_alignment_finds_itself_around_a_missing_scene(plays):
    modern = [f'w{i}' for i in range(3000)]
    folio = modern[:1000] + ['other']*50 + modern[1700:]
    groups = plays.align(modern, folio)
    exact = [(i, j) for i, k, j, l in groups if modern[i:k] == folio[j:l]]
    assert len(exact) >= 2290 and all(j == i if i < 1000 else j == i - 650 for i, j in exact)


def test_lines_are_cut_at_the_modern_ends(plays):
    rows = [dict(play='P', act=1, scene=1, text="Is this a dagger which I see before me,\nThe handle toward my hand?"),
            dict(play='P', act=1, scene=1, text='Come, let me clutch thee.')]
    pairs = plays.line_pairs(rows, "Is this a Dagger, which I see before\nme, the Handle toward my Hand?\nCome, let me clutch thee:")
    assert [p['original'] for p in pairs] == ['Is this a Dagger, which I see before me,', 'the Handle toward my Hand?', 'Come, let me clutch thee:']
    assert all(p['similarity'] == 1 for p in pairs)
