"""Baselines: every loss against a slow twin, runs that resume exactly, and nothing that a warm-up or a zero
weight hides."""
import copy

import pytest
import torch
import torch.nn.functional as F

from scenimefy.baselines import (RECIPES, STEPS, BaselineRun, BaselineSettings, baseline_weights, blur,
                                 color_reconstruction, color_statistics, color_transfer, feature_l1,
                                 from_lab, gram, gray, gray_style, smooth_edges, to_lab,
                                 total_variation, yuv)
from scenimefy.core import SettingsError, seeded
from scenimefy.runs import run_training
from scenimefy import semisup
from scenimefy.semisup import SemisupSettings, draw_ids
from scenimefy.painters import write_world
from scenimefy.translator import ResnetGenerator, map_colors
from tape import Tape

SMALL = BaselineSettings.preset('tiny').but(
    size=32, load_size=32, ngf=4, n_blocks=5, ndf=4, head_dim=8, n_patches=16, epochs=2, epoch_steps=2,
    log_every=1, sample_every=4, save_every=2)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp('baselines'), n_photos=5, n_anime=5, n_pairs=4, size=40)


def settings(name, **changes): return SMALL.but(method=name, **RECIPES[name] | {'warmup': 0} | changes)


def start(world, name, folder, **changes):
    cfg = settings(name, **changes)
    return BaselineRun(cfg, world/'photos', world/'anime', world/'pairs', folder, device='cpu')


def first_batch(r): return next(iter(r.feed()))


def noise(key, *shape, dtype=torch.float32):
    return torch.rand(*shape, generator=seeded('baselines', key), dtype=dtype)*1.9 - .95


# ---- colors

def test_lab_against_the_formula_pixel_by_pixel():
    x = noise('lab', 1, 3, 2, 2)
    lms = [[.3811, .5783, .0402], [.1967, .7244, .0782], [.0241, .1288, .8444]]
    for i in range(2):
        for j in range(2):
            rgb = [(v + 1)/2 for v in x[0, :, i, j].tolist()]
            cones = [sum(a*b for a, b in zip(row, rgb)) for row in lms]
            L, M, S = torch.tensor(cones).clamp(min=1/255).log10().tolist()
            expected = torch.tensor([(L + M + S)/3**.5, (L + M - 2*S)/6**.5, (L - M)/2**.5])
            assert torch.allclose(to_lab(x)[0, :, i, j], expected, atol=1e-5)


def test_transfer_survives_black_white_and_flat_pictures():
    stats = color_statistics(noise('anime', 6, 3, 16, 16))
    for value in (-1., 0., 1.):
        out = color_transfer(torch.full((1, 3, 8, 8), value), stats)
        assert out.isfinite().all() and out.abs().max() <= 1
        mean_color = from_lab(stats[0].expand(1, 3, 8, 8))
        assert torch.allclose(out, mean_color, atol=1e-2)


def test_transfer_does_not_depend_on_exposure():
    x = noise('exposure', 2, 3, 16, 16)*.3
    stats = color_statistics(noise('anime', 6, 3, 16, 16)*.4)
    darker = ((x + 1)*.5) - 1                                     # half the light: a shift of the logarithm
    assert (color_transfer(x, stats) - color_transfer(darker, stats)).abs().max() < 1e-3


def test_yuv_against_torchvision_free_formula_and_huber_by_hand():
    x = noise('yuv', 2, 3, 4, 4)
    r, g, b = ((x + 1)/2).unbind(1)
    y = .299*r + .587*g + .114*b
    assert torch.allclose(yuv(x), torch.stack([y, .492*(b - y), .877*(r - y)], 1), atol=1e-6)
    a, c = yuv(x[:1]), yuv(x[1:])
    d = a - c
    def huber(t): return torch.where(t.abs() < 1, .5*t*t, t.abs() - .5).mean()
    by_hand = d[:, 0].abs().mean() + huber(d[:, 1]) + huber(d[:, 2])
    assert torch.allclose(color_reconstruction(x[:1], x[1:]), by_hand, atol=1e-6)


# ---- variation, and critics of a seed

def test_variation_against_loops():
    x = noise('tv', 2, 3, 4, 5)
    right = [(x[b, c, i, j + 1] - x[b, c, i, j])**2 for b in range(2) for c in range(3) for i in range(4)
             for j in range(4)]
    down = [(x[b, c, i + 1, j] - x[b, c, i, j])**2 for b in range(2) for c in range(3) for i in range(3)
            for j in range(5)]
    assert torch.isclose(total_variation(x), sum(right)/len(right) + sum(down)/len(down))
    slope = noise('tv', 1, 2, 5, 4, dtype=torch.double).requires_grad_()
    assert torch.autograd.gradcheck(total_variation, (slope,))


# ---- edges and features

def test_edges_are_found_in_every_direction_and_the_rest_is_untouched():
    for dim in (-1, -2):
        x = torch.full((1, 3, 16, 16), -.6)
        x.narrow(dim, 8, 8).fill_(.6)
        y = smooth_edges(x)
        changed = (y != x).any(1)[0]
        lines = changed.any(0 if dim == -1 else 1).nonzero().flatten().tolist()
        assert lines == [6, 7, 8, 9]
    x = noise('blur', 2, 3, 12, 12)
    k = torch.tensor([1., 4, 6, 4, 1])/16
    planes = F.pad(x, (2, 2, 2, 2), mode='reflect').flatten(0, 1)[:, None]
    slow = F.conv2d(F.conv2d(planes, k.view(1, 1, 1, 5)), k.view(1, 1, 5, 1))
    assert torch.allclose(blur(x), slow.view_as(x), atol=1e-6)


def test_gram_against_a_loop_and_without_places():
    t = noise('gram', 2, 6, 4)
    for b in range(2):
        for i in range(4):
            for j in range(4):
                by_loop = sum(t[b, n, i]*t[b, n, j] for n in range(6))/24
                assert abs(gram(t)[b, i, j] - by_loop) < 1e-6
    assert torch.allclose(gram(t.flip(1)), gram(t)) and torch.allclose(gram(torch.cat([t, t], 1)), gram(t))


def test_no_gradient_reaches_the_reference():
    def f(x): return x.flatten(2).mT
    for loss in (lambda a, b: feature_l1(a, b, f), lambda a, b: gray_style(a, b, f)):
        a, b = (noise(k, 1, 3, 8, 8).requires_grad_() for k in 'ab')
        loss(a, b).backward()
        assert a.grad.abs().sum() > 0 and b.grad is None


@pytest.mark.parametrize('name', ['smooth', 'gram', 'color', 'feature'])
def test_gradients_against_finite_differences(name):
    b = noise('fixed', 1, 3, 5, 5, dtype=torch.double)
    def f(x): return x.flatten(2).mT.tanh()
    losses = dict(smooth=lambda a: (smooth_edges(a, 3.)*b).sum(), gram=lambda a: gray_style(a, b, f),
                  color=lambda a: color_reconstruction(a, b), feature=lambda a: feature_l1(a, b, f))
    a = noise('free', 1, 3, 5, 5, dtype=torch.double).requires_grad_()
    assert torch.autograd.gradcheck(losses[name], (a,), atol=1e-4)


# ---- steps

@pytest.mark.parametrize('name', STEPS)
def test_a_step_says_what_a_slow_twin_says(world, tmp_path, name):
    r = start(world, name, tmp_path)
    nets, (x, y, xp, yp) = copy.deepcopy(r.nets), first_batch(r)
    got = {k: float(v) for k, v in r.take_step((x, y, xp, yp)).items()}
    a, b = (xp, yp) if name == 'pix2pix' else (x, y)
    critic = nets.D_p if name == 'pix2pix' else nets.D
    def see(image): return critic(torch.cat([xp, image], 1) if name == 'pix2pix' else image)
    with torch.no_grad():
        fake = nets.G(a)
        fakes = dict(pix2pix=[(fake, 1)], CUT=[(fake, 1)], CartoonGAN=[(fake, 1), (smooth_edges(y), 1)],
                     AnimeGAN=[(fake, 1), (gray(y), 1), (smooth_edges(gray(y)), .1)])[name]
        d = .5*((see(b) - 1).square().mean() + sum(w*see(i).square().mean() for i, w in fakes))
        if name == 'pix2pix': assert abs(got['l1'] - (fake - yp).abs().mean()) < 1e-5
        if name in ('CartoonGAN', 'AnimeGAN'):
            assert abs(got['content'] - (r.tokens(fake) - r.tokens(x)).abs().mean()) < 1e-5
    assert abs(got['D_p' if name == 'pix2pix' else 'D'] - d) < 1e-5
    w = baseline_weights(r.cfg, 1)
    assert abs(got['total'] - sum(w[k]*v for k, v in got.items() if k in w)) < 1e-3
    for k, net in r.nets.present().items():
        moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), getattr(nets, k).parameters())]
        assert sum(moved) > .5*len(moved), f'{k} did not learn'


def cross_entropy_of_patches(q, k, tau):
    "Patch i of `q` among all patches of `k`, image by image."
    return torch.stack([F.cross_entropy(a @ b.T/tau, torch.arange(len(a))) for a, b in zip(q, k)]).mean()


@pytest.mark.parametrize('rank', [0, 1])
def test_cut_finds_patches_of_the_result_in_its_source(world, tmp_path, rank):
    """The photo for a translated photo, the anime for a translated anime; the patches are those of this step
    and process."""
    r = start(world, 'CUT', tmp_path, tau=.2)
    nets, (x, y, xp, yp) = copy.deepcopy(r.nets), first_batch(r)
    r.step, r.rank = 3, rank
    got = r.take_step((x, y, xp, yp))
    ids = draw_ids(r.cfg, 3, 'cpu', rank)['F']
    with torch.no_grad():
        def rows(image): return nets.F(nets.G.encode(image), ids)
        for name, source in (('hdce', x), ('idt', y)):
            taps = [cross_entropy_of_patches(q, k, .2) for q, k in zip(rows(nets.G(source)), rows(source))]
            assert abs(got[name] - sum(taps)/5) < 1e-4, name


def test_animegan_takes_texture_from_gray_anime_and_colors_from_the_photo(world, tmp_path):
    r = start(world, 'AnimeGAN', tmp_path)
    nets, (x, y, xp, yp) = copy.deepcopy(r.nets), first_batch(r)
    got = r.take_step((x, y, xp, yp))
    with torch.no_grad():
        fake = nets.G(x)
        light = (.299*y[:, 0] + .587*y[:, 1] + .114*y[:, 2])[:, None].repeat(1, 3, 1, 1)
        a, b = (r.tokens(i) for i in (fake, light))
        def together(t): return torch.einsum('bni,bnj->bij', t, t)/t[0].numel()
        assert abs(got['gram'] - (together(a) - together(b)).abs().mean()) < 1e-6
        from_photo, from_anime = color_reconstruction(fake, x), color_reconstruction(fake, y)
        assert abs(got['color'] - from_photo) < 1e-6 and abs(from_photo - from_anime) > 1e-3


def test_every_step_is_told_its_epoch_and_step_size(world, tmp_path, monkeypatch):
    "Four epochs of two steps: full, full, two thirds, one third; and the average follows each step."
    r = start(world, 'CUT', tmp_path, epochs=4, epoch_steps=2, lr=.006, ema=.9)
    told, before = [], r.ema.model[1].bias.clone()
    def listen(r, batch, w):
        told.append([o.param_groups[0]['lr'] for o in r.optims.values()])
        with torch.no_grad(): r.nets.G.model[1].bias.fill_(1.)
        return {}
    monkeypatch.setitem(STEPS, 'CUT', listen)
    epochs = []
    for step in range(8):
        r.step = step
        epochs.append(r.take_step(None)['epoch'])
    assert epochs == [1, 1, 2, 2, 3, 3, 4, 4] and len(told[0]) == 3         # G, D, F
    for got, want in zip(told, [.006]*4 + [.004]*2 + [.002]*2): assert got == pytest.approx([want]*3)
    torch.testing.assert_close(r.ema.model[1].bias, 1 - .9**8*(1 - before))


def test_gradients_are_averaged_before_every_update(world, tmp_path):
    r, log = start(world, 'CUT', tmp_path), []
    r.optims = {n: Tape(n, net, log) for n, net in r.nets.present().items()}
    r.sync_gradients = lambda names: log.append(('average', names))
    STEPS['CUT'](r, first_batch(r), baseline_weights(r.cfg, 1))
    assert [what if n == 'average' else n for n, what in log] == [['D'], 'D', ['G', 'F'], 'G', 'F']


def test_networks_are_those_that_the_recipe_needs(world, tmp_path):
    have = {name: set(start(world, name, tmp_path/name).nets.present()) for name in RECIPES}
    assert have == {'pix2pix': {'G', 'D_p'}, 'CUT': {'G', 'D', 'F'},
                    'CartoonGAN': {'G', 'D'}, 'AnimeGAN': {'G', 'D'}}


def test_warmup_moves_the_translator_alone(world, tmp_path):
    r = start(world, 'AnimeGAN', tmp_path, warmup=1)
    before = copy.deepcopy(r.nets)
    assert set(r.take_step(first_batch(r))) == {'content', 'total', 'epoch'}
    assert all(torch.equal(p, q) for p, q in zip(r.nets.D.parameters(), before.D.parameters()))
    assert not all(torch.equal(p, q) for p, q in zip(r.nets.G.parameters(), before.G.parameters()))


@pytest.mark.parametrize('name', STEPS)
def test_two_lives_equal_one(world, tmp_path, name):
    from scenimefy.runs import read_checkpoint, checkpoints
    whole = start(world, name, tmp_path/'whole')
    run_training(whole)
    cut = start(world, name, tmp_path/'cut')
    cut.n_steps = 2
    run_training(cut)
    run_training(start(world, name, tmp_path/'cut'), resume=True)
    a, b = (read_checkpoint(checkpoints(tmp_path/k)[-1])[0] for k in ('whole', 'cut'))
    assert set(a) == set(b) and len(a) > 50
    # other tests draw from the global generator
    assert all(torch.equal(a[k], b[k]) for k in a if k != 'rng/cpu')


def test_the_result_is_a_translator_that_stylize_reads(world, tmp_path):
    from scenimefy.translator import load_translator
    made = run_training(start(world, 'CartoonGAN', tmp_path/'r'))
    assert load_translator(made)(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_refusals(world, tmp_path):
    with pytest.raises(SettingsError, match='fp32'): start(world, 'CUT', tmp_path, precision='bf16')
    with pytest.raises(SettingsError, match='must be one of'): SMALL.but(method='cut')
    with pytest.raises(SettingsError, match='out of range'): SMALL.but(lam_gram=-1.)
    cfg = settings('AnimeGAN')
    assert BaselineSettings.from_json(cfg.to_json()) == cfg


@pytest.mark.parametrize('name', STEPS)
def test_critics_see_scenes_in_the_tone_of_their_goal(name, world, tmp_path):
    "With tone = style the mean color of what a critic calls fake is that of the goal; without, it is not."
    def seen(tone):
        r, shown = start(world, name, tmp_path/tone, tone=tone), []
        x, _, _, yp = batch = first_batch(r)
        def critic_step(critic, real, fakes):
            shown.append(fakes[0][0][:, -3:])
            return torch.zeros(())
        r.critic_step = critic_step
        STEPS[name](r, batch, baseline_weights(r.cfg, 1))
        goal = yp if name == 'pix2pix' else x if tone == 'own' else map_colors(x, r.nets.palette)
        return (shown[0].mean((2, 3)) - goal.mean((2, 3))).abs().max()
    assert seen('style') < .02 < seen('own')
