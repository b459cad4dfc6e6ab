"""Folders of weights: loading onto shardings, and damaged folders."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_UNET
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moebius_jax import UNet, UserError, load_elatentlpips, load_unet, load_vae, save_unet
from moebius_jax.sharding import make_mesh
from moebius_jax.weights import checksums
from moebius_jax.weights.tensors import network_tensors


@pytest.fixture(scope="module")
def unet():
    network = UNet(TINY_UNET, rngs=nnx.Rngs(3))
    network.eval()
    return network


@pytest.fixture(scope="module")
def folder(unet, tmp_path_factory):
    path = tmp_path_factory.mktemp("folders") / "unet"
    save_unet(path, unet)
    return path


def assert_same(a, b):
    ours, theirs = network_tensors(a), network_tensors(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(theirs[name]))


@pytest.mark.slow
def test_round_trip(unet, folder):
    loaded = load_unet(folder)
    assert loaded.config == TINY_UNET
    assert_same(loaded, unet)
    assert json.loads((folder / "config.json").read_text())["kind"] == "unet"


@pytest.mark.slow
def test_restores_onto_eight_devices_in_parts(unet, folder):
    mesh = make_mesh(jax.devices("cpu"))

    def place(name, shape):
        split = next((i for i, n in enumerate(shape) if n % 8 == 0), None)
        spec = (
            PartitionSpec(*[None] * split, "data")
            if split is not None and name.endswith("kernel")
            else PartitionSpec()
        )
        return NamedSharding(mesh, spec)

    loaded = load_unet(folder, placement=place)
    kernel = network_tensors(loaded)["time_embedding.linear_1.kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    assert_same(loaded, unet)


def test_replicates_over_a_mesh(unet, folder):
    loaded = load_unet(folder, placement=NamedSharding(make_mesh(jax.devices("cpu")), PartitionSpec()))
    kernel = network_tensors(loaded)["time_embedding.linear_1.kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert_same(loaded, unet)


def test_parameter_dtype_and_execution_choices(folder):
    loaded = load_unet(
        folder, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, position_order="banded", remat=True
    )
    tensors = network_tensors(loaded)
    assert tensors["conv_in.pointwise.kernel"].dtype == jnp.bfloat16
    assert tensors["conv_in.norm1.mean"].dtype == jnp.float32
    assert loaded.config == TINY_UNET.replace(position_order="banded", remat=True)


def test_wrong_kind_is_named(folder, tiny_folder):
    with pytest.raises(UserError, match="holds a student, expected a VAE"):
        load_vae(folder)
    with pytest.raises(UserError, match="holds a VAE, expected a U-Net"):
        load_unet(tiny_folder / "vae")
    with pytest.raises(UserError, match="expected an E-LatentLPIPS network"):
        load_elatentlpips(folder)


def test_not_a_folder_of_ours(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_unet(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a converted folder"):
        load_unet(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"convert it first: python convert_weights\.py"):
        load_unet(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other"), r"config\.json: format is 'other'; expected 'moebius-jax'"),
        (lambda c: c.update(version=99), "version is 99; expected 1 or 2"),
        (
            lambda c: c.update(version=1, kind="vae"),
            "a VAE as moebius-jax 0.1 kept it; convert its release file again",
        ),
        (lambda c: c.update(kind="text encoder"), "kind is 'text encoder'; expected one of unet, vae"),
        (lambda c: c["architecture"].pop("channels"), r"architecture\.channels: missing field"),
        (lambda c: c["architecture"].update(num_heads=3), r"architecture\.channels .* must be a multiple"),
        (lambda c: c["architecture"].update(layers_per_block=0), "layers_per_block is 0"),
        (lambda c: c["architecture"].update(in_channels=None), "in_channels is None"),
        (lambda c: c.update(dtype="int8"), "dtype is 'int8'; expected 'float32'"),
        (lambda c: c["architecture"].update(channels=[64, 64]), "damaged, or not of the network"),
    ],
)
def test_damaged_configs_are_named(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path / "f")
    (tmp_path / "f" / checksums.FILE).unlink()
    path = tmp_path / "f/config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_unet(tmp_path / "f")


@pytest.mark.slow
def test_damaged_files_are_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "f")
    (tmp_path / "f" / checksums.FILE).unlink()
    (tmp_path / "f/config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        load_unet(tmp_path / "f")
    shutil.copy(folder / "config.json", tmp_path / "f/config.json")
    for damage in (lambda data: data.write_bytes(data.read_bytes()[:50]), lambda data: data.unlink()):
        for data in (tmp_path / "f/weights").rglob("d/*"):
            damage(data)
        with pytest.raises(UserError, match="weights: damaged"):
            load_unet(tmp_path / "f")
