"Films through a function: what is kept, what is said, what is continued. Small films made here, no network."
import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from scenimefy import video as V
from scenimefy.core import UserError
from scenimefy.data import ImageError
from scenimefy.video import VideoError, is_video, map_video, probe


def same(x): return x
def negative(x): return -x


def picture(i, w=64, h=48):
    "A frame that differs from every other: a light bar, and a dark one that moves."
    a = np.full((h, w, 3), 90, np.uint8)
    a[:, :, 0] += np.arange(w, dtype=np.uint8)
    a[:, (2*i) % w:(2*i) % w + 6] = 30
    return a


def sound(container, seconds, codec='aac'):
    stream = container.add_stream(codec, rate=48000, layout='mono')
    size = 1024 if codec == 'aac' else 960
    frames = []
    for k in range(int(seconds*48000/size)):
        tone = .3*np.sin(np.arange(k*size, (k + 1)*size)/20, dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(tone[None], format='fltp', layout='mono')
        if codec != 'aac': frame = av.AudioFrame.from_ndarray((tone[None]*30000).astype(np.int16),
                                                              format='s16', layout='mono')
        frame.sample_rate, frame.pts, frame.time_base = 48000, k*size, Fraction(1, 48000)
        frames.append(frame)
    return stream, frames


def film(path, n=20, size=(64, 48), times=None, base=Fraction(1, 90000), codec='libx264', audio=None,
         pix_fmt='yuv420p', tags=None, fill=None, rate=25):
    "A film with the frames of `picture`; `times` in units of `base`."
    times = times or [round(i/rate/base) for i in range(n)]
    with av.open(str(path), 'w') as c:
        v = c.add_stream(codec, rate=rate, options={'crf': '10'} if codec == 'libx264' else {})
        (v.width, v.height), v.pix_fmt = size, pix_fmt
        v.codec_context.time_base = base
        for name, value in (tags or {}).items(): setattr(v.codec_context, name, value)
        a, tones = sound(c, n/rate, audio) if audio else (None, [])
        for tone in tones: c.mux(a.encode(tone))
        if audio: c.mux(a.encode(None))
        for i, t in enumerate(times):
            pixels = picture(i, *size) if fill is None else fill(i)
            frame = av.VideoFrame.from_ndarray(pixels, format='rgb24').reformat(format=pix_fmt)
            frame.pts, frame.time_base = t, base
            c.mux(v.encode(frame))
        c.mux(v.encode(None))
    return path


def decoded(path):
    with av.open(str(path)) as c: return [f.to_ndarray(format='rgb24') for f in c.decode(video=0)]


def seconds(path):
    with av.open(str(path)) as c: return [float(f.pts*f.time_base) for f in c.decode(video=0)]


def payloads(path):
    "Bytes of the sound packets, and when each is heard after the first picture is seen."
    with av.open(str(path)) as c: found = [p for p in c.demux(audio=0) if p.size]
    return [bytes(p) for p in found], [float(p.pts*p.time_base) - seconds(path)[0] for p in found]


def run(*args, **kwargs): return map_video(*args, progress=False, **kwargs)


# ---- what is kept

@pytest.mark.parametrize('suffix', ['.mp4', '.mkv', '.mov'])
def test_sound_is_copied_packet_for_packet(tmp_path, suffix):
    source = film(tmp_path/'a.mp4', audio='aac')
    done = run(source, tmp_path/f'b{suffix}', negative, segment=7)
    (ours, when), (theirs, before) = payloads(done.out), payloads(source)
    assert len(ours) > 30 and ours == theirs
    assert np.abs(np.array(when) - before).max() <= (.0006 if suffix == '.mkv' else 1e-6)   # mkv counts ms
    assert done.frames == 20 and not done.notes


def test_webm_keeps_opus_and_the_pictures(tmp_path):
    source = film(tmp_path/'a.mkv', audio='libopus', n=10)
    done = run(source, tmp_path/'b.webm', same, segment=4)
    assert payloads(done.out)[0] == payloads(source)[0]
    gap = [np.abs(a.astype(int) - b).mean() for a, b in zip(decoded(source), decoded(done.out), strict=True)]
    assert max(gap) < 4
    with av.open(str(done.out)) as c: assert 'vp9' in c.streams.video[0].codec_context.name


def test_pictures_go_through_fn(tmp_path):
    source = film(tmp_path/'a.mp4')
    shapes = []
    def fn(x):
        assert x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1
        shapes.append(tuple(x.shape))
        return -x
    done = run(source, tmp_path/'b.mp4', fn, batch=3, segment=7)
    assert shapes == [(3, 3, 48, 64), (3, 3, 48, 64), (1, 3, 48, 64)]*2 + [(3, 3, 48, 64)]*2
    pairs = list(zip(decoded(source), decoded(done.out), strict=True))
    assert all(np.abs(255 - a.astype(int) - b).mean() < 3 for a, b in pairs)


def test_uneven_times_are_kept(tmp_path):
    times = np.cumsum([1000, 3003, 1800, 9001, 1, 777, 4500, 90000, 3000, 3000, 2999, 1500]).tolist()
    source = film(tmp_path/'a.mp4', times=times)
    done = run(source, tmp_path/'b.mp4', same, segment=5)
    assert seconds(done.out) == seconds(source) and len(seconds(source)) == 12
    with av.open(str(done.out)) as c: assert c.streams.video[0].time_base == Fraction(1, 90000)
    done = run(source, tmp_path/'b.mkv', same, segment=5)
    assert np.abs(np.array(seconds(done.out)) - seconds(source)).max() <= .0006


def turn(path, matrix):
    "Write a display matrix into the track header of an .mp4."
    data = bytearray(path.read_bytes())
    at = data.index(b'tkhd') + 4
    assert data[at] == 0                      # version 0: the matrix stands 40 bytes further
    values = [round(v*65536) for v in matrix]
    a, b, c, d = values
    data[at + 40:at + 76] = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], '>i4').tobytes()
    path.write_bytes(data)


@pytest.mark.parametrize('matrix, degrees, upright', [
    ((0, 1, -1, 0), 90, lambda a: np.rot90(a, -1)), ((-1, 0, 0, -1), 180, lambda a: a[::-1, ::-1]),
    ((0, -1, 1, 0), 270, lambda a: np.rot90(a)), ((-1, 0, 0, 1), 180, lambda a: a[:, ::-1])])
def test_rotation_is_honoured(tmp_path, matrix, degrees, upright):
    source = film(tmp_path/'a.mp4', n=2)
    stored = decoded(source)[0].astype(int)
    turn(source, matrix)
    seen = []
    done = run(source, tmp_path/'b.mp4', lambda x: seen.append(V.to_array(x[0])) or x)
    want = upright(stored)
    assert probe(source).rotation == degrees and probe(source).size == want.shape[1::-1]
    assert np.abs(seen[0] - want).mean() < 2
    assert probe(done.out).rotation == 0 and np.abs(decoded(done.out)[0] - want).mean() < 3


LUMA = {1: (.2126, .0722), 6: (.299, .114), 9: (.2627, .0593)}


def stored(color, space, full):
    "Y, Cb and Cr of one color by the formulas of the standards."
    (kr, kb), (r, g, b) = LUMA[space], [v/255 for v in color]
    y = kr*r + (1 - kr - kb)*g + kb*b
    cb, cr = (b - y)/(2 - 2*kb), (r - y)/(2 - 2*kr)
    return (255*y, 128 + 255*cb, 128 + 255*cr) if full else (16 + 219*y, 128 + 224*cb, 128 + 224*cr)


@pytest.mark.parametrize('space, primaries, transfer', [(1, 1, 1), (6, 6, 6), (9, 9, 14)])
@pytest.mark.parametrize('full', [False, True])
@pytest.mark.parametrize('suffix', ['.mp4', '.mkv'])
def test_color_tags_are_kept_and_used(tmp_path, space, primaries, transfer, full, suffix):
    color = (200, 60, 90)
    planes = np.empty((3, 48, 64), np.uint8)
    planes[:] = np.rint(stored(color, space, full))[:, None, None]
    tags = dict(colorspace=space, color_primaries=primaries, color_trc=transfer, color_range=1 + full)
    with av.open(str(tmp_path/f'a{suffix}'), 'w') as c:
        v = c.add_stream('libx264', rate=25, options={'crf': '4'})
        v.width, v.height, v.pix_fmt = 64, 48, 'yuv420p'
        for name, value in tags.items(): setattr(v.codec_context, name, value)
        for _ in range(2): c.mux(v.encode(av.VideoFrame.from_ndarray(planes, format='yuv444p').reformat(
            format='yuv420p')))
        c.mux(v.encode(None))
    seen = []
    done = run(tmp_path/f'a{suffix}', tmp_path/f'b{suffix}', lambda x: seen.append(V.to_array(x[0])) or x)
    assert np.abs(seen[0].reshape(-1, 3).mean(0) - color).max() <= 2
    with av.open(str(done.out)) as c:
        context = c.streams.video[0].codec_context
        assert {name: getattr(context, name) for name in tags} == tags
        frame = next(c.decode(video=0))
        got = [np.frombuffer(p, np.uint8)[0] for p in frame.planes]
        assert np.abs(np.array(got, float) - np.rint(stored(color, space, full))).max() <= 2


def test_odd_sides_gain_a_line(tmp_path):
    frames = [Image.fromarray(picture(i, 33, 21)) for i in range(3)]
    frames[0].save(tmp_path/'a.gif', save_all=True, append_images=frames[1:], duration=40)
    seen = []
    done = run(tmp_path/'a.gif', tmp_path/'b.mp4', lambda x: seen.append(x.shape) or x)
    assert seen[0] == (1, 3, 21, 33) and probe(done.out).size == (34, 22)
    last = decoded(done.out)[0]
    assert np.abs(last[21].astype(int) - last[20]).mean() < 4


def test_ten_bits_and_other_samplings_can_be_read(tmp_path):
    for fmt in ('yuv422p', 'yuv444p', 'yuv420p10le'):
        source = film(tmp_path/'a.mp4', n=3, pix_fmt=fmt)
        done = run(source, tmp_path/'b.mp4', same)
        assert np.abs(decoded(source)[1].astype(int) - decoded(done.out)[1]).mean() < 3, fmt


@pytest.mark.parametrize('transfer, white, name', [(16, .5807, 'PQ'), (18, .75, 'HLG')])
def test_hdr_becomes_a_usual_film(tmp_path, transfer, white, name):
    "White paper lies at 58 % in PQ and at 75 % in HLG (BT.2408); both end at the same gray, near white."
    planes = np.full((48, 64, 3), 512, np.uint16)
    planes[..., 0] = round(64 + 876*white)
    tags = dict(colorspace=9, color_primaries=9, color_trc=transfer, color_range=1)
    with av.open(str(tmp_path/'a.mkv'), 'w') as c:
        v = c.add_stream('libx264', rate=25, options={'crf': '4'})
        v.width, v.height, v.pix_fmt = 64, 48, 'yuv420p10le'
        for key, value in tags.items(): setattr(v.codec_context, key, value)
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(planes << 6, format='yuv444p16le')
            c.mux(v.encode(frame.reformat(format='yuv420p10le')))
        c.mux(v.encode(None))
    seen = []
    done = run(tmp_path/'a.mkv', tmp_path/'b.mp4', lambda x: seen.append(V.to_array(x[0])) or x)
    want = 255*(.6 + .4*(1 - np.exp(-1)))**(1/2.4)                        # light 1, bent
    assert np.abs(seen[0].astype(float) - want).max() < 3
    assert name in done.notes[0] and 'BT.709' in done.notes[0]
    with av.open(str(done.out)) as c:
        context = c.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)
        assert context.format.name == 'yuv420p'


def test_pixels_that_are_not_square_stay_so(tmp_path):
    source = film(tmp_path/'a.mp4', n=2, tags=dict(sample_aspect_ratio=Fraction(4, 3)))
    for suffix in ('.mp4', '.mkv'):
        done = run(source, tmp_path/f'b{suffix}', same)
        with av.open(str(done.out)) as c: assert c.streams.video[0].sample_aspect_ratio == Fraction(4, 3)


def test_mpeg4_where_there_is_no_x264(tmp_path, monkeypatch):
    source = film(tmp_path/'a.mp4', audio='aac', rate=Fraction(30000, 1001))
    monkeypatch.setattr(V.av, 'codecs_available', av.codecs_available - {'libx264'})
    done = run(source, tmp_path/'b.mp4', same, segment=6)
    with av.open(str(done.out)) as c: assert c.streams.video[0].codec_context.name == 'mpeg4'
    assert payloads(done.out)[0] == payloads(source)[0] and seconds(done.out) == seconds(source)
    pairs = list(zip(decoded(source), decoded(done.out), strict=True))
    assert max(np.abs(a.astype(int) - b).mean() for a, b in pairs) < 4


# ---- what is said

def subtitles(path):
    "Text, when it is shown after the first picture, and how long."
    with av.open(str(path)) as c:
        found = [(bytes(p), float(p.pts*p.time_base), float(p.duration*p.time_base))
                 for p in c.demux(subtitles=0) if p.size]
    return [(text, round(start - seconds(path)[0], 3), long) for text, start, long in found]


def test_what_is_left_out_is_said(tmp_path):
    source = film(tmp_path/'a.mp4', n=4, audio='aac')
    with av.open(str(source)) as i, av.open(str(tmp_path/'b.mkv'), 'w') as o:
        first, second = (o.add_stream_from_template(i.streams.video[0]) for _ in range(2))
        sounds = o.add_stream_from_template(i.streams.audio[0])
        words = o.add_mux_stream('subrip') if hasattr(o, 'add_mux_stream') else None
        for p in i.demux():
            if p.dts is None: continue
            p.stream = sounds if p.stream.type == 'audio' else first
            o.mux(p)
            p.stream = second
            if p.stream_index == 0: o.mux(p)
        if words:
            text = av.Packet(b'hello')
            text.stream, text.time_base = words, Fraction(1, 1000)
            text.pts, text.dts, text.duration = 0, 0, 40
            o.mux(text)
    done = run(tmp_path/'b.mkv', tmp_path/'c.mkv', same)
    assert done.notes == ['not copied: 1 × video']
    if words: assert subtitles(done.out) == subtitles(tmp_path/'b.mkv') != []
    done = run(tmp_path/'b.mkv', tmp_path/'c.mp4', same)                  # which takes no subrip
    assert done.notes == ['not copied: 1 × video' + (', 1 × subtitle' if words else '')]
    done = run(source, tmp_path/'c.gif', same)
    assert done.notes == ['the sound is left out: a picture file has none']


def test_a_film_that_ends_early_is_kept_as_far_as_it_came(tmp_path):
    whole = film(tmp_path/'a.mkv', n=60, audio='aac')
    data = whole.read_bytes()
    (tmp_path/'b.mkv').write_bytes(data[:len(data)*6//10])
    done = run(tmp_path/'b.mkv', tmp_path/'c.mkv', same)
    assert 10 < done.frames < 60 and len(done.notes) == 1 and 'ends early' in done.notes[0]
    pairs = list(zip(decoded(whole), decoded(done.out)))[:-1]                  # the last is cut itself
    assert max(np.abs(a.astype(int) - b).mean() for a, b in pairs) < 3


def test_damage_in_the_middle_costs_only_a_part(tmp_path):
    data = bytearray(film(tmp_path/'a.mp4', n=60).read_bytes())
    middle = data.index(b'mdat') + 2000
    data[middle:middle + 60] = b'x'*60
    (tmp_path/'b.mp4').write_bytes(data)
    done = run(tmp_path/'b.mp4', tmp_path/'c.mp4', same)
    assert 50 < done.frames <= 60 and seconds(done.out) == sorted(seconds(done.out))


def bad_files(folder):
    whole = film(folder/'a.mp4', n=30)
    yield 'there is no such file', folder/'none.mp4'
    yield 'empty', (folder/'empty.mp4', b'')
    yield 'no film that we can read', (folder/'noise.mp4', os.urandom(5000))
    yield 'no film that we can read', (folder/'half.mp4', whole.read_bytes()[:len(whole.read_bytes())//2])
    yield 'no film that we can read', (folder/'list.m3u8', b'#EXTM3U\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n')
    yield 'no film that we can read', (folder/'list.mp4', b'ffconcat version 1.0\nfile a.mp4\n')
    yield 'no film that we can read', (folder/'broken.gif', b'GIF89a' + bytes(40))
    yield 'folder', folder
    with av.open(str(folder/'tone.mp4'), 'w') as c:
        stream, frames = sound(c, .2)
        for frame in frames: c.mux(stream.encode(frame))
        c.mux(stream.encode(None))
    yield 'no moving picture', folder/'tone.mp4'


def test_what_is_no_film_gets_one_line(tmp_path):
    for words, path in bad_files(tmp_path):
        if isinstance(path, tuple):
            path[0].write_bytes(path[1])
            path = path[0]
        for call in (lambda: run(path, tmp_path/'out.mp4', same), lambda: probe(path)):
            with pytest.raises(ImageError) as error: call()
            text = str(error.value)
            assert words in text and '\n' not in text and len(text) < 300, (path, text)
        assert not list(tmp_path.glob('out*')), path
    with pytest.raises(VideoError, match='no such file'): probe('http://localhost/a.mp4')


def test_targets_are_checked_before_the_work(tmp_path):
    def never(x): raise AssertionError('worked')
    source = film(tmp_path/'a.mp4', n=3, audio='aac')
    for name, words in {'b.avi': r'use one of .mp4', 'b.webm': 'cannot hold the sound', 'b': 'use one of',
                        'a.mp4': 'film itself'}.items():
        with pytest.raises(VideoError, match=words): run(source, tmp_path/name, never)
    with pytest.raises(VideoError, match='64×48 pixels, more than 1,000'):
        run(source, tmp_path/'b.mp4', never, max_pixels=1000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.mp4']


def test_a_wrong_function_is_named(tmp_path):
    source = film(tmp_path/'a.mp4', n=3)
    with pytest.raises(ValueError, match='keep the shape'):
        run(source, tmp_path/'b.mp4', lambda x: x[..., 1:])
    with pytest.raises(ValueError, match='NaN'): run(source, tmp_path/'b.mp4', lambda x: x*float('nan'))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.mp4']


def test_what_is_a_video(tmp_path):
    films = [film(tmp_path/'a.mp4', n=2), film(tmp_path/'b.mkv', n=2),
             film(tmp_path/'c.avi', n=2, codec='mpeg4', base=Fraction(1, 25)),
             (tmp_path/'a.mp4').rename(tmp_path/'a.jpg'), tmp_path/'missing.mov']
    frames = [Image.fromarray(picture(i)) for i in range(3)]
    for suffix in ('gif', 'webp'):
        frames[0].save(tmp_path/f'moves.{suffix}', save_all=True, append_images=frames[1:])
        frames[0].save(tmp_path/f'still.{suffix}')
    frames[0].save(tmp_path/'d.png')
    (tmp_path/'d.png').rename(tmp_path/'png.mp4')
    no = ['still.gif', 'still.webp', 'png.mp4', 'missing.jpg', 'missing.gif']
    assert all(is_video(p) for p in [*films[1:], tmp_path/'moves.gif', tmp_path/'moves.webp'])
    assert not any(is_video(tmp_path/name) for name in no) and not is_video(tmp_path)


def test_probe(tmp_path):
    source = film(tmp_path/'a.mp4', n=30, audio='aac', rate=Fraction(30000, 1001))
    found = probe(source)
    assert found.size == (64, 48) and found.frames == 30 and found.rate == Fraction(30000, 1001)
    assert abs(found.duration - 1.001) < .05 and found.sound == ('aac',) and found.rotation == 0


# ---- GIF and WebP

def animation(path, loop=0, alpha=False):
    frames = []
    for i in range(5):
        im = Image.fromarray(picture(i))
        if alpha:
            veil = np.full((48, 64), 255, np.uint8)
            veil[:, 8*i:8*i + 16] = 0
            im.putalpha(Image.fromarray(veil))
        frames.append(im)
    more = {} if loop is None else dict(loop=loop)
    lossless = dict(lossless=True) if path.suffix == '.webp' else {}
    if path.suffix == '.gif' and alpha: more['disposal'] = 2
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[40, 70, 200, 110, 90],
                   **more, **lossless)
    return path


def played(path):
    "(pictures RGBA, durations, loop) as Pillow plays them."
    pictures, durations = [], []
    with Image.open(path) as im:
        for i in range(im.n_frames):
            im.seek(i)
            im.load()
            pictures.append(np.asarray(im.convert('RGBA')).astype(int))
            durations.append(im.info.get('duration'))
        return pictures, durations, im.info.get('loop')


@pytest.mark.parametrize('before', ['.gif', '.webp'])
@pytest.mark.parametrize('after', ['.gif', '.webp'])
@pytest.mark.parametrize('alpha', [False, True])
def test_animations_keep_durations_loop_and_transparency(tmp_path, before, after, alpha):
    source = animation(tmp_path/f'a{before}', loop=3, alpha=alpha)
    done = run(source, tmp_path/f'b{after}', negative, segment=2)
    (old, times, _), (new, new_times, loop) = played(source), played(done.out)
    assert new_times == times == [40, 70, 200, 110, 90] and loop == 3 and done.frames == 5
    for a, b in zip(old, new, strict=True):
        seen = a[..., 3] > 127
        assert ((b[..., 3] > 127) == seen).mean() > .99
        assert np.abs(255 - a[seen][:, :3] - b[seen][:, :3]).mean() < 12


def test_an_animation_that_plays_once(tmp_path):
    for before in ('.gif', '.webp'):
        source = animation(tmp_path/f'a{before}', loop=None if before == '.gif' else 1)
        assert played(run(source, tmp_path/'b.gif', same).out)[2] in (None, 1)
        assert played(run(source, tmp_path/'b.webp', same).out)[2] == 1


def test_animation_to_film_and_back(tmp_path):
    source = animation(tmp_path/'a.gif', alpha=True)
    done = run(source, tmp_path/'b.mp4', same)
    assert np.allclose(seconds(done.out), [0, .04, .11, .31, .42])
    assert decoded(done.out)[0][5, 5].min() > 245                                   # what is clear is white
    film(tmp_path/'c.mp4', n=10)
    assert sum(played(run(tmp_path/'c.mp4', tmp_path/'c.gif', same).out)[1]) == 400
    film(tmp_path/'d.mp4', n=60, rate=60)                                           # too fast for browsers
    fast = played(run(tmp_path/'d.mp4', tmp_path/'d.gif', same).out)[1]
    assert min(fast) >= 20 and sum(fast) == 1000
    assert sum(played(run(tmp_path/'d.mp4', tmp_path/'d.webp', same).out)[1]) == 1000


def test_a_gif_that_ends_early(tmp_path):
    data = animation(tmp_path/'a.gif').read_bytes()
    (tmp_path/'b.gif').write_bytes(data[:len(data)*7//10])
    done = run(tmp_path/'b.gif', tmp_path/'c.gif', same)
    assert 1 < done.frames < 5 and 'ends early' in done.notes[0]


# ---- what is continued

class Stop(Exception): pass


def stopping_after(n, fn=same):
    "`fn`, which gives up after `n` frames."
    def stops(x):
        nonlocal n
        n -= len(x)
        if n < 0: raise Stop
        return fn(x)
    return stops


@pytest.mark.parametrize('suffix', ['.mp4', '.gif'])
def test_an_interrupted_run_is_continued(tmp_path, suffix):
    source = film(tmp_path/'a.mp4', audio='aac')
    whole = run(source, tmp_path/f'whole{suffix}', negative, segment=6)
    with pytest.raises(Stop): run(source, tmp_path/f'b{suffix}', stopping_after(13, negative), segment=6)
    assert not (tmp_path/f'b{suffix}').exists() and (tmp_path/f'b{suffix}.part').is_dir()
    calls = []
    def fn(x):
        calls.append(len(x))
        return -x
    done = run(source, tmp_path/f'b{suffix}', fn, segment=6, resume=True)
    assert sum(calls) == 20 - 12 and done.frames == 20
    assert done.out.read_bytes() == whole.out.read_bytes()
    assert not list(tmp_path.glob('*.part'))


def test_other_settings_do_not_continue(tmp_path):
    source = film(tmp_path/'a.mp4')
    with pytest.raises(Stop): run(source, tmp_path/'b.mp4', stopping_after(13), segment=6, key='one')
    with pytest.raises(VideoError, match='but key was different'):
        run(source, tmp_path/'b.mp4', same, segment=6, key='two', resume=True)
    assert (tmp_path/'b.mp4.part'/'00001.json').exists()                   # nothing is thrown away
    calls = []
    run(source, tmp_path/'b.mp4', lambda x: calls.append(1) or x, segment=6, key='two')
    assert len(calls) == 20                                                # without resume: all anew


def test_two_runs_do_not_write_one_file(tmp_path):
    source = film(tmp_path/'a.mp4', n=4)
    def fn(x):
        with pytest.raises(VideoError, match='another run'): run(source, tmp_path/'b.mp4', same)
        return x
    assert run(source, tmp_path/'b.mp4', fn).frames == 4


class Sums:
    "A function with a memory: each frame is mixed with those before."
    def reset(self): self.mean = None
    def remember(self): return {'mean': self.mean}
    def recall(self, kept): self.mean = kept['mean']

    def __call__(self, x):
        self.mean = x.clone() if self.mean is None else .8*self.mean + .2*x
        return self.mean


def test_what_the_function_remembers_goes_on(tmp_path):
    source, memory = film(tmp_path/'a.mp4'), Sums()
    whole = run(source, tmp_path/'whole.mp4', memory, state=memory, segment=6)
    again = run(source, tmp_path/'again.mp4', memory, state=memory, segment=6)          # it was reset
    with pytest.raises(Stop):
        run(source, tmp_path/'b.mp4', stopping_after(15, memory), state=memory, segment=6)
    other = Sums()
    done = run(source, tmp_path/'b.mp4', other, state=other, segment=6, resume=True)
    assert done.out.read_bytes() == again.out.read_bytes() == whole.out.read_bytes()


KILLED = '''
import sys, time
from scenimefy.video import map_video
def slow(x):
    time.sleep(.05)
    return -x
map_video(sys.argv[1], sys.argv[2], slow, segment=4, progress=False, resume=True)
'''


def test_sigkill_in_the_middle(tmp_path):
    source = film(tmp_path/'a.mp4', n=30, audio='aac')
    whole = run(source, tmp_path/'whole.mp4', negative, segment=4)
    job = subprocess.Popen([sys.executable, '-c', KILLED, str(source), str(tmp_path/'b.mp4')])
    mark = tmp_path/'b.mp4.part'/'00002.json'
    until = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < until: time.sleep(.01)
    time.sleep(.07)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert mark.exists() and not (tmp_path/'b.mp4').exists()
    done = run(source, tmp_path/'b.mp4', negative, segment=4, resume=True)
    for a, b in zip(decoded(whole.out), decoded(done.out), strict=True): assert np.array_equal(a, b)
    assert payloads(done.out) == payloads(source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.mp4', 'b.mp4', 'whole.mp4']


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    source = film(tmp_path/'a.mp4')
    real = os.replace
    def full(a, b):
        if str(b).endswith('00001.mp4'): raise OSError(28, 'No space left on device')
        return real(a, b)
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OSError, match='No space'): run(source, tmp_path/'b.mp4', same, segment=6)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path/'b.mp4.part').glob('*.mp4')] == ['00000.mp4']
    assert run(source, tmp_path/'b.mp4', same, segment=6, resume=True).frames == 20


def resident():
    "Bytes that this process holds now."
    return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='asks the kernel of Linux')
@pytest.mark.parametrize('kind', ['mp4', 'gif'])
def test_memory_does_not_grow_with_length(tmp_path, kind):
    w, h, n, held = 320, 240, 140, []
    source = film(tmp_path/'a.mp4', n=n, size=(w, h), fill=lambda i: picture(i, w, h))
    def fn(x):
        held.append(resident())
        return x
    run(source, tmp_path/f'b.{kind}', fn, segment=10)
    held.append(resident())                                        # after the segments were joined
    assert max(held) - max(held[:50]) < .3*90*(w*h*3), held        # of 90 frames that came later
