"""The finished model: a folder `sample.py` takes as it is, and `convert_weights.py --export` turns around."""

import json
from pathlib import Path

import jax
import numpy as np

from moebius_jax import checkpoints
from moebius_jax.files import replace_when_complete
from moebius_jax.models import VAE, UNet
from moebius_jax.models.functional import Bare
from moebius_jax.pipeline import DEFAULT_GUIDANCE, PIPELINE_FILE
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.overrides import describe
from moebius_jax.training.sharding import replicated
from moebius_jax.training.state import TrainState

FOLDER = "model"


def write_model(
    workdir: Path, config: TrainConfig, student: Bare[UNet], state: TrainState, vae: VAE | None
) -> Path:
    """Writes the averaged weights (and the VAE, where the run had one) as `workdir/model`.

    Raises:
        UserError: it cannot be written.
    """
    folder = workdir / FOLDER
    mesh = next(iter(state.params.values())).sharding.mesh
    gather = jax.jit(lambda tensors: tensors, out_shardings=replicated(mesh))
    tensors = {name: np.asarray(value) for name, value in gather(state.result).items()}
    if jax.process_index() == 0:
        source = {"trained_by": "train.py", "step": int(state.step), "config": describe(config)}
        with replace_when_complete(folder, overwrite=True, ours=(PIPELINE_FILE, "unet", "vae")) as partial:
            partial.mkdir()
            checkpoints.save(
                partial / "unet", student.config, tensors, dtype="float32", source=json_ready(source)
            )
            if vae is not None:
                checkpoints.save_vae(partial / "vae", jax.tree.map(np.asarray, vae))
            (partial / PIPELINE_FILE).write_text(json.dumps({"guidance_scale": DEFAULT_GUIDANCE}) + "\n")
    return folder


def json_ready(value: dict) -> dict:
    """`value` with everything JSON does not know as text."""
    return json.loads(json.dumps(value, default=str))
