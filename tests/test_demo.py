"The demo's arithmetic, its clock and its shares of time; the demo as a whole runs in test_cli."
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import scenimefy.demo as D
from scenimefy.bake import compare_to_truth
from scenimefy.core import UserError
from scenimefy.demo import (Clock, DemoSettings, _failed_html, _fit_finetune, _fit_train, _gain,
                            _losses_html, _next_html, _photos_html, _seconds_per_step, _short_memory,
                            _show_photo, _show_photos, _smooth)
from scenimefy.finetune import FinetuneSettings
from scenimefy.semisup import SemisupSettings
from scenimefy.painters import render
from scenimefy.world import HELD_OUT

from test_page import Reader


@pytest.fixture
def clock(monkeypatch):
    "A clock that stands still until it is moved: `clock[0] += 1`."
    now = [100.]
    monkeypatch.setattr(D, 'time', SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_smooth_is_the_mean_of_the_last_few():
    assert _smooth([1, 3, 5, 7], 2) == [1, 2, 4, 6] and _smooth([1, 3, 5, 7], 3) == [1, 2, 3, 5]
    assert _smooth([4, 2], 1) == [4, 2] and _smooth([], 3) == []


def test_gain_by_hand():
    "Four scenes come .2, .1, .3 and 0 closer, of .4: 37.5 percent, with the deviation of the mean of four."
    before, after = torch.full((4,), .4), torch.tensor([.2, .3, .1, .4])
    g = _gain(before, after)
    error = 100*math.sqrt((.05**2 + .05**2 + .15**2 + .15**2)/3)/math.sqrt(4)/.4
    assert (g['word'], g['better'], g['n']) == ('closer', 3, 4)
    numbers = (g['percent'], g['error'], g['photo'], g['output'])
    assert numbers == pytest.approx((37.5, error, .4, .25), rel=1e-4)
    worse = _gain(after, before)
    assert (worse['word'], worse['better']) == ('farther', 0)
    assert worse['percent'] == pytest.approx(60, rel=1e-4)


def test_average_remembers_a_tenth_of_a_short_run():
    assert [_short_memory(.99, n) for n in (50, 5000, 5)] == pytest.approx([.8, .99, 0.])
    assert _short_memory(.5, 50) == .5


def test_a_step_is_timed_without_the_slow_first_ones(clock):
    "Nine steps, the first three slow, the others two seconds each."
    def attempt(folder, tick):
        for seconds in (60, 9, 5, 2, 2, 2, 2, 2, 2):
            clock[0] += seconds
            tick()
    assert _seconds_per_step(attempt) == pytest.approx(2.)


def test_steps_fill_the_time(monkeypatch):
    "A hundred seconds at half a second each are 200 steps: ten in each of twenty epochs, or all of Stage 1."
    monkeypatch.setattr(D, '_seconds_per_step', lambda attempt: .5)
    third = SemisupSettings.preset('tiny').but(epochs=20, ema=.99)
    third = _fit_train(third, 100., 'photos', 'anime', 'pairs')
    assert (third.epochs, third.epoch_steps, third.ema) == (20, 10, pytest.approx(.95))
    first = _fit_finetune(FinetuneSettings.preset('tiny').but(ema=.99), 100., 'tiny', 'anime')
    assert (first.steps, first.ema) == (200, pytest.approx(.95))


def test_both_stages_share_the_time(monkeypatch, tmp_path):
    "A quarter of eighty seconds for Stage 1, the rest for Stage 3."
    class Enough(Exception): pass
    given = {}
    def fit(name, cfg, seconds, *_):
        given[name] = seconds
        if name == 'third': raise Enough
        return cfg
    fakes = dict(_fit_finetune=lambda *a: fit('first', *a), _fit_train=lambda *a: fit('third', *a),
                 finetune=lambda *a, **k: 'made', StyleganPairs=lambda *a: None,
                 load_segmenter=lambda *a: None, make_pairs=lambda *a: None)
    for name, fake in fakes.items(): monkeypatch.setattr(D, name, fake)
    settings = DemoSettings().but(seconds=80., share=.25)
    first, third = FinetuneSettings.preset('tiny'), SemisupSettings.preset('tiny')
    with pytest.raises(Enough):
        D._run_stages(settings, ('photos', 'anime'), tmp_path, first, third, Clock(lambda text: None))
    assert given == dict(first=20., third=60.)


def test_what_is_measured_is_what_stylize_shows():
    "The bare photo, its colors in the palette, and both networks with the tone that they ask for."
    class Net:
        def __init__(self, palette): self.palette = palette
        def paint(self, x): return x*.5
    x = torch.rand(2, 3, 8, 8)*2 - 1
    halved = torch.eye(3, 4)*.25
    found = {name: paint(x) for name, paint in D._compared(Net(halved), Net(None)).items()}
    torch.testing.assert_close(torch.stack(list(found.values())), torch.stack([x, x*.25, x*.5, x*.5]))
    assert len(D._compared(Net(None), Net(None))) == 3                         # no palette, no row for it


def test_distance_is_taken_to_the_anime_of_the_scene():
    "Doing nothing is as far as photo is from anime, painting gray as gray is; batches do not show."
    seeds = [HELD_OUT, HELD_OUT + 1, HELD_OUT + 2]
    photo, anime = (render(seeds, 32, style) for style in ('photo', 'anime'))
    nets = {'nothing': lambda x: x, 'gray': torch.zeros_like}
    found = compare_to_truth(nets, seeds, 32, lambda a, b: (a - b).amax((1, 2, 3)), batch=2)
    for name, made in (('nothing', photo), ('gray', torch.zeros_like(anime))):
        off = made - anime
        torch.testing.assert_close(found[name], torch.stack([off.abs().mean((1, 2, 3)), off.amax((1, 2, 3))]))
    assert (compare_to_truth({'nothing': lambda x: x}, seeds[:1], 32)['nothing'][1] == 0).all()


def test_clock_adds_up_what_has_one_name(clock):
    heard = []
    c = Clock(heard.append)
    for name, seconds in (('timing', 1), ('Stage 1', 5), ('timing', 2), ('Stage 3', 7)):
        c.start(name, 'x' if name == 'timing' else '')
        clock[0] += seconds
    c.stop()
    clock[0] += 100
    c.stop()                                                               # nothing runs: nothing is added
    assert c.seconds == {'timing': 3., 'Stage 1': 5., 'Stage 3': 7.}
    assert heard == ['timing: x', 'Stage 1', 'timing: x', 'Stage 3']


@pytest.mark.parametrize('size, small', [((60, 20), (32, 11)), ((20, 60), (11, 32)), ((40, 40), None),
                                         ((41, 8), (32, 6))])
def test_large_photos_are_translated_small_as_well(monkeypatch, tmp_path, size, small):
    "Large is what is more than a quarter longer than 32 px on its longer side."
    monkeypatch.setattr(D, 'stylize', lambda photo, net: photo.copy())
    Image.new('RGB', size).save(tmp_path/'photo.png')
    shown = _show_photo(None, tmp_path/'photo.png', tmp_path/'out.png', 32)
    assert (shown.small and shown.small.size) == small and Image.open(tmp_path/'out.png').size == size


def test_page_compares_kept_pairs_with_the_others(monkeypatch):
    lines = [dict(seed=i, lbce=1. + i, n_categories=3, agreement=a) for i, a in enumerate((.9, .8, .3, .1))]
    monkeypatch.setattr(D, 'read_scores', lambda folder: lines)
    monkeypatch.setattr(D, 'choose', lambda lines, cfg: {0, 1})
    monkeypatch.setattr(D, 'examples', lambda lines, cfg, n: {'best': [0], 'middle': [1], 'worst': [3]})
    monkeypatch.setattr(D, 'pair_html', lambda *a: '')
    text = D._stage2_html(None, None, 'folder', None)
    assert '85.0 % of the pixels agree in the kept pairs, 20.0 % in the others' in text
    assert 'made 4 pairs, and the 2 on' in text
    assert '<h3>best</h3>' in text and '<h3>worst</h3>' in text and 'middle' not in text


def test_no_translation_lies_over_another_or_over_a_photo(monkeypatch, tmp_path):
    "Four photos of one name, in letters of two sizes, and one that lies where its translation would."
    written = []
    monkeypatch.setattr(D, '_show_photo', lambda net, file, save, small: written.append(save.name))
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'hill.png').touch()
    names = ('a/Lake.jpg', 'b/lake.png', 'c/LAKE.b.jpg', 'd/lake.webp', 'e/LAKE.gif', 'out/hill.png')
    files = [tmp_path/name for name in names]
    _show_photos(None, files, tmp_path/'out', 32, [])
    assert written == ['Lake.png', 'lake-2.png', 'LAKE.b.png', 'lake-3.png', 'LAKE-4.png', 'hill-2.png']


def test_a_photo_that_fails_does_not_stop_the_others(monkeypatch, tmp_path):
    def show(net, file, save, small):
        if 'bad' in file.name: raise UserError(f'{file}: torn')
        if 'big' in file.name: raise MemoryError('too large')
        return save.name
    monkeypatch.setattr(D, '_show_photo', show)
    failed = [('gone.jpg', 'gone.jpg: no such file')]
    files = [tmp_path/'bad.jpg', tmp_path/'big.jpg', tmp_path/'good.jpg']
    assert _show_photos(None, files, tmp_path/'out', 32, failed) == ['good.png']
    assert failed[1:] == [(str(files[0]), f'{files[0]}: torn'), (str(files[1]), f'{files[1]}: too large')]


HOSTILE = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "' onload='x",
           '\udce4<i>', 'a\x1b<b>']


@pytest.mark.parametrize('name', HOSTILE, ids=ascii)
def test_no_photo_becomes_html(name):
    "Names of photos, reasons of failures, names of losses and of the folder."
    def sections(name):
        picture = Image.new('RGB', (8, 6), 'red')
        photos = [D.Shown(name, picture, picture, 1., small=picture)]
        log = {'loss': ([1, 2], [.5, .4])}
        return (_failed_html([(name, f'{name}: torn')]) + _photos_html(photos, 32) + _losses_html(log, log)
                + _next_html(name + '/translator.safetensors'))
    found = Reader(sections(name))
    assert found.tags == Reader(sections('harmless')).tags and name in ''.join(found.texts)
