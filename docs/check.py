"Look through a built site: nothing may come from another host, and every link must lead somewhere"
import re, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

LOADS = {('script', 'src'), ('img', 'src'), ('img', 'srcset'), ('source', 'src'), ('source', 'srcset'), ('iframe', 'src'), ('embed', 'src'), ('object', 'data'),
         ('video', 'src'), ('video', 'poster'), ('audio', 'src'), ('track', 'src'), ('input', 'src'), ('use', 'href'), ('image', 'href'), ('link', 'href')}
REMOTE = re.compile(r'\s*(?:https?:)?//', re.I)
CSS = re.compile(r'url\(\s*["\']?((?:https?:)?//[^)"\']*)|@import\s+(?:url\()?["\']?([^"\');]*)', re.I)
JS = re.compile(r'\b(?:import|from|fetch|importScripts)\s*\(?\s*["\'`]((?:https?:)?//[^"\'`]+)')

class Reader(HTMLParser):
    "Collects what one page loads, links to and can be linked at"
    def __init__(self): super().__init__(); self.loads, self.links, self.ids, self.remote, self.inside = [], [], [], [], ''
    def handle_starttag(self, tag, attrs):
        self.inside = tag if tag in ('script', 'style') else ''
        for k, v in attrs:
            v = v or ''
            if k == 'id': self.ids.append(v)
            if (tag, k) in LOADS and not (tag == 'link' and dict(attrs).get('rel') in ('canonical', 'alternate')): self.loads.append(v)
            if (tag, k) == ('a', 'href'): self.links.append(v)
            if k == 'style': self.remote += [a or b for a, b in CSS.findall(v)]
            if k.startswith('on'): self.remote.append(f'event handler {k}')
    def handle_endtag(self, tag): self.inside = ''
    def handle_data(self, data):
        if self.inside == 'style': self.remote += [a or b for a, b in CSS.findall(data)]
        if self.inside == 'script': self.remote += JS.findall(data)

def problems(site):
    "What is wrong with the site in this folder, as a list of lines"
    site, bad, pages = Path(site), [], {}
    for f in sorted(site.rglob('*.html')):
        pages[f] = r = Reader(); r.feed(f.read_text(encoding='utf-8'))
    for f, r in pages.items():
        at = f.relative_to(site)
        bad += [f'{at}: loads {u} from another host' for u in r.loads + r.remote if REMOTE.match(u) or u.startswith('event')]
        bad += [f'{at}: two elements have the id {i}' for i in sorted({i for i in r.ids if r.ids.count(i) > 1})]
        for url in r.loads + r.links:
            if re.match(r'[a-z][\w+.-]*:|//', url, re.I): continue
            path, _, frag = unquote(url).partition('#')
            target = (f.parent/path).resolve() if path else f.resolve()
            if target.is_dir(): target /= 'index.html'
            known = {p.resolve(): q for p, q in pages.items()} if frag else {}
            if not target.exists(): bad.append(f'{at}: {url} does not exist')
            elif frag and target in known and frag not in known[target].ids: bad.append(f'{at}: {url} has no such anchor')
    for f in sorted(site.rglob('*.css')):
        bad += [f'{f.relative_to(site)}: loads {a or b}' for a, b in CSS.findall(f.read_text(encoding='utf-8')) if REMOTE.match(a or b)]
    for f in sorted((site/'assets').rglob('*.js')):
        bad += [f'{f.relative_to(site)}: loads {u}' for u in JS.findall(f.read_text(encoding='utf-8'))]
    return bad

if __name__ == '__main__':
    bad = problems(sys.argv[1]); print('\n'.join(bad) or 'no problems')
    sys.exit(bool(bad))
