"Features to measure with: the numbers of pytorch-fid, and a file that runs nothing."
import math
import pickle

import numpy as np
import pytest
import torch

from scenimefy.core import to_image
from scenimefy.evaluate import summarize, survey
from scenimefy.features import FID_SHA, Features, fid_inception, inception_net, load_features
from scenimefy.metrics import frechet_distance
from scenimefy.weights import WeightsError
from scenimefy.painters import render
from scenimefy.world import HELD_OUT


@pytest.fixture(scope='module')
def inception_file(tmp_path_factory):
    "Random weights in the layout of pytorch-fid's file, large enough that features spread in the last layer."
    path = tmp_path_factory.mktemp('inception')/'random.pth'
    torch.manual_seed(3)
    net = fid_inception()
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d): torch.nn.init.kaiming_normal_(m.weight)
        if isinstance(m, torch.nn.BatchNorm2d):        # as after a training: no normalization is the identity
            for t in (m.weight, m.running_var): torch.nn.init.uniform_(t, .8, 1.2)
            for t in (m.bias, m.running_mean): torch.nn.init.uniform_(t, -.1, .1)
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture
def their_network(inception_file, monkeypatch):
    "pytorch-fid's own class, which would download its file: it is handed ours."
    from pytorch_fid import inception
    def handed_over(*args, **kwargs): return torch.load(inception_file, weights_only=True)
    monkeypatch.setattr(inception, 'load_state_dict_from_url', handed_over)
    return lambda dims: inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[dims]]).eval()


@pytest.mark.parametrize('dims', [64, 192, 768, 2048])
def test_every_size_equals_pytorch_fid(inception_file, their_network, dims):
    images = torch.rand(2, 3, 80, 112, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = their_network(dims)(images)[0].mean((2, 3))
        mine = inception_net(inception_file, dims)(2*images - 1)
    assert mine.shape == (2, dims) and expected.std() > 1e-3
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4*expected.abs().max().item())


def test_statistics_equal_pytorch_fid(tmp_path, inception_file, their_network):
    from pytorch_fid.fid_score import calculate_activation_statistics
    ours, stats, mine = load_features(str(inception_file), dims=64), [], []
    for name, first in (('anime', 0), ('reference', 500)):
        (tmp_path/name).mkdir()
        for i, x in enumerate(render(range(HELD_OUT + first, HELD_OUT + first + 6), 64, 'anime')):
            to_image(x).save(tmp_path/name/f'{i}.png')
        files = [str(f) for f in sorted((tmp_path/name).iterdir())]
        stats += calculate_activation_statistics(files, their_network(64), 4, 64, 'cpu', 0)
        mine.append(summarize(ours, survey(name, tmp_path/name)))
    expected, (a, b) = frechet_distance(*stats), mine
    assert expected > 1e-6
    assert math.isclose(frechet_distance(a.mean, a.cov, b.mean, b.cov), expected, rel_tol=1e-3)
    np.testing.assert_allclose(a.mean, stats[0], rtol=1e-4, atol=1e-6)
    assert ours.measure != 'FID' and 'random.pth' in ours.measure               # random weights give no FID


def test_building_the_network_leaves_random_numbers_alone(inception_file):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    inception_net(inception_file, 64)
    assert torch.equal(torch.rand(3), expected)


def test_only_one_combination_is_called_fid():
    assert Features(None, 'inception', 2048, FID_SHA).measure == 'FID'
    for name, dim, sha in (('inception', 64, FID_SHA), ('inception', 2048, '0'*64)):
        assert Features(None, name, dim, sha).measure == 'inception Fréchet distance'


@pytest.mark.parametrize('spoil, said', [
    (lambda t: t.pop('Conv2d_1a_3x3.conv.weight'), 'Missing key'),
    (lambda t: t.update({'fc.bias': torch.zeros(3)}), 'size mismatch'),
    (lambda t: t.update(more=torch.zeros(3)), 'Unexpected key'),
    (lambda t: t['fc.bias'].fill_(math.nan), 'finite')], ids=['missing', 'shape', 'more', 'nan'])
def test_a_file_of_other_tensors_is_refused(tmp_path, inception_file, spoil, said):
    tensors = torch.load(inception_file, weights_only=True)
    spoil(tensors)
    torch.save(tensors, tmp_path/'spoiled.pth')
    with pytest.raises(WeightsError, match=said): inception_net(tmp_path/'spoiled.pth')


def test_a_pickle_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self): return (open, (str(tmp_path/'ran'), 'w'))
    (tmp_path/'evil.pth').write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(WeightsError, match='nothing else is opened'): load_features(str(tmp_path/'evil.pth'))
    assert not (tmp_path/'ran').exists()
