"""Scaling laws fitted to runs: loss = c + the sum of terms, each a coefficient times powers of what was varied.

The laws are linear in c and the coefficients, which are at least 0, so only the exponents are searched, from a grid of
starts, and the rest is solved for each (variable projection). The loss is Huber's, so that a run that went astray pulls
little.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special  # scipy.stats would take a second to import

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
    """A fitted law.

    constant: c, the loss (nats) that no size removes
    residuals: measured minus fitted loss in nats, in the order of the runs
    undetermined: what the runs leave open: exponents at an end of the range that was searched, those of terms whose
        coefficient is 0, and c, where without it the runs are fitted as well
    """

    terms: tuple[Term, ...]
    constant: float
    coefficients: dict[str, float]
    exponents: dict[str, float]
    residuals: np.ndarray
    undetermined: tuple[str, ...]

    def loss(self, **variables: float) -> float:
        """The fitted loss in nats."""
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
    """Fit a law to runs: the values of each variable, and the losses in nats.

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
    # About their geometric mean, so that the columns of the linear problem are of one size.
    middle = {name: float(np.exp(np.log(v).mean())) for name, v in values.items()}

    def design(exponents: Sequence[float]) -> np.ndarray:
        by_name = dict(zip(names, exponents, strict=True))
        columns = [np.ones_like(loss)]
        for term in terms:
            logs = sum(by_name[e] * np.log(values[v] / middle[v]) for v, e in term.exponents.items())
            columns.append(np.exp(-logs))
        return np.stack(columns, 1)

    def search(first_column: int) -> tuple[np.ndarray, float]:
        """The exponents of least Huber loss, and that loss; without the first column c is 0."""

        def objective(exponents: np.ndarray) -> float:
            if not ((exponents >= _BOUNDS[0]) & (exponents <= _BOUNDS[1])).all():
                return np.inf
            return _solve(design(exponents)[:, first_column:], loss)[1]

        starts = sorted(itertools.product(_STARTS, repeat=len(names)), key=lambda start: objective(np.array(start)))
        tolerances = {"xatol": 1e-6, "fatol": 1e-14, "maxiter": 4000, "maxfev": 4000}
        found = [
            optimize.minimize(objective, start, method="Nelder-Mead", options=tolerances)
            for start in starts[:_POLISHED_STARTS]
        ]
        best = min(found, key=lambda result: result.fun)
        return best.x, float(best.fun)

    exponents, cost = search(0)
    matrix = design(exponents)
    solution, _ = _solve(matrix, loss)
    by_name = dict(zip(names, map(float, exponents), strict=True))
    coefficients = {
        term.coefficient: float(solution[1 + number])
        * float(np.prod([middle[v] ** by_name[e] for v, e in term.exponents.items()]))
        for number, term in enumerate(terms)
    }
    at_bounds = {name for name, e in by_name.items() if min(abs(e - bound) for bound in _BOUNDS) < 1e-3}
    needed = {name for term in terms if coefficients[term.coefficient] > 0 for name in term.exponents.values()}
    # An F test: by how much the loss would rise without c, against what a parameter without an effect would take away.
    spare = len(loss) - num_parameters
    rise = (search(1)[1] - cost) * spare
    without_constant = spare < 1 or rise < cost * float(special.fdtri(1, spare, _CONFIDENCE))
    return PowerLawFit(
        terms=terms,
        constant=float(solution[0]),
        coefficients=coefficients,
        exponents=by_name,
        residuals=loss - matrix @ solution,
        undetermined=(
            *(name for name in by_name if name in at_bounds or name not in needed),
            *(("c",) if without_constant else ()),
        ),
    )


def _solve(matrix: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, float]:
    """The coefficients, at least 0, of least Huber loss, by reweighted least squares; and that loss."""
    weights, before = np.ones_like(loss), np.inf
    for _ in range(_MAX_REWEIGHTINGS):
        root = np.sqrt(weights)
        solution, _ = optimize.nnls(matrix * root[:, None], loss * root)
        size = np.abs(loss - matrix @ solution)
        cost = float(np.where(size <= HUBER_DELTA, size**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2)).sum())
        if cost >= before * (1 - 1e-10):
            break
        before, weights = cost, HUBER_DELTA / np.maximum(size, HUBER_DELTA)
    return solution, cost
