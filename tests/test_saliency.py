"""CTSS: maps against slow loops, windows whose order is planted, gradients that pass the pixels and not the
choice, and a run that resumes exactly."""
import copy

import pytest
import torch
import torch.nn.functional as F

import scenimefy.saliency as S
from scenimefy.baselines import color_reconstruction, total_variation
from scenimefy.core import SettingsError, seeded
from scenimefy.painters import write_world
from scenimefy.runs import checkpoints, read_checkpoint, run_training
from scenimefy.saliency import (CTSS, SaliencyRun, SaliencySettings, clear_edges, ctss_step, cut_out,
                                edge_strength, most_salient, salient_patches, saliency, saliency_weights,
                                smoothed, stretched)
from scenimefy.translator import load_translator, map_colors
from tape import Tape, slopes

SMALL = SaliencySettings.preset('tiny').but(
    **CTSS, size=32, load_size=32, ngf=4, n_blocks=5, ndf=4, head_dim=8, n_patches=16, epochs=2,
    epoch_steps=2, log_every=1, sample_every=4, save_every=2)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp('saliency'), n_photos=5, n_anime=5, n_pairs=4, size=40)


def start(world, folder, **changes):
    cfg = SMALL.but(**changes)
    return SaliencyRun(cfg, world/'photos', world/'anime', world/'pairs', folder, device='cpu')


def first_batch(r): return next(iter(r.feed()))


def noise(key, *shape, dtype=torch.float32):
    return torch.rand(*shape, generator=seeded('saliency', key), dtype=dtype)*1.9 - .95


def light(x): return .299*x[:, 0] + .587*x[:, 1] + .114*x[:, 2]


# ---- the map

def test_edge_strength_against_a_loop_with_mirrored_borders():
    x = noise('edges', 2, 3, 5, 6)
    g = light(x)
    def at(b, i, j):
        i, j = abs(i), abs(j)
        return g[b, 8 - i if i > 4 else i, 10 - j if j > 5 else j].item()
    for b in range(2):
        for i in range(5):
            for j in range(6):
                m, left, right = at(b, i, j), at(b, i, j - 1), at(b, i, j + 1)
                above, below = at(b, i - 1, j), at(b, i + 1, j)
                slopes_here = abs(right - left) + abs(below - above)
                by_hand = slopes_here + abs(2*m - left - right) + abs(2*m - above - below)
                assert edge_strength(x)[b, 0, i, j].item() == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize('radius', [1, 2])
def test_smoothed_against_the_regression_that_the_guided_filter_is(radius):
    "In every window the line a·x + b that fits x with the penalty eps·a²; a pixel averages its lines."
    x, eps = noise('guided', 1, 1, 6, 7, dtype=torch.double), .2
    def window(i, j):
        rows = slice(max(0, i - radius), i + radius + 1)
        return x[0, 0, rows, max(0, j - radius):j + radius + 1].flatten()
    a, b = torch.zeros(6, 7, dtype=torch.double), torch.zeros(6, 7, dtype=torch.double)
    for i in range(6):
        for j in range(7):
            p = window(i, j)
            design = torch.stack([p, torch.ones_like(p)], 1)
            normal = design.T @ design/len(p) + torch.diag(torch.tensor([eps, 0.], dtype=torch.double))
            a[i, j], b[i, j] = torch.linalg.solve(normal, design.T @ p/len(p))
    for i in range(6):
        for j in range(7):
            near = slice(max(0, i - radius), i + radius + 1), slice(max(0, j - radius), j + radius + 1)
            line = a[near].mean()*x[0, 0, i, j] + b[near].mean()
            assert smoothed(x, radius, eps)[0, 0, i, j].item() == pytest.approx(line.item(), abs=1e-9)


def test_large_eps_leaves_the_average_of_averages_and_channels_are_apart():
    x = noise('box', 1, 3, 9, 9)
    def mean(t): return F.avg_pool2d(t, 3, 1, 1, count_include_pad=False)
    assert torch.allclose(smoothed(x, 1, 1e6), mean(mean(x)), atol=1e-5)
    other = x.clone()
    other[:, 0] = .5
    assert torch.equal(smoothed(other, 1)[:, 1:], smoothed(x, 1)[:, 1:])


def test_the_map_is_scaled_by_the_whole_batch():
    weak, strong = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    weak[..., 8:], strong[..., 8:] = .1, 1.
    alone = clear_edges(edge_strength(weak))[0]
    beside = clear_edges(edge_strength(torch.cat([weak, strong])))
    assert alone.max().item() == pytest.approx(1/1.04, abs=1e-5)
    assert beside[0].max().item() == pytest.approx(.01/.05, abs=1e-5)
    assert beside[1].max().item() == pytest.approx(1/1.04, abs=1e-5)


def test_an_even_picture_has_no_saliency_and_no_nan():
    for value in (-1., 0., .3, 1.):
        assert saliency(torch.full((2, 3, 32, 32), value)).abs().max() < 1e-3


@pytest.mark.parametrize('side, radius', [(16, 1), (64, 1), (128, 2), (256, 5)])
def test_the_filter_grows_with_the_picture(side, radius, monkeypatch):
    asked = []
    monkeypatch.setattr(S, 'smoothed', lambda x, r: asked.append(r) or x)
    saliency(torch.zeros(1, 3, side, side))
    assert asked == [radius]


def test_grain_is_less_salient_than_strokes():
    grain = .15*torch.randn(1, 3, 64, 64, generator=seeded('saliency', 'grain'))
    grain[..., 32:, 32:] += (torch.arange(32) // 4 % 2)*1.2                  # stripes of 4 px in one corner
    place = most_salient(saliency(grain), 24, 4, 1)[0].tolist()
    assert place[1] >= 28 and place[2] >= 28


# ---- the sampler

def with_lines(spots, n=2, size=32):
    "Pictures that are even, but for windows of 8 px: {(picture, top, left): number of lines}."
    x = torch.zeros(n, 3, size, size)
    for (b, t, l), lines in spots.items():
        for k in range(lines): x[b, :, t:t + 8, l + 2*k] = 1.
    return x


def test_a_planted_order_is_found_over_the_whole_mini_batch():
    spots = {(1, 24, 24): 4, (0, 0, 8): 3, (1, 8, 0): 2, (0, 16, 16): 1}
    maps = clear_edges(edge_strength(with_lines(spots)))
    for n in range(1, 5):
        assert [tuple(p) for p in most_salient(maps, 8, 8, n).tolist()] == list(spots)[:n]


@pytest.mark.parametrize('size', [64, 96, 128, 256, 512])
def test_a_translation_has_nine_windows_at_any_size(size):
    side = S._side(SMALL.but(size=size, load_size=size))
    assert len(most_salient(torch.zeros(1, 1, size, size), side, round(S._HOP_FAKE*side), 99)) == 9


def test_one_lively_picture_may_take_all_patches():
    x = torch.zeros(3, 3, 32, 32)
    x[1] = noise('lively', 3, 32, 32)
    assert set(most_salient(saliency(x), 12, 6, 12)[:, 0].tolist()) == {1}


def test_scores_are_means_of_windows_on_the_grid():
    maps = noise('scores', 2, 1, 20, 23).abs()
    found = most_salient(maps, 6, 4, 1000)
    grid = [(b, t, l) for b in range(2) for t in range(0, 15, 4) for l in range(0, 18, 4)]
    assert sorted(tuple(p) for p in found.tolist()) == grid
    scores = cut_out(maps, found, 6).mean((1, 2, 3))
    assert (scores.diff() <= 1e-6).all()


def test_ties_go_to_the_first_in_reading_order():
    maps = torch.zeros(2, 1, 16, 16)
    maps[1, 0, 8:, 8:] = .5
    maps[0, 0, :8, 8:] = .5
    want = [[0, 0, 8], [1, 8, 8], [0, 0, 0], [0, 8, 0], [0, 8, 8], [1, 0, 0], [1, 0, 8], [1, 8, 0]]
    assert most_salient(maps, 8, 8, 99).tolist() == want
    assert most_salient(maps, 8, 8, 3).tolist() == want[:3]


def test_cut_out_takes_these_pixels_of_these_pictures():
    x = torch.arange(2*2*5*6.).view(2, 2, 5, 6)
    got = cut_out(x, torch.tensor([[1, 2, 3], [0, 0, 0], [1, 2, 3]]), 2)
    assert torch.equal(got[0], x[1, :, 2:4, 3:5]) and torch.equal(got[1], x[0, :, :2, :2])
    assert torch.equal(got[2], got[0])


# ---- what passes back

def test_gradient_reaches_chosen_pixels_only_and_passes_through_no_choice():
    x = noise('gradient', 2, 3, 24, 24).requires_grad_()
    weight = noise('weight', 5, 1, 8, 8)
    (salient_patches(x, 8, 4, 5)*weight).sum().backward()
    assert not saliency(x).requires_grad           # a map that remembers its pictures would cost memory
    places = most_salient(saliency(x.detach()), 8, 4, 5)
    inside = torch.zeros(2, 24, 24, dtype=torch.bool)
    for b, t, l in places.tolist(): inside[b, t:t + 8, l:l + 8] = True
    assert 0 < inside.float().mean() < .5
    assert (x.grad.abs().sum(1)[~inside] == 0).all() and (x.grad.abs().sum(1)[inside] > 0).all()
    fixed = x.detach().clone().requires_grad_()
    patches = torch.stack([light(fixed)[b, t:t + 8, l:l + 8] for b, t, l in places.tolist()])
    low, high = (f(patches, (1, 2)).view(-1, 1, 1) for f in (torch.amin, torch.amax))
    (((patches - low)/(high - low))[:, None]*weight).sum().backward()
    assert torch.allclose(x.grad, fixed.grad, atol=1e-5)


@pytest.mark.parametrize('name', ['stretched', 'smoothed'])
def test_gradients_against_finite_differences(name):
    loss = dict(stretched=lambda a: stretched(a).square().sum(),
                smoothed=lambda a: smoothed(a, 1).square().sum())[name]
    a = noise('free', 2, 3, 4, 5, dtype=torch.double).requires_grad_()
    assert torch.autograd.gradcheck(loss, (a,), atol=1e-4)


def test_an_even_patch_has_a_finite_gradient():
    x = (.3 + 1e-4*noise('even', 1, 3, 8, 8)).requires_grad_()
    stretched(x).square().sum().backward()
    assert x.grad.isfinite().all() and stretched(x).max() < .05


# ---- steps

def test_a_step_says_what_a_slow_twin_says(world, tmp_path):
    r = start(world, tmp_path)
    nets, (x, y, xp, yp) = copy.deepcopy(r.nets), first_batch(r)
    got = {k: float(v) for k, v in r.take_step((x, y, xp, yp)).items()}
    with torch.no_grad():
        fake = nets.G(x)
        made, real = salient_patches(fake, 12, 9, 4), salient_patches(y, 12, 6, 4)
        def critic_loss(net, a, b): return .5*((net(a) - 1).square().mean() + net(b).square().mean())
        dy, dx = fake[:, :, 1:] - fake[:, :, :-1], fake[..., 1:] - fake[..., :-1]
        want = dict(D=critic_loss(nets.D, y, fake), D_s=critic_loss(nets.D_s, real, made),
                    content=(r.tokens(fake) - r.tokens(x)).abs().mean(), color=color_reconstruction(fake, x),
                    tv=(dy**2).mean()/2 + (dx**2).mean()/2)
    for name, value in want.items(): assert got[name] == pytest.approx(float(value), abs=1e-5), name
    w = saliency_weights(r.cfg, 1)
    assert {k for k, v in w.items() if v} == {'gan', 'patch', 'content', 'color', 'tv'} < set(got)
    assert got['total'] == pytest.approx(sum(w[k]*v for k, v in got.items() if k in w), abs=1e-4)
    for k, net in r.nets.present().items():
        moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), getattr(nets, k).parameters())]
        assert sum(moved) > .5*len(moved), f'{k} did not learn'


def test_who_learns_from_what(world, tmp_path):
    "Each critic from its own error, the translator from the sum; nothing leaks into a critic."
    r, log = start(world, tmp_path), []
    r.optims = {n: Tape(n, net, log) for n, net in r.nets.present().items()}
    x, y, _, _ = batch = first_batch(r)
    w = saliency_weights(r.cfg, 1)
    ctss_step(r, batch, w)
    assert [name for name, _ in log] == ['D', 'D_s', 'G']
    taken, nets = dict(log), r.nets
    for name in ('D', 'D_s'):          # the translator's step left their gradients alone
        for key, p in getattr(nets, name).named_parameters(): assert torch.equal(p.grad, taken[name][key])
    made, real = r.patches(nets.G(x).detach(), .75), r.patches(y, .5)
    loss = .5*((nets.D_s(real) - 1).square().mean() + nets.D_s(made).square().mean())
    for key, slope in slopes(loss, nets.D_s).items():
        assert torch.allclose(taken['D_s'][key], slope, atol=1e-6), key
    fake = nets.G(x)
    total = (w['gan']*(nets.D(fake) - 1).square().mean() + w['tv']*.5*total_variation(fake)
             + w['patch']*(nets.D_s(r.patches(fake, .75)) - 1).square().mean()
             + w['content']*(r.tokens(fake) - r.tokens(x)).abs().mean()
             + w['color']*color_reconstruction(fake, x))
    for key, slope in slopes(total, nets.G).items():
        assert torch.allclose(taken['G'][key], slope, atol=1e-5), key


def test_patches_of_anime_and_of_translations_move_by_their_own_hops(world, tmp_path, monkeypatch):
    r, asked = start(world, tmp_path, n_salient=3, batch=2), []
    def listen(images, side, hop, n):
        asked.append((side, hop, n))
        return torch.zeros(n, 1, side, side) + 0*images.mean()
    monkeypatch.setattr(S, 'salient_patches', listen)
    r.take_step(first_batch(r))
    assert sorted(asked) == [(12, 6, 6), (12, 9, 6)]          # three for each of two pictures


def test_critics_content_and_colors_see_the_tone_of_the_goal(world, tmp_path):
    r, shown = start(world, tmp_path, tone='style'), {}
    x, _, _, _ = batch = first_batch(r)
    def critic_step(name, real, fakes):
        shown[name] = fakes[0][0]
        return torch.zeros(())
    r.critic_step = critic_step
    got = ctss_step(r, batch, saliency_weights(r.cfg, 1))
    goal = map_colors(x, r.nets.palette)
    with torch.no_grad():
        for source, same in ((goal, True), (x, False)):
            content = (r.tokens(shown['D']) - r.tokens(source)).abs().mean()
            color = color_reconstruction(shown['D'], source)
            assert (abs(got['content'] - content) < 1e-5) == same == (abs(got['color'] - color) < 1e-5)
    assert (shown['D'].mean((2, 3)) - goal.mean((2, 3))).abs().max() < .02
    assert torch.equal(shown['D_s'], r.patches(shown['D'], .75))


# ---- the run

def test_the_critic_of_patches_is_a_function_of_the_seed(world, tmp_path):
    runs = {}
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        torch.manual_seed(len(runs))
        runs[name] = start(world, tmp_path/name, seed=seed).nets.D_s.state_dict()
    same = [torch.equal(v, runs['b'][k]) for k, v in runs['a'].items()]
    other = [torch.equal(v, runs['c'][k]) for k, v in runs['a'].items() if 'weight' in k]
    assert all(same) and not any(other)
    assert runs['a']['model.0.weight'].shape == (2, 1, 4, 4)


def test_without_its_weight_there_is_no_second_critic(world, tmp_path):
    r = start(world, tmp_path, lam_patch=0., lam_tv=0.)
    assert set(r.nets.present()) == {'G', 'D'} == set(r.optims)
    assert set(r.take_step(first_batch(r))) == {'D', 'gan', 'content', 'color', 'total', 'epoch'}


def test_warmup_moves_the_translator_alone(world, tmp_path):
    r = start(world, tmp_path, warmup=1)
    before = copy.deepcopy(r.nets)
    assert set(r.take_step(first_batch(r))) == {'content', 'total', 'epoch'}
    for name in ('D', 'D_s'):
        pairs = zip(getattr(r.nets, name).parameters(), getattr(before, name).parameters())
        assert all(torch.equal(p, q) for p, q in pairs)
    assert not all(torch.equal(p, q) for p, q in zip(r.nets.G.parameters(), before.G.parameters()))


def test_two_lives_equal_one(world, tmp_path):
    run_training(start(world, tmp_path/'whole'))
    cut = start(world, tmp_path/'cut')
    cut.n_steps = 2
    run_training(cut)
    made = run_training(start(world, tmp_path/'cut'), resume=True)
    a, b = (read_checkpoint(checkpoints(tmp_path/k)[-1])[0] for k in ('whole', 'cut'))
    assert set(a) == set(b) and {k.split('/')[1] for k in a if k.startswith('optim/')} == {'G', 'D', 'D_s'}
    assert any(k.startswith('net/D_s.') for k in a)
    # other tests draw from the global generator
    assert all(torch.equal(a[k], b[k]) for k in a if k != 'rng/cpu')
    G = load_translator(made)
    assert G(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_refusals(world, tmp_path):
    with pytest.raises(SettingsError, match='patches of 8 px are too small.*12'):
        start(world, tmp_path, patch_share=.25)
    with pytest.raises(SettingsError, match='fp32'): start(world, tmp_path, precision='bf16')
    with pytest.raises(SettingsError, match='must be one of'): SMALL.but(method='CUT')
    with pytest.raises(SettingsError, match='out of range'): SMALL.but(n_salient=0)
    assert SaliencySettings.from_json(SMALL.to_json()) == SMALL
