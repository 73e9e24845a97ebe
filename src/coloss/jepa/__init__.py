"""Joint-embedding prediction: encoders learnt without labels, what keeps them from collapsing, and meters of it."""

from coloss.data import default_views as default_views
from coloss.metrics import alignment as alignment
from coloss.metrics import feature_standard_deviation as feature_standard_deviation
from coloss.metrics import uniformity as uniformity
from coloss.nn import projection_head as projection_head
from coloss.ops import epps_pulley as epps_pulley
from coloss.train import FeatureSource as FeatureSource
from coloss.train import second_look as second_look

from .lejepa import LeJEPA as LeJEPA
from .lejepa import SIGReg as SIGReg
from .lejepa import invariance_loss as invariance_loss
from .lejepa import lejepa_loss as lejepa_loss
from .pretraining import load_encoder as load_encoder
from .pretraining import pretrain_lejepa as pretrain_lejepa
from .rank_monitor import CollapseWarning as CollapseWarning
from .rank_monitor import EffectiveRankMonitor as EffectiveRankMonitor
from .rankme import RankInterval as RankInterval
from .rankme import alpha_req as alpha_req
from .rankme import entropy_rank as entropy_rank
from .rankme import lidar as lidar
from .rankme import participation_ratio as participation_ratio
from .rankme import rankme as rankme
from .rankme import rankme_interval as rankme_interval
from .rankme import stable_rank as stable_rank
from .univariate import anderson_darling as anderson_darling
from .univariate import cramer_von_mises as cramer_von_mises
from .univariate import extended_jarque_bera as extended_jarque_bera
from .univariate import moment_match as moment_match
from .univariate import quantile_match as quantile_match
from .univariate import sliced_wasserstein as sliced_wasserstein

__all__ = [
    "CollapseWarning",
    "EffectiveRankMonitor",
    "FeatureSource",
    "LeJEPA",
    "RankInterval",
    "SIGReg",
    "alignment",
    "alpha_req",
    "anderson_darling",
    "cramer_von_mises",
    "default_views",
    "entropy_rank",
    "epps_pulley",
    "extended_jarque_bera",
    "feature_standard_deviation",
    "invariance_loss",
    "lejepa_loss",
    "lidar",
    "load_encoder",
    "moment_match",
    "participation_ratio",
    "pretrain_lejepa",
    "projection_head",
    "quantile_match",
    "rankme",
    "rankme_interval",
    "second_look",
    "sliced_wasserstein",
    "stable_rank",
    "uniformity",
]
