"""95 % intervals of differences between means, by Student's t. Without SciPy, whose quantiles these
are."""
import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

LEVEL = 0.95


class Difference(NamedTuple):
    """Of two means, with the interval that holds the true one in 95 of 100 repetitions."""

    mean: float
    std: float | None  # sample standard deviation of the paired differences; None: not paired
    low: float | None  # None for one value
    high: float | None
    n: int  # pairs, or the smaller number of values
    method: str  # paired, welch, or empty where there is no interval


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """first - second over the seeds that both have; None where they share none."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    values = [first[seed] - second[seed] for seed in seeds]
    mean = statistics.mean(values)
    if len(values) == 1:
        return Difference(mean, None, None, None, 1, "")
    std = statistics.stdev(values)
    half = t_quantile(len(values) - 1) * std / math.sqrt(len(values))
    return Difference(mean, std, mean - half, mean + half, len(values), "paired")


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """mean(first) - mean(second), paired where the seeds are the same, else after Welch (1947),
    which takes them for independent."""
    if first.keys() == second.keys():
        return paired(first, second)
    mean = statistics.mean(first.values()) - statistics.mean(second.values())
    n = min(len(first), len(second))
    if n == 1:
        return Difference(mean, None, None, None, 1, "")
    parts = [(statistics.variance(values.values()) / len(values), len(values) - 1)
             for values in (first, second)]
    squared = sum(part for part, _ in parts)
    half = 0.0
    if squared > 0:
        freedom = squared ** 2 / sum(part ** 2 / freedom for part, freedom in parts)
        half = t_quantile(freedom) * math.sqrt(squared)
    return Difference(mean, None, mean - half, mean + half, n, "welch")


def t_quantile(freedom: float, level: float = LEVEL) -> float:
    """t with P(|T| <= t) = level, by bisection."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if _within(middle, freedom) < level:
            low = middle
        else:
            high = middle
    return high


def _within(t: float, freedom: float) -> float:
    """P(|T| <= t) = 1 - I_x(freedom / 2, 1 / 2) with x = freedom / (freedom + t^2)
    (Abramowitz and Stegun, 26.7.1 and 26.5.27)."""
    return 1 - regularised_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def regularised_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b), by the continued fraction of Abramowitz and Stegun, 26.5.8."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - regularised_beta(1 - x, b, a)
    log_front = (math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
                 + a * math.log(x) + b * math.log1p(-x))
    # From its far end: after 500 terms nothing is left of what is cut off.
    fraction = 1.0
    for m in range(500, 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        fraction = 1 + even / (1 + odd / fraction)
    fraction = 1 - (a + b) * x / (a + 1) / fraction
    return math.exp(log_front) / (a * fraction)
