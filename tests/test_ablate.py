"Tables that survive kills, refuse what they cannot vouch for, and mark what they can."
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from scipy import stats

import scenimefy.ablate as A
from scenimefy.ablate import (PUBLISHED, TABLE_3_MORE, TABLE_4, _TOY_RECIPE, AblateSettings, Ruler, ablate,
                              compare_rows, draw_table, folder_digest, interval, read_table, row_file,
                              row_values, _rounded, _run_key, run_table, sentences, short_translator, strip,
                              table_cells, verdict, world_ruler, _ablation_text, _write_table_page)
from scenimefy.core import SettingsError, UserError, seeded
from scenimefy.finetune import FinetuneSettings, shared_styles
from scenimefy.page import table_html
from scenimefy.runs import Diverged, Stopped
from scenimefy.selection import Selected, passes
from scenimefy.stylegan import load_stylegan
from scenimefy.painters import render
from scenimefy.world import HELD_OUT, scenes

ROWS = {'full': {}, 'w/o sail': dict(adds=.5), 'twin of full': {}}
ABOUT = dict(boat='red', lr=1e-3, sizes=(1, 2))


def number(change, seed, folder): return 1 + change.get('adds', 0) + .1*seed
def measure(x): return dict(lbce=x, agreement=1/x)
def silent(text): pass
def never(*args): pytest.fail('a run was repeated')


def table(out, rows=ROWS, run_one=number, seeds=range(3), about=ABOUT, **more):
    return run_table(rows, run_one, measure, seeds, out, about, out.parent/'work', say=silent, **more)


# the arithmetic, against SciPy

@pytest.mark.parametrize('n', [2, 3, 4, 7, 21, 40])
def test_interval_is_scipys(n):
    d = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).tolist()
    mean, low, high = interval(d)
    theirs = stats.ttest_1samp(d, 0).confidence_interval(.95)
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-9*(high - low))
    assert mean == pytest.approx(sum(d)/n)


@pytest.mark.parametrize('n, quantile', [
    (2, 12.706), (3, 4.303), (5, 2.776), (11, 2.228), (21, 2.086), (41, 2.021)])
def test_interval_by_the_printed_table(n, quantile):
    "Student's t at .975, as every textbook prints it."
    d = [(-1)**k for k in range(n - 1)] + [0]
    mean, low, high = interval(d)
    assert (high - mean)/(statistics.stdev(d)/math.sqrt(n)) == pytest.approx(quantile, abs=5e-4)


@pytest.mark.parametrize('low, high, paper, mark', [
    (.1, .2, .3, 'agree'), (-.2, -.1, -.3, 'agree'), (.1, .2, -.3, 'disagree'), (-.2, -.1, .3, 'disagree'),
    (-.1, .2, .3, 'undecided'), (-math.inf, math.inf, .3, 'undecided'), (0., .2, .3, 'undecided'),
    (.1, .2, None, ''), (.1, .2, 0., '')])
def test_verdict(low, high, paper, mark): assert verdict(low, high, paper) == mark


# names of runs

def test_key_survives_json_and_sees_everything():
    key = _run_key(json.loads(json.dumps(ABOUT)), {}, 0)
    assert key == _run_key(ABOUT, {}, 0) and re.fullmatch('[0-9a-f]{16}', key)
    others = {_run_key({**ABOUT, 'lr': 2e-3}, {}, 0), _run_key(ABOUT, dict(a=1), 0), _run_key(ABOUT, {}, 1)}
    assert len({key, *others}) == 4


def test_folder_digest_sees_names_contents_and_moves(tmp_path):
    a, b = tmp_path/'a', tmp_path/'b'
    for folder in (a, b):
        (folder/'sub').mkdir(parents=True)
        (folder/'sub'/'x.png').write_bytes(b'1')
    one = folder_digest(a)
    assert one == folder_digest(b)
    (b/'.complete').touch()
    assert one == folder_digest(b)                                       # markers do not count
    (b/'sub'/'x.png').rename(b/'x.png')
    assert one != folder_digest(b)
    (a/'sub'/'x.png').write_bytes(b'2')
    assert one != folder_digest(a)


# the engine

def recorded(): # calls; `number`, which adds itself to them
    calls = []
    def counted(change, seed, folder):
        calls.append((change, seed))
        return number(change, seed, folder)
    return calls, counted


def test_rows_that_differ_by_nothing_are_one_run(tmp_path):
    calls, counted = recorded()
    t = table(tmp_path/'t.json', run_one=counted)
    assert len(calls) == 6 and [seed for _, seed in calls] == [0, 0, 1, 1, 2, 2]       # seeds outermost
    assert row_values(t, 'full', 'lbce') == row_values(t, 'twin of full', 'lbce') == {0: 1., 1: 1.1, 2: 1.2}
    line = compare_rows(t, 'lbce')[1]
    assert line.seeds == 3 and (line.difference, line.low, line.high) == pytest.approx((.5, .5, .5))


def test_a_second_call_runs_what_is_new(tmp_path):
    table(tmp_path/'t.json', seeds=[0])
    calls, counted = recorded()
    t = table(tmp_path/'t.json', {**ROWS, 'new': dict(adds=1)}, counted, seeds=range(2))
    assert calls == [(dict(adds=1), 0), ({}, 1), (dict(adds=.5), 1), (dict(adds=1), 1)]
    assert list(t['rows']) == [*ROWS, 'new']


def test_rows_left_out_of_a_later_call_stay_in_the_file(tmp_path):
    table(tmp_path/'t.json', seeds=[0])
    assert len(compare_rows(table(tmp_path/'t.json', {'full': {}}, seeds=[0]), 'lbce')) == 3


def test_renamed_rows_keep_their_results(tmp_path):
    table(tmp_path/'t.json', seeds=[0])
    t = table(tmp_path/'t.json', {'ours': {}, 'sail-less': dict(adds=.5)}, never, seeds=[0])
    assert row_values(t, 'ours', 'lbce') == {0: 1.}


def test_scale_is_asked_once(tmp_path):
    asked = []
    def scale():
        asked.append(1)
        return {'known': dict(lbce=1.23456789)}
    for _ in range(2): t = table(tmp_path/'t.json', seeds=[0], scale=scale)
    assert len(asked) == 1 and t['scale'] == {'known': dict(lbce=1.23457)}


def test_each_run_gets_an_empty_folder_that_goes_away(tmp_path):
    def careful(change, seed, folder):
        assert not folder.exists()
        folder.mkdir(parents=True); (folder/'x').touch()
        return 1.
    key = _run_key(json.loads(json.dumps(ABOUT)), {}, 0)
    (tmp_path/'work'/key).mkdir(parents=True)                                # left by a life that was killed
    table(tmp_path/'t.json', run_one=careful)
    assert not list((tmp_path/'work').iterdir())


def test_pictures_are_kept_of_the_first_seed(tmp_path):
    table(tmp_path/'t.json', picture=lambda x: strip(torch.full((5, 3, 8, 8), x - 1)))
    assert sorted(p.name for p in (tmp_path/'t').iterdir()) == ['full.jpg', 'w-o-sail.jpg']
    with Image.open(tmp_path/'t'/'full.jpg') as im: assert im.size == (32, 8)


def test_no_row_can_leave_the_folder():
    for row in ('../../etc/x', '/abs', 'a\\b', '..', 'w/o D_P'):
        for bad in ('/', '\\', '..'): assert bad not in row_file(row)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_what_diverged_is_recorded_and_left_out(tmp_path, bad):
    def wild(change, seed, folder):
        if change and seed == 1: raise Diverged('the training diverged at step 3')
        return bad if change and seed == 2 else number(change, seed, folder)
    def lbce(x): return dict(lbce=x)
    t = run_table(ROWS, wild, lbce, range(3), tmp_path/'t.json', ABOUT, tmp_path/'work', say=silent)
    failed = [r['failed'] for r in t['runs'].values() if 'failed' in r]
    assert len(failed) == 2 and 'step 3' in failed[0] and 'lbce' in failed[1]
    assert compare_rows(t, 'lbce')[1].seeds == 1 and math.isinf(compare_rows(t, 'lbce')[1].high)
    table(tmp_path/'t.json', run_one=never)


def test_other_errors_stop_the_table_and_keep_the_rest(tmp_path):
    def broken(change, seed, folder):
        if seed == 1: raise OSError('disk')
        return number(change, seed, folder)
    with pytest.raises(OSError): table(tmp_path/'t.json', run_one=broken)
    assert len(read_table(tmp_path/'t.json')['runs']) == 2


def test_a_stopped_training_says_how_to_go_on(tmp_path):
    def stopped(*a): raise Stopped('stopped by SIGTERM after step 3 of 9; it is saved, go on with --resume')
    said = r'by SIGTERM after step 3 of 9 \(full, seed 0\); 0 results are kept .* the same call'
    with pytest.raises(Stopped, match=said) as e: table(tmp_path/'t.json', run_one=stopped)
    assert '--resume' not in str(e.value)


def test_other_conditions_are_refused_by_name(tmp_path):
    table(tmp_path/'t.json')
    with pytest.raises(UserError, match=r'other conditions \(boat, wind\)'):
        table(tmp_path/'t.json', about={**ABOUT, 'boat': 'blue', 'wind': 3})


@pytest.mark.parametrize('runs', [
    [], {'x': {}}, {'x': 3}, {'x': dict(row='full', change={}, seed=0, found=3)},
    {'x': dict(row=None, change={}, seed=0, found={})}])
def test_runs_that_cannot_be_read(tmp_path, runs):
    (tmp_path/'t.json').write_text(json.dumps(dict(about={}, scale={}, rows={}, runs=runs)))
    with pytest.raises(UserError, match='runs cannot be read'): read_table(tmp_path/'t.json')


@pytest.mark.parametrize('text, said', [
    ('{', 'no table of results'), ('[]', 'no table'), ('{"about": {}}', 'no table'), ('null', 'no table')])
def test_files_that_are_no_tables(tmp_path, text, said):
    (tmp_path/'t.json').write_text(text)
    with pytest.raises(UserError, match=said): table(tmp_path/'t.json')
    assert (tmp_path/'t.json').read_text() == text                           # and nothing was overwritten


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match='cannot read'): read_table(tmp_path/'none.json')


def test_edited_settings_are_noticed(tmp_path):
    table(tmp_path/'t.json')
    text = (tmp_path/'t.json').read_text()
    (tmp_path/'t.json').write_text(text.replace('0.001', '0.002'))
    with pytest.raises(UserError, match='edited'): read_table(tmp_path/'t.json')


def test_killed_and_continued(tmp_path):
    "SIGKILL in the middle of a run: what was measured is there; the second life ends with the same numbers."
    code = '''
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_ablate import ABOUT, ROWS, measure, number
from scenimefy.ablate import run_table
def slow(change, seed, folder):
    if seed == 1: print('second seed', flush=True); time.sleep(60)
    return number(change, seed, folder)
out = Path(sys.argv[1])
run_table(ROWS, slow, measure, range(3), out, ABOUT, out.parent/'work')
'''
    out = tmp_path/'t.json'
    words = [sys.executable, '-c', code, str(out), str(Path(__file__).parent)]
    p = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    for line in p.stdout:
        if 'second seed' in line: break
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    p.stdout.close()
    assert {r['seed'] for r in read_table(out)['runs'].values()} == {0}
    again, whole = table(out), table(tmp_path/'whole.json')
    def plain(t): return {k: {**r, 'seconds': 0} for k, r in t['runs'].items()}
    assert plain(again) == plain(whole)
    assert {p.name for p in tmp_path.iterdir()} - {'work'} == {'t.json', 'whole.json'}


# reading

def noisy(change, seed, folder):
    shared, own = (.02, -.03, .01)[seed], (.001, -.002, .001)[seed]
    return 1.3 + change['adds'] + shared + own if change else 1.3 + shared


def test_marks_sentences_cells_and_figure(tmp_path):
    paper = {'full': 4., 'w/o sail': 4.2, 'w/o anchor': 4.1}
    effects = {'w/o sail': .05, 'w/o anchor': -.05, 'w/o paint': .0001}
    rows = {'full': {}} | {row: dict(adds=effect) for row, effect in effects.items()}
    t = table(tmp_path/'t.json', rows, noisy, scale=lambda: {'known': dict(lbce=1.)})
    lines = compare_rows(t, 'lbce', paper)
    assert [v.mark for v in lines] == ['', 'agree', 'disagree', '']
    assert lines[1].difference == pytest.approx(.05)
    assert lines[1].sd == pytest.approx(stats.tstd([1.371, 1.318, 1.361]))
    said = sentences(lines)
    assert len(said) == 3 and said[0].startswith('w/o sail: +0.20 in the paper; +0.0500')
    assert said[0].endswith('the same sign: agree.')
    assert 'the opposite sign: disagree' in said[1] and 'no such row' in said[2] and 'not excluded' in said[2]
    half = stats.t.ppf(.975, 2)*stats.tstd([.0011, -.0019, .0011])/3**.5           # what no row can go below
    assert lines[3].least == pytest.approx(half) and f'these seeds can show {half:.4f} or more' in said[2]
    assert all('can show' not in text for text in said[:2])
    head, cells = table_cells(t, paper)
    assert len(cells) == 5 and all(len(c) == len(head) for c in cells)
    assert 'w/o sail' in table_html(cells, head)
    figure = draw_table(t, paper)
    figure.savefig(tmp_path/'f.png')
    assert len(figure.axes) == 3
    assert [x.get_text() for x in figure.axes[0].get_yticklabels()] == list(rows)[1:]


def test_one_seed_and_no_reference(tmp_path):
    t = table(tmp_path/'t.json', seeds=[0])
    head, cells = table_cells(t, PUBLISHED[4])
    assert all('nan' not in c and 'inf' not in c for row in cells for c in row)
    assert 'one seed' in sentences(compare_rows(t, 'lbce'))[0]
    draw_table(t, {})
    assert compare_rows(t, 'lbce', reference='w/o sail')[0].difference == pytest.approx(-.5)
    assert compare_rows(table(tmp_path/'u.json', {'full': {}, 'b': dict(adds=1)}, seeds=[]), 'lbce') == []


def test_seeds_that_only_one_row_has_do_not_count(tmp_path):
    table(tmp_path/'t.json', {'full': {}}, seeds=range(3))
    t = table(tmp_path/'t.json', seeds=[2, 5])
    assert compare_rows(t, 'lbce')[1].seeds == 2 and list(row_values(t, 'full', 'lbce')) == [0, 1, 2, 5]


def test_page_is_safe_and_whole(tmp_path):
    rows = {'full': {}, 'w/o <script>': dict(adds=1)}
    t = table(tmp_path/'table4.json', rows, noisy, picture=lambda x: torch.zeros(3, 8, 32))
    text = _write_table_page(t, _ablation_text(4), tmp_path/'table4.json').read_text(encoding='utf8')
    assert text.count('<img') == 3 and 'http' not in text.replace('http-equiv', '')
    assert '<script' not in text


# rows, plans, settings

def test_published_numbers_are_the_papers():
    assert list(PUBLISHED[3].values()) == [4.24, 4.45, 4.53, 4.25, 4.30]
    assert list(PUBLISHED[4].values()) == [4.39, 4.76, 4.50, 4.68, 4.72, 4.58]
    assert all(v > PUBLISHED[n]['full'] for n in (3, 4) for k, v in PUBLISHED[n].items() if k != 'full')


def test_every_change_is_legal_json():
    for change in TABLE_3_MORE.values(): FinetuneSettings.preset('tiny').but(**json.loads(json.dumps(change)))
    for change in TABLE_4.values():
        settings = {k: v for k, v in json.loads(json.dumps(change)).items() if k != 'pairs'}
        _TOY_RECIPE.but(**settings)
    assert len({json.dumps(c) for c in TABLE_4.values()}) == len(TABLE_4) == 10


@pytest.mark.parametrize('budget, epochs, steps', [(2, 2, 2), (19, 19, 19), (120, 20, 120), (50, 20, 40)])
def test_short_translator(budget, epochs, steps):
    cfg = short_translator(budget)
    assert cfg.epochs == epochs and cfg.epochs*cfg.epoch_steps == steps


def test_wrong_table_and_row(tmp_path):
    with pytest.raises(SettingsError, match='3 or 4'): ablate(5, tmp_path/'o')
    with pytest.raises(SettingsError, match="no row 'w/o D_C'; known: full, w/o FreezeG"):
        ablate(3, tmp_path/'o', rows=['w/o D_C'])
    assert not (tmp_path/'o').exists()
    with pytest.raises(SettingsError, match='budget'): AblateSettings().but(budget=1)


def test_ruler_by_hand():
    photo = torch.zeros(8, 3, 64, 64)
    ruler = Ruler(photo, truth=photo + .5, n_real=8)
    found = ruler(photo)
    assert found['agreement'] == 1 and found['l1'] == pytest.approx(.5) and found['frechet'] > 0
    assert ruler(photo + 7)['l1'] == pytest.approx(.5)                                  # clamped to 1 first
    ruler.truth = None
    assert 'l1' not in ruler(photo)


def test_ruler_takes_labels_from_the_photo():
    "Two classes by hand: photos a little more sky than grass, pictures clearly grass in one of two pixels."
    ruler = Ruler(torch.zeros(2, 3, 32, 32), n_real=8)
    ruler.votes = torch.tensor([.6, .4]).view(1, 2, 1, 1).expand(2, 2, 1, 2)
    ruler.vote = lambda images: torch.tensor([[.8, .2], [.2, .8]]).view(1, 2, 1, 2).expand(2, 2, 1, 2)
    found = ruler(torch.zeros(2, 3, 32, 32))
    by_hand = (math.log(1 + math.exp(-.6)) + math.log(1 + math.exp(.6)))/2
    assert found['lbce'] == pytest.approx(by_hand, abs=1e-6)
    assert found['agreement'] == .5


def test_world_ruler_holds_the_same_scenes_twice_and_real_anime_of_others():
    "Photos, and their scenes as anime; both held out. What is called real is what a collection of anime has."
    ruler, seeds = world_ruler(3, 32, 4), range(HELD_OUT + 20_000, HELD_OUT + 20_003)
    assert torch.equal(ruler.photo, render(scenes(seeds, 'photo'), 32, 'photo'))
    assert torch.equal(ruler.truth, render(scenes(seeds, 'photo'), 32, 'anime'))
    real = render(scenes(range(HELD_OUT + 1000, HELD_OUT + 1004), 'anime'), 32, 'anime')
    torch.testing.assert_close(ruler.real, ruler.features(real), atol=1e-4, rtol=1e-4)


def test_scale_mixes_scenes_up_and_not_pixels():
    class Shows(Ruler):
        def __init__(self): self.photo, self.truth = torch.rand(2, 3, 3, 4, 4)
        def __call__(self, images): return images
    ruler = Shows()
    known = ruler.scale()
    assert torch.equal(known['the photos themselves'], ruler.photo)
    assert torch.equal(known['true anime'], ruler.truth)
    assert torch.equal(known['anime of other scenes'], ruler.truth[[2, 0, 1]])


def test_pairs_that_never_met_the_selection(monkeypatch, tmp_path):
    "The worst candidate of all is welcome in one folder and not in the other; both hold as many."
    asked = []
    def selected(rule, source, segmenter, out):
        asked.append(rule)
        return Selected(out, 1, 1)
    monkeypatch.setattr(A, 'make_pairs', selected)
    found = A.pair_folders(AblateSettings().but(pairs=6), tmp_path)
    assert list(found) == ['pairs', 'unselected'] and found['pairs'] != found['unselected']
    worst = dict(lbce=50., n_categories=1)
    assert [passes(worst, rule) for rule in asked] == [False, True]
    assert [rule.count for rule in asked] == [6, 6] and [rule.keep_best for rule in asked] == [.7, 1.]


def test_rows_of_table_4_reach_the_training(monkeypatch, tmp_path):
    "Each with its seed and its change; one row alone gets the folder of unselected pairs."
    seen = []
    for side in ('photos', 'anime'): (tmp_path/side).mkdir()
    pairs = {k: tmp_path/k for k in ('pairs', 'unselected')}
    monkeypatch.setattr(A, 'world_folder', lambda *a: tmp_path)
    monkeypatch.setattr(A, 'pair_folders', lambda *a: pairs)
    monkeypatch.setattr(A, 'world_ruler', lambda *a: SimpleNamespace(photo='photos', scale=None))
    def trained(*args, device, start):
        seen.append(args[:4])
        assert start == 'copy'                                      # all rows begin from one network
        return 'made'
    monkeypatch.setattr(A, 'digest', lambda net: getattr(net, 'paint', 'a judge'))
    monkeypatch.setattr(A, 'train', trained)
    monkeypatch.setattr(A, 'load_translator', lambda made: SimpleNamespace(paint=f'painted by {made}'))
    monkeypatch.setattr(A, 'in_parts', lambda net, photos: (net, photos))
    plan = A.plan_4(AblateSettings(), tmp_path)
    base = short_translator(AblateSettings().budget).but(tone='style')
    for row, change in plan['rows'].items():
        assert plan['run_one'](change, 5, tmp_path/'run') == ('painted by made', 'photos')
        cfg, *folders = seen[-1]
        assert cfg == base.but(seed=5, **{k: v for k, v in change.items() if k != 'pairs'})
        wanted = pairs['unselected' if row == 'no selection' else 'pairs']
        assert folders == [tmp_path/'photos', tmp_path/'anime', wanted]
    assert len(seen) == 10 and plan['about']['start'] == 'painted by copy'


def test_rows_of_table_3_reach_the_fine_tuning_and_paint_the_same_codes(monkeypatch, tmp_path):
    "More codes than fit into one batch: each keeps its own style and noise."
    seen, painted = [], []
    (tmp_path/'anime').mkdir()
    monkeypatch.setattr(A, 'world_folder', lambda *a: tmp_path)
    def ruler(photo, n_real):
        painted.append(photo)
        return SimpleNamespace(photo=photo)
    def tuned(cfg, source, anime, out, device):
        seen.append(cfg)
        return 'tiny'
    monkeypatch.setattr(A, 'Ruler', ruler)
    monkeypatch.setattr(A, 'finetune', tuned)
    plan = A.plan_3(AblateSettings().but(scenes=52, budget=7), tmp_path)
    source = load_stylegan('tiny')
    w_plus, noise = shared_styles(source, 52, generator=seeded('table 3'))
    with torch.no_grad(): want = source.synthesis(w_plus[50:], [layer[50:] for layer in noise]).clamp(-1, 1)
    torch.testing.assert_close(painted[0][50:], want, atol=1e-4, rtol=1e-4)
    assert torch.equal(plan['run_one']({}, 5, tmp_path/'run'), painted[0])   # an untouched copy
    monkeypatch.setattr(A, 'in_parts', lambda *a: None)
    base = FinetuneSettings.preset('tiny').but(steps=7, log_every=7, sample_every=7, save_every=7)
    for change in plan['rows'].values():
        plan['run_one'](change, 5, tmp_path/'run')
        assert seen[-1] == base.but(seed=5, **change)


def test_rounded():
    assert _rounded(dict(a=1/3)) == dict(a=.33333)
    with pytest.raises(Diverged, match='b came out'): _rounded(dict(a=1., b=math.nan))


def test_table_3_of_two_steps(tmp_path):
    "The whole way, on the bundled networks; the same call again runs nothing."
    cfg, said = AblateSettings().but(seeds=1, budget=2, world=4, scenes=8, real=8), []
    page = ablate(3, tmp_path/'o', cfg, ['w/o D_CLIP'], say=said.append)
    t = read_table(tmp_path/'o'/'table3.json')
    assert list(t['rows']) == ['full', 'w/o D_CLIP'] and len(said) == 2 and page.exists()
    assert t['scale']['anime of other scenes']['agreement'] < t['scale']['true anime']['agreement']
    assert {p.name for p in (tmp_path/'o'/'table3').iterdir()} == {'photos.jpg', 'full.jpg', 'w-o-d-clip.jpg'}
    before = (tmp_path/'o'/'table3.json').read_bytes()
    ablate(3, tmp_path/'o', cfg, ['w/o D_CLIP'], say=said.append)
    assert len(said) == 2 and before == (tmp_path/'o'/'table3.json').read_bytes()
