"What every module leans on, where the lesson cannot look: permissions and devices that are not here."
import os

import pytest
import torch

from scenimefy.core import UserError, atomic_path, pick_device


@pytest.mark.skipif(os.name == 'nt', reason='POSIX permissions')
@pytest.mark.parametrize('umask, mode', [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_written_files_are_ordinary_ones(tmp_path, umask, mode):
    "As readable as the user's umask allows, not private like a temporary file."
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path/'x.txt') as tmp: tmp.write_text('x')
        assert os.umask(umask) == umask                             # and the umask is as it was
    finally: os.umask(before)
    assert (tmp_path/'x.txt').stat().st_mode & 0o777 == mode


def test_cards_are_counted_from_zero(monkeypatch):
    "Two cards: cuda:0 and cuda:1, and no cuda:2."
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert [pick_device(name).index for name in ('cuda', 'cuda:0', 'cuda:1')] == [None, 0, 1]
    with pytest.raises(UserError, match="'cuda:2' is not available"): pick_device('cuda:2')
