"""Sets of runs: the demo, the studies of the paper, and the report that compares runs."""

from tinyexperts.study.analysis.report import write_report
from tinyexperts.study.analysis.study_report import write_study_report
from tinyexperts.study.demo import DemoConfig, run_demo
from tinyexperts.study.run_study import StudyConfig, run_study
from tinyexperts.study.runner.run_status import print_status
from tinyexperts.study.runner.study_folder import StudyFolder
from tinyexperts.study.runner.study_run import run_of_study
from tinyexperts.study.study import GridRun, Study

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
