"""What a lesson on reading files would be bored by: every mode, every kind of damage, every order."""
import io, os, random, struct, subprocess, sys, unicodedata, warnings, zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from scenimefy import data
from scenimefy.core import SettingsError, seeded, to_model
from scenimefy.data import (_FORMATS, ImageError, ImageSet, PairedSet, Steps, Transform, UnpairedSet, Windows,
                            as_rgb,
                            find_images, loader, match_pairs, _natural_key, read_image)

RNG = np.random.default_rng(0)


def picture(w=24, h=16, seed=0):
    "A smooth picture without symmetry, so that every turn and every JPEG can be recognized."
    x, y = np.linspace(0, 1, w)[None, :], np.linspace(0, 1, h)[:, None]
    a = np.stack([255*x + 0*y, 120 + 100*y + 0*x, 200*(1-x)*y + 13*seed % 50], 2)
    return Image.fromarray(a.astype(np.uint8))


def arr(im): return np.asarray(im).astype(int)


def save(im, path, **kw): im.save(path, **kw); return path


# ---------------------------------------------------------------- modes and depths
TURNS = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
         5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
         7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
         8: lambda a: np.rot90(a)}


@pytest.mark.parametrize('suffix', ['.png', '.tif', '.webp', '.jpg'])
def test_exif_orientation(tmp_path, suffix):
    for value, turn in TURNS.items():
        tag = Image.Exif(); tag[0x0112] = value
        path = save(picture(), tmp_path/f'{value}{suffix}', exif=tag,
                    **{'.webp': dict(lossless=True), '.jpg': dict(quality=98)}.get(suffix, {}))
        got, want = arr(read_image(path)), turn(arr(picture()))
        assert got.shape == want.shape, value
        assert np.abs(got - want).mean() < (4 if suffix == '.jpg' else .01), value


def test_exif_nonsense_and_metadata(tmp_path):
    for value in (0, 9, 77):
        tag = Image.Exif(); tag[0x0112] = value
        assert np.array_equal(arr(read_image(save(picture(), tmp_path/'a.png', exif=tag))), arr(picture()))
    for broken in (b'II*\0\xff\xff\xff\xff broken', b'XX*\0 no such order of bytes', b'MM\0*\0\0'):
        picture().save(tmp_path/'b.jpg', exif=b'Exif\0\0' + broken)
        assert read_image(tmp_path/'b.jpg').size == (24, 16), broken
    tag = Image.Exif(); tag[0x0112] = 6; tag[0x010e] = 'seven w'
    text, fraction = b'\x01\x0e\0\x02\0\0\0\x08', b'\x01\x0e\0\x05\0\0\0\x01'
    odd = tag.tobytes().replace(text, fraction)  # words that are called a fraction
    assert odd != tag.tobytes()
    picture().save(tmp_path/'d.jpg', exif=odd)
    assert read_image(tmp_path/'d.jpg').size == (16, 24)  # the turn does not suffer from that
    tag = Image.Exif(); tag[0x0112] = 6; tag.get_ifd(0x8825)[1] = 'N'
    out = read_image(save(picture(), tmp_path/'c.jpg', exif=tag))
    assert not out.info and not dict(out.getexif())    # no second turn, no position leaves the machine


@pytest.mark.parametrize('name,im', [
    ('1.png', picture().convert('1')), ('1.tif', picture().convert('1')), ('L.png', picture().convert('L')),
    ('L.jpg', picture().convert('L')), ('LA.png', picture().convert('LA')), ('P.png', picture().quantize(64)),
    ('P.gif', picture().quantize(64)), ('P.bmp', picture().quantize(64)), ('RGB.png', picture()),
    ('RGB.bmp', picture()), ('RGB.ppm', picture()), ('RGB.tif', picture()),
    ('RGBA.png', picture().convert('RGBA')),
    ('RGBA.tif', picture().convert('RGBA')), ('CMYK.tif', picture().convert('CMYK')),
    ('CMYK.jpg', picture().convert('CMYK')), ('YCbCr.tif', picture().convert('YCbCr')),
    ('LAB.tif', picture().convert('LAB'))])
def test_modes_look_like_the_picture(tmp_path, name, im):
    if name == 'YCbCr.tif' and PIL.__version__ < '11':
        pytest.skip('older Pillow cannot read its own YCbCr TIFF')
    path = save(im, tmp_path/name)
    opaque = arr(im.convert('RGB'))
    for alpha in (False, True):
        out = read_image(path, alpha=alpha)
        assert out.mode == ('RGBA' if alpha and im.mode in ('LA', 'RGBA') else 'RGB') and out.size == im.size
        assert np.abs(arr(out)[..., :3] - opaque).mean() < 4


def test_one_bit_is_black_and_white(tmp_path):
    out = arr(read_image(save(picture().convert('1'), tmp_path/'a.png')))
    assert set(np.unique(out)) == {0, 255}


def test_cmyk_jpeg_is_not_inverted(tmp_path):
    for color in ((255, 255, 255), (0, 0, 0), (200, 30, 30)):
        im = Image.new('RGB', (16, 16), color).convert('CMYK')
        out = arr(read_image(save(im, tmp_path/'a.jpg', quality=98)))
        assert np.abs(out - color).max() <= 6
    assert b'Adobe' in (tmp_path/'a.jpg').read_bytes()      # the kind that stores inverted inks


def test_deep_gray_is_scaled_everywhere(tmp_path):
    levels = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    want = [0, 1, 100, 255]
    Image.fromarray(levels).save(tmp_path/'a.png'); Image.fromarray(levels).save(tmp_path/'a.tif')
    (tmp_path/'a.pgm').write_bytes(b'P5 4 1 65535\n' + levels.astype('>u2').tobytes())
    Image.frombytes('I;16B', (4, 1), levels.astype('>u2').tobytes()).save(tmp_path/'b.tif')
    Image.fromarray(levels.astype(np.int32)).save(tmp_path/'c.tif')
    for f in ('a.png', 'a.tif', 'a.pgm', 'b.tif', 'c.tif'):
        assert arr(read_image(tmp_path/f))[0, :, 0].tolist() == want, f
    dark = Image.fromarray(np.array([[0, 255]], dtype=np.uint16)); dark.save(tmp_path/'d.png')
    assert arr(read_image(tmp_path/'d.png'))[0, :, 0].tolist() == [0, 1]     # a dark scan stays dark


@pytest.mark.parametrize('values,want', [([0, .5, 1], [0, 128, 255]), ([0, 100, 255], [0, 100, 255]),
                                         ([0, 25700, 65535], [0, 100, 255]), ([-5, 0, 1e6], [0, 0, 255]),
                                         ([np.nan, np.inf, 1], [0, 255, 255]), ([0, 0, 0], [0, 0, 0])])
def test_float_tiff(tmp_path, values, want):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path/'a.tif')
    assert arr(read_image(tmp_path/'a.tif'))[0, :, 0].tolist() == want


def test_a_lamp_does_not_turn_a_float_picture_black(tmp_path):
    "Levels of 0…1 with highlights above: white stays 1, and a warning says what became of them."
    levels = np.full((10, 20), .5, dtype=np.float32)
    levels[0, :4] = 9
    Image.fromarray(levels).save(tmp_path/'lamp.tif')
    with pytest.warns(UserWarning, match='levels reach 9; we take 1 for white'):
        out = arr(read_image(tmp_path/'lamp.tif'))[..., 0]
    assert out[0, 0] == 255 and out[1, 0] == 128
    stars = np.zeros((10, 20), dtype=np.float32)
    stars[::2] = 40
    stars[0, :4] = 250                                                   # a night in levels of 0…255
    Image.fromarray(stars).save(tmp_path/'stars.tif')
    assert arr(read_image(tmp_path/'stars.tif'))[2, 0, 0] == 40


def test_transparency_of_every_kind(tmp_path):
    red = (255, 0, 0)
    indexed = Image.new('P', (2, 1)); indexed.putpalette([*red, 0, 0, 255]); indexed.putpixel((1, 0), 1)
    files = {'int.png': (indexed, dict(transparency=1)),
             'bytes.png': (indexed, dict(transparency=b'\xff\x00')),
             'int.gif': (indexed, dict(transparency=1))}
    key = Image.new('RGB', (2, 1), red); key.putpixel((1, 0), (0, 0, 255))
    files['key.png'] = (key, dict(transparency=(0, 0, 255)))
    rgba = key.convert('RGBA'); rgba.putalpha(Image.fromarray(np.array([[255, 0]], dtype=np.uint8)))
    files |= {'rgba.png': (rgba, {}), 'rgba.webp': (rgba, dict(lossless=True, exact=True)),
              'rgba.tif': (rgba, {})}
    for name, (im, kw) in files.items():
        im.save(tmp_path/name, **kw)
        flat, kept = read_image(tmp_path/name), read_image(tmp_path/name, alpha=True)
        assert flat.mode == 'RGB' and kept.mode == 'RGBA', name
        assert flat.getpixel((0, 0)) == red and flat.getpixel((1, 0)) == (255, 255, 255), name
        assert kept.getpixel((0, 0)) == (*red, 255) and kept.getpixel((1, 0))[3] == 0, name
    gray = Image.fromarray(np.array([[10, 200]], dtype=np.uint8))
    gray.save(tmp_path/'gray.png', transparency=200)
    assert arr(read_image(tmp_path/'gray.png'))[0, :, 0].tolist() == [10, 255]
    half = Image.new('RGBA', (1, 1), (0, 0, 0, 128)); half.save(tmp_path/'half.png')
    assert abs(read_image(tmp_path/'half.png').getpixel((0, 0))[0] - 127) <= 1
    for mode in ('La', 'RGBa', 'PA', 'HSV', 'RGBX'):      # modes that only a program can hand over
        first = dict(La='LA', RGBa='RGBA', PA='P').get(mode, 'RGB')
        im = picture().convert(first).convert(mode)
        assert as_rgb(im).mode == 'RGB', mode


def test_first_frame(tmp_path):
    frames = [Image.new('RGB', (8, 8), c) for c in ('red', 'lime', 'blue')]
    for name in ('a.gif', 'a.png', 'a.webp', 'a.tif'):
        kw = dict(lossless=True) if name == 'a.webp' else {}
        frames[0].save(tmp_path/name, save_all=True, append_images=frames[1:], **kw)
        assert read_image(tmp_path/name).getpixel((3, 3)) == (255, 0, 0), name


def test_icc(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    path = save(picture(), tmp_path/'a.png', icc_profile=srgb)
    assert np.array_equal(arr(read_image(path)), arr(picture()))          # sRGB: not one level is changed
    swap = srgb.replace(b'rXYZ', b'????', 1).replace(b'gXYZ', b'rXYZ', 1).replace(b'????', b'gXYZ', 1)
    swap = swap.replace('sRGB'.encode('utf-16-be'), 'SWAP'.encode('utf-16-be'))
    want = arr(picture())[..., [1, 0, 2]]
    for mode in ('RGB', 'RGBA'):
        out = read_image(save(picture().convert(mode), tmp_path/'b.png', icc_profile=swap), alpha=True)
        assert out.mode == mode and np.abs(arr(out)[..., :3] - want).max() <= 3
    paletted = picture().quantize(64)
    out = read_image(save(paletted, tmp_path/'p.png', icc_profile=swap))
    assert np.abs(arr(out) - arr(paletted.convert('RGB'))[..., [1, 0, 2]]).max() <= 3
    for mode in ('L', 'CMYK'):                                            # a profile of the wrong kind
        im = picture().convert(mode)
        assert np.array_equal(arr(read_image(save(im, tmp_path/'c.tif', icc_profile=swap))),
                              arr(im.convert('RGB')))
    for junk in (b'x', swap[:150], bytes(500)):
        assert np.array_equal(arr(read_image(save(picture(), tmp_path/'d.png', icc_profile=junk))),
                              arr(picture()))


def test_the_given_picture_is_not_changed():
    im = picture().convert('RGBA'); im.info['note'] = 'mine'
    as_rgb(im); assert im.mode == 'RGBA' and im.info == {'note': 'mine'}


@pytest.mark.parametrize('size', [(1, 1), (3, 1200), (1200, 3), (2, 1)])
def test_odd_sizes(tmp_path, size):
    for name in ('a.png', 'a.jpg', 'a.webp', 'a.gif'):
        assert read_image(save(Image.new('RGB', size), tmp_path/name)).size == size
    assert Transform(8)(read_image(tmp_path/'a.png')).shape == (3, 8, 8)


# ---------------------------------------------------------------- damage
def encoded(im, fmt, **kw): b = io.BytesIO(); im.save(b, fmt, **kw); return b.getvalue()


def noisy(): return Image.fromarray(np.random.default_rng(1).integers(0, 255, (60, 60, 3), dtype=np.uint8))


def test_mislabeled_files_work(tmp_path):
    n = 0
    for fmt in ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM'):
        for suffix in ('.jpg', '.png', '.tif', '.txt', ''):
            (tmp_path/f'x{suffix}').write_bytes(encoded(picture(), fmt))
            assert read_image(tmp_path/f'x{suffix}').size == (24, 16); n += 1
    assert n == 35


@pytest.mark.fault('picture: cut off',
                   happens='one line says that it ends early',
                   left='nothing')
@pytest.mark.parametrize('fmt', ['JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM'])
def test_truncation_is_an_error_that_says_so(tmp_path, fmt):
    whole = encoded(noisy(), fmt)
    for part in (.02, .3, .6, .95):
        (tmp_path/'x.jpg').write_bytes(whole[:int(part*len(whole))])
        with pytest.raises(ImageError) as e: read_image(tmp_path/'x.jpg')
        text = str(e.value)
        assert 'ends early' in e.value.reason and 'x.jpg' in text and '\n' not in text, (part, text)
    progressive = encoded(noisy(), 'JPEG', progressive=True)
    (tmp_path/'p.jpg').write_bytes(progressive[:len(progressive)//2])
    with pytest.raises(ImageError, match='ends early'): read_image(tmp_path/'p.jpg')
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_any_damage_gives_a_picture_or_an_image_error(tmp_path):
    rnd, outcomes = random.Random(0), []
    for fmt in ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM'):
        whole = encoded(picture(), fmt)
        for _ in range(60):
            b = bytearray(whole)
            for _ in range(rnd.choice((1, 3, 10))):
                b[rnd.randrange(min(len(b), 200) if rnd.random() < .7 else len(b))] = rnd.randrange(256)
            (tmp_path/'x').write_bytes(b[:rnd.choice((len(b), len(b), rnd.randrange(1, len(b))))])
            try:
                out = read_image(tmp_path/'x', max_pixels=10_000_000)
                outcomes.append(True)
                assert out.mode == 'RGB'
            except ImageError as e:
                outcomes.append(False)
                assert e.reason and '\n' not in str(e)
    assert len(outcomes) == 420 and 50 < sum(outcomes) < 400


@pytest.mark.parametrize('content,words', [
    (b'', 'empty'), (b'hello world', 'text'), ('grüße'.encode(), 'text'), (b'<!DOCTYPE html><p>', 'web page'),
    (b'\xef\xbb\xbf<html>', 'web page'), (b'  <svg xmlns=""/>', 'SVG'), (b'%PDF-1.7 \0', 'PDF'),
    (b'PK\3\4\0\0\0', 'zip'), (b'version https://git-lfs.github.com/spec/v1', 'git lfs pull'),
    (b'\0\0\0\x18ftypisom\0\0\0\0', 'video'), (bytes(range(256)), 'none of the formats'),
    (b'\x89PNG\r\n\x1a\n', 'damaged'), (b'\xff\xd8\xff', 'damaged')])
def test_what_is_it_instead(tmp_path, content, words):
    (tmp_path/'x.jpg').write_bytes(content)
    with pytest.raises(ImageError, match=words): read_image(tmp_path/'x.jpg')


@pytest.mark.parametrize('content,words',
                         [(b'\0\0\0\x18ftypheic\0\0\0\0', 'HEIC.*pillow-heif'),
                          (b'\xff\x0a' + bytes(50), 'JPEG XL.*pip install')])
def test_a_missing_plugin_is_named(tmp_path, monkeypatch, content, words):
    monkeypatch.setattr(data, '_decoders', lambda: ['JPEG', 'PNG'])
    (tmp_path/'x.jpg').write_bytes(content)
    with pytest.raises(ImageError, match=words): read_image(tmp_path/'x.jpg')


def test_heic_is_read_where_its_plugin_is_installed(tmp_path):
    pillow_heif = pytest.importorskip('pillow_heif')
    pillow_heif.register_heif_opener()
    picture(64, 48).save(tmp_path/'x.heic', quality=95)
    assert np.abs(arr(read_image(tmp_path/'x.heic')).astype(int) - arr(picture(64, 48))).mean() < 12
    assert find_images(tmp_path) == [tmp_path/'x.heic']


@pytest.mark.fault('picture: a JPEG that lacks only its end marker',
                   happens='read, as all rows are there',
                   left='-')
def test_jpeg_without_its_end_marker(tmp_path):
    "Whole rows count, not the last two bytes; a file that lacks rows stays refused, whatever its size."
    rnd = np.random.default_rng(0)
    for side, options in ((64, {}), (61, dict(subsampling=0)), (64, dict(progressive=True)), (8, {})):
        noise = Image.fromarray(rnd.integers(0, 256, (side, side, 3), dtype=np.uint8))
        noise.save(tmp_path/'whole.jpg', quality=80, **options)
        whole = (tmp_path/'whole.jpg').read_bytes()
        for cut in (1, 2):
            (tmp_path/'cut.jpg').write_bytes(whole[:-cut])
            assert np.array_equal(arr(read_image(tmp_path/'cut.jpg')),
                                  arr(read_image(tmp_path/'whole.jpg'))), (side, options)
        if side == 8: continue
        for share in (.5, .8, .9):
            (tmp_path/'cut.jpg').write_bytes(whole[:int(len(whole)*share)])
            with pytest.raises(ImageError, match='ends early'): read_image(tmp_path/'cut.jpg')


def test_only_the_first_frame_is_said(tmp_path):
    a, b = picture(), picture().rotate(90)
    a.save(tmp_path/'x.gif', save_all=True, append_images=[b, a])
    a.save(tmp_path/'x.tif', save_all=True, append_images=[b])
    a.save(tmp_path/'x.mpo', save_all=True, append_images=[b])
    a.save(tmp_path/'x.webp', save_all=True, append_images=[b])
    for name, frames in (('x.gif', 3), ('x.tif', 2), ('x.webp', 2)):
        with pytest.warns(UserWarning,
                          match=f'{name}: it holds {frames} frames or pages, and only the first'):
            read_image(tmp_path/name)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        # the second picture of an MPO is an aid of the camera
        assert read_image(tmp_path/'x.mpo').size == a.size


@pytest.mark.fault('picture: metadata that unpack to more than 64 MiB',
                   happens='refused in one line',
                   left='nothing')
def test_large_metadata_of_a_png(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt('XML:com.adobe.xmp', 'y'*1_300_000, zip=True)
    picture().save(tmp_path/'x.png', pnginfo=info)
    before = PngImagePlugin.MAX_TEXT_CHUNK, Image.MAX_IMAGE_PIXELS
    assert np.array_equal(arr(read_image(tmp_path/'x.png')), arr(picture()))
    info = PngImagePlugin.PngInfo()
    info.add_itxt('bomb', 'y'*70_000_000, zip=True)
    picture().save(tmp_path/'bomb.png', pnginfo=info)
    with pytest.raises(ImageError, match='metadata unpack to more than 64 MiB'):
        read_image(tmp_path/'bomb.png')
    assert (PngImagePlugin.MAX_TEXT_CHUNK, Image.MAX_IMAGE_PIXELS) == before


def test_a_float_tiff_of_three_channels_is_refused_as_what_it_is(tmp_path):
    w, h, numbers = 4, 3, np.linspace(0, 1, 36, dtype='<f4').tobytes()
    at = 8 + 2 + 12*10 + 4
    tags = [(256, 4, 1, w), (257, 4, 1, h), (258, 3, 3, at), (259, 3, 1, 1), (262, 3, 1, 2),
            (273, 4, 1, at + 12), (277, 3, 1, 3),
            (278, 4, 1, h), (279, 4, 1, len(numbers)), (339, 3, 3, at + 6)]
    table = b''.join(struct.pack('<HHII', *t) for t in tags)
    (tmp_path/'x.tif').write_bytes(b'II*\0\x08\0\0\0' + struct.pack('<H', 10) + table
                                   + bytes(4) + struct.pack('<6H', 32, 32, 32, 3, 3, 3) + numbers)
    with pytest.raises(ImageError, match='3 × 32-bit float numbers a pixel.*8 or 16 bits'):
        read_image(tmp_path/'x.tif')


def test_only_allowed_formats(tmp_path):
    for fmt in ('ICO', 'PCX', 'TGA', 'SGI', 'EPS'):
        picture().save(tmp_path/'x.png', fmt)
        with pytest.raises(ImageError, match='none of the formats|text'): read_image(tmp_path/'x.png')
    assert set(data._decoders()) <= set(_FORMATS) and len(data._decoders()) >= 7


@pytest.mark.fault('picture: a pipe, a broken link, a folder, an impossible name',
                   happens='one line; nothing waits',
                   left='nothing')
def test_not_a_file(tmp_path):
    with pytest.raises(ImageError, match='folder'): read_image(tmp_path)
    with pytest.raises(ImageError, match='no such file'): read_image(tmp_path/'missing.png')
    with pytest.raises(ImageError): read_image('nul\0byte.png')
    with pytest.raises(ImageError): read_image('x'*5000)
    os.symlink('nowhere.png', tmp_path/'link.png')
    with pytest.raises(ImageError, match='no such file'): read_image(tmp_path/'link.png')
    if hasattr(os, 'mkfifo'):
        os.mkfifo(tmp_path/'pipe.png')
        with pytest.raises(ImageError, match='pipe'): read_image(tmp_path/'pipe.png')   # and does not hang


def test_permission_and_memory(tmp_path, monkeypatch):      # we may be root, who may read everything
    path = save(picture(), tmp_path/'a.png')
    for error, words in ((PermissionError(13, 'denied'), 'permissions'), (MemoryError(), 'memory')):
        def refuse(*a, **k): raise error
        monkeypatch.setattr(Image, 'open', refuse)
        with pytest.raises(ImageError, match=words) as e: read_image(path)
        assert e.value.__cause__ is error and e.value.path == path


def png_claiming(w, h):
    def chunk(kind, body):
        return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind+body))
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 1, 0, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', b'') + chunk(b'IEND', b'')


@pytest.mark.fault('picture: more pixels than 89 million',
                   happens='refused in one line before it is decoded',
                   left='nothing')
def test_bombs_are_refused_quietly_and_early(tmp_path, monkeypatch):
    path = tmp_path/'bomb.png'
    for side in (9460, 14000, 100_000):       # above the warning level, above twice that, absurd
        path.write_bytes(png_claiming(side, side))
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            with pytest.raises(ImageError, match='more than 89,478,485 pixels.*max_pixels'): read_image(path)
    picture().save(path)
    with pytest.raises(ImageError, match='more than 100 pixels'): read_image(path, max_pixels=100)
    assert read_image(path, max_pixels=24*16).size == (24, 16)
    monkeypatch.setattr(data, 'MAX_PIXELS', 383)
    with pytest.raises(ImageError): read_image(path)
    path.write_bytes(png_claiming(100_000, 100_000))
    path.write_bytes(png_claiming(14000, 14000))  # above Pillow's own limit: ours alone decides
    with pytest.raises(ImageError, match='ends early'): read_image(path, max_pixels=10**9)
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


def test_error_text_is_one_safe_line():
    odd = os.fsdecode(b'caf\xe9\n\x1b[31m.jpg')
    text = str(ImageError(odd, 'why'))
    text.encode('utf8'); assert '\n' not in text and '\x1b' not in text and text.endswith(': why')
    again = ImageError('Caught ImageError in DataLoader worker process 0.\nOriginal Traceback\n'
                       'scenimefy.data.ImageError: a: why\n')
    assert str(again) == 'a: why'


# ---------------------------------------------------------------- folders
def test_find_images(tmp_path):
    names = ['a10.PNG', 'a9.jpg', 'A1.Jpeg', 'sub/b2.webp', 'sub/b11.gif', 'sub/deep/er/c.tiff', 'd.bmp',
             'e.ppm', 'x.heic', 'raw.NEF']
    junk = ['.hidden.png', '._a9.jpg', '.git/x.png', '__MACOSX/a9.jpg', 'notes.txt', 'png', 'sub/._b2.webp']
    for n in names+junk: (tmp_path/n).parent.mkdir(parents=True, exist_ok=True); (tmp_path/n).touch()
    os.symlink(tmp_path, tmp_path/'sub'/'loop')
    os.symlink(tmp_path/'d.bmp', tmp_path/'link.png')
    os.symlink('gone', tmp_path/'gone.png')
    found = [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)]
    assert sorted(found) == sorted(names + ['link.png', 'gone.png'])
    assert found.index('a9.jpg') < found.index('a10.PNG')
    assert found.index('sub/b2.webp') < found.index('sub/b11.gif')
    assert found[0] == 'A1.Jpeg'
    assert found == [p.relative_to(tmp_path).as_posix() for p in find_images(str(tmp_path))]
    os.symlink(tmp_path/'sub', tmp_path/'named')
    assert find_images(tmp_path/'named')                      # a link that you name yourself is followed


def test_a_folder_is_listed_under_its_own_name(tmp_path):
    "Not under that of a link to it, though the link comes first in the alphabet."
    (tmp_path/'true').mkdir()
    picture().save(tmp_path/'true'/'x.png')
    os.symlink(tmp_path/'true', tmp_path/'a_link')
    assert find_images(tmp_path) == [tmp_path/'true'/'x.png']


@pytest.mark.fault('names: links that lead in circles',
                   happens='every folder is read once',
                   left='-')
def test_linked_folders_are_read_once(tmp_path):
    for name in ('photos/own.jpg', 'store/linked.jpg'):
        (tmp_path/name).parent.mkdir(exist_ok=True); picture().save(tmp_path/name)
    os.symlink('../store', tmp_path/'photos'/'more'); os.symlink('..', tmp_path/'store'/'up')
    found = [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path/'photos')]
    assert sorted(found) == ['photos/more/linked.jpg', 'photos/own.jpg']


def test_a_picture_without_a_suffix_is_found_by_its_first_bytes(tmp_path):
    picture().save(tmp_path/'noext', 'JPEG'); picture().save(tmp_path/'odd.dat', 'PNG')
    (tmp_path/'note.dat').write_text('a note'); (tmp_path/'sound.wav').write_bytes(b'RIFF\0\0\0\0WAVEfmt ')
    os.mkfifo(tmp_path/'pipe')                                            # opening it would wait for ever
    assert [p.name for p in find_images(tmp_path)] == ['noext', 'odd.dat']


def test_names_in_other_digits_and_other_unicode_forms(tmp_path):
    odd = ['①', '②', '10²', '٣', '9']
    assert sorted(odd, key=_natural_key)[:2] == ['9', '10²'] and len(sorted(odd, key=_natural_key)) == 5
    for side, form in (('trainA', 'NFC'), ('trainB', 'NFD')):
        (tmp_path/side).mkdir(); picture().save(tmp_path/side/(unicodedata.normalize(form, 'café') + '.png'))
    ((a, b),) = match_pairs(tmp_path)
    assert a.name != b.name and unicodedata.normalize('NFC', b.name) == a.name


@pytest.mark.parametrize('gamma', [None, 2.2, 1.8])
def test_profiles_are_judged_by_what_they_do(tmp_path, gamma):
    "A profile called sRGB that means linear light is applied; the true sRGB, however named, changes nothing."
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
    points = struct.pack('>I', 0) if gamma is None else struct.pack('>IH', 1, round(gamma*256))
    curve = b'curv\0\0\0\0' + points
    true = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    ramp.save(tmp_path/'true.png', icc_profile=true)
    assert np.array_equal(arr(read_image(tmp_path/'true.png')), arr(ramp))
    ramp.save(tmp_path/'odd.png', icc_profile=matrix_profile('sRGB IEC61966-2.1', curve))
    out = arr(read_image(tmp_path/'odd.png'))[0, :, 1].astype(float)
    level = np.arange(256)/255
    light = level if gamma is None else level**gamma
    want = 255*np.where(light <= .0031308, 12.92*light, 1.055*light**(1/2.4) - .055)
    assert np.abs(out - want)[8:].max() < 3, np.abs(out - want).max()


def matrix_profile(name:str, curve:bytes) -> bytes:
    "An ICC profile of sRGB's primaries with any tone curve and any name."
    def xyz(values): return b'XYZ \0\0\0\0' + b''.join(struct.pack('>i', round(v*65536)) for v in values)
    text = name.encode() + b'\0'
    desc = b'desc\0\0\0\0' + struct.pack('>I', len(text)) + text + bytes(78)
    tags = {b'desc': desc, b'cprt': b'text\0\0\0\0CC0\0', b'wtpt': xyz((.9642, 1, .8249)),
            b'rXYZ': xyz((.43607, .22249, .01392)), b'gXYZ': xyz((.38515, .71687, .09708)),
            b'bXYZ': xyz((.14307, .06061, .71410)),
            b'rTRC': curve, b'gTRC': curve, b'bTRC': curve}
    table, body, start = b'', b'', 128 + 4 + 12*len(tags)
    for tag, data_ in tags.items():
        table += tag + struct.pack('>II', start + len(body), len(data_))
        body += data_ + bytes(-len(data_) % 4)
    head = (struct.pack('>I', start + len(body)) + bytes(4) + bytes([2, 0x20, 0, 0]) + b'mntrRGB XYZ '
            + struct.pack('>6H', 2020, 1, 1, 0, 0, 0) + b'acsp' + bytes(28) + xyz((.9642, 1, .8249))[8:])
    return head.ljust(128, b'\0') + struct.pack('>I', len(tags)) + table + body


def test_a_program_ends_though_its_readers_live(tmp_path):
    "Python waits at its end for helpers that ignore SIGTERM; ours do, so they are ended before."
    for i in range(3): picture().save(tmp_path/f'{i}.png')
    code = ('from scenimefy.data import ImageSet, loader\n'
            f'it = iter(loader(ImageSet({str(tmp_path)!r}, 8), 1, steps=50, workers=2))\n'
            'next(it); kept = [it]; kept.append(kept); raise SystemExit(3)')
    assert subprocess.run([sys.executable, '-c', code], timeout=60).returncode == 3


def test_find_images_lists(tmp_path):
    (tmp_path/'f').mkdir(); (tmp_path/'f'/'1.png').touch(); (tmp_path/'odd.txt').touch()
    asked = [tmp_path/'odd.txt', tmp_path/'f', tmp_path/'f'/'..'/'f'/'1.png', tmp_path/'missing.png']
    # reading says why
    assert find_images(asked) == [tmp_path/'odd.txt', tmp_path/'f'/'1.png', tmp_path/'missing.png']
    assert find_images(tmp_path/'odd.txt') == [tmp_path/'odd.txt']
    with pytest.raises(ImageError, match='no such file or folder'): find_images(tmp_path/'missing')
    (tmp_path/'empty').mkdir()
    with pytest.raises(ImageError, match='found nothing'): find_images(tmp_path/'empty')
    with pytest.raises(ImageError, match='no pictures'): find_images([tmp_path/'f', tmp_path/'empty'])


def test_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    (tmp_path/'ok').mkdir(); (tmp_path/'ok'/'1.png').touch(); (tmp_path/'locked').mkdir()
    real, locked = os.scandir, {str(tmp_path/'locked')}
    def scandir(path='.'):
        if str(path) in locked: raise PermissionError(13, 'denied', str(path))
        return real(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.warns(UserWarning, match='locked.*left out'): assert len(find_images(tmp_path)) == 1
    locked.add(str(tmp_path))
    with pytest.raises(ImageError, match='cannot be listed'): find_images(tmp_path)


# ---------------------------------------------------------------- transform and sets
def test_transform_against_plain_arithmetic():
    im = picture(50, 31)
    want = np.asarray(im.resize((20, 20), Image.Resampling.BICUBIC)).astype(np.float64)/255
    want = torch.from_numpy((want - .5)/.5).permute(2, 0, 1).float()
    torch.testing.assert_close(Transform(16, 20)(im, 3, 1, False), want[:, 1:17, 3:19])
    torch.testing.assert_close(Transform(16, 20)(im, 3, 1, True), want[:, 1:17, 3:19].flip(-1))
    torch.testing.assert_close(Transform(16, 20)(im), want[:, 2:18, 2:18])
    assert Transform(20)(im).dtype == torch.float32
    for bad in ((0,), (30,), (64, 60)):
        with pytest.raises(SettingsError): Transform(*bad)


@pytest.fixture(scope='module')
def domains(tmp_path_factory):
    root = tmp_path_factory.mktemp('domains')
    for side, n in (('A', 5), ('B', 3)):
        (root/side).mkdir()
        for i in range(n): picture(20, 14, seed=i + 7*(side == 'B')).save(root/side/f'{i}.png')
    for side in ('trainA', 'trainB'):
        (root/'pairs'/side/'film').mkdir(parents=True)
        for i in range(4):
            suffix = 'png' if side == 'trainA' else 'bmp'
            picture(16, 16, seed=i).save(root/'pairs'/side/'film'/f'{i}.{suffix}')
    return root


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b))


def test_unpaired_is_a_function_of_seed_and_position(domains):
    one = UnpairedSet(domains/'A', domains/'B', 8, 12, seed=3)
    two = UnpairedSet(find_images(domains/'A'), find_images(domains/'B'), 8, 12, seed=3)
    assert len(one) == 5 and len(UnpairedSet(domains/'B', domains/'A', 8)) == 5
    order = list(range(40)); random.Random(0).shuffle(order)
    shuffled = {p: two[p] for p in order}
    assert all(same(one[p], shuffled[p]) for p in range(40)) and one.files(7) == two.files(7)
    torch.rand(3); assert same(one[11], two[11])
    assert not all(same(one[p], UnpairedSet(domains/'A', domains/'B', 8, 12, seed=4)[p]) for p in range(5))
    assert same(one[10**9], two[10**9])
    with pytest.raises(IndexError): one[-1]
    assert one[0][0].shape == (3, 8, 8) and one[0][0].abs().max() <= 1


def test_unpaired_statistics(domains):
    s = UnpairedSet(domains/'A', domains/'B', 8, seed=0)
    files = [s.files(p) for p in range(300)]
    for i in range(0, 300, 5): assert len({f[0] for f in files[i:i+5]}) == 5  # all photos in each pass
    counts = [sum(f[1].stem == str(i) for f in files) for i in range(3)]
    assert all(70 < c < 130 for c in counts)                                          # anime: uniform
    assert any(len({f[1] for f in files[i:i+3]}) < 3 for i in range(0, 300, 3))       # … with replacement
    plain = {f: s.transform(read_image(f)) for row in files for f in row}
    flips = np.array([[not torch.equal(x, plain[f]) for x, f in zip(s[p], files[p])] for p in range(300)])
    assert (abs(flips.mean(0) - .5) < .1).all() and abs((flips[:, 0] == flips[:, 1]).mean() - .5) < .1


def test_the_dice_of_both_sides_are_independent(tmp_path):
    "Window, mirror and choice of the anime tell nothing about the photo's: they agree as by chance."
    n, side, size = 400, 12, 8  # five places for a window, and five anime pictures
    row, column = np.mgrid[:side, :side]*20
    for name, pictures in (('photos', 1), ('anime', 5)):
        (tmp_path/name).mkdir()
        for i in range(pictures):  # a pixel says where it is, and in which picture
            levels = np.stack([column, row, 0*row + 50*i], 2).astype(np.uint8)
            Image.fromarray(levels).save(tmp_path/name/f'{i}.png')
    s = UnpairedSet(tmp_path/'photos', tmp_path/'anime', size, side, seed=1)
    def dice(x):                                                 # left, top, mirrored, picture
        column, row, picture = ((x + 1)*127.5).round().long()
        first, last = (column[0, k].item()//20 for k in (0, -1))
        assert abs(last - first) == size - 1
        return min(first, last), row[0, 0].item()//20, int(first > last), picture[0, 0].item()//50
    photo, anime = (np.array([dice(s[p][k]) for p in range(n)]) for k in (0, 1))
    for d in (photo[:, 0], photo[:, 1], anime[:, 0], anime[:, 1], anime[:, 3]):
        assert (abs(np.bincount(d, minlength=5)/n - 1/5) < .08).all()
    for mine in (photo[:, 0], photo[:, 1]):  # of two dice with five sides, one in five throws is equal
        for other in (anime[:, 0], anime[:, 1], anime[:, 3]):
            for shift in range(5): assert abs(((mine + shift) % 5 == other).mean() - 1/5) < .08
    assert abs((photo[:, 2] == anime[:, 2]).mean() - 1/2) < .1


def read_off(x):
    "Where the corners of a window lie in a picture whose pixels say (column, row): left, top, right, bottom."
    at = (x[:2]*127.5 + 127.5)/2
    return at[0].min().item(), at[1].min().item(), at[0].max().item(), at[1].max().item()


def ruler(path, w, h, third=0):
    column, row = np.meshgrid(np.arange(w), np.arange(h))
    Image.fromarray(np.stack([2*column, 2*row, 0*row + third], 2).astype(np.uint8)).save(path)


def test_windows_are_squares_of_every_scale_and_lie_everywhere(tmp_path):
    ruler(tmp_path/'r.png', 120, 80)
    im, w = read_image(tmp_path/'r.png'), Windows(16)
    seen = np.array([read_off(w(im, *w.draw(seeded('w', i)))) for i in range(3000)])
    across, down = seen[:, 2] - seen[:, 0], seen[:, 3] - seen[:, 1]
    assert np.abs(across - down).max() < 3                                    # nothing is squeezed
    assert across.min() < 16 and across.max() > 70
    near = across < 15*(80/16)**.5                                            # half of the doublings
    assert abs(near.mean() - .5) < .05
    assert seen[:, 0].min() < 1 and seen[:, 1].min() < 1 and seen[:, 2].max() > 118 and seen[:, 3].max() > 78
    centers = (seen[near, 0] + seen[near, 2])/2
    assert abs(centers.mean() - 59.5) < 3                                     # and as often left as right
    mirrored = [w.draw(seeded('w', i))[3] for i in range(3000)]
    assert abs(np.mean(mirrored) - .5) < .05
    x = w(im, .3, .2, .7)
    assert torch.equal(w(im, .3, .2, .7, True), x.flip(-1)) and torch.equal(x, w(im, .3, .2, .7))


def test_windows_of_small_and_odd_pictures():
    for size in ((5, 9), (16, 16), (300, 16), (17, 400), (1, 1)):
        for i in range(20):
            w = Windows(16)
            assert w(picture(*size), *w.draw(seeded(i))).shape == (3, 16, 16)
    for bad in (0, 2, 30):
        with pytest.raises(SettingsError, match='multiple of 4'): Windows(bad)


def test_sets_in_windows_are_functions_of_seed_and_position(domains):
    one, two = (UnpairedSet(domains/'A', domains/'B', 8, 0, seed=3) for _ in range(2))
    assert isinstance(one.transform, Windows) and len(one) == 5
    order = list(range(30)); random.Random(0).shuffle(order)
    shuffled = {p: two[p] for p in order}
    assert all(same(one[p], shuffled[p]) for p in range(30))
    assert [one.files(p) for p in range(30)] == [UnpairedSet(domains/'A', domains/'B', 8, 12, seed=3).files(p)
                                                 for p in range(30)]         # the choice of files is the same
    assert not all(same(one[p], UnpairedSet(domains/'A', domains/'B', 8, 0, seed=4)[p]) for p in range(5))
    batches = [list(loader(one, 2, steps=4, workers=n)) for n in (0, 2)]
    assert all(same(a, b) for a, b in zip(*batches))


def test_both_sides_see_several_scales(tmp_path):
    for name in ('photos', 'anime'):
        (tmp_path/name).mkdir()
        ruler(tmp_path/name/'r.png', 100, 60)
    s = UnpairedSet(tmp_path/'photos', tmp_path/'anime', 16, 0)
    windows = np.array([[read_off(x) for x in s[p]] for p in range(200)])     # (200, side, 4)
    sides = windows[:, :, 2] - windows[:, :, 0]
    assert (sides.min(0) < 17).all() and (sides.max(0) > 52).all()
    assert abs(np.corrcoef(sides.T)[0, 1]) < .2                               # dice of their own


def test_pairs_share_their_window(tmp_path):
    for side in ('trainA', 'trainB'):
        (tmp_path/side).mkdir()
        for i in range(3): ruler(tmp_path/side/f'{i}.png', 70, 50, third=100*(side == 'trainB'))
    s = PairedSet(tmp_path, 16, 0, seed=2)
    for p in range(30):
        x, y = s[p]
        assert torch.equal(x[:2], y[:2]) and not torch.equal(x[2], y[2])
    assert len({read_off(s[p][0]) for p in range(30)}) > 25
    ruler(tmp_path/'trainB'/'1.png', 35, 25)
    with pytest.raises(ImageError, match='35×25 px.*70×50.*load_size'): [s[p] for p in range(3)]
    assert PairedSet(tmp_path, 16, 20)[0][0].shape == (3, 16, 16)             # squeezed, any size will do


def test_folders_of_a_list_have_equal_shares(domains, tmp_path):
    extra = tmp_path/'extra'
    extra.mkdir()
    for i in range(2): picture(seed=20 + i).save(extra/f'x{i}.png')
    s = UnpairedSet([domains/'A', extra], [domains/'B', extra], 8, 12, seed=1)
    files = [s.files(p) for p in range(400)]
    assert [f[0].parent.name for f in files] == ['A', 'extra']*200           # by turns, whatever they hold
    assert len(s) == 10 and {f[0] for f in files[:10]} == {*find_images(domains/'A'), *find_images(extra)}
    for start in range(0, 400, 10):                       # each of the larger folder comes once an epoch
        assert len({f[0] for f in files[start:start+10:2]}) == 5
    for i in range(0, 400, 4): assert len({f[0] for f in files[i+1:i+4:2]}) == 2
    drawn = np.array([f[1].parent.name == 'extra' for f in files])
    assert abs(drawn.mean() - .5) < .08                                       # anime: by dice, …
    assert abs(drawn[::2].mean() - .5) < .1 and abs(drawn[1::2].mean() - .5) < .1   # … not in step
    assert s.names == ('photos', 'photos 2', 'anime', 'anime 2') and len(s.shelves) == 4
    again = UnpairedSet([domains/'A', extra], [domains/'B', extra], 8, 12, seed=1)
    assert all(same(s[p], again[p]) for p in (7, 3, 399))
    alone, listed = (UnpairedSet(a, domains/'B', 8, 12, seed=1) for a in (domains/'A', [domains/'A']))
    assert all(same(alone[p], listed[p]) for p in range(10)) and listed.names == ('photos', 'anime')
    assert same(alone[3][1:], UnpairedSet([domains/'A', extra], domains/'B', 8, 12, seed=1)[3][1:])
    mixed = UnpairedSet([extra, *find_images(domains/'A')], domains/'B', 8)   # single files: one more folder
    assert [len(shelf) for shelf in mixed.shelves] == [2, 5, 3]
    with pytest.raises(ImageError, match='gone: there is no such file or folder'):
        UnpairedSet([domains/'A', tmp_path/'gone'], domains/'B', 8)


def test_unreadable_files_of_every_folder_are_reported(domains, tmp_path):
    for name in ('one', 'two'):
        (tmp_path/name).mkdir()
        (tmp_path/name/'bad.png').write_bytes(b'gone')
        picture().save(tmp_path/name/'good.png')
    s = UnpairedSet([tmp_path/'one', tmp_path/'two'], domains/'B', 8, 0)
    with pytest.warns(UserWarning) as heard: used = {s.files(p)[0] for p in range(12)}
    assert len(heard) == 2 and {f.name for f in used} == {'good.png'} and len(used) == 2
    assert s.skipped == [tmp_path/'one'/'bad.png', tmp_path/'two'/'bad.png']


def test_one_folder(domains, tmp_path):
    s, again = ImageSet(domains/'A', 8, seed=3), ImageSet(find_images(domains/'A'), 8, seed=3)
    order = list(range(20)); random.Random(0).shuffle(order)
    shuffled = {p: again[p] for p in order}
    assert all(same(s[p], shuffled[p]) for p in range(20)) and s.files(7) == again.files(7)
    assert not all(same(s[p], ImageSet(domains/'A', 8, seed=4)[p]) for p in range(5))
    # all pictures in each pass
    for i in range(0, 20, 5): assert len({s.files(p) for p in range(i, i+5)}) == 5
    assert len(s) == 5 and s.names == ('photos',)
    assert ImageSet(domains/'B', 8, name='anime').names == ('anime',)
    (tmp_path/'wide').mkdir()
    for i in range(3): picture(28, 14, seed=i).save(tmp_path/'wide'/f'{i}.png')
    w, turned = ImageSet(tmp_path/'wide', 8), 0
    plain = {f: to_model(read_image(f).resize((16, 8), Image.Resampling.LANCZOS).crop((4, 0, 12, 8)))[0]
             for f in find_images(tmp_path/'wide')}                           # shorter side, then the middle
    for p in range(100):
        (x,), want = w[p], plain[w.files(p)[0]]
        mirrored = (x - want).abs().max() > .02
        torch.testing.assert_close(x, want.flip(-1) if mirrored else want, rtol=0, atol=.02)
        turned += mirrored.item()
    assert 30 < turned < 70
    assert {tuple(b[0].shape) for b in loader(s, 2, steps=3)} == {(2, 3, 8, 8)}
    with pytest.raises(IndexError): s[-1]
    bad = tmp_path/'bad'; bad.mkdir(); (bad/'0.png').write_bytes(b'gone'); picture().save(bad/'1.png')
    with pytest.warns(UserWarning, match='left out'):
        assert [ImageSet(bad, 8).files(p)[0].name for p in range(4)] == ['1.png']*4
    # smaller than the square: enlarged
    tall = tmp_path/'tall'; tall.mkdir(); picture(3, 40).save(tall/'a.png')
    assert ImageSet(tall, 8)[0][0].shape == (3, 8, 8)


def test_pairs(domains):
    s = PairedSet(domains/'pairs', 8, 12, seed=1)
    assert len(s) == 4
    for start in (0, 4, 40): assert len({s.files(p)[0] for p in range(start, start+4)}) == 4
    for p in range(30):
        x, y = s[p]
        assert torch.equal(x, y)           # the partners hold one picture: one window, one coin
        assert s.files(p)[0].stem == s.files(p)[1].stem
    assert len({s[p][0].sum().item() for p in range(30)}) > 10


def test_folders_of_pairs_have_equal_shares(tmp_path):
    "Two folders take turns, each in fresh orders; one folder in a list is as one folder."
    for name, n in (('few', 2), ('many', 5)):
        for side in ('trainA', 'trainB'):
            (tmp_path/name/side).mkdir(parents=True)
            for k in range(n):
                Image.new('RGB', (8, 8), (k, n, 0)).save(tmp_path/name/side/f'{k}.png')
    folders = [tmp_path/'few', tmp_path/'many']
    s = PairedSet(folders, 8, seed=3)
    seen = [s.files(k)[0].parts[-3:] for k in range(20)]
    assert len(s) == 10 and [name for name, *_ in seen] == ['few', 'many']*10
    every = {f'{k}.png' for k in range(5)}
    for first in (1, 11): assert {file for _, _, file in seen[first:first + 9:2]} == every
    assert all(a.name == b.name and a.parent.name == 'trainA' for a, b in map(s.files, range(20)))
    alone, listed = PairedSet(folders[1], 8, seed=3), PairedSet(folders[1:], 8, seed=3)
    assert [alone.files(k) for k in range(9)] == [listed.files(k) for k in range(9)]
    (tmp_path/'many'/'trainB'/'3.png').unlink()
    with pytest.raises(ImageError, match='many.*no partner'): PairedSet(folders, 8)


def test_pair_errors(tmp_path):
    with pytest.raises(ImageError, match='trainA'): PairedSet(tmp_path)
    for side, names in (('trainA', range(12)), ('trainB', range(4, 13))):
        (tmp_path/side).mkdir()
        for i in names: picture().save(tmp_path/side/f's{i}.png')
    with pytest.raises(ImageError) as e: match_pairs(tmp_path)
    assert '5 of 21 files' in str(e.value) and 'trainA/s0' in str(e.value) and 'trainB/s12' in str(e.value)
    for i in (0, 1, 2, 3): os.remove(tmp_path/'trainA'/f's{i}.png')
    os.remove(tmp_path/'trainB'/'s12.png')
    assert [a.stem for a, _ in match_pairs(tmp_path)] == [f's{i}' for i in range(4, 12)]      # natural order
    picture().save(tmp_path/'trainA'/'s5.jpg')
    with pytest.raises(ImageError, match='s5.jpg.*s5.png|s5.png.*s5.jpg'): match_pairs(tmp_path)


@pytest.mark.fault('training: pictures that cannot be read',
                   happens='each is named once and replaced by the next',
                   left='a run on the others')
def test_unreadable_files_in_training(tmp_path):
    for side in ('trainA', 'trainB'):
        (tmp_path/side).mkdir()
        for i in range(4): picture(seed=i).save(tmp_path/side/f'{i}.png')
    (tmp_path/'trainB'/'2.png').write_bytes(b'')
    s = PairedSet(tmp_path, 8, seed=0)
    with pytest.warns(UserWarning) as heard: used = [s.files(p)[0].stem for p in range(12)]
    assert len(heard) == 1 and 'trainB' in str(heard[0].message) and '2' not in used
    assert s.skipped == [tmp_path/'trainA'/'2.png', tmp_path/'trainB'/'2.png']
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fresh = PairedSet(tmp_path, 8, seed=0)
        # any order, the same stand-in
        assert [fresh.files(p)[0].stem for p in reversed(range(12))] == used[::-1]
        for i in range(4): (tmp_path/'trainA'/f'{i}.png').write_text('gone')
        with pytest.raises(ImageError, match='nothing here can be read, of 4'):
            loader(PairedSet(tmp_path, 8), 1, workers=2)
    many = tmp_path/'many'; many.mkdir()
    for i in range(30): (many/f'{i}.png').touch()
    picture().save(many/'99.png')
    s = UnpairedSet(many, many/'99.png', 8)
    with pytest.warns(UserWarning) as heard:
        for p in range(62): s[p]
    assert len(heard) == 11 and len(s.skipped) == 30       # ten names, then one line: no flood


# ---------------------------------------------------------------- loader
def test_loader_positions():
    assert list(Steps(3, 2, 2)) == [[6, 7, 8], [9, 10, 11]] and len(Steps(3, 2, 2)) == 2
    ranks = [list(Steps(2, 5, 3, r, 3)) for r in range(3)]
    assert [sum(rows, []) for rows in zip(*ranks)] == list(Steps(6, 5, 3))


def test_loader_is_the_same_for_any_workers_and_start(domains):
    torch.manual_seed(0); state = torch.get_rng_state()
    s = UnpairedSet(domains/'A', domains/'B', 8, 12, seed=9)
    want = [torch.stack([s[p][0] for p in (2*i, 2*i+1)]) for i in range(8)]
    for workers, start in ((0, 0), (2, 0), (1, 3)):
        got = list(loader(s, 2, start=start, steps=8-start, workers=workers))
        assert len(got) == 8-start, (workers, start)
        assert all(torch.equal(g[0], w) for g, w in zip(got, want[start:])), (workers, start)
    ours = [list(loader(s, 1, steps=8, rank=r, world_size=2)) for r in (0, 1)]
    assert all(torch.equal(torch.cat([a[0], b[0]]), w) for a, b, w in zip(*ours, want))
    assert torch.equal(state, torch.get_rng_state())
    assert len(loader(s, 2)) == 2 and len(loader(s, 99)) == 1 and list(loader(s, 2, steps=0)) == []
    for bad in (dict(batch=0), dict(batch=1, start=-1), dict(batch=1, rank=2, world_size=2),
                dict(batch=1, workers=-1)):
        with pytest.raises(SettingsError): loader(s, **bad)


def test_workers_share_what_is_unreadable(domains, tmp_path, capfd):
    for f in (domains/'A').iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
    (tmp_path/'3.png').write_bytes(b'\x89PNG')
    s = UnpairedSet(tmp_path, domains/'B', 8, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter('always')
        # past pytest's recorder
        warnings.showwarning = lambda message, *_, **__: os.write(2, f'{message}\n'.encode())
        first = next(p for p in range(5)
                     if s.shelves[0].rows[data._visited(p, 5, 0, 'photo')][0].name == '3.png')
        list(loader(s, 1, start=5 if first == 0 else 0, steps=20, workers=2))
    assert s.skipped == [tmp_path/'3.png']                 # found by a worker, known here
    assert 1 <= capfd.readouterr().err.count('left out of training') <= 2
