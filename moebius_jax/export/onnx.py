"""A program as ONNX, through jax2onnx."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moebius_jax.export.programs import Program

OPSET = 21  # the newest that onnxruntime-web runs in full
SUFFIX = ".onnx"


def write(program: Program, folder: Path, batch: int | None) -> list[Path]:
    """Writes `NAME.onnx`, weights included.

    Args:
        program: to export.
        folder: of the file.
        batch: of every call; None is one.
    """
    import onnx
    from jax2onnx import to_onnx

    model = to_onnx(
        lambda *inputs: program(program.weights, *inputs),
        program.arguments(batch or 1),
        model_name=program.name,
        opset=OPSET,
        input_names=list(program.inputs),
        output_names=list(program.outputs),
    )
    file = folder / f"{program.name}{SUFFIX}"
    onnx.save(model, str(file))
    return [file]


def run(folder: Path, name: str, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Runs an exported program with onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / f"{name}{SUFFIX}", providers=["CPUExecutionProvider"])
    # A program need not have an input it does not look at.
    return session.run(None, {wanted.name: inputs[wanted.name] for wanted in session.get_inputs()})
