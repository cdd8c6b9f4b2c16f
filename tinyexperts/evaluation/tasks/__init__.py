"""The tasks of an evaluation, in the order of their keys in evaluation.json."""

from tinyexperts.evaluation.tasks.expert_usage import EXPERT_USAGE
from tinyexperts.evaluation.tasks.perplexity import PERPLEXITY

TASKS = (PERPLEXITY, EXPERT_USAGE)
