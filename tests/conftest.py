"Fixtures that several test files share."
from pathlib import Path

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
