"""Table 1: rows that reach their methods, and photographs that are measured as the page says."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scenimefy.table1 as T
from scenimefy import semisup
from scenimefy.ablate import AblateSettings, Ruler, bundled_results, read_table
from scenimefy.baselines import RECIPES, BaselineSettings, color_statistics
from scenimefy.core import SettingsError, UserError, seeded, to_image
from scenimefy.data import Transform
from scenimefy.kept import kept
from scenimefy.painters import write_world
from scenimefy.semisup import SemisupSettings
from scenimefy.table1 import (PUBLISHED_1, TABLE_1, MethodRuler, PhotoRuler, compare_methods, windows,
                              _world_statistics)
from scenimefy.translator import ResnetGenerator
from scenimefy.whitebox import guided_filter

ROOT = Path(__file__).resolve().parents[1]
SMALL = BaselineSettings.preset('tiny').but(
    size=32, load_size=32, ngf=4, n_blocks=5, ndf=4, head_dim=8, n_patches=16, epochs=2, epoch_steps=2,
    log_every=1, sample_every=4, save_every=2)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp('table1'), n_photos=5, n_anime=5, n_pairs=4, size=40)


def noise(key, *shape): return torch.rand(*shape, generator=seeded('table1', key))*1.9 - .95


def test_rows_differ_and_are_named_as_the_paper_names_them():
    assert len({json.dumps(change, sort_keys=True) for change in TABLE_1.values()}) == len(TABLE_1) == 10
    assert set(PUBLISHED_1) <= set(TABLE_1)
    assert PUBLISHED_1 == {'photo': 121.807, 'CartoonGAN': 67.200, 'AnimeGAN': 67.739, 'White-box': 61.973,
                           'CTSS': 66.729, 'VToonify': 90.578, 'Scenimefy': 48.922}


def test_table_rows_reach_their_methods(world, tmp_path, monkeypatch):
    "Each row is trained by its own step, with its own seed, and paints with what it learned."
    asked = []
    class World:
        photo, truth, scale = noise('photos', 3, 3, 32, 32), None, dict
    monkeypatch.setattr(T, 'world_folder', lambda *a: world)
    monkeypatch.setattr(T, 'pair_folders', lambda *a: {'pairs': world/'pairs'})
    monkeypatch.setattr(T, 'world_ruler', lambda *a: World())
    known = SemisupSettings().to_dict()
    small = SemisupSettings(**{k: v for k, v in SMALL.to_dict().items() if k in known})
    start = ResnetGenerator(3, 3, small.ngf, small.n_blocks)
    start.paint = lambda photos: photos
    first = next(start.parameters())
    def rival(r, name):
        begins = dict(r.nets.G.named_parameters()).values()
        assert any(torch.equal(p, first) for p in begins) and r.cfg.tone == 'style' and r.cfg.warmup == 0
        asked.append((name, r.cfg.seed, r.cfg.method))
        return 'file'
    def ours(cfg, *args, **kwargs):
        assert kwargs['start'] == 'copy' and cfg.tone == 'style'
        asked.append(('Scenimefy', cfg.seed, ''))
        return 'file'
    monkeypatch.setattr(T, 'short_translator', lambda budget: small)
    monkeypatch.setattr(T, 'run_training', rival)
    monkeypatch.setattr(T, 'train', ours)
    monkeypatch.setattr(T, 'load_translator', lambda file: start)
    monkeypatch.setattr(semisup, 'load_translator', lambda file: start)
    plan = T.plan_1(AblateSettings(), tmp_path)
    rows = dict(plan['rows'])
    for too_large in ('VToonify', 'CTSS'): del rows[too_large]       # they refuse pictures as small as these
    for i, (row, change) in enumerate(rows.items()):
        paint = plan['run_one'](change, 5, tmp_path/f'run{i}')
        images = paint(World.photo)
        assert images.shape == World.photo.shape
        assert torch.equal(images, World.photo) == (row not in ('color transfer', 'White-box'))
        if row == 'White-box': torch.testing.assert_close(images, guided_filter(World.photo, World.photo))
    assert asked == [(n, 5, n) for n in (*RECIPES, 'White-box')] + [('Scenimefy', 5, '')]


def test_vtoonify_learns_as_many_steps_and_paints_with_the_degree_of_its_row(tmp_path, monkeypatch):
    asked = []
    def trained(cfg, *rest, **how):
        asked.append((cfg.steps, cfg.seed, cfg.lam_adv, rest))
        return 'file'
    monkeypatch.setattr(T, 'train_toonify', trained)
    monkeypatch.setattr(T, 'load_toonify', lambda file: file)
    monkeypatch.setattr(T, 'toonify', lambda net, photos, degree: (net, photos, degree))
    change = {**TABLE_1['VToonify'], 'degree': .5, 'lam_adv': .3}
    paint = T.train_method(SMALL, change, 7, ('photos', 'anime', 'pairs', tmp_path))
    assert asked == [(4, 7, .3, ('tiny', 'tiny-anime', tmp_path))]
    assert paint('a photo') == ('file', 'a photo', .5)


def test_statistics_are_those_of_the_first_pictures(world):
    look = Transform(64)
    files = sorted((world/'anime').glob('*.png'))
    for n in (2, 5):
        pictures = torch.stack([look(Image.open(f)) for f in files[:n]])
        for got, want in zip(_world_statistics(world/'anime', n), color_statistics(pictures)):
            torch.testing.assert_close(got, want)
    assert not torch.equal(_world_statistics(world/'anime', 2)[0], _world_statistics(world/'anime', 5)[0])


def test_windows_lie_inside_and_cover_the_corners():
    image = noise('windows', 1, 3, 80, 200)
    six = windows(image)
    assert six.shape == (6, 3, 64, 64)
    assert torch.equal(six[0], image[0, :, :64, :64]) and torch.equal(six[5], image[0, :, 16:, 136:])
    assert windows(image[..., :64, :64]).shape == (6, 3, 64, 64)      # six times the same


class Plain(Ruler):
    "A ruler whose features are the mean color: distances by hand."
    def __init__(self):
        self.features, self.real = lambda images: images.mean((2, 3)), noise('real', 50, 3)
        self.photo, self.truth = noise('drawn', 5, 3, 64, 64), None
    def __call__(self, images): return dict(frechet=images.mean().item())


@pytest.fixture
def photographs(tmp_path):
    for k, size in enumerate([(700, 500), (90, 300), (64, 64)]):
        generator = seeded('photograph', str(k))
        coarse = torch.rand(1, 3, 7, 9, generator=generator)*2 - 1
        to_image(coarse).resize(size, Image.Resampling.BICUBIC).save(tmp_path/f'{k}.png')
    return tmp_path


def test_photographs_of_any_size_are_brought_to_one_that_every_network_takes(photographs):
    sizes = []
    def paint(photo):
        sizes.append(tuple(photo.shape))
        return photo
    found = PhotoRuler(photographs, Plain())(paint)
    assert sizes == [(1, 3, 368, 512), (1, 3, 512, 152), (1, 3, 512, 512)]
    assert found['photo light'] == pytest.approx(1) and found['photo dL'] == pytest.approx(0, abs=1e-3)


def test_the_numbers_are_those_of_kept(photographs):
    ruler = PhotoRuler(photographs, Plain())
    def paint(photo): return .6*photo.flip(1) - .2
    found = ruler(paint)
    rows = []
    for f in sorted(photographs.glob('*.png')):
        photo = T._measured_size(Image.open(f))
        pixels = torch.from_numpy(np.array(photo))/127.5 - 1
        scene = ((.6*pixels.flip(-1) - .2 + 1)*127.5).round().byte().numpy()
        rows.append(kept(photo, Image.fromarray(scene)))
    for key in ('light', 'dL', 'hue', 'edges', 'flat', 'halo'):
        assert found[f'photo {key}'] == pytest.approx(sum(row[key] for row in rows)/3, abs=2e-2), key


def test_gray_photographs_have_no_hue_and_spoil_no_mean(tmp_path):
    Image.linear_gradient('L').convert('RGB').save(tmp_path/'gray.png')
    coarse = torch.rand(1, 3, 5, 5, generator=seeded('color'))*2 - 1
    to_image(coarse).resize((200, 200), Image.Resampling.BICUBIC).save(tmp_path/'color.png')
    found = PhotoRuler(tmp_path, Plain())(lambda photo: photo)
    assert found['photo hue'] == pytest.approx(0, abs=1e-3)


def test_a_folder_without_photographs_is_refused(tmp_path):
    with pytest.raises(UserError, match='no picture'): PhotoRuler(tmp_path, Plain())


def test_a_method_is_measured_on_both_and_shown_with_three_photographs(photographs):
    world = Plain()
    alone, both = MethodRuler(world), MethodRuler(world, PhotoRuler(photographs, world))
    assert set(alone(lambda x: x)) == {'frechet'} < set(both(lambda x: x))
    assert alone.picture(lambda x: x).shape == (3, 128, 512)
    picture = both.picture(lambda x: x)
    assert picture.shape == (3, 128, 3*192 + 512)
    assert torch.equal(picture[:, ::2, 576::2], torch.cat(list(world.photo[:4]), 2))
    first = torch.from_numpy(np.array(T._measured_size(Image.open(photographs/'0.png')))).permute(2, 0, 1)
    middle = first[:, 120:248, 160:352]/127.5 - 1            # of 512×368 px, not made smaller
    torch.testing.assert_close(picture[:, :, :192], middle, atol=.005, rtol=0)


def test_the_call_in_the_lesson_makes_the_table_that_is_kept():
    cells = json.loads((ROOT/'nbs'/'12f_table1.ipynb').read_text(encoding='utf8'))['cells']
    source = {c['id']: ''.join(c['source']) for c in cells}
    table = read_table(bundled_results()/'table1.json')
    steps = table['about']['settings']['epochs']*table['about']['settings']['epoch_steps']
    seeds = {r['seed'] for r in table['runs'].values()}
    assert f'seeds={len(seeds)}, budget={steps}' in source['slow-table'] and seeds == set(range(len(seeds)))
    assert f'--seeds {len(seeds)} --budget {steps} ' in source['slow-table-md']
    assert f"{table['about']['photographs']} in all" in source['photos-read-md']
    for rows in (table['rows'], TABLE_1): assert json.loads(json.dumps(rows)) == table['rows']
    assert all(r['found'] for r in table['runs'].values())


def test_a_row_that_nobody_knows_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="table 1 has no row 'CartonGAN'"):
        compare_methods(tmp_path, rows=['CartonGAN'])


def test_a_mistyped_folder_of_photographs_is_told_before_anything_is_drawn(tmp_path):
    with pytest.raises(UserError, match='no such file or folder'):
        compare_methods(tmp_path/'out', photos=tmp_path/'nobody')
    assert not (tmp_path/'out').exists()
