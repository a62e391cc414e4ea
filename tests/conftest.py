"Fixtures that several test files share."
import os
from pathlib import Path

# two processes share two cores: one thread each, also in the programs that they start
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import pytest
import torch

REFERENCE = Path(__file__).resolve().parents[2]/'shared'/'reference'


@pytest.fixture
def reference():
    "`reference(name)`: numbers of the released implementation as tensors, where the workplace has them."
    def load(name):
        path = REFERENCE/f'{name}.npz'
        if not path.exists(): pytest.skip('the reference numbers are not part of the repository')
        with np.load(path, allow_pickle=False) as z: return {k: torch.from_numpy(z[k]) for k in z.files}
    return load


@pytest.fixture(autouse=True)
def few_threads():
    "Results and timings on two cores do not fight over threads."
    torch.set_num_threads(min(2, torch.get_num_threads()))
