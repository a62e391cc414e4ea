"Drawings of the method: how a pair is judged, and everything on one page."
import torch

from scenimefy.finetune import FinetuneSettings, trainable_names
from scenimefy.losses import lambda_sup
from scenimefy.selection import SelectSettings, lbce_released
from scenimefy.semisup import SemisupSettings, term_weights
from scenimefy.stylegan import channel_plan
from scenimefy.translator import TAPS, count_parameters
from sheets import (CLASSES, CLIP_DIM, MASK, PX, QUERIES, heading, map_name, networks, scene, settings,
                    sizes_inside, times, vgg_size, weight)
from svg import BLUE, GREEN, INK, LINE, SOFT, Sheet


# ---- Stage 2

def segment_select():
    "From two pictures to scores, from scores to L_BCE and a decision."
    cfg = settings()[SelectSettings]
    s = Sheet(800, 560, 'Stage 2: how a pair is judged')
    heading(s, 20, 24, 'From an image to scores', 'the same for the photo and for the anime')
    photo, anime = scene(s, 24, 62, 62, 'photo', 'x^{p}'), scene(s, 24, 168, 62, 'anime', 'y^{p}')
    words = ['segmenter', 'Mask2Former', f'{QUERIES} queries', f'{CLASSES} classes']
    s.box(112, 60, 118, 172, words, 'frozen', bold=True, gap=20)
    for b in (photo, anime): s.arrow(b.right, (112, b.y + 31))
    what = s.stack(256, 74, 112, 44, lines=['what: class', times(QUERIES, CLASSES + 1)])
    where = s.stack(256, 178, 112, 44, lines=['where: mask', map_name((QUERIES, MASK, MASK))])
    for b in (what, where): s.arrow((230, b.y + 22), b.left)
    soft = s.box(402, 70, 142, 52, ['softmax over classes,', 'then drop “nothing”'], size=12)
    wide = s.box(402, 174, 142, 52, [f'enlarge to {PX}²,', 'sigmoid'], size=12)
    s.arrow((376, 96), soft.left)
    s.arrow((376, 200), wide.left)
    add = s.box(572, 116, 96, 62, ['multiply,', 'add over', f'{QUERIES} queries'], size=12)
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
    s.stack(24, y + 40, 104, 44, lines=['s of the photo', map_name((CLASSES, PX, PX))], size=12)
    s.stack(24, y + 126, 104, 44, lines=['s of the anime', map_name((CLASSES, PX, PX))], size=12)
    label = scene(s, 214, y + 31, 62, 'labels', 'labels', below=False)
    s.arrow((136, y + 62), (214, y + 62))
    s.text(174, y + 50, 'argmax', 12)
    count = s.box(322, y + 40, 136, 44, ['how many classes', 'own a pixel?'], size=12.5)
    s.arrow(label.right, count.left)
    words = ['L_{BCE}', 'mean over pixels of', 'log Σ e^{s} − s_{label}']
    loss = s.box(322, y + 118, 136, 60, words, 'loss', 12.5, bold=True, gap=18)
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
    for v in (best, worst): s.path([(at(v), y - 6), (at(v), y + 6)], INK, 2)
    cut = at(cfg.max_lbce)
    s.path([(cut, y - 16), (cut, y + 9)], GREEN, 2.4, '4 2')
    s.text(at(best), y + 20, f'{best:.2f}: right class, score 1, everywhere', 12, 'start')
    s.text(at(worst) + 8, y + 20, f'{worst:.2f}: wrong class, score 1', 12, 'end')
    s.text(cut, y - 26, f'the rule, {cfg.max_lbce:.1f}', 12, bold=True)
    s.text(20, y, 'L_{BCE}', 14, 'start', bold=True)
    s.note(20, y + 42, 'As long as no score exceeds 1, only pairs that agree almost nowhere reach '
                       f'{cfg.max_lbce:.1f}.')


# ---- everything

def system():
    "The whole method on one page."
    s = Sheet(800, 1178, 'Scenimefy on one page')
    heading(s, 16, 24, 'Scenimefy on one page', f'sizes for pictures of {PX} px, weights of the paper')
    _legend(s, 54)
    top = 76
    for draw, tall in ((_stage_1, 326), (_stage_2, 166), (_stage_3, 390), (_in_use, 152)):
        s.box(12, top, 776, tall, (), 'band')
        draw(s, top)
        top += tall + 20
        if draw is not _in_use: s.arrow((60, top - 20), (60, top), width=2.4)
    return s


def _legend(s, y):
    "What the shapes mean."
    kinds = {16: ('learns', 'learns'), 116: ('frozen', 'frozen'), 218: ('loss', 'loss and weight'),
             382: ('rule', 'rule')}
    for x, (kind, words) in kinds.items():
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
    s.note(26, top + 286, 'the same for both')
    rows = {'s': top + 96, 't': top + 222}
    begin = styles.side('right', .4)
    for end in rows.values(): s.arrow(begin, (128, begin[1]), (128, end), (146, end))
    s.arrow(noise.right, (128, noise.y + noise.h/2), (128, rows['t']), (146, rows['t']))
    _pyramid(s, 146, rows['s'], G, set(), 'G_{s}, the source: all frozen')
    _pyramid(s, 146, rows['t'], G, set(trainable_names(G)), f'G_{{t}}, the target: {cfg.blocks} blocks learn')
    s.note(146, rows['s'] + 50, f'blocks for maps of 4 to {PX} px')
    photo = scene(s, 400, rows['s'] - 32, 64, 'photo', 'x^{p}')
    anime = scene(s, 400, rows['t'] - 32, 64, 'anime', 'y^{p}', below=False)
    s.text(432, (rows['s'] + rows['t'])/2, f'3 × {PX}²', 12, color=SOFT)
    s.arrow((372, rows['s']), photo.left)
    s.arrow((372, rows['t']), anime.left)
    _scene_terms(s, top, photo, anime, cfg)


def _pyramid(s, x, middle, G, ours, words):
    "The blocks of a generator, small maps first."
    s.text(x, middle - 46, words, 12.5, 'start')
    for r, side in enumerate(channel_plan(PX)):
        learns = r > 0 and any(k.startswith(f'to_rgbs.{r - 1}.') for k in ours)
        tall = 24 + 7*r
        s.box(x + 32*r, middle - tall/2, 28, tall, [f'{side}'], 'learns' if learns else 'frozen', 11)


def _scene_terms(s, top, photo, anime, cfg):
    "Judges and terms on the right of Stage 1."
    bus = 484
    clip = s.box(502, top + 62, 104, 62, ['CLIP', 'ViT-B/32', f'→ {CLIP_DIM}'], 'frozen', 12, bold=True)
    words = ['VGG-19', 'conv4_4', f'→ {map_name(vgg_size())}']
    vgg = s.box(502, top + 142, 104, 62, words, 'frozen', 12, bold=True)
    critic_ = s.box(502, top + 240, 104, 50, ['critic D', '→ 1 score'], 'learns', 12, bold=True)
    for picture in (photo, anime):
        for judge in (clip, vgg):
            s.arrow(picture.right, (bus, picture.right[1]), (bus, judge.left[1]), judge.left)
    frames = scene(s, 330, top + 268, 46, 'anime')
    s.text(322, top + 291, 'anime frames y', 12, 'end')
    s.arrow(anime.bottom, (432, critic_.y + 20), (502, critic_.y + 20))
    s.arrow(frames.side('right', .5), (470, frames.y + 23), (470, critic_.y + 38), (502, critic_.y + 38))
    rows = ((top + 52, 'D_{CLIP}', 'whole pictures', cfg.lam_clip, clip),
            (top + 100, 'patch-CLIP', f'{cfg.crops} crops of {cfg.crop} px', cfg.lam_patch, clip),
            (top + 153, 'perceptual', 'features', cfg.lam_perc, vgg),
            (top + 245, 'GAN', 'y^{p} or a real y?', 1., critic_))
    for y, name, what, lam, judge in rows:
        b = s.box(634, y, 144, 40, [f'{name}, × {weight(lam)}', what], 'loss', 12, bold=True)
        s.arrow((606, b.left[1]), b.left)


def _stage_2(s, top):
    cfg = settings()[SelectSettings]
    heading(s, 26, top + 22, 'Stage 2', 'keep the pairs in which both pictures show the same things')
    photo, anime = scene(s, 26, top + 40, 44, 'photo'), scene(s, 26, top + 94, 44, 'anime')
    s.note(26, top + 150, f'new pairs, ψ = {cfg.psi:g}')
    words = ['segmenter', 'Mask2Former', f'{CLASSES} classes']
    s.box(96, top + 44, 108, 90, words, 'frozen', 12, bold=True)
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
    kept = s.box(676, top + 62, 102, 54, ['kept', f'{cfg.count:,} pairs'], 'gold', bold=True)
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
    s.text(226, top + 46, 'without partners', 12.5, 'start', bold=True)
    s.text(226, top + 224, 'with partners: the pairs of Stage 2', 12.5, 'start', bold=True)
    s.box(112, top + 60, 84, 306, (), 'learns')
    millions = count_parameters(networks()['G'])/1e6
    s.lines_at(154, top + 190, ['G', 'ResNet', f'{millions:.1f} million', 'numbers'], 12.5, bold=True)
    s.lines_at(154, top + 330, ['the same', 'for all'], 12, color=SOFT)
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
    x, cfg = 318, settings()[SemisupSettings]
    critic_size = f'{times(*sizes_inside("D")[-1][1:])} scores'
    row_size = f'{len(TAPS)} taps, {cfg.n_patches} rows of {cfg.head_dim}'
    rows = (('D_{U}', 'G(x) or a real y?', top + 62, [('GAN', w['gan'])]),
            ('F', 'patches: G(x), x; G(y), y', top + 138,
             [('SRC', w['src']), ('hDCE', w['hdce'] + w['idt'])]),
            ('D_{P}', 'G(x^{p}) or y^{p}, beside x^{p}?', top + 240, [('GAN', w['gan_sup'])]),
            ('F_{s}', 'patches: G(x^{p}), y^{p}', top + 314, [('StylePatchNCE', w['style'])]))
    for name, what, y, terms in rows:
        size = critic_size if name.startswith('D') else row_size
        s.box(x, y - 2, 172, 54, [name, what, size], 'learns', 12, bold=True, gap=15.5)
        for k, (term, lam) in enumerate(terms):
            at, tall, lines = y + 5, 40, [term, f'× {weight(lam)}']
            if len(terms) > 1: at, tall, lines = y - 4 + 32*k, 27, [f'{term}, × {weight(lam)}']
            pill = s.box(516, at, 142, tall, lines, 'loss', 12, bold=True)
            s.arrow((490, pill.left[1]), pill.left)
    s.note(x + 12, top + 377, 'In each step the critics learn first, then G and the heads.')
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
    for y in (87, 147, 179):
        s.arrow((658, top + y), (684, top + y), (684, top + 110), (709, top + 110))
    s.text(724, top + 76, 'loss of G', 13, bold=True)
    x, y, w, h = 690, top + 262, 84, 56
    s.rect(x, y, w, h, '#FFFFFF', LINE, 1, keep=True)
    def at(epoch): return x + w*(epoch - 1)/(cfg.epochs - 1), y + h - (h - 6)*lambda_sup(epoch, cfg.epochs)
    s.path([at(e) for e in range(1, cfg.epochs + 1)], BLUE, 2.4, keep=False)
    s.text(x + w/2, y + h + 13, f'epoch 1 to {cfg.epochs}', 12, color=SOFT)
    s.text(x + w/2, y + h + 31, f'{first["gan_sup"]:.0f} → {last["gan_sup"]:.2f}', 12)
    s.text(x + w/2 + 4, y - 14, '× λ_{sup}', 14, bold=True)
    for row in (265, 339): s.arrow((658, top + row), (674, top + row), (674, y + h/2), (x, y + h/2))
    s.arrow((724, y - 26), (724, top + 125))


def _in_use(s, top):
    heading(s, 26, top + 22, 'Use and measure', 'only G is kept')
    photo = scene(s, 52, top + 44, 62, 'photo', 'any photo, H × W')
    G = s.box(150, top + 54, 66, 42, ['G'], 'frozen', 15, bold=True)
    made = scene(s, 254, top + 44, 62, 'anime', 'its scene, H × W')
    s.arrow(photo.right, G.left)
    s.arrow(G.right, made.left)
    rows = (('FID', 'many scenes against anime frames: is it anime?'),
            ('L_{BCE}', 'a scene against its photo: is it the same place?'),
            ('a vote', 'people who do not know which method made what'))
    for k, (name, words) in enumerate(rows):
        y = top + 40 + 34*k
        b = s.box(378, y, 68, 26, [name], 'plain', 12.5, bold=True)
        s.text(456, y + 13, words, 12.5, 'start')
        s.arrow((316, top + 75), (350, top + 75), (350, y + 13), b.left)
