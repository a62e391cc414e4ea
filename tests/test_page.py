"Pictures on a page."
import pytest
from PIL import Image

from scenimefy.page import shrink


@pytest.mark.parametrize('size, small', [((100, 20), (50, 10)), ((20, 100), (10, 50)), ((80, 80), (50, 50)), ((1, 500), (1, 50)),
                                         ((50, 7), (50, 7)), ((3, 4), (3, 4))])
def test_the_longer_side_decides(size, small):
    "Wide or tall: neither side is longer than asked for, and nothing is enlarged."
    assert shrink(Image.new('RGB', size), 50).size == small
