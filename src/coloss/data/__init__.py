"""Data: sets by name, from files or folders of a user, batches with stable ids, samplers and augmented views."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
