"""Distillation: one network learns from another."""

from coloss.ops import binary_kl_loss as binary_kl_loss
from coloss.ops import dist_loss as dist_loss
from coloss.ops import distillation_kl_loss as distillation_kl_loss
from coloss.ops import dkd_loss as dkd_loss
from coloss.ops import gradient_cosine as gradient_cosine
from coloss.ops import logit_gap_loss as logit_gap_loss
from coloss.ops import project_conflicting as project_conflicting
from coloss.ops import standardized_logits as standardized_logits

from .conflict_report import Agreement as Agreement
from .conflict_report import ConflictReport as ConflictReport
from .conflict_report import conflict_report as conflict_report
from .dual_head import DualHead as DualHead
from .dual_head import DualHeadDistillation as DualHeadDistillation
from .dual_head import auxiliary_head as auxiliary_head
from .logit_distillation import LogitDistillation as LogitDistillation
from .teacher import TeacherLogits as TeacherLogits
from .teacher import tabulate_teacher_logits as tabulate_teacher_logits

__all__ = [
    "Agreement",
    "ConflictReport",
    "DualHead",
    "DualHeadDistillation",
    "LogitDistillation",
    "TeacherLogits",
    "auxiliary_head",
    "binary_kl_loss",
    "conflict_report",
    "dist_loss",
    "distillation_kl_loss",
    "dkd_loss",
    "gradient_cosine",
    "logit_gap_loss",
    "project_conflicting",
    "standardized_logits",
    "tabulate_teacher_logits",
]
