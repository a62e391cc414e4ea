"The procedural world: bytes, labels, placement and files, beyond what the lesson checks."
import hashlib, math, os, subprocess, sys
import pytest, torch
from PIL import Image
from scenimefy import world as W
from scenimefy.core import UserError

def digest(t): return hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16]

def test_hash_against_plain_integers():
    def plain(x):
        for _ in range(2): x = ((x ^ (x >> 16))*0x45d9f3b) % 2**32
        return x ^ (x >> 16)
    xs = [0, 1, 2, 12345, 2**31, 2**32 - 1]
    assert W._hash32(torch.tensor(xs)).tolist() == [plain(x) for x in xs]

@pytest.mark.parametrize('seed', [-1, -2**62, 2**31, 2**32 + 5, 2**62])
def test_any_integer_is_a_seed(seed):
    image = W.render([seed], 32, 'anime')
    assert image.isfinite().all() and not torch.equal(image, W.render([seed + 1], 32, 'anime'))

def test_bytes_are_stored():
    ids = [1, 2, 3, W.HELD_OUT + 4]   # seeds and size differ from those in the notebook
    found = [digest(W.to_uint8(W.render(ids, 48, style))) for style in W.STYLES]
    found += [digest(W.labels(ids, 48).to(torch.uint8)), digest(W._rand(torch.tensor(ids), 'x', 5))]
    assert found == ['d26156515906a339', 'cbb129a6fda1301b', '2608f55c8bbaece2', '06ecd505225e7daf']

def test_bytes_do_not_depend_on_process_threads_or_vector_instructions():
    code = ("import torch, hashlib; torch.set_num_threads(1); from scenimefy import world as W;"
            "found = [W.to_uint8(W.render([2, 9], 40, s)).numpy().tobytes() for s in W.STYLES];"
            "digests = [hashlib.sha256(b).hexdigest()[:16] for b in found];"
            "print(torch.backends.cpu.get_cpu_capability(), *digests)")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                         env={**os.environ, 'ATEN_CPU_CAPABILITY': 'default'}).stdout.split()
    assert out == ['DEFAULT', *(digest(W.to_uint8(W.render([9, 2], 40, s).flip(0))) for s in W.STYLES)]

@pytest.mark.parametrize('size', [16, 33, 64])
def test_a_scene_does_not_know_its_batch(size):
    ids = list(range(100, 124))
    def photo(i): return W.render(i, size, 'photo')
    def anime(i): return W.render(i, size, 'anime')
    def labels(i): return W.labels(i, size)
    for draw in (photo, anime, labels):
        batch = draw(ids)
        for k in (0, 11, 23): assert torch.equal(draw([ids[k]])[0], batch[k])

@pytest.mark.parametrize('style', ['photo', 'anime'])
def test_two_sizes_show_one_scene(style):
    small, large = W.render(range(24), 48, style), W.render(range(24), 192, style)
    same = (torch.nn.functional.avg_pool2d(large, 4) - small).abs().mean()
    other = (torch.nn.functional.avg_pool2d(large, 4) - small.roll(1, 0)).abs().mean()
    assert same < .08 and same < .35*other

@pytest.mark.parametrize('size', [1, 2, 3, 5, 8])
def test_tiny_sizes(size):
    for style in W.STYLES:
        t = W.render(range(40), size, style)
        assert t.shape == (40, 3, size, size) and t.min() >= -1 and t.max() <= 1
    assert W.labels(range(40), size).shape == (40, size, size)

def test_labels_follow_the_rules():
    s = W.scenes(range(400))
    lab, n = W.labels(s, 64), 64
    y = ((torch.arange(n) + .5)/n).view(1, -1, 1).expand_as(lab)
    horizon, checked = s.horizon.view(-1, 1, 1), 0
    below = dict(water=True, grass=True, earth=True, sky=False, mountain=False)
    for name, is_below in below.items():
        here = lab == W.CLASSES.index(name)
        assert here.any(), name
        wrong = here & ((y < horizon - 1/n) if is_below else (y > horizon + 1/n))
        assert not wrong.any(), name
        checked += 1
    assert checked == 5
    kinds = s.objects[..., 0]
    houses = (lab == W.CLASSES.index('house')).flatten(1).any(1)
    assert not (houses & ~(kinds == W.HOUSE).any(1)).any()
    water = (lab == W.CLASSES.index('water')).flatten(1).any(1)
    assert not (water & (s.lake == 0) & (s.course[:, 0, 3] == 0)).any()

def test_trees_stand_on_dry_ground():
    s = W.scenes(range(3000))
    for k in range(2):
        centre, half = W._course_at(s.course[:, k], s.objects[..., 2])
        wet = (s.objects[..., 0] > 0) & (half > 0) & ((s.objects[..., 1] - centre).abs() < half)
        assert not wet.any()
    shore = s.lake[:, None]
    assert not ((s.objects[..., 0] > 0) & (s.objects[..., 2] < shore)).any()

def test_pairs_agree_on_edges():
    "Photo and anime of one seed have their outlines at the same places, those of two seeds have not."
    def edges(t): return (t.mean(1)[..., 1:] - t.mean(1)[..., :-1]).abs().flatten(1)
    def corr(a, b):
        a, b = a - a.mean(1, True), b - b.mean(1, True)
        return torch.nn.functional.cosine_similarity(a, b).mean()
    p, a = edges(W.render(range(64), 64, 'photo')), edges(W.render(range(64), 64, 'anime'))
    assert corr(p, a) > .5 > .25 > corr(p, a.roll(1, 0))

def test_daylight_and_captions():
    s = W.scenes(range(600))
    day = W.is_daytime(s)
    assert .8 < day.double().mean() < .95 and torch.equal(day[:5], W.is_daytime(range(5)))
    texts = W.captions(s)
    assert len(set(texts)) > 100 and texts[7] == W.caption(7)
    for text, time in zip(texts, s.time.tolist()): assert ('by day', 'at sunset', 'at dusk')[time] in text
    assert all(('lake' in t) == bool(k) for t, k in zip(texts, s.lake > 0))

def test_domain_gap_and_disjoint_seeds(tmp_path):
    def share(mix):
        lab = W.labels(W.scenes(range(400), mix), 24)
        return torch.bincount(lab.flatten(), minlength=7).double()
    gap = share('anime')/share('photo')
    assert gap[W.CLASSES.index('house')] > 1.3 and gap[W.CLASSES.index('mountain')] < .85
    W.write_world(tmp_path, n_photos=3, n_anime=3, n_pairs=2, size=16, seed=2)
    def read(p):
        content = bytearray(Image.open(tmp_path/p).tobytes())
        return torch.frombuffer(content, dtype=torch.uint8).view(16, 16, 3)
    first = 2_000_000
    for path, style, mix, seed in (
            ('photos/000000.png', 'photo', 'photo', 0), ('anime/000002.png', 'anime', 'anime', 5),
            ('pairs/trainA/000001.png', 'photo', 'any', 7), ('pairs/trainB/000001.png', 'anime', 'any', 7)):
        assert torch.equal(read(path), W.to_uint8(W.render(W.scenes([first + seed], mix), 16, style))[0])
    W.write_world(tmp_path, n_photos=3, n_anime=3, n_pairs=2, size=16, seed=2)     # the same again is welcome
    (tmp_path/'anime'/'holiday.png').write_bytes(b'x')
    with pytest.raises(UserError, match='other files'): W.write_world(tmp_path, 3, 3, 2, 16, 2)

def test_batches_do_not_show_in_the_files(tmp_path):
    "Five photos written two at a time are the five that are written at once, and all different."
    for batch in (2, 32):
        W.write_world(tmp_path/str(batch), n_photos=5, n_anime=3, n_pairs=3, size=16, batch=batch)
    def read(batch):
        files = sorted((tmp_path/batch).rglob('*.png'))
        return {p.relative_to(tmp_path/batch): p.read_bytes() for p in files}
    assert read('2') == read('32') and len(set(read('2').values())) == len(read('2')) == 5 + 3 + 2*3

def test_captions_count_houses():
    s = W.scenes(range(400))
    n = (s.objects[..., 0] == W.HOUSE).sum(1).tolist()
    assert {0, 1, 2} == set(n)
    for text, k in zip(W.captions(s), n):
        assert ('a house' in text, 'houses' in text) == (k == 1, k == 2), text

@pytest.mark.parametrize('call, text', [
    (lambda: W.scenes([1], 'film'), 'any, photo, anime'), (lambda: W.scenes([1.5]), 'integers'),
    (lambda: W.render([1], 64, 'oil'), 'photo, anime'), (lambda: W.render([1], 0), 'at least 1 pixel'),
    (lambda: W.write_world('x', seed=-1), '0 to 9'), (lambda: W.write_world('x', n_photos=-1), 'asked for')])
def test_errors_say_what_to_do(call, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, UserError), match=text): call()
    assert not list(tmp_path.iterdir())

def test_wave_and_noise_stay_in_range():
    t = torch.linspace(-3, 3, 1201)
    assert (W._wave(t) - torch.sin(2*math.pi*t)).abs().max() < .06
    table = W._rand(torch.arange(3), 'table', 32, 32)
    n = W._value_noise(table, torch.rand(1, 20, 30)*90 - 40, torch.rand(1, 20, 30)*90 - 40)
    assert n.min() >= 0 and n.max() <= 1 and n.shape == (3, 20, 30)
