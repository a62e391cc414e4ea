"""VToonify at toy scale: layers blended to the digit, a painter cut in two that is still the painter, steps
against a slow twin, runs that resume exactly, and files that are refused with a reason."""
import copy, re

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scenimefy.core import SettingsError, seeded
from scenimefy.painters import render
from scenimefy.priors import load_perceptual
from scenimefy.runs import CheckpointError
from scenimefy.stylegan import Generator, load_stylegan, save_stylegan
from scenimefy.toonify import (Fusion, Toonifier, ToonifyRun, ToonifySettings, blend, brush, draw_degree,
                               draw_pair, layout, load_toonify, save_toonify, toonify, train_toonify)
from scenimefy.weights import PACKAGE, WeightsError
from scenimefy.world import HELD_OUT

SMALL = ToonifySettings(steps=4, batch=2, blocks=1, ndf=4, log_every=1, sample_every=4, save_every=2)
PLAN = {4: 6, 8: 5, 16: 4, 32: 3, 64: 2}


def generator(key, size=64):
    "A generator of random weights; its noise has a strength, which fresh ones lack."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded('toonify', key).initial_seed())
        G = Generator(size, 8, 2, channels={r: c for r, c in PLAN.items() if r <= size})
        for name, p in G.named_parameters():
            if 'noise' in name: torch.nn.init.normal_(p)
    return G.requires_grad_(False).eval()


def network(size=64):
    "A toonifier whose fusions let something in."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = Toonifier(generator('source', size), generator('target', size), 1)
        for p in net.fusions.parameters(): torch.nn.init.normal_(p, std=.2)
    return net.eval()


def picture(key, *shape): return torch.rand(*shape, generator=seeded('toonify', key))*1.9 - .95


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('toonify')
    paths = [folder/f'{name}.safetensors' for name in ('source', 'target')]
    for path in paths: save_stylegan(path, dict(g_ema=generator(path.stem).state_dict()))
    return paths


# ---- blending

def of_side(key):
    "The side of a parameter, from the table of the layout instead of a formula."
    table = {4: ['input.', 'conv1.', 'to_rgb1.'], 8: ['convs.0.', 'convs.1.', 'to_rgbs.0.'],
             16: ['convs.2.', 'convs.3.', 'to_rgbs.1.'], 32: ['convs.4.', 'convs.5.', 'to_rgbs.2.'],
             64: ['convs.6.', 'convs.7.', 'to_rgbs.3.']}
    return next((side for side, names in table.items() if key.startswith(tuple(names))), None)


def test_ends_are_the_generators_to_the_digit_and_codes_keep_their_meaning():
    source, target = generator('source'), generator('target')
    nothing, everything, half = (blend(source, target, d).state_dict() for d in (0., 1., .5))
    a, b = source.state_dict(), target.state_dict()
    for key in a:
        if key.startswith(('style.', 'noises.')): assert everything[key].equal(a[key]), key
        elif not key.endswith('kernel'):
            assert nothing[key].equal(a[key]) and everything[key].equal(b[key]), key
            assert torch.allclose(half[key], (a[key] + b[key])/2, atol=1e-6), key


def test_only_the_named_sides_are_exchanged_and_the_source_stays():
    source, target = generator('source'), generator('target')
    before = copy.deepcopy(source.state_dict())
    made, a, b = blend(source, target, {16: 1., 64: .25}), source.state_dict(), target.state_dict()
    seen = set()
    for key, p in made.named_parameters():
        part = {16: 1., 64: .25}.get(of_side(key), 0.)
        seen.add(of_side(key))
        assert torch.allclose(p, (1 - part)*a[key] + part*b[key], atol=1e-6), key
        assert not p.requires_grad
    assert seen == {None, 4, 8, 16, 32, 64}
    assert all(v.equal(before[k]) for k, v in source.state_dict().items())


@pytest.mark.parametrize('degree, told', [({65: 1.}, '65'), ({'64': 1.}, "'64'"), (7., '7'),
                                          ({64: -.1}, '-0.1'), (float('nan'), 'nan')])
def test_blend_refuses_what_would_change_nothing_or_too_much(degree, told):
    with pytest.raises(SettingsError, match=re.escape(told)): blend(generator('a'), generator('b'), degree)


def test_blend_refuses_a_stranger():
    for sizes in ((64, 32), (32, 64)):
        with pytest.raises(SettingsError, match='fine-tuned'): blend(*map(generator, 'ab', sizes), .5)


# ---- the painter cut in two

@pytest.mark.parametrize('size', [32, 64])
def test_layout_and_brush_are_synthesis(size):
    G = generator('source', size)
    w = G.mapping(torch.randn(2, 8, generator=seeded('w')))
    noise = G.draw_noise(2, seeded('noise'))
    whole = G.synthesis(w[:, None].expand(-1, G.n_latent, -1), noise)
    x, image = layout(G, w, noise)
    assert x.shape == (2, PLAN[size//8], size//8, size//8) and image.shape == (2, 3, size//8, size//8)
    assert torch.allclose(brush(G, x, image, w, noise[-6:]), whole, atol=1e-5)
    silent = [torch.zeros_like(n) for n in noise[-6:]]
    assert torch.allclose(brush(G, x, image, w), brush(G, x, image, w, silent), atol=1e-6)


@pytest.mark.parametrize('h, w', [(8, 8), (24, 40), (64, 64), (16, 136)])
def test_any_size_that_eight_divides(h, w):
    net, x = network(), picture('any', 2, 3, h, w)
    read = net.encoder(x)
    sides = [(5, h//8, w//8), (4, h//4, w//4), (3, h//2, w//2), (2, h, w)]
    assert [tuple(t.shape[1:]) for t in read['seen']] == sides
    assert read['x'].shape == (2, 5, h//8, w//8)
    made = toonify(net, x, .5)
    assert made.shape == x.shape and made.abs().max() <= 1
    assert made.equal(toonify(net, x, .5)), 'no dice'
    assert torch.allclose(toonify(net, x[1:], .5), made[1:], atol=1e-5), 'no picture knows its neighbors'


def test_what_cannot_be_painted_is_refused():
    net = network()
    for h, w in ((60, 64), (64, 4)):
        with pytest.raises(ValueError, match='multiples of 8'): toonify(net, picture('odd', 1, 3, h, w))
    for shape in ((1, 1, 64, 64), (1, 4, 64, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match='expected float'): toonify(net, picture('odd', *shape))
    for spoil in (lambda x: x*255, lambda x: x*float('nan')):
        with pytest.raises(ValueError, match='must lie'): toonify(net, spoil(picture('odd', 1, 3, 64, 64)))
    for degree in (-.1, 1.1, float('nan')):
        with pytest.raises(ValueError, match=r'must lie in \[0,1\]'):
            toonify(net, picture('odd', 1, 3, 8, 8), degree)
    with pytest.raises(SettingsError, match='too small; take 32'):
        Toonifier(generator('source', 16), generator('target', 16))


# ---- fusion

def test_a_fresh_fusion_lets_nothing_in():
    fusion = Fusion(4)
    x, image, seen = picture('x', 2, 4, 6, 5), picture('image', 2, 3, 6, 5), picture('seen', 2, 4, 6, 5)
    for degree in (0., 1.):
        after, below = fusion(x, image, seen, degree)
        assert torch.allclose(after, x, atol=1e-6) and below.equal(image)


def test_gate_and_mixture_pixel_by_pixel():
    "A fusion of two channels, worked out at one pixel in the middle with plain sums."
    net = network().fusions[2]
    x, image, seen = picture('x', 1, 3, 5, 5), picture('image', 1, 3, 5, 5), picture('seen', 1, 3, 5, 5)
    degree = .7
    def gate(i, j):
        total = net.gate.bias[0].clone()
        for di in range(3):
            for dj in range(3):
                p, q = min(4, max(0, i + di - 1)), min(4, max(0, j + dj - 1))    # the border goes on
                a, b = x[0, :, p, q], seen[0, :, p, q]
                values = torch.cat([a, (a - b).abs(), torch.tensor([degree])])
                total += (net.gate.weight[0, :, di, dj]*values).sum()
        return 1/(1 + (-total).exp())
    opening = net.opening(x, seen, degree)
    assert all(abs(opening[0, 0, i, j] - gate(i, j)) < 1e-5 for i, j in ((0, 0), (2, 2), (4, 1)))
    after, below = net(x, image, seen, degree)
    mixed = net.mix.bias.clone()
    for di in range(3):
        for dj in range(3):
            p, q = 1 + di, 1 + dj
            values = torch.cat([x[0, :, p, q], gate(p, q)*seen[0, :, p, q]])
            mixed += net.mix.weight[:, :, di, dj] @ values
    assert torch.allclose(after[0, :, 2, 2], mixed, atol=1e-5)
    added = net.rgb.weight[:, :, 0, 0] @ (gate(2, 2)*seen[0, :, 2, 2]) + net.rgb.bias
    assert torch.allclose(below[0, :, 2, 2], image[0, :, 2, 2] + added, atol=1e-5)


def test_the_degree_moves_the_gate_by_its_weights():
    fusion = network().fusions[0]
    x, seen = picture('x', 1, 5, 6, 6), picture('seen', 1, 5, 6, 6)
    logit = [fusion.opening(x, seen, d).logit() for d in (.2, .9)]
    moved = .7*fusion.gate.weight[0, -1].sum()
    assert torch.allclose(logit[1] - logit[0], moved.expand(1, 1, 6, 6), atol=1e-4)   # at the border too


# ---- pairs and steps

def test_degrees_reach_both_ends_and_fill_the_middle():
    drawn = [draw_degree(seeded('degree', k)) for k in range(3000)]
    assert min(drawn) == 0 and max(drawn) == 1
    for end in (0., 1.): assert abs(drawn.count(end)/3000 - 1/6) < .03
    inner = torch.tensor([d for d in drawn if 0 < d < 1])
    assert abs(inner.mean() - .5) < .03 and abs(inner.std() - 12**-.5) < .02


@pytest.mark.parametrize('degree, name', [(0., 'source'), (1., 'target')])
def test_a_pair_is_what_the_generators_paint_of_one_code(degree, name):
    net, G = network(), generator(name)
    pair = draw_pair(net, 3, .6, degree, seeded('pair'))
    dice = seeded('pair')
    z = torch.randn(3, 8, generator=dice)
    w = net.mean_w + .6*(net.source.mapping(z) - net.mean_w)
    noise = net.source.draw_noise(3, dice)
    def whole(G): return G.synthesis(w[:, None].expand(-1, G.n_latent, -1), noise).clamp(-1, 1)
    assert torch.allclose(pair['entry'][0], layout(net.source, w, noise)[0], atol=1e-5)
    assert torch.allclose(pair['photo'], whole(net.source), atol=1e-5)
    assert torch.allclose(pair['goal'], whole(G), atol=1e-5)


def test_a_step_says_what_a_slow_twin_says_and_moves_what_learns(files, tmp_path):
    r = ToonifyRun(SMALL.but(batch=3, seed=5), *files, tmp_path, 'cpu')
    nets, cfg = copy.deepcopy(r.nets), r.cfg
    r.step = 7
    got = {k: float(v) for k, v in r.take_step([]).items()}
    dice = seeded('toonify', 5, 7, 0)
    degree = draw_degree(dice)
    pair = draw_pair(nets.G, 3, cfg.psi, degree, dice)
    with torch.no_grad():
        made, read = nets.G(pair['photo'], degree), nets.G.encoder(pair['photo'])
        def judge(images): return nets.D(F.pad(images, (0, 0, 0, 0, 0, 1), value=degree))
        x, image = _entrance(nets.G, 3, 5, 7)
        expected = dict(rec=F.l1_loss(made, pair['goal']),
                        perc=load_perceptual('tiny')(made, pair['goal'], check=False).mean(),
                        entry=(read['x'] - x).square().mean() + (read['image'] - image).square().mean(),
                        D=.5*((judge(pair['goal']) - 1).square().mean() + judge(made).square().mean()))
    for name, value in expected.items(): assert abs(got[name] - value) < 2e-4*max(1, float(value)), name
    weights = dict(rec=cfg.lam_rec, perc=cfg.lam_perc, entry=cfg.lam_entry, adv=cfg.lam_adv)
    assert abs(got['total'] - sum(w*got[k] for k, w in weights.items())) < 1e-3
    moved = {k for k, p in r.nets.G.named_parameters() if not p.equal(nets.G.get_parameter(k))}
    assert moved and not [k for k in moved if k.startswith(('source.', 'target.'))]
    assert {k.split('.')[0] for k in moved} == {'encoder', 'fusions'}
    assert not r.nets.D.model[0].weight.equal(nets.D.model[0].weight)


def _entrance(net, n, seed, step):
    "What the source had at the cut in a step: its dice fall for the degree, the codes and the noise."
    dice = seeded('toonify', seed, step, 0)
    draw_degree(dice)
    w = net.source.mapping(torch.randn(n, net.source.style_dim, generator=dice))
    w = net.mean_w + SMALL.psi*(w - net.mean_w)
    return layout(net.source, w, net.source.draw_noise(n, dice))


def test_no_gradient_is_longer_than_allowed(files, tmp_path, monkeypatch):
    "Adam sees the same directions, cut to the length that the settings allow."
    lengths = {}
    for clip in (1e6, .01):
        r = ToonifyRun(SMALL.but(clip=clip), *files, tmp_path/str(clip), 'cpu')
        ours = [p for p in r.nets.G.parameters() if p.requires_grad]
        def look(*_, ours=ours, clip=clip):
            lengths[clip] = torch.stack([p.grad.norm() for p in ours if p.grad is not None]).norm().item()
        monkeypatch.setattr(r.optims['G'], 'step', look)
        r.take_step([])
    assert lengths[1e6] > .1 and abs(lengths[.01] - .01) < 1e-4


def test_the_critic_does_not_teach_the_goal_and_sees_the_degree(files, tmp_path):
    "Without its weight the critic's judgement moves no encoder; with it, it does."
    def after(lam):
        r = ToonifyRun(SMALL.but(lam_adv=lam), *files, tmp_path/str(lam), 'cpu')
        r.take_step([])
        return r.nets
    without, other = after(0.), after(1.)
    assert without.D.model[0].weight.equal(other.D.model[0].weight)
    assert not without.G.encoder.entry.weight.equal(other.G.encoder.entry.weight)
    assert without.D.in_ch == 4


# ---- runs

def state(path): return load_file(path)


def test_two_lives_are_one(files, tmp_path):
    whole = train_toonify(SMALL, *files, tmp_path/'whole', device='cpu')
    train_toonify(SMALL.but(steps=2), *files, tmp_path/'cut', device='cpu')
    cut = train_toonify(SMALL, *files, tmp_path/'cut', resume=True, device='cpu')
    a, b = state(whole), state(cut)
    assert set(a) == set(b) and all(a[k].equal(b[k]) for k in a)
    steps = [(tmp_path/n/'checkpoints'/'step-00000004.safetensors') for n in ('whole', 'cut')]
    a, b = (state(p) for p in steps)
    assert all(a[k].equal(b[k]) for k in a)
    fresh = ToonifyRun(SMALL, *files, tmp_path/'fresh', 'cpu').ema
    assert not fresh.encoder.entry.weight.equal(load_toonify(whole).encoder.entry.weight)


def test_a_run_goes_on_with_its_own_generators_only(files, tmp_path):
    train_toonify(SMALL.but(steps=2), *files, tmp_path/'run', device='cpu')
    with pytest.raises(CheckpointError, match='other generators'):
        train_toonify(SMALL, files[0], files[0], tmp_path/'run', resume=True, device='cpu')
    with pytest.raises(SettingsError, match='fp32 only'):
        ToonifyRun(SMALL.but(precision='bf16'), *files, tmp_path/'half', 'cpu')


def test_seeds_decide(files, tmp_path):
    def start(k, seed): return ToonifyRun(SMALL.but(seed=seed), *files, tmp_path/str(k), 'cpu').nets
    first = [start(k, seed).G.encoder.entry.weight for k, seed in enumerate((0, 0, 1))]
    assert first[0].equal(first[1]) and not first[0].equal(first[2])


# ---- files

def test_a_file_paints_as_the_network_did(tmp_path):
    net, x = network(), picture('file', 1, 3, 16, 24)
    save_toonify(tmp_path/'a.safetensors', net)
    assert toonify(load_toonify(tmp_path/'a.safetensors'), x, .3).equal(toonify(net, x, .3))
    save_toonify(tmp_path/'half.safetensors', net, half=True)
    half = load_toonify(tmp_path/'half.safetensors')
    assert torch.allclose(toonify(half, x, .3), toonify(net, x, .3), atol=.05)


def test_files_that_are_refused(tmp_path):
    path = tmp_path/'a.safetensors'
    save_toonify(path, network())
    good = load_file(path)
    faults = {'missing': lambda t: t.pop('encoder.entry.weight'),
              'does not belong': lambda t: t.update(more=torch.zeros(1)),
              'shape': lambda t: t.update({'fusions.0.rgb.bias': torch.zeros(4)}),
              'NaN': lambda t: t['mean_w'].fill_(float('nan')),
              'source': lambda t: t.pop('source.input.input')}
    for said, spoil in faults.items():
        tensors = {k: v.clone() for k, v in good.items()}
        spoil(tensors)
        save_file(tensors, path)
        with pytest.raises(WeightsError, match='no file of `save_toonify`'): load_toonify(path)
    path.write_bytes(b'<html>')
    with pytest.raises(WeightsError): load_toonify(path)


OUTSIDE = 'source.safetensors', 'target.safetensors'


def test_generators_may_stay_outside(files, tmp_path):
    "The file holds what learns and nothing else, and paints the same where the three files lie together."
    net = load_toonify(train_toonify(SMALL, *files, tmp_path/'run', device='cpu'))
    x = picture('out', 1, 3, 16, 24)
    path = files[0].with_name('light.safetensors')
    save_toonify(path, net, outside=OUTSIDE, step='4')
    with safe_open(path, 'pt') as f: names, about = set(f.keys()), f.metadata()
    assert names == {k for k, _ in net.named_parameters() if not k.startswith(('source.', 'target.'))}
    assert about['source'].split()[0] == 'source.safetensors' and about['step'] == '4'
    for d in (0., .4, 1.): assert toonify(load_toonify(path), x, d).equal(toonify(net, x, d))


def test_other_generators_are_refused(files, tmp_path):
    "One weight of one generator is another, or the two are exchanged, or one is missing."
    net = load_toonify(train_toonify(SMALL, *files, tmp_path/'run', device='cpu'))
    for name, state in (('source', net.source), ('target', net.target)):
        save_stylegan(tmp_path/f'{name}.safetensors', dict(g_ema=state.state_dict()))
    path = tmp_path/'light.safetensors'
    save_toonify(path, net, outside=OUTSIDE)
    load_toonify(path)
    for name in ('source', 'target'):
        G = copy.deepcopy(getattr(net, name))
        before = (tmp_path/f'{name}.safetensors').read_bytes()
        G.conv1.conv.weight.view(-1)[0] += 1e-3
        save_stylegan(tmp_path/f'{name}.safetensors', dict(g_ema=G.state_dict()))
        with pytest.raises(WeightsError, match=f'its {name} was another generator'): load_toonify(path)
        (tmp_path/f'{name}.safetensors').write_bytes(before)
    save_toonify(path, net, outside=OUTSIDE[::-1])
    with pytest.raises(WeightsError, match='its source was another generator'): load_toonify(path)
    save_toonify(path, net, outside=('gone.safetensors', 'target.safetensors'))
    with pytest.raises(WeightsError, match='gone.safetensors, lies neither beside it nor'): load_toonify(path)


def test_light_files_that_are_refused(files):
    "A part too few, a part too many, a path in place of a name, one generator named and one not."
    net = Toonifier(*(load_stylegan(file) for file in files), 1)
    path = files[0].with_name('light.safetensors')
    save_toonify(path, net, outside=OUTSIDE)
    good = load_file(path)
    with safe_open(path, 'pt') as f: about = f.metadata()
    def refused(tensors, said, why='.'):
        save_file(tensors, path, said)
        with pytest.raises(WeightsError, match=why): load_toonify(path)
    refused({k: v for k, v in good.items() if k != 'encoder.entry.bias'}, about, 'is missing')
    refused(good | {'mean_w': net.mean_w}, about, 'does not belong')
    for wrong in ('../' + about['source'], '', '[1]'): refused(good, about | {'source': wrong})
    refused(good, {k: v for k, v in about.items() if k != 'target'}, 'does not name its target')
    refused(good, {'format': about['format']}, 'neither holds nor names its source')


def test_the_bundled_network_keeps_the_photo_and_comes_near_to_anime(tmp_path):
    "On scenes that nothing was trained on; its generators are found in the package, wherever it lies."
    file = tmp_path/'mine.safetensors'
    file.write_bytes((PACKAGE/'toonify.safetensors').read_bytes())
    net, other = load_toonify('toonify'), load_toonify(file)
    photo, anime = (render(range(HELD_OUT + 900, HELD_OUT + 924), 64, style) for style in ('photo', 'anime'))
    def l1(a, b): return (a - b).abs().mean().item()
    made = [toonify(net, photo, d) for d in (0., .25, .5, .75, 1.)]
    assert toonify(other, photo).equal(made[-1])
    away, error = ([l1(x, ref) for x in made] for ref in (photo, anime))
    assert away == sorted(away) and away[0] < .025
    assert error == sorted(error, reverse=True) and error[-1] < .65*l1(photo, anime)
    for G, name in ((net.source, 'tiny'), (net.target, 'tiny-anime')):
        own = G.state_dict()
        assert all(own[key].equal(v) for key, v in load_stylegan(name).state_dict().items()), name
