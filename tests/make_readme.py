"""README.md from nbs/index.ipynb: `python tests/make_readme.py`, or `make readme`. nbdev's own way needs
Quarto."""
import re
from pathlib import Path

from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]


def readme_text() -> str:
    "The index as markdown, with links that work from the top of the repository."
    text, _ = MarkdownExporter().from_filename(str(ROOT/'nbs'/'index.ipynb'))
    text = text.replace('#| eval: false\n', '')
    return re.sub(r'\]\((images/|labs/|\d\d\w*\.ipynb)', r'](nbs/\1', text).strip() + '\n'


if __name__ == '__main__': (ROOT/'README.md').write_text(readme_text())
