"""What the site adds to MyST-NB: each cell's name as an anchor, the descriptions of its figures, a mark on
cells that the library holds, and MathJax from the package that pip installed."""
import shutil
from pathlib import Path

from docutils import nodes


def name_cells(app, tree):
    "Give every code cell its name as an anchor, and its figures their descriptions."
    for box in tree.findall(nodes.container):
        if box.get('nb_element') != 'cell_code': continue
        meta = box.get('cell_metadata', {})
        if meta.get('cell'):
            box['ids'].append(meta['cell'])
        if meta.get('module'): mark(box, meta['module'], '../'*app.env.docname.count('/'))
        describe(box, meta.get('alt', []))


def mark(box, module:str, up:str): # up: '../' for each folder above the page
    "A line above an exported cell: it is part of the library."
    text = f'<div class="exported"><a href="{up}api/{module}.html">scenimefy.{module}</a></div>'
    box['classes'].append('exported-cell')
    box.insert(0, nodes.raw('', text, format='html'))


def describe(box, texts):
    "The descriptions in the cell's metadata, in the order of its figures."
    for image, text in zip(box.findall(nodes.image), texts): image['alt'] = text


def copy_math(app, error):
    "MathJax and its fonts, into the site."
    if error: return
    source, target = Path(app.config.math_folder), Path(app.outdir)/'_static'/'mathjax'
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source/'tex-chtml-full.js', target)
    shutil.copytree(source/'output'/'chtml'/'fonts', target/'output'/'chtml'/'fonts', dirs_exist_ok=True)


def setup(app):
    app.add_config_value('math_folder', '', 'env')
    app.connect('doctree-read', name_cells)
    app.connect('build-finished', copy_math)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
