"""The list of all studies, and a study by its name."""

from __future__ import annotations

from tinyexperts.errors import InputError
from tinyexperts.study.demo import DEMO
from tinyexperts.study.studies.active_experts import ACTIVE_EXPERTS, GRANULARITY
from tinyexperts.study.studies.facts import FACTS
from tinyexperts.study.studies.isoflop import ISOFLOP
from tinyexperts.study.studies.lifelong import LIFELONG
from tinyexperts.study.studies.num_experts import NUM_EXPERTS
from tinyexperts.study.studies.optimizer import OPTIMIZER
from tinyexperts.study.studies.placement import PLACEMENT
from tinyexperts.study.studies.query_norm import QUERY_NORM, USAGE
from tinyexperts.study.studies.variants import VARIANTS
from tinyexperts.study.study import Study

STUDIES = (
    *(ISOFLOP, NUM_EXPERTS, ACTIVE_EXPERTS, QUERY_NORM, USAGE),
    *(PLACEMENT, OPTIMIZER, GRANULARITY, VARIANTS, FACTS, LIFELONG),
)


def study_named(name: str) -> Study:
    """Return a study, or the demo, by its name.

    Args:
        name (str): the name, as in the command.

    Raises:
        InputError: there is no such study.
    """
    found = next((study for study in (*STUDIES, DEMO) if study.name == name), None)
    if found is None:
        raise InputError(f"there is no study {name!r}: {', '.join(study.name for study in STUDIES)}")
    return found
