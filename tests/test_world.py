"The grammar of the drawn world: numbers, words, placement and captions, beyond what the lesson checks."
import math
from collections import Counter

import pytest
import torch

from scenimefy import world as W

WORDS = dict(place=W.PLACES, season=W.SEASONS, hour=W.HOURS, weather=W.WEATHERS)


def among(s, *places):
    "Which scenes lie at one of these places."
    return torch.isin(s.place, torch.tensor([W.PLACES.index(name) for name in places]))


def test_hash_against_plain_integers():
    def plain(x):
        for _ in range(2): x = ((x ^ (x >> 16))*0x45d9f3b) % 2**32
        return x ^ (x >> 16)
    xs = [0, 1, 2, 12345, 2**31, 2**32 - 1]
    assert W._hash32(torch.tensor(xs)).tolist() == [plain(x) for x in xs]


@pytest.mark.parametrize('seed', [-1, -2**62, 2**31, 2**32 + 5, 2**62])
def test_any_integer_is_a_seed(seed):
    one, next_one = W.scenes([seed]), W.scenes([seed + 1])
    assert one.table.isfinite().all() and not torch.equal(one.table, next_one.table)


def test_a_scene_does_not_know_its_batch():
    ids = [5, 77, 12345, W.HELD_OUT + 3]
    for mix in W.MIXES:
        together = W.scenes(ids, mix)
        for k, seed in enumerate(ids):
            alone = W.scenes([seed], mix)
            for name in vars(alone): assert torch.equal(getattr(alone, name)[0], getattr(together, name)[k])


def test_a_row_a_slice_and_a_mask_choose_scenes():
    s = W.scenes(range(10))
    assert s[3].seed.tolist() == [3] and s[2:5].seed.tolist() == [2, 3, 4]
    assert s[s.seed > 7].seed.tolist() == [8, 9] and len(s[torch.tensor([1, 1])]) == 2
    changed = s.but(hour=torch.full_like(s.hour, 4))
    assert changed.hour.tolist() == [4]*10 and torch.equal(changed.table, s.table)


@pytest.mark.parametrize('mix', W.MIXES)
@pytest.mark.parametrize('name', WORDS)
def test_every_word_occurs_in_its_share(name, mix):
    found = getattr(W.scenes(range(6000), mix), name).bincount(minlength=len(WORDS[name])).double()/6000
    share = W._SHARES[name][W.MIXES.index(mix)]
    assert len(share) == len(WORDS[name]) and abs(sum(share) - 1) < 1e-9
    assert (found - torch.tensor(share, dtype=torch.double)).abs().max() < .02


def test_words_are_independent():
    "Each hour comes with each weather about as often as their shares say."
    s = W.scenes(range(20000))
    both = torch.bincount(s.hour*4 + s.weather, minlength=20).view(5, 4).double()/len(s)
    assert (both - both.sum(1, True)*both.sum(0, True)).abs().max() < .006


def test_half_is_daylight_and_an_eighth_is_night():
    s = W.scenes(range(6000))
    day = W.is_daytime(s)
    assert .47 < day.double().mean() < .53 and torch.equal(day[:5], W.is_daytime(range(5)))
    assert .10 < (s.hour == W.HOURS.index('night')).double().mean() < .14


def test_the_gap_between_the_two_collections():
    photo, anime = (W.scenes(range(4000), mix) for mix in ('photo', 'anime'))
    def share(s, name, word): return (getattr(s, name) == WORDS[name].index(word)).double().mean().item()
    for name, word, least in (('weather', 'fair', 1.6), ('season', 'blossom', 1.7), ('place', 'street', 1.5)):
        assert share(anime, name, word) > least*share(photo, name, word), word
    for name, word in (('weather', 'overcast'), ('place', 'meadow'), ('season', 'snow')):
        assert share(anime, name, word) < .8*share(photo, name, word), word
    def mountains(s): return (s.ranges[:, 0] > 0).double().mean().item()
    assert mountains(anime) < .85*mountains(photo)


def test_no_sun_through_clouds_and_no_moon_at_dusk():
    s = W.scenes(range(4000))
    shows = s.sun[:, 2] > 0
    assert shows.any() and not (shows & (s.weather > 0)).any()
    assert not (shows & (s.hour == W.HOURS.index('dusk'))).any()
    assert (shows & (s.hour == W.HOURS.index('night'))).any()
    low = (s.hour > 0) & (s.hour < 4)
    assert (s.sun[low, 1] > s.horizon[low] - .18).all() and (s.sun[:, 1] < s.horizon).all()


def test_water_and_paths_lie_where_they_belong():
    s = W.scenes(range(4000))
    assert torch.equal(s.lake > 0, among(s, 'lake', 'bridge'))
    meadow = among(s, 'meadow')
    river, path = s.course[:, 0, 3] > 0, s.course[:, 1, 3] > 0
    assert river.any() and path.any() and not (river & path).any()
    assert not ((river | path) & ~meadow).any()
    assert not ((s.ranges > 0).any(1) & among(s, 'sea', 'forest', 'town')).any()
    assert not ((s.flowers > 0) & (s.season > 1)).any()                     # none in autumn and snow


def test_trees_stand_on_dry_ground():
    s = W.scenes(range(6000))
    there, g = s.objects[..., 0] > 0, s.objects[..., 2]
    for k in range(2):
        center, half = W._course_at(s.course[:, k], g)
        wet = there & (half > 0) & ((s.objects[..., 1] - center).abs() < half)
        assert not wet.any()
    assert not (there & (g < s.lake[:, None]*1.05)).any()
    on_track = (s.objects[..., 1] - W._lane_at(s.view, g)).abs() < .04 + .38*g
    assert not (there & on_track & among(s, 'railway')[:, None]).any()
    assert not (there & among(s, 'sea', 'forest', 'town')[:, None]).any()


def test_nobody_stands_in_the_street():
    s = W.scenes(range(6000))
    s = s[among(s, 'street')]
    there = s.objects[..., 0] > 0
    assert there.any() and not (s.objects[..., 0] == W.HOUSE).any()
    scale = s.objects[..., 2]*((1 - s.horizon)/W._EYE)[:, None]
    away = (s.objects[..., 1] - s.view[:, :1]).abs()
    assert (away > .45*scale)[there].all() and (away < .62*scale)[there].all()


def test_spring_has_something_that_blossoms():
    s = W.scenes(range(4000))
    spring = (s.season == 0) & among(s, 'meadow', 'lake', 'fields', 'railway')
    kinds = s.objects[spring, :, 0]
    assert (kinds != W.CONIFER).all() and (kinds == W._ROUND).any(1).double().mean() > .97


def test_captions_say_what_is_there():
    s = W.scenes(range(3000))
    texts = W.captions(s)
    assert texts[7] == W.caption(7) and W.caption(s[7]) == texts[7]
    for k, text in enumerate(texts):
        words = text.split()
        assert W.PLACES[s.place[k]] in words and W._WHEN[s.hour[k]] in text
        assert ('mist' in words) == (s.weather[k] == 2)
        gray = s.weather[k] == 1 and s.hour[k] == 0 and W.PLACES[s.place[k]] != 'forest'
        assert ('overcast' in words) == gray
        wet = s.weather[k] == 3
        assert ('snowfall' in words) == (wet and s.season[k] == 3)
        assert ('rain' in words) == (wet and s.season[k] != 3)
        assert ('snowy' in words) == (s.season[k] == 3)
        if 'mountains' in words: assert s.ranges[k, 0] > 0
        if 'houses' in words: assert (s.objects[k, :, 0] == W.HOUSE).any()
        if 'river' in words: assert s.course[k, 0, 3] > 0
        if s.hour[k] == 0 and s.weather[k] == 0 and s.ranges[k, 0] > 0: assert 'mountains' in words


def test_scenes_share_their_captions():
    texts = W.captions(range(2000))
    count = Counter(texts)
    assert 300 < len(count) < 600 and max(len(text.split()) for text in texts) <= 8
    assert sum(n for n in count.values() if n > 1) > .9*2000


def test_classes_are_those_of_ade20k():
    assert len(W.CLASSES) == len(set(W.CLASSES)) == len(W.ADE_IDS) == len(set(W.ADE_IDS)) == 13
    known = dict(sky=2, mountain=16, water=21, tree=4, grass=9, earth=13, house=25, building=1, road=6,
                 sea=26, sand=46, field=29, bridge=61)
    assert dict(zip(W.CLASSES, W.ADE_IDS)) == known


@pytest.mark.parametrize('call, text', [
    (lambda: W.scenes([1], 'film'), 'any, photo, anime'), (lambda: W.scenes([1.5]), 'integers')])
def test_errors_say_what_to_do(call, text):
    with pytest.raises(ValueError, match=text): call()


def test_wave_is_nearly_a_sine():
    t = torch.linspace(-3, 3, 1201)
    assert (W._wave(t) - torch.sin(2*math.pi*t)).abs().max() < .06
