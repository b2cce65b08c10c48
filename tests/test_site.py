"The site: built from the stored outputs, whole, without a request to another host, and working in a browser"
import ast, base64, functools, hashlib, http.server, importlib.util, json, os, re, threading
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent

def load(name):
    spec = importlib.util.spec_from_file_location(f'site_{name}', ROOT/'docs'/f'{name}.py')
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    return module

build = load('build')
PNG = base64.b64encode(bytes.fromhex('89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc000000301010018dd8db00000000049454e44ae426082')).decode()

# --- a chapter with every kind of cell -----------------------------------------------------------------------------------------

def md(s): return dict(cell_type='markdown', metadata={}, source=s)
def code(s, *outputs): return dict(cell_type='code', metadata={}, source=s, outputs=list(outputs), execution_count=None)
def shown(**data): return dict(output_type='display_data', metadata={}, data={k.replace('__', '/'): v for k, v in data.items()})
def plotly(trace, title, **data):
    return dict(output_type='display_data', metadata={}, data={'application/vnd.plotly.v1+json': dict(data=[trace], layout=dict(title=dict(text=title), height=300)), **data})

LONG = r'\log p(x) = ' + ' + '.join(rf'\log p(x_{{{i}}} \mid x_{{<{i}}})' for i in range(1, 12))
WIDGET = json.dumps(dict(state=dict(n=1), esm='''export default { render({ model, el }) {
  const b = document.createElement('button'); b.className = 'count'; b.textContent = model.get('n'); el.append(b)
  b.onclick = () => model.set('n', model.get('n') + 1); model.on('change:n', () => b.textContent = model.get('n')) } }''')).replace('<', '\\u003c')
DEMO = [
    md('# A demonstration\n\n> Every kind of cell'), md('<!-- badges -->\n[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](x)'),
    code('#| default_exp demo'), code('#| hide\nhidden_cell = 1'), code('#| export\nimport math'), code('#| hide\nx = 1'), code('import os'),
    md('## Ideas\nSee [(9.1)](#eq-short), [(9.2)](#eq-long), `profile` and [another chapter](02_second.ipynb#eq-other). Costs $p(x_t|x_{<t})$.[^1]\n\n[^1]: A footnote.'),
    md('A word.[^1]\n\n[^1]: Another footnote.'),
    md('| symbol | meaning |\n|---|---|\n| $p(a|b)$ | a bar in a table |'),
    md('<a id="eq-short"></a>\n$$ p(x) = \\prod_t p(x_t \\mid x_{<t}) \\tag{9.1} $$\n\nand after it text.'),
    code('#| export\ndef shown_code(): # a comment\n    return "printed"', dict(output_type='stream', name='stdout', text='\x1b[31m10%\r100% done\x1b[0m\n<script>alert(1)</script>')),
    code('x', dict(output_type='stream', name='stdout', text=['row 1\n']), dict(output_type='stream', name='stdout', text=['row 2\n']), shown(text__plain='a < b')), code('df', shown(text__html='<table class="dataframe"><tr><td>7</td></tr></table>', text__plain='7')),
    code('#| fig-cap: "A caption"\nfig', plotly(dict(type='scatter', y=[1, 3, 2]), 'A line </script>', **{'image/png': PNG})),
    code('#| echo: false\nhidden_code()', plotly(dict(type='heatmap', z=[[1, 2], [3, 4]]), 'A heatmap')),
    code('img', shown(image__png=PNG, text__plain='a picture')), code('widget', shown(text__html=f'<div class="lm-widget"><script type="application/json">{WIDGET}</script></div>')),
    md('```mermaid\nflowchart LR\n  notebook --> package\n```'),
    md('::: {.callout-warning collapse="true"}\n## Folded title\nFolded text.\n:::\n\n> [!TIP]\n> A tip.'),
    md('Filler.\n\n' * 40),
    md(f'<a id="eq-long"></a>\n$$\n{LONG} \\tag{{9.2}}\n$$'),
    md('## Exercises\n1. One.'), code('#| code-fold: true\n#| code-summary: "Solution to 1"\nassert solved'),
    md('<details><summary>Solution to 2</summary>\n\nBy $x$.\n\n</details>'),
]
SECOND = [md('# The second chapter\n\n> It is referred to'), md('Short.\n\n<a id="eq-other"></a>\n$$ y = x \\tag{2.1} $$')]
SIDEBAR = '''website: {sidebar: {contents: [index.ipynb, {section: One, contents: [{auto: "0*.ipynb"}]}, {section: Reference, contents: [symbols.ipynb]}]}}'''

def write_nbs(folder, **books):
    folder.mkdir(parents=True, exist_ok=True); (folder/'sidebar.yml').write_text(SIDEBAR)
    for name, cells in books.items(): (folder/f'{name}.ipynb').write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return folder

def demo_nbs(folder, **more):
    books = {'index': [md('# Home\n\n> The front page')], '01_demo': DEMO, '02_second': SECOND, 'symbols': [md('# Symbols\n\n> All of them')]}
    return write_nbs(folder, **{**books, **more})

def tree(folder): return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob('*')) if f.is_file() and '__pycache__' not in f.parts}

@pytest.fixture(scope='session')
def demo(tmp_path_factory):
    at = tmp_path_factory.mktemp('demo'); build.build(demo_nbs(at/'nbs'), at/'site')
    return at/'site'

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The real site"
    out = tmp_path_factory.mktemp('site')
    made = build.build(ROOT/'nbs', out); made.folder = out
    return made

# --- without a browser ---------------------------------------------------------------------------------------------------------

def test_vendored_files_are_the_recorded_ones():
    vendor = ROOT/'docs/vendor'
    rows = {p: h for h, p in re.findall(r'^([0-9a-f]{64}) +\d+ (\S+)$', (vendor/'README.md').read_text(), re.M)}
    assert rows == {k: v for k, v in tree(vendor).items() if k != 'README.md'}

def test_same_notebooks_same_bytes(tmp_path, demo):
    before = tree(demo_nbs(tmp_path/'nbs')); build.build(tmp_path/'nbs', tmp_path/'again')
    assert tree(tmp_path/'again') == tree(demo)
    assert tree(tmp_path/'nbs') == before, 'the build wrote into the notebooks\' folder'
    build.build(demo_nbs(tmp_path/'nbs'), tmp_path/'again')                        # over an older site
    assert tree(tmp_path/'again') == tree(demo)

def test_cells_become_what_they_should(demo):
    page = (demo/'demo.html').read_text(); text = build.plain(page)
    for gone in 'hidden_cell', 'hidden_code', '#|', 'default_exp', 'colab-badge', '10%', '\x1b', '$$', ':::', '[^1]': assert gone not in text, gone
    for there in 'shown_code', '100% done', '<script>alert(1)</script>', 'a < b', 'A caption', 'Folded title', 'A tip.', 'A footnote.', 'Another footnote.', 'a bar in a table': assert there in text, there
    assert '<pre class="stdout">row 1\nrow 2</pre>' in page
    assert '<script>alert' not in page and re.search(r'<td><span class="math">p\(a\\vert b\)</span></td>', page)
    assert page.count('<summary>Imports</summary>') == 1 and 'import math\nimport os' in (demo/'demo.md').read_text()
    assert re.search(r'<details class="fold"><summary>Solution to 1</summary>.*?solved', page, re.S)
    assert re.search(r'<details class="callout warning">\s*<summary class="callout-title">Folded title', page)
    assert 'src="assets/colab.svg"' in page and '/blob/main/nbs/01_demo.ipynb' in page
    assert '<a class="symbol" href="api/core.html#profile"><code>profile</code></a>' in page
    assert re.search(r'<a href="second.html#eq-other">', page) and re.search(r'rel="prev" href="index.html"', page) and re.search(r'rel="next" href="second.html"', page)
    fig = json.loads(re.search(r'<script type="application/json">(\{"data".*?)</script>', page)[1])
    assert fig['data'][0]['y'] == [1, 3, 2] and fig['layout']['title']['text'] == 'A line </script>'

def test_text_for_language_models(demo):
    listed = re.findall(r'\]\((\S+?\.md)\)', (demo/'llms.txt').read_text())
    assert {'index.md', 'demo.md', 'second.md', 'symbols.md', 'api/core.md'} <= set(listed)
    for name in listed: assert (demo/name).read_text().startswith('# ')
    page = (demo/'demo.md').read_text()
    assert '> Every kind of cell' in page and '100% done' in page and r'\tag{9.2}' in page and '[Figure: A line' in page and 'hidden_cell' not in page
    assert page.partition('\n\n> ')[2] in (demo/'llms-full.txt').read_text()

def test_search_knows_what_stands_where(demo):
    index = json.loads((demo/'search.js').read_text().removeprefix('window.LM_SEARCH='))
    text = {(title, head): words for title, head, _, words in index}
    assert 'another chapter' in text['A demonstration', 'Ideas'] and 'Folded text' in text['A demonstration', 'Ideas']
    assert 'One.' in text['A demonstration', 'Exercises'] and 'another chapter' not in text['A demonstration', 'Exercises']
    assert 'hidden_cell' not in json.dumps(index) and ['lmnotes.core', 'profile', 'api/core.html#profile'] in [row[:3] for row in index]

@pytest.mark.parametrize('line, said', [
    ('<script src="https://cdn.example.org/x.js"></script>', 'from another host'), ('![](https://example.org/a.png)', 'from another host'),
    ('<style>@import url("//fonts.example.org/a;b")</style>', 'from another host'), ('<p style="background:url(https://example.org/a.png)">x</p>', 'from another host'),
    ('<p onclick="alert(1)">x</p>', 'event handler'), ('<p id="x">a</p><p id="x">b</p>', 'two elements'),
    ('[gone](03_gone.ipynb)', 'leads nowhere'), ('[gone](#nothing)', 'no such anchor'), ('[gone](02_second.ipynb#nothing)', 'no such anchor'), ('![](gone.png)', 'leads nowhere')])
def test_a_mistake_fails_the_build(tmp_path, line, said):
    nbs = demo_nbs(tmp_path/'nbs', **{'01_demo': DEMO[:1] + [md(line)]})
    with pytest.raises(build.BuildError, match=said): build.build(nbs, tmp_path/'site')

def test_refusals(tmp_path):
    (tmp_path/'mine').mkdir(); (tmp_path/'mine/thesis.txt').write_text('x')
    with pytest.raises(build.BuildError, match='not a site'): build.build(demo_nbs(tmp_path/'nbs'), tmp_path/'mine')
    assert (tmp_path/'mine/thesis.txt').read_text() == 'x'
    with pytest.raises(build.BuildError, match='in no part'): build.build(demo_nbs(tmp_path/'nbs', **{'77_stray': SECOND}), tmp_path/'site')

def test_reference_reads_sources(tmp_path):
    (tmp_path/'m.py').write_text('''"What the module does"
__all__ = ['f', 'C', 'D', 'LIMIT']
LIMIT = 3
def f(a:int, # (B,T) ids
      b=(1, ','), *xs, # the rest
      c:str='x', # a name
      **kw)->float: # the result
    "Says what"
def _hidden(): pass
class C(dict):
    "A class"
    def __init__(self, n=1, # how many
                 ): pass
    def go(self): "Goes"
    def _no(self): pass
    @property
    def size(self): "Its size"
@patch
def more(self:C, k=2): # patched on
    "Later"
@dataclass
class D:
    "Fields"
    lr:float=1e-3 # learning rate
''')
    doc, syms = build.api.module(tmp_path/'m.py'); by = {s.name: s for s in syms}
    assert doc == 'What the module does' and set(by) == {'f', 'C', 'D', 'LIMIT'}
    assert by['f'].signature == "f(a:int, b=(1, ','), *xs, c:str='x', **kw) -> float" and by['f'].returns == ('float', 'the result') and by['f'].doc == 'Says what'
    assert by['f'].params == [('a', 'int', '', '(B,T) ids'), ('b', '', "(1, ',')", ''), ('*xs', '', '', 'the rest'), ('c', 'str', "'x'", 'a name'), ('**kw', '', '', '')]
    assert by['C'].params == [('n', '', '1', 'how many')] and [(m.name, m.kind) for m in by['C'].members] == [('C.go', 'method'), ('C.size', 'property'), ('C.more', 'method')]
    assert by['C'].members[-1].signature == 'C.more(k=2)' and by['D'].params == [('lr', 'float', '0.001', 'learning rate')]

def test_every_public_name_is_documented(site):
    lost = []
    for f in sorted((ROOT/'lmnotes').glob('[!_]*.py')):
        source = f.read_text(); lines, page = source.splitlines(), (site.folder/f'api/{f.stem}.html').read_text()
        names = next(ast.literal_eval(n.value) for n in ast.parse(source).body if isinstance(n, ast.Assign) and n.targets[0].id == '__all__')
        for name in names:
            entry = re.search(rf'<h2 id="{name}">.*?/lmnotes/{f.stem}\.py#L(\d+)-L\d+"', page)
            if not entry or not any(name in line for line in lines[int(entry[1])-1:int(entry[1])+9]): lost.append(f'{f.stem}.{name}')
    assert not lost, lost

def test_pages_of_the_book(site):
    assert [p.url for p in site.pages][:1] == ['index.html']
    books = {p.source for p in site.pages if p.source.endswith('.ipynb')}
    on_disk = {f.relative_to(ROOT).as_posix() for f in (ROOT/'nbs').rglob('*.ipynb') if not any(x[0] in '._' for x in f.relative_to(ROOT).parts)}
    assert books == on_disk
    for p in site.pages:
        if p.source.endswith('.ipynb'): assert p.summary, f'{p.source} has no one-line summary'
    for f in site.folder.rglob('*.html'): assert not re.search(r'^#\| ?\w', build.plain(f.read_text()), re.M), f

# --- in a browser --------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def chromium():
    path = load('environment').chromium()
    if not path:
        if os.environ.get('LMNOTES_REQUIRE_BROWSER') == '1': pytest.fail('no Chromium found, and LMNOTES_REQUIRE_BROWSER=1')
        pytest.skip('no Chromium found: the site was not opened in a browser (make browser installs one)')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser
        browser.close()

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

def serve(folder):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown(); server.server_close()

@pytest.fixture(scope='session')
def demo_url(demo): yield from serve(demo)

@pytest.fixture(scope='session')
def site_url(site): yield from serve(site.folder)

READY = '''() => [...document.querySelectorAll('.math')].every(e => e.classList.contains('done')) && [...document.querySelectorAll('.lm-plotly')].every(e => e.dataset.done)
  && [...document.querySelectorAll('pre.mermaid')].every(e => e.querySelector('svg')) && [...document.querySelectorAll('.lm-widget')].every(e => e.dataset.done)'''

class Tab:
    "A page that blocks and records every request to another host, and records errors"
    def __init__(self, browser, width=1280, scheme='light', **options):
        self.context = browser.new_context(viewport=dict(width=width, height=844), color_scheme=scheme, reduced_motion='reduce', **options)
        self.away, self.errors = [], []
        self.context.set_default_timeout(90_000)                                   # the machine may be busy
        self.context.route('**/*', self._route); self.page = self.context.new_page()
        self.page.on('console', lambda m: m.type in ('error', 'warning') and self.errors.append(m.text))
        self.page.on('pageerror', lambda e: self.errors.append(str(e)))
        self.page.on('response', lambda r: r.status >= 400 and self.errors.append(f'{r.status} {r.url}'))
        self.page.on('requestfailed', lambda r: r.failure == 'net::ERR_ABORTED' or self.errors.append(f'failed: {r.url}'))     # aborted: by leaving the page
    def _route(self, route):
        if re.match(r'http://127\.0\.0\.1:|file:|data:|blob:', route.request.url): route.continue_()
        else: self.away.append(route.request.url); route.abort()
    def open(self, url):
        self.page.goto(url); self.page.wait_for_function(READY)
        return self.page
    def __enter__(self): return self
    def __exit__(self, *exc):
        self.context.close()
        if not exc[0]: assert not self.away, self.away; assert not self.errors, self.errors

OVERFLOW = 'document.documentElement.scrollWidth - innerWidth'

@pytest.mark.slow
@pytest.mark.parametrize('width, scheme', [(1280, 'light'), (390, 'dark')])
def test_every_page_opens(chromium, site_url, site, width, scheme):
    with Tab(chromium, width, scheme) as tab:
        for p in site.pages:
            page = tab.open(site_url + p.url)
            assert not tab.errors and not tab.away, (p.url, tab.errors, tab.away)
            assert page.evaluate(OVERFLOW) <= 0, f'{p.url} is wider than the screen at {width}'
            assert not page.locator('.katex-error').count(), (p.url, page.locator('.katex-error').first.get_attribute('title'))
            assert '$$' not in page.locator('article').inner_text().replace(' ', ''), p.url
            for fig in page.locator('.lm-plotly').all(): assert fig.locator('svg.main-svg').count() and fig.bounding_box()['width'] > 200, p.url

@pytest.mark.slow
def test_figures_diagrams_and_controls(chromium, demo_url):
    with Tab(chromium) as tab:
        page = tab.open(demo_url + 'demo.html')
        assert page.locator('.lm-plotly').nth(0).locator('.scatterlayer path.js-line').count() == 1
        assert page.locator('.lm-plotly').nth(1).locator('.heatmaplayer image').count() == 1
        assert page.locator('.mermaid svg .node').count() == 2
        page.locator('.count').click(); assert page.locator('.count').inner_text() == '2'
        assert page.locator('.katex').count() >= 5
        fold = page.locator('details.fold').last; assert not fold.locator('pre').is_visible(); fold.locator('summary').click(); assert fold.locator('pre').is_visible()

@pytest.mark.slow
def test_theme(chromium, demo_url):
    with Tab(chromium) as tab:
        page = tab.open(demo_url + 'demo.html')
        colors = '[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector(".lm-plotly .gtitle")).fill, getComputedStyle(document.querySelector(".mermaid .nodeLabel")).color]'
        light = page.evaluate(colors); page.locator('.theme').click()
        page.wait_for_function(f'light => document.querySelector(".mermaid .nodeLabel") && {colors}.every((c, i) => c !== light[i])', arg=light)
        dark = page.evaluate(colors)
        page.goto(demo_url + 'second.html'); assert page.evaluate('getComputedStyle(document.body).backgroundColor') == dark[0]
    with Tab(chromium, scheme='dark') as tab:                                      # the system's wish, before any click
        page = tab.open(demo_url + 'demo.html'); assert page.evaluate('getComputedStyle(document.body).backgroundColor') == dark[0]

@pytest.mark.slow
def test_search(chromium, site_url):
    with Tab(chromium) as tab:
        page = tab.open(site_url + 'index.html')
        page.keyboard.press('/'); page.keyboard.type('seed_everything'); page.locator('.results a').first.wait_for()
        assert page.locator('.results a').first.get_attribute('href').endswith('api/core.html#seed_everything')
        page.keyboard.press('Enter'); page.wait_for_url('**/api/core.html#seed_everything')
        box = page.locator('#seed_everything').bounding_box(); assert 0 <= box['y'] < 400
        page.keyboard.press('/'); page.keyboard.type('<b>zzz'); page.get_by_text('Nothing found.').wait_for()

@pytest.mark.slow
@pytest.mark.parametrize('width', [1280, 390])
def test_equations(chromium, demo_url, width):
    "A reference jumps to its formula; the number shows; a long formula scrolls in its own box"
    with Tab(chromium, width) as tab:
        page = tab.open(demo_url + 'demo.html')
        page.locator('article a[href="#eq-long"]').click(); page.wait_for_timeout(200)
        box = page.locator('#eq-long + .math, p:has(#eq-long) + .math'); place = box.bounding_box()
        assert 52 <= place['y'] < 500 and page.locator('#eq-long').evaluate('e => e.matches(":target")')
        tag = box.locator('.katex-tag'); at = tag.bounding_box()
        assert '9.2' in tag.inner_text() and at['x'] >= 0 and at['x'] + at['width'] <= width, 'the number is out of sight'
        assert box.evaluate('e => e.scrollWidth > e.clientWidth + 50') and page.evaluate(OVERFLOW) <= 0
        box.evaluate('e => e.scrollLeft = 9999')
        last, number = box.locator('.katex-base').last.bounding_box(), tag.bounding_box()
        assert last['x'] + last['width'] <= number['x'] + number['width'], 'the end of the formula cannot be reached'
        page.locator('a[href="second.html#eq-other"]').click(); page.wait_for_url('**/second.html#eq-other')

@pytest.mark.slow
def test_ways_through_the_book(chromium, demo_url):
    with Tab(chromium, 390) as tab:
        page = tab.open(demo_url + 'demo.html')
        assert not page.locator('.menu').is_visible()
        page.locator('.menu-button').click(); assert page.locator('.menu [aria-current]').inner_text().endswith('A demonstration')
        page.mouse.click(385, 500); assert not page.locator('.menu').is_visible()
        page.locator('.pager [rel=next]').click(); page.wait_for_url('**/second.html')
        page.locator('.pager [rel=prev]').click(); page.wait_for_url('**/demo.html')

@pytest.mark.slow
def test_opened_as_a_file(chromium, demo):
    with Tab(chromium) as tab:
        page = tab.open((demo/'demo.html').as_uri())
        assert page.locator('.lm-plotly svg.main-svg').count() and page.locator('.katex').count() and page.locator('.count').is_visible()
        page.locator('.search input').fill('Best_Device'); page.locator('.results a').first.click(); page.wait_for_url('**/api/core.html#best_device')

@pytest.mark.slow
def test_without_scripts(chromium, demo):
    with Tab(chromium, java_script_enabled=False) as tab:
        tab.page.goto((demo/'demo.html').as_uri())
        assert tab.page.locator('noscript img').count() == 1 and tab.page.locator('noscript img').evaluate('e => e.naturalWidth') == 1
        assert tab.page.get_by_text('A caption').is_visible() and tab.page.locator('.menu').is_visible()
