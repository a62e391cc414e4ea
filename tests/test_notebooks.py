"The notebooks as a whole: in sync with the library, readable on the web, importable in order."
import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import nbformat
import pytest

from make_readme import readme_text
from run_notebooks import figures

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
LESSONS = [p for p in NOTEBOOKS if p.name != 'index.ipynb']
ini = configparser.ConfigParser()
ini.read(ROOT/'settings.ini')
VERSION = ini['DEFAULT']['version']
lesson = pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)


def cells(path): return nbformat.read(path, 4).cells
def module(path): return re.sub(r'^\d+[a-z]?_', '', path.stem)
def number(path): return path.name.split('_')[0]


def cell_named(path, name):
    "The one cell of a notebook that is called so."
    (found,) = [c for c in cells(path) if c.id == name]
    return found


def test_there_are_lessons():
    modules = {p.stem for p in (ROOT/'scenimefy').glob('*.py')}
    assert len(LESSONS) >= 9 and {module(p) for p in LESSONS} <= modules


def test_library_is_what_the_notebooks_say(tmp_path):
    "Export a copy of the repository again: not one byte of the library changes."
    leave_out = shutil.ignore_patterns('__pycache__', 'images')
    for name in ('nbs', 'scenimefy'): shutil.copytree(ROOT/name, tmp_path/name, ignore=leave_out)
    for name in ('settings.ini', 'pyproject.toml', 'README.md'): shutil.copy(ROOT/name, tmp_path/name)
    subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'],
                   cwd=tmp_path, check=True, capture_output=True)
    files = sorted(p.name for p in (ROOT/'scenimefy').glob('*.py'))
    assert len(files) > 9
    changed = [f for f in files if (ROOT/'scenimefy'/f).read_text() != (tmp_path/'scenimefy'/f).read_text()]
    assert not changed, f'run nbdev_export: {changed}'


@lesson
def test_cells_have_stable_names(path):
    ids = [c.id for c in cells(path)]
    assert len(ids) == len(set(ids)) > 10
    random = [i for i in ids if re.fullmatch(r'[0-9a-f]{8}(-[0-9a-f-]+)?', i)]
    assert not random, 'a cell still has a random id'


@lesson
def test_opening(path):
    "Title with a claim, badge, what you will learn, and an install cell that keeps an installed torch."
    cs = cells(path)
    assert re.match(r'# .+\n> .+', cs[0].source)
    badge = f'colab.research.google.com/github/scenimefy/scenimefy/blob/main/nbs/{path.name}'
    assert badge in cs[1].source
    assert any('**In this notebook**' in c.source or 'In this notebook' in c.source for c in cs[:4])
    install = cell_named(path, 'install').source
    assert f'"scenimefy=={VERSION}"' in install and 'torch' not in install and 'find_spec' in install


@lesson
def test_outputs_are_committed(path):
    code = [c for c in cells(path) if c.cell_type == 'code']
    with_output = [c for c in code if c.outputs]
    assert len(with_output) >= 5
    kinds = {kind for c in code for o in c.outputs for kind in o.get('data', {})}
    assert kinds & {'image/png', 'image/jpeg'}, 'no picture'
    errors = [c.id for c in code for o in c.outputs if o.output_type == 'error']
    assert not errors
    assert path.stat().st_size < 1_500_000


@lesson
def test_every_figure_is_described(path):
    "Each picture carries a text for those who cannot see it; `run_notebooks.py` copies it from the metadata."
    for c in cells(path):
        shown = figures(c)
        texts = [output.metadata.get(kind, {}).get('alt', '') for output, kind in shown]
        written = list(c.metadata.get('alt', []))
        assert texts == written, f'{c.id}: {len(shown)} figures, {len(written)} descriptions'
        assert all(20 <= len(t) <= 400 and '\n' not in t for t in texts), c.id
        if c.cell_type != 'markdown': continue
        for text, link in re.findall(r'!\[([^]]*)\]\(([^)]*)\)', c.source):
            assert len(text) >= 12, (c.id, link)


def test_index_pictures_are_described():
    found = []
    for c in cells(ROOT/'nbs'/'index.ipynb'):
        found += [text for text, _ in re.findall(r'!\[([^]]*)\]\((images/[^)]*)\)', c.source)]
    assert len(found) >= 2 and all(len(t) >= 40 for t in found)


@lesson
def test_equations_are_called_what_they_are(path):
    """Eq. 1 is D_CLIP with the perceptual term, Eq. 2 the patch loss, Eq. 3 the total; the paper gives no
    learning rate."""
    wrong = re.compile(r'Eq\. 2(, | and )3\b|learning rate of the paper|paper.s learning rate')
    for c in cells(path):
        assert not wrong.search(c.source), c.id
        for line in c.source.splitlines():
            if 'D_CLIP' in line and 'Eq. 1' in line:
                assert re.search(r'of Eq\. 1|in Eq\. 1|part|perceptual', line), (c.id, line)


@lesson
def test_next_link_skips_nothing(path):
    "The last line that says Next leads to the notebook that follows."
    said = [c.source for c in cells(path) if re.search(r'^\W*Next\b', c.source, re.M)]
    if path == LESSONS[-1]: return
    lines = [line for text in said for line in text.splitlines() if re.match(r'\W*Next\b', line)]
    links = re.findall(r'\(([\w]+\.ipynb)\)', ' '.join(lines))
    assert LESSONS[LESSONS.index(path) + 1].name in links, links


def test_commands_in_12_are_those_of_the_committed_tables():
    text = cell_named(ROOT/'nbs'/'12_ablate.ipynb', 'command-md').source
    for number in (3, 4):
        table = json.loads((ROOT/'scenimefy'/'results'/f'table{number}.json').read_text())
        seeds = {run['seed'] for run in table['runs'].values()}
        assert f'--table {number} --seeds {len(seeds)}' in text, number
    table3 = json.loads((ROOT/'scenimefy'/'results'/'table3.json').read_text())
    steps3 = table3['about']['settings']['steps']
    assert f'--budget {steps3}`' in text


@pytest.mark.twice
@lesson
def test_a_second_run_in_the_same_kernel(path):
    "No cell breaks a cell above it. Takes twice as long as the notebooks: `pytest -m twice`."
    command = [sys.executable, ROOT/'tests'/'run_notebooks.py', '--twice', path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]


@lesson
def test_no_paths_of_a_machine(path):
    text = path.read_text()
    found = re.findall(r'/(?:root|work|home|tmp)/[A-Za-z0-9._-]+', text)
    assert not found, found[:3]


@lesson
def test_widgets_have_a_static_twin(path):
    code = [c.source for c in cells(path) if c.cell_type == 'code']
    for widget in (c for c in code if re.search(r'\binteract\(', c)):
        drawing = set(re.findall(r'\b((?:draw|show)_(?!grid)\w+)', widget))
        others = '\n'.join(c for c in code if c != widget)
        assert any(f'{name}(' in others for name in drawing), f'nothing draws {drawing} at fixed settings'


def test_imports_go_downwards():
    "A module imports from lower numbers only."
    order = {module(p): number(p) for p in LESSONS}
    checked = 0
    for path in LESSONS:
        tree = ast.parse((ROOT/'scenimefy'/f'{module(path)}.py').read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module in order:
                checked += 1
                assert order[node.module] < number(path), f'{module(path)} imports {node.module}'
    assert checked > 10


def test_every_export_is_mentioned_in_a_test_or_lesson():
    "No public name is exported without being used outside the cell that defines it."
    unused = []
    for path in LESSONS:
        cs = [c for c in cells(path) if c.cell_type == 'code']
        exported = '\n'.join(c.source for c in cs if re.search(r'^#\|\s*exports?\b', c.source, re.M))
        rest = '\n'.join(c.source for c in cs if not re.search(r'^#\|\s*export', c.source, re.M))
        rest += '\n'.join(p.read_text() for p in (ROOT/'tests').glob('*.py'))
        rest += '\n'.join(p.read_text() for p in (ROOT/'scenimefy').glob('*.py') if p.stem != module(path))
        for node in ast.parse(exported.replace('%pip', '#')).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
            word = rf'\b{node.name}\b'
            elsewhere = re.search(word, rest) or len(re.findall(word, exported)) >= 2
            if not elsewhere: unused.append(f'{module(path)}.{node.name}')
    assert not unused, unused


def test_paper_map_points_at_cells():
    "Every cell that the index names exists in the notebook that it names."
    table = cell_named(ROOT/'nbs'/'index.ipynb', 'map').source
    ids = {number(p): {c.id for c in cells(p)} for p in LESSONS}
    checked = 0
    for row in table.splitlines():
        nbs = re.findall(r'\((\d+[a-z]?)_\w+\.ipynb\)', row)
        for cell in re.findall(r'`([a-z0-9-]+)`', row.split('|')[-2] if row.count('|') > 2 else ''):
            checked += 1
            assert any(cell in ids[n] for n in nbs), (cell, nbs)
    assert checked >= 12


def test_readme_is_the_index():
    "README.md is made from index.ipynb by `make readme`."
    assert readme_text() == (ROOT/'README.md').read_text(), 'run make readme'


def test_every_linked_file_exists():
    checked = 0
    for path in NOTEBOOKS:
        for c in cells(path):
            if c.cell_type != 'markdown': continue
            for link in re.findall(r'\]\(((?!http|#|attachment)[^)\s]+)\)', c.source):
                checked += 1
                name = link.split('#')[0]
                assert (ROOT/'nbs'/name).exists() or name in PLANNED, f'{path.name}: {link}'
    assert checked > 10


# ---- the style of the code, checked over the whole project

COLUMNS, ROWS = 110, 40
# the outer brackets of the assignment are nbdev's, and so are the lines in between
ALL_BLOCK = re.compile(r'^__all__ = \[.*?\]$', re.M | re.S)


def exported_modules():
    "Files that nbdev writes from notebooks; its own index is none of them."
    return [p for p in sorted((ROOT/'scenimefy').glob('*.py')) if p.name != '_modidx.py']


def written_code(path):
    "The code of a file; of an exported module without nbdev's `__all__` and the notebook's subtitle."
    text = path.read_text(encoding='utf-8')
    if 'AUTOGENERATED' in text: text = text[text.index('# AUTOGENERATED'):]
    return ALL_BLOCK.sub('', text)


def code_files():
    found = exported_modules() + [ROOT/'setup.py']
    for folder in ('tests', 'benchmarks', 'site'): found += sorted((ROOT/folder).glob('*.py'))
    return found


def code_cells():
    "(notebook and cell, its code), of all notebooks."
    return [(f'{p.name}#{c.id}', c.source) for p in NOTEBOOKS for c in cells(p) if c.cell_type == 'code']


def test_no_line_of_code_is_too_long():
    sources = [(str(p.relative_to(ROOT)), written_code(p)) for p in code_files()] + code_cells()
    assert len(sources) > 300
    long = []
    for name, code in sources:
        long += [f'{name}: {line.strip()}' for line in code.splitlines() if len(line) > COLUMNS]
    assert not long, f'{len(long)} lines above {COLUMNS} columns:\n' + '\n'.join(long)


def test_no_line_holds_two_statements():
    "A semicolon may end a line, which silences its output; it does not join statements."
    joined = []
    for path in NOTEBOOKS:
        for cell in (c for c in cells(path) if c.cell_type == 'code'):
            lines = re.sub(r'^(\s*)%', r'\1#', cell.source, flags=re.M).splitlines(keepends=True)
            for token in tokenize.generate_tokens(iter([*lines, '']).__next__):
                if token.type == tokenize.OP and token.string == ';' and token.line[token.end[1]:].strip():
                    joined.append(f'{path.name}#{cell.id}: {token.line.strip()}')
    assert not joined, '\n'.join(joined)


def test_no_cell_is_too_long():
    long = [name for name, code in code_cells() if len(code.splitlines()) > ROWS]
    assert not long, f'cells above {ROWS} lines: {long}'


def imported_names(path):
    "Every module, and every name of a module, that a file imports anywhere; relative ones in full."
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            package = 'scenimefy' if node.level else ''
            module = '.'.join(part for part in (package, node.module) if part)
            found |= {module} | {f'{module}.{a.name}' for a in node.names}
    return found


def imports(path, module):
    return any(name == module or name.startswith(f'{module}.') for name in imported_names(path))


def test_the_library_needs_neither_lessons_nor_a_test_framework():
    files = exported_modules()
    runs = ROOT/'scenimefy'/'runs.py'
    assert imports(runs, 'json') and imports(runs, 'scenimefy.core')
    assert not [p.name for p in files if p.stem != 'lesson' and imports(p, 'scenimefy.lesson')]
    assert not [p.name for p in files if imports(p, 'unittest')]


PLANNED = {'07_finetune.ipynb', '12_ablate.ipynb', '13_labs.ipynb', '14_bake.ipynb'}
