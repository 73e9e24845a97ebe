"""Contrastive learning: embeddings in which what belongs together is near and what does not is far."""

from .nt_xent import NTXent as NTXent
from .nt_xent import nt_xent_loss as nt_xent_loss

__all__ = [
    "NTXent",
    "nt_xent_loss",
]
