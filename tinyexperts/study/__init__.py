"""Sets of runs: the demo, the studies of the paper, and the report that compares runs."""

from tinyexperts.extras import require_extra

require_extra("study", __name__)
