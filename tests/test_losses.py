"Losses: a Stage-3 step of the released implementation, the two of Stage 1, what a lesson would be bored by."
import math

import pytest
import torch
import torch.nn.functional as F

from scenimefy import losses as L

TAPS = (0, 4, 8, 12, 16)


def unit(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, dtype=dtype, generator=generator), dim=-1)


# ---- one step of the released implementation; networks as plain functions, independent of the package ----

def weights(ref, name):
    return {k.split('/', 2)[2]: v.clone() for k, v in ref.items() if k.startswith(f'weights/{name}/')}


def blur_down(h, kernel):
    return F.conv2d(F.pad(h, (1,)*4, mode='reflect'), kernel, stride=2, groups=h.shape[1])


def encode(w, x):
    def conv(h, n, pad=0): return F.conv2d(h, w[f'{n}.weight'], w[f'{n}.bias'], padding=pad)
    def active(h): return F.relu(F.instance_norm(h))
    def part(h, n, i): return conv(F.pad(h, (1,)*4, mode='reflect'), f'model.{n}.conv_block.{i}')
    taps = [F.pad(x, (3,)*4, mode='reflect')]
    taps.append(conv(active(conv(taps[0], 'model.1')), 'model.4', 1))
    taps.append(conv(blur_down(active(taps[1]), w['model.7.filt']), 'model.8', 1))
    h = blur_down(active(taps[2]), w['model.11.filt'])
    for n in range(12, 17):
        inner = active(part(h, n, 1))
        h = h + F.instance_norm(part(inner, n, 5))
        if n in TAPS: taps.append(h)
    return taps


def head(w, feats, ids):
    rows = []
    for i, (f, at) in enumerate(zip(feats, ids)):
        v = f.flatten(2).mT[:, at]
        for j in (0, 2):
            v = F.linear(v, w[f'mlp_{i}.{j}.weight'], w[f'mlp_{i}.{j}.bias'])
            if j == 0: v = v.relu()
        rows.append(v/(v.norm(dim=-1, keepdim=True) + 1e-7))
    return rows


def critic(w, h):
    blur_after = {0: 2, 3: 6, 7: 10}        # {number of a convolution: that of the blur behind it}
    for n in (0, 3, 7, 11, 14):
        h = F.conv2d(h, w[f'model.{n}.weight'], w[f'model.{n}.bias'], padding=1)
        if n in (3, 7, 11): h = F.instance_norm(h)
        if n != 14: h = F.leaky_relu(h, .2)
        if n in blur_after: h = blur_down(h, w[f'model.{blur_after[n]}.filt'])
    return h


def close(mine, ref, rel=1e-4):
    mine, ref = mine.item(), ref.item()
    assert math.isclose(mine, ref, rel_tol=rel), f'{mine} against {ref}'


@pytest.fixture
def step(reference):
    "Rows of every image pair of one released step, heads with gradient, and its numbers."
    ref = reference('translation_step')
    G, heads, heads_s = (weights(ref, n) for n in ('G', 'F', 'F_s'))
    ids = [ref[f'patch_ids/{t}'] for t in TAPS]
    for w in (heads, heads_s):
        for p in w.values(): p.requires_grad_()
    def rows(w, name): return head(w, encode(G, ref[name]), ids)
    pairs = dict(x=(rows(heads, 'forward/fake_B'), rows(heads, 'input/real_A')),
                 y=(rows(heads, 'forward/idt_B'), rows(heads, 'input/real_B')),
                 p=(rows(heads_s, 'forward/fake_B_p'), rows(heads_s, 'input/real_B_p')))
    return ref, pairs, heads, heads_s


def mean_over_taps(loss, q, k):
    return torch.stack([loss(a, b) for a, b in zip(q, k)]).mean()


def weighted_hdce(epoch):
    return lambda q, k: L.hdce(q, k, L.hard_negative_weights(k, L.gamma(epoch)))


@pytest.mark.parametrize('epoch', (1, 2, 10, 20))
def test_reference_taps(step, epoch):
    ref, pairs, _, _ = step
    checked = 0
    for i, t in enumerate(TAPS):
        def at(name): return ref[f'loss/epoch{epoch}/{name}_layer{t}']
        q, k = (rows[i] for rows in pairs['x'])
        qp, kp = (rows[i] for rows in pairs['p'])
        torch.testing.assert_close(k[0].detach(), ref[f'forward/pool_A/{t}'], atol=1e-4, rtol=1e-4)
        hard = L.hard_negative_weights(k, L.gamma(epoch))[0]
        torch.testing.assert_close(hard, at('hdce_weight'), atol=1e-5, rtol=1e-4)
        close(L.src(q, k), at('raw_SRC'))
        close(weighted_hdce(epoch)(q, k), at('raw_HDCE'))
        close(L.patch_nce(qp, kp), at('raw_StyleNCE'))
        checked += 1
    assert checked == 5


def test_reference_lsgan(reference):
    ref = reference('translation_step')
    def at(name): return ref[f'loss/epoch1/{name}']
    def pair(image): return critic(weights(ref, 'D_p'), torch.cat([ref['input/real_A_p'], image], 1))
    fake, real = (critic(weights(ref, 'D'), ref[n]) for n in ('forward/fake_B', 'input/real_B'))
    fake_p, real_p = (pair(ref[n]) for n in ('forward/fake_B_p', 'input/real_B_p'))
    torch.testing.assert_close(fake, ref['forward/D_fake_B'], atol=1e-4, rtol=1e-4)
    for (a, b), end in (((fake, real), ''), ((fake_p, real_p), '_p')):
        close(L.lsgan(a, False), at(f'loss_D{end}_fake'))
        close(L.lsgan(b, True), at(f'loss_D{end}_real'))
        close((L.lsgan(a, False) + L.lsgan(b, True))/2, at(f'loss_D{end}'))
        close(L.lsgan(a, True), at(f'loss_G_GAN{end}'))


@pytest.mark.parametrize('epoch', (1, 20))
def test_reference_total(step, epoch):
    "The sum of one step, with the doubled weight and the stuck decay of the released code put in by hand."
    ref, pairs, heads, heads_s = step
    def at(name): return ref[f'loss/epoch{epoch}/{name}']
    src = .05*mean_over_taps(L.src, *pairs['x'])
    hdce, idt = (.1*mean_over_taps(weighted_hdce(epoch), *pairs[n]) for n in 'xy')
    style = .05*.05*mean_over_taps(L.patch_nce, *pairs['p'])
    for mine, name in ((src, 'SRC'), (hdce, 'HDCE'), (idt, 'HDCE_Y'), (style, 'NCE_s')):
        close(mine, at(f'loss_{name}'))
    total = at('loss_G_GAN') + src + (hdce + idt)/2 + at('loss_G_GAN_p') + style
    close(total, at('loss_G'))
    if epoch == 1:                   # gradients are recorded at epoch 1: decoupled form, no leak through keys
        total.backward()
        def norm(w): return torch.stack([p.grad.norm() for p in w.values()]).norm()
        close(norm(heads), ref['grad_norm/F'], rel=1e-3)
        close(norm(heads_s), ref['grad_norm/F_s'], rel=1e-3)


# ---- properties ----

LOSSES = dict(patch_nce=L.patch_nce, src=L.src, hdce=L.hdce,
              weighted=lambda q, k: L.hdce(q, k, L.hard_negative_weights(k, 10.)))


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('half', (torch.bfloat16, torch.float16))
def test_float32_whatever_surrounds_it(name, half):
    f = LOSSES[name]
    q, k = (unit(2, 16, 8, dtype=torch.float32, seed=s) for s in (1, 2))
    full = f(q, k)
    with torch.autocast('cpu', dtype=torch.bfloat16): inside = f(q, k)
    assert torch.equal(inside, full)
    low = q.to(half).requires_grad_()
    value = f(low, k.to(half))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, f(q.to(half).float(), k.to(half).float()))
    value.backward()
    assert low.grad.dtype == half and low.grad.isfinite().all()
    assert f(q=q, k=k) == full                                      # by keyword as well


@pytest.mark.parametrize('name', ['patch_nce', 'src', 'hdce'])
def test_half_precision_by_keyword_is_widened_too(name):
    q, k = (unit(2, 16, 8, dtype=torch.float32, seed=s).bfloat16() for s in (1, 2))
    value = getattr(L, name)(q=q, k=k)
    assert value.dtype == torch.float32 and torch.equal(value, getattr(L, name)(q, k))


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('batch', (2, 3))
def test_every_image_is_judged_alone(name, batch):
    f, q, k = LOSSES[name], unit(batch, 7, 4).requires_grad_(), unit(batch, 7, 4, seed=1)
    alone = torch.stack([f(q[i:i+1], k[i:i+1]) for i in range(batch)]).mean()
    torch.testing.assert_close(f(q, k), alone)
    together, = torch.autograd.grad(f(q, k), q)
    torch.testing.assert_close(together, torch.autograd.grad(alone, q)[0])


@pytest.mark.parametrize('name', LOSSES)
def test_keys_get_no_gradient(name):
    q, k = unit(1, 5, 3).requires_grad_(), unit(1, 5, 3, seed=1).requires_grad_()
    LOSSES[name](q, k).backward()
    assert k.grad is None and q.grad.isfinite().all()


MISFITS = (((5, 3), (5, 3)), ((1, 5, 3), (1, 4, 3)), ((2, 5, 3), (1, 5, 3)), ((1, 5, 3, 1), (1, 5, 3, 1)))


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('shapes', MISFITS)
def test_wrong_shapes_are_named(name, shapes):
    with pytest.raises(ValueError, match='batch, patches, channels'): LOSSES[name](*map(torch.zeros, shapes))


@pytest.mark.parametrize('name', LOSSES)
def test_inputs_are_not_changed(name):
    q, k = unit(2, 6, 4), unit(2, 6, 4, seed=1)
    before = q.clone(), k.clone()
    LOSSES[name](q, k)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])


def test_patch_nce_is_the_cross_entropy():
    q, k = unit(3, 256, 64, dtype=torch.float32), unit(3, 256, 64, dtype=torch.float32, seed=1)
    ref = torch.stack([F.cross_entropy(a @ b.T/.07, torch.arange(256)) for a, b in zip(q, k)]).mean()
    torch.testing.assert_close(L.patch_nce(q, k), ref)
    torch.testing.assert_close(L.hdce(q, k), ref)                      # same value, other gradient


def test_hdce_value_and_gradient():
    for weighted in (False, True):
        q, k = unit(2, 9, 5).requires_grad_(), unit(2, 9, 5, seed=1)
        W = L.hard_negative_weights(k, .3) if weighted else None
        sim = q @ k.mT
        neg = sim if W is None else sim*W
        neg = neg.masked_fill(torch.eye(9, dtype=torch.bool), -10.)
        pos = sim.diagonal(dim1=-2, dim2=-1)[..., None]
        decoupled = torch.logsumexp((neg - pos)/.07, -1).mean()
        logits = (torch.cat([pos, neg], -1)/.07).flatten(0, 1)
        value = F.cross_entropy(logits, torch.zeros(18, dtype=torch.long))
        torch.testing.assert_close(L.hdce(q, k, W), value)
        ours, = torch.autograd.grad(L.hdce(q, k, W), q)
        theirs, = torch.autograd.grad(decoupled, q)
        torch.testing.assert_close(ours, theirs)


def test_hdce_one_patch_and_extremes():
    q = torch.tensor([[[1., 0.]]], requires_grad=True)
    value = L.hdce(q, torch.tensor([[[0., 1.]]]))
    value.backward()
    assert value == 0
    assert torch.allclose(q.grad, torch.tensor([[[0., -1/.07]]]))      # attraction is all that is left
    same = torch.ones(1, 4, 1)
    assert math.isclose(L.hdce(same, same).item(), math.log(4), rel_tol=1e-6)
    opposite = L.hdce(-torch.eye(4)[None], torch.eye(4)[None], tau=.01)
    assert math.isclose(opposite.item(), 100 + math.log(3), rel_tol=1e-5)


def test_src_is_the_summed_divergence():
    q, k = (t.requires_grad_() for t in (unit(2, 11, 6)*3, unit(2, 11, 6, seed=1)))
    total = 0.
    for a, b in zip(F.normalize(q, dim=-1), F.normalize(k, dim=-1)):
        P, R = (a @ a.T).softmax(0), (b @ b.T).softmax(0)              # columns: symmetric, so the same sum
        M = (P + R)/2
        total = total + (P*(P/M).log() + R*(R/M).log()).sum()/2
    torch.testing.assert_close(L.src(q, k), total/2)
    ours, theirs = (torch.autograd.grad(v, q)[0] for v in (L.src(q, k), total/2))
    torch.testing.assert_close(ours, theirs)


def test_src_keeps_its_digits():
    "Rows that nearly agree: float32 stays within 1e-3 of float64 (a difference of entropies is off by more)."
    k = unit(1, 256, 64)
    q = F.normalize(k + .05*unit(1, 256, 64, seed=1), dim=-1)
    exact = L.src(q, k)
    assert abs(L.src(q.float(), k.float())/exact - 1) < 1e-3


def test_hard_weights_range_and_errors():
    k = unit(2, 20, 6)
    for g in (48., 10., .1):
        W = L.hard_negative_weights(k.requires_grad_(), g)
        assert not W.requires_grad and W.max() == 1 and W.min() > 0 and (W.amax(-1) == 1).all()
    for bad in (0., -1., float('nan')):
        with pytest.raises(ValueError, match='positive'): L.hard_negative_weights(k, bad)


def test_schedules():
    assert [L.gamma(t) for t in range(1, 21)] == [50 - 2*t for t in range(1, 21)]
    assert L.gamma(3, 4, start=8., end=4.) == 5.
    published = [1, .997, .988, .972, .951, .924, .891, .853, .809, .760,
                 .707, .649, .588, .522, .454, .383, .309, .233, .156, .078]
    assert all(abs(L.lambda_sup(t) - v) < 6e-4 for t, v in enumerate(published, 1))
    for f in (L.gamma, L.lambda_sup):
        for epoch in (0, -1, 21):
            with pytest.raises(ValueError, match='count from 1'): f(epoch)
    for n in range(1, 60):                                             # every n, also 4k, 4k+2, odd
        assert 0 < L.lambda_sup(n, n) <= 1 and L.gamma(n, n) == 10


def blocks_by_matrices(a, b, sides=(6, 24)):
    "The loss by its definition, in whole matrices: block sums are products with 0 and 1."
    axes = torch.tensor([[.299, .587, .114], [1., -1., 0.], [.5, .5, -1.]], dtype=torch.float64)
    d = torch.einsum('ij,bjhw->bihw', axes, a - b)
    means = []
    for side in sides:
        def sums(n): return F.one_hot(torch.arange(n)//side).T.double()      # (blocks, n)
        rows, columns = sums(d.shape[2]), sums(d.shape[3])
        area = rows.sum(1)[:, None]*columns.sum(1)
        means.append(((rows @ d @ columns.T/area)**2).sum(1).mean())
    return sum(means)/2


@pytest.mark.parametrize('h, w', [(48, 24), (31, 50), (5, 4), (128, 128)])
def test_color_blocks_of_any_size(h, w):
    generator = torch.Generator().manual_seed(h)
    a, b = (torch.rand(2, 3, h, w, dtype=torch.float64, generator=generator)*2 - 1 for _ in 'ab')
    assert L.color_blocks(a, b).item() == pytest.approx(blocks_by_matrices(a, b).item(), rel=1e-12)
    assert L.color_blocks(a, b) == L.color_blocks(-a, -b) and L.color_blocks(b, b) == 0


def test_color_blocks_by_hand():
    gray = torch.zeros(1, 3, 24, 24)
    blue = torch.tensor([0., 0., .5]).view(1, 3, 1, 1)
    # brightness .057, red-green 0, yellow-blue -.5, in both sizes of block
    assert L.color_blocks(gray + blue, gray).item() == pytest.approx(.057**2 + .25, abs=1e-6)
    one = gray.clone()
    one[..., :6, :6] = .48                    # one small block of sixteen; the large one moves by .03
    assert L.color_blocks(one, gray).item() == pytest.approx((.48**2/16 + .03**2)/2, abs=1e-6)
    red = gray.clone()
    red[:, 0], red[:, 1] = .1, -.1            # red-green .2, yellow-blue 0, brightness -.0288
    assert L.color_blocks(red, gray).item() == pytest.approx(.04 + .0288**2, abs=1e-6)


def test_color_blocks_forgive_texture_and_not_the_lattice_of_four_pixels():
    gray, at = torch.zeros(1, 3, 24, 24), torch.arange(24)
    for width, price in ((1, 0.), (3, 0.), (2, 1/18), (12, .5)):
        stripes = (at//width % 2*2. - 1).expand(1, 3, 24, 24)
        assert L.color_blocks(stripes, gray).item() == pytest.approx(price, abs=1e-6), width


def test_copy_forgives_the_tone_and_nothing_else():
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))*1.6 - .8
    assert L.copy_error(x, x) < 1e-3 and L.copy_error(.4*x - .3, x) < .02
    mirrored, negative = x.flip(3), -x
    assert min(L.copy_error(mirrored, x), L.copy_error(negative, x)) > .15


def test_copy_by_hand(monkeypatch):
    "Without tone to be given: L1, and a tenth of what the correlation of the channels lacks."
    monkeypatch.setattr(L, 'give_tone', lambda a, b: a)
    ramp = torch.linspace(-.5, .5, 16).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    assert L.copy_error(ramp + .1, ramp).item() == pytest.approx(.1, abs=1e-4)
    assert L.copy_error(-ramp, ramp).item() == pytest.approx(2*ramp.abs().mean().item() + .2, abs=1e-4)
    wrong_red = torch.cat([-ramp[:, :1], 2*ramp[:, 1:]], 1)       # one channel of three; contrast is free
    off = (2*ramp[:, :1].abs().mean() + 2*ramp[:, 1:].abs().mean()).item()/3
    assert L.copy_error(wrong_red, ramp).item() == pytest.approx(off + .2/3, abs=1e-4)


def test_color_blocks_under_mixed_precision():
    a = torch.rand(1, 3, 24, 24, requires_grad=True)
    b = torch.rand(1, 3, 24, 24, requires_grad=True)
    plain = L.color_blocks(a, b)
    with torch.autocast('cpu', torch.bfloat16): mixed = L.color_blocks(a, b)
    assert mixed.dtype == torch.float32 and mixed == plain
    half = L.color_blocks(a.bfloat16(), b.bfloat16())
    assert half.dtype == torch.float32 and half == L.color_blocks(a.bfloat16().float(), b.bfloat16().float())
    mixed.backward()
    assert b.grad is None and (a.grad != 0).all()


def test_content_range_and_gradient():
    a, b = torch.rand(2, 1, 3, 8, 8).mul(2).sub(1)
    a.requires_grad_()
    b.requires_grad_()
    seen = []
    def features(v):
        seen.append(v)
        return v.to(torch.bfloat16)*2
    value = L.content(a, b, features)
    value.backward()
    assert value.dtype == torch.float32 and b.grad is None and a.grad is not None
    assert {id(v) for v in seen} == {id(a), id(b)}                     # images reach the network as they are
    assert L.content(b, b, features) == 0


def test_content_by_hand():
    "Two images, two features each: differences 1, 2, 0 and 3; the mean of their squares is 14/4."
    def features(v): return v[:, :2, 0, 0]
    a, b = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    a[:, :2, 0, 0] = torch.tensor([[1., -2.], [0., 3.]])
    assert L.content(a, b, features) == 3.5


# ---- Stage 1 ----

def test_clip_distance():
    a, b = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a.requires_grad_()
    want = torch.stack([1 - (x @ y)/(x.norm()*y.norm()) for x, y in zip(a, b)]).mean()
    torch.testing.assert_close(L.clip_distance(a, b), want)
    torch.testing.assert_close(L.clip_distance(3*a, b/7), want)                  # lengths do not matter
    assert L.clip_distance(b, b).abs() < 1e-12 and torch.autograd.gradcheck(L.clip_distance, (a, b))
    with torch.autocast('cpu', dtype=torch.bfloat16): inside = L.clip_distance(a.float(), b.float())
    assert inside.dtype == torch.float32 and torch.equal(inside, L.clip_distance(a.float(), b.float()))
    assert L.clip_distance(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    for shapes in (((7,), (7,)), ((5, 7), (5, 6)), ((5, 7), (1, 7)), ((1, 5, 7), (1, 5, 7))):
        with pytest.raises(ValueError, match='batch, dim'): L.clip_distance(*map(torch.zeros, shapes))


def test_patch_clip_beside_the_released_rows():
    "The released rows keep an entry of exp(-10) for the crop itself: that changes the loss by millionths."
    q, k = unit(16, 16, 512), unit(16, 16, 512, seed=1)
    sim = q @ k.mT
    match = sim.diagonal(dim1=-2, dim2=-1)[..., None]
    others = sim.masked_fill(torch.eye(16, dtype=torch.bool), -10.)
    logits = torch.cat([match, others], -1).flatten(0, 1)
    released = F.cross_entropy(logits, torch.zeros(256, dtype=torch.long))
    gap = (released - L.patch_nce(q, k, tau=1.)).item()
    assert 0 < gap < 5e-6


def test_stylegan_losses_have_one_home():
    from scenimefy import pretrain, stylegan
    for name in ('r1_penalty', 'path_length', 'softplus_critic', 'softplus_generator'):
        assert name in L.__all__ and getattr(L, name).__module__ == 'scenimefy.losses'
        assert getattr(pretrain, name) is getattr(L, name) and not hasattr(stylegan, name)
