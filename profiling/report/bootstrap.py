"""How sure a ratio of two series of timings is: a bootstrap that respects that neighbouring steps resemble each other.

Step times drift (clocks, neighbours, caches), so resampling single steps would claim too much. Blocks are resampled instead:
the circular block bootstrap of Politis and Romano (1992), with the block length of Politis and White (2004) as corrected by
Patton, Politis and White (2009), 1 for steps that do not depend on each other. For a median it is chosen on the
ranks, which outliers do not move; for a mean on the series itself.

The interval is the percentile interval of 10,000 resamples, from a fixed seed: the same samples give the same answer. It is
meant to hold the truth 95 times in 100; test_compare.py counts how often it does in made-up series, and asks for less
where steps depend on each other: profile more of them where they drift.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

_CONFIDENCE = 0.95
MIN_SAMPLES = 6
"""Below this not even the whole range holds a median with 95%: the smallest and largest of n samples enclose it with
probability 1 - 2^(1 - n), 93.75% of 5 and 96.9% of 6."""
MAX_SAMPLES = 2000
"""Of longer series the last ones are used."""
RESAMPLES = 10_000
_CHUNK = 50

Statistic = Literal["median", "mean"]
SampleSeries = NDArray[np.float64]


class Ratio(NamedTuple):
    value: float
    low: float | None
    """Of the interval; None: too few samples to tell."""
    high: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


def ratio_of(a: Sequence[float], b: Sequence[float], statistic: Statistic = "median", seed: int = 0) -> Ratio | None:
    """Statistic of b over that of a, with its 95% interval; None if that of a is 0 or there are no samples."""
    if not len(a) or not len(b):
        return None
    first, second = (np.asarray(series, dtype=np.float64)[-MAX_SAMPLES:] for series in (a, b))
    estimate = np.median if statistic == "median" else np.mean
    below = float(estimate(first))
    if below == 0:
        return None
    value = float(estimate(second)) / below
    if min(len(first), len(second)) < MIN_SAMPLES:
        return Ratio(value, None, None)
    generators = np.random.default_rng(seed).spawn(2)
    with ThreadPoolExecutor(2) as pool:  # numpy holds no lock where the time goes
        below_R, above_R = pool.map(partial(_resampled, statistic=statistic), (first, second), generators)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.nanquantile(above_R / below_R, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2]).tolist()
    return Ratio(value, low, high)


def _resampled(series: SampleSeries, random: np.random.Generator, statistic: Statistic) -> SampleSeries:
    """The statistic of RESAMPLES resamples."""
    n = len(series)
    length = block_length(series.argsort().argsort().astype(np.float64) if statistic == "median" else series)
    if length == 1 and statistic == "median":
        return resampled_medians(series, random)
    blocks = -(-n // length)
    estimate = _medians if statistic == "median" else np.mean
    begins_at = np.lib.stride_tricks.sliding_window_view(np.concatenate([series, series[: length - 1]]), length)
    estimates = []
    for _ in range(RESAMPLES // _CHUNK):
        # MAX_SAMPLES fits in 16 bits, which are drawn and looked up in half the time of 64.
        starts = random.integers(n, size=(_CHUNK, blocks), dtype=np.uint16)
        estimates.append(estimate(begins_at[starts].reshape(_CHUNK, -1)[:, :n], axis=1))
    return np.concatenate(estimates)


def resampled_medians(series: SampleSeries, random: np.random.Generator) -> SampleSeries:
    """Medians of RESAMPLES resamples of single samples, without the resamples.

    What is drawn are the order statistics in the middle. The k-th smallest of n uniform numbers has the distribution
    Beta(k, n - k + 1); the next one divides what is left above it as the smallest of n - k does (David and Nagaraja, Order
    Statistics, 2003, sections 2.3 and 2.5). n times a uniform number, rounded down, is the place of a sample.
    """
    n, ordered = len(series), np.sort(series)
    k = (n + 1) // 2
    middle = random.beta(k, n - k + 1, size=RESAMPLES)
    after = middle + (1 - middle) * random.beta(1, n - k, size=RESAMPLES)
    lower, upper = (ordered[np.minimum((n * place).astype(np.intp), n - 1)] for place in (middle, after))
    return lower if n % 2 else (lower + upper) / 2


def _medians(samples: SampleSeries, axis: Literal[1]) -> SampleSeries:
    """np.median of finite numbers, whose order is lost, in a fourth of its time: it selects two order statistics and copies,
    where one and a maximum do."""
    middle = samples.shape[axis] // 2
    samples.partition(middle, axis=axis)
    upper: SampleSeries = samples[:, middle]
    return upper.copy() if samples.shape[axis] % 2 else (samples[:, :middle].max(axis=axis) + upper) / 2


def block_length(series: SampleSeries) -> int:
    """Return that of the circular block bootstrap, for the mean of `series`; 1 for a constant or uncorrelated one."""
    n = len(series)
    centred = series - series.mean()
    longest = math.ceil(min(3 * math.sqrt(n), n / 3))
    lags = min(n - 1, math.ceil(math.sqrt(n)) + max(5, math.ceil(math.sqrt(math.log10(n)))))
    covariance = np.array([centred[: n - lag] @ centred[lag:] for lag in range(lags + 1)]) / n
    if covariance[0] <= 1e-24 * float(series @ series) / n:
        return 1
    bandwidth = _bandwidth(covariance / covariance[0], n)
    if bandwidth == 0:
        return 1
    lag = np.arange(1, min(bandwidth, lags) + 1)
    # Flat-top window: 1 up to half the bandwidth, then falling to 0.
    window = np.clip(2 * (1 - lag / bandwidth), 0, 1)
    weighted = window * covariance[lag]
    spectrum = covariance[0] + 2 * weighted.sum()
    slope = 2 * (weighted * lag).sum()
    if spectrum <= 0:  # negatively correlated steps: blocks would only widen what is narrow
        return 1
    return max(1, min(longest, round(float((2 * slope**2 / (4 / 3 * spectrum**2) * n) ** (1 / 3)))))


def _bandwidth(correlation: SampleSeries, n: int) -> int:
    """Twice the last lag before `run` of them in a row are indistinguishable from 0."""
    run, threshold = max(5, math.ceil(math.sqrt(math.log10(n)))), 2 * math.sqrt(math.log10(n) / n)
    small = np.abs(correlation[1:]) < threshold
    for last in range(len(small)):
        if small[last : last + run].all():
            return 2 * last
    return 2 * len(small)
