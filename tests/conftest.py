"""Eight simulated devices, full fp32 precision, and small networks every test can use."""

import collections
import gc
import importlib.metadata
import os
import pathlib

# Tests spend their time compiling: half of it with LLVM's optimiser off, programs handed to LLVM in one piece
# (many are for many cores), and XLA's older code generator, which jax 0.11 has no more.
os.environ["FAST_COMPILE"] = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jax").startswith("0.10.")
)
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {os.environ['FAST_COMPILE']}"
)
# What one test compiled is not compiled again, in a process beside it or in the next run (`make clean`).
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache/compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["EPATH_USE_TF"] = "0"  # which is asked once a process, by whichever test comes first
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing downloads during tests; the Hub tests start their own server

import jax
import numpy as np
import pytest
import synth
from chromium import browser  # noqa: F401 (a fixture of all)
from PIL import Image
from safetensors.numpy import save_file

from moebius_jax import MoebiusInpaintPipeline, UNetConfig
from moebius_jax.models import VAE, UNet, VAEConfig
from moebius_jax.sharding import make_mesh
from moebius_jax.weights import convert_file
from moebius_jax.weights.detect import detect_architecture
from moebius_jax.weights.names import expected_tensors
from moebius_jax.weights.tensors import abstract_network, fill

# GPUs and TPUs would otherwise multiply fp32 matrices in lower precision.
jax.config.update("jax_default_matmul_precision", "highest")

# A process that has traced for minutes holds millions of objects; looking through all takes half a second.
gc.set_threshold(100_000, 20, 10)

# A network of the student's kind for 64 px squares, a hundredth of a second a step.
TINY_UNET = UNetConfig.student(
    channels=(32, 64),
    transformers=(True, True),
    layers_per_block=1,
    num_heads=4,
    latent_size=8,
    embedding_dim=16,
    context_dim=16,
)
TINY_VAE = VAEConfig(channels=(32, 32, 32, 32), layers_per_block=1)


def network_from_synth(name: str, *, execution: dict | None = None, **options) -> UNet:
    """The network of a manifest with its synthetic weights, in evaluation mode.

    `execution` holds choices of how to compute it, `options` its dtypes.
    """
    shapes = {key: tuple(shape) for key, shape in synth.manifest(name).items()}
    architecture = detect_architecture(shapes, name)
    draw = synth.metric_tensor if name.startswith("elatentlpips") else synth.tensor
    tensors = {
        slot.path: slot.layout.to_jax(draw(key, slot.shape))
        for key, slot in expected_tensors(architecture).items()
    }
    network = abstract_network(architecture.replace(**(execution or {})), **options)
    network = fill(network, {k: jax.numpy.asarray(v) for k, v in tensors.items()})
    network.eval()
    return network


@pytest.fixture(scope="session")
def student_mini() -> UNet:
    return network_from_synth("student_mini")


@pytest.fixture(scope="session")
def teacher_mini() -> UNet:
    return network_from_synth("teacher_mini")


@pytest.fixture(scope="session")
def vae_mini() -> VAE:
    return network_from_synth("vae_mini")


@pytest.fixture(scope="session")
def student_mini_file(tmp_path_factory) -> "os.PathLike[str]":
    """A release file of the small student."""
    path = tmp_path_factory.mktemp("release") / "student_mini.safetensors"
    save_file(synth.state_dict("student_mini"), path)
    return path


@pytest.fixture(scope="session")
def tiny_pipeline() -> MoebiusInpaintPipeline:
    """Untrained, for 64 px squares, on one device."""
    return MoebiusInpaintPipeline.untrained(TINY_UNET, TINY_VAE, mesh=make_mesh(jax.devices()[:1]))


@pytest.fixture(scope="session")
def tiny_folder(tiny_pipeline, tmp_path_factory) -> "os.PathLike[str]":
    """The tiny pipeline, saved."""
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def inception_folder(tmp_path_factory) -> "os.PathLike[str]":
    """Seeded Inception weights: a file of pytorch-fid's layout, and `converted`."""
    import reference
    import torch

    folder = tmp_path_factory.mktemp("inception")
    torch.save(reference.state_dict(), folder / "pt_inception.pth")
    convert_file(folder / "pt_inception.pth", folder / "converted")
    return folder


def not_as_written(path):
    """Adds what readers of JSON do not mind, and checksums do."""
    with path.open("a") as file:
        file.write("\n")


def draw_photos(folder: pathlib.Path, count: int) -> pathlib.Path:
    """A folder of picture-like images, 96 x 80."""
    folder.mkdir()
    y, x = np.mgrid[:80, :96]
    for i in range(count):
        waves = [127 + 100 * np.sin(x / (5 + i) + y / a) for a in (9, 14, 23)]
        Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def meshes_of(monkeypatch):
    """Called with a kind of layer: the sizes of the meshes it is called under from then on, a set."""

    def watch(layer: type) -> set[int]:
        seen, call = set(), layer.__call__

        def watched(self, *args, **kwargs):
            seen.add(jax.sharding.get_abstract_mesh().size)
            return call(self, *args, **kwargs)

        monkeypatch.setattr(layer, "__call__", watched)
        return seen

    return watch


@pytest.fixture
def photo() -> np.ndarray:
    """A picture-like uint8 image, 80 x 112."""
    y, x = np.mgrid[:80, :112]
    waves = [127 + 100 * np.sin(x / a + y / b) for a, b in ((9, 14), (23, 7), (11, 31))]
    return np.stack(waves, -1).astype(np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    """A hole of 20 x 24 pixels in `photo`, white."""
    grey = np.zeros((80, 112), np.uint8)
    grey[30:50, 40:64] = 255
    return grey


@pytest.hookimpl(tryfirst=True)  # before those that -m leaves out are taken away
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is long is slow; files with the most slow tests first, so that no process is left with a long one
    at the end."""
    slow: collections.Counter[pathlib.Path] = collections.Counter()
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")
        elif item.get_closest_marker("slow"):
            slow[item.path] += 1
    items.sort(key=lambda item: -slow[item.path])  # stable: a file's tests stay together and in order
