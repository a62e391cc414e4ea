"The wheel: what is in it, and that it works outside the repository."
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp('wheel')
    pip = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-q']
    subprocess.run([*pip, '-w', str(out), str(ROOT)], check=True, capture_output=True)
    (made,) = out.glob('*.whl')
    return made


def test_wheel_holds_what_is_needed_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        (metadata,) = [z.read(n).decode() for n in names if n.endswith('METADATA')]
        (entries,) = [z.read(n).decode() for n in names if n.endswith('entry_points.txt')]
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT/'scenimefy').rglob('*.py')}   # sub-packages too
    assert modules == {n for n in names if n.startswith('scenimefy/') and n.endswith('.py')}
    assert {f'{n.rpartition("/")[0]}/__init__.py' for n in modules} <= modules
    weights = {p.name for p in (ROOT/'scenimefy'/'weights').iterdir()}
    assert weights == {n.split('/')[-1] for n in names if n.startswith('scenimefy/weights/')}
    tables = {p.relative_to(ROOT).as_posix() for p in (ROOT/'scenimefy'/'results').rglob('*.*')}
    assert len(tables) > 20 and tables <= set(names)
    ours = 'clip', 'segmenter', 'stylegan', 'stylegan-anime', 'toonify', 'copy', 'drawn'
    bundled = {f'{name}.safetensors' for name in ours}
    files = (ROOT/'scenimefy'/'weights').glob('*.safetensors')
    assert bundled <= weights and sum(p.stat().st_size for p in files) <= 12e6
    others = [n for n in names if not n.startswith(('scenimefy/', 'scenimefy-'))]
    assert not others, 'something else is in the wheel'
    assert 'Requires-Python: >=3.10' in metadata and 'Requires-Dist: torch>=' in metadata
    runtime = [line for line in metadata.splitlines() if line.startswith('Requires-Dist')]
    runtime = [line for line in runtime if 'extra' not in line]
    assert runtime
    for name in ('nbdev', 'fastcore', 'pytest', 'torchmetrics'):
        assert not [line for line in runtime if name in line]
    assert 'scenimefy = scenimefy.cli:main' in entries
    assert wheel.stat().st_size < 14e6


def test_wheel_works_outside_the_repository(wheel, tmp_path):
    "Unpacked elsewhere, the repository out of sight: bundled networks load, one picture is translated."
    site = tmp_path/'site'
    with zipfile.ZipFile(wheel) as z: z.extractall(site)
    from PIL import Image
    Image.new('RGB', (33, 21), 'gray').save(tmp_path/'photo.png')
    code = ('import scenimefy, sys; from pathlib import Path; from scenimefy.cli import main; '
            'from scenimefy.doctor import _bundled_findings; '
            f'assert Path(scenimefy.__file__).is_relative_to({str(site)!r}), scenimefy.__file__; '
            'found = _bundled_findings(); '
            'assert len(found) == 5 and {m for m, *_ in found} == {"ok"}, found; '
            'sys.argv = "scenimefy stylize photo.png -o out --device cpu".split(); main()')
    env = dict(os.environ, PYTHONPATH=str(site), PYTHONSAFEPATH='1')
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Image.open(tmp_path/'out'/'photo.png').size == (33, 21)


def test_library_prints_and_imports_nothing_it_should_not():
    "Importing the library is quiet and does not pull development tools in."
    code = ('import sys, scenimefy.semisup, scenimefy.stylize, scenimefy.finetune, scenimefy.selection; '
            'import scenimefy.cli, scenimefy.doctor; '
            'print([m for m in ("nbdev", "fastcore", "execnb", "scipy", "IPython") if m in sys.modules])')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'
