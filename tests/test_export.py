"""Exported programs compute what the model does, without this package; a loop of them is the sampler."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_UNET, TINY_VAE
from flax import nnx

from moebius_jax import MoebiusInpaintPipeline, UserError
from moebius_jax.cli.export import main
from moebius_jax.diffusion.denoise import inpaint_latents
from moebius_jax.diffusion.draws import draw_noise
from moebius_jax.diffusion.solvers import DDIM, solver_steps
from moebius_jax.export import onnx, stablehlo, write
from moebius_jax.export.manifest import FORMAT, manifest
from moebius_jax.export.programs import programs
from moebius_jax.export.write import ExportOptions, export_model
from moebius_jax.models import inference_copy
from moebius_jax.sharding import make_mesh

TOLERANCE = 1e-4  # of the largest value, float32


@pytest.fixture(scope="module")
def pipeline():
    unet = TINY_UNET.replace(channels=(32,), transformers=(True,), layers_per_block=1)
    pipe = MoebiusInpaintPipeline.untrained(unet, TINY_VAE, mesh=make_mesh(jax.devices()[:1]))
    pipe.defaults = pipe.defaults.changed(num_inference_steps=3, scheduler="dpmpp_2m", strength=1.0)
    return pipe


@pytest.fixture(scope="module")
def exported(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "programs"
    return folder, export_model(pipeline, folder, ExportOptions())


def test_outputs_agree(exported):
    _, differences = exported
    assert {(d.program, d.output) for d in differences} == {
        ("encoder", "mean"),
        ("encoder", "std"),
        ("step", "new_latents"),
        ("step", "clean"),
        ("decoder", "images"),
    }
    assert max(d.relative for d in differences) < TOLERANCE


def test_programs_are_in_portable_forms(pipeline):
    for program in programs(pipeline.unet, pipeline.vae, guided=True):
        network = nnx.merge(program.graphdef, program.weights)
        platforms = {m.platform for _, m in nnx.iter_modules(network) if hasattr(m, "platform")}
        assert platforms == {"portable"}


def test_manifest_describes_the_files(exported, pipeline):
    folder, _ = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["kind"]) == (FORMAT, 1, "stablehlo")
    assert manifest["image_size"] == pipeline.sampler.image_size
    assert manifest["guided"] is True
    assert (manifest["solver"], manifest["steps"], manifest["strength"]) == ("dpmpp_2m", 3, 1.0)
    assert len(manifest["schedules"]["dpmpp_2m"]["3"]["timesteps"]) == 3
    assert manifest["calling_convention_version"] >= 9
    for program in manifest["programs"].values():
        for file in program["files"]:
            content = (folder / file["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file["sha256"]


def test_a_model_that_runs_a_small_share_of_its_steps(pipeline):
    solver = dataclasses.replace(pipeline.defaults, num_inference_steps=50, strength=0.15, scheduler=DDIM())
    found = manifest(pipeline.unet, pipeline.vae, [], solver)
    assert (found["solver"], found["steps"]) == ("ddim", 50)
    assert len(found["schedules"]["ddim"]["50"]["timesteps"]) == 7
    assert "refining" not in found["schedules"]["ddim"]["50"]
    refined = manifest(pipeline.unet, pipeline.vae, [], solver.changed(strength=1.0, refine=0.5))
    assert refined["refine"] == 0.5
    table = refined["schedules"]["ddim"]["50"]
    assert len(table["timesteps"]) == 50
    assert table["refining"]["timesteps"] == table["timesteps"][25:]
    assert set(found["schedules"]["dpmpp_2m"]) == {"10", "20"}  # of five none would be left


def test_a_trajectory_of_steps_is_the_samplers(exported, pipeline):
    """Any batch, the manifest's table, guidance: the loop of docs/export.md against `inpaint_latents`."""
    folder, _ = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    table = manifest["schedules"]["dpmpp_2m"]["5"]
    rng = np.random.default_rng(0)
    shape = (3, *manifest["latent_shape"])
    image, masked = rng.standard_normal((2, *shape), np.float32)
    mask = (rng.random((*shape[:3], 1)) < 0.5).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 3)
    noise = np.asarray(draw_noise(keys, shape[1:], jnp.float32(manifest["noise_offset"])))
    latents, before = table["start_alpha"] * image + table["start_sigma"] * noise, np.zeros(shape, np.float32)
    latents = latents.astype(np.float32)
    for timestep, row in zip(table["timesteps"], table["coefficients"], strict=True):
        inputs = {
            "latents": latents,
            "before": before,
            "mask": mask,
            "masked_latents": masked,
            "timestep": np.array([timestep], np.int32),
            "coefficients": np.float32(row),
            "guidance_scale": np.float32([2.5]),
        }
        latents, before = stablehlo.run(folder, "step", inputs)
    from flax import nnx

    expected = inpaint_latents(
        *nnx.split(inference_copy(pipeline.unet)),
        *map(jnp.asarray, (image, mask, masked)),
        keys,
        solver_steps("dpmpp_2m", 5, manifest["strength"]),
        jnp.float32(2.5),
        jnp.float32(manifest["noise_offset"]),
        guided=True,
    )
    np.testing.assert_allclose(latents, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_stablehlo_runs_without_this_package(exported, tmp_path):
    folder, _ = exported
    code = f"""
import sys
sys.modules["moebius_jax"] = None  # an import of it would fail
import jax.numpy as jnp
from jax import export
from safetensors.numpy import load_file
weights = load_file("{folder}/decoder.safetensors")
decoder = export.deserialize(open("{folder}/decoder.stablehlo", "rb").read())
images = decoder.call([jnp.asarray(weights[name]) for name in sorted(weights)], jnp.zeros((2, 8, 8, 4)))
assert images.shape == (2, 64, 64, 3)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"JAX_PLATFORMS": "cpu"})


@pytest.mark.slow
def test_onnx(pipeline, tmp_path):
    """Guided, as the released networks are."""
    pytest.importorskip("jax2onnx")
    pytest.importorskip("onnxruntime")
    differences = export_model(pipeline, tmp_path / "onnx", ExportOptions(format="onnx"))
    assert max(d.relative for d in differences) < TOLERANCE
    manifest = json.loads((tmp_path / "onnx" / "manifest.json").read_text())
    assert manifest["opset"] == 21
    assert manifest["batch"] == 1
    assert manifest["guided"] is True
    assert (manifest["solver"], manifest["steps"], manifest["strength"]) == ("dpmpp_2m", 3, 1.0)
    assert len(manifest["schedules"]["dpmpp_2m"]["3"]["timesteps"]) == 3


@pytest.mark.slow
def test_onnx_with_half_weights_is_half_the_size(tmp_path, monkeypatch):
    """tiny's are float16 as they come: nearly the same numbers, in half the bytes."""
    pytest.importorskip("jax2onnx")
    pytest.importorskip("onnxruntime")
    pipe = MoebiusInpaintPipeline.from_pretrained("tiny", mesh=make_mesh(jax.devices()[:1]))
    (program,) = (p for p in programs(pipe.unet, pipe.vae, guided=False) if p.name == "decoder")
    whole = onnx.write(program, tmp_path, None)[0].stat().st_size
    monkeypatch.setattr(write, "programs", lambda *_, **__: [program])
    (found,) = export_model(pipe, tmp_path / "half", ExportOptions(format="onnx", half_weights=True))
    assert found.relative < 5 * TOLERANCE  # some weights were worked out from others
    assert (tmp_path / "half/decoder.onnx").stat().st_size < 0.6 * whole
    assert json.loads((tmp_path / "half/manifest.json").read_text())["half_weights"] is True


def test_formats_that_are_none_are_refused():
    with pytest.raises(UserError, match="format is 'tflite'; expected one of stablehlo, onnx"):
        ExportOptions(format="tflite")


def test_half_weights_are_for_onnx(tmp_path, capsys):
    assert main(["tiny", str(tmp_path / "out"), "--half-weights"]) == 1
    assert "half_weights is for format onnx" in capsys.readouterr().err


def test_onnx_in_half_precision_is_refused(tmp_path, capsys):
    assert main(["tiny", str(tmp_path / "out"), "--format", "onnx", "--dtype", "float16"]) == 1
    assert "ONNX programs are exported in float32 only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_program_that_computes_something_else_is_not_written(pipeline, tmp_path, monkeypatch):
    run = stablehlo.run
    monkeypatch.setattr(stablehlo, "run", lambda *a: [1.01 * array for array in run(*a)])
    with pytest.raises(UserError, match=r"encoder: mean differs by .* nothing was written"):
        export_model(pipeline, tmp_path / "out", ExportOptions())
    assert not list(tmp_path.iterdir())


class TestCommand:
    @pytest.mark.slow
    def test_it_writes_and_refuses_to_overwrite(self, tmp_path, capsys):
        assert main(["tiny", str(tmp_path / "out")]) == 0
        assert "decoder: images differs by" in capsys.readouterr().out
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert manifest["guided"] is False  # tiny's scale is one
        assert main(["tiny", str(tmp_path / "out")]) == 1
        assert "exists already; --overwrite replaces an earlier export" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere/at/all"], "neither a folder nor a Hub repository"),
            (["tiny", "--batch-size", "0"], "--batch-size is 0; expected 1 or more"),
            (["tiny", "--variant", "ft_ffhq"], "leave out variant"),
        ],
    )
    def test_mistakes_are_one_line(self, tmp_path, capsys, arguments, message):
        assert main([arguments[0], str(tmp_path / "out"), *arguments[1:]]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
