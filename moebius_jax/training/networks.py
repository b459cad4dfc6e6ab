"""The networks around the student: read from converted folders or drawn at random, right onto the mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax.sharding import Mesh

from moebius_jax.buckets import fetched
from moebius_jax.distillation.loss import Loss
from moebius_jax.errors import UserError
from moebius_jax.models import VAE, UNet, UNetConfig, inference_copy
from moebius_jax.models.initializers import KeyStream
from moebius_jax.sharding import replicated, tensor_sharding, tree_shardings
from moebius_jax.training.config import TrainConfig
from moebius_jax.weights.folder import read_config
from moebius_jax.weights.kinds import KINDS, kind_of
from moebius_jax.weights.load import load_network, load_unet, load_vae
from moebius_jax.weights.tensors import Bare, Tensors, network_tensors, split_tensors

Network = TypeVar("Network", bound=nnx.Module)
TEACHER = "teacher"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenNetwork(Generic[Network]):
    """A network that is not trained.

    Attributes:
        bare: its graph, in evaluation mode.
        tensors: its arrays, cut over `fsdp`; shapes where only a program is compiled.
    """

    bare: Bare[Network]
    tensors: Tensors


def load_frozen(config: TrainConfig, mesh: Mesh, *, abstract: bool = False) -> dict[str, FrozenNetwork]:
    """What the losses look at: the teacher, and by its loss's name each network of a loss's own.

    Args:
        config: of the run.
        mesh: where it runs.
        abstract: shapes instead of arrays; folders are asked for their architecture only.

    Raises:
        UserError: no such folder, or a network that does not fit.
    """
    networks = {}
    if config.loss.needs_teacher:
        networks[TEACHER] = _load_teacher(config, mesh, abstract)
    for loss in config.loss.losses:
        if loss.network is not None:
            networks[loss.name] = _load_own(loss, config, mesh, abstract)
    return networks


def load_image_codec(config: TrainConfig, mesh: Mesh) -> VAE | None:
    """The VAE, on every device; None where there is none.

    Raises:
        UserError: no such folder, or another kind of network.
    """
    dtype = jnp.dtype(config.vae_dtype)
    if config.vae is None:
        return None
    if isinstance(config.vae, str):
        return load_vae(config.vae, dtype=dtype, placement=replicated(mesh), verify=config.verify)

    def draw() -> VAE:
        return VAE(config.vae, dtype=dtype, rngs=KeyStream(jax.random.key(config.seed + 3)))

    return jax.jit(draw, out_shardings=replicated(mesh))()


def load_initial_tensors(config: TrainConfig, mesh: Mesh) -> tuple[Tensors, Tensors]:
    """Parameters and BatchNorm statistics of the folder a run starts from.

    Raises:
        UserError: no such folder, or another architecture than the student's.
    """
    folder = fetched(config.init or "")
    if (folder / "unet").is_dir():  # a saved pipeline, as training leaves one
        folder = folder / "unet"
    found = read_config(folder).architecture
    if not isinstance(found, UNetConfig) or found.to_dict() != config.student.to_dict():
        different = (
            [k for k, v in config.student.to_dict().items() if found.to_dict()[k] != v]
            if isinstance(found, UNetConfig)
            else ["kind of network"]
        )
        raise UserError(f"{folder}: differs from the student in {', '.join(different)}")
    return split_tensors(load_unet(folder, param_dtype=jnp.float32, **_in_pieces(config, mesh)))


def _load_teacher(config: TrainConfig, mesh: Mesh, abstract: bool) -> FrozenNetwork[UNet]:
    """The teacher in the dtypes it is multiplied in."""
    dtypes = teacher_dtypes(config)
    if isinstance(config.teacher, UNetConfig):
        architecture = config.teacher
    else:
        folder = fetched(config.teacher)
        architecture = read_config(folder).architecture
        if not isinstance(architecture, UNetConfig):
            raise UserError(f"{config.teacher}: is no U-Net, so it cannot be a teacher")
    compares = any(loss.needs_teacher for loss in config.loss.output_losses)
    if compares and architecture.prediction_type != config.student.prediction_type:
        raise UserError(
            f"the teacher's prediction_type is {architecture.prediction_type}, the student's "
            f"{config.student.prediction_type}; expected the same, since outputs are compared"
        )
    architecture = architecture.replace(platform=config.student.platform)
    if config.loss.bottleneck_losses:
        _check_taps(config.student, architecture)

    def draw() -> UNet:
        network = UNet(architecture, rngs=KeyStream(jax.random.key(config.seed + 1)), **dtypes)
        network.eval()
        return inference_copy(network)

    if abstract or isinstance(config.teacher, UNetConfig):
        return _drawn(draw, mesh, abstract)
    network = inference_copy(load_unet(folder, **_in_pieces(config, mesh), **dtypes))
    tensors = network_tensors(network)
    # What was made of the weights lies as the compiler left it.
    place = jax.jit(lambda tensors: tensors, donate_argnums=0, out_shardings=tree_shardings(mesh, tensors))
    return FrozenNetwork(bare=Bare(network), tensors=place(tensors))


def hint_of_range(config: TrainConfig) -> str:
    """What to say beside numbers that are not finite, where a teacher in float16 may be why."""
    if config.loss.needs_teacher and teacher_dtypes(config)["dtype"] == jnp.float16:
        return "; the teacher may have left float16's range: try teacher_dtype=bfloat16"
    return ""


def teacher_dtypes(config: TrainConfig) -> dict[str, Dtype]:
    """`dtype` and `stream_dtype` of the teacher."""
    dtype, stream_dtype = config.dtype, config.stream_dtype
    if config.teacher_dtype != "auto":
        dtype = stream_dtype = config.teacher_dtype
    elif dtype != "float32" and (config.student.platform or jax.default_backend()) == "gpu":
        dtype = stream_dtype = "float16"
    return {"dtype": jnp.dtype(dtype), "stream_dtype": jnp.dtype(stream_dtype)}


def _load_own(loss: Loss, config: TrainConfig, mesh: Mesh, abstract: bool) -> FrozenNetwork:
    """The network of a loss's own."""
    dtype, architecture = jnp.dtype(config.dtype), loss.network
    if isinstance(architecture, str):
        if not abstract:
            network = load_network(loss.network, loss.NETWORK, dtype=dtype, **_in_pieces(config, mesh))
            return FrozenNetwork(bare=Bare(network), tensors=network_tensors(network))
        architecture = read_config(fetched(loss.network)).architecture

    def draw() -> nnx.Module:
        build = KINDS[kind_of(architecture)].network
        network = build(architecture, dtype=dtype, rngs=KeyStream(jax.random.key(config.seed + 2)))
        network.eval()
        return network

    return _drawn(draw, mesh, abstract)


def _check_taps(student: UNetConfig, teacher: UNetConfig) -> None:
    """A loss at the bottleneck compares maps, so they have to agree in shape."""
    at = teacher.latent_size if teacher.is_bound_to_latent_size else student.latent_size
    ours = student.latent_size // 2 ** (len(student.channels) - 1), student.channels[-1]
    side = at // 2 ** (len(teacher.channels) - 1)
    theirs = side * 2 if len(teacher.channels) > 1 else side, teacher.channels[-1]
    if ours != theirs or student.latent_size != at:
        raise UserError(
            f"teacher and student do not fit: the student's last down level gives {ours[0]} x {ours[0]} x "
            f"{ours[1]} at latents of {student.latent_size}, the teacher's first up level {theirs[0]} x "
            f"{theirs[0]} x {theirs[1]} at {at}"
        )


def _drawn(build: Callable[[], Network], mesh: Mesh, abstract: bool) -> FrozenNetwork[Network]:
    bare = Bare(nnx.eval_shape(build))
    if abstract:
        tensors: Any = {
            name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=tensor_sharding(mesh, s.shape))
            for name, s in bare.shapes.items()
        }
    else:
        draw = jax.jit(lambda: network_tensors(build()), out_shardings=tree_shardings(mesh, bare.shapes))
        tensors = draw()
    return FrozenNetwork(bare=bare, tensors=tensors)


def _in_pieces(config: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """How folders are loaded: cut over `fsdp`, compared with their checksums first."""
    return {"placement": lambda _, shape: tensor_sharding(mesh, shape), "verify": config.verify}
