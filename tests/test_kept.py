"What a scene keeps of its photo: every number beside a slow or a hand-made one, odd pictures, two folders."
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from scenimefy.core import UserError
from scenimefy.data import ImageError
from scenimefy.kept import KEPT, KEPT_NOTE, kept, measure_kept


def lab_of(color):
    "L*a*b* of one sRGB color, in plain Python."
    light = [c/12.92 if c <= .04045 else ((c + .055)/1.055)**2.4 for c in (v/255 for v in color)]
    rows = (.4124564, .3575761, .1804375), (.2126729, .7151522, .0721750), (.0193339, .1191920, .9503041)
    xyz = [sum(w*c for w, c in zip(row, light)) for row in rows]
    ratios = [v/white for v, white in zip(xyz, (.95047, 1, 1.08883))]
    x, y, z = [t**(1/3) if t > (6/29)**3 else t*(29/6)**2/3 + 4/29 for t in ratios]
    return 116*y - 16, 500*(x - y), 200*(y - z)


def lightness(gray): return lab_of((gray, gray, gray))[0]
def random(seed): return np.random.default_rng(seed)
def near(value, **how): return pytest.approx(value, **(dict(abs=1e-4) | how))


def tiles(colors, side=32):
    "A picture of plain squares; 48 of them across are the cells of the grid."
    return Image.fromarray(np.kron(colors, np.ones((side, side, 1))).astype(np.uint8))


def test_light_and_hue_of_tiles():
    "Each cell is one color, so both can be worked out from 240 colors without a picture."
    a, b = (random(k).integers(0, 256, (5, 48, 3)) for k in (1, 2))
    b = (b + 2*a)//3                                              # related colors
    got = kept(tiles(a), tiles(b))
    p, q = (np.array([lab_of(color) for color in colors.reshape(-1, 3)]) for colors in (a, b))
    assert got['light'] == near(np.corrcoef(p[:, 0], q[:, 0])[0, 1])
    assert got['dL'] == near(np.mean([abs(x - y) for x, y in zip(p[:, 0], q[:, 0])]))
    total = weights = 0
    for (_, *x), (_, *y) in zip(p, q):
        between = abs(math.degrees(math.atan2(x[1], x[0]) - math.atan2(y[1], y[0])))
        weight = math.sqrt(math.hypot(*x)*math.hypot(*y))
        total, weights = total + weight*min(between, 360 - between), weights + weight
    assert got['hue'] == near(total/weights, abs=1e-3) and got['hue'] > 10


def strip(seed, h=20):
    "512 px long, so nothing is resized: soft shapes, a few sure edges, and grain, in gray."
    rng = random(seed)
    shapes = np.kron(rng.integers(30, 220, (2, 16)), np.ones((h//2, 32)))
    return (shapes + rng.normal(0, 6, (h, 512))).clip(0, 255).round()


def window(m, y, x, r):
    "Values around a place; those of the border stand for what lies outside."
    rows, columns = np.arange(y - r, y + r + 1), np.arange(x - r, x + r + 1)
    return m[np.ix_(rows.clip(0, m.shape[0] - 1), columns.clip(0, m.shape[1] - 1))]


def steepness(m):
    down, across = np.gradient(m)
    return np.sqrt(down**2 + across**2)


def slow(p, q):
    "Edges, flat and halo of two maps of lightness, pixel by pixel."
    steep = steepness(p)
    sure = steep > np.quantile(steep, .9)
    texture, beyond = [], []
    for y, x in np.ndindex(p.shape):
        if window(sure, y, x, 3).any():
            shift = window(q, y, x, 24).mean() - window(p, y, x, 24).mean()
            here, around = q[y, x] - shift, window(p, y, x, 6)
            beyond.append(max(here - around.max(), around.min() - here, 0))
        else: texture.append([abs(m[y, x] - window(m, y, x, 2).mean()) for m in (p, q)])
    there, left = np.mean(texture, 0)
    return dict(edges=np.corrcoef(steep.ravel(), steepness(q).ravel())[0, 1], flat=left/there,
                halo=np.mean(beyond))


def test_edges_texture_and_halo_pixel_by_pixel():
    photo = strip(3)
    scene = (.7*photo + .2*strip(4) + 40).clip(0, 255).round()
    scene[:, 100:103], scene[:, 300:304] = 250, 5                  # rims
    levels = np.array([lightness(v) for v in range(256)])
    got = kept(*(Image.fromarray(m.astype(np.uint8)) for m in (photo, scene)))
    wanted = slow(*(levels[m.astype(int)] for m in (photo, scene)))
    assert wanted['halo'] > .5 and .2 < wanted['edges'] < .9 and wanted['flat'] > .3
    assert {key: got[key] for key in wanted} == near(wanted, abs=1e-5)


def test_an_unchanged_photo():
    photo = tiles(random(5).integers(0, 256, (36, 48, 3)), 10)
    got = kept(photo, photo)
    assert list(got) == list(KEPT) and got == near(dict(light=1, dL=0, hue=0, edges=1, flat=1, halo=0))
    assert all(type(value) is float for value in got.values())


def test_a_negative_keeps_its_drawing():
    "Black and white swap places: the light is upside down, and every line is where it was."
    board = Image.fromarray((np.indices((8, 8)).sum(0) % 2*255).astype(np.uint8)).resize((512, 512), 0)
    got = kept(board, ImageOps.invert(board))
    assert got['light'] == near(-1) and got['dL'] > 95 and got['edges'] == near(1)
    assert math.isnan(got['hue']) and math.isnan(got['flat']) and got['halo'] < 5


def halves(left, right, size=(512, 64)):
    im = Image.new('RGB', size, left)
    im.paste(Image.new('RGB', (size[0]//2, size[1]), right), (size[0]//2, 0))
    return im


def test_swapped_halves():
    dark, bright = (70,)*3, (200,)*3
    got = kept(halves(dark, bright), halves(bright, dark))
    assert got['light'] == near(-1) and got['dL'] == near(lightness(200) - lightness(70))


def test_rims_by_hand():
    "Two columns darker and two brighter than the photo at its one edge: columns 252 to 259 are its zone."
    photo, scene = halves((80,)*3, (160,)*3), halves((80,)*3, (160,)*3)
    scene.paste((60,)*3, (254, 0, 256, 64))
    scene.paste((185,)*3, (256, 0, 258, 64))
    low, high = lightness(80), lightness(160)
    down, up = lightness(60) - low, lightness(185) - high
    shift = 2*(up + down)/49                                # all four columns lie within 24 px of the zone
    plain = max(-shift, 0)*4 + max(shift, 0)*4              # where the scene is the photo, but for the shift
    plain -= max(-shift, 0)*2 + max(shift, 0)*2             # four of the eight columns are rims
    wanted = (plain + 2*(low - (low + down - shift)) + 2*((high + up - shift) - high))/8
    assert up + down != 0 and kept(photo, scene)['halo'] == near(wanted) and wanted > 3


def test_brighter_everywhere_is_no_halo():
    photo = halves((60,)*3, (150,)*3)
    scene = halves((110,)*3, (206,)*3)
    rise = [lightness(b) - lightness(a) for a, b in ((60, 110), (150, 206))]
    assert abs(rise[0] - rise[1]) < .5 and min(rise) > 20
    assert kept(photo, scene)['halo'] < .3 and kept(photo, scene)['dL'] == near(np.mean(rise))


def test_one_color():
    got = kept(Image.new('RGB', (40, 40), 'red'), Image.new('RGB', (40, 40), 'lime'))
    angles = [math.degrees(math.atan2(b, a)) for _, a, b in (lab_of((255, 0, 0)), lab_of((0, 255, 0)))]
    assert got['hue'] == near(angles[1] - angles[0]) and got['dL'] == near(87.7347 - 53.2408, abs=1e-3)
    assert all(math.isnan(got[key]) for key in ('light', 'edges', 'flat', 'halo'))


@pytest.mark.parametrize('level', [33, 77, 120, 200])
def test_a_blank_picture_has_no_light_to_keep(level, photo):
    "Nor does rounding in its mean make one up."
    blank = Image.new('L', photo.size, level)
    for got in (kept(photo, blank), kept(blank, photo)):
        assert math.isnan(got['light']) and math.isnan(got['edges']) and got['dL'] > 5


@pytest.mark.parametrize('chroma,known', [(0, False), (1, False), (20, True)])
def test_gray_has_no_hue(chroma, known):
    "A gray scene is not praised for its hue; nor is one that the eye takes for gray."
    photo, scene = (Image.new('RGB', (64, 64), (120, 120 - c, 120 - c)) for c in (60, chroma))
    assert math.isnan(kept(photo, scene)['hue']) is not known
    assert math.isnan(kept(scene, photo)['hue']) is not known


# ---- pictures of other sizes and kinds

@pytest.fixture(scope='module')
def photo():
    "Soft hills of color with sharp stripes, 3:2."
    rng, colors = random(6), random(7).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    im = np.asarray(Image.fromarray(colors).resize((600, 400), Image.Resampling.BICUBIC)).astype(float)
    im[:, 50::90] *= .4
    im[300:305] *= .3
    return Image.fromarray((im + rng.normal(0, 5, im.shape)).clip(0, 255).astype(np.uint8))


def test_each_fault_moves_its_number(photo):
    noise = random(8).normal(0, 12, (400, 600, 1))
    noisy = Image.fromarray((np.asarray(photo) + noise).clip(0, 255).astype(np.uint8))
    swapped = Image.merge('RGB', photo.split()[1:] + photo.split()[:1])
    assert kept(photo, ImageOps.mirror(photo))['light'] < .7
    darker = kept(photo, photo.point(lambda v: max(0, v - 40)))
    assert darker['dL'] > 10 and darker['light'] > .95 and darker['hue'] < 10 and darker['edges'] > .9
    assert kept(photo, swapped)['hue'] > 40
    assert kept(photo, photo.filter(ImageFilter.GaussianBlur(4)))['edges'] < .8
    painted = photo.filter(ImageFilter.MedianFilter(5))
    assert kept(photo, noisy)['flat'] > 1.5 and kept(photo, painted)['flat'] < .7
    assert kept(photo, photo.filter(ImageFilter.UnsharpMask(6, 200, 0)))['halo'] > 1


def test_sizes(photo):
    "The size of a scene makes little difference, nor does that of both; even 1 × 1 px can be measured."
    painted = photo.filter(ImageFilter.MedianFilter(5))
    whole = kept(photo, painted)
    for other in (kept(photo, painted.resize((900, 600), Image.Resampling.LANCZOS)),
                  kept(*(im.resize((1200, 800), Image.Resampling.LANCZOS) for im in (photo, painted)))):
        assert other == near(whole, rel=.1, abs=.1)
    assert kept(Image.new('RGB', (1, 1), 'red'), Image.new('RGB', (1, 1), 'red'))['hue'] == near(0)
    assert kept(photo.resize((700, 3)), painted.resize((700, 3)))['edges'] > .5
    strip = photo.resize((2000, 2))
    assert kept(strip, strip)['edges'] == near(1)


def test_stripes_finer_than_what_is_measured():
    "They melt into their mean: no lines and no texture appear that were not there."
    plain = halves((120,)*3, (200,)*3, (1500, 96))
    striped = np.array(plain)
    striped[:, 0:700:2], striped[:, 1:700:2] = 90, 150
    got = kept(plain, Image.fromarray(striped))
    assert got['edges'] > .95 and got['halo'] < 1


def test_a_picture_on_its_side(photo):
    "The grid has finer cells then, as it is 48 wide; lines, texture and halo stay to the last digit."
    photo = photo.resize((512, 341))
    scene = photo.filter(ImageFilter.UnsharpMask(6, 200, 0))
    upright = [im.transpose(Image.Transpose.TRANSPOSE) for im in (photo, scene)]
    lying, standing = kept(photo, scene), kept(*upright)
    for key in ('edges', 'flat', 'halo'): assert standing[key] == near(lying[key], abs=1e-9), key
    for key in ('light', 'dL', 'hue'): assert standing[key] == near(lying[key], abs=.5), key


def test_files_are_upright_and_on_white(photo, tmp_path):
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6                                     # a camera held upright: turn it back to look
    turned.save(tmp_path/'turned.png', exif=exif)
    assert kept(photo, tmp_path/'turned.png') == near(kept(photo, photo))
    assert kept(photo, Image.open(tmp_path/'turned.png')) == near(kept(photo, photo))
    veiled = Image.new('RGBA', (64, 48), (0, 0, 0, 0))
    assert kept(Image.new('L', (64, 48), 255), veiled)['dL'] == near(0)
    (tmp_path/'no.png').write_bytes(b'no picture')
    with pytest.raises(ImageError, match='no.png'): kept(photo, tmp_path/'no.png')


# ---- folders

@pytest.fixture
def folders(tmp_path, photo):
    scenes = {'a': photo.filter(ImageFilter.MedianFilter(5)), 'far/b': photo.point(lambda v: v//2),
              'c': photo.convert('L')}
    for name, scene in scenes.items():
        for folder, im, suffix in (('photos', photo, '.png'), ('scenes', scene, '.webp')):
            file = tmp_path/folder/f'{name}{suffix}'
            file.parent.mkdir(parents=True, exist_ok=True)
            im.save(file, lossless=True)
    return tmp_path/'photos', tmp_path/'scenes'


def test_folders(folders, photo, capsys):
    found = measure_kept(*folders)
    assert list(found['pictures']) == ['a', 'c', 'far/b'] and list(found['means']) == list(KEPT)
    rows = {'a': photo.filter(ImageFilter.MedianFilter(5)), 'far/b': photo.point(lambda v: v//2)}
    for name, scene in rows.items(): assert found['pictures'][name] == kept(photo, scene)
    for key in ('light', 'dL', 'edges', 'flat', 'halo'):
        assert found['means'][key] == near(sum(row[key] for row in found['pictures'].values())/3)
    assert math.isnan(found['pictures']['c']['hue'])              # made gray: left out of the mean
    assert found['means']['hue'] == near(sum(found['pictures'][name]['hue'] for name in rows)/2)
    files = [{'x': folder/f'c.{suffix}'} for folder, suffix in zip(folders, ('png', 'webp'))]
    assert math.isnan(measure_kept(*files)['means']['hue'])
    assert capsys.readouterr() == ('', '')
    measure_kept(*files, progress=True)
    assert '1/1' in capsys.readouterr().err


def test_partners(folders):
    photos, scenes = folders
    (scenes/'a.webp').rename(scenes/'z.webp')
    said = '2 of 6 files have no partner: photo a, scene z;'
    with pytest.raises(UserError, match=said): measure_kept(*folders)
    (scenes/'z.webp').unlink()
    with pytest.raises(UserError, match='1 of 5 .*: photo a;'): measure_kept(*folders)
    many = {str(i): photos/'a.png' for i in range(9)}
    with pytest.raises(UserError, match='photo 4, …;'): measure_kept(many, {'0 0': photos/'a.png'})
    with pytest.raises(UserError, match='no photos'): measure_kept({}, {})
    with pytest.raises(ImageError, match='no such file or folder'): measure_kept(photos, scenes/'none')
    (photos/'c.jpg').write_bytes((photos/'c.png').read_bytes())
    with pytest.raises(ImageError, match='one name, several files'): measure_kept(*folders)


def test_every_number_has_a_name_and_a_direction():
    assert all(name[-1] in '↑↓' for name in KEPT.values())
    assert [key for key, name in KEPT.items() if name.endswith('↑')] == ['light', 'edges']
    for word in ('Light kept', 'Light off', 'Drawing kept', 'Texture left', 'Halo'): assert word in KEPT_NOTE
