"""Paints the pictures of an evaluation: batched over all devices, and resumable to the bit."""

import dataclasses
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moebius_jax.errors import UserError
from moebius_jax.evaluation.cases import Case, read_hole, read_truth
from moebius_jax.evaluation.prefetch import prefetch
from moebius_jax.files import AlreadyThere, remove_remains, replace_when_complete
from moebius_jax.imaging.masks import MaskWarning
from moebius_jax.imaging.picture import mark_of, read_picture, write_image
from moebius_jax.inpaint.sampler import Sampler, SamplingOptions
from moebius_jax.inpaint.stream import InpaintOptions, Item, inpaint_stream
from moebius_jax.schema import read_json

SETTINGS_FILE = "run.json"
# How pictures are computed, not which: they round differently, and do not matter to those that exist.
_MACHINERY = ("batch_size", "device")


def check_folder(folder: Path, settings: dict[str, Any], *, complete: bool = False) -> dict[str, Any]:
    """Sees whether a folder is free, or holds results of these settings.

    Args:
        folder: for results; a run that was stopped is recognised by its `run.json`.
        settings: JSON values that decide what the results are.
        complete: nothing remains to be painted, so that batch size and device may be others.

    Returns:
        The settings of the folder's results.

    Raises:
        UserError: the folder holds results of other settings (names the first), or something else.
    """
    file = folder / SETTINGS_FILE
    settings = json.loads(json.dumps(settings))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, expected a folder for results")
    before = _read_settings(file)
    if before is None:
        foreign = folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir())
        before = _read_settings(file)  # another process may have begun just now
        if foreign and before is None:
            raise UserError(f"{folder}: is not empty and not from an evaluation (no {SETTINGS_FILE})")
    if before is None:
        return settings
    wanted, found = _flat(settings), _flat(before)
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key) and not (complete and key in _MACHINERY):
            raise UserError(
                f"{folder}: holds results with {key} {_short(found.get(key))}, asked for is "
                f"{_short(wanted.get(key))}; choose another --output"
            )
    return before


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of the results that are about to be written.

    Raises:
        UserError: as `check_folder`; another process may have been faster.
    """
    try:
        with replace_when_complete(folder / SETTINGS_FILE, overwrite=False) as partial:
            partial.write_text(json.dumps(settings, indent=2) + "\n")
    except AlreadyThere:
        check_folder(folder, settings)


def _read_settings(file: Path) -> dict[str, Any] | None:
    try:
        return read_json(file, dict[str, Any])
    except FileNotFoundError:
        return None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def paint(
    sampler: Sampler,
    cases: Sequence[Case],
    inpainting: InpaintOptions,
    sampling: SamplingOptions,
    *,
    size: int | None,
    seed: int,
    batch_size: int,
    begin: Callable[[], None] = lambda: None,
    track: Callable[..., Iterable[Any]] = lambda items, **_: items,
) -> list[str]:
    """Paints the cases that have no result yet.

    A picture's random numbers come from the seed and its name, so it does not matter what was done before
    or is done beside it.

    Args:
        sampler: runs batches.
        cases: with masks; results are written to `case.result`, whole or not at all.
        inpainting, sampling: how.
        size: see `cases.preparation`.
        seed: of all pictures.
        batch_size: a multiple of the sampler's devices.
        begin: called before the first result is written.
        track: wraps the loop over cases, as tqdm does.

    Returns:
        A line for each case that failed.

    Raises:
        UserError: a result cannot be written; the others would not fare better.
    """
    todo = [case for case in cases if not case.result.exists()]
    problems: list[str] = []
    begun = False
    for folder in {case.result.parent for case in todo}:
        remove_remains(folder)

    def items() -> Iterator[Item]:
        for case in todo:
            try:
                truth = read_truth(case, size)
                hole = read_hole(case.mask, truth, invert=inpainting.invert_mask)
            except UserError as error:
                problems.append(str(error))
                continue
            yield Item(
                rgb=truth,
                mask=hole.astype(np.uint8) * 255,
                seed=seed,
                index=zlib.crc32(os.fsencode(case.name)),
                name=str(case.truth),
                mask_name=str(case.mask),
                tag=case,
            )

    # The masks are upright by now, and were looked at before (see `inputs`).
    options = dataclasses.replace(inpainting, invert_mask=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MaskWarning)
        stream = inpaint_stream(sampler, items(), options, sampling, batch_size=batch_size)
        for result in track(stream, desc="painting", total=len(todo)):
            if result.error:
                problems.append(str(result.error))
                continue
            if not begun:
                begin()
                begun = True
            # Another process may have painted the same by now: then it is the same to the bit.
            case, image = result.item.tag, Image.fromarray(result.rgb)
            write_image(case.result, image, overwrite=True, mark=result_mark(case, result.rgb))
    return problems


def require_own_results(cases: Sequence[Case]) -> None:
    """Raises UserError if a result is not what was painted for its case: it was changed, or exchanged."""

    def is_own(case: Case) -> bool:
        return mark_of(case.result) == result_mark(case, read_picture(case.result).rgb)

    for case, own in zip(cases, prefetch(is_own, cases), strict=True):
        if not own:
            old = "" if mark_of(case.result) else " (version 0.1 did not mark its results)"
            raise UserError(
                f"{case.result}: not what was painted for {case.name}{old}; remove it, and it is painted "
                "again, or choose another --output"
            )


def result_mark(case: Case, rgb: np.ndarray) -> str:
    """What a result bears: whose it is, and which pixels."""
    return hashlib.sha256(os.fsencode(case.name) + b"\0" + np.ascontiguousarray(rgb).tobytes()).hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
