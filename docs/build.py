"""Build the site from the notebooks' stored outputs: nothing is run, nothing is fetched.

    python docs/build.py [--nbs nbs] [--out docs/_site]
"""
import argparse, configparser, json, os, re, shutil, sys
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import unquote
import yaml
sys.path.insert(0, str(Path(__file__).parent))
import api, check
from render import MD, Page, Renderer, code_html, plain, title_of

HERE, ROOT = Path(__file__).parent, Path(__file__).parent.parent
REMOTE_BADGES = {'colab-badge.svg': '/assets/colab.svg'}        # README's badges -> ours

class BuildError(Exception): "A mistake in the sources of the site"

def parts_of(nbs):
    "[(part, [notebook, ...]), ...] in the order of `sidebar.yml`; every notebook is in one part"
    seen, parts = set(), [('', [])]
    def add(item):
        found = sorted(nbs.glob(item['auto'])) if isinstance(item, dict) else [nbs/item] if (nbs/item).exists() else []
        parts[-1][1].extend(f for f in found if f not in seen and f.name[0] != '.'); seen.update(found)
    for item in yaml.safe_load((nbs/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']:
        if isinstance(item, dict) and 'section' in item:
            parts.append((item['section'], []))
            for sub in item['contents']: add(sub)
        else: add(item)
    rest = [p.relative_to(nbs) for p in sorted(nbs.rglob('*.ipynb')) if p not in seen]
    if rest := [str(p) for p in rest if not any(x[0] in '._' for x in p.parts)]:
        raise BuildError(f'in no part of sidebar.yml: {", ".join(rest)}')
    return [(name, books) for name, books in parts if books]

def url_of(rel):
    "02b_ngram.ipynb -> ngram.html, as nbdev names its pages"
    rel = rel.with_suffix('.html')
    return rel.with_name(re.sub(r'^\d+[a-z]?_', '', rel.name)).as_posix()

class Site:
    "All pages and what they share"
    def __init__(self, nbs, out):
        self.nbs, self.out, cp = nbs.resolve(), out, configparser.ConfigParser(delimiters=['='])
        cp.read(ROOT/'settings.ini', encoding='utf-8'); self.cfg = cp['DEFAULT']
        self.blob = f'{self.cfg["git_url"]}/blob/{self.cfg["branch"]}'
        self.lib = self.cfg['lib_path']
        self.modules = {p.stem: api.module(p) for p in sorted((ROOT/self.lib).glob('*.py')) if p.stem[0] != '_'}
        symbols = {f'{self.lib}.{m}': f'api/{m}.html' for m in self.modules}
        for m, (_, syms) in self.modules.items():
            for name in [n for s in syms for n in [s.name] + [x.name for x in s.members]]:
                symbols[f'{m}.{name}'] = f'api/{m}.html#{name}'; symbols.setdefault(name, f'api/{m}.html#{name}')
        for m, s in [(m, s) for m, (_, syms) in self.modules.items() for s in syms if s.kind == 'from another module']:
            symbols[f'{m}.{s.name}'] = symbols[s.name] = symbols[s.signature]          # documented where it is defined
        self.render, self.pages, self.parts, self.files = Renderer(symbols), [], [], {}

    def chapters(self):
        "The notebooks, rendered"
        for part, books in parts_of(self.nbs):
            self.parts.append((part, []))
            for path in books:
                nb = json.loads(path.read_text(encoding='utf-8')); rel = path.relative_to(self.nbs)
                num = re.match(r'(\d+)([a-z]?)_', rel.name); module = re.sub(r'^\d+[a-z]?_', '', rel.stem)
                title, summary = title_of(nb, rel.stem)
                page = Page(url_of(rel), title, summary, f'{int(num[1])}{num[2]}' if num and rel.parent == Path('.') else '', f'nbs/{rel.as_posix()}',
                            module=module if module in self.modules else '')
                try: self.render.notebook(nb, page)
                except Exception as e: raise BuildError(f'{path.name}: {type(e).__name__}: {e}') from e
                self.pages.append(page); self.parts[-1][1].append(page)
                self.files |= page.files

    def reference(self):
        "A page for each module, and one that lists them"
        by_module = {p.module: p for p in self.pages if p.module}
        index = Page('api/index.html', 'API reference', 'Every public name of the package, by module'); self.pages.append(index)
        order = list(by_module)                                         # as the chapters stand; what has no chapter comes last
        for m in sorted(self.modules, key=lambda m: order.index(m) if m in order else len(order)):
            doc, syms = self.modules[m]
            page = Page(f'api/{m}.html', f'{self.lib}.{m}', doc.split('\n\n')[0].strip(), source=f'{self.lib}/{m}.py', part='API reference')
            page.chapter = by_module.get(m)
            if page.chapter: page.html = f'<p>Derived and tested in <a href="/{page.chapter.url}">{escape(page.chapter.title)}</a>.</p>'
            page.sections.append(['', page.title, page.summary])
            for s in syms: self.symbol(s, page, 2)
            self.pages.append(page)
            names = ' '.join(f'<a class="symbol" href="/{page.url}#{s.name}"><code>{s.name}</code></a>' for s in syms)
            index.html += f'<h2 id="{m}"><a href="/{page.url}">{page.title}</a></h2><p>{MD.renderInline(page.summary)}</p><p class="names">{names}</p>'
            index.toc.append((2, m, m)); index.md += f'- [{page.title}]({m}.md): {page.summary}\n'

    def symbol(self, s, page, level):
        "The documentation of one name: signature, docstring, arguments, link to the source"
        short = s.name.rpartition('.')[2] if level > 2 else s.name
        src = f'{self.blob}/{page.source}#L{s.lines[0]}-L{s.lines[1]}'
        rows = ''.join(f'<dt><code>{escape(n)}</code>{f" <span>{escape(t)}</span>" if t else ""}{f" <span>= {escape(d)}</span>" if d else ""}</dt>'
                       f'<dd>{escape(note)}</dd>' for n, t, d, note in s.params)
        if s.returns[1]: rows += f'<dt>returns{f" <span>{escape(s.returns[0])}</span>" if s.returns[0] else ""}</dt><dd>{escape(s.returns[1])}</dd>'
        derived = f'<a href="/{page.chapter.url}#{s.name}">chapter</a> ' if page.chapter and s.name in page.chapter.ids else ''
        kind = s.kind + (f', a kind of {s.bases}' if s.bases else '')
        page.html += (f'<section class="api"><h{level} id="{s.name}"><code>{short}</code> <small>{escape(kind)}</small>'
                      f'<span class="source">{derived}<a href="{src}">source</a></span></h{level}><div class="code">{code_html(s.signature)}</div>'
                      f'{self.render.markdown(s.doc, page, headings=False)}{f"<dl>{rows}</dl>" if rows else ""}</section>')
        page.toc.append((level, s.name, f'<code>{short}</code>'))
        if s.kind != 'from another module': page.sections.append([s.name, s.name, f'{s.doc} {" ".join(f"{n}: {note}" for n, _, _, note in s.params)}'])
        page.md += f'{"#" * level} {s.name}\n\n```python\n{s.signature}\n```\n\n{s.doc}\n\n' + ''.join(f'- `{n}`: {d}\n' for n, _, _, d in s.params if d) + '\n'
        for sub in s.members: self.symbol(sub, page, level + 1)

    def relink(self, html, page):
        "Make addresses relative to the page: notebooks become pages, pictures are copied, other files are linked to the repository"
        at = Path(page.source).parent if page.source else Path('.')
        to = lambda url: os.path.relpath(url.split('#')[0], os.path.dirname(page.url) or '.').replace(os.sep, '/') + (f'#{url.split("#")[1]}' if '#' in url else '')
        pages = {p.source: p for p in self.pages if p.source}
        bare = lambda s: re.sub(r'[^\w-]', '', unquote(s).lower())       # GitHub's anchors are in lower case, Jupyter's are not
        def anchor(p, frag): return '#' + next((i for i in sorted(p.ids) if bare(i) == bare(frag)), frag) if frag and frag not in p.ids else frag and '#' + frag
        def one(m):
            url = m[3]
            if m[2] == 'img' and url.rpartition('/')[2] in REMOTE_BADGES: url = REMOTE_BADGES[url.rpartition('/')[2]]
            if re.match(r'[a-z][\w+.-]*:|//', url, re.I) or not url: return m[1] + url + '"'
            if url[0] == '#': return m[1] + anchor(page, url[1:]) + '"'
            if url[0] == '/': return m[1] + to(url[1:]) + '"'
            path, _, frag = url.partition('#')
            for base in (at, Path('.'), Path('nbs')):
                file = os.path.normpath(base/path)
                if file in pages: return m[1] + to(pages[file].url + anchor(pages[file], frag)) + '"'
                if (ROOT/file).exists() and not file.startswith('..'):
                    if m[2] == 'a': return f'{m[1]}{self.blob}/{file}{frag and "#" + frag}"'
                    self.files[f'files/{file}'] = (ROOT/file).read_bytes()
                    return m[1] + to(f'files/{file}') + '"'
            raise BuildError(f'{page.source or page.url}: a link to {url}, which leads nowhere')
        return re.sub(r'(<(a|img|source)\b[^>]*?\s(?:href|src|srcset)=")([^"]*)"', one, html)

    def menu(self, page):
        "The list of chapters"
        item = lambda p, text: f'<li><a href="/{p.url}"{" aria-current=page" if p is page else ""}>{text}</a></li>'
        out = []
        for part, pages in self.parts:
            body = ''.join(item(p, f'<b>{p.label}</b>{escape(p.title if p.url != "index.html" else "Home")}') for p in pages)
            if part == 'Reference': body += item(next(p for p in self.pages if p.url == 'api/index.html'), '<b></b>API reference')
            out.append((f'<h2>{part}</h2>' if part else '') + f'<ul>{body}</ul>')
        if page.url.startswith('api/'): out.append('<ul class="modules">' + ''.join(item(p, p.title) for p in self.pages if p.part == 'API reference') + '</ul>')
        return ''.join(out)

    def shell(self, page, before, after):
        "The whole HTML file of a page"
        cfg, home, link = self.cfg, page.url == 'index.html', lambda html: self.relink(html, page)
        badges = ''
        if page.source.endswith('.ipynb'):
            book = 'nbs/tour.ipynb' if home else page.source                 # the home page's badges open the tour, as README's do
            colab = f'https://colab.research.google.com/github/{cfg["git_url"].split("/", 3)[3]}/blob/{cfg["branch"]}/{book}'
            badges = (f'<a href="{colab}"><img src="/assets/colab.svg" alt="Open in Colab" width="117" height="20"></a>'
                      f'<a href="{self.blob}/{book}"><img src="/assets/github.svg" alt="View on GitHub" width="121" height="20"></a>')
        if page.module: badges += f'<a class="symbol" href="/api/{page.module}.html"><code>{self.lib}.{page.module}</code></a>'
        pager = ''.join(f'<a rel="{rel}" href="/{p.url}"><small>{text}</small>{escape(p.title)}</a>'
                        for rel, text, p in (('prev', 'Previous', before), ('next', 'Next', after)) if p)
        root = os.path.relpath('.', os.path.dirname(page.url) or '.')
        return Template((HERE/'page.html').read_text(encoding='utf-8')).substitute(
            title=escape(page.title if home else f'{page.title} · {cfg["title"]}'), site=escape(cfg['title']), git=cfg['git_url'], root=root,
            description=escape(plain(MD.renderInline(page.summary)), quote=True), markdown=Path(page.url).stem + '.md',
            head=f'<link rel="stylesheet" href="{root}/vendor/katex/katex.min.css">' if 'katex' in page.needs else '',
            heading=f'<h1>{page.label and f"<b>{page.label}</b> "}{MD.renderInline(page.title)}</h1>', summary=MD.renderInline(page.summary),
            toc=''.join(f'<li class="l{level}"><a href="#{id}">{text}</a></li>' for level, id, text in page.toc), toc_class='' if len(page.toc) > 1 else 'none',
            badges=link(badges), menu=link(self.menu(page)), body=link(page.html), pager=link(pager))

    def write(self):
        "Every file of the site"
        for before, page, after in zip([None] + self.pages, self.pages, self.pages[1:] + [None]):
            self.put(page.url, self.shell(page, before, after))
            self.put(page.url.replace('.html', '.md'), f'# {page.title}\n\n> {page.summary}\n\n{page.md}')
        for name, data in self.files.items(): self.put(name, data)
        self.put('search.js', 'window.LM_SEARCH=' + json.dumps(self.index(), ensure_ascii=False, separators=(',', ':')))
        self.llms()
        for folder in 'assets', 'vendor': shutil.copytree(HERE/folder, self.out/folder)
        css = self.out/'vendor/katex/katex.min.css'                     # every browser that can show the site takes the woff2 fonts
        css.write_text(re.sub(r',url\([^)]*\.(?:woff|ttf)\) format\("\w+"\)', '', css.read_text(encoding='utf-8')), encoding='utf-8')

    def index(self):
        "[page title, heading, address, text] of each section"
        return [[p.title, head, p.url + (f'#{id}' if id else ''), ' '.join(text.split())[:3000]] for p in self.pages for id, head, text in p.sections]

    def llms(self):
        "The book for language models: a list of its pages, and all its text in one file"
        line = lambda p: f'- [{p.title}]({p.url.replace(".html", ".md")}): {p.summary}'
        out = [f'# {self.cfg["title"]}', f'> {self.cfg["description"]}']
        for part, pages in self.parts: out += [f'## {part or "Start"}', '\n'.join(map(line, pages))]
        out += ['## API reference', '\n'.join(line(p) for p in self.pages if p.part == 'API reference')]
        self.put('llms.txt', '\n\n'.join(out) + '\n')
        self.put('llms-full.txt', '\n\n'.join(f'# {p.title}\n\n> {p.summary}\n\n{p.md}' for p in self.pages if p.source))

    def put(self, name, content):
        file = self.out/name; file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

def build(nbs=ROOT/'nbs', out=HERE/'_site'):
    "Build the site of the notebooks in `nbs` into `out`, which is replaced if it is a site; returns the `Site`"
    if out.exists() and any(out.iterdir()) and not (out/'llms.txt').exists():
        raise BuildError(f'{out} holds something that is not a site; remove it or choose another folder')
    new = out.with_name(out.name + '.new'); shutil.rmtree(new, ignore_errors=True)
    try:
        site = Site(nbs, new)
        site.chapters(); site.reference(); site.write()
        if bad := check.problems(new): raise BuildError('\n'.join(['the site has mistakes:'] + bad))
        shutil.rmtree(out, ignore_errors=True); new.rename(out)
    finally: shutil.rmtree(new, ignore_errors=True)
    return site

if __name__ == '__main__':
    args = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    args.add_argument('--nbs', type=Path, default=ROOT/'nbs', help='the folder of notebooks')
    args.add_argument('--out', type=Path, default=HERE/'_site', help='the folder to write')
    args = args.parse_args()
    try: site = build(args.nbs, args.out)
    except BuildError as e: sys.exit(f'docs/build.py: {e}')
    print(f'{len(site.pages)} pages in {os.path.relpath(args.out)}')
