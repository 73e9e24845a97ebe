"""Pure tensor functions from which losses, metrics and methods are built."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
