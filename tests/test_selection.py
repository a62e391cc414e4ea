"Pairs: the formulas against slow ones, the same pair in every batch, a folder that survives everything."
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import scenimefy.selection as selection
from scenimefy.core import SettingsError, UserError, seeded, to_array, to_image
from scenimefy.data import PairedSet, match_pairs
from scenimefy.priors import load_clip
from scenimefy.runs import Stopped
from scenimefy.report import write_report
from scenimefy.selection import (FolderPairs, SelectSettings, StyleganPairs, WorldPairs, agreement,
                                 choose, digest, lbce_released, make_pairs, n_categories, nll, _pair_files,
                                 read_scores, recut, score_pairs, semantic_scores)
from scenimefy.stylegan import Discriminator, Generator, save_stylegan

WIDTHS = {4: 8, 8: 8, 16: 8, 32: 8}
COLORS = torch.tensor([[-.5, .2, .9], [-.4, .6, -.7], [.8, -.2, -.6]])  # sky, grass, house


class Colors:
    "A segmenter that believes in colors: one query per class."
    classes = ['sky', 'grass', 'house']

    def __call__(self, images, check=True):
        far = (images[:, None] - COLORS[None, :, :, None, None]).square().sum(2)
        masks = torch.nn.functional.avg_pool2d(4 - 8*far, 2)
        return torch.eye(3, 4).mul(8).expand(len(images), -1, -1), masks


class Bands:
    "A source without networks: bands of sky and grass, the anime's horizon off by as much as the seed says."
    length, about = None, 'bands'

    def __init__(self, seconds=0.): self.seconds, self.drawn = seconds, []

    def pairs(self, seeds):
        time.sleep(self.seconds)
        self.drawn += list(seeds)
        return tuple(torch.stack([self.draw(s, side) for s in seeds]) for side in (0, 1))

    def draw(self, seed, side, size=32):
        g = seeded('bands', int(seed))
        line, off, flat = torch.rand(3, generator=g).tolist()
        noise = .05*torch.randn(3, size, size, generator=g)
        horizon = size if flat < .2 else int(size*(.2 + .6*line)) + side*int(12*off)
        image = COLORS[1].view(3, 1, 1).repeat(1, size, size)
        image[:, :horizon] = COLORS[0].view(3, 1, 1)
        return image + noise


def cfg(**changes):
    return SelectSettings(base='tiny', count=12, max_lbce=.7, batch=5, segmenter='tiny').but(**changes)


def everything(folder):
    "{relative name: bytes} of a folder of pairs."
    files = [p for p in sorted(Path(folder).rglob('*')) if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_formulas_against_loops():
    g = seeded('loops')
    cls, masks = torch.randn(2, 4, 6, generator=g), torch.randn(2, 4, 3, 3, generator=g)
    scores = semantic_scores(cls, masks, 3)
    slow = torch.zeros(2, 5, 3, 3)
    for b in range(2):
        for q in range(4):
            p = cls[b, q].exp()/cls[b, q].exp().sum()
            for k in range(5): slow[b, k] += p[k]/(1 + (-masks[b, q]).exp())
    assert torch.allclose(scores, slow, atol=1e-6)
    a, p = scores.flip(0), scores
    for b in range(2):
        total = logs = same = 0.
        for y in range(3):
            for x in range(3):
                k = int(p[b, :, y, x].argmax())
                total += float(a[b, :, y, x].exp().sum().log() - a[b, k, y, x])
                logs -= float((a[b, k, y, x]/a[b, :, y, x].sum()).log())
                same += int(a[b, :, y, x].argmax()) == k
        assert abs(float(lbce_released(a, p)[b]) - total/9) < 1e-5
        assert abs(float(nll(a, p)[b]) - logs/9) < 1e-5
        assert abs(float(agreement(a, p)[b]) - same/9) < 1e-6
        assert int(n_categories(p)[b]) == len(set(p[b].argmax(0).flatten().tolist()))


@pytest.mark.parametrize('k,zeros,right,wrong', [(150, 5.0106, 4.0220, 5.0220), (13, 2.5649, 1.6891, 2.6891)])
def test_band_of_lbce(k, zeros, right, wrong):
    label = torch.zeros(1, k, 4, 4); label[:, 2] = 1
    other = torch.zeros(1, k, 4, 4); other[:, 1] = 1
    for scores, value in ((label*0, zeros), (label, right), (other, wrong)):
        assert abs(lbce_released(scores, label).item() - value) < 5e-5


def test_masks_are_enlarged_like_released():
    cls, masks = torch.randn(1, 3, 5), torch.randn(1, 3, 8, 8)
    for size in (32, (32, 32)): assert semantic_scores(cls, masks, size).shape == (1, 4, 32, 32)
    big = torch.nn.functional.interpolate(masks, (32, 32), mode='bilinear', align_corners=False)
    assert torch.allclose(semantic_scores(cls, masks, 32), semantic_scores(cls, big, 32))


def test_wrong_shapes_are_refused():
    for f in (lbce_released, agreement, nll):
        with pytest.raises(ValueError, match='same size'):
            f(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8))


def small_pair():
    torch.manual_seed(3)
    a, b = (Generator(32, 16, 2, channels=WIDTHS) for _ in range(2))
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        for p in b.convs[-1].parameters(): p.add_(.3*torch.randn_like(p))
    return a, b


def test_a_pair_depends_on_its_seed_alone():
    source = StyleganPairs(*small_pair(), psi=.7, device='cpu')
    together = source.pairs(range(7))
    for s in (0, 4, 6):
        for many, one in zip(together, source.pairs([s])):
            levels = (to_array(many[s]).astype(int) - to_array(one[0]).astype(int))
            assert abs(levels).max() <= 1       # another batch size may round another way
    assert all(torch.equal(x, y) for x, y in zip(together, source.pairs(range(7))))
    again = StyleganPairs(*small_pair(), psi=.7, device='cpu')
    assert again.about == source.about and torch.equal(again.pairs([3])[1], source.pairs([3])[1])


def test_untouched_target_gives_the_photo_bit_for_bit():
    a, _ = small_pair()
    photo, anime = StyleganPairs(a, a, device='cpu').pairs([1, 2])
    assert torch.equal(photo, anime)


def test_both_get_the_same_styles_and_noise():
    source = StyleganPairs(*small_pair(), psi=.5, device='cpu')
    w, noise = source.draw([8, 9])
    assert torch.equal(source.pairs([8, 9])[0], source.source.synthesis(w, noise))
    assert torch.equal(source.pairs([8, 9])[1], source.target.synthesis(w, noise))
    z = torch.randn(1, 16, generator=seeded('pair', 8))
    mean = source.source.mean_latent(4096, seeded('mean latent'))
    want = mean + .5*(source.source.mapping(z) - mean)
    assert torch.allclose(w[:1, 0], want, atol=1e-6) and (w[0] == w[0, 0]).all()


def test_generators_of_two_kinds_are_refused():
    with pytest.raises(UserError, match='fine-tuned from the source'):
        StyleganPairs(small_pair()[0], Generator(32, 8, 2, channels=WIDTHS), device='cpu')


def test_scores_are_those_of_the_files():
    photo, anime = Bands().pairs(range(6))
    def stored(images):
        return torch.stack([torch.from_numpy(to_array(x)).permute(2, 0, 1).float()/127.5 - 1 for x in images])
    direct = score_pairs(Colors(), photo, anime)
    files = score_pairs(Colors(), stored(photo), stored(anime))
    for a, b in zip(direct, files):
        assert abs(a['lbce'] - b['lbce']) < 5e-3 and a['n_categories'] == b['n_categories']


def test_the_photo_labels_and_the_anime_answers():
    "Four pixels, two classes, by hand: the photo is all sky, the anime sky in one, grass in three."
    class Told:
        classes = ['sky', 'grass']
        def __call__(self, images, check=True):     # red: how sure of sky, green: how sure of grass; logits
            return torch.eye(2, 3).mul(40).sub(20).expand(len(images), -1, -1), images[:, :2].logit()
    photo, anime = torch.full((1, 3, 2, 2), .1), torch.full((1, 3, 2, 2), .1)
    photo[:, 0] = .9
    anime[0, :2, 0, 0] = torch.tensor([.8, .2])
    anime[0, :2].flatten(1)[:, 1:] = torch.tensor([[.3], [.4]])
    got, = score_pairs(Told(), photo, anime)
    sky, grass = math.log(1 + math.exp(.2 - .8)), math.log(1 + math.exp(.4 - .3))       # -log softmax of sky
    assert got['lbce'] == pytest.approx((sky + 3*grass)/4, abs=1e-4)
    assert got['nll'] == pytest.approx(-(math.log(.8) + 3*math.log(.3/.7))/4, abs=1e-4)
    assert (got['n_categories'], got['n_anime'], got['agreement']) == (1, 2, .25)


def test_folder_matches_its_record_and_feeds_the_trainer(tmp_path):
    done = make_pairs(cfg(), Bands(), Colors(), tmp_path/'p')
    lines = read_scores(done.folder)
    accepted = [x['seed'] for x in lines if x['accepted']]
    assert done.accepted == len(accepted) == 12 and done.candidates == len(lines) == accepted[-1] + 1 > 12
    assert [x['seed'] for x in lines] == list(range(len(lines)))
    assert [int(a.stem) for a, _ in match_pairs(done.folder)] == accepted
    assert all(x['accepted'] == (x['lbce'] < .7 and x['n_categories'] > 1) for x in lines)
    assert any(x['n_categories'] == 1 for x in lines) and any(x['lbce'] >= .7 for x in lines)
    x, y = PairedSet(done.folder, size=32)[0]
    assert x.shape == y.shape == (3, 32, 32)
    assert SelectSettings.from_json((done.folder/'settings.json').read_text()) == cfg()


def test_batch_size_does_not_matter(tmp_path):
    for b in (1, 4, 64): make_pairs(cfg(batch=b), Bands(), Colors(), tmp_path/str(b))
    files = [{k: v for k, v in everything(tmp_path/str(n)).items() if k.endswith('.png')} for n in (1, 4, 64)]
    assert files[0] == files[1] == files[2] and len(files[0]) == 24
    for one, four, many in zip(*(read_scores(tmp_path/str(n)) for n in (1, 4, 64))):
        for other in (four, many):                          # sums in another order differ in the last digit
            assert one.keys() == other.keys() and all(abs(one[k] - other[k]) < 1e-5 for k in one)


@pytest.mark.parametrize('batch', [1, 4, 7, 64])
def test_nothing_is_recorded_after_the_last_pair_and_nothing_is_done_twice(tmp_path, batch):
    "Whatever the batch, the record ends with the pair that completes the count; a second call draws nothing."
    make_pairs(cfg(batch=batch), Bands(), Colors(), tmp_path/'p')
    lines = read_scores(tmp_path/'p')
    assert lines[-1]['accepted'] and sum(x['accepted'] for x in lines) == 12
    source = Bands()
    make_pairs(cfg(batch=batch), source, Colors(), tmp_path/'p')
    assert not source.drawn and read_scores(tmp_path/'p') == lines


def test_advice_fits_what_was_changed(tmp_path):
    "A rule can be applied to the scores that are there; other pictures need another folder."
    make_pairs(cfg(), Bands(), Colors(), tmp_path/'p')
    for changed, advice in ((dict(max_lbce=.75), 'apply the new rule to its scores: scenimefy pairs --recut'),
                            (dict(psi=.5), 'or begin another folder'),
                            (dict(max_lbce=.75, psi=.5), 'or begin another folder')):
        with pytest.raises(SettingsError, match=advice):
            make_pairs(cfg(**changed), Bands(), Colors(), tmp_path/'p')


SCRIPT = '''
import sys
sys.path.insert(0, {tests!r})
from test_selection import *
make_pairs(cfg(), Bands(.4), Colors(), sys.argv[1])
'''


def start(folder):
    script = textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent)))
    process = subprocess.Popen([sys.executable, '-c', script, str(folder)], stderr=subprocess.PIPE, text=True,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'})
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None and len(read_scores(folder)) < 5:
        time.sleep(.02)
    return process


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_continued(tmp_path, number):
    make_pairs(cfg(), Bands(), Colors(), tmp_path/'whole')
    process = start(tmp_path/'cut')
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    if number != signal.SIGKILL:
        assert f'stopped by {number.name}' in err and 'run the same command again' in err
    before = read_scores(tmp_path/'cut')
    source = Bands()
    make_pairs(cfg(), source, Colors(), tmp_path/'cut')
    assert everything(tmp_path/'cut') == everything(tmp_path/'whole')
    assert before and min(source.drawn) == len(before)//5*5        # what was recorded is not drawn again


def test_half_a_line_and_half_a_file(tmp_path):
    make_pairs(cfg(), Bands(), Colors(), tmp_path/'whole')
    make_pairs(cfg(), Bands(), Colors(), tmp_path/'cut')
    scores = tmp_path/'cut'/'scores.jsonl'
    text = scores.read_text()
    scores.write_text(text[:len(text)*2//3])                      # a crash in the middle of a line
    (tmp_path/'cut'/'trainA'/'.00000003-x1y2.png').write_bytes(b'half')
    make_pairs(cfg(), Bands(), Colors(), tmp_path/'cut')
    assert everything(tmp_path/'cut') == everything(tmp_path/'whole')


def test_finished_work_is_not_done_again_and_can_grow(tmp_path):
    make_pairs(cfg(), Bands(), Colors(), tmp_path/'p')
    source = Bands()
    make_pairs(cfg(), source, Colors(), tmp_path/'p')
    assert not source.drawn
    make_pairs(cfg(count=20), source, Colors(), tmp_path/'p')
    make_pairs(cfg(count=20), Bands(), Colors(), tmp_path/'q')
    assert everything(tmp_path/'p') == everything(tmp_path/'q')
    assert 0 not in source.drawn                                   # growing goes on at a whole batch
    with pytest.raises(SettingsError, match='less than the 20'):
        make_pairs(cfg(), source, Colors(), tmp_path/'p')
    kept = choose(read_scores(tmp_path/'p'), cfg(count=20))
    lost = _pair_files(tmp_path/'p', min(kept))[0]
    lost.unlink()
    make_pairs(cfg(count=20), source, Colors(), tmp_path/'p')      # a lost file is drawn again
    assert lost.exists()


def test_other_settings_sources_segmenters_and_files_are_refused(tmp_path):
    make_pairs(cfg(), Bands(), Colors(), tmp_path/'p')
    before = everything(tmp_path/'p')
    with pytest.raises(SettingsError, match='max_lbce 0.7, now 0.75'):
        make_pairs(cfg(max_lbce=.75), Bands(), Colors(), tmp_path/'p')
    other = Bands(); other.about = 'stripes'
    with pytest.raises(UserError, match='source: bands, now stripes'):
        make_pairs(cfg(), other, Colors(), tmp_path/'p')
    class Blind(Colors): pass
    with pytest.raises(UserError, match='segmenter: Colors, now Blind'):
        make_pairs(cfg(), Bands(), Blind(), tmp_path/'p')
    assert everything(tmp_path/'p') == before
    (tmp_path/'mine'/'trainA').mkdir(parents=True)
    (tmp_path/'mine'/'trainA'/'00000001.png').write_bytes(b'x')
    with pytest.raises(UserError, match='did not make'):
        make_pairs(cfg(), Bands(), Colors(), tmp_path/'mine')
    (tmp_path/'p'/'trainB'/'holiday.jpg').write_bytes(b'x')
    with pytest.raises(UserError, match='trainB/holiday.jpg'):
        make_pairs(cfg(), Bands(), Colors(), tmp_path/'p')
    (tmp_path/'file').write_text('x')
    with pytest.raises(UserError, match='another folder'):
        make_pairs(cfg(), Bands(), Colors(), tmp_path/'file')


def test_a_hopeless_search_ends(tmp_path):
    said = r'last 15 candidates were all rejected: their lowest L_BCE is 0\.\d+'
    with pytest.raises(UserError, match=said):
        make_pairs(cfg(max_lbce=.1, patience=12), Bands(), Colors(), tmp_path/'p')
    assert len(read_scores(tmp_path/'p')) == 15
    with pytest.raises(UserError, match='NaN'):
        make_pairs(cfg(patience=12), Broken(), Colors(), tmp_path/'q')
    numbers = dict.fromkeys(('lbce', 'n_categories', 'n_anime', 'agreement', 'nll'))
    assert read_scores(tmp_path/'q')[0] == dict(seed=0, **numbers, accepted=False)


def test_a_full_disk_is_said_and_survived(tmp_path, monkeypatch):
    real, count = selection.write_png, []
    def full(path, image):
        count.append(path)
        if len(count) > 9: raise OSError(28, 'No space left on device')
        real(path, image)
    monkeypatch.setattr(selection, 'write_png', full)
    with pytest.raises(UserError, match='No space left on device; free some space'):
        make_pairs(cfg(), Bands(), Colors(), tmp_path/'p')
    monkeypatch.setattr(selection, 'write_png', real)
    make_pairs(cfg(), Bands(), Colors(), tmp_path/'p')
    make_pairs(cfg(), Bands(), Colors(), tmp_path/'q')
    assert everything(tmp_path/'p') == everything(tmp_path/'q')


def test_keep_best_keeps_the_best(tmp_path):
    done = make_pairs(cfg(count=6, keep_best=.5), Bands(), Colors(), tmp_path/'p')
    lines = read_scores(done.folder)
    passing = [x for x in lines if x['lbce'] < .7 and x['n_categories'] > 1]
    assert len(passing) == 12 and done.accepted == 6
    want = {x['seed'] for x in sorted(passing, key=lambda x: x['lbce'])[:6]}
    assert {x['seed'] for x in lines if x['accepted']} == want
    assert {int(a.stem) for a, _ in match_pairs(done.folder)} == want
    make_pairs(cfg(count=8, keep_best=.5), Bands(), Colors(), tmp_path/'p')
    make_pairs(cfg(count=8, keep_best=.5), Bands(), Colors(), tmp_path/'q')
    assert everything(tmp_path/'p') == everything(tmp_path/'q')


def test_recut_segments_nothing(tmp_path):
    make_pairs(cfg(), Bands(), Colors(), tmp_path/'p')
    tight = recut(tmp_path/'p', cfg(max_lbce=.64), tmp_path/'tight')     # all its pairs are there already
    direct = choose(read_scores(tmp_path/'p'), cfg(max_lbce=.64))
    assert 0 < tight.accepted == len(direct) < 12 and len(match_pairs(tight.folder)) == len(direct)
    loose = cfg(max_lbce=.8, count=100)
    with pytest.raises(UserError, match='drawn again'): recut(tmp_path/'p', loose, tmp_path/'loose')
    assert not (tmp_path/'loose').exists()
    source = Bands()
    done = recut(tmp_path/'p', loose, tmp_path/'loose', source)
    assert done.accepted > 12 and set(source.drawn).isdisjoint(choose(read_scores(tmp_path/'p'), cfg()))
    make_pairs(loose.but(count=done.accepted), Bands(), Colors(), tmp_path/'direct')
    a, b = (everything(tmp_path/n) for n in ('loose', 'direct'))
    assert {k: v for k, v in a.items() if 'train' in k} == {k: v for k, v in b.items() if 'train' in k}
    with pytest.raises(SettingsError, match='the rest must stay'):
        recut(tmp_path/'p', cfg(psi=.5), tmp_path/'r')
    with pytest.raises(UserError, match='already holds pairs'):
        recut(tmp_path/'p', cfg(max_lbce=.64), tmp_path/'tight')
    with pytest.raises(UserError, match='no scores.jsonl'): recut(tmp_path, cfg(), tmp_path/'r')
    other = Bands(); other.about = 'stripes'
    for rule in (loose, cfg(max_lbce=.64)):                         # with or without something to draw again
        with pytest.raises(UserError, match='another source'):
            recut(tmp_path/'p', rule, tmp_path/'r', other)


def command(*words):
    from typer.testing import CliRunner
    from scenimefy.cli import app
    return CliRunner().invoke(app, ['pairs', *map(str, words)])


def test_recut_from_the_shell(tmp_path, monkeypatch):
    monkeypatch.setattr('scenimefy.priors.load_segmenter', lambda name, device: Colors())
    for name, net in zip('ab', small_pair()):
        critic = Discriminator(32, channels=WIDTHS)
        save_stylegan(tmp_path/f'{name}.safetensors', dict(g_ema=net.state_dict(), d=critic.state_dict()))
    few = '--preset tiny --count 6 --batch 3'.split()
    nets = ('--source', tmp_path/'a.safetensors', '--target', tmp_path/'b.safetensors', '--device', 'cpu')
    first = command('-o', tmp_path/'p', *nets, *few, '--max-lbce', 9, '--min-categories', 1)
    assert first.exit_code == 0, first.output
    lines = read_scores(tmp_path/'p')
    cut = sorted(x['lbce'] for x in lines)[3]
    rule = ('--max-lbce', cut)
    said = command('-o', tmp_path/'p', *nets, *few, '--min-categories', 1, *rule)  # another rule
    advice = f'scenimefy pairs --recut {tmp_path/"p"} -o ANOTHER'
    assert said.exit_code == 2 and advice in ' '.join(said.output.split())
    done = command('--recut', tmp_path/'p', '-o', tmp_path/'q', *nets, *rule)
    assert done.exit_code == 0, done.output
    assert '3 of 6 pairs kept' in done.output and (tmp_path/'q'/'report.html').exists()
    kept = [x['seed'] for x in lines if x['lbce'] < cut]
    assert [int(a.stem) for a, _ in match_pairs(tmp_path/'q')] == kept
    for s in kept:
        for a, b in zip(_pair_files(tmp_path/'p', s), _pair_files(tmp_path/'q', s)):
            assert a.read_bytes() == b.read_bytes()
    back = command('--recut', tmp_path/'q', '-o', tmp_path/'r', *nets, '--max-lbce', 9)    # q lacks some
    assert back.exit_code == 0 and '6 of 6 pairs kept' in back.output, back.output
    for words, status, text in ((('--psi', .5), 2, 'the rest must stay'),
                                (('--target', tmp_path/'a.safetensors'), 1, 'another source')):
        said = command('--recut', tmp_path/'p', '-o', tmp_path/'s', *nets, *words)
        assert said.exit_code == status and text in said.output, said.output
    assert 'no scores.jsonl' in command('--recut', tmp_path, '-o', tmp_path/'s', *nets).output
    assert not (tmp_path/'s').exists()
    lost = command('-o', tmp_path/'h', *nets, *few, '--max-lbce', 0, '--patience', 3)      # a page shows why
    assert lost.exit_code == 1 and 'all rejected' in lost.output and (tmp_path/'h'/'report.html').exists()


def test_own_pairs_with_a_broken_file(tmp_path):
    photo, anime = Bands().pairs(range(9))
    for name, side in (('trainA', photo), ('trainB', anime)):
        (tmp_path/'in'/name).mkdir(parents=True)
        for i, x in enumerate(side): to_image(x).save(tmp_path/'in'/name/f'place-{i}.png')
    (tmp_path/'in'/'trainB'/'place-4.png').write_bytes(b'\x89PNG no more')
    source = FolderPairs(tmp_path/'in', size=32, device='cpu')
    with pytest.warns(UserWarning, match='place-4.png'):
        done = make_pairs(cfg(count=100), source, Colors(), tmp_path/'out')
    assert done.candidates == 9 and 0 < done.accepted < 9          # a folder ends; that is no error
    assert read_scores(tmp_path/'out')[4]['lbce'] is None and not read_scores(tmp_path/'out')[4]['accepted']
    assert 'seed 4:' not in write_report(tmp_path/'out', source, Colors(), n=3).read_text(encoding='utf8')


def test_own_pairs_are_signed_by_their_contents(tmp_path):
    photo, anime = Bands().pairs(range(3))
    for name, side in (('trainA', photo), ('trainB', anime)):
        (tmp_path/'in'/name).mkdir(parents=True)
        for i, x in enumerate(side): to_image(x).save(tmp_path/'in'/name/f'place-{i}.png')
    before = FolderPairs(tmp_path/'in', size=32, device='cpu')
    assert FolderPairs(tmp_path/'in', size=32, device='cpu').about == before.about
    make_pairs(cfg(count=100), before, Colors(), tmp_path/'out')
    to_image(anime[0]).save(tmp_path/'in'/'trainB'/'place-1.png')          # the same name, another picture
    with pytest.raises(UserError, match='another source'):
        after = FolderPairs(tmp_path/'in', size=32, device='cpu')
        make_pairs(cfg(count=200), after, Colors(), tmp_path/'out')


class Broken(Bands):
    about = 'broken'
    def draw(self, seed, side): return torch.full((3, 32, 32), torch.nan)


def test_world_pairs_know_the_truth():
    clean, spoiled = WorldPairs(16), WorldPairs(16, spoiled=.8)
    seeds = list(range(16))
    assert (clean.truth(seeds) == 1).all()
    kinds = [spoiled.harm(s)[0] for s in seeds]
    assert set(kinds) == {'none', 'shifted', 'swapped', 'other'}
    truth = spoiled.truth(seeds)
    assert all(truth[i] == 1 for i, k in enumerate(kinds) if k == 'none')
    assert all(truth[[k == h for k in kinds]].mean() < .97 for h in ('shifted', 'swapped', 'other'))
    many = list(range(100, 200))
    harms = [spoiled.harm(s)[0] for s in many]
    assert harms.count('swapped') > 10
    for k, x in zip(harms, spoiled.truth(many)):
        assert (x == 1) == (k == 'none'), k                                # a swap that nobody sees is none
    for a, b in zip(spoiled.pairs(seeds), spoiled.pairs([5])): assert torch.equal(a[5:6], b)
    assert torch.equal(spoiled.pairs(seeds)[0], clean.pairs(seeds)[0])


def test_digest_sees_every_weight():
    a, _ = small_pair()
    before = digest(a)
    with torch.no_grad(): a.convs[0].noise.weight.add_(1e-6)
    assert digest(a) != before and digest(Colors()) == 'Colors'


def test_digests_stay_and_every_precision_has_one():
    table = Path(selection.__file__).parent/'results'/'table4.json'
    assert digest(load_clip('tiny')) in table.read_text()                 # written long ago
    net = torch.nn.Linear(2, 1)
    with torch.no_grad(): net.weight[:], net.bias[:] = torch.tensor([[1., -2.]]), 3.
    one, two, three = '0000803f', '000000c0', '00004040'                  # 1, -2 and 3 in float32, by hand
    expected = b'weight' + bytes.fromhex(one + two) + b'bias' + bytes.fromhex(three)
    assert digest(net) == hashlib.blake2b(expected, digest_size=8).hexdigest()
    expected = b'weight' + bytes.fromhex('803f' + '00c0') + b'bias' + bytes.fromhex('4040')   # upper halves
    assert digest(net.bfloat16()) == hashlib.blake2b(expected, digest_size=8).hexdigest()


def test_progress_is_told(tmp_path):
    heard = []
    make_pairs(cfg(), Bands(), Colors(), tmp_path/'p', on_progress=lambda *numbers: heard.append(numbers))
    passed = [h[1] for h in heard]
    assert heard[-1] == (len(read_scores(tmp_path/'p')), 12, 12) and passed == sorted(passed)
