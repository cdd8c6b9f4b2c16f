"""Adam on the touched rows of a table."""

from tinyexperts.ops.row_adam.operator import row_adam_

__all__ = ["row_adam_"]
