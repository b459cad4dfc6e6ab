"""The finished model: a folder `sample.py` takes as it is, and `convert_weights.py --export` turns around."""

import json
from pathlib import Path

import jax
import numpy as np

from moebius_jax.buckets import files_below, is_bucket
from moebius_jax.files import require_nothing_else
from moebius_jax.inpaint import model_folder
from moebius_jax.inpaint.model_folder import write_model_folder
from moebius_jax.models import VAE
from moebius_jax.sharding import replicated
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.overrides import describe
from moebius_jax.training.state import TrainState
from moebius_jax.weights.folder import save
from moebius_jax.weights.load import save_network

FOLDER = "model"


def require_room_for_model(workdir: Path) -> None:
    """Raises UserError if there is something else where the model will go: now, not after the run."""
    folder = workdir / FOLDER
    if is_bucket(folder):  # where a model whose sending was interrupted is a part of one
        names = {name.split("/")[0] for name in files_below(folder)}
        require_nothing_else(folder, names, model_folder.PARTS)
    else:
        model_folder.require_replaceable(folder)


def write_model(workdir: Path, config: TrainConfig, state: TrainState, vae: VAE | None) -> Path:
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
        source = json.loads(json.dumps(source, default=str))  # what JSON does not know, as text
        with write_model_folder(folder, sampling=config.sampling, overwrite=True) as partial:
            save(partial / model_folder.UNET, config.student, tensors, dtype="float32", source=source)
            if vae is not None:
                save_network(partial / model_folder.VAE, jax.tree.map(np.asarray, vae))
    return folder
