"Drawings of the networks: StyleGAN2, the translator, its critics and heads."
from functools import cache

from scenimefy.finetune import trainable_names
from scenimefy.semisup import SemisupSettings
from scenimefy.stylegan import channel_plan
from scenimefy.translator import TAPS, PatchCritic, count_parameters, footprint
from sheets import PX, fields, heading, map_name, networks, scene, settings, sizes_inside, tap_sizes, times
from svg import BLUE, INK, LINE, RED, SOFT, Box, Sheet


# ---- StyleGAN2

def stylegan_blocks():
    "Stage 1's generator, a row for each resolution, with what is frozen."
    G, plan = networks()['S'], channel_plan(PX)
    ours = set(trainable_names(G))
    counts = {k: p.numel() for k, p in G.named_parameters()}
    s = Sheet(800, 720, 'The generator of StyleGAN2 at 256 px, and what Stage 1 freezes')
    heading(s, 20, 24, 'StyleGAN2 at 256 px', 'a row for each resolution; hatched: frozen in Stage 1')
    columns = {283: 'first convolution', 453: 'second convolution', 600: 'to RGB', 716: 'picture so far'}
    for x, words in columns.items():
        s.text(x, 54, words, 12, color=SOFT)

    _styles(s, G, ours)
    _all_rows(s, G, plan, ours)
    learned = sum(counts[k] for k in ours)
    y, rest = 666, sum(counts.values()) - learned
    s.box(20, y, 22, 20, (), 'frozen')
    s.text(50, y + 10, f'frozen: {len(counts) - len(ours)} tensors, {rest:,} numbers', anchor='start')
    s.box(400, y, 22, 20, (), 'learns')
    s.text(430, y + 10, f'learns: {len(ours)} tensors, {learned:,} numbers', anchor='start')
    s.text(20, y + 38, 'Above the dashed line source and target hold the same numbers; '
                       'below it the target learns to paint anime.', 12.5, 'start')
    return s


def _styles(s, G, ours):
    "From a code to an entry for every layer."
    z = s.box(18, 84, 92, 34, [f'z, {G.style_dim}'])
    depth = len(G.style) - 1
    lines = ['mapping', f'{depth} linear', 'layers', 'style.1–8']
    mapping = s.box(18, 160, 92, 92, lines, 'frozen', 12, bold=True)
    assert depth == 8 and not any(k.startswith('style.') for k in ours)
    s.arrow(z.bottom, mapping.top)
    w = s.box(18, 294, 92, 34, [f'w, {G.style_dim}'])
    s.arrow(mapping.bottom, w.top)
    wplus = s.box(18, 370, 92, 48, ['w^{+}', times(G.n_latent, G.style_dim)], bold=True)
    s.arrow(w.bottom, wplus.top)
    s.note(16, 440, ['One w copied, or', 'two mixed: an', 'entry for each', 'circle.'])
    lines = ['A 3 × 3 layer', 'with entry i also', 'adds noise map i:', 'one number for', 'each pixel.']
    s.note(16, 524, lines)


def _all_rows(s, G, plan, ours, top=72, step=84, tall=62):
    "The rows, what leads from one to the next, and the border of what is frozen."
    rows = [_row(s, plan, side, top + r*step, tall, ours) for r, side in enumerate(plan)]
    for a, b in zip(rows, rows[1:]): _between(s, a, b)
    frozen = [not row['learns'] for row in rows]
    assert frozen == sorted(frozen, reverse=True), 'frozen rows come first'
    cut = top + sum(frozen)*step - (step - tall)/2
    s.path([(130, cut), (790, cut)], RED, 1.6, '7 4', keep=False)


def _layer_kind(names, ours):
    "Whether these layers learn: all or none."
    (learns,) = {any(k.startswith(f'{name}.') for k in ours) for name in names}
    return 'learns' if learns else 'frozen'


def _row(s, plan, side, y, tall, ours):
    "One resolution: two convolutions (at 4 px a learned map and one), to-RGB, the picture so far."
    r = [*plan].index(side)
    c, j = plan[side], r - 1
    first, second, rgb = f'convs.{2*j}', f'convs.{2*j + 1}', f'to_rgbs.{j}'
    if r == 0: first, second, rgb = 'input', 'conv1', 'to_rgb1'
    kind = _layer_kind((first, second, rgb), ours)
    s.text(134, y + 20, f'{side} px', 14, 'start', bold=True)
    s.text(134, y + 40, map_name((c, side, side)), 11.5, 'start', color=SOFT)
    start = ['conv 3 × 3, ↑ 2', f'{plan[side//2]} → {c}', first] if r else ['learned map', f'{c} × 4²', first]
    a = s.box(223, y, 120, tall, start, kind, 12)
    b = s.box(393, y, 120, tall, ['conv 3 × 3', f'{c} → {c}', second], kind, 12)
    view = s.box(560, y, 80, tall, ['conv 1 × 1', f'{c} → 3', rgb], kind, 12)
    image = s.stack(682, y + 14, 68, 36, lines=[f'3 × {side}²'], size=12)
    for one, other in ((a, b.left), (b, view.left), (view, (682, y + 31))): s.arrow(one.right, other)
    for x, entry in ((223, 2*r - 1), (393, 2*r), (560, 2*r + 1)):
        if entry >= 0: s.badge(x, y, f'{entry}')
    return dict(a=a, b=b, image=image, learns=kind == 'learns')


def _between(s, a, b):
    "From one resolution to the next: features on the left, the enlarged picture on the right."
    start, end = a['b'].side('bottom', .5), b['a'].side('top', .5)
    middle = start[1] + 5
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
    s = Sheet(800, 576, 'The translator: a ResNet generator and its five taps')
    G, inside = networks()['G'], sizes_inside('G')
    heading(s, 20, 24, 'The translator G', f'{count_parameters(G):,} numbers; sizes for a photo of {PX} px')
    middle, bars = 178, _bars(s, inside, 178)
    scene(s, 14, middle - 28, 56, 'photo', 'photo x')
    scene(s, 730, middle - 28, 56, 'anime', 'G(x)')
    s.text(42, middle + 58, f'3 × {PX}²', 12, color=SOFT)
    s.text(758, middle + 58, f'3 × {PX}²', 12, color=SOFT)
    s.arrow((70, middle), (bars[0].x, middle))
    s.arrow((bars[30].x + bars[30].w, middle), (730, middle))
    stretches = (0, 0, 262), (1, 4, 256), (7, 8, 128), (11, 20, 64), (21, 22, 128), (25, 30, 256)
    for first, last, side in stretches:
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
    s.note(bars[16].x + 34, 66, '← taps: what the patch losses compare')
    s.text((bars[17].x + bars[20].x + 21)/2, bars[17].y - 12, '256 channels', 12, color=SOFT)


def _residual_block(s, y):
    "What a block holds."
    block = networks()['G'].model[12].conv_block
    names = dict(ReflectPad='mirror 1', Conv2d='conv 3', InstanceNorm='norm', ReLU='ReLU')
    parts = [names[type(m).__name__] for m in block]
    s.text(20, y + 30, 'A block:', 13, 'start', bold=True)
    x, last = 128, None
    s.arrow((92, y + 30), (x, y + 30))
    for words in parts:
        kind = 'learns' if words == 'conv 3' else 'quiet'
        b = s.box(x, y + 15, 64, 30, [words], kind, 12)
        if last: s.arrow(last.right, b.left)
        last, x = b, x + 78
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
    for words, dy in (('tap', 8), ('tensor', 38), ('one column sees', 66)):
        s.text(20, y + dy, words, anchor='start', bold=True)
    for x, t, size in zip(columns, TAPS, channels):
        s.badge(x, y + 8, f'{t}', 12, 12, '#FFF1E0', RED)
        s.text(x, y + 38, map_name(size), 13)
        s.text(x, y + 66, f'{seen[t]} × {seen[t]} px' if seen[t] > 1 else '1 pixel', 13)
    s.path([(20, y + 23), (780, y + 23)], LINE, 1)
    notes = ['A bar is as tall as its map; inside: channels; below: number of the module. '
             'White bars have nothing to learn.',
             'Not drawn: norm and ReLU after every convolution but the last, and the pad before module 30.']
    s.note(20, y + 96, notes)


# ---- the critic

def critic():
    "A patch critic: what one of its scores sees, and its layers."
    D, D_p, inside = networks()['D'], networks()['D_p'], sizes_inside('D')
    s = Sheet(800, 462, 'The patch critics and what one score sees')
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
    for share in (0, 1):
        s.path([patch.side('right', share), one.side('left', share)], RED, 1.4, '6 4', keep=False)
    s.rect(*one, RED, RED, 1.5)
    s.lines_at(320, 152, ['one score sees', f'{seen} × {seen} px'], 13, bold=True)
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
    s.note(40, y + 88, 'Leaky ReLU follows each convolution but the last; a norm comes between, '
                       'except after the first.')


# ---- the heads

SPOTS = ((.2, .25), (.7, .15), (.45, .5), (.85, .6), (.25, .8), (.65, .85))   # relative, for the eye only


def heads():
    "From the taps of two pictures to unit rows, and their similarities."
    F, cfg = networks()['F'], settings()[SemisupSettings]
    s = Sheet(800, 500, 'Patch heads: from taps to unit vectors and their similarities')
    heading(s, 20, 24, 'Patch heads', f'{count_parameters(F):,} numbers in F, and as many in F_{{s}}')
    rows = {'queries': (96, 'anime', 'G(x)'), 'keys': (276, 'photo', 'x')}
    s.box(104, 74, 66, 306, ['encoder', 'of G,', 'modules', f'0 to {TAPS[-1]}'], 'learns', 12)
    s.box(466, 74, 130, 306, (), 'learns')
    layers = [f'linear C → {F.dim}', 'ReLU', f'linear {F.dim} → {F.dim}', 'length 1']
    s.lines_at(531, 178, ['F, for each tap:', *layers], 12.5, bold=True, gap=24)
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
    count = f'{cfg.n_patches} positions for each tap,'
    s.lines_at(318, 232, [count, 'drawn anew in each step,', 'the same in both pictures'], 12.5)
    _matrix(s, 694, 172, 92, cfg)
    s.arrow((682, 129), (740, 129), (740, 170))
    s.arrow((682, 309), (740, 309), (740, 266))
    for k, (a, b, c) in enumerate((('F', 'G(x) with x, and G(y) with y', 'SRC, hDCE: the content stays'),
                                   ('F_{s}', 'G(x^{p}) with y^{p}', 'StylePatchNCE: the pair is the goal'))):
        y = 424 + 26*k
        s.text(20, y, a, 14, 'start', bold=True)
        s.text(56, y, b, 13, 'start')
        s.text(330, y, c, 13, 'start')
    s.note(20, 480, 'Five taps, so five comparisons; their mean is the loss. '
                    'A pixel of a tap is a column of C numbers.')
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
    words = ['similarities', times(cfg.n_patches, cfg.n_patches), 'dark: the', 'same place']
    s.lines_at(x + side/2, y + side + 86, words, 12)
