"""The compiled program of a run: networks without arrays, shapes and places of everything, and the step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moebius_jax.data.loader import Source
from moebius_jax.models import VAE, ELatentLPIPS, UNet
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.networks import FrozenNetwork, load_initial_tensors
from moebius_jax.training.optimizer import build_optimizer
from moebius_jax.training.sharding import batch_sharding, replicated, tree_shardings
from moebius_jax.training.state import (
    TrainState,
    abstract_state,
    bare_student,
    fresh_state,
    state_of,
)
from moebius_jax.training.step import Frozen, LatentBatch, build_step


class Program:
    """Everything about a run's step that does not change.

    Args:
        config: of the run.
        mesh: where it runs.
        teacher, metric: the networks its losses need.

    Attributes:
        frozen: their tensors.
        student: the trained network, without arrays.
        abstract_state: shapes, dtypes and shardings of the state.
        flops: of one step on all devices, once compiled; None where the compiler does not tell.
    """

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        *,
        teacher: FrozenNetwork[UNet] | None,
        metric: FrozenNetwork[ELatentLPIPS] | None,
    ) -> None:
        self._config, self._mesh = config, mesh
        self.frozen = Frozen(
            teacher=teacher.tensors if teacher else {}, metric=metric.tensors if metric else {}
        )
        groups = mesh.size if config.batch_norm == "device" else 1
        self.student = bare_student(
            config.student, dtype=config.dtype, stream_dtype=config.stream_dtype, batch_norm_groups=groups
        )
        self._optimizer = build_optimizer(
            config.optimizer, config.steps, spread=batch_sharding(mesh) if mesh.size > 1 else None
        )
        self._step = build_step(
            config,
            student=self.student,
            teacher=teacher.bare if teacher else None,
            metric=metric.bare if metric else None,
            optimizer=self._optimizer,
            mesh=mesh,
        )
        self.abstract_state = abstract_state(
            config.student, self._optimizer, mesh, has_ema=bool(config.ema_decay)
        )
        self.flops: float | None = None

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return sum(int(np.prod(p.shape)) for p in self.abstract_state.params.values())

    def initial_state(self) -> TrainState:
        """The state before the first step, born on its devices."""
        config, has_ema = self._config, bool(self._config.ema_decay)
        places = tree_shardings(self._mesh, self.abstract_state)
        if not config.init:
            draw = functools.partial(
                fresh_state, config.student, self._optimizer, config.seed, has_ema=has_ema
            )
            return jax.jit(draw, out_shardings=places)()
        begin = functools.partial(state_of, optimizer=self._optimizer, has_ema=has_ema)
        return jax.jit(begin, out_shardings=places)(*load_initial_tensors(config, self._mesh))

    def lower(self, state: TrainState) -> Any:
        """The step, lowered for these places. `state` may be abstract."""
        places = tree_shardings(self._mesh, self.abstract_state)
        step = jax.jit(self._step, donate_argnums=0, out_shardings=(places, replicated(self._mesh)))
        return step.lower(state, self.frozen, self.abstract_batch())

    def compile(self, state: TrainState) -> Any:
        """The compiled step: (state, frozen, batch) → (state, metrics); takes the state's memory over."""
        compiled = self.lower(state).compile()
        costs = compiled.cost_analysis() or {}
        # XLA counts the body of the loop over parts once.
        parts = self._config.accumulation
        self.flops = costs["flops"] * self._mesh.size * parts if "flops" in costs else None
        return compiled

    def abstract_batch(self) -> LatentBatch:
        """Shapes and places of a batch."""
        config, side = self._config, self._config.student.latent_size
        moments_dtype = jnp.float32 if config.data.kind == "images" else jnp.float16
        place = batch_sharding(self._mesh)

        def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=place)

        return LatentBatch(
            moments=array((side, side, 8), moments_dtype),
            masked_moments=array((side, side, 8), moments_dtype),
            hole=array((side, side), jnp.bool_),
            task=array((), jnp.int32),
            index=array((), jnp.int32),
        )

    def grids(self, vae: VAE | None, source: Source) -> Any:
        """The maker of sample grids, or None where none are wanted or nothing can decode them."""
        from moebius_jax.training.preview import SampleGrids

        if not self._config.log.grid_every or vae is None:
            return None
        return SampleGrids(self._config, self._mesh, self.student, vae, source)
