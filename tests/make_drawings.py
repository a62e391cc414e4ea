"""The drawings of nbs/images: `python tests/make_drawings.py`, or `make drawings`.

Sizes, layer numbers and weights are read from the networks and the settings, so a drawing changes with the
code, and `test_drawings.py` says when one is stale.
"""
import sys
from pathlib import Path

from sheet_method import segment_select, system
from sheet_networks import critic, heads, stylegan_blocks, translator

IMAGES = Path(__file__).resolve().parents[1]/'nbs'/'images'
ABOUT = {   # for those who cannot see them; the notebooks hold the same words
    'stylegan_blocks':
        'StyleGAN2 at 256 px as seven rows of layers, from 4 px above to 256 px below. Each layer has the '
        'number of its style entry in a circle, 0 to 13. The rows of 4 to 32 px and the mapping network are '
        'hatched, which means frozen in Stage 1; the rows of 64, 128 and 256 px learn.',
    'translator':
        'The translator as a row of bars whose height is the resolution: an encoder from 256 to 64 px, nine '
        'residual blocks, a decoder back to 256 px. Flags mark the taps 0, 4, 8, 12 and 16. Below, one '
        'residual block and a table: the taps see 1, 9, 15, 35 and 99 px.',
    'critic':
        'A picture of 256 px with a square of 84 px, joined by dashed lines to one cell of a map of 30 × 30 '
        'scores. Below, the layers: five convolutions and three blurs that halve the map. D_U takes one '
        'picture of 3 channels, D_P a pair of 6.',
    'heads':
        'Two pictures pass the encoder. At the same positions of their five taps columns are taken. A small '
        'network for each tap turns them into rows of length 1, 256 queries and 256 keys, and these make a '
        'square of similarities with a dark diagonal. F serves SRC and hDCE, F_s serves StylePatchNCE.',
    'segment_select':
        'Above, both pictures of a pair pass the segmenter; its classes and masks are multiplied and added '
        'to scores. Below, the labels of the photo meet the scores of the anime in L_BCE. Two rules follow: '
        'at least 2 classes, and L_BCE below 5.0, which lies at the end of its scale.',
    'system':
        'The method from top to bottom. Stage 1: two StyleGANs paint a photo and an anime picture from the '
        'same numbers; the last blocks of one learn. Stage 2: a segmenter and two rules keep pairs. Stage '
        '3: a translator learns from unpaired pictures and from pairs, whose weight fades. Then any photo '
        'becomes a scene, which is measured.',
}
DRAWINGS = dict(stylegan_blocks=stylegan_blocks, translator=translator, critic=critic, heads=heads,
                segment_select=segment_select, system=system)


def draw(name):
    sheet = DRAWINGS[name]()
    sheet.described = ABOUT[name]
    return sheet


def main(names):
    for name in names or DRAWINGS:
        sheet = draw(name)
        for clash in sheet.clashes(): print(f'{name}: {clash}', file=sys.stderr)
        (IMAGES/f'{name}.svg').write_text(sheet.svg(), encoding='utf-8', newline='\n')


if __name__ == '__main__': main(sys.argv[1:])
