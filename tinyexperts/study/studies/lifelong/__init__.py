"""The study of lifelong learning: new facts taught to trained models round by round, and what is left of the old."""

from tinyexperts.study.studies.lifelong.study import LIFELONG

__all__ = ["LIFELONG"]
