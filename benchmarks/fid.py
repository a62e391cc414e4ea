"""FID of two folders: pytorch-fid's command line against ours, same pictures, same weights.

    python benchmarks/fid.py [--n 150] [--weights FILE] [--only ours]

Without a file of weights a random one in the released layout is made: right for the arithmetic, the time and
the memory, not for the value. Each side runs in its own process. Memory is sampled over the whole tree of
processes, because pytorch-fid reads pictures in workers; PSS counts a page that several of them share once. A
third process only imports torch and torchvision: what it takes, both sides take before they begin, so the
memory above that is compared too. `python benchmarks/fid.py --n 2000` takes half an hour to hours on two
cores.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

OURS = """
import sys
from scenimefy.evaluate import summarize, survey
from scenimefy.features import load_features
from scenimefy.metrics import frechet_distance
net = load_features(sys.argv[1])
a, b = (summarize(net, survey(p, p)) for p in sys.argv[2:])
del net
print('FID: ', frechet_distance(a.mean, a.cov, b.mean, b.cov))
"""


IMPORTS = "import torch, torchvision, time; time.sleep(1); print('FID: nan')"


def random_weights(path):
    "A file in the layout of pytorch-fid's weights."
    import torch
    from scenimefy.features import fid_inception
    torch.manual_seed(0)
    net = fid_inception()
    for m in net.modules():   # large enough weights that the features spread
        if isinstance(m, torch.nn.Conv2d): torch.nn.init.kaiming_normal_(m.weight)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)


def tree(pid):
    "A process and all below it."
    found = [pid]
    try: children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except OSError: return found
    for child in children: found += tree(int(child))
    return found


def memory(pid):
    "(PSS of the tree, RSS of the process) in MiB."
    pss = rss = 0
    for p in tree(pid):
        try: lines = Path(f'/proc/{p}/smaps_rollup').read_text().splitlines()[1:]
        except OSError: continue
        sizes = {line.split(':')[0]: int(line.split()[1])/1024 for line in lines}
        pss += sizes['Pss']
        if p == pid: rss = sizes['Rss']
    return pss, rss


def measured(words, env):
    "Run a command; its FID, seconds, peak PSS of the tree, peak RSS of the main process."
    start, peak, cpu = time.perf_counter(), [0., 0.], os.times()
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    def watch():
        while process.poll() is None:
            pss, rss = memory(process.pid)
            peak[:] = max(peak[0], pss), max(peak[1], rss)
            time.sleep(.1)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    out, err = process.communicate()
    seconds, spent = time.perf_counter() - start, os.times()
    if process.returncode: raise SystemExit(f'{words[:3]} failed:\n{err[-2000:]}')
    (value,) = [float(line.split()[1]) for line in out.splitlines() if line.startswith('FID:')]
    cpu_seconds = spent.children_user + spent.children_system - cpu.children_user - cpu.children_system
    return dict(fid=value, seconds=round(seconds, 1), tree_mib=round(peak[0]), main_mib=round(peak[1]),
                cpu_seconds=round(cpu_seconds, 1))


def write_pictures(folder, n, first, style):
    from scenimefy.core import to_image
    from scenimefy.painters import render
    from scenimefy.world import scenes
    folder.mkdir()
    for k in range(n):
        image = to_image(render(scenes([first + k]), 128, style)[0])
        image.resize((256, 256), 3).save(folder/f'{k:05d}.png')


def compare(found, env):
    "Print how the two sides differ, and what remains of memory above the imports."
    a, b = found['ours'], found['pytorch-fid']
    share = {k: a[k]/b[k] for k in ('seconds', 'tree_mib', 'main_mib')}
    print(f"relative difference {abs(a['fid'] - b['fid'])/b['fid']:.1e}; ours takes {share['seconds']:.2f} "
          f"of the time, {share['tree_mib']:.2f} of the memory (all processes), "
          f"{share['main_mib']:.2f} (main process)")
    floor = measured([sys.executable, '-c', IMPORTS], env)
    for what, key in (('all processes', 'tree_mib'), ('main process', 'main_mib')):
        x, y = a[key] - floor[key], b[key] - floor[key]
        print(f'{what}: importing torch and torchvision takes {floor[key]} MiB; '
              f'above that, ours takes {x} and pytorch-fid {y}: {x/y:.2f}')


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument('--n', type=int, default=150, help='pictures per folder')
    parser.add_argument('--weights', type=Path, help="pytorch-fid's file, if you have it")
    parser.add_argument('--only', choices=('ours', 'pytorch-fid'))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        env = {**os.environ, 'TORCH_HOME': str(tmp)}
        weights = tmp/'hub'/'checkpoints'/'pt_inception-2015-12-05-6726825d.pth'
        if args.weights:
            weights.parent.mkdir(parents=True)
            weights.symlink_to(args.weights.resolve())
        else: random_weights(weights)
        write_pictures(tmp/'photo', args.n, 0, 'photo')
        write_pictures(tmp/'anime', args.n, 10_000, 'anime')
        folders = [str(tmp/'photo'), str(tmp/'anime')]
        jobs = {'ours': [sys.executable, '-c', OURS, str(weights), *folders],
                'pytorch-fid': [sys.executable, '-m', 'pytorch_fid', '--device', 'cpu', *folders]}
        found = {}
        for name, words in jobs.items():
            if args.only in (None, name):
                found[name] = measured(words, env)
                print(name, json.dumps(found[name]), flush=True)
    if len(found) == 2: compare(found, env)


if __name__ == '__main__': main()
