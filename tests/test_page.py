"Pictures on a page, and names from outside that want to be HTML."
from html.parser import HTMLParser

import pytest
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from scenimefy.page import (commands_html, data_uri, figure_html, grid_html, list_html, note_html, page_html,
                            part_html, picture_html, section_html, shrink, table_html)

HOSTILE = ['<script>alert(1)</script>.png', '"><img src=x onerror=alert(1)>', "' onload='alert(1)",
           '</style></title>', '&lt;b&gt;', '{{ 7*7 }}{% raw %}', '<!-- --><b>',
           '\udce4<i>\ud800.png', 'a\x00<b>\x1b[31m\x9b\x7f.png']
PICTURE = Image.new('RGB', (4, 3), 'red')
FIGURE = Figure(figsize=(1, 1), dpi=20)
PIECES = dict(
    figure=lambda name: figure_html(PICTURE, name),
    picture=lambda name: picture_html(FIGURE, FIGURE, name),
    grid=lambda name: grid_html([name, figure_html(PICTURE, 'ours'), name], 2),
    generator=lambda name: grid_html((n for n in (name, name)), 2),
    table=lambda name: table_html([(name, 1), ('row', name)], head=('head', name)),
    list=lambda name: list_html([name, Markup('<i>ours</i>')]),
    commands=lambda name: commands_html([(name, name), ('', name)]),
    note=lambda name: note_html(name, name),
    part=lambda name: part_html(name, name, list_html(['ours'])),
    section=lambda name: section_html(name, name, name, table_html([('ours', 1)])))


class Reader(HTMLParser):
    "What a browser sees: tags with the names of their attributes, and the text between them."
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.values = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *(key for key, _ in attrs)))
        self.values += [value for _, value in attrs]

    def handle_data(self, data): self.texts.append(data)


@pytest.mark.parametrize('size, small', [((100, 20), (50, 10)), ((20, 100), (10, 50)), ((80, 80), (50, 50)),
                                         ((1, 500), (1, 50)), ((50, 7), (50, 7)), ((3, 4), (3, 4))])
def test_the_longer_side_decides(size, small):
    "Wide or tall: neither side is longer than asked for, and nothing is enlarged."
    assert shrink(Image.new('RGB', size), 50).size == small


@pytest.mark.parametrize('name', HOSTILE, ids=ascii)
@pytest.mark.parametrize('piece', PIECES)
def test_no_name_becomes_html(piece, name):
    "A piece with a hostile name has the tags and attributes of one with a harmless name, and shows the name."
    made = PIECES[piece](name)
    seen, harmless = Reader(made), Reader(PIECES[piece]('harmless'))
    assert isinstance(made, Markup) and seen.tags == harmless.tags
    assert name in ''.join(seen.texts) + ''.join(seen.values)


@pytest.mark.parametrize('name', HOSTILE, ids=ascii)
def test_no_name_becomes_html_on_the_page(name):
    "Wherever a page takes a text; and what no page can hold is a question mark."
    def page(name): return page_html(name, name, name, [(name, name)], name)
    text = page(name)
    assert Reader(text).tags == Reader(page('harmless')).tags
    assert not any(0xd800 <= ord(c) < 0xe000 or c in '\x00\x1b\x7f\x9b' for c in text)
    text.encode('utf8')                                                 # it can be written
    for piece in PIECES.values():
        whole = page_html('t', 'l', piece(name))
        whole.encode('utf8')
        assert Reader(whole).tags == Reader(page_html('t', 'l', piece('harmless'))).tags


def test_strange_letters_become_question_marks_and_others_stay():
    text = page_html('t', 'a\udce4b\x07c\x85', 'tab\tline\nnext e\u0301 \u200d \U0001f332 ß')
    assert '<p>a?b?c?</p>' in text and 'tab\tline\nnext e\u0301 \u200d \U0001f332 ß' in text


def test_our_own_html_stays():
    ours = Markup('<i>ours</i>')
    for piece in (section_html('t', ours), note_html('Careful.', ours), table_html([(ours,)])):
        assert ours in piece
    body = section_html('t', 'x') + section_html('u', 'y')
    assert body in page_html('t', 'l', body)
    for piece in (figure_html(PICTURE, ours), picture_html(FIGURE, FIGURE, ours)):
        assert piece.split('alt="')[1].startswith('&lt;i&gt;ours&lt;/i&gt;"')    # but no tag in an attribute


def test_pieces_by_hand():
    assert list_html(['a', 'b']) == '<ul><li>a</li><li>b</li></ul>'
    assert note_html('Careful.', 'x') == '<div class="note"><b>Careful.</b> x</div>'
    assert part_html('t', 'a', 'b') == '<h3>t</h3>ab'
    assert section_html('t', 'x', 'a', 'b') == '<section><h2>t</h2><p>x</p>ab</section>'
    assert table_html([('a', 1)], ('k', 'v')) == ('<table><thead><tr><th>k</th><th>v</th></tr></thead>'
                                                  '<tbody><tr><td>a</td><td>1</td></tr></tbody></table>')
    assert table_html([('a', None)]) == '<table><tbody><tr><td>a</td><td>None</td></tr></tbody></table>'
    assert commands_html([('why', 'do'), ('', 'more'), ('then', 'end')]) == (
        '<pre><span class="c"># why</span>\ndo\nmore\n<span class="c"># then</span>\nend</pre>')


def test_a_figure_follows_light_and_dark():
    light, dark = Figure(figsize=(1, 1), dpi=20), Figure(figsize=(2, 1), dpi=20)
    text = picture_html(light, dark, 'curves')
    assert f'srcset="{data_uri(dark)}"' in text and f'src="{data_uri(light)}" alt="curves"' in text
    assert 'media="(prefers-color-scheme:dark)"' in text and data_uri(light) != data_uri(dark)


def test_a_page_fetches_nothing_and_says_so():
    text = page_html('t', 'l', figure_html(PICTURE, 'x'), [(3, 'pairs')], 'f')
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in text.replace('\n', ' ')
    assert isinstance(text, Markup) and text.startswith('<!doctype html>') and '<footer>f</footer>' in text
    assert '<div class="card"><b>3</b><span>pairs</span></div>' in text and '"Segoe UI"' in text
    assert 'http:' not in text and 'https:' not in text and 'url(' not in text and '@import' not in text
    tags = {tag for tag, *_ in Reader(text).tags}
    assert tags.isdisjoint(['script', 'link', 'iframe', 'object', 'a', 'form', 'base'])


@pytest.mark.parametrize('mode, kind', [('RGB', 'jpeg'), ('RGBA', 'png'), ('P', 'png'), ('L', 'png')])
def test_only_colors_without_holes_become_jpeg(mode, kind):
    assert data_uri(PICTURE.convert(mode)).startswith(f'data:image/{kind};base64,')
