"""Synthetic weights and inputs, drawn from their names (the rule the golden vectors were made with)."""

import json
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, np.ndarray]:
    """Arrays of one golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def manifest(name: str) -> dict[str, list[int]]:
    """Tensor name → shape of one release file."""
    return json.loads((GOLDEN / f"manifest_{name}.json").read_text())


def tensor(name: str, shape: list[int] | tuple[int, ...]) -> np.ndarray:
    """Weight or buffer `name`; step counters are int64 zeros."""
    leaf = name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    x = _normal(name, shape)
    if leaf == "running_mean":
        x = 0.1 * x
    elif leaf == "running_var":
        x = np.exp(0.3 * x)
    elif leaf == "rel_pos_emb" or name.endswith("embedding_layer.weight"):
        pass
    elif len(shape) <= 1:
        x = 0.1 * x + (leaf == "weight" and len(shape) == 1)
    else:
        x = x / np.sqrt(np.prod(shape[1:]))
    return x.astype(np.float32)


def metric_tensor(name: str, shape: list[int]) -> np.ndarray:
    """Weight of the E-LatentLPIPS network: as `tensor`, scaled so that its activations stay alive."""
    if name.startswith("lins."):
        name = name.replace("lins.", "lin", 1)
    x = tensor(name, shape)
    if name.startswith("lin"):
        return np.abs(x)
    return (x * np.sqrt(2)).astype(np.float32) if len(shape) == 4 else x


def state_dict(name: str) -> dict[str, np.ndarray]:
    """The whole release file of a manifest."""
    draw = metric_tensor if name.startswith("elatentlpips") else tensor
    return {key: draw(key, shape) for key, shape in manifest(name).items()}


def inputs(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard-normal input `name`, in the NCHW shape of the golden files."""
    return _normal(f"input:{name}", shape).astype(np.float32)


def nhwc(array: np.ndarray) -> np.ndarray:
    """NCHW → NHWC."""
    return np.moveaxis(array, 1, -1)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.max(np.abs(np.asarray(ours, np.float64) - theirs)) / np.max(np.abs(theirs)))


def _normal(seed: str, shape: list[int] | tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(zlib.crc32(seed.encode())).standard_normal(tuple(shape))
