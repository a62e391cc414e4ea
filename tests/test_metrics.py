"Distances of vectors, against NumPy, SciPy, torchmetrics and numbers by hand; flicker."
import math

import numpy as np
import pytest
import torch

import scenimefy.metrics as metrics
from scenimefy.metrics import (Moments, confidence, factor_distance, factored, feature_distance,
                               frechet_distance, jackknife, kernel_distance, kid, raft_flow, warp,
                               warping_error)


def normal(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cloud(n, d, seed, shift=0.):
    return normal(n, d, seed) @ torch.diag(torch.arange(1., d + 1).double()) + shift


def moments(x): # of NumPy
    return torch.from_numpy(np.mean(x.numpy(), 0)), torch.from_numpy(np.atleast_2d(np.cov(x.numpy().T)))


@pytest.mark.parametrize('cuts', [(1,), (2, 3, 50), tuple(range(1, 90))], ids=len)
def test_streamed_moments_are_numpys(cuts):
    x = cloud(90, 5, 1, shift=1e4)                     # far from 0: a sum of squares would lose the variance
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
    assert math.isclose(factor_distance(*factored(a), *factored(b)), expected, rel_tol=1e-8)


@pytest.mark.parametrize('n,d', [(8, 20), (200, 3)])
def test_frechet_limits(n, d):
    a = cloud(n, d, 4)
    assert feature_distance(a, a) < 1e-6*a.square().sum()
    shift = torch.arange(d).double()                   # the same shape, elsewhere
    assert math.isclose(feature_distance(a, a + shift), shift.square().sum().item(), rel_tol=1e-5)
    turn = torch.linalg.qr(cloud(d, d, 5))[0]
    b = cloud(n, d, 6, shift=1.)
    assert math.isclose(feature_distance(a @ turn, b @ turn), feature_distance(a, b), rel_tol=1e-6)


def test_points_give_more_digits_than_covariances_where_points_are_few():
    "A set against itself, moved by 1e-3: with few points, roots of zeros spoil the way over covariances."
    a = cloud(6, 40, 1)
    b = a.clone()
    b[:, 0] += 1e-3
    from_points, from_moments = feature_distance(a, b), frechet_distance(*moments(a), *moments(b))
    assert abs(from_points - 1e-6) < 1e-10 < abs(from_moments - 1e-6)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_broken_network_is_not_perfect(bad):
    "max(0, nan) is 0 in Python: such a distance would be the best of all."
    (m, c), (_, x) = moments(cloud(20, 3, 1)), factored(cloud(20, 3, 1))
    worse = m.clone()
    worse[1] = bad
    for mean, cov in ((worse, c), (m, c*bad)):
        for args in ((mean, cov, m, c), (m, c, mean, cov)):
            with pytest.raises(ValueError, match='NaN'): frechet_distance(*args)
            with pytest.raises(ValueError, match='NaN'): factor_distance(*args)


@pytest.mark.parametrize('n,d', [(5, 9), (9, 9), (10, 9), (4000, 9), (2, 1)])
def test_factor_gives_the_covariance(n, d):
    x = cloud(n, d, 8)
    mean, r = factored(x)
    assert r.shape == (min(n, d), d)
    torch.testing.assert_close(r.T @ r, moments(x)[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mean, moments(x)[0])


@pytest.mark.parametrize('shape', [(1, 3), (0, 3), (5,)], ids=str)
def test_a_covariance_needs_two_points(shape):
    with pytest.raises(ValueError, match='at least 2'): factored(torch.zeros(shape))
    with pytest.raises(ValueError, match='at least 2'): Moments(3).add(torch.zeros(1, 3)).cov


# --- torchmetrics, which has the same two distances -----------------------------------------------------

class Given(torch.nn.Identity):
    "Takes vectors for pictures."
    def __init__(self, d): super().__init__(); self.num_features = d


def theirs(metric, a, b):
    metric.update(a, real=True)
    metric.update(b, real=False)
    return metric.compute()


@pytest.mark.parametrize('n,m,d', [(300, 200, 8), (40, 30, 12)])
def test_frechet_against_torchmetrics(n, m, d):
    fid = pytest.importorskip('torchmetrics.image.fid')
    a, b = cloud(n, d, 1), cloud(m, d, 2, shift=.5)
    expected = theirs(fid.FrechetInceptionDistance(feature=Given(d)), a, b).item()
    one, other = Moments(d).add(a), Moments(d).add(b)
    assert feature_distance(a, b) == pytest.approx(expected, rel=1e-7) and expected > 1
    assert frechet_distance(one.mean, one.cov, other.mean, other.cov) == pytest.approx(expected, rel=1e-7)


@pytest.mark.filterwarnings('ignore:Metric `Kernel Inception Distance`')
@pytest.mark.parametrize('shift', [0., 1.])
def test_kid_against_torchmetrics(shift):
    "One subset of all points, the cubic kernel: the polynomial MMD without its diagonal."
    kernel = pytest.importorskip('torchmetrics.image.kid')
    a, b = cloud(50, 6, 1)/6, cloud(50, 6, 2, shift=shift)/6
    metric = kernel.KernelInceptionDistance(feature=Given(6), subsets=1, subset_size=50)
    mean, _ = theirs(metric, a, b)
    assert kernel_distance(a, b) == pytest.approx(mean.item(), rel=1e-6, abs=1e-9)
    assert kid(a, b)[0] == pytest.approx(mean.item(), rel=1e-6, abs=1e-9)


# --- how far to trust a value ---------------------------------------------------------------------------

def mean_of(x): return x.mean().item()
def square_of_mean(x): return x.mean().item()**2


@pytest.mark.parametrize('groups', [2, 7, 84])
def test_jackknife_is_exact_for_a_mean(groups):
    x = cloud(84, 1, 3, shift=2.)
    exact = x.view(-1, groups).mean(0).var().item()/groups
    bias, variance = jackknife(mean_of, x, groups)
    assert abs(bias) < 1e-12 and math.isclose(variance, exact, rel_tol=1e-9)
    assert math.isclose(jackknife(square_of_mean, x, groups)[0], exact, rel_tol=1e-9)
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
    "Two blocks: the mean of their estimates, and half their difference; the deviation alone is 1.4 of that."
    x, y = cloud(40, 3, 1)/3, cloud(40, 3, 2, shift=.5)/3
    one, two = kernel_distance(x[:20], y[:20]), kernel_distance(x[20:], y[20:])
    mean, error = kid(x, y, block=20)
    assert mean == pytest.approx((one + two)/2) and error == pytest.approx(abs(one - two)/2)


def test_interval_covers_the_truth():
    "Gaussian clouds a known distance apart: most intervals of 95 % hold it."
    held = 0
    for s in range(40):
        c = confidence(normal(120, 3, s), normal(120, 3, 900 + s) + 1.)
        held += c['low'] <= 3. <= c['high']
    assert held >= 33


def test_too_few_points_have_a_spread_and_no_interval():
    few = confidence(cloud(39, 20, 1), cloud(50, 20, 2))
    assert few['corrected'] is few['low'] is few['high'] is None and few['spread'] > 0
    known = confidence(cloud(40, 20, 1), cloud(50, 20, 2))
    assert math.isclose(known['high'] - known['low'], 2*known['spread'])
    assert set(confidence(cloud(3, 20, 1), cloud(50, 20, 2)).values()) == {None}


def test_an_interval_shows_its_progress(capsys):
    a, b = cloud(30, 2, 1).float(), cloud(30, 2, 2).float()
    assert confidence(a, b, progress=True) == confidence(a, b)
    assert '23/23' in capsys.readouterr().err


# --- flicker --------------------------------------------------------------------------------------------

def test_warping():
    g = torch.Generator().manual_seed(7)
    wide = torch.rand(1, 3, 24, 40, generator=g)*2 - 1
    clip = torch.cat([wide[..., t:t + 24] for t in range(5)])            # the camera moves one pixel a frame
    flow = torch.zeros(4, 2, 24, 24)
    flow[:, 0] = -1.                                                     # what was at x is now at x - 1
    assert warping_error(clip, flow) < 1e-10
    assert warping_error(clip, torch.zeros_like(flow)) > .05
    flicker = (clip + torch.tensor([0., .2, 0., .2, 0.]).view(5, 1, 1, 1)).clamp(-1, 1)
    assert .005 < warping_error(flicker, flow) <= .01 + 1e-6     # .2 of 2 is .1; squared .01, less if clipped
    still, inside = warp(clip[:1], torch.zeros(1, 2, 24, 24))
    assert torch.allclose(still, clip[:1], atol=1e-5) and inside.all()


def test_a_long_clip_is_judged_a_step_at_a_time():
    clip, zeros, widest = torch.rand(6, 3, 16, 16)*2 - 1, torch.zeros(5, 2, 16, 16), []
    def flow(a, b):
        widest.append(len(a) + len(b))
        return torch.zeros(len(a), 2, 16, 16)
    assert warping_error(clip, flow) == pytest.approx(warping_error(clip, zeros), rel=1e-6)
    expected = ((clip[1:] - clip[:-1])/2).square().mean().item()
    assert warping_error(clip, flow) == pytest.approx(expected, rel=1e-5)
    assert set(widest) == {2}
    wrong = [((clip[:1], flow), 'at least 2'), ((clip*9, flow), r'\[-1,1\]'),
             ((clip, zeros[:4]), 'needs'), ((clip, flow, clip[:3]), 'photos')]
    for bad, why in wrong:
        with pytest.raises(ValueError, match=why): warping_error(*bad)


def test_a_pixel_counts_if_the_way_back_agrees():
    "The left half moves right by one and comes back; of the right half the way back leads elsewhere."
    clip = torch.zeros(2, 3, 8, 8)
    clip[1, :, :, 4:] = 1.                               # all change lies where the two ways disagree …
    def flow(a, b):
        found = torch.zeros(1, 2, 8, 8)
        if torch.equal(a, clip[1:]): found[:, :, :, 4:] = 5.
        return found
    assert warping_error(clip, flow) == 0                # … and is left out
    assert warping_error(clip, torch.zeros(1, 2, 8, 8)) == pytest.approx(.5*.25)


def test_raft_is_wired_to_the_flow(tmp_path, monkeypatch):
    "Random weights: the last and finest flow comes back, and it is the network's own."
    from torchvision.models.optical_flow import raft_small
    torch.manual_seed(0)
    net = raft_small().eval()
    torch.save(net.state_dict(), tmp_path/'raft.pth')
    monkeypatch.setattr(metrics, 'fetch', {'raft-small': tmp_path/'raft.pth'}.get)
    a, b = torch.rand(2, 1, 3, 128, 128, generator=torch.Generator().manual_seed(1))*2 - 1
    with torch.no_grad(): expected = net(a, b)[-1]
    torch.testing.assert_close(raft_flow()(a, b), expected)
    assert expected.shape == (1, 2, 128, 128)
