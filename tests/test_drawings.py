"The drawings: fresh, legible, without a word that is covered, and true to the networks."
import functools
import re
import xml.etree.ElementTree as ET

import nbformat
import pytest

from make_drawings import ABOUT, DRAWINGS, IMAGES, draw
from make_readme import ROOT
from scenimefy.semisup import SemisupSettings, term_weights
from sheet_networks import middle_field
from sheets import (CLASSES, CLIP_DIM, MASK, PX, QUERIES, fields, map_name, networks, settings, sizes_inside,
                    tap_sizes, vgg_size)
from svg import SMALL, Sheet, crosses, spans, width_of

drawn = functools.cache(draw)
drawing = pytest.mark.parametrize('name', DRAWINGS)
WHERE = dict(system=['index'], stylegan_blocks=['03_stylegan', '07_finetune'], translator=['04_translator'],
             critic=['04_translator'], heads=['04_translator'], segment_select=['08_selection'])
TAG = '{http://www.w3.org/2000/svg}'


def words_in(name):
    "All words of a drawing, as its file holds them."
    root = ET.parse(IMAGES/f'{name}.svg').getroot()
    return [''.join(e.itertext()) for e in root.iter(f'{TAG}text')]


@drawing
def test_drawing_is_fresh(name):
    found = (IMAGES/f'{name}.svg').read_bytes()
    assert found == drawn(name).svg().encode(), 'run make drawings'


@drawing
def test_no_word_is_covered_or_crossed(name):
    assert not drawn(name).clashes()


@drawing
def test_drawing_can_be_read(name):
    "Words stay words of at least 10.5 px on a page of 800, on a white ground of its own, with a description."
    root = ET.parse(IMAGES/f'{name}.svg').getroot()
    assert root.get('viewBox').startswith('0 0 800 ') and root.get('role') == 'img'
    assert root.find(f'{TAG}title').text and root.find(f'{TAG}desc').text == ABOUT[name]
    ground = root.find(f'{TAG}rect')
    assert ground.get('fill') == '#FFFFFF' and ground.get('width') == '800'
    sizes = [float(e.get('font-size')) for e in root.iter(f'{TAG}text')]
    assert len(sizes) > 15 and min(sizes) >= 10.5
    kinds = {e.tag.removeprefix(TAG) for e in root.iter()}
    assert kinds <= {'svg', 'title', 'desc', 'rect', 'path', 'circle', 'text', 'tspan'}
    assert (IMAGES/f'{name}.svg').stat().st_size < 80_000


@drawing
def test_drawing_stands_where_it_is_explained(name):
    "Each place shows it with its whole description."
    assert 20 <= len(ABOUT[name]) <= 400
    for place in WHERE[name]:
        cells = nbformat.read(ROOT/'nbs'/f'{place}.ipynb', 4).cells
        shown = [c for c in cells if f'![{ABOUT[name]}](images/{name}.svg)' in c.source]
        assert len(shown) == 1, place


def test_facts_are_those_of_the_paper_and_the_released_code():
    "Numbers from the specification, against those that the drawings read from the networks."
    assert tap_sizes() == [(3, 262, 262), (128, 256, 256), (256, 128, 128), (256, 64, 64), (256, 64, 64)]
    assert fields() == {0: 1, 4: 9, 8: 15, 12: 35, 16: 99, 'critic': 84} and middle_field()[2] == 84
    sides = [h for _, h, _ in sizes_inside('D')]
    assert sorted(set(sides), reverse=True) == [255, 128, 127, 64, 63, 32, 31, 30]
    S = networks()['S']
    assert S.n_latent == 14 and len(S.noise_sides()) == 13
    assert vgg_size() == (512, 32, 32) and map_name(vgg_size()) == '512 × 32²'


def test_facts_of_networks_that_are_not_built():
    from open_clip import get_model_config
    from transformers import Mask2FormerConfig
    assert get_model_config('ViT-B-32-quickgelu')['embed_dim'] == CLIP_DIM
    mask2former = Mask2FormerConfig(num_labels=CLASSES)
    assert mask2former.num_queries == QUERIES and PX//mask2former.common_stride == MASK


def test_words_say_what_the_networks_are():
    "What a reader takes from the drawings, as literal words."
    assert {'convs.6', 'to_rgbs.3', 'learns: 42 tensors, 8,510,863 numbers', '512 × 64²',
            'frozen: 68 tensors, 21,523,475 numbers'} <= set(words_in('stylegan_blocks'))
    assert {'35 × 35 px', '99 × 99 px', '256 × 128²'} <= set(words_in('translator'))
    assert {'84 × 84 px', '30 × 30 scores', '64 × 255²'} <= set(words_in('critic'))
    assert {'256 positions for each tap,', 'C = 128', 'linear 256 → 256'} <= set(words_in('heads'))
    assert {'100 × 151', '150 × 256²', 'at least 2?', 'below 5.0?'} <= set(words_in('segment_select'))
    assert {'14 × 512', '16 crops of 32 px', 'patch-CLIP, × 0.05', 'perceptual, × 0.01', 'SRC, × 0.05',
            'hDCE, × 0.1', '1 → 0.08', '30 × 30 scores'} <= set(words_in('system'))


def test_frozen_blocks_are_hatched():
    "In the drawing of StyleGAN2: above the border only hatched boxes, below it only boxes that learn."
    text = (IMAGES/'stylegan_blocks.svg').read_text(encoding='utf-8')
    rows = 223, 393, 560                                         # left sides of the three columns
    fills = {x: re.findall(rf'<rect x="{x}" y="(\d+)" [^>]*fill="(#F1F1F1|#D9EAF5)"', text) for x in rows}
    for found in fills.values():
        assert [fill for _, fill in found] == 4*['#F1F1F1'] + 3*['#D9EAF5']


def test_unsupervised_terms_do_not_fade():
    "The drawing puts the fading weight on the branch of pairs only."
    cfg = settings()[SemisupSettings]
    first, last = term_weights(cfg, 1), term_weights(cfg, cfg.epochs)
    fading = {name for name in first if first[name] != last[name]}
    assert fading == {'gan_sup', 'style'}


# ---- the pencil itself

def test_clashes_are_found():
    s = Sheet(100, 100, 'test')
    s.text(50, 50, 'one')
    assert not s.clashes()
    s.text(55, 52, 'two')
    assert s.clashes() == ["'two' lies on 'one'"]
    s = Sheet(100, 100, 'test')
    s.text(50, 50, 'one')
    s.arrow((10, 50), (90, 50))
    assert s.clashes() == ["'one' is crossed by a line"]
    s = Sheet(100, 100, 'test')
    s.text(5, 50, 'much too long for this')
    assert s.clashes() == ["'much too long for this' leaves the page"]
    x = s.text(50, 50, 'x')
    assert crosses(x, (0, 50), (100, 50)) and crosses(x, (0, 0), (100, 100))
    assert not crosses(x, (0, 9), (99, 9)) and not crosses(x, (0, 0), (40, 40))


def test_words_that_do_not_fit_their_box_are_refused():
    s = Sheet(100, 100, 'test')
    with pytest.raises(ValueError, match='takes'): s.box(0, 0, 30, 20, ['a long line'])


def test_raised_and_lowered_letters():
    "They return to the line, and count at their size."
    raised = 'x<tspan dy="-4" font-size="7.5">p</tspan><tspan dy="4">, G</tspan>'
    lowered = '<tspan dy="2.5" font-size="7.5">s</tspan><tspan dy="-2.5">(1)</tspan>'
    assert spans('x^{p}, G_{s}(1)', 10) == raised + lowered
    assert abs(width_of('x^{p}') - (width_of('x') + SMALL*width_of('p'))) < 1e-9
    assert '&lt;b&gt;' in spans('<b>', 10)
