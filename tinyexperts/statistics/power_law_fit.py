"""Scaling laws fitted to runs: loss = c + the sum of terms, each a coefficient times powers of what was varied.

The laws are linear in c and the coefficients, which are at least 0, so only the exponents are searched, from a grid of
starts, and the rest is solved for each (variable projection). The loss is Huber's, so that a run that went astray pulls
little.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # brings what is called of it when it is called: stats would take a second

# Residuals beyond it (nats) count linearly.
HUBER_DELTA = 0.02
_STARTS = (0.1, 0.3, 0.6, 1.0)
_BOUNDS = (0.01, 3.0)
_POLISHED_STARTS = 5
_MAX_REWEIGHTINGS = 50
_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Term:
    """coefficient / (variable^exponent ...): the coefficient's name, and each variable's exponent by name."""

    coefficient: str
    exponents: Mapping[str, str]


# L(P, D) = c + a / P^alpha + b / D^beta, with P parameters and D tokens (arXiv 2203.15556).
SIZE_AND_TOKENS = (
    Term(coefficient="a", exponents={"P": "alpha"}),
    Term(coefficient="b", exponents={"D": "beta"}),
)
# L(P, D, G) = c + (g / G^gamma + a) / P^alpha + b / D^beta, with G the granularity (arXiv 2402.07871).
WITH_GRANULARITY = (Term(coefficient="g", exponents={"G": "gamma", "P": "alpha"}), *SIZE_AND_TOKENS)


@dataclass(frozen=True, kw_only=True, eq=False)
class PowerLawFit:
    """A fitted law."""

    terms: tuple[Term, ...]
    constant: float
    """c, the loss (nats) that no size removes."""
    coefficients: dict[str, float]
    exponents: dict[str, float]
    residuals: np.ndarray
    """Measured minus fitted loss in nats, in the order of the runs."""
    intervals: dict[str, tuple[float, float]]
    """The values of every exponent, and of c, with which the law, all else fitted again, is no worse than chance
    explains (95 %, an F test, which takes the runs' deviations as independent of each other)."""
    open_ends: dict[str, tuple[bool, bool]]
    """True where an interval leaves the values that were searched, below and above; from 0 for c."""

    @property
    def undetermined(self) -> tuple[str, ...]:
        """Exponents, and c, of which an end is open: without such a c the runs are fitted as well."""
        return tuple(name for name, is_open in self.open_ends.items() if any(is_open))

    def loss(self, **variables: float) -> float:
        """Return the fitted loss in nats."""
        total = self.constant
        for term in self.terms:
            value = self.coefficients[term.coefficient]
            for variable, exponent in term.exponents.items():
                value /= variables[variable] ** self.exponents[exponent]
            total += value
        return total


def fit_power_law(
    terms: Sequence[Term], variables: Mapping[str, Sequence[float]], losses: Sequence[float]
) -> PowerLawFit:
    """Fit a law to runs.

    Args:
        terms (Sequence[Term]): the terms of the law.
        variables (Mapping[str, Sequence[float]]): the values of each variable, one a run.
        losses (Sequence[float]): the loss of each run in nats.

    Raises:
        ValueError: a variable that is missing, values that are not positive, or fewer different runs than the law has
            parameters: seeds of one size are one.
    """
    terms = tuple(terms)
    names = tuple(dict.fromkeys(name for term in terms for name in term.exponents.values()))
    wanted = {variable for term in terms for variable in term.exponents}
    loss = np.asarray(losses, dtype=np.float64)
    values = {name: np.asarray(variables[name], dtype=np.float64) for name in wanted & variables.keys()}
    if values.keys() != wanted or any(v.shape != loss.shape or not (v > 0).all() for v in values.values()):
        raise ValueError(f"the law wants positive {', '.join(sorted(wanted))}, one for each of {len(loss)} losses")
    num_parameters = 1 + len(terms) + len(names)
    num_different = len(np.unique(np.stack([values[name] for name in sorted(wanted)]), axis=1).T)
    if num_different < num_parameters:
        raise ValueError(f"the law has {num_parameters} parameters, and there are {num_different} different runs")
    # Relative to their geometric mean, so that the columns of the linear problem are of one size.
    middle = {name: float(np.exp(np.log(v).mean())) for name, v in values.items()}

    def design(exponents: np.ndarray) -> np.ndarray:
        by_name = dict(zip(names, exponents, strict=True))
        columns = [np.ones_like(loss)]
        for term in terms:
            logs = sum(by_name[e] * np.log(values[v] / middle[v]) for v, e in term.exponents.items())
            columns.append(np.exp(-logs))
        return np.stack(columns, 1)

    def cost_of(exponents: np.ndarray, constant: float | None) -> float:
        if not ((exponents >= _BOUNDS[0]) & (exponents <= _BOUNDS[1])).all():
            return np.inf
        matrix = design(exponents)
        return _solve(matrix, loss)[1] if constant is None else _solve(matrix[:, 1:], loss - constant)[1]

    def least(
        held: Mapping[str, float], starts: list[tuple[float, ...]], *, polished: int, tolerance: float
    ) -> tuple[np.ndarray, float]:
        """Return the exponents of least Huber loss, and that loss, with some of them, and c, held at a value."""
        free = [number for number, name in enumerate(names) if name not in held]

        def whole(values: Sequence[float]) -> np.ndarray:
            exponents = np.array([held.get(name, 0.0) for name in names])
            exponents[free] = values
            return exponents

        def objective(values: Sequence[float]) -> float:
            return cost_of(whole(values), held.get("c"))

        starts = sorted({tuple(start[number] for number in free) for start in starts}, key=objective)[:polished]
        if not free:
            return whole(()), objective(())
        tolerances = {"xatol": tolerance, "fatol": tolerance**2, "maxiter": 4000, "maxfev": 4000}
        found = [
            scipy.optimize.minimize(objective, start, method="Nelder-Mead", options=tolerances) for start in starts
        ]
        best = min(found, key=lambda result: result.fun)
        return whole(best.x), float(best.fun)

    grid = list(itertools.product(_STARTS, repeat=len(names)))
    exponents, cost = least({}, grid, polished=_POLISHED_STARTS, tolerance=1e-7)
    matrix = design(exponents)
    solution, _ = _solve(matrix, loss)
    constant = float(solution[0])
    by_name = dict(zip(names, map(float, exponents), strict=True))
    coefficients = {
        term.coefficient: float(solution[1 + number])
        * float(np.prod([middle[v] ** by_name[e] for v, e in term.exponents.items()]))
        for number, term in enumerate(terms)
    }
    spare = len(loss) - num_parameters
    # The loss plus what a parameter without an effect would take from it by chance.
    limit = cost * (1 + float(scipy.special.fdtri(1, spare, _CONFIDENCE)) / spare) if spare else np.inf
    near = [*grid, tuple(map(float, exponents))]

    def beyond(name: str) -> Callable[[float], float]:
        return lambda value: least({name: value}, near, polished=1, tolerance=1e-4)[1] - limit

    intervals: dict[str, tuple[float, float]] = {}
    open_ends: dict[str, tuple[bool, bool]] = {}
    for name, found in {**by_name, "c": constant}.items():
        ends = (0.0, float(loss.max())) if name == "c" else _BOUNDS
        low, high = (_crossing(beyond(name), found, end) for end in ends)
        intervals[name], open_ends[name] = (low, high), (low == ends[0], high == ends[1])
    return PowerLawFit(
        terms=terms,
        constant=constant,
        coefficients=coefficients,
        exponents=by_name,
        residuals=loss - matrix @ solution,
        intervals=intervals,
        open_ends=open_ends,
    )


def _crossing(rise: Callable[[float], float], inside: float, end: float) -> float:
    """Return the end of an interval between a value inside and the end of the search; or that end."""
    if rise(end) <= 0:
        return end
    return inside if rise(inside) >= 0 else float(scipy.optimize.brentq(rise, inside, end, xtol=1e-4))


def _solve(matrix: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the coefficients, at least 0, of least Huber loss, by reweighted least squares; and that loss."""
    weights, before = np.ones_like(loss), np.inf
    for _ in range(_MAX_REWEIGHTINGS):
        root = np.sqrt(weights)
        solution, _ = scipy.optimize.nnls(matrix * root[:, None], loss * root)
        size = np.abs(loss - matrix @ solution)
        cost = float(np.where(size <= HUBER_DELTA, size**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2)).sum())
        if cost >= before * (1 - 1e-10):
            break
        before, weights = cost, HUBER_DELTA / np.maximum(size, HUBER_DELTA)
    return solution, cost
