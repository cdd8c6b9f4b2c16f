"""Sets of runs: the demo, and the report that compares runs."""

from tinyexperts.study.demo import DemoConfig, run_demo
from tinyexperts.study.report import write_report

__all__ = ["DemoConfig", "run_demo", "write_report"]
