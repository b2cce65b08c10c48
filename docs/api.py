"The reference: every public name of a module, read from its source without importing it"
import ast, io, tokenize
from dataclasses import dataclass, field

@dataclass
class Symbol:
    "A public function, class, method or constant"
    name: str
    kind: str                                      # function, class, method, property, value or from another module
    signature: str
    doc: str
    lines: tuple                                   # first and last line in the module
    params: list = field(default_factory=list)     # (name, type, default, description)
    returns: tuple = ('', '')                      # type, description
    bases: str = ''
    members: list = field(default_factory=list)    # a class's public methods

def comments(source):
    "line number -> the comment behind an argument, and line number -> the comment behind a definition's colon"
    args, heads, lines = {}, {}, source.splitlines()
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type != tokenize.COMMENT: continue
        (row, col), text = t.start, t.string.lstrip('# ').strip()
        (heads if lines[row-1][:col].rstrip().endswith(':') else args)[row] = text
    return args, heads

def names_in(tree):
    "(name, node) of each top-level definition or import of a name; a patched function is `Class.name`"
    for n in tree.body:
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)):
            patched = any(ast.unparse(d).split('(')[0] in ('patch', 'patch_to') for d in n.decorator_list)
            owner = n.args.args[0].annotation if patched and n.args.args else None
            yield (f'{ast.unparse(owner)}.{n.name}' if owner else n.name), n
        elif isinstance(n, ast.ClassDef): yield n.name, n
        elif isinstance(n, ast.ImportFrom):
            for a in n.names: yield a.asname or a.name, n
        elif isinstance(n, (ast.Assign, ast.AnnAssign)):
            for t in n.targets if isinstance(n, ast.Assign) else [n.target]:
                if isinstance(t, ast.Name): yield t.id, n

def arguments(fn, method):
    "(argument, stars, default) of each argument, in order"
    a = fn.args; pos = a.posonlyargs + a.args
    rows = list(zip(pos, [''] * len(pos), [None] * (len(pos) - len(a.defaults)) + a.defaults))[method:]
    if a.vararg: rows.append((a.vararg, '*', None))
    rows += [(p, '', d) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    return rows + ([(a.kwarg, '**', None)] if a.kwarg else [])

def parameters(fn, notes, method=False):
    "(name, type, default, description) of each argument; of several on one line the last one owns the comment"
    rows, args = [], arguments(fn, method)
    last = {(d or p).end_lineno: p for p, _, d in args}
    for p, stars, d in args:
        line = (d or p).end_lineno
        note = notes[0].get(line, '') if last[line] is p and line < fn.body[0].lineno else ''
        rows.append((stars + p.arg, ast.unparse(p.annotation) if p.annotation else '', ast.unparse(d) if d else '', note))
    return rows

def signature(name, fn, method=False):
    "The definition's head on one line, or an argument a line where that is long"
    a, parts = fn.args, []
    for p, stars, d in arguments(fn, method):
        if a.kwonlyargs and p is a.kwonlyargs[0] and not a.vararg: parts.append('*')
        parts.append(stars + p.arg + (f':{ast.unparse(p.annotation)}' if p.annotation else '') + (f'={ast.unparse(d)}' if d else ''))
        if a.posonlyargs and p is a.posonlyargs[-1]: parts.append('/')
    back = f' -> {ast.unparse(fn.returns)}' if fn.returns else ''
    one = f'{name}({", ".join(parts)}){back}'
    return one if len(one) <= 84 else f'{name}(\n' + ''.join(f'    {p},\n' for p in parts) + f'){back}'

def function(name, fn, notes, method=False):
    "A `Symbol` for a function"
    deco = {ast.unparse(d).split('(')[0].split('.')[-1] for d in fn.decorator_list}
    if deco & {'property', 'cached_property'}: kind = 'property'
    else: kind = 'method' if method else 'function'
    bound = method and 'staticmethod' not in deco
    back = next((notes[1][i] for i in range(fn.lineno, fn.body[0].lineno) if i in notes[1]), '')
    return Symbol(name, kind, name if kind == 'property' else signature(name, fn, bound), ast.get_docstring(fn) or '',
                  (fn.lineno, fn.end_lineno), [] if kind == 'property' else parameters(fn, notes, bound),
                  (ast.unparse(fn.returns) if fn.returns else '', back))

def klass(name, cls, notes):
    "A `Symbol` for a class: its constructor's arguments, or its fields, and its public methods"
    body = {n.name: n for n in cls.body if isinstance(n, ast.FunctionDef)}
    bases = ', '.join(ast.unparse(b) for b in cls.bases)
    s = Symbol(name, 'class', f'class {name}' + (f'({bases})' if bases else ''), ast.get_docstring(cls) or '', (cls.lineno, cls.end_lineno), bases=bases)
    if init := body.get('__init__'):
        s.signature, s.params = signature(name, init, True), parameters(init, notes, True)
    elif any('dataclass' in ast.unparse(d) for d in cls.decorator_list):
        s.params = [(f.target.id, ast.unparse(f.annotation), ast.unparse(f.value) if f.value else '', notes[0].get(f.end_lineno, ''))
                    for f in cls.body if isinstance(f, ast.AnnAssign)]
        parts = [f'{n}:{t}' + (f'={d}' if d else '') for n, t, d, _ in s.params]
        one = f'{name}({", ".join(parts)})'
        s.signature = one if len(one) <= 84 else f'{name}(\n' + ''.join(f'    {p},\n' for p in parts) + ')'
    s.members = [function(f'{name}.{n}', f, notes, True) for n, f in body.items() if not n.startswith('_') or n == '__call__']
    return s

def module(path):
    "(docstring, public symbols in the order of the source) of an exported module"
    source = path.read_text(encoding='utf-8'); tree, notes = ast.parse(source), comments(source)
    found = dict(names_in(tree)); public = next((ast.literal_eval(n.value) for k, n in found.items() if k == '__all__'), [])
    out = {}
    for name, node in found.items():
        owner, _, rest = name.partition('.')
        if isinstance(node, ast.ClassDef) and name in public: out[name] = klass(name, node, notes)
        elif rest and owner in out and not rest.startswith('_'): out[owner].members.append(function(name, node, notes, True))
        elif name in public and isinstance(node, ast.FunctionDef): out[name] = function(name, node, notes)
        elif name in public and isinstance(node, ast.ImportFrom):
            home = f'{node.module.rpartition(".")[2]}.{name}'
            out[name] = Symbol(name, 'from another module', f'{home}', f'Documented at `{home}`.', (node.lineno, node.end_lineno))
        elif name in public: out[name] = Symbol(name, 'value', ast.unparse(node), '', (node.lineno, node.end_lineno))
    return ast.get_docstring(tree) or '', list(out.values())
