from .measure import Cost as Cost
from .measure import cost_here as cost_here
from .measure import cost_in_fresh_process as cost_in_fresh_process
from .measure import interleaved as interleaved
from .row import Row as Row
from .runner import run_benchmarks as run_benchmarks
