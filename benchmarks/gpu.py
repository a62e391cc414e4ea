"""Everything to learn from a GPU that comes for ten minutes: checks, speeds and a training, in one run.

The one command, from the root of the repository, on the machine with the card; nothing is installed or
downloaded:

    PYTHONPATH=. python3 benchmarks/gpu.py --minutes 9 -o "$OUT"

and the same on a CPU, at a tiny size, to see that the script itself works (about 40 seconds on one core):

    PYTHONPATH=. python3 benchmarks/gpu.py --device cpu --tiny -o gpu-try

What is in OUT afterwards, at most eight files, none larger than 16 MB, no folder below OUT/train:

    gpu.json        the machine, every check with its numbers, every speed with its ratio, the training's log;
                    after a real run copy it to benchmarks/results/NAME.json (the name of the card is inside)
    gpu.md          the same to read
    train/          weights, a picture of progress, and the state to go on from, in parts where it is large
                    (`gpu.py --join OUT/train -o state.safetensors` puts them together,
                    `--state OUT/train` goes on)

All of it is written again after every single check, row and checkpoint, so a run that is killed has kept
what it had. Every part runs in a process of its own: one that hangs, crashes or breaks the card's context
costs its own item only. What cannot be imported is named first, and what needs it is skipped, with the
reason. If open_clip is not on that machine, its wheel and those of ftfy and wcwidth, unpacked into a folder
on PYTHONPATH, bring the tiny CLIP back: it judges in Stage 1 and in the training's perceptual score. Exit
status 1: a check failed, or none could be made.

"TF32 off" is said where float32 is meant exactly; tf32 rows let convolutions and matrix products round to
TF32.
Times exclude warm-up and compilation; a speed is a median, and its ratio is to a row of the same run.
"""
import argparse
import contextlib
import copy
import gc
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

LIMIT = 16*10**6       # bytes: larger files do not come back from a lent machine
FILES = 8              # nor do more than this many
BROKEN = 3             # exit status of a part whose card no longer answers; it is started again
SHARES = {'checks': .25, 'bench': .70, 'training': 1.}   # share of the time at whose end each part must end

NEEDS = {'torch': 'everything', 'numpy': 'everything', 'PIL': 'everything', 'safetensors': 'everything',
         'tqdm': 'everything', 'filelock': 'weights', 'accelerate': 'trainings', 'tensorboard': 'trainings',
         'transformers': 'the segmenter: pair scoring, data of the training',
         'open_clip': 'the tiny CLIP: priors of Stage 1, perceptual scores', 'scenimefy': 'everything'}

FULL = SimpleNamespace(
    seconds=1., least=5,                                                   # of timing a row; calls at least
    px=256, ngf=64, n_blocks=9, batches=(1, 8),                            # Stage 3 step
    photos=(1, 8, 32, 128), compiled_photos=(32, 128, 1, 8),               # stylize
    gan=256, gan_batch=16, gan_channels=None, gan_dim=512,                 # StyleGAN steps
    pairs=(32, 128, 512),
    check_px=64, check_ngf=16, check_steps=12,
    portions=48, portion=dict(pairs=60, sharp=20, side=192),               # data of the training
    train_batch=16, scenes=250, pictures=1000)                             # the last two: of its scores
TINY = SimpleNamespace(
    seconds=0., least=2,
    px=32, ngf=4, n_blocks=5, batches=(1,),
    photos=(1, 2), compiled_photos=(1,),
    gan=16, gan_batch=2, gan_channels=(8, 8, 8), gan_dim=16,
    pairs=(4,),
    check_px=32, check_ngf=4, check_steps=4,
    portions=1, portion=dict(pairs=4, sharp=4, side=64),
    train_batch=2, scenes=4, pictures=16)


# ---- the record: one dictionary, on disk at every moment

def write_whole(path, text):
    "Write a file that is whole or absent."
    tmp = path.with_name(f'.{path.name}')
    tmp.write_text(text, encoding='utf8')
    os.replace(tmp, path)


class Record(dict):
    "OUT/gpu.json as a dictionary; `save` also writes the table."
    def __init__(self, out, fresh=False):
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        super().__init__(about={}, missing={}, machine={}, parts={}, checks=[], bench=[], training={})
        file = self.out/'gpu.json'
        if file.exists() and not fresh: self.update(json.loads(file.read_text(encoding='utf8')))

    def save(self):
        text = json.dumps(finite(self), indent=1, ensure_ascii=False) + '\n'
        write_whole(self.out/'gpu.json', text)
        try: text = table(self)
        except Exception as e:                                  # the numbers are safe
            text = f"The table cannot be drawn: {reason(e)['traceback']}"
        write_whole(self.out/'gpu.md', text)

    def tally(self):
        "How many checks passed, failed and were skipped."
        passed = [row for row in self['checks'] if row.get('ok')]
        skipped = [row for row in self['checks'] if 'skipped' in row]
        return len(passed), len(self['checks']) - len(passed) - len(skipped), len(skipped)


def finite(value):
    "The same value with NaN and infinity as words: JSON has no numbers for them."
    if isinstance(value, dict): return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)): return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def reason(error):
    "What went wrong, in one line and in the last lines of its traceback."
    line = ' '.join(f'{type(error).__name__}: {error}'.split())[:400]
    return dict(error=line, traceback=''.join(traceback.format_exception(error))[-1500:])


class Skip(Exception):
    "This machine cannot do it, and that is no fault."


class Kit:
    "What a part works with: where it runs, how large, until when, and the record."
    def __init__(self, args, record):
        self.args, self.record, self.until = args, record, args.until
        self.device, self.tiny, self.size = args.device, args.tiny, TINY if args.tiny else FULL
        self.work, self.cuda = Path(args.work), args.device.startswith('cuda')

    def left(self): return self.until - time.time()

    def guarded(self, section, name, work, **more):
        "Run one piece of a part: what it found, or why not, is on disk before the next begins."
        done = self.record[section]
        if any(row['name'] == name for row in done): return        # by the life before, which broke the card
        row, began = dict(name=name, **more), time.perf_counter()
        self.record['running'] = dict(section=section, **row)
        self.record.save()
        try:
            if self.left() <= 0: raise Skip('not reached: the time of this part was over')
            row.update(work())
        except (Skip, ImportError) as e: row['skipped'] = ' '.join(str(e).split())
        except Exception as e: row.update(reason(e))
        row['took'] = round(time.perf_counter() - began, 2)
        done.append(row)
        self.record.pop('running')
        self.record.save()
        print(f"{section}: {name}: {verdict(row)}", flush=True)
        self.tidy()

    def tidy(self):
        "Give memory back, and leave if the card no longer answers: the parent starts this part again."
        if not self.cuda: return
        import torch
        compiler = sys.modules.get('torch._dynamo')
        if compiler: compiler.reset()                              # it would keep compiled networks alive
        gc.collect()
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception: sys.exit(BROKEN)


def verdict(row):
    "One row of the record in a few words."
    if 'skipped' in row: return f"skipped ({row['skipped']})"
    if 'error' in row: return f"FAILED ({row['error']})"
    if 'seconds' in row: return f"{row['seconds']:.4g} s, {row['per_second']:.4g} {row['unit']}/s"
    bad = [n for n in row.get('numbers', []) if n['ok'] is False]
    if not bad: return 'passed'
    return 'FAILED: ' + '; '.join(f"{n['what']} {n['gap']:.2g}, allowed {n['allowed']:.2g}" for n in bad)


# ---- numbers

def largest(numbers):
    "The largest number; NaN if there is one, which Python's `max` may pass over."
    numbers = list(numbers)
    for n in numbers:
        if math.isnan(n): return n
    return max(numbers)


def gap(a, b):
    "The largest difference of two tensors, relative to the largest value of the second."
    a, b = (t.detach().double().cpu() for t in (a, b))
    assert a.shape == b.shape, f'shapes {tuple(a.shape)} and {tuple(b.shape)}'
    return ((a - b).abs().max()/b.abs().max().clamp(min=1e-12)).item()


def worst(mine, theirs):
    "The largest difference over all tensors of a dictionary, relative to the largest value among them."
    assert mine.keys() == theirs.keys()
    scale = max(t.abs().max().item() for t in theirs.values())
    def off(a, b):
        a, b = (t.detach().double().cpu() for t in (a, b))
        return (a - b).abs().max().item()
    return largest(off(mine[k], theirs[k]) for k in theirs)/scale


def share_of_way(a, b, start):
    "How far apart two trainings ended, as a share of the way that the second has gone from `start`."
    import torch
    def flat(state): return torch.cat([state[k].double().flatten().cpu() for k in start])
    return ((flat(a) - flat(b)).norm()/(flat(b) - flat(start)).norm()).item()


def loss_gaps(mine, theirs):
    "Per loss, the difference relative to its size, or to 0.1 where it is smaller."
    assert mine.keys() == theirs.keys(), f'{sorted(mine)} against {sorted(theirs)}'
    a, b = ({k: v.item() for k, v in losses.items()} for losses in (mine, theirs))
    return {k: abs(a[k] - b[k])/max(.1, abs(b[k])) for k in b}


def judged(numbers):
    "A check's row from (what, gap, allowed); `allowed` None only informs. NaN never passes."
    rows = []
    for what, g, allowed in numbers:
        ok = None if allowed is None else bool(g <= allowed)
        rows.append(dict(what=what, gap=float(g), allowed=allowed, ok=ok))
    return dict(ok=all(row['ok'] is not False for row in rows), numbers=rows)


def tf32(on):
    "Let float32 products round to TF32, or not."
    import torch
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def randn(*shape, key=0):
    "Normal numbers that every device gets alike."
    import torch
    from scenimefy.core import seeded
    return torch.randn(*shape, generator=seeded('gpu', key))


def layouts():
    import torch
    return {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


def layout_of(reading):
    "How pictures lie in memory for the plain and for the fast step."
    return layouts()['channels_last' if reading == 'fast' else 'contiguous']


# ---- A. checks: what no test on a CPU reaches

def norm_case(kit, norm, shape, layout, grad_layout, dtype):
    "Output and input gradient of `norm` on the device, of plain arithmetic in float64 there, and of the CPU."
    import torch
    x, g = randn(*shape, key='x')*2 + 3, randn(*shape, key='g')
    def plain(x):
        mean = x.mean((2, 3), keepdim=True)
        variance = x.var((2, 3), keepdim=True, unbiased=False)
        return (x - mean)/(variance + 1e-5).sqrt()
    def both(fn, device, dtype):
        leaf = x.to(device, dtype).contiguous(memory_format=layouts()[layout]).requires_grad_()
        incoming = g.to(device, dtype).contiguous(memory_format=layouts()[grad_layout])
        y = fn(leaf)
        (slope,) = torch.autograd.grad(y, leaf, incoming)
        return y, slope
    return both(norm, kit.device, dtype), both(plain, kit.device, torch.float64), both(norm, 'cpu', dtype)


def norm_numbers(kit, norm, name, dtype, allowed):
    "Its largest gaps over three shapes, one a single image, in both layouts of input and incoming gradient."
    numbers, shapes = [], ((1, 24, 32, 32), (2, 24, 32, 32), (3, 8, 13, 9))
    for layout in layouts():
        for grad_layout in layouts():
            found = [norm_case(kit, norm, shape, layout, grad_layout, dtype) for shape in shapes]
            where = f'{name}, {layout}, gradient {grad_layout}'
            for i, what in enumerate(('output', 'input gradient')):
                off_true = largest(gap(mine[i], true[i]) for mine, true, _ in found)
                off_cpu = largest(gap(mine[i], cpu[i]) for mine, _, cpu in found)
                numbers += [(f'{where}: {what}', off_true, allowed),
                            (f'{where}: {what}, against the CPU', off_cpu, allowed)]
    return numbers


def check_norm(kit):
    "Against float64 on the same device and against the CPU."
    import torch
    import torch.nn.functional as F
    from scenimefy.translator import instance_norm
    numbers = norm_numbers(kit, instance_norm, 'float32', torch.float32, 1e-4)
    numbers += norm_numbers(kit, instance_norm, 'bfloat16', torch.bfloat16, .03)
    # torch's own function gives a wrong gradient on some CPUs (notebook 04): is it right here? Only to know.
    def torchs_own(x): return F.instance_norm(x, eps=1e-5)
    own = norm_numbers(kit, torchs_own, "torch's F.instance_norm", torch.float32, None)
    return numbers + [n for n in own if n[0].endswith('gradient')]


def toy(kit, **more):
    "Settings of Stage 3 for small networks."
    from scenimefy.semisup import SemisupSettings
    px, n = kit.size.check_px, kit.size.check_ngf
    cfg = SemisupSettings.preset('tiny').but(size=px, load_size=px, ngf=n, ndf=n, n_blocks=5, batch=2)
    return cfg.but(**more)


def images(n, px, channels=3, key=0): return randn(n, channels, px, px, key=key).mul(.5).clamp(-1, 1)


def pieces(cfg, batch):
    "Every network of Stage 3 with an input and a way to call it: {name: (networks, input, call)}."
    from scenimefy.semisup import Networks, draw_ids
    from scenimefy.translator import TAPS
    nets, ids, x = Networks(cfg), draw_ids(cfg, 0)['F'], images(batch, cfg.size)
    def image_and_taps(nets, x):
        image, taps = nets.G(x, taps=TAPS)
        return [image, *taps]
    return {'generator': (nets, x, image_and_taps),
            'critic': (nets, x, lambda nets, x: [nets.D(x)]),
            'critic of pairs': (nets, images(batch, cfg.size, 6), lambda nets, x: [nets.D_p(x)]),
            'heads': (nets, x, lambda nets, x: nets.F(nets.G.encode(x, TAPS), ids))}


def answers(net, x, call, device, layout):
    "Outputs and gradients of a copy of `net` on a device: {name: tensor}, {name: tensor}."
    net = copy.deepcopy(net).to(device, memory_format=layout)
    leaf = x.clone().to(device, memory_format=layout).requires_grad_()
    outputs = call(net, leaf)
    loss = sum((o*randn(*o.shape, key=i).to(device)).mean() for i, o in enumerate(outputs))
    loss.backward()
    gradients = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
    return {str(i): o for i, o in enumerate(outputs)}, {**gradients, 'input': leaf.grad}


def network_numbers(kit, name, net, x, call, layout):
    "The gaps of one network to the CPU's plain layout."
    outputs, gradients = answers(net, x, call, 'cpu', layouts()['contiguous'])
    mine, mine_gradients = answers(net, x, call, kit.device, layouts()[layout])
    off_input = gap(mine_gradients.pop('input'), gradients.pop('input'))       # those of the weights remain
    return [(f'{name}: outputs', largest(gap(mine[k], outputs[k]) for k in outputs), 1e-4),
            (f'{name}: gradient of the input', off_input, 5e-3),
            (f'{name}: gradients of the weights', worst(mine_gradients, gradients), 2e-3)]


def check_networks(kit):
    "In both layouts, for a batch of one and of two."
    numbers = []
    for batch in (1, 2):
        for name, piece in pieces(toy(kit), batch).items():
            for layout in layouts():
                numbers += network_numbers(kit, f'{name}, batch {batch}, {layout}', *piece, layout)
    return numbers


def one_step(kit, reading, precision='fp32', lr=None, device=None, layout=None):
    "Losses and gradients of one step of Stage 3 from fresh weights."
    import torch
    from scenimefy.semisup import Networks, draw_ids, fast_step, make_optimizers, plain_step
    cfg, device, grads = toy(kit), device or kit.device, {}
    layout = layout or layout_of(reading)
    nets = Networks(cfg).to(device, memory_format=layout)
    optims = make_optimizers(nets, cfg)
    if lr is not None:
        for o in optims.values(): o.param_groups[0]['lr'] = lr
    def keep(names):
        for name in names:
            for k, p in getattr(nets, name).named_parameters(): grads[f'{name}.{k}'] = p.grad.clone()
    batch = [images(2, cfg.size, key=i).to(device, memory_format=layout) for i in range(4)]
    args = (nets, optims, batch, draw_ids(cfg, 0, device), cfg, 1)
    amp = contextlib.nullcontext
    if precision == 'bf16': amp = lambda: torch.autocast(torch.device(device).type, torch.bfloat16)
    if reading == 'fast': losses = fast_step(*args, amp=amp, sync_gradients=keep)
    else:
        with amp(): losses = plain_step(*args)
        keep(nets.present())
    return losses, grads


def of_net(grads, net):
    "The gradients of one network."
    return {k: v for k, v in grads.items() if k.startswith(f'{net}.')}


def check_step(kit):
    "lr 0 keeps the critics still, so that both readings take gradients at one place; then the step as it is."
    plain, fast = one_step(kit, 'plain', lr=0.), one_step(kit, 'fast', lr=0.)
    cpu = one_step(kit, 'fast', lr=0., device='cpu', layout=layouts()['contiguous'])
    off_plain, off_cpu = (largest(loss_gaps(fast[0], other[0]).values()) for other in (plain, cpu))
    numbers = [('largest gap of a loss, lr 0', off_plain, 1e-4),
               ('largest gap of a loss, lr 0, against the CPU', off_cpu, 1e-3)]
    for net in ('G', 'D', 'D_p', 'F', 'F_s'):
        off_plain, off_cpu = (worst(of_net(fast[1], net), of_net(other[1], net)) for other in (plain, cpu))
        numbers += [(f'gradients of {net}', off_plain, 2e-3),
                    (f'gradients of {net}, against the CPU', off_cpu, 1e-2)]
    whole = loss_gaps(one_step(kit, 'fast')[0], one_step(kit, 'plain')[0])
    return numbers + [('largest gap of a loss, critics moving', largest(whole.values()), 5e-3)]


def check_bf16(kit):
    "Losses only: bfloat16 has three digits."
    numbers = []
    for reading in ('plain', 'fast'):
        low, full = (one_step(kit, reading, precision)[0] for precision in ('bf16', 'fp32'))
        for k, g in loss_gaps(low, full).items():
            numbers.append((f'{reading}: {k}', g, .05 if k == 'total' else .1))
    return numbers


def check_adam(kit):
    "The same ten random gradients to both; weights lie in both layouts."
    import torch
    from scenimefy.semisup import Networks, make_optimizers
    cfg, numbers = toy(kit), []
    for layout, order in layouts().items():
        nets = [Networks(cfg).to(kit.device, memory_format=order) for _ in range(2)]
        ours = make_optimizers(nets[0], cfg)['G']
        other = torch.optim.Adam(nets[1].G.parameters(), lr=cfg.lr, betas=cfg.betas,
                                 fused=False, foreach=False)
        start = weights_of(nets[0].G)
        for step in range(10):
            for net, optim in zip(nets, (ours, other)):
                for i, p in enumerate(net.G.parameters()):
                    p.grad = torch.empty_like(p)              # it lies as its weight does
                    p.grad.copy_(randn(*p.shape, key=(step, i)))
                optim.step()
        a, b = (net.G.state_dict() for net in nets)
        share = share_of_way(a, b, start)
        numbers.append((f'{layout}: weights after ten steps, share of the way', share, 1e-4))
    return numbers


def noise_folders(kit):
    "Three small folders of noise pictures, for trainings whose result does not matter."
    from scenimefy.core import to_image
    root, px = kit.work/'noise', kit.size.check_px + 8
    for k, name in enumerate(('photos', 'anime', 'pairs/trainA', 'pairs/trainB')):
        (root/name).mkdir(parents=True, exist_ok=True)
        for i in range(6): to_image(images(1, px, key=(k, i))[0]).save(root/name/f'{i}.png')
    return root/'photos', root/'anime', root/'pairs'


@contextlib.contextmanager
def repeatable():
    "Ask for algorithms that give the same numbers each time; where there are none, torch only warns."
    import torch
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    try: yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


def misplaced(run):
    "How many of Adam's moments lie in memory otherwise than their weight: a fused Adam would mix them up."
    count = 0
    for optim in run.optims.values():
        for p, state in optim.state.items():
            for moment in state.values():
                if moment.ndim > 0 and moment.stride() != p.stride(): count += 1
    return count


def weights_of(nets):
    "What is compared: the weights. A bias in front of a normalization only follows rounding."
    return {k: v.detach().cpu().clone() for k, v in nets.state_dict().items() if k.endswith('weight')}


def life(kit, name, cfg, folders, device, stop=None, resume=False):
    "One life of a training in a folder: its weights at the end, or where it was stopped; and `misplaced`."
    from scenimefy.runs import Stopped, run_training
    from scenimefy.semisup import Run
    def halt(step, n_steps, losses):
        if step == stop: signal.raise_signal(signal.SIGTERM)
    run = Run(cfg, *folders, kit.work/name, device)
    with repeatable(), contextlib.suppress(Stopped): run_training(run, resume, halt)
    return weights_of(run.nets), misplaced(run)


def lives(kit, tag, precision):
    "Settings, folders and first weights of small trainings."
    from scenimefy.semisup import Networks
    n = kit.size.check_steps
    cfg = toy(kit, epochs=2, epoch_steps=n//2, log_every=1, save_every=1000, sample_every=1000,
              precision=precision)
    start = weights_of(Networks(cfg))
    shutil.rmtree(kit.work/tag, ignore_errors=True)
    return cfg, noise_folders(kit), start


def check_resume(kit, precision):
    """A card need not repeat itself to the last bit, so two unbroken runs say how much of a difference is
    its own."""
    tag = f'resume-{precision}'
    cfg, folders, start = lives(kit, tag, precision)
    whole, again = (life(kit, f'{tag}/{i}', cfg, folders, kit.device)[0] for i in range(2))
    life(kit, f'{tag}/cut', cfg, folders, kit.device, stop=kit.size.check_steps//2)
    resumed, wrong = life(kit, f'{tag}/cut', cfg, folders, kit.device, resume=True)
    own = share_of_way(again, whole, start)
    return [('two unbroken runs, share of the way', own, .3),
            ('moments that lie otherwise than their weights', wrong, 0),
            ('stopped and resumed, share of the way', share_of_way(resumed, whole, start), .01 + 2*own)]


def check_moves(kit):
    "Half of the way on one device, the other half on the other; against all of it on the first."
    tag = 'moves'
    cfg, folders, start = lives(kit, tag, 'fp32')
    here, _ = life(kit, f'{tag}/card', cfg, folders, kit.device)
    there, _ = life(kit, f'{tag}/cpu', cfg, folders, 'cpu')
    own = share_of_way(here, there, start)
    numbers = [('all on the card against all on the CPU, share of the way', own, .3)]
    ways = (('CPU to card', 'cpu', kit.device, there), ('card to CPU', kit.device, 'cpu', here))
    for name, first, second, whole in ways:
        folder = f'{tag}/{name}'.replace(' ', '-')
        life(kit, folder, cfg, folders, first, stop=kit.size.check_steps//2)
        moved, wrong = life(kit, folder, cfg, folders, second, resume=True)
        numbers += [(f'{name}, share of the way', share_of_way(moved, whole, start), .01 + 2*own),
                    (f'{name}: moments that lie otherwise than their weights', wrong, 0)]
    return numbers


def check_stylize(kit):
    "Differences in levels of 0 to 255; the photo has odd sides."
    import numpy as np
    from scenimefy.core import to_image
    from scenimefy.stylize import stylize
    from scenimefy.painters import render
    from scenimefy.world import HELD_OUT, scenes
    photo = to_image(render(scenes([HELD_OUT]), 128, 'photo')[0]).crop((0, 0, 127, 97))
    def levels(device, precision):
        return np.asarray(stylize(photo, 'tiny', device, precision)).astype(float)
    cpu, numbers = levels('cpu', 'fp32'), []
    for precision, most, mean in (('fp32', 2, .1), ('bf16', 64, 3)):
        off = abs(levels(kit.device, precision) - cpu)
        numbers += [(f'{precision}: largest, levels', off.max(), most),
                    (f'{precision}: mean, levels', off.mean(), mean)]
    return numbers


def small_gan(kit):
    "A small generator and its critic, from one seed."
    import torch
    from scenimefy.pretrain import PretrainSettings, StyleganNetworks
    cfg = PretrainSettings.preset('tiny').but(size=32, style_dim=16, channels=(16, 16, 16, 16), batch=4,
                                              r1_every=1, path=2., path_every=1)
    return cfg, StyleganNetworks(cfg), torch.zeros(())


def check_gan_step(kit):
    """With R1 and path length, which need gradients of gradients. Seeds are drawn on the CPU, so devices
    must agree."""
    from scenimefy.pretrain import gan_step, lazy_adam
    found = []
    for device in ('cpu', kit.device):
        cfg, nets, mean = small_gan(kit)
        nets = nets.to(device)
        optims = {k: lazy_adam(net.parameters(), cfg.lr, 1) for k, net in (('G', nets.G), ('D', nets.D))}
        losses = gan_step(nets, optims, images(4, 32).to(device), cfg, 0, mean_path=mean.to(device))[0]
        found.append(losses)
    return [(f'loss {k}, card against CPU', g, 1e-2) for k, g in loss_gaps(found[1], found[0]).items()]


def finetune_optimizers(nets, cfg):
    "Stage 1's optimizers, of what learns."
    from scenimefy.pretrain import lazy_adam
    optims = {}
    for name, net in nets.items():
        learning = [p for p in net.parameters() if p.requires_grad]
        optims[name] = lazy_adam(learning, cfg.lr, 16)
    return optims


def check_finetune(kit):
    """Stage 1 with the tiny priors where open_clip is there, else without them: the names of the numbers say
    which."""
    import torch
    from scenimefy.finetune import FinetuneSettings, Priors, finetune_step, load_priors, target_of
    cfg, found = FinetuneSettings.preset('tiny').but(batch=4, crop=8, r1_every=1), []
    if not importlib.util.find_spec('open_clip'): cfg = cfg.but(lam_clip=0., lam_perc=0., lam_patch=0.)
    for device in ('cpu', kit.device):
        source = small_gan(kit)[1].to(device)
        nets = torch.nn.ModuleDict(dict(G=target_of(source.G, cfg.blocks), D=source.D))
        optims = finetune_optimizers(nets, cfg)
        priors = load_priors(cfg, device) if cfg.lam_clip else Priors()
        source.G.requires_grad_(False)
        found.append(finetune_step(nets, optims, images(4, 32).to(device), source.G, priors, cfg, 0))
    which = 'tiny priors' if cfg.lam_clip else 'no priors: open_clip is missing'
    gaps = loss_gaps(found[1], found[0])
    return [(f'{which}: loss {k}, card against CPU', g, 1e-2) for k, g in gaps.items()]


CHECKS = {
    'instance norm: gradients in both layouts': check_norm,
    'networks of Stage 3, forward and backward, fp32 (TF32 off) against the CPU': check_networks,
    'fast step against plain step, fp32 (TF32 off)': check_step,
    'bf16 step against fp32': check_bf16,
    'fused Adam against unfused': check_adam,
    'Stage 3 stopped and resumed, fp32': lambda kit: check_resume(kit, 'fp32'),
    'Stage 3 stopped and resumed, bf16': lambda kit: check_resume(kit, 'bf16'),
    'a state moves between CPU and card': check_moves,
    'stylize against the CPU': check_stylize,
    'gan_step with R1 and path length': check_gan_step,
    'finetune_step': check_finetune}


def checks(kit):
    "Part A. TF32 is off in all of it."
    tf32(False)
    for name, fn in CHECKS.items(): kit.guarded('checks', name, lambda: judged(fn(kit)))


# ---- B. speeds

BASES = {'Stage 3 step': 'plain fp32, batch 1', 'stylize': 'fp32, batch 1',
         'StyleGAN step': 'finetune_step fp32', 'pairs': 'drawn and scored on the CPU'}   # of the ratios


def timed(kit, work, units, unit):
    "Median seconds of `work`, units per second, and the peak memory; the calls that warm up are not counted."
    import torch
    wait = torch.cuda.synchronize if kit.cuda else (lambda: None)
    began = time.perf_counter()
    for _ in range(1 if kit.tiny else 3): work()
    wait()
    if kit.cuda: torch.cuda.reset_peak_memory_stats()
    warm, times = time.perf_counter(), []
    while len(times) < kit.size.least or (time.perf_counter() - warm < kit.size.seconds and len(times) < 50):
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    peak = torch.cuda.max_memory_allocated()/2**30 if kit.cuda else None
    return dict(seconds=seconds, per_second=units/seconds, unit=unit, repeats=len(times), peak_gib=peak,
                warm_up=round(warm - began, 2))


def ratios(rows):
    "Every row's speed and memory against the base row of its group; None where one of the two is missing."
    bases = {}
    for row in rows:
        group = row['group']
        if row['name'] == f'{group}: {BASES.get(group)}': bases[group] = row
    for row in rows:
        base = bases.get(row['group'], {})
        for ratio, number in (('ratio', 'per_second'), ('memory_ratio', 'peak_gib')):
            mine, other = row.get(number), base.get(number)
            row[ratio] = mine/other if mine and other else None


def measure(kit, group, name, work):
    "One row of the bench."
    def run():
        row = dict(work(), group=group, name=f'{group}: {name}')
        ratios([*kit.record['bench'], row])
        return row
    kit.guarded('bench', f'{group}: {name}', run, group=group)


def number_format(kit, precision):
    "Set TF32 as `precision` says and return the context of the forward passes."
    import torch
    if precision == 'tf32' and not kit.cuda: raise Skip('TF32 is a format of CUDA cards')
    tf32(precision == 'tf32')
    if precision != 'bf16': return contextlib.nullcontext
    return lambda: torch.autocast(torch.device(kit.device).type, torch.bfloat16)


def compiled(kit, *nets):
    "Compile forward passes in place. Never those of a step that needs gradients of gradients."
    import torch
    import torch._dynamo.utils
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = 'inductor' if kit.cuda else 'eager'      # the latter proves the tracing where no compiler is
    for net in nets:
        net.compile(backend=backend, dynamic=False)
        if hasattr(net, 'encode'): net.encode = torch.compile(net.encode, backend=backend, dynamic=False)


def graph_breaks():
    "Where the compiler had to fall back to Python since `compiled`."
    import torch._dynamo.utils
    return sum(torch._dynamo.utils.counters['graph_break'].values())


def step_speed(kit, reading, precision, batch, extra=''):
    "One step of Stage 3 at the paper's size; images/s counts images of each kind."
    import torch
    from scenimefy.semisup import Networks, SemisupSettings, draw_ids, fast_step, make_optimizers, plain_step
    amp, size = number_format(kit, precision), kit.size
    torch.backends.cudnn.benchmark = extra == 'cudnn.benchmark'
    if torch.backends.cudnn.benchmark and not kit.cuda: raise Skip('cuDNN is for CUDA cards')
    cfg = SemisupSettings.preset('paper').but(size=size.px, load_size=size.px, ngf=size.ngf, ndf=size.ngf,
                                              n_blocks=size.n_blocks)
    layout = layout_of(reading)
    nets = Networks(cfg).to(kit.device, memory_format=layout)
    optims, ids = make_optimizers(nets, cfg), draw_ids(cfg, 0, kit.device)
    pictures = [images(batch, size.px, key=i).to(kit.device, memory_format=layout) for i in range(4)]
    if extra == 'compiled': compiled(kit, nets.G, nets.D, nets.D_p)
    def work():
        if reading == 'fast': return fast_step(nets, optims, pictures, ids, cfg, 1, amp=amp)
        with amp(): plain_step(nets, optims, pictures, ids, cfg, 1)
    row = timed(kit, work, batch, 'images')
    return dict(row, graph_breaks=graph_breaks()) if extra == 'compiled' else row


def stylize_speed(kit, precision, batch, extra=''):
    "`translate` of a batch that is already on the device, by the paper-size network with random weights."
    import torch
    from scenimefy.stylize import translate
    from scenimefy.translator import ResnetGenerator
    number_format(kit, precision)
    torch.backends.cudnn.benchmark = False
    net = ResnetGenerator(3, 3, kit.size.ngf, kit.size.n_blocks).eval().requires_grad_(False)
    kind = torch.bfloat16 if precision == 'bf16' else torch.float32
    net = net.to(kit.device, kind, memory_format=torch.channels_last)      # as `stylize` prepares it
    if extra == 'compiled': compiled(kit, net)
    photos = images(batch, kit.size.px).to(kit.device)
    row = timed(kit, lambda: translate(net, photos), batch, 'photos')
    return dict(row, graph_breaks=graph_breaks()) if extra == 'compiled' else row


def gan_nets(kit):
    "StyleGAN2 of the paper's size, random weights, and a batch of pictures."
    import torch
    from scenimefy.stylegan import Discriminator, Generator, resolutions
    size, plan = kit.size, None
    if size.gan_channels: plan = dict(zip(resolutions(size.gan), size.gan_channels))
    torch.manual_seed(0)
    G = Generator(size.gan, size.gan_dim, channels=plan).to(kit.device)
    D = Discriminator(size.gan, channels=plan).to(kit.device)
    return G, D, images(size.gan_batch, size.gan).to(kit.device)


def finetune_speed(kit, precision, r1=False):
    "`finetune_step` without priors: with them it is theirs that one measures. R1 falls due every 16th step."
    import torch
    from scenimefy.finetune import FinetuneSettings, Priors, finetune_step, target_of
    amp = number_format(kit, precision)
    source, D, real = gan_nets(kit)
    cfg = FinetuneSettings.preset('paper').but(lam_clip=0., lam_perc=0., lam_patch=0., crop=8,
                                               r1=10. if r1 else 0., r1_every=1)
    nets = torch.nn.ModuleDict(dict(G=target_of(source, min(cfg.blocks, len(source.to_rgbs))), D=D))
    optims = finetune_optimizers(nets, cfg)
    source.requires_grad_(False)
    def work(): finetune_step(nets, optims, real, source, Priors(), cfg, 0, amp=amp)
    return timed(kit, work, len(real), 'images')


def gan_speed(kit, precision):
    "`gan_step` with R1 and path length in every step; they fall due every 16th and every 4th."
    import torch
    from scenimefy.pretrain import PretrainSettings, gan_step, lazy_adam
    amp = number_format(kit, precision)
    G, D, real = gan_nets(kit)
    cfg = PretrainSettings.preset('paper').but(r1_every=1, path_every=1)
    nets = SimpleNamespace(G=G, D=D, T=None)
    optims = dict(G=lazy_adam(G.parameters(), cfg.lr, 1), D=lazy_adam(D.parameters(), cfg.lr, 1))
    mean = torch.zeros((), device=kit.device)
    def work(): gan_step(nets, optims, real, cfg, 0, mean_path=mean, amp=amp)
    return timed(kit, work, len(real), 'images')


def pair_speed(kit, device, batch, draw=True, score=True):
    "Pairs of the bundled generators, 64 px, drawn and scored by the bundled segmenter."
    from scenimefy.priors import load_segmenter
    from scenimefy.selection import StyleganPairs, score_pairs
    import torch
    number_format(kit, 'fp32')
    source = StyleganPairs('tiny', 'tiny-anime', device=device)
    segmenter, kept = load_segmenter('tiny', device) if score else None, source.pairs(range(batch))
    def work():
        with torch.no_grad():
            photo, anime = source.pairs(range(batch)) if draw else kept
            if score: score_pairs(segmenter, photo, anime)
    return timed(kit, work, batch, 'pairs')


def step_rows(kit):
    "The plain reading in fp32 is the base."
    for batch in kit.size.batches:
        for precision in ('fp32', 'tf32', 'bf16'):
            for reading in ('plain', 'fast'):
                measure(kit, 'Stage 3 step', f'{reading} {precision}, batch {batch}',
                        lambda: step_speed(kit, reading, precision, batch))
        measure(kit, 'Stage 3 step', f'fast bf16, cudnn.benchmark, batch {batch}',
                lambda: step_speed(kit, 'fast', 'bf16', batch, 'cudnn.benchmark'))


def stylize_rows(kit):
    "Weights lie in channels_last, as the library has them on a card."
    for precision in ('fp32', 'bf16'):
        for batch in kit.size.photos:
            measure(kit, 'stylize', f'{precision}, batch {batch}',
                    lambda: stylize_speed(kit, precision, batch))
    most = kit.size.photos[-1]
    measure(kit, 'stylize', f'tf32, batch {most}', lambda: stylize_speed(kit, 'tf32', most))


def gan_rows(kit):
    "Steps with gradients of gradients are measured apart, and never compiled."
    group = 'StyleGAN step'
    for precision in ('fp32', 'tf32', 'bf16'):
        measure(kit, group, f'finetune_step {precision}', lambda: finetune_speed(kit, precision))
    for precision in ('fp32', 'bf16'):
        measure(kit, group, f'finetune_step with R1 {precision}',
                lambda: finetune_speed(kit, precision, r1=True))
        measure(kit, group, f'gan_step with R1 and path length {precision}',
                lambda: gan_speed(kit, precision))


def pair_rows(kit):
    "The bundled networks at 64 px."
    measure(kit, 'pairs', BASES['pairs'], lambda: pair_speed(kit, 'cpu', kit.size.pairs[0]))
    for batch in kit.size.pairs:
        measure(kit, 'pairs', f'drawn and scored, batch {batch}', lambda: pair_speed(kit, kit.device, batch))
    most = kit.size.pairs[-1]
    measure(kit, 'pairs', f'only scored, batch {most}', lambda: pair_speed(kit, kit.device, most, draw=False))
    measure(kit, 'pairs', f'only drawn, batch {most}', lambda: pair_speed(kit, kit.device, most, score=False))


def compiled_rows(kit):
    "Compiling takes a quarter of a minute to a minute each, so what a compiler has most to give comes first."
    def stylize_row(batch):
        measure(kit, 'stylize', f'bf16, compiled, batch {batch}',
                lambda: stylize_speed(kit, 'bf16', batch, 'compiled'))
    for batch in kit.size.compiled_photos[:2]: stylize_row(batch)
    for batch in kit.size.batches[::-1]:
        for precision in ('bf16', 'tf32'):
            measure(kit, 'Stage 3 step', f'fast {precision}, compiled, batch {batch}',
                    lambda: step_speed(kit, 'fast', precision, batch, 'compiled'))
    for batch in kit.size.compiled_photos[2:]: stylize_row(batch)


def bench(kit):
    "Part B, the most wanted rows first."
    for rows in (step_rows, stylize_rows, gan_rows, pair_rows, compiled_rows): rows(kit)


# ---- C. a training for the minutes that are left

def draw_portion(number, folder, pairs, sharp, side):
    "Generated pairs and drawn pictures to train on, made on one core; a function of the number."
    from scenimefy.core import to_image
    from scenimefy.priors import load_segmenter
    from scenimefy.selection import SelectSettings, StyleganPairs, make_pairs
    from scenimefy.painters import render
    from scenimefy.world import scenes
    import torch
    torch.set_num_threads(1)
    raw, done = folder/f'raw-{number:03d}', folder/f'portion-{number:03d}'
    cfg = SelectSettings.preset('tiny').but(count=pairs, keep_best=.7, seed=100_000 + 10_000*number)
    source = StyleganPairs('tiny', 'tiny-anime', cfg.psi, device='cpu')
    make_pairs(cfg, source, load_segmenter('tiny'), raw/'pairs')
    sides = ('trainA', 'trainB')
    for name in sides: shutil.copytree(raw/'pairs'/name, done/name, dirs_exist_ok=True)
    first_scene = 3_000_000 + 1000*number                   # of the world that the bake draws from
    for name, style, first in (('photos', 'photo', first_scene), ('anime', 'anime', first_scene + 500)):
        (done/name).mkdir(parents=True, exist_ok=True)
        pictures = render(scenes(range(first, first + sharp), style), side, style)
        for i, picture in enumerate(pictures, first): to_image(picture).save(done/name/f'{i}.png')
    (done/'complete').touch()
    return number


def cores():
    "How many processors this process may use."
    if hasattr(os, 'sched_getaffinity'): return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def portion(job):
    "One portion from a single argument, as a pool hands it over."
    number, folder, sizes = job
    return draw_portion(number, folder, **sizes)


def data(kit):
    """Draw the portions, on all cores but two. It runs beside the checks, which measure no time, and uses
    no card."""
    jobs = [(k, kit.work/'data', kit.size.portion) for k in range(kit.size.portions)]
    helpers = min(len(jobs), max(1, cores() - 2))
    if helpers == 1:
        for job in jobs: portion(job)
        return
    with multiprocessing.Pool(helpers) as pool:
        for _ in pool.imap_unordered(portion, jobs): pass


def gather(folder):
    "Put the complete portions into one folder; returns it and how many pictures each side has."
    home = folder/'all'
    for part in sorted(folder.glob('portion-*')):
        if not (part/'complete').exists(): continue
        number = part.name[-3:]
        for side in ('photos', 'anime', 'trainA', 'trainB'):
            (home/side).mkdir(parents=True, exist_ok=True)
            for file in (part/side).glob('*.png'): file.rename(home/side/f'{number}-{file.name}')
        (part/'complete').unlink()
    if not home.exists(): raise Skip('no portion of the data was complete in time')
    return home, {side.name: len(list(side.iterdir())) for side in sorted(home.iterdir())}


def settings_of(file, kind):
    "The settings that a bundled file carries in its header: the recipe it was made by."
    from safetensors import safe_open
    with safe_open(file, 'pt') as f: return kind.from_json(f.metadata()['settings'])


def common(kit):
    "What every training here sets: enough readers, a log that can stop it in time, one checkpoint at a time."
    workers = 0 if kit.tiny else max(0, min(8, cores()//2 - 2))        # two sets are read at once
    return dict(workers=workers, log_every=1 if kit.tiny else 20, sample_every=10**6, keep=1)


def translator_plan(kit):
    "Go on with the bundled translator by its own recipe, more images a step."
    from scenimefy.bake import translator_scores
    from scenimefy.semisup import Run, SemisupSettings
    from scenimefy.translator import load_translator
    from scenimefy.weights import find_weights
    cfg = settings_of(find_weights('tiny'), SemisupSettings).but(batch=kit.size.train_batch, **common(kit))
    if kit.tiny: cfg = cfg.but(size=32, load_size=48, epochs=2)
    home, counts = gather(kit.work/'data')
    def build(cfg, folder):
        run = Run(cfg, home/'photos', home/'anime', home, folder, kit.device)
        for net in (run.nets.G, run.ema): net.load_state_dict(load_translator('tiny').state_dict())
        return run
    def steps(n): return dict(epoch_steps=max(1, n//cfg.epochs))
    def score(file): return translator_scores(load_translator(file), kit.size.scenes)
    return SimpleNamespace(cfg=cfg, build=build, counts=counts, start='tiny', steps=steps, score=score)


def stylegan_plan(kit):
    "Go on with the last phase of the bundled StyleGAN, more images a step, on the photos of the portions."
    from scenimefy.bake import stylegan_scores
    from scenimefy.core import pick_device
    from scenimefy.priors import load_clip
    from scenimefy.pretrain import PretrainRun, PretrainSettings
    from scenimefy.stylegan import load_stylegan
    from scenimefy.weights import find_weights
    cfg = settings_of(find_weights('tiny', 'stylegan'), PretrainSettings)
    cfg = cfg.but(batch=4*kit.size.train_batch, **common(kit))
    home, counts = gather(kit.work/'data')
    if importlib.util.find_spec('open_clip'):
        clip = load_clip('tiny', pick_device(kit.device))
        def tokens(x): return clip.tokens(x.clamp(-1, 1))
    else:                            # without its second critic; the settings in the record say so
        cfg, tokens = cfg.but(lam_token=0.), None
    def build(cfg, folder): return PretrainRun(cfg, home/'photos', folder, kit.device, tokens, start='tiny')
    def steps(n): return dict(steps=n)
    def score(file): return stylegan_scores(load_stylegan(file), load_clip('tiny'), kit.size.pictures)
    return SimpleNamespace(cfg=cfg, build=build, counts=counts, start='tiny', steps=steps, score=score)


# The translator is what users see, and its bundled file has had 4,000 steps of one image. A step at this size
# keeps a card waiting for its CPU, so sixteen images a step cost hardly more than one. The StyleGAN has had
# far more steps.
CANDIDATES = {'translator': translator_plan, 'stylegan': stylegan_plan, 'none': None}


def pace(kit, plan):
    "Seconds of one step, readers included, in a run that is thrown away."
    run = plan.build(plan.cfg.but(**plan.steps(10**6)), kit.work/'trial')
    feed, times = run.feed(), []
    for _ in range(3 if kit.tiny else 60):
        start = time.perf_counter()
        losses = run.take_step(next(feed))
        wait_for = 'total' if 'total' in losses else 'D'
        losses[wait_for].item()                                  # the card must have computed it
        run.step += 1
        times.append(time.perf_counter() - start)
    feed.close()
    return statistics.mean(times[len(times)//3:])


def tried(fn, *args):
    "What `fn` returns, or why not."
    try: return fn(*args)
    except (Skip, ImportError) as e: return dict(skipped=str(e))
    except Exception as e: return reason(e)


def number_of_steps(kit, seconds):
    "How many steps fit into what is left, a tenth kept back for checkpoints."
    return 4 if kit.tiny else max(20, int(.9*kit.left()/seconds))


def thinned(values, every):
    "One of every so many entries of a list; the last is always kept."
    first = (len(values) - 1) % every
    return values[first::every]


def carry(kit, run):
    "Copy what a checkpoint has just written to OUT/train, where it survives this process and its machine."
    from scenimefy.runs import checkpoints, read_history, write_png
    home, log = kit.record.out/'train', kit.record['training']
    home.mkdir(exist_ok=True)
    state = checkpoints(run.folder)[-1]
    made = [bring(run.folder/run.result, home), bring(state, home)]
    for old in home.glob('step-*'):
        if not old.name.startswith(state.stem): old.unlink()
    with contextlib.suppress(OSError): write_png(home/'sheet.png', run.sheet())
    print(f'training: {run.step} of {run.n_steps} steps', flush=True)
    history = read_history(run.folder)
    every = max(1, len(history.get('step', []))//200)              # some 200 to 400 entries come along
    log.update(steps_done=run.step, files=[f for m in made for f in m['files']],
               left_out=[f for m in made for f in m['left_out']],
               log={k: thinned(v, every) for k, v in history.items()})
    kit.record.save()


def watch(kit, run):
    "Copy after every save; returns an `on_step` that stops the run when its time is over, state saved."
    save = run.save
    def save_and_carry():
        save()
        carry(kit, run)
    run.save = save_and_carry
    def on_step(step, n_steps, losses):
        if kit.left() <= 0: signal.raise_signal(signal.SIGTERM)
    return on_step


def interrupted(kit, plan, folder):
    """The settings of a run to go on with: one in the work folder that was kept, or with --state one that
    came back."""
    from scenimefy.runs import checkpoints
    if kit.args.state and not checkpoints(folder):
        files = sorted(kit.args.state.glob('step-*'))
        state = files[0].name.split('.')[0] if files else 'step-none'        # `join_state` refuses the latter
        (folder/'checkpoints').mkdir(parents=True)
        join_state(kit.args.state, folder/'checkpoints'/f'{state}.safetensors')
    found = checkpoints(folder)
    if not found: return None
    return settings_of(found[-1], type(plan.cfg)).but(**common(kit))


def new_settings(kit, plan):
    "As many steps as the time holds, and a checkpoint about every 30 seconds."
    seconds = kit.record['training']['seconds_per_step'] = pace(kit, plan)
    return plan.cfg.but(**plan.steps(number_of_steps(kit, seconds)), save_every=max(1, int(30/seconds)))


def training(kit):
    "Part C: as many steps of the chosen training as the time that is left holds."
    import torch
    from scenimefy.runs import Stopped, run_training
    if kit.args.train == 'none': raise Skip('not asked for')
    log, folder = kit.record['training'], kit.work/'run'
    plan = CANDIDATES[kit.args.train](kit)
    log.update(which=kit.args.train, start=plan.start, pictures=plan.counts,
               before=tried(plan.score, plan.start))
    kit.record.save()
    old = interrupted(kit, plan, folder)
    run = plan.build(old or new_settings(kit, plan), folder)
    log.update(settings=run.cfg.to_dict(), steps=run.n_steps,
               tf32_convolutions=kit.cuda and torch.backends.cudnn.allow_tf32)
    try:
        file = run_training(run, bool(old), watch(kit, run))
        log['ended'] = 'all steps done'
    except Stopped as e:
        file = run.folder/run.result
        log['ended'] = str(e)
    log['after'] = tried(plan.score, file)


# ---- files that come back

def bring(path, folder):
    """Copy a file to OUT if it is small enough. Weights and states that are larger go in parts, anything
    else stays."""
    from scenimefy.core import atomic_path
    path = Path(path)
    size = path.stat().st_size
    if size <= LIMIT:
        with atomic_path(folder/path.name) as tmp: shutil.copyfile(path, tmp)
        return dict(files=[path.name], left_out=[])
    if path.suffix == '.safetensors':
        with contextlib.suppress(ValueError): return dict(files=split_state(path, folder), left_out=[])
    why = f'{path.name}: {size/1e6:.1f} MB, and at most {LIMIT/1e6:.1f} MB come back'
    return dict(files=[], left_out=[why])


def tensors_in_parts(f, room):
    "Names of the tensors of an open file, in order and in lists of at most `room` bytes."
    parts, used = [[]], 0
    for key in f.keys():
        t = f.get_tensor(key)
        size = t.numel()*t.element_size()
        if size > room: raise ValueError(f'{key} alone has {size} bytes')
        if used + size > room:
            parts.append([])
            used = 0
        parts[-1].append(key)
        used += size
    return parts


def split_state(path, folder):
    """Write a safetensors file in parts below the limit, whole tensors in order; ValueError if one tensor is
    larger."""
    from safetensors import safe_open
    from safetensors.torch import save_file
    from scenimefy.core import atomic_path
    with safe_open(path, 'pt') as f:
        meta = f.metadata() or {}
        header = 300*len(f.keys()) + sum(len(str(v)) for v in meta.values()) + 1000      # generous
        parts = tensors_in_parts(f, LIMIT - header)
        names = [f'{path.stem}.part{i}of{len(parts)}.safetensors' for i in range(1, len(parts) + 1)]
        for name, part in zip(names, parts):
            tensors = {k: f.get_tensor(k) for k in part}
            with atomic_path(folder/name) as tmp: save_file(tensors, tmp, metadata=meta)
    return names


def whole_state(names):
    "Whether files of these names are one whole state, in parts or in one piece."
    if not names: return False
    states = {name.split('.')[0] for name in names}
    count = re.search(r'of(\d+)\.safetensors$', names[0])
    wanted = int(count[1]) if count else 1
    return len(states) == 1 and len(names) == wanted


def join_state(folder, path):
    "Put the parts of a state in `folder` together again, or copy the whole one."
    from safetensors import safe_open
    from safetensors.torch import save_file
    files = sorted(Path(folder).glob('step-*.safetensors'))
    names = [f.name for f in files]
    if not whole_state(names):
        raise ValueError(f'{folder} holds {names}; all parts of one state are needed, and no other')
    tensors = {}
    for file in files:
        with safe_open(file, 'pt') as f:
            meta = f.metadata()
            tensors.update({k: f.get_tensor(k) for k in f.keys()})
    save_file(tensors, path, metadata=meta)


# ---- the table

def cell(value):
    if value is None: return '–'
    return f'{value:.3g}' if isinstance(value, float) else str(value)


def line(*cells): return f"| {' | '.join(map(str, cells))} |"


def rule(columns): return line(*['---']*columns)


def excess(number):
    "How near a number came to its limit, for finding the worst; NaN, a word in the record, is worst of all."
    gap, allowed = number['gap'], number['allowed']
    if isinstance(gap, str) or math.isnan(gap): return math.inf
    return gap/allowed if allowed else gap


def check_state(row):
    "How a check went, in a word or a sign."
    if row.get('ok'): return '✓'
    return 'skipped' if 'skipped' in row else '**failed**'


def check_lines(rows):
    "Every check with the number that came nearest to its limit."
    lines = ['## Checks', '', line('check', '', 'nearest to its limit', 'allowed'), rule(4)]
    known = []
    for row in rows:
        numbers = row.get('numbers', [])
        known += [n for n in numbers if n['ok'] is None]
        bounded = [n for n in numbers if n['ok'] is not None]
        found, allowed = row.get('skipped') or row.get('error', ''), ''
        if bounded:
            n = max(bounded, key=excess)
            found, allowed = f"{cell(n['gap'])}: {n['what']}", cell(n['allowed'])
        lines.append(line(row['name'], check_state(row), found, allowed))
    return lines + [''] + [f"- only to know: {n['what']}: {cell(n['gap'])}" for n in known] + ['']


def speed_line(row, group):
    "One speed of a group, or why there is none."
    name, why = row['name'].removeprefix(f'{group}: '), row.get('skipped') or row.get('error')
    if why: return line(name, f'not measured: {why}', '', '', '', '')
    return line(name, cell(row['seconds']), f"{cell(row['per_second'])} {row['unit']}", cell(row['ratio']),
                cell(row['peak_gib']), cell(row['memory_ratio']))


def bench_lines(rows):
    "A table for each group."
    lines = ['## Speeds', '',
             'Median of several calls, warm-up and compilation excluded; × is to the base of the group.', '']
    for group in dict.fromkeys(row['group'] for row in rows):
        lines += [f'### {group} (base: {BASES.get(group)})', '',
                  line('', 'seconds', 'per second', '×', 'peak GiB', '× memory'), rule(6)]
        lines += [speed_line(row, group) for row in rows if row['group'] == group]
        lines.append('')
    return lines


def table(record):
    "gpu.md."
    passed, failed, skipped = record.tally()
    lines = ['# What a GPU told us', '', line('machine', ''), rule(2)]
    lines += [line(k, v) for k, v in record['machine'].items()] + ['']
    lines += [f'- missing: `{name}` ({why})' for name, why in record['missing'].items()]
    for part, state in record['parts'].items():
        lines.append(f"- {part}: {state.get('error') or state.get('skipped') or state.get('ended')}")
    lines += ['', f'{passed} checks passed, {failed} failed, {skipped} were skipped.', '']
    if record['checks']: lines += check_lines(record['checks'])
    if record['bench']: lines += bench_lines(record['bench'])
    shown = {k: v for k, v in record['training'].items() if k != 'log'}
    if shown: lines += ['## Training', '', *(f'- {k}: {cell(v)}' for k, v in shown.items()), '']
    return '\n'.join(lines)


# ---- conducting

def missing():
    "What cannot be imported here, and what is lost by it."
    return {name: why for name, why in NEEDS.items() if importlib.util.find_spec(name) is None}


def card_name(text):
    "'NVIDIA H100 80GB HBM3' → 'nvidia-h100'."
    words = []
    for word in re.split(r'[^a-z0-9]+', text.lower()):
        if re.fullmatch(r'\d+gb|sxm\d*|pcie|hbm\w*|nvl\d*', word): break
        words.append(word)
    return '-'.join(filter(None, words)) or 'card'


def output_of(*words):
    "What a command prints, or '' if there is none such."
    here = Path(__file__).resolve().parent
    try: return subprocess.run(words, capture_output=True, text=True, timeout=20, cwd=here).stdout.strip()
    except (OSError, subprocess.TimeoutExpired): return ''


def machine(kit):
    "What the numbers were measured on."
    import torch
    import scenimefy
    about = dict(date=time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime()), python=platform.python_version(),
                 torch=torch.__version__, cpu=f'{cores()} cores, {platform.machine()}',
                 scenimefy=f'{scenimefy.__version__} in {Path(scenimefy.__file__).parent}',
                 commit=output_of('git', 'describe', '--always', '--dirty') or 'unknown')
    if not kit.cuda:
        card = 'none: ran on the CPU, at a tiny size' if kit.tiny else 'none: ran on the CPU'
        return dict(card=card, **about)
    p = torch.cuda.get_device_properties(kit.device)
    driver = output_of('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader').split('\n')[0]
    return dict(card=p.name, memory=f'{p.total_memory/2**30:.1f} GiB', capability=f'{p.major}.{p.minor}',
                driver=driver or 'unknown', cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(),
                **about)


PARTS = {'data': data, 'checks': checks, 'bench': bench, 'training': training}


def get_ready(kit):
    "Refuse a machine without a card; note what machine it is."
    import torch
    if kit.cuda and not torch.cuda.is_available():
        raise Skip('no CUDA card here; `--device cpu --tiny` tries the script itself')
    about = kit.record['about']
    if not kit.record['machine']: kit.record['machine'] = machine(kit)
    if about.get('name'): return
    if kit.cuda: about['name'] = card_name(kit.record['machine']['card'])
    else: about['name'] = 'cpu-tiny' if kit.tiny else 'cpu'


def work(args):
    "The process of one part."
    record = Record(args.out)
    kit, began = Kit(args, record), time.perf_counter()
    try:
        if args.part != 'data': get_ready(kit)
        PARTS[args.part](kit)
        state = dict(ended='done')
    except (Skip, ImportError) as e: state = dict(skipped=' '.join(str(e).split()))
    except Exception as e: state = reason(e)
    if args.part == 'data':                         # beside the checks, whose process owns the record
        if 'ended' not in state: (kit.work/'data-failed').write_text(json.dumps(state))
        return 0
    record['parts'][args.part] = dict(state, seconds=round(time.perf_counter() - began, 1))
    record.save()
    return 0


def command(args, part, until):
    "What starts the process of a part."
    words = [sys.executable, __file__, '--part', part, '--until', until, '--work', args.work, '-o', args.out,
             '--device', args.device, '--train', args.train]
    if args.tiny: words.append('--tiny')
    if args.state: words += ['--state', args.state]
    return [str(w) for w in words]


def start(args, part, until):
    "A part in a process of its own; what it says on stderr, progress bars mostly, goes to a file."
    env = dict(os.environ, PYTHONUNBUFFERED='1')
    if part == 'checks': env.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')        # for `repeatable`
    if part == 'data': env.update(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    args.work.mkdir(parents=True, exist_ok=True)
    with open(args.work/f'{part}.err', 'wb') as errors:      # a group of its own: `end` finds its helpers
        return subprocess.Popen(command(args, part, until), env=env, stderr=errors, preexec_fn=os.setpgrp)


def last_words(args, part):
    "The end of what a part said on stderr."
    file = args.work/f'{part}.err'
    if not file.exists(): return ''
    return file.read_text(errors='replace').replace('\r', '\n')[-1500:]


def end(child, seconds=0.):
    """Wait so long for a process, then stop it, gently first: a training saves its state. Its status; None:
    stopped."""
    status = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired): status = child.wait(max(0., seconds))
        if status is None:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired): child.wait(5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)               # and its helpers
        child.wait()
    return status


def note_death(args, part, status):
    "Write down what a part was doing when it ended before its time; True if it may go on behind that."
    record = Record(args.out)
    why = 'stopped at the end of its time' if status is None else f'its process ended with status {status}'
    running = record.pop('running', None)
    if running: record[running.pop('section')].append(dict(running, error=why))
    record['parts'][part] = dict(error=why, traceback=last_words(args, part))
    record.save()
    doing = f" ({running['name']})" if running else ''
    print(f'{part}: {why}{doing}', flush=True)
    return status is not None and (running is not None or status == BROKEN)


def run_part(args, part, deadline, until):
    "A part until its deadline; after a crash it goes on behind the item that crashed."
    while True:
        status = end(start(args, part, until), deadline - time.time())
        if status == 0: return
        goes_on = note_death(args, part, status)
        if not goes_on or time.time() > until: return


def finish_data(args, child, deadline):
    "Wait for the data; what is complete by then is what the training gets."
    status = end(child, deadline - time.time())
    failed, record = Path(args.work)/'data-failed', Record(args.out)
    if failed.exists(): record['parts']['data'] = json.loads(failed.read_text())
    else:
        how = 'done'
        if status is None: how = 'its time was over'
        elif status != 0: how = f'its process ended with status {status}'
        ready = len(list(Path(args.work).glob('data/portion-*/complete')))
        record['parts']['data'] = dict(ended=f'{how}, {ready} portions')
    record.save()


def conduct(args):
    "All parts, one after the other, inside the time."
    began, total = time.time(), .98*60*args.minutes           # the rest is for ending processes
    record = Record(args.out, fresh=True)
    record['about'] = dict(name=args.name, minutes=args.minutes, tiny=args.tiny, device=args.device,
                           train=args.train, parts=args.only)
    record['missing'] = missing()
    for name, why in record['missing'].items(): print(f'missing here: {name} (for {why})', flush=True)
    record.save()
    child = None
    if args.train != 'none' and 'training' in args.only: child = start(args, 'data', began + total)
    try:
        for part in SHARES:
            if part not in args.only: continue
            if child and part != 'checks':
                finish_data(args, child, began + SHARES['checks']*total)
                child = None
            deadline = began + SHARES[part]*total
            run_part(args, part, deadline, deadline - .05*total)
    finally:
        if child: end(child)
    return report(args, time.time() - began)


def report(args, seconds):
    "The last lines on stdout, and the exit status."
    record = Record(args.out)
    record['about']['took'] = round(seconds, 1)
    record.save()
    files = [f for f in record.out.rglob('*') if f.is_file()]
    size = sum(f.stat().st_size for f in files)
    warning = f'; only {FILES} come back from a lent machine' if len(files) > FILES else ''
    print(f'{seconds:.0f} s; {len(files)} files in {args.out}, {size/1e6:.1f} MB{warning}')
    for part, state in record['parts'].items():
        if 'error' in state: print(f"{part}: {state['error']}")
    passed, failed, skipped = record.tally()
    print(f'{passed} passed, {failed} failed, {skipped} skipped', flush=True)
    none_made = 'checks' in args.only and not passed
    return 1 if failed or none_made else 0


def parse(argv):
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument('-o', '--out', type=Path, required=True, help='folder for what is learned')
    parser.add_argument('--minutes', type=float, default=9., help='the whole ends within this time')
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--tiny', action='store_true', help='sizes for trying the script on a CPU')
    parser.add_argument('--train', choices=tuple(CANDIDATES), default='translator',
                        help='for the last minutes')
    parser.add_argument('--only', nargs='+', choices=tuple(SHARES), default=list(SHARES), help='parts to run')
    parser.add_argument('--state', type=Path, help='OUT/train of an earlier run, to go on from')
    parser.add_argument('--name', help='of the record; otherwise made from the card')
    parser.add_argument('--work', type=Path, help='folder for data and runs, kept; otherwise a temporary one')
    parser.add_argument('--join', type=Path,
                        help='only put the parts of a state in this folder into one file, -o')
    parser.add_argument('--part', choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument('--until', type=float, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if args.join: return join_state(args.join, args.out)
    if args.part: return work(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))       # so that the parts are ended too
    if args.work: return conduct(args)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp:
        args.work = Path(tmp)
        return conduct(args)


if __name__ == '__main__': sys.exit(main())
