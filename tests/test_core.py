"lmnotes.core beyond its chapter: imports, hostile text in a real page, faults while writing, a machine that is not as it should be"
import ast, errno, html.parser, importlib, json, os, random, re, signal, subprocess, sys
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from lmnotes import core
from lmnotes.core import (HTML, LmnotesError, LmnotesTypeError, UnknownNameError, atomic_write, best_dtype, brief, changed_on_disk, doctor, el,
                          fresh_dir, html_page, json_script, known_name, profile, require, seed_everything, versions)

ROOT = Path(__file__).parent.parent
PACKAGE = Path(core.__file__).parent

def python(code, *args, **kw): return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, timeout=60, **kw)

# --- imports --------------------------------------------------------------------------------------------------------------------

def test_import_is_light():
    "Processor time, not the clock: the machine may be busy"
    code = "import sys, time; t = time.process_time(); import lmnotes.core; print(time.process_time() - t, *[m for m in ('torch', 'numpy', 'transformers', 'fastcore') if m in sys.modules])"
    runs = [python(code).stdout.split() for _ in range(3)]
    assert all(len(r) == 1 for r in runs), f'loaded too: {runs[0][1:]}'
    assert min(float(r[0]) for r in runs) < .1

def test_imports_change_no_state():
    "Every module of the package, imported in one process: the random state and the default dtype stay"
    names = [f'lmnotes.{p.stem}' for p in PACKAGE.glob('*.py') if not p.stem.startswith('_')]
    code = """import sys, importlib, torch
before = torch.random.get_rng_state()
for n in sys.argv[1:]: importlib.import_module(n)
assert torch.equal(before, torch.random.get_rng_state())
assert torch.get_default_dtype() == torch.float32"""
    r = python(code, *names)
    assert r.returncode == 0, r.stderr

# --- errors ---------------------------------------------------------------------------------------------------------------------

def test_errors_are_value_errors():
    with pytest.raises(ValueError, match=r"^top_p is 1\.5, but must be in \(0, 1\]$"): require(False, 'top_p', 1.5, 'in (0, 1]')
    with pytest.raises(TypeError): require(False, 'x', b'', 'a str', LmnotesTypeError)
    with pytest.raises(LmnotesError): require(False, 'x', b'', 'a str', LmnotesTypeError)
    assert require(True, 'x', 1, 'anything') is None

def test_messages_stay_short():
    class Rude:
        def __repr__(self): return 'x\n' * 10_000
    for value in ('y' * 10**6, list(range(10**6)), {i: i for i in range(10**5)}, Rude(), [['z' * 1000] * 1000] * 10, 10**300):
        assert len(brief(value)) < 500 and '\n' not in brief(value)

@pytest.mark.parametrize('known', [['kjv', 'factbook'], {'kjv': 1, 'factbook': 2}, []])
def test_unknown_names(known):
    with pytest.raises(UnknownNameError) as e: known_name('kjb', known)
    assert 'kjb' in str(e.value) and all(k in str(e.value) for k in known)
    assert ('did you mean' in str(e.value)) == bool(known)
    for bad in (None, 3, b'kjv', ['kjv']):
        with pytest.raises(LmnotesTypeError): known_name(bad, known)

@pytest.mark.parametrize('seed', [-1, 2**32, 1.0, '1', None, True, float('nan')])
def test_bad_seeds(seed):
    with pytest.raises(LmnotesError, match='^seed is'): seed_everything(seed)

def test_seed_takes_any_integer():
    import numpy as np, torch
    a, b = torch.rand(2, generator=seed_everything(np.int64(3))), torch.rand(2, generator=seed_everything(3))
    torch.testing.assert_close(a, b, rtol=0, atol=0)

def test_profile(monkeypatch):
    for value, expected in dict(test=1, cpu=2, gpu=3).items():
        monkeypatch.setenv('LMNOTES_PROFILE', value); assert profile(test=1, cpu=2, gpu=3) == expected
    monkeypatch.setenv('LMNOTES_PROFILE', 'fast')
    with pytest.raises(LmnotesError, match='LMNOTES_PROFILE'): profile(test=1, cpu=2, gpu=3)
    with pytest.raises(TypeError): profile(1, 2, 3)
    monkeypatch.setenv('LMNOTES_PROFILE', '')
    monkeypatch.setattr(core, 'best_device', lambda: __import__('torch').device('mps'))
    assert profile(test=1, cpu=2, gpu=3) == 3

def test_best_dtype(monkeypatch):
    import torch
    for has, expected in ((dict(avx512_bf16=True), torch.bfloat16), (dict(amx_bf16=True), torch.bfloat16), (dict(avx512_bf16=False), torch.float32), ({}, torch.float32)):
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: has, raising=False)
        assert best_dtype('cpu') == expected
    for capability, expected in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda d=None: capability)
        assert best_dtype('cuda') == expected

# --- HTML -----------------------------------------------------------------------------------------------------------------------

RUN = 'window.taken=(window.taken||0)+1'
HOSTILE = [f'<img src=x onerror="{RUN}">', f"<img src=x onerror='{RUN}'>", f'"><script>{RUN}</script>', f"'><script>{RUN}</script>", f"' onmouseover='{RUN}' x='", f'" onmouseover="{RUN}" x="',
           f'<svg/onload={RUN}>', f'javascript:{RUN}', f'</title><script>{RUN}</script>', f'</style><script>{RUN}</script>', f'</script><script>{RUN}</script>', f'<!--<script>{RUN}</script>', f'-->]]><script>{RUN}</script>',
           f'<a href="javascript:{RUN}">x</a>', f'<iframe srcdoc="<script>parent.{RUN}</script>">', '&lt;script&gt;', '&#60;b&#62;', '&amp;lt;', '<math><mtext></mtext><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=1&gt;">',
           '\ud800', '\x00', '\x1b[31m', '\u202e', '</textarea><b>', '<plaintext>', '${1}`', '{{7*7}}', '<base href=//x>', '<meta http-equiv=refresh content=0>', '<link rel=stylesheet href=//x>', ' \n\t ']

class Seen(html.parser.HTMLParser):
    def __init__(self, page):
        super().__init__(); self.elements, self.text = [], ''
        self.feed(page); self.close()
    def handle_starttag(self, tag, attrs): self.elements.append((tag, dict(attrs)))
    def handle_data(self, data): self.text += data

@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=20)), max_size=6).map(''.join))
def test_any_text_stays_text(text):
    clean = re.sub('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]', '\ufffd', text)
    seen = Seen(el('span', text, title=text, data_token=text))
    assert seen.elements == [('span', {'title': clean, 'data-token': clean})] and seen.text == clean
    el('span', text).encode('utf-8')

@pytest.mark.parametrize('tag', ['script', 'iframe', 'object', 'embed', 'base', 'link', 'form', 'math', 'foreignObject', 'use', 'animate', 'template', 'noscript', 'SCRIPT', 'x-y', '', 'span onclick=1', 'b><script', None, 3])
def test_refused_tags(tag):
    with pytest.raises(LmnotesError): el(tag)

@pytest.mark.parametrize('attrs', [{'onclick': '1'}, {'ONCLICK': '1'}, {'on_click': '1'}, {'onanything': '1'}, {'srcdoc': 'x'}, {'http_equiv': 'refresh'}, {'a b': '1'}, {'a"': '1'}, {'a>': '1'}, {'': '1'}, {'1a': '1'}, {'a=b': '1'}, {'\x00onclick': '1'},
                                   {'style': 'background:url(//x)'}, {'style': 'background:URL (x)'}, {'style': '@import "x"'}, {'style': 'width:expression(1)'}, {'style': 'b:u\\72l(x)'}, {'style': 'background:image-set("x")'}])
def test_refused_attributes(attrs):
    with pytest.raises(LmnotesError): el('p', **attrs)

SCHEMES = ['javascript:1', 'JavaScript:1', ' javascript:1', 'java\nscript:1', 'java\tscript:1', '\x01javascript:1', '\u2028javascript:1', 'javascript\n:1', 'vbscript:1', 'data:text/html,<script>1</script>', 'data:text/html;base64,x', 'data:image/svg+xml,x', 'data:image/png,x', 'blob:x', 'file:///etc/passwd', 'view-source:x', 'unknown:x']
@pytest.mark.parametrize('url', SCHEMES)
def test_refused_addresses(url):
    for tag, name in (('a', 'href'), ('img', 'src'), ('img', 'srcset'), ('button', 'formaction'), ('a', 'xlink:href'), ('a', 'ping')):
        with pytest.raises(LmnotesError): el(tag, **{name: url})

def test_allowed_addresses():
    for url in ('x.html', '../a/b.html#c', '#eq-1', '?q=a:b', 'https://example.org/?a=1&b=2', 'http://example.org', 'mailto:a@example.org', '', '/a:b', './a:b'):
        assert Seen(el('a', href=url)).elements == [('a', {'href': url})]
    assert Seen(el('img', src='data:image/png;base64,AAAA', alt='')).elements[0][1]['src'] == 'data:image/png;base64,AAAA'
    with pytest.raises(LmnotesError): el('a', href='data:image/png;base64,AAAA')

def test_children():
    assert el('p', 1, None, 2.5, ['a', ('b', el('b', 'c'))], (x for x in 'de')) == '<p>12.5ab<b>c</b>de</p>'
    assert el('br') == '<br>' and el('p', hidden=True, title=None, lang=False, for_='x', cls='y', data_n=0) == '<p hidden for="x" class="y" data-n="0"></p>'
    with pytest.raises(LmnotesError): el('br', 'x')
    assert el('p', el('b', '<') + '<i>') == '<p>&lt;b&gt;&amp;lt;&lt;/b&gt;&lt;i&gt;</p>', 'what was glued by hand is text again'
    assert el('p', el('b', 'x'))._repr_html_() == '<p><b>x</b></p>' and 'characters' in repr(el('p'))
    for css in ('</style><script>', '@import "x"', 'p{}<!--'):
        with pytest.raises(LmnotesError): el('style', css)
    assert el('style', 'a > b { content: "&" }') == '<style>a > b { content: "&" }</style>'

def test_json_script():
    for data in (HOSTILE[2], {'a': [1, None, '</script>', '<!--']}, '\u2028'):
        page = json_script(data, cls='lm"x')
        assert json.loads(re.search('>(.*)</script>', page, re.S)[1]) == data and page.count('<') == 2
    with pytest.raises(ValueError): json_script(float('nan'))

def test_notebooks_make_html_with_el():
    "No string with markup in their code. Plotly's <b>, <i> and <br>, which it cleans itself, are allowed"
    tag = re.compile(r'</?(?:div|span|p|td|tr|th|table|style|script|svg|img|html|body|details|button|pre|code|h[1-6]|strong|a|li|ul)(?:\s[^>]*)?/?>', re.I)
    sources = {}
    for p in [*(ROOT/'nbs').glob('*.ipynb'), *(ROOT/'nbs/tasks').glob('*.ipynb')]:
        code = (''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code')
        sources[p.relative_to(ROOT)] = '\n'.join(re.sub(r'^\s*[!%].*$', 'pass', c, flags=re.M) for c in code)
    found = []
    for path, source in sources.items():
        if path.stem == '00a_safe': continue
        tree = ast.parse(source)
        said = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}                         # docstrings
        found += [f'{path}:{n.lineno}: {n.value[:60]!r}' for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in said and tag.search(n.value)]
    assert not found, 'markup made by hand, use core.el:\n' + '\n'.join(found)

@pytest.fixture(scope='module')
def tab():
    spec = importlib.util.spec_from_file_location('environment', ROOT/'docs/environment.py')
    environment = importlib.util.module_from_spec(spec); spec.loader.exec_module(environment)
    path = environment.chromium()
    if not path:
        if os.environ.get('LMNOTES_REQUIRE_BROWSER') == '1': pytest.fail('no Chromium found, and LMNOTES_REQUIRE_BROWSER=1')
        pytest.skip('no Chromium found: hostile text was not shown in a browser (make browser installs one)')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser.new_page()
        browser.close()

def test_hostile_text_in_a_real_page(tab, tmp_path):
    "As text, as attribute, in a title, in JSON, in SVG: nothing runs, nothing is loaded, and the page reads back what went in"
    rng = random.Random(0)
    tokens = HOSTILE + [''.join(rng.choices(HOSTILE, k=3)) for _ in range(100)]
    data = [t for t in tokens if '\ud800' not in t]
    report = core.Report(); report.rows.append((HOSTILE[0], HOSTILE[2])); report.check(False, HOSTILE[1], HOSTILE[3])
    page = html_page(HOSTILE[8], el('p', [el('span', t, title=t, data_token=t) for t in tokens], id='tokens'), el('svg', el('text', el('title', HOSTILE[0]), HOSTILE[2], x=HOSTILE[4])),
                     json_script(data, cls='data'), HTML(report._repr_html_()), css='span { padding: 1px }')
    (tmp_path/'page.html').write_text(page, encoding='utf-8')
    asked, dialogs = [], []
    tab.on('request', lambda r: asked.append(r.url)); tab.on('dialog', lambda d: (dialogs.append(d.message), d.dismiss()))
    tab.goto((tmp_path/'page.html').as_uri()); tab.dispatch_event('text', 'mouseover')
    for span in tab.query_selector_all('#tokens > span')[:40]: span.dispatch_event('mouseover')
    tab.wait_for_timeout(200)
    seen = tab.evaluate("""() => ({taken: window.taken || 0, scripts: document.querySelectorAll('script').length, images: document.images.length, frames: frames.length,
        names: [...new Set([...document.querySelectorAll('#tokens *')].flatMap(e => [e.localName, ...e.getAttributeNames()]))].sort(),
        tokens: [...document.querySelectorAll('#tokens > span')].map(e => [e.textContent, e.title, e.dataset.token]), title: document.title,
        data: JSON.parse(document.querySelector('.data').textContent), handlers: [...document.querySelectorAll('*')].filter(e => e.getAttributeNames().some(n => n.startsWith('on'))).length})""")
    clean = [re.sub('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]', '\ufffd', t) for t in tokens]
    assert seen['taken'] == 0 and not dialogs and len(asked) == 1
    assert seen['scripts'] == 1 and seen['images'] == 0 and seen['frames'] == 0 and seen['handlers'] == 0
    assert seen['names'] == ['data-token', 'span', 'title']
    assert seen['tokens'] == [[t] * 3 for t in clean]
    assert seen['title'] == HOSTILE[8] and seen['data'] == data

def test_the_page_test_can_fail(tab, tmp_path):
    "The same look at a page made with f-strings sees the attack"
    (tmp_path/'naive.html').write_text(f'<!doctype html><body><span title="{HOSTILE[5]}">{HOSTILE[0]}</span>', encoding='utf-8')
    tab.goto((tmp_path/'naive.html').as_uri()); tab.wait_for_timeout(200); tab.query_selector('span').dispatch_event('mouseover')
    assert tab.evaluate('window.taken') >= 2

# --- files ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('call', ['fsync', 'replace', 'open', 'write'])
@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_fault_at_any_call_leaves_the_old_file(tmp_path, monkeypatch, call, code):
    path = tmp_path/'a.json'; path.write_bytes(b'old')
    def fail(*a, **k): raise OSError(code, os.strerror(code))
    if call == 'open': monkeypatch.setattr('builtins.open', fail)
    elif call != 'write': monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError) as e:
        with atomic_write(path) as f: fail() if call == 'write' else f.write(b'new')
    monkeypatch.undo()
    assert e.value.errno == code and e.value.filename == str(path)
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['a.json']

def test_killed_while_writing(tmp_path):
    path = tmp_path/'a.txt'; path.write_text('old')
    r = python("import os, signal, sys; from lmnotes.core import atomic_write\nwith atomic_write(sys.argv[1], 'w') as f: f.write('new' * 10**6); f.flush(); os.kill(os.getpid(), signal.SIGKILL)", path)
    assert r.returncode == -signal.SIGKILL and path.read_text() == 'old'
    with atomic_write(path, 'w') as f: f.write('n\u00e9w')
    assert path.read_bytes() == 'n\u00e9w'.encode()

def test_atomic_write_refuses(tmp_path):
    for mode in ('r', 'a', 'x', 'w+', None):
        with pytest.raises(LmnotesError, match='^mode'), atomic_write(tmp_path/'a', mode): pass
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path/'no'/'a'): pass
    assert not os.listdir(tmp_path)

def test_fresh_dir(tmp_path):
    a = fresh_dir(tmp_path/'a'/'b'); assert a.is_dir() and fresh_dir(a) == a
    (a/'.hidden').touch()
    with pytest.raises(LmnotesError, match='holds something'): fresh_dir(a)
    assert fresh_dir(a, overwrite=True) == a and (a/'.hidden').exists()
    for overwrite in (False, True):
        with pytest.raises(LmnotesError, match='this is a file'): fresh_dir(a/'.hidden', overwrite)

# --- doctor ---------------------------------------------------------------------------------------------------------------------

def test_doctor_here():
    r = doctor()
    assert dict(r.rows)['torch'].startswith(__import__('torch').__version__) and {'device', 'precision', 'memory', 'disk', 'widgets', 'processors'} <= set(dict(r.rows))
    assert r.ok == (not r.problems) and repr(r).endswith('no problems found') == r.ok

def test_doctor_never_shows_secrets(monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_' + 'planted' * 4); monkeypatch.setenv('LMNOTES_PROFILE', 'planted'); monkeypatch.setenv('HTTPS_PROXY', 'http://planted:planted@x')
    r = doctor()
    assert 'planted' not in repr(r) + r._repr_html_() and any('LMNOTES_PROFILE' in w for w, _ in r.problems)

def test_doctor_sees_another_version_on_disk(tmp_path, monkeypatch):
    (tmp_path/'safetensors-99.0.dist-info').mkdir(); (tmp_path/'safetensors-99.0.dist-info/METADATA').write_text('Metadata-Version: 2.1\nName: safetensors\nVersion: 99.0\n')
    loaded = importlib.import_module('safetensors').__version__
    monkeypatch.syspath_prepend(str(tmp_path))
    assert versions('safetensors') == (loaded, '99.0') and versions('no-such-package') == (None, None)
    r = doctor()
    assert not r.ok and any(w.startswith(f'safetensors {loaded} is loaded, but 99.0') and 'restart' in what for w, what in r.problems)

def test_doctor_when_things_are_wrong(monkeypatch):
    import torch, shutil
    monkeypatch.setattr(core, 'memory', lambda: (8e9, 1e9)); monkeypatch.setattr(core, 'cpus', lambda: 1); monkeypatch.setattr(torch, 'get_num_threads', lambda: 64)
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: type('U', (), dict(free=10**6))); monkeypatch.setattr(core, 'versions', lambda n: (None, None if n == 'datasets' else '1'))
    monkeypatch.setattr(core, 'best_device', lambda: torch.device('cpu')); monkeypatch.setattr(shutil, 'which', lambda n: '/x/nvidia-smi')
    monkeypatch.setattr(core, 'changed_on_disk', lambda m: m.__name__ == 'lmnotes.core')
    wrong = ' | '.join(w for w, _ in doctor().problems)
    for part in ('3 GB of memory', '64 threads on 1', '1 GB of disk', 'datasets is not installed', 'NVIDIA driver', 'edited since the import: lmnotes.core'): assert part in wrong

def test_doctor_without_torch():
    r = python("import sys; sys.modules['torch'] = None\nfrom lmnotes.core import doctor; r = doctor(); print(r); sys.exit(not any('torch does not load' in w for w, _ in r.problems))")
    assert r.returncode == 0, r.stderr

def test_changed_on_disk(tmp_path, monkeypatch):
    source = 'from contextlib import contextmanager\nfrom typing import NamedTuple\nfrom dataclasses import dataclass\nclass P(NamedTuple):\n    x: int = 0\n@dataclass\nclass Q:\n    y: int = 0\n    def m(self): return 1\n@contextmanager\ndef c(): yield 2\ndef f(a, *, b=(1, 2)): return {"k": lambda: a}\n'
    monkeypatch.syspath_prepend(str(tmp_path)); path = tmp_path/'some_module.py'
    path.write_text(source); module = importlib.import_module('some_module')
    assert not changed_on_disk(module)
    for old, new in (('return 1', 'return 7'), ('yield 2', 'yield 7'), ('lambda: a', 'lambda: 7'), ('def f', 'def g'), ('class Q:', 'class Q')):
        assert old in source
        path.write_text(source.replace(old, new)); assert changed_on_disk(module), (old, new)
    path.write_text(source + '\ndef more(): pass\n'); assert not changed_on_disk(module), 'what is added does not make the old wrong'
    path.unlink(); assert changed_on_disk(module)
    assert not any(changed_on_disk(m) for n, m in list(sys.modules.items()) if n.startswith('lmnotes.'))
