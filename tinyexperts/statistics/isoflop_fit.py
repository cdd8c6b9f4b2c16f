"""The best model size of one training budget: a parabola of the loss in the logarithm of the size.

As in the isoFLOP method of Hoffmann et al. (arXiv 2203.15556), which the paper uses. A minimum is named only where it
is interior to the sizes that were run, with all of its interval. Grids that are wide or off center bias a parabola: the
residuals show it, and power_law_fit.py doesn't have that fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

NUM_RESAMPLES = 2000
# The share of resamples beyond an end of the grid above which the interval is open at that end.
_TAIL = 0.025


@dataclass(frozen=True, kw_only=True, eq=False)
class IsoFlopFit:
    """Loss = curvature (log size - log optimum)^2 + loss_at_optimum, fitted to all sizes and seeds of a budget."""

    coefficients: tuple[float, float, float]
    """The parabola in the logarithm of the size, the highest power first."""
    residuals: np.ndarray
    """Measured minus fitted loss in nats, in the order of the points."""
    refusal: str | None = None
    """The reason why no size of least loss can be named; None where `optimum` is one."""
    optimum: float | None = None
    """The size of least loss."""
    loss_at_optimum: float | None = None
    optimum_interval: tuple[float, float] | None = None
    """95 %, by resampled residuals; 0 or infinity at an end that the grid does not close (then there is no optimum);
    None where there are no more points than a parabola has parameters."""
    loss_interval: tuple[float, float] | None = None

    @property
    def has_curve(self) -> bool:
        """True where there were sizes enough for a parabola, with or without a minimum."""
        return bool(np.isfinite(self.coefficients).all())

    def loss_at(self, size: float) -> float:
        """Return the fitted loss in nats."""
        return float(np.polyval(self.coefficients, np.log(size)))


def fit_isoflop(sizes: Sequence[float], losses: Sequence[float], *, seed: int = 0) -> IsoFlopFit:
    """Fit the runs of one budget.

    Args:
        sizes (Sequence[float]): the size of each run: parameters, any count of them. Seeds are points of one size.
        losses (Sequence[float]): the loss of each run in nats.
        seed (int): the seed of the resamples.

    Raises:
        ValueError: counts that differ, sizes that are not positive, losses that are not finite.
    """
    size, loss = np.asarray(sizes, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if size.shape != loss.shape or not (size > 0).all() or not np.isfinite(loss).all():
        raise ValueError(f"sizes must be positive and losses finite, one each, got {sizes} and {losses}")
    if len(np.unique(size)) < 3:
        refusal = f"a parabola needs three sizes, got {len(np.unique(size))}"
        return IsoFlopFit(coefficients=(np.nan, np.nan, np.nan), residuals=loss, refusal=refusal)
    center = np.log(size).mean()
    design = np.vander(np.log(size) - center, 3)
    solve = np.linalg.pinv(design)
    fitted = solve @ loss
    residuals = loss - design @ fitted
    a, b, c = fitted
    coefficients = (float(a), float(b - 2 * a * center), float(a * center**2 - b * center + c))
    refused = partial(IsoFlopFit, coefficients=coefficients, residuals=residuals)
    low, high = float(size.min()), float(size.max())
    if a <= 0:
        return refused(refusal="the losses do not rise towards both ends of the sizes")
    optimum = float(np.exp(center - b / (2 * a)))
    if not low < optimum < high:
        side = "smaller" if optimum <= low else "larger"
        where = f"outside of the sizes that were run, {low:,.0f} to {high:,.0f}"
        return refused(refusal=f"the least loss lies {where}: run {side} ones")
    if len(size) == 3:
        return refused(refusal="a parabola through three runs leaves nothing to judge it by")
    # A fit pulls its points towards itself, those at the ends most: its residuals are too small by that.
    leverage = np.einsum("ij,ji->i", design, solve)
    scaled = residuals / np.sqrt(np.clip(1 - leverage, 1e-9, None))
    scaled -= scaled.mean()
    drawn = np.random.default_rng(seed).choice(scaled, (NUM_RESAMPLES, len(size)))
    a_r, b_r, c_r = solve @ (design @ fitted + drawn).T
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(a_r > 0, center - b_r / (2 * a_r), np.nan)
        least = np.where(a_r > 0, c_r - b_r**2 / (4 * a_r), np.nan)
    # A resample without a minimum closes neither end.
    ends = (
        np.quantile(np.where(np.isnan(logs), -np.inf, logs), _TAIL, method="nearest"),
        np.quantile(np.where(np.isnan(logs), np.inf, logs), 1 - _TAIL, method="nearest"),
    )
    optimum_interval = (
        0.0 if ends[0] < np.log(low) else float(np.exp(ends[0])),
        np.inf if ends[1] > np.log(high) else float(np.exp(ends[1])),
    )
    if optimum_interval[0] == 0.0 or np.isinf(optimum_interval[1]):
        refusal = "the interval of the minimum leaves the sizes that were run"
        return refused(refusal=refusal, optimum_interval=optimum_interval)
    quantiles = np.nanquantile(least, [_TAIL, 1 - _TAIL])
    loss_interval = (float(quantiles[0]), float(quantiles[1]))
    return IsoFlopFit(
        coefficients=coefficients,
        optimum=optimum,
        loss_at_optimum=float(c - b**2 / (4 * a)),
        optimum_interval=optimum_interval,
        loss_interval=loss_interval,
        residuals=residuals,
    )
