"""Scores pictures: reads them ahead, in batches of one size, through the metrics that need a network."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moebius_jax.errors import UserError
from moebius_jax.evaluation.cases import (
    Case,
    Hole,
    Rgb,
    pixel_digest,
    read_hole,
    read_result,
    read_truth,
)
from moebius_jax.evaluation.masks import hole_digest, set_hash
from moebius_jax.evaluation.metrics import pixels
from moebius_jax.evaluation.metrics.inception_features import InceptionFeatures
from moebius_jax.evaluation.metrics.lpips import LPIPS, require_size
from moebius_jax.evaluation.metrics.names import METRICS, NEEDS_INCEPTION, Metric
from moebius_jax.evaluation.metrics.scores import Scores
from moebius_jax.evaluation.prefetch import prefetch
from moebius_jax.hardware import device_errors
from moebius_jax.models import Inception

_MOST_WAITING = 4  # batches of pictures kept until others of their size come
_PIXELS = {"psnr": pixels.psnr, "ssim": pixels.ssim, "l1": pixels.l1}


@dataclasses.dataclass(frozen=True)
class _Read:
    """A case's pictures, and what needs no network."""

    name: str
    truth: Rgb
    result: Rgb
    hole: Hole
    values: dict[str, tuple[float, float]]
    digests: tuple[bytes, bytes | None]


class Scorer:
    """Scores cases on the devices of a mesh.

    Args:
        metrics: which.
        mesh: its devices share each batch.
        inception: FID's network; needed by "fid" and "ids".
        batch_size: pictures per batch, rounded up to a multiple of the devices.
        keep_truths: remember Inception's features of originals, for more results of the same ones.

    Raises:
        UserError: an unknown metric, or no network where one is needed.
    """

    def __init__(
        self,
        metrics: Sequence[Metric],
        mesh: Mesh,
        *,
        inception: Inception | None = None,
        batch_size: int = 8,
        keep_truths: bool = False,
    ) -> None:
        if unknown := sorted(set(metrics) - set(METRICS)):
            raise UserError(f"metric {unknown[0]!r}; expected some of {', '.join(METRICS)}")
        self._needs_features = bool(set(metrics) & set(NEEDS_INCEPTION))
        if self._needs_features and inception is None:
            raise UserError(f"{' and '.join(NEEDS_INCEPTION)} need the Inception network")
        self.metrics = tuple(m for m in METRICS if m in metrics)
        self._devices = mesh.size
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._full_batches: set[tuple[int, ...]] = set()
        self._inception = InceptionFeatures(inception, mesh) if self._needs_features else None
        self._keep_truths = keep_truths
        self._truths: dict[tuple[bytes, bytes | None], tuple[np.ndarray, ...]] = {}
        self._lpips = {b: LPIPS(b, mesh) for b in ("alex", "vgg")} if "lpips" in metrics else {}

    def __call__(
        self,
        cases: Sequence[Case],
        *,
        size: int | None = None,
        invert_masks: bool = False,
        track: Callable[..., Iterable[Any]] = lambda items, **_: items,
    ) -> Scores:
        """Reads and scores every case, in the order of their names.

        Args:
            cases: with or without masks; in any order.
            size: originals are prepared to it, see `cases.preparation`; None takes them as they are.
            invert_masks: black is the hole.
            track: wraps the loop over cases, as tqdm does.

        Raises:
            UserError: a file cannot be read or does not fit; names it.
        """
        cases = sorted(cases, key=lambda case: case.name)
        pixel_metrics = [m for m in self.metrics if m in _PIXELS]

        def read(case: Case) -> _Read:
            truth = read_truth(case, size)
            if self._lpips:
                require_size(truth.shape[:2], str(case.truth))
            result = read_result(case, truth)
            hole = np.zeros(truth.shape[:2], bool)
            if case.mask is not None:
                hole = read_hole(case.mask, truth, invert=invert_masks)
            return _Read(
                case.name,
                truth,
                result,
                hole,
                {m: _PIXELS[m](result, truth, hole) for m in pixel_metrics},
                (pixel_digest(truth), hole_digest(hole) if case.mask is not None else None),
            )

        measured: dict[str, dict[str, Any]] = {}
        waiting: dict[tuple[int, ...], list[_Read]] = collections.defaultdict(list)
        digests: dict[str, dict[str, bytes]] = {"images": {}, "masks": {}}
        for case, item in zip(
            cases, track(prefetch(read, cases), desc="scoring", total=len(cases)), strict=True
        ):
            digests["images"][item.name] = item.digests[0]
            if case.mask is not None:
                digests["masks"][case.mask_name] = item.digests[1]
            measured[item.name] = {
                "ratio": item.hole.mean() if case.mask is not None else math.nan,
                **item.values,
            }
            group = waiting[item.truth.shape]
            group.append(item)
            if len(group) == self._batch_size:
                self._run_networks(group, measured)
                group.clear()
            elif sum(map(len, waiting.values())) > _MOST_WAITING * self._batch_size:
                fullest = max(waiting.values(), key=len)  # pictures of many sizes: do not keep them all
                self._run_networks(fullest, measured)
                fullest.clear()
        for group in waiting.values():
            if group:
                self._run_networks(group, measured)
        return self._collect(cases, measured, digests)

    def _run_networks(self, group: list[_Read], measured: dict[str, dict[str, Any]]) -> None:
        # A size that fills no batch is not worth a full one; one that did has its program.
        shape, full = group[0].truth.shape, self._batch_size
        if len(group) == full:
            self._full_batches.add(shape)
        elif shape not in self._full_batches:
            full = -(-len(group) // self._devices) * self._devices
        filled = group + [group[-1]] * (full - len(group))
        truths, results, holes = (
            np.stack([getattr(r, f) for r in filled]) for f in ("truth", "result", "hole")
        )
        found: dict[Any, Any] = {}
        with device_errors(f"scoring {full} pictures of {truths.shape[2]} x {truths.shape[1]}"):
            for backbone, network in self._lpips.items():
                found[f"lpips_{backbone}"] = network(results, truths, holes)
            if self._inception is not None:
                found["result"] = self._inception(results, holes)
                found["truth"] = self._known_truths(group) or self._inception(truths, holes)
            found = jax.tree.map(np.asarray, found)
        if self._keep_truths and self._inception is not None:
            for i, item in enumerate(group):
                self._truths[item.digests] = tuple(part[i] for part in found["truth"])
        for i, item in enumerate(group):
            for key, (whole, hole) in found.items():
                measured[item.name][key] = whole[i], hole[i] if item.hole.any() else hole[i] * math.nan

    def _known_truths(self, group: list[_Read]) -> tuple[np.ndarray, np.ndarray] | None:
        """Features of the originals and their holes, if all were seen before."""
        known = [self._truths.get(item.digests) for item in group]
        return None if None in known else tuple(map(np.stack, zip(*known, strict=True)))

    def _collect(
        self,
        cases: Sequence[Case],
        measured: dict[str, dict[str, Any]],
        digests: dict[str, dict[str, bytes]],
    ) -> Scores:
        rows = [measured[case.name] for case in cases]
        keys = [k for k in rows[0] if k not in ("ratio", "truth", "result")]
        features = {}
        for kind in ("truth", "result") if self._needs_features else ():
            pairs = [row.pop(kind) for row in rows]  # gigabytes, of many pictures
            for i, part in enumerate(("whole", "hole")):
                features[kind, part] = np.stack([pair[i] for pair in pairs])
        return Scores(
            names=[case.name for case in cases],
            ratios=np.array([row["ratio"] for row in rows], float),
            values={key: np.array([row[key] for row in rows], float) for key in keys},
            features=features,
            images_sha256=set_hash(digests["images"]),
            masks_sha256=set_hash(digests["masks"]) if digests["masks"] else None,
        )
