"""Runs compared: methods, the results of runs, paired differences, and the report of runs side by side."""

from tinyexperts.extras import require_extra

require_extra("study", __name__)
