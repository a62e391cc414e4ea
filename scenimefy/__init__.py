__version__ = "0.1.0"

from scenimefy.front import open_front

open_front(__name__)
