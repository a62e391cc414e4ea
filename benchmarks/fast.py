"""Seconds and peak memory of a picture on a CPU: stock torch against strips, and other engines.

    PYTHONPATH=. python benchmarks/fast.py [--threads 2] [--large] [-o benchmarks/results/NAME.json]

`stock` is `net(x)`, eager and in one piece; `strips` is `fast.quicken(net)(x)`. onnxruntime and OpenVINO
take part if they and `onnx` can be imported. All ways of a row take turns in one process; the least of
several times counts. With `--threads 1` these are seconds of the processor, which other programs disturb
less; with more threads the benchmark wants a quiet machine. Peak memory is that of a child process that
makes one picture. `--large` adds pictures of 3840×2160 and 7680×4320 through the paper-size network, in
a child each, within 4 GB and 8 GB; that takes minutes.
"""
import argparse
import copy
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = [('drawn', 512, 512, 5), ('drawn', 1448, 2048, 2), ('paper', 256, 256, 5), ('paper', 1024, 1024, 2)]
LARGE = [('paper', 2160, 3840, '4GB'), ('paper', 4320, 7680, '8GB')]
WAYS = ['stock', 'strips', 'onnxruntime', 'openvino']


def network(name):
    "The bundled network, or one of the paper's size with random weights."
    import torch
    from scenimefy.translator import ResnetGenerator, load_translator
    torch.manual_seed(0)
    net = load_translator('drawn') if name == 'drawn' else ResnetGenerator().eval()
    return net.requires_grad_(False)


def photo(h, w):
    "Soft shapes (1,3,h,w)."
    import torch
    import torch.nn.functional as F
    small = torch.rand(1, 3, h//8 + 2, w//8 + 2, generator=torch.Generator().manual_seed(0))*2 - 1
    return F.interpolate(small, (h, w), mode='bilinear')


def exported(net, path):
    "The network as an ONNX file, with layers that the exporter knows."
    import torch
    from torch import nn
    from scenimefy.translator import Downsample, InstanceNorm, ReflectPad
    net = copy.deepcopy(net)
    for parent in list(net.modules()):
        for name, m in parent.named_children():
            if isinstance(m, InstanceNorm): setattr(parent, name, nn.InstanceNorm2d(1))
            if isinstance(m, ReflectPad): setattr(parent, name, nn.ReflectionPad2d(m.n))
            if isinstance(m, Downsample):
                blur = nn.Conv2d(len(m.filt), len(m.filt), 3, stride=2, groups=len(m.filt), bias=False)
                blur.weight.data = m.filt
                setattr(parent, name, nn.Sequential(nn.ReflectionPad2d(1), blur))
    torch.onnx.export(net.model, (torch.zeros(1, 3, 64, 64),), str(path), input_names=['x'], dynamo=False,
                      dynamic_axes=dict(x={2: 'h', 3: 'w'}), opset_version=17)


def onnxruntime_way(path, threads):
    "A function of an array."
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return lambda x: session.run(None, {'x': x.numpy()})[0]


def openvino_way(path, threads):
    "A function of an array; float32, which is not what OpenVINO would choose on every processor."
    import openvino
    hints = dict(INFERENCE_NUM_THREADS=threads, INFERENCE_PRECISION_HINT='f32')
    model = openvino.Core().compile_model(str(path), 'CPU', hints)
    return lambda x: model(x.numpy())[0]


def ways(name, threads, wanted, folder):
    "{way: function of a photo} of those in `wanted` that can be imported."
    from importlib.util import find_spec
    from scenimefy.fast import quicken
    net = network(name)
    found = dict(stock=net, strips=quicken(net) if 'strips' in wanted else None)
    makers = dict(onnxruntime=onnxruntime_way, openvino=openvino_way)
    file = folder/f'{name}.onnx'
    for way, maker in makers.items():
        if way not in wanted or not find_spec(way): continue
        if not file.exists():
            if not find_spec('onnx'): continue
            exported(net, file)
        found[way] = maker(file, threads)
    return {way: found[way] for way in wanted if found.get(way) is not None}


def timed_row(name, h, w, turns, threads, folder):
    "{way: seconds}, the smallest of `turns`, and {way: largest difference to stock}."
    import numpy as np
    import torch
    clock = time.process_time if threads == 1 else time.perf_counter
    x, found = photo(h, w), ways(name, threads, WAYS, folder)
    seconds, gaps = {way: float('inf') for way in found}, {}
    with torch.inference_mode():
        want = found['stock'](x).numpy()
        for turn in range(turns + 1):                       # the first one warms up
            for way, f in found.items():
                start = clock()
                y = f(x)
                took = clock() - start
                if turn: seconds[way] = min(seconds[way], took)
                else: gaps[way] = float(np.abs(np.asarray(y) - want).max())
    return seconds, gaps


def one(way, name, h, w, threads, folder):
    "One picture in this process; print the peak of its memory in MiB."
    import torch
    torch.set_num_threads(threads)
    with torch.inference_mode(): ways(name, threads, [way], folder)[way](photo(h, w))
    print(peak_mib())


def large(name, h, w, limit, threads):
    "A picture within a limit of memory, from photo to scene with tone; print seconds and peak."
    import torch
    from scenimefy.fast import parse_size, quicken
    from scenimefy.stylize import translate
    from scenimefy.translator import as_shown
    torch.set_num_threads(threads)
    net, x = quicken(network(name)), photo(h, w)
    start = time.perf_counter()
    scene = translate(net, x, parse_size(limit))
    took = time.perf_counter() - start
    as_shown(scene, x, torch.eye(3, 4))
    print(json.dumps(dict(seconds=took, mib=peak_mib())))


def peak_mib():
    "The most memory that this process has held. (`getrusage` would begin with that of the parent.)"
    status = Path('/proc/self/status').read_text()
    return int(re.search(r'VmHWM:\s*(\d+)', status)[1])/1024


def child(*words):
    "The last line that this script prints in a process of its own."
    done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr)
    return done.stdout.strip().splitlines()[-1]


def about(threads):
    "Where this was measured."
    import torch
    from importlib.metadata import version
    from importlib.util import find_spec
    engines = {way: version(way) for way in WAYS[2:] if find_spec(way)}
    model = [line for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')]
    return dict(processor=model[0].split(':')[1].strip() if model else platform.processor(), threads=threads,
                torch=torch.__version__, instructions=torch.backends.cpu.get_cpu_capability(), **engines)


def show(row):
    "One line for each way."
    base = row['seconds']['stock']
    for way, seconds in row['seconds'].items():
        print(f"{row['net']:<7}{row['w']:>5}×{row['h']:<6}{way:<13}{seconds:>8.2f} s {base/seconds:>6.2f}×"
              f"{row['mib'][way]:>8.0f} MiB   difference {row['gaps'][way]:.0e}", flush=True)


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--large', action='store_true')
    parser.add_argument('-o', '--out', type=Path)
    parser.add_argument('--one', nargs=5, help=argparse.SUPPRESS)
    parser.add_argument('--large-one', nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        way, name, h, w, folder = args.one
        return one(way, name, int(h), int(w), args.threads, Path(folder))
    if args.large_one:
        name, h, w, limit = args.large_one
        return large(name, int(h), int(w), limit, args.threads)
    import torch
    torch.set_num_threads(args.threads)
    result = dict(about=about(args.threads), rows=[], large=[])
    print(json.dumps(result['about']))
    with tempfile.TemporaryDirectory() as folder:
        for name, h, w, turns in ROWS:
            seconds, gaps = timed_row(name, h, w, turns, args.threads, Path(folder))
            common = ['--threads', args.threads, '--one']
            mib = {way: float(child(*common, way, name, h, w, folder)) for way in seconds}
            result['rows'].append(dict(net=name, h=h, w=w, seconds=seconds, gaps=gaps, mib=mib))
            show(result['rows'][-1])
    for name, h, w, limit in LARGE if args.large else ():
        row = json.loads(child('--threads', args.threads, '--large-one', name, h, w, limit))
        result['large'].append(dict(row, net=name, h=h, w=w, limit=limit))
        print(f"{name:<7}{w:>5}×{h:<6}within {limit}: {row['seconds']:.0f} s, {row['mib']:.0f} MiB")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__': main()
