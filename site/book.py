"""The course as a static site: `python site/book.py`, or `make site`. Nothing is executed and nothing is
fetched: the outputs shown are those in the notebooks."""
import argparse
import configparser
import json
import posixpath
import re
import shutil
import sys
import time
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'site'))
import api

NBS = ROOT/'nbs'
OUT = ROOT/'_docs'
ini = configparser.ConfigParser()
ini.read(ROOT/'settings.ini', encoding='utf-8')
GIT, BRANCH = ini['DEFAULT']['git_url'], ini['DEFAULT']['branch']
COLAB = GIT.replace('https://github.com', 'https://colab.research.google.com/github') + f'/blob/{BRANCH}/nbs'
PARTS = {'Ground': ('00', '02'), 'Networks': ('03', '05'), 'Losses and the three stages': ('06', '09'),
         'Scenes, and how good they are': ('10', '12'), 'Around it': ('13', '99')}
HIDDEN = ('answers', 'teacher', 'runs')     # folders whose notebooks are not for readers of the site
WIDGET = 'application/vnd.jupyter.widget-view+json'
LINK = re.compile(r'\]\(((?!https?:|#|attachment:|mailto:)[^)\s]+)\)')     # to a file of ours
DIRECTIVE = re.compile(r'^#\|\s*([^\n]*)\n?', re.M)


# ---- what there is

def notebooks() -> list: # of paths below nbs/, without suffix
    "Every notebook of the site: the textbook and, where they are, the labs."
    found = [p.relative_to(NBS) for p in NBS.rglob('*.ipynb')]
    found = [p for p in found if not set(p.parts) & set(HIDDEN) and '.ipynb_checkpoints' not in p.parts]
    return sorted(p.with_suffix('').as_posix() for p in found)


def texts() -> list: # of paths below nbs/, without suffix
    "Every page of the course that is plain Markdown."
    found = [p.relative_to(NBS) for p in NBS.rglob('*.md')]
    return sorted(p.with_suffix('').as_posix() for p in found if '.ipynb_checkpoints' not in p.parts)


def toctree() -> dict: # caption -> pages
    "The navigation, made from the files that are there."
    labs = [name for name in notebooks() if name.startswith('labs/')]
    pages = texts()
    course = [name for name in pages if name == 'labs/index'] + labs
    own = [name for name in pages if re.fullmatch(r'labs/\w+', name) and name != 'labs/index']
    loose = [name for name in pages if '/' not in name]            # beside the notebooks
    teachers = [name for name in pages if name not in course + own + loose]
    tree = {'The course': course + own, 'For teachers': teachers}
    chapters = [name for name in notebooks() if re.match(r'\d\d', name)]
    for part, (first, last) in PARTS.items():
        tree[part] = [name for name in chapters if first <= name[:2] <= last]
    tree['Library'] = [*loose, 'api/index', 'changes', 'contributing']
    return {caption: names for caption, names in tree.items() if names}


def entry(name:str) -> str: # a line of a toctree
    "A page in the navigation; a chapter carries its number, by which the lessons call it."
    if not re.match(r'\d\d', name): return name
    nb = json.loads((NBS/f'{name}.ipynb').read_text(encoding='utf-8'))
    title = ''.join(nb['cells'][0]['source']).splitlines()[0].lstrip('# ')
    return f'{name.split("_")[0]} · {title} <{name}>'


def toctree_text() -> str: # markdown
    "The navigation as hidden directives at the end of the first page."
    blocks = []
    for caption, names in toctree().items():
        lines = '\n'.join(entry(name) for name in names)
        blocks.append(f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```')
    return '\n\n'.join(blocks)


# ---- one notebook as the site shows it

def directives(source:str) -> list: # words such as 'export', 'eval: false'
    return [found.strip() for found in DIRECTIVE.findall(source)]


def shown_outputs(outputs) -> list:
    "Outputs without progress bars; in place of a widget, a word about where it moves."
    kept = []
    for output in outputs:
        data = output.get('data', {})
        if WIDGET not in data:
            kept.append(output)
            continue
        text = ''.join(data.get('text/plain', ''))
        if '%|' in text: continue       # a progress bar
        note = ('<p class="widget-note">Controls appear here when the notebook runs: '
                'open it in Colab or in JupyterLab.</p>')
        kept.append(dict(output_type='display_data', data={'text/html': note}, metadata={}))
    return kept


def shown_code(cell, module:str) -> dict:
    "A code cell without nbdev's directives; the site needs its name, and whether the library holds it."
    source = ''.join(cell['source'])
    marks = directives(source)
    exported = any(re.match(r'exports?$', mark) for mark in marks)
    meta = dict(cell['metadata'], cell=cell['id'], module=module if exported else '')
    tags = list(meta.get('tags', []))
    if 'hide' in marks: tags.append('remove-cell')
    if cell['id'] == 'install': tags.append('hide-input')
    meta['tags'] = tags
    source = DIRECTIVE.sub('', source).strip('\n')
    return dict(cell, source=source, metadata=meta, outputs=shown_outputs(cell['outputs']))


def shown_text(cell, name:str) -> dict:
    "A Markdown cell whose badge is a plain link, and whose links leave the site where the site has no page."
    source = ''.join(cell['source'])
    if cell['id'] in ('badge', 'badges', 'title'): source = without_badges(source)
    source = LINK.sub(lambda found: local_link(found[1], name), source)
    return dict(cell, source=f'<a id="{cell["id"]}"></a>\n\n{source}')


def without_badges(source:str) -> str:
    "No pictures from other servers; the page has a button of its own."
    source = re.sub(r'\[!\[[^]]*\]\(https?:[^)]*\)\]\([^)]*\)\s*(·\s*)?', '', source)
    return re.sub(r'!\[[^]]*\]\(https?:[^)]*\)\s*', '', source)


def local_link(target:str, name:str) -> str: # '](…)'
    "A link of page `name`: as it is if the site has its target, else to the file in the repository."
    path, _, anchor = target.partition('#')
    file = (NBS/name).parent/path
    inside = file.resolve()
    if inside.is_relative_to(NBS):
        page = inside.relative_to(NBS).with_suffix('').as_posix()
        if page in notebooks() + texts() or inside.suffix in ('.png', '.jpg', '.svg'): return f']({target})'
    if not inside.is_relative_to(ROOT): raise SystemExit(f'{name}: {target} is outside the repository')
    known = {'CHANGELOG.md': 'changes.md', 'CONTRIBUTING.md': 'contributing.md'}
    place = inside.relative_to(ROOT).as_posix()
    if place in known: return f']({"../"*name.count("/")}{known[place]})'
    kind = 'tree' if inside.is_dir() else 'blob'
    return f']({GIT}/{kind}/{BRANCH}/{place}{"#" + anchor if anchor else ""})'


def module_of(nb) -> str:
    "The module that a notebook exports, or nothing."
    for cell in nb['cells']:
        found = re.search(r'^#\|\s*default_exp\s+(\S+)', ''.join(cell['source']), re.M)
        if found: return found.group(1)
    return ''


def shown_notebook(name:str) -> dict:
    "A notebook of nbs/ as the site shows it."
    nb = json.loads((NBS/f'{name}.ipynb').read_text(encoding='utf-8'))
    module, cells = module_of(nb), []
    for cell in nb['cells']:
        made = shown_code(cell, module) if cell['cell_type'] == 'code' else shown_text(cell, name)
        cells.append(made)
    button = f'<a class="colab-button" href="{COLAB}/{name}.ipynb">Open in Colab</a>'
    if module: button += f' <a class="colab-button" href="api/{module}.html">Reference: {module}</a>'
    head = dict(cell_type='markdown', id='buttons', metadata={}, source=f'<p class="buttons">{button}</p>')
    cells.insert(1, head)
    if name == 'index':
        cells.append(dict(cell_type='markdown', id='contents', metadata={}, source=toctree_text()))
    return dict(nb, cells=cells)


# ---- the finished pages

def broken_links(html) -> list: # 'page -> target'
    "Links within the site that lead nowhere: no such page, or no such place on it."
    pages = {p.relative_to(html).as_posix(): p.read_text(encoding='utf-8') for p in html.rglob('*.html')}
    places = {name: set(re.findall(r'\bid="([^"]+)"', text)) for name, text in pages.items()}
    broken = []
    for name, text in pages.items():
        for target in sorted(set(re.findall(r'<a\b[^>]*?\bhref="([^":]+)"', text))):
            path, _, anchor = unquote(target).partition('#')
            file = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
            if file in pages: good = not anchor or anchor in places[file]
            else: good = (html/file).exists()
            if not good: broken.append(f'{name} -> {target}')
    return broken


# ---- all of it

def shown_page(name:str) -> str: # markdown
    "A Markdown page of nbs/, with links that work on the site."
    text = (NBS/f'{name}.md').read_text(encoding='utf-8')
    return LINK.sub(lambda found: local_link(found[1], name), text)


def write_sources(folder):
    "Everything that Sphinx reads."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for picture in NBS.rglob('*'):
        if picture.suffix not in ('.png', '.jpg', '.svg'): continue
        place = folder/picture.relative_to(NBS)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, place)
    for name in notebooks():
        write(folder/f'{name}.ipynb', json.dumps(shown_notebook(name), ensure_ascii=False))
    for name in texts(): write(folder/f'{name}.md', shown_page(name))
    for file, name in (('CHANGELOG.md', 'changes'), ('CONTRIBUTING.md', 'contributing')):
        text = (ROOT/file).read_text(encoding='utf-8')
        write(folder/f'{name}.md', text.replace('](nbs/', ']('))      # the site begins in nbs/
    api.write_pages(folder/'api')


def write(path, text:str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


def sphinx(out, kind:str, jobs:int) -> int: # 0: all went well
    "Let Sphinx make `kind` of the sources; a warning is an error."
    from sphinx.cmd.build import main
    write_sources(out/'src')
    options = ['-b', kind, '-c', ROOT/'site', '-d', out/'doctrees', '-j', jobs, '-W', '--keep-going', '-q']
    return main([str(option) for option in (*options, out/'src', out/kind)])


def build(out, jobs:int=1) -> int: # 0: all went well
    "The pages, and a look at every link between them."
    failed = sphinx(out, 'html', jobs)
    broken = broken_links(out/'html')
    for line in broken: print('broken link:', line)
    return failed or int(bool(broken))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('-o', '--out', type=Path, default=OUT, help='folder of the site (default _docs)')
    parser.add_argument('-j', '--jobs', type=int, default=2, help='processes')
    parser.add_argument('--links', action='store_true', help='no pages: try the links to other sites')
    parser.add_argument('--requirements', action='store_true', help='only print what pip must install')
    args = parser.parse_args()
    if args.requirements:
        print(ini['DEFAULT']['site_requirements'])
        sys.exit()
    if args.links: sys.exit(sphinx(args.out, 'linkcheck', args.jobs))
    start = time.time()
    failed = build(args.out, args.jobs)
    if failed: sys.exit(failed)
    print(f'{args.out}/html/index.html, in {time.time() - start:.0f} s')
