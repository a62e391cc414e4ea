"Stylizing: sizes, odd files, names, hostile weights. Small networks, no network access."
import copy, errno, io, json, os, pickle, random, struct, time, weakref, zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from scenimefy import fast
from scenimefy import stylize as S
from scenimefy.core import SettingsError, UserError
from scenimefy.stylize import Stylizer, stylize, stylize_folder, translate
from scenimefy.translator import ResnetGenerator, as_shown, load_translator, save_translator
from scenimefy.weights import WeightsError


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return ResnetGenerator(ngf=4, n_blocks=1).eval()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('SCENIMEFY_HOME', str(tmp_path/'home'))
    monkeypatch.delenv('SCENIMEFY_OFFLINE', raising=False)
    return tmp_path/'home'


def photo(h, w, mode='RGB', seed=0):
    a = np.random.default_rng(seed).integers(0, 256, (h, w, 4), dtype=np.uint8)
    im = Image.fromarray(a[..., :3])
    if mode == 'RGBA': return Image.fromarray(a)
    if mode == 'I;16': return Image.fromarray(a[..., 0].astype(np.uint16)*257)
    return im.convert(mode)


# ---- sizes and pixels

def test_every_size_comes_back(net):
    rng = random.Random(1)
    sizes = [(1, 1), (1, 2), (2, 1), (3, 1200), (1200, 3), (1, 9), (4, 4), (5, 5), (7, 8), (8, 8), (250, 254)]
    sizes += [(rng.randint(1, 70), rng.randint(1, 70)) for _ in range(60)]
    sizes += [(h, w) for h in range(1, 13) for w in range(1, 13)]
    for h, w in sizes:
        x = torch.rand(1, 3, h, w)*2 - 1
        y = translate(net, x)
        assert y.shape == x.shape and y.isfinite().all() and y.abs().max() <= 1, (h, w)
    for h, w in sizes[:20]: assert stylize(photo(h, w), net).size == (w, h)


def test_multiples_of_four_are_the_plain_forward_rounded(net):
    im = photo(24, 36)
    x = torch.from_numpy(np.array(im)).permute(2, 0, 1)[None]/127.5 - 1
    with torch.no_grad(): want = ((net(x)[0] + 1)*127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    diff = np.abs(np.asarray(stylize(im, net)).astype(int) - want)
    assert diff.max() <= 1 and (diff > 0).mean() < .01     # float noise may tip a rounding


def test_padding_mirrors_and_keeps_the_corner(net):
    x = torch.arange(35.).view(1, 1, 5, 7).expand(1, 3, 5, 7)/35
    p = S.pad_to_fit(x)
    assert p.shape[-2:] == (8, 8) and torch.equal(p[..., :5, :7], x)
    assert torch.equal(p[..., 5, :7], x[..., 3, :]) and torch.equal(p[..., :5, 7], x[..., :, 5])
    assert S.pad_to_fit(torch.ones(1, 3, 1, 1)).eq(1).all()
    assert S.pad_to_fit(torch.rand(2, 3, 12, 8)).shape == (2, 3, 12, 8)


class Halves(torch.nn.Module):
    "Not a translator: halves the colors, so that every pixel can be found again."
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([.5]))
    def forward(self, x): return x*self.weight


@pytest.mark.parametrize('h, w', [(5, 7), (7, 5), (1, 1), (2, 9), (8, 11), (13, 12)])
def test_what_is_cut_off_is_what_was_added(h, w):
    "Sides that are no multiples of 4: each pixel comes back from its own place, not from the margin."
    x = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(h*100 + w))*2 - 1
    assert torch.equal(translate(Halves(), x), x*.5)


def test_sources_and_modes(net, tmp_path):
    for mode in ('RGB', 'L', 'LA', 'P', 'RGBA', 'CMYK', '1', 'I;16', 'YCbCr', 'HSV', 'LAB'):
        im = photo(9, 13, 'RGB').convert('L').convert('LA') if mode == 'LA' else photo(9, 13, mode)
        out = stylize(im, net)
        assert out.size == (13, 9) and out.mode == ('RGBA' if mode in ('RGBA', 'LA') else 'RGB'), mode
    assert stylize(np.zeros((9, 13), np.uint8), net).size == (13, 9)
    assert stylize(np.zeros((9, 13, 1), np.uint8), net).size == (13, 9)
    rgba = photo(9, 13, 'RGBA')
    assert np.array_equal(np.asarray(stylize(np.asarray(rgba), net)), np.asarray(stylize(rgba, net)))
    assert np.array_equal(np.asarray(stylize(rgba, net))[..., 3], np.asarray(rgba)[..., 3])
    rgba.save(tmp_path/'a.png')
    assert np.array_equal(np.asarray(stylize(str(tmp_path/'a.png'), net)), np.asarray(stylize(rgba, net)))
    for wrong in (torch.rand(1, 3, 8, 8), np.zeros((8, 8, 3), np.float32), None, 3):
        with pytest.raises(TypeError, match='uint8'): stylize(wrong, net)
    for shape in ((8, 8, 5), (2, 8, 8, 3), (0, 4, 3), (8,)):
        with pytest.raises(TypeError, match='H,W'): stylize(np.zeros(shape, np.uint8), net)


def test_turned_photo(net, tmp_path):
    im = photo(10, 22)
    exif = Image.Exif(); exif[0x0112] = 6
    im.save(tmp_path/'t.png', exif=exif)
    turned = im.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(stylize(tmp_path/'t.png', net)), np.asarray(stylize(turned, net)))


def test_too_large_for_memory(net, monkeypatch):
    monkeypatch.setattr(fast, 'memory_free', lambda device: 10_000)
    with pytest.raises(UserError, match='GB'): stylize(photo(64, 64), net)
    monkeypatch.setattr(fast, 'memory_free', lambda device: None)
    assert stylize(photo(64, 64), net).size == (64, 64)


# ---- weights

def test_round_trip_and_cache(net, tmp_path):
    path = save_translator(net, tmp_path/'g.safetensors', step=7)
    again = load_translator(path)
    for k, v in net.state_dict().items(): assert torch.equal(again.state_dict()[k], v)
    assert not again.training and load_translator(path) is not load_translator(path)
    from safetensors import safe_open
    with safe_open(path, 'pt') as f: about = f.metadata()
    assert about['format'] == 'scenimefy.translator'
    assert (about['ngf'], about['n_blocks'], about['step']) == ('4', '1', '7')
    torch.save(net.state_dict(), tmp_path/'g.pth')
    im = photo(20, 20)
    assert np.array_equal(np.asarray(stylize(im, tmp_path/'g.pth')), np.asarray(stylize(im, path)))
    before = S._ready(str(path), 'cpu', 'fp32')
    assert S._ready(path, 'cpu', None) is before  # the loop does not read the file again
    other = ResnetGenerator(ngf=4, n_blocks=2)
    save_translator(other, path); os.utime(path, ns=(1, 1))
    assert S._ready(path, 'cpu', None) is not before                # but a new file is noticed
    state = torch.get_rng_state(); load_translator(path); assert torch.equal(state, torch.get_rng_state())
    half = {k: v.half() for k, v in net.state_dict().items()}
    torch.save(half, tmp_path/'h.pt')
    assert next(load_translator(tmp_path/'h.pt').parameters()).dtype == torch.float32
    with pytest.raises(UserError, match='precision'): stylize(im, path, precision='fp8')
    assert stylize(im, path, precision='bf16').size == im.size


@pytest.mark.parametrize('way', ['stylize', 'folder', 'file'])
def test_device_and_precision_are_honoured_or_refused(net, tmp_path, way):
    "A network runs where and as it is; whoever asks for something else is told, and nothing is written."
    path, out = tmp_path/'p.png', tmp_path/'out'
    photo(9, 12).save(path)
    def run(weights, **asked):
        if way == 'stylize': return stylize(path, weights, **asked)
        if way == 'folder': return stylize_folder(path, out, weights, progress=False, **asked)
        return S.stylize_file([path], out/'x.png', weights, **asked)
    low = ResnetGenerator(ngf=4, n_blocks=1).to(torch.bfloat16)
    away = ResnetGenerator(ngf=4, n_blocks=1).to('meta')
    saved = save_translator(net, tmp_path/'g.safetensors')
    for weights, asked, words in ((net, dict(precision='bf16'),
                                   'holds torch.float32, but precision is .bf16.'),
                                  (low, dict(precision='fp32'),
                                   'holds torch.bfloat16, but precision is .fp32.'),
                                  (away, dict(device='cpu'), 'is on meta, but device is .cpu.'),
                                  (net, dict(device='gpu0'), 'no device is called'),
                                  (saved, dict(precision='float32'), "use 'fp32' or 'bf16'"),
                                  (net, dict(precision='bfloat16'), "use 'fp32' or 'bf16'"),
                                  (saved, dict(device='gpu0'), 'no device is called')):
        kind = SettingsError if words.startswith('use') else UserError   # a wrong word: exit status 2
        with pytest.raises(kind, match=words): run(weights, **asked)
    assert not out.exists()
    for weights, asked in ((net, dict(device='cpu', precision='fp32')), (low, dict(precision='bf16')),
                           (low, {}),
                           (saved, dict(device='cpu', precision='bf16'))): assert run(weights, **asked)
    assert S._ready(saved, 'cpu', 'bf16') is not S._ready(saved, 'cpu', None)
    assert next(S._ready(saved, 'cpu', 'bf16').parameters()).dtype == torch.bfloat16


def test_a_network_on_one_of_several_cards(monkeypatch):
    "'cuda' means any of the cards, 'cuda:1' that one."
    class There(torch.nn.Module):
        def parameters(self): return iter([torch.nn.Parameter(torch.zeros(1, device='meta'))])
    monkeypatch.setattr(S, 'pick_device', torch.device)
    there = There()
    assert S._ready(there, 'meta', None) is there
    with pytest.raises(UserError, match='is on meta'): S._ready(there, 'meta:1', None)


def test_paper_size_keys_load_strictly(tmp_path):
    net = ResnetGenerator()
    assert sum(p.numel() for p in net.parameters()) == 11_378_179
    torch.save(net.state_dict(), tmp_path/'Shinkai_net_G.pth')
    got = load_translator(tmp_path/'Shinkai_net_G.pth')
    assert list(got.state_dict()) == list(net.state_dict()) and len(got.state_dict()) == 52


class Evil:
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return os.mkdir, (self.mark,)


def bad_files(folder, net):
    "{name: (path, words of the message)}"
    state, files = net.state_dict(), {}
    def put(name, words, data=None, obj=None):
        path = folder/name
        if obj is not None: torch.save(obj, path)
        else: path.write_bytes(data)
        files[name] = path, words
    good = io.BytesIO(); torch.save(state, good); good = good.getvalue()
    save_translator(net, folder/'ok.safetensors'); safe = (folder/'ok.safetensors').read_bytes()
    put('empty.pth', 'empty', b'')
    put('page.pth', 'web page', b'<!DOCTYPE html><html><body>Sign in</body></html>')
    put('pointer.safetensors', 'LFS', b'version https://git-lfs.github.com/spec/v1\noid sha256:00\n')
    put('cut.pth', 'cut short', good[:len(good)//2])
    put('cut.safetensors', 'damaged', safe[:-100])
    put('long.safetensors', 'damaged', safe + b'x'*64)
    put('noise.bin', 'neither', b'\x01\x02'*500)
    put('head.safetensors', 'damaged', struct.pack('<Q', 50) + b'{' + b'x'*20)
    i = good.index(b'data.pkl') + 200
    put('broken.pth', '', good[:i] + bytes(64) + good[i+64:])
    put('bare.pkl', 'pickle', pickle.dumps(Evil(folder/'ran1')))
    put('evil.pth', 'mkdir', obj={'model.1.weight': Evil(folder/'ran2')})
    put('whole.pth', 'refused', obj=net)
    put('state.pth', 'dictionary of tensors', obj={'G': state, 'step': 3})
    put('list.pth', 'dictionary of tensors', obj=[torch.zeros(3)])
    put('other.pth', 'another network', obj={'conv.weight': torch.zeros(3, 3)})
    put('module.pth', 'another network', obj={f'modul.{k}': v for k, v in state.items()})
    put('missing.pth', 'is missing', obj={k: v for k, v in state.items() if k != 'model.4.bias'})
    put('extra.pth', 'does not belong', obj={**state, 'model.99.weight': torch.zeros(1)})
    put('shape.pth', 'shape', obj={**state, 'model.4.weight': torch.zeros(2, 2)})
    put('flat.pth', '', obj={**state, 'model.1.weight': torch.zeros(5)})
    put('nan.pth', 'NaN', obj={**state, 'model.4.bias': torch.full((8,), float('nan'))})
    put('int.pth', 'float', obj={**state, 'model.4.bias': torch.zeros(8, dtype=torch.int64)})
    put('blur.pth', 'filt', obj={**state, 'model.7.filt': torch.zeros_like(state['model.7.filt'])})
    put('gray.pth', 'channels', obj=ResnetGenerator(in_ch=1, out_ch=3, ngf=4, n_blocks=1).state_dict())
    wide = {k: torch.zeros(1).expand(v.shape) for k, v in state.items()}
    wide['model.1.weight'] = torch.zeros(1).expand(100_000, 3, 7, 7)
    put('wide.pth', 'sense', obj=wide)
    with zipfile.ZipFile(folder/'zip.pth', 'w') as z: z.writestr('a/readme.txt', 'hello')
    files['zip.pth'] = folder/'zip.pth', 'damaged'
    return files


@pytest.mark.fault('weights: 25 kinds of wrong files',
                   happens='each is refused in one line that says what it is',
                   left='nothing')
def test_bad_weights_are_named_and_run_nothing(net, tmp_path):
    files = bad_files(tmp_path, net)
    for name, (path, words) in files.items():
        with pytest.raises(WeightsError) as e: load_translator(path)
        text = str(e.value)
        assert words in text and str(path) in text and '\n' not in text and len(text) < 600, (name, text)
    assert len(files) >= 25
    assert not (tmp_path/'ran1').exists() and not (tmp_path/'ran2').exists()
    for wrong in (tmp_path/'nowhere.pth', tmp_path, 'shinkay'):
        with pytest.raises(WeightsError, match='shinkai'): load_translator(wrong)
    with pytest.raises(UserError, match='safetensors'): save_translator(net, tmp_path/'a.pth')


# ---- folders

def make_album(folder):
    "Ten files; returns the names of the good ones and of the bad ones."
    folder.mkdir(parents=True)
    buf = io.BytesIO(); photo(60, 60).save(buf, 'JPEG')
    (folder/'truncated.jpg').write_bytes(buf.getvalue()[:len(buf.getvalue())//2])
    (folder/'empty.png').write_bytes(b'')
    (folder/'text.jpg').write_text('these are only words')
    photo(20, 30, 'CMYK').save(folder/'cmyk.jpg')
    photo(20, 30, 'I;16').save(folder/'deep.png')
    photo(20, 30, 'P').save(folder/'exposure.gif')
    photo(20, 30, 'RGBA').save(folder/'alpha.png')
    exif = Image.Exif(); exif[0x0112] = 6; exif[0x010e] = 'secret place'
    exif.get_ifd(0x8825)[1] = 'N'
    photo(20, 30).save(folder/'turned.jpg', exif=exif)
    photo(1, 1).save(folder/'one.png')
    photo(3, 1200).save(folder/'strip.png')
    return ({'cmyk.jpg': (30, 20), 'deep.png': (30, 20), 'exposure.gif': (30, 20), 'alpha.png': (30, 20),
             'turned.jpg': (20, 30), 'one.png': (1, 1), 'strip.png': (1200, 3)},
            {'truncated.jpg': 'truncated', 'empty.png': 'empty', 'text.jpg': 'text'})


@pytest.mark.fault('picture: bad ones in an album',
                   happens='named in the report; the others are done',
                   left='the scenes of the others')
def test_one_bad_file_never_stops_the_album(net, tmp_path, capsys):
    good, bad = make_album(tmp_path/'in'/'deep')
    report = stylize_folder(tmp_path/'in', tmp_path/'out', net)
    assert {d.path.name for d in report.done} == set(good)
    assert {f.path.name for f in report.failed} == set(bad)
    for d in report.done:
        assert d.out == tmp_path/'out'/'deep'/f'{d.path.stem}.png'
        with Image.open(d.out) as im:
            assert im.size == good[d.path.name] and im.format == 'PNG' and not im.getexif()
            assert im.mode == ('RGBA' if d.path.name == 'alpha.png' else 'RGB')
    for f in report.failed: assert bad[f.path.name] in f.reason and '\n' not in f.reason
    assert not report.ok and report.seconds > 0
    assert '7 done, 3 failed' in str(report) and str(report).count('\n') == 3
    # nothing left behind
    assert not [p for p in (tmp_path/'out').rglob('*') if p.is_file() and p.suffix != '.png']
    first = {p: p.read_bytes() for p in (tmp_path/'out').rglob('*.png')}
    stylize_folder(tmp_path/'in', tmp_path/'out', net, progress=False)
    assert first == {p: p.read_bytes() for p in (tmp_path/'out').rglob('*.png')}  # twice is once


def outputs(report, out): return {str(d.out.relative_to(out)) for d in report.done}


@pytest.mark.fault('names: x.jpg, x.png and X.PNG in one folder',
                   happens='every scene has a name of its own',
                   left='one scene for each')
def test_names_never_collide(net, tmp_path):
    a, out = tmp_path/'a', tmp_path/'out'
    for name in ('x.jpg', 'x.png', 'X.PNG', 'x.jpg.png', 's/y.jpg', 's/y.webp', 'z.jpeg', 't.x/q.bmp'):
        (a/name).parent.mkdir(parents=True, exist_ok=True); photo(8, 8).save(a/name)
    report = stylize_folder(a, out, net, progress=False)
    names = outputs(report, out)
    assert report.ok and len(names) == len({n.casefold() for n in names}) == 8
    assert {'z.png', 's/y.jpg.png', 's/y.webp.png', 't.x/q.png'} <= names
    b = tmp_path/'b'; b.mkdir(); photo(8, 8).save(b/'z.jpg')
    report = stylize_folder([a, b, a/'z.jpeg', tmp_path/'nowhere', b/'z.jpg'], tmp_path/'o2', net,
                            progress=False)
    assert {'a/z.png', 'b/z.png'} <= outputs(report, tmp_path/'o2') and len(report.done) == 9
    assert [f.path.name for f in report.failed] == ['nowhere']


@pytest.mark.fault('names: scenes into the folder of the photos',
                   happens='refused, or written beside them',
                   left='every photo as it was')
def test_inputs_survive(net, tmp_path, monkeypatch):
    a = tmp_path/'a'; a.mkdir()
    photo(8, 8).save(a/'x.png'); photo(8, 8).save(a/'y.jpg')
    before = {p: p.read_bytes() for p in a.iterdir()}
    with pytest.raises(UserError, match='photos themselves'): stylize_folder(a, a, net)
    with pytest.raises(UserError, match='photos themselves'): stylize_folder(a, a/'..'/'a', net)
    report = stylize_folder(list(before), a, net, progress=False)  # files by name, into their own folder
    assert report.ok and all(p.read_bytes() == b for p, b in before.items())
    assert outputs(report, a) == {'x.png.png', 'y.png'}
    for p in set(a.iterdir()) - set(before): p.unlink()
    for _ in range(2):  # a result is not a photo the next time
        report = stylize_folder(a, a/'anime', net, progress=False)
        assert outputs(report, a/'anime') == {'x.png', 'y.png'}
    monkeypatch.chdir(tmp_path)
    report = stylize_folder('a', '.', net, progress=False)  # above the photos: still not onto them
    assert report.ok and (tmp_path/'x.png').exists()
    assert all(p.read_bytes() == b for p, b in before.items())


@pytest.mark.fault('names: links in the folder of the scenes that lead elsewhere',
                   happens='nothing is written through them',
                   left='files elsewhere as they were')
def test_links_do_not_lead_out(net, tmp_path):
    a, out, away = tmp_path/'a', tmp_path/'out', tmp_path/'away'
    (a/'sub').mkdir(parents=True); out.mkdir(); away.mkdir()
    photo(8, 8).save(a/'sub'/'x.png'); photo(8, 8).save(a/'y.png')
    os.symlink(away, out/'sub'); os.symlink(a/'y.png', out/'y.png')
    before = (a/'y.png').read_bytes()
    report = stylize_folder(a, out, net, progress=False)
    assert [f.path.name for f in report.failed] == ['x.png'] and 'out of' in report.failed[0].reason
    assert not list(away.iterdir())
    assert (a/'y.png').read_bytes() == before, 'the link was written through'
    os.symlink('/', a/'root')                                            # the whole disk is not walked
    with pytest.warns(UserWarning, match='root: this link leads back'):
        done = stylize_folder(a, tmp_path/'o3', net, progress=False).done
    assert len(done) == 2


def test_full_disk_stops_with_one_sentence(net, tmp_path, monkeypatch):
    a = tmp_path/'a'; a.mkdir()
    for i in range(3): photo(8, 8).save(a/f'{i}.png')
    def full(self, fp, *args, **kw): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(Image.Image, 'save', full)
    with pytest.raises(UserError, match='full after 0 of 3'):
        stylize_folder(a, tmp_path/'out', net, progress=False)
    assert not list((tmp_path/'out').iterdir())


def test_wrong_weights_fail_before_the_first_photo(tmp_path):
    photo(8, 8).save(tmp_path/'x.png')
    with pytest.raises(WeightsError): stylize_folder(tmp_path/'x.png', tmp_path/'out', tmp_path/'no.pth')
    assert not (tmp_path/'out').exists()


# ---- what lies in the output folder, and what it is called

@pytest.mark.fault('names: a picture of somebody else lies where a scene would go',
                   happens='it stays; the scene has another name, and a note says so',
                   left='both')
def test_a_strangers_picture_stays(net, tmp_path):
    "Somebody else's file in the output folder keeps its place; our own scene of an earlier run does not."
    album, out = tmp_path/'album', tmp_path/'out'
    album.mkdir(); out.mkdir()
    photo(9, 12).save(album/'a.jpg'); photo(9, 12, seed=1).save(album/'b.jpg')
    strangers = photo(5, 5, seed=2)
    strangers.save(out/'a.png')
    for turn in range(2):
        report = stylize_folder(album, out, net, progress=False)
        assert [d.out.name for d in report.done] == ['a.jpg.png', 'b.png'] and len(report.notes) == 1, turn
        assert 'a.png is not ours and stays' in report.notes[0]
        assert np.array_equal(Image.open(out/'a.png'), strangers)
    assert sorted(p.name for p in out.iterdir()) == ['a.jpg.png', 'a.png', 'b.png']
    with Image.open(out/'b.png') as im:
        assert im.info.pop('scenimefy').startswith('{"weights": ')
        assert im.info == {'Software': 'scenimefy', 'srgb': 0}


@pytest.mark.parametrize('name', ['scene.png', 'scene.jpg', 'scene.webp', 'scene.tif', 'scene.bmp'])
def test_one_photo_into_one_file(net, tmp_path, name):
    photo(9, 12).save(tmp_path/'p.png')
    report = S.stylize_file([tmp_path/'p.png'], tmp_path/'new'/name, net)
    assert report.ok and [p.name for p in (tmp_path/'new').iterdir()] == [name]
    with Image.open(tmp_path/'new'/name) as im: assert im.size == (12, 9)


def test_one_file_bad_requests(net, tmp_path):
    photo(9, 12).save(tmp_path/'p.png')
    photo(9, 12).save(tmp_path/'q.png')
    (tmp_path/'words.png').write_text('words')
    before = (tmp_path/'p.png').read_bytes()
    for given, out, words in (([tmp_path/'p.png', tmp_path/'q.png'], 'x.png', 'give a folder'),
                              ([tmp_path], 'x.png', 'give a folder'),
                              ([tmp_path/'p.png'], 'x.html', 'we write'),
                              ([tmp_path/'p.png'], 'p.png', 'the photo itself')):
        with pytest.raises(UserError, match=words): S.stylize_file(given, tmp_path/out, net)
    report = S.stylize_file([tmp_path/'words.png'], tmp_path/'x.png', net)
    assert not report.ok and 'text' in report.failed[0].reason and not (tmp_path/'x.png').exists()
    assert (tmp_path/'p.png').read_bytes() == before


def test_larger_photos_need_to_be_asked_for(net, tmp_path):
    photo(20, 30).save(tmp_path/'p.png')
    with pytest.raises(UserError, match='max-pixels'): stylize(tmp_path/'p.png', net, max_pixels=599)
    assert stylize(tmp_path/'p.png', net, max_pixels=600).size == (30, 20)
    assert 'max-pixels' in stylize_folder(tmp_path/'p.png', tmp_path/'out', net, progress=False,
                                          max_pixels=599).failed[0].reason


@pytest.mark.fault('disk: one that knows no permissions (SMB, FUSE)',
                   happens='written as usual',
                   left='all scenes')
def test_a_disk_without_permissions_takes_scenes(net, tmp_path, monkeypatch):
    "SMB, FUSE and foreign NTFS refuse chmod; writing does not need it."
    def refuse(*args, **kwargs): raise PermissionError(errno.EPERM, 'Operation not permitted')
    monkeypatch.setattr(os, 'chmod', refuse)
    photo(9, 12).save(tmp_path/'p.png')
    assert stylize_folder(tmp_path/'p.png', tmp_path/'out', net, progress=False).ok
    save_translator(net, tmp_path/'net.safetensors')
    assert load_translator(tmp_path/'net.safetensors').ngf == 4


def test_files_have_the_permissions_of_any_other_file(net, tmp_path):
    old = os.umask(0o027)
    try:
        save_translator(net, tmp_path/'net.safetensors')
        S.save_picture(photo(4, 4), tmp_path/'p.png')
        (tmp_path/'plain').touch()
    finally: os.umask(old)
    assert {oct(p.stat().st_mode) for p in tmp_path.iterdir() if p.is_file()} == {oct(0o100640)}


@pytest.mark.parametrize('wrap',
                         [lambda sd: {f'module.{k}': v for k, v in sd.items()},
                          lambda sd: {f'_orig_mod.module.{k}': v for k, v in sd.items()},
                          lambda sd: {k: torch.nn.Parameter(v) for k, v in sd.items()}],
                         ids=['DataParallel', 'compiled', 'parameters'])
def test_wrapped_weights_load(net, tmp_path, wrap):
    torch.save(wrap(net.state_dict()), tmp_path/'w.pth')
    loaded = load_translator(tmp_path/'w.pth')
    x = torch.rand(1, 3, 16, 16)*2 - 1
    assert torch.equal(translate(loaded, x), translate(net, x))


def test_tone_comes_back_if_asked_for_or_if_the_network_asks(net, tmp_path):
    dark = photo(40, 60).point(lambda v: v//5)
    def off(scene): return np.abs(np.asarray(scene, float) - np.asarray(dark, float)).mean((0, 1)).max()
    plain, toned = stylize(dark, net, tone=False), stylize(dark, net, tone=True)
    means = [np.asarray(p, float).mean((0, 1)) for p in (dark, plain, toned)]
    assert np.abs(means[2] - means[0]).max() < 3 < 20 < np.abs(means[1] - means[0]).max()
    assert off(toned) < off(plain)
    assert (np.asarray(stylize(dark, net)) == np.asarray(plain)).all()
    wishful = copy.deepcopy(net)
    wishful.palette = torch.eye(3, 4)
    assert (np.asarray(stylize(dark, wishful)) == np.asarray(toned)).all()
    assert (np.asarray(stylize(dark, wishful, tone=False)) == np.asarray(plain)).all()
    lighter = copy.deepcopy(net)
    lighter.palette = torch.eye(3, 4)
    lighter.palette[:, 3] = .5
    assert np.asarray(stylize(dark, lighter), float).mean() > np.asarray(toned, float).mean() + 40
    file = save_translator(wishful, tmp_path/'wishful.safetensors')
    dark.save(tmp_path/'dark.png')
    S.stylize_folder(tmp_path/'dark.png', tmp_path/'out', file, progress=False)
    with Image.open(tmp_path/'out/dark.png') as im:
        assert np.abs(np.asarray(im, int) - np.asarray(toned, int)).max() <= 1
    S.stylize_file([tmp_path/'dark.png'], tmp_path/'own.png', file, tone=False)
    with Image.open(tmp_path/'own.png') as im:
        assert np.abs(np.asarray(im, int) - np.asarray(plain, int)).max() <= 1


# ---- one object that keeps the choices

def levels(path):
    with Image.open(path) as im: return np.asarray(im).astype(int)


def test_a_stylizer_does_what_the_functions_do(net, tmp_path):
    pictures = [photo(20, 30, seed=i) for i in range(3)]
    for i, p in enumerate(pictures): p.save(tmp_path/f'{i}.png')
    look = dict(strength=.6, keep_color=True, preserve=.5)
    stylizer = Stylizer(net, **look)
    want = [np.asarray(stylize(p, net, **look)).astype(int) for p in pictures]
    x = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1)/127.5 - 1 for p in pictures])
    batch = ((stylizer.batch(x) + 1)*127.5).round().permute(0, 2, 3, 1).numpy()
    arrays, paths = [np.asarray(p) for p in pictures], [tmp_path/f'{i}.png' for i in range(3)]
    singly = [stylizer(p) for p in pictures]
    for got in (stylizer(pictures), stylizer(arrays), stylizer(paths), singly, batch):
        assert all(np.abs(np.asarray(g).astype(int) - w).max() <= 1 for g, w in zip(got, want))
    assert stylizer([]) == []
    report = stylizer(tmp_path, tmp_path/'out')
    assert report.ok and [d.out.name for d in report.done] == ['0.png', '1.png', '2.png']
    assert stylizer(tmp_path/'1.png', tmp_path/'new.bmp').ok
    for path, w in ((tmp_path/'out/1.png', want[1]), (tmp_path/'new.bmp', want[1])):
        assert np.abs(levels(path) - w).max() <= 1
    file = save_translator(net, tmp_path/'net.safetensors')
    assert Stylizer(file, 'cpu').net is Stylizer(file, 'cpu', strength=.1).net       # read once


def test_without_wishes_it_is_the_network_and_the_last_step(net):
    "Not one level differs from the picture that there was before there were choices."
    wishful = copy.deepcopy(net)
    wishful.palette = torch.eye(3, 4)
    im = photo(24, 36)
    x = torch.from_numpy(np.array(im)).permute(2, 0, 1)[None]/127.5 - 1
    want = (as_shown(translate(wishful, x), x, wishful.palette)[0].clamp(-1, 1) + 1)*127.5
    assert np.array_equal(np.asarray(stylize(im, wishful)), want.round().byte().permute(1, 2, 0).numpy())


def test_wrong_choices_are_named(net):
    for wrong, words in ((dict(strenght=1), "did you mean 'strength'"), (dict(format='tiff'), "'webp'"),
                         (dict(quality=0), 'quality'), (dict(batch=-1), 'batch'),
                         (dict(max_memory='lots'), 'memory')):
        with pytest.raises(SettingsError, match=words): Stylizer(net, **wrong)


def test_a_mask_keeps_the_photo_where_it_is_black(net, tmp_path):
    im, mask = photo(40, 60), Image.new('L', (6, 4), 255)
    mask.paste(0, (0, 0, 3, 4))
    made = np.asarray(stylize(im, net, mask=mask)).astype(int)
    assert np.array_equal(made[:, :12], np.asarray(im)[:, :12])
    assert np.abs(made[:, 48:] - np.asarray(stylize(im, net)).astype(int)[:, 48:]).max() <= 1


# ---- folders: batches, order, memory

def test_batches_give_the_same_scenes_in_the_same_order(net, tmp_path):
    album = tmp_path/'album'
    album.mkdir()
    for i in range(9):
        h, w = (20, 30) if i % 4 else (30, 20)
        photo(h, w, 'RGBA' if i == 2 else 'RGB', seed=i).save(album/f'{i}.png')
    (album/'4.png').write_text('words')
    mask = Image.new('L', (5, 5), 255)
    mask.paste(0, (0, 0, 2, 5))
    mask.save(tmp_path/'mask.png')
    how = dict(progress=False, mask=tmp_path/'mask.png')
    reports = [stylize_folder(album, tmp_path/f'out{n}', net, batch=n, **how) for n in (1, 3, 100)]
    for report in reports:
        assert [d.path.name for d in report.done] == [f'{i}.png' for i in range(9) if i != 4]
        assert [f.path.name for f in report.failed] == ['4.png'] and all(d.seconds > 0 for d in report.done)
    for d in reports[0].done:
        for n in (3, 100):
            assert np.abs(levels(d.out) - levels(tmp_path/f'out{n}'/d.out.name)).max() <= 1, d.out.name


def test_a_batch_that_fails_is_tried_one_by_one(net, tmp_path, monkeypatch):
    for i in range(5): photo(8, 8, seed=i).save(tmp_path/f'{i}.png')
    stylizer, sizes, real = Stylizer(net, batch=4), [], Stylizer.batch
    def batch(self, x, mask=None):
        sizes.append(len(x))
        if len(x) > 1: raise MemoryError('too many')
        if len(sizes) == 3: raise RuntimeError('this one')
        return real(self, x, mask)
    monkeypatch.setattr(Stylizer, 'batch', batch)
    report = stylizer.folder(tmp_path, tmp_path/'out', progress=False)
    assert sizes == [4, 1, 1, 1, 1, 1]
    assert [f.path.name for f in report.failed] == ['1.png'] and 'this one' in report.failed[0].reason
    assert [d.path.name for d in report.done] == ['0.png', '2.png', '3.png', '4.png']


def test_threads_keep_the_order_and_few_pictures(net, tmp_path, monkeypatch):
    "Some are read slowly, some written slowly; the rest waits, and not in memory."
    for i in range(24): photo(8, 8, seed=i).save(tmp_path/f'{i:02}.png')
    alive, most = [], []
    real_read, real_paint, real_save = S._picture, S._paint, S.save_picture
    def read(path, *more):
        time.sleep(.02*(int(path.stem) % 3 == 0))
        got = real_read(path, *more)
        alive.append(weakref.ref(got[0]))
        most.append(sum(ref() is not None for ref in alive))
        return got
    def save(*args):
        time.sleep(.01*(int(args[1].stem) % 5 == 0))
        return real_save(*args)
    def paint(painter, jobs):
        time.sleep(.02)
        real_paint(painter, jobs)
    monkeypatch.setattr(S, '_picture', read)
    monkeypatch.setattr(S, '_paint', paint)
    monkeypatch.setattr(S, 'save_picture', save)
    report = stylize_folder(tmp_path, tmp_path/'out', net, progress=False)
    assert [d.path.name for d in report.done] == [f'{i:02}.png' for i in range(24)] and max(most) <= 12


def test_names_take_as_many_steps_as_there_are_photos(monkeypatch):
    tried, real = [], S._names
    def names(*args):
        for name in real(*args):
            tried.append(name)
            yield name
    monkeypatch.setattr(S, '_names', names)
    for trick in (lambda i: f'{i}.jpg', lambda i: 'x.jpg', lambda i: f'{i//2}.{"jpg" if i % 2 else "png"}'):
        tried.clear()
        sources = [(S.Path(f'/nowhere/{i}/p.jpg'), S.Path(trick(i))) for i in range(1_000)]
        jobs = S._name_outputs(sources, S.Path('/nowhere/out'))
        assert len({str(out).casefold() for _, out in jobs}) == 1_000 and len(tried) <= 2_000


# ---- folders: formats, metadata, masks

@pytest.mark.parametrize('kind, suffix', [('png', '.png'), ('jpeg', '.jpg'), ('webp', '.webp')])
def test_kinds_of_files_and_what_is_skipped(net, tmp_path, kind, suffix):
    album, out = tmp_path/'album', tmp_path/'out'
    album.mkdir(); out.mkdir()
    for i in range(3): photo(16, 20, 'RGBA' if i == 1 else 'RGB', seed=i).save(album/f'{i}.png')
    photo(5, 5, seed=7).save(out/f'2{suffix}')                          # a stranger's
    how = dict(progress=False, format=kind)
    report = stylize_folder(album, out, net, **how)
    assert [d.out.name for d in report.done] == [f'0{suffix}', f'1{suffix}', f'2.png{suffix}']
    assert len(report.notes) == 1
    with Image.open(out/f'1{suffix}') as im:
        assert im.format == kind.upper() and im.mode == ('RGB' if kind == 'jpeg' else 'RGBA')
    os.utime(out/f'0{suffix}', ns=(1, 1))
    photo(16, 20, seed=9).save(album/'3.png')
    later = stylize_folder(album, out, net, skip_existing=True, **how)
    assert [d.out.name for d in later.skipped] == [f'0{suffix}', f'1{suffix}', f'2.png{suffix}']
    assert [d.path.name for d in later.done] == ['3.png'] and '3 already there' in str(later)
    assert (out/f'0{suffix}').stat().st_mtime_ns == 1
    again = stylize_folder(album, out, net, **how)                       # without it, they are made anew
    assert len(again.done) == 4 and (out/f'0{suffix}').stat().st_mtime_ns > 1
    assert len(list(out.iterdir())) == 5


@pytest.mark.parametrize('kind', ['png', 'jpeg', 'webp'])
@pytest.mark.parametrize('change, word', [
    (dict(strength=.5), 'strength 1.0 → 0.5'), (dict(brush=True), 'brush False → True'),
    (dict(tone=True), 'tone'), (dict(mask='m.png'), 'mask'), ('weights', 'weights')])
def test_scenes_that_were_made_in_another_way_are_not_mixed_in(net, tmp_path, kind, change, word):
    photo(16, 20).save(tmp_path/'p.png')
    Image.new('L', (4, 4), 99).save(tmp_path/'m.png')
    def run(net=net, mask=None, **how):
        if mask: mask = tmp_path/mask
        return Stylizer(net, format=kind, **how).folder(tmp_path/'p.png', tmp_path/'out', mask, False)
    made = run().done[0].out
    before = made.read_bytes()
    again = run(skip_existing=True, batch=3)                             # changes no pixel
    assert len(again.skipped) == 1 and not again.notes
    if change == 'weights':
        change = dict(net=copy.deepcopy(net))
        next(change['net'].parameters()).data.add_(.1)
    with pytest.raises(UserError, match=word): run(skip_existing=True, **change)
    assert made.read_bytes() == before
    assert len(run(**change).done) == len(run(skip_existing=True, **change).skipped) == 1
    assert str(tmp_path).encode() not in made.read_bytes()


def test_scenes_that_do_not_say_how_they_were_made_stay(net, tmp_path):
    photo(16, 20).save(tmp_path/'p.png')
    (tmp_path/'out').mkdir()
    S.save_picture(photo(16, 20), tmp_path/'out'/'p.png')                 # as the first versions wrote it
    report = stylize_folder(tmp_path/'p.png', tmp_path/'out', net, progress=False, skip_existing=True)
    assert len(report.skipped) == 1 and 'do not say' in report.notes[0]


@pytest.mark.skipif(os.name == 'nt', reason='POSIX locks')
@pytest.mark.parametrize('how', ['folder', 'file'])
def test_half_files_of_a_killed_run_are_swept(net, tmp_path, how):
    import fcntl
    out, half = tmp_path/'out', tmp_path/'out'/'.p-0123abcd.png'
    out.mkdir()
    photo(16, 20).save(tmp_path/'p.jpg')
    others = [out/name for name in ('.q-0123abcd.png', '.p-0123abc.png', '.p-0123abcd.jpg', '.hidden.png')]
    for path in [half, *others]: path.write_bytes(b'half')
    def run():
        if how == 'file': return S.stylize_file([tmp_path/'p.jpg'], out/'p.png', net)
        return stylize_folder(tmp_path/'p.jpg', out, net, progress=False)
    another = os.open(out, os.O_RDONLY)
    fcntl.flock(another, fcntl.LOCK_SH)                                   # another run is at work here
    assert run().ok and half.exists()
    os.close(another)
    assert run().ok and not half.exists()
    assert sorted(out.iterdir()) == sorted([out/'p.png', *others])


def test_the_bar_moves_inside_a_picture(net, tmp_path, monkeypatch):
    seen, real = [], S._Bar.inside
    def inside(bar, share):
        real(bar, share)
        seen.append(bar.n)
    monkeypatch.setattr(S._Bar, 'inside', inside)
    for i in range(2): photo(40, 40, seed=i).save(tmp_path/f'{i}.png')
    stylizer = Stylizer(net)
    assert stylizer.folder(tmp_path, tmp_path/'out', progress=True).ok and stylizer.tell is None
    assert seen == sorted(seen) and seen[-1] == pytest.approx(2) and len({round(n, 3) for n in seen}) > 8
    assert any(0 < n < 1 for n in seen) and any(1 < n < 2 for n in seen)
    seen.clear()
    assert stylizer(tmp_path/'0.png', tmp_path/'one.png', progress=True).ok and len(seen) > 4


def test_quality_changes_the_size(net, tmp_path):
    photo(60, 60).save(tmp_path/'p.png')
    def size(kind, q):
        out = tmp_path/f'{kind}{q}'
        report = stylize_folder(tmp_path/'p.png', out, net, progress=False, format=kind, quality=q)
        return report.done[0].out.stat().st_size
    for kind in ('jpeg', 'webp'): assert size(kind, 10) < size(kind, 60) < size(kind, 100)


def told_photo(path):
    "A photo that tells everything, turned, with a block of its maker and a place."
    exif = Image.Exif()
    exif[0x0112], exif[0x010f], exif[0x0110], exif[0x013b] = 6, 'Maker', 'Model 7', 'Ann'
    camera = {0x9003: '2024:05:06 07:08:09', 0x829a: .5, 0x927c: b'SECRET BLOCK', 0xa002: 30}
    exif.get_ifd(0x8769).update(camera)
    exif.get_ifd(0x8825).update({1: 'N', 2: (48.0, 51.0, 30.0), 0x1d: '2024:05:06'})
    photo(20, 30).save(path, exif=exif)


@pytest.mark.parametrize('kind', ['png', 'jpeg', 'webp'])
def test_metadata_is_kept_if_asked_and_the_place_only_if_asked_for_too(net, tmp_path, kind):
    told_photo(tmp_path/'p.jpg')
    def run(name, **how):
        report = stylize_folder(tmp_path/'p.jpg', tmp_path/name, net, progress=False, format=kind, **how)
        made = report.done[0].out
        with Image.open(made) as im:
            exif = im.getexif()
            return made.read_bytes(), im.size, exif, dict(exif.get_ifd(0x8769)), dict(exif.get_ifd(0x8825))
    data, size, exif, camera, place = run('plain')
    assert not set(exif) - {0x0131, 0x8769, 0x9213} and not set(camera) - {0xa001} and not place
    assert b'Maker' not in data
    data, size, exif, camera, place = run('kept', keep_metadata=True)
    assert (exif[0x0112], exif[0x010f], exif[0x0110], exif[0x013b]) == (1, 'Maker', 'Model 7', 'Ann')
    assert camera[0x9003] == '2024:05:06 07:08:09' and camera[0x829a] == .5 and camera[0xa001] == 1
    assert size == (20, 30) and not place and b'SECRET' not in data and 0xa002 not in camera
    data, size, exif, camera, place = run('place', keep_metadata=True, keep_location=True)
    assert place[1] == 'N' and place[2][0] == 48 and b'SECRET' not in data
    assert not run('alone', keep_location=True)[4]                       # the place of what is not kept


def test_broken_metadata_cost_no_picture(net, tmp_path):
    told_photo(tmp_path/'p.jpg')
    data = (tmp_path/'p.jpg').read_bytes()
    start = data.index(b'Exif') + 6
    rng = random.Random(0)
    for i in range(12):
        hurt = bytearray(data)
        for _ in range(8): hurt[start + rng.randrange(8, 120)] = rng.randrange(256)
        (tmp_path/f'{i}.jpg').write_bytes(hurt)
    how = dict(keep_metadata=True, keep_location=True)
    report = stylize_folder(tmp_path, tmp_path/'out', net, progress=False, **how)
    assert report.ok and len(report.done) == 13


def test_every_file_says_that_it_is_srgb(net, tmp_path):
    from PIL import ImageCms
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    photo(20, 30).save(tmp_path/'p.jpg', icc_profile=lab)
    for name in ('a.png', 'a.jpg', 'a.webp'):
        S.stylize_file([tmp_path/'p.jpg'], tmp_path/name, net)
        with Image.open(tmp_path/name) as im:
            assert 'icc_profile' not in im.info
            assert im.info['srgb'] == 0 if name == 'a.png' else im.getexif().get_ifd(0x8769)[0xa001] == 1


def test_a_folder_of_masks(net, tmp_path):
    for name in ('a/x.jpg', 'a/sub/y.png', 'a/z.png'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        photo(24, 24).save(tmp_path/name)
    for name, level in (('m/x.png', 0), ('m/sub/y.jpg', 255)):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', (4, 4), level).save(tmp_path/name)
    report = stylize_folder(tmp_path/'a', tmp_path/'out', net, progress=False, mask=tmp_path/'m')
    assert [f.path.name for f in report.failed] == ['z.png'] and 'no mask' in report.failed[0].reason
    assert np.array_equal(levels(tmp_path/'out/x.png'), levels(tmp_path/'a/x.jpg'))
    plain = np.asarray(stylize(tmp_path/'a/sub/y.png', net)).astype(int)
    assert np.abs(levels(tmp_path/'out/sub/y.png') - plain).max() <= 1
    (tmp_path/'bad.png').write_text('words')
    bad = stylize_folder(tmp_path/'a', tmp_path/'out2', net, progress=False, mask=tmp_path/'bad.png')
    assert len(bad.failed) == 3 and 'bad.png' in bad.failed[0].reason


# ---- reports and sheets

def test_the_report_as_json(net, tmp_path):
    good, bad = make_album(tmp_path/'in')
    report = stylize_folder(tmp_path/'in', tmp_path/'out', net, progress=False, strength=.5)
    told = json.loads(S.write_report(report, tmp_path/'deep/r.json').read_text())
    assert {S.Path(row['photo']).name for row in told['done']} == set(good)
    assert all(S.Path(row['scene']).exists() and row['seconds'] >= 0 for row in told['done'])
    assert {S.Path(row['photo']).name: row['reason'] for row in told['failed']}.keys() == bad.keys()
    assert told['settings']['strength'] == .5
    assert told['weights'] == 'ResnetGenerator' and told['device'] == 'cpu'
    assert told['seconds'] > 0 and told['skipped'] == [] and told['program'] == 'scenimefy'


def test_sheets_show_every_pair_and_hold_few_pictures(net, tmp_path, monkeypatch):
    for i in range(7): photo(200 + i, 300, seed=i).save(tmp_path/f'{i} & <b>.png')
    report = stylize_folder(tmp_path, tmp_path/'out', net, progress=False)
    report.done[3].path.unlink()                                        # gone since: gray, and no error
    alive, most, real = [], [], S._small
    def small(*args, **kw):
        im = real(*args, **kw)
        alive.append(weakref.ref(im))
        most.append(sum(ref() is not None for ref in alive))
        return im
    monkeypatch.setattr(S, '_small', small)
    page = S.write_sheet(report, tmp_path/'s.html').read_text()
    assert page.count('<img') == 14 and page.count('&lt;b&gt;') >= 14 and '<b>' not in page.split('<main>')[1]
    assert page.rstrip().endswith('</html>') and max(most) <= 3
    S.write_sheet(report, tmp_path/'s.png')
    whole = levels(tmp_path/'s.png')
    assert max(most) <= 3 and whole.shape[1] > 6*160 and not report.notes
    monkeypatch.setattr(S, '_PAIRS', 2)
    S.write_sheet(report, tmp_path/'few.png')
    assert levels(tmp_path/'few.png').shape[0] < whole.shape[0] and 'first 2 of 7' in report.notes[0]
    with pytest.raises(SettingsError, match='html'): S.check_sheet('sheet.txt')


# ---- films

def test_a_film_is_its_frames(net, tmp_path):
    pytest.importorskip('scenimefy.video')
    frames = [photo(2, 3, seed=i).resize((24, 20), Image.BICUBIC) for i in range(5)]
    frames[0].save(tmp_path/'a.webp', save_all=True, append_images=frames[1:], duration=80, lossless=True)
    mask = Image.new('L', (24, 20), 0)
    stylizer = Stylizer(net, strength=.5)
    assert stylizer(tmp_path/'a.webp', tmp_path/'b.webp').ok
    with Image.open(tmp_path/'b.webp') as im:
        assert im.n_frames == 5
        for i, frame in enumerate(frames):
            im.seek(i)
            gap = np.abs(np.asarray(im.convert('RGB')).astype(int) - np.asarray(stylizer(frame)).astype(int))
            assert gap.mean() < 12, i                                   # WebP loses a little
    report = stylizer.video(tmp_path/'a.webp', tmp_path/'c.mp4', mask, progress=False)
    assert report.ok and report.done[0].out == tmp_path/'c.mp4' and report.seconds > 0
    assert not stylizer.video(tmp_path/'c.mp4', tmp_path/'d.xyz', progress=False).ok
    (tmp_path/'e.mp4').write_bytes(b'no film at all')
    assert not stylizer(tmp_path/'e.mp4', tmp_path/'f.mp4').ok


def test_what_is_a_film_and_where_it_goes(net, tmp_path):
    pytest.importorskip('scenimefy.video')
    frames = [photo(20, 24, seed=i) for i in range(2)]
    frames[0].save(tmp_path/'a.gif', save_all=True, append_images=frames[1:], duration=80)
    frames[0].save(tmp_path/'still.webp')
    Stylizer(net).video(tmp_path/'a.gif', tmp_path/'a.mp4', progress=False)
    (tmp_path/'out').mkdir()
    for name, out, target in (('a.gif', 'b.webp', 'b.webp'), ('a.gif', 'b.png', None), ('a.gif', 'out', None),
                              ('a.mp4', 'out', 'out/a.mp4'), ('a.mp4', 'c.mkv', 'c.mkv'),
                              ('still.webp', 'b.webp', None), ('none.avi', 'out', 'out/none.mp4'),
                              ('none.png', 'x.webp', None)):
        want = tmp_path/target if target else None
        assert S.film_target(tmp_path/name, tmp_path/out) == want, (name, out)


def test_a_steady_film(net, tmp_path):
    pytest.importorskip('scenimefy.steady')
    frames = [photo(20, 24, seed=i) for i in range(4)]
    frames[0].save(tmp_path/'a.webp', save_all=True, append_images=frames[1:], duration=80)
    assert Stylizer(net, smooth=True)(tmp_path/'a.webp', tmp_path/'b.webp').ok


def test_a_photo_is_held_once_while_it_is_painted(monkeypatch):
    "The picture is let go when its numbers are there, and a plan is chosen behind all copies."
    painter, seen, plan, grow = S._Album('drawn', 'cpu'), [], S._plan, S.pad_to_fit
    job = S._Job(None, None, picture=Image.new('RGB', (21, 18), 'teal'))
    def planned(*args):
        seen.append(('plan', job.picture))
        return plan(*args)
    def grown(x):
        seen.append('grown')
        return grow(x)
    monkeypatch.setattr(S, '_plan', planned)
    monkeypatch.setattr(S, 'pad_to_fit', grown)
    S._paint(painter, [job])
    assert seen == ['grown', ('plan', None)] and job.scene.size == (21, 18)
