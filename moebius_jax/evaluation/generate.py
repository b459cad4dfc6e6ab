"""Paints the pictures of an evaluation: batched over all devices, and resumable to the bit."""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moebius_jax.errors import UserError
from moebius_jax.evaluation.cases import Case, read_hole, read_truth
from moebius_jax.files import replace_when_complete
from moebius_jax.imaging.picture import write_image
from moebius_jax.inpaint import InpaintOptions, Item, inpaint_stream
from moebius_jax.sampling.sampler import Sampler, SamplingOptions

SETTINGS_FILE = "run.json"


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Makes a folder for results of these settings, or checks that it is one.

    Args:
        folder: for results; a run that was stopped is recognised by its `run.json`.
        settings: JSON values that decide what the results are.

    Raises:
        UserError: the folder holds results of other settings (names the first), or something else.
    """
    file = folder / SETTINGS_FILE
    settings = json.loads(json.dumps(settings))
    if file.is_file():
        try:
            before = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{file}: damaged ({error})") from None
        different = sorted(k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k))
        if different:
            key = different[0]
            raise UserError(
                f"{folder}: holds results with {key} {_short(before.get(key))}, asked for is "
                f"{_short(settings.get(key))}; choose another --output"
            )
        return
    if folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise UserError(f"{folder}: is not empty and not from an evaluation (no {SETTINGS_FILE})")
    try:
        with replace_when_complete(file, overwrite=False) as partial:
            partial.write_text(json.dumps(settings, indent=2) + "\n")
    except UserError:
        if not file.is_file():
            raise
        claim_folder(folder, settings)  # another process was faster: are its settings ours?


def listing_hash(cases: Sequence[Case]) -> str:
    """Hash of the originals' and masks' names and sizes in bytes: quick, to recognise a run's inputs."""
    total = hashlib.sha256()
    for case in cases:
        for file in (case.truth, case.mask):
            total.update(f"{case.name}\0{file.stat().st_size if file else ''}\0".encode())
    return total.hexdigest()


def generate(
    sampler: Sampler,
    cases: Sequence[Case],
    inpainting: InpaintOptions,
    sampling: SamplingOptions,
    *,
    size: int | None,
    seed: int,
    batch_size: int,
    track: Callable[..., Iterable[Any]] = lambda items, **_: items,
) -> list[str]:
    """Paints the cases that have no result yet.

    A picture's random numbers come from the seed and its name, so it does not matter what was done before
    or is done beside it.

    Args:
        sampler: runs batches.
        cases: with masks; results are written to `case.result`, whole or not at all.
        inpainting, sampling: how.
        size: see `cases.PREPARATION`.
        seed: of all pictures.
        batch_size: a multiple of the sampler's devices.
        track: wraps the loop over cases, as tqdm does.

    Returns:
        A line for each case that failed.
    """
    todo = [case for case in cases if not case.result.exists()]
    problems: list[str] = []

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

    # The masks are upright by now.
    options = dataclasses.replace(inpainting, invert_mask=False)
    stream = inpaint_stream(sampler, items(), options, sampling, batch_size=batch_size)
    for result in track(stream, desc="painting", total=len(todo)):
        try:
            if result.error:
                raise result.error
            write_image(result.item.tag.result, Image.fromarray(result.rgb), overwrite=False)
        except UserError as error:
            problems.append(str(error))
    return problems


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
