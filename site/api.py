"""One page of reference per module, as MyST Markdown, read from the exported files without importing them:
signature, docstring, a table of the comments behind the arguments, and the cell that defines the name."""
import ast
import copy
import io
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT/'scenimefy'
CELL = re.compile(r'# %% \.\./nbs/(\S+)\.ipynb #(\S+)')
FENCE = '`'*4     # of a directive that may hold a fenced example


@dataclass
class Row:
    "One line of a table: an argument, a setting, or what comes back."
    name: str
    kind: str = ''       # its annotation
    default: str = ''
    meaning: str = ''


@dataclass
class Item:
    "A public name of a module, or a method of a class."
    name: str
    kind: str            # 'function', 'class', 'method', 'property', 'data'
    signature: str
    text: str            # docstring
    page: str            # notebook that defines it, without suffix
    cell: str            # its cell there
    rows: list = field(default_factory=list)
    methods: list = field(default_factory=list)


class Module:
    "An exported file: its tree, the comment on every line, the cell of every line."
    def __init__(self, path):
        self.name = path.stem
        self.source = path.read_text(encoding='utf-8')
        self.tree = ast.parse(self.source)
        self.cells = cells(self.source)
        self.comments = comments(self.source)
        self.text = ast.get_docstring(self.tree) or ''
        self.public = public_names(self.tree)
        self.notebook = self.cells[-1][0]    # the same on every line below the first cell


def cells(source:str) -> list: # (notebook, cell) of every line, counted from 1
    "Where each line of a file was written."
    found, here = [('', '')], ('', '')
    for line in source.splitlines():
        mark = CELL.match(line)
        if mark: here = mark.groups()
        found.append(here)
    return found


def comments(source:str) -> dict: # line -> text
    "The comment beside each line of code; lines below it that hold only a comment go on with it."
    found, first, last = {}, 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT: continue
        line, text = token.start[0], token.string.lstrip('# ')
        alone = not token.line[:token.start[1]].strip()
        if not alone:
            first = last = line
            found[line] = text
        elif line == last + 1:
            last = line
            found[first] += f' {text}'
    return found


def public_names(tree) -> list:
    "What stands in `__all__`."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
            return ast.literal_eval(node.value)
    return []


# ---- functions

def arguments(node) -> list: # (ast.arg, default or None, prefix), in order
    "The arguments of a function."
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None]*(len(plain) - len(a.defaults)) + list(a.defaults)
    found = [(arg, default, '') for arg, default in zip(plain, defaults)]
    if a.vararg: found.append((a.vararg, None, '*'))
    found += [(arg, default, '') for arg, default in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: found.append((a.kwarg, None, '**'))
    return [row for row in found if row[0].arg not in ('self', 'cls')]


def signature(node) -> str:
    "A function's arguments as Python writes them, without `self`."
    args = copy.copy(node.args)
    args.args = [arg for arg in args.args if arg.arg not in ('self', 'cls')]
    returns = f' -> {ast.unparse(node.returns)}' if node.returns else ''
    return f'({ast.unparse(args)}){returns}'


def argument_rows(node, beside) -> list: # of Row; arguments that share a comment share a row
    "The comments behind the arguments of a function."
    end = node.returns.end_lineno if node.returns else 0
    rows, last = [], 0
    for arg, default, prefix in arguments(node):
        line = arg.lineno
        meaning = beside.get(line, '') if line != end else ''
        row = Row(prefix + arg.arg, unparsed(arg.annotation), unparsed(default), meaning)
        if line == last and meaning and alike(rows[-1], row): rows[-1] = joined(rows[-1], row)
        else:
            if line == last: rows[-1].meaning = ''     # the comment is about the last one
            rows.append(row)
        last = line
    if node.returns and end in beside: rows.append(Row('returns', unparsed(node.returns), '', beside[end]))
    return rows if any(row.meaning for row in rows) else []


def alike(a, b) -> bool:
    "May two arguments on one line share the comment beside it?"
    told_apart = b.meaning.count(';') >= b.name.count(',') + 1
    return told_apart or (a.kind == b.kind and bool(a.default) == bool(b.default))


def joined(a, b):
    "Two arguments with one comment between them."
    kind = a.kind if a.kind == b.kind else ', '.join(k for k in (a.kind, b.kind) if k)
    default = ', '.join(d for d in (a.default, b.default) if d)
    return Row(f'{a.name}, {b.name}', kind, default, a.meaning)


def unparsed(node) -> str: return ast.unparse(node) if node else ''


# ---- classes and values

def field_rows(node, beside) -> list: # of Row
    "The fields of a data class or named tuple; settings say their meaning in `opt(…)`."
    rows = []
    for part in node.body:
        if not isinstance(part, ast.AnnAssign) or 'ClassVar' in ast.unparse(part.annotation): continue
        default, meaning = unparsed(part.value), beside.get(part.end_lineno, '')
        if isinstance(part.value, ast.Call) and getattr(part.value.func, 'id', '') == 'opt':
            default, meaning = setting(part.value)
        rows.append(Row(unparsed(part.target), unparsed(part.annotation), default, meaning))
    return rows


def setting(call) -> tuple: # default, meaning
    "The parts of `opt(default, doc, origin, unit)`."
    words = [a.value if isinstance(a, ast.Constant) else unparsed(a) for a in call.args[1:4]]
    words += [''] * (3 - len(words))
    for keyword in call.keywords:
        if keyword.arg == 'unit': words[2] = unparsed(keyword.value).strip("'")
    doc, origin, unit = words
    return f'{unparsed(call.args[0])} {unit}'.strip(), f'{doc} ({origin})' if origin else doc


def is_fields(node) -> bool:
    "Do the annotated lines of a class make its arguments?"
    marks = [ast.unparse(part) for part in (*node.decorator_list, *node.bases)]
    return any('dataclass' in mark or 'NamedTuple' in mark or mark.endswith('Settings') for mark in marks)


def class_item(node, module) -> Item:
    "A class with its public methods."
    page, cell = module.cells[node.lineno]
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    made = [m for m in methods if m.name == '__init__']
    rows, text = field_rows(node, module.comments), ''
    if is_fields(node): text = '(' + ', '.join(row.name for row in rows) + ')'
    elif made:
        text = signature(made[0])
        rows = argument_rows(made[0], module.comments)
    item = Item(node.name, 'class', text, ast.get_docstring(node) or '', page, cell, rows)
    shown = [m for m in methods if not m.name.startswith('_') or m.name == '__call__']
    bases = [unparsed(base) for base in node.bases]
    if bases: item.text += f'\n\nBase: `{", ".join(bases)}`'
    item.methods = [method_item(m, module) for m in shown]
    return item


def method_item(node, module) -> Item:
    marks = [ast.unparse(d) for d in node.decorator_list]
    item = function_item(node, module)
    item.kind = 'property' if 'property' in marks else 'method'
    if item.kind == 'property': item.signature = ''
    return item


def function_item(node, module) -> Item:
    page, cell = module.cells[node.lineno]
    rows = argument_rows(node, module.comments)
    return Item(node.name, 'function', signature(node), ast.get_docstring(node) or '', page, cell, rows)


def value_item(name, node, module) -> Item:
    "A constant: its value if that is short, and the comment beside it."
    page, cell = module.cells[node.lineno]
    value = unparsed(node.value)
    text = module.comments.get(node.lineno, '')
    return Item(name, 'data', f' = {value}' if len(value) <= 60 else '', text, page, cell)


def items(module) -> list: # of Item, in the order of the notebook
    "Every public name of a module."
    found = {}
    for node in module.tree.body:
        if isinstance(node, ast.FunctionDef): found[node.name] = function_item(node, module)
        if isinstance(node, ast.ClassDef): found[node.name] = class_item(node, module)
        if not isinstance(node, (ast.Assign, ast.AnnAssign)): continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for name in names_of(targets): found.setdefault(name, value_item(name, node, module))
    missing = [name for name in module.public if name not in found]
    if missing: raise SystemExit(f'{module.name}: no definition found of {missing}')
    return [found[name] for name in found if name in module.public]


def names_of(targets) -> list: # of strings
    "The plain names that an assignment sets, `a, b = …` included."
    found = []
    for target in targets:
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        found += [part.id for part in parts if isinstance(part, ast.Name)]
    return found


# ---- pages

def plain(text:str) -> str:
    "Words as Markdown that shows them as they are; what stands in backticks is left alone."
    parts = re.split(r'(`[^`]*`)', text)
    escaped = [re.sub(r'([*_$<\[\]{}~^|])', r'\\\1', part) for part in parts[::2]]
    code = [part.replace('|', r'\|') for part in parts[1::2]] + ['']
    return ''.join(a + b for a, b in zip(escaped, code))


def paragraphs(text:str) -> str:
    "A docstring with its paragraphs."
    return '\n\n'.join(plain(' '.join(part.split())) for part in re.split(r'\n\s*\n', text))


def code(text:str) -> str: return '`' + text.replace('|', r'\|') + '`' if text else ''


def table(rows) -> str: # markdown
    if not rows: return ''
    kinds, defaults = any(r.kind for r in rows), any(r.default for r in rows)
    head = ['name'] + ['type']*kinds + ['default']*defaults + ['meaning']
    lines = ['| ' + ' | '.join(head) + ' |', '|---'*len(head) + '|']
    for r in rows:
        name = '*returns*' if r.name == 'returns' else code(r.name)
        cells = [name] + [code(r.kind)]*kinds + [code(r.default)]*defaults + [plain(r.meaning)]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def cell_link(item) -> str:
    "To the cell of the notebook that defines the name."
    return (f'<a class="cell-link" href="../{item.page}.html#{item.cell}">'
            f'{item.page}.ipynb, cell <code>{item.cell}</code></a>')


def extras(entry) -> str: # markdown; `entry` is a row of the front door: raises and example
    if not entry: return ''
    raises, example = entry
    return f'**Raises** {raises}\n\n```python\n{example.strip()}\n```'


def block(item, module:str, owner:str='', entry=None) -> str: # markdown
    "One name as Sphinx's Python domain writes it."
    name = f'{owner}.{item.name}' if owner else item.name
    value, shown = '', item.signature
    if item.kind == 'data': value, shown = item.signature.removeprefix(' = '), ''
    lines = [f'{FENCE}{{py:{item.kind}}} {name}{shown}', f':module: {module}']
    if value: lines.append(f':value: {value}')
    parts = [paragraphs(item.text), table(item.rows), extras(entry)]
    if not owner: parts.append(cell_link(item))
    body = '\n\n'.join(part for part in parts if part)
    below = '\n\n'.join(block(m, module, item.name) for m in item.methods)
    return '\n'.join([*lines, '', body, FENCE]) + (f'\n\n{below}' if below else '')


def page(module, entries) -> str: # markdown
    "The page of one module."
    name = f'scenimefy.{module.name}'
    parts = [f'# {name}', f'{FENCE}{{py:module}} {name}\n{FENCE}', paragraphs(module.text),
             f'Written in the notebook <a href="../{module.notebook}.html">{module.notebook}.ipynb</a>.']
    parts += [block(item, name, entry=entries.get((module.name, item.name))) for item in items(module)]
    return '\n\n'.join(parts) + '\n'


def modules() -> list: # of Module, in the order of the notebooks
    "Every exported file that has public names."
    found = [Module(path) for path in PACKAGE.glob('*.py') if path.stem not in ('__init__', '_modidx')]
    return sorted([m for m in found if m.public], key=lambda m: m.notebook)


def front_entries(module) -> dict: # (home, name) -> (raises, example)
    "The rows of the front door, read from the calls `Entry(name, home, raises, example)`."
    found = {}
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call) or getattr(node.func, 'id', '') != 'Entry': continue
        name, home, raises, example = [ast.literal_eval(arg) for arg in node.args]
        found[home, name] = raises, example
    return found


def index_page(found, entries) -> str: # markdown
    "All modules, the names that `import scenimefy` offers first."
    front = [f'<a href="{home}.html#scenimefy.{home}.{name}"><code>{name}</code></a>'
             for home, name in entries if home != name]
    front += [f'<a href="{home}.html"><code>{name}</code></a>' for home, name in entries if home == name]
    lines = ['# Reference', 'Read from the code and from the comments behind the arguments. Each name leads '
             'to the cell of the notebook that defines it and explains why it is as it is.',
             '## What `import scenimefy` offers', ' · '.join(front), '## Modules',
             '| module | what is inside | names |\n|---|---|---|']
    rows = [f'| [scenimefy.{m.name}]({m.name}.md) | {plain(m.text)} | {len(m.public)} |' for m in found]
    lines[-1] += '\n' + '\n'.join(rows)
    names = '\n'.join(f'{m.name}' for m in found)
    return '\n\n'.join(lines) + f'\n\n```{{toctree}}\n:hidden:\n:maxdepth: 1\n\n{names}\n```\n'


def pages(found) -> dict: # file name -> markdown
    "All pages of the reference, of the modules `found`."
    (front,) = [m for m in found if m.name == 'front']
    entries = front_entries(front)
    made = {f'{m.name}.md': page(m, entries) for m in found}
    return made | {'index.md': index_page(found, entries)}


def write_pages(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages(modules()).items(): (folder/name).write_text(text, encoding='utf-8')
