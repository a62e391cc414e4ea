"""A small lab for the tests of the teacher's kit: number 99, made by code, so that nobody takes it for a lab.

Its exercises are those of `scenimefy.answers.lab99`, under which name this module enters itself.
"""
import sys
from pathlib import Path

import nbformat
import torch

from scenimefy.labs import Exercise, Mistake, collect

sys.modules['scenimefy.answers.lab99'] = sys.modules[__name__]
TESTS = Path(__file__).resolve().parent


def mean_square(x): return (x**2).mean(-1)
def sum_square(x): return (x**2).sum(-1)
def wrong_axis(x): return (x**2).mean(0)
def scaled(x, tau): return (x/tau).softmax(-1)
def no_temperature(x, tau): return x.softmax(-1)
def multiplied(x, tau): return (x*tau).softmax(-1)
def square_cases(): return [(torch.arange(float(n*n)).view(n, n) + 1,) for n in (2, 3, 4)]
def numbers(n): return torch.arange(float(n)).view(1, n)
def softmax_cases(): return [(numbers(2), .5), (numbers(3), .07), (numbers(4), 2.)]


HINTS = 'Look at the shape.', 'It is one line.'
EXERCISES = collect(
    Exercise('99.1', 'the share of the sky', .25, hints=HINTS,
             mistakes=(Mistake('That is a percentage.', 25.), Mistake('Of 16, not of 4.', 1.))),
    Exercise('99.2', 'the mean square', mean_square, cases=square_cases, gradients=(0,), hints=HINTS,
             mistakes=(Mistake('You added. Take the mean.', sum_square),
                       Mistake('You averaged over the first axis.', wrong_axis))),
    Exercise('99.3', 'a softmax with temperature', scaled, cases=softmax_cases, hints=HINTS,
             mistakes=(Mistake('Where is the temperature?', no_temperature),
                       Mistake('Divide by the temperature.', multiplied))))

SETUP = f"""import sys
sys.path.insert(0, {str(TESTS)!r})
import sample_lab
import matplotlib.pyplot as plt, torch
from scenimefy.labs import check, hint, progress"""
ANSWER_2 = '''def my_mean_square(x):
    "The mean of squares over the last axis."
    # BEGIN SOLUTION
    squares_of_all = x**2
    return squares_of_all.mean(-1)
    # END SOLUTION'''
ANSWER_3 = '''def my_softmax(x, tau):
    if tau > 0:
        # BEGIN SOLUTION
        return (x/tau).softmax(-1)
        # END SOLUTION'''
RUBRIC = 'Rubric (3 points): 1 for a number, 2 for the reason.\n\n*In class:* some say "smaller".'
CELLS = [
    ('title', '# Lab 99 · A sample\n> For tests only.\n\n| | |\n|---|---|\n| time | 45–60 minutes |'),
    ('install', '#| eval: false\n# generated'),
    ('setup', SETUP),
    ('sky-md', '## The sky\nA picture, and a number. The derivation is in [06](../06_losses.ipynb).'),
    ('fig-curve', "plt.figure(figsize=(4, 2))\nplt.plot([0, 1, 4, 9])\nplt.show()"),
    ('try-numbers', 'torch.arange(4)**2'),
    ('q-99-1', '**99.1** (5 minutes) Which share of the picture is sky? `hint("99.1")` helps.'),
    ('ans-99-1', 'share = .25  # SOLUTION'),
    ('check-99-1', "check('99.1', share)"),
    ('teach-99-1', 'Many give a percentage.'),
    ('q-99-2', '**99.2** (10 minutes) Write the mean square.'),
    ('ans-99-2', ANSWER_2),
    ('check-99-2', "check('99.2', my_mean_square)"),
    ('q-99-3', '**99.3** (10 minutes) Write the softmax.'),
    ('ans-99-3', ANSWER_3),
    ('check-99-3', "check('99.3', my_softmax)"),
    ('open-99-4', '**99.4** What does a larger temperature do, and why?'),
    ('write-99-4', '*Your answer:*'),
    ('teach-99-4', RUBRIC),
    ('open-99-5', '**99.5** Where would you use it?'),
    ('write-99-5', '*Your answer:*'),
    ('progress-99', 'progress(99)'),
    ('quiz', '## Quiz\n1. What is a softmax?'),
    ('teach-quiz', '1. Positive numbers with sum 1.'),
    ('recap', '## What you can do now\nScale and share.'),
]
PIXEL = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='


CODE = 'install', 'setup', 'fig-', 'try-', 'ans-', 'check-', 'progress-'


def make(id, source):
    "One cell; code cells of a source come with outputs."
    if not id.startswith(CODE): return nbformat.v4.new_markdown_cell(source, id=id)
    cell = nbformat.v4.new_code_cell(source, id=id, execution_count=1)
    data = {'text/plain': f'output of {id}'}
    if id.startswith('fig-'):
        data['image/png'] = PIXEL
        cell.metadata.alt = ['a curve that rises faster and faster']
    cell.outputs = [nbformat.v4.new_output('execute_result', data, execution_count=1)]
    return cell


def sample_source():
    "The source of the sample lab, as the notebook of a teacher."
    return nbformat.v4.new_notebook(cells=[make(*cell) for cell in CELLS])


def fill(nb, answers):
    "A student's notebook: the cells named in `answers` have a new text."
    for cell in nb.cells:
        if cell.id in answers: cell.source = answers[cell.id]
    return nb


RIGHT = {
    'ans-99-1': 'share = 1/4',
    'ans-99-2': 'def my_mean_square(x): return x.pow(2).mean(dim=-1)',
    'ans-99-3': 'def my_softmax(x, tau): return torch.softmax(x/tau, dim=1)',
    'write-99-4': '*Your answer:*\n\nIt flattens: differences of x count less.',
    'write-99-5': 'In <b>attention</b>.'}
CLASS = {
    'ada': RIGHT,
    'ben': RIGHT | {'ans-99-2': 'def my_mean_square(x): return (x*x).sum(-1)',
                    'ans-99-3': 'def my_softmax(x, tau): return x.softmax(-1)',
                    'write-99-4': 'Larger is sharper.'},
    'cleo': {},
    'dan': RIGHT | {'ans-99-1': 'share = 1/0',
                    'ans-99-2': 'def my_mean_square(x):\n    while True: pass'}}
