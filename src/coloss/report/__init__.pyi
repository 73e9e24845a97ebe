from .evidence_figure import difference_svg as difference_svg
from .html import render_report as render_report
from .html import write_report as write_report
from .quantities import Quantity as Quantity
from .quantities import describe_metric as describe_metric
from .ranking import Row as Row
from .ranking import rank_arms as rank_arms
from .wording import headline as headline
