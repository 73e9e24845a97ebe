"""Bodies that move: encoders of skeletons, words for motion, poses lifted from images, repetitions counted."""

from coloss.motion.cameras import PinholeCamera as PinholeCamera
from coloss.motion.cameras import Viewpoints as Viewpoints
from coloss.motion.cameras import pixel_coordinates as pixel_coordinates
from coloss.motion.cameras import ring_viewpoints as ring_viewpoints
from coloss.motion.cameras import screen_coordinates as screen_coordinates
from coloss.motion.hop_graph_former import HopAggregate as HopAggregate
from coloss.motion.hop_graph_former import HopAttention as HopAttention
from coloss.motion.hop_graph_former import HopGraphFormer as HopGraphFormer
from coloss.motion.hop_graph_former import LimbRefine as LimbRefine
from coloss.motion.hop_graph_former import limbs_of as limbs_of
from coloss.motion.lifting import GraphMLPLifter as GraphMLPLifter
from coloss.motion.lifting import ResidualLifter as ResidualLifter
from coloss.motion.lifting_data import LiftingPairs as LiftingPairs
from coloss.motion.lifting_data import LiftingSplits as LiftingSplits
from coloss.motion.lifting_data import MirrorPoses as MirrorPoses
from coloss.motion.lifting_data import lifting_pairs as lifting_pairs
from coloss.motion.lifting_data import lifting_splits as lifting_splits
from coloss.motion.lifting_data import mirror_poses as mirror_poses
from coloss.motion.lifting_recipe import load_lifter as load_lifter
from coloss.motion.lifting_recipe import train_hop_lifter as train_hop_lifter
from coloss.motion.lifting_recipe import train_lifter as train_lifter
from coloss.motion.pose_refinement import RefinedPoses as RefinedPoses
from coloss.motion.pose_refinement import RefinementInfo as RefinementInfo
from coloss.motion.pose_refinement import test_time_optimize as test_time_optimize
from coloss.motion.uncertain_lifting import LaplacePoseLoss as LaplacePoseLoss
from coloss.motion.uncertain_lifting import ScaleCalibration as ScaleCalibration
from coloss.motion.uncertain_lifting import UncertainLifter as UncertainLifter
from coloss.motion.uncertain_lifting import UncertainLifterHead as UncertainLifterHead
from coloss.motion.uncertain_lifting import UncertainPose as UncertainPose
from coloss.motion.uncertain_lifting import UncertainPoses as UncertainPoses
from coloss.motion.uncertain_lifting import certainty as certainty
from coloss.motion.uncertain_lifting import laplace_pose_loss as laplace_pose_loss
from coloss.motion.uncertain_lifting import scale_calibration as scale_calibration

from .adaptive_topology import AdaptiveGraphConv as AdaptiveGraphConv
from .adaptive_topology import AdaptiveTopology as AdaptiveTopology
from .adaptive_topology import add_adaptive_topology as add_adaptive_topology
from .attention_rank import AttentionRanks as AttentionRanks
from .attention_rank import attention_ranks as attention_ranks
from .attention_rank import attention_weights as attention_weights
from .bvh import BvhMotion as BvhMotion
from .bvh import read_bvh as read_bvh
from .bvh import write_bvh as write_bvh
from .character_picture import draw_skeleton as draw_skeleton
from .clip_crops import ClipCrops as ClipCrops
from .clip_crops import random_stretches as random_stretches
from .clip_files import read_clips as read_clips
from .counter_choice import CounterChoice as CounterChoice
from .counter_choice import choose_counter as choose_counter
from .counter_choice import counter_signal as counter_signal
from .exercise_data import ExerciseWindows as ExerciseWindows
from .exercise_data import chained as chained
from .exercise_data import hide_joints as hide_joints
from .exercise_data import known_repetitions as known_repetitions
from .exercise_data import labelled_windows as labelled_windows
from .exercise_monitor import ExerciseModel as ExerciseModel
from .exercise_monitor import ExerciseMonitor as ExerciseMonitor
from .exercise_monitor import Reading as Reading
from .exercise_recipe import load_exercise_model as load_exercise_model
from .exercise_recipe import train_exercise_monitor as train_exercise_monitor
from .exercise_windows import WindowSplit as WindowSplit
from .exercise_windows import cut_windows as cut_windows
from .exercise_windows import group_window_split as group_window_split
from .exercise_windows import random_window_split as random_window_split
from .exercise_windows import resample_rate as resample_rate
from .federated_averaging import fedavg as fedavg
from .federated_averaging import split_state as split_state
from .federated_client import FederatedClient as FederatedClient
from .federated_client import FederatedRound as FederatedRound
from .federated_client import LocalTraining as LocalTraining
from .federated_client import assembled_model as assembled_model
from .federated_client import evaluate_client as evaluate_client
from .federated_client import initial_states as initial_states
from .federated_client import train_client as train_client
from .federated_diagnostics import block_agreement as block_agreement
from .federated_diagnostics import link_agreement as link_agreement
from .federated_flower import federated_client_app as federated_client_app
from .federated_flower import federated_server_app as federated_server_app
from .federated_grid import InProcessGrid as InProcessGrid
from .federated_methods import BlockDistillation as BlockDistillation
from .federated_methods import ProximalTerm as ProximalTerm
from .federated_methods import block_distillation_loss as block_distillation_loss
from .federated_methods import proximal_loss as proximal_loss
from .federated_recipe import fsar_client_app as fsar_client_app
from .federated_recipe import fsar_server_app as fsar_server_app
from .federated_recipe import load_fsar as load_fsar
from .federated_recipe import train_fsar as train_fsar
from .federated_skeletons import SkeletonShard as SkeletonShard
from .federated_skeletons import clip_inputs as clip_inputs
from .federated_skeletons import skeleton_clients as skeleton_clients
from .federated_skeletons import skeleton_shards as skeleton_shards
from .federated_trainer import FederatedRun as FederatedRun
from .federated_trainer import FederatedTrainer as FederatedTrainer
from .figure_networks import FigureNetwork as FigureNetwork
from .figure_networks import MaskNetwork as MaskNetwork
from .figure_networks import heatmap_points as heatmap_points
from .figure_networks import joint_error as joint_error
from .figure_networks import joint_heatmaps as joint_heatmaps
from .figure_networks import visible_heatmap_loss as visible_heatmap_loss
from .figure_sequences import FigureFrames as FigureFrames
from .figure_sequences import MotionParts as MotionParts
from .figure_sequences import draw_windows as draw_windows
from .figure_sequences import figure_frames as figure_frames
from .figure_sequences import motion_parts as motion_parts
from .figure_sequences import moving_windows as moving_windows
from .figure_sequences import still_figures as still_figures
from .figure_training import judge_pictures as judge_pictures
from .frame_interpolation import FrameInterpolator as FrameInterpolator
from .frame_interpolation import backward_warp as backward_warp
from .frame_interpolation import interpolation_metrics as interpolation_metrics
from .frame_interpolation import slow_motion as slow_motion
from .frame_interpolation_recipe import load_frame_interpolator as load_frame_interpolator
from .frame_interpolation_recipe import save_picture_rows as save_picture_rows
from .frame_interpolation_recipe import train_frame_interpolator as train_frame_interpolator
from .generic_text import GenericTextEncoder as GenericTextEncoder
from .generic_text import movement_sentences as movement_sentences
from .generic_text import sentence_perplexity as sentence_perplexity
from .generic_text import train_generic_text as train_generic_text
from .human_aware_loss import HumanAwareLoss as HumanAwareLoss
from .human_aware_loss import mask_distance as mask_distance
from .interpolation_losses import census_loss as census_loss
from .interpolation_losses import charbonnier_loss as charbonnier_loss
from .interpolation_losses import heatmap_mse_loss as heatmap_mse_loss
from .interpolation_losses import laplacian_pyramid_loss as laplacian_pyramid_loss
from .interpolation_losses import reconstruction_loss as reconstruction_loss
from .interpolation_losses import soft_dice_focal_loss as soft_dice_focal_loss
from .iterative_decoding import guided_logits as guided_logits
from .iterative_decoding import iterative_decode as iterative_decode
from .lamp_evaluation import evaluate_lamp as evaluate_lamp
from .lamp_methods import DrawnCaption as DrawnCaption
from .lamp_methods import TurnTerm as TurnTerm
from .lamp_model import LAMP_SIZES as LAMP_SIZES
from .lamp_model import Lamp as Lamp
from .lamp_model import load_lamp as load_lamp
from .lamp_recipe import train_lamp as train_lamp
from .language_motion import LanguageMotionPretraining as LanguageMotionPretraining
from .language_motion import MotionTokens as MotionTokens
from .language_motion import drawn_captions as drawn_captions
from .language_motion import encode_motions as encode_motions
from .language_motion import read_motion_tokens as read_motion_tokens
from .language_motion_losses import HardNegatives as HardNegatives
from .language_motion_losses import contrastive_max_loss as contrastive_max_loss
from .language_motion_losses import hard_negatives as hard_negatives
from .language_motion_losses import matching_loss as matching_loss
from .language_motion_losses import next_words as next_words
from .language_motion_losses import prefix_lm_loss as prefix_lm_loss
from .language_motion_losses import query_text_scores as query_text_scores
from .language_motion_losses import query_token_loss as query_token_loss
from .language_motion_model import LanguageMotionCondition as LanguageMotionCondition
from .language_motion_model import LanguageMotionModel as LanguageMotionModel
from .length_predictor import LengthPredictor as LengthPredictor
from .masked_tokens import PAPER_GENERATOR as PAPER_GENERATOR
from .masked_tokens import SMALL_GENERATOR as SMALL_GENERATOR
from .masked_tokens import MaskedTokens as MaskedTokens
from .masked_tokens import MaskedTokenTraining as MaskedTokenTraining
from .masked_tokens import MaskedTokenTransformer as MaskedTokenTransformer
from .masked_tokens import mask_tokens as mask_tokens
from .masked_tokens import masked_token_loss as masked_token_loss
from .mixed_clips import MixedClips as MixedClips
from .mixed_clips import mix_contrastive_loss as mix_contrastive_loss
from .mixed_clips import mixed_region_loss as mixed_region_loss
from .mixed_clips import queue_contrast_loss as queue_contrast_loss
from .mixed_clips import region_features as region_features
from .mixed_clips import skeleton_mix as skeleton_mix
from .momentum_prediction import BYOL as BYOL
from .momentum_prediction import BYOLOutputs as BYOLOutputs
from .momentum_prediction import byol_loss as byol_loss
from .momentum_prediction import cross_model_loss as cross_model_loss
from .momentum_views import MomentumViewMethod as MomentumViewMethod
from .motion_captioner import FromEmbeddings as FromEmbeddings
from .motion_captioner import MotionCaptioner as MotionCaptioner
from .motion_captioner import caption_loss as caption_loss
from .motion_captions import compose_captions as compose_captions
from .motion_evaluator import PAPER_EVALUATOR as PAPER_EVALUATOR
from .motion_evaluator import SMALL_EVALUATOR as SMALL_EVALUATOR
from .motion_evaluator import TextMotionEmbeddings as TextMotionEmbeddings
from .motion_evaluator import TextMotionEvaluator as TextMotionEvaluator
from .motion_evaluator import TextMotionMatching as TextMotionMatching
from .motion_evaluator import margin_contrastive_loss as margin_contrastive_loss
from .motion_picture import film_strip_svg as film_strip_svg
from .motion_picture import save_gif as save_gif
from .motion_representation import FeatureNormalizer as FeatureNormalizer
from .motion_representation import feature_groups as feature_groups
from .motion_representation import motion_features as motion_features
from .motion_representation import recover_joints as recover_joints
from .motion_representation import rest_directions as rest_directions
from .motion_tokenizer import PAPER_TOKENIZER as PAPER_TOKENIZER
from .motion_tokenizer import SMALL_TOKENIZER as SMALL_TOKENIZER
from .motion_tokenizer import MotionReconstruction as MotionReconstruction
from .motion_tokenizer import MotionTokenizerTraining as MotionTokenizerTraining
from .motion_tokenizer import MotionVQVAE as MotionVQVAE
from .motion_tokenizer import motion_tokenizer_loss as motion_tokenizer_loss
from .motion_tokenizer import motion_tokenizer_terms as motion_tokenizer_terms
from .motion_tokenizer import token_mask as token_mask
from .neighbour_voting import cosine_similarity_matrix as cosine_similarity_matrix
from .neighbour_voting import nearest_mask as nearest_mask
from .neighbour_voting import neighbour_votes as neighbour_votes
from .neighbour_voting import soft_positive_loss as soft_positive_loss
from .part_stream_recipe import PartStreamModel as PartStreamModel
from .part_stream_recipe import load_part_streams as load_part_streams
from .part_stream_recipe import train_part_streams as train_part_streams
from .part_streams import ARM_STRIDES as ARM_STRIDES
from .part_streams import ARM_WIDTHS as ARM_WIDTHS
from .part_streams import BODY_STRIDES as BODY_STRIDES
from .part_streams import BODY_WIDTHS as BODY_WIDTHS
from .part_streams import LEG_STRIDES as LEG_STRIDES
from .part_streams import LEG_WIDTHS as LEG_WIDTHS
from .part_streams import MODALITIES as MODALITIES
from .part_streams import PartStream as PartStream
from .part_streams import PartStreamEnsemble as PartStreamEnsemble
from .part_streams import PartStreamNet as PartStreamNet
from .part_streams import streams_of_parts as streams_of_parts
from .part_streams import unify_modalities as unify_modalities
from .pose_features import COCO_LANDMARKS as COCO_LANDMARKS
from .pose_features import LANDMARKS as LANDMARKS
from .pose_features import MEDIAPIPE_LANDMARKS as MEDIAPIPE_LANDMARKS
from .pose_features import PoseSpec as PoseSpec
from .pose_features import body_frame_coordinates as body_frame_coordinates
from .pose_features import body_scale as body_scale
from .pose_features import frame_features as frame_features
from .pose_features import invariant_pose_features as invariant_pose_features
from .pose_features import joint_angles as joint_angles
from .pose_features import pair_distances as pair_distances
from .pose_features import pose_spec as pose_spec
from .query_transformer import JointReading as JointReading
from .query_transformer import MemoryAttention as MemoryAttention
from .query_transformer import QueryReading as QueryReading
from .query_transformer import QueryTextLayer as QueryTextLayer
from .query_transformer import QueryTransformer as QueryTransformer
from .query_transformer import query_text_mask as query_text_mask
from .reference_counts import count_strides as count_strides
from .reference_counts import count_swings as count_swings
from .rendered_figures import RenderedFigures as RenderedFigures
from .rendered_figures import occluding_bars as occluding_bars
from .rendered_figures import orthographic_view as orthographic_view
from .rendered_figures import render_figures as render_figures
from .rendered_figures import side_colors as side_colors
from .rendered_figures import textured_background as textured_background
from .repetition_counter import HysteresisCounter as HysteresisCounter
from .repetition_counter import SwingCounter as SwingCounter
from .repetition_counter import autocorrelation_count as autocorrelation_count
from .repetition_counter import hysteresis_count as hysteresis_count
from .repetition_counter import hysteresis_events as hysteresis_events
from .repetition_counter import peak_count as peak_count
from .repetition_counter import phase_count as phase_count
from .score_fusion import fit_fusion_weights as fit_fusion_weights
from .score_fusion import fuse_scores as fuse_scores
from .skeleton_byol import SkeletonACL as SkeletonACL
from .skeleton_byol import SkeletonBYOL as SkeletonBYOL
from .skeleton_contrast import SkeleMixCLR as SkeleMixCLR
from .skeleton_contrast import SkeletonCLR as SkeletonCLR
from .skeleton_evaluation import evaluate_skeleton_encoder as evaluate_skeleton_encoder
from .stream_encoder import StreamEncoder as StreamEncoder
from .stream_encoder import StreamHeads as StreamHeads
from .text_motion_data import TextMotion as TextMotion
from .text_motion_data import load_text_motion as load_text_motion
from .window_classifier import FeatureScaler as FeatureScaler
from .window_classifier import KernelPenalty as KernelPenalty
from .window_classifier import WindowClassifier as WindowClassifier
from .window_classifier import carry_forward as carry_forward

__all__ = [
    "ARM_STRIDES",
    "ARM_WIDTHS",
    "AdaptiveGraphConv",
    "AdaptiveTopology",
    "AttentionRanks",
    "BODY_STRIDES",
    "BODY_WIDTHS",
    "BYOL",
    "BYOLOutputs",
    "BlockDistillation",
    "BvhMotion",
    "COCO_LANDMARKS",
    "ClipCrops",
    "CounterChoice",
    "DrawnCaption",
    "ExerciseModel",
    "ExerciseMonitor",
    "ExerciseWindows",
    "FeatureNormalizer",
    "FeatureScaler",
    "FederatedClient",
    "FederatedRound",
    "FederatedRun",
    "FederatedTrainer",
    "FigureFrames",
    "FigureNetwork",
    "FrameInterpolator",
    "FromEmbeddings",
    "GenericTextEncoder",
    "GraphMLPLifter",
    "HardNegatives",
    "HopAggregate",
    "HopAttention",
    "HopGraphFormer",
    "HumanAwareLoss",
    "HysteresisCounter",
    "InProcessGrid",
    "JointReading",
    "KernelPenalty",
    "LAMP_SIZES",
    "LANDMARKS",
    "LEG_STRIDES",
    "LEG_WIDTHS",
    "Lamp",
    "LanguageMotionCondition",
    "LanguageMotionModel",
    "LanguageMotionPretraining",
    "LaplacePoseLoss",
    "LengthPredictor",
    "LiftingPairs",
    "LiftingSplits",
    "LimbRefine",
    "LocalTraining",
    "MEDIAPIPE_LANDMARKS",
    "MODALITIES",
    "MaskNetwork",
    "MaskedTokenTraining",
    "MaskedTokenTransformer",
    "MaskedTokens",
    "MemoryAttention",
    "MirrorPoses",
    "MixedClips",
    "MomentumViewMethod",
    "MotionCaptioner",
    "MotionParts",
    "MotionReconstruction",
    "MotionTokenizerTraining",
    "MotionTokens",
    "MotionVQVAE",
    "PAPER_EVALUATOR",
    "PAPER_GENERATOR",
    "PAPER_TOKENIZER",
    "PartStream",
    "PartStreamEnsemble",
    "PartStreamModel",
    "PartStreamNet",
    "PinholeCamera",
    "PoseSpec",
    "ProximalTerm",
    "QueryReading",
    "QueryTextLayer",
    "QueryTransformer",
    "Reading",
    "RefinedPoses",
    "RefinementInfo",
    "RenderedFigures",
    "ResidualLifter",
    "SMALL_EVALUATOR",
    "SMALL_GENERATOR",
    "SMALL_TOKENIZER",
    "ScaleCalibration",
    "SkeleMixCLR",
    "SkeletonACL",
    "SkeletonBYOL",
    "SkeletonCLR",
    "SkeletonShard",
    "StreamEncoder",
    "StreamHeads",
    "SwingCounter",
    "TextMotion",
    "TextMotionEmbeddings",
    "TextMotionEvaluator",
    "TextMotionMatching",
    "TurnTerm",
    "UncertainLifter",
    "UncertainLifterHead",
    "UncertainPose",
    "UncertainPoses",
    "Viewpoints",
    "WindowClassifier",
    "WindowSplit",
    "add_adaptive_topology",
    "assembled_model",
    "attention_ranks",
    "attention_weights",
    "autocorrelation_count",
    "backward_warp",
    "block_agreement",
    "block_distillation_loss",
    "body_frame_coordinates",
    "body_scale",
    "byol_loss",
    "caption_loss",
    "carry_forward",
    "census_loss",
    "certainty",
    "chained",
    "charbonnier_loss",
    "choose_counter",
    "clip_inputs",
    "compose_captions",
    "contrastive_max_loss",
    "cosine_similarity_matrix",
    "count_strides",
    "count_swings",
    "counter_signal",
    "cross_model_loss",
    "cut_windows",
    "draw_skeleton",
    "draw_windows",
    "drawn_captions",
    "encode_motions",
    "evaluate_client",
    "evaluate_lamp",
    "evaluate_skeleton_encoder",
    "feature_groups",
    "fedavg",
    "federated_client_app",
    "federated_server_app",
    "figure_frames",
    "film_strip_svg",
    "fit_fusion_weights",
    "frame_features",
    "fsar_client_app",
    "fsar_server_app",
    "fuse_scores",
    "group_window_split",
    "guided_logits",
    "hard_negatives",
    "heatmap_mse_loss",
    "heatmap_points",
    "hide_joints",
    "hysteresis_count",
    "hysteresis_events",
    "initial_states",
    "interpolation_metrics",
    "invariant_pose_features",
    "iterative_decode",
    "joint_angles",
    "joint_error",
    "joint_heatmaps",
    "judge_pictures",
    "known_repetitions",
    "labelled_windows",
    "laplace_pose_loss",
    "laplacian_pyramid_loss",
    "lifting_pairs",
    "lifting_splits",
    "limbs_of",
    "link_agreement",
    "load_exercise_model",
    "load_frame_interpolator",
    "load_fsar",
    "load_lamp",
    "load_lifter",
    "load_part_streams",
    "load_text_motion",
    "margin_contrastive_loss",
    "mask_distance",
    "mask_tokens",
    "masked_token_loss",
    "matching_loss",
    "mirror_poses",
    "mix_contrastive_loss",
    "mixed_region_loss",
    "motion_features",
    "motion_parts",
    "motion_tokenizer_loss",
    "motion_tokenizer_terms",
    "movement_sentences",
    "moving_windows",
    "nearest_mask",
    "neighbour_votes",
    "next_words",
    "occluding_bars",
    "orthographic_view",
    "pair_distances",
    "peak_count",
    "phase_count",
    "pixel_coordinates",
    "pose_spec",
    "prefix_lm_loss",
    "proximal_loss",
    "query_text_mask",
    "query_text_scores",
    "query_token_loss",
    "queue_contrast_loss",
    "random_stretches",
    "random_window_split",
    "read_bvh",
    "read_clips",
    "read_motion_tokens",
    "reconstruction_loss",
    "recover_joints",
    "region_features",
    "render_figures",
    "resample_rate",
    "rest_directions",
    "ring_viewpoints",
    "save_gif",
    "save_picture_rows",
    "scale_calibration",
    "screen_coordinates",
    "sentence_perplexity",
    "side_colors",
    "skeleton_clients",
    "skeleton_mix",
    "skeleton_shards",
    "slow_motion",
    "soft_dice_focal_loss",
    "soft_positive_loss",
    "split_state",
    "still_figures",
    "streams_of_parts",
    "test_time_optimize",
    "textured_background",
    "token_mask",
    "train_client",
    "train_exercise_monitor",
    "train_frame_interpolator",
    "train_fsar",
    "train_generic_text",
    "train_hop_lifter",
    "train_lamp",
    "train_lifter",
    "train_part_streams",
    "unify_modalities",
    "visible_heatmap_loss",
    "write_bvh",
]
