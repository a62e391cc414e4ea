"""What one step of each `colab` preset holds in memory and computes, counted on a CPU; no GPU is needed.

    python benchmarks/presets.py [train finetune pretrain pairs]

Every tensor is counted from the moment it is made until it is freed, so the peak is that of all weights,
gradients, numbers of Adam and stored activations together; the judges have random weights, which cost the
same. A card holds more than that: 1 GiB is added for CUDA itself and for the work space of its convolutions.
Seconds are multiply-and-add counts over half of what a T4 promises for fp32. Both are estimates, no measurements.
"""
import argparse
import json
import tempfile
import time
import weakref
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from scenimefy.core import seeded, to_array

T4_BYTES = 15e9            # 15 GB, of which the driver keeps some: Colab shows 14.7 GiB
T4_FLOPS = .5*8.1e12       # half of the 8.1 TFLOPS that the data sheet gives for fp32
CUDA_BYTES = 2**30         # context and work space
CARD = 14.7*2**30


class LiveBytes(TorchDispatchMode):
    "Counts the bytes of all storages that are alive; `peak` is the largest sum so far."
    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size

    def count(self, tensor):
        "Count the storage of a tensor, once."
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known: return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key, size)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor): self.count(leaf)
        return out


def tensors_of(thing):
    "All weights and buffers of the networks that an object holds, also inside dictionaries and tuples."
    if isinstance(thing, nn.Module): return [*thing.parameters(), *thing.buffers()]
    if isinstance(thing, dict): thing = thing.values()
    elif hasattr(thing, '__dict__'): thing = vars(thing).values()
    elif not isinstance(thing, (list, tuple)): return []
    return [t for part in thing for t in tensors_of(part)] if thing else []


def counted(owners, act):
    "(peak bytes, multiply-and-adds times two) of a call, beside the networks of `owners`."
    live = LiveBytes()
    for owner in owners:
        for t in tensors_of(owner): live.count(t)
    flops = FlopCounterMode(display=False)
    with flops, live: act()
    return live.peak, flops.get_total_flops()


def pictures(folder, n=8, size=256):
    "A folder of noise."
    folder.mkdir(parents=True)
    for i in range(n):
        noise = torch.rand(3, size, size, generator=seeded('presets', i))*2 - 1
        Image.fromarray(to_array(noise)).save(folder/f'{i}.png')
    return folder


def judges():
    "The networks that Stage 1 asks, with random weights."
    from scenimefy.finetune import Priors
    from scenimefy.priors import Clip, VggDistance, _vgg19_features, _vit_b32_net, fresh
    return Priors(Clip(fresh(_vit_b32_net), 224, None), VggDistance(fresh(_vgg19_features)))


def prepare_train(work):
    from scenimefy.semisup import Run, SemisupSettings
    for side in ('trainA', 'trainB'): pictures(work/'pairs'/side)
    cfg = SemisupSettings.preset('colab').but(workers=0)
    return Run(cfg, pictures(work/'photos'), pictures(work/'anime'), work/'pairs', work/'run', 'cpu'), [0, 1]


def prepare_finetune(work):
    from scenimefy.finetune import FinetuneRun, FinetuneSettings
    from scenimefy.stylegan import Discriminator, Generator, save_stylegan
    nets = dict(g_ema=Generator(256).state_dict(), d=Discriminator(256).state_dict())
    save_stylegan(work/'source.safetensors', nets)
    cfg = FinetuneSettings.preset('colab').but(workers=0)
    r = FinetuneRun(cfg, work/'source.safetensors', pictures(work/'anime'), work/'run', 'cpu', judges())
    return r, [1, cfg.r1_every]


def prepare_pretrain(work):
    from scenimefy.pretrain import PretrainRun, PretrainSettings
    cfg = PretrainSettings.preset('colab').but(workers=0)
    return PretrainRun(cfg, pictures(work/'photos', cfg.batch), work/'run', 'cpu'), [1, cfg.r1_every]


def training(prepare, work):
    "Peak and flops of a stage: plain steps, and the one in `r1_every` that has the penalty as well."
    r, (plain, rare) = prepare(work)
    batch = next(iter(r.feed()))
    r.take_step(batch)                     # from here on Adam has its numbers
    owners, found = [r, *(o.state for o in r.optims.values())], []
    for step in (plain, rare):
        r.step = step
        found.append(counted(owners, lambda: r.take_step(batch)))
    (_, often), (_, seldom) = found
    every = getattr(r.cfg, 'r1_every', 1)
    return dict(peak=max(p for p, _ in found), flops=often + (seldom - often)/every, steps=r.n_steps)


def pairing():
    "Peak and flops of one batch of candidates, painted and scored."
    from scenimefy.priors import Segmenter, _swin_b_net, fresh
    from scenimefy.selection import SelectSettings, StyleganPairs, score_pairs
    from scenimefy.stylegan import Generator
    cfg = SelectSettings.preset('colab')
    source = StyleganPairs(Generator(256), Generator(256), cfg.psi, 'cpu')
    segmenter = Segmenter(fresh(_swin_b_net), [str(k) for k in range(150)])
    def act(): score_pairs(segmenter, *source.pairs(range(cfg.batch)))
    peak, flops = counted([source, segmenter], act)
    return dict(peak=peak, flops=flops, steps=cfg.count/cfg.batch)


STAGES = dict(pretrain=prepare_pretrain, finetune=prepare_finetune, pairs=None, train=prepare_train)


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument('stages', nargs='*', default=list(STAGES))
    torch.set_num_threads(1)
    for stage in parser.parse_args().stages:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            found = training(STAGES[stage], Path(work)) if STAGES[stage] else pairing()
        seconds = found['flops']/T4_FLOPS
        held = found['peak'] + CUDA_BYTES
        print(json.dumps(dict(
            stage=stage, counted_gib=round(found['peak']/2**30, 2), on_a_card_gib=round(held/2**30, 2),
            fits_a_t4=held < CARD, tflop_per_step=round(found['flops']/1e12, 2), seconds_per_step=round(seconds, 2),
            steps=round(found['steps']), minutes=round(found['steps']*seconds/60),
            measured_here_s=round(time.perf_counter() - began))), flush=True)


if __name__ == '__main__': main()
