"""Drawings as SVG: boxes, arrows and words that stay words, and a check that no word is crossed or covered.

A network that learns is a box with a thick blue frame, a frozen one is hatched, a loss is a rounded box with
a dashed frame, a rule is a hexagon, a picture or a tensor is a small stack of sheets. So the shapes alone
tell them apart, without any color. Colors are those of Okabe and Ito.
"""
import functools
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib
from fontTools.ttLib import TTFont

BLUE, RED, GREEN, GOLD, SKY = '#0072B2', '#D55E00', '#009E73', '#E69F00', '#56B4E9'
INK, SOFT, LINE = '#1B1B1B', '#505050', '#8A8A8A'
SIZE = 13                                    # px of the usual letter, on a page 800 px wide
FAMILY = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
MARKUP = re.compile(r'([_^])\{([^}]*)\}')    # x^{p}, G_{s}
SMALL = .75                                  # size of raised and lowered letters
LOOKS = {                                    # fill, frame, width of the frame, dashes, corner
    'plain': ('#FFFFFF', INK, 1.2, '', 3), 'learns': ('#D9EAF5', BLUE, 2.6, '', 3),
    'frozen': ('#F1F1F1', SOFT, 1.2, '', 3), 'loss': ('#FFF1E0', RED, 1.8, '5 3', 13),
    'rule': ('#E2F3EC', GREEN, 1.8, '', 0), 'band': ('#FAFAFA', LINE, 1, '', 8),
    'block': ('#FBE3B0', BLUE, 2.6, '', 3), 'gold': ('#FBE3B0', INK, 1.2, '', 3),
    'quiet': ('#FFFFFF', LINE, 1, '', 3)}


def number(v):
    "At most one decimal, the same on every machine."
    return f'{round(float(v), 1):g}'


@functools.cache
def letter_widths(bold):
    "{letter: width at size 1} of the widest font that a browser may choose; what fits in it fits in others."
    folder = Path(matplotlib.get_data_path())/'fonts'/'ttf'
    font = TTFont(folder/('DejaVuSans-Bold.ttf' if bold else 'DejaVuSans.ttf'))
    widths, units = font['hmtx'], font['head'].unitsPerEm
    return {chr(code): widths[name][0]/units for code, name in font.getBestCmap().items()}


def width_of(words, size=SIZE, bold=False):
    "px that a line of words takes, raised and lowered letters counted at their size."
    plain, small = MARKUP.sub('', words), ''.join(part for _, part in MARKUP.findall(words))
    widths = letter_widths(bold)
    return size*(sum(widths[c] for c in plain) + SMALL*sum(widths[c] for c in small))


def escaped(words):
    return words.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')


def spans(words, size):
    "The inside of a <text>: raised and lowered letters as <tspan>."
    out, at, shift = '', 0, 0.
    for found in MARKUP.finditer(words):
        out += _span(words[at:found.start()], -shift)
        if found.start() > at: shift = 0.
        goal = .25*size if found[1] == '_' else -.4*size
        out += _span(found[2], goal - shift, SMALL*size)
        at, shift = found.end(), goal
    return out + _span(words[at:], -shift)


def _span(words, dy, size=None):
    if not words: return ''
    if not dy and size is None: return escaped(words)
    font_size = f' font-size="{number(size)}"' if size else ''
    return f'<tspan dy="{number(dy)}"{font_size}>{escaped(words)}</tspan>'


class Box(NamedTuple):
    "Where something was drawn, and the places at which arrows end."
    x: float
    y: float
    w: float
    h: float

    def side(self, name, share=.5): # share: from the top, or from the left
        x, y, w, h = self
        return {'left': (x, y + share*h), 'right': (x + w, y + share*h),
                'top': (x + share*w, y), 'bottom': (x + share*w, y + h)}[name]

    @property
    def left(self): return self.side('left')
    @property
    def right(self): return self.side('right')
    @property
    def top(self): return self.side('top')
    @property
    def bottom(self): return self.side('bottom')


def around(boxes, margin=0):
    "The box around several."
    x, y = min(b.x for b in boxes) - margin, min(b.y for b in boxes) - margin
    right, low = max(b.x + b.w for b in boxes) + margin, max(b.y + b.h for b in boxes) + margin
    return Box(x, y, right - x, low - y)


class Sheet:
    "A page to draw on. It remembers where words and lines are."
    def __init__(self, width, height, title):
        self.width, self.height, self.title, self.described = width, height, title, ''
        self.parts, self.words, self.lines = [], [], []

    # ---- elements

    def path(self, points, stroke=INK, width=1.2, dashes='', fill='none', close=False, keep=True):
        "A line through points; `keep`: no word may lie on it."
        d = 'M' + ' L'.join(f'{number(x)} {number(y)}' for x, y in points) + (' Z' if close else '')
        dash = f' stroke-dasharray="{dashes}"' if dashes else ''
        self.parts.append(f'<path d="{d}" fill="{fill}" stroke="{stroke}" '
                          f'stroke-width="{number(width)}"{dash}/>')
        if keep: self._remember([*points, points[0]] if close else points)

    def _remember(self, points): self.lines += zip(points, points[1:])

    def rect(self, x, y, w, h, fill='none', stroke='none', width=1., dashes='', corner=0, keep=False):
        dash = f' stroke-dasharray="{dashes}"' if dashes else ''
        self.parts.append(f'<rect x="{number(x)}" y="{number(y)}" width="{number(w)}" height="{number(h)}" '
                          f'rx="{number(corner)}" fill="{fill}" stroke="{stroke}" '
                          f'stroke-width="{number(width)}"{dash}/>')
        if keep: self._remember([(x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y)])
        return Box(x, y, w, h)

    def circle(self, x, y, r, fill='#FFFFFF', stroke=INK, width=1.2):
        self.parts.append(f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(r)}" fill="{fill}" '
                          f'stroke="{stroke}" stroke-width="{number(width)}"/>')

    def text(self, x, y, words, size=SIZE, anchor='middle', bold=False, color=INK, room=None, plate=None,
             turned=False, safe=False):
        """One line; `y` is the middle of its height. `plate`: a colored ground. `turned`: reads upwards.
        `safe`: what it lies on was meant."""
        w = width_of(words, size, bold)
        if room is not None and w > room: raise ValueError(f'{words!r} takes {w:.0f} px of {room:.0f}')
        left = x - w*{'start': 0, 'middle': .5, 'end': 1}[anchor]
        area = Box(left, y - .5*size, w, size)
        if turned: area = Box(x - .5*size, y - w/2, size, w)
        if plate: self.rect(area.x - 3, area.y - 1, area.w + 6, area.h + 2, fill=plate, corner=2)
        self.words.append((area, words, safe or bool(plate)))
        weight = ' font-weight="bold"' if bold else ''
        turn = f' transform="rotate(-90 {number(x)} {number(y)})"' if turned else ''
        self.parts.append(f'<text x="{number(x)}" y="{number(y + .36*size)}" font-size="{number(size)}" '
                          f'text-anchor="{anchor}" fill="{color}"{weight}{turn}>{spans(words, size)}</text>')
        return area

    # ---- what the drawings are made of

    def hatch(self, x, y, w, h, gap=7, color='#BDBDBD'):
        "Slanted lines: frozen."
        segments = []
        for k in range(1, int((w + h)/gap) + 1):
            c = k*gap                                        # the line x + y = c, inside the box
            a, b = (min(c, w), max(0, c - w)), (max(0, c - h), min(c, h))
            segments.append(f'M{number(x + a[0])} {number(y + a[1])} L{number(x + b[0])} {number(y + b[1])}')
        self.parts.append(f'<path d="{" ".join(segments)}" stroke="{color}" stroke-width="1" fill="none"/>')

    def box(self, x, y, w, h, lines=(), kind='plain', size=SIZE, bold=False, gap=None):
        "A box with lines of words in its middle; the first is bold if `bold`."
        fill, stroke, width, dashes, corner = LOOKS[kind]
        if kind == 'rule':
            upper = [(x, y + h/2), (x + 9, y), (x + w - 9, y), (x + w, y + h/2)]
            self.path([*upper, (x + w - 9, y + h), (x + 9, y + h)], stroke, width, fill=fill, close=True)
        else:
            self.rect(x, y, w, h, fill, 'none', corner=corner)
            if kind == 'frozen': self.hatch(x, y, w, h)
            self.rect(x, y, w, h, 'none', stroke, width, dashes, corner, keep=True)
        self.lines_at(x + w/2, y + h/2, lines, size, bold, gap, room=w - 5, plate=kind == 'frozen' and fill)
        return Box(x, y, w, h)

    def lines_at(self, x, y, lines, size=SIZE, bold=False, gap=None, room=None, plate=None, anchor='middle',
                 color=INK):
        "Lines of words, one below the other, around the height `y`."
        lines = [lines] if isinstance(lines, str) else list(lines)
        gap = gap or size + 4
        for k, words in enumerate(lines):
            at = y + (k - (len(lines) - 1)/2)*gap
            self.text(x, at, words, size, anchor, bold and k == 0, color, room, plate or None)

    def note(self, x, y, words):
        "Small gray words, one line or several; `y` is the middle of the first."
        lines = [words] if isinstance(words, str) else words
        for k, line in enumerate(lines): self.text(x, y + 16*k, line, 12, 'start', color=SOFT)

    def stack(self, x, y, w, h, n=3, step=4, fill='#FFFFFF', stroke=INK, lines=(), size=SIZE):
        "A tensor: sheets behind each other. The box is that of the front sheet."
        for k in range(n - 1, -1, -1):
            self.rect(x + k*step, y - k*step, w, h, fill, stroke, 1.1, corner=1, keep=k == 0)
        self.lines_at(x + w/2, y + h/2, lines, size, room=w - 4)
        return Box(x, y, w, h)

    def arrow(self, *points, color=INK, width=1.5, dashes='', head=True, keep=True):
        "A line with a head at its last point."
        (x0, y0), (x1, y1) = points[-2:]
        length = max(1e-6, ((x1 - x0)**2 + (y1 - y0)**2)**.5)
        ux, uy = (x1 - x0)/length, (y1 - y0)/length
        end = (x1 - 7*ux, y1 - 7*uy) if head else (x1, y1)
        self.path([*points[:-1], end], color, width, dashes, keep=keep)
        if not head: return
        wings = [(x1, y1), (x1 - 9*ux - 4.2*uy, y1 - 9*uy + 4.2*ux), (x1 - 9*ux + 4.2*uy, y1 - 9*uy - 4.2*ux)]
        self.path(wings, 'none', 0, fill=color, close=True, keep=False)

    def bracket(self, x0, x1, y, words, drop=6, size=12, below=True, color=SOFT):
        "A bracket under (or over) a stretch, with its name."
        sign = 1 if below else -1
        self.path([(x0, y), (x0, y + sign*drop), (x1, y + sign*drop), (x1, y)], color, 1)
        self.text((x0 + x1)/2, y + sign*(drop + 11), words, size, color=color)

    def badge(self, x, y, words, r=10, size=11, fill='#FFFFFF', stroke=INK):
        "A number in a circle."
        self.circle(x, y, r, fill, stroke)
        self.text(x, y, words, size, safe=True)

    # ---- the file

    def svg(self):
        "The file as text."
        w, h = number(self.width), number(self.height)
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" '
                f'role="img" font-family="{FAMILY}">\n<title>{escaped(self.title)}</title>\n'
                f'<desc>{escaped(self.described)}</desc>\n'
                f'<rect width="{w}" height="{h}" fill="#FFFFFF"/>\n')
        return head + '\n'.join(self.parts) + '\n</svg>\n'

    def clashes(self):
        "Words that leave the page, lie on other words, or are crossed by a line."
        found = []
        for k, (a, words, plate) in enumerate(self.words):
            if a.x < 4 or a.y < 2 or a.x + a.w > self.width - 4 or a.y + a.h > self.height - 2:
                found.append(f'{words!r} leaves the page')
            for b, other, _ in self.words[:k]:
                if overlap(a, b): found.append(f'{words!r} lies on {other!r}')
            if not plate and any(crosses(a, *line) for line in self.lines):
                found.append(f'{words!r} is crossed by a line')
        return found


def overlap(a, b):
    "Whether two areas share more than a pixel at their rims."
    wide = min(a.x + a.w, b.x + b.w) - max(a.x, b.x)
    tall = min(a.y + a.h, b.y + b.h) - max(a.y, b.y)
    return wide > 1 and tall > 1


def crosses(area, start, end):
    "Whether a line comes inside the area, less a pixel at its rim."
    low, high = 0., 1.                                   # the stretch of the line that is inside so far
    for at, side, a, b in ((area.x, area.w, start[0], end[0]), (area.y, area.h, start[1], end[1])):
        near, far = at + 1, at + side - 1
        if a == b:
            if not near < a < far: return False
            continue
        one, other = sorted(((near - a)/(b - a), (far - a)/(b - a)))
        low, high = max(low, one), min(high, other)
    return low < high
