"""The tasks of an evaluation by their names, in the order of their keys in evaluation.json."""

from tinyexperts.evaluation.tasks.expert_usage import evaluate_expert_usage
from tinyexperts.evaluation.tasks.facts import evaluate_facts
from tinyexperts.evaluation.tasks.perplexity import evaluate_perplexity

TASKS = {"perplexity": evaluate_perplexity, "expert_usage": evaluate_expert_usage, "facts": evaluate_facts}
