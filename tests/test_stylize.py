"Stylizing: sizes, odd files, names, hostile weights. Small networks, no network access."
import copy, errno, io, os, pickle, random, struct, zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from scenimefy import fast
from scenimefy import stylize as S
from scenimefy.core import SettingsError, UserError
from scenimefy.stylize import stylize, stylize_folder, translate
from scenimefy.translator import ResnetGenerator, load_translator, save_translator
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
    with Image.open(out/'b.png') as im: assert im.info == {'Software': 'scenimefy', 'srgb': 0}


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
