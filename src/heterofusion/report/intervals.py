"""Means over seeds with 95% intervals, and differences that are paired by seed."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95

Seed = str | None  # None: a result that no seed was given for
# One value per seed and combination of the labels that two sides are paired by.
Cells = Mapping[tuple[str, ...], Mapping[Seed, float]]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: the mean.
        half_width: half the width of the 95% t interval; None with one value, which says nothing of the spread.
        values: the values.
    """

    mean: float
    half_width: float | None
    values: tuple[float, ...]

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends of the interval; None with one value."""
        return None if self.half_width is None else (self.mean - self.half_width, self.mean + self.half_width)

    def text(self, signed: bool = False) -> str:
        """`0.563 ± 0.012`, or the value alone if there is one; with the sign of a difference on request."""
        mean = f"{self.mean:{'+' if signed else ''}.3f}"
        if float(mean) == 0:  # no -0.000
            mean = "0.000"
        return mean if self.half_width is None else f"{mean} ± {self.half_width:.3f}"

    def plain(self) -> dict[str, float | int | list[float] | None]:
        """For JSON."""
        return {"mean": self.mean, "half_width": self.half_width, "n": len(self.values), "values": list(self.values)}


def estimate(values: Iterable[float]) -> Estimate | None:
    """Mean and 95% interval by Student's t, one value per seed; None of no values.

    Args:
        values: one value per seed.

    Returns:
        mean ± t(0.975, n - 1) * s / sqrt(n), with s the standard deviation with n - 1 in the denominator.
    """
    values = tuple(values)
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, values)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Estimate(mean, quantile * statistics.stdev(values) / math.sqrt(len(values)), values)


def differences(left: Cells, right: Cells) -> dict[tuple[str, ...], dict[Seed, float]]:
    """Left minus right, where both have the same combination and the same seed.

    What has no seed (a base model, a merge) does not depend on one: it is compared with every seed of the other side.

    Args:
        left: values by combination and seed.
        right: the same.

    Returns:
        Differences by combination and seed; combinations without a pair are left out.
    """
    pairs = {}
    for combination in left.keys() & right.keys():
        ours, theirs = left[combination], right[combination]
        seeds = ours.keys() & theirs.keys()
        if theirs.keys() == {None}:
            seeds = set(ours)
        elif ours.keys() == {None}:
            seeds = set(theirs)
        if seeds:
            pairs[combination] = {
                seed: ours[seed if seed in ours else None] - theirs[seed if seed in theirs else None] for seed in seeds
            }
    return pairs


def mean_per_seed(cells: Cells) -> tuple[dict[Seed, float], list[str]]:
    """Means over the combinations, per seed.

    A seed that a combination lacks is left out: means of other combinations cannot be compared with the rest.

    Args:
        cells: values by combination and seed.

    Returns:
        Mean by seed (the one key None if nothing has a seed), and the seeds that were left out.
    """
    seeded = [set(values) for values in cells.values() if set(values) != {None}]
    kept: set[Seed] = set.intersection(*seeded) if seeded else ({None} if cells else set())
    dropped = set().union(*seeded) - kept
    means = {
        seed: statistics.fmean(values[seed if seed in values else None] for values in cells.values())
        for seed in sorted(kept, key=natural)
    }
    return means, sorted(map(str, dropped), key=natural)


def number(text: object) -> float | None:
    """The finite number that a label is, or None."""
    if isinstance(text, bool):
        return None
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def natural(text: str | None) -> tuple[int, float, str]:
    """Key that sorts numbers as numbers, before words; what is missing comes first."""
    if text is None:
        return (0, 0.0, "")
    value = number(text)
    return (2, 0.0, text) if value is None else (1, value, text)
