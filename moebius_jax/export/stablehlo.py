"""A program as StableHLO, through `jax.export`: for CPUs, CUDA and TPUs alike, run by jax alone."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from moebius_jax.export.programs import Program

PLATFORMS = ("cpu", "cuda", "tpu")
SUFFIX = ".stablehlo"
WEIGHTS = ".safetensors"


def write(program: Program, folder: Path, batch: int | None) -> list[Path]:
    """Writes `NAME.stablehlo`, and `NAME.safetensors` with its weights, which are its first arguments.

    Args:
        program: to export.
        folder: of the files.
        batch: None leaves it open: any number may be called.

    Returns:
        The files.
    """
    from safetensors.numpy import save_file

    leaves, tree = jax.tree.flatten(program.weights)
    names = [f"{i:05d}" for i in range(len(leaves))]  # in the order they are passed
    count = export.symbolic_shape("B")[0] if batch is None else batch

    def function(weights: list[jax.Array], *inputs: jax.Array) -> object:
        return program(jax.tree.unflatten(tree, weights), *inputs)

    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(shapes, *program.arguments(count))
    files = [folder / f"{program.name}{SUFFIX}", folder / f"{program.name}{WEIGHTS}"]
    files[0].write_bytes(exported.serialize())
    save_file({name: np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)}, files[1])
    return files


def run(folder: Path, name: str, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Runs an exported program on its inputs in order, as others would: docs/export.md has these lines."""
    from safetensors.numpy import load_file

    weights = load_file(folder / f"{name}{WEIGHTS}")
    exported = export.deserialize((folder / f"{name}{SUFFIX}").read_bytes())
    found = exported.call(
        [jnp.asarray(weights[key]) for key in sorted(weights)], *map(jnp.asarray, inputs.values())
    )
    return [np.asarray(array) for array in jax.tree.leaves(found)]


def calling_convention(folder: Path, name: str) -> int:
    """The version `jax.export` wrote; jax reads it for at least half a year."""
    return export.deserialize((folder / f"{name}{SUFFIX}").read_bytes()).calling_convention_version
