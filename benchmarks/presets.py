"""What one step of each `colab` preset holds in memory and computes, counted without a GPU.

    python benchmarks/presets.py [pretrain finetune pairs train]

The steps run on torch's device `meta`, where a tensor has a shape and no numbers. Every tensor is counted
from the moment it is made until it is freed, so the peak is that of all weights, gradients, numbers of Adam
and stored activations together. A card holds more than that: 1 GiB is added for CUDA itself and for the work
space of its convolutions. Seconds are operations over half of what a T4 promises for fp32. These are
estimates; nobody measured them on a T4.
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
from torch.utils.flop_counter import flop_registry

from scenimefy.core import seeded, to_array

T4_FLOPS = .5*8.1e12       # half of the 8.1 TFLOPS that the data sheet gives for fp32
CUDA_BYTES = 2**30         # context and work space
CARD = 14.7*2**30          # what Colab's T4 leaves of 16 GB


class Counter(TorchDispatchMode):
    "Counts the bytes of all storages that are alive, their largest sum so far (`peak`), and the operations."
    def __init__(self):
        super().__init__()
        self.now = self.peak = self.flops = 0
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
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula: self.flops += formula(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor): self.count(leaf)
        return out


def networks_of(thing):
    "The networks that a run, or whatever makes pairs, holds; judges come as a tuple."
    found = []
    for part in vars(thing).values():
        parts = part if isinstance(part, tuple) else [part]
        found += [p for p in parts if isinstance(p, nn.Module)]
    return found


def counted(networks, states, act):
    "(peak bytes, operations) of a call, beside these networks and the states of these optimizers."
    live = Counter()
    for net in networks:
        for t in (*net.parameters(), *net.buffers()): live.count(t)
    for t in tree_leaves(states):
        if isinstance(t, torch.Tensor): live.count(t)
    with live: act()
    return live.peak, live.flops


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
    clip, vgg = Clip(fresh(_vit_b32_net), 224, None), VggDistance(fresh(_vgg19_features))
    return Priors(clip.to('meta'), vgg.to('meta'))


def without_numbers(r):
    "Move the networks of a run to `meta`, with new optimizers of the same kind."
    r.device = torch.device('meta')
    for name in ('nets', 'ema', 'source'):
        if getattr(r, name, None) is not None: setattr(r, name, getattr(r, name).to('meta'))
    for name, old in r.optims.items():
        learn = [p for p in getattr(r.nets, name).parameters() if p.requires_grad]
        group = old.param_groups[0]
        r.optims[name] = torch.optim.Adam(learn, group['lr'], group['betas'], foreach=False)
    return r


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
    r = without_numbers(r)
    batch = next(iter(r.feed()))
    r.take_step(batch)                     # from here on Adam has its numbers
    states, found = [list(o.state.values()) for o in r.optims.values()], []
    for step in (plain, rare):
        r.step = step
        found.append(counted(networks_of(r), states, lambda: r.take_step(batch)))
    (_, often), (_, seldom) = found
    every = getattr(r.cfg, 'r1_every', 1)
    return dict(peak=max(p for p, _ in found), flops=often + (seldom - often)/every, steps=r.n_steps)


def pairing():
    "Peak and flops of one batch of candidates, painted and scored."
    from scenimefy.priors import Segmenter, _swin_b_net, fresh, semantic_scores
    from scenimefy.selection import SelectSettings, StyleganPairs
    from scenimefy.stylegan import Generator
    cfg = SelectSettings.preset('colab')
    source = StyleganPairs(Generator(256), Generator(256), cfg.psi, 'cpu')
    source.device, source.mean_w = torch.device('meta'), source.mean_w.to('meta')
    source.source, source.target = source.source.to('meta'), source.target.to('meta')
    segmenter = Segmenter(fresh(_swin_b_net), [str(k) for k in range(150)]).to('meta')
    def act():
        photo, anime = source.pairs(range(cfg.batch))
        semantic_scores(*segmenter(torch.cat([photo, anime]), check=False), photo.shape[-2:])
    peak, flops = counted([*networks_of(source), segmenter], [], act)
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
            fits_a_t4=held < CARD, tflop_per_step=round(found['flops']/1e12, 2),
            seconds_per_step=round(seconds, 2), steps=round(found['steps']),
            minutes=round(found['steps']*seconds/60), counting_took_s=round(time.perf_counter() - began))),
            flush=True)


if __name__ == '__main__': main()
