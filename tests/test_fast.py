"Strips: the same numbers as in one piece, in any plan, at odd sizes, and what fits into memory."
import copy
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scenimefy import fast
from scenimefy import stylize as S
from scenimefy.core import SettingsError, UserError
from scenimefy.fast import PLANS, QuickConv, choose_plan, parse_size, quicken, strip_pass
from scenimefy.stylize import translate
from scenimefy.translator import ResnetGenerator, load_translator, save_translator


def random_net(ngf, n_blocks, seed=0):
    torch.manual_seed(seed)
    net = ResnetGenerator(ngf=ngf, n_blocks=n_blocks).eval().requires_grad_(False)
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d): torch.nn.init.normal_(m.weight, 0, .05)
    return net


@pytest.fixture(scope='module')
def net(): return random_net(6, 2)


def picture(h, w, n=1, seed=0):
    "Soft shapes; noise alone would hide an error of a whole strip in its own restlessness."
    small = torch.rand(n, 3, h//6 + 2, w//6 + 2, generator=torch.Generator().manual_seed(seed))*2 - 1
    return F.interpolate(small, (h, w), mode='bicubic').clamp(-1, 1)


@pytest.fixture
def low_strips(monkeypatch):
    "Strips as low as they may be, so that small pictures have many."
    monkeypatch.setattr(fast, '_STRIP_BYTES', 1)


SIZES = [(8, 8), (8, 40), (40, 8), (5, 5), (9, 23), (31, 12), (33, 34), (66, 47), (70, 13)]


@pytest.mark.parametrize('plan', PLANS)
@pytest.mark.parametrize('least', [4, 16])
def test_strips_are_the_whole(net, low_strips, monkeypatch, plan, least):
    monkeypatch.setitem(fast._LEAST, plan, least)
    for h, w in SIZES:
        x = picture(h, w, n=2)
        torch.testing.assert_close(strip_pass(net, x, plan), net(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize('plan', PLANS)
def test_strips_of_a_quick_network(low_strips, plan):
    net = random_net(48, 2, seed=3)
    quick = quicken(net)
    assert len(quick.quick) >= 4
    for h, w in ((32, 32), (37, 50), (9, 44)):
        x = picture(h, w)
        torch.testing.assert_close(strip_pass(quick, x, plan), net(x), atol=1e-4, rtol=0)


def test_flat_and_bright_pictures(net, low_strips):
    "One color, and a nearly flat half: the variance is small where the mean is not."
    flat = torch.full((1, 3, 40, 36), .9)
    half = flat.clone()
    half[..., 24:, :] = picture(16, 36)
    quick = quicken(net)
    for x in (flat, half, flat/3, -flat, 0*flat):
        for plan in PLANS: torch.testing.assert_close(strip_pass(net, x, plan), net(x), atol=1e-4, rtol=0)
        torch.testing.assert_close(quick(x), net(x), atol=1e-4, rtol=0)


def test_flat_pictures_with_the_bundled_network():
    net = load_translator('drawn').requires_grad_(False)
    quick = quicken(net)
    for value in (.9, .3, -1.):
        x = torch.full((1, 3, 41, 38), value)
        torch.testing.assert_close(quick(x), net(x), atol=1e-4, rtol=0)


def test_moments_of_a_channel_far_from_zero():
    "Far from 0 with a small deviation: right because the layer subtracts a center."
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(4, 5, 3)
    x = 300 + .1*torch.randn(60, 30, 4)
    layer = fast.Conv(fast.Photo(x), fast.DirectConv(conv), True)
    keep = torch.empty(60, 30, 5)
    scale, shift = fast._measure(layer, 4, lambda share: None, keep)
    padded = F.pad(x.permute(2, 0, 1)[None].double(), [1]*4, mode='reflect')
    raw = F.conv2d(padded, conv.weight.double())
    variance = raw.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(scale.double(), (variance + 1e-5).rsqrt(), rtol=2e-2, atol=0)


def test_low_precision_goes_through_strips(net):
    half = copy.deepcopy(net).to(torch.bfloat16)
    x = picture(24, 32)
    gap = (strip_pass(half, x.bfloat16()).float() - net(x)).abs().mean()
    assert gap < .05


def test_quick_convolution():
    torch.manual_seed(1)
    conv = torch.nn.Conv2d(5, 7, 3, bias=False).requires_grad_(False)
    for h, w in ((6, 6), (7, 11), (3, 3), (18, 5)):
        x = torch.randn(5, h + 5, w + 5)
        quick = QuickConv(conv)
        rows, cols = h - 2, w - 2
        strip = x.permute(1, 2, 0)[:-(-rows//4)*4 + 2, :-(-cols//4)*4 + 2].contiguous()
        want = conv(x[None, :, :h, :w])[0].permute(1, 2, 0)
        torch.testing.assert_close(quick(strip, rows, cols), want, atol=1e-4, rtol=0)
        torch.testing.assert_close(quick(strip, rows, cols, torch.empty_like(want)), want, atol=1e-4, rtol=0)


def test_a_quick_network_is_still_a_generator(net, tmp_path):
    net = copy.deepcopy(net)
    net.palette = torch.eye(3, 4)
    quick = quicken(net)
    assert isinstance(quick, ResnetGenerator) and torch.equal(quick.palette, net.palette)
    assert torch.equal(copy.deepcopy(quick).palette, net.palette)
    x = picture(20, 28)
    torch.testing.assert_close(quick.paint(x), net.paint(x), atol=1e-4, rtol=0)
    for ours, theirs in zip(quick.encode(x), net.encode(x)):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    image, taps = quick(x, taps=(0, 4))
    assert len(taps) == 2 and image.shape == x.shape
    with pytest.raises(ValueError, match='at least'): quick(x[..., :4])
    with pytest.raises(ValueError, match='to_model'): quick(x[0])
    save_translator(quick, tmp_path/'quick.safetensors')
    assert torch.equal(load_translator(tmp_path/'quick.safetensors')(x), net(x))
    twice = copy.deepcopy(quick).bfloat16()
    assert twice(x.bfloat16()).dtype == torch.bfloat16


def test_translate_takes_strips_when_memory_is_short(net, monkeypatch):
    x, seen, plans = picture(61, 50), [], []
    run = fast.strip_pass
    def spy(net, x, plan, progress):
        plans.append(plan)
        return run(net, x, plan, progress)
    monkeypatch.setattr('scenimefy.stylize.strip_pass', spy)
    monkeypatch.setattr(fast, '_resident', lambda: 0)
    with torch.no_grad(): whole = net(S.pad_to_fit(x))[..., :61, :50]
    monkeypatch.setattr(fast, '_STRIP_ROWS', 0)
    sizes = [fast.strip_memory(64, 52, 6, p) for p in PLANS]
    for size in sizes:
        ours = translate(net, x, max_memory=size, progress=seen.append)
        torch.testing.assert_close(ours, whole, atol=1e-4, rtol=0)
    assert plans == list(PLANS)
    assert seen[-1] == pytest.approx(1) and min(seen) > 0
    with pytest.raises(UserError, match='make it smaller'): translate(net, x, max_memory=sizes[-1] - 1)
    monkeypatch.setattr(fast, 'memory_free', lambda device: sizes[-1])
    plans.clear()
    translate(net, x)
    assert plans == ['quarter']


def test_what_does_not_fit_is_said_in_numbers_that_are_true(net, monkeypatch):
    monkeypatch.setattr(fast, '_resident', lambda: 700_000_000)
    monkeypatch.setattr(fast, 'memory_free', lambda device: 5*10**9)
    with pytest.raises(UserError, match=r'and 0\.3 GB are left of the 1\.0 GB that it may hold'):
        fast.choose_plan(net, 40_000, 40_000, 10**9)
    monkeypatch.setattr(fast, 'memory_free', lambda device: 2*10**8)      # less than the limit leaves
    for limit in (10**9, None):
        with pytest.raises(UserError, match=r'and 0\.2 GB are free'):
            fast.choose_plan(net, 40_000, 40_000, limit)


def test_touched_networks_and_low_precision_run_in_one_piece(net, monkeypatch):
    x = picture(32, 32)
    monkeypatch.setattr('scenimefy.stylize.strip_pass', None)      # calling it would raise
    heard, hooked, changed = [], copy.deepcopy(net), copy.deepcopy(net)
    hooked.model[2].register_forward_hook(lambda *args: heard.append(1))
    changed.model[2] = torch.nn.Identity()
    translate(hooked, x), translate(copy.deepcopy(net).bfloat16(), x)
    assert heard
    assert (translate(changed, x) - net(x)).abs().max() > .01
    quick = quicken(net)
    quick.model[2] = torch.nn.Identity()
    torch.testing.assert_close(quick(x), changed(x), atol=1e-4, rtol=0)
    monkeypatch.setattr(fast, 'memory_free', lambda device: 10_000)
    with pytest.raises(UserError, match='make it smaller'): translate(changed, x)


def test_large_pictures_are_promised_to_fit():
    assert fast.strip_memory(2160, 3840, 64, 'quarter') < 1.3e9
    assert fast.strip_memory(4320, 7680, 64, 'quarter') < 4.5e9
    assert fast.strip_memory(4000, 12000, 64, 'quarter') < 6.4e9
    held = dict(all=3.5, half=1, quarter=.5)
    for plan, maps in held.items(): assert fast.strip_memory(1000, 1000, 64, plan) > maps*256e6


@pytest.mark.parametrize('h, w, plan, peak', [
    (3000, 1000, 'quarter', .420), (1000, 3000, 'quarter', .425), (2000, 6000, 'quarter', 1.620),
    (4000, 12000, 'quarter', 6.281), (1000, 3000, 'half', .803), (1000, 3000, 'all', 2.763)])
def test_promised_memory_is_above_what_was_measured_and_not_far(h, w, plan, peak):
    "Peaks in GB of a process on Linux beside what it held before; ngf 64, one thread."
    assert peak < fast.strip_memory(h, w, 64, plan)/1e9 < 1.15*peak


def test_each_further_picture_of_a_batch_needs_its_scene(net, monkeypatch):
    h, w = 64, 52
    one = fast.strip_memory(h, w, net.ngf, 'quarter')
    monkeypatch.setattr(fast, 'memory_free', lambda device: one + 2*3*4*h*w)     # two scenes in float32
    assert choose_plan(net, h, w, batch=3) == 'quarter'
    with pytest.raises(UserError): choose_plan(net, h, w, batch=4)


@pytest.mark.parametrize('plan', PLANS)
def test_the_blocks_begin_without_what_the_encoder_left(monkeypatch, plan):
    left, blocks = [], fast._blocks
    def noted(walk, x):
        left.append(len(walk.tiles.pieces))
        return blocks(walk, x)
    monkeypatch.setattr(fast, '_blocks', noted)
    strip_pass(quicken(random_net(48, 1)), picture(32, 32), plan)
    assert (left[0] == 0) == (plan != 'all')


def test_memory_of_pictures_that_lie_on_their_side():
    for plan, same in dict(all=False, half=True, quarter=True).items():
        high, wide = (fast.strip_memory(h, w, 4, plan) for h, w in ((9000, 500), (500, 9000)))
        assert (high == wide) == same and high <= wide


@pytest.mark.parametrize('plan', PLANS)
def test_wide_pictures_are_turned_where_memory_is_saved(net, monkeypatch, plan):
    seen, encode = [], fast._encode
    def noted(walk, photo):
        seen.append((photo.h, photo.w))
        return encode(walk, photo)
    monkeypatch.setattr(fast, '_encode', noted)
    for h, w in ((12, 40), (40, 12), (16, 16)): strip_pass(net, picture(h, w), plan)
    assert seen == [(12, 40) if plan == 'all' else (40, 12), (40, 12), (16, 16)]


def test_a_sum_lets_go_of_what_it_has_added():
    torch.manual_seed(0)
    x, y, scale, shift = torch.randn(6, 3, 2), torch.randn(6, 3, 2), torch.randn(2), torch.randn(2)
    want, gone, out = x + y*scale + shift, weakref.ref(y), torch.empty(6, 3, 2)
    layer = fast.Sum(x, y, scale, shift)
    del y
    layer.into(0, 4, out[:4])
    assert gone() is not None
    layer.into(3, 6, out[3:])
    assert gone() is None
    torch.testing.assert_close(out, want)
    layer.into(0, 6, out.zero_())               # and it can still be asked
    torch.testing.assert_close(out, want)


def test_maps_that_live_at_once(net, low_strips, monkeypatch):
    "One behind the encoder, two behind the blocks, one with the scene; the same for a second picture."
    h, w, living, counts = 1200, 40, [], []
    zeros = np.zeros
    def noted(n, *args):
        array = zeros(n, *args)
        if n >= h*w*net.ngf//4: living.append(weakref.ref(array))
        return array
    def counted(function):
        def told(*args):
            result = function(*args)
            gc.collect()
            counts.append(sum(ref() is not None for ref in living))
            return result
        return told
    monkeypatch.setattr(np, 'zeros', noted)
    for name in ('_encode', '_blocks', '_decode'):
        monkeypatch.setattr(fast, name, counted(getattr(fast, name)))
    for x in (picture(h, w, n=2), picture(w, h, n=2)):
        strip_pass(net, x, 'quarter')
        assert counts == [1, 2, 1, 1, 2, 1]
        counts.clear()


@pytest.mark.parametrize('text, size', [('4GB', 4*10**9), ('4g', 4*10**9), ('1.5GiB', 3*2**29),
                                        ('512 MB', 512*10**6), ('700', 700), (700, 700),
                                        ('2TB', 2*10**12), ('3kb', 3000)])
def test_sizes_in_words(text, size): assert parse_size(text) == size


@pytest.mark.parametrize('text', ['', 'GB', '-4GB', '0', '0GB', '4XB', '4 4GB', 'nan', None])
def test_sizes_that_are_none(text):
    with pytest.raises(SettingsError, match='4GB'): parse_size(text)


# ---- training

@pytest.mark.parametrize('p', [0, 1])
@pytest.mark.parametrize('n, c, o, h, w', [
    (1, 1, 1, 3, 3), (2, 3, 5, 9, 16), (3, 4, 2, 20, 7), (1, 2, 3, 5, 70)])
def test_quick_product_and_its_gradients_are_those_of_pytorch(monkeypatch, n, c, o, h, w, p):
    torch.manual_seed(n + c)
    monkeypatch.setattr(fast, '_TILES', 4)                                # several groups
    x = torch.randn(n, c, h, w, dtype=torch.float64).transpose(2, 3).contiguous().transpose(2, 3)
    conv = torch.nn.Conv2d(c, o, 3, padding=p).double()
    inputs = x.requires_grad_(), conv.weight, conv.bias
    ours, want = fast.QuickProduct.apply(*inputs, p, fast.Room()), conv(x)
    torch.testing.assert_close(ours, want, atol=1e-11, rtol=0)
    incoming = torch.randn(1, o, 1, 1, dtype=torch.float64).expand_as(want)      # without memory of its own
    for a, b in zip(*(torch.autograd.grad(y, inputs, incoming) for y in (ours, want))):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_a_network_that_learns_quickly_keeps_weights_and_names(monkeypatch, tmp_path):
    monkeypatch.setattr(fast, '_WIDE', 32)
    torch.manual_seed(0)
    plain = ResnetGenerator(ngf=4, n_blocks=2)
    quick, x = copy.deepcopy(plain), picture(24, 36)
    kept = list(quick.parameters())
    fast.learn_quickly(quick)
    assert sum(isinstance(m, fast.LearningConv) for m in quick.modules()) == 8
    # optimizers know them still
    assert all(a is b for a, b in zip(quick.parameters(), kept, strict=True))
    assert list(quick.state_dict()) == list(plain.state_dict())
    for net in (plain, quick): net(x).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), quick.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-3, msg=name)
    save_translator(quick, tmp_path/'quick.safetensors')
    again = load_translator(tmp_path/'quick.safetensors')
    torch.testing.assert_close(again(x), quick(x), atol=1e-4, rtol=0)


def test_the_quicker_way_is_taken_if_it_clearly_is(monkeypatch):
    for quick, way in ((.5, 'quick'), (.94, 'quick'), (.97, 'direct'), (2., 'direct')):
        monkeypatch.setattr(fast, 'trial', lambda *a: dict(direct=1., quick=quick))
        assert fast.quickest_way(256, 64)[0] == way
        assert fast.quickest_way(64, 64) == ('direct', {})                # too thin to ask
