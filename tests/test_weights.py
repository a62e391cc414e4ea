"Weights: downloads that break off, lie or are altered; files that carry code; names. No network access."
import argparse, contextlib, errno, hashlib, http.server, os, pickle, threading, zipfile

import numpy as np
import pytest
import torch

from scenimefy import weights as W
from scenimefy.stylize import stylize
from scenimefy.translator import ResnetGenerator, save_translator
from scenimefy.weights import REGISTRY, Remote, WeightsError, fetch, find_weights, read_weights


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('SCENIMEFY_HOME', str(tmp_path/'home'))
    monkeypatch.delenv('SCENIMEFY_OFFLINE', raising=False)
    return tmp_path/'home'


# ---- downloads

class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    def __init__(self, data):
        super().__init__(('127.0.0.1', 0), Handler)
        self.data, self.mode, self.cut, self.asked = data, 'range', None, []
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()
    def handle_error(self, *args): pass                                  # clients hang up on purpose


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        s, start = self.server, 0
        wish = self.headers.get('Range')
        s.asked.append(wish)
        if s.mode == '404': return self.send_error(404)
        if wish and s.mode == 'range' and int(wish[6:-1]) >= len(s.data):
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(s.data)}')
            return self.end_headers()
        if s.mode == 'leave':
            self.send_response(302)
            self.send_header('Location', 'http://example.invalid/x')
            return self.end_headers()
        if wish and s.mode != 'norange':
            start = int(wish[6:-1]); self.send_response(206)
            self.send_header('Content-Range', f'bytes {start}-{len(s.data)-1}/{len(s.data)}')
        else: self.send_response(200)
        body = s.data[start:]
        if s.mode != 'nolength': self.send_header('Content-Length', len(body))
        self.end_headers()
        if s.cut is not None: body, s.cut = body[:s.cut], None           # break off once
        self.wfile.write(body); self.wfile.flush()


@pytest.fixture
def server(monkeypatch):
    data = np.random.default_rng(5).bytes(300_000)
    s = Server(data)
    remote = Remote(f'http://127.0.0.1:{s.server_port}/toy.bin', len(data), hashlib.sha256(data).hexdigest(),
                    'toy license')
    monkeypatch.setitem(REGISTRY, 'toy', remote)
    yield s
    s.shutdown(); s.server_close()


def names(folder): return {p.name for p in folder.iterdir()} - {'toy.bin.lock'}


def test_whole_download_is_kept(server, home, capsys):
    path = fetch('toy')
    assert path == home/'toy.bin' and path.read_bytes() == server.data and names(home) == {'toy.bin'}
    assert capsys.readouterr().err.count('toy license') == 1
    assert fetch('toy') == path and len(server.asked) == 1 and 'license' not in capsys.readouterr().err


@pytest.mark.fault('download: the connection breaks',
                   happens='the rest is asked for',
                   left='the whole file')
def test_broken_download_goes_on(server, home):
    server.cut = 100_000
    assert fetch('toy').read_bytes() == server.data
    assert server.asked == [None, 'bytes=100000-']


def test_download_of_another_day_goes_on(server, home):
    home.mkdir(); (home/'toy.bin.part').write_bytes(server.data[:70_000])
    assert fetch('toy').read_bytes() == server.data and server.asked == ['bytes=70000-']


def test_wrong_part_is_started_over(server, home):
    home.mkdir(); (home/'toy.bin.part').write_bytes(b'x'*70_000)
    assert fetch('toy').read_bytes() == server.data and server.asked == ['bytes=70000-', None]
    for size in (300_000, 400_000):
        (home/'toy.bin').unlink(); (home/'toy.bin.part').write_bytes(b'x'*size)
        assert fetch('toy').read_bytes() == server.data
    (home/'toy.bin').rename(home/'toy.bin.part'); server.asked.clear()       # killed just before the rename
    assert fetch('toy').read_bytes() == server.data and not server.asked


def test_server_without_range(server, home):
    server.mode, server.cut = 'norange', 100_000
    assert fetch('toy').read_bytes() == server.data and names(home) == {'toy.bin'}


@pytest.mark.fault('download: the file arrives altered, too long or too short',
                   happens='refused in one line',
                   left='nothing, or a .part file')
@pytest.mark.parametrize('mode', ['range', 'nolength'])
def test_altered_long_and_short(server, home, mode):
    server.mode, data = mode, server.data
    for wrong, words in ((data[:-1] + b'!', 'altered'), (data + b'more', 'expected 300,000'),
                         (data[:-9], '300,000'), (b'<html>sorry</html>', '300,000')):
        server.data = wrong
        with pytest.raises(WeightsError, match=words): fetch('toy')
        assert not (home/'toy.bin').exists()
        (home/'toy.bin.part').unlink(missing_ok=True)
    endless = data*3
    server.data = endless
    with pytest.raises(WeightsError): fetch('toy')
    assert names(home) == set()
    server.data = data
    assert fetch('toy').read_bytes() == data


def test_another_size_is_refused_before_the_first_byte(server, home):
    server.data += b'more'
    with pytest.raises(WeightsError, match='offers 300,004 bytes.*another file stands there now'):
        fetch('toy')
    assert names(home) == set()


@pytest.mark.fault('download: an answer without end',
                   happens='left as soon as it is longer than promised',
                   left='nothing')
def test_an_endless_answer_is_left(server, home, monkeypatch):
    class Endless(contextlib.nullcontext):
        status, headers, blocks = 200, {}, 0
        def __enter__(self): return self
        def read(self, n):
            self.blocks += 1
            assert self.blocks < 8, 'five blocks are more than the 300,000 bytes that were promised'
            return bytes(n)
    monkeypatch.setattr(W, '_open_url', lambda url, start: Endless())
    with pytest.raises(WeightsError, match='more than the expected 300,000 bytes'): fetch('toy')
    assert names(home) == set()


def test_refusals(server, home, monkeypatch):
    server.mode = '404'
    with pytest.raises(WeightsError, match='404'): fetch('toy')
    server.mode = 'leave'                                                # a redirect to plain http elsewhere
    with pytest.raises(WeightsError, match='https only'): fetch('toy')
    with pytest.raises(WeightsError, match='known: shinkai'): fetch('sinkai')
    remote = REGISTRY['toy']
    for url in ('http://example.invalid/toy.bin', 'file:///etc/passwd', 'ftp://127.0.0.1/x'):
        monkeypatch.setitem(REGISTRY, 'toy', Remote(url, remote.size, remote.sha256, ''))
        with pytest.raises(WeightsError, match='https only'): fetch('toy')


def test_offline_tells_what_to_do_by_hand(server, home, monkeypatch):
    server.shutdown(); server.server_close()
    with pytest.raises(WeightsError) as e: fetch('toy')
    text, remote = str(e.value), REGISTRY['toy']
    assert remote.url in text and str(home/'toy.bin') in text and '300,000' in text and '\n' not in text
    monkeypatch.setenv('SCENIMEFY_OFFLINE', '1')
    with pytest.raises(WeightsError, match='SCENIMEFY_OFFLINE'): fetch('shinkai')
    (home/'toy.bin').write_bytes(b'by hand, but wrong')  # a file put there by hand is checked, too
    with pytest.raises(WeightsError, match='18 bytes'): fetch('toy')
    (home/'toy.bin').write_bytes(server.data)
    assert fetch('toy').read_bytes() == server.data


def test_two_at_once(server, home):
    found, wrong = [], []
    def get():
        try: found.append(fetch('toy').read_bytes() == server.data)
        except Exception as e: wrong.append(e)
    threads = [threading.Thread(target=get) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert found == [True]*4 and not wrong and len(server.asked) == 1


def test_weights_by_name(server, home, tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = ResnetGenerator(ngf=4, n_blocks=1).eval()
    save_translator(net, tmp_path/'g.safetensors')
    server.data = (tmp_path/'g.safetensors').read_bytes()
    digits = hashlib.sha256(server.data).hexdigest()
    monkeypatch.setitem(REGISTRY, 'toy', Remote(REGISTRY['toy'].url, len(server.data), digits, ''))
    im = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    for _ in range(2):
        assert np.array_equal(np.asarray(stylize(im, 'toy', 'cpu')), np.asarray(stylize(im, net)))
    assert len(server.asked) == 1


def test_unusable_home(server, tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    with pytest.raises(WeightsError, match='SCENIMEFY_HOME'): fetch('toy', tmp_path/'file'/'deeper')


def test_a_file_that_is_here_is_only_read(server, home, monkeypatch):
    "The cache of a class room may not be ours to write to: no lock, no record."
    home.mkdir()
    (home/'toy.bin').write_bytes(server.data)
    def refuse(*args): raise PermissionError(errno.EACCES, 'Permission denied')
    monkeypatch.setattr(W, 'FileLock', refuse)
    assert fetch('toy').read_bytes() == server.data and names(home) == {'toy.bin'} and not server.asked
    (home/'toy.bin').unlink()
    with pytest.raises(WeightsError, match='set SCENIMEFY_HOME'): fetch('toy')


@pytest.mark.parametrize('value, off', [(None, False), ('', False), ('0', False), ('1', True), ('yes', True)])
def test_zero_is_online(monkeypatch, value, off):
    if value is not None: monkeypatch.setenv('SCENIMEFY_OFFLINE', value)
    assert W.offline() is off


@pytest.mark.parametrize('value', ['', '0'])
def test_offline_zero_means_online(server, home, monkeypatch, value):
    monkeypatch.setenv('SCENIMEFY_OFFLINE', value)
    assert fetch('toy').read_bytes() == server.data


@pytest.mark.fault('download: the disk or the quota is full',
                   happens='one line says how much to free',
                   left='-')
@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_is_said(server, home, monkeypatch, code):
    def full(*a, **k): raise OSError(code, 'no room')
    monkeypatch.setattr(W, '_open_url', full)
    with pytest.raises(WeightsError, match='the disk is full; free 300,000 bytes'): fetch('toy')


# ---- files that other programs look for, too, and of whose hash only the beginning is published

@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    "The registry's toy, of unknown size and with eight digits, belongs into torch's cache."
    was = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path/'hub'))
    digits = hashlib.sha256(server.data).hexdigest()[:8]
    monkeypatch.setitem(REGISTRY, 'toy', Remote(REGISTRY['toy'].url, 0, digits, 'toy license', shared=True))
    yield tmp_path/'hub'/'checkpoints'
    torch.hub.set_dir(was)


def test_shared_files_stay_where_others_look(server, hub, home, monkeypatch):
    path = fetch('toy')
    assert path == hub/'toy.bin' == W.kept_at('toy') and path.read_bytes() == server.data
    assert names(hub) == {'toy.bin'} and not home.exists()  # eight digits are promised: no record of ours
    assert fetch('toy') == path and len(server.asked) == 1                # the cache answers
    path.write_bytes(b'another')
    with pytest.raises(WeightsError, match='begins with .*Delete it and run again'): fetch('toy')
    path.unlink()
    monkeypatch.setenv('SCENIMEFY_OFFLINE', '1')
    with pytest.raises(WeightsError, match='SCENIMEFY_OFFLINE is set.*by hand.*toy.bin'): fetch('toy')


@pytest.mark.parametrize('digits', [8, 64])
def test_a_shared_file_altered_on_the_way(server, hub, monkeypatch, digits):
    whole = hashlib.sha256(server.data).hexdigest()
    monkeypatch.setitem(REGISTRY, 'toy', Remote(REGISTRY['toy'].url, 0, whole[:digits], '', shared=True))
    data, server.data = server.data, server.data[:-1] + b'!'
    with pytest.raises(WeightsError, match='altered'): fetch('toy')
    assert not (hub/'toy.bin').exists()
    server.data, server.cut = data, 100_000
    assert fetch('toy').read_bytes() == data and server.asked[-1] == 'bytes=100000-'


def test_nobody_has_a_cache(hub, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: '~/.cache/torch/hub')  # as torch says it without a home
    with pytest.raises(WeightsError, match='TORCH_HOME'): fetch('toy')


# ---- files whose size and hash nobody told us

@pytest.fixture
def unpinned(server, tmp_path, monkeypatch):
    torch.save({'a': torch.randn(300, 300)}, tmp_path/'a.pt')
    server.data = (tmp_path/'a.pt').read_bytes()
    remote = Remote(f'http://127.0.0.1:{server.server_port}/toy.pt', 0, '', 'toy license', 'stylegan')
    monkeypatch.setitem(REGISTRY, 'toy', remote)
    return server


def test_first_use_is_remembered(unpinned, home):
    path = fetch('toy')
    record = home/'toy.pt.sha256'
    assert path.read_bytes() == unpinned.data
    assert record.read_text() == hashlib.sha256(unpinned.data).hexdigest()
    assert fetch('toy') == path and find_weights('toy', 'stylegan') == path and len(unpinned.asked) == 1
    good = path.read_bytes()
    torch.save({'a': torch.randn(3)}, path)                              # another whole file, later
    with pytest.raises(WeightsError, match='first use.*Delete it.*toy.pt.sha256'): fetch('toy')
    path.unlink()
    assert fetch('toy').read_bytes() == good
    path.unlink(); unpinned.data = good[:90_000] + b'!' + good[90_001:]   # the server changes its mind
    with pytest.raises(WeightsError, match='first use'): fetch('toy')
    assert not path.exists()
    record.write_text('')  # a record that a crash left empty is none
    with pytest.raises(WeightsError, match='checksum'): fetch('toy')
    unpinned.data = good
    assert fetch('toy') == path and len(record.read_text()) == 64


def test_unpinned_download_goes_on_and_is_checked(unpinned, home):
    unpinned.cut = 100_000
    assert fetch('toy').read_bytes() == unpinned.data and unpinned.asked == [None, 'bytes=100000-']
    # killed just before the rename
    (home/'toy.pt').rename(home/'toy.pt.part'); (home/'toy.pt.sha256').unlink()
    assert fetch('toy').read_bytes() == unpinned.data
    (home/'toy.pt').unlink(); (home/'toy.pt.sha256').unlink()
    (home/'toy.pt.part').write_bytes(b'x'*70_000)                        # another file's beginning
    assert fetch('toy').read_bytes() == unpinned.data
    (home/'toy.pt').unlink(); (home/'toy.pt.sha256').unlink()
    for wrong, words in ((b'<html>sorry</html>', 'web page'), (unpinned.data[:-50], 'cut short'),
                         (b'', 'offers an unknown')):
        unpinned.data = wrong
        with pytest.raises(WeightsError, match=words): fetch('toy')
        assert not (home/'toy.pt').exists() and not (home/'toy.pt.sha256').exists()


def test_server_that_names_no_length_or_too_much(unpinned, home, monkeypatch):
    unpinned.mode = 'nolength'
    with pytest.raises(WeightsError, match='unknown number'): fetch('toy')
    unpinned.mode = 'range'
    monkeypatch.setattr(W, '_LARGEST', 1000)
    with pytest.raises(WeightsError, match='at most 1,000'): fetch('toy')
    assert not (home/'toy.pt').exists()


def test_the_largest_file_is_still_taken(unpinned, home, monkeypatch):
    monkeypatch.setattr(W, '_LARGEST', len(unpinned.data))
    assert fetch('toy').read_bytes() == unpinned.data


def test_a_file_put_there_by_hand_is_remembered_too(unpinned, home):
    home.mkdir(); (home/'toy.pt').write_bytes(unpinned.data)
    assert fetch('toy') == home/'toy.pt' and not unpinned.asked and (home/'toy.pt.sha256').exists()


# ---- files that carry more than tensors

class Evil:
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return os.mkdir, (self.mark,)


class Mine:
    "A class that nobody allowed."


@pytest.mark.fault('weights: a file that carries code',
                   happens='refused in one line that names what it would call; nothing is run',
                   left='nothing')
@pytest.mark.parametrize('hide', [
    lambda e: {'g_ema': e}, lambda e: argparse.Namespace(size=e),
    lambda e: {'args': argparse.Namespace(a=[{'b': e}])},
    lambda e: [e], lambda e: {'x': (e,)}])
def test_code_is_never_run(tmp_path, hide):
    torch.save(hide(Evil(tmp_path/'ran')), tmp_path/'x.pt')
    for beside in ((), [argparse.Namespace]):
        with pytest.raises(WeightsError, match='refused without running it.*mkdir'):
            read_weights(tmp_path/'x.pt', beside)
    assert not (tmp_path/'ran').exists()
    torch.load(tmp_path/'x.pt', weights_only=False)                      # the file does what we say it does
    assert (tmp_path/'ran').exists()


def test_exactly_the_named_class_is_let_in(tmp_path):
    args = argparse.Namespace(size=256, lr=.002, path='x', flag=True, nothing=None, more=[1, 2])
    torch.save({'a': torch.ones(2), 'args': args}, tmp_path/'n.pt')
    with pytest.raises(WeightsError, match='argparse Namespace'): read_weights(tmp_path/'n.pt')
    got = read_weights(tmp_path/'n.pt', [argparse.Namespace])
    assert got['args'] == args and got['a'].tolist() == [1, 1]
    assert argparse.Namespace not in torch.serialization.get_safe_globals()   # the door is closed again
    for other in (Mine(), argparse.ArgumentParser, np.float64(1.)):
        torch.save({'args': args, 'other': other}, tmp_path/'o.pt')
        with pytest.raises(WeightsError, match='refused'): read_weights(tmp_path/'o.pt', [argparse.Namespace])


def test_two_programs_in_one_file(tmp_path):
    torch.save({'a': torch.ones(2)}, tmp_path/'z.pth')
    with zipfile.ZipFile(tmp_path/'z.pth', 'a') as z:
        z.writestr('other/data.pkl', pickle.dumps(Evil(tmp_path/'ran')))
    with pytest.raises(WeightsError, match='single'): read_weights(tmp_path/'z.pth')
    assert not (tmp_path/'ran').exists()


def test_names_belong_to_a_kind():
    files = dict(translator='drawn', stylegan='stylegan', clip='clip', segmenter='segmenter',
                 toonify='toonify')
    assert {kind: find_weights('tiny', kind).stem for kind in W._BUNDLED} == files
    assert find_weights('tiny', 'clip').parent == W.PACKAGE
    with pytest.MonkeyPatch.context() as m:
        m.setitem(W._BUNDLED['stylegan'], 'lost', 'lost.safetensors')
        with pytest.raises(WeightsError, match='install scenimefy again'): find_weights('lost', 'stylegan')
    for name, kind in (('shinkai', 'stylegan'), ('lhq', 'translator')):
        with pytest.raises(WeightsError, match='no such file'): find_weights(name, kind)


def test_registry_entry():
    for name in ('lhq', 'shinkai-stylegan'):  # published without size or hash: we invent none
        r = REGISTRY[name]
        assert r.url.startswith('https://') and r.file.endswith('.pt')
        assert (r.size, r.sha256, r.kind) == (0, '', 'stylegan')
        assert 'non-commercial' in r.license
    r = REGISTRY['shinkai']
    assert r.url.startswith('https://') and r.file == 'Shinkai_net_G.pth' and r.size == 45_570_633
    assert len(r.sha256) == 64
    assert 'non-commercial' in r.license


def test_registry_entries_of_the_judges():
    "CLIP's file is a program, opened after all 64 digits were compared; torchvision publishes eight."
    digits = {'vit-b-32': 64, 'inception': 64, 'vgg19': 8, 'vgg16': 8, 'raft-small': 8}
    kinds = {'vit-b-32': 'clip', 'inception': 'features', 'vgg19': 'perceptual', 'vgg16': 'perceptual',
             'raft-small': 'flow'}
    assert set(digits) == {name for name, r in REGISTRY.items() if r.shared}
    for name, number in digits.items():
        r = REGISTRY[name]
        assert r.url.startswith('https://') and r.kind == kinds[name] and len(r.sha256) == number, name
        assert r.sha256[:8] in r.url  # their makers name the digits in the address
    assert all(r.sha256.isalnum() and r.sha256 == r.sha256.lower() for r in REGISTRY.values() if r.sha256)
