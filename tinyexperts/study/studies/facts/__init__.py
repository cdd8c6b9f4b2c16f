"""The study of facts: what four kinds of feed-forward layer store at equal training FLOPs."""

from tinyexperts.study.studies.facts.study import FACTS

__all__ = ["FACTS"]
