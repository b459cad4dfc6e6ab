"""The report as Markdown: our figures beside the published ones."""

import math
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from moebius_jax.evaluation.published import QUALITY
from moebius_jax.evaluation.report.document import HIGHER_IS_BETTER

NAMES = {
    "fid": "FID",
    "p_ids": "P-IDS",
    "u_ids": "U-IDS",
    "lpips_alex": "LPIPS (Alex)",
    "lpips_vgg": "LPIPS (VGG)",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "l1": "L1",
}
_DIGITS = {"fid": 2, "p_ids": 4, "u_ids": 4, "psnr": 2}


def render_markdown(document: dict[str, Any]) -> str:
    """The whole report as Markdown text."""
    protocol = document["protocol"]
    sections = [f"# {protocol.get('title', 'Scores')}", _facts(document)]
    if document["departures"]:
        sections.append("**Before you compare**\n\n" + _list(document["departures"]))
    if document["published"]["rows"] and len(document["runs"]) == 1:
        sections.append("## Beside the paper\n\n" + _beside_the_paper(document))
    if document["sweep"]:
        sections.append(f"## By {document['sweep'].replace('_', ' ')}\n\n" + _sweep(document))
    for run in document["runs"]:
        title = f" ({run['label']})" if run["label"] else ""
        sections.append(f"## All metrics{title}\n\n" + _metrics(run))
        if run["bins"]:
            sections.append(f"## By share of hole{title}\n\n" + _bins(run))
    sections.append("## How it was computed\n\n" + _methods(document))
    sections.append("## To repeat it\n\n" + _repeat(document))
    return "\n\n".join(sections) + "\n"


def figure(key: str, value: float | str | None) -> str:
    """A metric's value as text; a dash where there is none."""
    if value is None:
        return "–"
    value = float(value)
    return "∞" if math.isinf(value) else f"{value:.{_DIGITS.get(key, 4)}f}"


def arrow(key: str) -> str:
    """A metric's name, and whether higher or lower is better."""
    return f"{NAMES[key]} {'↑' if key in HIGHER_IS_BETTER else '↓'}"


def metric_keys(summary: dict[str, Any]) -> list[str]:
    """The metrics of a summary, in the order of `NAMES`."""
    return [key for key in NAMES if key in summary]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns after the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def comparison_rows(document: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of (who, FID, LPIPS, where from): the paper's and ours."""
    rows = [
        (f"{row['model']}, published", figure("fid", row["fid"]), f"{row['lpips']:.3f}", row["table"])
        for row in document["published"]["rows"]
    ]
    for run in document["runs"]:
        summary = run["all"]
        lpips = [summary[k]["whole"] for k in ("lpips_alex", "lpips_vgg") if k in summary]
        ours = " / ".join(figure("lpips", value) for value in lpips) or "–"
        fid = figure("fid", summary["fid"]["whole"]) if "fid" in summary else "–"
        rows.append(
            ("this run", fid, f"{ours}{' (Alex / VGG)' if lpips else ''}", f"{summary['count']} images")
        )
    return rows


def sweep_table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the setting, each metric of whole pictures, and the paper's where it has any."""
    sweep, keys = document["sweep"], metric_keys(document["runs"][0]["all"])
    head = [sweep.replace("_", " "), *map(arrow, keys)]
    rows = []
    for run in document["runs"]:
        setting = run["settings"]["sampling"][sweep]
        rows.append([str(setting), *(figure(key, run["all"][key]["whole"]) for key in keys)])
    if sweep == "guidance_scale" and document["published"]["guidance"]:
        published = {row["guidance_scale"]: row for row in document["published"]["guidance"]}
        head += ["published FID", "published LPIPS"]
        for run, row in zip(document["runs"], rows, strict=True):
            theirs = published.get(run["settings"]["sampling"][sweep])
            row.extend([figure("fid", theirs["fid"]), f"{theirs['lpips']:.3f}"] if theirs else ["–", "–"])
    return head, rows


def _facts(document: dict[str, Any]) -> str:
    sources = document["sources"]
    lines = [f"{document['created']}, {document['versions']['devices']}"]
    if document["kind"] in QUALITY:
        lines.append(
            f"protocol: {document['protocol']['dataset']}; masks: {document['protocol']['masks_like']}"
        )
    lines.append(f"images: {sources['images']['count']} from {sources['images'].get('folder')}")
    if sources["masks"]["sha256"]:
        masks = sources["masks"]
        kind = f" ({masks['set_kind']}, seed {masks['set_seed']})" if "set_kind" in masks else ""
        lines.append(f"masks: {masks.get('origin')}{kind}, SHA-256 `{masks['sha256']}`")
    if "model" in sources:
        lines.append(f"model: {sources['model']['name']}, U-Net SHA-256 `{sources['model']['unet_sha256']}`")
    return _list(lines)


def _beside_the_paper(document: dict[str, Any]) -> str:
    return table(("", "FID ↓", "LPIPS ↓", "source"), comparison_rows(document))


def _sweep(document: dict[str, Any]) -> str:
    return table(*sweep_table(document))


def _metrics(run: dict[str, Any]) -> str:
    summary = run["all"]
    rows = [
        (arrow(key), figure(key, summary[key]["whole"]), figure(key, summary[key]["hole"]))
        for key in metric_keys(summary)
    ]
    return table(("", "whole image", "inside the hole"), rows)


def _bins(run: dict[str, Any]) -> str:
    keys = metric_keys(run["all"])
    head = ["hole", "images", *(f"{arrow(key)}{part}" for key in keys for part in ("", ", hole"))]
    rows = [
        [
            f"{100 * row['low']:.0f}-{100 * row['high']:.0f} %",
            row["count"],
            *(figure(key, row[key][part]) for key in keys for part in ("whole", "hole")),
        ]
        for row in run["bins"]
    ]
    return table(head, rows)


def _methods(document: dict[str, Any]) -> str:
    keys = metric_keys(document["runs"][0]["all"])
    lines = [f"{NAMES[key]}: {document['methods'][key]}" for key in keys]
    if {"fid", "p_ids"} & set(keys):
        fewest = document["fewest_images_for_set_metrics"]
        lines.append(f"FID, P-IDS and U-IDS are given for {fewest} images or more")
    return _list([*lines, f"images: {document['preparation']}", *document["choices"]])


def _repeat(document: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    command = shlex.join(document["command"])
    return f"```\n{command}\n```\n\n{versions}. All settings and hashes: `report.json`."


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
