"""nbs/faults.md, the table of faults, from the marks `fault` of the tests: `python tests/make_faults.py`."""
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT/'nbs'/'faults.md'
KINDS = {'killed': 'A process is killed', 'disk': 'A disk is full or refuses', 'picture': 'A picture lies',
         'weights': 'Weights or a checkpoint lie', 'download': 'A download goes wrong',
         'training': 'A training goes wrong', 'shared': 'Two at once', 'names': 'Names, folders and streams'}
HEAD = '''# What happens when something goes wrong

Each line is a test, and the line stands at the test itself: `python tests/make_faults.py` collects them.
`pytest -m fault` runs them all. The tests of `tests/test_faults.py` draw their moments and damages by a seed:
`FAULTS=20` makes them look 20 times as widely, `FAULTS_SEED=7` at other places.
'''


def texts(call) -> dict: # of a mark: its words by name
    found = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    return dict(what=ast.literal_eval(call.args[0]), **found)


def marks(file) -> list: # (name of the test, words of its mark), in the order of the file
    "The marks of one file, read and not run."
    found = []
    for node in ast.parse(file.read_text(encoding='utf8')).body:
        if not isinstance(node, ast.FunctionDef): continue
        for mark in node.decorator_list:
            named = isinstance(mark, ast.Call) and ast.unparse(mark.func) in ('fault', 'pytest.mark.fault')
            if named: found.append((node.name, texts(mark)))
    return found


def page_text() -> str: # markdown
    "A table for each kind of fault."
    first = ROOT/'tests'/'test_faults.py'
    files = [first, *(f for f in sorted(first.parent.glob('test_*.py')) if f != first)]
    parts = [HEAD]
    rows = {kind: [] for kind in KINDS}
    for file in files:
        for name, words in marks(file):
            kind, what = words['what'].split(': ', 1)
            cells = [what, words['happens'], words['left'], f'`{file.stem}.{name}`']
            rows[kind].append('| ' + ' | '.join(c.replace('|', r'\|') for c in cells) + ' |')
    for kind, title in KINDS.items():
        head = [f'\n## {title}\n', '| fault | what happens | what is left | test |', '|---|---|---|---|']
        parts.append('\n'.join([*head, *rows[kind], '']))
    return ''.join(parts)


if __name__ == '__main__': PAGE.write_text(page_text(), encoding='utf8')
