"The preference study: no vote lost, no name shown, statistics that a class without opinion cannot fool."
import csv
import errno
import math
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import scenimefy.study as S
from scenimefy.core import UserError, seeded
from scenimefy.data import ImageError
from scenimefy.study import (_COLUMNS, _CRITERIA, _PAPER_METHODS, _PAPER_TABLE_2, Booth, arrangement,
                             bootstrap, _cast, open_study, _pending, _questions, read_votes, _shares,
                             simulate, table_2, tabulate, voter_intervals, voters_needed, _votes_file,
                             wilson, winner_p)


def picture(key, size=(24, 16)):
    noise = torch.rand(size[1], size[0], 3, generator=seeded('picture', key))
    return Image.fromarray((255*noise).byte().numpy())


@pytest.fixture(scope='module')
def study():
    def four(name): return [picture(f'{name}{i}') for i in range(4)]
    return open_study(four('p'), {m: four(m) for m in 'uvw'})


def folders(root, names=('a', 'b/c'), methods=('u', 'v'), suffix='png'):
    for kind in ('photos', *methods):
        for n in names:
            f = root/kind/f'{n}.{suffix}'
            f.parent.mkdir(parents=True, exist_ok=True)
            picture(kind + n).save(f)
    return root/'photos', {m: root/m for m in methods}


# ---- what is judged

def test_folders_match_by_stem_and_extra_pictures_are_left_out(tmp_path):
    photos, methods = folders(tmp_path)
    (tmp_path/'u'/'a.png').rename(tmp_path/'u'/'a.bmp')
    picture('x').save(tmp_path/'v'/'more.png')
    s = open_study(photos, methods)
    assert s.names == ('a', 'b/c') and s.methods == ['u', 'v']
    assert all(len(p) == 2 for p in s.pictures.values())


def test_what_spoils_a_study_is_found_before_the_first_vote(tmp_path, study):
    photos, methods = folders(tmp_path)
    with pytest.raises(UserError, match='at least 2 methods'): open_study(photos, {'u': tmp_path/'u'})
    with pytest.raises(UserError, match='3 pictures for 4 photos'):
        open_study(study.photos, {'u': study.photos, 'v': study.photos[:3]})
    with pytest.raises(UserError, match='no photo'): open_study([], {'u': [], 'v': []})
    picture('again').save(tmp_path/'u'/'a.jpg')
    with pytest.raises(ImageError, match='several files'): open_study(photos, methods)
    (tmp_path/'u'/'a.jpg').unlink()
    (tmp_path/'v'/'a.png').write_bytes((tmp_path/'v'/'a.png').read_bytes()[:200])
    with pytest.raises(ImageError): open_study(photos, methods)
    (tmp_path/'v'/'a.png').unlink()
    with pytest.raises(UserError, match="'v' has no picture for 1 of 2 photos: a"):
        open_study(photos, methods)


def test_size_does_not_betray_a_method():
    small, large = picture('s', (90, 60)), picture('l', (1800, 1200))
    s = open_study([picture('p', (900, 600))], {'small': [small], 'large': [large]})
    sizes = {im.size for im in s.photos + s.pictures['small'] + s.pictures['large']}
    assert sizes == {(S._SIDE, round(S._SIDE*2/3))}
    with pytest.raises(UserError, match='another shape'):
        open_study([picture('p', (90, 60))], {'a': [picture('p', (90, 60))], 'b': [picture('p', (60, 60))]})


def test_any_kind_of_image_in_memory():
    im = picture('x')
    t = torch.from_numpy(np.array(im)).permute(2, 0, 1)/127.5 - 1
    s = open_study([im, np.array(im), t], {'a': [im]*3, 'b': [t]*3})
    assert len({p.tobytes() for p in s.photos + s.pictures['a'] + s.pictures['b']}) == 1
    clear = Image.new('RGBA', (24, 16), (0, 0, 0, 0))                 # nothing to see: paper white, not black
    s = open_study([clear, np.array(clear)], {'a': [im, im], 'b': [im, im]})
    assert {p.getpixel((3, 3)) for p in s.photos} == {(255, 255, 255)} and clear.mode == 'RGBA'


def test_id_changes_with_every_part(study):
    ids = {study.id}
    other = [picture('other'), *study.pictures['u'][1:]]
    renamed = dict(zip('xyz', study.pictures.values()))
    changed = {**study.pictures, 'u': other}
    for photos, methods, seed in ((study.photos, study.pictures, 1), (study.photos[::-1], study.pictures, 0),
                                  (study.photos, changed, 0), (study.photos, renamed, 0)):
        ids.add(open_study(photos, methods, seed).id)
    assert len(ids) == 5


# ---- order

def test_everybody_is_asked_everything_in_an_order_of_their_own(study):
    orders = {tuple(_questions(study, f'v{i}')) for i in range(30)}
    everything = {(n, c) for n in study.names for c in _CRITERIA}
    assert len(orders) > 15 and all(set(o) == everything for o in orders)
    orders = [arrangement(study, f'v{i}', n) for i in range(300) for n in study.names]
    places = np.array([[order.index(m) for m in study.methods] for order in orders])
    for m in range(3): assert np.abs(np.bincount(places[:, m])/1200 - 1/3).max() < .07
    assert len({tuple(arrangement(study, 'v', n)) for n in study.names}) > 1


# ---- the file

def test_a_crash_at_any_byte_loses_at_most_the_vote_being_written(tmp_path, study):
    path = _votes_file(tmp_path, 'ada')
    lengths = [path.stat().st_size]
    for name, c in _questions(study, 'ada')[:3]:
        _cast(path, study, 'ada', name, c, 'u', 1.)
        lengths.append(path.stat().st_size)
    whole = path.read_bytes()
    for cut in range(lengths[0], len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = sum(n - 1 <= cut for n in lengths[1:])       # a line that lacks only its end is whole
        assert len(read_votes(path)) == kept
        _votes_file(tmp_path, 'ada')
        assert path.read_bytes() == whole[:lengths[kept]]
        assert _pending(study, 'ada', read_votes(path)) == _questions(study, 'ada')[kept:]


def test_a_last_line_without_its_end_is_continued_on_a_new_line(tmp_path, study):
    path = _votes_file(tmp_path, 'ada')
    (n0, c0), (n1, c1) = _questions(study, 'ada')[:2]
    _cast(path, study, 'ada', n0, c0, 'u', 1.)
    path.write_bytes(path.read_bytes()[:-1])
    _cast(_votes_file(tmp_path, 'ada'), study, 'ada', n1, c1, 'v', 1.)
    assert [v['method'] for v in read_votes(path)] == ['u', 'v']
    path.write_bytes(path.read_bytes()[:-1] + b'\n' + 'aü,b'.encode()[:2])       # cut inside a letter
    assert len(read_votes(path)) == 2 and _votes_file(tmp_path, 'ada').read_bytes().endswith(b'Z\n')


def test_odd_names_survive_the_file(tmp_path):
    odd = ['a,b', 'say "x"', 'ünï']
    s = open_study([picture('p')], {m: [picture(m)] for m in odd})
    path = _votes_file(tmp_path, 'José 2')
    for (n, c), m in zip(_questions(s, 'José 2'), odd): _cast(path, s, 'José 2', n, c, m, .5)
    assert [v['method'] for v in read_votes(path)] == odd
    assert next(csv.reader(open(path, encoding='utf8'))) == _COLUMNS


@pytest.mark.parametrize('name', [
    '', ' ', '../x', 'a/b', 'a\\b', '.hidden', '=1+1', 'x'*41, 'a\nb', 'end ', '-x'])
def test_names_that_are_no_file_names_are_refused(tmp_path, name):
    with pytest.raises(UserError, match='no name for a voter'): _votes_file(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_two_voters_merge_and_copies_count_once(tmp_path, study):
    for who in ('ada', 'ben'):
        path = _votes_file(tmp_path/'one', who)
        for n, c in _questions(study, who): _cast(path, study, who, n, c, 'v', 1.)
    (tmp_path/'two').mkdir()
    (tmp_path/'two'/'copy.csv').write_bytes((tmp_path/'one'/'ada.csv').read_bytes())
    votes = read_votes([tmp_path/'one', tmp_path/'two'/'copy.csv'])
    assert len(votes) == 24 and tabulate(votes, 'style', study.methods).shape == (2, 4, 3)


def test_two_people_under_one_name_are_noticed(tmp_path, study):
    n, c = _questions(study, 'ada')[0]
    for folder, method in (('one', 'u'), ('two', 'v')):
        _cast(_votes_file(tmp_path/folder, 'ada'), study, 'ada', n, c, method, 1.)
    with pytest.raises(UserError, match="'ada' answered .* twice"):
        read_votes([tmp_path/'one', tmp_path/'two'])


def test_files_of_another_kind(tmp_path):
    (tmp_path/'x.csv').write_text('a,b\n1,2\n')
    with pytest.raises(UserError, match='no file of votes'): read_votes(tmp_path)
    (tmp_path/'x.csv').write_text('')
    with pytest.raises(UserError, match='no file of votes'): read_votes(tmp_path/'x.csv')
    (tmp_path/'x.csv').write_text(','.join(_COLUMNS) + '\n1,2\n')
    with pytest.raises(UserError, match='damaged line'): read_votes(tmp_path/'x.csv')
    with pytest.raises(UserError, match='cannot be read'): read_votes(tmp_path/'none.csv')
    (tmp_path/'x.csv').write_bytes(b'\xff\xfe\n')
    with pytest.raises(UserError, match='no file of votes'): read_votes(tmp_path/'x.csv')


def test_a_photo_whose_name_is_no_text(tmp_path, study):
    name = os.fsdecode(b'caf\xe9')
    odd = S.Study((name,), study.photos[:1], {m: ims[:1] for m, ims in study.pictures.items()}, 0)
    _cast(_votes_file(tmp_path, 'ada'), odd, 'ada', name, 'style', odd.methods[0], 1.)
    assert [v['photo'] for v in read_votes(tmp_path)] == [name]


def test_voters_at_the_same_time(tmp_path, study):
    def vote(who):
        path = _votes_file(tmp_path, who)
        for n, c in _questions(study, who): _cast(path, study, who, n, c, 'w', 1.)
    threads = [threading.Thread(target=vote, args=(f'v{i}',)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(read_votes(tmp_path)) == 8*12


# ---- the booth

def test_booth_asks_everything_and_writes_what_was_clicked(tmp_path, study):
    booth, wanted = Booth(study, 'eve', tmp_path, pause=0), {}
    while booth.waiting:
        q = booth.waiting[0]
        i = len(wanted) % 3
        wanted[q] = booth.order[i]
        booth.buttons[i].click()
    votes = read_votes(tmp_path)
    assert {(v['photo'], v['criterion']): v['method'] for v in votes} == wanted and len(wanted) == 12
    assert all(int(v['place']) == 1 + k % 3 for k, v in enumerate(votes))
    booth.buttons[0].click()
    assert len(read_votes(tmp_path)) == 12


def test_booth_shows_the_pictures_in_the_order_it_unveils(tmp_path, study):
    booth = Booth(study, 'eve', tmp_path, pause=0)
    i = study.names.index(booth.waiting[0][0])
    import io
    for image, method in zip(booth.images, booth.order):
        assert Image.open(io.BytesIO(image.value)).tobytes() == study.pictures[method][i].tobytes()
    assert b'tEXt' not in booth.images[0].value and b'eXIf' not in booth.images[0].value


def test_a_double_click_is_one_vote(tmp_path, study, monkeypatch):
    now = [100.]
    monkeypatch.setattr(S.time, 'monotonic', lambda: now[0])
    booth = Booth(study, 'eve', tmp_path)
    def click_after(seconds):
        now[0] += seconds
        booth.buttons[1].click()
    click_after(2)
    click_after(.1)
    assert len(read_votes(tmp_path)) == 1
    click_after(1)
    assert [v['seconds'] for v in read_votes(tmp_path)] == ['2.0', '1.1']


def test_a_full_disk_keeps_the_question(tmp_path, study, monkeypatch):
    booth = Booth(study, 'eve', tmp_path, pause=0)
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    before = booth.waiting[0]
    with monkeypatch.context() as m:
        m.setattr(S, '_cast', full)
        booth.buttons[0].click()
    assert booth.waiting[0] == before and 'No space' in booth.trouble.value and booth.bar.value == 0
    booth.buttons[0].click()
    assert booth.bar.value == 1 and booth.trouble.value == '' and len(read_votes(tmp_path)) == 1


def test_booth_goes_on_and_does_not_mix_studies(tmp_path, study):
    booth = Booth(study, 'eve', tmp_path, pause=0)
    for _ in range(5): booth.buttons[0].click()
    assert Booth(study, 'eve', tmp_path).waiting == _questions(study, 'eve')[5:]
    other = open_study(study.photos, study.pictures, seed=9)
    assert len(Booth(other, 'eve', tmp_path).waiting) == 12
    assert len(Booth(study, 'mia', tmp_path).waiting) == 12


def test_two_open_ballots_of_one_voter_write_no_question_twice(tmp_path, study):
    one, two = (Booth(study, 'eve', tmp_path, pause=0) for _ in range(2))
    clicks = 0
    while one.waiting or two.waiting:
        for booth, i in ((one, 0), (two, 1), (two, 2)): booth.choose(i)
        clicks += 1
        assert clicks < 20
    votes = read_votes(tmp_path)
    assert len(votes) == 12 == len({(v['photo'], v['criterion']) for v in votes})
    assert all(arrangement(study, 'eve', v['photo'])[int(v['place']) - 1] == v['method'] for v in votes)


def test_a_late_click_shows_the_current_state(tmp_path, study):
    one, two = (Booth(study, 'eve', tmp_path, pause=0) for _ in range(2))
    for _ in range(2): one.choose(0)
    two.choose(1)
    assert len(read_votes(tmp_path)) == 2 and two.waiting == one.waiting
    assert 'not counted' in two.trouble.value and two.bar.value == 2
    (tmp_path/'eve.csv').unlink()                                   # the folder was emptied under the ballot
    two.choose(1)
    assert len(two.waiting) == 12 and two.bar.value == 0


# ---- statistics

def test_wilson_against_scipy():
    stats = pytest.importorskip('scipy.stats')
    for k, n in ((0, 10), (7, 10), (10, 10), (206, 300)):
        for level in (.9, .95):
            ref = stats.binomtest(k, n).proportion_ci(level, method='wilson')
            assert np.allclose(wilson(k, n, level), ref, atol=1e-9)


def test_shares_of_several_tables_at_once():
    "Two tables of three ballots: votes are added over ballots, not over tables; no vote at all is no share."
    counts = np.array([[[1, 0], [1, 0], [0, 2]], [[0, 0], [0, 3], [1, 0]], [[0, 0]]*3])
    assert _shares(counts).tolist() == [[.5, .5], [.25, .75], [0, 0]]


def test_bootstrap_matches_its_theory():
    for rho in (0., .3):
        c = simulate([.5, .3, .2], 400, 10, rho, seed=rho)
        low, high = bootstrap(c)
        per_voter = c.sum(1)[:, 0]/10
        half = 1.96*per_voter.std(ddof=1)/math.sqrt(400)
        assert abs((high - low)[0]/2 - half) < .12*half and low[0] < per_voter.mean() < high[0]
    assert (bootstrap(c)[0] == bootstrap(c)[0]).all()


def test_an_interval_is_never_a_point(study):
    c = np.zeros((12, 4, 3), int)
    c[:, :, 0] = 1
    share, low, high = voter_intervals(c)
    all_of_12, none_of_12 = wilson(12, 12)[0], wilson(0, 12)[1]
    assert share.tolist() == [1, 0, 0]
    assert np.allclose(low, [all_of_12, 0, 0]) and np.allclose(high, [1, none_of_12, none_of_12])
    c[:3, :, :2] = [0, 1]
    low, high = bootstrap(c)
    assert np.allclose(voter_intervals(c)[1:], [[*low[:2], 0], [*high[:2], none_of_12]])
    with pytest.raises(UserError, match='at least 2 voters'): voter_intervals(c[:1])
    one = [dict(study=study.id, voter='a', photo='000', criterion=k, method='u') for k in _CRITERIA]
    with pytest.raises(UserError, match='at least 2 voters'): table_2(one, study.methods)
    two = one + [dict(v, voter='b') for v in one]
    assert table_2(two, study.methods)[0][:2] == ['style', f'1.000 [{wilson(2, 2)[0]:.2f}, 1.00]']


@pytest.mark.parametrize('voters', [20, 100])
def test_bootstrap_against_scipy(voters):
    "The same ballots in SciPy's hat: the ends agree as far as 20,000 draws tell."
    from scipy import stats
    choices = simulate([.5, .3, .2], voters, 10, .2, seed=voters)
    def fractions(drawn, axis):
        total = drawn.sum(axis)                          # (k, repeats)
        return total/total.sum(0)
    theirs = stats.bootstrap((choices.sum(1),), fractions, axis=0, n_resamples=20000, method='percentile',
                             rng=np.random.default_rng(0)).confidence_interval
    mine = bootstrap(choices, repeats=20000)
    assert np.abs(np.array(mine) - theirs).max() < .06*(mine[1] - mine[0]).min()


def test_photos_from_the_hat():
    c = np.zeros((20, 4, 2), int)
    c[:, :2, 0] = 1
    c[:, 2:, 1] = 1                            # everybody agrees, photo by photo
    assert (bootstrap(c)[0] == .5).all() and (bootstrap(c)[1] == .5).all()
    low, high = bootstrap(c, 'photos')
    assert low[0] < .1 and high[0] > .9


def test_winner_test_keeps_its_promise_without_an_opinion_and_finds_a_planted_one():
    def rate(p, rho):
        classes = [simulate(p, 15, 6, rho, seed=('w', rho, s)) for s in range(150)]
        return np.mean([winner_p(c, 200, seed=s) < .05 for s, c in enumerate(classes)])
    for rho in (0., .5, 1.): assert rate([1/3]*3, rho) < .1
    assert rate([.6, .2, .2], .2) > .8


def test_winner_does_not_depend_on_names():
    c = simulate([.5, .3, .2], 12, 5, .2)
    assert abs(winner_p(c, 4000) - winner_p(c[..., [2, 0, 1]], 4000)) < .02


def test_unfinished_ballots_count_with_what_they_hold(tmp_path, study):
    for i, stop in enumerate((12, 5, 1)):
        path = _votes_file(tmp_path, f'v{i}')
        for n, c in _questions(study, f'v{i}')[:stop]: _cast(path, study, f'v{i}', n, c, 'u', 1.)
    votes = read_votes(tmp_path)
    asked = {v['criterion'] for v in votes}
    assert sum(tabulate(votes, c, study.methods).sum() for c in asked) == 18
    assert _shares(tabulate(votes, 'style', study.methods).sum(1)).tolist() == [1., 0., 0.]


def test_a_table_holds_the_voters_and_photos_of_its_own_question(study):
    "Who only judged the content, and a photo only judged by it, leave no empty rows in the table of style."
    vote = dict(study=study.id, voter='a', photo='000', criterion='style', method='v')
    content = dict(vote, criterion='content')
    more = [content, dict(content, photo='001'), dict(content, voter='b')]
    assert tabulate([vote, *more], 'style', study.methods).tolist() == [[[0, 1, 0]]]
    judged = tabulate([vote, *more], 'content', study.methods)
    assert judged.tolist() == [[[0, 1, 0], [0, 1, 0]], [[0, 1, 0], [0, 0, 0]]]


def test_table_refuses_what_is_not_its_own(study):
    vote = dict(study=study.id, voter='a', photo='000', criterion='style', method='u')
    with pytest.raises(UserError, match='2 studies'):
        tabulate([vote, dict(vote, study='x')], 'style', study.methods)
    with pytest.raises(UserError, match='none of'): tabulate([dict(vote, method='z')], 'style', study.methods)
    with pytest.raises(UserError, match="no votes on 'overall'"):
        table_2([vote, dict(vote, criterion='content')], study.methods)


def test_voters_needed_grows_as_it_should():
    assert voters_needed(.25, 6) > voters_needed(.3, 6) > voters_needed(.5, 6)
    assert voters_needed(.3, 6, rho=0.) < voters_needed(.3, 6, rho=.2) < voters_needed(.3, 6, rho=1.)
    assert voters_needed(.3, 6, power=.9) > voters_needed(.3, 6) and voters_needed(.1, 6) > 0


@pytest.mark.parametrize('k', [2, 3, 6, 20])
def test_voters_needed_is_enough_for_an_announcement(k):
    v = voters_needed(.99, k, 10, 0.)
    unanimous = lambda n: winner_p(np.eye(k, dtype=int)[:1].repeat(n, 0)[:, None], 20000)
    assert unanimous(v) < .05 and k**(2. - v) >= .05 - 1e-9                       # and one voter fewer is not


@pytest.mark.parametrize('name, value', [
    ('p', 0.), ('p', 1.), ('p', 1.2), ('p', math.nan), ('p', -.1), ('k', 1), ('k', 0), ('photos', 0),
    ('rho', 1.1), ('rho', math.nan), ('level', 1.), ('power', 0.)])
def test_voters_needed_refuses(name, value):
    with pytest.raises(UserError, match=f'{name} out of range'):
        voters_needed(**dict(dict(p=.3, k=6), **{name: value}))


def test_paper_table_is_three_hundred_votes_each():
    for row in _PAPER_TABLE_2.values():
        counts = [round(300*x) for x in row]
        assert len(row) == len(_PAPER_METHODS) and sum(counts) == 300
        assert np.abs(np.array(counts)/300 - row).max() <= .0005
