"What this computer can do: nothing is broken here, and what is broken elsewhere is named."
import contextlib, io, subprocess, sys

import torch
from rich.cells import cell_len
from rich.text import Text

import scenimefy.doctor as look
from scenimefy.doctor import BROKEN, _FINE, _NOTE


def test_memory_is_that_of_the_container(monkeypatch):
    "A machine of 1000 pages; a container may have less, never more, or no limit at all."
    monkeypatch.setattr(look.os, 'sysconf', lambda name: dict(SC_PAGE_SIZE=4096, SC_PHYS_PAGES=1000)[name])
    for limit, want in (('2000000\n', 2_000_000), ('9223372036854771712', 4_096_000), ('max', 4_096_000)):
        monkeypatch.setattr(look.Path, 'read_text', lambda self, limit=limit: limit)
        assert look._memory_total() == want

def test_it_can_do_without_half_precision(monkeypatch):
    "A device that fails in fp32 is broken; one that fails in bf16 is noted."
    for fails, marks in ((torch.bfloat16, [_FINE, _NOTE]), (torch.float32, [BROKEN, _FINE])):
        def tries(device, dtype, fails=fails): return 'not here' if dtype is fails else ''
        monkeypatch.setattr(look, '_tries', tries)
        cpu = [finding for finding in look._device_findings() if finding[1] == 'cpu']
        assert [mark for mark, _, _ in cpu] == marks
        assert [value.split()[0] for _, _, value in cpu] == ['fp32', 'bf16']

def test_it_sees_wrong_weights(monkeypatch, tmp_path):
    monkeypatch.setenv('SCENIMEFY_HOME', str(tmp_path))
    assert {mark for mark, *_ in look._weights_findings()} == {_FINE, _NOTE}
    (tmp_path/'Shinkai_net_G.pth').write_bytes(b'half')
    assert [name for mark, name, _ in look._weights_findings() if mark == BROKEN] == ['weights shinkai']

def test_a_missing_package_is_broken(monkeypatch):
    monkeypatch.setattr(look, '_PACKAGES', ('numpy', 'no-such-package'))
    assert look._package_findings()[2:] == [
        (_FINE, 'numpy', look.importlib.metadata.version('numpy')),
        (BROKEN, 'no-such-package', 'missing; pip install no-such-package')]

def test_a_part_that_fails_is_a_finding(monkeypatch):
    def fail(): raise RuntimeError('no\nprocessor')
    for name in ('package', 'device', 'weights', 'speed'):
        monkeypatch.setattr(look, f'_{name}_findings', lambda: [])
    monkeypatch.setattr(look, '_host_findings', fail)
    heard = []
    report = look.doctor(say=lambda *part: heard.append(part))
    assert report['computer'] == [(BROKEN, 'computer', 'RuntimeError: no processor')]
    assert heard == list(report.items())
    assert list(report) == ['packages', 'computer', 'devices', 'weights', 'speed']

def test_speed_is_the_middle_pass_without_the_first(monkeypatch):
    asked = []
    def seconds(device, n):
        asked.append((str(device), n))
        return [.5, 3., 1., 2.]
    monkeypatch.setattr(look, '_translation_seconds', seconds)
    assert look._speed_findings('cpu') == [(_FINE, 'speed', '2.00 s for a 256 px photo on cpu, fp32, '
                                            'paper-size network')]
    assert asked == [('cpu', 4)]

def test_importing_it_is_light():
    code = ('import sys, scenimefy.doctor; heavy = {"torch", "numpy", "PIL", "rich"} & set(sys.modules); '
            'assert not heavy, heavy')
    subprocess.run([sys.executable, '-c', code], check=True)


class Terminal(io.StringIO):
    def isatty(self): return True

PATH = '/somewhere/' + 'deep/'*12 + 'Shinkai_net_G.pth'
FOUND = [(_FINE, 'torch', '2.14.1'), (_NOTE, 'gpu', 'none [bold]'), (BROKEN, 'weights shinkai', PATH)]

def test_a_terminal_has_colors_and_its_width(monkeypatch):
    "Nothing is lost in a narrow terminal: a long path goes on in the next line of its column."
    for name in ('NO_COLOR', 'FORCE_COLOR', 'TTY_COMPATIBLE'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('TERM', 'xterm-256color')
    monkeypatch.setenv('COLUMNS', '40')
    with contextlib.redirect_stdout(Terminal()) as screen: look.print_findings('weights', FOUND)
    text = screen.getvalue()
    assert all(f'\x1b[{color}m  {mark}' in text for color, mark in ((32, _FINE), (33, _NOTE), (31, BROKEN)))
    plain = Text.from_ansi(text).plain
    assert all(cell_len(line) <= 40 for line in plain.splitlines()) and '…' not in plain
    assert PATH in ''.join(line[23:] for line in plain.splitlines())    # whole, over several lines
    assert '[bold]' in plain

def test_a_pipe_has_whole_lines(monkeypatch, capsys):
    "What a script reads: one line per finding, no color, no spaces at the end."
    monkeypatch.setenv('COLUMNS', '40')
    monkeypatch.setenv('FORCE_COLOR', '1')                              # as in a Jupyter kernel
    look.print_findings('weights', FOUND)
    assert capsys.readouterr().out == f'''
weights
  ok  torch             2.14.1
  --  gpu               none [bold]
  !!  weights shinkai   {PATH}
'''
