"""Networks that become smaller: factorised, sparse, quantised or compressed layers."""

from coloss.ops import matricize as matricize
from coloss.ops import nuclear_norm as nuclear_norm
from coloss.ops import truncated_svd as truncated_svd

from .compressed_file import CompressedModel as CompressedModel
from .compressed_file import compress_model as compress_model
from .compressed_file import load_compressed as load_compressed
from .cost import multiply_adds as multiply_adds
from .cost import multiply_adds_per_position as multiply_adds_per_position
from .layer_choice import choose_layers as choose_layers
from .low_rank import DecomposedLayer as DecomposedLayer
from .low_rank import decompose as decompose
from .low_rank import decompose_model as decompose_model
from .low_rank import refresh_batch_norm as refresh_batch_norm
from .low_rank import select_layers as select_layers
from .projection import low_rank_matrix as low_rank_matrix
from .projection import low_rank_weight as low_rank_weight
from .projection import nuclear_subgradient as nuclear_subgradient
from .projection import tangent_component as tangent_component
from .size_report import CompressionReport as CompressionReport
from .size_report import compression_report as compression_report
from .stored_weights import CodebookWeight as CodebookWeight
from .stored_weights import DenseWeight as DenseWeight
from .stored_weights import LowRankWeight as LowRankWeight
from .stored_weights import NMSparseWeight as NMSparseWeight
from .stored_weights import SparseWeight as SparseWeight
from .stored_weights import StoredWeight as StoredWeight
from .stored_weights import store_exactly as store_exactly
from .trained_rank_pruning import TrainedRankPruning as TrainedRankPruning
from .trained_rank_pruning import nuclear_norm_loss as nuclear_norm_loss

__all__ = [
    "CodebookWeight",
    "CompressedModel",
    "CompressionReport",
    "DecomposedLayer",
    "DenseWeight",
    "LowRankWeight",
    "NMSparseWeight",
    "SparseWeight",
    "StoredWeight",
    "TrainedRankPruning",
    "choose_layers",
    "compress_model",
    "compression_report",
    "decompose",
    "decompose_model",
    "load_compressed",
    "low_rank_matrix",
    "low_rank_weight",
    "matricize",
    "multiply_adds",
    "multiply_adds_per_position",
    "nuclear_norm",
    "nuclear_norm_loss",
    "nuclear_subgradient",
    "refresh_batch_norm",
    "select_layers",
    "store_exactly",
    "tangent_component",
    "truncated_svd",
]
