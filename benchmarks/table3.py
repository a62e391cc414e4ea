"""Table 3 of the paper at toy scale: Stage 1 with one part switched off at a time, measured on held-out codes.

    python benchmarks/table3.py -o nbs/results/table3.json [--seeds 3] [--steps 120] [--rows full "w/o D_CLIP"]

Every run is written as soon as it is measured, and a second call goes on where the first one ended. One thread.
L_BCE and label agreement come from the tiny segmenter, the distance to the anime domain is a Fréchet distance in
features of the tiny CLIP. All runs start from one source and see one set of 2,000 anime frames.
"""
import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from scenimefy.core import UserError, atomic_path, seeded
from scenimefy.evaluate import embed, feature_distance
from scenimefy.finetune import TABLE_3, FinetuneSettings, finetune, shared_styles
from scenimefy.priors import load_clip, load_segmenter
from scenimefy.selection import agreement, digest, lbce_released, semantic_scores
from scenimefy.stylegan import load_stylegan
from scenimefy.world import HELD_OUT, render, scenes, write_world

ROWS = {**TABLE_3, 'no priors': dict(lam_clip=0., lam_perc=0., lam_patch=0.)}
MEASURES = ('lbce', 'agreement', 'frechet')


@torch.no_grad()
def paint(G, w_plus, noise, batch=50):
    "Images of many codes."
    parts = [slice(k, k + batch) for k in range(0, len(w_plus), batch)]
    return torch.cat([G.synthesis(w_plus[p], [n[p] for n in noise]).clamp(-1, 1) for p in parts])


@torch.no_grad()
def votes(segmenter, images, batch=50):
    return torch.cat([semantic_scores(*segmenter(x), x.shape[-2:]) for x in images.split(batch)])


class Ruler:
    "Measures images of the held-out codes against the photos of the same codes and against real anime."
    def __init__(self, source, codes):
        self.clip, self.segmenter = load_clip('tiny'), load_segmenter('tiny')
        self.w_plus, self.noise = shared_styles(source, codes, generator=seeded('table 3'))
        self.photo = paint(source, self.w_plus, self.noise)
        self.votes = votes(self.segmenter, self.photo)
        self.real = self._real(HELD_OUT, 1000, source.size)

    def _real(self, first, n, size):
        return torch.cat([embed(self.clip, render(scenes(range(k, k + 50), 'anime'), size, 'anime'))
                          for k in range(first, first + n, 50)])

    def __call__(self, images, photo_votes=None):
        v, p = votes(self.segmenter, images), self.votes if photo_votes is None else photo_votes
        return dict(lbce=lbce_released(v, p).mean().item(), agreement=agreement(v, p).mean().item(),
                    frechet=feature_distance(embed(self.clip, images), self.real))

    def scale(self, size):
        "What the measures say where the answer is known."
        n, first = len(self.photo), HELD_OUT + 5000
        s = scenes(range(first, first + n), 'photo')
        photo, anime = (render(s, size, style) for style in ('photo', 'anime'))
        v = votes(self.segmenter, photo)
        return {'the photos themselves': self(self.photo), 'true pairs': self(anime, v),
                'anime of other scenes': self(anime.roll(1, 0), v),
                'real anime': dict(frechet=feature_distance(self._real(HELD_OUT + 9000, n, size), self.real))}


def rounded(values): return {k: round(v, 5) for k, v in values.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('-o', '--out', type=Path, required=True)
    parser.add_argument('--source', default='tiny')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=120)
    parser.add_argument('--codes', type=int, default=500)
    parser.add_argument('--frames', type=int, default=2000, help='anime frames to train on')
    parser.add_argument('--rows', nargs='*', default=list(ROWS), choices=list(ROWS))
    args = parser.parse_args()
    torch.set_num_threads(1)

    source = load_stylegan(args.source).requires_grad_(False)
    base = FinetuneSettings.preset('tiny').but(steps=args.steps, log_every=20, sample_every=args.steps, save_every=args.steps)
    about = dict(settings=base.to_dict(), codes=args.codes, frames=args.frames, size=source.size, source=digest(source))
    about['clip'], about['segmenter'] = digest(load_clip('tiny')), digest(load_segmenter('tiny'))
    table = dict(about=about, scale={}, rows={}, summary={})
    if args.out.exists():
        table = json.loads(args.out.read_text())
        if table['about'] != json.loads(json.dumps(about)):
            raise UserError(f'{args.out} was measured with other settings or weights; remove it, or name another file')

    def write():
        for row, runs in table['rows'].items():
            columns = {k: [r[k] for r in runs.values()] for k in (*MEASURES, 'seconds')}
            table['summary'][row] = {k: [round(statistics.mean(v), 5), round(statistics.stdev(v) if len(v) > 1 else 0., 5)]
                                     for k, v in columns.items()}
        with atomic_path(args.out) as tmp: tmp.write_text(json.dumps(table, indent=1))

    ruler = Ruler(source, args.codes)
    if not table['scale']:
        table['scale'] = {k: rounded(v) for k, v in ruler.scale(source.size).items()}
        write()
    with tempfile.TemporaryDirectory() as work:
        frames = write_world(Path(work)/'world', n_photos=0, n_anime=args.frames, n_pairs=0, size=source.size)/'anime'
        for seed in range(args.seeds):                       # all rows of one seed first: a stop leaves whole seeds
            for row in args.rows:
                runs = table['rows'].setdefault(row, {})
                if str(seed) in runs: continue
                cfg, began = base.but(seed=seed, **ROWS[row]), time.perf_counter()
                result = finetune(cfg, args.source, frames, Path(work)/f'{row} {seed}'.replace('/', ''), device='cpu')
                seconds = time.perf_counter() - began
                found = ruler(paint(load_stylegan(result), ruler.w_plus, ruler.noise))
                runs[str(seed)] = rounded({**found, 'seconds': seconds})
                print(f'{row:<16} seed {seed}: ' + ', '.join(f'{k} {v:.4f}' for k, v in runs[str(seed)].items()), flush=True)
                write()


if __name__ == '__main__': main()
