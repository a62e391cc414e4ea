"The site: every notebook and every public name is on it; built only where Sphinx is installed."
import ast
import configparser
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'site'))
import api
import book

WORKFLOWS = sorted((ROOT/'.github'/'workflows').glob('*.yml'))
ini = configparser.ConfigParser()
ini.read(ROOT/'settings.ini', encoding='utf-8')


@pytest.fixture(scope='module')
def modules(): return api.modules()


def test_every_notebook_is_in_the_navigation():
    names = [name for group in book.toctree().values() for name in group]
    assert len(names) == len(set(names))
    for path in (ROOT/'nbs').glob('*.ipynb'):
        assert path.stem == 'index' or path.stem in names, path.name
    for path in (ROOT/'nbs'/'labs').glob('*.ipynb'): assert f'labs/{path.stem}' in names, path.name


def test_the_course_comes_first_and_answers_stay_away(tmp_path, monkeypatch):
    files = ['00_core.ipynb', 'index.ipynb', 'labs/lab2.ipynb', 'labs/lab1.ipynb', 'labs/index.md',
             'labs/project.md', 'labs/teacher/lab1.ipynb', 'labs/teacher/guide.md', 'answers/lab1.ipynb',
             'labs/.ipynb_checkpoints/lab1.ipynb']
    for name in files:
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text('{}')
    monkeypatch.setattr(book, 'NBS', tmp_path)
    tree = book.toctree()
    assert list(tree) == ['The course', 'For teachers', 'Ground', 'Library']
    assert tree['The course'] == ['labs/index', 'labs/lab1', 'labs/lab2', 'labs/project']
    assert tree['For teachers'] == ['labs/teacher/guide'] and tree['Ground'] == ['00_core']


def test_links_lead_to_pages_or_to_the_repository():
    git = f'{book.GIT}/blob/main'
    assert book.local_link('06_losses.ipynb#recap', 'index') == '](06_losses.ipynb#recap)'
    assert book.local_link('../06_losses.ipynb', 'labs/lab2') == '](../06_losses.ipynb)'
    assert book.local_link('images/strip.png', 'index') == '](images/strip.png)'
    assert book.local_link('../CHANGELOG.md', 'index') == '](changes.md)'
    assert book.local_link('../../CHANGELOG.md', 'labs/index') == '](../changes.md)'
    assert book.local_link('../tests/tape.py', 'index') == f']({git}/tests/tape.py)'
    assert book.local_link('../tests', 'index') == f']({book.GIT}/tree/main/tests)'
    assert book.local_link('teacher/lab1.ipynb', 'labs/index') == f']({git}/nbs/labs/teacher/lab1.ipynb)'


def test_links_of_contributing_and_changes_lead_to_pages(tmp_path, monkeypatch):
    "These two lie outside of nbs/, where the site begins."
    monkeypatch.setattr(book.api, 'write_pages', lambda folder: None)      # the slow part
    book.write_sources(tmp_path/'src')
    linked = 0
    for name in ('contributing', 'changes'):
        for target in re.findall(r'\]\((?!https?:)([^)#]+)', (tmp_path/f'src/{name}.md').read_text()):
            assert (tmp_path/'src'/target).is_file(), f'{name}: {target}'
            linked += 1
    assert linked


def test_a_notebook_as_the_site_shows_it():
    cells = {cell['id']: cell for cell in book.shown_notebook('06_losses')['cells']}
    assert 'remove-cell' in cells['setup']['metadata']['tags']
    assert cells['eq-lsgan']['metadata']['module'] == 'losses'
    assert cells['try-lsgan']['metadata']['module'] == ''
    assert cells['eq-lsgan']['source'].startswith('def lsgan')
    assert 'blob/main/nbs/06_losses.ipynb' in cells['buttons']['source']
    assert 'colab-badge' not in json.dumps(list(cells.values()))
    (note,) = cells['fig-tau-slider']['outputs']
    assert 'widget-note' in note['data']['text/html']
    outputs = [o for c in book.shown_notebook('02b_runs')['cells'] for o in c.get('outputs', [])]
    assert outputs and not [o for o in outputs if '%|' in str(o.get('data', {}))]


def test_every_public_name_is_in_the_reference(modules):
    "By `__all__`, by nbdev's index, and by the cell that each link names."
    index = ast.literal_eval((ROOT/'scenimefy'/'_modidx.py').read_text().partition('d = ')[2])['syms']
    files = {p.stem for p in (ROOT/'scenimefy').glob('*.py')} - {'__init__', '_modidx'}
    assert {m.name for m in modules} == files
    count = 0
    for module in modules:
        found = {item.name: item for item in api.items(module)}
        assert set(found) == set(module.public)
        symbols = [name.split('.')[2:] for name in index[f'scenimefy.{module.name}']]
        assert {s[0] for s in symbols if len(s) == 1 and not s[0].startswith('_')} <= set(found)
        nb = json.loads((ROOT/'nbs'/f'{module.notebook}.ipynb').read_text(encoding='utf-8'))
        sources = {cell['id']: ''.join(cell['source']) for cell in nb['cells']}
        for item in found.values():
            count += 1
            assert re.search(rf'\b{item.name}\b', sources[item.cell]), (module.name, item.name)
    assert count > 250


def test_the_reference_says_what_the_comments_say(modules):
    losses = api.page(next(m for m in modules if m.name == 'losses'), {})
    assert '{py:function} patch_nce(q: Tensor, k: Tensor, tau: float=0.07) -> Tensor' in losses
    assert '| `tau` | `float` | `0.07` | temperature, > 0 |' in losses
    assert '| *returns* | `Tensor` |  | () nats, mean over patches and images |' in losses
    assert 'href="../06_losses.html#eq-nce"' in losses
    settings = api.page(next(m for m in modules if m.name == 'runs'), {})
    assert '| `keep` | `int` | `2` | checkpoints that are kept (ours) |' in settings
    pages = api.pages(modules)
    assert '**Raises** `ValueError` for arrays that are no pictures' in pages['core.md']
    assert all('%%' not in text for text in pages.values())


def test_words_that_markdown_would_change():
    assert api.plain('a*b, c_d in [0,1] and `x*y|z`') == r'a\*b, c\_d in \[0,1\] and `x*y\|z`'


def test_broken_links_are_found(tmp_path):
    (tmp_path/'api').mkdir()
    (tmp_path/'a.html').write_text('<p id="here"><a href="api/b.html#x">1</a><a href="#here">2</a>'
                                   '<a href="#gone">3</a><a href="https://example.org/">4</a>')
    (tmp_path/'api'/'b.html').write_text('<b id="x"></b><a class="k" href="../a.html">5</a>'
                                         '<a href="c.html">6</a>')
    assert book.broken_links(tmp_path) == ['a.html -> #gone', 'api/b.html -> c.html']


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_are_short_and_pinned(path):
    text = path.read_text()
    used = re.findall(r'uses: (\S+)', text)
    assert used and all(re.fullmatch(r'[\w-]+/[\w-]+@v\d+', action) for action in used)
    assert len(text.splitlines()) <= 50 and '\t' not in text and 'permissions:' in text


def test_the_oldest_torch_tried_is_the_oldest_allowed():
    text = (ROOT/'.github'/'workflows'/'tests.yml').read_text()
    for name in ('torch', 'torchvision'):
        bound = re.search(rf'\b{name}>=([\d.]+)', ini['DEFAULT']['requirements']).group(1)
        assert f'{name}=={bound}.*' in text
    assert f"python: '{ini['DEFAULT']['min_python']}'" in text


# ---- with Sphinx, and with a browser

def missing(*names): return [name for name in names if importlib.util.find_spec(name) is None]


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The finished pages; half a minute."
    lacking = missing('sphinx', 'myst_nb', 'sphinx_book_theme', 'sphinx_copybutton', 'sphinx-mathjax-offline')
    if lacking: pytest.skip(f'pip install "scenimefy[site]": {lacking}')
    out = tmp_path_factory.mktemp('site')
    assert book.build(out) == 0
    return out/'html'


def test_the_site_builds_without_a_warning(site):
    html = (site/'06_losses.html').read_text(encoding='utf-8')
    assert 'id="eq-nce"' in html and 'id="patch_nce"' not in html
    pages = [p for p in site.glob('*.html') if re.match(r'\d\d', p.name)]
    assert len(pages) == len(list((ROOT/'nbs').glob('[0-9]*.ipynb')))
    for page in pages:
        figures = re.findall(r'<img\b[^>]*src="_images/[^>]*>', page.read_text(encoding='utf-8'))
        assert figures, page.name
        for figure in figures:
            assert len(re.search(r'alt="([^"]*)"', figure).group(1)) >= 12, (page.name, figure)
    assert 'scenimefy.losses.patch_nce' in (site/'api'/'losses.html').read_text(encoding='utf-8')
    assert (site/'searchindex.js').stat().st_size > 100_000
    assert (site/'_static'/'mathjax'/'tex-chtml-full.js').exists()


def test_the_site_in_a_browser(site, tmp_path):
    "Two widths, light and dark: nothing is wider than the window, nothing comes from another server."
    import shots
    if missing('playwright') or not shots.find_browser(): pytest.skip('no playwright, or no browser')
    faults = shots.shoot_site(site, tmp_path, ('index', '06_losses', 'api/core'))
    assert not faults
    assert len(list(tmp_path.glob('*.png'))) == 12


def test_a_slider_moves_in_jupyterlab(tmp_path):
    import shots
    if missing('playwright') or not (shots.find_browser() and shots.find_lab()):
        pytest.skip('no playwright, no browser, or no JupyterLab')
    moved = shots.shoot_widgets(ROOT/'nbs'/'06_losses.ipynb', tmp_path)
    assert moved and all(before != after for before, after in moved)
    assert len(list(tmp_path.glob('*.png'))) == 2*len(moved)
