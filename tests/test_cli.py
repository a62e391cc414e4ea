"The command line: flags, exit statuses, and what a person reads when something goes wrong."
import json, os, signal, subprocess, sys, time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import scenimefy.cli as cli
from scenimefy.core import SettingsError, UserError
from scenimefy.demo import DemoSettings
from scenimefy.semisup import SemisupSettings, Stopped, read_history
from scenimefy.stylize import save_generator
from scenimefy.translator import ResnetGenerator

PROGRAM = [sys.executable, '-c', 'from scenimefy.cli import main; main()']
SMALL = ('--preset tiny --size 16 --load-size 16 --batch 1 --ngf 4 --ndf 4 --n-blocks 5 --n-layers 1 --head-dim 8 '
         '--n-patches 8 --epochs 2 --epoch-steps 2 --log-every 1 --save-every 1 --sample-every 50').split()


def run(*words):
    return CliRunner().invoke(cli.app, [str(w) for w in words])

def shell(*words, **more):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run([*PROGRAM, *map(str, words)], capture_output=True, text=True, env=env, timeout=120, **more)

def one_line(result, status=1):
    "The single line that a failed command left; no traceback."
    assert result.exit_code == status, result.output
    lines = [l for l in result.output.splitlines() if l.startswith('scenimefy:')]
    assert len(lines) == 1 and 'Traceback' not in result.output, result.output
    return lines[0]

@pytest.fixture(scope='session')
def net(tmp_path_factory):
    torch.manual_seed(0)
    return save_generator(ResnetGenerator(3, 3, 4, 5), tmp_path_factory.mktemp('net')/'net.safetensors')

@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp('pictures')
    for sub in ('photos', 'anime', 'pairs/trainA', 'pairs/trainB'):
        (root/sub).mkdir(parents=True)
        for i in range(3): Image.effect_noise((20, 20), 90).convert('RGB').save(root/sub/f'{i}.png')
    return root

@pytest.fixture
def folders(pictures):
    return ['--photos', pictures/'photos', '--anime', pictures/'anime', '--pairs', pictures/'pairs']


# --- the program -----------------------------------------------------------------------------------

def test_help_is_light_and_complete():
    code = ("import sys; from typer.testing import CliRunner; import scenimefy.cli as c; "
            "r = CliRunner().invoke(c.app, ['--help']); print(r.output); "
            "heavy = {'torch', 'numpy', 'PIL', 'matplotlib', 'accelerate'} & set(sys.modules); assert not heavy, heavy")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = done.stdout.split('Commands:')[1].split()
    assert {'demo', 'stylize', 'train', 'doctor'} <= set(commands)
    assert not {'pretrain', 'pairs', 'evaluate', 'ablate', 'app'} & set(commands)   # no promises

def test_version():
    import scenimefy
    assert run('--version').output.strip() == f'scenimefy {scenimefy.__version__}'

@pytest.mark.parametrize('line', ['nonsense', 'stylize', 'stylize a.png', 'stylize a.png -o x --wieghts y', 'doctor now',
                                  'train', 'train --photos x', 'demo --seconds soon', 'demo --seconds -1', '--nonsense', ''])
def test_usage_errors_are_2(line):
    result = run(*line.split())
    assert result.exit_code == 2 and 'Traceback' not in result.output and 'Usage' in result.output

def test_reader_of_the_pipe_leaves():
    read, write = os.pipe()
    os.close(read)
    try: done = subprocess.run([*PROGRAM, '--help'], stdout=write, stderr=subprocess.PIPE, timeout=60)
    finally: os.close(write)
    assert done.stderr == b'' and done.returncode == 1


# --- errors ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('error, status, text', [
    (UserError('lake.jpg:\n the file\n ends early'), 1, 'scenimefy: lake.jpg: the file ends early'),
    (SettingsError('lr = 7 is out of range'), 2, 'lr = 7'),
    (Stopped('stopped by SIGINT after step 3'), 130, 'SIGINT'),
    (Stopped('stopped by SIGTERM after step 3'), 143, 'SIGTERM'),
    (KeyboardInterrupt(), 130, 'interrupted'),
    (ZeroDivisionError('division by zero'), 1, '--debug'),
    (RuntimeError(''), 1, 'RuntimeError')])
def test_errors_become_one_line(monkeypatch, error, status, text):
    def fail(*a, **k): raise error
    monkeypatch.setattr('scenimefy.stylize.stylize_folder', fail)
    assert text in one_line(run('stylize', 'a.png', '-o', 'x'), status)

@pytest.mark.parametrize('words', ['--debug stylize a.png -o x', 'stylize a.png -o x --debug', 'stylize --debug a.png -o x'])
def test_debug_anywhere(monkeypatch, words):
    def fail(*a, **k): raise ZeroDivisionError('here')
    monkeypatch.setattr('scenimefy.stylize.stylize_folder', fail)
    result = run(*words.split())
    assert result.exit_code == 1 and 'Traceback' in result.output and 'test_cli.py' in result.output

def test_a_file_called_debug(monkeypatch):
    seen = []
    def look(paths, *a, **k): seen.extend(map(str, paths)); raise UserError('enough')
    monkeypatch.setattr('scenimefy.stylize.stylize_folder', look)
    assert 'Traceback' not in run('stylize', '-o', 'x', '--', '--debug').output and seen == ['--debug']


# --- flags from the settings -----------------------------------------------------------------------

@pytest.fixture
def caught(monkeypatch):
    "The settings that `train` was called with, instead of a training."
    seen = []
    monkeypatch.setattr('scenimefy.semisup.train', lambda cfg, *a, **k: seen.append(cfg) or Path('w'))
    return seen

FIELDS = [f for f in fields(SemisupSettings) if f.name not in ('base', 'lam_content')]

def other(f):
    "A valid value of field `f` that is not its default, as typed and as it should arrive."
    if isinstance(f.default, bool): return None, not f.default
    if f.metadata['choices']: v = next(c for c in f.metadata['choices'] if c != f.default); return v, v
    if isinstance(f.default, tuple): return '0.25,0.75', (.25, .75)
    v = type(f.default)((f.metadata['hi'] or 2*f.default + 4) if f.name != 'size' else 64)
    return str(v), v

@pytest.mark.parametrize('f', FIELDS, ids=lambda f: f.name)
def test_every_setting_is_a_flag(caught, folders, f):
    typed, value = other(f)
    name = '--' + f.name.replace('_', '-')
    words = [name.replace('--', '--no-') if f.default else name] if typed is None else [name, typed]
    result = run('train', *folders, '-o', 'unused', *words)
    assert result.exit_code == 0, result.output
    assert caught == [SemisupSettings().but(**{f.name: value})]

def test_help_names_value_unit_and_origin():
    text = ' '.join(run('train', '--help').output.split())
    tiny = SemisupSettings.preset('tiny')
    assert f'--lam-style NUM StylePatchNCE [0.05, tiny {tiny.lam_style}; paper §4.1]' in text
    assert '--identity / --no-identity' in text and f'256 px, tiny {tiny.size}' in text

def test_presets(caught, folders):
    for name in SemisupSettings.presets(): assert run('train', *folders, '-o', 'r', '--preset', name).exit_code == 0
    assert run('train', *folders, '-o', 'r').exit_code == 0
    assert caught == [SemisupSettings.preset(p) for p in [*SemisupSettings.presets(), 'paper']]

@pytest.mark.parametrize('words, text', [('--lr 7', 'lr = 7.0 is out of range'), ('--decay linear', "'cosine', 'none'"),
    ('--preset huge', 'tiny'), ('--betas 0.5,x', '0.5,0.999'), ('--lr nan', 'finite'), ('--size 512', 'load_size')])
def test_bad_values_are_2(caught, folders, words, text):
    assert text in one_line(run('train', *folders, '-o', 'r', *words.split()), 2) and not caught

@pytest.mark.parametrize('words', ['--identity False', '--size large', '--lam-stile 1', '--batch 1.5'])
def test_wrong_words_are_2(caught, folders, words):
    assert run('train', *folders, '-o', 'r', *words.split()).exit_code == 2 and not caught


# --- train -----------------------------------------------------------------------------------------

def test_train_and_resume(folders, tmp_path):
    out = tmp_path/'run'
    first = run('train', *folders, '-o', out, *SMALL)
    assert first.exit_code == 0 and (out/'translator.safetensors').exists(), first.output
    assert 'resume' in one_line(run('train', *folders, '-o', out, *SMALL))               # does not overwrite a run
    (out/'translator.safetensors').unlink()
    whole = read_history(out)
    newest = max((out/'checkpoints').iterdir())
    newest.unlink()                                                                      # as if killed after step 3
    assert run('train', *folders, '-o', out, '--resume').exit_code == 0                  # no flag is needed again
    again = read_history(out)
    assert again['step'] == [1, 2, 3, 4] and again['total'] == whole['total']
    assert 'lr' in one_line(run('train', *folders, '-o', out, '--resume', '--lr', '0.01'), 2)
    assert 'preset' in one_line(run('train', *folders, '-o', out, '--resume', '--preset', 'colab'), 2)
    assert run('train', *folders, '-o', out, '--resume', '--preset', 'tiny', '--workers', '0').exit_code == 0

def test_resume_of_nothing(folders, tmp_path):
    assert 'nothing to resume' in one_line(run('train', *folders, '-o', tmp_path/'none', '--resume'))
    (tmp_path/'settings.json').write_text('{"lr": ')
    assert 'JSON' in one_line(run('train', *folders, '-o', tmp_path, '--resume'), 2)

def test_missing_folder(pictures, tmp_path):
    line = one_line(run('train', '--photos', tmp_path/'gone', '--anime', pictures/'anime', '--pairs', pictures/'pairs',
                        '-o', tmp_path/'run', *SMALL))
    assert 'gone' in line and not (tmp_path/'run'/'checkpoints').exists()

@pytest.mark.skipif(os.name == 'nt', reason='POSIX signals')
def test_ctrl_c_saves(folders, tmp_path):
    out = tmp_path/'run'
    words = [*PROGRAM, 'train', *map(str, folders), '-o', str(out), *SMALL, '--epoch-steps', '100000', '--save-every', '100000']
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'})
    try:
        deadline = time.time() + 90
        while not (out/'log.jsonl').exists() or not (out/'log.jsonl').read_text():
            assert process.poll() is None and time.time() < deadline, process.communicate()
            time.sleep(.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally: process.kill()
    assert process.returncode == 130 and 'Traceback' not in err
    assert sum(l.startswith('scenimefy:') for l in err.replace('\r', '\n').splitlines()) == 1
    assert list((out/'checkpoints').iterdir()) and (out/'translator.safetensors').exists()


# --- stylize ---------------------------------------------------------------------------------------

def test_stylize_reports_every_file(net, tmp_path):
    Image.new('RGB', (13, 9), 'green').save(tmp_path/'good.png')
    (tmp_path/'text.jpg').write_text('hello')
    (tmp_path/'empty.png').touch()
    result = run('stylize', tmp_path, tmp_path/'missing.png', '-o', tmp_path/'out', '--weights', net)
    lines = [l for l in result.output.splitlines() if l.startswith('scenimefy:')]
    assert result.exit_code == 1 and '1 done, 3 failed' in result.output
    assert sorted(n for l in lines for n in ('text.jpg', 'empty.png', 'missing.png') if n in l) == \
           ['empty.png', 'missing.png', 'text.jpg'] and len(lines) == 3
    made = next((tmp_path/'out').rglob('good.png'))
    assert Image.open(made).size == (13, 9)
    assert run('stylize', tmp_path/'good.png', '-o', tmp_path/'out2', '--weights', net).exit_code == 0

def test_stylize_bad_requests(net, tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path/'a.png')
    assert 'no such file' in one_line(run('stylize', tmp_path/'a.png', '-o', tmp_path/'o', '--weights', tmp_path/'no.pth'))
    assert 'not available' in one_line(run('stylize', tmp_path/'a.png', '-o', tmp_path/'o', '--weights', net, '--device', 'cuda:99'))

@pytest.mark.skipif(sys.platform != 'linux', reason='file names of any bytes')
def test_unprintable_name(net, tmp_path):
    name = os.fsdecode(bytes(tmp_path) + b'/caf\xe9\x1b[31m.jpg')
    Path(name).write_text('no picture')
    done = shell('stylize', name, '-o', tmp_path/'o', '--weights', net)
    assert done.returncode == 1 and 'Traceback' not in done.stderr and '1 failed' in done.stdout


# --- doctor and demo -------------------------------------------------------------------------------

def test_doctor(monkeypatch):
    monkeypatch.setattr(cli, 'speed_findings', lambda: [(cli.FINE, 'speed', '0.5 s')])
    good = run('doctor')
    assert good.exit_code == 0 and 'torchvision' in good.output and 'float32 works' in good.output and 'shinkai' in good.output
    def fail(): raise RuntimeError('no processor')
    monkeypatch.setattr(cli, 'device_findings', fail)
    bad = run('doctor')
    assert bad.exit_code == 1 and 'no processor' in bad.output and 'speed' in bad.output   # the rest is still looked at

def test_doctor_sees_wrong_weights(monkeypatch, tmp_path):
    monkeypatch.setenv('SCENIMEFY_HOME', str(tmp_path))
    assert {m for m, *_ in cli.weights_findings()} == {cli.FINE, cli.NOTE}
    (tmp_path/'Shinkai_net_G.pth').write_bytes(b'half')
    assert cli.BROKEN in {m for m, *_ in cli.weights_findings()}

@pytest.fixture
def small_demo(monkeypatch):
    small = DemoSettings().but(n_photos=4, n_anime=4, n_pairs=4, draw_size=64, seconds=.1, n_test=4, n_show=1, show_size=32,
                               small=32)
    tiny = SemisupSettings.preset('tiny').but(size=16, load_size=16, ngf=4, ndf=4, n_blocks=5, n_layers=1, epochs=2, n_patches=8)
    monkeypatch.setattr('scenimefy.demo.DemoSettings', lambda: small)
    monkeypatch.setattr(SemisupSettings, 'preset', classmethod(lambda cls, name: tiny))

def test_demo(small_demo, tmp_path):
    (tmp_path/'more').mkdir()
    for path, color in ((tmp_path/'<b>&.png', 'red'), (tmp_path/'more'/'<b>&.jpg', 'blue')):
        Image.new('RGB', (60, 40), color).save(path)
    (tmp_path/'bad.jpg').write_text('no')
    result = run('demo', tmp_path/'<b>&.png', tmp_path/'more', tmp_path/'bad.jpg', tmp_path/'gone.jpg', '-o', tmp_path/'d',
                 '--seconds', '0.1')
    assert result.exit_code == 1, result.output
    assert result.output.index('cannot be done') < result.output.index('drawing a world')    # bad news first
    page = (tmp_path/'d'/'index.html').read_text(encoding='utf8')
    addresses = [p.split('"')[0] for mark in ('src="', 'srcset="', 'href="') for p in page.split(mark)[1:]]
    assert len(addresses) > 10 and all(a.startswith('data:image/') for a in addresses) and '<script' not in page
    assert '<b>&.png' not in page and '&lt;b&gt;&amp;.png' in page and 'bad.jpg' in page and 'gone.jpg' in page
    assert len(list((tmp_path/'d'/'pictures').iterdir())) == 2                               # same stem, two files
    assert run('demo', '-o', tmp_path/'d', '--seconds', '0.1').exit_code == 0                                    # twice into one folder
    assert not [p for p in tmp_path.iterdir() if p.suffix == '.html' or p.name.startswith('.')]

def test_demo_keeps_what_is_not_its_own(small_demo, tmp_path):
    (tmp_path/'work').mkdir()
    (tmp_path/'work'/'thesis.txt').write_text('all of it')
    assert 'did not make' in one_line(run('demo', '-o', tmp_path))
    assert (tmp_path/'work'/'thesis.txt').read_text() == 'all of it'
    (tmp_path/'file').touch()
    assert '-o' in one_line(run('demo', '-o', tmp_path/'file'))
