"""Evaluation: perplexity, bits per byte, expert usage, and the tasks that measure them."""

from tinyexperts.evaluation.answer import Answer, FiredExpert, answer
from tinyexperts.evaluation.evaluate import Evaluation, evaluate
from tinyexperts.evaluation.expert_usage import ExpertUsage, expert_usage, recorded_expert_usage
from tinyexperts.evaluation.facts import FactRecall, Recall, measure_facts
from tinyexperts.evaluation.fired import Firing, recorded_firing
from tinyexperts.evaluation.perplexity import LossByCopy, Perplexity, bigram_stood_earlier, measure_perplexity
from tinyexperts.evaluation.task import Subject, TaskResult

__all__ = [
    "Answer",
    "Evaluation",
    "ExpertUsage",
    "FactRecall",
    "FiredExpert",
    "Firing",
    "LossByCopy",
    "Perplexity",
    "Recall",
    "Subject",
    "TaskResult",
    "answer",
    "bigram_stood_earlier",
    "evaluate",
    "expert_usage",
    "measure_facts",
    "measure_perplexity",
    "recorded_expert_usage",
    "recorded_firing",
]
