"The report of Stage 2: what it counts, which pairs it shows, and names that do not become HTML."
import json

import pytest
import torch

from scenimefy.report import (acceptance, class_color, draw_histogram, examples, mask_image, named,
                              write_report)
from scenimefy.selection import Hopeless, make_pairs, read_scores

from test_page import Reader
from test_selection import Bands, Broken, Colors, cfg


def write_report_of(folder, source):
    return write_report(folder, source, Colors(), n=3).read_text(encoding='utf8')


def test_report_is_one_file_and_tells_all(tmp_path):
    make_pairs(cfg(), Bands(), Colors(), tmp_path/'p')
    text = write_report_of(tmp_path/'p', Bands())
    lines = read_scores(tmp_path/'p')
    assert not [word for word in ('http:', 'https:', '<script') if word in text]
    assert 'src="data:image/' in text
    for title, seeds in examples(lines, cfg(), 3).items():
        assert (title in text) == bool(seeds) and all(f'seed {s}:' in text for s in seeds)
    for name, passed, only in acceptance(lines, cfg()): assert name in text and f'<td>{passed}</td>' in text
    assert 'Whether the anime is <i>anime</i>' in text and '<code>scenimefy train --pairs …</code>' in text
    assert text.count('<picture class="plain">') == text.count('media="(prefers-color-scheme:dark)"') == 1
    assert '&lt;' not in text and '&#34;' not in text                # no HTML of ours was taken for text
    assert 'sky ' in text and 'grass ' in text                       # masks are named
    make_pairs(cfg(), Bands(), Colors(), tmp_path/'p')        # the page does not stop the folder from growing


def test_report_without_a_single_score(tmp_path):
    with pytest.raises(Hopeless, match='NaN'): make_pairs(cfg(patience=5), Broken(), Colors(), tmp_path/'p')
    text = write_report(tmp_path/'p', Broken(), Colors()).read_text(encoding='utf8')
    assert 'No candidate could be scored' in text and 'pairs accepted, of 5 candidates' in text
    assert 'seed 0' not in text


def test_acceptance_counts():
    numbers = [(.6, 2), (.8, 2), (.6, 1), (.8, 1), (None, None)]
    lines = [dict(seed=i, lbce=l, n_categories=n) for i, (l, n) in enumerate(numbers)]
    assert [row[1:] for row in acceptance(lines, cfg())] == [(2, 1), (2, 1), (1, 4)]
    more = [*lines, dict(seed=5, lbce=.5, n_categories=9), dict(seed=6, lbce=.9, n_categories=3)]
    assert [row[1:] for row in acceptance(more, cfg())] == [(3, 2), (4, 1), (2, 5)]
    assert acceptance(more, cfg(keep_best=.5, count=1))[-1] == ('best 50% of these', 1, 1)


def test_examples_by_hand():
    numbers = (.5, .9, .3, None, .8, .6, .2, .95, .4)
    lines = [dict(seed=i, lbce=l, n_categories=2) for i, l in enumerate(numbers)]  # left: 4 1 7
    assert list(examples(lines, cfg(), 2).values()) == [[6, 2], [0, 5], [4, 1], [7]]
    assert list(examples(lines, cfg(), 1).values()) == [[6], [5], [4], [7]]
    assert list(examples(lines, cfg(), 5).values()) == [[6, 2, 8, 0, 5], [], [4, 1, 7], []]


@pytest.mark.parametrize('values, drawn', [((.5, .6, .9), True), ((.5, .6), False), ((.8, .9), False),
                                           ((), False)])
def test_the_cut_is_drawn_where_it_cuts(values, drawn):
    lines = [dict(seed=i, lbce=l, n_categories=2) for i, l in enumerate((*values, None))]
    ax, = draw_histogram(lines, cfg()).axes
    assert len(ax.lines) == drawn and sum(p.get_height() for p in ax.patches) >= len(values)


def test_no_name_of_the_reports_world_becomes_html(tmp_path):
    "A source and a segmenter that call themselves hostile names, and classes that do."
    class Hostile(Bands): about = '<script>alert(1)</script>"><img src=x>\udce4'
    class Classes(Colors): classes = ['<b>sky</b>', '"><script>', "' onload='x"]
    folders = []
    for source, segmenter in ((Bands(), Colors()), (Hostile(), Classes())):
        folders.append(make_pairs(cfg(count=3), source, segmenter, tmp_path/type(source).__name__).folder)
    settings = json.loads((folders[1]/'settings.json').read_text())
    settings['segmenter'] = 'x/<i>net<i>"'
    (folders[1]/'settings.json').write_text(json.dumps(settings))
    harmless = write_report(folders[0], Bands(), Colors()).read_text(encoding='utf8')
    text = write_report(folders[1], Hostile(), Classes()).read_text(encoding='utf8')
    assert Reader(text).tags == Reader(harmless).tags and '&lt;script&gt;' in text and '&lt;i&gt;net' in text


def test_masks_and_colors():
    labels = torch.tensor([[0, 0, 0], [1, 1, 2]])
    im = mask_image(labels, Colors.classes)
    colors = im.convert('RGB')
    assert colors.getpixel((0, 0)) == class_color('sky') and colors.getpixel((2, 1)) == class_color('house')
    assert named(labels, Colors.classes) == 'sky 50%, grass 33%, house 17%'
    assert class_color('swivel chair') == class_color('swivel chair') != class_color('chandelier')
    assert class_color('building, edifice') == class_color('building')
    many = [f'thing {i}' for i in range(150)]
    last = mask_image(torch.arange(150).view(10, 15), many).convert('RGB').getpixel((14, 9))
    assert last == class_color('thing 149')
