"""Networks that become smaller: factorised, sparse, quantised or compressed layers."""

from coloss.ops import matricize as matricize
from coloss.ops import nuclear_norm as nuclear_norm
from coloss.ops import truncated_svd as truncated_svd

from .adam_s import AdamS as AdamS
from .bf16_codec import DFloat11Tensor as DFloat11Tensor
from .bf16_codec import ExponentStats as ExponentStats
from .bf16_codec import encode_bf16 as encode_bf16
from .bf16_codec import exponent_stats as exponent_stats
from .binary_layers import BinaryConv2d as BinaryConv2d
from .binary_layers import BinaryLinear as BinaryLinear
from .binary_layers import SignActivation as SignActivation
from .binary_layers import estimating_error as estimating_error
from .binary_layers import gradient_stability as gradient_stability
from .binary_training import Binarization as Binarization
from .binary_training import binarize_layers as binarize_layers
from .binary_training import power_at as power_at
from .binary_training import ship_binary_layers as ship_binary_layers
from .cached_loss import cached_loss as cached_loss
from .codebook import Codebook as Codebook
from .codebook import GroupedCodebookWeight as GroupedCodebookWeight
from .codebook import group_rows as group_rows
from .codebook import groups_within as groups_within
from .codebook import kmeans_codebook as kmeans_codebook
from .codebook_layers import CodebookConv2d as CodebookConv2d
from .codebook_layers import CodebookLinear as CodebookLinear
from .codebook_layers import run_from_codes as run_from_codes
from .codebook_learning import CodeSearch as CodeSearch
from .codebook_learning import LearnedCodebook as LearnedCodebook
from .codebook_learning import learn_codebook as learn_codebook
from .compressed_checkpoint import CheckpointReport as CheckpointReport
from .compressed_checkpoint import CompressedCheckpoint as CompressedCheckpoint
from .compressed_checkpoint import StoredTensor as StoredTensor
from .compressed_checkpoint import compress_checkpoint as compress_checkpoint
from .compressed_checkpoint import decompress_checkpoint as decompress_checkpoint
from .compressed_file import CompressedModel as CompressedModel
from .compressed_file import compress_model as compress_model
from .compressed_file import load_compressed as load_compressed
from .cost import multiply_adds as multiply_adds
from .cost import multiply_adds_per_position as multiply_adds_per_position
from .dfloat11 import BFloat16Storage as BFloat16Storage
from .dynamic_token_pruning import DynamicTokenPruning as DynamicTokenPruning
from .dynamic_token_pruning_recipe import load_token_pruning as load_token_pruning
from .dynamic_token_pruning_recipe import train_token_pruning as train_token_pruning
from .early_exit_models import EarlyExitLanguageModel as EarlyExitLanguageModel
from .early_exit_models import EarlyExitSegmenter as EarlyExitSegmenter
from .early_exit_models import QueryMasks as QueryMasks
from .early_exit_models import early_exit_cost as early_exit_cost
from .early_exit_models import evaluate_segmenter as evaluate_segmenter
from .early_exit_models import segmentation_loss as segmentation_loss
from .gradual_sparsifier import GradualSparsifier as GradualSparsifier
from .gradual_sparsifier import scheduled_density as scheduled_density
from .group_quantization import QuantizedGroups as QuantizedGroups
from .group_quantization import quantize_groups as quantize_groups
from .int8_artefact import Int8Artefact as Int8Artefact
from .int8_artefact import IntegerWeight as IntegerWeight
from .int8_artefact import PerPrecisionWeight as PerPrecisionWeight
from .int8_artefact import export_int8 as export_int8
from .int8_artefact import load_int8 as load_int8
from .joint_precision import DoubleRounding as DoubleRounding
from .joint_precision import JointPrecisionStep as JointPrecisionStep
from .just_in_time import CodedMemory as CodedMemory
from .just_in_time import coded_memory as coded_memory
from .just_in_time import compress_module_ as compress_module_
from .just_in_time import decompress_module_ as decompress_module_
from .just_in_time import open_compressed as open_compressed
from .layer_choice import choose_layers as choose_layers
from .layer_reconstruction import LayerProblem as LayerProblem
from .layer_reconstruction import LayerReconstruction as LayerReconstruction
from .layer_reconstruction import OutputMoments as OutputMoments
from .learned_codebooks import LearnedCodebooks as LearnedCodebooks
from .learned_codebooks import compress_with_codebooks as compress_with_codebooks
from .low_rank import DecomposedLayer as DecomposedLayer
from .low_rank import decompose as decompose
from .low_rank import decompose_model as decompose_model
from .low_rank import refresh_batch_norm as refresh_batch_norm
from .low_rank import select_layers as select_layers
from .masked_weight import MaskedWeight as MaskedWeight
from .mixed_precision import allocate_bits as allocate_bits
from .mixed_precision import draw_bits as draw_bits
from .mixed_precision import hessian_trace as hessian_trace
from .mixed_precision import quantization_errors as quantization_errors
from .mixed_precision import redraw_probability as redraw_probability
from .mixed_precision import roulette as roulette
from .multibit_quantizers import ActivationQuantizer as ActivationQuantizer
from .multibit_quantizers import MultiBitQuantizer as MultiBitQuantizer
from .multibit_quantizers import QuantizedInput as QuantizedInput
from .neuron_order import permute_neurons as permute_neurons
from .nm_sparsity import MaskedToKept as MaskedToKept
from .nm_sparsity import SemiStructured as SemiStructured
from .nm_sparsity import choose_nm_layers as choose_nm_layers
from .nm_sparsity import decay_budget as decay_budget
from .nm_sparsity import finalize_nm_ as finalize_nm_
from .nm_sparsity import masked_to_kept_ratio as masked_to_kept_ratio
from .nm_sparsity import nm_parameter_groups as nm_parameter_groups
from .nm_sparsity import nm_violations as nm_violations
from .nm_sparsity import semi_structured_ as semi_structured_
from .precision_calibration import calibrate_precision as calibrate_precision
from .projection import low_rank_matrix as low_rank_matrix
from .projection import low_rank_weight as low_rank_weight
from .projection import nuclear_subgradient as nuclear_subgradient
from .projection import tangent_component as tangent_component
from .pruned_layers import LayerSparsity as LayerSparsity
from .pruned_layers import prune_by_magnitude as prune_by_magnitude
from .pruned_layers import sparsity_report as sparsity_report
from .quantized_cache import CachedReader as CachedReader
from .quantized_cache import QuantizedCache as QuantizedCache
from .rank_based_pruning import RankBasedPruning as RankBasedPruning
from .row_group_scale import RowGroupScale as RowGroupScale
from .scale_optimizer import ScaleAdam as ScaleAdam
from .scale_optimizer import adaptive_scale_rate as adaptive_scale_rate
from .scale_optimizer import precision_rate_factor as precision_rate_factor
from .second_optimizer import SecondOptimizer as SecondOptimizer
from .semi_structured_training import SemiStructuredSparsity as SemiStructuredSparsity
from .size_report import CompressionReport as CompressionReport
from .size_report import compression_report as compression_report
from .staircase_cache import StaircaseCache as StaircaseCache
from .staircase_cache import StaircaseKVCache as StaircaseKVCache
from .stored_factors import store_low_rank as store_low_rank
from .stored_weights import CodebookWeight as CodebookWeight
from .stored_weights import DenseWeight as DenseWeight
from .stored_weights import LowRankWeight as LowRankWeight
from .stored_weights import NMSparseWeight as NMSparseWeight
from .stored_weights import SparseWeight as SparseWeight
from .stored_weights import StoredWeight as StoredWeight
from .stored_weights import store_exactly as store_exactly
from .switchable_layers import SwitchableBatchNorm as SwitchableBatchNorm
from .switchable_layers import SwitchableConv1d as SwitchableConv1d
from .switchable_layers import SwitchableConv2d as SwitchableConv2d
from .switchable_layers import SwitchableConv3d as SwitchableConv3d
from .switchable_layers import SwitchableLinear as SwitchableLinear
from .switchable_layers import bits_of as bits_of
from .switchable_layers import make_switchable as make_switchable
from .switchable_layers import set_bits as set_bits
from .switchable_layers import to_plain as to_plain
from .token_early_exit import EarlyExitOutputs as EarlyExitOutputs
from .token_early_exit import TokenEarlyExit as TokenEarlyExit
from .token_early_exit import token_multiply_adds as token_multiply_adds
from .trained_rank_pruning import TrainedRankPruning as TrainedRankPruning
from .trained_rank_pruning import nuclear_norm_loss as nuclear_norm_loss

__all__ = [
    "ActivationQuantizer",
    "AdamS",
    "BFloat16Storage",
    "Binarization",
    "BinaryConv2d",
    "BinaryLinear",
    "CachedReader",
    "CheckpointReport",
    "CodeSearch",
    "Codebook",
    "CodebookConv2d",
    "CodebookLinear",
    "CodebookWeight",
    "CodedMemory",
    "CompressedCheckpoint",
    "CompressedModel",
    "CompressionReport",
    "DFloat11Tensor",
    "DecomposedLayer",
    "DenseWeight",
    "DoubleRounding",
    "DynamicTokenPruning",
    "EarlyExitLanguageModel",
    "EarlyExitOutputs",
    "EarlyExitSegmenter",
    "ExponentStats",
    "GradualSparsifier",
    "GroupedCodebookWeight",
    "Int8Artefact",
    "IntegerWeight",
    "JointPrecisionStep",
    "LayerProblem",
    "LayerReconstruction",
    "LayerSparsity",
    "LearnedCodebook",
    "LearnedCodebooks",
    "LowRankWeight",
    "MaskedToKept",
    "MaskedWeight",
    "MultiBitQuantizer",
    "NMSparseWeight",
    "OutputMoments",
    "PerPrecisionWeight",
    "QuantizedCache",
    "QuantizedGroups",
    "QuantizedInput",
    "QueryMasks",
    "RankBasedPruning",
    "RowGroupScale",
    "ScaleAdam",
    "SecondOptimizer",
    "SemiStructured",
    "SemiStructuredSparsity",
    "SignActivation",
    "SparseWeight",
    "StaircaseCache",
    "StaircaseKVCache",
    "StoredTensor",
    "StoredWeight",
    "SwitchableBatchNorm",
    "SwitchableConv1d",
    "SwitchableConv2d",
    "SwitchableConv3d",
    "SwitchableLinear",
    "TokenEarlyExit",
    "TrainedRankPruning",
    "adaptive_scale_rate",
    "allocate_bits",
    "binarize_layers",
    "bits_of",
    "cached_loss",
    "calibrate_precision",
    "choose_layers",
    "choose_nm_layers",
    "coded_memory",
    "compress_checkpoint",
    "compress_model",
    "compress_module_",
    "compress_with_codebooks",
    "compression_report",
    "decay_budget",
    "decompose",
    "decompose_model",
    "decompress_checkpoint",
    "decompress_module_",
    "draw_bits",
    "early_exit_cost",
    "encode_bf16",
    "estimating_error",
    "evaluate_segmenter",
    "exponent_stats",
    "export_int8",
    "finalize_nm_",
    "gradient_stability",
    "group_rows",
    "groups_within",
    "hessian_trace",
    "kmeans_codebook",
    "learn_codebook",
    "load_compressed",
    "load_int8",
    "load_token_pruning",
    "low_rank_matrix",
    "low_rank_weight",
    "make_switchable",
    "masked_to_kept_ratio",
    "matricize",
    "multiply_adds",
    "multiply_adds_per_position",
    "nm_parameter_groups",
    "nm_violations",
    "nuclear_norm",
    "nuclear_norm_loss",
    "nuclear_subgradient",
    "open_compressed",
    "permute_neurons",
    "power_at",
    "precision_rate_factor",
    "prune_by_magnitude",
    "quantization_errors",
    "quantize_groups",
    "redraw_probability",
    "refresh_batch_norm",
    "roulette",
    "run_from_codes",
    "scheduled_density",
    "segmentation_loss",
    "select_layers",
    "semi_structured_",
    "set_bits",
    "ship_binary_layers",
    "sparsity_report",
    "store_exactly",
    "store_low_rank",
    "tangent_component",
    "to_plain",
    "token_multiply_adds",
    "train_token_pruning",
    "truncated_svd",
]
