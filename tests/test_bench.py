"The bench: forms take turns in processes of their own, and a speed without equal numbers is not shown."
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import scenimefy.bench as b
import scenimefy.cli as cli
from scenimefy.bench import Row, bench, measure, rows, table
from scenimefy.core import SettingsError

TOY = '''
import os, signal, time
import numpy as np

def noted(name, work):
    "A call that writes down who was called, in which process."
    def call():
        with open(os.environ['TOY_LOG'], 'a') as f: f.write(f'{name} {os.getpid()}\\n')
        return [1.]
    return call
def stock(work): return noted('stock', work)
def ours(work): return noted('ours', work)

def counting(work):
    "1, 2, 3, … from call to call."
    calls = []
    def call():
        calls.append(None)
        return [float(len(calls))]
    return call

def off(work): return lambda: [1.1]
def nan(work): return lambda: [np.nan]
def other_shape(work): return lambda: [[1., 1.]]
def one_too_few(work): return lambda: []
def nothing(work): return lambda: None

def large(work): return lambda: [np.ones(200*2**20, np.uint8).min()]
def raises(work): raise ValueError('no such thing')
def dies(work): return lambda: os.kill(os.getpid(), signal.SIGKILL)
def hangs(work): return lambda: time.sleep(6)
def greedy(work):
    "Asks for 300 MiB where 100 are free."
    import scenimefy.bench
    scenimefy.bench._free = lambda: 100*2**20
    return lambda: [np.empty(300*2**20, np.uint8)[:1]]
def threads(work): return lambda: [float(os.environ['OMP_NUM_THREADS'])]
def reads(work): return lambda: [float(open(os.path.join(work, 'number')).read())]
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A module that a new process can import; it gets the path of this one."
    (tmp_path/'bench_toy.py').write_text(TOY)
    monkeypatch.setenv('TOY_LOG', str(tmp_path/'log'))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'bench_toy', raising=False)
    import bench_toy
    return bench_toy


def a_row(seconds=.01, budget=.2, **forms):
    return Row('toy', 'what', 'theirs', forms, seconds, .01, budget=budget)


# --- how it is measured

def test_forms_take_turns_in_two_processes(toy, tmp_path):
    found = measure(a_row(stock=toy.stock, ours=toy.ours))['forms']
    names, pids = zip(*[line.split() for line in (tmp_path/'log').read_text().splitlines()])
    n = len(found['stock']['seconds'])
    assert n == len(found['ours']['seconds']) == 2
    assert names == ('stock', 'ours')*(n + 1)                       # the first round warms up
    assert len(set(pids)) == 2 and set(pids[0::2]).isdisjoint(pids[1::2])

def test_long_calls_have_a_new_process_each(toy, tmp_path):
    found = measure(a_row(seconds=1000., stock=toy.stock, ours=toy.ours))['forms']
    names, pids = zip(*[line.split() for line in (tmp_path/'log').read_text().splitlines()])
    assert names == ('stock', 'ours')*2 and len(set(pids)) == 4     # and nothing warms up
    assert len(found['ours']['seconds']) == 2

@pytest.mark.parametrize('seconds, n', [(.001, 7), (10., 6), (29., 2), (500., 2)])
def test_what_is_cheap_is_repeated(seconds, n):
    assert b._rounds(a_row(budget=60.), seconds) == n

def test_memory_is_that_of_the_form(toy):
    if not b._in_proc('VmHWM'): pytest.skip('this system does not tell')
    found = measure(a_row(stock=toy.large, ours=toy.nothing))['forms']
    assert found['stock']['peak'] - found['ours']['peak'] > 150*2**20

def test_threads_reach_the_form(toy):
    found = measure(a_row(stock=toy.threads, ours=toy.off), threads=3)
    assert '6.3e-01' in found['forms']['ours']['error']             # 1.1 is not 3

def test_ready_writes_for_all_forms(toy):
    def ready(work): Path(work, 'number').write_text('5')
    found = measure(a_row(stock=toy.reads, ours=toy.reads)._replace(ready=ready))['forms']
    assert found['ours']['gap'] == 0


# --- what is not shown

@pytest.mark.parametrize('name', ['off', 'nan', 'other_shape', 'one_too_few', 'nothing'])
def test_no_ratio_without_equal_numbers(toy, name):
    ours = measure(a_row(stock=toy.counting, ours=getattr(toy, name)))['forms']['ours']
    assert 'numbers differ' in ours['error'] and 'ratio' not in ours and 'gap' not in ours

def test_the_first_results_are_compared(toy):
    found = measure(a_row(stock=toy.counting, ours=toy.counting, third=toy.stock))['forms']
    assert found['ours']['gap'] == found['third']['gap'] == 0

@pytest.mark.parametrize('name, said', [
    ('raises', 'ValueError: no such thing'), ('dies', 'status -9'), ('hangs', 'not done within'),
    pytest.param('greedy', 'does not fit', marks=pytest.mark.skipif(
        not b._in_proc('VmSize'), reason='no limit on this system'))])
def test_a_form_that_fails_stops_no_other(toy, monkeypatch, name, said):
    monkeypatch.setattr(b, '_PATIENCE', 4 if name == 'hangs' else 60)
    found = measure(a_row(stock=getattr(toy, name), ours=toy.ours))['forms']
    assert said in found['stock']['error'] and not found['stock']['seconds']
    assert found['ours']['seconds'] and 'error' not in found['ours'] and 'ratio' not in found['ours']

def test_best_times_and_ratio_by_hand(tmp_path):
    found = dict(stock=dict(seconds=[6., 4., 5.]), ours=dict(seconds=[8., 2.]))
    b._judge(a_row(stock=None, ours=None), tmp_path, found)
    assert (found['stock']['best'], found['ours']['best'], found['ours']['ratio']) == (4., 2., 2.)
    assert b._time_cell(found['ours']) == '2 s (+300%)'


# --- the rows themselves

def numbers(make, work): return [np.asarray(a) for a in make(work)()]

@pytest.mark.parametrize('makes', [
    [lambda w: b._step('plain_step', 32, 4, w), lambda w: b._step('fast_step', 32, 4, w)],
    [lambda w: b._pairs(1, 3, w), lambda w: b._pairs(3, 3, w)],
    [lambda w: b._stock_stylize('drawn', 20, 24, w), lambda w: b._our_stylize('drawn', 20, 24, w)]],
    ids=['step', 'pairs', 'stylize'])
def test_both_forms_of_a_row_do_the_same_work(tmp_path, makes):
    theirs, ours = (numbers(make, tmp_path) for make in makes)
    assert all(np.abs(a).max() > 0 for a in theirs) and b._gap(theirs, ours) < 1e-3

def test_the_list_of_rows():
    whole, quick = rows(), rows(quick=True)
    assert [r.name for r in whole] == [r.name for r in quick]       # none is dropped
    groups = {'step', 'stylize', 'pairs', 'fid', 'startup'}
    assert {r.name.split('-')[0] for r in whole} == groups
    assert {'stylize-256', 'stylize-1024', 'stylize-3mp', 'stylize-4k'} <= {r.name for r in whole}
    assert all(list(r.forms)[:2] == ['stock', 'ours'] for r in whole)
    assert sum(b._estimate(r, 1.) for r in quick if r.quick) < 120

def test_words_choose_rows():
    def names(*words): return [r.name for r in b._chosen(words, False)]
    assert names('step', 'fid') == ['step', 'fid'] and names() == [r.name for r in rows()]
    assert names('stylize-bundled') == ['stylize-bundled-512', 'stylize-bundled-3mp']
    assert len(names('startup')) == 3
    with pytest.raises(SettingsError, match='known: step'): names('styl')


# --- the files and the command

@pytest.fixture
def toy_rows(toy, monkeypatch):
    good = Row('startup-good', 'a b c', 'theirs', dict(stock=toy.stock, ours=toy.ours), .01, budget=.1)
    bad = good._replace(name='startup-bad', forms=dict(stock=toy.stock, ours=toy.off))
    large = good._replace(name='startup-large', quick=False)
    monkeypatch.setattr(b, 'rows', lambda quick=False: [good, bad, large])
    return good, bad, large

def test_the_record_is_on_disk_after_every_row(toy_rows, tmp_path):
    seen = []
    def say(text):
        seen.append((text, [r['name'] for r in json.loads((tmp_path/'o'/'bench.json').read_text())['rows']]))
    record = bench(tmp_path/'o', quick=True, say=say)
    assert 'about' in seen[0][0]                                     # how long, before anything is measured
    assert [names for _, names in seen] == [[], [], ['startup-good'],
                                            ['startup-good', 'startup-bad', 'startup-large']]
    assert json.loads((tmp_path/'o'/'bench.json').read_text()) == json.loads(json.dumps(record))
    head, lines = table(record)
    assert len(lines) == 3 and all(len(line) == len(head) for line in lines)
    text = (tmp_path/'o'/'bench.md').read_text()
    assert '| startup-large | not with --quick |' in text and 'numbers differ' in text
    assert 'torch' in text and f"{record['machine']['cores']} cores" in text

def test_other_engines_get_columns():
    f = dict(seconds=[1.], peak=2**20, best=1., ratio=1., gap=0.)
    broken = dict(seconds=[], peak=0, error='does not fit')
    record = dict(rows=[dict(name='a', forms=dict(stock=f, ours=f, openvino=f, onnxruntime=broken)),
                        dict(name='b', forms=dict(stock=f, ours=broken)), dict(name='c', note='no')])
    head, (a, second, c) = table(record)
    assert head[-2:] == ['onnxruntime', 'openvino'] and len(a) == len(second) == len(c) == len(head)
    assert a[-2:] == ['does not fit', '1 s (+0%), 1.00×, 1 MiB'] and second[2:4] == ['does not fit', '–']

def test_command(toy_rows, tmp_path):
    def run(*words): return CliRunner().invoke(cli.app, ['bench', *map(str, words), '-o', str(tmp_path/'o')])
    good = run('--only', 'startup-good')
    assert good.exit_code == 0 and 'startup-good' in good.stdout and '×' in good.stdout, good.output
    assert 'about' in good.stderr and 'about' not in good.stdout       # progress is no part of the table
    assert run('--only', 'startup-bad').exit_code == 1
    assert run('--only', 'nothing').exit_code == 2 and run('--threads', 0).exit_code == 2


# --- start-up: which packages are not loaded (a time would depend on the computer)

def loaded(code):
    code += '\nimport sys\nprint(*sorted(sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())

HEAVY = {'numpy', 'PIL', 'torch', 'rich', 'matplotlib', 'tqdm', 'multiprocessing.pool'}

def test_import_is_light(): assert not HEAVY & loaded('import scenimefy')

def test_the_bench_is_light():
    "Its processes hold nothing that the form does not need."
    assert not HEAVY & loaded('import scenimefy.bench')

def test_one_picture_needs_torch_and_little_else():
    "torch._dynamo and sympy alone took half of the time before the first pixel."
    code = ("import numpy, scenimefy.stylize as s; "
            "s.stylize(numpy.zeros((9, 9, 3), 'u1'), device='cpu')")
    found = loaded(code)
    needless = {'torch._dynamo', 'sympy', 'torchvision', 'matplotlib', 'transformers', 'open_clip',
                'accelerate', 'scipy', 'pandas', 'IPython', 'tensorboard', 'torch.utils.tensorboard', 'av',
                'lpips'}
    assert 'torch' in found and not needless & found, needless & found

def test_a_program_is_measured_from_outside():
    "Its own memory, and what it says when it fails."
    call = b._Program(sys.executable, '-c', 'import time\nx = b"1"*(100*2**20)\ntime.sleep(.2)')
    assert call() is None
    if b._in_proc('VmHWM'): assert 100*2**20 < call.peak < 200*2**20
    with pytest.raises(RuntimeError, match='no such file'):
        b._Program(sys.executable, '-c', 'raise SystemExit("no such file")')()
