"""Grades notebooks that were handed in: one folder with a notebook per student, each named after its student.

    python nbs/labs/teacher/grade.py checks 2 handed_in -o graded     # run them: checks.csv, checks.html
    python nbs/labs/teacher/grade.py answers 2 handed_in -o graded    # read them: answers.html, points.csv
    python nbs/labs/teacher/grade.py total graded                     # both together: totals.csv

`checks` executes what students wrote, with your rights, on this machine; README.md says how to avoid that.
It needs otter-grader: pip install "scenimefy[course]".
"""
import argparse
import ast
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import nbformat
from markupsafe import Markup, escape

from make_labs import HERE, read_notebook, student_version
from scenimefy.page import note_html, page_html, section_html, table_html

TESTS = '''OK_FORMAT = False
from otter.test_files import test_case
from time_limit import judged

name, points = {id!r}, 1

@test_case(points=1)
def test_answer(env):
    right, says = judged({id!r}, {expression!r}, env, {seconds})
    assert right, says
'''


# ---- what a lab asks for

def source_of(lab):
    "The source of a lab: its number, `project`, or the path of a notebook."
    name = f'lab{lab}' if str(lab).isdigit() else lab
    path = Path(lab) if str(lab).endswith('.ipynb') else HERE/f'{name}.ipynb'
    if not path.exists(): raise SystemExit(f'there is no {path}')
    return read_notebook(path)


def title_of(source): return re.match(r'# (.+)', source['cells'][0]['source'])[1]


def questions_with_checks(source):
    "{id: the expression that is checked}, from the cells `check('2.3', answer)`."
    found = {}
    for cell in source['cells']:
        if cell['cell_type'] != 'code' or not cell['id'].startswith('check-'): continue
        for node in ast.walk(ast.parse(cell['source'])):
            if not isinstance(node, ast.Call) or getattr(node.func, 'id', '') != 'check': continue
            found[ast.literal_eval(node.args[0])] = ast.unparse(node.args[1])
    return found


def handed_in(folder):
    "The notebooks of a folder, by the names of their students."
    paths = {path.stem: path for path in sorted(Path(folder).glob('*.ipynb'))}
    if not paths: raise SystemExit(f'no notebook in {folder}')
    return paths


def write_csv(path, rows):
    with open(path, 'w', newline='', encoding='utf-8-sig') as file:       # so that Excel reads the letters
        csv.writer(file).writerows(rows)


def read_csv(path):
    "Rows as dictionaries; [] if there is no such file. Excel may have put semicolons for commas."
    if not Path(path).exists(): return []
    text = Path(path).read_text(encoding='utf-8-sig')
    mark = ';' if text.split('\n')[0].count(';') > text.split('\n')[0].count(',') else ','
    return list(csv.DictReader(io.StringIO(text, newline=''), delimiter=mark))


# ---- by machine: the checks

@dataclass
class Graded:
    "One notebook after its run."
    student: str
    points: dict = field(default_factory=dict)      # {id: 0 or 1}
    says: dict = field(default_factory=dict)        # {id: what `check` says}
    note: str = ''                                  # what the teacher should know


def make_autograder(asked, path, seconds):
    "The zip file of otter: one test for each exercise. Gradescope takes the same file."
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder)/'tests'
        tests.mkdir()
        for id, expression in asked.items():
            text = TESTS.format(id=id, expression=expression, seconds=seconds)
            (tests/f"q{id.replace('.', '_')}.py").write_text(text, encoding='utf-8')
        needs = Path(folder)/'requirements.txt'
        needs.write_text(f"scenimefy=={version('scenimefy')}\n", encoding='utf-8')
        shutil.copy(HERE/'time_limit.py', folder)
        command = [sys.executable, '-m', 'otter', 'generate', '-t', 'tests', '-o', path, '-r', needs.name,
                   '--no-config', '--no-environment', 'time_limit.py']
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode: raise SystemExit(f'otter generate failed:\n{done.stderr}')


def copy_to_run(path, target, seconds, errors):
    "The handed-in notebook with a time limit around its cells, for the kernel of this machine."
    nb = nbformat.read(path, 4)
    cells = [cell for cell in nb.cells if cell.get('id') != 'install']
    new = nbformat.v4.new_code_cell
    start = new(f'from time_limit import Watch\n_watch = Watch({seconds}, {str(errors)!r})')
    nb.cells = [start, *cells, new('_watch.end()')]
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = []
        cell.pop('id', None)
    nb.nbformat_minor = 4                               # ids may be missing or doubled: none are needed here
    nb.metadata = {'kernelspec': {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}}
    nbformat.write(nb, target)


def read_results(file, graded):
    "Points and texts out of otter's results.json."
    for test in json.loads(file.read_text(encoding='utf-8'))['tests']:
        if test['name'] not in graded.points: continue
        graded.points[test['name']] = int(test['score'])
        said = re.search(r'AssertionError: (.*)', test.get('output', ''), re.S)
        right = test['score'] == test['max_score']
        graded.says[test['name']] = '✓' if right else said[1].strip() if said else '✗ ?'


def grade_one(path, autograder, asked, seconds, minutes):
    "Run one notebook in a process of its own."
    graded = Graded(path.stem, {id: 0 for id in asked}, {id: '… not graded' for id in asked})
    with tempfile.TemporaryDirectory() as folder:
        target, errors = Path(folder)/'notebook.ipynb', Path(folder)/'errors.json'
        try: copy_to_run(path, target, seconds, errors)
        except Exception as e:
            graded.note = f'this is no notebook ({type(e).__name__})'
            return graded
        command = [sys.executable, '-m', 'otter', 'run', '-a', autograder, '-o', folder, '--no-logo', target]
        try: done = subprocess.run(command, capture_output=True, text=True, timeout=60*minutes)
        except subprocess.TimeoutExpired:
            graded.note = f'stopped after {minutes} minutes; look at it by hand'
            return graded
        results = Path(folder)/'results.json'
        if results.exists(): read_results(results, graded)
        notes = json.loads(errors.read_text(encoding='utf-8'))[:3] if errors.exists() else []
        if done.returncode: notes.append(f"otter: {done.stderr.strip().split(chr(10))[-1]}")
        graded.note = '; '.join(notes)
    return graded


def checks_table(everyone, asked):
    rows = [['student', *asked, 'points', 'of', 'note']]
    for g in everyone:
        rows.append([g.student, *g.points.values(), sum(g.points.values()), len(asked), g.note])
    return rows


def common_replies(everyone, id):
    "What `check` said about one exercise, the most frequent first."
    found = Counter(g.says[id] for g in everyone)
    return [(says.removeprefix('✗').removeprefix(f' {id}: ').strip() or says, number)
            for says, number in found.most_common()]


def checks_page(title, everyone, asked):
    "The class as a table, then what was said about each exercise."
    signs = [[g.student, *(says[0] for says in g.says.values()), f'{sum(g.points.values())} of {len(asked)}']
             for g in everyone]
    table = table_html(signs, ['student', *asked, 'points'])
    body = section_html('The class', '✓ right, ✗ wrong, … not answered', table)
    notes = [(g.student, g.note) for g in everyone if g.note]
    for student, text in notes: body += note_html(student, text)
    replies = Markup('')
    for id in asked:
        replies += section_html(f'Exercise {id}', 'What check said, and to how many.',
                                table_html(common_replies(everyone, id), ['reply', 'students']))
    return page_html(title, f'Checks: {len(everyone)} notebooks were run.', body + replies)


def grade_checks(lab, folder, out, seconds=120, minutes=15):
    "Run all notebooks of a folder; write checks.csv and checks.html."
    if not find_spec('otter'): raise SystemExit('otter-grader is missing: pip install "scenimefy[course]"')
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    source, autograder = source_of(lab), (out/'autograder.zip').resolve()
    asked = questions_with_checks(source)
    make_autograder(asked, autograder, seconds)
    everyone = []
    for student, path in handed_in(folder).items():
        graded = grade_one(path, autograder, asked, seconds, minutes)
        everyone.append(graded)
        signs, points = ' '.join(says[0] for says in graded.says.values()), sum(graded.points.values())
        print(f'{student:16} {signs}  {points} of {len(asked)}  {graded.note}', flush=True)
    write_csv(out/'checks.csv', checks_table(everyone, asked))
    (out/'checks.html').write_text(checks_page(title_of(source), everyone, asked), encoding='utf-8')
    return everyone


# ---- by hand: the written answers

STYLE = Markup('''<style>
.ask{display:grid;grid-template-columns:minmax(0,2fr) minmax(0,3fr);gap:28px;align-items:start}
.ask>div:first-child{position:sticky;top:16px;font-size:.95rem}
.rubric{border-left:4px solid var(--hot);padding:1px 16px;background:var(--card);border-radius:0 14px 14px 0}
.answer{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:10px 16px;
margin:0 0 14px;display:flex;gap:16px;justify-content:space-between;break-inside:avoid}
.answer .who{color:var(--soft);font-size:.85rem}
.answer .text{white-space:pre-wrap;overflow-wrap:anywhere}
.answer .none{color:var(--soft);font-style:italic}
.box{flex:none;align-self:start;text-align:center;color:var(--soft);font-size:.85rem}
.box i{display:block;width:58px;height:40px;border:2px solid var(--soft);border-radius:8px;margin:2px 0}
@media(max-width:700px){.ask{grid-template-columns:1fr}.ask>div:first-child{position:static}}
@media print{.ask{display:block}.ask>div:first-child{position:static}}
</style>''')


@dataclass(frozen=True)
class Question:
    "A question that is answered in words."
    id: str             # '2-7'
    cell: dict          # the question itself
    rubric: str         # Markdown, for the teacher
    points: int


def open_questions(source):
    "The questions of a lab that are answered in words."
    cells, found = {cell['id']: cell for cell in source['cells']}, []
    for id in cells:
        if not id.startswith('write-'): continue
        number = id.removeprefix('write-')
        cell = cells.get(f'open-{number}') or cells.get(f'q-{number}')
        if cell is None: raise ValueError(f'{id} has no question open-{number}')
        rubric = cells.get(f'teach-{number}', {}).get('source', '')
        points = re.search(r'(\d+) points?', rubric)
        found.append(Question(number, cell, rubric, int(points[1]) if points else 4))
    return found


def cell_name(cell):
    "The id of a cell. Colab keeps it in the metadata of older notebooks."
    return cell.get('id') or cell.get('metadata', {}).get('id', '')


def written_answer(nb, question, released):
    "What stands between a question and the next cell that everybody has: the answer, in one cell or several."
    ids = {cell['id'] for cell in released} - {f'write-{question.id}'}
    texts = {cell['source'].strip() for cell in released if not cell['id'].startswith('write-')}
    asked, parts, below = question.cell, [], False
    for cell in nb.cells:
        name, text = cell_name(cell), cell.source.strip()
        if name == asked['id'] or text == asked['source'].strip(): below = True
        elif below and (name in ids or text in texts): break
        elif below: parts.append(re.sub(r'^\*Your answer:\*', '', text).strip())
    return '\n\n'.join(part for part in parts if part)


def code_name(student):
    "A name that gives nobody away at a glance, the same one tomorrow."
    return 'student ' + hashlib.sha256(student.encode()).hexdigest()[:5]


def rendered(markdown):
    "Markdown of ours as HTML."
    from nbconvert.filters import markdown2html
    return Markup(markdown2html(markdown))


def answer_html(row, who, text, points):
    shown = Markup('<div class="{}">{}</div>').format('text' if text else 'none', text or 'nothing')
    box = Markup('<div class="box">row {}<i></i>of {}</div>').format(row, points)
    left = Markup('<div><div class="who">{}</div>{}</div>').format(who, shown)
    return Markup('<div class="answer">{}{}</div>').format(left, box)


def question_html(question, answers):
    "One question: it and its rubric on the left, all answers on the right."
    left = rendered(question.cell['source'])
    if question.rubric: left += Markup('<div class="rubric">{}</div>').format(rendered(question.rubric))
    cards = Markup('').join(answer_html(*answer, question.points) for answer in answers)
    number = question.id.replace('-', '.')
    columns = Markup('<div class="ask"><div>{}</div><div>{}</div></div>').format(left, cards)
    return section_html(f'Question {number}', f'{len(answers)} answers', columns)


def read_all(folder):
    "{student: notebook}; what cannot be read is said and left out."
    found = {}
    for student, path in handed_in(folder).items():
        try: found[student] = nbformat.read(path, 4)
        except Exception as e: print(f'{student}: this is no notebook ({type(e).__name__})')
    return found


def collect_answers(lab, folder, out, without_names=False):
    "Write answers.html and points.csv. Points that are in points.csv already stay."
    out, source = Path(out), source_of(lab)
    out.mkdir(parents=True, exist_ok=True)
    released, everyone = student_version(source)['cells'], read_all(folder)
    shown = {student: code_name(student) if without_names else student for student in everyone}
    before = {(row['student'], row['question']): row for row in read_csv(out/'points.csv')}
    rows, body = [['row', 'student', 'question', 'points', 'of', 'comment']], STYLE
    for question in open_questions(source):
        answers, number = [], question.id.replace('-', '.')
        for student in sorted(everyone, key=lambda s: shown[s]):
            who = shown[student]
            old = before.get((who, number), {'points': '', 'comment': ''})
            rows.append([len(rows), who, number, old['points'], question.points, old['comment']])
            answers.append((len(rows) - 1, who, written_answer(everyone[student], question, released)))
        body += question_html(question, answers)
    lead = 'Written answers. Points go into points.csv, into the row that stands above the box.'
    (out/'answers.html').write_text(page_html(title_of(source), lead, body), encoding='utf-8')
    write_csv(out/'points.csv', rows)
    if without_names: write_csv(out/'names.csv', [['code', 'student'], *((c, s) for s, c in shown.items())])
    print(f'{out/"answers.html"}: {len(rows) - 1} answers of {len(everyone)} students')


# ---- both

def number(text):
    "A number as people write it in a table; `None` for an empty cell."
    return float(text.replace(',', '.')) if text.strip() else None


def total(out):
    "checks.csv and points.csv together: totals.csv, one line for each student."
    out = Path(out)
    checks, points = read_csv(out/'checks.csv'), read_csv(out/'points.csv')
    names = {row['code']: row['student'] for row in read_csv(out/'names.csv')}
    machine = {row['student']: (number(row['points']), number(row['of'])) for row in checks}
    hand, open_rows = {}, Counter()
    for row in points:
        student, given = names.get(row['student'], row['student']), number(row['points'])
        if given is None: open_rows[student] += 1
        sum_, of = hand.get(student, (0, 0))
        hand[student] = sum_ + (given or 0), of + number(row['of'])
    rows = [['student', 'checks', 'of', 'written', 'of', 'sum', 'of', 'answers without points']]
    for student in sorted({*machine, *hand}):
        (a, a_of), (b, b_of) = machine.get(student, (0, 0)), hand.get(student, (0, 0))
        values = [f'{v:g}' for v in (a, a_of, b, b_of, a + b, a_of + b_of)]
        rows.append([student, *values, open_rows[student]])
    write_csv(out/'totals.csv', rows)
    for row in rows: print('  '.join(str(cell) for cell in row))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    for name, text in (('checks', 'run the notebooks'), ('answers', 'collect the written answers')):
        command = commands.add_parser(name, help=text)
        command.add_argument('lab', help='number of the lab, `project`, or the path of a source')
        command.add_argument('folder', help='the notebooks, one for each student')
        command.add_argument('-o', '--out', required=True, metavar='FOLDER', help='where the results go')
    commands.choices['checks'].add_argument('--seconds', type=int, default=120, help='limit for a cell')
    commands.choices['checks'].add_argument('--minutes', type=float, default=15, help='limit for a notebook')
    commands.choices['answers'].add_argument('--without-names', action='store_true')
    commands.add_parser('total', help='add up').add_argument('out')
    asked = parser.parse_args()
    if asked.command == 'checks':
        grade_checks(asked.lab, asked.folder, asked.out, asked.seconds, asked.minutes)
    if asked.command == 'answers': collect_answers(asked.lab, asked.folder, asked.out, asked.without_names)
    if asked.command == 'total': total(asked.out)


if __name__ == '__main__': main()
