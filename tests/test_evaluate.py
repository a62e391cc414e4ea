"Measuring folders that are wrong in every way we know, what is kept of them, reports, the command line."
import json
import math
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import scenimefy.evaluate as e
from scenimefy.cli import app
from scenimefy.core import SettingsError, UserError, to_image, to_model
from scenimefy.data import read_image
from scenimefy.evaluate import (_KEEP, Summary, compare, evaluate, halves, measure_pairs, measure_set,
                                _preflight, read_summary, summarize, survey, _table_row, _warning_for)
from scenimefy.features import Features, load_features
from scenimefy.kept import KEPT, KEPT_NOTE, measure_kept
from scenimefy.metrics import Moments, frechet_distance
from scenimefy.painters import render
from scenimefy.world import HELD_OUT


def compare_tiny(methods, reference, *photos, **more):
    return compare(methods, reference, *photos, features='tiny', **more)


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


def test_halves_are_two():
    "The second half is the first, 3 and 4 further: the distance is 9 + 16, not the 0 of a half to itself."
    a = torch.randn(20, 2, generator=torch.Generator().manual_seed(1))
    both = torch.cat([a, a + torch.tensor([3., 4.])])
    m = Moments(2).add(both)
    found = halves(Summary(40, m.mean, m.cov, both, {}))
    assert found['n'] == 20 and found['distance'] == pytest.approx(25, rel=1e-4) and found['kid'] > .1


def test_everything_wrong_is_said_at_once(folders, spoiled):
    (spoiled/'03.png').write_bytes(b'not a picture')
    (spoiled/'04.png').unlink()
    Image.new('RGB', (48, 64)).save(spoiled/'05.png')
    Image.new('RGB', (64, 64)).save(spoiled/'06.jpg')                          # a second 06
    a, b = survey('photos', folders/'photos'), survey('CUT', spoiled)
    with pytest.raises(UserError) as error: _preflight([a, b], [(a, b)])
    said = str(error.value)
    for part in ('03.png', '04', '48×64', '06', 'nothing was measured'): assert part in said, part
    assert '\n' not in said


def test_no_network_is_loaded_for_a_broken_folder(folders, spoiled, monkeypatch):
    monkeypatch.setattr(e, 'load_features', lambda *a: pytest.fail('a network was loaded'))
    (spoiled/'07.png').write_bytes(b'')
    reference, anime = folders/'reference', folders/'anime'
    with pytest.raises(UserError, match='07.png'): compare_tiny({'CUT': spoiled}, reference)
    with pytest.raises(UserError, match='no such folder'): compare_tiny({'CUT': folders/'none'}, reference)
    good = {'CUT': anime}
    with pytest.raises(UserError, match='a file'): compare_tiny(good, reference, out=anime/'00.png')
    for out in (anime, reference):
        with pytest.raises(UserError, match='folder of pictures'): compare_tiny(good, reference, out=out)
    with pytest.raises(SettingsError, match='inputs'): compare_tiny({'photos': anime}, reference)
    with pytest.raises(SettingsError, match='no folder'): compare_tiny({}, reference)
    monkeypatch.setattr(e, 'survey', lambda *a: pytest.fail('a folder was read'))
    with pytest.raises(UserError, match='known: inception, tiny'): compare(good, reference, features='tinny')
    with pytest.raises(UserError, match='no such file'): compare_tiny(good, folders/'none.safetensors')


def test_features_that_are_not_finite_name_the_picture(folders):
    files, one = survey('anime', folders/'anime'), torch.tensor(0.)
    def net(x): return torch.stack([x.mean((1, 2, 3)), (x.mean((1, 2, 3)) - one).abs().log()], 1)
    broken = Features(net, 'odd', 2, '')
    summarize(broken, files)
    one = to_model([read_image(folders/'anime'/'17.png')]).mean((1, 2, 3))      # the log of 0
    with pytest.raises(UserError, match='17.png: its odd features'): summarize(broken, files)


def test_vectors_are_kept_in_random_order(folders, monkeypatch):
    "Each picture's once; the first of them are a sample of the folder and not its beginning."
    mean, s = Features(lambda x: x.mean((2, 3)), 'mean', 3, ''), survey('anime', folders/'anime')
    files = torch.cat([to_model([read_image(f)]).mean((2, 3)) for f in s.files.values()])
    whole = summarize(mean, s).kept
    place = (whole[:, None] - files).abs().amax(2).argmin(1)               # which picture each vector is of
    torch.testing.assert_close(whole, files[place])
    assert sorted(place.tolist()) == list(range(30)) and place.tolist() != list(range(30))
    assert abs(place[:15].float().mean() - 14.5) < 5                       # not the folder's first half
    monkeypatch.setattr(e, '_KEEP', 7)
    few = summarize(mean, s)
    assert torch.equal(few.kept, whole[:7]) and few.n == 30


def test_pairs_are_judged_by_the_labels_of_the_photo(tmp_path):
    "Two classes by hand: the photo is a little more sky than grass everywhere; the anime's left is grass."
    class Told(torch.nn.Module):
        "Red says how sure of sky, green how sure of grass."
        def __init__(self): super().__init__(); self.unused = torch.nn.Parameter(torch.zeros(1))
        def forward(self, x, check=True):
            return torch.eye(2, 3).mul(40).sub(20).expand(len(x), -1, -1), ((x + 1)/2)[:, :2].logit()
    for name in ('photos', 'anime'): (tmp_path/name).mkdir()
    anime = Image.new('RGB', (32, 32), (204, 51, 0))                             # sky .8, grass .2
    anime.paste((51, 204, 0), (0, 0, 16, 32))
    for i in range(2):
        Image.new('RGB', (32, 32), (153, 102, 0)).save(tmp_path/'photos'/f'{i}.png')   # sky .6, grass .4
        anime.save(tmp_path/'anime'/f'{i}.png')
    def far(made, photo): return (made - photo).abs().mean((1, 2, 3))
    got = measure_pairs(survey('ours', tmp_path/'anime'), survey('photos', tmp_path/'photos'), Told(), far)
    by_hand = (math.log(1 + math.exp(.6)) + math.log(1 + math.exp(-.6)))/2
    assert got['lbce'] == pytest.approx(by_hand, abs=1e-4)
    assert got['nll'] == pytest.approx(-(math.log(.2) + math.log(.8))/2, abs=1e-4) and got['agreement'] == .5
    assert got['perceptual'] == pytest.approx(2*((102 + 102) + (51 + 51))/255/6, abs=1e-5)


def test_photos_without_partner_or_of_odd_size_are_found_first(folders, tmp_path, monkeypatch):
    "Only a comparison with photos needs partners, and sides that the segmenter takes."
    def loaded(*a): raise KeyError('all is well so far')
    monkeypatch.setattr(e, 'load_features', loaded)
    fewer = shutil.copytree(folders/'photos', tmp_path/'fewer')
    (fewer/'04.png').unlink()
    with pytest.raises(UserError, match='1 pictures of ours have no partner in photos: 04'):
        compare_tiny({'ours': folders/'anime'}, folders/'reference', fewer)
    for name in ('photos', 'anime', 'reference'):
        (tmp_path/'odd'/name).mkdir(parents=True)
        for f in (folders/name).glob('0*.png'):
            Image.open(f).resize((48, 64)).save(tmp_path/'odd'/name/f.name)
    odd = {'ours': tmp_path/'odd'/'anime'}, tmp_path/'odd'/'reference'
    with pytest.raises(UserError, match='multiples of 32, and these are not: 48×64'):
        compare_tiny(*odd, tmp_path/'odd'/'photos')
    with pytest.raises(KeyError, match='so far'): compare_tiny(*odd)


def test_what_scenes_keep_of_their_photos(folders, tmp_path):
    "Measured on the files as stored, whatever `resize` makes of them for the networks; gray has no hue."
    photos, ours, gray = (tmp_path/name for name in ('photos', 'ours', 'gray'))
    for folder in (photos, ours, gray): folder.mkdir()
    for name in ('00.png', '01.png', '02.png'):
        shutil.copy(folders/'photos'/name, photos)
        shutil.copy(folders/'anime'/name, ours)
        Image.open(photos/name).convert('L').save(gray/name)
    both = {'ours': ours, 'gray': gray}
    report = compare_tiny(both, folders/'reference', photos, out=tmp_path/'out', resize=32)
    found, wanted = report['methods']['ours']['kept'], measure_kept(photos, ours)
    assert found['means'] == wanted['means'] and found['pictures'] == wanted['pictures']
    assert 'kept' not in report['methods']['photos'] and len(found['pictures']) == 3
    written = json.loads((tmp_path/'out'/'metrics.json').read_text())['methods']
    assert written['ours']['kept'] == found and written['gray']['kept']['means']['hue'] is None
    assert written['gray']['kept']['pictures']['00']['hue'] is None
    head, rows = e.kept_rows(report)
    assert head == ['method', *KEPT.values()] and [row[0] for row in rows] == ['ours', 'gray']
    assert rows[0][1:] == [f'{found["means"][key]:.3g}' for key in KEPT] and rows[1][3] == '–'
    page = (tmp_path/'out'/'index.html').read_text()
    assert 'Kept of the photos' in page and KEPT_NOTE in page
    assert all(f'<td>{cell}</td>' in page for cell in rows[0]) and all(name in page for name in head)


def test_without_photos_nothing_is_kept(folders, tmp_path):
    report = compare_tiny({'ours': folders/'anime'}, folders/'reference', out=tmp_path)
    assert 'kept' not in report['methods']['ours'] and e.kept_rows(report)[1] == []
    assert 'Kept of the photos' not in (tmp_path/'index.html').read_text()


def test_report(folders, tmp_path):
    photos = folders/'photos'
    both = {'ours': folders/'anime', 'identity': photos}
    report = compare_tiny(both, folders/'reference', photos, out=tmp_path)
    m = report['methods']
    assert m['identity']['distance'] == pytest.approx(m['photos']['distance'], rel=1e-9)
    assert m['identity']['perceptual'] == pytest.approx(0, abs=1e-6) and m['ours']['perceptual'] > .1
    assert m['identity']['agreement'] == 1. and report['measure'] == 'tiny Fréchet distance'
    kept, page = json.loads((tmp_path/'metrics.json').read_text()), (tmp_path/'index.html').read_text()
    ours = kept['methods']['ours']
    assert ours['distance'] == m['ours']['distance'] and len(ours['files']) == 30
    assert 'http' not in page.replace('http-equiv', '')
    assert _table_row('cartoon-gan') == 'CartoonGAN'
    assert _table_row('Scenimefy') == 'Ours' and _table_row('photos') == ''
    names = ('photos', 'ours', 'identity', 'reference')
    assert kept['protocol']['formats'] == {k: {'png': 30} for k in names}
    assert kept['floor']['n'] == 15 and [n for n, _ in ours['by_size']] == [7, 15, 22, 30]
    assert 'By size' in page and 'reference, two halves' in page


def test_jpeg_against_png_is_said(folders, tmp_path):
    (tmp_path/'jpeg').mkdir()
    for f in (folders/'anime').glob('*.png'): Image.open(f).save(tmp_path/'jpeg'/f'{f.stem}.JPEG', quality=75)
    report = compare_tiny({'ours': tmp_path/'jpeg'}, folders/'reference', out=tmp_path/'r')
    assert 'jpg against png' in report['methods']['ours']['warning']
    assert 'jpg against png' in (tmp_path/'r'/'index.html').read_text()
    again = compare_tiny({'ours': tmp_path/'jpeg'}, tmp_path/'r'/'reference.safetensors')   # it knows, too
    assert 'jpg against png' in again['methods']['ours']['warning']


def test_statistics_are_checked(folders, tmp_path, monkeypatch):
    ours = {'ours': folders/'anime'}
    compare_tiny(ours, folders/'reference', out=tmp_path)
    good, tiny = tmp_path/'reference.safetensors', load_features('tiny')
    assert read_summary(good, tiny).n == 30
    with safe_open(good, 'pt') as f:
        tensors, about = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    told = json.loads(about['about'])
    def manifest(**changed): return dict(about=json.dumps(told | changed))
    nan = {k: v*math.nan for k, v in tensors.items()}
    spoiled = [('net', tensors, manifest(weights='0'*64)), ('nan', tensors | dict(cov=nan['cov']), about),
               ('kept', tensors | dict(kept=nan['kept']), about),
               ('sizes', tensors, manifest(sizes={'64 by 64': 30})),
               ('named', tensors, manifest(weights=None)), ('bare', tensors, None),
               ('part', {'mean': tensors['mean']}, about)]
    for name, t, meta in spoiled:
        save_file(t, tmp_path/f'{name}.safetensors', meta)
        with pytest.raises(UserError, match=name): read_summary(tmp_path/f'{name}.safetensors', tiny)
    with pytest.raises(UserError, match='weights 00000000'): compare_tiny(ours, tmp_path/'net.safetensors')
    small = tmp_path/'small'
    small.mkdir()
    for f in (folders/'anime').glob('*.png'): Image.open(f).resize((32, 32)).save(small/f.name)
    monkeypatch.setattr(e, 'load_features', lambda *a: pytest.fail('a network was loaded'))
    with pytest.raises(UserError, match='mixed sizes: 32×32 in ours .*64×64 in reference'):
        compare_tiny({'ours': small}, good)
    (tmp_path/'torn.safetensors').write_bytes(good.read_bytes()[:200])
    with pytest.raises(UserError): read_summary(tmp_path/'torn.safetensors', tiny)


def run(*args): return CliRunner().invoke(app, list(map(str, args)))


def test_commands(folders, tmp_path):
    reference, ours = folders/'reference', f'Scenimefy={folders/"anime"}'
    done = run('compare', reference, ours, '--features', 'tiny', '-o', tmp_path/'r')
    assert done.exit_code == 0 and '48.922' in done.output and 'tiny Fréchet distance' in done.output
    again = run('evaluate', folders/'anime', tmp_path/'r'/'reference.safetensors', '--features', 'tiny')
    assert again.exit_code == 0 and again.output.splitlines()[1].split()[1] in done.output
    photos = folders/'photos'
    both = run('evaluate', photos, reference, '--photos', photos, '--features', 'tiny')
    lines = both.output.splitlines()[1:3]
    assert both.exit_code == 0 and [line.split()[0] for line in lines] == ['photos', 'generated']
    assert '121.807' not in lines[0]
    told = both.output.splitlines()
    (at,) = [i for i, line in enumerate(told) if 'light kept ↑' in line]
    assert told[at + 1].split() == ['generated', '1', '0', '0', '1', '1', '0'] and told[at + 2] == KEPT_NOTE
    assert 'light kept' not in done.output + again.output


@pytest.mark.parametrize('args,status', [
    (('ours',), 2), (('=x',), 2), (('a=x', 'a=y'), 2), (('photos=x',), 2), (('a=/nowhere',), 1)], ids=str)
def test_compare_refuses(folders, tmp_path, args, status):
    done = run('compare', folders/'reference', *args, '--features', 'tiny', '-o', tmp_path/'r')
    assert done.exit_code == status and not (tmp_path/'r').exists()


def twelve(): return Features(lambda x: x.flatten(1)[:, :12], 'inception (test)', 12, 'abc')


def test_statistics_of_pytorch_fid(folders, tmp_path):
    "mu and sigma in an .npz: read where the features are the same, refused with the reason elsewhere."
    net = twelve()
    ref, mine = (summarize(net, survey('s', folders/name)) for name in ('reference', 'anime'))
    np.savez(tmp_path/'stats.npz', mu=ref.mean.numpy(), sigma=ref.cov.numpy())
    taken = read_summary(tmp_path/'stats.npz', net)
    found = measure_set(mine, taken)
    expected = frechet_distance(mine.mean, mine.cov, ref.mean, ref.cov)
    assert math.isclose(found['distance'], expected, rel_tol=1e-9)
    assert found['kid'] is None and found['n_reference'] is None and found['by_size'] == []
    assert 'statistics alone' in found['warning']
    with pytest.raises(UserError, match='12 features of Inception; now it is tiny'):
        read_summary(tmp_path/'stats.npz', load_features('tiny'))
    wrong = [(dict(mu=np.zeros(3)), 'mu and sigma'), (dict(mu=np.zeros(3), sigma=np.eye(4)), 'damaged'),
             (dict(mu=np.full(3, np.nan), sigma=np.eye(3)), 'damaged'),
             (dict(mu=np.array([{}]), sigma=np.eye(1)), 'pytorch-fid')]
    for content, words in wrong:
        np.savez(tmp_path/'bad.npz', **content)
        with pytest.raises(UserError, match=words): read_summary(tmp_path/'bad.npz')
    (tmp_path/'text.npz').write_text('no archive')
    with pytest.raises(UserError, match='pytorch-fid'): read_summary(tmp_path/'text.npz')


def test_a_report_on_statistics_alone(folders, tmp_path, monkeypatch):
    net = twelve()
    monkeypatch.setattr(e, 'load_features', lambda *_: net)
    ref = summarize(net, survey('s', folders/'reference'))
    np.savez(tmp_path/'stats.npz', mu=ref.mean.numpy(), sigma=ref.cov.numpy())
    report = compare({'ours': folders/'anime'}, tmp_path/'stats.npz', out=tmp_path/'out', device='cpu')
    head, (row, *_) = e.comparison_rows(report)
    assert row[head.index('KID ↓')] == '–' and (tmp_path/'out'/'index.html').exists()


def test_mixed_sizes_become_one(folders, spoiled, tmp_path):
    "Refused without `resize`; with it, squeezed by Pillow's bicubic filter, and the report says so."
    odd = next(spoiled.iterdir())
    Image.open(odd).resize((80, 48)).save(odd)
    words = ['evaluate', spoiled, folders/'reference', '--features', 'tiny', '-o', tmp_path/'out']
    refused = run(*words)
    assert refused.exit_code == 1 and '--resize' in refused.output
    assert run(*words, '--resize', '32').exit_code == 0
    report = json.loads((tmp_path/'out'/'metrics.json').read_text())
    assert '32×32' in report['protocol']['resize']
    small = tmp_path/'small'
    for name, folder in (('anime', spoiled), ('reference', folders/'reference')):
        (small/name).mkdir(parents=True)
        for f in folder.iterdir():
            im = Image.open(f).convert('RGB')
            im.resize((32, 32), Image.Resampling.BICUBIC).save(small/name/f.name)
    by_hand = compare_tiny({'x': small/'anime'}, small/'reference', device='cpu')['methods']['x']['distance']
    (name, found), = report['methods'].items()
    assert math.isclose(found['distance'], by_hand, rel_tol=1e-6)
    saved = tmp_path/'out'/'reference.safetensors'
    with pytest.raises(UserError, match='taken with resize 32'):
        compare_tiny({'x': folders/'anime'}, saved, device='cpu')


def test_partners_in_other_unicode_forms(folders, tmp_path):
    for name, form in (('a', 'NFC'), ('b', 'NFD')):
        (tmp_path/name).mkdir()
        for i in range(2):
            shutil.copy(folders/'anime'/'00.png', tmp_path/name/unicodedata.normalize(form, f'é{i}.png'))
    a, b = survey('a', tmp_path/'a'), survey('b', tmp_path/'b')
    assert a.files.keys() == b.files.keys()
    _preflight([a, b], [(a, b)])


def test_warnings_know_the_size_of_sets():
    assert _warning_for(30, 5000, 64) and _warning_for(3000, 3000, 64) == ''
    assert 'only the spread' in _warning_for(39, 50, 20) and 'only the spread' not in _warning_for(40, 50, 20)
    assert _KEEP > 6605 and _KEEP >= 2*2048          # the paper's sets can be corrected


@pytest.mark.parametrize('folder, name', [('ours', 'ours'), ('photos', 'generated'), ('.', 'generated')])
def test_one_folder_is_called_by_its_name(monkeypatch, folder, name):
    "And everything else that was told is handed on."
    asked = []
    monkeypatch.setattr(e, 'compare', lambda *args, **more: asked.append((args, more)))
    evaluate(folder, 'reference', 'inputs', 'tiny', 'out', 'cpu', True, 32)
    args, more = asked[0]
    assert args == ({name: folder}, 'reference', 'inputs', 'tiny', 'out', 'cpu')
    assert more == dict(progress=True, resize=32)


def test_one_folder_is_measured_as_one_of_several(folders):
    one = evaluate(folders/'anime', folders/'reference', features='tiny', device='cpu')
    several = compare_tiny({'a': folders/'anime', 'b': folders/'photos'}, folders/'reference', device='cpu')
    assert list(one['methods']) == ['anime']
    assert one['methods']['anime']['distance'] == several['methods']['a']['distance'] > 0


def test_text_of_others_is_text_on_the_page(folders, tmp_path):
    compare_tiny({'<b>ours': folders/'anime'}, folders/'reference', out=tmp_path)
    page = (tmp_path/'index.html').read_text()
    assert '<b>ours' not in page and '&lt;b&gt;ours' in page
