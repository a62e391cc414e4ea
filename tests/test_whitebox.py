"""White-box: the filter against least squares, pieces against a slow twin that knows no forest, and a step
against its losses written out."""
import copy

import numpy as np
import pytest
import torch

import scenimefy.whitebox as W
from scenimefy.baselines import total_variation
from scenimefy.core import SettingsError, seeded
from scenimefy.painters import render, write_world
from scenimefy.priors import load_clip
from scenimefy.runs import checkpoints, read_checkpoint, run_training
from scenimefy.translator import give_tone, load_translator, map_colors
from scenimefy.whitebox import (WHITEBOX, Pieces, WhiteboxRun, WhiteboxSettings, box, color_pieces,
                                draw_shift, guided_filter, piece_color, structure, superpixels, surface,
                                texture, whitebox_paint, whitebox_step, whitebox_weights)
from scenimefy.world import HELD_OUT, scenes
from tape import Tape

SMALL = WhiteboxSettings.preset('tiny').but(
    size=32, load_size=32, ngf=4, n_blocks=5, ndf=4, n_patches=16, epochs=2, epoch_steps=2, log_every=1,
    sample_every=4, save_every=2, **WHITEBOX)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp('whitebox'), n_photos=5, n_anime=5, n_pairs=4, size=40)


def start(world, folder, **changes):
    data = world/'photos', world/'anime', world/'pairs'
    return WhiteboxRun(SMALL.but(**changes), *data, folder, device='cpu')


def first_batch(r): return next(iter(r.feed()))


def noise(key, *shape, dtype=torch.float32):
    return torch.rand(*shape, generator=seeded('whitebox', key), dtype=dtype)*1.9 - .95


# ---- the filter

def by_regressions(guide, x, radius, eps):
    "One channel: least squares in every window, numpy's solver, lines averaged over the windows of a pixel."
    h, w = guide.shape
    total, count = np.zeros((h, w, 2)), np.zeros((h, w))
    for i in range(h):
        for j in range(w):
            here = np.s_[max(0, i - radius):i + radius + 1, max(0, j - radius):j + radius + 1]
            n = guide[here].size
            rows = np.stack([guide[here].ravel(), np.ones(n)], 1)
            rows = np.append(rows, [[np.sqrt(n*eps), 0.]], 0)   # the price of the slope, as an equation
            line = np.linalg.lstsq(rows, np.append(x[here].ravel(), 0.), rcond=None)[0]
            total[here] += line
            count[here] += 1
    line = total/count[..., None]
    return line[..., 0]*guide + line[..., 1]


@pytest.mark.parametrize('radius, eps', [(1, .01), (2, .2), (3, .05)])
def test_the_filter_is_a_regression_in_every_window(radius, eps):
    guide, x = (noise(k, 2, 3, 7, 9, dtype=torch.double) for k in ('guide', 'picture'))
    got = guided_filter(guide, x, radius, eps).numpy()
    for b in range(2):
        for c in range(3):
            want = by_regressions(guide[b, c].numpy(), x[b, c].numpy(), radius, eps)
            np.testing.assert_allclose(got[b, c], want, atol=1e-10)


def test_the_window_is_cut_at_the_border():
    x = noise('box', 1, 1, 5, 6)
    for i in range(5):
        for j in range(6):
            window = x[0, 0, max(0, i - 2):i + 3, max(0, j - 2):j + 3]
            assert torch.isclose(box(x, 2)[0, 0, i, j], window.mean(), atol=1e-6)


def test_limits_of_the_filter():
    p = noise('limits', 2, 3, 12, 10, dtype=torch.double)
    torch.testing.assert_close(guided_filter(p, p, 2, 1e-13), p, atol=1e-9, rtol=0)
    torch.testing.assert_close(guided_filter(p, p, 2, 1e12), box(box(p, 2), 2), atol=1e-9, rtol=0)
    torch.testing.assert_close(surface(torch.full((1, 3, 16, 16), .4)), torch.full((1, 3, 16, 16), .4))
    faint = .2*p
    assert surface(faint).var() < .1*faint.var()


def test_a_guide_of_other_contrast_says_the_same():
    "A line in the guide is a line in 2 - 3·guide, if the price of the slope is counted in the new unit."
    guide, x = (noise(k, 1, 3, 9, 9, dtype=torch.double) for k in ('g', 'x'))
    torch.testing.assert_close(guided_filter(2 - 3*guide, x, 1, 9*.02), guided_filter(guide, x, 1, .02))
    torch.testing.assert_close(guided_filter(guide, 2*x + 1, 1, .02), 2*guided_filter(guide, x, 1, .02) + 1)


def test_an_edge_of_the_guide_stays_an_edge():
    edge = torch.full((1, 1, 9, 16), -.5)
    edge[..., 8:] = .5
    torch.testing.assert_close(guided_filter(edge, edge, 2, 1e-4), edge, atol=2e-3, rtol=0)
    without = guided_filter(torch.zeros_like(edge), edge, 2, 1e-4)           # a guide that knows of no edge
    assert (without - edge).abs().max() > .3


@pytest.mark.parametrize('side, radius', [(8, 1), (32, 1), (64, 2), (128, 4), (256, 8)])
def test_the_windows_of_a_surface_grow_with_the_picture(side, radius):
    x = noise('surface', 1, 3, side, side)
    assert torch.equal(surface(x), guided_filter(x, x, radius, .2))


def test_gradients_against_finite_differences():
    guide, x = (noise(k, 1, 2, 5, 4, dtype=torch.double).requires_grad_() for k in ('g', 'x'))
    assert torch.autograd.gradcheck(lambda g, p: guided_filter(g, p, 1, .1), (guide, x))
    assert torch.autograd.gradcheck(surface, (x,))


# ---- pieces

def slow_pieces(image, scale):
    "The rule, told with sets and with the definition of `in`: the largest step of a smallest spanning tree."
    _, h, w = image.shape
    color = {(i, j): image[:, i, j].double() for i in range(h) for j in range(w)}
    def step(p, q): return (color[p] - color[q]).norm().item()
    def beside(p): return [q for q in ((p[0], p[1] + 1), (p[0] + 1, p[1])) if q in color]
    pairs = sorted((step(p, q), p, q) for p in color for q in beside(p))
    def inner(piece):
        "Prim's tree from any pixel of the piece."
        reached, largest = {next(iter(piece))}, 0.
        while reached < piece:
            d, p, q = min((d, p, q) for d, p, q in pairs
                          if {p, q} <= piece and (p in reached) != (q in reached))
            reached |= {p, q}
            largest = max(largest, d)
        return largest
    owner = {p: frozenset([p]) for p in color}
    for d, p, q in pairs:
        a, b = owner[p], owner[q]
        if a is b or d > min(inner(a) + scale/len(a), inner(b) + scale/len(b)): continue
        for s in a | b: owner[s] = a | b
    return set(owner.values())


def as_sets(pieces):
    found = {}
    for i, row in enumerate(pieces.tolist()):
        for j, k in enumerate(row): found.setdefault(k, set()).add((i, j))
    assert sorted(found) == list(range(len(found)))                  # numbered without gaps
    return {frozenset(s) for s in found.values()}


@pytest.mark.parametrize('scale', [.5, .8, 2.])
def test_pieces_are_those_of_a_slow_twin(scale):
    image = noise('pieces', 3, 6, 7)
    found = as_sets(superpixels(image, scale, smallest=1, sigma=0))
    assert found == slow_pieces(image, scale)
    assert 1 < len(found) < 42


def together(piece):
    "Whether one can walk from any pixel of a set to any other without leaving it."
    seen, new = set(), [next(iter(piece))]
    while new:
        i, j = new.pop()
        if (i, j) in seen: continue
        seen.add((i, j))
        new += [q for q in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)) if q in piece]
    return seen == piece


def test_pieces_hang_together_and_none_is_too_small():
    image = noise('hang', 3, 20, 24)
    for smallest in (5, 20):
        found = as_sets(superpixels(image, .1, smallest, sigma=0))
        assert len(found) > 3 and all(len(p) >= smallest and together(p) for p in found)
    assert min(len(p) for p in as_sets(superpixels(image, .1, 1, sigma=0))) == 1
    assert torch.equal(superpixels(image), superpixels(image))
    assert superpixels(torch.zeros(3, 9, 5)).max() == 0


def test_a_blur_calms_grain():
    grain = .1*noise('grain', 3, 24, 24)
    raw, blurred = (superpixels(grain, .1, 1, sigma).max() for sigma in (0, .8))
    assert blurred < .5*raw


def test_the_larger_piece_keeps_its_root():
    pieces = Pieces(5)
    pieces.join(0, 1, .1)
    pieces.join(2, 0, .4)
    assert [pieces.root(i) for i in range(5)] == [0, 0, 0, 3, 4]
    assert pieces.size[0] == 3 and pieces.inner[0] == .4


# ---- colors of pieces

def test_colors_piece_by_piece():
    image, pieces = noise('colors', 3, 8, 8), torch.arange(8)[:, None].expand(8, 8)
    got = color_pieces(image, pieces)
    for k in range(8):
        rows = [sorted(image[c, k].tolist()) for c in range(3)]
        unrest = sum(np.std(row) for row in rows)/3*127.5
        assert unrest > 40
        median = torch.tensor([(row[3] + row[4])/2 for row in rows])
        torch.testing.assert_close(got[:, k], median[:, None].expand(3, 8))
    calm = .05*image + .2
    torch.testing.assert_close(color_pieces(calm, pieces)[:, 2, 0], calm[:, 2].mean(1))


@pytest.mark.parametrize('last, expected', [(120, 105), (170, 108.75), (200, 100)])
def test_three_kinds_of_pieces(last, expected):
    levels = np.array([[100., 100, 100, last], [100, 100, 100, last], [100, 100, 100, last]])
    np.testing.assert_allclose((piece_color(levels/127.5 - 1) + 1)*127.5, expected)


def test_a_strong_color_is_not_restless():
    "What counts is how a channel differs from place to place, and not from the other channels."
    red = np.array([[1., 1, 1, .9], [-1, -1, -1, -1], [-1, -1, -1, -1]])
    np.testing.assert_allclose(piece_color(red), red.mean(1))


def test_structure_is_flat_and_its_power_darkens():
    x = noise('structure', 2, 3, 24, 24)
    plain = structure(x, 1.)
    for image, original in zip(plain, x):
        pieces = superpixels(original, smallest=2)                  # 12 of 64 px: 1.7 of 24 px
        for k in range(pieces.max() + 1): assert image[:, pieces == k].std(1, correction=0).max() < 1e-6
    torch.testing.assert_close(structure(x), 2*((plain + 1)/2)**1.2 - 1)
    assert structure(3*x).isfinite().all() and structure(3*x).abs().max() <= 1
    assert not structure(x.requires_grad_()).requires_grad


@pytest.mark.parametrize('side, smallest', [(64, 12), (128, 48)])
def test_the_smallest_piece_grows_with_the_picture(side, smallest):
    x = .1*noise('smallest', 3, side, side)
    assert superpixels(x).max() > superpixels(x, smallest=48).max()
    colors = color_pieces(x, superpixels(x, smallest=smallest))
    torch.testing.assert_close(structure(x[None], 1.)[0], colors, atol=1e-6, rtol=0)


def test_squares_cost_what_the_solution_of_the_exercise_says():
    tokens, paid = load_clip('tiny').tokens, []
    for first, n in ((40_000, 6), (40_100, 16)):
        drawn = scenes(range(HELD_OUT + first, HELD_OUT + first + n), 'photo')
        for style in ('photo', 'anime'):
            images = render(drawn, 64, style)
            squares = images.unflatten(2, (16, 4)).unflatten(4, (16, 4)).mean((3, 5), keepdim=True)
            squares = squares.expand(-1, -1, -1, 4, -1, 4).reshape(images.shape)
            paid.append(round((tokens(images) - tokens(squares)).abs().mean().item(), 3))
    assert paid == [.369, .347, .401, .401]


# ---- texture and variation

def test_texture_pixel_by_pixel():
    x, shift = noise('texture', 2, 3, 4, 5), draw_shift(3, 1)
    got = texture(x, shift)
    assert got.shape == (2, 1, 4, 5)
    r, g, b = x.unbind(1)
    b1, b2, b3 = shift.tolist()
    want = .2*(b1*r + b2*g + b3*b) + .8*(.299*r + .587*g + .114*b)
    torch.testing.assert_close(got[:, 0], want)


def test_shifts_fill_their_range_and_follow_their_keys():
    draws = torch.stack([draw_shift(0, k, 0) for k in range(1500)])
    assert draws.min() < -.99 and draws.max() > .99 and draws.abs().max() <= 1
    assert (draws.mean(0).abs() < .06).all() and (draws.std(0) - 3**-.5).abs().max() < .03
    correlated = torch.corrcoef(draws.T).fill_diagonal_(0)
    assert correlated.abs().max() < .1
    assert not torch.equal(draw_shift(0, 1, 0), draw_shift(1, 1, 0))
    assert not torch.equal(draw_shift(0, 1, 0), draw_shift(0, 1, 1))


# ---- the training

@pytest.mark.parametrize('tone', ['own', 'style'])
def test_a_step_says_what_a_slow_twin_says(world, tmp_path, tone):
    w = dict(surface=.3, texture=.7, structure=1.5, content=1.2, tv=2.)
    r = start(world, tmp_path, tone=tone, power=1.1, **{f'lam_{k}': v for k, v in w.items()})
    nets, (x, y, xp, yp) = copy.deepcopy(r.nets), first_batch(r)
    r.step = 1
    got = {k: float(v) for k, v in r.take_step((x, y, xp, yp)).items()}
    shift = 2*torch.rand(3, generator=seeded('color shift', r.cfg.seed, 1, 0)) - 1
    with torch.no_grad():
        goal, fake = x, nets.G(x)
        if tone == 'style':
            goal = map_colors(x, nets.palette)
            fake = give_tone(fake, goal)
        fake = guided_filter(x, fake, 1, .01)
        views = {'D_s': lambda i: guided_filter(i, i, 1, .2), 'D_t': lambda i: texture(i, shift)}
        for name, view in views.items():
            critic = getattr(nets, name)
            d = .5*((critic(view(y)) - 1).square().mean() + critic(view(fake)).square().mean())
            assert abs(got[name] - d) < 1e-5, name
        assert abs(got['content'] - (r.tokens(fake) - r.tokens(goal)).abs().mean()) < 1e-5
        pieces = structure(fake, 1.1)
        assert abs(got['structure'] - (r.tokens(fake) - r.tokens(pieces)).abs().mean()) < 1e-4
        assert abs(got['tv'] - total_variation(fake)) < 1e-5
    assert abs(got['total'] - sum(v*got[k] for k, v in w.items())) < 1e-4
    for k, net in r.nets.present().items():
        moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), getattr(nets, k).parameters())]
        assert sum(moved) > .5*len(moved), f'{k} did not learn'


def test_the_translator_meets_critics_that_have_learned(world, tmp_path):
    r = start(world, tmp_path)
    batch, before = first_batch(r), copy.deepcopy(r.nets.G)
    got = r.take_step(batch)
    with torch.no_grad():
        fake = guided_filter(batch[0], before(batch[0]))
        shift = draw_shift(r.cfg.seed, 0, 0)
        for name, critic, view in (('surface', r.nets.D_s, surface(fake)),
                                   ('texture', r.nets.D_t, texture(fake, shift))):
            assert abs(got[name] - (critic(view) - 1).square().mean()) < 1e-5, name


def test_the_structure_is_a_target_and_holds_still(world, tmp_path):
    "The gradient of the structure loss is that towards a constant picture."
    r, log = start(world, tmp_path, lam_surface=0., lam_texture=0., lam_tv=0., lam_content=1e-6), []
    x = (batch := first_batch(r))[0]
    r.optims = {'G': Tape('G', r.nets.G, log)}
    whitebox_step(r, batch, whitebox_weights(r.cfg, 1))
    fake = guided_filter(x, r.nets.G(x))
    loss = (r.tokens(fake) - r.tokens(structure(fake.detach(), 1.))).abs().mean()
    (wanted,) = torch.autograd.grad(loss, [r.nets.G.model[1].weight])
    ((_, gradients),) = log
    torch.testing.assert_close(gradients['model.1.weight'], wanted*r.cfg.lam_structure, atol=1e-4, rtol=1e-2)


def test_anime_and_translation_are_shifted_alike(world, tmp_path, monkeypatch):
    r, shifts = start(world, tmp_path), []
    def remembered(images, shift):
        shifts.append(shift)
        return texture(images, shift)
    monkeypatch.setattr(W, 'texture', remembered)
    batch = first_batch(r)
    for r.step in (0, 1): whitebox_step(r, batch, whitebox_weights(r.cfg, 1))
    assert len(shifts) == 6 and all(torch.equal(s, shifts[0]) for s in shifts[:3])
    assert all(torch.equal(s, shifts[3]) for s in shifts[3:]) and not torch.equal(shifts[0], shifts[3])


def test_gradients_are_averaged_before_every_update(world, tmp_path):
    r, log = start(world, tmp_path), []
    r.optims = {n: Tape(n, net, log) for n, net in r.nets.present().items()}
    r.sync_gradients = lambda names: log.append(('average', names))
    whitebox_step(r, first_batch(r), whitebox_weights(r.cfg, 1))
    assert [what if n == 'average' else n for n, what in log] == [['D_s'], 'D_s', ['D_t'], 'D_t', ['G'], 'G']
    taken = dict(entry for entry in log if entry[0] != 'average')
    for critic in ('D_s', 'D_t'):                      # what the translator learns leaves no trace in them
        for k, p in getattr(r.nets, critic).named_parameters():
            assert torch.equal(p.grad, taken[critic][k])


def test_what_has_no_weight_has_no_critic(world, tmp_path):
    assert set(start(world, tmp_path/'all').nets.present()) == {'G', 'D_s', 'D_t'}
    r = start(world, tmp_path/'one', lam_surface=0.)
    assert set(r.nets.present()) == {'G', 'D_t'} == set(r.optims)
    terms = {'texture', 'structure', 'content', 'tv'}
    assert set(r.take_step(first_batch(r))) == {'D_t', *terms, 'total', 'epoch'}


def test_critics_follow_from_the_seed(world, tmp_path):
    def first(name, **changes):
        torch.rand(5)                                                    # what happened before does not count
        return next(getattr(start(world, tmp_path/'s', **changes).nets, name).parameters())
    for name, channels in (('D_s', 3), ('D_t', 1)):
        assert torch.equal(first(name), first(name)) and first(name).shape[1] == channels
        assert not torch.equal(first(name), first(name, seed=1))
    def depth(n): return len(list(start(world, tmp_path/'s', n_layers=n).nets.D_s.parameters()))
    assert depth(1) < depth(2) < depth(3)
    assert first('D_s', init='xavier').std() < .03 < first('D_s').std()


def test_warmup_moves_the_translator_alone(world, tmp_path):
    r = start(world, tmp_path, warmup=1)
    before = copy.deepcopy(r.nets)
    assert set(r.take_step(first_batch(r))) == {'content', 'total', 'epoch'}
    for name in ('D_s', 'D_t'):
        pairs = zip(getattr(r.nets, name).parameters(), getattr(before, name).parameters())
        assert all(torch.equal(p, q) for p, q in pairs)
    assert not all(torch.equal(p, q) for p, q in zip(r.nets.G.parameters(), before.G.parameters()))
    assert all(whitebox_weights(r.cfg, 2).values())


def test_critics_see_scenes_in_the_tone_of_their_goal(world, tmp_path):
    def seen(tone):
        r, shown = start(world, tmp_path/tone, tone=tone), []
        x = (batch := first_batch(r))[0]
        def critic_step(critic, real, fakes):
            shown.append(fakes[0][0])
            return torch.zeros(())
        r.critic_step = critic_step
        whitebox_step(r, batch, whitebox_weights(r.cfg, 1))
        goal = x if tone == 'own' else map_colors(x, r.nets.palette)
        return (shown[0].mean((2, 3)) - goal.mean((2, 3))).abs().max()
    assert seen('style') < .03 < seen('own')


def test_two_lives_equal_one(world, tmp_path):
    whole = start(world, tmp_path/'whole')
    run_training(whole)
    cut = start(world, tmp_path/'cut')
    cut.n_steps = 2
    run_training(cut)
    run_training(start(world, tmp_path/'cut'), resume=True)
    a, b = (read_checkpoint(checkpoints(tmp_path/k)[-1])[0] for k in ('whole', 'cut'))
    assert set(a) == set(b)
    for start_of_name in ('optim/D_t/', 'optim/D_s/', 'net/D_t.', 'net/D_s.'):
        assert any(k.startswith(start_of_name) for k in a)
    # other tests draw from the global generator
    assert all(torch.equal(a[k], b[k]) for k in a if k != 'rng/cpu')
    net = load_translator(tmp_path/'whole'/'translator.safetensors')
    assert whitebox_paint(net, noise('shown', 2, 3, 32, 32)).shape == (2, 3, 32, 32)


def test_painting_is_filtered_by_the_photo():
    net, x = load_translator('copy'), noise('paint', 2, 3, 32, 32)
    with torch.no_grad(): scene = net.paint(x)
    full, half, none = (whitebox_paint(net, x, amount) for amount in (1., .5, 0.))
    torch.testing.assert_close(full, guided_filter(x, scene, 1, .01).clamp(-1, 1))
    torch.testing.assert_close(none, scene.clamp(-1, 1))
    torch.testing.assert_close(half, ((scene + guided_filter(x, scene, 1, .01))/2).clamp(-1, 1))
    assert not full.requires_grad


@pytest.mark.parametrize('shape', [(1, 3, 61, 63), (1, 3, 64, 62), (1, 3, 6, 8)])
def test_painting_refuses_sides_that_the_network_would_change(shape):
    net = load_translator('copy')
    with pytest.raises(ValueError, match='multiples of 4'): whitebox_paint(net, noise('odd', *shape))


@pytest.mark.parametrize('spoil, told', [
    (lambda x: 127.5*x + 127.5, r'must lie in \[-1,1\]'), (lambda x: x*float('nan'), 'must lie'),
    (lambda x: x[0], r'expected float \(B,3,H,W\)'), (lambda x: x[:, :1], 'expected float'),
    (lambda x: x.to(torch.uint8), 'expected float')])
def test_painting_refuses_what_is_no_photo(spoil, told):
    net, photos = load_translator('copy'), spoil(noise('odd', 1, 3, 64, 64))
    with pytest.raises(ValueError, match=told): whitebox_paint(net, photos)


def test_weights_of_the_released_code_at_256_px():
    assert round(200/(32*32*512), 4) == .0004        # conv4_4 has an eighth of the side and 512 channels
    assert round(10_000/(3*256*256), 2) == .05


def test_refusals(world, tmp_path):
    with pytest.raises(SettingsError, match='fp32'): start(world, tmp_path, precision='bf16')
    with pytest.raises(SettingsError, match='warmup'): start(world, tmp_path, warmup=2)
    with pytest.raises(SettingsError, match='must be one of'): SMALL.but(method='CUT')
    with pytest.raises(SettingsError, match='out of range'): SMALL.but(lam_tv=-1.)
    assert WhiteboxSettings.from_json(SMALL.to_json()) == SMALL
