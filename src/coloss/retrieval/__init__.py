"""Retrieval: queries find documents by their scores."""

from coloss.metrics import (
    SimilarityDistribution as SimilarityDistribution,
)
from coloss.metrics import (
    mean_similarity_distribution as mean_similarity_distribution,
)
from coloss.metrics import (
    pooled_auc as pooled_auc,
)
from coloss.metrics import (
    roc_curve_pooled as roc_curve_pooled,
)
from coloss.metrics import (
    threshold_at_fpr as threshold_at_fpr,
)
from coloss.ops import (
    sdm_loss as sdm_loss,
)

from .basis_transform import BackwardCompatibleTraining as BackwardCompatibleTraining
from .basis_transform import BasisTransformTraining as BasisTransformTraining
from .block_attention import attention_document_scores as attention_document_scores
from .block_attention import attention_logits as attention_logits
from .block_attention import attention_ranking_loss as attention_ranking_loss
from .block_attention import blockrank_attention as blockrank_attention
from .block_attention import blockrank_block_mask as blockrank_block_mask
from .block_attention import blockrank_mask as blockrank_mask
from .block_attention import blockrank_position_ids as blockrank_position_ids
from .block_language_model import BlockBatch as BlockBatch
from .block_language_model import BlockRanker as BlockRanker
from .block_language_model import BlockRankerOutputs as BlockRankerOutputs
from .block_ranker import AttentionRanking as AttentionRanking
from .block_ranker import answer_loss as answer_loss
from .checkpoint_merge import merge_checkpoints as merge_checkpoints
from .compatibility_report import CompatibilityReport as CompatibilityReport
from .compatibility_report import compatibility_report as compatibility_report
from .compatibility_report import procrustes_map as procrustes_map
from .compatible_head import BackwardCompatibleHead as BackwardCompatibleHead
from .compatible_head import BasisTransform as BasisTransform
from .compatible_head import CompatibleOutput as CompatibleOutput
from .compatible_head import PrototypeHead as PrototypeHead
from .compatible_head import UpgradedEncoder as UpgradedEncoder
from .compatible_losses import backward_compatible_loss as backward_compatible_loss
from .compatible_losses import backward_compatible_terms as backward_compatible_terms
from .compatible_losses import class_prototypes as class_prototypes
from .counted_target import NO_DEFENCE as NO_DEFENCE
from .counted_target import CountedTarget as CountedTarget
from .counted_target import Defence as Defence
from .counted_target import QueryBudgetError as QueryBudgetError
from .cross_modal_granularity import CrossModalGranularity as CrossModalGranularity
from .cross_modal_granularity import MatchHead as MatchHead
from .cross_modal_granularity import hard_negative_indices as hard_negative_indices
from .cross_modal_granularity import match_loss as match_loss
from .decoupled_softmax import DecoupledSoftmax as DecoupledSoftmax
from .demonstration_bank import DemonstrationBank as DemonstrationBank
from .demonstration_bank import Retrieved as Retrieved
from .demonstration_bank import content_keys as content_keys
from .demonstration_reading import DemonstrationTraining as DemonstrationTraining
from .demonstration_reading import evaluate_demonstrations as evaluate_demonstrations
from .demonstration_reading import shuffled_episode as shuffled_episode
from .document_scorers import DenseRetriever as DenseRetriever
from .document_scorers import LateInteractionRetriever as LateInteractionRetriever
from .document_scorers import late_interaction_scores as late_interaction_scores
from .embedding_targets import EmbeddingTargets as EmbeddingTargets
from .embedding_targets import embedding_table as embedding_table
from .extraction_audit import ExtractionAudit as ExtractionAudit
from .extraction_run import audit_recommender as audit_recommender
from .gate_contrast import GateContrast as GateContrast
from .gate_contrast import HistoryMasking as HistoryMasking
from .gate_contrast import gate_contrastive_loss as gate_contrastive_loss
from .gate_contrast import mask_histories as mask_histories
from .gate_contrast import random_history_mask as random_history_mask
from .graded_losses import pearson_loss as pearson_loss
from .graded_losses import preference_order_loss as preference_order_loss
from .graded_losses import rank_kl_loss as rank_kl_loss
from .joined_scores import JoinedScores as JoinedScores
from .joined_scores import joined_scores as joined_scores
from .joined_scores import positive_pairs as positive_pairs
from .joint_reader_recipe import small_retrieval_reader as small_retrieval_reader
from .joint_reader_recipe import train_retrieval_reader as train_retrieval_reader
from .joint_retrieval import JointRetrieval as JointRetrieval
from .joint_retrieval_step import JointRetrievalStep as JointRetrievalStep
from .list_distillation import ListDistillation as ListDistillation
from .list_distillation import bidirectional_repair_loss as bidirectional_repair_loss
from .list_distillation import list_distillation_loss as list_distillation_loss
from .mann_whitney import MannWhitneyLoss as MannWhitneyLoss
from .mann_whitney import MannWhitneyRetrieval as MannWhitneyRetrieval
from .mann_whitney import mann_whitney_loss as mann_whitney_loss
from .many_positives import decoupled_score_loss as decoupled_score_loss
from .many_positives import draw_positives as draw_positives
from .many_positives import multi_positive_softmax_loss as multi_positive_softmax_loss
from .many_positives import soft_topk_loss as soft_topk_loss
from .marginal import document_log_prior as document_log_prior
from .marginal import marginal_class_log_probs as marginal_class_log_probs
from .marginal import marginal_nll as marginal_nll
from .mixture_ranker import AttentionWeightedGate as AttentionWeightedGate
from .mixture_ranker import EmbeddedHistory as EmbeddedHistory
from .mixture_ranker import HistoryInput as HistoryInput
from .mixture_ranker import MixtureRanker as MixtureRanker
from .mixture_ranker import TargetAttention as TargetAttention
from .mixture_ranker import expert_load as expert_load
from .mixture_ranker import small_mixture_ranker as small_mixture_ranker
from .query_synthesis import FollowingItems as FollowingItems
from .query_synthesis import Queries as Queries
from .query_synthesis import autoregressive_queries as autoregressive_queries
from .query_synthesis import few_shot_queries as few_shot_queries
from .query_synthesis import random_queries as random_queries
from .reader_ranked import best_documents as best_documents
from .reader_ranked import reader_agreement as reader_agreement
from .reader_ranked import reader_ranked_loss as reader_ranked_loss
from .reader_ranked import sample_documents as sample_documents
from .retrieval_augmented import Demonstrated as Demonstrated
from .retrieval_augmented import DemonstrationReader as DemonstrationReader
from .retrieval_augmented import LabelVote as LabelVote
from .retrieval_augmented import RetrievalAugmented as RetrievalAugmented
from .retrieval_reader import MeanReader as MeanReader
from .retrieval_reader import ReaderLoss as ReaderLoss
from .retrieval_reader import RetrievalReader as RetrievalReader
from .retrieval_reader import with_candidates as with_candidates
from .threshold_report import ThresholdReport as ThresholdReport
from .threshold_report import threshold_report as threshold_report
from .token_dual_encoder import GranularityDecoder as GranularityDecoder
from .token_dual_encoder import TokenDualEncoder as TokenDualEncoder
from .token_dual_encoder import Tokens as Tokens
from .token_dual_encoder import TokenTower as TokenTower
from .unified_embedding import UnifiedEmbedding as UnifiedEmbedding
from .unified_embedding import multi_positive_info_nce_loss as multi_positive_info_nce_loss

__all__ = [
    "NO_DEFENCE",
    "AttentionRanking",
    "AttentionWeightedGate",
    "BackwardCompatibleHead",
    "BackwardCompatibleTraining",
    "BasisTransform",
    "BasisTransformTraining",
    "BlockBatch",
    "BlockRanker",
    "BlockRankerOutputs",
    "CompatibilityReport",
    "CompatibleOutput",
    "CountedTarget",
    "CrossModalGranularity",
    "DecoupledSoftmax",
    "Defence",
    "Demonstrated",
    "DemonstrationBank",
    "DemonstrationReader",
    "DemonstrationTraining",
    "DenseRetriever",
    "EmbeddedHistory",
    "EmbeddingTargets",
    "ExtractionAudit",
    "FollowingItems",
    "GateContrast",
    "GranularityDecoder",
    "HistoryInput",
    "HistoryMasking",
    "JoinedScores",
    "JointRetrieval",
    "JointRetrievalStep",
    "LabelVote",
    "LateInteractionRetriever",
    "ListDistillation",
    "MannWhitneyLoss",
    "MannWhitneyRetrieval",
    "MatchHead",
    "MeanReader",
    "MixtureRanker",
    "PrototypeHead",
    "Queries",
    "QueryBudgetError",
    "ReaderLoss",
    "RetrievalAugmented",
    "RetrievalReader",
    "Retrieved",
    "SimilarityDistribution",
    "TargetAttention",
    "ThresholdReport",
    "TokenDualEncoder",
    "TokenTower",
    "Tokens",
    "UnifiedEmbedding",
    "UpgradedEncoder",
    "answer_loss",
    "attention_document_scores",
    "attention_logits",
    "attention_ranking_loss",
    "audit_recommender",
    "autoregressive_queries",
    "backward_compatible_loss",
    "backward_compatible_terms",
    "best_documents",
    "bidirectional_repair_loss",
    "blockrank_attention",
    "blockrank_block_mask",
    "blockrank_mask",
    "blockrank_position_ids",
    "class_prototypes",
    "compatibility_report",
    "content_keys",
    "decoupled_score_loss",
    "document_log_prior",
    "draw_positives",
    "embedding_table",
    "evaluate_demonstrations",
    "expert_load",
    "few_shot_queries",
    "gate_contrastive_loss",
    "hard_negative_indices",
    "joined_scores",
    "late_interaction_scores",
    "list_distillation_loss",
    "mann_whitney_loss",
    "marginal_class_log_probs",
    "marginal_nll",
    "mask_histories",
    "match_loss",
    "mean_similarity_distribution",
    "merge_checkpoints",
    "multi_positive_info_nce_loss",
    "multi_positive_softmax_loss",
    "pearson_loss",
    "pooled_auc",
    "positive_pairs",
    "preference_order_loss",
    "procrustes_map",
    "random_history_mask",
    "random_queries",
    "rank_kl_loss",
    "reader_agreement",
    "reader_ranked_loss",
    "roc_curve_pooled",
    "sample_documents",
    "sdm_loss",
    "shuffled_episode",
    "small_mixture_ranker",
    "small_retrieval_reader",
    "soft_topk_loss",
    "threshold_at_fpr",
    "threshold_report",
    "train_retrieval_reader",
    "with_candidates",
]
