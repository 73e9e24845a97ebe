"""Joint-embedding prediction: encoders learnt without labels, what keeps them from collapsing, and meters of it."""

from coloss.data import BlockMask1d as BlockMask1d
from coloss.data import Masker as Masker
from coloss.data import MaskRequest as MaskRequest
from coloss.data import Masks as Masks
from coloss.data import MaskSchedule as MaskSchedule
from coloss.data import MultiBlock2d as MultiBlock2d
from coloss.data import RandomColumns as RandomColumns
from coloss.data import RandomTokens as RandomTokens
from coloss.data import default_views as default_views
from coloss.metrics import RankInterval as RankInterval
from coloss.metrics import alignment as alignment
from coloss.metrics import alpha_req as alpha_req
from coloss.metrics import entropy_rank as entropy_rank
from coloss.metrics import feature_standard_deviation as feature_standard_deviation
from coloss.metrics import lidar as lidar
from coloss.metrics import participation_ratio as participation_ratio
from coloss.metrics import rankme as rankme
from coloss.metrics import rankme_interval as rankme_interval
from coloss.metrics import stable_rank as stable_rank
from coloss.metrics import uniformity as uniformity
from coloss.nn import AttentivePool as AttentivePool
from coloss.nn import MaskTokenPredictor as MaskTokenPredictor
from coloss.nn import projection_head as projection_head
from coloss.nn import token_encoder_for_shape as token_encoder_for_shape
from coloss.ops import epps_pulley as epps_pulley
from coloss.ops import latent_prediction_loss as latent_prediction_loss
from coloss.train import FeatureSource as FeatureSource
from coloss.train import second_look as second_look

from .collapse_layers import collapse_report as collapse_report
from .collapse_measures import WithinBetween as WithinBetween
from .collapse_measures import between_whitener as between_whitener
from .collapse_measures import class_means as class_means
from .collapse_measures import collapse_metrics as collapse_metrics
from .collapse_measures import equiangularity as equiangularity
from .collapse_measures import equinorm as equinorm
from .collapse_measures import moment_means as moment_means
from .collapse_measures import nc1 as nc1
from .collapse_measures import nc2 as nc2
from .collapse_measures import nc3 as nc3
from .collapse_measures import nc4 as nc4
from .collapse_measures import nearest_mean as nearest_mean
from .collapse_measures import within_between as within_between
from .collapse_response import ResponseSpectrum as ResponseSpectrum
from .collapse_response import nc_response as nc_response
from .collapse_response import predicted_response as predicted_response
from .collapse_theory import FeaturePath as FeaturePath
from .collapse_theory import FreeFeatures as FreeFeatures
from .collapse_theory import best_weight as best_weight
from .collapse_theory import central_path as central_path
from .collapse_theory import free_features_loss as free_features_loss
from .collapse_theory import solve_near as solve_near
from .collapse_theory import ufm_solution as ufm_solution
from .deep_linear import DeepLinearSSL as DeepLinearSSL
from .deep_linear import GainCourse as GainCourse
from .deep_linear import train_deep_linear as train_deep_linear
from .equivariance import action_probe as action_probe
from .equivariance import evaluate_equivariance as evaluate_equivariance
from .equivariance import evaluate_invariance as evaluate_invariance
from .feature_order import FeatureAudit as FeatureAudit
from .feature_order import OffDiagonalWarning as OffDiagonalWarning
from .feature_order import audit_features as audit_features
from .feature_order import learning_order as learning_order
from .few_label_probes import few_label_probes as few_label_probes
from .group_sparse import GroupSparseMap as GroupSparseMap
from .group_sparse import ProximalStep as ProximalStep
from .group_sparse import activation_group_penalty as activation_group_penalty
from .group_sparse import group_l2_norms as group_l2_norms
from .group_sparse import group_lasso as group_lasso
from .group_sparse import multi_information_gaussian as multi_information_gaussian
from .group_sparse import prox_group_lasso_ as prox_group_lasso_
from .known_colours import Blurs as Blurs
from .known_colours import ColourChanges as ColourChanges
from .known_transforms import KnownTransform as KnownTransform
from .known_transforms import ParamTransform as ParamTransform
from .known_transforms import RandomCrops as RandomCrops
from .known_transforms import Rotations as Rotations
from .known_transforms import Shifts as Shifts
from .known_transforms import TransformChain as TransformChain
from .known_transforms import draw_views as draw_views
from .known_transforms import parameter_spread as parameter_spread
from .known_transforms import relative_actions as relative_actions
from .learning_times import fixed_point as fixed_point
from .learning_times import integrate as integrate
from .learning_times import jepa_time as jepa_time
from .learning_times import mae_time as mae_time
from .lejepa import LeJEPA as LeJEPA
from .lejepa import SIGReg as SIGReg
from .lejepa import invariance_loss as invariance_loss
from .lejepa import lejepa_loss as lejepa_loss
from .masked_prediction import LatentPass as LatentPass
from .masked_prediction import MaskedPrediction as MaskedPrediction
from .masked_prediction import between_sample_std as between_sample_std
from .masked_prediction import find_token_encoder as find_token_encoder
from .mutual_information import SupervisedMI as SupervisedMI
from .mutual_information import describe_weights as describe_weights
from .mutual_information import pinball_loss as pinball_loss
from .mutual_information_bounds import NWJ as NWJ
from .mutual_information_bounds import DonskerVaradhan as DonskerVaradhan
from .mutual_information_bounds import InfoNCE as InfoNCE
from .mutual_information_bounds import VariationalBound as VariationalBound
from .mutual_information_bounds import donsker_varadhan_bound as donsker_varadhan_bound
from .mutual_information_bounds import info_nce_bound as info_nce_bound
from .mutual_information_bounds import nwj_bound as nwj_bound
from .mutual_information_data import MIMetaDataset as MIMetaDataset
from .mutual_information_data import PairedBatch as PairedBatch
from .mutual_information_data import draw_pair as draw_pair
from .mutual_information_estimators import KSG as KSG
from .mutual_information_estimators import GaussianMI as GaussianMI
from .mutual_information_estimators import InformationInterval as InformationInterval
from .mutual_information_estimators import MIEstimator as MIEstimator
from .mutual_information_families import PairedSamples as PairedSamples
from .mutual_information_families import additive_uniform_information as additive_uniform_information
from .mutual_information_families import bivariate_gaussian_information as bivariate_gaussian_information
from .mutual_information_families import clayton_information as clayton_information
from .mutual_information_families import gaussian_information as gaussian_information
from .mutual_information_families import student_excess_information as student_excess_information
from .mutual_information_networks import CellMIRegressor as CellMIRegressor
from .mutual_information_networks import SetMIRegressor as SetMIRegressor
from .mutual_information_report import JudgedEstimate as JudgedEstimate
from .mutual_information_report import error_by_bin as error_by_bin
from .mutual_information_report import interval_coverage as interval_coverage
from .mutual_information_report import judge_estimator as judge_estimator
from .mutual_information_report import mean_squared_error as mean_squared_error
from .mutual_information_report import rank_agreement as rank_agreement
from .mutual_information_training import crossing_rate as crossing_rate
from .mutual_information_training import fit_regressor as fit_regressor
from .mutual_information_training import train_mist as train_mist
from .neural_collapse import NeuralCollapseMonitor as NeuralCollapseMonitor
from .pretraining import load_encoder as load_encoder
from .pretraining import pretrain_lejepa as pretrain_lejepa
from .rank_gaussian import gaussian_copula_information as gaussian_copula_information
from .rank_gaussian import rank_gaussianise as rank_gaussianise
from .rank_monitor import CollapseWarning as CollapseWarning
from .rank_monitor import EffectiveRankMonitor as EffectiveRankMonitor
from .saccades import Saccades as Saccades
from .salient_regions import SequentialMasks as SequentialMasks
from .salient_regions import connected_components_2d as connected_components_2d
from .salient_regions import otsu_threshold as otsu_threshold
from .salient_regions import ranked_regions as ranked_regions
from .salient_regions import saliency_map as saliency_map
from .salient_regions import sequential_masks as sequential_masks
from .sequence_aggregator import ActionConditionedAggregator as ActionConditionedAggregator
from .sequence_aggregator import ActionPredictor as ActionPredictor
from .sequence_aggregator import SequenceEncoder as SequenceEncoder
from .sequence_aggregator import next_view_loss as next_view_loss
from .sequential_prediction import DSeqJEPA as DSeqJEPA
from .sequential_prediction import GivenSaliency as GivenSaliency
from .sequential_prediction import QuerySaliency as QuerySaliency
from .sequential_prediction import SalientSequence as SalientSequence
from .sequential_prediction import VarianceSaliency as VarianceSaliency
from .series_data import SeriesSet as SeriesSet
from .series_data import read_series as read_series
from .series_model import SeriesCrops as SeriesCrops
from .series_model import SeriesModel as SeriesModel
from .series_model import fine_tune_series as fine_tune_series
from .series_prediction import SeriesPrediction as SeriesPrediction
from .series_prediction import new_series_encoder as new_series_encoder
from .series_prediction import train_series_encoder as train_series_encoder
from .series_preparation import SeriesPreparation as SeriesPreparation
from .series_preparation import fill_gaps as fill_gaps
from .series_preparation import order_channels as order_channels
from .series_preparation import remove_drift as remove_drift
from .series_pretraining import load_series_encoder as load_series_encoder
from .series_pretraining import pretrain_series as pretrain_series
from .sparse_activations import ActivationGroupSparsity as ActivationGroupSparsity
from .sparse_prediction import GaussianLatents as GaussianLatents
from .sparse_prediction import SparseJEPA as SparseJEPA
from .table_prediction import TabularJEPA as TabularJEPA
from .table_pretraining import pretrain_tjepa as pretrain_tjepa
from .table_transformer import TJEPATransformer as TJEPATransformer
from .univariate import anderson_darling as anderson_darling
from .univariate import cramer_von_mises as cramer_von_mises
from .univariate import extended_jarque_bera as extended_jarque_bera
from .univariate import moment_match as moment_match
from .univariate import quantile_match as quantile_match
from .univariate import sliced_wasserstein as sliced_wasserstein
from .vicreg import VICReg as VICReg
from .vicreg import vicreg_terms as vicreg_terms
from .view_sequences import SeqJEPA as SeqJEPA
from .view_statistics import ViewMoments as ViewMoments
from .view_statistics import view_moments as view_moments

__all__ = [
    "ActionConditionedAggregator",
    "ActionPredictor",
    "ActivationGroupSparsity",
    "AttentivePool",
    "BlockMask1d",
    "Blurs",
    "CellMIRegressor",
    "CollapseWarning",
    "ColourChanges",
    "DSeqJEPA",
    "DeepLinearSSL",
    "DonskerVaradhan",
    "EffectiveRankMonitor",
    "FeatureAudit",
    "FeaturePath",
    "FeatureSource",
    "FreeFeatures",
    "GainCourse",
    "GaussianLatents",
    "GaussianMI",
    "GivenSaliency",
    "GroupSparseMap",
    "InfoNCE",
    "InformationInterval",
    "JudgedEstimate",
    "KSG",
    "KnownTransform",
    "LatentPass",
    "LeJEPA",
    "MIEstimator",
    "MIMetaDataset",
    "MaskRequest",
    "MaskSchedule",
    "MaskTokenPredictor",
    "MaskedPrediction",
    "Masker",
    "Masks",
    "MultiBlock2d",
    "NWJ",
    "NeuralCollapseMonitor",
    "OffDiagonalWarning",
    "PairedBatch",
    "PairedSamples",
    "ParamTransform",
    "ProximalStep",
    "QuerySaliency",
    "RandomColumns",
    "RandomCrops",
    "RandomTokens",
    "RankInterval",
    "ResponseSpectrum",
    "Rotations",
    "SIGReg",
    "Saccades",
    "SalientSequence",
    "SeqJEPA",
    "SequenceEncoder",
    "SequentialMasks",
    "SeriesCrops",
    "SeriesModel",
    "SeriesPrediction",
    "SeriesPreparation",
    "SeriesSet",
    "SetMIRegressor",
    "Shifts",
    "SparseJEPA",
    "SupervisedMI",
    "TJEPATransformer",
    "TabularJEPA",
    "TransformChain",
    "VICReg",
    "VarianceSaliency",
    "VariationalBound",
    "ViewMoments",
    "WithinBetween",
    "action_probe",
    "activation_group_penalty",
    "additive_uniform_information",
    "alignment",
    "alpha_req",
    "anderson_darling",
    "audit_features",
    "best_weight",
    "between_sample_std",
    "between_whitener",
    "bivariate_gaussian_information",
    "central_path",
    "class_means",
    "clayton_information",
    "collapse_metrics",
    "collapse_report",
    "connected_components_2d",
    "cramer_von_mises",
    "crossing_rate",
    "default_views",
    "describe_weights",
    "donsker_varadhan_bound",
    "draw_pair",
    "draw_views",
    "entropy_rank",
    "epps_pulley",
    "equiangularity",
    "equinorm",
    "error_by_bin",
    "evaluate_equivariance",
    "evaluate_invariance",
    "extended_jarque_bera",
    "feature_standard_deviation",
    "few_label_probes",
    "fill_gaps",
    "find_token_encoder",
    "fine_tune_series",
    "fit_regressor",
    "fixed_point",
    "free_features_loss",
    "gaussian_copula_information",
    "gaussian_information",
    "group_l2_norms",
    "group_lasso",
    "info_nce_bound",
    "integrate",
    "interval_coverage",
    "invariance_loss",
    "jepa_time",
    "judge_estimator",
    "latent_prediction_loss",
    "learning_order",
    "lejepa_loss",
    "lidar",
    "load_encoder",
    "load_series_encoder",
    "mae_time",
    "mean_squared_error",
    "moment_match",
    "moment_means",
    "multi_information_gaussian",
    "nc1",
    "nc2",
    "nc3",
    "nc4",
    "nc_response",
    "nearest_mean",
    "new_series_encoder",
    "next_view_loss",
    "nwj_bound",
    "order_channels",
    "otsu_threshold",
    "parameter_spread",
    "participation_ratio",
    "pinball_loss",
    "predicted_response",
    "pretrain_lejepa",
    "pretrain_series",
    "pretrain_tjepa",
    "projection_head",
    "prox_group_lasso_",
    "quantile_match",
    "rank_agreement",
    "rank_gaussianise",
    "ranked_regions",
    "rankme",
    "rankme_interval",
    "read_series",
    "relative_actions",
    "remove_drift",
    "saliency_map",
    "second_look",
    "sequential_masks",
    "sliced_wasserstein",
    "solve_near",
    "stable_rank",
    "student_excess_information",
    "token_encoder_for_shape",
    "train_deep_linear",
    "train_mist",
    "train_series_encoder",
    "ufm_solution",
    "uniformity",
    "vicreg_terms",
    "view_moments",
    "within_between",
]
