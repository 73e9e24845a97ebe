"""Contrastive learning: embeddings in which what belongs together is near and what does not is far."""

from .adaptive_losses import AdaptiveMultiHeadLoss as AdaptiveMultiHeadLoss
from .adaptive_losses import adaptive_barlow_twins_loss as adaptive_barlow_twins_loss
from .adaptive_losses import adaptive_contrastive_loss as adaptive_contrastive_loss
from .adaptive_losses import adaptive_simsiam_loss as adaptive_simsiam_loss
from .adaptive_losses import omega as omega
from .adaptive_multi_head import AdaptiveMultiHead as AdaptiveMultiHead
from .adaptive_multi_head import similarity_overlap as similarity_overlap
from .clip import LogitScale as LogitScale
from .clip import MultiViewClipLoss as MultiViewClipLoss
from .clip import clip_loss as clip_loss
from .cross_modal import CrossModalHeads as CrossModalHeads
from .cross_modal import cross_modal_barlow_loss as cross_modal_barlow_loss
from .cross_modal import cross_modal_simsiam_loss as cross_modal_simsiam_loss
from .cross_modal import swap_assign_loss as swap_assign_loss
from .embedding_monitor import EmbeddingMonitor as EmbeddingMonitor
from .episode_losses import ICNNLoss as ICNNLoss
from .episode_losses import ProtoTripletLoss as ProtoTripletLoss
from .episode_losses import proto_triplet_loss as proto_triplet_loss
from .episodic_training import EpisodicTraining as EpisodicTraining
from .global_contrastive import GlobalContrastiveLoss as GlobalContrastiveLoss
from .global_contrastive import decaying_gamma as decaying_gamma
from .global_contrastive import log_mean_contrast as log_mean_contrast
from .image_text import OPENMOJI_PROMPTS as OPENMOJI_PROMPTS
from .image_text import ClipObjective as ClipObjective
from .image_text import ProjectedEncoder as ProjectedEncoder
from .image_text import class_embeddings as class_embeddings
from .image_text import evaluate_image_text as evaluate_image_text
from .image_text import image_text_model as image_text_model
from .image_text import image_text_task as image_text_task
from .image_text_views import CaptionViews as CaptionViews
from .image_text_views import TextAugment as TextAugment
from .image_text_views import WordAugment as WordAugment
from .image_text_views import strong_image_views as strong_image_views
from .individual_temperatures import BimodalGlobalContrastive as BimodalGlobalContrastive
from .individual_temperatures import GlobalContrastive as GlobalContrastive
from .labelled_pairs import PairLoss as PairLoss
from .labelled_pairs import mean_pair_loss as mean_pair_loss
from .labelled_pairs import pair_loss as pair_loss
from .lightweight_clip import LightweightCLIP as LightweightCLIP
from .local_negatives import LocalNegativesWarning as LocalNegativesWarning
from .masked_words import FusedMaskedLM as FusedMaskedLM
from .masked_words import ImageFusion as ImageFusion
from .masked_words import mask_tokens as mask_tokens
from .meta_nodes import MetaNodeContrast as MetaNodeContrast
from .meta_nodes import meta_node_contrast_loss as meta_node_contrast_loss
from .meta_nodes import meta_nodes as meta_nodes
from .metric_mix import MetricMix as MetricMix
from .mixup_contrast import MixedPairs as MixedPairs
from .mixup_contrast import MultimodalMixupLoss as MultimodalMixupLoss
from .mixup_contrast import UnimodalHeads as UnimodalHeads
from .mixup_contrast import mixup_contrastive_loss as mixup_contrastive_loss
from .mixup_contrast import mixup_pairs as mixup_pairs
from .multi_head import FeaturePairTemperature as FeaturePairTemperature
from .multi_head import MultiHeadProjector as MultiHeadProjector
from .multi_head import PairTemperature as PairTemperature
from .multi_view_clip import MultiViewClip as MultiViewClip
from .multimodal_mixup import MultimodalMixup as MultimodalMixup
from .node_graph import influence as influence
from .node_graph import knn_graph as knn_graph
from .nt_xent import NTXent as NTXent
from .nt_xent import nt_xent_loss as nt_xent_loss
from .pair_loss_forms import PAIR_LOSSES as PAIR_LOSSES
from .pair_loss_forms import contrastive as contrastive
from .pair_loss_forms import euclidean_contrastive as euclidean_contrastive
from .pair_loss_forms import find_pair_loss as find_pair_loss
from .pair_loss_forms import lifted_structure as lifted_structure
from .pair_loss_forms import multi_similarity as multi_similarity
from .pair_loss_forms import nca as nca
from .pair_loss_forms import proxy_anchor as proxy_anchor
from .pair_mixing import AnchoredMixes as AnchoredMixes
from .pair_mixing import metric_mix_loss as metric_mix_loss
from .pair_mixing import mixed_pair_loss as mixed_pair_loss
from .pair_mixing import mixed_pairs as mixed_pairs
from .pair_mixing import mixed_similarities as mixed_similarities
from .pair_mixing import utilization as utilization
from .pamc import MetaNodeViews as MetaNodeViews
from .pamc import PamC as PamC
from .pretext import JigsawHead as JigsawHead
from .pretext import JigsawPretext as JigsawPretext
from .pretext import Pretext as Pretext
from .pretext import RotationPretext as RotationPretext
from .pretext_images import jigsaw_permutations as jigsaw_permutations
from .pretext_images import rotated_copies as rotated_copies
from .pretext_images import shuffled_tiles as shuffled_tiles
from .scatsimclr import ScatSimCLR as ScatSimCLR
from .scattering import ADAPTERS as ADAPTERS
from .scattering import ResidualAdapter as ResidualAdapter
from .scattering import ScatteringEncoder as ScatteringEncoder
from .scattering import ScatteringFront as ScatteringFront
from .scattering import scattering_channels as scattering_channels
from .scattering import scattering_encoder as scattering_encoder
from .simple_contrast import simple_contrastive_loss as simple_contrastive_loss
from .soft_clip import soft_clip_loss as soft_clip_loss
from .soft_clip import soft_target_clip_loss as soft_target_clip_loss
from .soft_targets import progressive_softening as progressive_softening
from .soft_targets import soft_targets as soft_targets
from .soft_targets import softened_targets as softened_targets
from .student_assignment import StudentTAssignment as StudentTAssignment
from .student_assignment import k_means as k_means
from .student_assignment import log_assignments as log_assignments
from .student_assignment import sharpened_target as sharpened_target
from .temperature import effective_negatives as effective_negatives
from .temperature import negative_weights as negative_weights
from .temperature import weight_entropy as weight_entropy
from .temperature_report import TemperatureReport as TemperatureReport
from .temperature_report import TemperatureRow as TemperatureRow
from .temperature_report import temperature_report as temperature_report
from .token_matching import match_tokens as match_tokens
from .token_matching import token_contrastive_loss as token_contrastive_loss
from .token_matching import token_similarity as token_similarity

__all__ = [
    "ADAPTERS",
    "AdaptiveMultiHead",
    "AdaptiveMultiHeadLoss",
    "AnchoredMixes",
    "BimodalGlobalContrastive",
    "CaptionViews",
    "ClipObjective",
    "CrossModalHeads",
    "EmbeddingMonitor",
    "EpisodicTraining",
    "FeaturePairTemperature",
    "FusedMaskedLM",
    "GlobalContrastive",
    "GlobalContrastiveLoss",
    "ICNNLoss",
    "ImageFusion",
    "JigsawHead",
    "JigsawPretext",
    "LightweightCLIP",
    "LocalNegativesWarning",
    "LogitScale",
    "MetaNodeContrast",
    "MetaNodeViews",
    "MetricMix",
    "MixedPairs",
    "MultiHeadProjector",
    "MultiViewClip",
    "MultiViewClipLoss",
    "MultimodalMixup",
    "MultimodalMixupLoss",
    "NTXent",
    "OPENMOJI_PROMPTS",
    "PAIR_LOSSES",
    "PairLoss",
    "PairTemperature",
    "PamC",
    "ProjectedEncoder",
    "ProtoTripletLoss",
    "ResidualAdapter",
    "Pretext",
    "RotationPretext",
    "ScatSimCLR",
    "ScatteringEncoder",
    "ScatteringFront",
    "StudentTAssignment",
    "TemperatureReport",
    "TemperatureRow",
    "TextAugment",
    "UnimodalHeads",
    "WordAugment",
    "adaptive_barlow_twins_loss",
    "adaptive_contrastive_loss",
    "adaptive_simsiam_loss",
    "class_embeddings",
    "clip_loss",
    "contrastive",
    "cross_modal_barlow_loss",
    "cross_modal_simsiam_loss",
    "decaying_gamma",
    "effective_negatives",
    "euclidean_contrastive",
    "evaluate_image_text",
    "find_pair_loss",
    "image_text_model",
    "image_text_task",
    "influence",
    "jigsaw_permutations",
    "k_means",
    "knn_graph",
    "lifted_structure",
    "log_assignments",
    "log_mean_contrast",
    "mask_tokens",
    "match_tokens",
    "mean_pair_loss",
    "meta_node_contrast_loss",
    "meta_nodes",
    "metric_mix_loss",
    "mixed_pair_loss",
    "mixed_pairs",
    "mixed_similarities",
    "mixup_contrastive_loss",
    "mixup_pairs",
    "multi_similarity",
    "nca",
    "negative_weights",
    "nt_xent_loss",
    "omega",
    "pair_loss",
    "progressive_softening",
    "proto_triplet_loss",
    "proxy_anchor",
    "rotated_copies",
    "scattering_channels",
    "scattering_encoder",
    "sharpened_target",
    "shuffled_tiles",
    "similarity_overlap",
    "simple_contrastive_loss",
    "soft_clip_loss",
    "soft_target_clip_loss",
    "soft_targets",
    "softened_targets",
    "strong_image_views",
    "swap_assign_loss",
    "temperature_report",
    "token_contrastive_loss",
    "token_similarity",
    "utilization",
    "weight_entropy",
]
