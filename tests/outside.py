"""Notebooks as Colab has them: no repository around, and the package installed by their own setup cell.

    python tests/outside.py nbs/06_losses.ipynb …    # run each twice over; prints seconds, or what failed

An empty virtual environment sees every package of this one except scenimefy. Each notebook is copied alone
into an empty folder and runs in a process of its own: first its setup cell, then all cells, then all again.
"""
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make_wheel(folder) -> Path:
    pip = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-q', '-w', str(folder)]
    subprocess.run([*pip, str(ROOT)], check=True, capture_output=True)
    (made,) = Path(folder).glob('*.whl')
    return made


def empty_environment(folder) -> Path: # its python
    "A virtual environment that shares all packages of this one, but neither scenimefy nor its links."
    folder = Path(folder)
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(folder)], check=True)
    shared, (site,) = folder/'shared', folder.glob('lib/python*/site-packages')
    shared.mkdir()
    ours = re.compile(r'scenimefy|__editable__|.*\.pth$')
    for place in {sysconfig.get_path('purelib'), sysconfig.get_path('platlib'), *_added_folders()}:
        for entry in Path(place).iterdir():
            link = shared/entry.name
            if not ours.match(entry.name) and not link.is_symlink(): link.symlink_to(entry)
    (site/'shared.pth').write_text(f'{shared}\n')
    return folder/'bin'/'python'


def _added_folders() -> list:
    "Folders that a .pth file of this environment adds."
    found = []
    for file in Path(sysconfig.get_path('purelib')).glob('*.pth'):
        found += [line for line in file.read_text().splitlines() if Path(line).is_dir() and line != str(ROOT)]
    return found


def surroundings(wheels) -> dict:
    "Environment variables of a process that finds wheels only in the folder `wheels`, and no repository."
    # IPython would add the packages of the environment that VIRTUAL_ENV names, and with them this repository
    hidden = 'PYTHON', 'PIP_', 'VIRTUAL_ENV'
    env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    return {**env, 'PYTHONNOUSERSITE': '1', 'PIP_NO_INDEX': '1', 'PIP_FIND_LINKS': str(wheels),
            'PIP_NO_BUILD_ISOLATION': '0', 'PIP_DISABLE_PIP_VERSION_CHECK': '1'}


def skipped_flags() -> str:
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return '|'.join(ini['DEFAULT']['tst_flags'].split())


def run_outside(python, notebook, wheels, times=2, limit=600):
    "The finished process that ran a notebook in an empty folder; its output has the seconds of each run."
    with tempfile.TemporaryDirectory() as empty:
        shutil.copy(notebook, empty)
        shutil.copy(__file__, Path(empty)/'outside.py')
        inside = [str(python), 'outside.py', '--inside', Path(notebook).name, skipped_flags(), str(times)]
        return subprocess.run(inside, cwd=empty, env=surroundings(wheels), capture_output=True, text=True,
                              timeout=limit)


def inside(name, flags, times):
    "Run the setup cell, then every other cell `times` times, in one shell."
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    skipped = re.compile(rf'^#\|\s*({flags}|eval:\s*false)\b', re.M)
    name = os.path.abspath(name)                  # notebooks change the folder
    shell = CaptureShell(name)
    def other(cell): return cell.get('id') != 'install'
    def left_out(cell): return bool(skipped.search(cell.source))
    shell.run_all(read_nb(name), exc_stop=True, preproc=other)
    if 'shared' in sys.modules['scenimefy'].__file__ or sys.prefix not in sys.modules['scenimefy'].__file__:
        raise SystemExit('another scenimefy won: ' + sys.modules['scenimefy'].__file__)
    seconds = []
    for _ in range(int(times)):
        began = time.perf_counter()
        shell.run_all(read_nb(name), exc_stop=True, preproc=left_out)
        seconds.append(f'{time.perf_counter() - began:.0f} s')
    print('\nruns:', ', '.join(seconds))


def main(notebooks, limit=600):
    with tempfile.TemporaryDirectory() as work:
        wheels = Path(work)/'wheels'
        make_wheel(wheels)
        python = empty_environment(Path(work)/'venv')
        for notebook in notebooks:
            try: done = run_outside(python, notebook, wheels, limit=limit)
            except subprocess.TimeoutExpired:
                print(f'{notebook}: no end after {limit} s', flush=True)
                continue
            said = done.stdout.splitlines()
            if done.returncode == 0: print(f'{notebook}: {said[-1]}', flush=True)
            else: print(f'{notebook}: FAILED', *said[-5:], done.stderr[-2500:], sep='\n', flush=True)


if __name__ == '__main__':
    if '--inside' in sys.argv: inside(*sys.argv[2:])
    else: main(sys.argv[1:])
