"""Evaluation: perplexity, bits per byte, expert usage, and the tasks that measure them."""

from tinyexperts.evaluation.evaluate import Evaluation, evaluate
from tinyexperts.evaluation.expert_usage import ExpertUsage, expert_usage, recorded_expert_usage
from tinyexperts.evaluation.perplexity import LossByCopy, Perplexity, bigram_stood_earlier, measure_perplexity
from tinyexperts.evaluation.task import Subject, TaskResult

__all__ = [
    "Evaluation",
    "ExpertUsage",
    "LossByCopy",
    "Perplexity",
    "Subject",
    "TaskResult",
    "bigram_stood_earlier",
    "evaluate",
    "expert_usage",
    "measure_perplexity",
    "recorded_expert_usage",
]
