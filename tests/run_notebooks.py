"""Execute notebooks in place, as `nbdev_test` would: cells for a GPU, the network or an evening are left alone.

    python tests/run_notebooks.py nbs/06_losses.ipynb …             # in place, with outputs and their descriptions
    python tests/run_notebooks.py --twice nbs/06_losses.ipynb …     # two runs in one kernel; nothing is written
    python tests/run_notebooks.py --describe nbs/06_losses.ipynb …  # only copies the descriptions to the outputs

A cell that draws keeps a description of each of its figures in its metadata (`alt`, a list of texts). They are copied
to the outputs, where readers of the screen and converted pages find them.

One notebook after the other: kernels that start at the same moment sometimes wait for each other forever.
"""
import os
import re
import sys
import time

import nbformat
from nbclient import NotebookClient
from nbdev.config import get_config

FLAGS = '|'.join(get_config().tst_flags.split())          # those of settings.ini
SKIPPED = re.compile(rf'^#\|\s*({FLAGS}|eval:\s*false)\b', re.M)
PICTURES = ('image/png', 'image/jpeg')


class Client(NotebookClient):
    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if SKIPPED.search(cell.source): return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def execute(nb):
    Client(nb, timeout=900, kernel_name='python3', resources={'metadata': {'path': 'nbs'}}, record_timing=False).execute()


def figures(cell) -> list: # of (output, kind of picture)
    return [(o, kind) for o in cell.get('outputs', []) for kind in PICTURES if kind in o.get('data', {})]


def describe(nb):
    "Copy the descriptions of a cell's figures to its outputs."
    for cell in nb.cells:
        for (output, kind), text in zip(figures(cell), cell.metadata.get('alt', [])): output.metadata[kind] = {'alt': text}


def run(path):
    start, nb = time.perf_counter(), nbformat.read(path, 4)
    execute(nb)
    nb.metadata.pop('widgets', None)
    describe(nb)
    nbformat.write(nb, path)
    print(f'{path}: {time.perf_counter() - start:.0f} s', flush=True)


def run_twice(path):
    "All cells, and then all cells again, as a reader does who presses Run All a second time. In this process, as nbdev_test."
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    shell = CaptureShell(path)
    for _ in range(2): shell.run_all(read_nb(path), exc_stop=True, preproc=lambda cell: bool(SKIPPED.search(cell.source)))


if __name__ == '__main__':
    for path in sys.argv[1:]:
        if path.startswith('--'): continue
        if '--twice' in sys.argv:
            path = os.path.abspath(path)
            os.chdir(os.path.dirname(path))
            run_twice(path)
        elif '--describe' in sys.argv:
            nb = nbformat.read(path, 4)
            describe(nb)
            nbformat.write(nb, path)
        else: run(path)
