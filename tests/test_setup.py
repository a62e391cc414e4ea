"The setup cell of every notebook: one text, the wheel or else the repository, and nothing else is touched."
import shlex
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from types import SimpleNamespace

import nbformat
import pytest
import torch
from packaging.requirements import Requirement

import scenimefy.lesson as lesson
from make_setup import ROOT, install_cells, notebooks, setup_cell, write_setup
from outside import empty_environment, make_wheel, run_outside, surroundings
from scenimefy.core import bf16_note
from scenimefy.lesson import setup_report

ini = ConfigParser(delimiters=['='])
ini.read(ROOT/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
LESSONS = sorted((ROOT/'nbs').glob('*.ipynb'))


def test_one_text_in_all_notebooks():
    assert len(setup_cell().splitlines()) <= 8
    found = []
    for path in notebooks():
        cells = install_cells(nbformat.read(path, 4))
        assert len(cells) <= 1, path.name
        assert path.parent.name == 'answers' or cells, f'{path.name}: no setup cell'
        found += [path.name for c in cells if c.source != setup_cell()]
    assert not found, f'run python tests/make_setup.py: {found}'


def test_settings_name_version_and_address_once():
    text = setup_cell()
    assert f'"scenimefy=={cfg["version"]}"' in text
    assert cfg['source_url'] == f'{cfg["git_url"]}/archive/v{cfg["version"]}.zip'
    assert cfg['source_url'] in text


def test_make_setup_changes_nothing_else(tmp_path):
    sources = {'install': '#| eval: false\n# generated', 'other': 'x = 1'}
    cells = [nbformat.v4.new_code_cell(text, id=name) for name, text in sources.items()]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'lab.ipynb')
    assert write_setup(tmp_path/'lab.ipynb', 'text') and not write_setup(tmp_path/'lab.ipynb', 'text')
    assert [c.source for c in nbformat.read(tmp_path/'lab.ipynb', 4).cells] == ['text', 'x = 1']


def test_torch_of_colab_satisfies_the_requirement():
    "pip leaves a package alone that satisfies what is asked; a build for CUDA is one of its version."
    (ours,) = [r for r in map(Requirement, shlex.split(cfg['requirements'])) if r.name == 'torch']
    there = ['2.5.0+cu121', '2.6.0+cu124', '2.9.1+cu128', torch.__version__]
    assert all(ours.specifier.contains(version) for version in there)
    assert {s.operator for s in ours.specifier} == {'>='}


# ---- the report

def card(monkeypatch, name, gib, capability):
    "Pretend that there is such a card."
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda *_: name)
    properties = SimpleNamespace(total_memory=gib*2**30)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda *_: properties)


def reported(capsys):
    setup_report()
    (line,) = capsys.readouterr().out.splitlines()
    return line


def test_report_on_a_t4(monkeypatch, capsys):
    card(monkeypatch, 'Tesla T4', 14.7, (7, 5))
    line = reported(capsys)
    assert 'Tesla T4, 14.7 GiB' in line and 'no bf16' in line and 'colab presets fit' in line
    assert 'only imitates bf16' in bf16_note('cuda') and 'fp32 is faster' in bf16_note('cuda')


def test_report_on_other_cards(monkeypatch, capsys):
    card(monkeypatch, 'NVIDIA L4', 22.2, (8, 9))
    line = reported(capsys)
    assert 'fp32 or bf16' in line and 'colab presets fit' in line and bf16_note('cuda') == ''
    card(monkeypatch, 'GTX 1650', 3.9, (7, 5))
    assert 'may need more memory' in reported(capsys)


def test_report_on_a_processor(monkeypatch, capsys):
    monkeypatch.setattr(lesson, 'pick_device', lambda: torch.device('cpu'))
    line = reported(capsys)
    assert line.startswith(f'scenimefy {cfg["version"]} on the processor, ') and 'T4' not in line


def test_presets_ask_for_no_bf16():
    "What a T4 cannot do is never chosen for it."
    from scenimefy.finetune import FinetuneSettings
    from scenimefy.pretrain import PretrainSettings
    from scenimefy.semisup import SemisupSettings
    for settings in (FinetuneSettings, PretrainSettings, SemisupSettings):
        for name in settings.presets(): assert settings.preset(name).precision == 'fp32'


def test_bf16_on_a_t4_is_a_clear_warning(monkeypatch, tmp_path):
    from scenimefy.runs import Processes
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: (7, 5))
    monkeypatch.setattr('scenimefy.runs.pick_device', lambda name: torch.device('cuda'))
    with pytest.warns(UserWarning, match='cuda only imitates bf16.*fp32 is faster'):
        Processes(tmp_path, 'cuda', 'bf16')


def test_counting_of_a_step():
    "benchmarks/presets.py counts what is alive and what is computed, without numbers."
    sys.path.insert(0, str(ROOT/'benchmarks'))
    from presets import counted
    net = torch.nn.Linear(10, 20, device='meta')
    def act():
        for _ in range(3): net(torch.empty(5, 10, device='meta'))        # each result is freed again
    peak, operations = counted([net], [], act)
    assert operations == 3*2*5*10*20
    weights, batch, result = 220*4, 50*4, 100*4
    assert weights + batch + result <= peak <= weights + 2*(batch + result)


# ---- outside the repository

RUN = ('import sys; from execnb.shell import CaptureShell; shell = CaptureShell(); '
       'out = shell.run(open("cell.py").read()); print(out); import scenimefy; print(scenimefy.__file__)')


@pytest.fixture(scope='module')
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheels')
    make_wheel(folder)
    return folder


def set_up(python, cell, wheels, folder):
    "Run a setup cell in an empty folder; what it printed, and the names that are installed now."
    (folder/'cell.py').write_text(cell)
    done = subprocess.run([str(python), '-c', RUN], cwd=folder, env=surroundings(wheels), capture_output=True,
                          text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    (site,) = python.parent.parent.glob('lib/python*/site-packages')
    assert done.stdout.splitlines()[-1] == str(site/'scenimefy'/'__init__.py'), done.stdout[-500:]
    return done.stdout, {p.name for p in site.iterdir()}


OURS = {'scenimefy', f'scenimefy-{cfg["version"]}.dist-info', 'shared.pth'}


def test_setup_cell_installs_the_wheel_and_nothing_else(wheels, tmp_path):
    python = empty_environment(tmp_path/'venv')
    said, installed = set_up(python, setup_cell(), wheels, tmp_path)
    assert f'scenimefy {cfg["version"]} on ' in said and 'ERROR' not in said
    assert installed == OURS
    said, installed = set_up(python, setup_cell(), tmp_path/'no-wheels', tmp_path)   # a second time: nothing
    assert 'ERROR' not in said and installed == OURS


def test_setup_cell_falls_back_to_the_repository(tmp_path):
    "No such release: the archive of the tag is built. Here it is a zip of this working tree."
    archive = tmp_path/'v1.zip'
    git = ['git', 'ls-files', '-z', '-co', '--exclude-standard']
    listed = subprocess.run(git, cwd=ROOT, capture_output=True)
    if listed.returncode: pytest.skip('this is no git checkout')
    with zipfile.ZipFile(archive, 'w') as z:
        names = [n for n in listed.stdout.decode().split('\0') if n and not n.startswith('nbs/')]
        for name in names:
            if (ROOT/name).is_file(): z.write(ROOT/name, f'top/{name}')
    (tmp_path/'none').mkdir()
    cell = setup_cell().replace(cfg['source_url'], archive.as_uri())
    said, installed = set_up(empty_environment(tmp_path/'venv'), cell, tmp_path/'none', tmp_path)
    assert f'scenimefy {cfg["version"]} on ' in said
    assert installed == OURS


@pytest.mark.twice
@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_notebook_runs_twice_outside(path, wheels, outside_python):
    "Each notebook alone in an empty folder, with the wheel: all cells, and all cells again."
    done = run_outside(outside_python, path, wheels, limit=900)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-2000:]


@pytest.fixture(scope='module')
def outside_python(tmp_path_factory): return empty_environment(tmp_path_factory.mktemp('outside')/'venv')
