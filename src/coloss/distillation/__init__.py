"""Distillation: one network learns from another."""

from coloss.ops import batch_label_entropy as batch_label_entropy
from coloss.ops import binary_kl_loss as binary_kl_loss
from coloss.ops import disagreement as disagreement
from coloss.ops import dist_loss as dist_loss
from coloss.ops import distillation_kl_loss as distillation_kl_loss
from coloss.ops import dkd_loss as dkd_loss
from coloss.ops import gradient_cosine as gradient_cosine
from coloss.ops import gumbel_noise as gumbel_noise
from coloss.ops import joint_labels as joint_labels
from coloss.ops import logit_gap_loss as logit_gap_loss
from coloss.ops import marginal_logits as marginal_logits
from coloss.ops import project_conflicting as project_conflicting
from coloss.ops import rotate4 as rotate4
from coloss.ops import soft_embed as soft_embed
from coloss.ops import standardized_logits as standardized_logits
from coloss.ops import straight_through_tokens as straight_through_tokens
from coloss.ops import transform_copies as transform_copies

from .augmented_local_heads import AugmentedLocalLearning as AugmentedLocalLearning
from .augmented_local_heads import augmented_head as augmented_head
from .augmented_local_heads import augmented_layers as augmented_layers
from .augmented_local_heads import pyramid_depths as pyramid_depths
from .augmented_local_heads import residual_layer as residual_layer
from .augmented_local_heads import uniform_layer_indices as uniform_layer_indices
from .block_counts import BlockCount as BlockCount
from .block_counts import block_count_table as block_count_table
from .block_counts import step_bytes as step_bytes
from .cache_predictor import KVCachePredictor as KVCachePredictor
from .cache_predictor import kept_layers as kept_layers
from .cache_predictor import kv_cache_loss as kv_cache_loss
from .cache_predictor import pruned_copy as pruned_copy
from .cache_predictor import uniform_layer_map as uniform_layer_map
from .conflict_audit import audit_conflict as audit_conflict
from .conflict_report import Agreement as Agreement
from .conflict_report import ConflictReport as ConflictReport
from .conflict_report import conflict_report as conflict_report
from .cycle_training import CurvePoint as CurvePoint
from .cycle_training import StagedRun as StagedRun
from .cycle_training import flops_to_reach as flops_to_reach
from .cycle_training import train_in_stages as train_in_stages
from .data_free_distillation import DataFreeDistillation as DataFreeDistillation
from .data_free_distillation import student_and_rewriter_adamw as student_and_rewriter_adamw
from .data_free_recipe import DataFreeLengths as DataFreeLengths
from .data_free_recipe import TextTask as TextTask
from .data_free_recipe import distill_without_data as distill_without_data
from .data_free_recipe import public_texts as public_texts
from .data_free_recipe import small_text_classifier as small_text_classifier
from .data_free_recipe import text_task as text_task
from .distillation_networks import distillation_network as distillation_network
from .distillation_networks import instance_norm_network as instance_norm_network
from .distillation_plan import DistillationPlan as DistillationPlan
from .distillation_plan import plan_for as plan_for
from .distillation_recipe import distill_dataset as distill_dataset
from .distillation_recipe import distill_splits as distill_splits
from .distilled_dataset import DistilledDataset as DistilledDataset
from .dual_head import DualHead as DualHead
from .dual_head import DualHeadDistillation as DualHeadDistillation
from .dual_head import auxiliary_head as auxiliary_head
from .expert_trajectories import input_gradient_penalty as input_gradient_penalty
from .expert_trajectories import loss_ramp as loss_ramp
from .expert_trajectories import record_trajectory as record_trajectory
from .expert_trajectories import step_lengths as step_lengths
from .feature_distillation import FeatureDistillation as FeatureDistillation
from .fresh_networks import FreshAccuracy as FreshAccuracy
from .fresh_networks import evaluate_distilled as evaluate_distilled
from .fresh_networks import evaluate_references as evaluate_references
from .fresh_networks import train_on_distilled as train_on_distilled
from .image_decoder import ImageDecoder as ImageDecoder
from .image_decoder import convolutional_head as convolutional_head
from .kv_prediction import KVPredictedLM as KVPredictedLM
from .kv_prediction import KVPredictionOutputs as KVPredictionOutputs
from .kv_prediction import continuation_loss as continuation_loss
from .kv_prediction import first_token_logits as first_token_logits
from .kv_prediction import first_token_operations as first_token_operations
from .kv_prediction import kv_prediction_terms as kv_prediction_terms
from .kv_prediction_recipe import first_token_milliseconds as first_token_milliseconds
from .kv_prediction_recipe import load_kv_prediction as load_kv_prediction
from .kv_prediction_recipe import train_kv_prediction as train_kv_prediction
from .layer_branches import Branch as Branch
from .layer_branches import BranchOutputs as BranchOutputs
from .layer_branches import layer_feature_loss as layer_feature_loss
from .layer_branches import layer_kl_loss as layer_kl_loss
from .layer_branches import stage_branches as stage_branches
from .local_learning import LocalHead as LocalHead
from .local_learning import LocalLearning as LocalLearning
from .local_learning import block_ends as block_ends
from .logit_distillation import LogitDistillation as LogitDistillation
from .logit_losses import LogitLoss as LogitLoss
from .logit_losses import logit_loss as logit_loss
from .logit_losses import standardized_kl_loss as standardized_kl_loss
from .momentum_heads import MomentumAuxHead as MomentumAuxHead
from .momentum_heads import MomentumLocalLearning as MomentumLocalLearning
from .momentum_heads import block_weights as block_weights
from .multilevel_training import train_multilevel as train_multilevel
from .multilevel_training import two_level_cycle as two_level_cycle
from .network_layers import Layer as Layer
from .network_layers import find_layers as find_layers
from .network_layers import read_layers as read_layers
from .optimizer_growth import map_optimizer_state as map_optimizer_state
from .past_predictions import PredictionMemory as PredictionMemory
from .past_predictions import soften_targets as soften_targets
from .representatives import kmeans_centres as kmeans_centres
from .representatives import kmeans_representatives as kmeans_representatives
from .representatives import random_representatives as random_representatives
from .self_distillation import LayeredSelfDistillation as LayeredSelfDistillation
from .self_distillation import ProgressiveSelfDistillation as ProgressiveSelfDistillation
from .self_distillation_loss import SelfDistillationLoss as SelfDistillationLoss
from .teacher import TeacherLogits as TeacherLogits
from .teacher import tabulate_teacher_logits as tabulate_teacher_logits
from .token_generator import RewritingPretraining as RewritingPretraining
from .token_generator import TextRewriter as TextRewriter
from .token_generator import Written as Written
from .token_generator import distinct_share as distinct_share
from .token_generator import hide_words as hide_words
from .token_generator import read_tokens as read_tokens
from .token_generator import word_embedding as word_embedding
from .token_generator import write_texts as write_texts
from .trajectory_matching import TrajectoryMatcher as TrajectoryMatcher
from .trajectory_matching import balance_factor as balance_factor
from .trajectory_matching import perturb_weights as perturb_weights
from .trajectory_matching import trajectory_matching_loss as trajectory_matching_loss
from .transformer_growth import TransformerSizes as TransformerSizes
from .transformer_growth import coalesce as coalesce
from .transformer_growth import coalescing_map as coalescing_map
from .transformer_growth import grow as grow
from .transformer_growth import growing_map as growing_map
from .transformer_growth import prune_layers as prune_layers
from .transformer_layouts import TransformerLayout as TransformerLayout
from .transformer_layouts import bert_layout as bert_layout
from .transformer_layouts import causal_language_model_layout as causal_language_model_layout
from .transformer_layouts import encoder_layout as encoder_layout
from .transformer_layouts import gpt2_layout as gpt2_layout
from .v_cycle import Stage as Stage
from .v_cycle import VCycle as VCycle
from .v_cycle import cycle_steps as cycle_steps
from .v_cycle import training_flops as training_flops

__all__ = [
    "Agreement",
    "AugmentedLocalLearning",
    "BlockCount",
    "Branch",
    "BranchOutputs",
    "ConflictReport",
    "CurvePoint",
    "DataFreeDistillation",
    "DataFreeLengths",
    "DistillationPlan",
    "DistilledDataset",
    "DualHead",
    "DualHeadDistillation",
    "FeatureDistillation",
    "FreshAccuracy",
    "ImageDecoder",
    "KVCachePredictor",
    "KVPredictedLM",
    "KVPredictionOutputs",
    "Layer",
    "LayeredSelfDistillation",
    "LocalHead",
    "LocalLearning",
    "LogitDistillation",
    "LogitLoss",
    "MomentumAuxHead",
    "MomentumLocalLearning",
    "PredictionMemory",
    "ProgressiveSelfDistillation",
    "RewritingPretraining",
    "SelfDistillationLoss",
    "Stage",
    "StagedRun",
    "TeacherLogits",
    "TextRewriter",
    "TextTask",
    "TrajectoryMatcher",
    "TransformerLayout",
    "TransformerSizes",
    "VCycle",
    "Written",
    "audit_conflict",
    "augmented_head",
    "augmented_layers",
    "auxiliary_head",
    "balance_factor",
    "batch_label_entropy",
    "bert_layout",
    "binary_kl_loss",
    "block_count_table",
    "block_ends",
    "block_weights",
    "causal_language_model_layout",
    "coalesce",
    "coalescing_map",
    "conflict_report",
    "continuation_loss",
    "convolutional_head",
    "cycle_steps",
    "disagreement",
    "dist_loss",
    "distill_dataset",
    "distill_splits",
    "distill_without_data",
    "distillation_kl_loss",
    "distillation_network",
    "distinct_share",
    "dkd_loss",
    "encoder_layout",
    "evaluate_distilled",
    "evaluate_references",
    "find_layers",
    "first_token_logits",
    "first_token_milliseconds",
    "first_token_operations",
    "flops_to_reach",
    "gpt2_layout",
    "gradient_cosine",
    "grow",
    "growing_map",
    "gumbel_noise",
    "hide_words",
    "input_gradient_penalty",
    "instance_norm_network",
    "joint_labels",
    "kept_layers",
    "kmeans_centres",
    "kmeans_representatives",
    "kv_cache_loss",
    "kv_prediction_terms",
    "layer_feature_loss",
    "layer_kl_loss",
    "load_kv_prediction",
    "logit_gap_loss",
    "logit_loss",
    "loss_ramp",
    "map_optimizer_state",
    "marginal_logits",
    "perturb_weights",
    "plan_for",
    "project_conflicting",
    "prune_layers",
    "pruned_copy",
    "public_texts",
    "pyramid_depths",
    "random_representatives",
    "read_layers",
    "read_tokens",
    "record_trajectory",
    "residual_layer",
    "rotate4",
    "small_text_classifier",
    "soft_embed",
    "soften_targets",
    "stage_branches",
    "standardized_kl_loss",
    "standardized_logits",
    "step_bytes",
    "step_lengths",
    "straight_through_tokens",
    "student_and_rewriter_adamw",
    "tabulate_teacher_logits",
    "text_task",
    "train_in_stages",
    "train_kv_prediction",
    "train_multilevel",
    "train_on_distilled",
    "training_flops",
    "trajectory_matching_loss",
    "transform_copies",
    "two_level_cycle",
    "uniform_layer_indices",
    "uniform_layer_map",
    "word_embedding",
    "write_texts",
]
