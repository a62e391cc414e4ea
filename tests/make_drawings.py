"""The drawings of nbs/images, from the networks themselves: `python tests/make_drawings.py`, or `make drawings`.

Sizes, layer numbers and weights are read from networks that are built without memory, and from the settings
of the preset `paper`. So a drawing changes with the code, and `test_drawings.py` says when one is stale.
"""
import math
import sys
from functools import cache
from pathlib import Path

import torch

from scenimefy.finetune import FinetuneSettings, trainable_names
from scenimefy.losses import lambda_sup
from scenimefy.priors import VggDistance, _vgg19_features
from scenimefy.selection import SelectSettings, lbce_released
from scenimefy.semisup import SemisupSettings, term_weights
from scenimefy.stylegan import Generator, channel_plan
from scenimefy.translator import (TAPS, PatchCritic, PatchHeads, ResnetGenerator, _field_side, count_parameters,
                                  footprint, tap_channels)
from svg import BLUE, GOLD, GREEN, INK, LINE, RED, SKY, SOFT, Box, Sheet

IMAGES = Path(__file__).resolve().parents[1]/'nbs'/'images'
PX = 256
CLIP_SIDE, CLIP_DIM = 224, 512      # ViT-B/32: compared in the tests
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
def settings(): return {cls: cls.preset('paper') for cls in (FinetuneSettings, SelectSettings, SemisupSettings)}


def weight(v): return f'{v:g}'


# ---- small pictures inside the drawings

def scene(s, x, y, side, kind, name='', below=True):
    "A tiny landscape: 'photo' in soft bands without outlines, 'anime' flat with outlines, 'labels' as a map."
    u = side/10
    line = dict(stroke=INK, width=1.3) if kind == 'anime' else dict(stroke='none', width=0)
    sky, hill, land = {'photo': ('#C9D3DA', '#8E9A93', '#6F7A62'), 'anime': ('#9AD7F5', '#5FA777', '#B9DB6B'),
                       'labels': ('#FFFFFF', '#C9C9C9', '#8A8A8A')}[kind]
    s.rect(x, y, side, side, sky)
    if kind == 'photo':
        for k, tone in enumerate(('#B5C1CA', '#C0CBD2', '#D5DDE2')): s.rect(x, y + 1.3*k*u, side, 1.3*u, tone)
    ridge = [(0, 6), (2.2, 3.4), (3.6, 4.9), (6.4, 2.2), (10, 5.8), (10, 7), (0, 7)]
    s.path([(x + a*u, y + b*u) for a, b in ridge], fill=hill, close=True, keep=False, **line)
    if kind == 'photo':
        snow = [(6.4, 2.2), (5.3, 3.3), (6.3, 3.1), (7.6, 3.4)]
        s.path([(x + a*u, y + b*u) for a, b in snow], 'none', 0, fill='#E4E8EA', close=True, keep=False)
    shore = [(0, 6.6), (4, 6.2), (10, 6.9), (10, 10), (0, 10)]
    s.path([(x + a*u, y + b*u) for a, b in shore], fill=land, close=True, keep=False, **line)
    if kind == 'photo': s.rect(x, y + 8.4*u, side, 1.6*u, '#59634F')
    tree = [(1.2, 8.3), (2.2, 4.6), (3.2, 8.3)]
    dark = {'photo': '#3F4A3C', 'anime': '#2E7D4F', 'labels': '#505050'}[kind]
    s.path([(x + a*u, y + b*u) for a, b in tree], fill=dark, close=True, keep=False, **line)
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


# ---- StyleGAN2

def stylegan_blocks():
    "Stage 1's generator, a row for each resolution, with what is frozen."
    G, plan = networks()['S'], channel_plan(PX)
    ours = set(trainable_names(G))
    counts = {k: p.numel() for k, p in G.named_parameters()}
    s = Sheet(800, 720, 'The generator of StyleGAN2 at 256 px, and what Stage 1 freezes', ABOUT['stylegan_blocks'])
    heading(s, 20, 24, 'StyleGAN2 at 256 px', 'a row for each resolution; hatched: frozen in Stage 1')
    for x, words in ((283, 'first convolution'), (453, 'second convolution'), (600, 'to RGB'), (716, 'picture so far')):
        s.text(x, 54, words, 12, color=SOFT)

    z = s.box(18, 84, 92, 34, [f'z, {G.style_dim}'])
    depth = len(G.style) - 1
    mapping = s.box(18, 160, 92, 92, ['mapping', f'{depth} linear', 'layers', 'style.1–8'], 'frozen', 12, bold=True)
    assert depth == 8 and not any(k.startswith('style.') for k in ours)
    s.arrow(z.bottom, mapping.top)
    w = s.box(18, 294, 92, 34, [f'w, {G.style_dim}'])
    s.arrow(mapping.bottom, w.top)
    wplus = s.box(18, 370, 92, 48, ['w^{+}', times(G.n_latent, G.style_dim)], bold=True)
    s.arrow(w.bottom, wplus.top)
    s.lines_at(16, 452, ['One w copied, or', 'two mixed: an', 'entry for each', 'circle.'], 12, color=SOFT, anchor='start')
    s.lines_at(16, 548, ['A 3 × 3 layer', 'with entry i also', 'adds noise map i:', 'one number for', 'each pixel.'], 12, color=SOFT, anchor='start')

    top, step, tall = 72, 84, 62
    rows = []
    for r, side in enumerate(plan):
        y, j = top + r*step, r - 1
        mine = [f'convs.{2*j}', f'convs.{2*j+1}', f'to_rgbs.{j}'] if r else ['conv1', '', 'to_rgb1']
        rows.append(_row(s, G, side, plan, y, tall, r, mine, ours, rows))
    for r, (a, b) in enumerate(zip(rows, rows[1:])): _between(s, a, b, step - tall)
    frozen = [r for r, row in enumerate(rows) if not row['learns']]
    assert frozen == [0, 1, 2, 3]
    cut = top + len(frozen)*step - (step - tall)/2
    s.path([(130, cut), (790, cut)], RED, 1.6, '7 4', keep=False)
    learned = sum(counts[k] for k in ours)
    y = top + len(plan)*step + 6
    s.box(20, y, 22, 20, (), 'frozen')
    s.text(50, y + 10, f'frozen: {len(counts) - len(ours)} tensors, {sum(counts.values()) - learned:,} numbers', 13, 'start')
    s.box(400, y, 22, 20, (), 'learns')
    s.text(430, y + 10, f'learns: {len(ours)} tensors, {learned:,} numbers', 13, 'start')
    s.text(20, y + 38, 'Above the dashed line source and target are one network; below it the target learns to paint anime.',
           13, 'start')
    return s


def _row(s, G, side, plan, y, tall, r, mine, ours, rows):
    "One resolution: convolutions, to-RGB, the picture so far."
    learns = {any(k.startswith(f'{name}.') for k in ours) for name in mine if name}
    assert len(learns) == 1
    kind = 'learns' if learns.pop() else 'frozen'
    below = plan[side//2] if r else None
    s.text(134, y + 20, f'{side} px', 14, 'start', bold=True)
    s.text(134, y + 40, map_name((plan[side], side, side)), 11.5, 'start', color=SOFT)
    out = dict(learns=kind == 'learns')
    if r:
        out['a'] = s.box(223, y, 120, tall, ["conv 3 × 3, ↑ 2", f'{below} → {plan[side]}', mine[0]], kind, 12)
        out['b'] = s.box(393, y, 120, tall, ['conv 3 × 3', f'{plan[side]} → {plan[side]}', mine[1]], kind, 12)
        s.arrow(out['a'].right, out['b'].left)
        s.badge(223, y, f'{2*r - 1}')
        s.badge(393, y, f'{2*r}')
    else:
        start = s.box(223, y, 120, tall, ['learned map', map_name((plan[4], 4, 4)), 'input'], 'frozen', 12)
        assert 'input.input' not in ours
        out['b'] = s.box(393, y, 120, tall, ['conv 3 × 3', f'{plan[4]} → {plan[4]}', 'conv1'], kind, 12)
        s.arrow(start.right, out['b'].left)
        s.badge(393, y, '0')
    out['rgb'] = s.box(560, y, 80, tall, ['conv 1 × 1', f'{plan[side]} → 3', mine[2]], kind, 12)
    s.arrow(out['b'].right, out['rgb'].left)
    s.badge(560, y, f'{2*r + 1}')
    out['image'] = s.stack(682, y + 14, 68, 36, n=3, lines=[f'3 × {side}²'], size=12)
    s.arrow(out['rgb'].right, (682, y + 31))
    return out


def _between(s, a, b, gap):
    "From one resolution to the next: features on the left, the enlarged picture on the right."
    start, end = a['b'].side('bottom', .5), b['a'].side('top', .5)
    middle = start[1] + gap/2
    s.arrow(start, (start[0], middle), (end[0], middle), end)
    s.arrow((716, a['image'].y + a['image'].h), (716, b['image'].y - 8))
    s.text(724, a['image'].y + a['image'].h + 10, '↑ 2, add', 11.5, 'start', color=SOFT)


# ---- the translator

BARS = {0: ('pad 3', 'quiet'), 1: ('conv 7', 'learns'), 4: ('conv 3', 'learns'), 7: ('blur ↓ 2', 'quiet'),
        8: ('conv 3', 'learns'), 11: ('blur ↓ 2', 'quiet'), **{i: ('block', 'block') for i in range(12, 21)},
        21: ('up ↑ 2', 'quiet'), 22: ('conv 3', 'learns'), 25: ('up ↑ 2', 'quiet'), 26: ('conv 3', 'learns'),
        30: ('conv 7, tanh', 'learns')}
BAR_HEIGHT = {262: 154, 256: 150, 128: 110, 64: 74}


def translator():
    "The ResNet generator: bars as tall as their maps, the taps, and one residual block from inside."
    s = Sheet(800, 576, 'The translator: a ResNet generator and its five taps', ABOUT['translator'])
    G, inside = networks()['G'], sizes_inside('G')
    heading(s, 20, 24, 'The translator G', f'{count_parameters(G):,} numbers; sizes for a photo of {PX} px')
    middle, bars = 178, _bars(s, inside, 178)
    scene(s, 14, middle - 28, 56, 'photo', 'photo x')
    scene(s, 730, middle - 28, 56, 'anime', 'G(x)')
    s.text(42, middle + 58, f'3 × {PX}²', 12, color=SOFT)
    s.text(758, middle + 58, f'3 × {PX}²', 12, color=SOFT)
    s.arrow((70, middle), (bars[0].x, middle))
    s.arrow((bars[30].x + bars[30].w, middle), (730, middle))
    for first, last, side in ((0, 0, 262), (1, 4, 256), (7, 8, 128), (11, 20, 64), (21, 22, 128), (25, 30, 256)):
        assert {h for _, h, _ in (inside[i] for i in BARS if first <= i <= last)} == {side}
        s.bracket(bars[first].x + 1, bars[last].x + bars[last].w - 1, 284, f'{side}²')
    for words, first, last in (('encoder', 0, 11), ('nine residual blocks', 12, 20), ('decoder', 21, 30)):
        s.text((bars[first].x + bars[last].x + bars[last].w)/2, 320, words, 13, bold=True)
    _tap_marks(s, bars)
    _residual_block(s, 348)
    _tap_table(s, 448)
    return s


def _bars(s, inside, middle):
    "A bar for each module that changes the size or the channels."
    x, found = 90, {}
    for i, (words, kind) in BARS.items():
        c, h, _ = inside[i]
        tall, wide = BAR_HEIGHT[h], 21 if kind == 'block' else 28
        y = middle - tall/2
        found[i] = s.box(x, y, wide, tall, (), kind)
        if kind != 'block': s.text(x + wide/2, middle - 8, words, 12, turned=True)
        if kind != 'block': s.text(x + wide/2, y + tall - 10, f'{c}', 11)
        if kind != 'block' or i in (12, 16, 20): s.text(x + wide/2, 274, f'{i}', 12, color=SOFT)
        x += wide + (3 if kind == 'block' else 8)
        if i == 20: x += 5
    return found


def _tap_marks(s, bars):
    "Flags over the modules whose outputs the losses look at."
    for t in TAPS:
        b = bars[t]
        x = b.x + b.w/2
        s.path([(x, b.y), (x, 74)], RED, 1.6, keep=False)
        s.badge(x, 66, f'{t}', 12, 12, '#FFF1E0', RED)
    s.text(bars[16].x + 34, 66, '← taps: what the patch losses compare', 12, 'start', color=SOFT)
    s.text((bars[17].x + bars[20].x + 21)/2, bars[17].y - 12, '256 channels', 12, color=SOFT)


def _residual_block(s, y):
    "What a block holds."
    block = networks()['G'].model[12].conv_block
    names = dict(ReflectPad='mirror 1', Conv2d='conv 3', InstanceNorm='norm', ReLU='ReLU')
    parts = [names[type(m).__name__] for m in block]
    s.text(20, y + 30, 'A block:', 13, 'start', bold=True)
    x, last, first = 128, None, None
    s.arrow((92, y + 30), (x, y + 30))
    for words in parts:
        kind = 'learns' if words == 'conv 3' else 'quiet'
        b = s.box(x, y + 15, 64, 30, [words], kind, 12)
        if last: s.arrow(last.right, b.left)
        first, last, x = first or b, b, x + 78
    s.circle(x + 14, y + 30, 11)
    s.text(x + 14, y + 30, '+', 15)
    s.arrow(last.right, (x + 3, y + 30))
    s.arrow((108, y + 30), (108, y + 62), (x + 14, y + 62), (x + 14, y + 41))
    s.text(400, y + 75, 'the input itself, so that a block only adds a correction', 12, color=SOFT)
    s.arrow((x + 25, y + 30), (x + 48, y + 30))


def _tap_table(s, y):
    "Each tap: the tensor, and how much of the photo one of its columns can see."
    seen, channels = fields(), tap_sizes()
    columns = [190 + 122*k for k in range(len(TAPS))]
    for words, dy in (('tap', 0), ('tensor', 30), ('one column sees', 58)): s.text(20, y + dy + 8, words, 13, 'start', bold=True)
    for x, t, size in zip(columns, TAPS, channels):
        s.badge(x, y + 8, f'{t}', 12, 12, '#FFF1E0', RED)
        s.text(x, y + 38, map_name(size), 13)
        s.text(x, y + 66, f'{seen[t]} × {seen[t]} px' if seen[t] > 1 else '1 pixel', 13)
    s.path([(20, y + 23), (780, y + 23)], LINE, 1)
    notes = ['A bar is as tall as its map; inside: channels; below: number of the module. White bars have nothing to learn.',
             'Not drawn: norm and ReLU after every convolution but the last, and the pad before module 30.']
    s.lines_at(20, y + 105, notes, 12, color=SOFT, anchor='start')


# ---- the critic

def critic():
    "A patch critic: what one of its scores sees, and its layers."
    D, D_p, inside = networks()['D'], networks()['D_p'], sizes_inside('D')
    s = Sheet(800, 462, 'The patch critics and what one score sees', ABOUT['critic'])
    heading(s, 20, 24, 'A patch critic', 'a score for every patch, no verdict on the whole')
    side, at = 190, (40, 56)
    scene(s, *at, side, 'anime')
    scale, (x0, y0, seen) = side/PX, middle_field()
    assert seen == fields()['critic']
    patch = Box(at[0] + scale*x0, at[1] + scale*y0, scale*seen, scale*seen)
    for color, thick in (('#FFFFFF', 6), (RED, 2.6)): s.rect(*patch, 'none', color, thick)
    c, n, _ = inside[-1]
    cell, grid = 5, (560, 72)
    for k in range(n + 1):
        s.path([(grid[0] + cell*k, grid[1]), (grid[0] + cell*k, grid[1] + cell*n)], LINE, .6, keep=False)
        s.path([(grid[0], grid[1] + cell*k), (grid[0] + cell*n, grid[1] + cell*k)], LINE, .6, keep=False)
    one = Box(grid[0] + cell*(n//2), grid[1] + cell*(n//2), cell, cell)
    for share in (0, 1): s.path([patch.side('right', share), one.side('left', share)], RED, 1.4, '6 4', keep=False)
    s.rect(*one, RED, RED, 1.5)
    s.lines_at(390, 156, ['one score sees', f'{seen} × {seen} px'], 14, bold=True, plate='#FFFFFF')
    s.text(at[0] + side/2, at[1] + side + 14, f'an image, {PX} × {PX} px', 12, color=SOFT)
    s.text(grid[0] + cell*n/2, grid[1] + cell*n + 16, f'{n} × {n} scores', 14, bold=True)
    s.text(grid[0] + cell*n/2, grid[1] + cell*n + 36, 'goal: 1 for real, 0 for made', 12, color=SOFT)
    _critic_layers(s, D, inside, 292)
    for y, name, net, words in ((412, 'D_{U}', D, 'one picture, y or G(x)'),
                                (438, 'D_{P}', D_p, 'a pair: photo x^{p} first, then y^{p} or G(x^{p})')):
        s.text(40, y, name, 14, 'start', bold=True)
        s.text(76, y, f'{net.in_ch} channels in: {words}; {count_parameters(net):,} numbers', 13, 'start')
    return s


@cache
def middle_field():
    "(left, top, side) of what the middle score of the critic sees in a picture of 256 px."
    strength = footprint(PatchCritic(ndf=4).model, size=PX)
    rows, columns = strength.sum(1).nonzero().flatten(), strength.sum(0).nonzero().flatten()
    return int(columns.min()), int(rows.min()), int(rows.max() - rows.min()) + 1


def _critic_layers(s, D, inside, y):
    "The layers that change the size, each with its map."
    kinds = dict(Conv2d=('conv 4', 'learns'), Downsample=('blur ↓ 2', 'quiet'))
    x, last = 40, None
    for i, layer in enumerate(D.model):
        if type(layer).__name__ not in kinds: continue
        words, kind = kinds[type(layer).__name__]
        b = s.box(x, y, 76, 48, [words, f'module {i}'], kind, 12)
        s.text(x + 38, y + 64, map_name(inside[i]), 12)
        if last: s.arrow(last.right, b.left)
        last, x = b, x + 92
    s.text(40, y + 88, 'Leaky ReLU follows each convolution but the last, and a norm comes between, except after the first.',
           12, 'start', color=SOFT)


# ---- the heads

SPOTS = ((.2, .25), (.7, .15), (.45, .5), (.85, .6), (.25, .8), (.65, .85))   # relative, for the eye only


def heads():
    "From the taps of two pictures to unit rows, and their similarities."
    F, cfg = networks()['F'], settings()[SemisupSettings]
    s = Sheet(800, 500, 'Patch heads: from taps to unit vectors and their similarities', ABOUT['heads'])
    heading(s, 20, 24, 'Patch heads', f'{count_parameters(F):,} numbers in F, and as many in F_{{s}}')
    rows = {'queries': (96, 'anime', 'G(x)'), 'keys': (276, 'photo', 'x')}
    enc = s.box(104, 74, 66, 306, ['encoder', 'of G,', f'modules', f'0 to {TAPS[-1]}'], 'learns', 12)
    mlp = s.box(466, 74, 130, 306, (), 'learns')
    s.lines_at(531, 178, ['F, for each tap:', 'linear C → ' + f'{F.dim}', 'ReLU', f'linear {F.dim} → {F.dim}', 'length 1'],
               12.5, bold=True, gap=24)
    s.lines_at(531, 310, ['the same for both', 'pictures, in fp32'], 12, color=SOFT)
    for name, (y, kind, words) in rows.items():
        picture = scene(s, 20, y, 66, kind, words)
        s.arrow(picture.right, (104, y + 33))
        _sampled_taps(s, 186, y + 33, named=name == 'queries')
        s.arrow((448, y + 33), (466, y + 33))
        out = s.stack(614, y + 8, 58, 50, lines=[f'{cfg.n_patches}', f'× {F.dim}'])
        s.arrow((596, y + 33), out.left)
        s.text(646, y + 74, name, 13, bold=True)
    s.text(646, 276 + 92, 'no gradient', 12, color=SOFT)
    s.lines_at(318, 232, [f'{cfg.n_patches} positions for each tap,', 'drawn anew in each step,', 'the same in both pictures'], 12.5)
    _matrix(s, 694, 172, 92, cfg)
    s.arrow((682, 129), (740, 129), (740, 170))
    s.arrow((682, 309), (740, 309), (740, 266))
    for k, (a, b, c) in enumerate((('F', 'G(x) with x, and G(y) with y', 'SRC, hDCE: the content stays'),
                                   ('F_{s}', 'G(x^{p}) with y^{p}', 'StylePatchNCE: the pair is the goal'))):
        y = 424 + 26*k
        s.text(20, y, a, 14, 'start', bold=True)
        s.text(56, y, b, 13, 'start')
        s.text(330, y, c, 13, 'start')
    s.text(20, 480, f'Five taps, so five comparisons; their mean is the loss. A pixel of a tap is a column of C numbers.',
           12, 'start', color=SOFT)
    return s


def _sampled_taps(s, x, y, named):
    "Five maps, wide to narrow, with the sampled positions."
    for (c, h, _), t in zip(tap_sizes(), TAPS):
        side = {262: 46, 256: 45, 128: 36, 64: 28}[h]
        left = x + (46 - side)/2
        s.rect(left, y - side/2, side, side, '#FFFFFF', INK, 1.2, keep=True)
        for a, b in SPOTS: s.circle(left + a*side, y - side/2 + b*side, 2.4, RED, 'none', 0)
        if named:
            s.text(x + 23, y + 38, f'tap {t}', 12)
            s.text(x + 23, y + 54, f'C = {c}', 11, color=SOFT)
        x += 53


def _matrix(s, x, y, side, cfg):
    "Similarities of all queries with all keys: the diagonal is what belongs together."
    n = 8
    u = side/n
    s.rect(x, y, side, side, '#EDEDED', INK, 1.2, keep=True)
    for k in range(n): s.rect(x + k*u, y + k*u, u, u, BLUE)
    for k in range(1, n):
        s.path([(x + k*u, y), (x + k*u, y + side)], '#FFFFFF', 1, keep=False)
        s.path([(x, y + k*u), (x + side, y + k*u)], '#FFFFFF', 1, keep=False)
    s.lines_at(x + side/2, y + side + 76, ['similarities', times(cfg.n_patches, cfg.n_patches), 'dark: the', 'same place'], 12)


# ---- Stage 2

def segment_select():
    "From two pictures to scores, from scores to L_BCE and a decision."
    cfg = settings()[SelectSettings]
    s = Sheet(800, 560, 'Stage 2: how a pair is judged', ABOUT['segment_select'])
    heading(s, 20, 24, 'From an image to scores', 'the same for the photo and for the anime')
    photo, anime = scene(s, 24, 62, 62, 'photo', 'x^{p}'), scene(s, 24, 168, 62, 'anime', 'y^{p}')
    seg = s.box(112, 60, 118, 172, ['segmenter', 'Mask2Former', f'{QUERIES} queries', f'{CLASSES} classes'], 'frozen', bold=True,
                gap=20)
    for b in (photo, anime): s.arrow(b.right, (112, b.y + 31))
    what = s.stack(256, 74, 112, 44, lines=['what: class', times(QUERIES, CLASSES + 1)])
    where = s.stack(256, 178, 112, 44, lines=['where: mask', map_name((QUERIES, MASK, MASK))])
    for b in (what, where): s.arrow((230, b.y + 22), b.left)
    soft = s.box(402, 70, 142, 52, ['softmax over classes,', 'then drop “nothing”'], size=12)
    wide = s.box(402, 174, 142, 52, [f'enlarge to {PX}²,', 'sigmoid'], size=12)
    s.arrow((376, 96), soft.left)
    s.arrow((376, 200), wide.left)
    add = s.box(572, 116, 96, 62, ['multiply,', f'add over', f'{QUERIES} queries'], size=12)
    s.arrow(soft.right, (620, 96), add.top)
    s.arrow(wide.right, (620, 200), add.bottom)
    s.stack(696, 122, 84, 50, lines=['scores s', map_name((CLASSES, PX, PX))], size=12)
    s.arrow(add.right, (696, 147))
    s.path([(20, 256), (780, 256)], LINE, 1)
    _judge_pair(s, cfg, 280)
    _ruler(s, cfg, 506)
    return s


def _judge_pair(s, cfg, y):
    "Labels of the photo against scores of the anime, and the two rules."
    heading(s, 20, y, 'From scores to a decision', 'the photo says what is right')
    a = s.stack(24, y + 40, 104, 44, lines=['s of the photo', map_name((CLASSES, PX, PX))], size=12)
    b = s.stack(24, y + 126, 104, 44, lines=['s of the anime', map_name((CLASSES, PX, PX))], size=12)
    label = scene(s, 214, y + 31, 62, 'labels', 'labels', below=False)
    s.arrow((136, y + 62), (214, y + 62))
    s.text(174, y + 50, 'argmax', 12)
    count = s.box(322, y + 40, 136, 44, ['how many classes', 'own a pixel?'], size=12.5)
    s.arrow(label.right, count.left)
    loss = s.box(322, y + 118, 136, 60, ['L_{BCE}', 'mean over pixels of', 'log Σ e^{s} − s_{label}'], 'loss', 12.5, bold=True)
    s.arrow((136, y + 154), (322, y + 154))
    s.arrow(label.bottom, (245, y + 134), (322, y + 134))
    many = s.box(496, y + 40, 112, 44, [f'at least {cfg.min_categories}?'], 'rule', bold=True)
    low = s.box(496, y + 126, 112, 44, [f'below {cfg.max_lbce:.1f}?'], 'rule', bold=True)
    s.arrow(count.right, many.left)
    s.arrow(loss.right, low.left)
    kept = s.box(690, y + 40, 98, 44, ['kept', f'{cfg.count:,} pairs'], 'gold', bold=True)
    lost = s.box(690, y + 130, 98, 36, ['left out'], 'quiet')
    middle = y + 105
    s.circle(640, middle, 17)
    s.text(640, middle, 'and', 12)
    s.arrow(many.right, (640, y + 62), (640, middle - 17))
    s.arrow(low.right, (640, y + 148), (640, middle + 17))
    s.arrow((657, middle), (672, middle), (672, y + 62), kept.left)
    s.arrow((657, middle), (672, middle), (672, y + 148), lost.left)
    s.text(676, y + 48, 'yes', 12, 'end')
    s.text(676, y + 164, 'no', 12, 'end')


def _ruler(s, cfg, y):
    "Where L_BCE can lie at all."
    right = torch.zeros(1, CLASSES, 1, 1)
    right[:, 0] = 1
    wrong = right.roll(1, 1)
    best, worst = lbce_released(right, right).item(), lbce_released(wrong, right).item()
    def at(v): return 110 + 560*(v - best)/(worst - best)
    s.path([(at(best), y), (at(worst), y)], INK, 2)
    for v, words in ((best, f'{best:.2f}: score 1 for the right class'), (worst, f'{worst:.2f}')):
        s.path([(at(v), y - 6), (at(v), y + 6)], INK, 2)
    cut = at(cfg.max_lbce)
    s.path([(cut, y - 16), (cut, y + 9)], GREEN, 2.4, '4 2')
    s.text(at(best), y + 20, f'{best:.2f}: right class, score 1, everywhere', 12, 'start')
    s.text(at(worst) + 8, y + 20, f'{worst:.2f}: wrong class, score 1', 12, 'end')
    s.text(cut, y - 26, f'the rule, {cfg.max_lbce:.1f}', 12, bold=True)
    s.text(20, y, 'L_{BCE}', 14, 'start', bold=True)
    s.text(20, y + 42, 'As long as no score exceeds 1, only pairs that agree almost nowhere fail the rule of 5.0.', 12,
           'start', color=SOFT)


# ---- everything

def system():
    "The whole method on one page."
    s = Sheet(800, 1150, 'Scenimefy on one page', ABOUT['system'])
    heading(s, 16, 24, 'Scenimefy on one page', f'sizes for pictures of {PX} px, weights of the paper')
    _legend(s, 54)
    for y, h in ((76, 326), (412, 166), (588, 390), (988, 152)): s.box(12, y, 776, h, (), 'band')
    _stage_1(s, 76)
    _stage_2(s, 412)
    _stage_3(s, 588)
    _in_use(s, 988)
    return s


def _legend(s, y):
    "What the shapes mean."
    for x, kind, words in ((16, 'learns', 'learns'), (116, 'frozen', 'frozen'), (218, 'loss', 'loss and weight'),
                           (382, 'rule', 'rule')):
        s.box(x, y - 9, 30, 18, (), kind)
        s.text(x + 38, y, words, 12, 'start')
    scene(s, 472, y - 9, 18, 'photo')
    s.text(498, y, 'photo', 12, 'start')
    scene(s, 558, y - 9, 18, 'anime')
    s.text(584, y, 'anime', 12, 'start')
    s.stack(648, y - 5, 26, 14, n=3, step=2)
    s.text(686, y, 'tensor', 12, 'start')


def _stage_1(s, top):
    cfg, G = settings()[FinetuneSettings], networks()['S']
    heading(s, 26, top + 22, 'Stage 1', 'two generators paint from the same random numbers')
    z = s.box(26, top + 50, 82, 30, [f'z, {G.style_dim}'])
    mapping = s.box(26, top + 100, 82, 40, ['mapping'], 'frozen')
    styles = s.box(26, top + 160, 82, 46, ['styles w^{+}', times(G.n_latent, G.style_dim)])
    noise = s.box(26, top + 222, 82, 46, ['noise', f'{len(G.noise_sides())} maps'])
    s.arrow(z.bottom, mapping.top)
    s.arrow(mapping.bottom, styles.top)
    s.text(26, top + 286, 'the same for both', 12, 'start', color=SOFT)
    rows = {'s': top + 96, 't': top + 222}
    for end in rows.values(): s.arrow(styles.side('right', .4), (128, styles.y + .4*styles.h), (128, end), (146, end))
    s.arrow(noise.right, (128, noise.y + noise.h/2), (128, rows['t']), (146, rows['t']))
    _pyramid(s, 146, rows['s'], G, set(), 'G_{s}, source: all frozen')
    _pyramid(s, 146, rows['t'], G, set(trainable_names(G)), f'G_{{t}}, target: a copy whose last {cfg.blocks} blocks learn')
    photo = scene(s, 400, rows['s'] - 32, 64, 'photo', f'x^{{p}}, 3 × {PX}²')
    anime = scene(s, 400, rows['t'] - 32, 64, 'anime', f'y^{{p}}, 3 × {PX}²', below=False)
    s.arrow((372, rows['s']), photo.left)
    s.arrow((372, rows['t']), anime.left)
    _scene_terms(s, top, photo, anime, cfg)


def _pyramid(s, x, middle, G, ours, words):
    "The blocks of a generator, small maps first."
    s.text(x, middle - 46, words, 12.5, 'start', bold=False)
    for r, side in enumerate(channel_plan(PX)):
        learns = r and any(k.startswith(f'to_rgbs.{r - 1}.') for k in ours)
        tall = 24 + 7*r
        s.box(x + 32*r, middle - tall/2, 28, tall, [f'{side}'], 'learns' if learns else 'frozen', 11)
    s.text(x + 110, middle + 46, 'px', 11, color=SOFT)


def _scene_terms(s, top, photo, anime, cfg):
    "Judges and terms on the right of Stage 1."
    bus = 484
    clip = s.box(502, top + 62, 104, 62, ['CLIP', 'ViT-B/32', f'→ {CLIP_DIM}'], 'frozen', 12, bold=True)
    vgg = s.box(502, top + 142, 104, 62, ['VGG-19', 'conv4_4', f'→ {map_name(vgg_size())}'], 'frozen', 12, bold=True)
    critic_ = s.box(502, top + 240, 104, 50, ['critic D', '→ 1 score'], 'learns', 12, bold=True)
    for picture in (photo, anime):
        for judge in (clip, vgg): s.arrow(picture.right, (bus, picture.right[1]), (bus, judge.left[1]), judge.left)
    frames = scene(s, 330, top + 268, 46, 'anime')
    s.text(322, top + 291, 'anime frames y', 12, 'end')
    s.arrow(anime.bottom, (432, critic_.y + 20), (502, critic_.y + 20))
    s.arrow(frames.side('right', .5), (470, frames.y + 23), (470, critic_.y + 38), (502, critic_.y + 38))
    rows = ((top + 52, 'D_{CLIP}', 'whole pictures', cfg.lam_clip, clip), (top + 100, 'patch-CLIP',
            f'{cfg.crops} crops of {cfg.crop} px', cfg.lam_patch, clip),
            (top + 153, 'perceptual', 'features', cfg.lam_perc, vgg), (top + 245, 'GAN', 'y^{p} or a real y?', 1., critic_))
    for y, name, what, lam, judge in rows:
        b = s.box(634, y, 144, 40, [f'{name}, × {weight(lam)}', what], 'loss', 12, bold=True)
        s.arrow((606, b.left[1]), b.left)


def _stage_2(s, top):
    cfg = settings()[SelectSettings]
    heading(s, 26, top + 22, 'Stage 2', 'keep the pairs in which both pictures show the same things')
    photo, anime = scene(s, 26, top + 40, 44, 'photo'), scene(s, 26, top + 94, 44, 'anime')
    s.text(26, top + 150, f'new pairs, ψ = {cfg.psi:g}', 12, 'start', color=SOFT)
    seg = s.box(96, top + 44, 108, 90, ['segmenter', 'Mask2Former', f'{CLASSES} classes'], 'frozen', 12, bold=True)
    for b in (photo, anime): s.arrow(b.right, (96, b.y + 22))
    label = scene(s, 240, top + 40, 44, 'labels')
    scores = s.stack(232, top + 100, 84, 34, lines=[map_name((CLASSES, PX, PX))], size=12)
    s.text(292, top + 54, 'labels of', 12, 'start')
    s.text(292, top + 70, 'x^{p}', 12, 'start')
    s.text(274, top + 150, 'scores of y^{p}', 12)
    s.arrow((204, label.y + 22), label.left)
    s.arrow((204, scores.y + 17), scores.left)
    loss = s.box(370, top + 96, 100, 42, ['L_{BCE}'], 'loss', bold=True)
    many = s.box(506, top + 42, 130, 40, [f'at least {cfg.min_categories} classes'], 'rule', 12)
    low = s.box(506, top + 97, 130, 40, [f'below {cfg.max_lbce:.1f}'], 'rule', 12)
    kept = s.box(676, top + 62, 102, 54, ['pairs', f'{cfg.count:,}'], 'gold', bold=True)
    s.arrow((350, label.y + 22), many.left)
    s.arrow((324, loss.left[1]), loss.left)
    s.arrow((350, label.y + 22), (350, loss.y + 10), (370, loss.y + 10))
    s.arrow(loss.right, low.left)
    for b in (many, low): s.arrow(b.right, (656, b.right[1]), (656, kept.left[1]), kept.left)


def _stage_3(s, top):
    cfg = settings()[SemisupSettings]
    first, last = term_weights(cfg, 1), term_weights(cfg, cfg.epochs)
    heading(s, 26, top + 22, 'Stage 3', 'one translator learns from both: with and without partners')
    s.path([(22, top + 208), (778, top + 208)], LINE, 1, '3 3')
    s.text(26, top + 48, 'without partners', 12.5, 'start', bold=True)
    s.text(26, top + 226, 'with partners: the pairs of Stage 2', 12.5, 'start', bold=True)
    G = s.box(112, top + 60, 84, 306, (), 'learns')
    s.lines_at(154, top + 128, ['G', 'ResNet', f'{len(TAPS)} taps'], 13, bold=True)
    s.lines_at(154, top + 296, ['the same', 'weights'], 12, color=SOFT)
    inputs = ((top + 62, 'photo', 'x', 'anime', 'G(x)'), (top + 138, 'anime', 'y', 'anime', 'G(y)'),
              (top + 240, 'photo', 'x^{p}', 'anime', 'G(x^{p})'))
    made = []
    for y, kind, name, goal, out in inputs:
        a = scene(s, 32, y, 50, kind, name)
        made.append(scene(s, 226, y, 50, goal, out))
        s.arrow(a.right, (112, y + 25))
        s.arrow((196, y + 25), made[-1].left)
    goal = scene(s, 226, top + 314, 50, 'anime')
    s.text(251, top + 375, 'y^{p}, the partner', 12)
    _branches(s, top, made, goal, first)
    _fading(s, top, cfg, first, last)


def _branches(s, top, made, goal, w):
    "Critics, heads and terms of both branches."
    x, wide = 318, 150
    rows = (('D_{U}', 'G(x) or a real y?', top + 62, [('GAN', w['gan'])]),
            ('F', 'patches: G(x), x; G(y), y', top + 138, [('SRC', w['src']), ('hDCE', w['hdce'] + w['idt'])]),
            ('D_{P}', 'is G(x^{p}) real beside x^{p}?', top + 240, [('GAN', w['gan_sup'])]),
            ('F_{s}', 'patches: G(x^{p}), y^{p}', top + 314, [('StylePatchNCE', w['style'])]))
    for name, what, y, terms in rows:
        b = s.box(x, y, 172, 50, [name, what], 'learns', 12, bold=True)
        for k, (term, lam) in enumerate(terms):
            at, tall, lines = y + 5, 40, [term, f'× {weight(lam)}']
            if len(terms) > 1: at, tall, lines = y - 4 + 32*k, 27, [f'{term}, × {weight(lam)}']
            pill = s.box(516, at, 142, tall, lines, 'loss', 12, bold=True)
            s.arrow((490, pill.left[1]), pill.left)
    first, second, pair = made
    s.arrow(first.right, (x, first.right[1]))
    s.arrow((296, first.right[1]), (296, top + 155), (x, top + 155))
    s.arrow(second.side('right', .64), (x, top + 170))
    s.arrow(pair.right, (x, pair.right[1]))
    s.arrow((296, pair.right[1]), (296, top + 330), (x, top + 330))
    s.arrow(goal.side('right', .6), (x, top + 344))


def _fading(s, top, cfg, first, last):
    "The sum of both branches; that of the pairs fades."
    s.circle(724, top + 110, 15)
    s.text(724, top + 110, '+', 17)
    for y in (79, 147, 179): s.arrow((658, top + y), (684, top + y), (684, top + 110), (709, top + 110), head=y == 79)
    s.text(724, top + 76, 'loss of G', 13, bold=True)
    x, y, w, h = 690, top + 262, 84, 56
    s.rect(x, y, w, h, '#FFFFFF', LINE, 1, keep=True)
    points = [(x + w*(e - 1)/(cfg.epochs - 1), y + h - (h - 6)*lambda_sup(e, cfg.epochs)) for e in range(1, cfg.epochs + 1)]
    s.path(points, BLUE, 2.4, keep=False)
    s.text(x + w/2, y + h + 13, f'epoch 1 to {cfg.epochs}', 12, color=SOFT)
    s.text(x + w/2, y + h + 31, f'{first["gan_sup"]:.0f} → {last["gan_sup"]:.2f}', 12)
    s.text(x + w/2 + 4, y - 14, '× λ_{sup}', 14, bold=True)
    for at in (265, 339): s.arrow((658, top + at), (674, top + at), (674, y + h/2), (x, y + h/2), head=at == 265)
    s.arrow((724, y - 26), (724, top + 125))


def _in_use(s, top):
    heading(s, 26, top + 22, 'Use and measure', 'only G is kept')
    photo = scene(s, 32, top + 44, 62, 'photo', 'any photo, H × W')
    G = s.box(138, top + 54, 76, 42, ['G'], 'frozen', 15, bold=True)
    made = scene(s, 254, top + 44, 62, 'anime', 'its scene, H × W')
    s.arrow(photo.right, G.left)
    s.arrow(G.right, made.left)
    rows = (('FID', 'many scenes against anime frames: is it anime?'), ('L_{BCE}', 'a scene against its photo: is it the same place?'),
            ('a vote', 'people who do not know which method made what'))
    for k, (name, words) in enumerate(rows):
        y = top + 40 + 34*k
        b = s.box(378, y, 68, 26, [name], 'plain', 12.5, bold=True)
        s.text(456, y + 13, words, 12.5, 'start')
        s.arrow((316, top + 75), (350, top + 75), (350, y + 13), b.left)


ABOUT = {
    'stylegan_blocks': 'StyleGAN2 at 256 px as seven rows of layers, from 4 px above to 256 px below. Each layer has '
                       'the number of its style entry in a circle, 0 to 13. The rows of 4 to 32 px and the mapping '
                       'network are hatched, which means frozen in Stage 1; the rows of 64, 128 and 256 px learn.',
    'translator': 'The translator as a row of bars whose height is the resolution: an encoder from 256 to 64 px, nine '
                  'residual blocks, a decoder back to 256 px. Flags mark the taps 0, 4, 8, 12 and 16. Below, one '
                  'residual block and a table: the taps see 1, 9, 15, 35 and 99 px.',
    'critic': 'A picture of 256 px with a square of 84 px, joined by dashed lines to one cell of a map of 30 × 30 '
              'scores. Below, the layers: five convolutions and three blurs that halve the map. D_U takes one '
              'picture of 3 channels, D_P a pair of 6.',
    'heads': 'Two pictures pass the encoder. At the same positions of their five taps columns are taken. A small '
             'network for each tap turns them into rows of length 1, 256 queries and 256 keys, and these make a '
             'square of similarities with a dark diagonal. F serves SRC and hDCE, F_s serves StylePatchNCE.',
    'segment_select': 'Above, both pictures of a pair pass the segmenter; its classes and masks are multiplied and '
                      'added to scores. Below, the labels of the photo meet the scores of the anime in L_BCE. Two '
                      'rules follow: at least 2 classes, and L_BCE below 5.0, which lies at the end of its scale.',
    'system': 'The method from top to bottom. Stage 1: two StyleGANs paint a photo and an anime picture from the same '
              'numbers; the last blocks of one learn. Stage 2: a segmenter and two rules keep pairs. Stage 3: a '
              'translator learns from unpaired pictures and from pairs, whose weight fades. Then any photo becomes a '
              'scene, which is measured.',
}
DRAWINGS = dict(stylegan_blocks=stylegan_blocks, translator=translator, critic=critic, heads=heads,
                segment_select=segment_select, system=system)


def main(names):
    for name in names or DRAWINGS:
        sheet = DRAWINGS[name]()
        for clash in sheet.clashes(): print(f'{name}: {clash}', file=sys.stderr)
        (IMAGES/f'{name}.svg').write_text(sheet.svg(), encoding='utf-8', newline='\n')


if __name__ == '__main__': main(sys.argv[1:])
