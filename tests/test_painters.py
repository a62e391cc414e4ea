"The painters of the drawn world: bytes, labels, light and files, beyond what the lesson checks."
import hashlib
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from scenimefy import painters as P
from scenimefy import world as W
from scenimefy.core import UserError

STYLES = [*P.STYLES, *P.OTHER_STYLES]
# photo, anime, woodblock, labels; seeds and size differ from those in the notebook
_BYTES = ['70bc45910ece4126', '8f794bc94b1f861c', '19bedbb57df1e47f', 'bca2d6d00d70cafd']


def digest(t): return hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16]
def luma(t): return .30*t[:, 0] + .59*t[:, 1] + .11*t[:, 2]
def of_class(lab, name): return lab == W.CLASSES.index(name)


def at(place, n=40, **changes):
    "The first `n` scenes at a place, with some words changed."
    s = W.scenes(range(1000))
    s = s[(s.place == W.PLACES.index(place)).nonzero()[:n, 0]]
    return s.but(**{name: torch.full_like(s.place, k) for name, k in changes.items()})


def test_the_styles():
    assert STYLES == ['photo', 'anime', 'woodblock'] and P._LOOKS.keys() == set(STYLES)
    assert P.STYLES['photo'].crisp < .3 < P.STYLES['anime'].crisp
    assert all(len(text.split()) == 3 for text in P._PALETTE.values())      # a color per style


def test_bytes_are_stored():
    ids = [1, 2, 3, W.HELD_OUT + 4]
    found = [digest(P.to_uint8(P.render(ids, 48, style))) for style in STYLES]
    found += [digest(P.labels(ids, 48).to(torch.uint8))]
    assert found == _BYTES


def test_bytes_do_not_depend_on_process_threads_or_vector_instructions():
    code = ("import torch, hashlib; torch.set_num_threads(1); from scenimefy import painters as P;"
            "found = [P.to_uint8(P.render(range(30), 40, s)).numpy().tobytes() for s in P._LOOKS];"
            "digests = [hashlib.sha256(b).hexdigest()[:16] for b in found];"
            "print(torch.backends.cpu.get_cpu_capability(), *digests)")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                         env={**os.environ, 'ATEN_CPU_CAPABILITY': 'default'}).stdout.split()
    assert {*W.scenes(range(30)).place.tolist()} == {*range(9)}            # every painter is at work
    back = list(range(29, -1, -1))
    assert out == ['DEFAULT', *(digest(P.to_uint8(P.render(back, 40, s).flip(0))) for s in STYLES)]


@pytest.mark.parametrize('size', [16, 33, 64])
def test_a_scene_does_not_know_its_batch(size):
    ids = list(range(100, 140))
    def photo(i): return P.render(i, size, 'photo')
    def anime(i): return P.render(i, size, 'anime')
    def labels(i): return P.labels(i, size)
    for draw in (photo, anime, labels):
        batch = draw(ids)
        for k in (0, 7, 11, 23, 31, 39): assert torch.equal(draw([ids[k]])[0], batch[k])


def test_other_seeds_are_other_pictures():
    images = P.to_uint8(P.render(range(60), 16, 'anime'))
    assert len({bytes(t.flatten().tolist()) for t in images}) == 60


@pytest.mark.parametrize('style', STYLES)
def test_two_sizes_show_one_scene(style):
    small, large = P.render(range(36), 48, style), P.render(range(36), 192, style)
    shrunk = torch.nn.functional.avg_pool2d(large, 4)
    same, other = (shrunk - small).abs().mean(), (shrunk - small.roll(1, 0)).abs().mean()
    assert same < .06 and same < .25*other


@pytest.mark.parametrize('size', [1, 2, 3, 5, 8])
def test_tiny_sizes(size):
    for style in STYLES:
        t = P.render(range(60), size, style)
        assert t.shape == (60, 3, size, size) and t.isfinite().all() and t.min() >= -1 and t.max() <= 1
    assert P.labels(range(60), size).shape == (60, size, size)


def test_labels_follow_the_rules():
    s = W.scenes(range(600))
    lab, n = P.labels(s, 64), 64
    y = ((torch.arange(n) + .5)/n).view(1, -1, 1).expand_as(lab)
    horizon, checked = s.horizon.view(-1, 1, 1), 0
    below = dict(water=True, grass=True, earth=True, road=True, sea=True, sand=True, field=True, sky=False)
    for name, is_below in below.items():
        here = of_class(lab, name)
        assert here.any(), name
        if name in ('grass', 'earth'): here = here & (s.place != W.PLACES.index('forest')).view(-1, 1, 1)
        wrong = here & ((y < horizon - 1.5/n) if is_below else (y > horizon + 1.5/n))
        if name == 'sky': wrong = wrong & (s.place != W.PLACES.index('street')).view(-1, 1, 1)
        assert not wrong.any(), name
        checked += 1
    assert checked == 8


@pytest.mark.parametrize('name, places', [
    ('sea', {'sea'}), ('sand', {'sea'}), ('field', {'fields'}), ('bridge', {'bridge'}),
    ('building', {'town'}), ('road', {'street', 'town'}), ('water', {'meadow', 'lake', 'bridge', 'town'})])
def test_classes_belong_to_their_places(name, places):
    s = W.scenes(range(600))
    has = of_class(P.labels(s, 48), name).flatten(1).sum(1) > 20
    found = {W.PLACES[k] for k in s.place[has].unique().tolist()}
    assert found == places


def test_houses_stand_where_the_grammar_says():
    s = W.scenes(range(600))
    has = of_class(P.labels(s, 64), 'house').flatten(1).any(1)
    allowed = (s.objects[..., 0] == W.HOUSE).any(1) | (s.place == W.PLACES.index('street'))
    assert has.any() and not (has & ~allowed).any()
    wet = of_class(P.labels(s, 64), 'water').flatten(1).any(1) & (s.place == 0)
    assert not (wet & (s.course[:, 0, 3] == 0)).any()


def test_every_class_is_large_enough_to_be_learned():
    "Where a class occurs it covers two percent of the picture, in most of its scenes; none is rare."
    lab = P.labels(range(800), 64)
    for name in W.CLASSES:
        share = of_class(lab, name).double().mean((1, 2))
        there = share > 0
        assert there.double().mean() > .05, name
        assert (share[there] > .02).double().mean() > .6, name


def test_snow_lies_on_the_ground():
    "A meadow under snow is earth to the label map, and bright."
    green, white = at('meadow', season=1, hour=0, weather=0), at('meadow', season=3, hour=0, weather=0)
    assert of_class(P.labels(green, 32), 'grass').any() and not of_class(P.labels(white, 32), 'grass').any()
    for style in STYLES:
        def ground(s): return luma(P.render(s, 32, style))[:, -5:].mean()
        assert ground(white) > ground(green) + .25, style


def test_pairs_agree_on_edges():
    "Photo and anime of one seed have their outlines at the same places, those of two seeds have not."
    def edges(t): return (t.mean(1)[..., 1:] - t.mean(1)[..., :-1]).abs().flatten(1)
    def corr(a, b):
        a, b = a - a.mean(1, True), b - b.mean(1, True)
        return torch.nn.functional.cosine_similarity(a, b).mean()
    s = W.scenes(range(96))
    p, a, w = (edges(P.render(s, 64, style)) for style in STYLES)
    assert corr(p, a) > .5 > .25 > corr(p, a.roll(1, 0))
    assert corr(a, w) > .7


@pytest.mark.parametrize('style', STYLES)
def test_hours_have_their_light(style):
    "Day, dawn and golden hour, dusk, night: darker and darker; golden light is warm, night is blue."
    s = W.scenes(range(120)).but(weather=torch.zeros(120, dtype=torch.long))
    pictures = [P.render(s.but(hour=torch.full_like(s.hour, k)), 32, style) for k in range(5)]
    day, dawn, golden, dusk, night = (luma(t).mean().item() for t in pictures)
    assert day > dusk + .1 > night + .2 and min(dawn, golden) > dusk
    def warmth(t): return (t[:, 0] - t[:, 2]).mean().item()
    assert warmth(pictures[2]) > warmth(pictures[0]) + .1 > warmth(pictures[4])
    darkest = luma(pictures[4]).flatten(1).min(1).values
    if style != 'photo': assert (darkest > -.95).all()                       # a painted night is never black


def test_windows_are_lit_after_sunset():
    def warm(s): return ((t := P.render(s, 64, 'anime'))[:, 0] - t[:, 2]).flatten(1).amax(1).mean().item()
    town = dict(weather=0, season=1)
    assert warm(at('town', hour=4, **town)) > .6 > warm(at('town', hour=0, **town)) + .1
    s = W.scenes(range(30))
    pane, lamp, window = (P._palette(s, 'anime')[:, P._AT[name]] for name in ('pane', 'lamp', 'window'))
    late = s.hour >= 3
    assert torch.equal(pane[late], lamp[late]) and torch.equal(pane[~late], window[~late])


def test_mist_and_rain_change_the_picture():
    "Mist takes contrast away where it is far, around the horizon; rain darkens the land."
    s = W.scenes(range(80)).but(hour=torch.zeros(80, dtype=torch.long))
    for style in STYLES:
        fair, misty, rainy = (P.render(s.but(weather=torch.full_like(s.weather, k), haze=haze), 64, style)
                              for k, haze in ((0, s.haze*0), (2, s.haze*0 + 1), (3, s.haze*0)))
        def contrast(t): return luma(t)[:, 24:36].flatten(1).std(1).mean()
        assert contrast(misty) < .8*contrast(fair), style
        assert luma(rainy)[:, 44:].mean() < luma(fair)[:, 44:].mean() - .05, style


def test_anime_is_flat_where_it_is_calm():
    "Half of the pixels differ from their neighbors by less than a third of what they do in photos."
    s = W.scenes(range(80))
    s = s[W.is_daytime(s) & (s.weather == 0)]
    def calm(style):
        t = P.render(s, 128, style)
        steps = (t[..., 1:] - t[..., :-1]).abs().mean(1).flatten(1)
        return steps.median(1).values.mean().item()
    assert calm('anime') < .34*calm('photo')


def test_photos_have_a_depth_that_is_sharp():
    "A lens that focuses far away softens what is near, and the other way around; between them all is sharp."
    s = at('meadow', hour=0, weather=0)
    def restless(focus, rows):
        camera = s.camera.clone()
        camera[:, 3] = focus
        t = P.render(s.but(camera=camera), 64, 'photo')[:, :, rows]
        return (t[..., 1:] - t[..., :-1]).abs().mean().item()
    far, near = slice(0, 36), slice(52, 64)
    assert restless(.1, near) < .9*restless(.5, near) and restless(.1, far) > .99*restless(.5, far)
    assert restless(.9, far) < .9*restless(.5, far) and restless(.9, near) > .99*restless(.5, near)


def test_anime_grass_stands_in_tufts():
    "On a meadow near us the photo has blades nearly everywhere, anime leaves large patches without any."
    s = at('meadow', hour=0, weather=0, season=1)
    s = s.but(objects=s.objects*0, course=s.course*0, flowers=s.flowers*0)
    def bare(style):
        t = P.render(s, 128, style)[:, :, 100:]
        return ((t[..., 1:] - t[..., :-1]).abs().amax(1) < .01).double().mean().item()
    assert bare('anime') > .65 and bare('photo') < .2


def test_greens_differ_from_scene_to_scene():
    "The hue of grass is a matter of mood: its spread over scenes is more than five degrees."
    s = at('meadow', season=1, hour=0, weather=0)
    grass = P._palette(s, 'anime')[:, P._AT['grass']]
    hue = torch.atan2(3**.5*(grass[:, 1] - grass[:, 2]), 2*grass[:, 0] - grass[:, 1] - grass[:, 2])
    assert hue.rad2deg().std() > 5
    same = P._palette(s.but(mood=torch.zeros(len(s), 4)), 'anime')[:, P._AT['grass']]
    assert (same - same[:1]).abs().max() < 1e-6


def test_the_camera_touches_only_photos():
    s = W.scenes(range(12))
    other = s.but(camera=torch.stack([torch.full((12,), v) for v in (1.1, .4, .3, .9)], 1))
    assert not torch.equal(P.render(s, 32, 'photo'), P.render(other, 32, 'photo'))
    for style in STYLES[1:]: assert torch.equal(P.render(s, 32, style), P.render(other, 32, style))


def test_domain_gap_in_pixels():
    def share(mix):
        lab = P.labels(W.scenes(range(600), mix), 24)
        return torch.bincount(lab.flatten(), minlength=len(W.CLASSES)).double()
    gap = share('anime')/share('photo')
    assert gap[W.CLASSES.index('house')] > 1.3 and gap[W.CLASSES.index('mountain')] < .85


def test_files_are_scenes_of_disjoint_seeds(tmp_path):
    P.write_world(tmp_path, n_photos=3, n_anime=3, n_pairs=2, size=16, seed=2)
    def read(p):
        content = bytearray(Image.open(tmp_path/p).tobytes())
        return torch.frombuffer(content, dtype=torch.uint8).view(16, 16, 3)
    first = 2_000_000
    for path, style, mix, seed in (
            ('photos/000000.png', 'photo', 'photo', 0), ('anime/000002.png', 'anime', 'anime', 5),
            ('pairs/trainA/000001.png', 'photo', 'any', 7), ('pairs/trainB/000001.png', 'anime', 'any', 7)):
        assert torch.equal(read(path), P.to_uint8(P.render(W.scenes([first + seed], mix), 16, style))[0])
    P.write_world(tmp_path, n_photos=3, n_anime=3, n_pairs=2, size=16, seed=2)     # the same again is welcome
    (tmp_path/'anime'/'holiday.png').write_bytes(b'x')
    with pytest.raises(UserError, match='other files'): P.write_world(tmp_path, 3, 3, 2, 16, 2)


def test_batches_do_not_show_in_the_files(tmp_path):
    "Five photos written two at a time are the five that are written at once, and all different."
    for batch in (2, 32):
        P.write_world(tmp_path/str(batch), n_photos=5, n_anime=3, n_pairs=3, size=16, batch=batch)
    def read(batch):
        files = sorted((tmp_path/batch).rglob('*.png'))
        return {p.relative_to(tmp_path/batch): p.read_bytes() for p in files}
    assert read('2') == read('32') and len(set(read('2').values())) == len(read('2')) == 5 + 3 + 2*3


@pytest.mark.parametrize('call, text', [
    (lambda: P.render([1], 64, 'oil'), 'photo, anime'), (lambda: P.render([1], 0), 'at least 1 pixel'),
    (lambda: P.write_world('x', seed=-1), '0 to 9'), (lambda: P.write_world('x', n_photos=-1), 'asked for')])
def test_errors_say_what_to_do(call, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, UserError), match=text): call()
    assert not list(tmp_path.iterdir())


def test_noise_stays_in_range():
    table = W._rand(torch.arange(3), 'table', 32, 32)
    n = P._value_noise(table, torch.rand(1, 20, 30)*90 - 40, torch.rand(1, 20, 30)*90 - 40)
    assert n.min() >= 0 and n.max() <= 1 and n.shape == (3, 20, 30)
