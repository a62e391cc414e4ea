"""Networks of others from files of their published layout. Every expected picture is computed here, from the
tensors of the file and torch.nn.functional alone."""
import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from scenimefy.cli import app
from scenimefy.core import SettingsError, UserError, seeded, to_image, to_model
from scenimefy.data import read_image
from scenimefy.painters import render
from scenimefy.rivals import AnimeGANv2, CartoonGAN, WhiteBox, is_rival, load_rival, paint_methods
from scenimefy.translator import ResnetGenerator
from scenimefy.weights import WeightsError
from scenimefy.world import HELD_OUT


def noise(*shape, seed=0): return torch.rand(*shape, generator=seeded('rivals', *shape, seed))*2 - 1


# ---- the layouts, written down from the published files: {key: shape} at width w

def cartoon_layout(w):
    convs = {'conv01_1': (w, 3, 7), 'conv02_1': (2*w, w, 3), 'conv02_2': (2*w, 2*w, 3),
             'conv03_1': (4*w, 2*w, 3), 'conv03_2': (4*w, 4*w, 3)}
    norms = {'in01_1': w, 'in02_1': 2*w, 'in03_1': 4*w, 'in12_1': 2*w, 'in13_1': w}
    for block in ('04', '05', '06', '07', '08', '09', '10', '11'):
        for half in '12':
            convs[f'conv{block}_{half}'], norms[f'in{block}_{half}'] = (4*w, 4*w, 3), 4*w
    convs |= {'deconv01_2': (2*w, 2*w, 3), 'deconv02_2': (w, w, 3), 'deconv03_1': (3, w, 7)}
    layout = {}
    for name, (n, m, side) in convs.items():
        layout |= {f'{name}.weight': (n, m, side, side), f'{name}.bias': (n,)}
    for name, n in norms.items(): layout |= {f'{name}.scale': (n,), f'{name}.shift': (n,)}
    for name, n, m in (('deconv01_1', 4*w, 2*w), ('deconv02_1', 2*w, w)):       # transposed: (in, out, …)
        layout |= {f'{name}.weight': (n, m, 3, 3), f'{name}.bias': (m,)}
    return layout


def animegan_layout(w):
    layout = {}
    def normed(name, n, m, side=3, per_channel=False):
        layout[f'{name}.1.weight'] = (m, 1 if per_channel else n, side, side)
        if per_channel: layout[f'{name}.1.bias'] = (m,)
        layout[f'{name}.2.weight'] = layout[f'{name}.2.bias'] = (m,)
    for name, n, m, side in (('block_a.0', 3, w, 7), ('block_a.1', w, 2*w, 3), ('block_a.2', 2*w, 2*w, 3),
                             ('block_b.0', 2*w, 4*w, 3), ('block_b.1', 4*w, 4*w, 3),
                             ('block_c.0', 4*w, 4*w, 3), ('block_c.5', 8*w, 4*w, 3),
                             ('block_d.0', 4*w, 4*w, 3), ('block_d.1', 4*w, 4*w, 3),
                             ('block_e.0', 4*w, 2*w, 3), ('block_e.1', 2*w, 2*w, 3),
                             ('block_e.2', 2*w, w, 7)):
        normed(name, n, m, side)
    for k, n in ((1, 4*w), (2, 8*w), (3, 8*w), (4, 8*w)):
        normed(f'block_c.{k}.layers.0', n, 2*n, 1)
        normed(f'block_c.{k}.layers.1', 2*n, 2*n, per_channel=True)
        layout[f'block_c.{k}.layers.2.weight'] = (8*w, 2*n, 1, 1)
        layout[f'block_c.{k}.layers.3.weight'] = layout[f'block_c.{k}.layers.3.bias'] = (8*w,)
    return layout | {'out_layer.0.weight': (3, w, 1, 1)}


def whitebox_layout(w):
    convs = {'Conv': (w, 3, 7), 'Conv_1': (w, w, 3), 'Conv_2': (2*w, w, 3), 'Conv_3': (2*w, 2*w, 3),
             'Conv_4': (4*w, 2*w, 3), 'Conv_5': (2*w, 4*w, 3), 'Conv_6': (2*w, 2*w, 3), 'Conv_7': (w, 2*w, 3),
             'Conv_8': (w, w, 3), 'Conv_9': (3, w, 7)}
    for k in range(4): convs |= {f'block_{k}.conv1': (4*w, 4*w, 3), f'block_{k}.conv2': (4*w, 4*w, 3)}
    layout = {}
    for name, (n, m, side) in convs.items():
        layout |= {f'generator.{name}.weight': (n, m, side, side), f'generator.{name}.bias': (n,)}
    return layout


def filled(layout):
    "Numbers for a layout, such that every layer has an output of ordinary size."
    state = {}
    for k, (key, shape) in enumerate(layout.items()):
        x = torch.randn(shape, generator=seeded('filled', k))
        if len(shape) == 4: state[key] = x*(1.6/(shape[1]*shape[2]*shape[3]))**.5
        else: state[key] = 1 + .2*x if key.endswith(('scale', '2.weight', '3.weight')) else .1*x
    return state


# ---- what the published networks compute, from their tensors

def cartoon_by_hand(s, x):
    def conv(name, x, pad=0, **how):
        return F.conv2d(x, s[f'{name}.weight'], s[f'{name}.bias'], padding=pad, **how)
    def norm(name, x):
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
        scale, shift = (s[f'{name}.{k}'].view(1, -1, 1, 1) for k in ('scale', 'shift'))
        return (x - mean)/(var + 1e-9).sqrt()*scale + shift
    def mirrored(x, n): return F.pad(x, (n,)*4, mode='reflect')
    def up(name, x):
        return F.conv_transpose2d(x, s[f'{name}.weight'], s[f'{name}.bias'], 2, 1, 1)
    x = norm('in01_1', conv('conv01_1', mirrored(x, 3))).relu()
    x = norm('in02_1', conv('conv02_2', conv('conv02_1', x, 1, stride=2), 1)).relu()
    x = norm('in03_1', conv('conv03_2', conv('conv03_1', x, 1, stride=2), 1)).relu()
    for k in range(4, 12):
        y = norm(f'in{k:02d}_1', conv(f'conv{k:02d}_1', mirrored(x, 1))).relu()
        x = norm(f'in{k:02d}_2', conv(f'conv{k:02d}_2', mirrored(y, 1))) + x
    x = norm('in12_1', conv('deconv01_2', up('deconv01_1', x), 1)).relu()
    x = norm('in13_1', conv('deconv02_2', up('deconv02_1', x), 1)).relu()
    return conv('deconv03_1', mirrored(x, 3)).tanh()


def animegan_by_hand(s, x):
    def scaled(name, x):
        mean, var = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), unbiased=False, keepdim=True)
        scale, shift = (s[f'{name}.{k}'].view(-1, 1, 1) for k in ('weight', 'bias'))
        return (x - mean)/(var + 1e-5).sqrt()*scale + shift
    def normed(name, x, stride=1):
        kernel, bias = s[f'{name}.1.weight'], s.get(f'{name}.1.bias')
        pad = (0, 1, 0, 1) if stride == 2 else (kernel.shape[2]//2,)*4
        groups = 1 if bias is None else len(kernel)
        x = F.conv2d(F.pad(x, pad, mode='reflect'), kernel, bias, stride, groups=groups)
        return F.leaky_relu(scaled(f'{name}.2', x), .2)
    def larger(x, size): return F.interpolate(x, size, mode='bilinear', align_corners=True)
    whole = x.shape[2:]
    x = normed('block_a.2', normed('block_a.1', normed('block_a.0', x), 2))
    half = x.shape[2:]
    x = normed('block_c.0', normed('block_b.1', normed('block_b.0', x, 2)))
    for k in (1, 2, 3, 4):
        y = normed(f'block_c.{k}.layers.1', normed(f'block_c.{k}.layers.0', x))
        y = scaled(f'block_c.{k}.layers.3', F.conv2d(y, s[f'block_c.{k}.layers.2.weight']))
        x = y if k == 1 else x + y
    x = larger(normed('block_c.5', x), half)
    x = larger(normed('block_d.1', normed('block_d.0', x)), whole)
    x = normed('block_e.2', normed('block_e.1', normed('block_e.0', x)))
    return F.conv2d(x, s['out_layer.0.weight']).tanh()


def whitebox_by_hand(s, photo):
    def conv(name, x, stride=1):
        kernel = s[f'generator.{name}.weight']
        return F.conv2d(x, kernel, s[f'generator.{name}.bias'], stride, kernel.shape[2]//2)
    def bent(x): return F.leaky_relu(x, .2)
    def double(x): return F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=True)
    a = bent(conv('Conv', photo))
    b = bent(conv('Conv_2', bent(conv('Conv_1', a, 2))))
    c = bent(conv('Conv_4', bent(conv('Conv_3', b, 2))))
    for k in range(4): c = c + conv(f'block_{k}.conv2', bent(conv(f'block_{k}.conv1', c)))
    x = bent(conv('Conv_7', bent(conv('Conv_6', double(bent(conv('Conv_5', c))) + b))))
    made = conv('Conv_9', bent(conv('Conv_8', double(x) + a)))
    def box(x):                                          # sums over 3×3, by what lies inside
        ones = torch.ones(3, 1, 3, 3)
        return F.conv2d(x, ones, padding=1, groups=3)/F.conv2d(torch.ones_like(x), ones, padding=1, groups=3)
    mean_x, mean_y = box(photo), box(made)
    slope = (box(photo*made) - mean_x*mean_y)/(box(photo*photo) - mean_x**2 + 5e-3)
    return box(slope)*photo + box(mean_y - slope*mean_x)


def fed(by_hand, state, photo, bgr, multiple):
    "The published convention, in NumPy: order of colors, sides by mirroring, cut, clipped."
    h, w = photo.shape[2:]
    x = np.pad(photo.numpy(), ((0, 0), (0, 0), (0, -h % multiple), (0, -w % multiple)), 'reflect')
    x = torch.from_numpy(x[:, ::-1].copy() if bgr else x)
    made = by_hand(state, x).numpy()[:, :, :h, :w]
    return torch.from_numpy((made[:, ::-1] if bgr else made).clip(-1, 1).copy())


PUBLISHED = {'CartoonGAN': (cartoon_layout, cartoon_by_hand, CartoonGAN, 64, True, 4),
             'AnimeGANv2': (animegan_layout, animegan_by_hand, AnimeGANv2, 32, False, 32),
             'White-box': (whitebox_layout, whitebox_by_hand, WhiteBox, 32, True, 4)}


@pytest.mark.parametrize('kind', PUBLISHED)
def test_a_published_file_paints_what_its_network_paints(tmp_path, kind):
    layout, by_hand, network, width, bgr, multiple = PUBLISHED[kind]
    state, photo = filled(layout(width)), noise(2, 3, 45, 38)
    assert {k: tuple(v.shape) for k, v in network().state_dict().items()} == layout(width)
    torch.save(state, tmp_path/'net.pth')
    rival = load_rival(tmp_path/'net.pth', 'cpu')
    expected = torch.cat([fed(by_hand, state, x, bgr, multiple) for x in photo.split(1)])
    scenes = rival(photo)
    assert rival.kind == kind and scenes.shape == photo.shape and expected.std() > .05
    assert (scenes - expected).abs().max() < 2e-3


@pytest.mark.parametrize('sides', [(1, 1), (3, 4), (4, 40), (8, 7)], ids=str)
def test_photos_of_a_few_pixels(tmp_path, sides):
    state, photo = filled(cartoon_layout(2)), noise(1, 3, *sides)
    torch.save(state, tmp_path/'net.pth')
    x = photo.numpy()
    for axis, side in ((3, sides[1]), (2, sides[0])):            # to 8 pixels at least, then as ever
        more = max(8, side + -side % 4) - side
        edges = [(0, more if k == axis else 0) for k in range(4)]
        x = np.pad(x, edges, 'reflect' if more < side else 'edge')
    expected = cartoon_by_hand(state, torch.from_numpy(x[:, ::-1].copy()))[..., :sides[0], :sides[1]].flip(1)
    assert (load_rival(tmp_path/'net.pth', 'cpu')(photo) - expected).abs().max() < 2e-3


def test_cut_is_our_own_generator(tmp_path):
    net = ResnetGenerator(ngf=8, n_blocks=9).eval()
    torch.save(net.state_dict(), tmp_path/'latest_net_G.pth')
    assert net.state_dict()['model.7.filt'].shape == (16, 1, 3, 3)             # the blur is in the file
    photo = noise(1, 3, 41, 50)
    padded = torch.from_numpy(np.pad(photo.numpy(), ((0, 0), (0, 0), (0, 3), (0, 2)), 'reflect'))
    with torch.no_grad(): expected = net(padded)[..., :41, :50]
    assert (load_rival(tmp_path/'latest_net_G.pth', 'cpu')(photo) - expected).abs().max() < 1e-4
    state = net.state_dict()
    state['model.7.filt'] = state['model.7.filt'] + .1
    torch.save(state, tmp_path/'other.pth')
    with pytest.raises(WeightsError, match='filt'): load_rival(tmp_path/'other.pth', 'cpu')


def test_a_name_is_stylized_as_ever():
    from scenimefy.stylize import stylize
    photo = to_image(render([HELD_OUT], 64, 'photo'))
    scene = to_model(stylize(photo, 'drawn', device='cpu'))
    assert (load_rival('drawn', 'cpu')(to_model(photo)) - scene).abs().max() <= 1/127.5


def test_other_clothes(tmp_path):
    state, photo = filled(whitebox_layout(4)), noise(1, 3, 16, 16)
    torch.save(state, tmp_path/'plain.pth')
    torch.save({f'module.{k}': v.half() for k, v in state.items()}, tmp_path/'wrapped.pth')
    save_file(state, tmp_path/'net.safetensors')
    def scene(name): return load_rival(tmp_path/name, 'cpu')(photo)
    assert torch.equal(scene('net.safetensors'), scene('plain.pth'))
    assert (scene('wrapped.pth') - scene('plain.pth')).abs().max() < .02


def test_the_first_key_that_does_not_fit_is_named(tmp_path):
    def refused(state, match):
        torch.save(state, tmp_path/'net.pth')
        with pytest.raises(WeightsError, match=match): load_rival(tmp_path/'net.pth', 'cpu')
    whole = filled(cartoon_layout(4))
    refused({k: v for k, v in whole.items() if k != 'in07_2.scale'}, 'CartoonGAN: in07_2.scale is missing')
    refused({k: v for k, v in whole.items() if k != 'conv01_1.weight'}, 'conv01_1.* is missing|has shape')
    refused(whole | {'conv99.weight': torch.zeros(1)}, 'conv99.weight does not belong there')
    refused(whole | {'conv04_1.bias': torch.zeros(5)}, r'conv04_1.bias has shape \(5,\), not \(16,\)')
    refused(whole | {'conv04_1.bias': torch.full((16,), float('nan'))}, 'NaN')
    refused(whole | {'conv01_1.weight': torch.zeros(0, 3, 7, 7)}, 'makes no sense')
    refused({'g': whole, 'step': 3}, 'no plain dictionary')
    refused({'features.0.weight': torch.zeros(1)}, 'known are CartoonGAN.*AnimeGANv2.*White-box.*onnx')
    refused({'model.1.weight': torch.zeros(4, 3, 7, 7)}, 'not weights of our generator')


class Evil:
    def __init__(self, folder): self.folder = str(folder)
    def __reduce__(self): return os.mkdir, (self.folder,)


def test_nothing_in_a_file_is_run(tmp_path):
    torch.save(filled(cartoon_layout(2)) | {'x': Evil(tmp_path/'made')}, tmp_path/'net.pth')
    with pytest.raises(WeightsError, match='refused without running'): load_rival(tmp_path/'net.pth', 'cpu')
    assert not (tmp_path/'made').exists()


# ---- graphs

def need_onnx():
    for name in ('onnx', 'onnxruntime'):
        if find_spec(name) is None: pytest.skip(f'{name} is not installed')


def graph(path, nodes, given, made, numbers=(), shape=('n', 'h', 'w', 3), out=None, outside=None, **more):
    "A graph from (operation, inputs, output, attributes); `outside`: where a tensor says its numbers lie."
    from onnx import TensorProto, helper, save_model
    held = []
    for name, v in dict(numbers).items():
        kind = TensorProto.FLOAT if v.is_floating_point() else TensorProto.INT64
        held.append(helper.make_tensor(name, kind, v.shape, v.flatten().tolist()))
    if outside is not None:
        held[0].ClearField('float_data')
        held[0].data_location = TensorProto.EXTERNAL
        for key, value in (('location', outside), ('offset', '0'), ('length', str(4*held[0].dims[0]))):
            entry = held[0].external_data.add()
            entry.key, entry.value = key, value
    ends = [[helper.make_tensor_value_info(name, more.get('kind', TensorProto.FLOAT), dims)]
            for name, dims in ((given, shape), (made, out or shape))]
    made_nodes = [helper.make_node(op, ins, [to], **how) for op, ins, to, how in nodes]
    opsets = [helper.make_opsetid('', 17), helper.make_opsetid('strange', 1)]
    whole = helper.make_graph(made_nodes, 'g', *ends, held)
    save_model(helper.make_model(whole, opset_imports=opsets, ir_version=9), path)
    return path


COLORS = torch.tensor([.5, 1., -.25])                      # a factor for red, green, blue
TIMES = dict(c=COLORS)
def times(given, made, c='c'): return [('Mul', [given, c], made, {})]


@pytest.mark.parametrize('given,made,kind,multiple', [
    ('generator_input:0', 'generator/G_MODEL/out_layer/Tanh:0', 'AnimeGANv2 (ONNX)', 32),
    ('AnimeGANv3_input:0', 'generator_1/main/out_layer:0', 'AnimeGANv3 (ONNX)', 16),
    ('animeganv3_input:0', 'out', 'AnimeGANv3 (ONNX)', 16),
    ('photo', 'scene', 'a graph taken as RGB (ONNX)', 32)])
def test_graphs_with_channels_last(tmp_path, given, made, kind, multiple):
    "The colors show whether channels were taken for what they are, the spread whether the sides were right."
    need_onnx()
    rival = load_rival(graph(tmp_path/'net.onnx', times(given, made), given, made, TIMES))
    photo = noise(2, 3, 21, 34)
    assert (rival.kind, rival.bgr, rival.multiple, rival.size) == (kind, False, multiple, None)
    assert torch.equal(rival(photo), photo*COLORS.view(3, 1, 1))
    asked, run = [], rival.run
    rival.run = lambda x: asked.append(x.shape) or run(x)
    rival(photo)
    assert set(asked) == {(1, 3, -(-21//multiple)*multiple, -(-34//multiple)*multiple)}


def test_graphs_with_channels_second_and_fixed_sides(tmp_path):
    need_onnx()
    factors = dict(c=COLORS.view(3, 1, 1))
    second = graph(tmp_path/'second.onnx', times('x', 'y'), 'x', 'y', factors, (1, 3, 'h', 'w'))
    photo = noise(1, 3, 30, 50)
    assert torch.equal(load_rival(second)(photo), photo*COLORS.view(3, 1, 1))
    fixed = load_rival(graph(tmp_path/'fixed.onnx', times('x', 'y'), 'x', 'y', TIMES, (1, 24, 40, 3)))
    smooth = F.interpolate(noise(1, 3, 4, 5), (30, 50), mode='bicubic').clamp(-.8, .8)
    assert fixed.size == (24, 40) and (fixed(smooth) - smooth*COLORS.view(3, 1, 1)).abs().max() < .1
    with pytest.raises(WeightsError, match='same size'):       # it is no translator: the sides are exchanged
        load_rival(graph(tmp_path/'turn.onnx', [('Transpose', ['x'], 'y', dict(perm=[0, 2, 1, 3]))], 'x', 'y',
                         out=('n', 'w', 'h', 3)))(photo)


@pytest.mark.parametrize('dims', [(1, 4, 'h', 'w'), ('n', 3, 'h', 3), (1, 'h', 'w'), ('n', 'h', 'w', 'c')],
                         ids=str)
def test_graphs_that_are_no_translators(tmp_path, dims):
    need_onnx()
    path = graph(tmp_path/'net.onnx', [('Identity', ['x'], 'y', {})], 'x', 'y', shape=dims)
    with pytest.raises(WeightsError, match=r'one float \(1,3,H,W\)'): load_rival(path)


def test_graphs_that_cannot_be_read(tmp_path):
    need_onnx()
    from onnx import TensorProto
    whole = graph(tmp_path/'whole.onnx', times('x', 'y'), 'x', 'y', TIMES).read_bytes()
    (tmp_path/'cut.onnx').write_bytes(whole[:len(whole)//2])
    (tmp_path/'page.onnx').write_bytes(b'<!doctype html><html>sign in</html>')
    (tmp_path/'empty.onnx').write_bytes(b'')
    graph(tmp_path/'levels.onnx', [('Identity', ['x'], 'y', {})], 'x', 'y', kind=TensorProto.UINT8)
    graph(tmp_path/'strange.onnx', [('Identity', ['x'], 'y', dict(domain='strange'))], 'x', 'y')
    for name in ('cut', 'page', 'empty', 'levels', 'strange'):
        with pytest.raises(WeightsError, match=f'{name}.onnx: '): load_rival(tmp_path/f'{name}.onnx')


@pytest.mark.parametrize('place', ['../secret', 'sub/../../secret', '{tmp}/secret', 'link',
                                   'numbers\0/../../secret'])
def test_a_graph_reads_nothing_outside_its_folder(tmp_path, place):
    need_onnx()
    COLORS.numpy().tofile(tmp_path/'secret')
    home = tmp_path/'home'
    (home/'sub').mkdir(parents=True)
    (home/'link').symlink_to(tmp_path/'secret')
    COLORS.numpy().tofile(home/'numbers')
    path = graph(home/'net.onnx', times('x', 'y'), 'x', 'y', TIMES, outside=place.format(tmp=tmp_path))
    with pytest.raises(WeightsError, match='refused'): load_rival(path)


def test_numbers_beside_a_graph(tmp_path):
    need_onnx()
    path = graph(tmp_path/'net.onnx', times('x', 'y'), 'x', 'y', TIMES, outside='numbers.bin')
    with pytest.raises(WeightsError, match='numbers.bin with its numbers is missing'): load_rival(path)
    COLORS.numpy().tofile(tmp_path/'numbers.bin')
    photo = noise(1, 3, 32, 32)
    rival = load_rival(path)
    assert torch.equal(rival(photo), photo*COLORS.view(3, 1, 1))
    assert [Path(f).name for f in rival.files] == ['net.onnx', 'numbers.bin']


def test_a_tensor_deep_in_a_graph_is_looked_at(tmp_path):
    "In a branch of an If, in an attribute: the numbers may hide anywhere."
    need_onnx()
    from onnx import TensorProto, helper, save_model
    def constant(outside):
        t = helper.make_tensor('t', TensorProto.FLOAT, [3], COLORS.tolist())
        if outside:
            t.ClearField('float_data')
            t.data_location = TensorProto.EXTERNAL
            entry = t.external_data.add()
            entry.key, entry.value = 'location', '../secret'
        return helper.make_graph([helper.make_node('Constant', [], ['b'], value=t)], 'branch', [],
                                 [helper.make_tensor_value_info('b', TensorProto.FLOAT, [3])])
    for outside in (False, True):
        branches = dict(then_branch=constant(False), else_branch=constant(outside))
        nodes = [helper.make_node('If', ['yes'], ['c'], **branches),
                 helper.make_node('Mul', ['x', 'c'], ['y'])]
        ends = [[helper.make_tensor_value_info(k, TensorProto.FLOAT, ['n', 'h', 'w', 3])] for k in 'xy']
        yes = helper.make_tensor('yes', TensorProto.BOOL, [], [True])
        model = helper.make_model(helper.make_graph(nodes, 'g', *ends, [yes]), ir_version=9,
                                  opset_imports=[helper.make_opsetid('', 17)])
        save_model(model, tmp_path/'net.onnx')
        if not outside: assert load_rival(tmp_path/'net.onnx').kind == 'a graph taken as RGB (ONNX)'
        else:
            with pytest.raises(WeightsError, match='refused'): load_rival(tmp_path/'net.onnx')


class ChannelsLast(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return self.net(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')        # of torch's older exporter
def test_white_box_as_a_graph(tmp_path):
    "Known by its kernels alone, so it gets blue, green, red; the same network one channel wider is not it."
    need_onnx()
    state, photo = filled(whitebox_layout(32)), noise(1, 3, 22, 36)
    net = WhiteBox().eval()
    net.load_state_dict(state)
    for width, kind in ((32, 'White-box (ONNX)'), (33, 'a graph taken as RGB (ONNX)')):
        exported = ChannelsLast(net if width == 32 else WhiteBox(width).eval())
        torch.onnx.export(exported, (torch.zeros(1, 32, 32, 3),), str(tmp_path/'w.onnx'), dynamo=False,
                          input_names=['photo'], dynamic_axes=dict(photo={1: 'h', 2: 'w'}))
        rival = load_rival(tmp_path/'w.onnx')
        assert rival.kind == kind and rival.bgr == (width == 32)
        expected = fed(whitebox_by_hand, state, photo, True, 4)
        if width == 32: assert (rival(photo) - expected).abs().max() < 2e-3


def test_onnx_that_is_missing(tmp_path, monkeypatch):
    (tmp_path/'net.onnx').write_bytes(b'x')
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(UserError, match=r'scenimefy\[onnx\]'): load_rival(tmp_path/'net.onnx')


# ---- painted once, then compared

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Four photos in two folders, twelve anime scenes, and files of two rivals."
    root = tmp_path_factory.mktemp('rivals')
    for name, style, n in (('photos', 'photo', 4), ('anime', 'anime', 12)):
        (root/name/'deep').mkdir(parents=True)
        for k, x in enumerate(render(range(HELD_OUT, HELD_OUT + n), 32, style)):
            to_image(x).save(root/name/('deep' if k % 2 else '')/f'{k}.v1.png')
    torch.save(filled(whitebox_layout(2)), root/'white.pth')
    torch.save(filled(cartoon_layout(2)), root/'cartoon.pth')
    return root


def paint(world, out, said=None, **methods):
    return paint_methods(methods, world/'anime', world/'photos', out, 'cpu', say=(said or []).append)


def test_scenes_are_painted_once(world, tmp_path):
    said, out = [], tmp_path/'out'
    def again(file=world/'white.pth'):
        said.clear()
        methods = {'White-box': file, 'b': world/'anime'}
        found = paint_methods(methods, world/'anime', world/'photos', out, 'cpu', say=said.append)
        assert found == {'White-box': out/'scenes'/'White-box', 'b': world/'anime'}
        return int(said[0].removeprefix('White-box: White-box, ').split()[0])
    assert again() == 4 and again() == 0
    scenes = sorted(p.relative_to(out/'scenes').as_posix() for p in out.rglob('*.png'))
    assert scenes == [f'White-box/{n}' for n in ('0.v1.png', '2.v1.png', 'deep/1.v1.png', 'deep/3.v1.png')]
    scene, photo = read_image(out/'scenes'/scenes[2]), read_image(world/'photos'/'deep'/'1.v1.png')
    expected = fed(whitebox_by_hand, filled(whitebox_layout(2)), to_model(photo), True, 4)
    assert scene.size == photo.size and (to_model(scene) - expected).abs().max() < 2/127.5

    (out/'scenes'/scenes[0]).write_bytes(b'damaged')
    assert again() == 1 and again() == 0
    other = tmp_path/'other.pth'
    torch.save(filled(whitebox_layout(3)), other)
    assert again(other) == 4 and again(other) == 0 and again() == 4      # what lies there is of the others
    record = out/'scenes'/'White-box.jsonl'
    last = record.read_text().splitlines()[-4:]
    record.write_text('\n'.join(last)[:-9])                                     # killed while it was written
    assert again() == 1 and again() <= 1 and again() == 0


def test_the_scene_of_a_photo_that_is_gone_goes_too(world, tmp_path):
    photos, scenes = tmp_path/'photos', tmp_path/'out'/'scenes'/'a'
    shutil.copytree(world/'photos', photos)
    def names(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*.png'))
    def again():
        methods = {'a': world/'white.pth'}
        paint_methods(methods, world/'anime', photos, tmp_path/'out', 'cpu', say=str)
    again()
    (photos/'deep'/'3.v1.png').unlink()
    (photos/'0.v1.png').rename(photos/'new.png')
    (scenes/'not ours.png').write_bytes(b'')
    again()
    assert names(scenes) == sorted([*names(photos), 'not ours.png'])
    shutil.copy(world/'photos'/'0.v1.png', photos)                                  # and back again
    again()
    assert names(scenes) == ['0.v1.png', '2.v1.png', 'deep/1.v1.png', 'new.png', 'not ours.png']


def test_what_is_wrong_is_said_before_anything_is_painted(world, tmp_path, monkeypatch):
    out, file = tmp_path/'out', world/'white.pth'
    monkeypatch.setattr('scenimefy.rivals._paint', None)
    def refused(match, error=UserError, photos=world/'photos', reference=world/'anime', out=out, **methods):
        with pytest.raises(error, match=match): paint_methods(methods, reference, photos, out, 'cpu')
        assert not Path(tmp_path/'out').exists()
    refused('--photos', SettingsError, photos=None, a=file)
    refused('-o', SettingsError, out=None, a=file)
    refused('lies in the folder of the photos', out=world/'photos'/'out', a=file)
    refused('same folder', SettingsError, **{'a/b': file, 'A:B': file})
    refused('no such folder', reference=world/'nowhere', a=file)
    refused('no such folder', photos=world/'nowhere', a=file)
    refused('no such file', a=world/'none.onnx')
    (tmp_path/'bad').mkdir()
    (tmp_path/'bad'/'1.png').write_bytes(b'no picture')
    refused('cannot be read', photos=tmp_path/'bad', a=file)
    torch.save({}, tmp_path/'odd.pth')
    refused('odd.pth', a=file, b=tmp_path/'odd.pth')


def test_what_is_weights_and_what_is_a_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('drawn', 'shinkai', 'hf:someone/net', 'missing.onnx', 'missing.pth', world/'white.pth'):
        assert is_rival(name), name
    assert is_rival(Path('hf:someone/net')) and not is_rival(world/'photos') and not is_rival('nowhere')
    (tmp_path/'drawn').mkdir()                                            # a folder of results of that name
    assert not is_rival('drawn') and paint_methods({'a': 'drawn'}, None) == {'a': 'drawn'}
    ResnetGenerator(ngf=4, n_blocks=1).save_pretrained(tmp_path/'saved')
    assert is_rival(tmp_path/'saved')


def test_names_of_methods_stay_inside(world, tmp_path):
    found = paint(world, tmp_path/'out', **{'../../up': world/'white.pth', 'C:\\x y': world/'cartoon.pth'})
    assert [p.name for p in found.values()] == ['______up', 'C__x_y']
    assert {p.name for p in tmp_path.iterdir()} == {'out'} and len(list((tmp_path/'out').rglob('*.png'))) == 8


def run(*args): return CliRunner().invoke(app, list(map(str, args)))


def test_at_the_command_line(world, tmp_path, monkeypatch):
    out, methods = tmp_path/'out', [f"White-box={world/'white.pth'}", 'ours=drawn']
    words = ['compare', world/'anime', *methods, '--method', f"CartoonGAN={world/'cartoon.pth'}", '--method',
             f"unchanged={world/'photos'}", '--photos', world/'photos', '--features', 'tiny', '-o', out,
             '--device', 'cpu']
    if find_spec('onnx') and find_spec('onnxruntime'):
        name = 'AnimeGANv3_input:0'
        words += ['--method', f"AnimeGAN={graph(tmp_path/'v3.onnx', times(name, 'y'), name, 'y', TIMES)}"]
    done, asked = run(*words), []
    monkeypatch.setattr('scenimefy.evaluate.compare', lambda methods, *_, **__: asked.append(methods))
    monkeypatch.setattr('scenimefy.cli._print_report', lambda *_: None)
    again = run(*words)
    assert done.exit_code == 0 and again.exit_code == 0, done.output
    assert 'White-box: White-box, 4 photos painted, 0 already there' in done.output
    assert 'CartoonGAN: CartoonGAN, 0 photos painted, 4 already there' in again.output
    assert asked[0]['ours'] == out/'scenes'/'ours' and asked[0]['unchanged'] == world/'photos'
    report = json.loads((out/'metrics.json').read_text())
    names = ['photos', 'White-box', 'ours', 'CartoonGAN', 'unchanged', 'AnimeGAN']
    assert list(report['methods']) == names[:len(report['methods'])] and len(report['methods']) >= 5
    assert report['methods']['unchanged']['kept']['means']['edges'] == pytest.approx(1)
    page = (out/'index.html').read_text(encoding='utf8')
    assert page.count('<img') == 4*len(report['methods']) and 'ours: 0.v1' in page
    assert Image.open(out/'scenes'/'CartoonGAN'/'0.v1.png').size == (32, 32)


@pytest.mark.parametrize('words,status,text', [
    (['a={world}/white.pth'], 2, '--photos'), ([], 2, 'nothing to compare'),
    (['--method', 'a'], 2, 'NAME=FILE'),
    (['a={world}/none.pth', '--photos', '{world}/photos'], 1, 'no such file'),
    (['a=x', '--method', 'a=y'], 2, 'name of its own')], ids=str)
def test_the_command_line_refuses(world, tmp_path, words, status, text):
    words = [word.format(world=world) for word in words]
    done = run('compare', world/'anime', *words, '--features', 'tiny', '-o', tmp_path/'o')
    assert done.exit_code == status and text in ' '.join(done.output.split()), done.output
    assert not (tmp_path/'o').exists()


def test_a_mistyped_method_is_named_before_anything_is_painted(tmp_path):
    for typo in ('drwan', tmp_path/'nobody'):
        with pytest.raises(UserError, match='no folder, no file and no name of weights; known names: dr'):
            paint_methods(dict(ours='drawn', other=typo), tmp_path, tmp_path, tmp_path/'out')
    assert not (tmp_path/'out').exists()
