"`lmnotes train` as a process: what it writes, what it refuses, Ctrl-C and going on, two processes."
import csv, hashlib, json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from lmnotes.checkpoints import checkpoints, verify_checkpoint
from lmnotes.cli import main
from lmnotes.core import LmnotesError
from lmnotes.data import load_tokenizer
from lmnotes.hub import load_model
from lmnotes.shell import load_texts, train

pytestmark = pytest.mark.slow
LMNOTES = [sys.executable, '-c', 'import sys; from lmnotes.cli import main; sys.exit(main())', 'train']
TEXTS = [f'The {a} {b} went to the {c}, and the {c} was {a}.' for a in ('old', 'young', 'tired', 'happy') for b in ('king', 'queen', 'clown') for c in ('castle', 'market', 'river')]
ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}
SMALL = ['--length', '32', '--batch-size', '4', '--precision', 'fp32']


@pytest.fixture(scope='module')
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp('texts')/'book.txt'
    path.write_text('\n\n'.join(TEXTS), encoding='utf-8')
    return path


def run(*args, launch=(), **kwargs):
    "Exit code, what was printed, what was complained about"
    done = subprocess.run([*launch, *(LMNOTES if not launch else []), *map(str, args)], capture_output=True, text=True, timeout=240, env=ENV, **kwargs)
    return done.returncode, done.stdout, done.stderr


def weights(out):
    return hashlib.sha256((out/'model'/'model.safetensors').read_bytes()).hexdigest()


# --- texts ------------------------------------------------------------------------------------------------------------------------

def write_txt(folder): (folder/'a.txt').write_text('\n\n'.join(TEXTS)); return folder/'a.txt'
def write_jsonl(folder): (folder/'a.jsonl').write_text('\n'.join(json.dumps(dict(text=t, n=1)) for t in TEXTS)); return folder/'a.jsonl'
def write_parquet(folder): Dataset.from_dict(dict(text=TEXTS)).to_parquet(folder/'a.parquet'); return folder/'a.parquet'
def write_csv(folder):
    with open(folder/'a.csv', 'w', newline='') as f: csv.writer(f).writerows([['text'], *[[t] for t in TEXTS]])
    return folder/'a.csv'
def write_folder(folder):
    for i in range(6): (folder/f'{i}.txt').write_text('\n\n'.join(TEXTS[6 * i:6 * i + 6]))
    return folder


@pytest.mark.parametrize('write', [write_txt, write_jsonl, write_parquet, write_csv, write_folder])
def test_texts_of_every_kind_are_split_once(tmp_path, write):
    seen, unseen, test = map(list, load_texts(write(tmp_path), held_out=.2))
    assert unseen and test and len(seen) > len(unseen) + len(test) and sorted([*seen, *unseen, *test]) == sorted(TEXTS)      # no text twice
    assert (list(load_texts(tmp_path if write is write_folder else next(tmp_path.iterdir()), held_out=.2)[0])) == seen, 'the same split each time'


def test_no_text_is_held_out_unless_wanted(book):
    seen, unseen, test = load_texts(book, held_out=0)
    assert sorted(seen) == sorted(TEXTS) and len(unseen) == len(test) == 0


# --- refusals ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('args, said', [
    (['nowhere.txt'], 'nowhere.txt'), (['BOOK', '--model', 'gpt-huge'], 'gpt-huge'), (['BOOK', '--model', 'bert-tiny'], 'model'), (['BOOK', '--length', '1'], 'length'),
    (['BOOK', '--length', '100000'], 'length'), (['BOOK', '--steps', '0'], 'steps'), (['BOOK', '--steps', '3', '--epochs', '1'], 'steps'), (['BOOK', '--epochs', '-1'], 'epochs'),
    (['BOOK', '--batch-size', '0'], 'batch_size'), (['BOOK', '--accumulate', '-2'], 'accumulate'), (['BOOK', '--lr', '-1'], 'lr'), (['BOOK', '--lr', 'nan'], 'lr'), (['BOOK', '--lr', '0'], 'lr'), (['BOOK', '--epochs', 'nan'], 'epochs'), (['BOOK', '--opt', 'adam'], 'adam'),
    (['BOOK', '--precision', 'int8'], 'precision'), (['BOOK', '--column', 'body'], 'column'), (['BOOK', '--by', 'chapter'], 'by'), (['BOOK', '--held-out', '.9'], 'held_out'),
    (['BOOK', '--out', 'BOOK'], 'out'), (['BOOK', '--processes', '2'], 'processes'), (['BOOK', '--keep', '0'], 'keep'), (['BOOK', '--validate-every', '0'], 'every'), (['BOOK', '--patience', '0'], 'patience'),
    (['nobody/nothing'], 'hub'), (['BOOK', '--seed', '-1'], 'seed'), (['BOOK', '--workers', '-1'], 'num_workers'), (['BOOK', '--save-every', '0'], 'save_every')])
def test_what_cannot_be_is_one_line_and_exit_code_2(book, tmp_path, capsys, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('lmnotes.shell.hub_reachable', lambda: False)
    code = main(['train', *[str(book) if a == 'BOOK' else a for a in args]])
    out, err = capsys.readouterr()
    assert code == 2 and said in err and err.count('\n') == 1 and not out, (code, err)
    assert not (tmp_path/'out').exists(), 'nothing is written before everything is checked'


@pytest.mark.parametrize('args', [[], ['BOOK', '--steps', 'ten'], ['BOOK', '--what'], ['BOOK', 'more']])
def test_grammar(args, capsys):
    with pytest.raises(SystemExit) as e: main(['train', *args])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and '--help' in err


def test_help_names_every_argument_of_train(capsys):
    import inspect
    with pytest.raises(SystemExit) as e: main(['train', '--help'])
    out = capsys.readouterr().out
    flags = ['--' + n.replace('_', '-') for n in inspect.signature(train).parameters if n != 'text']
    assert e.value.code == 0 and all(f in out for f in flags) and 'torchrun' in out and '#' not in out


# --- runs -------------------------------------------------------------------------------------------------------------------------

def test_a_run_writes_model_report_and_checkpoints(book, tmp_path):
    code, out, err = run(book, '--out', tmp_path/'o', '--epochs', 2, *SMALL)
    assert code == 0, err
    report = json.loads((tmp_path/'o/report.json').read_text())
    assert report['perplexity_after'] < report['perplexity_before'] and report['precision'] == 'fp32' and 'perplexity after' in out
    model, tokenizer = load_model(tmp_path/'o/model'), load_tokenizer(tmp_path/'o/model')
    import transformers
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'o/model')
    ids = torch.tensor([tokenizer('The old king')['input_ids']])
    with torch.no_grad(): torch.testing.assert_close(model(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    code, out, err = run(book, '--out', tmp_path/'o', '--epochs', 2, *SMALL)
    assert code == 2 and 'resume' in err, 'a run is not overwritten'
    before = weights(tmp_path/'o')
    code, out, err = run(book, '--out', tmp_path/'o', '--epochs', 2, *SMALL, '--resume')
    assert code == 0 and weights(tmp_path/'o') == before, 'a finished run does nothing more'
    code, out, err = run(book, '--out', tmp_path/'o', '--epochs', 2, *SMALL, '--resume', '--seed', 5)
    assert code == 2 and 'seed was 0, now 5' in err, err


def interrupted(args, out, sign, launch=()):
    "Start, send a signal to all processes after the first checkpoint; exit code and what was said"
    p = subprocess.Popen([*launch, *(LMNOTES if not launch else []), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV, start_new_session=True)
    end = time.time() + 120
    while not list((out/'checkpoints').glob('step-*/manifest.json')): assert time.time() < end and p.poll() is None, p.communicate()[0]; time.sleep(.05)
    os.killpg(p.pid, sign)
    said = p.communicate(timeout=120)[0]
    return p.returncode, said


def test_ctrl_c_saves_and_resume_goes_on(book, tmp_path):
    "As Ctrl-C does it; the same weights as a run without a break"
    args = lambda o: [book, '--out', tmp_path/o, '--steps', 60, '--save-every', 1, '--held-out', 0, *SMALL]
    code, said = interrupted(args('a'), tmp_path/'a', signal.SIGINT)
    assert code == 130 and '--resume' in said and not (tmp_path/'a/model').exists(), said
    assert run(*args('a'), '--resume')[0] == 0 and run(*args('b'))[0] == 0
    assert weights(tmp_path/'a') == weights(tmp_path/'b')


def test_kill_saves_too(book, tmp_path):
    "What Slurm sends before the time is up"
    code, said = interrupted([book, '--out', tmp_path/'o', '--steps', 60, '--save-every', 1, '--held-out', 0, *SMALL], tmp_path/'o', signal.SIGTERM)
    assert code == 143 and 'interrupted after step' in said, said
    verify_checkpoint(checkpoints(tmp_path/'o'/'checkpoints')[-1])


def test_two_processes(book, tmp_path):
    "torchrun of the console script: two, asserted; stopped by Ctrl-C together; then on to the end, sharded and not"
    two = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '--no-python', *LMNOTES]
    args = lambda o: [book, '--out', tmp_path/o, '--steps', 40, '--save-every', 2, '--processes', 2, *SMALL[:3], '2', *SMALL[4:]]
    code, said = interrupted(args('a'), tmp_path/'a', signal.SIGINT, two)
    assert code != 0 and '--resume' in said and said.count('interrupted') == 1, said
    code, out, err = run(*args('a'), '--resume', launch=two)
    assert code == 0 and out.count('perplexity after') == 1, err
    assert json.loads((tmp_path/'a/report.json').read_text())['processes'] == 2
    assert run(*args('b'), launch=two)[0] == 0 and weights(tmp_path/'a') == weights(tmp_path/'b')


def test_bad_input_in_python_is_an_error(tmp_path):
    with pytest.raises(LmnotesError, match='opt'): train('kjv', out=tmp_path/'o', opt='adam')
    assert not Path(tmp_path/'o').exists()


def test_a_folder_of_someone_elses_is_left_alone(book, tmp_path):
    "The model one starts from, in the very place where the new one would go."
    load_model('gpt-tiny').save_pretrained(tmp_path/'own'/'model')
    load_tokenizer('gpt-tiny').save_pretrained(tmp_path/'own'/'model')
    (tmp_path/'own'/'model'/'README.md').write_text('mine')
    before = {p.name: p.read_bytes() for p in (tmp_path/'own'/'model').iterdir()}
    for model in ('gpt-tiny', str(tmp_path/'own'/'model')):
        with pytest.raises(LmnotesError, match='out'): train(str(book), model=model, out=str(tmp_path/'own'), steps=1, resume=True)
    assert {p.name: p.read_bytes() for p in (tmp_path/'own'/'model').iterdir()} == before
