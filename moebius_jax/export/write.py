"""A folder of exported programs, and whether they compute what the model does."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from moebius_jax.errors import UserError
from moebius_jax.export import onnx, stablehlo
from moebius_jax.export.manifest import manifest
from moebius_jax.export.programs import Program, programs
from moebius_jax.files import replace_when_complete
from moebius_jax.inpaint.pipeline import MoebiusInpaintPipeline
from moebius_jax.schema import AtLeastOne, checked, one_of
from moebius_jax.weights.folder import is_ours
from moebius_jax.weights.release_files import sha256

FORMATS: dict[str, ModuleType] = {"stablehlo": stablehlo, "onnx": onnx}
MANIFEST = "manifest.json"
LIMIT, LIMIT_HALF = 1e-4, 5e-2  # of what may lie between a program and the model


@checked
class ExportOptions:
    """How a model is exported.

    Attributes:
        format: a key of `FORMATS`.
        batch: items of a call; None leaves it open where the format can ("stablehlo"), else one.
        guided: whether a step runs both branches of guidance; None where the model's scale is not one.
        half_weights: ONNX files hold weights in float16 and compute with them in float32.

    Raises:
        UserError: a field is out of range, or half weights are asked for in another format.
    """

    format: Annotated[str, one_of(FORMATS)] = "stablehlo"
    batch: AtLeastOne | None = None
    guided: bool | None = None
    half_weights: bool = False

    def __post_init__(self) -> None:
        if self.half_weights and FORMATS[self.format] is not onnx:
            raise ValueError(
                "half_weights is for format onnx; StableHLO has its weights in files of their own"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How far an exported program is from the model, for seeded inputs.

    Attributes:
        program, output: names.
        relative: largest difference over the largest value.
    """

    program: str
    output: str
    relative: float


def export_model(
    pipeline: MoebiusInpaintPipeline,
    folder: Path,
    options: ExportOptions,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[Difference]:
    """Writes a folder with the model's programs and `manifest.json`; it appears only when complete.

    Args:
        pipeline: the model, in the dtypes its programs shall compute in.
        folder: to make.
        options: see there.
        overwrite: replace an earlier export.
        say: told what is being done.

    Returns:
        How far each program's outputs are from the model's own.

    Raises:
        UserError: half precision in ONNX, the folder exists or cannot be written, or a program computes
            something else.
    """
    kind = FORMATS[options.format]
    dtypes = (pipeline.unet.precision.dtype, pipeline.vae.dtype)
    if kind is onnx and any(jnp.dtype(dtype) != jnp.float32 for dtype in dtypes):
        raise UserError("ONNX programs are exported in float32 only: jax2onnx mixes dtypes in half precision")
    guided = pipeline.defaults.guidance_scale != 1 if options.guided is None else options.guided
    exported = programs(pipeline.unet, pipeline.vae, guided=guided)
    described = manifest(pipeline.unet, pipeline.vae, exported, pipeline.defaults)
    described |= {"kind": options.format, "guided": guided, "batch": _batch(options)}
    described |= (
        {"opset": onnx.OPSET, "half_weights": options.half_weights}
        if kind is onnx
        else {"platforms": list(stablehlo.PLATFORMS)}
    )
    suffixes = (onnx.SUFFIX, stablehlo.SUFFIX, stablehlo.WEIGHTS)
    ours = (MANIFEST, *(program.name + suffix for program in exported for suffix in suffixes))
    differences, half = [], {"half_weights": True} if options.half_weights else {}
    if folder.is_dir() and any(folder.iterdir()) and not is_ours(folder / MANIFEST):
        raise UserError(f"{folder}: not replaced, it is no export of ours")
    with replace_when_complete(folder, overwrite=overwrite, ours=ours) as partial:
        partial.mkdir()
        for program in exported:
            say(f"{program.name}: exporting")
            files = kind.write(program, partial, options.batch, **half)
            described["programs"][program.name]["files"] = [_described(file) for file in files]
            if kind is stablehlo:
                version = stablehlo.calling_convention(partial, program.name)
                described["calling_convention_version"] = version
            say(f"{program.name}: comparing")
            found = _differences(kind, program, partial, options.batch or 1)
            _require_small(found, half=options.half_weights or pipeline.unet.precision.is_half)
            differences += found
        (partial / MANIFEST).write_text(json.dumps(described, indent=1) + "\n")
    return differences


def _require_small(differences: list[Difference], *, half: bool) -> None:
    limit = LIMIT_HALF if half else LIMIT
    for found in differences:
        if not found.relative <= limit:  # NaN is not
            raise UserError(
                f"{found.program}: {found.output} differs by {found.relative:.1e} of its largest value from "
                f"the model's, more than {limit:g}; nothing was written"
            )


def _batch(options: ExportOptions) -> int | None:
    return options.batch or (None if options.format == "stablehlo" else 1)


def _described(file: Path) -> dict[str, Any]:
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}


def _differences(kind: ModuleType, program: Program, folder: Path, batch: int) -> list[Difference]:
    inputs = _seeded(program, batch)
    ours = jax.tree.leaves(jax.jit(program)(program.weights, *map(jnp.asarray, inputs.values())))
    theirs = kind.run(folder, program.name, inputs)
    found = []
    for name, a, b in zip(program.outputs, map(np.asarray, ours), theirs, strict=True):
        relative = float(np.abs(a - b).max() / np.abs(a).max())
        found.append(Difference(program=program.name, output=name, relative=relative))
    return found


def _seeded(program: Program, batch: int) -> dict[str, np.ndarray]:
    """Inputs of the size those of pictures have."""
    rng = np.random.default_rng(0)
    special = {
        "mask": lambda shape: (rng.random(shape) < 0.5).astype(np.float32),
        "timestep": lambda shape: np.full(shape, 500, np.int32),
        "coefficients": lambda shape: np.array([0.6, 0.8, 0.7, 0.2, 0.0], np.float32).reshape(shape),
        "guidance_scale": lambda shape: np.full(shape, 2.5, np.float32),
        "images": lambda shape: rng.uniform(-1, 1, shape).astype(np.float32),
    }
    return {
        name: special.get(name, lambda shape: rng.standard_normal(shape, np.float32))(argument.shape)
        for name, argument in zip(program.inputs, program.arguments(batch), strict=True)
    }
