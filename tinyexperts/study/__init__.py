"""Sets of runs: the demo, the studies of the paper, and the report that compares runs."""

from tinyexperts.study.demo import DemoConfig, run_demo
from tinyexperts.study.execution.study_folder import StudyFolder
from tinyexperts.study.execution.study_run import run_of_study
from tinyexperts.study.execution.study_status import print_status
from tinyexperts.study.grids.grid import GridRun, Study
from tinyexperts.study.reports.report import write_report
from tinyexperts.study.reports.study_report import write_study_report
from tinyexperts.study.study_runner import StudyConfig, run_study

__all__ = [
    "DemoConfig",
    "GridRun",
    "Study",
    "StudyConfig",
    "StudyFolder",
    "print_status",
    "run_demo",
    "run_of_study",
    "run_study",
    "write_report",
    "write_study_report",
]
