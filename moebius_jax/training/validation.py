"""The task loss on held-out data: always the same samples, with the same noise."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from moebius_jax.data.datasets import Dataset
from moebius_jax.data.samples import Batch
from moebius_jax.distillation.loss import mean_square
from moebius_jax.models import VAE, UNet
from moebius_jax.sharding import replicated, with_mesh
from moebius_jax.training.batches import encoded, to_devices
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.inputs import noised_inputs, step_keys
from moebius_jax.training.loading import first_batches
from moebius_jax.weights.tensors import Bare, Tensors

METRIC = "validation_loss_task"


class Validation:
    """Measures a student in evaluation mode.

    Args:
        config: of the run.
        mesh: the samples are cut over it, and stay there.
        student: without arrays.
        vae: encodes, where the data are pictures.
        dataset: held out.

    Raises:
        UserError: the data cannot be read.
    """

    def __init__(
        self, config: TrainConfig, mesh: Mesh, student: Bare[UNet], vae: VAE | None, dataset: Dataset
    ) -> None:
        size = config.batch_size // config.accumulation
        count = -(-config.log.validation_samples // size)
        batches = first_batches(config, dataset, seed=config.seed + 1, size=size, count=count)
        self._batches = [encoded(to_devices(batch, mesh), vae) for batch in batches]

        def task_loss(tensors: Tensors, batch: Batch, number: Array) -> Float[Array, ""]:
            unet = student(tensors)
            unet.eval()
            noised, inputs = noised_inputs(config, step_keys(config.seed, number, batch.index), batch)
            predicted = unet(inputs.latents, inputs.timesteps, inputs.input_ids).sample
            return mean_square(predicted, noised.target)

        self._task_loss = jax.jit(with_mesh(task_loss, mesh), out_shardings=replicated(mesh))

    def __call__(self, tensors: Tensors) -> dict[str, float]:
        """The mean over all samples, for these tensors of the student."""
        losses = [self._task_loss(tensors, b, jnp.int32(i)) for i, b in enumerate(self._batches)]
        return {METRIC: float(jnp.mean(jnp.stack(losses)))}
