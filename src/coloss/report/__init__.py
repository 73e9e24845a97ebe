"""What a comparison found, for a reader: a ranking, a self-contained HTML page, a figure for documents."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
