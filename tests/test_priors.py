"The judges and their teachers: one contract for tiny and real ones, damaged files, ranges, repeatability."
import copy
import functools
import json
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from scenimefy import priors as P
from scenimefy import teachers as T
from scenimefy.core import SettingsError, UserError, to_array
from scenimefy.weights import WeightsError, find_weights
from scenimefy.painters import render
from scenimefy.world import CLASSES, HELD_OUT, captions, scenes


def world(n=2, style='photo', size=64): return render(range(HELD_OUT, HELD_OUT + n), size, style)


@functools.cache
def real_clip():
    from open_clip import get_tokenizer
    return P.Clip(P.fresh(P._vit_b32_net), 224, get_tokenizer('ViT-B-32-quickgelu'))


@functools.cache
def real_vgg():
    features = P.fresh(P._vgg19_features)
    for layer in features:
        if isinstance(layer, nn.Conv2d): nn.init.kaiming_normal_(layer.weight)
    return P.VggDistance(features)


@functools.cache
def real_lpips():
    import lpips
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return P.LpipsDistance(P.fresh(lambda: lpips.LPIPS(net='vgg', pnet_rand=True, verbose=False)))


def real_segmenter(): return P.Segmenter(P.fresh(P._swin_b_net), [f'class {k}' for k in range(150)])


# ---- one contract; the real architectures hold random numbers ----

def frozen(judge):
    judge.train()
    assert not any(m.training for m in judge.modules())
    assert not any(p.requires_grad for p in judge.parameters())


def refuses(call, x):
    for wrong, text in ((x*255, 'to_model'), (x[0], 'B,3,H,W'), (x.mul(255).to(torch.uint8), 'float'),
                        (x*float('nan'), 'must lie')):
        with pytest.raises(ValueError, match=text): call(wrong)


def gradient(call, x, judge):
    x = x.clone().requires_grad_()
    call(x).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert all(p.grad is None for p in judge.parameters())


@pytest.mark.parametrize('make', [lambda: P.load_clip('tiny'), real_clip], ids=['tiny', 'real'])
def test_clip_contract(make):
    clip, x = make(), world()
    frozen(clip)
    e, tokens = clip(x), clip.tokens(x)
    assert e.dtype == tokens.dtype == torch.float32 and len(e) == len(tokens) == 2 and tokens.ndim == 3
    torch.testing.assert_close(e.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(torch.cat([clip(one[None]) for one in x]), e, atol=1e-4, rtol=1e-3)
    gradient(lambda x: clip(x)[:, :3], x, clip)
    gradient(clip.tokens, x, clip)
    refuses(clip, x); refuses(clip.tokens, x)
    assert clip(x*1.5, check=False).isfinite().all()
    assert clip.text(['lake by day with mountains']).shape == (1, e.shape[1])


@pytest.mark.parametrize('make', [lambda: P.load_perceptual('tiny'), real_vgg, real_lpips],
                         ids=['tiny', 'vgg19', 'lpips'])
def test_perceptual_contract(make):
    distance, x, y = make(), world(), world(style='anime')
    frozen(distance)
    d = distance(x, y)
    assert d.shape == (2,) and d.dtype == torch.float32 and (d > 0).all() and (distance(x, x) == 0).all()
    torch.testing.assert_close(distance(x[1:], y[1:]), d[1:], rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(distance(y, x), d, rtol=1e-4, atol=1e-9)
    gradient(lambda x: distance(x, y)*1e3, x, distance)
    gradient(lambda y: distance(x, y)*1e3, y, distance)
    refuses(lambda x: distance(x, x), x); refuses(lambda y: distance(x, y), y)
    assert distance(x*1.5, y, check=False).isfinite().all()


@pytest.mark.parametrize('make, queries, classes',
                         [(lambda: P.load_segmenter('tiny'), 16, 13), (real_segmenter, 100, 150)],
                         ids=['tiny', 'real'])
def test_segmenter_contract(make, queries, classes):
    segmenter, x = make(), world()
    frozen(segmenter)
    cls, masks = segmenter(x)
    assert cls.shape == (2, queries, classes + 1) and masks.shape[:2] == (2, queries)
    assert len(segmenter.classes) == classes
    assert not cls.requires_grad and cls.dtype == masks.dtype == torch.float32
    torch.testing.assert_close(segmenter(x[1:])[0], cls[1:], atol=1e-3, rtol=1e-3)
    found = P.segment(segmenter, x)
    assert found.shape == (2, 64, 64) and found.dtype == torch.int64 and 0 <= found.min()
    assert found.max() < classes
    refuses(segmenter, x)
    with pytest.raises(ValueError, match='multiples of 32'): segmenter(x[..., :60])
    loud = segmenter(x*1.3, check=False)[0]
    torch.testing.assert_close(loud, segmenter((x*1.3).clamp(-1, 1))[0])


def test_real_sizes():
    from torchvision.models import vgg19
    with torch.device('meta'): clip, vgg = P._vit_b32_net(), vgg19()                # shapes, no memory
    assert sum(p.numel() for p in clip.parameters()) == 151_277_313
    net = real_vgg().net
    assert [str(m) for m in net] == [str(m) for m in vgg.features[:26]]
    assert [type(m).__name__ for m in net].count('Conv2d') == 12 and isinstance(net[-1], nn.Conv2d)
    assert len(net) == 26
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 512, 8, 8)


# ---- what the networks are fed ----

def cubic(t, a=-.75):
    t = np.abs(t)
    return np.where(t <= 1, (a + 2)*t**3 - (a + 3)*t**2 + 1, np.where(t < 2, a*(t**3 - 5*t**2 + 8*t - 4), 0))


def bicubic_matrix(n, size):
    "(size,n): each row mixes four neighbors, the ends repeat."
    m = np.zeros((size, n))
    for i in range(size):
        at = (i + .5)*n/size - .5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            m[i, np.clip(j, 0, n - 1)] += cubic(at - j)
    return m


@pytest.mark.parametrize('h, w', [(64, 64), (16, 16), (256, 256), (40, 100)])
def test_clip_input_is_bicubic_without_antialias(h, w):
    x = torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(0))*2.4 - 1.2          # not clamped
    u = (x[0].double().numpy() + 1)/2
    u = bicubic_matrix(h, 224) @ u @ bicubic_matrix(w, 224).T
    mean = np.reshape([.48145466, .4578275, .40821073], (3, 1, 1))
    deviation = np.reshape([.26862954, .26130258, .27577711], (3, 1, 1))
    want = (u - mean)/deviation
    # torch's weights are single precision
    torch.testing.assert_close(P.clip_input(x, 224)[0].double(), torch.from_numpy(want), atol=5e-4, rtol=0)


def test_clip_input_is_that_of_open_clip_at_its_own_size():
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from torchvision.transforms.functional import normalize, to_tensor
    x = world(1, size=224)
    want = normalize(to_tensor(to_array(x)), OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    # half a level of a byte
    torch.testing.assert_close(P.clip_input(x, 224)[0], want, atol=.5/255/.26 + 1e-6, rtol=0)


def test_segmenter_input_is_that_of_a_picture_file():
    from torchvision.transforms.functional import normalize
    x = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))*2.4 - 1.2
    levels = torch.from_numpy(to_array(x)).permute(2, 0, 1).float()
    want = normalize(levels, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    torch.testing.assert_close(P.segmenter_input(x)[0], want, atol=1e-5, rtol=1e-5)


def test_vgg_sees_zero_to_one_and_nothing_else():
    d = real_vgg()
    x, y = world(), world(style='anime')
    with torch.no_grad():
        want = F.mse_loss(d.net(x*.5 + .5), d.net(y*.5 + .5), reduction='none').mean((1, 2, 3))
    torch.testing.assert_close(d(x, y), want)


def test_lpips_is_the_package():
    d, x, y = real_lpips(), world(), world(style='anime')
    net, want = d.net, 0.
    # of the published code
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ([-.030, -.088, -.188], [.458, .448, .450]))
    with torch.no_grad():
        for fx, fy, lin in zip(net.net((x - shift)/scale), net.net((y - shift)/scale), net.lins):
            unit = [f/(f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (fx, fy)]
            weight = lin.model[-1].weight.flatten()  # one per channel, from human judgments
            assert (weight >= 0).all()
            want = want + torch.einsum('bchw,c->b', (unit[0] - unit[1]).square(), weight)/fx[0, 0].numel()
    torch.testing.assert_close(d(x, y), want)


def test_tokens_are_those_of_the_named_block():
    "Four blocks: the second, halfway, if none is named; block 1 is the first. No class token in front."
    clip, seen = P.load_clip('tiny'), []
    blocks = clip.net.visual.transformer.resblocks
    for b in blocks: b.register_forward_hook(lambda m, args, out: seen.append(out[:, 1:]))
    for block, last in ((None, 2), (1, 1), (3, 3)):
        seen.clear()
        got = clip.tokens(world(), block=block)
        assert len(blocks) == 4 and got.shape == (2, 64, 96) and torch.equal(got, seen[last - 1])


def test_token_distance_by_hand():
    "Tokens (2 patches, 3 numbers) that differ by 2 in one patch and by 0 in the other: the mean square is 2."
    class Told(nn.Module):
        def tokens(self, images, check=True): return images
    a, b = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    a[:, 0] = 2.
    assert P.TokenDistance(Told())(a, b).tolist() == [2.]


def test_segment_counts_the_votes_of_queries_that_found_something():
    """Two queries, two classes and nothing. A mostly found nothing, a little class 0; B found class 1 rather
    than 0, and has the say."""
    cls = torch.tensor([[[2., 0., 4.], [0., 1., -9.]]])  # .117 and .016 of A, .269 and .731 of B
    masks = torch.full((1, 2, 2, 2), 20.)
    assert (P.segment(lambda images, check: (cls, masks), torch.zeros(1, 3, 4, 4)) == 1).all()


def test_segment_enlarges_masks_before_it_squashes_them():
    """A is sure on the left and doubtful on the right, B lukewarm everywhere: enlarged logits give A three of
    four columns."""
    cls = torch.eye(2, 3).mul(40).sub(20)[None]
    # enlarged: 20, 14.5, 3.5, -2
    masks = torch.tensor([[20., -2.], [.4, .4]]).view(1, 2, 1, 2).expand(1, 2, 2, 2)
    found = P.segment(lambda images, check: (cls, masks), torch.zeros(1, 3, 4, 4))
    assert found.tolist() == [[[0, 0, 0, 1]]*4]


@pytest.mark.parametrize('make, factor', [(real_vgg, 16.), (real_lpips, 1.)], ids=['vgg19', 'lpips'])
def test_features_four_times_as_strong(make, factor):
    "The squared difference grows with the strength of the features; LPIPS looks at their directions alone."
    judge, x, y = make(), world(), world(style='anime')
    was = judge(x, y)
    loud = copy.deepcopy(judge)
    if factor == 16: loud.net.append(Times4())
    else: loud.net.net = Times4(loud.net.net)
    torch.testing.assert_close(loud(x, y), factor*was, rtol=1e-4, atol=1e-9)


class Times4(nn.Module):
    def __init__(self, net=None): super().__init__(); self.net = net
    def forward(self, x): return 4*x if self.net is None else [4*f for f in self.net(x)]


# ---- words ----

def test_every_caption_of_the_world_can_be_read():
    texts = captions(range(2000))
    ids = P.tokenize(texts)
    assert ids.shape == (2000, P._LENGTH) and (ids.max(1).values == P._END).all()
    assert ((ids == P._END).sum(1) == 1).all()
    assert len(torch.unique(ids, dim=0)) == len(set(texts))  # different captions stay different
    for text, why in (('meadow with a castle', 'castle'), ('lake '*12, 'at most')):
        with pytest.raises(UserError, match=why): P.tokenize([text])


# ---- files ----

FILES = {'clip': P.load_clip, 'segmenter': P.load_segmenter}


@pytest.mark.parametrize('name', FILES)
def test_bundled_file(name):
    "Half precision on disk, single in memory, and it says how it was made and how good it is."
    path = find_weights('tiny', name)
    assert path.stat().st_size < 2_500_000
    tensors, net = load_file(path), FILES[name]('tiny').net
    assert all(t.dtype == torch.float16 for t in tensors.values())
    assert tensors.keys() == dict(net.named_parameters()).keys()
    for k, p in net.named_parameters(): assert p.dtype == torch.float32 and torch.equal(p, tensors[k].float())
    about = P.read_header(path)
    scores, settings = json.loads(about['scores']), json.loads(about['settings'])
    assert int(about['seconds']) > 0 and settings['seed'] >= 0 and settings['steps'] > 100
    assert settings == {'clip': T.ClipSettings, 'segmenter': T.SegmenterSettings}[name]().to_dict()
    if name == 'clip':
        assert min(scores['photo_top5'], scores['anime_top5']) >= .93 and scores['cos_pairs'] > .8
    else: assert min(scores['photo_miou'], scores['anime_miou']) >= .80


@pytest.mark.parametrize('name', FILES)
def test_damaged_files_are_refused(name, tmp_path):
    path, bad = find_weights('tiny', name), tmp_path/'bad.safetensors'
    good = load_file(path)
    key = sorted(good)[3]
    def refused(text):
        with pytest.raises(WeightsError, match=text): FILES[name](str(bad))
    for content, why in ((b'', 'empty'), (b'<html>', 'web page'), (path.read_bytes()[:5000], 'damaged'),
                         (b'\x80\x04N.', 'carry code')):
        bad.write_bytes(content); refused(why)
    save_file({k: v for k, v in good.items() if k != key}, bad); refused(f'{key} is missing')
    save_file({**good, 'one.more': torch.zeros(1)}, bad); refused('one.more does not belong there')
    save_file({**good, key: torch.zeros(3, 5, 7)}, bad); refused(r'shape \(3, 5, 7\)')
    save_file({**good, key: torch.full_like(good[key], float('nan'))}, bad); refused('NaN or infinity')
    other = next(n for n in FILES if n != name)
    with pytest.raises(WeightsError, match='another network'): FILES[name](str(find_weights('tiny', other)))
    with pytest.raises(WeightsError, match='no such file'): FILES[name](str(tmp_path/'none.safetensors'))


def test_half_precision_round_trip(tmp_path):
    net = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30))
    P.save_half(net, tmp_path/'n.safetensors', kind='test', steps=3)
    back = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30))
    P._fill_from(back, tmp_path/'n.safetensors')
    for p, q in zip(net.parameters(), back.parameters()):
        assert torch.equal(p.half().float(), q) and (p - q).abs().max() <= 2**-11*p.abs().max() + 1e-7
    assert P.read_header(tmp_path/'n.safetensors') == dict(kind='test', steps='3')
    assert [f.name for f in tmp_path.iterdir()] == ['n.safetensors']  # no leftover of the writing


def test_loading_leaves_the_callers_random_numbers():
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    P.load_clip(); P.load_segmenter()
    assert torch.equal(torch.rand(2), want)


# ---- the real ones (their download is tested in test_weights.py) ----

@pytest.fixture
def hub(tmp_path, monkeypatch):
    was = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path/'hub'))
    yield tmp_path
    torch.hub.set_dir(was)


def test_offline_loaders_say_what_to_get(hub, monkeypatch):
    monkeypatch.setenv('SCENIMEFY_OFFLINE', '1')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    for call, text in ((lambda: P.load_clip('vit-b-32'), 'ViT-B-32.pt'),
                       (lambda: P.load_perceptual('vgg19'), 'vgg19-dcbb9e9d.pth'),
                       (lambda: P.load_perceptual('lpips'), 'vgg16-397923af.pth'),
                       (lambda: P.load_segmenter('mask2former'), 'hf download')):
        with pytest.raises(WeightsError, match=text): call()
    with pytest.raises(UserError, match='tiny, vgg19, lpips'): P.load_perceptual('vgg')


def test_openai_archive(tmp_path):
    "Half precision in a TorchScript archive, three whole numbers beside the tensors: OpenAI's layout, small."
    net = P.tiny_clip_net()
    class Holder(nn.Module):
        def forward(self, x): return x
    root = Holder()
    for name, p in net.named_parameters():
        at = root
        *path, last = name.split('.')
        for part in path:
            if not hasattr(at, part): at.add_module(part, Holder())
            at = getattr(at, part)
        at.register_parameter(last, nn.Parameter(p.detach().half()))
    for name, value in (('input_resolution', 64), ('context_length', 12), ('vocab_size', 19)):
        root.register_buffer(name, torch.tensor(value))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.script(root).save(str(tmp_path/'tiny.pt'))
        back = P._from_torchscript(P.tiny_clip_net(), tmp_path/'tiny.pt')
    for p, q in zip(net.parameters(), back.parameters()): assert torch.equal(p.half().float(), q)


def test_vgg_file(tmp_path, monkeypatch):
    "A file in torchvision's layout fills the features, the classifier is left out, a hole is noticed."
    path = tmp_path/'v.pth'
    small = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
    monkeypatch.setattr(P, '_vgg19_features', small)
    monkeypatch.setattr(P, 'fetch', lambda name: {'vgg19': path}[name])
    tensors = {f'features.{k}': v for k, v in small().state_dict().items()}
    torch.save({**tensors, 'classifier.0.weight': torch.zeros(2, 2)}, path,
               _use_new_zipfile_serialization=False)
    assert torch.equal(P.vgg19().net[0].weight, tensors['features.0.weight'])
    torch.save({k: v for k, v in tensors.items() if k != 'features.2.bias'}, path)
    with pytest.raises(WeightsError, match='features.2.bias is missing'): P.vgg19()


@pytest.fixture
def ade(tmp_path, monkeypatch):
    "A Mask2Former of ADE20K's 150 classes, small, in the layout of the Hub, in place of the real one."
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
    config = Mask2FormerConfig(**{**P.tiny_segmenter_net().config.to_dict(), 'label2id': None,
                                  'id2label': {k: {2: 'sky'}.get(k, f'class {k}') for k in range(150)}})
    P.fresh(lambda: Mask2FormerForUniversalSegmentation(config)).save_pretrained(tmp_path/'ade')
    monkeypatch.setattr(P, '_ADE20K', str(tmp_path/'ade'))
    return tmp_path/'ade'/'model.safetensors'


def test_mask2former_takes_a_file_that_fits_exactly(ade):
    segmenter = P.load_segmenter('mask2former')
    assert len(segmenter.classes) == 150 and segmenter.classes[2] == 'sky'
    assert segmenter(world(1))[0].shape == (1, 16, 151)
    good = load_file(ade)
    key = next(k for k in good if k.endswith('class_predictor.weight'))
    for bad, text in (({k: v for k, v in good.items() if k != key}, f'{key} is missing'),
                      ({**good, 'one.more': torch.zeros(1)}, 'one.more is unexpected'),
                      ({**good, key: torch.zeros(3, 5)}, 'mismatched')):
        save_file(bad, ade, metadata={'format': 'pt'})
        with pytest.raises(WeightsError, match=text): P.load_segmenter('mask2former')


# ---- check_judge ----

def test_check_judge(ade, monkeypatch, capsys):
    P.check_judge('tiny')
    out = capsys.readouterr().out
    assert out.count('\n') == out.count('tiny: ') == 6 and 'number 0 is sky' in out
    with pytest.raises(UserError, match='known: tiny, vit-b-32, vgg19, lpips, mask2former'):
        P.check_judge('vgg')
    monkeypatch.setattr(P, 'load_perceptual', lambda name, device: real_vgg())
    P.check_judge('vgg19')  # holds for any weights: the file's digest does the rest
    class Asleep:  # the same answer to everything
        def __call__(self, images): return torch.full((len(images), 512), 512**-.5)
        text = __call__
    monkeypatch.setattr(P, 'load_clip', lambda name, device: Asleep())
    with pytest.raises(WeightsError, match='vit-b-32 was loaded, but this does not hold: a drawn photo'):
        P.check_judge('vit-b-32')
    P.check_judge('mask2former')


# ---- teachers ----

CLIP = T.ClipSettings.preset('lesson').but(scenes=32, steps=2, batch=8, crops=4, held_out=4)
SEG = T.SegmenterSettings.preset('lesson').but(scenes=32, steps=2, batch=4, held_out=4)


@pytest.mark.parametrize('train, cfg', [(T.train_clip, CLIP), (T.train_segmenter, SEG)],
                         ids=['clip', 'segmenter'])
def test_training_is_a_function_of_its_seed(train, cfg, tmp_path):
    logs, scores = {n: [] for n in 'abc'}, {}
    for n in 'abc':
        torch.manual_seed(ord(n))  # must not matter, nor be touched
        before = torch.get_rng_state()
        scores[n] = train(tmp_path/f'{n}.safetensors', cfg.but(seed=int(n == 'c')), logs[n].append)
        assert torch.equal(before, torch.get_rng_state())
    a, b, c = (load_file(tmp_path/f'{n}.safetensors') for n in 'abc')
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)
    no_time = lambda log: [{k: v for k, v in h.items() if k != 'seconds'} for h in log]
    assert no_time(logs['a']) == no_time(logs['b']) and [h['step'] for h in logs['a']] == [1, 2]
    about = P.read_header(tmp_path/'a.safetensors')
    assert json.loads(about['scores']) == scores['a'] == scores['b']
    assert type(cfg).from_json(about['settings']) == cfg
    FILES[train.__name__.split('_')[1]](str(tmp_path/'a.safetensors'))             # loads


@pytest.mark.parametrize('train, cfg', [(T.train_clip, CLIP), (T.train_segmenter, SEG)],
                         ids=['clip', 'segmenter'])
def test_killed_training_goes_on(train, cfg, tmp_path, monkeypatch):
    "Four steps are two, a kill in the third, and two more; the caller's random numbers stay."
    monkeypatch.setattr(T, '_KEEP_EVERY', 2)
    four, keep, second = cfg.but(steps=4), tmp_path/'state.safetensors', []
    train(tmp_path/'whole.safetensors', four)
    def killed(log):
        if log['step'] == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(tmp_path/'cut.safetensors', four, killed, keep=keep)
    assert keep.exists() and not (tmp_path/'cut.safetensors').exists()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train(tmp_path/'cut.safetensors', four, second.append, keep=keep)
    assert torch.equal(before, torch.get_rng_state()) and [log['step'] for log in second] == [3, 4]
    train(tmp_path/'cut.safetensors', four, second.append, keep=keep)
    assert len(second) == 2                                    # finished: not one step more
    whole, cut = (load_file(tmp_path/f'{n}.safetensors') for n in ('whole', 'cut'))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


def test_state_of_another_training_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(T, '_KEEP_EVERY', 1)
    keep, steps = tmp_path/'state.safetensors', []
    def killed(log): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): T.train_segmenter(tmp_path/'s.safetensors', SEG, killed, keep=keep)
    with pytest.warns(UserWarning, match='other settings'):
        with pytest.raises(KeyboardInterrupt):
            T.train_segmenter(tmp_path/'s.safetensors', SEG.but(seed=4), killed, keep=keep)
    keep.write_bytes(keep.read_bytes()[:999])
    with pytest.warns(UserWarning, match='begins again'):
        T.train_segmenter(tmp_path/'s.safetensors', SEG, lambda log: steps.append(log['step']), keep=keep)
    assert steps == [1, 2]


def test_too_few_scenes_for_one_step():
    for cls, values in ((T.ClipSettings, dict(scenes=32)), (T.ClipSettings, dict(scenes=55)),
                        (T.SegmenterSettings, dict(scenes=32, batch=33))):
        with pytest.raises(SettingsError, match='scenes = .* too few'): cls(**values)
    assert T.ClipSettings(scenes=56).batch == 48


def test_training_scenes_are_not_held_out():
    for cfg in (T.ClipSettings(), T.SegmenterSettings()): assert cfg.scenes < HELD_OUT
    with pytest.raises(UserError, match='scenes'): T.ClipSettings(scenes=HELD_OUT + 1)


def test_contrast():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(6, 4, generator=g, dtype=torch.float64)
    match = torch.zeros(6, 4, dtype=torch.bool)
    match[torch.arange(6), torch.tensor([0, 1, 2, 3, 0, 2])] = True
    rows = sum(-z[i].log_softmax(0)[match[i]].mean() for i in range(6))/6
    cols = sum(-z[:, j].log_softmax(0)[match[:, j]].mean() for j in range(4))/4
    torch.testing.assert_close(T._contrast(z.float(), match).double(), (rows + cols)/2, atol=1e-6, rtol=1e-6)
    best = torch.where(match, 50., -50.)
    floor = (np.log(2) + 0 + np.log(2) + 0)/4/2  # two captions have two images each
    assert abs(T._contrast(best, match).item() - floor) < 1e-6


def test_pieces_are_crops():
    x = world(1)
    cut = T._pieces(x, torch.tensor([[.25, .5, .25]]))                              # 16 px, enlarged to 64
    want = F.interpolate(x, scale_factor=4, mode='bicubic', align_corners=False)[..., 128:192, 64:128]
    torch.testing.assert_close(cut, want, atol=1e-4, rtol=1e-4)


def test_segmenter_loss_wants_the_truth():
    truth = torch.randint(0, 13, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    truth[truth == 3] = 0
    cls, masks = torch.full((2, 16, 14), -15.), torch.full((2, 16, 8, 8), -15.)
    cls[..., 13] = 15.
    for k in range(13):
        if k == 3: continue
        cls[:, k, 13], cls[:, k, k] = -15., 15.
        masks[:, k] = torch.where(truth == k, 15., -15.)
    perfect = sum(T._segmenter_loss(cls, masks, truth).values())
    assert perfect < 1e-3
    for change in (lambda: cls[:, 3].copy_(cls[:, 2]), lambda: masks[:, 0].neg_()):
        change()
        worse = sum(T._segmenter_loss(cls, masks, truth).values())
        assert worse > perfect + .5


@dataclass(frozen=True)
class Lesson:
    steps: int
    lr: float = .1


@pytest.mark.parametrize('slope', [lambda step: 5., lambda step: 500. if step % 2 else 5.],
                         ids=['even', 'wild'])
def test_teach_goes_down_by_the_scheduled_step_size(slope):
    """A weight whose slope is cut to 1 moves by one step size each time: two steps of rise, then half a
    cosine down to a hundredth."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    place, want = [], [0.]
    def losses(step):
        place.append(net.weight.item())
        return dict(a=slope(step)*net.weight.sum())
    T._teach(net, Lesson(10), losses, torch.Generator())
    for t in range(10):
        size = .1*min((t + 1)/2, .5 + .5*np.cos(np.pi*t/10) + .01)
        want.append(want[-1]*(1 - .02*size) - size)  # a little decay, and the step
    assert place + [net.weight.item()] == pytest.approx(want, abs=1e-4)


def test_factor_rises_for_a_hundred_steps_and_falls_to_a_hundredth():
    assert [T._factor(t, 10_000) for t in (0, 49, 99)] == [.01, .5, 1.]
    assert T._factor(5000, 10_000) == pytest.approx(.51)
    assert T._factor(9999, 10_000) == pytest.approx(.01, abs=1e-6)
    assert T._factor(0, 6) == 1.  # a lesson has no time to rise


def test_squares_lie_anywhere_inside():
    left, top, side = T._squares(3000, lambda u: .2 + .4*u, torch.Generator().manual_seed(0)).numpy().T
    assert left.min() >= 0 and top.min() >= 0 and max((left + side).max(), (top + side).max()) <= 1
    x, y = left/(1 - side), top/(1 - side)  # each anywhere between 0 and 1
    for t in (x, y, side/.4 - .5): assert abs(t.mean() - .5) < .03 and abs(t.std() - 12**-.5) < .02
    assert abs(np.corrcoef([x, y, side]) - np.eye(3)).max() < .06  # and none of them knows another


def test_disturbed_blurs_some_and_tints_all_a_little():
    draw = torch.Generator().manual_seed(0)
    gray = T._disturbed(torch.zeros(600, 3, 4, 4), draw)
    assert (gray == gray[..., :1, :1]).all() and gray.abs().max() <= .05 and abs(gray.mean()) < .003
    assert gray.std() > .025
    board = (torch.arange(10)[:, None] + torch.arange(10)) % 2*2. - 1  # blurred wholly, a ninth of it is left
    seen = T._disturbed(board.expand(600, 3, 10, 10), draw)[:, 0, 4:6, 4:6]
    contrast = (seen.amax((1, 2)) - seen.amin((1, 2)))/2
    blurred = contrast < .85  # lighter or darker is at least .9
    assert .18 < blurred.float().mean() < .32 and contrast[~blurred].min() > .85
    assert contrast.max() <= 1.1 + 1e-6
    assert contrast.min() < .3


def test_scenes_of_all_three_mixes_are_drawn():
    "Sixty-four at a time: any, then what photos tend to show, then what anime does; the seeds go on."
    seen = T._drawn(130, first=1000)
    parts = ((range(1000, 1064), 'any'), (range(1064, 1128), 'photo'), (range(1128, 1130), 'anime'))
    assert seen['text'] == [text for seeds, mix in parts for text in captions(scenes(seeds, mix))]
    assert seen['photo'].shape == seen['anime'].shape == (130, 3, 64, 64)
    last = ((render(scenes([1129], 'anime'), 64, 'photo') + 1)*127.5).round()
    assert (seen['photo'][129] - last[0]).abs().max() <= 1


def test_mirrored_pictures_have_mirrored_labels(tmp_path, monkeypatch):
    """A world in which the color says the class: picture and truth that reach the loss agree in every pixel.
    Layers are averaged."""
    kinds = torch.randint(0, 13, (40, 64, 64), generator=torch.Generator().manual_seed(0))
    picture = (kinds*20)[:, None].expand(-1, 3, -1, -1).byte()
    monkeypatch.setattr(T, '_drawn', lambda *a, **k: dict(photo=picture, anime=picture, labels=kinds.byte()))
    monkeypatch.setattr(T, '_disturbed', lambda x, draw: x)
    monkeypatch.setattr(T, 'segmenter_input', lambda x: x)
    monkeypatch.setattr(T, 'segmenter_scores', lambda *a: {})
    fed, turned, log = [], [], []
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.weight = nn.Parameter(torch.zeros(1))
        def forward(self, pixel_values, output_auxiliary_logits):
            fed.append(((pixel_values[:, 0] + 1)*127.5/20).round().long())
            logits = dict(class_queries_logits=self.weight, masks_queries_logits=None)
            return SimpleNamespace(auxiliary_logits=[logits]*3, **logits)
    def loss(classes, masks, truth):
        assert torch.equal(truth, fed[-1])
        # no scene as it was drawn
        turned.extend((t[None] != kinds).flatten(1).any(1).all().item() for t in truth)
        return dict(kind=classes.sum() + 2)
    monkeypatch.setattr(T, 'tiny_segmenter_net', Net)
    monkeypatch.setattr(T, '_segmenter_loss', loss)
    T.train_segmenter(tmp_path/'s.safetensors', SEG.but(steps=5, batch=6, scenes=40, lr=0.), log.append)
    assert .2 < np.mean(turned) < .8 and len(fed) == 5 and {h['kind'] for h in log} == {2.}
