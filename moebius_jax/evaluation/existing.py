"""Any method's pictures against their originals."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from moebius_jax.errors import UserError
from moebius_jax.evaluation.cases import Case, list_pictures, pair_masks, read_truth
from moebius_jax.evaluation.inputs import odd_masks
from moebius_jax.evaluation.protocols import PROTOCOLS
from moebius_jax.evaluation.published import QUALITY
from moebius_jax.evaluation.report.document import Run
from moebius_jax.evaluation.report.result import EvaluationReport, case_loader, claim_report
from moebius_jax.evaluation.settings import ScoringSettings
from moebius_jax.imaging.grid import is_grid
from moebius_jax.schema import checked, one_of

KIND = "score"


@checked
class ExistingSettings(ScoringSettings):
    """What is scored.

    Attributes:
        pred: folder of results.
        gt: folder of originals, of the same names.
        beside: protocol whose published figures are shown.
        output: folder for the report.

    Raises:
        UserError: a value is out of range.
    """

    pred: Path
    gt: Path
    beside: Annotated[str, one_of(QUALITY)] | None = None
    output: Path | None = None


def score_existing(
    settings: ExistingSettings,
    *,
    command: Sequence[str] = (),
    track: Callable[..., Iterable[Any]] = lambda items, **_: items,
) -> EvaluationReport:
    """Scores `pred` against `gt`.

    Args:
        settings: see there.
        command: for the report.
        track: wraps the loop over pictures, as tqdm does.

    Raises:
        UserError: a file cannot be read, has no partner or does not fit.
    """
    cases = _pairs(settings)
    enough = settings.fewest_images(len(cases))
    if settings.output is not None:
        claim_report(settings.output, KIND, (settings.pred, settings.gt, settings.masks))
    scores = settings.make_scorer()(
        cases, size=settings.size, invert_masks=settings.invert_masks, track=track
    )
    odd = odd_masks(scores.names, scores.ratios)
    for line in odd:
        warnings.warn(f"{settings.masks}: {line}", stacklevel=2)
    protocol = {}
    if settings.beside:
        title = f"Scores beside {PROTOCOLS[settings.beside].title}"
        protocol = {"name": settings.beside, "title": title}
    sources = {"images": {"folder": str(settings.gt)}, "results": {"folder": str(settings.pred)}}
    if settings.masks:
        polarity = "black is the hole" if settings.invert_masks else "white is the hole"
        sources["masks"] = {"folder": str(settings.masks), "origin": "stored set", "polarity": polarity}
    return EvaluationReport.of(
        [Run.of(scores, settings.metrics, enough, label="", settings={})],
        case_loader(cases, size=settings.size, invert_masks=settings.invert_masks),
        kind=KIND,
        enough=enough,
        protocol=protocol,
        departures=[*_departures(settings, cases), *odd, *settings.small_set_note(len(cases))],
        sources={**sources, **settings.inception_facts()},
        command=command,
        size=settings.size,
    )


def _departures(settings: ExistingSettings, cases: list[Case]) -> list[str]:
    """What a reader who compares with the published figures has to know."""
    if settings.beside is None:
        return []
    protocol = PROTOCOLS[settings.beside]
    lines = [
        "pictures made elsewhere: whether images, masks and settings are the protocol's is not known here"
    ]
    if len(cases) != protocol.count:
        lines.append(f"{len(cases):,} images, the protocol has {protocol.count:,}")
    height, width = (settings.size,) * 2 if settings.size else read_truth(cases[0], None).shape[:2]
    if (height, width) != (protocol.size,) * 2:
        lines.append(
            f"pictures of {width} x {height} pixels, the protocol has {protocol.size} x {protocol.size}"
        )
    return lines


def _pairs(settings: ExistingSettings) -> list[Case]:
    """Results with their originals and masks, by name; one without a partner is an error.

    Grids that `sample.py` left beside its results are none.
    """
    truths, found = list_pictures(settings.gt, "originals"), list_pictures(settings.pred, "results")
    results = {name: file for name, file in found.items() if not is_grid(file)}
    _require_partners(truths, results, settings.pred, "result")
    _require_partners(results, truths, settings.gt, "original")
    masks: dict[str, Path] = {}
    pairs: dict[str, str] = {}
    if settings.masks:
        masks = list_pictures(settings.masks, "masks")
        pairs = pair_masks(truths, masks, settings.masks, settings.pair_by)
    elif settings.invert_masks or settings.pair_by != "name":
        raise UserError("--invert-masks and --pair-by are for --masks, which is missing")
    return [
        Case(
            name=name,
            truth=file,
            mask=masks[pairs[name]] if pairs else None,
            mask_name=pairs.get(name, ""),
            result=results[name],
        )
        for name, file in truths.items()
    ]


def _require_partners(found: dict[str, Path], others: dict[str, Path], folder: Path, what: str) -> None:
    missing = [name for name in found if name not in others]
    if missing:
        more = f" (and {len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise UserError(f"{folder}: no {what} {missing[0]}.*{more}; results and originals are paired by name")
