"The loop that all trainings share: lives cut short at any step, damaged files, and what must be refused."
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import scenimefy.runs as runs
from scenimefy.core import SettingsError, UserError, opt, seeded
from scenimefy.data import ImageSet
from scenimefy.runs import (CheckpointError, Diverged, RunSettings, Stopped, TrainingRun, checkpoints,
                            copy_run, descend, fetch_copy, read_checkpoint, read_history, _read_lines,
                            restore, run_training, runs_folder, state_tensors, stop_signals, update_ema)


@dataclass(frozen=True)
class LineSettings(RunSettings):
    "Two numbers that learn the brightness and the contrast of small pictures."
    size:  int   = opt(8, 'side', 'test', lo=2)
    batch: int   = opt(2, 'images', 'test', lo=1)
    steps: int   = opt(9, 'length', 'test', lo=1)
    lr:    float = opt(.1, 'Adam step size', 'test', lo=0.)


class LineRun(TrainingRun):
    result = 'line.safetensors'
    def __init__(self, cfg, photos, run):
        super().__init__(cfg, run, 'cpu')
        torch.manual_seed(cfg.seed)                     # the dice are part of the state that we compare
        self.sets, self.n_steps = (ImageSet(photos, cfg.size, cfg.seed),), cfg.steps
        self.nets = nn.ModuleDict({'G': nn.Linear(1, 1)})
        nn.init.zeros_(self.nets.G.weight)
        nn.init.zeros_(self.nets.G.bias)
        self.nets.register_buffer('seen', torch.tensor(0))
        self.ema = nn.Linear(1, 1)
        self.ema.load_state_dict(self.nets.G.state_dict())
        self.optims = {'G': torch.optim.Adam(self.nets.G.parameters(), cfg.lr)}

    def take_step(self, batch):
        (x,) = batch
        target = torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))])
        loss = (self.nets.G(torch.tensor([[0.], [1.]])) - target).square().mean()
        descend(self.optims, ['G'], loss.backward)
        update_ema(self.ema, self.nets.G, .5)
        self.nets.seen += len(x)
        return {'loss': loss, 'count': self.step}

    def sheet(self): return torch.zeros(3, 4, 4)
    def export(self): save_file(self.ema.state_dict(), self.folder/self.result)


TOY = LineSettings(workers=0, log_every=1, save_every=2, sample_every=100)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photos')
    for i in range(5):
        noise = torch.randint(50*i, 50*i + 56, (10, 14, 3), generator=seeded('runs', i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder/f'{i}.png')
    return folder


def life(photos, run, cfg=TOY, resume=False, on_step=None, backup=None):
    r = LineRun(cfg, photos, run)
    run_training(r, resume, on_step, backup=backup)
    return r


@pytest.fixture(scope='module')
def whole(photos, tmp_path_factory):
    "An undisturbed run."
    run = tmp_path_factory.mktemp('whole')/'run'
    life(photos, run)
    return run


def same(a, b):
    "History, last checkpoint and result are equal to the last bit, the clock aside."
    ha, hb = read_history(a), read_history(b)
    ha.pop('seconds'), hb.pop('seconds')
    ta, tb = (read_checkpoint(checkpoints(d)[-1])[0] for d in (a, b))
    ra, rb = (load_file(d/LineRun.result) for d in (a, b))
    if ha != hb or len(ha['step']) != 9 or ta.keys() != tb.keys(): return False
    return all(torch.equal(ta[k], tb[k]) for k in ta) and all(torch.equal(ra[k], rb[k]) for k in ra)


def crash_at(at):
    def crash(step, n_steps, losses):
        if step == at: raise SystemError('crash')
    return crash


# ---- a life cut short

@pytest.mark.parametrize('at', range(3, 10))
def test_crash_after_any_step(photos, whole, tmp_path, at):
    with pytest.raises(SystemError): life(photos, tmp_path/'run', on_step=crash_at(at))
    r = life(photos, tmp_path/'run', resume=True)
    assert r.step == 9 and same(whole, tmp_path/'run')


def test_crash_before_the_first_checkpoint(photos, whole, tmp_path):
    with pytest.raises(SystemError): life(photos, tmp_path/'run', on_step=crash_at(1))
    with pytest.raises(CheckpointError, match='nothing to resume'):
        life(photos, tmp_path/'nowhere', resume=True)
    for resume in (True, False):                     # as whoever reads the message would try it
        run = tmp_path/f'run{resume}'
        with pytest.raises(SystemError): life(photos, run, on_step=crash_at(1))
        with pytest.warns(UserWarning, match='begins again'): life(photos, run, resume=resume)
        assert same(whole, run)


def test_a_strangers_folder_is_not_begun_again(photos, tmp_path):
    "settings.json beside files that no run writes, or beside a damaged checkpoint: nothing is overwritten."
    for name in ('scores.jsonl', 'checkpoints/step-00000003.damaged'):
        run = tmp_path/name.replace('/', '-')
        (run/name).parent.mkdir(parents=True)
        for file in ('settings.json', name): (run/file).write_text('{}')
        with pytest.raises(UserError, match='already holds'): life(photos, run)
        assert (run/'settings.json').read_text() == '{}'


def test_many_short_lives(photos, whole, tmp_path):
    "One step a life, each ended by a signal."
    def stop(step, n_steps, losses): signal.raise_signal(signal.SIGTERM)
    for i in range(9):
        with pytest.raises(Stopped, match=f'after step {i + 1} of 9'):
            life(photos, tmp_path/'run', resume=i > 0, on_step=stop)
    assert same(whole, tmp_path/'run')


def test_crash_between_checkpoint_and_result(photos, whole, tmp_path, monkeypatch):
    "The checkpoint is newer than the result: the next life writes the result again."
    class Dies(LineRun):
        def export(self):
            if self.step == 9: raise SystemError('crash')
            super().export()
    with pytest.raises(SystemError): run_training(Dies(TOY, photos, tmp_path/'run'))
    assert checkpoints(tmp_path/'run')[-1].stem == 'step-00000009'
    life(photos, tmp_path/'run', resume=True)
    assert same(whole, tmp_path/'run')


def test_a_run_may_be_made_longer_where_its_settings_allow(photos, whole, tmp_path):
    @dataclass(frozen=True)
    class Longer(LineSettings):
        "No schedule depends on the length."
        FREE = LineSettings.FREE | {'steps'}
    short = Longer(**{**TOY.to_dict(), 'steps': 4})
    life(photos, tmp_path/'run', short)
    life(photos, tmp_path/'run', short.but(steps=9), resume=True)
    assert same(whole, tmp_path/'run')
    with pytest.raises(SettingsError, match='already made 9 steps'):
        life(photos, tmp_path/'run', short, resume=True)


def test_finished_run_resumes_to_nothing(photos, whole, tmp_path):
    "Resuming a finished run is no error, changes nothing, and puts a lost result back."
    life(photos, tmp_path/'run')
    (tmp_path/'run'/LineRun.result).unlink()
    assert life(photos, tmp_path/'run', TOY.but(save_every=1), resume=True).step == 9
    assert same(whole, tmp_path/'run')


def test_workers_do_not_change_the_result(photos, whole, tmp_path):
    life(photos, tmp_path/'run', TOY.but(workers=2))
    assert same(whole, tmp_path/'run')


# ---- files that were hurt

def test_history_of_a_lost_life_is_dropped(photos, whole, tmp_path):
    run = tmp_path/'run'
    life(photos, run)
    log = run/'log.jsonl'
    for c in checkpoints(run)[1:]: c.unlink()                       # only step 8 of 9 is left
    log.write_text(log.read_text() + '{"step": 10, "lo')            # and a line that the crash cut short
    life(photos, run, resume=True)
    assert [e['step'] for e in _read_lines(log)] == list(range(1, 10)) and same(whole, run)


def test_damaged_history_does_not_block(photos, whole, tmp_path):
    life(photos, tmp_path/'run')
    with open(tmp_path/'run'/'log.jsonl', 'ab') as f: f.write(bytes(3) + b'\n[1]\n{"a": 1}\n')
    life(photos, tmp_path/'run', resume=True)
    assert same(whole, tmp_path/'run')


def test_whole_numbers_stay_whole(whole):
    assert read_history(whole)['count'] == list(range(9)) and '"count": 0,' in (whole/'log.jsonl').read_text()


def test_broken_checkpoint_falls_back(photos, whole, tmp_path):
    run = tmp_path/'run'
    life(photos, run)
    newest = checkpoints(run)[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match='trying the one before'): life(photos, run, resume=True)
    assert same(whole, run)
    for c in checkpoints(run): c.write_bytes(b'no')
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match='delete that folder'):
        life(photos, run, resume=True)


def test_checkpoint_of_another_kind_is_refused(photos, tmp_path):
    "The result may be a safetensors file too, but it is no checkpoint; nor is that of another stage ours."
    run = tmp_path/'run'
    r = life(photos, run)
    tensors = {k: v.clone() for k, v in read_checkpoint(checkpoints(run)[-1])[0].items()}
    for c in checkpoints(run): c.write_bytes((run/r.result).read_bytes())
    with pytest.warns(UserWarning, match='no checkpoint'), pytest.raises(CheckpointError):
        life(photos, run, resume=True)
    @dataclass(frozen=True)
    class Other(RunSettings):
        "The settings of another stage."
        rl: float = opt(.1, 'step size', 'test', lo=0.)
    runs.save_checkpoint(run, 9, Other(), tensors, {})
    with pytest.raises(CheckpointError, match="another kind of training: no setting 'rl'"):
        life(photos, run, resume=True)


def test_full_disk(photos, tmp_path, monkeypatch):
    "Saving fails with advice; the checkpoints before stay, and no half file does."
    real, calls = save_file, []
    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) < 3: return real(tensors, path, metadata)
        path.write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(runs, 'save_file', full)
    with pytest.raises(UserError, match='free some space, then --resume'): life(photos, tmp_path/'run')
    left = sorted(p.name for p in (tmp_path/'run'/'checkpoints').iterdir())
    assert left == ['step-00000002.safetensors', 'step-00000004.safetensors']


# ---- when something is written

def test_saved_after_ten_minutes_at_the_latest(photos, tmp_path, monkeypatch):
    cfg = TOY.but(save_every=1000, keep=20)
    life(photos, tmp_path/'a', cfg)
    assert [c.stem[-2:] for c in checkpoints(tmp_path/'a')] == ['09']
    monkeypatch.setattr(runs, '_SAVE_SECONDS', -1)
    life(photos, tmp_path/'b', cfg)
    assert len(checkpoints(tmp_path/'b')) == 9


def test_log_and_samples(photos, tmp_path):
    life(photos, tmp_path/'run', TOY.but(log_every=4, sample_every=3))
    assert read_history(tmp_path/'run')['step'] == [4, 8, 9]        # the last step always
    samples = sorted(p.stem for p in (tmp_path/'run'/'samples').iterdir())
    assert samples == ['00000003', '00000006', '00000009']
    assert json.loads((tmp_path/'run'/'settings.json').read_text())['log_every'] == 4


@pytest.mark.fault('training: a loss becomes NaN or infinite',
                   happens='it stops, and names the step, the loss and the pictures of the batch',
                   left='the last good checkpoint')
def test_nan_between_two_log_entries_is_not_saved(photos, tmp_path):
    "Nobody looks at the loss of step 4, but its checkpoint is due."
    class Sick(LineRun):
        def take_step(self, batch):
            losses = super().take_step(batch)
            if self.step == 3: losses['loss'] = losses['loss']*float('nan')
            return losses
    with pytest.raises(Diverged, match=r'at step 4: loss became NaN.*step-00000002'):
        run_training(Sick(TOY.but(log_every=100), photos, tmp_path/'run'))
    assert len(checkpoints(tmp_path/'run')) == 1


def test_diverged_names_the_images_of_the_batch(photos, tmp_path):
    class Sick(LineRun):
        def take_step(self, batch): return {'loss': float('inf')}
    r = Sick(TOY.but(batch=3), photos, tmp_path/'run')
    with pytest.raises(Diverged) as e: run_training(r)
    for p in range(3): assert r.sets[0].files(p)[0].name in str(e.value)
    assert 'no checkpoint had been written yet' in str(e.value)


# ---- state

def test_part_of_a_network_may_be_trained():
    "An optimizer that holds some of a network's weights: only theirs are saved, before and after a step."
    def make():
        nets = nn.ModuleDict({'G': nn.Linear(2, 2)})
        return nets, {'G': torch.optim.Adam([nets.G.bias])}
    def one_step(nets, optims):
        optims['G'].zero_grad()
        nets.G(torch.ones(1, 2)).sum().backward()
        optims['G'].step()
    nets, optims = make()
    assert not [k for k in state_tensors(nets, optims) if k.startswith('optim/')]
    one_step(nets, optims)
    saved = state_tensors(nets, optims)
    assert {k.split('/')[2] for k in saved if k.startswith('optim/')} == {'bias'}
    assert len(optims['G'].state) == 1
    again, fresh = make()
    restore(saved, again, fresh)
    one_step(nets, optims)
    one_step(again, fresh)
    assert torch.equal(nets.G.bias, again.G.bias)


def without(state, keys): return {k: v for k, v in state.items() if k not in keys}


def test_missing_or_extra_numbers_are_refused():
    nets = nn.ModuleDict({'G': nn.Linear(2, 2)})
    state = state_tensors(nets, {})
    biases = [k for k in state if 'bias' in k]
    with pytest.raises(CheckpointError, match='Missing key'): restore(without(state, biases), nets, {})
    more = {**state, 'net/more': torch.ones(1)}
    with pytest.raises(CheckpointError, match='Unexpected key'): restore(more, nets, {})


def test_a_state_without_its_optimizer_is_refused():
    "All of Adam's memory, of every weight that learns, in the shape of the weight."
    def make():
        nets = nn.ModuleDict({'G': nn.Linear(2, 3)})
        return nets, {'G': torch.optim.Adam(nets.G.parameters())}
    nets, optims = make()
    nets.G(torch.ones(1, 2)).sum().backward()
    optims['G'].step()
    state = state_tensors(nets, optims)
    keys = [k for k in state if k.startswith('optim/')]
    assert len(keys) == 6
    for lost in ([k] for k in keys):
        with pytest.raises(CheckpointError, match='memory of Adam'): restore(without(state, lost), *make())
    with pytest.raises(CheckpointError, match='memory of Adam'): restore(without(state, keys), *make())
    turned = {**state, 'optim/G/weight/exp_avg': torch.zeros(2, 3)}
    with pytest.raises(CheckpointError, match='another shape'): restore(turned, *make())
    restore(state, *make())


@pytest.mark.fault('shared: a training begins where another is at work',
                   happens='refused in one line',
                   left='every file of the first as it was')
def test_a_locked_run_refuses_a_second_one(photos, tmp_path, monkeypatch):
    "Another process holds the folder: nothing is read, nothing is written."
    life(photos, tmp_path/'run')
    before = {p: p.read_bytes() for p in (tmp_path/'run').rglob('*') if p.is_file()}
    code = ('import sys, time\n'
            'from scenimefy.runs import one_at_a_time\n'
            'with one_at_a_time(sys.argv[1]):\n'
            '    print("locked", flush=True)\n'
            '    time.sleep(60)')
    command = [sys.executable, '-c', code, str(tmp_path/'run')]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == 'locked\n'
        monkeypatch.setattr(runs.one_at_a_time.__wrapped__, '__defaults__', (.2,))
        with pytest.raises(UserError, match='another process is at work'):
            life(photos, tmp_path/'run', resume=True)
    finally:
        other.kill()
        other.wait()
    assert {p: p.read_bytes() for p in (tmp_path/'run').rglob('*') if p.is_file()} == before
    life(photos, tmp_path/'run', resume=True)        # the lock died with its process


def test_stray_local_rank(photos, tmp_path, monkeypatch):
    "A variable that some launcher left behind does not make a training wait for others."
    for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('LOCAL_RANK', '0')
    with pytest.warns(UserWarning, match='LOCAL_RANK'): life(photos, tmp_path/'run')
    assert (tmp_path/'run'/LineRun.result).exists()


# ---- reading and writing fail

@pytest.mark.fault('training: a process that reads ahead is killed',
                   happens='the state is saved, one line says what happened, --resume goes on',
                   left='a checkpoint of the last step')
def test_a_dead_reader_costs_no_step(photos, tmp_path):
    "The system kills a process that reads ahead: the state is saved, one line says what happened."
    def kill_readers(step, n_steps, losses):
        import multiprocessing
        if step == 3:
            for child in multiprocessing.active_children(): os.kill(child.pid, signal.SIGKILL)
    run = tmp_path/'run'
    with pytest.raises(UserError, match='workers = 0') as e:
        life(photos, run, TOY.but(workers=1, steps=40), on_step=kill_readers)
    assert '\n' not in str(e.value) and 'go on with --resume' in str(e.value)
    saved = int(checkpoints(run)[-1].stem.split('-')[1])
    assert saved >= 3 and f'after step {saved} is saved' in str(e.value)
    assert life(photos, run, TOY.but(steps=40), resume=True).step == 40


def test_what_a_reader_raises_is_one_line(photos, tmp_path, monkeypatch):
    usual = ImageSet._sample
    def broken(self, position):
        if position >= 12: raise OSError(errno.EIO, 'Input/output error')
        return usual(self, position)
    r = LineRun(TOY.but(workers=1), photos, tmp_path/'run')
    monkeypatch.setattr(ImageSet, '_sample', broken)
    said = 'OSError: .Errno 5. Input/output error; the state after step [56] is saved'
    with pytest.raises(UserError, match=said) as e: run_training(r)
    assert '\n' not in str(e.value) and 'Traceback' not in str(e.value)


def test_trackers_are_closed_however_a_run_ends(photos, tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(runs.Accelerator, 'end_training', lambda self: ended.append(1))
    def stop(step, n_steps, losses): signal.raise_signal(signal.SIGTERM)
    before = threading.excepthook
    with pytest.raises(Stopped): life(photos, tmp_path/'a', on_step=stop)
    with pytest.raises(SystemError): life(photos, tmp_path/'b', on_step=crash_at(2))
    life(photos, tmp_path/'c')
    assert len(ended) == 3 and threading.excepthook is before


def test_average_moves_by_the_share_that_it_forgets():
    "A decay of 0.75: of the way from 4 to 8 a quarter, then a quarter of what is left."
    average, net = nn.Linear(1, 1), nn.Linear(1, 1)
    for p in average.parameters(): nn.init.constant_(p, 4.)
    for p in net.parameters(): nn.init.constant_(p, 8.)
    for want in (5., 5.75):
        update_ema(average, net, .75)
        assert all(p.item() == want for p in average.parameters())
        assert all(p.item() == 8 for p in net.parameters())


# ---- signals and processes

def test_signals_in_a_thread():
    "Python allows handlers in the main thread only; elsewhere the block runs without them."
    seen = []
    def work():
        with stop_signals() as arrived: seen.append(arrived)
    t = threading.Thread(target=work)
    t.start()
    t.join()
    assert seen == [[]]


def test_a_signal_to_another_process_stops_all(photos, tmp_path):
    r = LineRun(TOY, photos, tmp_path/'run')
    assert r.anywhere(['SIGTERM']) == ['SIGTERM'] and r.anywhere([]) == []
    for others, expected in ((0, []), (1, ['a signal to another process'])):
        r.world_size, r.accelerator = 2, types.SimpleNamespace(reduce=lambda t, how: t + others)
        assert r.anywhere([]) == expected


def test_gradients_of_two_processes_are_their_mean(photos, tmp_path):
    "Not their sum, which Adam would not notice and other optimizers would."
    r = LineRun(TOY, photos, tmp_path/'run')
    def with_a_five(t, how):
        "What a second process adds, whose gradients are 5."
        return (t + 5)/2 if how == 'mean' else t + 5
    r.world_size, r.accelerator = 2, types.SimpleNamespace(reduce=with_a_five)
    r.nets.G.weight.grad = torch.full((1, 1), 3.)
    r.sync_gradients(['G'])
    assert r.nets.G.weight.grad.item() == 4 and r.nets.G.bias.grad is None


def test_a_device_is_not_ignored_among_several_processes(photos, tmp_path, monkeypatch):
    "Each process has its own card: a card of one's own choice is refused, the kind of device is not."
    class Two:
        num_processes, process_index, is_main_process, device = 2, 0, True, torch.device('cpu')
    monkeypatch.setattr(runs, '_new_accelerator', lambda folder: Two())
    monkeypatch.setattr(runs, 'pick_device', lambda name: torch.device('cpu' if name == 'auto' else name))
    for name in ('auto', 'cpu'):
        assert runs.Processes(tmp_path, name, 'fp32').device == torch.device('cpu')
    for name in ('cuda', 'cuda:1', 'cpu:0'):
        with pytest.raises(SettingsError, match='leave the device out'):
            runs.Processes(tmp_path, name, 'fp32')


def test_diverged_names_the_images_of_its_own_process(photos, tmp_path):
    "The second of two processes, batches of two: the first step shows it the third and fourth picture."
    r = LineRun(TOY, photos, tmp_path/'run')
    r.step, r.rank, r.world_size = 1, 1, 2
    with pytest.raises(Diverged) as e: runs._look_at({'loss': float('nan')}, r)
    named = [r.sets[0].files(p)[0].name in str(e.value) for p in range(5)]
    assert named == [False, False, True, True, False]


def test_frozen_networks_thaw_after_an_error():
    net = nn.Linear(1, 1)
    with pytest.raises(ZeroDivisionError):
        with runs.frozen(net, None):
            assert not any(p.requires_grad for p in net.parameters())
            1/0
    assert all(p.requires_grad for p in net.parameters())


# ---- what is refused

def test_settings_that_change_the_result(photos, tmp_path):
    life(photos, tmp_path/'run')
    for change in (dict(lr=.2), dict(seed=1), dict(batch=1), dict(steps=10)):
        with pytest.raises(SettingsError, match='keeps its settings'):
            life(photos, tmp_path/'run', TOY.but(**change), resume=True)
    life(photos, tmp_path/'run', TOY.but(keep=1, log_every=3, sample_every=1), resume=True)


@pytest.mark.fault('shared: a new training in the folder of an old one',
                   happens='refused, with the advice to add --resume',
                   left='every file as it was')
def test_run_folder_is_not_overwritten(photos, tmp_path):
    life(photos, tmp_path/'run')
    with pytest.raises(UserError, match='--resume'): life(photos, tmp_path/'run')
    (tmp_path/'other').mkdir()
    (tmp_path/'other'/LineRun.result).write_text('mine')
    with pytest.raises(UserError, match='--resume'): life(photos, tmp_path/'other')
    assert (tmp_path/'other'/LineRun.result).read_text() == 'mine'


def test_a_file_in_place_of_the_run_folder(photos, tmp_path):
    (tmp_path/'run').write_text('mine')
    with pytest.raises(UserError, match='cannot write'): life(photos, tmp_path/'run')
    assert (tmp_path/'run').read_text() == 'mine'


def test_another_number_of_processes(photos, tmp_path):
    life(photos, tmp_path/'run')
    r = LineRun(TOY, photos, tmp_path/'run')
    r.world_size = 2
    with pytest.raises(CheckpointError, match='1 processes and now has 2'): run_training(r, resume=True)


# ---- a copy on another disk

def test_runs_are_kept_on_a_mounted_drive(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, '_DRIVE', tmp_path/'MyDrive')
    assert runs_folder() == Path('runs')
    (tmp_path/'MyDrive').mkdir()
    assert runs_folder() == tmp_path/'MyDrive'/'scenimefy'


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_runs import TOY, life
def slowly(step, n_steps, losses):
    print(step, flush=True)
    if step == 7: time.sleep(600)
life(Path({photos!r}), Path({run!r}), on_step=slowly, backup=Path({backup!r}))
"""


@pytest.mark.fault('killed: training, and the machine goes with its disk',
                   happens='--resume with --backup goes on from the copy, and ends bit for bit as '
                           'undisturbed',
                   left='the copy, up to the last save')
def test_a_machine_that_is_taken_away(photos, whole, tmp_path):
    "SIGKILL in step 7, and the disk is lost: the copy holds step 6, and the run ends as if undisturbed."
    local, copy = tmp_path/'machine'/'run', tmp_path/'drive'/'run'
    places = dict(photos=str(photos), run=str(local), backup=str(copy))
    code = KILLED.format(tests=str(Path(__file__).parent), **places)
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.DEVNULL)
    try:
        for line in process.stdout:
            if line.strip() == '7': break
    finally: process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL and checkpoints(copy)[-1].name == 'step-00000006.safetensors'
    shutil.rmtree(tmp_path/'machine')
    r = life(photos, local, resume=True, backup=copy)
    assert r.step == 9 and same(whole, local) and same(whole, copy)
    assert [p.name for p in checkpoints(copy)] == [p.name for p in checkpoints(local)]


def test_the_further_of_two_copies_wins(photos, whole, tmp_path):
    "A machine that slept while another one went on takes the state of the other, and never the reverse."
    first, second, copy = (tmp_path/name for name in ('first', 'second', 'copy'))
    with pytest.raises(SystemError): life(photos, first, on_step=crash_at(5), backup=copy)
    with pytest.raises(SystemError): life(photos, second, resume=True, on_step=crash_at(9), backup=copy)
    assert checkpoints(first)[-1].name < checkpoints(copy)[-1].name
    began = []
    life(photos, first, resume=True, on_step=lambda step, *_: began.append(step), backup=copy)
    assert began == [9] and same(whole, first)
    for file in checkpoints(copy): file.unlink()
    fetch_copy(first, copy)
    assert len(checkpoints(first)) == 2 and same(whole, first)


def test_a_new_run_does_not_write_over_a_copy(photos, tmp_path):
    life(photos, tmp_path/'a', backup=tmp_path/'copy')
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path/'copy').rglob('*'))
    with pytest.raises(UserError, match='already holds the copy of a run'):
        life(photos, tmp_path/'b', backup=tmp_path/'copy')
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path/'copy').rglob('*'))


@pytest.mark.fault('disk: the second disk of --backup drops out',
                   happens='a note; the next save makes up for it',
                   left='the run, and later its copy')
def test_a_drive_that_drops_out(photos, whole, tmp_path, monkeypatch):
    "A copy that fails is a warning; the next save makes up for it."
    failed, copyfile = [], shutil.copyfile
    def sometimes(*args):
        if len(failed) < 2:
            failed.append(args)
            raise OSError(errno.ENOTCONN, 'Transport endpoint is not connected')
        return copyfile(*args)
    monkeypatch.setattr(shutil, 'copyfile', sometimes)
    with pytest.warns(UserWarning, match='the next save tries again'):
        life(photos, tmp_path/'run', backup=tmp_path/'copy')
    assert len(failed) == 2 and same(whole, tmp_path/'run') and same(whole, tmp_path/'copy')


def test_a_copy_that_was_cut_off_is_no_run(photos, whole, tmp_path):
    "The machine goes while the first checkpoint is copied: the log is there, and nothing to go on from."
    run, copy = tmp_path/'run', tmp_path/'copy'
    with pytest.raises(SystemError): life(photos, run, on_step=crash_at(4), backup=copy)
    for file in checkpoints(copy): file.unlink()
    shutil.rmtree(run)
    with pytest.raises(CheckpointError, match='nothing to resume'):
        life(photos, run, resume=True, backup=copy)
    shutil.rmtree(run, ignore_errors=True)
    life(photos, run, backup=copy)
    assert same(whole, copy)


def test_the_same_folder_twice_is_no_copy(photos, whole, tmp_path):
    r = life(photos, tmp_path/'run', backup=tmp_path/'x'/'..'/'run')
    assert r.backup is None and same(whole, tmp_path/'run')


def test_what_is_copied(tmp_path, monkeypatch):
    "Everything but hidden files; checkpoints last and once, the rest anew; dropped checkpoints go."
    copied, copyfile = [], shutil.copyfile
    def noted(file, to):
        copied.append(file.name)
        copyfile(file, to)
    monkeypatch.setattr(shutil, 'copyfile', noted)
    run, copy = tmp_path/'run', tmp_path/'copy'
    for name in ('log.jsonl', '.lock', 'checkpoints/step-1.safetensors', 'checkpoints/.step-2.safetensors'):
        (run/name).parent.mkdir(parents=True, exist_ok=True)
        (run/name).write_text('first')
    copy_run(run, copy)
    assert {p.name for p in copy.rglob('*') if p.is_file()} == {'log.jsonl', 'step-1.safetensors'}
    assert copied == ['log.jsonl', 'step-1.safetensors']
    (run/'log.jsonl').write_text('later')
    copy_run(run, copy)
    assert copied[2:] == ['log.jsonl']
    (run/'checkpoints'/'step-1.safetensors').rename(run/'checkpoints'/'step-3.safetensors')
    copy_run(run, copy)
    assert (copy/'log.jsonl').read_text() == 'later'
    assert [p.name for p in checkpoints(copy)] == ['step-3.safetensors']
