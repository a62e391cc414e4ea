"Networks that hold their statistics over a scene. Small networks, no network access."
import av
import numpy as np
import pytest
import torch

from scenimefy.core import SettingsError
from scenimefy.steady import Cuts, SteadyNorm, block_flow, flicker, moved, pan, steady
from scenimefy.stylize import quicken, translate
from scenimefy.translator import PatchCritic, ResnetGenerator
from scenimefy.video import map_video


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    net = ResnetGenerator(ngf=4, n_blocks=2).eval()
    net.palette = torch.eye(3, 4)
    return net


def film(n=6, h=24, w=32, seed=0):
    "Frames that slowly become brighter."
    base = torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed))*1.2 - 1
    return torch.stack([base + .06*t for t in range(n)])


def one_by_one(net, frames): return torch.cat([translate(net, frame[None]) for frame in frames])


def test_keep_0_is_the_network_and_the_network_is_left_alone(net):
    frames = film()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert torch.allclose(one_by_one(steady(net, keep=0.), frames), one_by_one(net, frames), atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(isinstance(m, SteadyNorm) for m in net.modules())


def test_keys_palette_and_sizes_are_those_of_the_network(net):
    made = steady(net)
    assert list(made.state_dict()) == list(net.state_dict()) and torch.equal(made.palette, net.palette)
    assert (made.ngf, made.n_blocks, made.in_ch) == (4, 2, 3) and isinstance(made, ResnetGenerator)
    assert made.paint(film(2)).shape == (2, 3, 24, 32)


def test_statistics_of_the_first_frame_by_a_second_path(net):
    "Hooks keep what each InstanceNorm of the plain network sees in frame 0; frame 3 is then run with that."
    frames, seen, layers = film(), [], [m for m in net.modules() if type(m).__name__ == 'InstanceNorm']
    hooks = [m.register_forward_hook(lambda m, x, y: seen.append(x[0].clone())) for m in layers]
    with torch.no_grad(): net(frames[:1])
    for hook in hooks: hook.remove()
    stats = [(x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)) for x in seen]
    def hold(k): return lambda m, x, y: (before[k] - stats[k][0])/(stats[k][1] + 1e-5).sqrt()
    before = {}
    def keep(k): return lambda m, x: before.update({k: x[0].clone()})
    hooks = [m.register_forward_pre_hook(keep(k)) for k, m in enumerate(layers)]
    hooks += [m.register_forward_hook(hold(k)) for k, m in enumerate(layers)]
    with torch.no_grad(): want = net(frames[3:4])
    for hook in hooks: hook.remove()
    got = one_by_one(steady(net), frames[[0, 3]])[1:]
    assert torch.allclose(got, want, atol=1e-3)


@pytest.mark.parametrize('keep', [1., .8])
def test_batches_change_nothing(net, keep):
    frames = film(7)
    alone = one_by_one(steady(net, keep), frames)
    made = steady(net, keep)
    together = torch.cat([translate(made, frames[:3]), translate(made, frames[3:])])
    assert torch.allclose(alone, together, atol=1e-4)


def test_a_cut_begins_anew_inside_a_batch_too(net):
    dark, light = film(3), film(3, seed=1).flip(0) + .7
    frames = torch.cat([dark, light.clamp(-1, 1)])
    want = torch.cat([one_by_one(steady(net), part) for part in (frames[:3], frames[3:])])
    assert torch.allclose(one_by_one(steady(net), frames), want, atol=1e-4)
    assert torch.allclose(translate(steady(net), frames), want, atol=1e-4)
    never = one_by_one(steady(net, jump=1.), frames)
    assert not torch.allclose(never[3:], want[3:], atol=1e-2)


def test_a_quickened_network(net):
    frames = film()
    want = one_by_one(steady(net), frames)
    for made in (steady(quicken(net)), quicken(steady(net))):       # the second is left as it is
        assert torch.allclose(one_by_one(made, frames), want, atol=1e-3)


def test_copies_keep_palette_and_brush(net):
    "A copy that forgets what its network asks for shows other scenes, and says nothing."
    net.palette, net.brush = torch.eye(3, 4), True
    for made in (quicken(net), steady(net), steady(quicken(net))):
        assert made.brush is True and torch.equal(made.palette, net.palette)


def test_it_goes_on_where_it_was(net):
    frames, first, second = film(6), steady(net, .7), steady(net, .7)
    whole = one_by_one(first, frames)
    first.reset()
    one_by_one(first, frames[:3])
    second.recall(first.remember())
    assert torch.equal(one_by_one(second, frames[3:]), whole[3:])
    second.reset()
    assert torch.equal(one_by_one(second, frames[:3]), whole[:3])
    assert steady(net).remember() == {}


def test_an_interrupted_film_ends_like_an_uninterrupted_one(net, tmp_path):
    with av.open(str(tmp_path/'a.mp4'), 'w') as c:
        v = c.add_stream('libx264', rate=25)
        v.width, v.height, v.pix_fmt = 32, 24, 'yuv420p'
        for frame in film(10):
            array = ((frame.clamp(-1, 1) + 1)*127.5).byte().permute(1, 2, 0).contiguous().numpy()
            c.mux(v.encode(av.VideoFrame.from_ndarray(array, format='rgb24')))
        c.mux(v.encode(None))
    def run(name, made, fn=None, **more):
        fn = fn or (lambda x: translate(made, x))
        return map_video(tmp_path/'a.mp4', tmp_path/name, fn, state=made, segment=3, progress=False, **more)
    whole = run('whole.mp4', steady(net, .8))
    made, left = steady(net, .8), [7]
    def stops(x):
        left[0] -= 1
        if left[0] < 0: raise KeyboardInterrupt
        return translate(made, x)
    with pytest.raises(KeyboardInterrupt): run('b.mp4', made, stops)
    again = run('b.mp4', steady(net, .8), resume=True)
    assert again.out.read_bytes() == whole.out.read_bytes() and again.frames == 10


def test_wrong_use_is_named(net):
    for keep in (-.1, 1.1):
        with pytest.raises(SettingsError, match='must lie in'): steady(net, keep)
    bare = ResnetGenerator(ngf=4, n_blocks=0)
    bare.model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match='no InstanceNorm'): steady(bare)


def test_flow_finds_a_moving_square_and_what_it_uncovers():
    still = torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(3))*2 - 1
    box = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(4))*2 - 1
    before, now = still.clone(), still.clone()
    before[:, 12:28, 10:26], now[:, 12:28, 14:30] = box, box
    way, seen = block_flow(before, now, block=5)
    assert (way[1, 15:25, 17:27] == 4).all() and (way[0, 15:25, 17:27] == 0).all()
    assert (way[:, :8] == 0).all() and not seen[18:22, 11:13].any()    # just uncovered
    assert max(flicker([before, now], [before, now], lambda *pair: block_flow(*pair, block=5))) < 4


def test_the_first_frame_begins_a_scene_and_a_pan_does_not():
    wide = torch.rand(3, 30, 90, generator=torch.Generator().manual_seed(5))
    wide = torch.nn.functional.avg_pool2d(wide[None], 7, 1, 3)[0]*4 - 2
    look = Cuts(.5)
    look.look(torch.stack([wide[:, :, 3*t:3*t + 40] for t in range(8)]).clamp(-1, 1))
    assert look.found == [True] + [False]*7
    frames, inside = moved(wide, pan(None, wide, dx=3)[0])
    assert torch.equal(frames[:, :, 3:], wide[:, :, :-3]) and np.count_nonzero(~inside) == 90
