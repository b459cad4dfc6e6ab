"""The networks around the student: read from converted folders or drawn at random, right onto the mesh."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moebius_jax import checkpoints
from moebius_jax.errors import UserError
from moebius_jax.models import VAE, ELatentLPIPS, UNet, UNetConfig, inference_copy
from moebius_jax.models import vae as vae_model
from moebius_jax.models.functional import Bare, Tensors, split_tensors
from moebius_jax.models.initializers import KeyStream
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.sharding import replicated, tensor_sharding, tree_shardings

Network = TypeVar("Network", bound=nnx.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenNetwork(Generic[Network]):
    """A network that is not trained.

    Attributes:
        bare: its graph, in evaluation mode.
        tensors: its arrays, cut over `fsdp`; shapes where only a program is compiled.
    """

    bare: Bare[Network]
    tensors: Tensors


def load_teacher(config: TrainConfig, mesh: Mesh, *, abstract: bool) -> FrozenNetwork[UNet] | None:
    """The teacher in the dtypes it is multiplied in; None where no loss needs one.

    Raises:
        UserError: no such folder, or a network that cannot teach this student.
    """
    if not config.loss.needs_teacher or config.teacher is None:
        return None
    dtypes = {"dtype": jnp.dtype(config.dtype), "stream_dtype": jnp.dtype(config.stream_dtype)}

    def draw(architecture: UNetConfig) -> UNet:
        network = UNet(architecture, rngs=KeyStream(jax.random.key(config.seed + 1)), **dtypes)
        network.eval()
        return inference_copy(network)

    if isinstance(config.teacher, UNetConfig):
        architecture = config.teacher
    else:
        architecture = checkpoints.read_config(Path(config.teacher)).architecture
        if not isinstance(architecture, UNetConfig):
            raise UserError(f"{config.teacher}: is no U-Net, so it cannot be a teacher")
    architecture = dataclasses.replace(architecture, platform=config.student.platform)
    if "coarse" in config.loss.terms:
        _check_taps(config.student, architecture)
    if abstract or isinstance(config.teacher, UNetConfig):
        return _drawn(lambda: draw(architecture), mesh, abstract)
    network = checkpoints.load_unet(config.teacher, placement=_placement(mesh), **dtypes)
    network = inference_copy(network)
    return FrozenNetwork(bare=Bare(network), tensors=checkpoints.network_tensors(network))


def load_metric(config: TrainConfig, mesh: Mesh, *, abstract: bool) -> FrozenNetwork[ELatentLPIPS] | None:
    """The perceptual metric; None where its loss is absent.

    Raises:
        UserError: no such folder, or another kind of network.
    """
    if "perceptual" not in config.loss.terms or config.metric is None:
        return None
    dtype = jnp.dtype(config.dtype)
    if isinstance(config.metric, str):
        if not abstract:
            network = checkpoints.load_elatentlpips(config.metric, dtype=dtype, placement=_placement(mesh))
            return FrozenNetwork(bare=Bare(network), tensors=checkpoints.network_tensors(network))
        architecture = checkpoints.read_config(Path(config.metric)).architecture
    else:
        architecture = config.metric
    key = jax.random.key(config.seed + 2)
    return _drawn(lambda: ELatentLPIPS(architecture, dtype=dtype, rngs=KeyStream(key)), mesh, abstract)


def load_vae(config: TrainConfig, mesh: Mesh) -> VAE | None:
    """The VAE, on every device; None where there is none.

    Raises:
        UserError: no such folder, or another kind of network.
    """
    dtype = jnp.dtype(config.vae_dtype)
    if config.vae is None:
        return None
    if isinstance(config.vae, str):
        return checkpoints.load_vae(config.vae, dtype=dtype, placement=replicated(mesh))
    init = jax.jit(vae_model.init_params, static_argnums=0, out_shardings=replicated(mesh))
    return VAE(params=init(config.vae, jax.random.key(config.seed + 3)), config=config.vae, dtype=dtype)


def load_initial_tensors(config: TrainConfig, mesh: Mesh) -> tuple[Tensors, Tensors]:
    """Parameters and BatchNorm statistics of the folder a run starts from.

    Raises:
        UserError: no such folder, or another architecture than the student's.
    """
    folder = Path(config.init or "")
    if (folder / "unet").is_dir():  # a saved pipeline, as training leaves one
        folder = folder / "unet"
    found = checkpoints.read_config(folder).architecture
    if not isinstance(found, UNetConfig) or found.to_dict() != config.student.to_dict():
        different = (
            [k for k, v in config.student.to_dict().items() if found.to_dict()[k] != v]
            if isinstance(found, UNetConfig)
            else ["kind of network"]
        )
        raise UserError(f"{folder}: differs from the student in {', '.join(different)}")
    network = checkpoints.load_unet(folder, param_dtype=jnp.float32, placement=_placement(mesh))
    return split_tensors(network)


def _check_taps(student: UNetConfig, teacher: UNetConfig) -> None:
    """The coarse loss compares maps, so they have to agree in shape."""
    ours = student.latent_size // 2 ** (len(student.channels) - 1), student.channels[-1]
    side = teacher.latent_size // 2 ** (len(teacher.channels) - 1)
    theirs = side * 2 if len(teacher.channels) > 1 else side, teacher.channels[-1]
    if ours != theirs or student.latent_size != teacher.latent_size:
        raise UserError(
            f"teacher and student do not fit: the student's last down level gives {ours[0]} x {ours[0]} x "
            f"{ours[1]} at latents of {student.latent_size}, the teacher's first up level {theirs[0]} x "
            f"{theirs[0]} x {theirs[1]} at {teacher.latent_size}"
        )


def _drawn(build: Callable[[], Network], mesh: Mesh, abstract: bool) -> FrozenNetwork[Network]:
    bare = Bare(nnx.eval_shape(build))
    if abstract:
        tensors: Any = {
            name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=tensor_sharding(mesh, s.shape))
            for name, s in bare.shapes.items()
        }
    else:
        draw = jax.jit(
            lambda: checkpoints.network_tensors(build()), out_shardings=tree_shardings(mesh, bare.shapes)
        )
        tensors = draw()
    return FrozenNetwork(bare=bare, tensors=tensors)


def _placement(mesh: Mesh) -> Callable[[str, tuple[int, ...]], jax.sharding.Sharding]:
    return lambda _, shape: tensor_sharding(mesh, shape)
