"The command line: flags, exit statuses, and what a person reads when something goes wrong."
import json, os, re, shutil, signal, subprocess, sys, time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import scenimefy.cli as cli
from scenimefy.core import SettingsError, UserError
from scenimefy.demo import DemoSettings
from scenimefy.doctor import _weights_findings
from scenimefy.finetune import FinetuneSettings
from scenimefy.priors import save_half, tiny_segmenter_net
from scenimefy.runs import Stopped, read_history
from scenimefy.selection import Selected, SelectSettings
from scenimefy.semisup import SemisupSettings
from scenimefy.pretrain import PretrainSettings
from scenimefy.stylegan import Discriminator, Generator, save_stylegan
from scenimefy.translator import ResnetGenerator, load_translator, save_translator

PROGRAM = [sys.executable, '-c', 'from scenimefy.cli import main; main()']
SMALL = ('--preset tiny --size 16 --load-size 16 --batch 1 --ngf 4 --ndf 4 --n-blocks 5 --n-layers 1 '
         '--head-dim 8 --n-patches 8 --epochs 2 --epoch-steps 2 '
         '--log-every 1 --save-every 1 --sample-every 50').split()


def run(*words):
    return CliRunner().invoke(cli.app, [str(w) for w in words])

def shell(*words, **more):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run([*PROGRAM, *map(str, words)], capture_output=True, text=True, env=env, timeout=120,
                          **more)

def one_line(result, status=1):
    "The single line that a failed command left; no traceback."
    assert result.exit_code == status, result.output
    lines = [l for l in result.output.splitlines() if l.startswith('scenimefy:')]
    assert len(lines) == 1 and 'Traceback' not in result.output, result.output
    return lines[0]

@pytest.fixture(scope='session')
def net(tmp_path_factory):
    torch.manual_seed(0)
    return save_translator(ResnetGenerator(3, 3, 4, 5), tmp_path_factory.mktemp('net')/'net.safetensors')

@pytest.fixture(scope='session')
def painters(tmp_path_factory):
    "Files of two StyleGANs (32 px) with random weights, and of a segmenter."
    root, plan = tmp_path_factory.mktemp('painters'), {4: 8, 8: 8, 16: 8, 32: 8}
    torch.manual_seed(0)
    for name in 'ab':
        save_stylegan(root/f'{name}.safetensors', dict(g_ema=Generator(32, 16, 2, channels=plan).state_dict(),
                                                       d=Discriminator(32, channels=plan).state_dict()))
    save_half(tiny_segmenter_net(), root/'segmenter.safetensors')
    return root

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
            "heavy = {'torch', 'numpy', 'PIL', 'matplotlib', 'accelerate', 'rich'} & set(sys.modules); "
            "assert not heavy, heavy")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = re.findall(r'^  (\w+)  ', done.stdout.split('Commands:')[1], re.M)
    assert sorted(commands) == ['ablate', 'app', 'bake', 'bench', 'compare', 'convert', 'demo', 'doctor',
                                'evaluate', 'export', 'finetune', 'pairs', 'pretrain', 'stylize', 'train']

def test_version():
    import scenimefy
    assert run('--version').output.strip() == f'scenimefy {scenimefy.__version__}'

@pytest.mark.parametrize('line', [
    'nonsense', 'stylize', 'stylize a.png', 'stylize a.png -o x --wieghts y', 'doctor now', 'train',
    'train --photos x', 'demo --seconds soon', 'demo --seconds -1', '--nonsense', ''])
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

@pytest.mark.parametrize('words', ['--debug stylize a.png -o x', 'stylize a.png -o x --debug',
                                   'stylize --debug a.png -o x'])
def test_debug_anywhere(monkeypatch, words):
    def fail(*a, **k): raise ZeroDivisionError('here')
    monkeypatch.setattr('scenimefy.stylize.stylize_folder', fail)
    result = run(*words.split())
    assert result.exit_code == 1 and 'Traceback' in result.output and 'test_cli.py' in result.output

def test_a_file_called_debug(monkeypatch):
    seen = []
    def look(paths, *a, **k):
        seen.extend(map(str, paths))
        raise UserError('enough')
    monkeypatch.setattr('scenimefy.stylize.stylize_folder', look)
    assert 'Traceback' not in run('stylize', '-o', 'x', '--', '--debug').output and seen == ['--debug']


# --- flags from the settings -----------------------------------------------------------------------

@pytest.fixture
def caught(monkeypatch):
    "The settings that a stage was called with, instead of the stage."
    seen = []
    def catch(cfg, *a, **k):
        seen.append(cfg)
        return Path('w')
    for name in ('semisup.train', 'pretrain.pretrain', 'finetune.finetune'):
        monkeypatch.setattr(f'scenimefy.{name}', catch)
    def catch_pairs(cfg, *a):
        seen.append(cfg)
        return Selected(Path('p'), 3, 4)
    monkeypatch.setattr('scenimefy.selection.make_pairs', catch_pairs)
    for name in ('selection.StyleganPairs', 'report.write_report', 'priors.load_segmenter'):
        monkeypatch.setattr(f'scenimefy.{name}', lambda *a, **k: 'made')
    return seen

STAGES = dict(train=SemisupSettings, pretrain=PretrainSettings, finetune=FinetuneSettings,
              pairs=SelectSettings)
FIELDS = [(name, f) for name, cls in STAGES.items() for f in fields(cls) if f.name not in cli._NO_FLAG]

def line_for(name, pictures, out='unused'):
    "The shortest command line that `scenimefy NAME` accepts."
    want = dict(train=['photos', 'anime', 'pairs'], pretrain=['photos'], finetune=['anime'], pairs=[])[name]
    return [name, *(w for k in want for w in (f'--{k}', pictures/k)), '-o', out]

def other(f):
    "A valid value of field `f` that is not its default, as typed and as it should arrive."
    if isinstance(f.default, bool): return None, not f.default
    others = [choice for choice in f.metadata['choices'] or () if choice != f.default]
    if others: return others[0], others[0]
    if f.name == 'channels': return '8,8,8,8,8,8,8', (8,)*7
    if f.name == 'load_size': return '512', 512              # never below `size`
    if isinstance(f.default, tuple): return '0.25,0.75', (.25, .75)
    if isinstance(f.default, str): return 'tiny', 'tiny'
    if isinstance(f.default, float): v = f.default/2 or .5
    else: v = max(f.default//2, f.metadata['lo']) if f.default != f.metadata['lo'] else f.default + 1
    return str(v), 64 if f.name == 'size' else v

@pytest.mark.parametrize('name, f', FIELDS, ids=lambda v: getattr(v, 'name', v))
def test_every_setting_is_a_flag(caught, pictures, name, f):
    typed, value = other(f)
    flag = '--' + f.name.replace('_', '-')
    if typed is None: words = [flag.replace('--', '--no-', 1) if f.default else flag]
    else: words = [flag, str(value) if f.name == 'size' else typed]
    given = {f.name: value}
    if f.name == 'lam_content':           # a weight without a name is refused
        words += ['--content', 'vgg']
        given['content'] = 'vgg'
    result = run(*line_for(name, pictures), *words)
    assert result.exit_code == 0, result.output
    assert caught == [STAGES[name].preset('paper').but(**given)]

def test_help_names_value_unit_and_origin():
    text = ' '.join(run('train', '--help').output.split())
    tiny = SemisupSettings.preset('tiny')
    assert f'--lam-style NUM StylePatchNCE [0.05, tiny {tiny.lam_style}; paper §4.1]' in text
    assert '--identity / --no-identity' in text and f'256 px, tiny {tiny.size}' in text

def test_presets(caught, folders):
    for name in SemisupSettings.presets():
        assert run('train', *folders, '-o', 'r', '--preset', name).exit_code == 0
    assert run('train', *folders, '-o', 'r').exit_code == 0
    assert caught == [SemisupSettings.preset(p) for p in [*SemisupSettings.presets(), 'paper']]

@pytest.mark.parametrize('words, text', [
    ('--lr 7', 'lr = 7.0 is out of range'), ('--decay linear', "'cosine', 'none'"), ('--preset huge', 'tiny'),
    ('--betas 0.5,x', '0.5,0.999'), ('--lr nan', 'finite'), ('--size 512', 'load_size'),
    ('--lam-content 2', '--content'), ('--content color --lam-content 0', 'leave content at none'),
    ('--content colour', "'color', 'vgg'")])
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
    assert 'resume' in one_line(run('train', *folders, '-o', out, *SMALL))      # does not overwrite a run
    (out/'translator.safetensors').unlink()
    whole = read_history(out)
    newest = max((out/'checkpoints').iterdir())
    newest.unlink()                                                             # as if killed after step 3
    assert run('train', *folders, '-o', out, '--resume').exit_code == 0         # no flag is needed again
    again = read_history(out)
    assert again['step'] == [1, 2, 3, 4] and again['total'] == whole['total']
    assert 'lr' in one_line(run('train', *folders, '-o', out, '--resume', '--lr', '0.01'), 2)
    assert 'preset' in one_line(run('train', *folders, '-o', out, '--resume', '--preset', 'colab'), 2)
    assert run('train', *folders, '-o', out, '--resume', '--preset', 'tiny', '--workers', '0').exit_code == 0

def test_train_goes_on_from_a_copy(folders, tmp_path):
    "The run's folder is gone with its machine; the copy knows the settings, too."
    out, copy = tmp_path/'run', tmp_path/'copy'
    first = run('train', *folders, '-o', out, '--backup', copy, *SMALL)
    assert first.exit_code == 0, first.output
    whole = read_history(out)
    shutil.rmtree(out)
    max((copy/'checkpoints').iterdir()).unlink()                                # as if killed after step 3
    assert 'nothing to resume' in one_line(run('train', *folders, '-o', tmp_path/'none', '--resume'))
    assert run('train', *folders, '-o', out, '--resume', '--backup', copy).exit_code == 0
    assert read_history(out)['total'] == whole['total'] == read_history(copy)['total']

def test_train_on_several_folders_with_a_content_term(folders, pictures, tmp_path):
    out, more = tmp_path/'run', tmp_path/'more'
    more.mkdir()
    Image.effect_noise((50, 30), 90).convert('RGB').save(more/'wide.png')
    several = [*folders, '--photos', more]
    words = [*several, '-o', out, *SMALL, '--load-size', '0', '--content', 'color']
    assert run('train', *words).exit_code == 0
    kept = json.loads((out/'settings.json').read_text())
    assert (kept['content'], kept['lam_content'], kept['load_size']) == ('color', 10., 0)
    assert all(v > 0 for v in read_history(out)['content'])
    assert run('train', *several, '-o', out, '--resume').exit_code == 0         # no flag is needed again
    assert 'photos 2' in one_line(run('train', *folders, '-o', out, '--resume'))
    line = one_line(run('train', *folders, '--photos', tmp_path/'gone', '-o', tmp_path/'other', *SMALL))
    assert 'gone' in line and not (tmp_path/'other'/'checkpoints').exists()

def test_vgg_that_cannot_be_fetched_is_one_line(folders, tmp_path, monkeypatch):
    monkeypatch.setenv('SCENIMEFY_OFFLINE', '1')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    line = one_line(run('train', *folders, '-o', tmp_path/'run', *SMALL, '--content', 'vgg'))
    assert 'vgg19-dcbb9e9d.pth' in line

def test_resume_of_nothing(folders, tmp_path):
    assert 'nothing to resume' in one_line(run('train', *folders, '-o', tmp_path/'none', '--resume'))
    (tmp_path/'settings.json').write_text('{"lr": ')
    assert 'JSON' in one_line(run('train', *folders, '-o', tmp_path, '--resume'), 2)

def test_missing_folder(pictures, tmp_path):
    line = one_line(run('train', '--photos', tmp_path/'gone', '--anime', pictures/'anime',
                        '--pairs', pictures/'pairs', '-o', tmp_path/'run', *SMALL))
    assert 'gone' in line and not (tmp_path/'run'/'checkpoints').exists()

@pytest.mark.fault('killed: Ctrl-C while training',
                   happens='the step ends, the state is saved, status 130; --resume goes on',
                   left='a checkpoint of the last step')
@pytest.mark.skipif(os.name == 'nt', reason='POSIX signals')
def test_ctrl_c_saves(folders, tmp_path):
    out = tmp_path/'run'
    words = [*PROGRAM, 'train', *map(str, folders), '-o', str(out), *SMALL, '--epoch-steps', '100000',
             '--save-every', '100000']
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


# --- stages 1 and 2 --------------------------------------------------------------------------------

PRETRAIN = '--preset tiny --size 16 --channels 8,8,8 --style-dim 16 --n-mlp 2 --batch 2 --steps 2'.split()
FINETUNE = '--preset tiny --crops 2 --crop 8 --batch 2 --steps 2'.split()

def test_pretrain_resume_and_start(pictures, painters, tmp_path):
    words = ['pretrain', '--photos', pictures/'photos', '-o']
    assert run(*words, tmp_path/'run', *PRETRAIN).exit_code == 0
    assert 'resume' in one_line(run(*words, tmp_path/'run', *PRETRAIN))
    assert run(*words, tmp_path/'run', '--resume', '--steps', '3').exit_code == 0   # longer is fine,
    shorter = run(*words, tmp_path/'run', '--resume', '--steps', '2')
    assert 'already made 3 steps' in one_line(shorter, 2)                           # shorter is not
    assert 'batch' in one_line(run(*words, tmp_path/'run', '--resume', '--batch', '4'), 2)
    assert run(*words, tmp_path/'run', '--resume').exit_code == 0
    larger = list(PRETRAIN)
    for flag, value in (('--size', '32'), ('--channels', '8,8,8,8')): larger[larger.index(flag) + 1] = value
    grown = run(*words, tmp_path/'grown', *larger, '--start', tmp_path/'run'/'stylegan.safetensors')
    assert grown.exit_code == 0, grown.output
    assert 'no such file' in one_line(run(*words, tmp_path/'new', *PRETRAIN, '--start', tmp_path/'none'))
    assert 'channels' in one_line(run(*words, tmp_path/'new', *PRETRAIN, '--channels', '8,8'), 2)
    assert 'such as 96,48' in one_line(run(*words, tmp_path/'new', *PRETRAIN, '--channels', '8.5,8,8'), 2)

def test_finetune_and_resume(pictures, painters, tmp_path):
    words = ['finetune', '--source', painters/'a.safetensors', '--anime', pictures/'anime',
             '-o', tmp_path/'run']
    first = run(*words, *FINETUNE)
    assert first.exit_code == 0 and 'scenimefy pairs' in first.output
    assert (tmp_path/'run'/'anime.safetensors').exists()
    assert run(*words, '--resume').exit_code == 0
    assert 'lam_clip' in one_line(run(*words, '--resume', '--lam-clip', '2'), 2)
    assert 'crop' in one_line(run(*words[:-1], tmp_path/'new', *FINETUNE, '--crop', '64'), 2)
    words[2] = tmp_path/'none.pt'
    assert 'none.pt' in one_line(run(*words[:-1], tmp_path/'new', *FINETUNE))

def test_networks_that_nobody_named(monkeypatch, pictures, tmp_path):
    seen = []
    def finetune(cfg, source, *a, **k):
        seen.append(source)
        return Path('w')
    monkeypatch.setattr('scenimefy.finetune.finetune', finetune)
    for words in ('', '--preset tiny', '--source mine.pt'):
        assert run('finetune', '--anime', pictures/'anime', '-o', tmp_path, *words.split()).exit_code == 0
    assert seen == ['lhq', 'tiny', 'mine.pt']

def pair_words(painters, out, **more):
    flags = dict(preset='tiny', count=48, batch=2, max_lbce=9, min_categories=1, keep_best=.5,
                 source=painters/'a.safetensors', target=painters/'b.safetensors',
                 segmenter=painters/'segmenter.safetensors', device='cpu') | more
    words = ['pairs', '-o', str(out)]
    for name, value in flags.items(): words += [f'--{name.replace("_", "-")}', str(value)]
    return words

def contents(folder):
    files = [p for p in sorted(folder.rglob('*')) if p.suffix in ('.png', '.jsonl')]
    return {p.relative_to(folder): p.read_bytes() for p in files}

@pytest.mark.skipif(os.name == 'nt', reason='POSIX signals')
def test_pairs_survive_a_kill(painters, tmp_path):
    # both lives with as many threads: another number sums in another order, and a pixel may move by one level
    env = {**os.environ, 'OMP_NUM_THREADS': str(torch.get_num_threads())}
    process = subprocess.Popen([*PROGRAM, *pair_words(painters, tmp_path/'killed')],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    scores = tmp_path/'killed'/'scores.jsonl'
    try:
        deadline = time.time() + 300
        while not scores.exists() or scores.read_text().count('\n') < 4:
            assert process.poll() is None and time.time() < deadline
            time.sleep(.01)
    finally:
        process.kill()
        process.wait()
    again, whole = (run(*pair_words(painters, tmp_path/name)) for name in ('killed', 'whole'))
    assert again.exit_code == whole.exit_code == 0, again.output
    assert '48 of 96 pairs kept (50%)' in again.output and 'report.html' in again.output
    assert (tmp_path/'killed'/'report.html').exists()
    assert contents(tmp_path/'killed') == contents(tmp_path/'whole') and len(contents(tmp_path/'whole')) == 97

def test_pairs_bad_requests(painters, tmp_path):
    assert run(*pair_words(painters, tmp_path/'p', count=2)).exit_code == 0
    assert 'psi' in one_line(run(*pair_words(painters, tmp_path/'p', count=2, psi=.5)), 2)
    other = run(*pair_words(painters, tmp_path/'p', count=2, target=painters/'a.safetensors'))
    assert 'another' in one_line(other)
    assert 'rejected' in one_line(run(*pair_words(painters, tmp_path/'q', max_lbce=0, patience=4)))
    assert 'none.pt' in one_line(run(*pair_words(painters, tmp_path/'q', source='none.pt')))
    assert 'out of range' in one_line(run(*pair_words(painters, tmp_path/'q', count=0)), 2)
    assert not list((tmp_path/'q'/'trainA').glob('*'))


def test_pairs_are_painted_with_the_given_truncation(monkeypatch, caught):
    painted = []
    monkeypatch.setattr('scenimefy.selection.StyleganPairs', lambda *a: painted.append(a))
    for words in ('', '--psi 0.5 --preset tiny --device cpu', '--source a --target b'):
        assert run('pairs', '-o', 'p', *words.split()).exit_code == 0
    assert painted == [('lhq', 'shinkai-stylegan', .7, 'auto'), ('tiny', 'tiny-anime', .5, 'cpu'),
                       ('a', 'b', .7, 'auto')]


# --- tables, recipes and measures --------------------------------------------------------------------

def test_ablate_hands_everything_on(monkeypatch):
    from scenimefy.ablate import AblateSettings
    asked = []
    monkeypatch.setattr('scenimefy.ablate.ablate', lambda *a, say: asked.append(a))
    assert run('ablate', '--table', '4', '-o', 'o', '--row', 'w/o D_P', '--row', 'w/o decay', '--work', 'w',
               '--budget', '7', '--seeds', '2').exit_code == 0
    assert run('ablate', '--table', '3', '-o', 'o', '--device', 'cuda').exit_code == 0
    changed = AblateSettings().but(budget=7, seeds=2)
    assert asked == [(4, Path('o'), changed, ['w/o D_P', 'w/o decay'], Path('w'), 'cpu'),
                     (3, Path('o'), AblateSettings(), (), None, 'cuda')]

def test_table_1_is_measured_on_photographs_too(monkeypatch):
    from scenimefy.ablate import AblateSettings
    asked = []
    monkeypatch.setattr('scenimefy.table1.compare_methods', lambda *a, say: asked.append(a))
    done = run('ablate', '--table', '1', '-o', 'o', '--row', 'CUT', '--photos', 'p', '--seeds', '2')
    assert done.exit_code == 0
    assert asked == [(Path('o'), AblateSettings().but(seeds=2), ['CUT'], None, Path('p'), 'cpu')]
    assert run('ablate', '--table', '4', '-o', 'o', '--photos', 'p').exit_code == 2
    wrong = run('ablate', '--table', '2', '-o', 'o')
    assert wrong.exit_code == 2 and 'choose 1, 3 or 4' in ' '.join(wrong.output.split())

def test_bake_makes_what_is_named(monkeypatch):
    asked = []
    def bake(names, out, device, say, photos):
        asked.append((names, out, device, photos))
        return dict.fromkeys(names or ['all'])
    monkeypatch.setattr('scenimefy.bake.bake', bake)
    named = run('bake', '-o', 'o', 'clip', 'drawn', '--photos', 'a', '--photos', 'b')
    everything = run('bake', '-o', 'o', '--device', 'cpu')
    assert asked == [(['clip', 'drawn'], Path('o'), 'auto', [Path('a'), Path('b')]),
                     (None, Path('o'), 'cpu', ())]
    assert named.output.split() == [str(Path('o')/f'{n}.safetensors') for n in ('clip', 'drawn')]
    assert everything.exit_code == 0

def test_features_are_inception_unless_others_are_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in ('a', 'b=c'): Path(folder).mkdir()
    asked = []
    def compare(methods, reference, photos, features, out, device, **more):
        asked.append((methods, str(reference), photos, features, out, device))
        return dict(methods={}, note='')
    monkeypatch.setattr('scenimefy.evaluate.compare', compare)
    monkeypatch.setattr('scenimefy.evaluate.comparison_rows', lambda report: (['method'], []))
    assert run('evaluate', 'made/ours', 'ref').exit_code == 0
    assert run('evaluate', 'made/photos', 'ref', '--features', 'tiny').exit_code == 0
    assert run('compare', 'ref', 'CUT=a', 'ours=b=c', '-o', 'o', '--photos', 'p', '--device',
               'cpu').exit_code == 0
    assert asked == [({'ours': Path('made/ours')}, 'ref', None, 'inception', None, 'auto'),
                     ({'generated': Path('made/photos')}, 'ref', None, 'tiny', None, 'auto'),
                     ({'CUT': Path('a'), 'ours': Path('b=c')}, 'ref', Path('p'), 'inception', Path('o'),
                      'cpu')]


def test_the_table_is_whole_in_a_pipe(monkeypatch):
    "No cell is cut or wrapped, nothing is colored, no line ends in spaces; what looks like markup stays."
    head = ['method', 'FID ↓', 'about']
    rows = [['ours [red]', '1.5', 'x'*300], ['夕焼け', '–', ':smile: two  words']]
    report = dict(methods={'ours': dict(warning='few pictures')}, note='a note')
    monkeypatch.setattr('scenimefy.evaluate.compare', lambda *a, **k: report)
    monkeypatch.setattr('scenimefy.evaluate.comparison_rows', lambda report: (head, rows))
    monkeypatch.setenv('COLUMNS', '40')
    result = run('evaluate', 'made', 'ref')
    assert result.exit_code == 0 and result.stdout.splitlines() == [
        'method      FID ↓  about', 'ours [red]  1.5    ' + 'x'*300, '夕焼け      –      :smile: two  words',
        'a note']
    assert result.stderr == 'scenimefy: ours: few pictures\n'


# --- stylize ---------------------------------------------------------------------------------------

def test_stylize_hands_everything_on(monkeypatch):
    from scenimefy.stylize import Report
    asked = []
    def stylize(paths, out, **how):
        asked.append((paths, out, how))
        return Report()
    monkeypatch.setattr('scenimefy.stylize.stylize_folder', stylize)
    monkeypatch.setattr('scenimefy.stylize.stylize_file', stylize)
    assert run('stylize', 'a.png', '-o', 'o').exit_code == 0
    for out in ('o', 'o.png'):
        assert run('stylize', 'a.png', '-o', out, '--weights', 'tiny', '--device', 'cpu',
                   '--precision', 'bf16', '--max-pixels', '7', '--no-tone', '--no-brush').exit_code == 0
    usual = dict(weights='drawn', device='auto', precision=None, max_pixels=None, tone=None, brush=None,
                 progress=False)
    how = dict(weights='tiny', device='cpu', max_pixels=7, precision='bf16', tone=False, brush=False)
    photos = [Path('a.png')]
    assert asked == [(photos, Path('o'), usual), (photos, Path('o'), how | dict(progress=False)),
                     (photos, Path('o.png'), how | dict(progress=False))]

def test_stylize_flags_are_the_settings(monkeypatch, tmp_path):
    "Each setting of a picture or a folder has its flag; what is not given is left to the library."
    from scenimefy.stylize import Report, StylizeSettings
    asked = []
    def stylize(paths, out, **how):
        asked.append(how)
        return Report()
    monkeypatch.setattr('scenimefy.stylize.stylize_folder', stylize)
    words = ('--strength .5 --keep-color --preserve .2 --mask m.png --feather 3 --smooth --format webp '
             '--quality 80 --skip-existing --keep-metadata --keep-location --batch 4 '
             '--max-memory 4GB').split()
    result = run('stylize', 'a.png', '-o', 'o', *words, '--report', tmp_path/'r.json')
    assert result.exit_code == 0 and json.loads((tmp_path/'r.json').read_text())['done'] == []
    want = dict(strength=.5, keep_color=True, preserve=.2, feather=3, smooth=True, format='webp', quality=80,
                skip_existing=True, keep_metadata=True, keep_location=True, batch=4)
    assert set(want) == {f.name for f in fields(StylizeSettings)} - {'base'}
    assert {name: asked[0][name] for name in want} == want
    assert asked[0]['mask'] == Path('m.png') and asked[0]['max_memory'] == '4GB'

def test_stylize_with_choices(net, tmp_path):
    for i in range(2): Image.new('RGB', (12, 9), 'green').save(tmp_path/f'{i}.png')
    words = ['stylize', tmp_path, '-o', tmp_path/'out', '--weights', net, '--format', 'webp']
    assert run(*words, '--strength', 0, '--sheet', tmp_path/'s.html').exit_code == 0
    assert (tmp_path/'s.html').read_text().count('<img') == 4
    assert '2 already there' in run(*words, '--skip-existing', '--strength', 0).output
    line = one_line(run(*words, '--skip-existing'))
    assert '2 of 2 scenes' in line and 'strength 0.0 → 1.0' in line and '--skip-existing' in line
    for wrong in (['--strength', 2], ['--format', 'tiff'], ['--sheet', 's.txt'], ['--max-memory', 'lots']):
        assert run(*words, *wrong).exit_code == 2, wrong

def test_stylize_a_film(net, tmp_path):
    frames = [Image.new('RGB', (12, 10), color) for color in ('red', 'green', 'blue')]
    frames[0].save(tmp_path/'a.gif', save_all=True, append_images=frames[1:])
    words = ['stylize', tmp_path/'a.gif', '--weights', net, '-o']
    assert run(*words, tmp_path/'b.webp', '--strength', .5).exit_code == 0
    with Image.open(tmp_path/'b.webp') as im: assert im.n_frames == 3 and im.size == (12, 10)
    assert 'we cannot write' in one_line(run(*words, tmp_path/'b.avi'))

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

@pytest.mark.parametrize('out', ['folder', 'scene.png', 'film.mp4'])
def test_a_mistyped_path_is_noticed_before_weights_are_fetched(monkeypatch, tmp_path, out):
    def fetch(*a, **k): raise AssertionError('weights were looked for')
    monkeypatch.setattr('scenimefy.stylize.find_weights', fetch)
    photo = tmp_path/('typo.mp4' if out == 'film.mp4' else 'typo.png')
    assert 'typo' in one_line(run('stylize', photo, '-o', tmp_path/out, '--weights', 'shinkai'))

@pytest.mark.parametrize('words, status', [
    (['train', '--help'], 0), (['train'], 2), (['stylize', 'EMPTY'], 1)])
def test_statuses(tmp_path, net, words, status):
    (tmp_path/'empty').mkdir()
    if 'EMPTY' in words: words = ['stylize', tmp_path/'empty', '-o', tmp_path/'out', '--weights', net]
    result = run(*words)
    assert result.exit_code == status and 'Traceback' not in result.output, result.output
    assert not (tmp_path/'out').exists()

def test_stylize_bad_requests(net, tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path/'a.png')
    words = ['stylize', tmp_path/'a.png', '-o', tmp_path/'o', '--weights']
    assert 'no such file' in one_line(run(*words, tmp_path/'no.pth'))
    assert 'not available' in one_line(run(*words, net, '--device', 'cuda:99'))

@pytest.mark.skipif(sys.platform != 'linux', reason='file names of any bytes')
def test_unprintable_name(net, tmp_path):
    name = os.fsdecode(bytes(tmp_path) + b'/caf\xe9\x1b[31m.jpg')
    Path(name).write_text('no picture')
    done = shell('stylize', name, '-o', tmp_path/'o', '--weights', net)
    assert done.returncode == 1 and 'Traceback' not in done.stderr and '1 failed' in done.stdout


# --- doctor and demo -------------------------------------------------------------------------------

def test_doctor(monkeypatch):
    monkeypatch.setattr('scenimefy.doctor._speed_findings', lambda: [('ok', 'speed', '0.5 s')])
    good = run('doctor')
    assert good.exit_code == 0 and good.output.endswith('\nNothing is broken.\n')
    assert all(word in good.output for word in ('torchvision', 'fp32 works', 'shinkai', 'speed'))
    def fail(): raise RuntimeError('no processor')
    monkeypatch.setattr('scenimefy.doctor._device_findings', fail)
    bad = run('doctor')
    assert bad.exit_code == 1 and bad.output.endswith('\n1 broken\n')
    assert 'no processor' in bad.output and 'speed' in bad.output   # the rest is still looked at

def test_doctor_of_a_broken_torch(tmp_path):
    "The doctor names it, looks at the rest, and ends with 1."
    (tmp_path/'torch.py').write_text('raise ImportError("libcudart.so.13 is missing")')
    code = f'import sys; sys.path.insert(0, {str(tmp_path)!r}); from scenimefy.cli import main; main()'
    done = subprocess.run([sys.executable, '-c', code, 'doctor'], capture_output=True, text=True)
    assert done.returncode == 1 and 'Traceback' not in done.stdout + done.stderr and done.stderr == ''
    broken = [line for line in done.stdout.splitlines() if line.startswith('  !!')]
    assert broken[0].split()[1] == 'torch' and 'libcudart.so.13 is missing' in broken[0]
    assert re.search(r'^  ok  numpy  +\d', done.stdout, re.M)
    assert re.search(r'^\d+ broken$', done.stdout, re.M)

@pytest.fixture
def small_demo(monkeypatch):
    small = DemoSettings().but(n_photos=4, n_anime=4, n_pairs=4, draw_size=64, seconds=.1, n_codes=2,
                               n_test=4, n_show=1, show_size=32, small=32)
    third = SemisupSettings.preset('tiny').but(size=16, load_size=16, ndf=4, n_layers=1, epochs=2,
                                               n_patches=8)
    first = FinetuneSettings.preset('tiny').but(batch=2, crops=2)
    monkeypatch.setattr('scenimefy.demo.DemoSettings', lambda: small)
    monkeypatch.setattr(SemisupSettings, 'preset', classmethod(lambda cls, name: third))
    monkeypatch.setattr(FinetuneSettings, 'preset', classmethod(lambda cls, name: first))

def test_demo(small_demo, tmp_path, monkeypatch):
    def refuse(*_, **__): raise AssertionError('the network was asked')
    monkeypatch.setattr('socket.socket.connect', refuse)
    monkeypatch.setattr('socket.getaddrinfo', refuse)
    (tmp_path/'more').mkdir()
    for path, color in ((tmp_path/'<b>&.png', 'red'), (tmp_path/'more'/'<b>&.jpg', 'blue')):
        Image.new('RGB', (60, 40), color).save(path)
    (tmp_path/'bad.jpg').write_text('no')
    result = run('demo', tmp_path/'<b>&.png', tmp_path/'more', tmp_path/'bad.jpg', tmp_path/'gone.jpg',
                 '-o', tmp_path/'d', '--seconds', '0.1')
    assert result.exit_code == 1, result.output
    assert result.output.index('cannot be done') < result.output.index('drawing a world')    # bad news first
    page = (tmp_path/'d'/'index.html').read_text(encoding='utf8')
    addresses = [p.split('"')[0] for mark in ('src="', 'srcset="', 'href="') for p in page.split(mark)[1:]]
    assert len(addresses) > 10 and all(a.startswith('data:image/') for a in addresses)
    assert '<script' not in page and '<b>&.png' not in page
    assert '&lt;b&gt;&amp;.png' in page and 'bad.jpg' in page and 'gone.jpg' in page
    assert len(list((tmp_path/'d'/'pictures').iterdir())) == 2                  # same stem, two files
    assert run('demo', '-o', tmp_path/'d', '--seconds', '0.1').exit_code == 0   # twice into one folder
    assert not [p for p in tmp_path.iterdir() if p.suffix == '.html' or p.name.startswith('.')]
    weights = tmp_path/'d'/'translator.safetensors'   # the page names it; a second demo does not clear it
    assert str(weights) in (tmp_path/'d'/'index.html').read_text(encoding='utf8') and load_translator(weights)

def test_demo_takes_the_time_that_it_is_given(monkeypatch):
    asked = []
    def demo(photos, out, settings, say):
        asked.append((photos, out, settings.seconds))
        raise UserError('enough')
    monkeypatch.setattr('scenimefy.demo.demo', demo)
    run('demo', 'a.png', '-o', 'o', '--seconds', '7')
    run('demo')
    assert asked == [([Path('a.png')], Path('o'), 7.), ([], Path('scenimefy-demo'), 55.)]

def test_demo_keeps_what_is_not_its_own(small_demo, tmp_path):
    (tmp_path/'work').mkdir()
    (tmp_path/'work'/'thesis.txt').write_text('all of it')
    assert 'did not make' in one_line(run('demo', '-o', tmp_path))
    assert (tmp_path/'work'/'thesis.txt').read_text() == 'all of it'
    (tmp_path/'file').touch()
    assert '-o' in one_line(run('demo', '-o', tmp_path/'file'))


# --- streams, names, warnings ------------------------------------------------------------------------

@pytest.mark.fault('names: standard input, output and error are closed',
                   happens='the work is done',
                   left='all scenes')
def test_closed_streams(net, tmp_path):
    "A service without standard output or error gets its work done all the same."
    Image.new('RGB', (9, 7)).save(tmp_path/'p.png')
    command = ' '.join([*map(repr, PROGRAM[:2]), f"'{PROGRAM[2]}'", 'stylize', 'p.png', '-o', '{out}',
                        '--weights', f"'{net}'"])
    for out, closing in (('a', '2>&-'), ('b', '>&-'), ('c', '>&- 2>&- <&-')):
        done = subprocess.run(['sh', '-c', f'{command.format(out=out)} {closing}'], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0 and (tmp_path/out/'p.png').exists(), (closing, done.stderr)
        assert 'Traceback' not in done.stderr

def test_warnings_are_one_line(net, tmp_path):
    frame = Image.new('RGB', (9, 7), 'red')
    frame.save(tmp_path/'moves.gif', save_all=True, append_images=[Image.new('RGB', (9, 7), 'blue')])
    done = shell('stylize', 'moves.gif', '-o', 'out', '--weights', net, cwd=tmp_path)
    assert done.returncode == 0
    assert [l for l in done.stderr.splitlines() if l] == [
        'scenimefy: note: moves.gif: it holds 2 frames or pages, and only the first is read']

def test_out_may_be_a_file_or_is_refused(net, pictures, folders, tmp_path):
    photo = pictures/'photos'/'0.png'
    assert run('stylize', photo, '-o', tmp_path/'scene.png', '--weights', net).exit_code == 0
    assert Image.open(tmp_path/'scene.png').size == (20, 20)
    many = run('stylize', pictures/'photos', '-o', tmp_path/'all.png', '--weights', net)
    assert 'give a folder' in one_line(many, 2)
    compare = ['compare', pictures/'anime', f"a={pictures/'photos'}"]
    for words in (['train', *folders, *SMALL], ['demo'], compare):
        refused = run(*words, '-o', tmp_path/'page.html')
        text = ' '.join(refused.output.replace('│', ' ').split())
        assert refused.exit_code == 2 and 'named like a file' in text, refused.output
    (tmp_path/'v1.zip').mkdir()                                    # an odd name of a folder that is there
    assert run('stylize', photo, '-o', tmp_path/'v1.zip', '--weights', net).exit_code == 0

def test_max_pixels(net, pictures, tmp_path):
    words = ['stylize', pictures/'photos'/'0.png', '-o', tmp_path/'out', '--weights', net, '--max-pixels']
    assert '--max-pixels' in one_line(run(*words, 399))
    assert run(*words, 400).exit_code == 0

@pytest.mark.fault('names: a user without a home directory',
                   happens='one line says which variable to set',
                   left='nothing')
def test_nobody_home(monkeypatch, tmp_path):
    "A user without a home directory is told what to set; `doctor` does not call that broken."
    import pathlib
    from scenimefy.weights import WeightsError, weights_home
    monkeypatch.delenv('SCENIMEFY_HOME', raising=False)
    def nowhere(): raise RuntimeError('Could not determine home directory.')
    monkeypatch.setattr(pathlib.Path, 'home', nowhere)
    with pytest.raises(WeightsError, match='SCENIMEFY_HOME'): weights_home()
    monkeypatch.setattr('scenimefy.doctor._bundled_findings', list)
    assert [mark for mark, *_ in _weights_findings()] == ['--']
    monkeypatch.setenv('SCENIMEFY_HOME', str(tmp_path))            # torch has a cache of its own
    monkeypatch.setattr('torch.hub.get_dir', lambda: '~/.cache/torch/hub')
    notes = {what: text for mark, what, text, *_ in _weights_findings() if mark == '--'}
    assert 'TORCH_HOME' in notes['weights vgg19'] and 'first use' in notes['weights shinkai']

@pytest.mark.fault('disk: the drive with the pictures is unplugged while training',
                   happens='the state is saved, one line says so, the program ends',
                   left='a checkpoint of the last step')
def test_a_drive_that_is_unplugged_ends_the_program(pictures, tmp_path):
    "Readers in processes of their own fail: one line, the state is saved, and the program ends."
    import shutil
    for sub in ('photos', 'anime', 'pairs'): shutil.copytree(pictures/sub, tmp_path/sub)
    words = ['train', '--photos', 'photos', '--anime', 'anime', '--pairs', 'pairs', '-o', 'run', *SMALL,
             '--epochs', '2', '--epoch-steps', '3000', '--save-every', '100000', '--workers', '2']
    process = subprocess.Popen([*PROGRAM, *words], cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    for _ in range(600):
        log = tmp_path/'run'/'log.jsonl'
        if log.exists() and log.read_text().count('\n') > 3: break
        time.sleep(.1)
    for file in (tmp_path/'anime').iterdir(): file.unlink()
    _, err = process.communicate(timeout=90)
    said = [l for l in re.split('[\r\n]', err) if l.startswith('scenimefy: ') and 'note:' not in l]
    assert process.returncode == 1 and len(said) == 1, err[-500:]
    assert 'is saved, go on with --resume' in said[0], err[-500:]
    assert list((tmp_path/'run'/'checkpoints').glob('*.safetensors'))

@pytest.mark.fault('names: frames whose names are no UTF-8, in a training',
                   happens='trained on and resumed as any other',
                   left='a run')
def test_names_that_are_no_text(folders, pictures, tmp_path):
    "A frame whose name is Shift-JIS bytes is trained on like any other, and its run can be saved."
    import shutil
    shutil.copytree(pictures/'anime', tmp_path/'anime')
    name = '夕焼け'.encode('shift_jis') + b'.png'
    os.rename(os.fsencode(tmp_path/'anime'/'0.png'), os.fsencode(tmp_path/'anime') + b'/' + name)
    words = ['train', *folders, '-o', tmp_path/'run', *SMALL]
    words[words.index('--anime') + 1] = tmp_path/'anime'
    assert run(*words).exit_code == 0
    assert run('train', *folders[:2], '--anime', tmp_path/'anime', *folders[4:], '-o', tmp_path/'run',
               '--resume').exit_code == 0
