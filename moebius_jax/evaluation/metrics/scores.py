"""Every metric of every picture, and what they come to over any part of a set."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from moebius_jax.evaluation.metrics.distributions import (
    ENOUGH_FOR_FID,
    frechet_distance,
    inception_discriminative_scores,
)
from moebius_jax.evaluation.metrics.names import NEEDS_INCEPTION, Metric

BINS = tuple(i / 10 for i in range(11))

Summary = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What was measured of N pictures.

    Attributes:
        names: of the pictures.
        ratios: share of each that is hole; NaN where no masks were given.
        values: metric → [N, 2], over the whole picture and inside the hole (NaN without one).
        features: (set, part) → [N, 2048], Inception's view of the "result" or "truth", "whole" or "hole";
            empty without metrics that need it.
        images_sha256, masks_sha256: hashes of what was read; the latter None without masks.
    """

    names: list[str]
    ratios: Float[np.ndarray, " N"]
    values: dict[str, Float[np.ndarray, "N 2"]]
    features: dict[tuple[str, str], Float[np.ndarray, "N 2048"]]
    images_sha256: str
    masks_sha256: str | None

    def summary(
        self, metrics: Sequence[Metric], rows: np.ndarray | None = None, *, enough: int = ENOUGH_FOR_FID
    ) -> Summary:
        """What the metrics come to over some of the pictures.

        Args:
            metrics: to report.
            rows: which pictures; None is all.
            enough: of fewer pictures than this, FID, P-IDS and U-IDS are None.

        Returns:
            "count", and for each metric {"whole": …, "hole": …}: means over pictures (over those with a hole)
            or the set's; None where there is nothing to measure.
        """
        rows = np.arange(len(self.names)) if rows is None else rows
        summary: Summary = {"count": len(rows)}
        parts = {"whole": rows, "hole": rows[self.ratios[rows] > 0]}
        for metric in metrics:
            if metric not in NEEDS_INCEPTION:
                for key in (k for k in self.values if k.split("_")[0] == metric):
                    summary[key] = {
                        part: _mean(self.values[key][chosen, i])
                        for i, (part, chosen) in enumerate(parts.items())
                    }
                continue
            found = {
                part: self._of_sets(metric, part, chosen) if len(chosen) >= max(2, enough) else None
                for part, chosen in parts.items()
            }
            if metric == "fid":
                summary["fid"] = found
            else:
                for i, key in enumerate(("p_ids", "u_ids")):
                    summary[key] = {part: pair and pair[i] for part, pair in found.items()}
        return summary

    def without_features(self) -> "Scores":
        """The same without what Inception saw, which of many pictures takes gigabytes."""
        return dataclasses.replace(self, features={})

    def bins(self, metrics: Sequence[Metric], *, enough: int = ENOUGH_FOR_FID) -> list[Summary]:
        """Summaries by the hole's share of the picture, in tenths; empty bins are left out."""
        number = np.digitize(self.ratios, BINS[1:-1])  # a share of 1 belongs to the last
        rows = {i: np.flatnonzero((number == i) & ~np.isnan(self.ratios)) for i in range(len(BINS) - 1)}
        return [
            {"low": BINS[i], "high": BINS[i + 1], **self.summary(metrics, chosen, enough=enough)}
            for i, chosen in rows.items()
            if len(chosen)
        ]

    def _of_sets(self, metric: str, part: str, rows: np.ndarray) -> Any:
        truth, result = (self.features[kind, part][rows] for kind in ("truth", "result"))
        if metric == "fid":
            return frechet_distance(truth, result)
        return inception_discriminative_scores(truth, result)


def _mean(values: Float[np.ndarray, " N"]) -> float | None:
    """Mean of the finite values: one picture without a fault must not make a set's PSNR infinite.

    Infinite if all are; None if there is none.
    """
    known = values[~np.isnan(values)]
    finite = known[np.isfinite(known)]
    return float((finite if len(finite) else known).mean()) if len(known) else None
