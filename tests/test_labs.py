"The labs: exercises that recognize mistakes, what students get, slides, and grading."
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
TEACHER = ROOT/'nbs'/'labs'/'teacher'
sys.path.insert(0, str(TEACHER))

import grade
import make_labs
import sample_lab
import time_limit
from run_notebooks import figures
from scenimefy import labs
from scenimefy.core import UserError

SOURCES = make_labs.sources()
ANSWERS = sorted((ROOT/'scenimefy'/'answers').glob('lab*.py'))
source = pytest.mark.parametrize('path', SOURCES, ids=lambda p: p.stem)


def all_exercises():
    "Those of every lab of the package, and of the sample."
    numbers = [path.stem.removeprefix('lab') for path in ANSWERS]
    return [exercise for lab in [*numbers, 99] for exercise in labs.exercises(lab).values()]


exercise = pytest.mark.parametrize('e', all_exercises(), ids=lambda e: e.id)


# ---- exercises

@exercise
def test_the_right_answer_is_right(e):
    found = labs.judge(e, e.answer)
    assert found.right is True, str(found)


@exercise
def test_every_mistake_is_recognized_as_itself(e):
    assert len(e.mistakes) >= 2
    for k, mistake in enumerate(e.mistakes):
        found = labs.judge(e, mistake.wrong)
        assert (found.right, found.mistake) == (False, k), f'{mistake.says!r} is taken for: {found}'
        assert found.text == mistake.says and len(mistake.says) > 10


@exercise
def test_hints_and_solution(e):
    assert len(e.hints) == 2 and all(e.hints) and e.hints[0] != e.hints[1] and e.title
    assert len(labs._solution(e)) > 2
    if callable(e.answer): assert len(e.cases()) >= 3 or e.cases() == e.answer, 'at least three hidden cases'


@exercise
def test_an_open_answer_is_open(e):
    assert labs.judge(e, ...).right is None
    if callable(e.answer): assert labs.judge(e, lambda *args: None).right is None


# ---- check, hint, progress

@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record(folder): return json.loads((folder/'progress.json').read_text())


def test_check_keeps_progress(folder, capsys):
    labs.check('99.1', ...)
    assert not (folder/'progress.json').exists(), 'an open answer is no try'
    labs.check('99.1', 25.)
    assert 'percentage' in capsys.readouterr().out
    assert record(folder) == {'99.1': dict(tries=1, hints=0, right=False)}
    labs.check('99.1', .25)
    labs.check('99.1', 7.)
    assert record(folder) == {'99.1': dict(tries=3, hints=0, right=True)}, 'solved stays solved'


def test_two_hints_then_the_solution(folder, capsys):
    for _ in range(3): labs.hint('99.2')
    first, second, solution = re.split(r'(?<=\n)(?=\*\*Hint 2|<details>)', capsys.readouterr().out)
    assert 'Look at the shape' in first and 'one line' in second
    assert '<details>' in solution and '(x**2).mean(-1)' in solution
    assert record(folder)['99.2']['hints'] == 3


def test_progress_is_a_table(folder, capsys):
    labs.check('99.1', .25)
    labs.check('99.2', sample_lab.sum_square)
    capsys.readouterr()
    labs.progress(99)
    out = capsys.readouterr().out
    states = re.findall(r'(99\.\d) .*?\| (\w+) \|', out)
    assert states == [('99.1', 'solved'), ('99.2', 'tried'), ('99.3', 'open')]


@pytest.mark.parametrize('text', ['', '{"99.1": {"tries": 1', '[1, 2]', '{"99.1": 3}', '{"99.1": {}}', '\0'])
def test_a_broken_record_is_replaced(folder, capsys, text):
    (folder/'progress.json').write_text(text)
    labs.progress(99)
    labs.hint('99.1')
    labs.check('99.1', .25)
    assert record(folder) == {'99.1': dict(tries=1, hints=1, right=True)}


def test_a_record_in_another_encoding_is_replaced(folder, capsys):
    (folder/'progress.json').write_bytes(b'\xff\xfe\x00')
    labs.check('99.1', .25)
    assert record(folder)['99.1']['right']


@pytest.mark.parametrize('id', ['99.9', '98.1', 'first', '', '99', 99.7])
def test_an_unknown_exercise_is_said(folder, id):
    for ask in (lambda: labs.check(id, 1), lambda: labs.hint(id)):
        with pytest.raises(UserError): ask()
    assert not (folder/'progress.json').exists()


def test_an_unknown_lab_is_said():
    with pytest.raises(UserError, match='no lab 98'): labs.progress(98)


# ---- students' notebooks

def sample(tmp_path):
    "The sample's source as a file."
    path = tmp_path/'lab99.ipynb'
    nbformat.write(sample_lab.sample_source(), path)
    return path


def student(tmp_path): return make_labs.student_version(make_labs.read_notebook(sample(tmp_path)))


def by_id(nb): return {cell['id']: cell for cell in nb['cells']}


@pytest.mark.parametrize('before, after', [
    ('x = 3  # SOLUTION', 'x = ...'),
    ('    return a + b  # SOLUTION', '    return ...'),
    ('return_value = 3  # SOLUTION', 'return_value = ...'),
    ("x = '='  # SOLUTION\ny = 2", 'x = ...\ny = 2'),
    ('def f(x):\n    # BEGIN SOLUTION\n    y = x\n    return y\n    # END SOLUTION', 'def f(x):\n    ...'),
    ('if x:\n\t# BEGIN SOLUTION\n\ty\n\t# END SOLUTION\nz', 'if x:\n\t...\nz'),
    ('a\n\nb', 'a\n\nb')])
def test_a_solution_becomes_three_dots(before, after):
    assert make_labs.strip_solution(before) == after


@pytest.mark.parametrize('code', [
    '# BEGIN SOLUTION\nx', 'x\n# END SOLUTION', '# BEGIN SOLUTION\n# BEGIN SOLUTION\n# END SOLUTION',
    'a, b = 1, 2  # SOLUTION', 'f(3)  # SOLUTION', 'x = f(  # SOLUTION'])
def test_a_mark_that_would_leave_a_broken_cell_is_refused(code):
    with pytest.raises(ValueError): make_labs.strip_solution(code)


def test_what_a_student_gets(tmp_path):
    nb = student(tmp_path)
    cells, before = by_id(nb), by_id(sample_lab.sample_source())
    gone = {id for id in before if id.startswith('teach-')}
    assert gone and set(cells) == set(before) - gone | {'hand-in'}
    assert cells['ans-99-1']['source'] == 'share = ...'
    assert cells['ans-99-2']['source'].endswith('last axis."\n    ...')
    assert cells['ans-99-3']['source'].endswith('if tau > 0:\n        ...')
    for id in ('ans-99-1', 'ans-99-2', 'check-99-1', 'check-99-2', 'progress-99'):
        assert not cells[id]['outputs'], id
    assert cells['fig-curve']['outputs'][0]['data']['image/png'] == sample_lab.PIXEL
    assert cells['fig-curve']['metadata']['alt'] and cells['try-numbers']['outputs']
    unchanged = {id for id in cells if id in before and not id.startswith('ans-')}
    assert all(cells[id]['source'] == before[id]['source'] for id in unchanged)


def test_making_twice_and_cleaning_change_nothing(tmp_path):
    from nbdev.clean import clean_nb
    text = make_labs.notebook_text(student(tmp_path))
    assert text == make_labs.notebook_text(student(tmp_path))
    nbformat.validate(nbformat.reads(text, 4))
    nb = json.loads(text)
    clean_nb(nb, allowed_cell_metadata_keys=['alt'], clean_ids=False)
    assert json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n' == text
    path = tmp_path/'student.ipynb'
    path.write_text(text, encoding='utf-8')
    assert make_labs.notebook_text(make_labs.read_notebook(path)) == text


def test_a_lab_with_nothing_filled_in_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    names = {}
    for cell in student(tmp_path)['cells']:
        if cell['cell_type'] == 'code': exec(cell['source'], names)
    said = capsys.readouterr().out
    assert said.count('…') == 3 and '✗' not in said


@source
def test_the_committed_notebook_is_the_generated_one(path):
    made = make_labs.notebook_text(make_labs.student_version(make_labs.read_notebook(path)))
    assert (make_labs.LABS/path.name).read_text(encoding='utf-8') == made, 'run nbs/labs/teacher/make_labs.py'


@source
def test_no_solution_is_left(path):
    source, text = make_labs.read_notebook(path), (make_labs.LABS/path.name).read_text(encoding='utf-8')
    nb = json.loads(text)
    assert 'SOLUTION' not in text and not [c['id'] for c in nb['cells'] if c['id'].startswith('teach-')]
    left = {line.strip() for cell in nb['cells'] for line in ''.join(cell['source']).split('\n')}
    for cell in source['cells']:
        if cell['cell_type'] != 'code': continue
        long = {line for line in make_labs.solution_lines(cell['source']) if len(line) >= 30}
        assert not long & left, cell['id']


@source
def test_a_lab_asks_what_its_answers_know(path):
    nb = make_labs.read_notebook(path)
    cells, asked = by_id(nb), grade.questions_with_checks(nb)
    known = [answers for answers in ANSWERS if answers.stem == path.stem]
    wanted = list(labs.exercises(path.stem.removeprefix('lab'))) if known else []
    assert list(asked) == wanted
    for id in asked:
        number = id.replace('.', '-')
        assert {f'q-{number}', f'ans-{number}', f'check-{number}'} <= set(cells), id
        assert id in cells[f'q-{number}']['source']
    assert {'title', 'install', 'setup', 'recap'} <= set(cells)
    if path.stem == 'project': return
    for question in grade.open_questions(nb): assert 'points' in question.rubric, question.id
    assert {'quiz', 'teach-quiz'} <= set(cells) and make_labs.minutes_said(nb) != '?'


@source
def test_cells_of_a_lab_are_short_and_named(path):
    cells = make_labs.read_notebook(path)['cells']
    ids = [cell['id'] for cell in cells]
    assert len(ids) == len(set(ids)) and not [id for id in ids if re.fullmatch('[0-9a-f]{8}(-.*)?', id)]
    for cell in cells:
        lines = cell['source'].split('\n')
        if cell['cell_type'] != 'code': continue
        assert len(lines) <= 40 and max(len(line) for line in lines) <= 110, cell['id']


@source
def test_figures_of_a_lab_are_described(path):
    for cell in nbformat.read(path, 4).cells:
        shown, texts = figures(cell), list(cell.metadata.get('alt', []))
        assert texts == [output.metadata.get(kind, {}).get('alt', '') for output, kind in shown], cell.id
        assert all(20 <= len(text) <= 400 for text in texts), cell.id
        assert not [output for output in cell.get('outputs', []) if output.output_type == 'error'], cell.id


@source
def test_links_of_a_lab_lead_somewhere(path):
    text = '\n'.join(cell['source'] for cell in make_labs.read_notebook(path)['cells'])
    links = re.findall(r'\]\(((?!http|#|attachment)[^)\s]+)\)', text)
    missing = [link for link in links if not (make_labs.LABS/link.split('#')[0]).exists()]
    assert links and not missing
    assert not re.findall(r'/(?:root|work|home|tmp)/[A-Za-z0-9._-]+', path.read_text(encoding='utf-8'))


@pytest.mark.parametrize('path', sorted(TEACHER.glob('*.py')), ids=lambda p: p.name)
def test_lines_of_the_kit_are_short(path):
    assert max(len(line) for line in path.read_text(encoding='utf-8').split('\n')) <= 110


@pytest.mark.twice
@source
def test_a_students_notebook_runs_twice_with_nothing_filled_in(path):
    command = [sys.executable, ROOT/'tests'/'run_notebooks.py', '--twice', make_labs.LABS/path.name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]


# ---- slides and the table

def test_slides_hold_the_lab_and_hide_its_solutions(tmp_path):
    nb = make_labs.slides_notebook(make_labs.read_notebook(sample(tmp_path)))
    kinds = {cell['id']: cell['metadata']['slideshow']['slide_type'] for cell in nb['cells']}
    assert {kinds[id] for id in ('title', 'sky-md', 'q-99-1', 'open-99-4', 'quiz', 'recap')} == {'slide'}
    assert kinds['teach-99-4'] == kinds['note-ans-99-2'] == 'notes' and kinds['ans-99-2'] == '-'
    assert not {'install', 'setup', 'check-99-1', 'write-99-4', 'progress-99'} & set(kinds)
    shown = [cell['source'] for cell in nb['cells'] if kinds[cell['id']] != 'notes']
    assert 'squares_of_all' not in ''.join(shown) and 'squares_of_all' in by_id(nb)['note-ans-99-2']['source']


def test_slides_are_a_page(tmp_path):
    page = make_labs.slides_html(make_labs.slides_notebook(make_labs.read_notebook(sample(tmp_path))))
    assert page.count('<aside class="notes">') == 6 and 'plt.figure' not in page
    assert sample_lab.PIXEL in page and 'reveal.js' in page


def test_a_slide_that_is_full_goes_on_below():
    cell = make_labs.markdown_cell('some-md', 'word '*60)
    lines = make_labs.height(cell, True)
    assert make_labs.slide_kind(cell, make_labs.LINES - lines, lines) == '-'
    assert make_labs.slide_kind(cell, make_labs.LINES - lines + 1, lines) == 'subslide'


def test_the_table_counts_exercises_and_mistakes(tmp_path):
    row = make_labs.table_row(sample(tmp_path), {'lab99': {'seconds': 90}})
    assert row == ['[Lab 99 · A sample](../lab99.ipynb)', '45–60', '1.5', 3, 6, 2]


@pytest.mark.parametrize('title, minutes', [('| time | 55 minutes; one for the machine |', '55'),
                                            ('| **Time** | 45 to 60 min |', '45 to 60'), ('| a | b |', '?')])
def test_minutes_are_read_from_the_title(title, minutes):
    assert make_labs.minutes_said({'cells': [{'source': title}]}) == minutes


def test_the_page_of_the_teacher_has_room_for_the_table():
    assert make_labs.TABLE.search((TEACHER/'README.md').read_text(encoding='utf-8'))


def test_links_of_the_page_of_the_teacher():
    text = (TEACHER/'README.md').read_text(encoding='utf-8')
    links = re.findall(r'\]\(((?!http)[^)]+)\)', text)
    assert len(links) > 10
    missing = [link for link in links if not (TEACHER/link).exists()]
    assert not missing


# ---- grading

def hand_in(tmp_path, names):
    "Notebooks of students of the sample lab, in a folder."
    folder, text = tmp_path/'handed_in', make_labs.notebook_text(student(tmp_path))
    folder.mkdir()
    for name in names:
        nb = sample_lab.fill(nbformat.reads(text, 4), sample_lab.CLASS[name])
        nbformat.write(nb, folder/f'{name}.ipynb')
    return folder


def test_an_answer_that_does_not_return_is_stopped():
    def endless(x):
        while True: pass
    right, says = time_limit.judged('99.2', 'endless', {'endless': endless}, .5)
    assert not right and 'stopped after 0.5 s' in says


def test_a_process_in_the_background_is_stopped_too():
    "There interrupts are ignored from the start."
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try: test_an_answer_that_does_not_return_is_stopped()
    finally: signal.signal(signal.SIGINT, before)


def test_verdicts_of_answers():
    names = {'f': sample_lab.mean_square, 'g': sample_lab.sum_square}
    assert time_limit.judged('99.2', 'f', names, 20) == (True, '✓ 99.2: the mean square.')
    assert time_limit.judged('99.2', 'g', names, 20) == (False, '✗ 99.2: You added. Take the mean.')
    right, says = time_limit.judged('99.2', 'h', names, 20)
    assert not right and 'NameError' in says


def test_questions_are_read_from_the_source(tmp_path):
    found = grade.questions_with_checks(make_labs.read_notebook(sample(tmp_path)))
    assert found == {'99.1': 'share', '99.2': 'my_mean_square', '99.3': 'my_softmax'}


def test_what_otter_says_becomes_points(tmp_path):
    file = tmp_path/'results.json'
    graded = grade.Graded('eva', {'99.1': 0, '99.2': 0}, {'99.1': '…', '99.2': '…'})
    output = 'Error at line 9 in test:\n    assert right, says\n  AssertionError: ✗ 99.2: You added.\n'
    tests = [dict(name='Public Tests', output=''), dict(name='99.1', score=1, max_score=1, output='passed'),
             dict(name='99.2', score=0, max_score=1, output=output)]
    file.write_text(json.dumps(dict(tests=tests)))
    grade.read_results(file, graded)
    assert graded.points == {'99.1': 1, '99.2': 0}
    assert graded.says == {'99.1': '✓', '99.2': '✗ 99.2: You added.'}
    page = grade.checks_page('Lab 99', [graded], graded.points)
    assert 'You added.' in page and 'eva' in page


@pytest.mark.skipif(not find_spec('otter'), reason='otter-grader is not installed (extra: course)')
def test_a_class_is_graded(tmp_path):
    folder = hand_in(tmp_path, ['ada', 'ben', 'cleo'])
    (folder/'eve.ipynb').write_text('no notebook')
    found = {g.student: g for g in grade.grade_checks(sample(tmp_path), folder, tmp_path/'out', seconds=300)}
    assert {name: list(g.points.values()) for name, g in found.items()} == {
        'ada': [1, 1, 1], 'ben': [1, 0, 0], 'cleo': [0, 0, 0], 'eve': [0, 0, 0]}
    assert 'You added' in found['ben'].says['99.2'] and found['cleo'].says['99.1'].startswith('…')
    assert 'no notebook' in found['eve'].note
    assert len(grade.read_csv(tmp_path/'out'/'checks.csv')) == 4


def written(tmp_path, change=lambda nb: None):
    "What ada wrote to question 99.4, after a change of her notebook."
    source = make_labs.read_notebook(sample(tmp_path))
    nb = nbformat.read(hand_in(tmp_path, ['ada'])/'ada.ipynb', 4)
    change(nb)
    question = grade.open_questions(source)[0]
    return grade.written_answer(nb, question, make_labs.student_version(source)['cells'])


def test_a_written_answer_is_found(tmp_path):
    assert written(tmp_path) == 'It flattens: differences of x count less.'


def test_a_written_answer_is_found_without_names_of_cells(tmp_path):
    def lose_ids(nb):
        for cell in nb.cells: del cell['id']
    assert written(tmp_path, lose_ids) == 'It flattens: differences of x count less.'


def test_an_answer_in_a_cell_of_its_own_is_found(tmp_path):
    def add_cell(nb):
        k = [cell.id for cell in nb.cells].index('write-99-4')
        nb.cells[k].source = '*Your answer:*'
        nb.cells.insert(k + 1, nbformat.v4.new_markdown_cell('Below.'))
    assert written(tmp_path, add_cell) == 'Below.'


def test_written_answers_on_one_page(tmp_path):
    folder, out = hand_in(tmp_path, ['ada', 'ben', 'cleo']), tmp_path/'out'
    grade.collect_answers(sample(tmp_path), folder, out)
    page, rows = (out/'answers.html').read_text(encoding='utf-8'), grade.read_csv(out/'points.csv')
    found = [(row['student'], row['question'], row['of']) for row in rows]
    assert found[:3] == [('ada', '99.4', '3'), ('ben', '99.4', '3'), ('cleo', '99.4', '3')]
    assert found[3:] == [('ada', '99.5', '4'), ('ben', '99.5', '4'), ('cleo', '99.5', '4')]
    assert 'Larger is sharper.' in page and '1 for a number' in page and '&lt;b&gt;attention' in page
    assert page.index('It flattens') < page.index('99.5') and page.count('nothing') == 2


def test_points_stay_when_a_late_notebook_comes(tmp_path):
    folder, out = hand_in(tmp_path, ['ben', 'cleo']), tmp_path/'out'
    grade.collect_answers(sample(tmp_path), folder, out)
    rows = grade.read_csv(out/'points.csv')
    rows[0].update(points='2,5', comment='why?')
    grade.write_csv(out/'points.csv', [list(rows[0]), *(list(row.values()) for row in rows)])
    (folder/'ada.ipynb').write_text((folder/'ben.ipynb').read_text())
    grade.collect_answers(sample(tmp_path), folder, out)
    kept = {(row['student'], row['question']): row for row in grade.read_csv(out/'points.csv')}
    row = kept['ben', '99.4']
    assert len(kept) == 6 and (row['points'], row['comment']) == ('2,5', 'why?')


def test_names_can_be_hidden_and_points_are_added_up(tmp_path):
    folder, out = hand_in(tmp_path, ['ada', 'ben']), tmp_path/'out'
    grade.collect_answers(sample(tmp_path), folder, out, without_names=True)
    assert 'ada' not in (out/'answers.html').read_text(encoding='utf-8').replace('Scenimefy', '')
    rows = grade.read_csv(out/'points.csv')
    assert Counter(row['question'] for row in rows) == {'99.4': 2, '99.5': 2} and 'ada' not in str(rows)
    for row in rows: row['points'] = '1,5' if row['student'] == grade.code_name('ada') else ''
    text = '\r\n'.join(';'.join(cells) for cells in [list(rows[0]), *(row.values() for row in rows)])
    (out/'points.csv').write_text(text, encoding='utf-8-sig')           # as Excel saves it in half of Europe
    rows = [['student', 'points', 'of', 'note'], ['ada', 3, 3, ''], ['ben', 1, 3, '']]
    grade.write_csv(out/'checks.csv', rows)
    grade.total(out)
    totals = {row['student']: row for row in grade.read_csv(out/'totals.csv')}
    assert (totals['ada']['sum'], totals['ben']['sum']) == ('6', '1')
    assert (totals['ada']['answers without points'], totals['ben']['answers without points']) == ('0', '2')
