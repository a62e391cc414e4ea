"Networks in folders and on a (local, pretended) Hub; files of other programs; ONNX. No network access."
import argparse
import http.server
import json
import os
import re
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from scenimefy.cli import app
from scenimefy.core import UserError, seeded
from scenimefy.export import _flat, compare_onnx, convert, export_onnx
from scenimefy.stylegan import Discriminator, Generator, load_discriminator, load_stylegan, read_stylegan
from scenimefy.translator import ResnetGenerator, load_translator, save_translator
from scenimefy.weights import PACKAGE, REGISTRY, Remote, WeightsError, find_weights, sha256_of


def translator(palette=None, ngf=4):
    net = ResnetGenerator(ngf=ngf, n_blocks=1).eval()
    if palette is not None: net.palette = torch.rand(3, 4, generator=seeded('palette', palette))
    return net


def stylegans():
    plan = {4: 8, 8: 8}
    return Generator(8, 8, 2, channels=plan).eval(), Discriminator(8, channels=plan).eval()


def same(one, other):
    "The same keys in the same order, the same numbers."
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(v, b[k]) for k, v in a.items())


class Evil:
    def __init__(self, folder): self.folder = str(folder)
    def __reduce__(self): return os.mkdir, (self.folder,)


# ---- folders

@pytest.mark.parametrize('palette', [None, 1])
def test_a_folder_holds_a_translator_and_its_palette(tmp_path, palette):
    net = translator(palette)
    net.brush = bool(palette)
    net.save_pretrained(tmp_path/'net')
    assert {p.name for p in (tmp_path/'net').iterdir()} == {'model.safetensors', 'config.json', 'README.md'}
    config = json.loads((tmp_path/'net'/'config.json').read_text())
    assert config == dict(in_ch=3, out_ch=3, ngf=4, n_blocks=1,
                          palette=net.palette.tolist() if palette else None, brush=bool(palette))
    for again in (ResnetGenerator.from_pretrained(tmp_path/'net'),
                  ResnetGenerator.from_pretrained(str(tmp_path/'net')), load_translator(tmp_path/'net')):
        assert same(net, again) and not again.training and again.brush == net.brush
        assert again.palette.equal(net.palette) if palette else again.palette is None


def test_stylegans_in_folders(tmp_path):
    for net in stylegans():
        folder = tmp_path/type(net).__name__
        net.save_pretrained(folder)
        assert same(net, type(net).from_pretrained(folder))
        assert json.loads((folder/'config.json').read_text())['channels'] == {'4': 8, '8': 8}
    assert same(stylegans()[0], load_stylegan(tmp_path/'Generator')) is False       # other random numbers
    with pytest.raises(WeightsError, match='no g_ema'): Generator.from_pretrained(tmp_path/'Discriminator')
    with pytest.raises(WeightsError, match='another network'):
        ResnetGenerator.from_pretrained(tmp_path/'Generator')


def test_keys_are_those_of_the_released_files():
    "SPEC 1.3: 135 and 50 tensors; 52 of the translator. The mixin adds none."
    with torch.device('meta'): nets = ResnetGenerator(), Generator(256), Discriminator(256)
    assert [len(net.state_dict()) for net in nets] == [52, 135, 50]
    assert [sum(p.numel() for p in net.parameters()) for net in nets[1:]] == [30_034_338, 28_864_129]


def test_a_palette_that_only_the_config_knows(tmp_path):
    "A file without a header of ours, as another program may write it."
    net = translator(2)
    net.save_pretrained(tmp_path)
    save_file(net.state_dict(), tmp_path/'model.safetensors')
    assert load_translator(tmp_path).palette.equal(net.palette)
    (tmp_path/'config.json').write_text('{"n_blocks": 9}')
    with pytest.raises(WeightsError, match='n_blocks is 9, but it is 1'): load_translator(tmp_path)


@pytest.mark.parametrize('change, words', [
    (dict(ngf=64), 'ngf is 64, but it is 4'), (dict(palette=None), 'palette'),
    (dict(palette=[[1, 2]]), 'palette'), (dict(n_blocks='1; rm -rf'), 'n_blocks')])
def test_a_config_that_contradicts_the_weights(tmp_path, change, words):
    net = translator(3)
    net.save_pretrained(tmp_path)
    file = tmp_path/'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(WeightsError, match=words): ResnetGenerator.from_pretrained(tmp_path)


@pytest.mark.parametrize('text', ['', '[' * 100_000, '3', '{"a": ' + '9'*1_000_001 + '}'])
def test_a_config_that_is_none(tmp_path, text):
    translator().save_pretrained(tmp_path)
    (tmp_path/'config.json').write_text(text)
    with pytest.raises(WeightsError, match='no small JSON'): ResnetGenerator.from_pretrained(tmp_path)


def test_a_folder_with_a_pickle_only_is_refused_and_nothing_runs(tmp_path):
    torch.save({'model.1.weight': Evil(tmp_path/'ran')}, tmp_path/'pytorch_model.bin')
    for load in (ResnetGenerator.from_pretrained, Generator.from_pretrained):
        with pytest.raises(WeightsError, match='holds no model.safetensors'): load(tmp_path)
    with pytest.raises(WeightsError, match='a folder without model.safetensors'): find_weights(tmp_path)
    assert not (tmp_path/'ran').exists()


# ---- cards

def code_of(card): return '\n'.join(re.findall(r'```python\n(.*?)```', card, re.S))


def test_the_code_on_a_card_runs(tmp_path, monkeypatch):
    "As a stranger would try it, with the path of the folder."
    from PIL import Image
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((270, 260), 90).convert('RGB').save('photo.jpg')
    for net in (translator(4), *stylegans()):
        net.save_pretrained('net')
        code = code_of(Path('net/README.md').read_text()).replace('OWNER/NAME', 'net')
        exec(code, {})
        Path('net/README.md').unlink()                  # an existing card belongs to its writer and stays
    assert Image.open('scene.png').size == (8, 8) and Image.open('corner.png').size == (256, 256)


def test_what_a_card_says():
    drawn = load_translator('drawn')
    card = drawn.generate_model_card()
    assert card.data.license == 'apache-2.0' and card.data.pipeline_tag == 'image-to-image'
    ours = (PACKAGE/'drawn.md').read_text(encoding='utf8')
    assert ours.partition('\n')[2].strip() in str(card) and '1,965,059' in str(card)
    with torch.no_grad(): drawn.model[1].bias[0] += 1e-3
    card = drawn.generate_model_card()                       # one number changed: no longer ours
    assert card.data.license is None and 'Not stated' in str(card) and 'Debian' not in str(card)
    card = str(drawn.generate_model_card(license='cc-by-4.0', trained_on='my photos', repo_id='me/net'))
    assert 'license: cc-by-4.0' in card and 'Trained on my photos' in card and 'hf:me/net' in card
    assert load_stylegan('tiny').generate_model_card().data.license == 'apache-2.0'
    assert load_discriminator('tiny').generate_model_card().data.license == 'apache-2.0'


# ---- the Hub: a server on this machine that answers as huggingface_hub expects

class FakeHub(http.server.BaseHTTPRequestHandler):
    folder, sha, asked = None, 'c'*40, []
    def log_message(self, *args): pass
    def do_HEAD(self): self.answer(body=False)
    def do_GET(self): self.answer(body=True)

    def answer(self, body):
        path = self.path.partition('?')[0]
        self.asked.append(path)
        if path.startswith('/api/models/me/net/revision/'):
            names = [p.name for p in self.folder.iterdir()]
            data = json.dumps(dict(id='me/net', sha=self.sha, siblings=[dict(rfilename=n) for n in names]))
            return self.send(data.encode(), body, {'Content-Type': 'application/json'})
        if path.startswith('/api/models/me/net/tree/'):
            files = [dict(type='file', path=p.name, size=p.stat().st_size, oid=self.sha)
                     for p in self.folder.iterdir()]
            return self.send(json.dumps(files).encode(), body, {'Content-Type': 'application/json'})
        file = self.folder/path.rpartition('/')[2]
        if '/resolve/' not in path or not file.is_file(): return self.send_error(404)
        self.send(file.read_bytes(), body, {'ETag': f'"{sha256_of(file)}"', 'X-Repo-Commit': self.sha})

    def send(self, data, body, headers):
        self.send_response(200)
        for name, value in ({'Content-Length': len(data)} | headers).items(): self.send_header(name, value)
        self.end_headers()
        if body: self.wfile.write(data)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.delenv('SCENIMEFY_OFFLINE', raising=False)
    for name in ('http_proxy', 'https_proxy', 'all_proxy'):
        for form in (name, name.upper()): monkeypatch.delenv(form, raising=False)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), FakeHub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()
    FakeHub.folder, FakeHub.asked = tmp_path/'hub', []
    yield dict(endpoint=f'http://127.0.0.1:{server.server_port}', cache_dir=tmp_path/'cache')
    server.shutdown()
    server.server_close()


def test_a_name_on_the_hub(tmp_path, hub, monkeypatch):
    "Two files are fetched, the pickle beside them is not; afterwards no network is needed."
    net = translator(5)
    net.save_pretrained(tmp_path/'hub')
    torch.save({'x': Evil(tmp_path/'ran')}, tmp_path/'hub'/'pytorch_model.bin')
    again = ResnetGenerator.from_pretrained('me/net', revision='v1', **hub)
    assert same(net, again) and again.palette.equal(net.palette)
    assert any('revision/v1' in path for path in FakeHub.asked)
    fetched = {path.rpartition('/')[2] for path in FakeHub.asked if '/resolve/' in path}
    assert fetched == {'model.safetensors', 'config.json'}
    monkeypatch.setenv('SCENIMEFY_OFFLINE', '1')
    before = len(FakeHub.asked)
    assert same(net, ResnetGenerator.from_pretrained('hf:me/net@v1', **hub))
    with pytest.raises(WeightsError, match='SCENIMEFY_OFFLINE is set'):
        ResnetGenerator.from_pretrained('me/other', **hub)
    assert len(FakeHub.asked) == before and not (tmp_path/'ran').exists()


def test_a_repository_of_pickles(tmp_path, hub):
    (tmp_path/'hub').mkdir()
    torch.save(translator().state_dict(), tmp_path/'hub'/'pytorch_model.bin')
    with pytest.raises(WeightsError, match='holds no model.safetensors'):
        ResnetGenerator.from_pretrained('me/net', **hub)
    with pytest.raises(WeightsError, match='hf:me/unknown: cannot fetch'):
        ResnetGenerator.from_pretrained('me/unknown', **hub)


@pytest.mark.parametrize('name', ['nowhere', './no/such/folder', 'a/b/c', '../no-such-owner-here'])
def test_names_that_are_none(name):
    with pytest.raises(WeightsError, match='OWNER/NAME') as e: ResnetGenerator.from_pretrained(name)
    assert '\n' not in str(e.value)


def test_weights_of_a_command_may_be_a_folder_or_a_name(tmp_path, hub, monkeypatch):
    from scenimefy import weights
    translator(6).save_pretrained(tmp_path/'hub')
    assert find_weights(tmp_path/'hub') == tmp_path/'hub'/'model.safetensors'
    whole = weights.snapshot_download
    monkeypatch.setattr(weights, 'snapshot_download', lambda repo, **how: whole(repo, **how, **hub))
    assert find_weights('hf:me/net', 'stylegan').read_bytes() == find_weights(tmp_path/'hub').read_bytes()
    with pytest.raises(WeightsError, match='hf:OWNER/NAME'): find_weights('me/net')  # a path, no request


def test_upload(tmp_path, monkeypatch):
    "What would be sent: huggingface_hub's two calls are caught; no server takes part."
    monkeypatch.delenv('SCENIMEFY_OFFLINE', raising=False)
    sent = {}
    def create_repo(self, repo_id, **how):
        sent['create'] = repo_id, how
        return argparse.Namespace(repo_id=repo_id)
    def upload_folder(self, *, repo_id, folder_path, **how):
        sent['files'] = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
        return f'https://huggingface.co/{repo_id}/commit/1'
    monkeypatch.setattr(HfApi, 'create_repo', create_repo)
    monkeypatch.setattr(HfApi, 'upload_folder', upload_folder)
    net = translator(7)
    where = net.push_to_hub('me/net', private=True, model_card_kwargs=dict(license='cc0-1.0'))
    assert where == 'https://huggingface.co/me/net/commit/1' and sent['create'][1]['private'] is True
    assert set(sent['files']) == {'model.safetensors', 'config.json', 'README.md'}
    card = sent['files']['README.md'].decode()
    assert 'license: cc0-1.0' in card and "from_pretrained('me/net')" in card and 'OWNER' not in card
    monkeypatch.setenv('SCENIMEFY_OFFLINE', '1')
    with pytest.raises(WeightsError, match='not uploaded'): net.push_to_hub('me/net')


# ---- convert

WRAPPERS = {
    'plain': lambda s: s,
    'module.': lambda s: {f'module.{k}': v for k, v in s.items()},
    'nested': lambda s: {'epoch': 3, 'model': {'state_dict': s}},
    'lightning': lambda s: {'state_dict': {f'netG.{k}': v for k, v in s.items()} | {'netD.a': torch.ones(1)}},
    'averaged': lambda s: {'n_averaged': torch.tensor(9)} | {f'module.{k}': v for k, v in s.items()},
    'both': lambda s: {'net': {k: v*2 for k, v in s.items()},
                       'net_ema': {f'module._orig_mod.{k}': nn.Parameter(v) for k, v in s.items()}},
    'beside': lambda s: s | {'optimizer': {'state': {0: torch.ones(2)}}},
    'half': lambda s: {k: v.half() for k, v in s.items()}}


@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('kind', ['translator', 'generator', 'critic'])
def test_every_wrapper_of_every_network(tmp_path, wrapper, kind):
    generator, critic = stylegans()
    net = dict(translator=translator(), generator=generator, critic=critic)[kind]
    torch.save(WRAPPERS[wrapper](net.state_dict()), tmp_path/'in.pth')
    lines = convert(tmp_path/'in.pth', tmp_path/'out.safetensors')
    load = dict(translator=load_translator, generator=load_stylegan, critic=load_discriminator)[kind]
    again = load(tmp_path/'out.safetensors').state_dict() if kind != 'critic' else \
        read_stylegan(tmp_path/'out.safetensors')['d']
    want = {k: v.half().float() if wrapper == 'half' else v for k, v in net.state_dict().items()}
    assert again.keys() == want.keys() and all(torch.equal(v, again[k]) for k, v in want.items())
    n_parameters = sum(p.numel() for p in net.parameters())
    assert f'{n_parameters:,} parameters' in lines[0]
    if wrapper == 'both': assert 'from net_ema' in lines[0]
    if wrapper == 'both' and kind == 'translator': assert lines[1] == 'left out: net'
    if wrapper == 'half': assert 'float16' in lines[0]


def test_a_checkpoint_of_a_stylegan_training(tmp_path):
    "The layout of SPEC 1.3: three networks are kept under their names, the rest is named and left out."
    (g_ema, d), (g, _) = stylegans(), stylegans()
    adam = torch.optim.Adam(g.parameters())
    g(torch.randn(1, 8)).sum().backward()
    adam.step()
    torch.save(dict(g=g.state_dict(), d=d.state_dict(), g_ema=g_ema.state_dict(), g_optim=adam.state_dict(),
                    args=argparse.Namespace(size=8), ada_aug_p=0.), tmp_path/'000001.pt')
    lines = convert(tmp_path/'000001.pt', tmp_path/'out.safetensors', half=True)
    assert lines[-1] == 'left out: g_optim, args, ada_aug_p' and len(lines) == 4
    made = read_stylegan(tmp_path/'out.safetensors')
    for part, net in dict(g_ema=g_ema, g=g, d=d).items():
        assert all(torch.equal(v.half().float(), made[part][k]) for k, v in net.state_dict().items()), part
    stored = load_file(tmp_path/'out.safetensors')
    assert {v.dtype for v in stored.values()} == {torch.float16}


def test_the_released_sizes(tmp_path):
    "SPEC 3: ngf 64, 9 blocks, 52 tensors."
    net = ResnetGenerator()
    torch.save(net.state_dict(), tmp_path/'Shinkai_net_G.pth')
    (line,) = convert(tmp_path/'Shinkai_net_G.pth', tmp_path/'half.safetensors', half=True)
    assert line == ('translator: ngf 64, n_blocks 9, 11,378,179 parameters, float32, '
                    'from the top of the file')
    assert 22e6 < (tmp_path/'half.safetensors').stat().st_size < 23.5e6
    again = load_translator(tmp_path/'half.safetensors').state_dict()
    assert all(torch.equal(v.half().float(), again[k]) for k, v in net.state_dict().items())


def test_what_a_file_of_ours_knows_is_kept(tmp_path):
    net = translator(8)
    save_translator(net, tmp_path/'in.safetensors', scores={'l1': .5}, note='by hand')
    convert(tmp_path/'in.safetensors', tmp_path/'out.safetensors', half=True)
    from scenimefy.weights import noted
    found = noted(tmp_path/'out.safetensors')
    assert found['scores'] == {'l1': .5} and found['note'] == 'by hand'
    assert found['source'] == 'in.safetensors'
    assert load_translator(tmp_path/'out.safetensors').palette.equal(net.palette)
    convert(tmp_path/'out.safetensors', tmp_path/'out.safetensors')           # onto itself, and again
    convert(tmp_path/'out.safetensors', tmp_path/'out.safetensors')
    assert same(load_translator(tmp_path/'out.safetensors'), load_translator(tmp_path/'out.safetensors'))


def test_terms_of_a_released_file_travel_with_it(tmp_path, monkeypatch):
    torch.save(translator().state_dict(), tmp_path/'net.pth')
    file = tmp_path/'net.pth'
    monkeypatch.setitem(REGISTRY, 'toy', Remote('https://example.org/net.pth', file.stat().st_size,
                                                sha256_of(file), 'toy terms'))
    assert convert(file, tmp_path/'out.safetensors')[-1] == 'licence: toy terms'
    from scenimefy.weights import noted
    assert noted(tmp_path/'out.safetensors')['license'] == 'toy terms'


def refused(tmp_path, content, words, **how):
    torch.save(content, tmp_path/'in.pth')
    with pytest.raises(WeightsError, match=words) as e:
        convert(tmp_path/'in.pth', tmp_path/'out.safetensors', **how)
    assert '\n' not in str(e.value) and not (tmp_path/'out.safetensors').exists()


def test_what_is_none_of_ours(tmp_path):
    state = translator().state_dict()
    refused(tmp_path, {'a.weight': torch.ones(2)}, 'another network')
    refused(tmp_path, {'epoch': 3}, 'no tensors')
    refused(tmp_path, [state], 'no tensors')
    refused(tmp_path, torch.ones(2), 'no tensors')
    refused(tmp_path, {'ema': {k: v for k, v in state.items() if 'filt' not in k}}, 'ema/ is no .* missing')
    refused(tmp_path, {**state, 'model.4.bias': state['model.4.bias']*float('nan')}, 'NaN')
    refused(tmp_path, {**state, 'model.4.bias': state['model.4.bias'].int()}, 'holds torch.int32')
    wide = torch.zeros(1, 3, 1, 1).expand(10**6, 3, 7, 7)
    refused(tmp_path, {**state, 'model.1.weight': wide}, 'no ResnetG')
    refused(tmp_path, {**state, 'model.1.weight': state['model.1.weight']*1e9}, 'too large', half=True)
    refused(tmp_path, {**state, 'x': Evil(tmp_path/'ran')}, 'mkdir')
    assert not (tmp_path/'ran').exists()
    with pytest.raises(WeightsError, match='rename it'): convert('drawn', tmp_path/'x.pth')
    with pytest.raises(WeightsError, match='no such file'): convert(tmp_path/'no', tmp_path/'x.safetensors')


def test_a_dictionary_inside_itself():
    loop = {'model.1.weight': torch.ones(1)}
    loop['again'] = loop
    assert len(_flat(loop)) == 5


def test_the_command(tmp_path):
    torch.save({'ema': translator().state_dict()}, tmp_path/'in.pth')
    out = str(tmp_path/'o.safetensors')
    done = CliRunner().invoke(app, ['convert', str(tmp_path/'in.pth'), '-o', out, '--half'])
    assert done.exit_code == 0 and 'from ema' in done.output and out in done.output
    done = CliRunner().invoke(app, ['convert', str(tmp_path/'none.pth'), '-o', out])
    assert done.exit_code == 1 and 'no such file' in done.output


# ---- ONNX

def test_onnx_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(UserError, match=r'scenimefy\[onnx\]'): export_onnx(translator(), tmp_path/'net.onnx')
    with pytest.raises(UserError, match='rename it'): export_onnx(translator(), tmp_path/'net.pt')
    done = CliRunner().invoke(app, ['export', 'drawn', '-o', str(tmp_path/'net.onnx')])
    assert done.exit_code == 1 and 'scenimefy[onnx]' in done.output and not (tmp_path/'net.onnx').exists()


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        if find_spec(name) is None: pytest.skip(f'{name} is not installed')
    net = load_translator('drawn')
    return net, export_onnx(net, tmp_path_factory.mktemp('onnx')/'drawn.onnx')


def test_onnx_equals_torch_at_odd_and_large_sizes(exported):
    sizes = (1, 64, 64), (3, 8, 12), (1, 5, 9), (2, 37, 61), (1, 387, 515), (1, 1080, 1920)
    gaps = compare_onnx(*exported, sizes)
    assert list(gaps) == list(sizes) and max(gaps.values()) < 1e-4, gaps


def test_what_the_onnx_file_says(exported):
    import onnx
    net, path = exported
    made = onnx.load(path)
    onnx.checker.check_model(made, full_check=True)
    assert [(o.domain, o.version) for o in made.opset_import] == [('', 18)]
    about = {p.key: p.value for p in made.metadata_props}
    assert json.loads(about['palette']) == net.palette.tolist()
    assert (about['ngf'], about['n_blocks'], about['scenimefy'][:2]) == ('32', '6', '0.')
    (photo,), (scene,) = made.graph.input, made.graph.output
    assert (photo.name, scene.name) == ('photo', 'scene')
    dims = photo.type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ['batch', 3, 'height', 'width']
    raw = path.read_bytes()
    assert b'.py' not in raw and str(Path.home()).encode() + b'/' not in raw      # no file of this machine
    assert net.training is False and next(net.parameters()).requires_grad     # it is as it was
