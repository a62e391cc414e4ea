"The second anime and its measures: against loops, against the first painter, and the results that are kept."
import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from scenimefy import flat as F
from scenimefy.ablate import AblateSettings, bundled_results, read_table, row_file, world_folder
from scenimefy.core import seeded, to_model
from scenimefy.painters import labels, render, to_uint8
from scenimefy.world import CLASSES, HELD_OUT, PLACES, SEASONS, scenes


ROOT = Path(__file__).resolve().parents[1]


def random_labels(size, kinds=3): return torch.randint(kinds, (2, size, size), generator=seeded('flat', size))


def noise(*shape): return torch.rand(*shape, generator=seeded('flat noise'))*2 - 1


def luma(t): return .299*t[0] + .587*t[1] + .114*t[2]


# ---- the painter

def test_bytes_are_stored():
    image = to_uint8(F.render_flat([1, 2, 3, HELD_OUT + 4], 48))
    assert hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16] == 'd03914f305b947ea'


@pytest.mark.parametrize('size', [1, 2, 3, 5, 33, 64])
def test_any_size_and_any_batch(size):
    ids = list(range(100, 112))
    batch = F.render_flat(ids, size)
    assert batch.shape == (12, 3, size, size) and batch.isfinite().all()
    assert batch.min() >= -1 and batch.max() <= 1
    for k in (0, 7, 11): assert torch.equal(F.render_flat([ids[k]], size)[0], batch[k])
    assert torch.equal(F.painted(ids, size, 'flat'), batch)


def test_the_first_anime_is_untouched():
    before = render(range(6), 40, 'anime')
    F.render_flat(range(6), 40)
    assert torch.equal(render(range(6), 40, 'anime'), before)


def fair_meadows(n=12):
    s = scenes(range(1500))
    plain = (s.place == PLACES.index('meadow')) & (s.weather == 0) & (s.hour == 0) & (s.haze < .2)
    return s[(plain & (s.season == SEASONS.index('summer'))).nonzero()[:n, 0]]


def test_grass_has_one_color():
    "Near us, where the air has no color of its own, half of all grass or more is exactly one color."
    s = fair_meadows()
    assert len(s) >= 8
    near = labels(s, 96) == CLASSES.index('grass')
    near[:, :72] = False
    def largest_share(images):
        found = []
        for image, here in zip(to_uint8(images), near):
            if here.sum() < 200: continue
            _, counts = image[here].unique(dim=0, return_counts=True)
            found.append(counts.max().item()/counts.sum().item())
        return found
    flat, first = largest_share(F.render_flat(s, 96)), largest_share(render(s, 96, 'anime'))
    assert len(flat) >= 6 and min(flat) > .5 and min(first) < .3
    assert sum(flat)/len(flat) > sum(first)/len(first) + .2


def test_lines_are_dark_by_day_and_by_night():
    for hour in (0, 4):
        s = scenes(range(16))
        s = s.but(hour=torch.full_like(s.hour, hour))
        ink = F.outlines(labels(s, 64)) == 1
        light = F.render_flat(s, 64).mul(torch.tensor([.299, .587, .114]).view(3, 1, 1)).sum(1)
        assert ink.float().mean() > .02 and light[ink].max() < -.5


@pytest.mark.parametrize('size, reach', [(9, 1), (64, 1), (100, 2)])
def test_outlines_pixel_by_pixel(size, reach):
    lab = random_labels(size)
    found = F.outlines(lab)
    for y, x in [(0, 0), (0, size - 1), (size - 1, 3), (4, 4), (5, 2), (size//2, size//2)]:
        other = 0
        for dy in range(-reach, reach + 1):
            for dx in range(-reach, reach + 1):
                j, i = min(max(y + dy, 0), size - 1), min(max(x + dx, 0), size - 1)
                other += int(lab[1, j, i] != lab[1, y, x])
        assert found[1, y, x].item() == pytest.approx(min(1, 3*other/(2*reach + 1)**2), abs=1e-6)


# ---- the measures

def neighbors(y, x, size):
    "The pixels above, below, left and right."
    around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    return [(j, i) for j, i in around if 0 <= j < size and 0 <= i < size]


def square(y, x, reach, size):
    rows = range(max(0, y - reach), min(size, y + reach + 1))
    columns = range(max(0, x - reach), min(size, x + reach + 1))
    return [(j, i) for j in rows for i in columns]


def slow_mean(light, allowed, y, x, size):
    values = [light[j][i] for j, i in square(y, x, 4, size) if allowed[j][i]]
    return sum(values)/len(values) if values else None


def slow_marks(image, grass):
    "The definition in the lesson, with loops and a flood fill."
    size, light = len(grass), luma(image).double().tolist()
    pixels = [(y, x) for y in range(size) for x in range(size)]
    inner = [[all(grass[j][i] for j, i in square(y, x, 2, size)) for x in range(size)] for y in range(size)]
    jumps, dark = 0, set()
    for y, x in pixels:
        if not inner[y][x]: continue
        later = [(j, i) for j, i in neighbors(y, x, size) if (j, i) > (y, x) and inner[j][i]]
        jumps += any(abs(light[y][x] - light[j][i]) > .12 for j, i in later)
        if slow_mean(light, inner, y, x, size) - light[y][x] > .12: dark.add((y, x))
    marks = 0
    while dark:
        marks, edge = marks + 1, [dark.pop()]
        while edge:
            new = [p for p in square(*edge.pop(), 1, size) if p in dark]
            dark -= set(new)
            edge += new
    n = sum(map(sum, inner))
    return jumps/n, 1000*marks/n


def test_marks_against_loops():
    size, image = 30, noise(3, 30, 30)*.25
    grass = torch.ones(size, size, dtype=torch.bool)
    grass[:9, :12] = False
    grass[20:, 25:] = False
    found = F.grass_marks(image[None], grass[None])
    edges, strokes = slow_marks(image, grass.tolist())
    assert 0 < edges < 1 and strokes > 5
    assert found['edges'] == pytest.approx(edges) and found['strokes'] == pytest.approx(strokes)


def test_marks_leave_out_what_is_not_grass():
    image, grass = torch.zeros(1, 3, 24, 24), torch.zeros(1, 24, 24, dtype=torch.bool)
    grass[:, :, :12] = True
    image[..., 10:] = -1                          # a dark line at the border, and all beyond it
    assert F.grass_marks(image, grass) == dict(edges=0., strokes=0.)
    assert F.grass_marks(image, torch.zeros_like(grass)) == dict(edges=0., strokes=0.)


def test_depth_against_loops():
    size, image, lab = 20, noise(3, 20, 20), torch.zeros(20, 20, dtype=torch.int64)
    lab[:, 9:], lab[12:] = 1, 2
    light, total, n = luma(image).double().tolist(), 0., 0
    edge = {(y, x) for y in range(size) for x in range(size)
            if any(lab[j, i] != lab[y, x] for j, i in neighbors(y, x, size))}
    away = [[not any(p in edge for p in square(y, x, 1, size)) for x in range(size)] for y in range(size)]
    for y, x in edge:
        around = slow_mean(light, away, y, x, size)
        if around is None: continue
        total, n = total + around - light[y][x], n + 1
    assert F.outline_depth(image[None], lab[None]) == pytest.approx(total/n, abs=1e-5)


# ---- data and ruler

@pytest.fixture(scope='module')
def ruler(): return F.StyleRuler(20, n_real=40)


def test_ruler_knows_the_styles(ruler):
    flat, anime, photo = (ruler(t) for t in (ruler.truth['flat'], ruler.truth['anime'], ruler.photo))
    assert flat['l1_flat'] == anime['l1_anime'] == 0 < flat['l1_anime'] == anime['l1_flat']
    assert flat['distance_flat'] < flat['distance_anime'] and anime['distance_anime'] < anime['distance_flat']
    assert photo['agreement'] == 1 and flat['agreement'] < 1
    assert flat['ink'] > anime['ink'] > photo['ink']


def test_grassy_scenes_come_first(ruler):
    share = (ruler.lab == CLASSES.index('grass')).float().mean((1, 2))
    picked = ruler.grassy(4)
    rest = [k for k in range(20) if k not in picked]
    assert share[picked].min() >= share[rest].max()


def test_both_styles_are_trained_on_the_same_scenes(tmp_path):
    cfg = AblateSettings().but(world=4)
    first, second = (F.style_folder(style, cfg, tmp_path) for style in F.STYLES_HERE)
    assert first == world_folder(tmp_path, 4, 96)/'anime'
    assert [p.name for p in sorted(first.iterdir())] == [p.name for p in sorted(second.iterdir())]
    s = scenes([4_000_000 + 4 + 2], 'anime')
    for folder, drawn in ((first, render(s, 96, 'anime')), (second, F.render_flat(s, 96))):
        stored = to_model(Image.open(folder/'000002.png'))
        assert (stored - drawn).abs().max() <= 1.01/127.5


def test_pairs_of_the_painters_show_one_scene(tmp_path):
    cfg = AblateSettings().but(world=4, pairs=4)
    folder = F.painted_pairs('flat', cfg, tmp_path)
    for k in range(4):
        s = scenes([4_000_000 + 2*4 + k], 'photo')
        for side, drawn in (('trainA', render(s, 96, 'photo')), ('trainB', F.render_flat(s, 96))):
            stored = to_model(Image.open(folder/side/f'{k:06d}.png'))
            assert (stored - drawn).abs().max() <= 1.01/127.5
    assert len(list(folder.rglob('*.png'))) == 8


def test_each_row_is_given_its_pictures_and_its_pairs(tmp_path, monkeypatch):
    asked = {}
    def trained(cfg, photos, anime, pairs, folder, **rest):
        asked[folder.name] = (anime.name, pairs.name, cfg.content)
        return 'copy'
    monkeypatch.setattr(F, 'train', trained)
    monkeypatch.setattr(F, 'style_pairs', lambda style, cfg, work, *rest: tmp_path/f'made {style}')
    monkeypatch.setattr(F, 'folder_digest', lambda folder: 'x')
    plan = F.plan_styles(AblateSettings().but(world=4, pairs=4, scenes=8, real=8), tmp_path, 2)
    for row, change in F.STYLE_ROWS.items(): plan['run_one'](change, 0, tmp_path/row)
    assert asked == {'anime': ('anime', 'made anime', 'none'), 'flat': ('flat-4', 'made flat', 'none'),
                     'flat + content': ('flat-4', 'made flat', 'color'),
                     'flat, true pairs': ('flat-4', 'painted-flat-4', 'none')}


# ---- what is kept

def test_results_are_those_of_the_rows():
    folder = bundled_results()
    table = read_table(folder/'style.json')
    assert table['runs'] and all(r['found'] for r in table['runs'].values())
    assert all(json.loads(json.dumps(F.STYLE_ROWS[row])) == change for row, change in table['rows'].items())
    kept = [folder/'style.json', *(folder/'style').iterdir()]
    wanted = {row_file(row) for row in (*table['rows'], 'photos', 'true anime', 'true flat', 'pairs flat')}
    assert wanted <= {p.name for p in kept}
    assert sum(p.stat().st_size for p in kept) < 150_000


def test_the_call_in_the_lesson_makes_the_table_that_is_kept():
    cells = json.loads((ROOT/'nbs'/'12g_flat.ipynb').read_text(encoding='utf-8'))['cells']
    (call,) = [''.join(c['source']) for c in cells if c['id'] == 'slow-table']
    about = read_table(bundled_results()/'style.json')['about']
    steps = about['settings']['epochs']*about['settings']['epoch_steps']
    wanted = dict(budget=steps, stage1=about['stage1'], scenes=about['scenes'], real=about['real'])
    for name, value in wanted.items(): assert f'{name}={value}' in call, name


def test_the_painters_score_what_they_are():
    scale = read_table(bundled_results()/'style.json')['scale']
    assert scale['true flat']['l1_flat'] == scale['true anime']['l1_anime'] == 0
    for measure in ('edges', 'strokes'): assert scale['true flat'][measure] < scale['true anime'][measure]
    assert scale['true flat']['ink'] > 20*scale['true anime']['ink']
