"Measuring: against NumPy, SciPy and pytorch-fid, on folders that are wrong in every way we know, and from the command line."
import json
import math
import pickle
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from scenimefy import evaluate
from scenimefy.cli import app
from scenimefy.core import SettingsError, UserError, to_image
from scenimefy.evaluate import (KEEP, Features, Moments, Summary, compare_folders, confidence, factor, factor_distance,
                                feature_distance, frechet_distance, halves, jackknife, kernel_distance, kid, load_features,
                                measure, measure_pairs, moments, preflight, raft_flow, read_summary, summarize, survey, table_row,
                                warning_for, warp, warping_error)
from scenimefy.world import HELD_OUT, render


def cloud(n, d, seed, shift=0.):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) @ torch.diag(torch.arange(1., d + 1).double()) + shift


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Thirty scenes as photo and as anime, and other anime scenes as the reference."
    root = tmp_path_factory.mktemp('measured')
    for name, style, first in (('photos', 'photo', 0), ('anime', 'anime', 0), ('reference', 'anime', 500)):
        (root/name).mkdir()
        for i, x in enumerate(render(range(HELD_OUT + first, HELD_OUT + first + 30), 64, style)):
            to_image(x).save(root/name/f'{i:02d}.png')
    return root


@pytest.fixture
def spoiled(folders, tmp_path): return shutil.copytree(folders/'anime', tmp_path/'spoiled')


# --- arithmetic ------------------------------------------------------------------------------------

@pytest.mark.parametrize('cuts', [(1,), (2, 3, 50), tuple(range(1, 90))], ids=len)
def test_streamed_moments_are_numpys(cuts):
    x = cloud(90, 5, 1, shift=1e4)                        # far from 0: a sum of squares would lose the variance
    streamed, parts = Moments(5), [p for p in x.tensor_split(cuts) if len(p)]
    for part in parts: streamed.add(part)
    np.testing.assert_allclose(streamed.mean, np.mean(x.numpy(), 0), rtol=1e-12)
    np.testing.assert_allclose(streamed.cov, np.cov(x.numpy(), rowvar=False), rtol=1e-8, atol=1e-9)
    halves = [Moments(5).add(h) for h in x.flip(0).chunk(2)]
    merged = halves[0].merge(halves[1]).merge(Moments(5))
    assert merged.n == 90 and torch.allclose(merged.cov, streamed.cov, rtol=1e-10)


def test_frechet_against_scipy():
    linalg = pytest.importorskip('scipy.linalg')
    a, b = cloud(60, 6, 2), cloud(50, 6, 3, shift=.5)
    (m1, c1), (m2, c2) = moments(a), moments(b)
    root = np.real(linalg.sqrtm(c1.numpy() @ c2.numpy()))
    expected = ((m1 - m2)**2).sum().item() + np.trace(c1.numpy() + c2.numpy() - 2*root)
    assert math.isclose(frechet_distance(m1, c1, m2, c2), expected, rel_tol=1e-8)
    assert math.isclose(factor_distance(*factor(a), *factor(b)), expected, rel_tol=1e-8)


@pytest.mark.parametrize('n,d', [(8, 20), (200, 3)])
def test_frechet_limits(n, d):
    a = cloud(n, d, 4)
    assert feature_distance(a, a) < 1e-6*a.square().sum()
    shift = torch.arange(d).double()
    assert math.isclose(feature_distance(a, a + shift), shift.square().sum().item(), rel_tol=1e-5)   # the same shape, elsewhere
    turn = torch.linalg.qr(cloud(d, d, 5))[0]
    b = cloud(n, d, 6, shift=1.)
    assert math.isclose(feature_distance(a @ turn, b @ turn), feature_distance(a, b), rel_tol=1e-6)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_broken_network_is_not_perfect(bad):
    "max(0, nan) is 0 in Python: such a distance would be the best of all."
    (m, c), (_, x) = moments(cloud(20, 3, 1)), factor(cloud(20, 3, 1))
    worse = m.clone(); worse[1] = bad
    for mean, cov in ((worse, c), (m, c*bad)):
        for args in ((mean, cov, m, c), (m, c, mean, cov)):
            with pytest.raises(ValueError, match='NaN'): frechet_distance(*args)
            with pytest.raises(ValueError, match='NaN'): factor_distance(*args)


@pytest.mark.parametrize('n,d', [(5, 9), (9, 9), (10, 9), (4000, 9), (2, 1)])
def test_factor_gives_the_covariance(n, d):
    x = cloud(n, d, 8)
    mean, r = factor(x)
    assert r.shape == (min(n, d), d)
    torch.testing.assert_close(r.T @ r, moments(x)[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mean, moments(x)[0])


@pytest.mark.parametrize('groups', [2, 7, 84])
def test_jackknife_is_exact_for_a_mean(groups):
    x = cloud(84, 1, 3, shift=2.)
    exact = x.view(-1, groups).mean(0).var().item()/groups
    bias, variance = jackknife(lambda t: t.mean().item(), x, groups)
    assert abs(bias) < 1e-12 and math.isclose(variance, exact, rel_tol=1e-9)
    assert math.isclose(jackknife(lambda t: t.mean().item()**2, x, groups)[0], exact, rel_tol=1e-9)
    for wrong in (1, 85):
        with pytest.raises(ValueError, match='groups'): jackknife(len, x, wrong)


def test_kid_is_unbiased():
    "Two samples of one cloud: the mean over many draws is 0, which a biased estimate never is."
    found = [kernel_distance(cloud(12, 3, s)/3, cloud(12, 3, 1000 + s)/3) for s in range(400)]
    mean, error = np.mean(found), np.std(found)/20
    assert abs(mean) < 3*error
    assert min(found) < 0
    assert math.isnan(kid(cloud(5, 2, 1), cloud(5, 2, 2))[1])


def test_error_of_kid_shrinks_with_the_number_of_blocks():
    "Two blocks: the mean of their estimates, and half their difference; the deviation alone would be 1.4 times that."
    x, y = cloud(40, 3, 1)/3, cloud(40, 3, 2, shift=.5)/3
    one, two = kernel_distance(x[:20], y[:20]), kernel_distance(x[20:], y[20:])
    mean, error = kid(x, y, block=20)
    assert mean == pytest.approx((one + two)/2) and error == pytest.approx(abs(one - two)/2)


def test_halves_are_two():
    "The second half is the first, 3 and 4 further: the distance is 9 + 16, not the 0 of a half to itself."
    a = cloud(20, 2, 1)
    both = torch.cat([a, a + torch.tensor([3., 4.])]).float()
    found = halves(Summary(40, *moments(both), both, {}))
    assert found['n'] == 20 and found['distance'] == pytest.approx(25, rel=1e-4) and found['kid'] > .1


def test_interval_covers_the_truth():
    "Gaussian clouds a known distance apart: most intervals of 95 % hold it."
    held = 0
    for s in range(40):
        c = confidence(torch.randn(120, 3, generator=torch.Generator().manual_seed(s), dtype=torch.float64),
                       torch.randn(120, 3, generator=torch.Generator().manual_seed(900 + s), dtype=torch.float64) + 1.)
        held += c['low'] <= 3. <= c['high']
    assert held >= 33
    assert warning_for(30, 5000, 64) and warning_for(3000, 3000, 64) == ''


def test_too_few_points_have_a_spread_and_no_interval():
    few = confidence(cloud(39, 20, 1), cloud(50, 20, 2))
    assert few['corrected'] is few['low'] is few['high'] is None and few['spread'] > 0
    known = confidence(cloud(40, 20, 1), cloud(50, 20, 2))
    assert math.isclose(known['high'] - known['low'], 2*known['spread'])
    assert set(confidence(cloud(3, 20, 1), cloud(50, 20, 2)).values()) == {None}
    assert 'only the spread' in warning_for(39, 50, 20) and 'only the spread' not in warning_for(40, 50, 20)
    assert KEEP > 6605 and KEEP >= 2*2048          # the paper's sets can be corrected


def test_warping():
    g = torch.Generator().manual_seed(7)
    wide = torch.rand(1, 3, 24, 40, generator=g)*2 - 1
    clip = torch.cat([wide[..., t:t + 24] for t in range(5)])                # the camera moves one pixel a frame
    flow = torch.zeros(4, 2, 24, 24); flow[:, 0] = -1.                       # what was at x is now at x - 1
    assert warping_error(clip, flow) < 1e-10
    assert warping_error(clip, torch.zeros_like(flow)) > .05
    flicker = (clip + torch.tensor([0., .2, 0., .2, 0.]).view(5, 1, 1, 1)).clamp(-1, 1)
    assert .005 < warping_error(flicker, flow) <= .01 + 1e-6                 # .2 of 2 is .1; squared .01; less where clipped
    still, inside = warp(clip[:1], torch.zeros(1, 2, 24, 24))
    assert torch.allclose(still, clip[:1], atol=1e-5) and inside.all()


def test_a_long_clip_is_judged_a_step_at_a_time():
    clip, widest = torch.rand(6, 3, 16, 16)*2 - 1, []
    def flow(a, b):
        widest.append(len(a) + len(b))
        return torch.zeros(len(a), 2, 16, 16)
    assert warping_error(clip, flow) == pytest.approx(warping_error(clip, torch.zeros(5, 2, 16, 16)), rel=1e-6)
    assert warping_error(clip, flow) == pytest.approx(((clip[1:] - clip[:-1])/2).square().mean().item(), rel=1e-5)
    assert set(widest) == {2}
    for bad, why in (((clip[:1], flow), 'at least 2'), ((clip*9, flow), r'\[-1,1\]'), ((clip, torch.zeros(4, 2, 16, 16)), 'needs'),
                     ((clip, flow, clip[:3]), 'photos')):
        with pytest.raises(ValueError, match=why): warping_error(*bad)


def test_raft_is_wired_to_the_flow(tmp_path, monkeypatch):
    "Random weights: the last and finest flow comes back, and it is the network's own."
    import scenimefy.evaluate as e
    from torchvision.models.optical_flow import raft_small
    torch.manual_seed(0)
    net = raft_small().eval()
    torch.save(net.state_dict(), tmp_path/'raft.pth')
    monkeypatch.setattr(e, 'from_web', lambda url, digest: tmp_path/'raft.pth' if digest in url else pytest.fail('the digest is not in the name'))
    a, b = torch.rand(2, 1, 3, 128, 128, generator=torch.Generator().manual_seed(1))*2 - 1
    with torch.no_grad(): expected = net(a, b)[-1]
    torch.testing.assert_close(raft_flow()(a, b), expected)
    assert expected.shape == (1, 2, 128, 128)


# --- pytorch-fid -----------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def inception_file(tmp_path_factory):
    "Random weights in the layout of pytorch-fid's file."
    from pytorch_fid import inception
    path, made, load = tmp_path_factory.mktemp('inception')/'random.pth', [], torch.nn.Module.load_state_dict
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:                # it would download: hand it nothing, and keep its network
        patch.setattr(inception, 'load_state_dict_from_url', lambda *a, **k: {})
        patch.setattr(torch.nn.Module, 'load_state_dict',
                      lambda self, state, *a, **k: load(self, state, *a, **k) if state else made.append(self))
        inception.fid_inception_v3()
    torch.save(made[0].state_dict(), path)
    return path


def test_equals_pytorch_fid(folders, inception_file, monkeypatch):
    from pytorch_fid import inception
    from pytorch_fid.fid_score import calculate_activation_statistics
    monkeypatch.setattr(inception, 'load_state_dict_from_url', lambda *a, **k: torch.load(inception_file, weights_only=True))
    theirs = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[64]]).eval()
    ours = load_features(str(inception_file), dims=64)
    stats, mine = [], []
    for name in ('anime', 'reference'):
        files = sorted((folders/name).glob('*.png'))[:6]
        stats += calculate_activation_statistics([str(f) for f in files], theirs, 4, 64, 'cpu', 0)
        s = survey(name, folders/name)
        s.files = {f.stem: f for f in files}
        mine.append(summarize(ours, s))
    expected = frechet_distance(*stats)
    assert expected > 1e-6
    assert math.isclose(frechet_distance(mine[0].mean, mine[0].cov, mine[1].mean, mine[1].cov), expected, rel_tol=1e-3)
    np.testing.assert_allclose(mine[0].mean, stats[0], rtol=1e-4, atol=1e-6)
    assert ours.measure != 'FID' and 'random.pth' in ours.measure               # random weights give no FID


def test_a_pickle_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self): return (open, (str(tmp_path/'ran'), 'w'))
    (tmp_path/'evil.pth').write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(Exception): load_features(str(tmp_path/'evil.pth'))
    assert not (tmp_path/'ran').exists()


# --- folders ---------------------------------------------------------------------------------------

def test_everything_wrong_is_said_at_once(folders, spoiled):
    (spoiled/'03.png').write_bytes(b'not a picture')
    (spoiled/'04.png').unlink()
    Image.new('RGB', (48, 64)).save(spoiled/'05.png')
    Image.new('RGB', (64, 64)).save(spoiled/'06.jpg')                          # a second 06
    a, b = survey('photos', folders/'photos'), survey('CUT', spoiled)
    with pytest.raises(UserError) as error: preflight([a, b], [(a, b)])
    for part in ('03.png', '04', '48×64', '06', 'nothing was measured'): assert part in str(error.value), part
    assert '\n' not in str(error.value)


def test_no_network_is_loaded_for_a_broken_folder(folders, spoiled, monkeypatch):
    import scenimefy.evaluate as e
    monkeypatch.setattr(e, 'load_features', lambda *a: pytest.fail('a network was loaded'))
    (spoiled/'07.png').write_bytes(b'')
    with pytest.raises(UserError, match='07.png'): compare_folders({'CUT': spoiled}, folders/'reference', features='tiny')
    with pytest.raises(UserError, match='no such folder'): compare_folders({'CUT': folders/'none'}, folders/'reference', features='tiny')
    good, file = {'CUT': folders/'anime'}, folders/'anime'/'00.png'
    for out, why in ((file, 'a file'), (folders/'anime', 'folder of pictures'), (folders/'reference', 'folder of pictures')):
        with pytest.raises(UserError, match=why): compare_folders(good, folders/'reference', features='tiny', out=out)
    with pytest.raises(SettingsError, match='inputs'): compare_folders({'photos': folders/'anime'}, folders/'reference', features='tiny')
    with pytest.raises(SettingsError, match='no folder'): compare_folders({}, folders/'reference', features='tiny')
    monkeypatch.setattr(e, 'survey', lambda *a: pytest.fail('a folder was read'))
    with pytest.raises(UserError, match='known: inception, tiny'): compare_folders(good, folders/'reference', features='tinny')
    with pytest.raises(UserError, match='no such file'): compare_folders(good, folders/'none.safetensors', features='tiny')


def test_features_that_are_not_finite_name_the_picture(folders):
    broken = Features(lambda x: torch.stack([x.mean((1, 2, 3)), (x.mean((1, 2, 3)) - one).abs().log()], 1), 'odd', 2, '')
    one = torch.tensor(0.)
    files = survey('anime', folders/'anime')
    summarize(broken, files)
    from scenimefy.core import to_model
    from scenimefy.data import read_image
    one = to_model([read_image(folders/'anime'/'17.png')]).mean((1, 2, 3))      # the log of 0
    with pytest.raises(UserError, match='17.png: its odd features'): summarize(broken, files)


def test_vectors_are_kept_in_random_order(folders, monkeypatch):
    "Each picture's once; the first of them are a sample of the folder and not its beginning, however many are kept."
    import scenimefy.evaluate as e
    from scenimefy.core import to_model
    from scenimefy.data import read_image
    mean, s = Features(lambda x: x.mean((2, 3)), 'mean', 3, ''), survey('anime', folders/'anime')
    files = torch.cat([to_model([read_image(f)]).mean((2, 3)) for f in s.files.values()])
    whole = summarize(mean, s).kept
    place = (whole[:, None] - files).abs().amax(2).argmin(1)                   # which picture each vector is of
    torch.testing.assert_close(whole, files[place])
    assert sorted(place.tolist()) == list(range(30)) and place.tolist() != list(range(30))
    assert abs(place[:15].float().mean() - 14.5) < 5                           # the first half is not the folder's first half
    monkeypatch.setattr(e, 'KEEP', 7)
    few = summarize(mean, s)
    assert torch.equal(few.kept, whole[:7]) and few.n == 30


def test_pairs_are_judged_by_the_labels_of_the_photo(tmp_path):
    "Two classes by hand: the photo is a little more sky than grass everywhere; the anime is clearly grass on its left."
    class Told(torch.nn.Module):
        "Red says how sure of sky, green how sure of grass."
        def __init__(self): super().__init__(); self.unused = torch.nn.Parameter(torch.zeros(1))
        def forward(self, x, check=True): return torch.eye(2, 3).mul(40).sub(20).expand(len(x), -1, -1), ((x + 1)/2)[:, :2].logit()
    for name in ('photos', 'anime'): (tmp_path/name).mkdir()
    anime = Image.new('RGB', (32, 32), (204, 51, 0))                             # sky .8, grass .2
    anime.paste((51, 204, 0), (0, 0, 16, 32))
    for i in range(2):
        Image.new('RGB', (32, 32), (153, 102, 0)).save(tmp_path/'photos'/f'{i}.png')   # sky .6, grass .4
        anime.save(tmp_path/'anime'/f'{i}.png')
    far = lambda made, photo: (made - photo).abs().mean((1, 2, 3))
    got = measure_pairs(survey('ours', tmp_path/'anime'), survey('photos', tmp_path/'photos'), Told(), far)
    assert got['lbce'] == pytest.approx((math.log(1 + math.exp(.6)) + math.log(1 + math.exp(-.6)))/2, abs=1e-4)
    assert got['nll'] == pytest.approx(-(math.log(.2) + math.log(.8))/2, abs=1e-4) and got['agreement'] == .5
    assert got['perceptual'] == pytest.approx(2*((102 + 102) + (51 + 51))/255/6, abs=1e-5)


def test_photos_without_partner_or_of_odd_size_are_found_first(folders, tmp_path, monkeypatch):
    "Only a comparison with photos needs partners, and sides that the segmenter takes."
    import scenimefy.evaluate as e
    def loaded(*a): raise KeyError('all is well so far')
    monkeypatch.setattr(e, 'load_features', loaded)
    fewer = shutil.copytree(folders/'photos', tmp_path/'fewer')
    (fewer/'04.png').unlink()
    with pytest.raises(UserError, match='1 pictures of ours have no partner in photos: 04'):
        compare_folders({'ours': folders/'anime'}, folders/'reference', fewer, 'tiny')
    for name in ('photos', 'anime', 'reference'):
        (tmp_path/'odd'/name).mkdir(parents=True)
        for f in (folders/name).glob('0*.png'): Image.open(f).resize((48, 64)).save(tmp_path/'odd'/name/f.name)
    odd = {'ours': tmp_path/'odd'/'anime'}, tmp_path/'odd'/'reference'
    with pytest.raises(UserError, match='multiples of 32, and these are not: 48×64'): compare_folders(*odd, tmp_path/'odd'/'photos', 'tiny')
    with pytest.raises(KeyError, match='so far'): compare_folders(*odd, features='tiny')


def test_report(folders, tmp_path):
    report = compare_folders({'ours': folders/'anime', 'identity': folders/'photos'}, folders/'reference', folders/'photos', 'tiny', tmp_path)
    m = report['methods']
    assert m['identity']['distance'] == pytest.approx(m['photos']['distance'], rel=1e-9)
    assert m['identity']['perceptual'] == pytest.approx(0, abs=1e-6) and m['ours']['perceptual'] > .1
    assert m['identity']['agreement'] == 1. and report['measure'] == 'tiny Fréchet distance'
    kept = json.loads((tmp_path/'metrics.json').read_text())
    assert kept['methods']['ours']['distance'] == m['ours']['distance'] and len(kept['methods']['ours']['files']) == 30
    assert 'http' not in (tmp_path/'index.html').read_text().replace('http-equiv', '')
    assert table_row('cartoon-gan') == 'CartoonGAN' and table_row('Scenimefy') == 'Ours' and table_row('photos') == ''
    assert kept['protocol']['formats'] == {k: {'png': 30} for k in ('photos', 'ours', 'identity', 'reference')}
    assert kept['floor']['n'] == 15 and [n for n, _ in kept['methods']['ours']['by_size']] == [7, 15, 22, 30]
    assert 'By size' in (tmp_path/'index.html').read_text() and 'reference, two halves' in (tmp_path/'index.html').read_text()


def test_jpeg_against_png_is_said(folders, tmp_path):
    (tmp_path/'jpeg').mkdir()
    for f in (folders/'anime').glob('*.png'): Image.open(f).save(tmp_path/'jpeg'/f'{f.stem}.JPEG', quality=75)
    report = compare_folders({'ours': tmp_path/'jpeg'}, folders/'reference', features='tiny', out=tmp_path/'r')
    assert 'jpg against png' in report['methods']['ours']['warning'] and 'jpg against png' in (tmp_path/'r'/'index.html').read_text()
    again = compare_folders({'ours': tmp_path/'jpeg'}, tmp_path/'r'/'reference.safetensors', features='tiny')   # the file knows, too
    assert 'jpg against png' in again['methods']['ours']['warning']


def test_statistics_are_checked(folders, tmp_path, monkeypatch):
    import scenimefy.evaluate as e
    compare_folders({'ours': folders/'anime'}, folders/'reference', features='tiny', out=tmp_path)
    good, tiny = tmp_path/'reference.safetensors', load_features('tiny')
    assert read_summary(good, tiny).n == 30
    with safe_open(good, 'pt') as f: tensors, about = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    other = json.loads(about['about']) | dict(weights='0'*64)
    for name, t, meta in (('net', tensors, dict(about=json.dumps(other))), ('nan', tensors | dict(cov=tensors['cov']*math.nan), about),
                          ('kept', tensors | dict(kept=tensors['kept']*math.nan), about),
                          ('sizes', tensors, dict(about=json.dumps(json.loads(about['about']) | dict(sizes={'64 by 64': 30})))),
                          ('bare', tensors, None), ('part', {'mean': tensors['mean']}, about)):
        save_file(t, tmp_path/f'{name}.safetensors', meta)
        with pytest.raises(UserError, match=name): read_summary(tmp_path/f'{name}.safetensors', tiny)
    with pytest.raises(UserError, match='weights 00000000'): compare_folders({'ours': folders/'anime'}, tmp_path/'net.safetensors', features='tiny')
    small = tmp_path/'small'; small.mkdir()
    for f in (folders/'anime').glob('*.png'): Image.open(f).resize((32, 32)).save(small/f.name)
    monkeypatch.setattr(e, 'load_features', lambda *a: pytest.fail('a network was loaded'))
    with pytest.raises(UserError, match='mixed sizes: 32×32 in ours .*64×64 in reference'): compare_folders({'ours': small}, good, features='tiny')
    (tmp_path/'torn.safetensors').write_bytes(good.read_bytes()[:200])
    with pytest.raises(UserError): read_summary(tmp_path/'torn.safetensors', tiny)


# --- command line ----------------------------------------------------------------------------------

def run(*args): return CliRunner().invoke(app, list(map(str, args)))


def test_commands(folders, tmp_path):
    done = run('compare', folders/'reference', f'Scenimefy={folders/"anime"}', '--features', 'tiny', '-o', tmp_path/'r')
    assert done.exit_code == 0 and '48.922' in done.output and 'tiny Fréchet distance' in done.output
    again = run('evaluate', folders/'anime', tmp_path/'r'/'reference.safetensors', '--features', 'tiny')
    assert again.exit_code == 0 and again.output.splitlines()[1].split()[1] in done.output
    both = run('evaluate', folders/'photos', folders/'reference', '--photos', folders/'photos', '--features', 'tiny')
    assert both.exit_code == 0 and [l.split()[0] for l in both.output.splitlines()[1:3]] == ['photos', 'generated'] and '121.807' not in both.output.splitlines()[1]


@pytest.mark.parametrize('args,status', [(('ours',), 2), (('=x',), 2), (('a=x', 'a=y'), 2), (('photos=x',), 2), (('a=/nowhere',), 1)], ids=str)
def test_compare_refuses(folders, tmp_path, args, status):
    done = run('compare', folders/'reference', *args, '--features', 'tiny', '-o', tmp_path/'r')
    assert done.exit_code == status and not (tmp_path/'r').exists()


# --- other people's statistics, one size for all, names ------------------------------------------------

def test_statistics_of_pytorch_fid(folders, tmp_path):
    "mu and sigma in an .npz: read where the features are the same, refused with the reason where they are not."
    net = Features(lambda x: x.flatten(1)[:, :12], 'inception (test)', 12, 'abc')
    ref, mine = (summarize(net, survey('s', folders/name)) for name in ('reference', 'anime'))
    np.savez(tmp_path/'stats.npz', mu=ref.mean.numpy(), sigma=ref.cov.numpy())
    taken = read_summary(tmp_path/'stats.npz', net)
    found = measure(mine, taken)
    assert math.isclose(found['distance'], frechet_distance(mine.mean, mine.cov, ref.mean, ref.cov), rel_tol=1e-9)
    assert found['kid'] is None and found['n_reference'] is None and found['by_size'] == [] and 'statistics alone' in found['warning']
    with pytest.raises(UserError, match='12 features of Inception; now it is tiny'): read_summary(tmp_path/'stats.npz', load_features('tiny'))
    for content, words in ((dict(mu=np.zeros(3)), 'mu and sigma'), (dict(mu=np.zeros(3), sigma=np.eye(4)), 'damaged'),
                           (dict(mu=np.full(3, np.nan), sigma=np.eye(3)), 'damaged'), (dict(mu=np.array([{}]), sigma=np.eye(1)), 'pytorch-fid')):
        np.savez(tmp_path/'bad.npz', **content)
        with pytest.raises(UserError, match=words): read_summary(tmp_path/'bad.npz')
    (tmp_path/'text.npz').write_text('no archive')
    with pytest.raises(UserError, match='pytorch-fid'): read_summary(tmp_path/'text.npz')


def test_a_report_on_statistics_alone(folders, tmp_path, monkeypatch):
    net = Features(lambda x: x.flatten(1)[:, :12], 'inception (test)', 12, 'abc')
    monkeypatch.setattr(evaluate, 'load_features', lambda *_: net)
    ref = summarize(net, survey('s', folders/'reference'))
    np.savez(tmp_path/'stats.npz', mu=ref.mean.numpy(), sigma=ref.cov.numpy())
    report = compare_folders({'ours': folders/'anime'}, tmp_path/'stats.npz', out=tmp_path/'out', device='cpu')
    head, (row, *_) = evaluate.comparison_rows(report)
    assert row[head.index('KID ↓')] == '–' and (tmp_path/'out'/'index.html').exists()


def test_mixed_sizes_become_one(folders, spoiled, tmp_path):
    "Refused without `resize`; with it, every picture is squeezed by Pillow's bicubic filter, and the report says so."
    odd = next(spoiled.iterdir())
    Image.open(odd).resize((80, 48)).save(odd)
    words = ['evaluate', spoiled, folders/'reference', '--features', 'tiny', '-o', tmp_path/'out']
    refused = CliRunner().invoke(app, [str(w) for w in words])
    assert refused.exit_code == 1 and '--resize' in refused.output
    assert CliRunner().invoke(app, [str(w) for w in [*words, '--resize', '32']]).exit_code == 0
    report = json.loads((tmp_path/'out'/'metrics.json').read_text())
    assert '32×32' in report['protocol']['resize']
    small = tmp_path/'small'
    for name, folder in (('anime', spoiled), ('reference', folders/'reference')):
        (small/name).mkdir(parents=True)
        for f in folder.iterdir(): Image.open(f).convert('RGB').resize((32, 32), Image.Resampling.BICUBIC).save(small/name/f.name)
    by_hand = compare_folders({'x': small/'anime'}, small/'reference', features='tiny', device='cpu')['methods']['x']['distance']
    (name, found), = report['methods'].items()
    assert math.isclose(found['distance'], by_hand, rel_tol=1e-6)
    saved = tmp_path/'out'/'reference.safetensors'
    with pytest.raises(UserError, match='taken with resize 32'): compare_folders({'x': folders/'anime'}, saved, features='tiny', device='cpu')


def test_partners_in_other_unicode_forms(folders, tmp_path):
    for name, form in (('a', 'NFC'), ('b', 'NFD')):
        (tmp_path/name).mkdir()
        for i in range(2): shutil.copy(folders/'anime'/'00.png', tmp_path/name/unicodedata.normalize(form, f'é{i}.png'))
    a, b = survey('a', tmp_path/'a'), survey('b', tmp_path/'b')
    assert a.files.keys() == b.files.keys()
    preflight([a, b], [(a, b)])


def test_an_interval_shows_its_progress(capsys):
    a, b = cloud(30, 2, 1).float(), cloud(30, 2, 2).float()
    assert confidence(a, b, progress=True) == confidence(a, b)
    assert '23/23' in capsys.readouterr().err
