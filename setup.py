"""The facts of settings.ini, handed to setuptools. nbdev 2 keeps them there; pyproject.toml calls them
dynamic."""
import ast
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup


def version_in(file):
    "What a module's line `__version__ = '…'` says."
    for line in file.read_text(encoding='utf-8').splitlines():
        if line.startswith('__version__'): return ast.literal_eval(line.split('=')[1].strip())
    raise SystemExit(f'no __version__ in {file}')


here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
version = version_in(here/cfg['lib_path']/'__init__.py')
if version != cfg['version']:
    raise SystemExit(f"version {version} in __init__.py, {cfg['version']} in settings.ini")
pythons = [f'Programming Language :: Python :: 3.{minor}' for minor in range(10, 14)]

setup(
    name=cfg['lib_name'],
    version=version,
    description=cfg['description'],
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha',
                 'Intended Audience :: Education',
                 'Intended Audience :: Science/Research',
                 'Topic :: Scientific/Engineering :: Image Processing',
                 *pythons],
    packages=find_packages(include=['scenimefy', 'scenimefy.*']),
    package_data={'scenimefy': ['weights/*', 'results/*', 'results/*/*']},
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg['requirements']),
    extras_require={name: shlex.split(cfg[f'{name}_requirements'])
                    for name in ('dev', 'heif', 'app', 'onnx', 'diffusion', 'course', 'site')},
    entry_points={'console_scripts': shlex.split(cfg['console_scripts']),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)
