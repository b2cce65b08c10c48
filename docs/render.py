"One notebook's stored cells as a page: HTML, table of contents, sections for the search, Markdown for llms.txt"
import ast, base64, hashlib, json, re
from dataclasses import dataclass, field
from html import escape, unescape
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.attrs import attrs_plugin
from mdit_py_plugins.container import container_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.footnote import footnote_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound
from api import names_in

DIRECTIVE = re.compile(r'\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)')
FENCE = re.compile(r'(^ *(?:```|~~~).*?^ *(?:```|~~~) *$)', re.M | re.S)
ANSI = re.compile(r'\x1b\[[0-9;?]*[A-Za-z]')

@dataclass
class Page:
    "What the site needs to know about a page"
    url: str                                       # relative to the site's root
    title: str
    summary: str = ''
    label: str = ''                                # 02b for 02b_ngram
    source: str = ''                               # path in the repository
    module: str = ''                               # core for 00_core, if it exports one
    part: str = ''                                 # of pages that are in no list of the sidebar
    chapter: object = None                         # the page that derives a module
    html: str = ''
    md: str = ''                                   # the same as Markdown
    toc: list = field(default_factory=list)        # (level, id, HTML of the heading)
    sections: list = field(default_factory=list)   # [id, heading, text], for the search
    files: dict = field(default_factory=dict)      # name -> bytes, pictures found in outputs
    needs: set = field(default_factory=set)        # katex, plotly, mermaid, widget
    ids: set = field(default_factory=set)          # anchors in use
    texts: int = 0                                 # pieces of Markdown rendered

def plain(html):
    "The words of some HTML, without its formulas and tags"
    html = re.sub(r'<(script|style)\b.*?</\1>|<(span|div) class="math[^>]*>.*?</\2>', ' ', html, flags=re.S)
    return ' '.join(unescape(re.sub(r'<[^>]+>', ' ', html)).split())

def code_html(source, lang='python'):
    "Highlighted code"
    try: lexer = get_lexer_by_name(lang or 'text', stripnl=False)
    except ClassNotFound: lexer = get_lexer_by_name('text')
    return f'<pre><code>{highlight(source.rstrip(), lexer, HtmlFormatter(nowrap=True)).rstrip()}</code></pre>'

def slug(text, taken):
    "An id as Jupyter makes it (The-usual-mistakes), different from those `taken`"
    base = re.sub(r'[<>"]', '', text).strip().replace(' ', '-') or 'section'
    s, n = base, 0
    while s in taken: n += 1; s = f'{base}-{n}'
    taken.add(s)
    return s

def _callouts(tokens):
    "Quarto's `::: {.callout-note collapse=\"true\" title=\"...\"}`: a heading on its first line is the title"
    out, opened = [], []
    while tokens:
        t = tokens.pop(0); out.append(t)
        if t.type == 'container_callout_open':
            opened.append(t)
            fold, title = re.search(r'collapse="?(true|false)', t.info), re.search(r'title="([^"]*)"', t.info)
            kind = re.search(r'callout-(\w+)', t.info)[1]
            t.meta = dict(kind=kind, fold=fold and fold[1], title=title[1] if title else kind.title())
            if tokens[0].type == 'heading_open': t.meta['title'] = tokens[1].content; del tokens[:3]
        elif t.type == 'container_callout_close': t.meta = opened.pop().meta
    return out

def _callout(self, tokens, idx, options, env):
    m = tokens[idx].meta; tag, head = ('details', 'summary') if m['fold'] else ('div', 'div')
    if tokens[idx].nesting < 0: return f'</div></{tag}>\n'
    return (f'<{tag} class="callout {m["kind"]}"{" open" if m["fold"] == "false" else ""}>'
            f'<{head} class="callout-title">{MD.renderInline(m["title"])}</{head}><div class="callout-body">\n')

def _fence(self, tokens, idx, options, env):
    "A code block of the text; mermaid becomes a diagram"
    t = tokens[idx]; lang = t.info.strip().strip('{}').split(' ')[0].lstrip('.')
    if lang == 'mermaid': return f'<figure class="mermaid-box"><pre class="mermaid">{escape(t.content)}</pre></figure>\n'
    return f'<div class="code">{code_html(t.content, lang)}</div>\n'

def parser():
    "The Markdown of a notebook: GitHub's, with formulas, footnotes and callouts"
    md = (MarkdownIt('commonmark', dict(html=True, alerts=True)).enable(['table', 'strikethrough'])
          .use(dollarmath_plugin, double_inline=True, renderer=lambda s, o: escape(s.strip())).use(footnote_plugin)
          .use(attrs_plugin, spans=True, after=('link_close', 'image', 'span_close')))
    md.use(container_plugin, 'callout', validate=lambda info, *a: 'callout-' in info, render=_callout)
    for rule, tag, cls in ('math_inline', 'span', 'math'), ('math_inline_double', 'div', 'math display'), ('math_block', 'div', 'math display'):
        md.add_render_rule(rule, lambda self, t, i, o, e, tag=tag, cls=cls: f'<{tag} class="{cls}">{escape(t[i].content.strip())}</{tag}>')
    md.add_render_rule('fence', _fence)
    md.add_render_rule('table_open', lambda *a: '<div class="scroll"><table>')
    md.add_render_rule('table_close', lambda *a: '</table></div>')
    return md

MD = parser()

def prepare(text):
    "Give displayed formulas paragraphs of their own and keep bars inside formulas from splitting table cells"
    def outside(s):
        s = re.sub(r'^( *)\$\$(.+?)\$\$[ \t]*$', lambda m: f'\n{m[1]}$${m[2]}$$\n', s, flags=re.M | re.S)
        row = lambda m: re.sub(r'(?<!\\)\$[^$\n]+\$', lambda f: re.sub(r'(?<!\\)\|', r'\\vert ', f[0]), m[0])
        return re.sub(r'^ *\|.*$', row, s, flags=re.M)
    return ''.join(p if i % 2 else outside(p) for i, p in enumerate(FENCE.split(text)))

class Renderer:
    "Renders pages; `symbols` maps a public name to the address of its documentation"
    def __init__(self, symbols): self.symbols = symbols

    def markdown(self, text, page, headings=True):
        "HTML of `text`, its headings entered in the page's contents and index"
        page.texts += 1; env = dict(docId=str(page.texts))       # keeps the footnotes of different cells apart
        tokens = _callouts(MD.parse(prepare(text), env))
        for i, t in enumerate(tokens):
            if t.type == 'heading_open' and headings:
                inner = tokens[i+1]; html = MD.renderer.render([inner], MD.options, env)
                t.attrs['id'] = t.attrs.get('id') or slug(plain(html) or inner.content, page.ids)
                if t.tag in ('h2', 'h3'): page.toc.append((int(t.tag[1]), t.attrs['id'], re.sub(r'</?a\b[^>]*>', '', html)))
                page.sections.append([t.attrs['id'], plain(html), ''])
                anchor = f'<a class="anchor" href="#{escape(t.attrs["id"])}" aria-label="Link to this section"></a>'
                inner.children.append(Token('html_inline', '', 0, content=anchor))
            if t.type == 'inline': self._link_symbols(t, page, skip=i and tokens[i-1].type == 'heading_open')
        html = MD.renderer.render(tokens, MD.options, env)
        page.needs |= {n for n, mark in (('katex', 'class="math'), ('mermaid', 'class="mermaid"')) if mark in html}
        if page.sections:                                   # the words below each heading, for the search
            first, *rest = re.split(r'<h\d [^>]*?id="([^"]*)"[^>]*>.*?</h\d>', html, flags=re.S)
            below = {unescape(i): plain(text) for i, text in zip(rest[::2], rest[1::2])}
            for section in page.sections: section[2] += ' ' + below.get(section[0], '')
            before = page.sections[-len(below)-1] if headings else page.sections[-1]
            before[2] += ' ' + plain(first)
        return html

    def _link_symbols(self, inline, page, skip):
        "Link code in the text that is a public name to its documentation"
        depth, out = 0, []
        for c in inline.children or []:
            depth += (c.type == 'link_open') - (c.type == 'link_close')
            url = self.symbol(c.content, page.module) if c.type == 'code_inline' and not depth and not skip else None
            if url:
                c.type, c.content = 'html_inline', f'<a class="symbol" href="/{url}"><code>{escape(c.content)}</code></a>'
            out.append(c)
        inline.children = out

    def symbol(self, text, module):
        "Where `name`, `name()`, `module.name` or `Class.method` is documented, its own module first; or None"
        name = re.sub(r'\(.*\)$', '', text.strip())
        return next((self.symbols[k] for k in (f'{module}.{name}', name, name.removeprefix('lmnotes.')) if k in self.symbols), None)

    def notebook(self, nb, page):
        "Fill `page` from a notebook's stored cells"
        cells, html, md = merged(nb['cells']), [], []
        names = [defined(c) if c['cell_type'] == 'code' else [] for c in cells]
        page.ids |= {n for ns in names for n in ns}
        page.sections.append(['', page.title, page.summary])
        for cell, ns in zip(cells, names):
            h, m = self.code(cell, page, ns) if cell['cell_type'] == 'code' else (self.markdown(cell['source'], page), cell['source'])
            html.append(h); md.append(m)
        page.html, page.md = '\n'.join(filter(None, html)), '\n\n'.join(filter(None, md)) + '\n'

    def code(self, cell, page, names):
        "A code cell: its code without directives, then its outputs"
        flags, src = directives(''.join(cell['source']))
        outs = [] if 'hide_output' in flags or flags.get('output') == 'false' else [self.output(o, page) for o in joined(cell.get('outputs', []))]
        html, md = ''.join(h for h, _ in outs), '\n\n'.join(m for _, m in outs if m)
        if html and flags.get('fig-cap'): html = f'<figure>{html}<figcaption>{MD.renderInline(flags["fig-cap"])}</figcaption></figure>'
        if html: html = f'<div class="out">{html}</div>'
        if src.strip() and 'hide_input' not in flags and flags.get('echo') != 'false':
            note, ids = '', ''.join(f'<a id="{n}"></a>' for n in names)
            public = [n for n in names if f'{page.module}.{n}' in self.symbols]
            if public:
                links = ' '.join(f'<a href="/{self.symbols[f"{page.module}.{n}"]}">{n}</a>' for n in public)
                note = f'<div class="exported" title="part of the package">lmnotes.{page.module} {links}</div>'
            block = f'{ids}<div class="code">{note}{code_html(src)}</div>'
            fold = flags.get('code-fold') or ('true' if imports_only(src) else '')
            if fold in ('true', 'show'):
                label = flags.get('code-summary') or ('Imports' if imports_only(src) else 'Show the code')
                block = f'<details class="fold"{" open" if fold == "show" else ""}><summary>{escape(label)}</summary>{block}</details>'
            html, md = block + html, f'```python\n{src.rstrip()}\n```' + ('\n\n' + md if md else '')
        return f'<div class="cell">{html}</div>' if html else '', md

    def output(self, out, page):
        "One stored output as (HTML, Markdown): a live figure before HTML before a picture before text"
        if out['output_type'] == 'stream':
            text = clean_stream(out['text'])
            return (f'<pre class="{out.get("name", "stdout")}">{escape(text)}</pre>', fenced(text)) if text.strip() else ('', '')
        if out['output_type'] == 'error':
            text = f'{out["ename"]}: {out["evalue"]}'
            return f'<pre class="error">{escape(ANSI.sub("", text))}</pre>', fenced(text)
        data = {k: v if isinstance(v, dict) else ''.join(v) for k, v in out.get('data', {}).items()}
        if (fig := data.get('application/vnd.plotly.v1+json')) is not None: return self.figure(fig, data, page)
        if (html := data.get('text/html')) is not None:
            if 'lm-widget' in html: page.needs.add('widget')
            return f'<div class="html scroll">{html}</div>', fenced(data.get('text/plain') or plain(html))
        for mime, ext in ('image/svg+xml', 'svg'), ('image/png', 'png'), ('image/jpeg', 'jpg'), ('image/gif', 'gif'):
            if mime in data:
                alt = escape(' '.join(data.get('text/plain', 'output of the cell above').split()), quote=True)
                return f'<img src="{self.picture(data[mime], ext, page)}" alt="{alt}">', ''
        if text := data.get('text/markdown'): return self.markdown(text, page, headings=False), text
        if text := data.get('text/latex'): return self.markdown(text, page, headings=False), text
        text = ANSI.sub('', data.get('text/plain', ''))
        return (f'<pre class="result">{escape(text)}</pre>', fenced(text)) if text.strip() else ('', '')

    def figure(self, fig, data, page):
        "A Plotly figure, drawn in the page from its JSON; the stored PNG stands in where scripts are off"
        page.needs.add('plotly')
        layout = fig.get('layout', {}); height = int(layout.get('height') or 400)
        title = layout.get('title', {}); title = plain(title.get('text') or '' if isinstance(title, dict) else str(title)) or 'Figure'
        img = f'<noscript><img src="{self.picture(data["image/png"], "png", page)}" alt="{escape(title, quote=True)}"></noscript>' if 'image/png' in data else ''
        js = json.dumps({k: fig[k] for k in ('data', 'layout', 'frames') if k in fig}, sort_keys=True, separators=(',', ':')).replace('<', '\\u003c')
        return (f'<div class="lm-plotly" role="img" aria-label="{escape(title, quote=True)}" style="min-height:{height}px">'
                f'<script type="application/json">{js}</script></div>{img}'), f'[Figure: {title}]'

    def picture(self, content, ext, page):
        "Store a picture under a name made of its content; its address from the site's root"
        raw = content.encode() if ext == 'svg' else base64.b64decode(content)
        name = f'figures/{hashlib.sha256(raw).hexdigest()[:16]}.{ext}'
        page.files[name] = raw
        return '/' + name

def is_title(src): return bool(re.match(r'\s*# \S', src)) and not re.search(r'^(?!# |>|- \w+:|\s*$)', src, re.M)

def title_of(nb, default):
    "(title, one-line summary) of a notebook's first cell"
    src = next((''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown'), '')
    head, quote = re.search(r'^# +(.+)$', src, re.M), re.search(r'^> *(.+(?:\n> *.+)*)', src, re.M)
    return head.group(1).strip() if head else default, ' '.join(quote.group(1).replace('\n>', ' ').split()) if quote else ''

def directives(src):
    "Split a cell into its `#| key: value` lines and the code below them"
    flags, lines = {}, src.splitlines()
    while lines and (m := DIRECTIVE.match(lines[0])):
        flags[m[1]] = m[2].strip().strip('"\''); lines.pop(0)
    return flags, '\n'.join(lines).strip('\n')

def defined(cell):
    "The names that an exported cell defines at its top level"
    flags, src = directives(''.join(cell['source']))
    if not flags.keys() & {'export', 'exports'}: return []
    return [name for name, node in names_in(ast.parse(src)) if not name.startswith('_') and not isinstance(node, ast.ImportFrom)]

def imports_only(src):
    "Whether a cell holds nothing but imports, and names to hand on"
    try: body = ast.parse(src).body
    except SyntaxError: return False                        # a magic or a shell command
    return bool(body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) or ast.unparse(n).startswith('_all_ =') for n in body)

def merged(cells):
    "The cells that show, with neighboring cells of imports as one"
    out = []
    for cell in cells:
        src = ''.join(cell['source']); flags, body = directives(src)
        if cell['cell_type'] == 'markdown': hidden = is_title(src) or '<!-- badges -->' in src
        else: hidden = flags.keys() & {'hide', 'default_exp'} or flags.get('include') == 'false'
        if hidden or cell['cell_type'] == 'raw': continue
        imports = cell['cell_type'] == 'code' and not cell.get('outputs') and imports_only(body)
        if imports and out and out[-1].get('imports'): out[-1]['source'] += '\n' + body
        else: out.append({**cell, 'source': body if imports else src, 'imports': imports})
    return out

def joined(outputs):
    "The outputs, with what was printed in several goes as one"
    out = []
    for o in outputs:
        o = {**o, 'text': ''.join(o['text'])} if o['output_type'] == 'stream' else o
        if out and 'text' in o and out[-1].get('name') == o['name']: out[-1]['text'] += o['text']
        else: out.append(o)
    return out

def clean_stream(text):
    "A terminal's text as a terminal shows it: no color codes, only the last state of a progress line"
    return '\n'.join(line.rstrip('\r').rpartition('\r')[2] for line in ANSI.sub('', text).split('\n')).rstrip()

def fenced(text, most=60):
    "Text in a Markdown block, cut when long"
    lines = text.rstrip().splitlines()
    return '```text\n' + '\n'.join(lines[:most] + (['...'] if len(lines) > most else [])) + '\n```' if lines else ''
