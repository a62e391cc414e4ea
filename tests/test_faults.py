"""Faults: a process is killed, a disk is full, a file lies. The rows of nbs/faults.md are made from the marks
here. Moments and damages are drawn by a seed and printed: FAULTS=20 looks 20 times as widely, FAULTS_SEED=7
elsewhere."""
import functools
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors.torch import load_file

import scenimefy.cli as cli
import test_runs
import test_selection
import test_semisup
from make_faults import KINDS, PAGE, page_text
from scenimefy.core import UserError
from scenimefy.data import ImageError, find_images, read_image
from scenimefy.runs import (CheckpointError, checkpoints, read_checkpoint, run_training, save_checkpoint)
from scenimefy.selection import make_pairs
from scenimefy.semisup import train
from scenimefy.stylegan import load_stylegan
from scenimefy.stylize import stylize_folder
from scenimefy.translator import ResnetGenerator, load_translator, save_translator
from scenimefy.weights import PACKAGE, REGISTRY, Remote, WeightsError, fetch

WIDTH, SEED = int(os.environ.get('FAULTS', 1)), int(os.environ.get('FAULTS_SEED', 0))
PHOTOS = Path(__file__).resolve().parents[2]/'shared'/'photos'
BIRTH = multiprocessing.get_context('forkserver')
BIRTH.set_forkserver_preload(['scenimefy.semisup', 'scenimefy.report', 'scenimefy.stylize', 'scenimefy.cli',
                              'torch.utils.tensorboard', 'torch._dynamo', 'PIL.ImageCms', 'pillow_heif',
                              'pytest'])
pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='processes and disks of Linux')
fault = pytest.mark.fault


# ---- a process with a life of its own

_CHANGES = {'os.rename': 0, 'os.remove': 0, 'os.mkdir': 0, 'open': os.O_WRONLY | os.O_RDWR | os.O_CREAT}

def _dies_before(number:int, folder, done:list): # number: -1 never
    "Count the operations that change files in `folder`; SIGKILL ends this process before one of them."
    def watch(event, details):
        if event not in _CHANGES or not str(details[0]).startswith(str(folder)): return
        if event == 'open' and not details[2] & _CHANGES['open']: return
        if len(done) == number: os.kill(os.getpid(), signal.SIGKILL)
        done.append(event)
    sys.addaudithook(watch)

def _live(job, folder, number, pipe):
    "What the child process does."
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(os.devnull, 'w')
    done = []
    _dies_before(number, folder, done)
    pipe.send('begins')
    try:
        job(folder)
        pipe.send((len(done), ''))
    except Exception:
        pipe.send((len(done), traceback.format_exc()))
        sys.exit(1)

def born(job, folder, number=-1):
    "A running child process, and the pipe that it speaks into."
    pipe, its = BIRTH.Pipe(False)
    child = BIRTH.Process(target=_live, args=(job, folder, number, its), daemon=True)
    child.start()
    its.close()
    assert pipe.recv() == 'begins'
    return child, pipe

def life(job, folder, number=-1, seconds=None) -> tuple: # (exit code, operations, traceback)
    "Run `job(folder)` in a process of its own, killed before an operation, after some seconds, or never."
    child, pipe = born(job, folder, number)
    child.join(120 if seconds is None else seconds)
    if child.is_alive(): child.kill()
    child.join()
    try: count, trace = pipe.recv()
    except EOFError: count, trace = -1, ''
    return child.exitcode, count, trace

def moments(what, n, last) -> list:
    "Up to `n` numbers below `last`, in order."
    drawn = sorted(random.Random(f'{SEED} {what}').sample(range(last), min(n*WIDTH, last)))
    print(f'{what}: FAULTS_SEED={SEED}, killed before operations {drawn} of {last}')
    return drawn

def contents(folder, hidden=False) -> dict: # {name: bytes}
    files = [p for p in sorted(Path(folder).rglob('*')) if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if hidden or not p.name.startswith('.')}

def half_files(folder) -> list:
    "What a killed process was writing."
    return [p.name for p in Path(folder).rglob('.*') if p.is_file() and p.name not in ('.lock', '.gitignore')]

def killed_and_done_again(job, tmp_path, n, same, left=None, writers=1):
    "Kill the job before each of `n` operations, look at what it left, do it again, and compare."
    code, count, trace = life(job, tmp_path/'whole')
    assert code == 0, trace
    for at in moments(tmp_path.name, n, count):
        folder = tmp_path/f'killed-{at}'
        assert life(job, folder, at)[0] == -signal.SIGKILL
        assert len(half_files(folder)) <= writers
        if left: left(folder)
        code, _, trace = life(job, folder)
        assert code == 0 and same(tmp_path/'whole', folder), f'killed before operation {at}: {trace}'


# ---- SIGKILL

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp('faults')/'photos'
    root.mkdir()
    for i in range(5): noise(24, 18, i).save(root/f'{i}.png')
    return root

@pytest.fixture(scope='module')
def net(tmp_path_factory):
    torch.manual_seed(0)
    return save_translator(ResnetGenerator(3, 3, 4, 5), tmp_path_factory.mktemp('net')/'net.safetensors')

def noise(w, h, seed) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))

def line_run(run, photos):
    "A training that goes on where it is, or begins."
    try: run_training(test_runs.LineRun(test_runs.TOY, photos, run), resume=True)
    except CheckpointError as error:
        assert 'nothing to resume' in str(error)
        run_training(test_runs.LineRun(test_runs.TOY, photos, run))

@fault('killed: training, before any change of a file',
       happens='the next life goes on from the newest checkpoint (or begins, if there is none yet) and ends '
               'with the same weights, log and optimizer, bit for bit',
       left='whole checkpoints; at most one hidden half file, which the next save removes')
def test_training_killed_anywhere(photos, tmp_path):
    def whole_checkpoints(run):
        for file in checkpoints(run): read_checkpoint(file)
    killed_and_done_again(functools.partial(line_run, photos=photos), tmp_path, 5, test_runs.same,
                          whole_checkpoints)

STAGE3 = test_semisup.TOY.but(epochs=2, workers=0)

def stage3(run, photos):
    try: train(STAGE3, photos, photos, photos.parent/'pairs', run, resume=True, device='cpu')
    except CheckpointError: train(STAGE3, photos, photos, photos.parent/'pairs', run, device='cpu')

@fault('killed: Stage 3, at any time', happens='--resume ends with the same translator, bit for bit',
       left='whole checkpoints')
def test_stage_3_killed_at_any_time(photos, tmp_path):
    for side in ('trainA', 'trainB'): shutil.copytree(photos, photos.parent/'pairs'/side, dirs_exist_ok=True)
    job, began = functools.partial(stage3, photos=photos), time.perf_counter()
    assert life(job, tmp_path/'whole')[0] == 0
    took, dice = time.perf_counter() - began, random.Random(f'{SEED} stage 3')
    for k in range(WIDTH):
        seconds = dice.uniform(.3, .9)*took
        print(f'stage 3: FAULTS_SEED={SEED}, killed after {seconds:.2f} of {took:.2f} s')
        life(job, tmp_path/str(k), seconds=seconds)
        code, _, trace = life(job, tmp_path/str(k))
        a, b = (load_file(tmp_path/d/'translator.safetensors') for d in ('whole', str(k)))
        assert code == 0 and all(torch.equal(a[name], b[name]) for name in a), trace
        assert test_semisup.same_history(tmp_path/'whole', tmp_path/str(k))

def pairs(folder, seconds=0.):
    make_pairs(test_selection.cfg(), test_selection.Bands(seconds), test_selection.Colors(), folder)

@fault('killed: making pairs',
       happens='the same command goes on; folder and scores end as in an undisturbed run',
       left='whole pictures and whole lines; at most four half files, which the next life removes')
def test_pairs_killed_anywhere(tmp_path):
    def same(a, b): return contents(a, hidden=True) == contents(b, hidden=True)
    killed_and_done_again(pairs, tmp_path, 6, same, writers=4)

def scenes(out, album, weights): stylize_folder(album, out, weights, device='cpu', progress=False)

@fault('killed: stylizing a folder', happens='the same command writes the scenes again, equal in every byte',
       left='whole scenes; at most one hidden half file (.NAME-….png), which the next run removes')
def test_folder_killed_anywhere(photos, net, tmp_path):
    def only_whole(out):
        whole = contents(tmp_path/'whole')
        assert contents(out).items() <= whole.items()
        assert not out.exists() or not contents(out) or len(find_images(out)) == len(contents(out))
    def same(a, b): return contents(a) == contents(b)
    job = functools.partial(scenes, album=photos, weights=net)
    killed_and_done_again(job, tmp_path, 5, same, only_whole)

def saves(run):
    "Checkpoints of 8 MB, one after another, each full of its own number."
    for step in range(1, 10_000):
        save_checkpoint(run, step, test_runs.TOY, {'x': torch.full((2_000_000,), float(step))}, {})

@fault('killed: writing a checkpoint, at any time',
       happens='a file under the name of a checkpoint is complete, with the numbers of its step',
       left='whole checkpoints, at most one hidden half file, which the next save removes')
def test_checkpoint_killed_at_any_time(tmp_path):
    dice = random.Random(f'{SEED} checkpoint')
    for k in range(3*WIDTH):
        seconds = dice.uniform(.05, .6)
        print(f'checkpoint: FAULTS_SEED={SEED}, killed after {seconds:.3f} s')
        run = tmp_path/str(k)
        assert life(saves, run, seconds=seconds)[0] == -signal.SIGKILL
        for file in checkpoints(run):
            tensors, meta = read_checkpoint(file)
            assert (tensors['x'] == int(meta['step'])).all() and file.stem.endswith(meta['step'])
        assert len(checkpoints(run)) <= test_runs.TOY.keep + 1
        save_checkpoint(run, 20_000, test_runs.TOY, {'x': torch.zeros(1)}, {})
        assert not half_files(run)


# ---- downloads

class Drip(http.server.BaseHTTPRequestHandler):
    "Sends `server.data` from the byte that is asked for, and stalls for ever at byte `server.stall`."
    def log_message(self, *args): pass
    def do_GET(self):
        s, wish = self.server, self.headers.get('Range')
        start = int(wish[6:-1]) if wish else 0
        s.asked.append(start)
        self.send_response(206 if wish else 200)
        if wish: self.send_header('Content-Range', f'bytes {start}-{len(s.data) - 1}/{len(s.data)}')
        self.send_header('Content-Length', len(s.data) - start)
        self.end_headers()
        end = len(s.data) if s.stall is None else s.stall
        self.wfile.write(s.data[start:end])
        self.wfile.flush()
        if s.stall is None: return
        s.stalled.set()
        s.go_on.wait(60)

@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Drip)
    s.daemon_threads, s.data, s.asked, s.stall = True, np.random.default_rng(5).bytes(600_000), [], None
    s.stalled, s.go_on = threading.Event(), threading.Event()
    threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()
    yield s
    s.go_on.set()
    s.shutdown()
    s.server_close()

def download(folder, url, size, sha256):
    REGISTRY['toy'] = Remote(url, size, sha256, 'toy license')
    fetch('toy', folder)

def of_server(s): # a job
    sha256 = hashlib.sha256(s.data).hexdigest()
    return functools.partial(download, url=f'http://127.0.0.1:{s.server_port}/toy.bin', size=len(s.data),
                             sha256=sha256)

@fault('killed: downloading weights',
       happens='the next call asks only for the bytes that are missing, and checks all',
       left='a .part file, which is never taken for weights')
def test_download_killed_anywhere(server, tmp_path):
    dice, job = random.Random(f'{SEED} download'), of_server(server)
    for k in range(3*WIDTH):
        home, server.stall = tmp_path/str(k), dice.randrange(70_000, 600_000)
        print(f'download: FAULTS_SEED={SEED}, killed after {server.stall} bytes')
        server.stalled.clear()
        child, _ = born(job, home)
        assert server.stalled.wait(30)
        while not (home/'toy.bin.part').exists() or not (home/'toy.bin.part').stat().st_size: time.sleep(.01)
        child.kill()
        child.join()
        have = (home/'toy.bin.part').stat().st_size
        assert not (home/'toy.bin').exists() and 0 < have <= server.stall
        server.stall = None
        code, _, trace = life(job, home)
        assert code == 0, trace
        assert (home/'toy.bin').read_bytes() == server.data and server.asked[-1] == have
        assert set(contents(home)) <= {'toy.bin', 'toy.bin.lock'}

@fault('killed: downloading weights, before any change of a file',
       happens='the next call ends with the whole file',
       left='nothing, a .part file or the whole file')
def test_download_killed_before_a_change(server, tmp_path):
    def same(a, b): return (a/'toy.bin').read_bytes() == (b/'toy.bin').read_bytes() == server.data
    killed_and_done_again(of_server(server), tmp_path, 4, same)


# ---- two at once

def together(job, folder, n=2) -> list: # exit code and traceback of each
    lives = [born(job, folder) for _ in range(n)]
    for child, _ in lives: child.join(120)
    return [(child.exitcode, pipe.recv()[1]) for child, pipe in lives]

@fault('shared: two trainings in one folder at once',
       happens='the second waits ten seconds for the first, then is refused; in neither case do they mix',
       left='the run of the first')
def test_two_trainings_in_one_folder(photos, tmp_path):
    job = functools.partial(line_run, photos=photos)
    assert life(job, tmp_path/'whole')[0] == 0
    for code, trace in together(job, tmp_path/'both'):
        assert code == 0 or 'another process is at work' in trace, trace
    assert test_runs.same(tmp_path/'whole', tmp_path/'both')

@fault('shared: two commands make pairs in one folder at once',
       happens='one after the other, or the second is refused',
       left='the folder that one alone would have made')
def test_two_make_pairs_in_one_folder(tmp_path):
    assert life(pairs, tmp_path/'whole')[0] == 0
    for code, trace in together(functools.partial(pairs, seconds=.1), tmp_path/'both'):
        assert code == 0 or 'another process is at work' in trace, trace
    assert contents(tmp_path/'whole') == contents(tmp_path/'both')

@fault('shared: two commands stylize into one folder at once',
       happens='both do all photos; the later scene stands',
       left='whole scenes')
def test_two_stylize_into_one_folder(photos, net, tmp_path):
    job = functools.partial(scenes, album=photos, weights=net)
    assert life(job, tmp_path/'whole')[0] == 0
    for code, trace in together(job, tmp_path/'both'): assert code == 0, trace
    assert contents(tmp_path/'whole') == contents(tmp_path/'both') and not half_files(tmp_path/'both')

@fault('shared: two programs download the same weights at once',
       happens='one downloads, the other waits and reads',
       left='one file')
def test_two_downloads(server, tmp_path):
    for code, trace in together(of_server(server), tmp_path/'home'): assert code == 0, trace
    assert (tmp_path/'home'/'toy.bin').read_bytes() == server.data and server.asked == [0]


# ---- disks, with real ones in a mount namespace of their own

IN_NAMESPACE = """
mkdir -p disk/full disk/read_only disk/locked
mount -t tmpfs -o size=$1 tmpfs disk/full && mount -t tmpfs -o ro tmpfs disk/read_only || exit 77
chmod 000 disk/locked
exec setpriv --bounding-set=-dac_override,-dac_read_search $2 -c 'import test_faults; test_faults.try_disks()'
"""
SMALL_DISK = '12k'

def resized(size): subprocess.run(['mount', '-o', f'remount,size={size}', 'disk/full'], check=True)

def try_disks():
    "In a namespace: every command writes to every disk; what it said and what is left, as JSON."
    torch.set_num_threads(1)
    commands, found = json.loads(Path('commands.json').read_text()), {}
    Path('freed').mkdir()
    for name, words in commands.items():
        for disk in ('full', 'read_only', 'locked'):
            said = program([w.replace('OUT', f'disk/{disk}/out') for w in words])
            left = [] if disk == 'locked' else sorted(contents(f'disk/{disk}', hidden=True))
            found[f'{disk} {name}'] = *said, left
        if name in ('pairs', 'evaluate'):                        # test_selection frees space for the pairs
            shutil.rmtree('disk/full/out')
            continue
        resized('50m')                                           # somebody frees space
        again = [w.replace('OUT', 'disk/full/out') for w in words]
        found[f'freed {name}'] = *program(again + ['--resume']*(name == 'train')), []
        shutil.move('disk/full/out', f'freed/{name}')
        resized(SMALL_DISK)
        program([w.replace('OUT', f'usual/{name}') for w in words])
    found['unreadable'] = *unreadable(commands['stylize']), sorted(contents('some'))
    Path('found.json').write_text(json.dumps(found))

def unreadable(words) -> tuple:
    "What is said about a folder with a closed folder and a closed file in it."
    Path('album/closed').mkdir(parents=True)
    for name in ('album/closed/x.png', 'album/y.png', 'album/z.png'): noise(9, 9, 9).save(name)
    for name in ('album/closed', 'album/y.png'): os.chmod(name, 0)
    command = ['stylize', 'album', '-o', 'some', *words[4:]]
    status, complaints = program(command)
    return status, complaints + program(command, notes=True)[1]

def program(words, notes=False) -> tuple: # (exit status, its complaints, or its notes)
    "One command of the program, in this process."
    from typer.testing import CliRunner
    with warnings.catch_warnings():
        warnings.simplefilter('always')
        warnings.showwarning = cli._tell_warning
        done = CliRunner().invoke(cli.app, [str(w) for w in words])
    assert 'Traceback' not in done.output, done.output
    said = [line for line in re.split('[\r\n]', done.output) if line.startswith('scenimefy: ')]
    return done.exit_code, [line for line in said if notes == ('note:' in line)]

@pytest.fixture(scope='module')
def disks(photos, net, tmp_path_factory):
    "What `try_disks` found; skips where we may not mount anything."
    root = tmp_path_factory.mktemp('disks')
    if subprocess.run(['unshare', '-rm', 'true'], stderr=subprocess.DEVNULL).returncode:
        pytest.skip('no mount namespace here')
    for side in ('trainA', 'trainB'): shutil.copytree(photos, root/'pairs'/side)
    where = ['--photos', str(photos), '--anime', str(photos), '--pairs', str(root/'pairs')]
    small = ('--preset tiny --size 16 --load-size 16 --ngf 4 --ndf 4 --n-blocks 5 --n-layers 1 --head-dim 8 '
             '--n-patches 8 --epochs 2 --epoch-steps 1 --log-every 1 --workers 0 --device cpu').split()
    commands = dict(stylize=['stylize', str(photos), '-o', 'OUT', '--weights', str(net), '--device', 'cpu'],
                    train=['train', *where, '-o', 'OUT', *small],
                    pairs='pairs -o OUT --preset tiny --count 2 --batch 2 --device cpu'.split(),
                    evaluate=['evaluate', str(photos), str(photos), '--features', 'tiny', '-o', 'OUT'])
    (root/'commands.json').write_text(json.dumps(commands))
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(['unshare', '-rm', 'sh', '-c', IN_NAMESPACE, 'sh', SMALL_DISK, sys.executable],
                          cwd=root, env={**os.environ, 'PYTHONPATH': paths}, capture_output=True, text=True)
    if done.returncode == 77: pytest.skip('no tmpfs here')
    assert done.returncode == 0, done.stderr[-3000:]
    return root, json.loads((root/'found.json').read_text())

NAMES = ('stylize', 'train', 'pairs', 'evaluate')

@fault('disk: full',
       happens='one line says so; after space is freed the same command (a training with --resume) ends '
               'as if nothing had been',
       left='what was whole by then; no half file')
@pytest.mark.parametrize('name', NAMES)
def test_full_disk(disks, name):
    root, found = disks
    status, said, left = found[f'full {name}']
    assert status == 1 and len(said) == 1 and re.search('full|No space left', said[0]), said
    assert not [file for file in left if re.search(r'/\.[^/]+-[0-9a-f]{8}\.', file)], left
    if f'freed {name}' not in found: return
    assert found[f'freed {name}'][0] == 0, found[f'freed {name}']
    usual, freed = root/'usual'/name, root/'freed'/name
    assert files(usual) == files(freed)
    for file in files(usual):
        if file.suffix == '.png': assert (usual/file).read_bytes() == (freed/file).read_bytes(), file
    if name != 'train': return
    a, b = (load_file(d/'translator.safetensors') for d in (usual, freed))
    assert all(torch.equal(a[k], b[k]) for k in a)

def files(folder) -> list: # but those of TensorBoard, which hold the time in their names
    return sorted(Path(p) for p in contents(folder) if 'tensorboard' not in p)

@fault('disk: read-only', happens='one line names the folder', left='nothing')
@pytest.mark.parametrize('name', NAMES)
def test_read_only_disk(disks, name):
    status, said, left = disks[1][f'read_only {name}']
    assert status == 1 and len(said) == 1 and 'Read-only file system' in said[0] and not left

@fault('disk: a folder that we may not write to', happens='one line names the folder',
       left='nothing')
@pytest.mark.parametrize('name', NAMES)
def test_locked_folder(disks, name):
    status, said, _ = disks[1][f'locked {name}']
    assert status == 1 and len(said) == 1 and 'ermission' in said[0], said

@fault('disk: folders and photos that we may not read',
       happens='each is named in a line, the others are done, the exit status is 1',
       left='the scenes of the others')
def test_unreadable_photos(disks):
    status, said, left = disks[1]['unreadable']
    assert status == 1 and left == ['z.png']
    assert len(said) == 2 and 'y.png: we may not read it' in said[0], said
    assert 'note: album/closed: this folder cannot be listed and is left out' in said[1], said


# ---- pictures that lie

def with_tags() -> dict: # what a picture may carry
    exif = Image.Exif()
    exif[0x0112], exif[0x010e] = 6, 'a place'
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB'))
    return dict(exif=exif.tobytes(), icc_profile=profile.tobytes())

def samples() -> dict: # {name: bytes}
    "Small pictures of every kind that we read; real ones too, where the workplace has them."
    smooth = noise(6, 5, 0).resize((30, 22), Image.Resampling.BICUBIC)
    gray = smooth.convert('L')
    tags, deep = with_tags(), Image.fromarray(np.asarray(gray).astype(np.uint16)*257)
    clear = smooth.copy()
    clear.putalpha(gray)
    kinds = {'png': (smooth, 'PNG', tags), 'png palette': (smooth.quantize(16), 'PNG', {}),
             'png deep': (deep, 'PNG', {}), 'png clear': (clear, 'PNG', {}),
             'png bit': (gray.convert('1'), 'PNG', {}),
             'jpeg': (smooth, 'JPEG', tags), 'jpeg progressive': (smooth, 'JPEG', dict(progressive=True)),
             'jpeg cmyk': (smooth.convert('CMYK'), 'JPEG', {}), 'webp': (smooth, 'WEBP', tags),
             'webp lossless': (clear, 'WEBP', dict(lossless=True)), 'gif': (smooth.quantize(16), 'GIF', {}),
             'gif moving': (gray, 'GIF', dict(save_all=True, append_images=[gray.rotate(90)])),
             'tiff': (smooth, 'TIFF', tags),
             'tiff deflate': (smooth, 'TIFF', dict(compression='tiff_deflate')),
             'tiff lzw cmyk': (smooth.convert('CMYK'), 'TIFF', dict(compression='tiff_lzw')),
             'tiff jpeg': (smooth, 'TIFF', dict(compression='jpeg')),
             'tiff float': (gray.convert('F'), 'TIFF', {}), 'bmp': (smooth, 'BMP', {}),
             'bmp palette': (smooth.quantize(16), 'BMP', {}), 'ppm': (smooth, 'PPM', {}),
             'jpeg 2000': (smooth, 'JPEG2000', {}), 'avif': (smooth, 'AVIF', {}),
             'heic': (smooth, 'HEIF', {})}
    read_image.__globals__['_decoders']()                     # registers HEIC, where its plugin is installed
    made = {name: encoded(*kind) for name, kind in kinds.items() if kind[1] in Image.SAVE}
    for file in sorted(PHOTOS.glob('*.jpg')):
        with Image.open(file) as im: made[file.name] = encoded(im.resize((64, 40)), 'JPEG', {})
    made['png interlaced'] = interlaced()
    return made

def encoded(im, form, options) -> bytes:
    buffer = io.BytesIO()
    im.save(buffer, form, **options)
    return buffer.getvalue()

def interlaced() -> bytes:
    "A gray PNG of 8×8 px in the seven passes of Adam7, which Pillow reads and does not write."
    lines = [(1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8)]     # rows of each pass, pixels of a row
    rows = b''.join((b'\0' + bytes(range(40, 40 + wide)))*high for high, wide in lines)
    header = struct.pack('>IIBBBBB', 8, 8, 8, 0, 0, 0, 1)
    chunks = png_chunk(b'IHDR', header) + png_chunk(b'IDAT', zlib.compress(rows)) + png_chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + chunks

def png_chunk(kind, data) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

def damaged(data:bytes, dice) -> bytes:
    "One to four accidents, most of them near the head: bits, bytes, lengths, an early end."
    b = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4))):
        at = dice.randrange(min(len(b), 400) if dice.random() < .6 else len(b))
        size = dice.choice((1, 2, 4, 30))
        match dice.choice(('flip', 'lose', 'double', 'length', 'noise', 'end')):
            case 'flip': b[at] ^= 1 << dice.randrange(8)
            case 'lose': del b[at:at + size]
            case 'double': b[at:at] = b[at:at + size]
            case 'length': b[at:at + 4] = dice.choice((b'\xff'*4, b'\0'*4, b'\x7f\xff\xff\xff', b'\0\1\0\0'))
            case 'noise': b[at:at + size] = dice.randbytes(size)
            case 'end': del b[max(1, at):]
        if not b: return b'\0'
    return bytes(b)

MEMORY = 400 << 20      # bytes that reading a small file may take, beyond what the process has

def _read_all(read, folder, pipe):
    "Read every file of a folder with little memory; a file that takes 20 seconds ends the process."
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, 'w')
    warnings.simplefilter('ignore')
    has = int(Path('/proc/self/statm').read_text().split()[0])*os.sysconf('SC_PAGE_SIZE')
    resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, has + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for file in sorted(Path(folder).iterdir()):
        pipe.send(file.name)
        signal.alarm(20)
        try: said = read(file)
        except UserError as error: said = str(error)
        except BaseException as error: said = f'BAD {type(error).__name__}: {error}'
        signal.alarm(0)
        pipe.send(str(said))

def read_in_a_cell(read, folder) -> dict: # {name of a file: what came of it}
    "Read files in a process with little memory and little time."
    pipe, its = BIRTH.Pipe(False)
    child = BIRTH.Process(target=_read_all, args=(read, folder, its), daemon=True)
    child.start()
    its.close()
    said = []
    try:
        while True: said.append(pipe.recv())
    except EOFError: child.join()
    assert child.exitcode == 0, f'{said[-1]} ended the process: {child.exitcode} (-14: a hang)'
    return dict(zip(said[::2], said[1::2]))

def picture(file) -> str:
    im = read_image(file, max_pixels=4_000_000)
    assert im.mode == 'RGB' and min(im.size) > 0
    return f'picture {im.width*im.height}'

def write_damaged(made:dict, folder, n, what):
    "`n` damaged variants of each file, named by their kind and number."
    dice = random.Random(f'{SEED} {what}')
    print(f'{what}: FAULTS_SEED={SEED}, {n*WIDTH} damaged variants of each of {list(made)}')
    folder.mkdir()
    for name, data in made.items():
        for k in range(n*WIDTH): (folder/f'{name} {k:03}').write_bytes(damaged(data, dice))

def one_line(said) -> bool: return not said.startswith('BAD') and '\n' not in said

@fault('picture: hundreds damaged at random, of every format',
       happens='each gives a picture of plausible size or one line; none takes 20 s, or 400 MiB of memory',
       left='nothing')
def test_damaged_pictures(tmp_path):
    made = samples()
    (tmp_path/'whole').mkdir()
    for name, data in made.items(): (tmp_path/'whole'/name).write_bytes(data)
    whole = read_in_a_cell(picture, tmp_path/'whole')
    assert all(said.startswith('picture') for said in whole.values()), whole
    write_damaged(made, tmp_path/'damaged', 12, 'pictures')
    found = read_in_a_cell(picture, tmp_path/'damaged')
    assert not {name: said for name, said in found.items() if not one_line(said) or 'into memory' in said}
    pictures = sum(said.startswith('picture') for said in found.values())
    assert .1*len(found) < pictures < .9*len(found), pictures

@fault('picture: a hundred damaged ones among good ones in a folder',
       happens='every good one is done, every bad one is named in one line, the exit status is 1',
       left='the scenes of all that could be read')
def test_damaged_pictures_in_a_folder(net, tmp_path):
    made = {name.replace(' ', '-').replace('.', '-'): data for name, data in samples().items()}
    write_damaged(made, tmp_path/'in', 5, 'folder')
    for file in list((tmp_path/'in').iterdir()): file.rename(file.with_suffix('.jpg'))
    for i in range(3): noise(9, 9, i).save(tmp_path/'in'/f'good{i}.png')
    how = ['--weights', net, '--device', 'cpu', '--max-pixels', '100000']
    status, failed = program(['stylize', tmp_path/'in', '-o', tmp_path/'out', *how])
    scenes = contents(tmp_path/'out')
    n = len(list((tmp_path/'in').iterdir()))
    assert status == 1 and len(scenes) + len(failed) == n > 100, (len(scenes), len(failed), n)
    assert {f'good{i}.png' for i in range(3)} <= scenes.keys()


# ---- pictures that fill the memory or take for ever

def passes(side, n) -> bytes: # a progressive JPEG that goes over its picture n times more
    whole = encoded(Image.new('L', (side, side)), 'JPEG', dict(progressive=True))
    last = whole[whole.rfind(b'\xff\xda'):-2]
    return whole[:-2] + last*n + b'\xff\xd9'

def pages(n) -> bytes: # a TIFF file of n pages of one pixel
    tags = [(256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 0), (278, 1), (279, 1)]
    entries = b''.join(struct.pack('<HHII', tag, 3, 1, value) for tag, value in tags)
    size, data = 2 + len(entries) + 4, [b'II*\0\x08\0\0\0']
    for i in range(n):
        after = 8 + size*(i + 1) if i < n - 1 else 0
        data.append(struct.pack('<H', len(tags)) + entries + struct.pack('<I', after))
    return b''.join(data)

@fault('picture: bombs that cost time (endless passes, pages, frames)',
       happens='a JPEG of more than 100 passes is refused in one line; of pages and frames only the first is '
               'read',
       left='nothing')
def test_pictures_that_take_for_ever(tmp_path):
    small = encoded(Image.new('P', (1, 1)), 'GIF', {})
    frame = b'\x2c\0\0\0\0\1\0\1\0\0\2\2\x44\1\0'
    for name, data in dict(passes=passes(2000, 3000), tiff=pages(100_000),
                           gif=small[:-1] + frame*100_000 + b';').items(): (tmp_path/name).write_bytes(data)
    found = read_in_a_cell(picture, tmp_path)
    assert found['passes'].endswith('it goes over its picture 3006 times, perhaps to keep us busy: '
                                    're-save it with a picture editor')
    assert found['tiff'] == found['gif'] == 'picture 1'

@fault('picture: a damaged length that claims two gigabytes',
       happens='one line; no more memory than the file has bytes',
       left='nothing')
def test_a_length_that_lies(tmp_path):
    data = bytearray(encoded(noise(20, 20, 0), 'PNG', {}))
    at = data.index(b'IDAT')
    data[at - 4:at] = b'\x7f\xff\xff\xff'
    (tmp_path/'x.png').write_bytes(data)
    found = read_in_a_cell(picture, tmp_path)['x.png']
    assert one_line(found) and 'memory' not in found

@fault('picture: JPEG files whose other parts look like passes', happens='read as usual', left='-')
def test_passes_are_counted_not_guessed(tmp_path):
    "A film behind the picture, as telephones write it, and a comment: neither is a pass."
    usual = encoded(noise(20, 20, 0), 'JPEG', dict(progressive=True))
    comment = b'\xff\xfe' + struct.pack('>H', 2 + 2000) + b'\xff\xda'*1000
    (tmp_path/'film.jpg').write_bytes(usual + b'\xff\xda\0\0'*1000)
    (tmp_path/'comment.jpg').write_bytes(usual[:2] + comment + usual[2:])
    for name in ('film.jpg', 'comment.jpg'): assert read_image(tmp_path/name).size == (20, 20)


# ---- weights and checkpoints that lie

def translator(file) -> str:
    weights = load_translator(file).state_dict()
    assert all(w.isfinite().all() for w in weights.values())
    return 'network'

def stylegan(file) -> str:
    load_stylegan(file)
    return 'network'

@fault('weights: hundreds damaged at random (.safetensors, .pth)',
       happens='each gives a network of finite numbers or one line; none runs code, hangs or takes 400 MiB',
       left='nothing')
def test_damaged_weights(net, tmp_path):
    torch.save(load_translator(net).state_dict(), tmp_path/'net.pth')
    made = {'safetensors': net.read_bytes(), 'pth': (tmp_path/'net.pth').read_bytes()}
    write_damaged(made, tmp_path/'damaged', 60, 'weights')
    found = read_in_a_cell(translator, tmp_path/'damaged')
    assert not {name: said for name, said in found.items() if not one_line(said)}
    assert len([said for said in found.values() if said != 'network']) > 30

@fault('weights: StyleGAN files damaged at random', happens='as with translators', left='nothing')
def test_damaged_stylegans(tmp_path):
    made = {'stylegan': (PACKAGE/'stylegan.safetensors').read_bytes()}
    write_damaged(made, tmp_path/'damaged', 10, 'stylegan')
    found = read_in_a_cell(stylegan, tmp_path/'damaged')
    assert not {name: said for name, said in found.items() if not one_line(said)}

def resumed(run, photos):
    warnings.simplefilter('ignore')
    run_training(test_runs.LineRun(test_runs.TOY, photos, run), resume=True)

@fault('weights: a checkpoint of which any bytes were changed, lost or added',
       happens='the run goes on from the one before, and ends bit for bit as it would have',
       left='the damaged file, renamed to .damaged')
def test_damaged_checkpoints(photos, tmp_path):
    line_run(tmp_path/'whole', photos)
    dice = random.Random(f'{SEED} checkpoints')
    for k in range(12*WIDTH):
        run = tmp_path/str(k)
        shutil.copytree(tmp_path/'whole', run)
        newest = checkpoints(run)[-1]
        whole, data = newest.read_bytes(), damaged(newest.read_bytes(), dice)
        newest.write_bytes(data)
        resumed(run, photos)
        assert test_runs.same(tmp_path/'whole', run), f'FAULTS_SEED={SEED}, number {k}'
        assert whole == data or list((run/'checkpoints').glob('*.damaged'))

@fault('weights: one bit of one number of a checkpoint', happens='noticed, as the file holds its own SHA-256',
       left='the damaged file')
def test_one_bit_of_a_checkpoint(tmp_path):
    file = save_checkpoint(tmp_path, 1, test_runs.TOY, {'x': torch.ones(100), 'n': torch.tensor(3)}, {})
    data, dice = bytearray(file.read_bytes()), random.Random(f'{SEED} bit')
    for _ in range(40*WIDTH):
        at, bit = dice.randrange(len(data) - 408, len(data)), 1 << dice.randrange(8)
        data[at] ^= bit
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match='has changed since it was written'): read_checkpoint(file)
        data[at] ^= bit
    file.write_bytes(data)
    assert read_checkpoint(file)[0]['x'].sum() == 100

@fault('weights: a hostile checkpoint whose hash is right', happens='one line; nothing of it is run',
       left='the file')
def test_hostile_checkpoint(photos, tmp_path):
    line_run(tmp_path/'whole', photos)
    tensors, meta = read_checkpoint(checkpoints(tmp_path/'whole')[-1])
    state, data = {k: v.clone() for k, v in tensors.items()}, json.loads(meta['data'])
    def without(*names): return {k: v for k, v in state.items() if k not in names}
    lies = {'no dice': (without('rng/cpu'), 9, data), 'no weights': ({'rng/cpu': state['rng/cpu']}, 9, data),
            'small dice': ({**state, 'rng/cpu': torch.zeros(3, dtype=torch.uint8)}, 9, data),
            'turned': ({**state, 'average/weight': torch.zeros(7)}, 9, data), 'no data': (state, 9, {}),
            'list': (state, 9, []), 'no processes': (state, 9, {**data, 'processes': []}),
            'step': (state, 10**8 - 1, data)}
    for name, (numbers, step, about) in lies.items():
        shutil.copytree(tmp_path/'whole', tmp_path/name)
        for file in checkpoints(tmp_path/name): file.unlink()
        save_checkpoint(tmp_path/name, step, test_runs.TOY, numbers, about)
        with pytest.raises(UserError) as error: resumed(tmp_path/name, photos)
        assert '\n' not in str(error.value), name


# ---- many files, odd names, closed streams

def many(folder):
    "10,000 files with 40 open at once at most: found, named, read in training, and 100 of them stylized."
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    from scenimefy.data import UnpairedSet
    from scenimefy.stylize import _name_outputs, _sources
    found = find_images(folder)
    jobs = _name_outputs(_sources([folder], folder.parent/'out')[0], folder.parent/'out')
    assert len(found) == len(jobs) == len({str(out).casefold() for _, out in jobs}) == 10_000
    assert [p.stem for p in found[:12]] == [f'photo {i}' for i in range(12)]
    data = UnpairedSet(folder, folder, 16)
    for position in range(0, 3000, 30): data[position]
    report = stylize_folder(found[:100*WIDTH], folder.parent/'out', ResnetGenerator(ngf=4, n_blocks=1).eval(),
                            progress=False)
    assert report.ok and len(report.done) == 100*WIDTH

@fault('names: 10,000 files in a folder',
       happens='all are found, in natural order, and each scene has a name of its own; never more than 40 '
               'files are open', left='one scene for each')
def test_ten_thousand_files(tmp_path):
    (tmp_path/'in').mkdir()
    noise(8, 8, 0).save(tmp_path/'in'/'photo 0.png')
    for i in range(1, 10_000): os.link(tmp_path/'in'/'photo 0.png', tmp_path/'in'/f'photo {i}.png')
    code, _, trace = life(many, tmp_path/'in')
    assert code == 0, trace

@fault('names: --debug.png, -, line breaks, a space, bytes that are no UTF-8, 251 letters, other scripts',
       happens='all are done; after `--` a name may begin with a dash', left='scenes of the same names')
def test_odd_names(net, tmp_path, monkeypatch):
    names = [b'--debug.png', b'-.png', b'a\nb.png', b' .png', b'caf\xe9.png', b'a'*251 + b'.png',
             b'$HOME.png', 'ß 語 \u202e .png'.encode(), b'x:*?.png', b'con.png', b'%s{0}.png', b'a.png.png',
             '\U0001f600.png'.encode()]
    (tmp_path/'in').mkdir()
    for name in names: (Path(os.fsdecode(os.fsencode(tmp_path/'in') + b'/' + name))).write_bytes(
        encoded(noise(9, 9, 0), 'PNG', {}))
    how = ['--weights', net, '--device', 'cpu']
    assert program(['stylize', tmp_path/'in', '-o', tmp_path/'out', *how]) == (0, [])
    assert sorted(os.listdir(os.fsencode(tmp_path/'out'))) == sorted(names)
    monkeypatch.chdir(tmp_path/'in')
    assert program(['stylize', '-o', '../two', *how, '--', '--debug.png', '-.png']) == (0, [])
    assert sorted(os.listdir('../two')) == ['--debug.png', '-.png']

def talks_into(_, words, closed):
    "The program, with full or closed streams."
    os.close(0)
    for number in closed: os.dup2(os.open('/dev/full', os.O_WRONLY), number)
    sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', closefd=False)
    sys.argv = ['scenimefy', *words]
    try: cli.main()
    except SystemExit as end: Path(words[-1]).with_suffix('.status').write_text(str(end.code or 0))

@fault('names: the disk behind standard output or error is full',
       happens='the work is done, and the exit status says that it could not be told', left='all scenes')
@pytest.mark.parametrize('closed', [(1,), (2,), (1, 2)])
def test_full_streams(photos, net, tmp_path, closed):
    words = ['stylize', '--weights', net, '--device', 'cpu', photos/'0.png', '-o', tmp_path/'out']
    words = [str(word) for word in words]
    life(functools.partial(talks_into, words=words, closed=closed), tmp_path)
    assert list(contents(tmp_path/'out')) == ['0.png']
    assert (tmp_path/'out.status').read_text() == str(int(1 in closed))

def test_help_into_a_full_disk():
    code = 'from scenimefy.cli import main; main()'
    with open('/dev/full', 'w') as full:
        done = subprocess.run([sys.executable, '-c', code, '--help'], stdout=full, stderr=subprocess.PIPE,
                              text=True)
    assert done.returncode == 1
    assert done.stderr == 'scenimefy: cannot print the result: No space left on device\n'

def test_the_table_is_up_to_date():
    "Every row stands at its test, and the marks of all tests stand in the page."
    text = page_text()
    assert text == PAGE.read_text(encoding='utf8'), 'run python tests/make_faults.py'
    parts = text.split('\n## ')[1:]
    assert len(parts) == len(KINDS) and all(part.count('\n| ') > 2 for part in parts)
