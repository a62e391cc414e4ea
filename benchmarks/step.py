"""Seconds and peak memory of one training step: the plain reading against the fast one, fp32 and bf16.

    python benchmarks/step.py [--size 256] [--ngf 64] [--repeat 3]

Every variant runs in a process of its own, so that peak memory is its own; variants take turns, so that a
machine that slows down slows all of them. Ratios are against the plain step in fp32.
"""
import argparse
import json
import statistics
import subprocess
import sys

VARIANTS = [('plain', 'fp32'), ('fast', 'fp32'), ('plain', 'bf16'), ('fast', 'bf16')]


def layout_of(reading, precision, device):
    "How pictures lie in memory: as the library has them for that reading on that device."
    import torch
    if reading == 'fast' and (precision == 'bf16' or device == 'cuda'): return torch.channels_last
    return torch.contiguous_format


def pictures(size, device, layout):
    "Four batches of one random picture."
    import torch
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(1, 3, size, size, generator=generator)*2 - 1 for _ in range(4)]
    return [b.to(device, memory_format=layout) for b in batches]


def peak_bytes(device):
    "The most memory that this process has held: the card's, or its own on a CPU."
    import resource
    import torch
    if device == 'cuda': return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024


def one(reading, precision, size, ngf, repeat):
    "Time `repeat` steps after one to warm up; print a JSON line."
    import contextlib
    import time
    import torch
    from scenimefy.semisup import (Networks, SemisupSettings, draw_ids, fast_step, make_optimizers,
                                   plain_step, settle_way)
    torch.set_num_threads(2)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    cfg = SemisupSettings.preset('paper').but(size=size, load_size=size, ngf=ngf, ndf=ngf)
    layout = layout_of(reading, precision, device)
    nets = Networks(cfg).to(device, memory_format=layout)
    if reading == 'fast': settle_way(nets, cfg.but(precision=precision))     # as a run does
    optims = make_optimizers(nets, cfg)
    amp = contextlib.nullcontext
    if precision == 'bf16': amp = lambda: torch.autocast(device, torch.bfloat16)
    batch, times = pictures(size, device, layout), []
    for step in range(repeat + 1):
        ids = draw_ids(cfg, step, device)
        began = time.perf_counter()
        if reading == 'fast': fast_step(nets, optims, batch, ids, cfg, 1, amp=amp)
        else:
            with amp(): plain_step(nets, optims, batch, ids, cfg, 1)
        if device == 'cuda': torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    print(json.dumps(dict(seconds=times[1:], peak=peak_bytes(device))))


def in_a_process(variant, args):
    "What `one` prints for a variant, in a process of its own."
    words = [sys.executable, __file__, '--one', *variant,
             '--size', args.size, '--ngf', args.ngf, '--repeat', args.repeat]
    done = subprocess.run([str(w) for w in words], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument('--size', type=int, default=256)
    parser.add_argument('--ngf', type=int, default=64)
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--one', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return one(*args.one, args.size, args.ngf, args.repeat)
    seconds, peak = {v: [] for v in VARIANTS}, {v: 0 for v in VARIANTS}
    for _ in range(args.rounds):
        for v in VARIANTS:
            out = in_a_process(v, args)
            seconds[v] += out['seconds']
            peak[v] = max(peak[v], out['peak'])
    base = VARIANTS[0]
    base_seconds = statistics.median(seconds[base])
    print(f'one step at {args.size} px, ngf {args.ngf}, batch 1; median of {len(seconds[base])}')
    print(f"{'':14}{'seconds':>9}{'faster':>9}{'peak GiB':>10}{'memory':>9}")
    for v in VARIANTS:
        reading, precision = v
        s = statistics.median(seconds[v])
        print(f'{reading:<7}{precision:<7}{s:>9.2f}{base_seconds/s:>8.2f}×'
              f'{peak[v]/2**30:>10.2f}{peak[v]/peak[base]:>8.2f}×')


if __name__ == '__main__': main()
