"""Does the supervised branch help? Translators with and without it, from the same start, on selected generated pairs.

    python benchmarks/supervised.py --pairs PAIRS --photos PHOTOS --anime ANIME -o nbs/results/supervised.json

PAIRS is what `scenimefy pairs --source tiny --target tiny-anime --preset tiny` wrote; PHOTOS and ANIME are folders of
unpaired pictures (`scenimefy.world.write_world`). Measured: L1 and tiny perceptual distance to the true anime rendering
of held-out daytime scenes. Every run is written when it is measured; a second call goes on where the first one ended.
"""
import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from scenimefy.bake import translator_scores
from scenimefy.core import atomic_path
from scenimefy.semisup import SemisupSettings, train
from scenimefy.stylize import load_generator

ROWS = {'full': {}, 'w/o supervised': dict(lam_gan_sup=0., lam_style=0.)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    for name in ('photos', 'anime', 'pairs', 'out'): parser.add_argument(f'--{name}', *['-o'][:name == 'out'], type=Path, required=True)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=300)
    parser.add_argument('--scenes', type=int, default=150)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = SemisupSettings.preset('tiny').but(epoch_steps=max(1, args.steps//20), ema=.98, log_every=100,
                                              save_every=100_000, sample_every=100_000)
    kept = json.loads(args.out.read_text()) if args.out.exists() else {}
    runs = kept.get('runs', {})
    for seed in range(args.seeds):
        for row, change in ROWS.items():
            key = f'{row} | {seed}'
            if key in runs: continue
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                made = train(base.but(seed=seed, **change), args.photos, args.anime, args.pairs, Path(folder)/'run', device='cpu')
                runs[key] = {**translator_scores(load_generator(made), args.scenes), 'seconds': round(time.perf_counter() - start)}
            print(key, runs[key], flush=True)
            table = {name: {what: dict(mean=round(statistics.mean(v), 4), sd=round(statistics.stdev(v), 4) if len(v) > 1 else None)
                            for what in ('output_l1', 'output_perceptual')
                            if (v := [r[what] for k, r in runs.items() if k.startswith(f'{name} |')])} for name in ROWS}
            with atomic_path(args.out) as tmp:
                tmp.write_text(json.dumps(dict(settings=base.to_dict(), rows=ROWS, runs=runs, table=table), indent=1) + '\n')


if __name__ == '__main__': main()
