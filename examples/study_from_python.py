"""A study from Python: a grid of small runs, and a table with a row for each.

python examples/study_from_python.py data/stdlib runs/example-study
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from tinyexperts.study.analysis.frame import read_runs
from tinyexperts.study.run_study import StudyConfig, run_study
from tinyexperts.study.runner.study_folder import StudyFolder
from tinyexperts.study.studies.num_experts import NUM_EXPERTS


def main(data: Path, output: Path) -> pd.DataFrame:
    """Run the ablation of the number of experts at its smallest scale; return the mean loss by budget and number."""
    run_study(NUM_EXPERTS, StudyConfig(scale="minute", data=data, output=output))
    runs = read_runs(StudyFolder(output)).done
    return runs.pivot_table(values="loss, held out", index="num_experts", columns="budget")


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2])))
