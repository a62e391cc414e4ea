"""Settings of Sphinx for `site/book.py`. The notebooks are shown with the outputs that they hold."""
import configparser
import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

ini = configparser.ConfigParser()
ini.read(HERE.parent/'settings.ini', encoding='utf-8')
facts = ini['DEFAULT']
project, author, release = facts['lib_name'], facts['author'], facts['version']
copyright = facts['copyright']
language = 'en'

extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx.ext.mathjax', 'cells']
source_suffix = {'.ipynb': 'myst-nb', '.md': 'myst-nb'}
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_heading_anchors = 3
suppress_warnings = [
    'myst.header',        # a lesson may go from a title to a third level
    'mystnb.unknown_mime_type',
]

add_module_names = False
toc_object_entries_show_parents = 'hide'
python_maximum_signature_line_length = 88

# MathJax travels with the site: pip brings it, so a class without a network reads formulas, too
math_folder = str(Path(importlib.util.find_spec('sphinx-mathjax-offline').origin).parent/'static'/'mathjax')
mathjax_path = 'mathjax/tex-chtml-full.js'
html_static_path = ['static']

html_theme = 'sphinx_book_theme'
html_baseurl = f"{facts['doc_host']}{facts['doc_baseurl']}/"
html_title = 'Scenimefy, a course'
html_css_files = ['book.css']
html_show_sourcelink = False
html_copy_source = False
html_last_updated_fmt = None
html_context = {'default_mode': 'auto'}     # light or dark, as the reader's system says
html_theme_options = {
    'navbar_start': [], 'navbar_center': [], 'navbar_end': [], 'navbar_persistent': [],
    'repository_url': facts['git_url'],
    'repository_branch': facts['branch'],
    'path_to_docs': 'nbs',
    'use_repository_button': True,
    'use_issues_button': True,
    'use_download_button': False,
    'launch_buttons': {'colab_url': 'https://colab.research.google.com'},
    'home_page_in_toc': True,
    'show_navbar_depth': 1,
    'show_toc_level': 2,
    'pygments_light_style': 'a11y-light',
    'pygments_dark_style': 'a11y-dark',
}
copybutton_selector = 'div.cell_input pre, div.highlight-python pre, div.highlight-sh pre'
copybutton_prompt_text = r'>>> |\.\.\. |\$ '
copybutton_prompt_is_regexp = True

# python site/book.py --links
linkcheck_ignore = [r'https?://(localhost|127\.0\.0\.1)']
linkcheck_anchors = False      # pages that a script draws have none to be found
linkcheck_retries = 2
linkcheck_timeout = 20
