"""The parts of every report: the style of figures, numbers as text, tables, the page."""

from tinyexperts.extras import require_extra

require_extra("study", __name__)
