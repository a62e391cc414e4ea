"""The students' notebooks, the slides and the table of the labs, made from the sources in this folder.

    python nbs/labs/teacher/make_labs.py                    # nbs/labs/*.ipynb from every notebook here
    python nbs/labs/teacher/make_labs.py --slides _slides   # slides of every lab into a folder
    python nbs/labs/teacher/make_labs.py --time             # run every lab, write times.json
    python nbs/labs/teacher/make_labs.py --table            # the table in README.md

A source holds the solutions. What becomes of its cells is in `student_version`.
"""
import argparse
import ast
import copy
import importlib
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LABS = HERE.parent
BEGIN, END, MARK = '# BEGIN SOLUTION', '# END SOLUTION', '# SOLUTION'
CALLS = re.compile(r'^(check|hint|progress)\(', re.M)      # these print about the teacher's own answers

HAND_IN = """## Hand in

Save the notebook, then download it as a file that ends in `.ipynb` (Colab: *File → Download → Download
.ipynb*; JupyterLab: *File → Download*). Give the file your name, such as `ada.ipynb`. Do not delete the
cells with the questions: your written answers are found below them."""


# ---- reading and writing, in the form that nbdev_clean writes, so that it changes nothing later

def sources():
    "The labs of this folder in order, then the project."
    return sorted(HERE.glob('*.ipynb'))


def read_notebook(path):
    "A notebook as a dictionary; the text of each cell is one string."
    nb = json.loads(Path(path).read_text(encoding='utf-8'))
    for cell in nb['cells']: cell['source'] = ''.join(cell['source'])
    return nb


def notebook_text(nb):
    "A notebook as the text of its file."
    nb = copy.deepcopy(nb)
    for cell in nb['cells']: cell['source'] = cell['source'].splitlines(keepends=True)
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n'


def markdown_cell(id, source):
    return dict(cell_type='markdown', id=id, metadata={}, source=source)


# ---- solutions

def open_line(line):
    "A line that ends in `# SOLUTION`, without what stands right of `=` or `return`."
    code = line[:line.rindex(MARK)].rstrip()
    space = code[:len(code) - len(code.lstrip())]
    assignment = re.sub(r'^return\b', 'answer =', code.strip())
    try: (node,) = ast.parse(assignment).body
    except (SyntaxError, ValueError): raise ValueError(f'not one whole statement: {line.strip()!r}') from None
    targets = node.targets if isinstance(node, ast.Assign) else []
    if len(targets) != 1 or not isinstance(targets[0], ast.Name):
        raise ValueError(f'write name = value or return value: {line.strip()!r}')
    if assignment != code.strip(): return f'{space}return ...'
    return f'{space}{targets[0].id} = ...'


def strip_solution(code):
    "Code without its solutions; `...` stands where they were."
    lines, inside = [], False
    for line in code.split('\n'):
        word = line.strip()
        if word == BEGIN:
            if inside: raise ValueError(f'two times {BEGIN}')
            inside = True
            lines.append(line.replace(BEGIN, '...'))
        elif word == END:
            if not inside: raise ValueError(f'{END} without {BEGIN}')
            inside = False
        elif not inside:
            lines.append(open_line(line) if word.endswith(MARK) else line)
    if inside: raise ValueError(f'{BEGIN} without {END}')
    return '\n'.join(lines)


def solution_lines(code):
    "The lines of code that `strip_solution` takes away or shortens."
    kept = strip_solution(code).split('\n')
    return [line.strip() for line in code.split('\n')
            if line not in kept and line.strip() not in (BEGIN, END)]


def student_cell(cell):
    "A cell as a student gets it."
    cell = copy.deepcopy(cell)
    cell['metadata'] = {key: value for key, value in cell['metadata'].items() if key == 'alt'}
    if cell['cell_type'] != 'code': return cell
    try: cell['source'] = strip_solution(cell['source'])
    except ValueError as e: raise ValueError(f"cell {cell['id']}: {e}") from None
    cell['execution_count'] = None
    about_answers = cell['id'].startswith(('ans-', 'check-')) or CALLS.search(cell['source'])
    if about_answers: cell['outputs'] = []
    for output in cell['outputs']:
        if 'execution_count' in output: output['execution_count'] = None
    return cell


def student_version(nb):
    """The notebook of a student: no solutions, no cells for the teacher, no outputs that show an answer.

    Figures of experiments stay. A student who reads the page on GitHub, on a phone or without a machine sees
    what will come, and can compare with it what the own run gave."""
    cells = [student_cell(cell) for cell in nb['cells'] if not cell['id'].startswith('teach-')]
    if any(cell['id'].startswith(('check-', 'write-')) for cell in cells):
        cells.append(markdown_cell('hand-in', HAND_IN))
    kernel = {'display_name': 'python3', 'language': 'python', 'name': 'python3'}
    return dict(cells=cells, metadata={'kernelspec': kernel}, nbformat=4, nbformat_minor=5)


def make_students(folder=LABS):
    "Write the students' notebooks."
    for path in sources():
        target = Path(folder)/path.name
        target.write_text(notebook_text(student_version(read_notebook(path))), encoding='utf-8', newline='\n')
        print(target)


# ---- slides

LINES, WIDTH, PICTURE = 20, 110, 14       # a slide holds so many; letters of a line; lines of a picture
NEW_SLIDE = re.compile(r'^(title$|q-[\dP]|open-[\dP]|quiz$|recap$)')
LEFT_OUT = re.compile(r'^(install$|setup$|check-|write-|widget-|test-|(try-)?progress)')


def height(cell, code_shown):
    "Lines that a cell takes on a slide, roughly."
    text = cell['source'] if code_shown else ''
    lines = sum(1 + len(line)//WIDTH for line in text.splitlines())
    for output in cell.get('outputs', []):
        data = output.get('data', {})
        if 'image/png' in data or 'image/jpeg' in data: lines += PICTURE
        else: lines += len(output.get('text', [])) + len(data.get('text/plain', []))
    return lines


def slide_kind(cell, used, lines):
    "The slide type of a cell, when `used` lines of the slide are taken."
    heading = cell['cell_type'] == 'markdown' and re.match(r'#{1,2} ', cell['source'])
    if heading or NEW_SLIDE.match(cell['id']): return 'slide'
    return 'subslide' if used + lines > LINES else '-'


def solution_note(cell):
    "The solution of an exercise, for the speaker."
    note = markdown_cell(f"note-{cell['id']}", f"Solution:\n\n```python\n{cell['source']}\n```")
    note['metadata'] = {'slideshow': {'slide_type': 'notes'}}
    return note


def slides_notebook(nb):
    """The same cells as slides: questions and headings open a slide, what does not fit goes below it, the
    teacher's cells and the solutions become notes of the speaker (key S)."""
    cells, used = [], 0
    for cell in nb['cells']:
        if LEFT_OUT.match(cell['id']): continue
        shown = student_cell(cell)
        if cell['id'].startswith('teach-'):
            shown['metadata'] = {'slideshow': {'slide_type': 'notes'}}
            cells.append(shown)
            continue
        code_shown = not cell['id'].startswith('fig-')
        lines = height(shown, code_shown)
        kind = slide_kind(cell, used, lines)
        used = lines if kind != '-' else used + lines
        if cell['id'].startswith('ans-'): used = LINES    # what follows is not seen yet
        shown['metadata'] = {'slideshow': {'slide_type': kind}, 'tags': [] if code_shown else ['hide-code']}
        cells.append(shown)
        if cell['id'].startswith('ans-'): cells.append(solution_note(cell))
    return dict(nb, cells=cells)


def slides_html(nb):
    "The page of the slides. Its browser loads reveal.js, require.js and MathJax from the network."
    import nbformat
    from nbconvert import SlidesExporter
    from traitlets.config import Config
    config = Config()
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_input_tags = {'hide-code'}
    config.SlidesExporter.reveal_scroll = True          # a slide that is too long can be scrolled
    config.SlidesExporter.reveal_number = 'c/t'
    config.SlidesExporter.reveal_width, config.SlidesExporter.reveal_height = '1280', '720'
    config.SlidesExporter.exclude_input_prompt = config.SlidesExporter.exclude_output_prompt = True
    page, _ = SlidesExporter(config=config).from_notebook_node(nbformat.reads(notebook_text(nb), 4))
    return page


def make_slides(folder):
    "Write the slides of every lab into a folder."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sources():
        target = folder/f'{path.stem}.slides.html'
        target.write_text(slides_html(slides_notebook(read_notebook(path))), encoding='utf-8')
        print(target)


# ---- the table of the instructor's page

TABLE = re.compile(r'(<!-- table -->\n).*?(<!-- end of table -->)', re.S)


def measure():
    "Run every lab once, and note how long the machine took."
    os.chdir(HERE.parents[2])                          # where settings.ini is
    sys.path.insert(0, 'tests')
    import nbformat
    from run_notebooks import execute
    file = HERE/'times.json'
    times = json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}
    for path in sources():
        start = time.perf_counter()
        execute(nbformat.read(path, 4))
        seconds = round(time.perf_counter() - start)
        times[path.stem] = dict(seconds=seconds, machine=f'{platform.machine()}, {platform.system()}')
        print(f'{path.stem}: {seconds} s')
        file.write_text(json.dumps(times, indent=1) + '\n', encoding='utf-8')


def minutes_said(nb):
    "The minutes of a student's time, as the title cell says them."
    found = re.search(r'(\d+(?:\s*(?:–|-|to)\s*\d+)?)\s*min', nb['cells'][0]['source'])
    return found[1] if found else '?'


def table_row(path, times):
    nb = read_notebook(path)
    title = re.match(r'# (.+)', nb['cells'][0]['source'])[1]
    try: found = importlib.import_module(f'scenimefy.answers.{path.stem}').EXERCISES.values()
    except ModuleNotFoundError: found = []
    mistakes = sum(len(exercise.mistakes) for exercise in found)
    written = sum(cell['id'].startswith('write-') for cell in nb['cells'])
    seconds = times.get(path.stem, {}).get('seconds')
    machine = '?' if seconds is None else f'{seconds/60:.1f}'
    return [f'[{title}](../{path.name})', minutes_said(nb), machine, len(found), mistakes, written]


def table():
    "What the labs ask for and what they recognize, as a table in Markdown."
    file = HERE/'times.json'
    times = json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}
    rows = [['lab', 'minutes', 'machine minutes', 'exercises', 'mistakes recognized', 'written answers'],
            ['---'] + ['---:']*5]
    rows += [table_row(path, times) for path in sources()]
    return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in rows)


def fill_table():
    "Put the table between the two marks of README.md."
    page = HERE/'README.md'
    text = page.read_text(encoding='utf-8')
    new = table()
    page.write_text(TABLE.sub(lambda found: f'{found[1]}{new}\n{found[2]}', text), encoding='utf-8')
    print(new)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--slides', metavar='FOLDER', help='write the slides of every lab here')
    parser.add_argument('--time', action='store_true', help='run every lab and write times.json')
    parser.add_argument('--table', action='store_true', help='fill the table of README.md')
    asked = parser.parse_args()
    if asked.slides: make_slides(asked.slides)
    if asked.time: measure()
    if asked.table: fill_table()
    if not (asked.slides or asked.time or asked.table): make_students()


if __name__ == '__main__': main()
