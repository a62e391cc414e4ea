"""The setup cell of every notebook and lab, from settings.ini: `python tests/make_setup.py`.

A cell that is called `install` gets the text below. The package is installed if it is not here: the wheel of
this version, else the repository at its tag. pip keeps a torch that satisfies `requirements`, and Colab's
does.
"""
from configparser import ConfigParser
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
CELL = """#| eval: false
from importlib.util import find_spec
if find_spec('{lib_name}') is None:
    %pip install -q "{lib_name}=={version}"
if find_spec('{lib_name}') is None:   # not released yet: the repository
    %pip install -q "{source_url}"
from {lib_name}.lesson import setup_report
setup_report()"""


def setup_cell() -> str:
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return CELL.format_map(ini['DEFAULT'])


def notebooks() -> list:
    "All notebooks and labs; answers and checkpoints of Jupyter have no setup cell."
    return [p for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]


def install_cells(nb) -> list: return [c for c in nb.cells if c.id == 'install']


def write_setup(path, text:str) -> bool: # whether the file was changed
    nb = nbformat.read(path, 4)
    old = [c for c in install_cells(nb) if c.source != text]
    for c in old: c.source, c.outputs, c.execution_count = text, [], None
    if old: nbformat.write(nb, path)
    return bool(old)


if __name__ == '__main__':
    changed = [p.relative_to(ROOT) for p in notebooks() if write_setup(p, setup_cell())]
    print(*changed, sep='\n')
