"""A program as ONNX, through jax2onnx."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moebius_jax.export.programs import Program

if TYPE_CHECKING:
    import onnx

OPSET = 21  # the newest that onnxruntime-web runs in full
SUFFIX = ".onnx"
_SMALL = 256  # numbers; what is smaller (sizes, offsets, tables of a norm) is not worth a cast


def write(program: Program, folder: Path, batch: int | None, *, half_weights: bool = False) -> list[Path]:
    """Writes `NAME.onnx`, weights included.

    Args:
        program: to export.
        folder: of the file.
        batch: of every call; None is one.
        half_weights: keep them in float16, half the file; they are made float32 when it is loaded.
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
    if half_weights:
        _halve(model)
    file = folder / f"{program.name}{SUFFIX}"
    onnx.save(model, str(file))
    return [file]


def _halve(model: "onnx.ModelProto") -> None:
    """Large float32 constants as float16, each cast back: runtimes do that once, when they load the file."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for constant in model.graph.initializer:
        values = numpy_helper.to_array(constant)
        if values.dtype != np.float32 or values.size < _SMALL:
            continue
        name = constant.name
        constant.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
        casts.append(helper.make_node("Cast", [constant.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def run(folder: Path, name: str, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Runs an exported program with onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / f"{name}{SUFFIX}", providers=["CPUExecutionProvider"])
    # A program need not have an input it does not look at.
    return session.run(None, {wanted.name: inputs[wanted.name] for wanted in session.get_inputs()})
