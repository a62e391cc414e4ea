"The networks of Stage 3 beside an independent, plain build of the same layers and the reference numbers."
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import scenimefy.translator
from scenimefy.translator import (TAPS, BlurDown, PatchCritic, PatchHeads, ResnetGenerator, _blur_pools,
                                  _columns, count_parameters, _field_side, footprint, init_weights,
                                  instance_norm, output_side,
                                  released_side, sample_ids, save_translator, tap_channels, tap_shapes)

CLOSE = dict(rtol=1e-4, atol=1e-4)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def part(ref, prefix): return {k[len(prefix):]: v for k, v in ref.items() if k.startswith(prefix)}


# ---- an independent build, slow and literal: stock modules and explicit filters ----------------------------

class LiteralDown(nn.Module):
    def __init__(self, ch):
        super().__init__()
        kernel = torch.tensor([[1., 2, 1], [2, 4, 2], [1, 2, 1]])/16
        self.register_buffer('filt', kernel.repeat(ch, 1, 1, 1))
    def forward(self, x):
        return F.conv2d(F.pad(x, (1,)*4, mode='reflect'), self.filt, stride=2, groups=x.shape[1])


class LiteralUp(nn.Module):
    def __init__(self, ch):
        super().__init__()
        row = torch.tensor([1., 3, 3, 1])
        self.register_buffer('filt', (torch.outer(row, row)/16).repeat(ch, 1, 1, 1))
    def forward(self, x):
        x = F.pad(x, (1,)*4, mode='replicate')
        return F.conv_transpose2d(x, self.filt, stride=2, padding=2, groups=x.shape[1])[:, :, 1:-1, 1:-1]


class LiteralBlock(nn.Module):
    def __init__(self, ch):
        super().__init__()
        self.conv_block = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(ch, ch, 3), nn.InstanceNorm2d(ch),
                                        nn.ReLU(),
                                        nn.ReflectionPad2d(1), nn.Conv2d(ch, ch, 3), nn.InstanceNorm2d(ch))
    def forward(self, x): return x + self.conv_block(x)


class Literal(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.model = nn.Sequential(*layers)
    def forward(self, x): return self.model(x)


def literal_generator(n, blocks):
    def nr(ch): return nn.InstanceNorm2d(ch), nn.ReLU()
    return Literal(nn.ReflectionPad2d(3), nn.Conv2d(3, n, 7), *nr(n), nn.Conv2d(n, 2*n, 3, padding=1),
                   *nr(2*n),
                   LiteralDown(2*n), nn.Conv2d(2*n, 4*n, 3, padding=1), *nr(4*n), LiteralDown(4*n),
                   *[LiteralBlock(4*n) for _ in range(blocks)], LiteralUp(4*n),
                   nn.Conv2d(4*n, 2*n, 3, padding=1),
                   *nr(2*n), LiteralUp(2*n), nn.Conv2d(2*n, n, 3, padding=1), *nr(n), nn.ReflectionPad2d(3),
                   nn.Conv2d(n, 3, 7), nn.Tanh())


def literal_critic(n, in_ch):
    def step(a, b):
        return LiteralDown(a), nn.Conv2d(a, b, 4, padding=1), nn.InstanceNorm2d(b), nn.LeakyReLU(.2)
    return Literal(nn.Conv2d(in_ch, n, 4, padding=1), nn.LeakyReLU(.2), *step(n, 2*n), *step(2*n, 4*n),
                   *step(4*n, 8*n), nn.Conv2d(8*n, 1, 4, padding=1))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('size', [(32, 32), (21, 38)])
def test_generator_equals_literal_build_forward_and_backward(layout, size):
    torch.manual_seed(0)
    mine, literal = ResnetGenerator(ngf=4, n_blocks=5), literal_generator(4, 5)
    literal.load_state_dict(mine.state_dict(), strict=True)
    mine, literal = mine.double().to(memory_format=layout), literal.double()
    x = torch.randn(2, 3, *size, dtype=torch.double).contiguous(memory_format=layout)
    image, feats = mine(x, taps=TAPS)
    torch.testing.assert_close(image, literal(x), **CLOSE)
    assert image.shape[2:] == tuple(map(output_side, size))
    assert [tuple(f.shape[1:]) for f in feats] == tap_shapes(*size, ngf=4)
    h, want = x, []
    for i, m in enumerate(literal.model):
        h = m(h)
        if i in TAPS: want.append(h)
    def score(im, fs): return sum((t*torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in [im, *fs])
    score(image, feats).backward()
    score(h, want).backward()
    for (name, a), b in zip(mine.named_parameters(), literal.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6*float(b.grad.abs().max()) + 1e-9,
                                   msg=name)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_critic_equals_literal_build(layout):
    torch.manual_seed(0)
    mine, literal = PatchCritic(6, 4).double(), literal_critic(4, 6).double()
    literal.load_state_dict(mine.state_dict(), strict=True)
    x = torch.randn(2, 6, 45, 50, dtype=torch.double)
    a, b = mine.to(memory_format=layout)(x.contiguous(memory_format=layout)), literal(x)
    torch.testing.assert_close(a, b)
    a.square().mean().backward()
    b.square().mean().backward()
    for p, q in zip(mine.parameters(), literal.parameters()): torch.testing.assert_close(p.grad, q.grad)


# ---- numbers of the released implementation ----------------------------------------------------------------

@pytest.mark.parametrize('layout', LAYOUTS)
def test_reference_generator_and_taps(reference, layout):
    ref = reference('translation_step')
    G = ResnetGenerator(ngf=8)
    G.load_state_dict(part(ref, 'weights/G/'), strict=True)
    G = G.to(memory_format=layout)
    x, y = (ref[f'input/real_{k}'] for k in 'AB')
    with torch.no_grad():
        out, feats = G(torch.cat([x, y]), taps=TAPS)
        for mine, name in ((out[:1], 'fake_B'), (out[1:], 'idt_B'), (G(ref['input/real_A_p']), 'fake_B_p')):
            torch.testing.assert_close(mine, ref[f'forward/{name}'], **CLOSE)
        for tap, both, alone in zip(TAPS, feats, G.encode(x)):
            torch.testing.assert_close(both[:1], ref[f'forward/feat_A/{tap}'], **CLOSE)
            torch.testing.assert_close(alone, ref[f'forward/feat_A/{tap}'], **CLOSE)


def test_reference_critics_and_heads(reference):
    ref = reference('translation_step')
    D, D_p = PatchCritic(3, 8), PatchCritic(6, 8)
    heads, heads_s = (PatchHeads(tap_channels(8), 16) for _ in 'ab')
    for net, key in ((D, 'D'), (D_p, 'D_p'), (heads, 'F'), (heads_s, 'F_s')):
        net.load_state_dict(part(ref, f'weights/{key}/'), strict=True)
    pair = torch.cat([ref['input/real_A_p'], ref['forward/fake_B_p']], 1)
    torch.testing.assert_close(D(ref['forward/fake_B']), ref['forward/D_fake_B'], **CLOSE)
    torch.testing.assert_close(D_p(pair), ref['forward/D_p_fake'], **CLOSE)
    rows = heads([ref[f'forward/feat_A/{t}'] for t in TAPS], [ref[f'patch_ids/{t}'] for t in TAPS])
    for t, r in zip(TAPS, rows): torch.testing.assert_close(r[0], ref[f'forward/pool_A/{t}'], **CLOSE)


# ---- format, sizes, faults ---------------------------------------------------------------------------------

def test_counts_of_the_paper_networks():
    with torch.device('meta'):
        nets = ResnetGenerator(), PatchCritic(), PatchCritic(6), PatchHeads(tap_channels())
    assert [count_parameters(n) for n in nets] == [11_378_179, 2_764_737, 2_767_809, 560_384]
    assert [len(n.state_dict()) for n in nets] == [52, 13, 13, 20]


def test_deep_critics_do_not_grow_beyond_eight_times_their_first_layer():
    with torch.device('meta'): D = PatchCritic(3, 4, n_layers=5)
    assert [m.out_channels for m in D.model if isinstance(m, nn.Conv2d)] == [4, 8, 16, 32, 32, 32, 1]


def test_half_precision_file(tmp_path):
    "Asked for, every number on disk has 16 bits and is the nearest to ours; else not one bit is lost."
    net = ResnetGenerator(ngf=2, n_blocks=1)
    half, full = (load_file(save_translator(net, tmp_path/f'{h}.safetensors', half=h)) for h in (True, False))
    for k, v in net.state_dict().items():
        assert half[k].dtype == torch.float16 and torch.equal(half[k], v.half())
        assert full[k].dtype == torch.float32 and torch.equal(full[k], v)


def test_receptive_fields():
    G = ResnetGenerator(ngf=2)
    assert [_field_side(footprint(G.model[:t+1], size=128)) for t in TAPS] == [1, 9, 15, 35, 99]
    assert _field_side(footprint(PatchCritic(ndf=2).model, size=128)) == 84


@pytest.mark.parametrize('make,channels', [(lambda: ResnetGenerator(ngf=2, n_blocks=1), 3),
                                           (lambda: PatchCritic(ndf=2), 3),
                                           (lambda: PatchCritic(6, 2, n_layers=2), 6)])
def test_min_side_is_the_true_minimum(make, channels):
    net = make()
    smallest = net.min_side
    assert net(torch.zeros(1, channels, smallest, smallest)).numel() > 0
    with pytest.raises(ValueError, match=f'at least {smallest}'):
        net(torch.zeros(1, channels, smallest - 1, 64))
    net.min_side = 1
    with pytest.raises((RuntimeError, ValueError)): net(torch.zeros(1, channels, smallest - 1, smallest - 1))


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('key', ['model.7.filt', 'model.25.filt'])
def test_another_blur_is_refused(strict, key):
    net = ResnetGenerator(ngf=2, n_blocks=9)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for bad in (state[key].roll(1, -1), state[key]*float('nan')):
        with pytest.raises(RuntimeError, match='not the blur'):
            net.load_state_dict({**state, key: bad}, strict=strict)
    net.load_state_dict({k: v.half() for k, v in state.items()}, strict=True)  # half-precision files are fine
    with pytest.raises(RuntimeError, match='Missing'):
        net.load_state_dict({k: v for k, v in state.items() if k != key})


def test_size_rules():
    assert [output_side(s) for s in (5, 8, 249, 250, 1081)] == [8, 8, 252, 252, 1084]
    assert [released_side(s) for s in (250, 254, 258, 262, 256)] == [248, 256, 256, 264, 256]


# ---- behavior ----------------------------------------------------------------------------------------------

def test_every_single_tap_survives_the_in_place_relus():
    torch.manual_seed(0)
    G = ResnetGenerator(ngf=2, n_blocks=1)
    x, h, want = torch.randn(1, 3, 16, 16), None, []
    with torch.no_grad():
        h = x
        for m in G.model:
            h = m(h.clone())
            want.append(h.clone())
        image, feats = G(x, taps=range(len(G.model)))
        for a, b in zip(feats, want): torch.testing.assert_close(a, b)
        torch.testing.assert_close(image, want[-1])
        torch.testing.assert_close(G.encode(x, taps=(8, 0))[1], want[0])


def test_encode_stops_after_the_last_tap():
    G, seen = ResnetGenerator(ngf=2, n_blocks=6), []
    for i, m in enumerate(G.model): m.register_forward_hook(lambda *_, i=i: seen.append(i))
    assert len(G.encode(torch.zeros(1, 3, 16, 16))) == 5
    assert seen == list(range(17))


@pytest.mark.parametrize('size', [(2, 2), (3, 2), (7, 8), (16, 5)])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_blur_down_gradient(size, layout):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size).contiguous(memory_format=layout).requires_grad_()
    down = LiteralDown(3)
    mine, literal = BlurDown.apply(x, down.filt), down(x)
    torch.testing.assert_close(mine, literal)
    torch.testing.assert_close(_blur_pools(x), literal)
    w = torch.randn_like(mine)
    torch.testing.assert_close(torch.autograd.grad(mine, x, w)[0], torch.autograd.grad(literal, x, w)[0])


def test_instance_norm_of_a_channel_far_from_zero():
    torch.manual_seed(0)
    for layout in LAYOUTS:
        x = (30 + torch.randn(2, 8, 64, 64)).contiguous(memory_format=layout)
        torch.testing.assert_close(instance_norm(x).double(), F.instance_norm(x.double()), rtol=0, atol=1e-3)
        assert instance_norm(x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize('arriving', LAYOUTS)
@pytest.mark.parametrize('stored', LAYOUTS)
@pytest.mark.parametrize('shape', [(1, 3, 4, 5), (3, 3, 4, 5), (1, 1, 4, 5), (2, 3, 1, 6)])
@pytest.mark.parametrize('kind', [torch.float32, torch.float64, torch.bfloat16])
def test_instance_norm_and_its_gradient_in_every_layout(kind, shape, stored, arriving):
    "torch's own call gives another channel's gradient for one image, if the incoming one is channels_last."
    g = torch.Generator().manual_seed(1)
    x, slope = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    want = x.to(kind).double().clone().requires_grad_()
    centered = want - want.mean((2, 3), keepdim=True)
    out = centered/(centered.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
    out.backward(slope.to(kind).double())
    mine = x.to(kind).clone(memory_format=stored).requires_grad_()
    made = instance_norm(mine)
    made.backward(slope.to(kind).contiguous(memory_format=arriving))
    close = dict(rtol=.02, atol=.1) if kind is torch.bfloat16 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.double(), out.detach(), **close)
    torch.testing.assert_close(mine.grad.double(), want.grad, **close)
    assert made.dtype == kind


def test_the_library_never_calls_the_norm_with_the_wrong_gradient():
    "`F.instance_norm` and `nn.InstanceNorm2d` stay out of what trains; an ONNX file is a frozen copy."
    for path in Path(scenimefy.translator.__file__).parent.glob('*.py'):
        if path.stem == 'export': continue
        assert not re.search(r'\b(F|functional)\.instance_norm\b|InstanceNorm2d', path.read_text()), path.name


@pytest.mark.parametrize('layout', LAYOUTS)
def test_autocast_keeps_images_and_rows_in_float32(layout):
    torch.manual_seed(0)
    G, D = ResnetGenerator(ngf=8, n_blocks=5), PatchCritic(ndf=4)
    for net in (G, D): net.to(memory_format=layout)
    heads, x = PatchHeads(tap_channels(8), 16), torch.rand(2, 3, 32, 32)*2 - 1
    with torch.autocast('cpu', torch.bfloat16):
        image, feats = G(x, taps=TAPS)
        rows, score = heads(feats, sample_ids(feats, 64)), D(image)
    assert image.dtype == score.dtype == torch.float32 and feats[-1].dtype == torch.bfloat16
    assert all(r.dtype == torch.float32 and r.shape == (2, 64, 16) for r in rows)
    (sum(r.sum() for r in rows) + score.mean()).backward()
    assert all(torch.isfinite(p.grad).all() for p in G.parameters())
    torch.testing.assert_close(image, G(x), rtol=0, atol=.1)


def test_columns_and_their_gradient():
    torch.manual_seed(0)
    ids, w = torch.tensor([0, 11, 23, 11]), torch.randn(2, 4, 5)
    for layout in LAYOUTS:
        f = torch.randn(2, 5, 4, 6).contiguous(memory_format=layout).requires_grad_()
        got = _columns(f, ids)
        for s, i in enumerate(ids): torch.testing.assert_close(got[:, s], f[:, :, i//6, i % 6])
        naive = torch.stack([f[:, :, i//6, i % 6] for i in ids], 1)
        torch.testing.assert_close(torch.autograd.grad(got, f, w)[0], torch.autograd.grad(naive, f, w)[0])


def test_sample_ids_draws_each_position_once_and_follows_its_generator():
    feats = [torch.zeros(1, 3, 20, 20), torch.zeros(1, 4, 5, 5)]
    a, b = (sample_ids(feats, 64, torch.Generator().manual_seed(3)) for _ in 'ab')
    assert all(torch.equal(i, j) for i, j in zip(a, b))
    assert [len(i) for i in a] == [64, 25] and all(len(set(i.tolist())) == len(i) for i in a)
    assert max(a[0]) < 400 and sorted(a[1].tolist()) == list(range(25))


def test_init_weights():
    net = init_weights(PatchHeads((64, 128), 256), generator=torch.Generator().manual_seed(0))
    for layer in (m for m in net.modules() if isinstance(m, nn.Linear)):
        want = .02*(2/(layer.in_features + layer.out_features))**.5
        assert abs(layer.weight.std().item()/want - 1) < .03 and not layer.bias.any()
    again = init_weights(PatchHeads((64, 128), 256), generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))
    conv = init_weights(nn.Conv2d(64, 32, 3), gain=1., generator=torch.Generator().manual_seed(0))
    assert abs(conv.weight.std().item()/(2/(96*9))**.5 - 1) < .03


# ---- the tone

def scenes_and_photo(*size):
    "A photo, and a scene that is an affine map of its colors."
    g = torch.Generator().manual_seed(3)
    photo = torch.rand(2, 3, *size, generator=g)*1.4 - .7
    matrix = torch.tensor([[.5, .2, 0], [-.1, .6, .1], [.1, 0, .4]])
    return torch.einsum('ij,bjhw->bihw', matrix, photo) - .2, photo


@pytest.mark.parametrize('size', [(32, 32), (64, 96), (50, 33), (5, 7)])
def test_matching_undoes_an_affine_map_of_colors(size):
    scene, photo = scenes_and_photo(*size)
    assert (scene - photo).abs().mean() > .2
    assert (scenimefy.translator.match_tone(scene, photo) - photo).abs().mean() < .01


def test_matching_is_least_squares_and_each_image_has_its_own_map():
    "Against a plain solution of the same problem, one image after another, in float64."
    from scenimefy.translator import match_tone
    g = torch.Generator().manual_seed(4)
    scene, photo = (torch.rand(2, 3, 64, 64, generator=g, dtype=torch.float64) for _ in range(2))
    scene[1] *= 3
    for s, p, got in zip(scene, photo, match_tone(scene, photo, ridge=0.)):
        columns = [F.avg_pool2d(t[None], 2)[0].flatten(1).T for t in (s, p)]
        ones = torch.ones(1024, 1, dtype=torch.float64)
        best = torch.linalg.lstsq(torch.cat([columns[0], ones], 1), columns[1]).solution
        want = s.flatten(1).T @ best[:3] + best[3]
        torch.testing.assert_close(got.flatten(1).T, want, rtol=1e-3, atol=1e-3)


def test_matching_moves_no_edge_and_bears_blank_pictures():
    from scenimefy.translator import match_tone
    scene = torch.zeros(1, 3, 32, 32)
    scene[..., 16:] = .5
    photo = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    out = match_tone(scene, photo)
    for half in (out[..., :16], out[..., 16:]): assert (half - half[..., :1]).abs().max() < 1e-6
    blank = match_tone(torch.full((1, 3, 8, 8), .3), photo)
    torch.testing.assert_close(blank.mean((2, 3)), photo.mean((2, 3)), rtol=0, atol=1e-4)
    assert blank.isfinite().all() and match_tone(scene, torch.zeros_like(scene)).abs().max() < .01


def test_a_file_remembers_the_palette_of_its_network(tmp_path):
    from scenimefy.translator import load_translator
    from scenimefy.weights import WeightsError
    net = ResnetGenerator(ngf=2, n_blocks=1)
    assert load_translator(save_translator(net, tmp_path/'none.safetensors')).palette is None
    net.palette = torch.arange(12.).view(3, 4)/7
    assert load_translator(save_translator(net, tmp_path/'net.safetensors')).palette.equal(net.palette)
    torch.save(net.state_dict(), tmp_path/'net.pth')
    assert load_translator(tmp_path/'net.pth').palette is None
    for wrong in (torch.eye(3), torch.ones(12), torch.full((3, 4), torch.nan)):
        net.palette = wrong
        save_translator(net, tmp_path/'net.safetensors')
        with pytest.raises(WeightsError, match='three rows of four'):
            load_translator(tmp_path/'net.safetensors')
    net.palette = None
    for text in ('warm', '{"a": 1}', '[[1], [1, 2]]', '[[1' + '0'*400 + ', 0, 0, 0]]'):
        save_translator(net, tmp_path/'net.safetensors', palette=text)
        with pytest.raises(WeightsError, match='three rows of four'):
            load_translator(tmp_path/'net.safetensors')


def test_a_map_of_colors_by_hand():
    from scenimefy.translator import as_shown, map_colors
    x = torch.tensor([.1, .2, .4]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    maps = torch.tensor([[0, 1., 0, 0], [2., 0, 0, .1], [0, 0, 1., -.5]])
    want = torch.tensor([.2, .3, -.1]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    torch.testing.assert_close(map_colors(x, maps), want)
    both = torch.stack([maps, torch.eye(3, 4)])
    torch.testing.assert_close(map_colors(torch.cat([x, x]), both), torch.cat([want, x]))
    scene, photo = scenes_and_photo(32, 32)
    shown = as_shown(scene, photo, torch.eye(3, 4)*.5)
    assert (shown - .5*photo).abs().mean() < .03 and as_shown(scene, photo, None) is scene
    assert as_shown(scene, photo, torch.eye(3, 4)*9).abs().max() <= 1


def test_lent_colors_leave_the_light_alone():
    "By loops: averages of squares of 8 px; brightness stays to the last bit of float32."
    g = torch.Generator().manual_seed(0)
    scene, goal = (torch.rand(2, 3, 16, 24, generator=g)*2 - 1 for _ in 'ab')
    out = scenimefy.translator.match_colors(scene, goal)
    light = torch.tensor([.299, .587, .114]).view(3, 1, 1)
    torch.testing.assert_close((light*out).sum(1), (light*scene).sum(1), atol=1e-5, rtol=0)
    flat = torch.tensor([.5, -.2, .1]).view(1, 3, 1, 1).expand(1, 3, 20, 37)      # no multiple of 8
    gray = (light*flat).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(scenimefy.translator.match_colors(gray, flat), flat, atol=1e-6, rtol=0)
    far = scenimefy.translator.seen_from_afar(goal)
    squares = goal[0, 0].view(2, 8, 3, 8).mean((1, 3))
    share = torch.tensor([1/32, 15/16, 1/32])                     # half a pixel from the center of a square
    wide = squares[[0, 1, 1]]                                     # below the lower square lies itself
    want = torch.einsum('i,j,ij->', share, share, wide)
    assert far[0, 0, 11:13, 11:13].mean().item() == pytest.approx(want.item(), abs=1e-5)


def test_paint_shows_the_tone_that_the_file_asks_for():
    net, x = ResnetGenerator(ngf=4, n_blocks=5).eval(), torch.rand(1, 3, 16, 16)*2 - 1
    with torch.no_grad():
        assert torch.equal(net.paint(x), net(x))
        net.palette = torch.eye(3, 4)*.5
        torch.testing.assert_close(net.paint(x), scenimefy.translator.give_tone(net(x), x*.5).clamp(-1, 1))
