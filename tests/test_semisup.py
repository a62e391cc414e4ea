"The translator's trainer: the reference numbers, a life cut short, several processes, and refusals."
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from scenimefy.core import SettingsError, seeded
from scenimefy.losses import color_blocks
from scenimefy.runs import CheckpointError, Diverged, checkpoints, read_history
from scenimefy.weights import WeightsError
from scenimefy.semisup import (Networks, SemisupSettings, draw_ids, fast_step, load_content, make_optimizers,
                               only, plain_step, seeded_net, settle_way, term_weights, train, without_branch)
from scenimefy.translator import TAPS, PatchCritic, ResnetGenerator

TOY = SemisupSettings.preset('tiny').but(
    size=16, load_size=20, ngf=4, n_blocks=5, ndf=4, n_layers=1, head_dim=8, n_patches=8,
    batch=1, epochs=4, epoch_steps=3, log_every=1, save_every=2, sample_every=100)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Three folders of small noise pictures: what they show does not matter here."
    root = tmp_path_factory.mktemp('pictures')
    for k, name in enumerate(('photos', 'anime', 'pairs/trainA', 'pairs/trainB')):
        (root/name).mkdir(parents=True)
        for i in range(5):
            noise = torch.randint(256, (24, 30, 3), generator=seeded('test', k, i), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(root/name/f'{i}.png')
    return root/'photos', root/'anime', root/'pairs'


def same_history(a, b):
    "All that was logged is equal to the last bit, the clock aside."
    a, b = read_history(a), read_history(b)
    for history in (a, b): history.pop('seconds')
    return a == b and len(a['step']) > 0


def hold_still(optims):
    "Steps that move nothing."
    for o in optims.values(): o.param_groups[0]['lr'] = 0.


def gradients_of(nets, names):
    "{network: the gradient of each of its parameters, as it is now}"
    return {n: [p.grad.clone() for p in getattr(nets, n).parameters()] for n in names}


# ---- the numbers of the released implementation

@pytest.mark.parametrize('reading', [plain_step, fast_step])
@pytest.mark.parametrize('epoch', [1, 2, 10, 20])
def test_reference_step(reference, reading, epoch):
    "One step equals the released one, its doubled weight and stuck decay reproduced by settings."
    ref = reference('translation_step')
    cfg = SemisupSettings.preset('paper').but(size=64, load_size=64, ngf=8, ndf=8, head_dim=16, n_patches=64,
                                              decay='none', lam_style=.05*.05)
    nets = Networks(cfg)
    for name, net in nets.present().items():
        prefix = f'weights/{name}/'
        weights = {k.removeprefix(prefix): v for k, v in ref.items() if k.startswith(prefix)}
        net.load_state_dict(weights, strict=True)
    ids = [ref[f'patch_ids/{t}'].long() for t in TAPS]
    # the reference computes G's loss with critics that have not moved yet
    optims = make_optimizers(nets, cfg)
    hold_still(optims)
    grads, extra = {}, {}
    def keep(names): grads.update(gradients_of(nets, names))
    if reading is fast_step: extra = dict(sync_gradients=keep)
    batch = [ref[f'input/{k}'] for k in ('real_A', 'real_B', 'real_A_p', 'real_B_p')]
    got = reading(nets, optims, batch, dict(F=ids, F_s=ids), cfg, epoch, **extra)
    if reading is plain_step: keep(nets.present())
    prefix = f'loss/epoch{epoch}/'
    losses = {k.removeprefix(prefix): v for k, v in ref.items() if k.startswith(prefix)}
    want = {k: v.item() for k, v in losses.items() if v.numel() == 1}
    pairs = {'src': ('loss_SRC', cfg.lam_src), 'style': ('loss_NCE_s', cfg.lam_style),
             'hdce': ('loss_HDCE', cfg.lam_hdce), 'idt': ('loss_HDCE_Y', cfg.lam_hdce),
             'total': ('loss_G', 1.), 'D': ('loss_D', 1.), 'D_p': ('loss_D_p', 1.)}
    for mine, (name, weight) in pairs.items():
        assert got[mine].item()*weight == pytest.approx(want[name], rel=1e-4), mine
    if epoch == 1:
        for name in ('F', 'F_s'):
            norm = torch.stack([g.norm() for g in grads[name]]).norm().item()
            assert norm == pytest.approx(ref[f'grad_norm/{name}'].item(), rel=1e-4), name
        got = dict(zip(dict(nets.G.named_parameters()), grads['G']))
        norm = torch.stack([g.norm() for g in grads['G']]).norm().item()
        assert norm == pytest.approx(ref['grad_norm/G'].item(), rel=1e-4)
        keys = [k.removeprefix('grad/G/') for k in ref if k.startswith('grad/G/')]
        assert len(keys) >= 4
        for key in keys:
            want = ref[f'grad/G/{key}']
            gap = (got[key] - want).abs().max().item()
            # a bias in front of a normalization has no slope: what stands there is rounding, about 3e-6
            assert gap <= 1e-4*max(want.abs().max().item(), .1), (key, gap)


def test_gradient_is_the_slope_of_the_loss():
    "Along a random direction in the decoder's weights, the step's gradient predicts the change of the total."
    # the encoder's weights also move the keys, which the losses hold still on purpose; the decoder's do not
    cfg = TOY.but(lam_hdce=0., lam_l1=.3)                      # hDCE's value and gradient differ on purpose
    nets = Networks(cfg).double()
    images = [torch.rand(1, 3, 16, 16, generator=seeded('slope', i)).double()*2 - 1 for i in range(4)]
    still = make_optimizers(nets, cfg)
    hold_still(still)
    ids = draw_ids(cfg, 0)
    def total(): return plain_step(nets, still, images, ids, cfg, 1)['total'].item()
    plain_step(nets, still, images, ids, cfg, 1)
    grads = gradients_of(nets, ['G'])
    direction = []
    for i, (name, p) in enumerate(nets.G.named_parameters()):
        along = torch.randn(p.shape, generator=seeded('direction', i)).double()
        in_decoder = int(name.split('.')[1]) > max(TAPS)
        direction.append(along if in_decoder else torch.zeros_like(along))
    def moved(h):
        with torch.no_grad():
            for p, d in zip(nets.G.parameters(), direction): p += h*d
        value = total()
        with torch.no_grad():
            for p, d in zip(nets.G.parameters(), direction): p -= h*d
        return value
    slope = (moved(1e-8) - moved(-1e-8))/2e-8
    predicted = sum((g*d).sum().item() for g, d in zip(grads['G'], direction))
    assert predicted == pytest.approx(slope, rel=1e-4)


# ---- the table of terms

def test_a_branch_is_switched_off_by_the_terms_that_are_on():
    assert without_branch('unsupervised') == dict(lam_gan=0., lam_src=0., lam_hdce=0.)
    assert without_branch('supervised') == dict(lam_gan_sup=0., lam_style=0.)


def test_every_row_is_a_setting_a_weight_and_a_switch():
    "A weight above 0 adds its term to the step, and nothing else; the identity half follows hDCE."
    from scenimefy.semisup import TERMS, term_weights
    nothing = without_branch('unsupervised') | without_branch('supervised')
    base = TOY.but(lam_l1=1.).but(**nothing)
    for t in TERMS:
        if isinstance(t.lam, str): continue
        kind = dict(content='color') if t.name == 'content' else {}
        cfg = base.but(**{'lam_l1': 0., f'lam_{t.name}': .5}, **kind)
        on = {name: w for name, w in term_weights(cfg, 1).items() if w}
        assert on == ({'hdce': .25, 'idt': .25} if t.name == 'hdce' else {t.name: .5})
        assert set(Networks(cfg).present()) == {'G', *t.nets}
        halved = term_weights(cfg.but(epochs=2), 2)[t.name]
        assert (halved == pytest.approx(.5*.5**.5)) == (t.branch == 'supervised')


def test_nothing_is_recorded_for_keys():
    "The memory that the fast step saves."
    import contextlib
    from scenimefy.semisup import FastView
    batch = [torch.rand(1, 3, 16, 16, generator=seeded('keys', i))*2 - 1 for i in range(4)]
    v = FastView(Networks(TOY), batch, draw_ids(TOY, 0), TOY, 1, None, contextlib.nullcontext, 'x y xp')
    for queries, keys in (v.photo_rows, v.anime_rows, v.pair_rows):
        assert all(q.requires_grad for q in queries) and not any(k.requires_grad for k in keys)


# ---- a life cut short

RUNNER = textwrap.dedent('''
    import sys, time, torch
    from scenimefy.semisup import SemisupSettings, train
    torch.set_num_threads(1)
    photos, anime, pairs, run, settings, resume, pace = sys.argv[1:]
    def slow(step, n, losses):
        print(step, flush=True)
        time.sleep(float(pace))
    train(SemisupSettings.from_json(settings), photos, anime, pairs, run, resume == 'yes', slow, device='cpu')
''')


def start(folders, run, resume=False, pace=0., cfg=TOY, **kwargs):
    arguments = [*folders, run, cfg.to_json(), 'yes' if resume else 'no', pace]
    command = [sys.executable, '-c', RUNNER, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **kwargs)


def test_sigkill_and_resume(folders, tmp_path):
    "No signal handler runs at SIGKILL: what is on the disk must be enough."
    whole = start(folders, tmp_path/'whole')
    cut = start(folders, tmp_path/'cut', pace=.02)
    for line in cut.stdout:
        if line.strip() == '7':
            cut.kill()
            break
    cut.communicate()
    whole.communicate()
    assert cut.returncode == -signal.SIGKILL and whole.returncode == 0
    assert not (tmp_path/'cut'/'checkpoints'/'step-00000012.safetensors').exists()
    again = start(folders, tmp_path/'cut', resume=True)
    again.communicate()
    assert again.returncode == 0
    assert same_history(tmp_path/'whole', tmp_path/'cut')
    a, b = (load_file(tmp_path/d/'translator.safetensors') for d in ('whole', 'cut'))
    assert all((a[k] == b[k]).all() for k in a)


@pytest.mark.fault('training: a weight becomes NaN, though the losses are finite',
                   happens='it stops, and names the step',
                   left='the last good checkpoint; the translator holds finite numbers')
def test_nan_in_a_weight_is_never_saved(folders, tmp_path, monkeypatch):
    "The losses of a step are finite and its update is not: neither a checkpoint nor a translator holds it."
    from scenimefy import semisup
    def poisoned(nets, *args, **kwargs):
        losses = fast_step(nets, *args, **kwargs)
        poisoned.steps += 1
        if poisoned.steps == 4:
            first = next(nets.G.parameters())
            first.data[0] = float('nan')
        return losses
    poisoned.steps = 0
    monkeypatch.setattr(semisup, 'fast_step', poisoned)
    with pytest.raises(Diverged, match='step 4'): train(TOY, *folders, tmp_path/'run')
    assert [c.stem for c in checkpoints(tmp_path/'run')] == ['step-00000002']
    assert all(t.isfinite().all() for t in load_file(tmp_path/'run'/'translator.safetensors').values())


# ---- what decides the result, and what does not

@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_eight_steps_equal_four_and_four(folders, tmp_path, precision):
    "bf16 keeps its weights channels_last, so Adam's moments must come back in that order, too."
    cfg = TOY.but(epoch_steps=2, save_every=2, ema=.9, precision=precision)
    def lights_out(step, n_steps, losses):
        if step == 4: raise SystemError('the lights went out')
    train(cfg, *folders, tmp_path/'whole')
    with pytest.raises(SystemError): train(cfg, *folders, tmp_path/'cut', on_step=lights_out)
    train(cfg, *folders, tmp_path/'cut', resume=True)
    a, b = (load_file(checkpoints(tmp_path/run)[-1]) for run in ('whole', 'cut'))
    differ = [k for k in a if not k.startswith('rng') and not torch.equal(a[k], b[k])]
    assert a.keys() == b.keys() and not differ, differ[:3]
    assert same_history(tmp_path/'whole', tmp_path/'cut')


@pytest.fixture
def choice(monkeypatch):
    "Toy convolutions are wide enough for a choice, and `trial` says what the test wants."
    seconds = dict(direct=1., quick=.5)
    monkeypatch.setattr('scenimefy.fast._WIDE', 64)
    monkeypatch.setattr('scenimefy.fast.trial', lambda *a: seconds)
    return seconds

def test_a_resumed_run_takes_up_its_way(folders, tmp_path, choice):
    "The machine is another one after the interruption, where the trial ends otherwise."
    cfg = TOY.but(epochs=2, epoch_steps=2, save_every=1)
    def lights_out(step, n_steps, losses):
        if step == 3: raise SystemError('the lights went out')
    train(cfg, *folders, tmp_path/'whole')
    with pytest.raises(SystemError): train(cfg, *folders, tmp_path/'cut', on_step=lights_out)
    assert json.loads((tmp_path/'cut'/'way.json').read_text()) == dict(way='quick', direct=1., quick=.5)
    choice['quick'] = 2.
    train(cfg, *folders, tmp_path/'cut', resume=True)
    assert same_history(tmp_path/'whole', tmp_path/'cut')
    a, b = (load_file(checkpoints(tmp_path/run)[-1]) for run in ('whole', 'cut'))
    assert all(torch.equal(a[k], b[k]) for k in a if not k.startswith('rng'))

def test_both_ways_make_the_same_step(choice):
    told = []
    for way in ('direct', 'quick'):
        nets, batch = Networks(TOY), [torch.rand(1, 3, 16, 16, generator=seeded(k))*2 - 1 for k in range(4)]
        assert settle_way(nets, TOY, way) == way
        told.append(fast_step(nets, make_optimizers(nets, TOY), batch, draw_ids(TOY, 0), TOY, 1))
    direct, quick = told
    for name in direct: assert quick[name].item() == pytest.approx(direct[name].item(), rel=1e-4), name
    assert quick['total'].item() == pytest.approx(direct['total'].item(), rel=1e-5)
    assert quick != direct

def test_no_choice_where_there_is_none(folders, tmp_path, choice):
    for precision in ('fp32', 'bf16'):
        nets, cfg = Networks(TOY), TOY.but(precision=precision)
        assert settle_way(nets, cfg) == ('quick' if precision == 'fp32' else 'direct')
    assert settle_way(Networks(TOY), TOY, 'direct') == 'direct'     # an older checkpoint's


def test_workers_do_not_change_the_result(folders, tmp_path):
    train(TOY.but(epochs=2), *folders, tmp_path/'none')
    train(TOY.but(epochs=2, workers=2), *folders, tmp_path/'two')
    assert same_history(tmp_path/'none', tmp_path/'two')


def test_seed_changes_the_result(folders, tmp_path):
    train(TOY.but(epochs=2), *folders, tmp_path/'a')
    train(TOY.but(epochs=2, seed=1), *folders, tmp_path/'b')
    assert not same_history(tmp_path/'a', tmp_path/'b')


def test_patches_differ_between_heads_and_steps():
    a, b = draw_ids(TOY, 0), draw_ids(TOY, 1)
    assert not any((i == j).all() for i, j in zip(a['F'], a['F_s']))
    assert not any((i == j).all() for i, j in zip(a['F'], b['F']))
    G = ResnetGenerator(3, 3, 4, 5)                                  # the shapes are the generator's own
    for tap, ids in zip(G.encode(torch.zeros(1, 3, 16, 16)), draw_ids(TOY.but(n_patches=10**6), 0)['F']):
        assert sorted(ids.tolist()) == list(range(tap[0, 0].numel()))


def test_processes_look_at_other_patches():
    "The same step and head, another process: not one list of positions is the same."
    a, b = draw_ids(TOY, 5, rank=0), draw_ids(TOY, 5, rank=1)
    for head in ('F', 'F_s'): assert not any((i == j).all() for i, j in zip(a[head], b[head]))


@pytest.mark.parametrize('rank', [0, 1])
def test_every_step_is_told_its_epoch_step_size_and_patches(folders, tmp_path, monkeypatch, rank):
    "Four epochs of three steps: the step size is full in two of them, then two thirds of it, then one third."
    from scenimefy import semisup
    told = []
    def listen(nets, optims, batch, ids, cfg, epoch, *rest):
        told.append((epoch, [g['lr'] for o in optims.values() for g in o.param_groups], ids))
        return dict(total=torch.zeros(()))
    monkeypatch.setattr(semisup, 'fast_step', listen)
    r = semisup.Run(TOY.but(lr=.006), *folders, tmp_path/'run', 'cpu')
    r.rank = rank
    for step in range(12):
        r.step = step
        assert r.take_step(None)['epoch'] == told[-1][0]
    epochs, sizes, ids = zip(*told)
    assert epochs == (1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4)
    assert {len(s) for s in sizes} == {5}                                    # G, D, D_p, F, F_s
    full = {1: .006, 2: .006, 3: .004, 4: .002}
    for epoch, of_all in zip(epochs, sizes): assert of_all == pytest.approx([full[epoch]]*5)
    for step, got in enumerate(ids):
        want = draw_ids(TOY, step, 'cpu', rank)
        assert all(torch.equal(i, j) for head in want for i, j in zip(got[head], want[head]))


def test_batch_is_the_mean_of_its_images():
    "Losses and gradients of a batch of two are the means of two batches of one: nothing mixes images."
    cfg = TOY.but(lam_l1=.5)
    images = [torch.rand(2, 3, 16, 16, generator=seeded('batch', i))*2 - 1 for i in range(4)]
    def gradients(batch):
        nets, grads = Networks(cfg), {}
        def keep(names):
            for n in names:
                for k, p in getattr(nets, n).named_parameters(): grads[n, k] = p.grad.clone()
        optims = make_optimizers(nets, cfg)
        hold_still(optims)
        losses = fast_step(nets, optims, batch, draw_ids(cfg, 0), cfg, 2, sync_gradients=keep)
        return losses, grads
    both = gradients(images)
    one, two = (gradients([i[n:n+1] for i in images]) for n in (0, 1))
    for k in both[0]: assert both[0][k].item() == pytest.approx((one[0][k] + two[0][k]).item()/2, rel=1e-5)
    for name in ('G', 'D', 'D_p', 'F', 'F_s'):
        of_net = {key: g for key, g in both[1].items() if key[0] == name}
        largest = max(g.abs().max() for g in of_net.values())
        for key, g in of_net.items():
            gap = (g - (one[1][key] + two[1][key])/2).abs().max()
            assert (gap/largest).item() < 1e-4, key


PROCESSES = textwrap.dedent('''
    import sys, torch
    from scenimefy.semisup import SemisupSettings, train
    torch.set_num_threads(1)
    photos, anime, pairs, run, settings = sys.argv[1:]
    train(SemisupSettings.from_json(settings), photos, anime, pairs, run, device='cpu')
''')


def test_two_processes_equal_one_with_twice_the_batch(folders, tmp_path):
    # each process draws its own patches, so the terms that look at patches are left out
    cfg = TOY.but(epochs=2, epoch_steps=2, lam_src=0., lam_hdce=0., lam_style=0., lam_l1=1.)
    train(cfg.but(batch=2), *folders, tmp_path/'one')
    script = tmp_path/'run.py'
    script.write_text(PROCESSES)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    env = dict(os.environ, MASTER_ADDR='127.0.0.1', MASTER_PORT=port, WORLD_SIZE='2',
               LOCAL_WORLD_SIZE='2', ACCELERATE_USE_CPU='true')
    command = [sys.executable, str(script), *map(str, folders), str(tmp_path/'two'), cfg.to_json()]
    def start_one(rank):
        own = dict(env, RANK=str(rank), LOCAL_RANK=str(rank))
        return subprocess.Popen(command, env=own, text=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    for p in [start_one(rank) for rank in (0, 1)]:
        _, errors = p.communicate(timeout=120)
        assert p.returncode == 0, errors[-1500:]
    a, b = (load_file(tmp_path/d/'translator.safetensors') for d in ('one', 'two'))
    for k in a:  # a bias before a norm has no true gradient, and Adam makes steps of the rounding
        if k.endswith('weight'): torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=2e-5)


# ---- a beginning

def test_copy_row_is_the_error_of_a_toned_output():
    from scenimefy.translator import give_tone
    batch = [torch.rand(2, 3, 16, 16, generator=seeded('copy', i))*2 - 1 for i in range(4)]
    cfg = TOY.but(**only(copy=2.))
    nets, x = Networks(cfg), batch[0]
    fake = nets.G(x).detach()
    channels = zip(fake.flatten(2).flatten(0, 1), x.flatten(2).flatten(0, 1))
    alike = sum(torch.corrcoef(torch.stack(pair))[0, 1] for pair in channels)/6
    want = (give_tone(fake, x) - x).abs().mean() + .1*(1 - alike)
    losses = fast_step(nets, make_optimizers(nets, cfg), batch, draw_ids(cfg, 0), cfg, 1)
    assert losses['copy'].item() == pytest.approx(want.item(), rel=1e-3)
    assert losses['total'].item() == pytest.approx(2*want.item(), rel=1e-3) and set(nets.present()) == {'G'}


@pytest.mark.parametrize('tone', ['own', 'photo', 'style'])
def test_terms_see_the_tone_that_was_asked_for(tone):
    "Both readings of the step, against the images that the terms should have seen."
    from scenimefy.translator import give_tone, map_colors
    palette = dict(own=None, photo=torch.eye(3, 4), style=torch.rand(3, 4, generator=seeded('p')))[tone]
    cfg = TOY.but(tone=tone, content='color')
    batch = [torch.rand(2, 3, 16, 16, generator=seeded('tone', i))*2 - 1 for i in range(4)]
    logs = []
    for step in (plain_step, fast_step):
        nets = Networks(cfg)
        if tone == 'style': nets.palette.copy_(palette)
        with torch.no_grad():
            fake, goal = nets.G(batch[0]), batch[0]
            if tone != 'own':
                goal = map_colors(goal, palette)
                fake = give_tone(fake, goal)
            real_or_not = [nets.D(fake), nets.D(batch[1])]
        logs.append(step(nets, make_optimizers(nets, cfg), batch, draw_ids(cfg, 0), cfg, 1, color_blocks))
        assert logs[-1]['content'].item() == pytest.approx(color_blocks(fake, goal).item(), rel=1e-4)
        fooled = .5*(real_or_not[0]**2).mean() + .5*((real_or_not[1] - 1)**2).mean()
        assert logs[-1]['D'].item() == pytest.approx(fooled.item(), rel=1e-4)
    for name, value in logs[0].items():
        assert logs[1][name].item() == pytest.approx(value.item(), rel=1e-4), name


def test_anime_keeps_its_own_tone_and_a_pair_has_the_tone_of_its_anime_side():
    cfg = TOY.but(tone='style')
    nets = Networks(cfg)
    nets.palette[:, 3] = .3
    batch = [torch.rand(2, 3, 16, 16, generator=seeded('same', i))*2 - 1 for i in range(4)]
    from scenimefy.semisup import View
    v = View(nets, batch, draw_ids(cfg, 0), cfg, 1)
    assert (v.same.mean((2, 3)) - batch[1].mean((2, 3))).abs().max() < 1e-5
    assert (v.fake.mean((2, 3)) - batch[0].mean((2, 3))).abs().max() > .05
    assert (v.fake_p.mean((2, 3)) - batch[3].mean((2, 3))).abs().max() < 1e-5    # of a pair the tone is known


def test_the_palette_of_a_style_is_fitted_and_travels_with_run_and_file(tmp_path):
    from scenimefy.core import to_image
    from scenimefy.translator import load_translator, map_colors
    style = torch.tensor([[.8, .1, 0, .1], [0, .7, .1, .05], [.1, 0, .6, .2]])
    for k in range(6):
        plain = torch.rand(1, 3, 4, 4, generator=seeded('palette', k))*1.2 - .8
        plain = torch.nn.functional.interpolate(plain, (24, 24))
        for name, x in (('photos', plain), ('anime', plain), ('pairs/trainA', plain),
                        ('pairs/trainB', map_colors(plain, style))):
            (tmp_path/name).mkdir(exist_ok=True, parents=True)
            to_image(x[0]).save(tmp_path/name/f'{k}.png')
    cfg = TOY.but(tone='style', size=24, load_size=24, epochs=2, epoch_steps=2, save_every=2)
    sets = [tmp_path/name for name in ('photos', 'anime', 'pairs')]
    found = load_translator(train(cfg, *sets, tmp_path/'run')).palette
    want = torch.eye(3, 4) + .8*(style - torch.eye(3, 4))
    assert (found - want).abs().max() < .05
    newest = max((tmp_path/'run/checkpoints').iterdir())
    newest.unlink()
    assert load_translator(train(cfg, *sets, tmp_path/'run', resume=True)).palette.equal(found)
    photo = load_translator(train(cfg.but(tone='photo'), *sets, tmp_path/'photo'))
    own = load_translator(train(cfg.but(tone='own'), *sets, tmp_path/'own'))
    assert photo.palette.equal(torch.eye(3, 4)) and own.palette is None


def test_a_copy_learns_with_its_own_tone():
    for tone in ('photo', 'style'):
        with pytest.raises(SettingsError, match='negative'): TOY.but(lam_copy=1., tone=tone)
    assert TOY.but(lam_copy=1.).tone == 'own'


def test_only_switches_the_rest_off():
    cfg = SemisupSettings().but(content='color').but(**only(src=.5))
    assert {name: w for name, w in term_weights(cfg, 1).items() if w} == {'src': .5}


def test_a_training_begins_with_the_weights_it_is_given(folders, tmp_path):
    from scenimefy.translator import ResnetGenerator, load_translator, save_translator
    torch.manual_seed(8)
    given = ResnetGenerator(ngf=TOY.ngf, n_blocks=TOY.n_blocks)
    file = save_translator(given, tmp_path/'given.safetensors')
    still = TOY.but(lr=1e-12, epochs=2, epoch_steps=1)
    made = load_translator(train(still, *folders, tmp_path/'run', start=file))
    want = given.state_dict()
    for name, value in made.state_dict().items(): assert (value - want[name]).abs().max() < 1e-6
    other = load_translator(train(still, *folders, tmp_path/'other'))
    assert (other.model[1].weight - given.model[1].weight).abs().max() > .01
    with pytest.raises(SettingsError, match='set both'):
        train(still.but(ngf=TOY.ngf + 2), *folders, tmp_path/'no', start=file)


# ---- what is refused

def test_betas_are_two():
    with pytest.raises(SettingsError, match='two numbers'): TOY.but(betas=(.5,))


# ---- the content term

def test_content_has_a_name_and_a_weight_or_neither():
    assert TOY.content == 'none' and TOY.lam_content == 0
    for kind, usual in (('color', 10.), ('vgg', .2)):
        named = TOY.but(content=kind)
        assert (named.content, named.lam_content) == (kind, usual)
        assert TOY.but(content=kind, lam_content=3).lam_content == 3
        assert named.but(lr=.01).lam_content == usual
        assert named.but(content='none') == TOY and SemisupSettings.from_json(named.to_json()) == named
    assert TOY.but(content='color').but(content='vgg').lam_content == .2
    with pytest.raises(SettingsError, match='lam_content = 2 weighs no term.*--content'):
        TOY.but(lam_content=2)
    with pytest.raises(SettingsError, match="content = 'color' has the weight lam_content = 0"):
        TOY.but(content='color', lam_content=0.)
    with pytest.raises(SettingsError, match='has the weight'): SemisupSettings(content='vgg')
    with pytest.raises(SettingsError, match="'none', 'color', 'vgg'"): TOY.but(content='colour')


@pytest.fixture
def vgg(tmp_path, monkeypatch):
    "A small file in the layout of torchvision's VGG-19, and what it says of images in [-1,1]."
    from torch import nn
    from scenimefy import priors
    def small():
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3))
    net = small()
    layout = {f'features.{k}': v for k, v in net.state_dict().items()}
    torch.save({**layout, 'classifier.0.weight': torch.zeros(2, 2)}, tmp_path/'vgg.pth')
    monkeypatch.setattr(priors, '_vgg19_features', small)
    monkeypatch.setattr(priors, 'fetch', lambda name: {'vgg19': tmp_path/'vgg.pth'}[name])
    return lambda images: net((images + 1)/2)


def test_vgg_content_is_the_squared_difference_of_its_features(vgg):
    loss = load_content('vgg')
    # a bit out of range, as the output of a network may be
    a, b = (torch.rand(2, 3, 16, 16, generator=seeded('vgg', k))*2.4 - 1.2 for k in 'ab')
    a.requires_grad_()
    b.requires_grad_()
    torch.testing.assert_close(loss(a, b), ((vgg(a) - vgg(b))**2).mean())
    loss(a, b).backward()
    assert a.grad.abs().sum() > 0 and b.grad is None and loss(b, b) == 0


def test_vgg_that_is_not_there_is_said_before_the_run_begins(folders, tmp_path, monkeypatch):
    monkeypatch.setenv('SCENIMEFY_OFFLINE', '1')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'nowhere'))
    with pytest.raises(WeightsError, match='vgg19-dcbb9e9d.pth'):
        train(TOY.but(content='vgg'), *folders, tmp_path/'run')
    assert not list(tmp_path.glob('run/checkpoints/*'))


@pytest.mark.parametrize('kind', ['color', 'vgg'])
def test_both_readings_of_the_content_term_agree(vgg, kind):
    "Losses and gradients of G; the term is what its definition says of G(x) and x."
    cfg = TOY.but(content=kind, lam_content=2.)
    batch = [torch.rand(2, 3, 16, 16, generator=seeded('batch', i))*2 - 1 for i in range(4)]
    seen = []
    for reading in (plain_step, fast_step):
        nets, grads = Networks(cfg), {}
        with torch.no_grad(): fake = nets.G(batch[0])
        def keep(names): grads.update(gradients_of(nets, names))
        log = reading(nets, make_optimizers(nets, cfg), batch, draw_ids(cfg, 0), cfg, 1, load_content(kind),
                      sync_gradients=keep)
        if kind == 'vgg': torch.testing.assert_close(log['content'], ((vgg(fake) - vgg(batch[0]))**2).mean())
        else: torch.testing.assert_close(log['content'], color_blocks(fake, batch[0]))
        seen.append((log, grads['G']))
    (plain, a), (fast, b) = seen
    for k in plain: torch.testing.assert_close(plain[k], fast[k], rtol=1e-5, atol=1e-6)
    top = max(g.abs().max() for g in a)
    for g, h in zip(a, b): assert (g - h).abs().max() < 1e-4*top
    without = Networks(TOY)
    logged = fast_step(without, make_optimizers(without, TOY), batch, draw_ids(TOY, 0), TOY, 1)
    assert 'content' not in logged


def test_content_run_on_several_folders_in_windows_is_resumed_to_the_bit(folders, tmp_path):
    "The name stands in settings.json; other folders, or another order of them, are refused."
    photos, anime, pairs = folders
    wide = tmp_path/'wide'
    wide.mkdir()
    for i in range(2): Image.effect_noise((60, 40), 90).convert('RGB').save(wide/f'wide{i}.png')
    cfg = TOY.but(content='color', load_size=0)
    data = [photos, wide], anime, pairs
    train(cfg, *data, tmp_path/'whole')
    train(cfg, *data, tmp_path/'cut')
    for newest in checkpoints(tmp_path/'cut')[1:]: newest.unlink()
    (tmp_path/'cut'/'translator.safetensors').unlink()
    kept = SemisupSettings.from_json((tmp_path/'cut'/'settings.json').read_text())
    assert (kept.content, kept.lam_content, kept.load_size) == ('color', 10., 0)
    train(kept, *data, tmp_path/'cut', resume=True)
    assert same_history(tmp_path/'whole', tmp_path/'cut')
    assert len(read_history(tmp_path/'cut')['content']) == 12
    with pytest.raises(CheckpointError, match='photos: 5 → 2 files; photos 2: 2 → 5 files'):
        train(kept, [wide, photos], anime, pairs, tmp_path/'cut', resume=True)
    with pytest.raises(CheckpointError, match='photos 2: 2 → 0 files'):
        train(kept, photos, anime, pairs, tmp_path/'cut', resume=True)


def test_bf16_keeps_the_heads_in_fp32(folders, tmp_path):
    "bf16 trains to finite, similar losses; weights and the saved translator stay float32."
    train(TOY.but(epochs=2), *folders, tmp_path/'fp32')
    weights = train(TOY.but(epochs=2, precision='bf16'), *folders, tmp_path/'bf16')
    a, b = read_history(tmp_path/'fp32')['total'], read_history(tmp_path/'bf16')['total']
    assert b[0] == pytest.approx(a[0], rel=.05) and a != b
    assert all(t.dtype == torch.float32 for t in load_file(weights).values())


def test_a_network_follows_from_its_name_and_the_seed():
    "What was drawn before does not count, and what is drawn after does not change."
    def first(name='D_s', **changes):
        cfg = SemisupSettings.preset('tiny').but(**changes)
        return seeded_net(name, cfg, lambda: PatchCritic(2, 6, 2)).model[0].weight
    for init in ('xavier', 'default'):
        torch.manual_seed(1)
        weight = first(init=init)
        after = torch.rand(3)
        torch.manual_seed(1)
        assert torch.rand(3).equal(after) and first(init=init).equal(weight) and weight.shape[:2] == (6, 2)
        assert not first('D_t', init=init).equal(weight) and not first(init=init, seed=1).equal(weight)
    assert first(init='xavier').std() < .03 < first(init='default').std()
