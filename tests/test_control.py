"Strength, color, detail and region: ends, limits and order, against numbers worked out here."
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from scenimefy.control import Look, adjust, bring_detail, fade, lettering, photo_colors, read_mask
from scenimefy.core import SettingsError

LUMA = np.array([.299, .587, .114])


def random(seed, h=40, w=56, n=1): # in [-1,1]
    return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(seed))*2 - 1


def luma(x): return np.tensordot(LUMA, x.double().numpy(), ([0], [1]))


# ---- strength

def test_ends_and_weights():
    photo, scene = random(0), random(1)
    assert torch.equal(fade(photo, scene, 0.), photo)
    assert (fade(photo, scene, 1.) - scene).abs().max() < 1e-5
    board = (torch.arange(64).view(-1, 1) + torch.arange(64)) % 2*2. - 1     # averages over 8 px are 0
    for a in (.1, .5, .9):
        even = fade(torch.zeros(1, 3, 64, 64), torch.full((1, 3, 64, 64), .6), a)
        strokes = fade(torch.zeros(1, 3, 64, 64), .6*board.expand(1, 3, 64, 64), a)
        assert (even - .6*(1 - (1 - a)**2)).abs().max() < 1e-6, a
        assert (strokes - .6*a*a*board).abs().max() < 1e-6, a


@pytest.mark.parametrize('size', [(40, 56), (1, 1), (3, 90), (17, 8)])
def test_more_strength_is_more_change(size):
    photo, scene = random(2, *size), random(3, *size)
    moved = [(fade(photo, scene, a/20) - photo).abs().mean().item() for a in range(21)]
    assert all(a < b for a, b in zip(moved, moved[1:])), moved


# ---- color

def test_light_of_the_scene_hue_of_the_photo():
    photo, scene = random(4), random(5)
    got = photo_colors(photo, scene)
    assert got.abs().max() <= 1 and np.abs(luma(got) - luma(scene)).max() < 1e-5
    before, after = (x.double().numpy()[0] - luma(x) for x in (photo, got))
    assert np.abs(np.cross(before, after, axis=0)).max() < 1e-5          # one direction: one hue
    assert (np.sum(before*after, 0) > -1e-6).all()                       # and not the opposite one
    share = np.linalg.norm(after, axis=0)/np.linalg.norm(before, axis=0)
    assert share.max() < 1 + 1e-4                                        # never stronger
    paler = share < 1 - 1e-3
    touches = np.abs(got.numpy()[0]).max(0) > 1 - 1e-4
    assert paler.any() and touches[paler].all()                          # paler only where it has to be


def test_colors_that_fit_stay():
    photo = random(6)*.3
    assert (photo_colors(photo, photo) - photo).abs().max() < 1e-6
    gray = torch.full((1, 3, 4, 4), .2)
    made = photo_colors(gray, random(7, 4, 4))
    assert (made.amax(1) - made.amin(1)).max() < 1e-6


# ---- detail

def picture(draw, background=200):
    im = Image.new('RGB', (160, 96), (background,)*3)
    draw(ImageDraw.Draw(im))
    return torch.from_numpy(np.array(im)).permute(2, 0, 1)[None].float()/127.5 - 1


def letters(pen): pen.text((12, 30), 'open from 7 to 6', fill=(20, 20, 40), font=ImageFont.load_default(18))


def test_letters_are_found_and_calm_or_rough_places_are_not():
    found = lettering(picture(letters))[0, 0]
    assert found[34:50, 14:140].mean() > .5 and found[:16].max() == 0
    assert found.min() >= 0 and found.max() <= 1
    assert lettering(torch.zeros(1, 3, 50, 50)).max() == 0
    rough = torch.rand(1, 1, 96, 96, generator=torch.Generator().manual_seed(1)).expand(1, 3, -1, -1)*.3 - .1
    assert lettering(rough).max() == 0                                  # a meadow: fine and weak
    assert lettering(torch.rand(1, 3, 1, 1)).shape == (1, 1, 1, 1)
    edge = picture(lambda pen: pen.rectangle((80, 0, 160, 96), fill=(120, 120, 120)))
    assert lettering(edge).max() < .2                                   # a roof: one edge


def test_detail_comes_back_where_there_are_letters_and_only_there():
    photo = picture(letters)
    scene = torch.nn.functional.avg_pool2d(photo, 7, 1, 3)*.8 + .1     # blurred, and of another tone
    off = [((bring_detail(photo, scene, a) - scene)*(lettering(photo) == 0)).abs().max() for a in (.5, 1.)]
    assert off == [0, 0]
    def contrast(x): return luma(x)[0, 34:50, 14:140].std()
    steps = [contrast(bring_detail(photo, scene, a)) for a in (0., .25, .5, .75, 1.)]
    assert steps == sorted(steps) and steps[-1] > .8*contrast(photo) > 2*steps[0]
    assert torch.equal(bring_detail(photo, scene, 0.), scene)
    other = photo*.5 + .3                                               # a broad change of color only
    darker = other - .2
    assert (bring_detail(other, darker, 1.) - darker).abs().max() < 1e-5


# ---- region

def test_masks_of_any_size_and_kind(tmp_path):
    half = Image.new('L', (10, 6), 0)
    half.paste(255, (0, 0, 5, 6))
    half.save(tmp_path/'m.png')
    file = tmp_path/'m.png'
    for mask in (half, half.convert('RGB'), half.convert('1'), np.array(half), file, str(file)):
        weights = read_mask(mask, 60, 100, feather=0)
        assert weights.shape == (1, 1, 60, 100)
        assert weights[..., :40].min() == 1 and weights[..., 60:].max() == 0
        assert 0 <= weights.min() and weights.max() <= 1
    for size in ((1, 1), (1, 70), (300, 2)): assert read_mask(half, *size).shape == (1, 1, *size)
    assert read_mask(Image.new('L', (3, 3), 128), 4, 4).unique().item() == pytest.approx(128/255)


def test_the_edge_is_a_ramp_of_the_width_asked_for():
    step = np.zeros((1, 101), np.uint8)
    step[:, 50:] = 255
    for feather in (0, 3, 20):
        row = read_mask(step, 1, 101, feather)[0, 0, 0].double().numpy()
        window = np.array([step[0, max(0, i - feather):i + feather + 1].mean()/255 for i in range(101)])
        assert np.abs(row - window).max() < 1e-6, feather


# ---- together

def test_nothing_asked_for_is_nothing_done():
    photo, scene = random(8), random(9)
    assert adjust(photo, scene, Look()) is scene


def test_zero_and_black_are_the_photo_whatever_else_is_asked_for():
    photo, scene, black = random(10), random(11), torch.zeros(1, 1, 40, 56)
    for preserve, keep_color in itertools.product((0., .7), (False, True)):
        look = dict(preserve=preserve, keep_color=keep_color)
        assert torch.equal(adjust(photo, scene, Look(strength=0., **look)), photo)
        assert torch.equal(adjust(photo, scene, Look(**look), black), photo)


def test_the_order_is_detail_color_strength_region():
    photo, scene = picture(letters), random(12, 96, 160)*.8
    mask = torch.linspace(0, 1, 160).expand(1, 1, 96, 160)
    want = fade(photo, photo_colors(photo, bring_detail(photo, scene, .6)), .4).clamp(-1, 1)
    want = photo + mask*(want - photo)
    got = adjust(photo, scene, Look(strength=.4, preserve=.6, keep_color=True), mask)
    assert (got - want).abs().max() < 1e-5
    other = fade(photo, bring_detail(photo, photo_colors(photo, scene), .6), .4)
    assert (got - other)[..., 100:].abs().max() > .05                   # another order is another picture


def test_a_batch_is_its_pictures():
    photos, scenes = random(13, n=3), random(14, n=3)
    look, masks = Look(strength=.3, preserve=1., keep_color=True), torch.rand(3, 1, 40, 56)
    whole = adjust(photos, scenes, look, masks)
    for i in range(3):
        one = adjust(photos[i:i+1], scenes[i:i+1], look, masks[i:i+1])
        assert (whole[i:i+1] - one).abs().max() < 1e-6


@pytest.mark.parametrize('wrong', [dict(strength=1.1), dict(strength=-.1), dict(preserve=2.),
                                   dict(feather=-1), dict(keep_color=1),
                                   dict(strength=float('nan')), dict(power=1)])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(SettingsError, match=next(iter(wrong))): Look(**wrong)
