"The front door: few names, loaded late, explained, with examples that run."
import dataclasses
import doctest
import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import scenimefy
from scenimefy.front import FRONT, Entry, explained, session


def fresh(code):
    "What another Python prints that runs `code`."
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return done.stdout.split('\n')


def functions():
    "The functions and classes of the front door; `world` is a module."
    found = {}
    for name in FRONT:
        thing = getattr(scenimefy, name)
        if isinstance(thing, ModuleType): thing = vars(thing).get(name)
        if thing is not None: found[name] = thing
    return found


def test_the_front_door_is_small_and_light():
    assert 20 <= len(FRONT) <= 30 and set(dir(scenimefy)) == {*FRONT, '__version__'}
    loaded = fresh('import sys, scenimefy\n'
                   'print(*[m for m in ("torch", "numpy", "PIL", "typer") if m in sys.modules])')
    assert loaded[0] == ''


@pytest.mark.parametrize('first', ['scenimefy.stylize', 'scenimefy.evaluate', 'scenimefy.cli', 'scenimefy'])
def test_the_same_things_in_every_order_of_imports(first):
    "A module of the name stays a module, and can be called as its function."
    code = f'''
import {first}
from scenimefy import stylize, evaluate, finetune, pretrain
import scenimefy.stylize, scenimefy.evaluate as e
for module in (stylize, evaluate, finetune, pretrain):
    name = module.__name__.split('.')[1]
    print(callable(module), callable(getattr(module, name)), module is sys.modules[module.__name__])
print(e is evaluate, callable(e.frechet_distance))
'''
    lines = fresh('import sys' + code)
    assert lines[:4] == ['True True True']*4 and lines[4] == 'True True'


def test_a_call_of_a_module_is_a_call_of_its_function(monkeypatch):
    from scenimefy import stylize
    monkeypatch.setattr(stylize, 'stylize', lambda *args, **kwargs: (args, kwargs))
    assert stylize('photo.jpg', weights='tiny') == (('photo.jpg',), {'weights': 'tiny'})


def test_an_unknown_name_is_an_error():
    with pytest.raises(AttributeError, match='stylise'): scenimefy.stylise


def test_everything_is_explained():
    for name, thing in functions().items():
        text, entry = thing.__doc__, FRONT[name]
        for part in (entry.raises, session(entry.example)): assert part in text, name
        if hasattr(thing, 'PRESETS'):
            assert all(f'\n{f.name} = ' in text for f in dataclasses.fields(thing)), name
            continue
        for p in inspect.signature(thing).parameters: assert f'\n{p}' in text, (name, p)
        if inspect.isfunction(thing):
            assert inspect.signature(thing).return_annotation is not inspect.Signature.empty, name


def test_no_parameter_is_left_unexplained():
    "Each has a line of its own, and so has what comes back."
    from scenimefy.front import _comments
    for name, thing in functions().items():
        if hasattr(thing, 'PRESETS'): continue
        is_class = inspect.isclass(thing)
        comments = _comments(thing.__init__ if is_class else thing)
        wanted = [*inspect.signature(thing).parameters, *([] if is_class else ['return'])]
        assert not [w for w in wanted if w not in comments], name


def test_the_package_says_what_it_offers():
    assert all(name in scenimefy.__doc__ for name in FRONT)


def test_parameters_bring_their_comments():
    def painted(width:int=3,   # px
                ratio=1.,      # height by width,
                               # before cutting
                name='a', sure=False # both share a line
               ) -> list:      # of pictures
        "Paint."
    text = explained(painted, Entry('painted', 'here', '`ValueError`', '1 + 1  # → 2'))
    assert text == '''Paint.

Parameters
----------
width : int, default 3
    px
ratio, default 1.0
    height by width, before cutting
name, default 'a'
    both share a line
sure, default False
    both share a line

Returns
-------
of pictures

Raises
------
`ValueError`

Examples
--------
>>> 1 + 1
2'''


def test_a_comment_behind_a_signature_of_one_line_is_about_the_result():
    def sides(size:int) -> list: # of maps
        "Sides."
    text = explained(sides, Entry('sides', 'here', '`ValueError`', '1 + 1  # → 2'))
    assert 'size : int\n\nReturns' in text and '-------\nof maps' in text


@pytest.mark.parametrize('name', FRONT)
def test_example(name, tmp_path, monkeypatch):
    "As a reader would try it: in an empty folder, without a network."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SCENIMEFY_OFFLINE', '1')
    example = doctest.DocTestParser().get_doctest(session(FRONT[name].example), {}, name, None, 0)
    assert len(example.examples) >= 2
    result = doctest.DocTestRunner().run(example)
    assert result.attempted and not result.failed
