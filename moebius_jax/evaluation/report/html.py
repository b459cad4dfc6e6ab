"""The report as one page that needs nothing else: charts, tables, and cases to look at."""

import base64
import dataclasses
import io
import math
import shlex
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from moebius_jax.evaluation.metrics.scores import Scores
from moebius_jax.evaluation.report import markdown
from moebius_jax.evaluation.report.charts import line_chart
from moebius_jax.evaluation.report.document import HIGHER_IS_BETTER

PER_GROUP = 4  # cases shown of the best, of the middle and of the worst
_SIDE = 512  # pixels pictures are shrunk to
_GREY = 128  # what the masked picture shows in the hole, as the model sees it

# Original, result, hole of the picture with this name.
Load = Callable[[str], tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W 3"], Bool[np.ndarray, "H W"]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """One case on the page: its figures, and its pictures as data addresses."""

    name: str
    value: str
    ratio: str
    original: str
    masked: str
    result: str


def render_html(document: dict[str, Any], scores: Scores, load: Load) -> str:
    """The page.

    Args:
        document: from `build_document`.
        scores: of the run that is shown.
        load: reads a case's pictures.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((resources.files(__package__) / "template.html").read_text())
    metric = ranking_metric(scores)
    return template.render(
        document=document,
        groups=_groups(scores, metric, load) if metric else {},
        metric=_title(*metric) if metric else None,
        charts=_charts(document),
        command=shlex.join(document["command"]),
        md=markdown,
    )


def ranking_metric(scores: Scores) -> tuple[str, int] | None:
    """By which metric, over which part, cases are ranked: the nearest to what people see."""
    part = int(np.any(scores.ratios > 0))
    return next(((key, part) for key in ("lpips_alex", "l1", "psnr", "ssim") if key in scores.values), None)


def pick_cases(values: np.ndarray, *, higher_is_better: bool, n: int = PER_GROUP) -> dict[str, list[int]]:
    """Positions of the best, median and worst values; no position twice, NaN left out."""
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(-values[known] if higher_is_better else values[known], kind="stable")]
    n = min(n, math.ceil(len(order) / 3))
    middle = max(n, (len(order) - n) // 2)
    groups = {
        "Best": order[:n],
        "Median": order[middle : middle + n],
        "Worst": order[max(middle + n, len(order) - n) :],
    }
    return {name: list(map(int, rows)) for name, rows in groups.items() if len(rows)}


def _groups(scores: Scores, metric: tuple[str, int], load: Load) -> dict[str, list[Shown]]:
    key, part = metric
    values = scores.values[key][:, part]
    groups = pick_cases(values, higher_is_better=key in HIGHER_IS_BETTER)
    return {
        title: [_shown(scores.names[i], key, values[i], scores.ratios[i], load) for i in rows]
        for title, rows in groups.items()
    }


def _shown(name: str, key: str, value: float, ratio: float, load: Load) -> Shown:
    original, result, hole = load(name)
    masked = np.where(hole[..., None], np.uint8(_GREY), original)
    return Shown(
        name=name,
        value=markdown.figure(key, value),
        ratio="" if math.isnan(ratio) else f"{ratio:.0%} hole",
        original=_data_url(original),
        masked=_data_url(masked),
        result=_data_url(result),
    )


def _data_url(rgb: UInt8[np.ndarray, "H W 3"]) -> str:
    image = Image.fromarray(rgb)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _title(key: str, part: int) -> str:
    return markdown.NAMES[key] + (" inside the hole" if part else "")


def _charts(document: dict[str, Any]) -> list[str]:
    """Each metric by the hole's share; in a sweep, each metric by the setting as well."""
    shown = document["runs"][document["shown"]]
    keys = markdown.metric_keys(shown["all"])
    charts = []
    if document["sweep"]:
        charts += _sweep_charts(document, keys)
    bins = shown["bins"]
    if len(bins) > 1:
        middles = [50 * (row["low"] + row["high"]) for row in bins]
        for key in keys:
            series = {
                label: (middles, [_number(row[key][part]) for row in bins])
                for part, label in (("whole", "whole image"), ("hole", "inside the hole"))
            }
            if any(value is not None for _, values in series.values() for value in values):
                charts.append(line_chart(markdown.arrow(key), "share of the image that is hole, %", series))
    return charts


def _sweep_charts(document: dict[str, Any], keys: Sequence[str]) -> list[str]:
    sweep = document["sweep"]
    settings = [run["settings"]["sampling"][sweep] for run in document["runs"]]
    if not all(isinstance(setting, int | float) for setting in settings):
        return []  # names have no order to draw a line along; the table shows them
    published = document["published"]["guidance"] if sweep == "guidance_scale" else []
    charts = []
    for key in keys:
        series = {"whole image": (settings, [_number(run["all"][key]["whole"]) for run in document["runs"]])}
        column = key.split("_")[0]
        if published and column in ("fid", "lpips"):
            series["published"] = ([r["guidance_scale"] for r in published], [r[column] for r in published])
        if any(value is not None for value in series["whole image"][1]):
            charts.append(line_chart(markdown.arrow(key), sweep.replace("_", " "), series))
    return charts


def _number(value: float | str | None) -> float | None:
    return None if value is None or math.isinf(float(value)) else float(value)
