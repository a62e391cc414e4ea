"""What all drawings share: facts read from the networks and settings, and tiny landscapes.

The networks are built without memory, because only shapes count. Settings are those of the preset `paper`.
"""
from functools import cache

import torch

from scenimefy.finetune import FinetuneSettings
from scenimefy.priors import VggDistance, _vgg19_features
from scenimefy.selection import SelectSettings
from scenimefy.semisup import SemisupSettings
from scenimefy.stylegan import Generator
from scenimefy.translator import (TAPS, PatchCritic, PatchHeads, ResnetGenerator, _field_side, footprint,
                                  tap_channels)
from svg import INK, SOFT

PX = 256                            # side of the pictures
CLIP_DIM = 512                      # of ViT-B/32; compared in test_drawings.py, as the next three
QUERIES, CLASSES, MASK = 100, 150, 64


# ---- facts

def shape(t): return tuple(t.shape[1:])
def times(*sizes): return ' × '.join(f'{s:,}' for s in sizes)


def map_name(sizes):
    "(64, 256, 256) → 64 × 256²"
    c, h, w = sizes
    return f'{c} × {h}²' if h == w else times(*sizes)


@cache
def networks():
    "The networks of the paper, without memory: only shapes count."
    with torch.device('meta'):
        return dict(S=Generator(PX), G=ResnetGenerator(), D=PatchCritic(), D_p=PatchCritic(6),
                    F=PatchHeads(tap_channels()))


@cache
def sizes_inside(name):
    "(C,H,W) behind every module of the translator or of a critic."
    net, found = networks()[name], []
    x = torch.empty(1, net.in_ch, PX, PX, device='meta')
    for layer in net.model:
        x = layer(x)
        found.append(shape(x))
    return found


@cache
def tap_sizes():
    return [shape(t) for t in networks()['G'].encode(torch.empty(1, 3, PX, PX, device='meta'))]


@cache
def fields():
    "Side of the square of pixels that a tap, or a score of the critic, can see."
    G = ResnetGenerator(ngf=4)
    found = {t: _field_side(footprint(G.model[:t + 1])) for t in TAPS}
    return found | {'critic': _field_side(footprint(PatchCritic(ndf=4).model))}


@cache
def vgg_size():
    with torch.device('meta'): judge = VggDistance(_vgg19_features())
    return shape(judge.features(torch.empty(1, 3, PX, PX, device='meta')))


@cache
def settings():
    return {cls: cls.preset('paper') for cls in (FinetuneSettings, SelectSettings, SemisupSettings)}


def weight(v): return f'{v:g}'


# ---- small pictures inside the drawings

COLORS = {'photo': ('#C9D3DA', '#8E9A93', '#6F7A62', '#3F4A3C'),        # sky, hill, land, tree
          'anime': ('#9AD7F5', '#5FA777', '#B9DB6B', '#2E7D4F'),
          'labels': ('#FFFFFF', '#C9C9C9', '#8A8A8A', '#505050')}


def scene(s, x, y, side, kind, name='', below=True):
    "A tiny landscape: 'photo' in soft bands without outlines, 'anime' flat with outlines, 'labels' as a map."
    u = side/10
    line = dict(stroke=INK, width=1.3) if kind == 'anime' else dict(stroke='none', width=0)
    sky, hill, land, dark = COLORS[kind]
    def shape_of(points, fill, **line):
        s.path([(x + a*u, y + b*u) for a, b in points], fill=fill, close=True, keep=False, **line)
    s.rect(x, y, side, side, sky)
    if kind == 'photo':
        for k, tone in enumerate(('#B5C1CA', '#C0CBD2', '#D5DDE2')): s.rect(x, y + 1.3*k*u, side, 1.3*u, tone)
    ridge = [(0, 6), (2.2, 3.4), (3.6, 4.9), (6.4, 2.2), (10, 5.8), (10, 7), (0, 7)]
    shape_of(ridge, hill, **line)
    if kind == 'photo':
        snow = [(6.4, 2.2), (5.3, 3.3), (6.3, 3.1), (7.6, 3.4)]
        shape_of(snow, '#E4E8EA', **line)
    shore = [(0, 6.6), (4, 6.2), (10, 6.9), (10, 10), (0, 10)]
    shape_of(shore, land, **line)
    if kind == 'photo': s.rect(x, y + 8.4*u, side, 1.6*u, '#59634F')
    tree = [(1.2, 8.3), (2.2, 4.6), (3.2, 8.3)]
    shape_of(tree, dark, **line)
    if kind == 'anime':
        for a, b, r in ((6.6, 1.2, .55), (7.4, 1.0, .75), (8.2, 1.25, .55)):
            s.circle(x + a*u, y + b*u, r*u, '#FFFFFF', 'none', 0)
    frame = s.rect(x, y, side, side, 'none', INK, 1.4, keep=True)
    if name and below: s.text(x + side/2, y + side + 11, name)
    elif name: s.text(x + side/2, y - 10, name)
    return frame


def heading(s, x, y, words, note=''):
    area = s.text(x, y, words, 16, 'start', bold=True)
    if note: s.text(area.x + area.w + 12, y + 1, note, 13, 'start', color=SOFT)
