"StyleGAN2: released numbers and layout, the objective, training that can be killed, files not to be trusted."
import argparse, os, signal, subprocess, sys, types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from scenimefy import pretrain as P
from scenimefy.core import SettingsError, UserError, seeded
from scenimefy.losses import path_length, r1_penalty, softplus_critic, softplus_generator
from scenimefy.pretrain import PretrainSettings, lazy_adam, pretrain
from scenimefy.runs import Stopped, checkpoints, read_history
from scenimefy.stylegan import (Blur, Discriminator, Generator, ModulatedConv2d, check_batch, draw_styles,
                                grow, load_discriminator, load_stylegan, minibatch_deviation, mix_styles,
                                read_stylegan, save_stylegan, upfirdn2d)
from scenimefy.weights import _BUNDLED, WeightsError
from tape import Tape, slopes

PLAN = {4: 12, 8: 12, 16: 8, 32: 6}


def small_G(size=16): return Generator(size, 8, 2, channels=PLAN)
def small_D(size=16): return Discriminator(size, channels=PLAN)


# ---- the released implementation

def test_reference(reference):
    ref = reference('stylegan2')
    def part(prefix): return {k[len(prefix):]: v for k, v in ref.items() if k.startswith(prefix)}
    plan = {4: 16, 8: 16, 16: 12, 32: 8}
    G, D = Generator(32, 16, 3, channels=plan), Discriminator(32, channels=plan)
    G.load_state_dict(part('weights/generator/'), strict=True)
    D.load_state_dict(part('weights/discriminator/'), strict=True)
    noise = [ref[f'input/noise/{i}'] for i in range(len(G.noise_sides()))]
    z, w = ref['input/z'], G.mapping(ref['input/z'])
    mixed = mix_styles(w, G.mapping(ref['input/z2']), 3, G.n_latent)
    mine = {'w': w, 'image': G(z, noise=noise), 'image_truncated_0.7': G(z, .7, ref['input/mean_w'], noise),
            'image_mix_inject3': G.synthesis(mixed, noise), 'discriminator_score': D(ref['forward/image']),
            'image_registered_noise': G(z, noise=G.stored_noise())}
    for name, value in mine.items():
        want = ref[f'forward/{name}']
        assert value.shape == want.shape and (value - want).abs().max() < 1e-4, name
    image = ref['forward/image'].clone().requires_grad_()
    mine, theirs = r1_penalty(D(image), image), ref['loss/r1_penalty'].squeeze()
    torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-3, atol=0)


def styled_conv(name, cin, cout, up=False):
    shapes = {f'{name}.conv.weight': (1, cout, cin, 3, 3), f'{name}.conv.modulation.weight': (cin, 512),
              f'{name}.conv.modulation.bias': (cin,), f'{name}.noise.weight': (1,),
              f'{name}.activate.bias': (cout,)}
    if up: shapes[f'{name}.conv.blur.kernel'] = (4, 4)
    return shapes


def to_rgb(name, cin, up=True):
    shapes = {f'{name}.bias': (1, 3, 1, 1), f'{name}.conv.weight': (1, 3, cin, 1, 1),
              f'{name}.conv.modulation.weight': (cin, 512), f'{name}.conv.modulation.bias': (cin,)}
    if up: shapes[f'{name}.upsample.kernel'] = (4, 4)
    return shapes


def released_generator():
    "{key: shape} of the released 256 px generator, written down from the specification, not from our class."
    ch = {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128}
    shapes = {'input.input': (1, 512, 4, 4)}
    for i in range(1, 9): shapes |= {f'style.{i}.weight': (512, 512), f'style.{i}.bias': (512,)}
    shapes |= styled_conv('conv1', 512, 512) | to_rgb('to_rgb1', 512, up=False)
    for j, r in enumerate((8, 16, 32, 64, 128, 256)):
        shapes |= styled_conv(f'convs.{2*j}', ch[r//2], ch[r], up=True)
        shapes |= styled_conv(f'convs.{2*j+1}', ch[r], ch[r])
        shapes |= to_rgb(f'to_rgbs.{j}', ch[r])
    sides = (4, 8, 8, 16, 16, 32, 32, 64, 64, 128, 128, 256, 256)
    for i, r in enumerate(sides): shapes[f'noises.noise_{i}'] = (1, 1, r, r)
    return shapes


def released_discriminator():
    shapes = {'convs.0.0.weight': (128, 3, 1, 1), 'convs.0.1.bias': (128,)}
    widths = (128, 256, 512, 512, 512, 512, 512)
    for n, (cin, cout) in enumerate(zip(widths, widths[1:]), 1):
        shapes |= {f'convs.{n}.conv1.0.weight': (cin, cin, 3, 3), f'convs.{n}.conv1.1.bias': (cin,),
                   f'convs.{n}.conv2.0.kernel': (4, 4), f'convs.{n}.conv2.1.weight': (cout, cin, 3, 3),
                   f'convs.{n}.conv2.2.bias': (cout,),
                   f'convs.{n}.skip.0.kernel': (4, 4), f'convs.{n}.skip.1.weight': (cout, cin, 1, 1)}
    return shapes | {'final_conv.0.weight': (512, 513, 3, 3), 'final_conv.1.bias': (512,),
                     'final_linear.0.weight': (512, 8192), 'final_linear.0.bias': (512,),
                     'final_linear.1.weight': (1, 512), 'final_linear.1.bias': (1,)}


def learned(shapes):
    "How many numbers are learned: all but blur kernels and stored noise."
    total = 0
    for key, shape in shapes.items():
        if not key.endswith('kernel') and not key.startswith('noises.'): total += int(np.prod(shape))
    return total


def n_parameters(net): return sum(p.numel() for p in net.parameters())
def filled(shapes): return {k: torch.full(shape, .01) for k, shape in shapes.items()}
def shapes_of(net): return {k: tuple(v.shape) for k, v in net.state_dict().items()}


def test_released_layout_loads_strictly(tmp_path):
    gen, dis = released_generator(), released_discriminator()
    for shapes, tensors, numbers in ((gen, 135, 30_034_338), (dis, 50, 28_864_129)):
        assert len(shapes) == tensors and learned(shapes) == numbers
    g, d = filled(gen), filled(dis)
    adam = {'state': {0: {'step': 3, 'exp_avg': torch.zeros(())}},
            'param_groups': [{'betas': (0., .99), 'params': [0]}]}
    command = argparse.Namespace(size=256, r1=10., ckpt=None, augment=False)
    released = dict(g=g, d=d, g_ema=g, g_optim=adam, d_optim={}, args=command, ada_aug_p=.0)
    torch.save(released, tmp_path/'lhq-220000.pt')
    net, critic = load_stylegan(tmp_path/'lhq-220000.pt'), load_discriminator(tmp_path/'lhq-220000.pt')
    assert (net.size, net.style_dim, net.n_latent, len(net.style)) == (256, 512, 14, 9) and critic.size == 256
    assert list(net.noise_sides()) == [4, 8, 8, 16, 16, 32, 32, 64, 64, 128, 128, 256, 256]
    assert set(net.state_dict()) == set(gen) and set(critic.state_dict()) == set(dis)
    assert n_parameters(net) == 30_034_338 and n_parameters(critic) == 28_864_129
    assert all(v.eq(.01).all() for v in net.state_dict().values())
    assert not net.training and all(p.requires_grad for p in net.parameters())
    with torch.device('meta'): our_generator, our_critic = Generator(256), Discriminator(256)
    assert shapes_of(our_generator) == gen and shapes_of(our_critic) == dis


# ---- files

class Evil:
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return os.mkdir, (self.mark,)


@pytest.fixture
def states():
    torch.manual_seed(1)
    return dict(g_ema=small_G().state_dict(), g=small_G().state_dict(), d=small_D().state_dict())


def test_file_that_would_run_code(tmp_path, states):
    for i, hostile in enumerate((argparse.Namespace(size=Evil(tmp_path/'ran')), Evil(tmp_path/'ran'))):
        torch.save(dict(states, args=hostile), tmp_path/f'{i}.pt')
        for load in (load_stylegan, load_discriminator, read_stylegan):
            with pytest.raises(WeightsError, match='refused without running it.*mkdir'):
                load(tmp_path/f'{i}.pt')
    assert not (tmp_path/'ran').exists()


def test_files_round_trip(tmp_path, states):
    save_stylegan(tmp_path/'a.safetensors', states, note='x')
    torch.save(dict(states, args=argparse.Namespace(size=16)), tmp_path/'a.pt')
    torch.save({'g_ema': states['g_ema']}, tmp_path/'plain.pt')           # no Namespace, one network
    before = torch.get_rng_state()
    for name in ('a.safetensors', 'a.pt', 'plain.pt'):
        net = load_stylegan(tmp_path/name)
        assert all(torch.equal(v, states['g_ema'][k]) for k, v in net.state_dict().items())
    for name in ('a.safetensors', 'a.pt'):
        raw, critic = load_stylegan(tmp_path/name, 'g'), load_discriminator(tmp_path/name)
        assert torch.equal(raw.input.input, states['g']['input.input'])
        assert torch.equal(critic.final_linear[1].weight, states['d']['final_linear.1.weight'])
        assert list(read_stylegan(tmp_path/name)) == ['g_ema', 'g', 'd']
    assert torch.equal(before, torch.get_rng_state())                    # loading draws no random numbers
    net = load_stylegan(tmp_path/'a.pt')
    with torch.no_grad(): net.input.input.zero_()                        # each load has memory of its own
    assert not torch.equal(load_stylegan(tmp_path/'a.pt').input.input, net.input.input)
    save_stylegan(tmp_path/'h.safetensors', states, half=True)
    half = load_stylegan(tmp_path/'h.safetensors')
    assert half.input.input.dtype == torch.float32
    assert load_file(tmp_path/'h.safetensors')['g/input.input'].dtype == torch.float16
    assert os.path.getsize(tmp_path/'h.safetensors') < .6*os.path.getsize(tmp_path/'a.safetensors')


def test_files_that_do_not_fit(tmp_path, states):
    g = states['g_ema']
    def refused(words, load=load_stylegan, **content):
        torch.save(content, tmp_path/'x.pt')
        with pytest.raises(WeightsError) as e: load(tmp_path/'x.pt')
        assert words in str(e.value) and 'x.pt' in str(e.value) and '\n' not in str(e.value), str(e.value)
    def without(key): return {k: v for k, v in g.items() if k != key}
    refused('convs.1.noise.weight is missing', g_ema=without('convs.1.noise.weight'))
    refused('input.input', g_ema=without('input.input'))
    refused('does not belong', g_ema={**g, 'convs.9.activate.bias': torch.zeros(3)})
    refused('shape', g_ema={**g, 'conv1.conv.weight': torch.zeros(1, 12, 11, 3, 3)})
    refused('NaN', g_ema={**g, 'conv1.conv.weight': g['conv1.conv.weight']*float('nan')})
    refused('int64', g_ema={**g, 'conv1.noise.weight': torch.zeros(1, dtype=torch.int64)})
    refused('no sense', g_ema={**g, 'input.input': torch.zeros(1).expand(1, 100_000, 4, 4)})
    deep = {f'to_rgbs.{j}.bias': torch.zeros(3) for j in range(9)}
    deep |= {f'convs.{2*j}.conv.weight': torch.zeros(1, 4, 4, 3, 3) for j in range(9)}
    refused('no sense', g_ema={**g, **deep})
    refused('g_ema', g=g)
    refused('g_ema', g_ema=[1, 2])
    refused('g_ema', g_ema=g, d={'a': 3})
    refused('no sense', g_ema={**g, 'input.input': torch.zeros(1, 0, 4, 4)})
    refused('no sense', g_ema={**g, 'style.1.weight': torch.zeros(8, 0)})
    empty = {**states['d'], 'convs.0.0.weight': torch.zeros(0, 3, 1, 1)}
    refused('no sense', load_discriminator, g_ema=g, d=empty)
    refused('no d', load_discriminator, g_ema=g)
    refused('missing', load_discriminator, g_ema=g, d=g)
    refused('missing', g_ema=states['d'])
    torch.save([g], tmp_path/'l.pt')
    with pytest.raises(WeightsError, match='g_ema'): load_stylegan(tmp_path/'l.pt')
    save_file(g, tmp_path/'flat.safetensors')                       # a generator alone, under its own keys
    alone = load_stylegan(tmp_path/'flat.safetensors').state_dict()
    assert all(torch.equal(v, alone[k]) for k, v in g.items())
    with pytest.raises(WeightsError, match='tiny, tiny-anime, lhq, shinkai-stylegan'):
        load_stylegan('nowhere')
    (tmp_path/'page.pt').write_text('<html>sign in</html>')
    with pytest.raises(WeightsError, match='web page'): load_stylegan(tmp_path/'page.pt')


@pytest.mark.parametrize('name', list(_BUNDLED['stylegan']))
def test_bundled(name):
    net = load_stylegan(name)
    z = torch.randn(16, net.style_dim, generator=seeded('t'))
    images = net(z, noise=net.stored_noise()).detach()
    assert net.size == 64 and images.isfinite().all()
    assert images.std(0).mean() > .1                                     # sixteen different pictures


# ---- parts

def test_upfirdn_is_zeros_padding_convolution():
    rng = np.random.default_rng(0)
    cases = ((1, 1, (1, 2), [1, 2, 5]), (2, 1, (2, 1), [1, 3, 3, 1]),
             (3, 2, (0, 3), [1, 0, 2, 4]), (1, 2, (2, 2), [1, 3, 3, 1]))
    for up, down, pad, row in cases:
        x = rng.standard_normal((5, 9))
        column = np.array([2., 1., 1., 3.])[:len(row)]
        wide = np.zeros((5*up, 9*up))
        wide[::up, ::up] = x
        wide = np.pad(wide, pad)
        rows = np.stack([np.convolve(line, row, 'valid') for line in wide])
        want = np.stack([np.convolve(line, column, 'valid') for line in rows.T]).T[::down, ::down]
        kernel = torch.tensor(np.outer(column, row))
        got = upfirdn2d(torch.tensor(x)[None, None], kernel, up, down, pad)[0, 0]
        assert got.shape == want.shape == tuple((n*up + sum(pad) - len(row))//down + 1 for n in x.shape)
        np.testing.assert_allclose(got, want, atol=1e-10)


def test_enlarging_is_bilinear_inside():
    x = torch.rand(2, 3, 9, 7)
    mine = Blur(up=2, pad=(2, 1), gain=4)(x)
    ref = F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=False)
    assert mine.shape == ref.shape
    torch.testing.assert_close(mine[..., 1:-1, 1:-1], ref[..., 1:-1, 1:-1], atol=1e-6, rtol=0)


def test_modulation_against_weights_per_image():
    torch.manual_seed(0)
    for up in (False, True):
        conv = ModulatedConv2d(5, 7, 3, 4, upsample=up).double()
        x, w = torch.randn(3, 5, 6, 6).double(), torch.randn(3, 4).double()
        slow = []
        for image, s in zip(x, conv.modulation(w)):
            W = conv.weight[0]*conv.scale*s[:, None, None]
            W = W*(W.square().sum((1, 2, 3), keepdim=True) + 1e-8).rsqrt()
            if up:
                wide = F.conv_transpose2d(image[None], W.transpose(0, 1), stride=2)
                slow.append(upfirdn2d(wide, conv.blur.kernel, pad=(1, 1)))
            else: slow.append(F.conv2d(image[None], W, padding=1))
        torch.testing.assert_close(conv(x, w), torch.cat(slow))
    assert conv(x, w).shape[2:] == (12, 12)


def test_deviation_groups():
    x = torch.randn(8, 2, 3, 3)
    got = minibatch_deviation(x)[:, 2, 0, 0]
    for first in (0, 1):                                                # images i and i mod 2 belong together
        group = x[first::2]
        want = (group.var(0, unbiased=False) + 1e-8).sqrt().mean()
        torch.testing.assert_close(got[first::2], want.expand(4))
    for n in (1, 2, 3, 5, 6, 7): assert minibatch_deviation(x[:n]).shape == (n, 3, 3, 3)
    assert (minibatch_deviation(x[:1])[:, 2] - 1e-4).abs().max() < 1e-7


def test_sizes():
    with pytest.raises(SettingsError, match='power of two'): Generator(24)
    with pytest.raises(SettingsError, match='no width'): Generator(64, channels=PLAN)
    G, D = small_G(32), small_D(32)
    assert G.n_latent == 8 and G(torch.randn(2, 8)).shape == (2, 3, 32, 32)
    assert D(torch.randn(4, 3, 32, 32)).shape == (4, 1)
    for wrong in (torch.zeros(2, 8), torch.zeros(2, 7, 8), torch.zeros(2, 8, 9)):
        with pytest.raises(ValueError, match='w_plus'): G.synthesis(wrong)
    with pytest.raises(ValueError, match='mean_latent'): G(torch.randn(1, 8), .5)
    for wrong in (torch.zeros(8), torch.zeros(2, 7), torch.zeros(2, 1, 8)):
        with pytest.raises(ValueError, match=r'z is .* must be \(B,8\)'): G(wrong)
    with pytest.raises(SettingsError, match='positive'): Generator(16, channels={**PLAN, 8: 0})


def test_noise_and_mean_style():
    G = small_G(32)
    a, b = (G.draw_noise(2, seeded('n')) for _ in range(2))
    assert all(torch.equal(s, t) for s, t in zip(a, b)) and [t.shape[2] for t in a] == G.noise_sides()
    assert torch.equal(G.mean_latent(64, seeded('m')), G.mean_latent(64, seeded('m')))
    assert G.mean_latent(64).shape == (1, 8)
    w, noise = torch.randn(2, 8, 8), G.draw_noise(2)
    one = G.draw_noise(1)
    assert torch.equal(G.synthesis(w, one), G.synthesis(w, [t.expand(2, -1, -1, -1) for t in one]))
    two_channels = [t.expand(-1, 2, -1, -1) for t in noise]
    for wrong in (noise[:-1], [*noise, noise[-1]], noise[::-1], [], G.draw_noise(3), two_channels):
        with pytest.raises(ValueError, match='must be 7 maps'): G.synthesis(w, wrong)
    alone = G.synthesis(w[1:], [n[1:] for n in noise])
    torch.testing.assert_close(G.synthesis(w, noise)[1:], alone, atol=1e-5, rtol=0)


def test_mixing():
    G, a, b = small_G(), torch.ones(3, 8), torch.zeros(3, 8)
    assert mix_styles(a, b, 2, 6)[0, :, 0].tolist() == [1, 1, 0, 0, 0, 0]
    assert mix_styles(a, b, torch.tensor([0, 3, 6]), 6).sum((1, 2)).tolist() == [0, 24, 48]
    def sixty(mixing): return torch.stack([draw_styles(G, 1, mixing, seeded('x', i))[0] for i in range(60)])
    def changes(w): return (w[:, 1:] != w[:, :-1]).any(2)                # (60, n_latent - 1)
    never, always = changes(sixty(0.)), changes(sixty(1.))
    assert not never.any() and (always.sum(1) == 1).all()
    at = always.float().argmax(1) + 1
    assert set(at.tolist()) == set(range(1, 6))                          # 1 … n_latent-1, each of them


# ---- objective

def test_minibatch_deviation():
    x = torch.arange(12.).view(12, 1, 1, 1)*torch.ones(1, 2, 3, 3)
    said = {n: minibatch_deviation(x[:n])[:, 2, 0, 0] for n in (1, 2, 3, 4, 5, 6, 7, 8, 9)}
    for n in (1, 5, 7): torch.testing.assert_close(said[n], torch.full((n,), 1e-4))   # no group: blind
    groups = {2: (0, 1), 3: (0, 1, 2), 4: (0, 1, 2, 3), 6: (0, 2, 4), 8: (0, 2, 4, 6), 9: (0, 3, 6)}
    for n, members in groups.items():
        torch.testing.assert_close(said[n], torch.full((n,), float(np.std(members))))
    for n in (5, 7, 11, 25):
        with pytest.raises(SettingsError, match=f'batch = {n}: .* take {n - 1} or {n + 1}'):
            PretrainSettings().but(batch=n)
        for near in (n - 1, n + 1): check_batch(near)
    assert PretrainSettings().but(batch=1).batch == 1


def test_losses_by_hand():
    t = torch.tensor
    assert abs(softplus_critic(t([2.]), t([-1.])).item() - .4402) < 1e-4
    assert abs(softplus_critic(t([0.]), t([0.])).item() - 2*np.log(2)) < 1e-6
    assert abs(softplus_generator(t([0., 0.])).item() - np.log(2)) < 1e-6
    x = torch.randn(3, 2, 1, 1, requires_grad=True)
    assert r1_penalty(3*x[:, 0] + 4*x[:, 1], x).item() == 25
    for every, (lr, beta) in {16: (.0018824, .990585), 4: (.0016, .991992), 0: (.002, .99)}.items():
        group = lazy_adam([torch.nn.Parameter(torch.zeros(1))], .002, every).param_groups[0]
        assert abs(group['lr'] - lr) < 1e-7
        assert group['betas'][0] == 0 and abs(group['betas'][1] - beta) < 1e-6


def test_r1_gradient_by_finite_differences():
    torch.manual_seed(0)
    D, x = small_D(8).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    weight = D.convs[1].conv1[0].weight
    (slope,) = torch.autograd.grad(r1_penalty(D(x), x), weight)
    for at in ((0, 0, 1, 1), (3, 2, 0, 2)):
        def moved(h):
            with torch.no_grad(): weight[at] += h
            value = r1_penalty(D(x), x).item()
            with torch.no_grad(): weight[at] -= h
            return value
        torch.testing.assert_close(slope[at].item(), (moved(1e-5) - moved(-1e-5))/2e-5, rtol=1e-4, atol=1e-9)


def test_path_length_by_finite_differences():
    torch.manual_seed(0)
    G = Generator(8, 4, 1, channels={4: 6, 8: 5}).double()
    w = torch.randn(3, G.n_latent, 4, dtype=torch.float64, requires_grad=True)
    noise, n = [t.double() for t in G.draw_noise(3)], torch.randn(3, 3, 8, 8, dtype=torch.float64)
    penalty, mean = path_length(G.synthesis(w, noise), w, torch.tensor(2.), n, decay=.25)
    lengths = []
    for b in range(3):
        own_noise = [t[b:b+1] for t in noise]
        def value(e): return (G.synthesis(w[b:b+1] + e, own_noise)*n[b]/8).sum().item()
        total = 0.
        for layer in range(G.n_latent):
            for i in range(4):
                e = torch.zeros(1, G.n_latent, 4, dtype=torch.float64)
                e[0, layer, i] = 1e-5
                total += ((value(e) - value(-e))/2e-5)**2
        lengths.append((total/G.n_latent)**.5)
    lengths = torch.tensor(lengths, dtype=torch.float64)
    want = 2 + .25*(lengths.mean() - 2)
    torch.testing.assert_close(mean.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(penalty, (lengths - want).square().mean(), rtol=1e-4, atol=1e-12)
    assert not mean.requires_grad and penalty.requires_grad


# ---- training

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    for i in range(12):
        a = np.linspace(rng.integers(90, 250, 3), rng.integers(0, 120, 3), 20)[:, None].repeat(24, 1)
        Image.fromarray(a.astype(np.uint8)).save(folder/f'{i:02d}.png')
    return folder


CFG = PretrainSettings.preset('tiny').but(size=16, style_dim=8, n_mlp=2, channels=(12, 12, 8), batch=4,
                                          steps=6, path=2., path_every=2, r1_every=3, ema=.9,
                                          log_every=1, sample_every=6, save_every=2)


def tokens(x): return F.adaptive_avg_pool2d(x, 8).flatten(2).mT           # (B,64,3)
def tapes(nets, names, log): return {n: Tape(n, getattr(nets, n), log) for n in names}
def four_pictures(): return torch.rand(4, 3, 16, 16, generator=seeded('real'))*2 - 1


def painted(nets, cfg, what, step, n=4):
    "What `gan_step` paints for one of its terms: styles, picture, and the dice as they lie afterwards."
    dice = seeded(what, cfg.seed, step, 0)
    w = draw_styles(nets.G, n, cfg.mixing, dice)
    return w, nets.G.synthesis(w, nets.G.draw_noise(n, dice)), dice


def test_order_and_lazy_factors():
    "Critic, R1 every third step, generator, path length every second; their gradients, each with its factor."
    cfg = CFG.but(r1=10.)
    nets, real, zero = P.StyleganNetworks(cfg), four_pictures(), torch.tensor(0.)
    logs = {}
    for step, want in ((0, 'DDGG'), (1, 'DG'), (2, 'DGG'), (3, 'DDG'), (6, 'DDGG')):
        logs[step] = []
        P.gan_step(nets, tapes(nets, 'GD', logs[step]), real, cfg, step, mean_path=zero)
        assert ''.join(n for n, _ in logs[step]) == want
    x = real.clone().requires_grad_()
    _, critic_fake, _ = painted(nets, cfg, 'critic', 0)
    _, generator_fake, _ = painted(nets, cfg, 'generator', 0)
    w, image, dice = painted(nets, cfg, 'path', 0, n=2)
    penalty, _ = path_length(image, w, zero, torch.randn(image.shape, generator=dice))
    losses = [(softplus_critic(nets.D(real), nets.D(critic_fake.detach())), nets.D),
              (10/2*3*r1_penalty(nets.D(x), x), nets.D),
              (softplus_generator(nets.D(generator_fake)), nets.G),
              (2*2*penalty, nets.G)]
    for (_, got), (loss, net) in zip(logs[0], losses, strict=True):
        torch.testing.assert_close(got, slopes(loss, net))


def test_gradients_are_averaged_before_every_update():
    "What several processes share must be shared before an optimizer moves: D, R1, second critic, G, path."
    cfg, log = CFG.but(lam_token=.3), []
    nets = P.StyleganNetworks(cfg, 3)
    def note(names): log.append(('synced', names))
    P.gan_step(nets, tapes(nets, 'GDT', log), four_pictures(), cfg, 0, tokens=tokens, sync_gradients=note,
               mean_path=torch.tensor(0.))
    order = [what if n == 'synced' else n for n, what in log]
    assert order == [['D'], 'D', ['T'], 'T', ['D'], 'D', ['G'], 'G', ['G'], 'G']


def test_second_critic_by_hand():
    "A hinge at 1 and at -1 for the critic; the generator climbs what it says, weighted, beside its own loss."
    cfg, log = CFG.but(lam_token=.3, r1=0., path=0.), []
    nets, real = P.StyleganNetworks(cfg, 3), four_pictures()
    with torch.no_grad(): nets.T.layers[-1].bias.fill_(.4)
    losses, _ = P.gan_step(nets, tapes(nets, 'GDT', log), real, cfg, 5, tokens=tokens)
    _, critic_fake, _ = painted(nets, cfg, 'critic', 5)
    on_real, on_fake = (nets.T(tokens(x)).flatten().tolist() for x in (real, critic_fake))
    hinge = sum(max(0, 1 - s) for s in on_real)/4 + sum(max(0, 1 + s) for s in on_fake)/4
    assert losses['T'].item() == pytest.approx(hinge, rel=1e-5)
    _, fake, _ = painted(nets, cfg, 'generator', 5)
    total = F.softplus(-nets.D(fake)).mean() - .3*nets.T(tokens(fake)).mean()
    assert [n for n, _ in log] == ['D', 'T', 'G']
    torch.testing.assert_close(log[2][1], slopes(total, nets.G))


def same(a, b):
    one, two = load_file(a), load_file(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_stopped_and_resumed_is_the_same(photos, tmp_path):
    whole = pretrain(CFG, photos, tmp_path/'whole')
    def stop(step, n, losses):
        if step == 3: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match='--resume'): pretrain(CFG, photos, tmp_path/'cut', on_step=stop)
    cut = pretrain(CFG, photos, tmp_path/'cut', resume=True)
    assert same(whole, cut)
    a, b = read_history(tmp_path/'whole'), read_history(tmp_path/'cut')
    assert a['D'] == b['D'] and a['G'] == b['G'] and a['step'] == b['step'] == [1, 2, 3, 4, 5, 6]
    states = read_stylegan(whole)
    assert not torch.equal(states['g']['conv1.conv.weight'], states['g_ema']['conv1.conv.weight'])
    assert load_stylegan(whole).size == 16 and load_discriminator(whole).size == 16
    assert Image.open(tmp_path/'whole'/'samples'/'00000006.png').size == (8*16, 3*16)
    with pytest.raises(SettingsError, match='r1 1.0 → 2.0'):
        pretrain(CFG.but(r1=2.), photos, tmp_path/'cut', resume=True)
    with pytest.raises(UserError, match='already holds'): pretrain(CFG, photos, tmp_path/'cut')


def test_killed_and_resumed_is_the_same(photos, tmp_path):
    "No signal handler runs at SIGKILL: what is on the disk must be enough."
    script = f'''if True:
        import os, signal, torch
        from scenimefy.pretrain import PretrainSettings, pretrain
        torch.set_num_threads({torch.get_num_threads()})
        def die(step, n, losses):
            if step == 5: os.kill(os.getpid(), signal.SIGKILL)
        cfg = PretrainSettings.from_json({CFG.to_json()!r})
        pretrain(cfg, {str(photos)!r}, {str(tmp_path/'cut')!r}, on_step=die)'''
    assert subprocess.run([sys.executable, '-c', script], capture_output=True).returncode == -signal.SIGKILL
    assert [c.stem for c in checkpoints(tmp_path/'cut')] == ['step-00000002', 'step-00000004']
    assert same(pretrain(CFG, photos, tmp_path/'whole'), pretrain(CFG, photos, tmp_path/'cut', resume=True))
    assert read_history(tmp_path/'whole')['D'] == read_history(tmp_path/'cut')['D']


def test_processes_paint_other_pictures(photos, tmp_path):
    "The same batch, step and weights, another process: other codes. Nothing else decides them."
    real = four_pictures()
    def losses(name, rank):
        r = P.PretrainRun(CFG, photos, tmp_path/name, 'cpu')
        r.rank = rank
        return {k: v.item() for k, v in r.take_step([real]).items()}
    zero, again, one = losses('a', 0), losses('b', 0), losses('c', 1)
    assert zero == again and zero['D'] != one['D'] and zero['G'] != one['G'] and zero['path'] != one['path']


def test_ema_keeps_nine_tenths(photos, tmp_path):
    r = P.PretrainRun(CFG.but(ema=.9), photos, tmp_path/'r', 'cpu')
    before = {k: p.clone() for k, p in r.ema.named_parameters()}
    r.take_step(next(iter(r.feed())))
    for k, p in r.ema.named_parameters():
        want = .9*before[k] + .1*r.nets.G.get_parameter(k)
        torch.testing.assert_close(p, want, atol=1e-6, rtol=1e-5, msg=k)
    assert not torch.equal(r.nets.G.conv1.conv.weight, before['conv1.conv.weight'])


def test_each_optimizer_is_corrected_for_its_own_penalty(photos, tmp_path):
    "Path length every second step is G's, R1 every third is D's; without a penalty nothing is corrected."
    def sizes(name, **change):
        cfg = CFG.but(lr=.006, lam_token=.3, **change)
        r = P.PretrainRun(cfg, photos, tmp_path/name, 'cpu', tokens=tokens)
        groups = {n: o.param_groups[0] for n, o in r.optims.items()}
        return {n: (group['lr'], group['betas'][1]) for n, group in groups.items()}
    own, both = (.006, .99), sizes('both')
    assert both['G'] == pytest.approx((.004, .99**(2/3))) and both['D'] == pytest.approx((.0045, .99**(3/4)))
    assert both['T'] == pytest.approx(own)
    assert sizes('no path', path=0.)['G'] == pytest.approx(own)
    assert sizes('no r1', r1=0.)['D'] == pytest.approx(own)


def test_sheet_is_read_like_text(photos, tmp_path):
    "Eight samples in a row, the ninth begins the second row."
    r = P.PretrainRun(CFG, photos, tmp_path/'r', 'cpu')
    g = seeded('sheet', CFG.seed)
    z = torch.randn(24, 8, generator=g)
    with torch.no_grad(): images = r.ema(z, noise=r.ema.draw_noise(24, g)).clamp(-1, 1)
    sheet = r.sheet()
    assert sheet.shape == (3, 3*16, 8*16)
    for i in (0, 1, 8, 23):
        top, left = i//8*16, i % 8*16
        torch.testing.assert_close(sheet[:, top:top + 16, left:left + 16], images[i])


def test_every_weight_learns(photos, tmp_path):
    run = P.PretrainRun(CFG, photos, tmp_path/'r', 'cpu')
    before = {k: v.clone() for k, v in run.nets.named_parameters()}
    for batch, _ in zip(run.feed(), range(2)):
        run.take_step(batch)
        run.step += 1
    still = [k for k, v in run.nets.named_parameters() if torch.equal(v, before[k])]
    assert not still, still
    assert run.nets.mean_path > 0


def test_other_ways_to_run(photos, tmp_path):
    made = pretrain(CFG.but(steps=2, precision='bf16', r1_every=1, path=0.), photos, tmp_path/'bf16')
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in read_stylegan(made)['g'].values())
    with pytest.raises(SettingsError, match='tokens'): pretrain(CFG.but(lam_token=.3), photos, tmp_path/'t')
    pretrain(CFG.but(lam_token=.3, steps=2), photos, tmp_path/'tokens', tokens=tokens)
    assert {'T', 'G_T'} <= set(read_history(tmp_path/'tokens'))
    with pytest.raises(UserError): pretrain(CFG, tmp_path/'no photos', tmp_path/'n')


def test_settings():
    assert PretrainSettings.preset('paper').but() == PretrainSettings() and PretrainSettings().plan() is None
    assert PretrainSettings.preset('tiny').plan() == {4: 64, 8: 64, 16: 64, 32: 32, 64: 16}
    for wrong, words in ((dict(channels=(8, 8)), '7 positive'), (dict(size=100), 'power of two'),
                         (dict(size=4), 'out of range'), (dict(mixing=1.5), 'mixing'), (dict(lr=-1.), 'lr'),
                         (dict(channels=(8, 8, 0, 8, 8, 8, 8)), 'positive'), (dict(r1_every=0), 'r1_every')):
        with pytest.raises(SettingsError, match=words): PretrainSettings().but(**wrong)


def test_growing():
    torch.manual_seed(0)
    g, d = small_G(8), small_D(8)
    up = Blur(up=2, pad=(2, 1), gain=4)
    for size, times in ((16, 1), (32, 2)):
        G, D = small_G(size), small_D(size)
        grow(G, g.state_dict())
        grow(D, d.state_dict())
        z, noise = torch.randn(2, 8), G.draw_noise(2)
        with torch.no_grad():
            want = g(z, noise=noise[:len(g.noise_sides())])
            for _ in range(times): want = up(want)
            torch.testing.assert_close(G(z, noise=noise), want, atol=1e-5, rtol=0)
        assert torch.equal(D.final_conv[0].weight, d.final_conv[0].weight)
        assert torch.equal(D.convs[-1].skip[1].weight, d.convs[-1].skip[1].weight)
        G2 = small_G(size)
        grow(G2, G.state_dict())                                         # the same size: a copy
        assert all(torch.equal(a, b) for a, b in zip(G2.state_dict().values(), G.state_dict().values()))
    wider, narrower = Generator(16, 9, 2, channels=PLAN), Generator(16, 8, 2, channels={**PLAN, 8: 3})
    for net, state in ((small_G(8), small_G(16)), (small_D(8), small_D(16)), (wider, small_G(8)),
                       (narrower, small_G(8))):
        with pytest.raises(UserError, match='does not fit'): grow(net, state.state_dict())


def test_a_training_starts_from_a_smaller_network(photos, tmp_path):
    torch.manual_seed(0)
    g, d = small_G(8), small_D(8)
    save_stylegan(tmp_path/'s.safetensors', dict(g_ema=g.state_dict(), d=d.state_dict()))
    run = P.PretrainRun(CFG, photos, tmp_path/'r', 'cpu', start=tmp_path/'s.safetensors')
    for net in (run.nets.G, run.ema): assert torch.equal(net.conv1.conv.weight, g.conv1.conv.weight)
    assert pretrain(CFG.but(steps=1), photos, tmp_path/'run', start=tmp_path/'s.safetensors').exists()
    with pytest.raises(WeightsError, match='no such file'):
        pretrain(CFG, photos, tmp_path/'q', start=tmp_path/'nothing.pt')


def test_start_gives_each_generator_its_own_past(photos, tmp_path):
    "The generator goes on from the raw one, the average from the average: mixing them up loses one of them."
    torch.manual_seed(5)
    raw, smooth, d = small_G(), small_G(), small_D()
    states = dict(g_ema=smooth.state_dict(), g=raw.state_dict(), d=d.state_dict())
    save_stylegan(tmp_path/'s.safetensors', states)
    r = P.PretrainRun(CFG, photos, tmp_path/'r', 'cpu', start=tmp_path/'s.safetensors')
    for mine, theirs in ((r.nets.G, raw), (r.ema, smooth), (r.nets.D, d)):
        assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), theirs.parameters(), strict=True))


def test_the_mean_path_length_is_one_number_for_all_processes(tmp_path, monkeypatch):
    "Each process sees other lengths; what is kept, saved and used next is the mean over all of them."
    Image.new('RGB', (8, 8), 'gray').save(tmp_path/'0.png')
    cfg = PretrainSettings.preset('tiny').but(size=8, channels=(4, 4), style_dim=4, n_mlp=1, batch=2, steps=2,
                                              path=2., path_every=1, mixing=0.)
    run = P.PretrainRun(cfg, tmp_path, tmp_path/'run', 'cpu')
    asked = []
    def reduce(t, how):
        asked.append((t.clone(), how))
        return t + 5
    run.world_size, run.accelerator = 2, types.SimpleNamespace(reduce=reduce)
    run.sync_gradients = lambda names: None
    run.take_step([torch.zeros(2, 3, 8, 8)])
    (own, how), = asked
    assert how == 'mean' and own > 0 and torch.equal(run.nets.mean_path, own + 5)
