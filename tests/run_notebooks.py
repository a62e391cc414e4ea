"""Execute notebooks in place, as `nbdev_test` would: cells for a GPU, the network or an evening are left out.

    python tests/run_notebooks.py nbs/06_losses.ipynb …             # in place, with outputs
    python tests/run_notebooks.py --twice nbs/06_losses.ipynb …     # twice in one kernel; writes nothing
    python tests/run_notebooks.py --describe nbs/06_losses.ipynb …  # only copies the descriptions

A cell that draws keeps a description of each of its figures in its metadata (`alt`, a list of texts). They
are copied to the outputs, where screen readers and converted pages find them.

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
    "Run the cells of a notebook that is in memory, in the folder of the notebooks."
    place = {'metadata': {'path': 'nbs'}}
    Client(nb, timeout=900, kernel_name='python3', resources=place, record_timing=False).execute()


def figures(cell) -> list: # of (output, kind of picture)
    found = []
    for output in cell.get('outputs', []):
        found += [(output, kind) for kind in PICTURES if kind in output.get('data', {})]
    return found


def describe(nb):
    "Copy the descriptions of a cell's figures to its outputs."
    for cell in nb.cells:
        texts = cell.metadata.get('alt', [])
        for (output, kind), text in zip(figures(cell), texts): output.metadata[kind] = {'alt': text}


def run(path):
    "Execute a notebook and write it back with its outputs."
    start, nb = time.perf_counter(), nbformat.read(path, 4)
    execute(nb)
    nb.metadata.pop('widgets', None)
    describe(nb)
    nbformat.write(nb, path)
    print(f'{path}: {time.perf_counter() - start:.0f} s', flush=True)


def run_twice(path):
    """All cells, and then all cells again, as a reader does who presses Run All a second time. In this
    process, as nbdev_test."""
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    def left_out(cell): return bool(SKIPPED.search(cell.source))
    shell = CaptureShell(path)
    for _ in range(2): shell.run_all(read_nb(path), exc_stop=True, preproc=left_out)


def only_describe(path):
    "Copy the descriptions in a notebook's file, without executing it."
    nb = nbformat.read(path, 4)
    describe(nb)
    nbformat.write(nb, path)


if __name__ == '__main__':
    for path in sys.argv[1:]:
        if path.startswith('--'): continue
        if '--twice' in sys.argv:
            path = os.path.abspath(path)
            os.chdir(os.path.dirname(path))
            run_twice(path)
        elif '--describe' in sys.argv: only_describe(path)
        else: run(path)
