"""Execute notebooks in place, as `nbdev_test` would: cells for a GPU, the network or an evening are left alone.

    python tests/run_notebooks.py nbs/06_losses.ipynb …

One after the other: kernels that start at the same moment sometimes wait for each other forever.
"""
import re
import sys
import time

import nbformat
from nbclient import NotebookClient
from nbdev.config import get_config

FLAGS = '|'.join(get_config().tst_flags.split())          # those of settings.ini
SKIPPED = re.compile(rf'^#\|\s*({FLAGS}|eval:\s*false)\b', re.M)


class Client(NotebookClient):
    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if SKIPPED.search(cell.source): return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def run(path):
    start, nb = time.perf_counter(), nbformat.read(path, 4)
    Client(nb, timeout=900, kernel_name='python3', resources={'metadata': {'path': 'nbs'}},
           record_timing=False).execute()
    nb.metadata.pop('widgets', None)
    nbformat.write(nb, path)
    print(f'{path}: {time.perf_counter() - start:.0f} s', flush=True)


if __name__ == '__main__':
    for path in sys.argv[1:]: run(path)
