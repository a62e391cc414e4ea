"Stage 1: what is trained, what both generators share, a life cut short, and what must be refused."
import os
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from scenimefy.core import SettingsError, seeded
from scenimefy.finetune import (TABLE_3, FinetuneRun, FinetuneSettings, Priors, critic_for, cut, draw_corners,
                                finetune, finetune_step, load_priors, scene_terms, shared_styles, source_of,
                                target_of, trainable_names)
from scenimefy.losses import patch_nce, r1_penalty, softplus_critic, softplus_generator
from scenimefy.runs import CheckpointError, Stopped, checkpoints, read_history
from scenimefy.stylegan import Discriminator, Generator, load_stylegan, read_stylegan, save_stylegan
from scenimefy.weights import WeightsError
from tape import Tape, slopes

PLAN = {4: 8, 8: 8, 16: 4}
TOY = FinetuneSettings.preset('tiny').but(steps=4, batch=4, blocks=1, crops=3, crop=8, r1_every=2,
                                          log_every=1, save_every=2, sample_every=100)
ROWS = torch.randn(48, 5, generator=seeded('toy clip'))


def toy_clip(images, check=True):
    small = F.adaptive_avg_pool2d(images, 4).flatten(1)
    return F.normalize(small @ ROWS, dim=-1)


def toy_distance(a, b, check=True): return (a - b).square().mean((1, 2, 3))


JUDGES = Priors(toy_clip, toy_distance)


def toy_generator(seed=0):
    "A generator whose noise and biases do something, as in a trained one."
    torch.manual_seed(seed)
    G = Generator(16, 8, 2, channels=PLAN)
    for k, p in G.named_parameters():
        if k.endswith('noise.weight'): p.data.fill_(.3)
    return G


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "A source file with its critic, one without, and a folder of noise pictures."
    root = tmp_path_factory.mktemp('finetune')
    G = toy_generator()
    torch.manual_seed(1)
    critic = Discriminator(16, channels=PLAN)
    save_stylegan(root/'source.safetensors', dict(g_ema=G.state_dict(), d=critic.state_dict()))
    save_stylegan(root/'alone.safetensors', dict(g_ema=G.state_dict()))
    (root/'anime').mkdir()
    for i in range(6):
        noise = torch.randint(256, (16, 20, 3), generator=seeded('test', i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(root/'anime'/f'{i}.png')
    return root


def new_run(files, folder, cfg=TOY, source='source', **more):
    return FinetuneRun(cfg, files/f'{source}.safetensors', files/'anime', folder, 'cpu', JUDGES, **more)


def first_batch(r): return next(iter(r.feed()))


def some_steps(r):
    for batch in r.feed():
        r.take_step(batch)
        r.step += 1
    return r


def changed(net, source):
    "Names of the parameters and buffers that differ in any bit."
    own = source.state_dict()
    return {k for k, v in net.state_dict().items() if not torch.equal(v, own[k])}


# ---- what is trained

def test_released_size():
    with torch.device('meta'): G = Generator(256)
    sizes = {k: p.numel() for k, p in G.named_parameters()}
    ours = trainable_names(G)
    assert len(ours) == 42 and sum(sizes[k] for k in ours) == 8_510_863
    layers = {'.'.join(k.split('.')[:2]) for k in ours}
    assert layers == {f'convs.{i}' for i in range(6, 12)} | {f'to_rgbs.{j}' for j in range(3, 6)}


@pytest.mark.parametrize('blocks', range(7))
def test_every_number_of_blocks(blocks):
    "Six blocks: the prefix convs.1 must not take convs.10 and 11 with it, nor miss them."
    with torch.device('meta'): G = Generator(256, channels={4*2**i: 4 for i in range(7)})
    ours, names = trainable_names(G, blocks), [k for k, _ in G.named_parameters()]
    per_block = 2*5 + 4
    expected = per_block*blocks
    if not blocks: expected = len([k for k in names if not k.startswith('style.')])
    assert len(ours) == len(set(ours)) == expected
    assert ours == [k for k in names if k in ours] and not any(k.startswith('style.') for k in ours)


def test_too_many_blocks():
    with pytest.raises(SettingsError, match='has 2 blocks'): trainable_names(toy_generator(), 3)


@pytest.mark.parametrize('change', [
    {}, dict(blocks=2), dict(blocks=0), dict(lam_clip=0., lam_perc=0., lam_patch=0.),
    dict(negatives='batch'), dict(precision='bf16')], ids=str)
def test_exactly_the_trainable_tensors_move(files, tmp_path, change):
    "In the raw network and in the average; buffers and everything frozen stay equal to the last bit."
    cfg = TOY.but(**change)
    r = some_steps(new_run(files, tmp_path, cfg))
    ours = set(trainable_names(r.source, cfg.blocks))
    assert changed(r.nets.G, r.source) == ours and changed(r.ema, r.source) == ours
    assert not changed(r.source, load_stylegan(files/'source.safetensors'))
    r.export()
    assert changed(load_stylegan(tmp_path/r.result), r.source) == ours


def test_untouched_target_is_the_source(files, tmp_path):
    r = new_run(files, tmp_path)
    r.export()
    w_plus, noise = shared_styles(r.source, 3, .9, seeded('x'))
    photo = r.source.synthesis(w_plus, noise)
    for G in (r.nets.G, r.ema, load_stylegan(tmp_path/'anime.safetensors')):
        assert torch.equal(G.synthesis(w_plus, noise), photo)


# ---- one step

def test_the_pair_shares_styles_and_noise(files, tmp_path):
    "Both generators are handed the very same tensors, and CLIP sees every image and crop once."
    r, seen, judged = new_run(files, tmp_path), [], []
    def watched(paint):
        def painted(w, noise):
            seen.append((w, noise))
            return paint(w, noise)
        return painted
    def counting(images, check=True):
        judged.append(len(images))
        return toy_clip(images)
    for G in (r.source, r.nets.G): G.synthesis = watched(G.synthesis)
    finetune_step(r.nets, r.optims, first_batch(r)[0], r.source, Priors(counting, toy_distance), TOY, 0)
    (w1, n1), (w2, n2) = seen
    assert w1 is w2 and n1 is n2 and not w1.requires_grad
    assert sorted(judged) == [4, 4, 12, 12]


def test_order_and_factors(files, tmp_path):
    "Critic, R1 every second step, target; the gradients of each, with its factor and its weights."
    cfg = TOY.but(r1=10., lam_clip=.7, lam_perc=3., lam_patch=.2)
    r = new_run(files, tmp_path, cfg)
    G, D, real = r.nets.G, r.nets.D, first_batch(r)[0]
    with torch.no_grad(): G.to_rgbs[-1].bias.add_(.1)       # a copy of the source would have no scene terms
    for step, want in ((0, 'DDG'), (1, 'DG'), (2, 'DDG')):
        log = []
        tapes = {n: Tape(n, r.nets[n], log) for n in 'GD'}
        finetune_step(r.nets, tapes, real, r.source, JUDGES, cfg, step)
        assert ''.join(n for n, _ in log) == want
        if step: continue
        d = seeded('finetune', cfg.seed, step, 0)
        w_plus, noise = shared_styles(r.source, len(real), cfg.mixing, d)
        corners = draw_corners(16, cfg.crop, cfg.crops, d)
        photo, anime = r.source.synthesis(w_plus, noise), G.synthesis(w_plus, noise)
        x = real.clone().requires_grad_()
        t = scene_terms(photo, anime, JUDGES, cfg, corners)
        losses = [(softplus_critic(D(real), D(anime.detach())), D),
                  (10/2*2*r1_penalty(D(x), x), D),
                  (softplus_generator(D(anime)) + .7*t['clip'] + 3*t['perc'] + .2*t['patch'], G)]
        for (_, got), (loss, net) in zip(log, losses, strict=True):
            torch.testing.assert_close(got, slopes(loss, net))


def test_gradients_stay_in_the_target():
    source, corners = toy_generator().requires_grad_(False), [(0, 0), (3, 8), (8, 2)]
    G = target_of(source, 1)
    w_plus, noise = shared_styles(source, 4, .9, seeded('g'))
    photo = source.synthesis(w_plus, noise).requires_grad_()
    anime = G.synthesis(w_plus, noise) + .1*torch.randn(4, 3, 16, 16)
    terms = scene_terms(photo, anime, JUDGES, TOY, corners)
    sum(terms.values()).backward()
    assert photo.grad is None
    # a ToRGB bias that shifts the whole image still has a gradient; nothing frozen has
    assert {k for k, p in G.named_parameters() if p.grad is not None} == set(trainable_names(G, 1))


def test_terms_by_loop():
    photo, anime = torch.rand(2, 4, 3, 16, 16, generator=seeded('t')).mul(2).sub(1)
    corners = draw_corners(16, 8, 3, seeded('c'))
    def E(image): return toy_clip(image[None])[0]
    got = scene_terms(photo, anime, JUDGES, TOY, corners)
    want = dict(clip=0., perc=0., patch=0.)
    for p, a in zip(photo, anime):
        want['clip'] += (1 - E(p) @ E(a))/4
        want['perc'] += (p - a).square().mean()/4
        k, q = (torch.stack([E(i[:, y:y + 8, x:x + 8]) for x, y in corners]) for i in (p, a))
        want['patch'] += F.cross_entropy(q @ k.T, torch.arange(3))/4
    for name in want: torch.testing.assert_close(got[name], want[name])
    # the released negatives: the same place in the other images
    q, k = (toy_clip(cut(i, corners, 8).flatten(0, 1)).view(4, 3, -1) for i in (anime, photo))
    other = torch.stack([patch_nce(q[None, :, n], k[None, :, n], 1.) for n in range(3)]).mean()
    released = scene_terms(photo, anime, JUDGES, TOY.but(negatives='batch'), corners)
    torch.testing.assert_close(released['patch'], other)


def test_crops_reach_every_edge():
    corners = draw_corners(10, 4, 500, seeded('edges'))
    for axis in zip(*corners): assert set(axis) == set(range(7))
    image = torch.arange(100.).view(1, 1, 10, 10)
    assert torch.equal(cut(image, [(6, 0)], 4)[0, 0], image[0, :, :4, 6:])   # (left, top)


@pytest.mark.parametrize('row', TABLE_3)
def test_a_weight_of_zero_asks_nobody(row):
    "A judge whose terms are switched off is not loaded and not called."
    cfg = TOY.but(**{k: v for k, v in TABLE_3[row].items() if k != 'blocks'})
    def refuse(*a, **k): raise AssertionError('asked')
    judges = Priors(toy_clip if cfg.lam_clip or cfg.lam_patch else refuse,
                    toy_distance if cfg.lam_perc else refuse)
    terms = scene_terms(*torch.zeros(2, 2, 3, 16, 16), judges, cfg, [(0, 0), (1, 1)])
    assert set(terms) == {k for k in ('clip', 'perc', 'patch') if getattr(cfg, f'lam_{k}')}


def test_no_judges_at_all():
    assert load_priors(TOY.but(lam_clip=0., lam_patch=0., lam_perc=0.)) == Priors(None, None)


def test_gradients_are_averaged_before_every_update(files, tmp_path):
    "What several processes share must be shared before an optimizer moves: critic, R1, target."
    r, log = new_run(files, tmp_path), []
    tapes = {n: Tape(n, r.nets[n], log) for n in 'GD'}
    finetune_step(r.nets, tapes, first_batch(r)[0], r.source, JUDGES, TOY, 0,
                  sync_gradients=lambda names: log.append(('average', names)))
    assert [what if n == 'average' else n for n, what in log] == [['D'], 'D', ['D'], 'D', ['G'], 'G']


def test_processes_paint_other_pictures(files, tmp_path):
    "The same batch, step and weights, another process: other codes and crops. Nothing else decides them."
    real = torch.rand(4, 3, 16, 16, generator=seeded('real'))*2 - 1
    def losses(name, rank):
        r = new_run(files, tmp_path/name)
        with torch.no_grad(): r.nets.G.to_rgbs[-1].bias.add_(.1)
        r.rank = rank
        return {k: v.item() for k, v in r.take_step([real]).items()}
    zero, again, one = losses('a', 0), losses('b', 0), losses('c', 1)
    assert zero == again and all(zero[k] != one[k] for k in ('D', 'G', 'clip', 'patch'))


def test_average_keeps_nine_tenths(files, tmp_path):
    r = new_run(files, tmp_path, TOY.but(ema=.9))
    before = {k: p.clone() for k, p in r.ema.named_parameters()}
    r.take_step(first_batch(r))
    for k, p in r.ema.named_parameters():
        want = .9*before[k] + .1*r.nets.G.get_parameter(k)
        torch.testing.assert_close(p, want, atol=1e-6, rtol=1e-5, msg=k)
    assert changed(r.nets.G, r.source)


def test_step_sizes_are_those_of_stylegan(files, tmp_path):
    "G as if path length came every fourth step, as released; D for the R1 that it really has."
    for name, change, want in (('a', dict(r1_every=2), (2/3, .99**(2/3))), ('b', dict(r1=0.), (1., .99))):
        r = new_run(files, tmp_path/name, TOY.but(lr=.005, **change))
        groups = {n: r.optims[n].param_groups[0] for n in 'GD'}
        g, d = ((groups[n]['lr'], groups[n]['betas'][1]) for n in 'GD')
        assert g == pytest.approx((.004, .99**.8)) and d == pytest.approx((.005*want[0], want[1]))


def test_bf16_reaches_the_networks(files, tmp_path):
    "Asked for, both generators and the critic compute in half precision, R1 and the judges do not."
    r, seen = new_run(files, tmp_path, TOY.but(precision='bf16')), {}
    def watch(name, net):
        seen[name] = []
        net.register_forward_hook(lambda module, inputs, out: seen[name].append(out.dtype))
    watch('source', r.source.convs[0].conv)
    watch('G', r.nets.G.convs[0].conv)
    watch('D', r.nets.D.convs[0][0])
    r.take_step(first_batch(r))
    half, full = torch.bfloat16, torch.float32
    assert seen == dict(source=[half], G=[half], D=[half, half, full, half])     # D: real, made, R1, made


# ---- the critic

def test_critic_from_the_file_or_fresh(files, tmp_path):
    held = read_stylegan(files/'source.safetensors')['d']
    r = new_run(files, tmp_path/'a')
    assert all(torch.equal(v, held[k]) for k, v in r.nets.D.state_dict().items())
    def fresh(name, seed): return new_run(files, tmp_path/name, TOY.but(seed=seed), 'alone').nets.D
    def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    one, two, other = fresh('b', 0), fresh('c', 0), fresh('d', 1)
    assert same(one, two) and not same(one, other)
    assert {k: v.shape for k, v in one.state_dict().items()} == {k: v.shape for k, v in held.items()}


def test_released_critic_shape():
    with torch.device('meta'):
        shapes = {k: v.shape for k, v in Discriminator(256).state_dict().items()}
        assert {k: v.shape for k, v in critic_for(Generator(256)).state_dict().items()} == shapes


# ---- runs

def same_history(a, b):
    a, b = read_history(a), read_history(b)
    for history in (a, b): history.pop('seconds')
    return a == b and len(a['step']) > 0


def test_resume_to_the_last_bit(files, tmp_path):
    cfg = TOY.but(steps=5)
    args = dict(source=files/'source.safetensors', anime=files/'anime', device='cpu', priors=JUDGES)
    whole = finetune(cfg, run=tmp_path/'whole', **args)
    def stop(step, n, losses):
        if step == 3: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped): finetune(cfg, run=tmp_path/'cut', on_step=stop, **args)
    torch.manual_seed(99)
    cut_short = finetune(cfg, run=tmp_path/'cut', resume=True, **args)
    a, b = read_stylegan(whole)['g_ema'], read_stylegan(cut_short)['g_ema']
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert same_history(tmp_path/'whole', tmp_path/'cut')
    picture = Image.open(tmp_path/'whole'/'samples'/'00000005.png')
    assert picture.size == (8*16, 2*16)
    top = load_stylegan(files/'source.safetensors')
    w_plus, noise = shared_styles(top, 8, generator=seeded('sheet', cfg.seed))
    first = new_run(files, tmp_path/'new').sheet()[:, :16, :16]
    assert torch.equal(first, top.synthesis(w_plus, noise)[0].clamp(-1, 1))


def test_another_source_is_refused(files, tmp_path):
    args = dict(anime=files/'anime', device='cpu', priors=JUDGES)
    def go_on(name):
        finetune(TOY.but(steps=2), tmp_path/f'{name}.safetensors', run=tmp_path/'run', resume=True, **args)
    finetune(TOY.but(steps=2), files/'source.safetensors', run=tmp_path/'run', **args)
    assert source_of(tmp_path/'run')['source'] == str((files/'source.safetensors').resolve())
    assert source_of(tmp_path) == {}
    torch.manual_seed(0)
    large = Generator(32, 8, 2, channels={**PLAN, 32: 4})
    for name, G in (('other', toy_generator(5)), ('large', large)):
        save_stylegan(tmp_path/f'{name}.safetensors', dict(g_ema=G.state_dict()))
        said = rf'another source: .*source.safetensors \(16 px.*{name}.safetensors \({G.size} px'
        with pytest.raises(CheckpointError, match=said): go_on(name)
    (tmp_path/'same.safetensors').write_bytes((files/'source.safetensors').read_bytes())
    go_on('same')                                               # the place does not matter
    (tmp_path/'run'/'source.json').unlink()                     # without the note, the frozen weights tell
    with pytest.raises(CheckpointError, match='another source'): go_on('other')


def test_a_name_stays_a_name(files, tmp_path, monkeypatch):
    "Even where a folder or a file is called so, and wherever the package lies."
    monkeypatch.chdir(tmp_path)
    (tmp_path/'tiny').write_text('not this one')
    finetune(TOY.but(steps=1), 'tiny', files/'anime', tmp_path/'run', device='cpu', priors=JUDGES)
    assert source_of('run')['source'] == 'tiny'


def test_resumed_command_remembers_its_source(files, tmp_path, capsys):
    from scenimefy.cli import finetune_command
    source = files/'source.safetensors'
    finetune(TOY.but(steps=1), source, files/'anime', tmp_path, device='cpu', priors=JUDGES)
    finetune_command(files/'anime', tmp_path, resume=True, device='cpu')
    assert f'--source {source.resolve()} ' in capsys.readouterr().out


def test_resumed_copy_remembers_its_source(files, tmp_path):
    "A run that is brought back from its copy refuses another source as the run itself would."
    args = dict(anime=files/'anime', device='cpu', priors=JUDGES, backup=tmp_path/'copy')
    finetune(TOY.but(steps=1), files/'source.safetensors', run=tmp_path/'run', **args)
    shutil.rmtree(tmp_path/'run')
    with pytest.raises(CheckpointError, match='began with another source'):
        finetune(TOY.but(steps=2), 'tiny', run=tmp_path/'run', resume=True, **args)
    finetune(TOY.but(steps=2), files/'source.safetensors', run=tmp_path/'run', resume=True, **args)
    assert len(checkpoints(tmp_path/'copy')) == 2


def test_refusals(files, tmp_path):
    with pytest.raises(SettingsError, match='crop = 32 px, but the source paints 16'):
        new_run(files, tmp_path, TOY.but(crop=32))
    with pytest.raises(SettingsError, match='has 2 blocks'): new_run(files, tmp_path, TOY.but(blocks=5))
    with pytest.raises(SettingsError): TOY.but(negatives='both')
    with pytest.raises(SettingsError, match='batch = 5: .* take 4 or 6'): TOY.but(batch=5)
    large = Discriminator(32, channels={**PLAN, 32: 4})
    save_stylegan(tmp_path/'odd.safetensors', dict(g_ema=toy_generator().state_dict(), d=large.state_dict()))
    with pytest.raises(WeightsError, match='paints 16 px, but its critic looks at 32 px'):
        new_run(tmp_path, tmp_path/'r', source='odd')


def test_presets():
    paper = FinetuneSettings.preset('paper')
    assert (paper.steps, paper.batch, paper.lr, paper.blocks) == (1000, 16, .002, 3)
    assert (paper.crops, paper.crop, paper.tau) == (16, 32, 1.)
    assert (paper.lam_clip, paper.lam_perc, paper.lam_patch) == (1., .01, .05)
    assert paper.origin('lam_perc') == 'paper §4.1'
    for row, change in TABLE_3.items(): paper.but(**change)
