"""The kit for a lent GPU, tried where there is none: the whole of it at a tiny size, and what it does when
things fail."""
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT/'benchmarks'/'gpu.py'


@pytest.fixture
def gpu():
    "The script as a module, fresh for each test."
    spec = importlib.util.spec_from_file_location('gpu_kit', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*words):
    "The script as a person would start it, on one core."
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    words = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(words, env=env, capture_output=True, text=True)


def record_in(out): return json.loads((out/'gpu.json').read_text())


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "One tiny run of everything."
    out, kept = tmp_path_factory.mktemp('out'), tmp_path_factory.mktemp('kept')
    minutes = 10                                                          # enough on a busy machine
    done = run('--device', 'cpu', '--tiny', '-o', out, '--minutes', minutes, '--work', kept)
    return SimpleNamespace(out=out, kept=kept, done=done, record=record_in(out))


# ---- the whole, tiny

def test_every_part_is_there(tiny):
    assert tiny.done.returncode == 0, tiny.done.stdout[-3000:] + tiny.done.stderr[-2000:]
    parts = tiny.record['parts']
    assert set(parts) == {'checks', 'data', 'bench', 'training'}
    assert all(state.get('ended', '').startswith('done') for state in parts.values()), parts
    assert tiny.done.stdout.splitlines()[-1] == f"{len(tiny.record['checks'])} passed, 0 failed, 0 skipped"
    assert 'torch' in tiny.record['machine'] and tiny.record['missing'] == {}
    assert tiny.record['about']['name'] == 'cpu-tiny'


def test_every_check_has_numbers_and_limits(tiny, gpu):
    assert [row['name'] for row in tiny.record['checks']] == list(gpu.CHECKS)
    for row in tiny.record['checks']:
        assert any(n['allowed'] is not None for n in row['numbers']), row['name']
        assert all(isinstance(n['gap'], float) for n in row['numbers']), row['name']


def test_every_speed_has_a_ratio(tiny, gpu):
    rows = tiny.record['bench']
    assert {row['group'] for row in rows} == set(gpu.BASES)
    measured = [row for row in rows if 'skipped' not in row]
    assert all(row['ratio'] > 0 and row['per_second'] > 0 for row in measured), measured
    for group, base in gpu.BASES.items():
        assert [row['ratio'] for row in measured if row['name'] == f'{group}: {base}'] == [1.]
    assert all('CUDA' in row['skipped'] for row in rows if 'skipped' in row)
    assert any('compiled' in row['name'] and row['graph_breaks'] == 0 for row in measured)


def test_training_leaves_files_that_come_back(tiny, gpu):
    log = tiny.record['training']
    assert log['steps_done'] == log['steps'] == 4 and log['log']['step'][-1] == 4
    assert log['before']['output_l1'] > 0 and log['after']['output_l1'] > 0
    files = [f for f in tiny.out.rglob('*') if f.is_file()]
    assert len(files) <= gpu.FILES and max(f.stat().st_size for f in files) <= gpu.LIMIT
    assert all(len(f.relative_to(tiny.out).parts) <= 2 for f in files)
    assert set(log['files']) < {f.name for f in files} and 'translator.safetensors' in log['files']


def test_parts_of_a_state_make_the_checkpoint(tiny, gpu, tmp_path):
    (checkpoint,) = (tiny.kept/'run'/'checkpoints').iterdir()
    assert len([f for f in tiny.record['training']['files'] if f.startswith('step-')]) > 1
    gpu.main(['--join', str(tiny.out/'train'), '-o', str(tmp_path/'state.safetensors')])
    a, b = load_file(checkpoint), load_file(tmp_path/'state.safetensors')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_table(tiny):
    text = (tiny.out/'gpu.md').read_text()
    titles = ('## Checks', '### Stage 3 step', '### stylize', '### StyleGAN step', '### pairs', '## Training')
    for title in titles: assert title in text


# ---- a training cut short

def train_here(gpu, tiny, out, until, state=None):
    "The training part, in this process, with the pictures of the tiny run."
    (out/'work').mkdir(parents=True)
    (out/'work'/'data').symlink_to(tiny.kept/'data')
    words = ['--device', 'cpu', '--tiny', '--part', 'training', '--until', until,
             '--work', out/'work', '-o', out]
    if state: words += ['--state', state]
    assert gpu.main([str(w) for w in words]) == 0
    return record_in(out)['training']


def test_out_of_time_and_on_again(tiny, gpu, tmp_path):
    "A training that is stopped leaves its state in OUT; another machine goes on from there."
    log = train_here(gpu, tiny, tmp_path/'first', time.time())
    assert log['steps_done'] == 1 and log['steps'] == 4 and 'SIGTERM' in log['ended']
    log = train_here(gpu, tiny, tmp_path/'second', time.time() + 100, tmp_path/'first'/'train')
    assert log['steps_done'] == 4 and log['log']['step'] == [2, 3, 4] and log['ended'] == 'all steps done'


# ---- what fails

def alive(pid):
    "Whether a process runs; one that is dead and not yet collected does not."
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError: return False


class Finished:
    "A process that has ended well."
    pid = 2**30          # of no process
    def wait(self, *seconds): return 0


def small(gpu, monkeypatch, **parts):
    "Only these parts, run in this process; returns the words that start them."
    for name in gpu.PARTS: monkeypatch.setitem(gpu.PARTS, name, parts.get(name, lambda kit: None))
    def start(args, name, until):
        gpu.work(gpu.parse(gpu.command(args, name, until)[2:]))
        return Finished()
    monkeypatch.setattr(gpu, 'start', start)
    return ['--device', 'cpu', '--tiny', '--minutes', '1']


def boom(*args): raise ValueError('broken on purpose')


def test_a_part_that_raises(gpu, monkeypatch, tmp_path):
    def train(kit): kit.record['training'].update(done=True)
    words = small(gpu, monkeypatch, bench=boom, checks=gpu.checks, training=train)
    monkeypatch.setattr(gpu, 'CHECKS', {'easy': lambda kit: [('nothing', 0., 1.)]})
    assert gpu.main([*words, '-o', str(tmp_path)]) == 0
    record = record_in(tmp_path)
    assert record['parts']['bench']['error'] == 'ValueError: broken on purpose'
    assert record['training'] == {'done': True} and record['parts']['checks']['ended'] == 'done'
    assert 'broken on purpose' in (tmp_path/'gpu.md').read_text()


def test_checks_that_fail(gpu, monkeypatch, tmp_path, capsys):
    def absent(kit): import no_such_module_at_all
    found = {'raises': boom,
             'too far': lambda kit: [('gap', 2., 1.)],
             'NaN': lambda kit: [('gap', float('nan'), 1.)],
             'cannot': absent,
             'good': lambda kit: [('gap', .5, 1.), ('only to know', 9., None)]}
    monkeypatch.setattr(gpu, 'CHECKS', found)
    assert gpu.main([*small(gpu, monkeypatch, checks=gpu.checks), '-o', str(tmp_path)]) == 1
    rows = {row['name']: row for row in record_in(tmp_path)['checks']}
    assert list(rows) == list(found)
    assert rows['good']['ok'] and not rows['too far']['ok'] and not rows['NaN']['ok']
    assert 'broken on purpose' in rows['raises']['traceback']
    assert 'no_such_module' in rows['cannot']['skipped']
    assert rows['NaN']['numbers'][0]['gap'] == 'nan'
    assert capsys.readouterr().out.splitlines()[-1] == '1 passed, 3 failed, 1 skipped'


def test_largest_keeps_nan(gpu):
    assert gpu.largest([3., 1.]) == 3.
    for numbers in ([1., float('nan'), 3.], [1., float('nan')]): assert math.isnan(gpu.largest(numbers))


def test_a_row_whose_base_failed(gpu):
    rows = [dict(group='pairs', name='pairs: drawn and scored on the CPU', error='no'),
            dict(group='pairs', name='pairs: other', per_second=2.)]
    gpu.ratios(rows)
    assert rows[1]['ratio'] is None and 'not measured: no' in '\n'.join(gpu.bench_lines(rows[:1]))


DIES = '''
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location('kit', sys.argv[1])
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)
def good(kit): return [('x', 0., 1.)]
gpu.CHECKS = {'a': good, 'b': lambda kit: os._exit(77), 'c': good}
sys.exit(gpu.main(sys.argv[2:]))
'''


def test_a_process_that_dies_loses_one_item(gpu, monkeypatch, tmp_path):
    "The next life of the part goes on behind it."
    real = gpu.command
    def command(*args): return [sys.executable, '-c', DIES, str(SCRIPT), *real(*args)[2:]]
    monkeypatch.setattr(gpu, 'command', command)
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    words = ['--device', 'cpu', '--tiny', '--only', 'checks', '--train', 'none', '-o', str(tmp_path)]
    assert gpu.main(words) == 1
    rows = record_in(tmp_path)['checks']
    assert [row['name'] for row in rows] == ['a', 'b', 'c'] and rows[2]['ok']
    assert rows[1]['error'] == 'its process ended with status 77'


HANGS = '''
import subprocess, sys, time
helper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
with open(sys.argv[1], 'a') as f: f.write(f'{helper.pid}\\n')
time.sleep(60)
'''


def test_it_ends_in_time(gpu, monkeypatch, tmp_path):
    "A part that hangs is stopped at the end of its share, and so are its helpers."
    def command(*args): return [sys.executable, '-c', HANGS, str(tmp_path/'helpers')]
    monkeypatch.setattr(gpu, 'command', command)
    began = time.monotonic()
    assert gpu.main(['--device', 'cpu', '--tiny', '--minutes', '.05', '-o', str(tmp_path)]) == 1
    assert time.monotonic() - began < 15
    for pid in map(int, (tmp_path/'helpers').read_text().split()):
        assert not alive(pid), pid
    states = record_in(tmp_path)['parts']
    for part in ('checks', 'bench', 'training'):
        assert states[part]['error'] == 'stopped at the end of its time', part


def test_without_a_card(tmp_path):
    "On a machine without CUDA the command of the docstring says so, and fails."
    if torch.cuda.is_available(): pytest.skip('there is one')
    done = run('-o', tmp_path, '--train', 'none', '--only', 'checks')
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == '0 passed, 0 failed, 0 skipped'
    assert 'no CUDA card' in record_in(tmp_path)['parts']['checks']['skipped']


def test_large_files(gpu, monkeypatch, tmp_path):
    """A state above the limit comes in parts; anything else stays where it is, and so does a state with one
    huge tensor."""
    out, state = tmp_path/'out', 'step-00000001.safetensors'
    out.mkdir()
    save_file({str(i): torch.full((1000,), float(i)) for i in range(9)}, tmp_path/state, {'step': '1'})
    (tmp_path/'film.bin').write_bytes(bytes(20_000))
    save_file({'huge': torch.zeros(9000)}, tmp_path/'huge.safetensors')
    monkeypatch.setattr(gpu, 'LIMIT', 16_000)
    found = {name: gpu.bring(tmp_path/name, out) for name in (state, 'film.bin', 'huge.safetensors')}
    assert len(found[state]['files']) > 1 and all(f.stat().st_size <= 16_000 for f in out.iterdir())
    for name in ('film.bin', 'huge.safetensors'):
        assert not found[name]['files'] and name in found[name]['left_out'][0]
    gpu.join_state(out, tmp_path/'joined.safetensors')
    assert (load_file(tmp_path/'joined.safetensors')['8'] == 8).all()
    a_part = list(out.iterdir())[0]
    a_part.unlink()
    with pytest.raises(ValueError, match='all parts'): gpu.join_state(out, tmp_path/'joined.safetensors')


CARDS = {'NVIDIA H100 80GB HBM3': 'nvidia-h100', 'NVIDIA H200': 'nvidia-h200', 'Tesla T4': 'tesla-t4',
         'NVIDIA A100-SXM4-40GB': 'nvidia-a100', 'NVIDIA GeForce RTX 4090': 'nvidia-geforce-rtx-4090'}


def test_names_of_cards(gpu):
    assert {card: gpu.card_name(card) for card in CARDS} == CARDS
