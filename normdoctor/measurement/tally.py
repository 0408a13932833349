"""What was seen of one norm, batch by batch → what is known of it over all of the data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from normdoctor.measured import Measured
from normdoctor.measurement.curves import fit_curves
from normdoctor.measurement.walks import Seen, TokensSeen, Vector
from normdoctor.moments import Moments

ENOUGH_BATCHES = 8
"""With fewer the spread between batches is told from the spread between samples."""


@dataclass(frozen=True, eq=False)
class Part:
    """What one batch tells of one norm."""

    index: int
    """The batch's place among all."""
    size: int
    """Samples in it."""
    moments: Moments
    of_samples: Moments | None
    """The moments of the means of samples, where they were taken."""
    active: Vector | None
    """Values above 0 behind the norm, by channel."""
    tokens: TokensSeen | None = None

    @classmethod
    def of(cls, index: int, size: int, seen: Seen) -> Part:
        means = None if seen.sample_means is None else Moments.of(seen.sample_means)
        active = None if seen.active is None else seen.active * seen.moments.count
        return cls(index, size, seen.moments, means, active, seen.tokens)


@dataclass(eq=False)
class Tally:
    """All batches of one norm so far. Parts are added in the order of the batches, so that sums are repeatable."""

    moments: Moments | None = None
    """Over all values."""
    samples: int = 0
    batches: int = 0
    share_different: float = 1.0
    """Share of the samples that are no copies of others."""
    _parts: int = 0
    _last: int = -1
    _size: int = 0
    """Samples in a whole batch: in the first one."""
    _of_samples: Moments | None = None
    _of_batches: Moments | None = None
    """The moments of the means of whole batches, and of their variances behind them."""
    _active: Vector | None = None
    _tokens: TokensSeen | None = None

    def add(self, part: Part) -> None:
        if part.index != self._last:
            self.samples += part.size
            self.batches += 1
            self._last = part.index
        self._parts += 1
        self._size = self._size or part.size
        self.moments = _sum(self.moments, part.moments)
        if part.of_samples is not None:
            self._of_samples = _sum(self._of_samples, part.of_samples)
        if part.size == self._size:
            both = np.concatenate([part.moments.mean, part.moments.variance()])
            self._of_batches = _sum(self._of_batches, Moments(1, both, np.zeros_like(both)))
        if part.active is not None:
            self._active = part.active if self._active is None else self._active + part.active
        if part.tokens is not None:
            self._tokens = part.tokens if self._tokens is None else self._tokens + part.tokens

    def total(self) -> Moments:
        """Over all values; there must have been some."""
        assert self.moments is not None
        return self.moments

    def standard_error(self) -> Vector | None:
        """Of the mean of each channel, in its standard deviations; None where nothing can be said."""
        effective = self._effective()
        return None if effective is None else np.asarray(1 / np.sqrt(effective))

    def measured(self) -> Measured:
        """The record that rules judge."""
        moments, effective = self.total(), self._effective()
        mean_spread, var_spread = self._spreads(effective)
        if self._tokens is not None:
            return self._of_tokens(self._tokens)
        return Measured(
            moments=moments,
            samples=self.samples,
            batches=self.batches,
            calls=max(1, round(self._parts / self.batches)),
            mean_spread=mean_spread,
            var_spread=var_spread,
            effective=effective,
            active=None if self._active is None else self._active / moments.count,
        )

    def _of_tokens(self, tokens: TokensSeen) -> Measured:
        """The record of a norm without statistics."""
        curve = None if tokens.points is None else fit_curves(tokens.points)
        return Measured(
            moments=self.total(),
            samples=self.samples,
            batches=self.batches,
            calls=max(1, round(self._parts / self.batches)),
            starved=None if tokens.points is None else tokens.starved / tokens.count,
            saturated=None if tokens.points is not None else tokens.saturated / tokens.count,
            input_sd=float(np.sqrt(self.total().variance()[0])),
            tanh_fit=None if curve is None else curve.tanh,
            linear_fit=None if curve is None else curve.linear,
            tanh_alpha=None if curve is None else curve.alpha,
        )

    def _effective(self) -> Vector | None:
        """samples * variance / variance of the means of samples: at most the count."""
        if self._of_samples is None or self._of_samples.count < 2:
            return None
        moments, between = self.total(), self._of_samples.variance(1)
        most = max(1.0, self.share_different * moments.count)
        with np.errstate(divide="ignore", invalid="ignore"):
            effective = self.share_different * self.samples * moments.variance() / between
        # Where the means of all samples are one number there is nothing that one more sample could add.
        return np.asarray(np.clip(np.where(between > 0, effective, most), 1.0, most))

    def _spreads(self, effective: Vector | None) -> tuple[Vector | None, Vector | None]:
        """Standard deviations, between batches, of the mean and of the variance of a batch."""
        if self._of_batches is not None and self._of_batches.count >= ENOUGH_BATCHES:
            means, variances = np.split(np.sqrt(self._of_batches.variance(1)), 2)
            return means, variances
        if effective is None:
            return None, None
        of_batch = np.maximum(effective * self._size / self.samples, 1.0)
        variance = self.total().variance()
        # A Gaussian's: Var(mean) = v / n, Var(variance) = 2 v^2 / n.
        return np.sqrt(variance / of_batch), variance * np.sqrt(2 / of_batch)


def _sum(before: Moments | None, more: Moments) -> Moments:
    return more if before is None else before + more
