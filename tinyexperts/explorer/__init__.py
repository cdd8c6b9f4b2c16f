"""The explorer of a run's experts: where they are, what they promote, which texts fire them, what they hold."""

from tinyexperts.extras import require_extra

require_extra("study", __name__)

from tinyexperts.explorer.inspect_run import inspect_run
from tinyexperts.explorer.knock_out import KnockOut, LossRise, knock_out, knocked_out

__all__ = ["KnockOut", "LossRise", "inspect_run", "knock_out", "knocked_out"]
