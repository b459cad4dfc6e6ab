"""The four extensions of docs/extending.md, from files of a user's own: its code is what is run here."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
import synth
from conftest import TINY_UNET, TINY_VAE
from logged import scalars
from PIL import Image
from safetensors.numpy import load_file, save_file

from moebius_jax import MoebiusInpaintPipeline, UserError, load_unet
from moebius_jax.cli import convert, sample
from moebius_jax.data.datasets import DATASETS
from moebius_jax.diffusion.solvers import SOLVERS, solver_steps
from moebius_jax.extensions import load_extension
from moebius_jax.models import UNet
from moebius_jax.models.initializers import KeyStream
from moebius_jax.models.switches import SELF_MIXERS
from moebius_jax.sharding import make_mesh
from moebius_jax.weights.load import save_vae
from moebius_jax.weights.names import counterparts, expected_tensors
from train import main as train

DOCS = Path(__file__).parents[1] / "docs" / "extending.md"
CONFIG = """
from configs.tiny_run import get_config as tiny
from configs.window_mean import WindowMean
from configs.array_dataset import ArrayDataset
from configs.hole_loss import InTheHole
from moebius_jax.data.config import DataConfig
from moebius_jax.data.loader import LoaderConfig
from moebius_jax.distillation.config import LossConfig


def get_config():
    config = tiny()
    return config.replace(
        student=config.student.replace(self_mixer="window_mean", window=5),
        loss=LossConfig(terms=("coarse", "task", InTheHole(power=1.5))),
        data=DataConfig(
            kind="array", augment=config.data.augment, loader=LoaderConfig(workers=1, threads=1, prefetch=1)
        ),
        batch_size=8,
        steps=2,
    )
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with the code blocks of the document, under the names their first lines give."""
    folder = tmp_path_factory.mktemp("mine")
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL):
        (folder / re.match(r"# (\w+\.py)\n", block)[1]).write_text(block)
    assert len(list(folder.iterdir())) == 4
    return folder


@pytest.fixture(autouse=True)
def registries():
    """What a test registers is forgotten after it."""
    before = [(registry, dict(registry)) for registry in (SELF_MIXERS, DATASETS, SOLVERS)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


@pytest.fixture
def pictures(tmp_path, photo, mask) -> list[str]:
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return ["--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png")]


@pytest.mark.slow
def test_a_mixer_converts_there_and_back_and_samples(files, tmp_path, pictures):
    extension = ["--extension", str(files / "window_mean.py")]
    load_extension(files / "window_mean.py")
    config = TINY_UNET.replace(self_mixer="window_mean", window=5)
    slots = expected_tensors(config)
    name = "diff_model.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    own = {key.removeprefix(name): slot.shape for key, slot in slots.items() if key.startswith(f"{name}.")}
    assert own == {
        ".to_value.weight": (32, 32, 1, 1),
        ".proj.out.weight": (32, 32, 1, 1),
        ".window_weight": (1, 1, 5, 5),
    }
    released = {key: synth.tensor(key, slot.shape) for key, slot in slots.items()}
    save_file(released, tmp_path / "theirs.safetensors")
    SELF_MIXERS.pop("window_mean")  # a new process does not know it
    with pytest.raises(SystemExit):
        convert.main([str(tmp_path / "theirs.safetensors"), str(tmp_path / "unet"), "--extension", "no.py"])
    assert convert.main([str(tmp_path / "theirs.safetensors"), str(tmp_path / "unet")]) == 1
    assert convert.main([str(tmp_path / "theirs.safetensors"), str(tmp_path / "unet"), *extension]) == 0
    unet = load_unet(tmp_path / "unet")
    assert unet.config == config
    back = tmp_path / "back.safetensors"
    assert convert.main([str(tmp_path / "unet"), "--export", str(back)]) == 0
    returned = load_file(back)
    assert all(np.array_equal(value, returned[key]) for key, value in released.items())

    vae = MoebiusInpaintPipeline.untrained(TINY_UNET, TINY_VAE, mesh=make_mesh(jax.devices()[:1])).vae
    save_vae(tmp_path / "vae", vae)
    output = tmp_path / "result.png"
    arguments = ["--model", str(tmp_path / "unet"), "--num-inference-steps", "2", "--output", str(output)]
    assert sample.main([*arguments, *pictures, *extension]) == 0
    assert Image.open(output).size == (112, 80)


def test_muon_leaves_alone_what_a_module_says(files):
    load_extension(files / "window_mean.py")
    found = counterparts(TINY_UNET.replace(self_mixer="window_mean"))
    path = "down_blocks.0.attentions.0.block.self_mixer"
    assert {n: found[f"{path}.{n}"].muon for n in ("window", "to_value.kernel", "to_out.kernel")} == {
        "window": False,
        "to_value.kernel": True,
        "to_out.kernel": True,
    }


@pytest.mark.slow
def test_a_run_with_a_mixer_a_loss_and_a_data_set(files, tmp_path, capfd):
    """Two steps of train.py, samples from a worker process, and the result is of the new architecture."""
    (files / "mine.py").write_text(CONFIG)
    (files / "tiny_run.py").write_text((Path(__file__).parent / "tiny_run.py").read_text())
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.integers(0, 256, (12, 64, 64, 3), np.uint8))
    work = tmp_path / "run"
    arguments = [str(files / "mine.py"), "--workdir", str(work), "--no-compilation-cache"]
    overrides = [f"data.path={tmp_path / 'images.npy'}", "log.every=1"]
    assert train([*arguments, *overrides]) == 0
    log = capfd.readouterr().err
    assert "losses coarse, task, hole" in log
    trained = load_unet(work / "model" / "unet")
    assert trained.config.self_mixer == "window_mean"
    found = scalars(work)
    for name in ("loss_hole", "weight_hole", "loss_task", "loss_featkd"):
        assert len(found[name]) == 2
        assert np.isfinite(found[name]).all()
    fresh = UNet(trained.config, rngs=KeyStream(jax.random.key(0)))
    before, after = (n.down_blocks[0].attentions[0].block.self_mixer.window[...] for n in (fresh, trained))
    assert np.abs(np.asarray(after) - np.asarray(before)).max() > 0
    assert train([*arguments, "data.path=nothing.npy"]) == 1
    assert "error: nothing.npy: no array of images" in capfd.readouterr().err


@pytest.mark.slow
def test_a_solver(files, tmp_path, tiny_pipeline, tiny_folder, photo, mask, pictures, capsys):
    extension = files / "quadratic.py"
    solver = load_extension(extension).QuadraticDDIM()
    steps = solver_steps(solver, 4)
    assert list(steps.timesteps) == [999, 562, 250, 62]
    ours = tiny_pipeline(photo, mask, scheduler=solver, num_inference_steps=4, seed=3).images[0]
    ddim = tiny_pipeline(photo, mask, num_inference_steps=4, seed=3).images[0]
    assert np.any(np.asarray(ours) != np.asarray(ddim))

    arguments = ["--model", str(tiny_folder), *pictures, "--output", str(tmp_path / "out.png")]
    arguments += ["--num-inference-steps", "4", "--scheduler", "ddim_quadratic"]
    SOLVERS.pop("ddim_quadratic")
    assert sample.main(arguments) == 1
    assert "is 'ddim_quadratic'; expected ddim or ddim_trailing or dpmpp_2m" in capsys.readouterr().err
    assert sample.main([*arguments, "--extension", str(extension)]) == 0


def test_what_fails_in_a_file_is_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("1 / 0")
    with pytest.raises(UserError, match=r"mine\.py: ZeroDivisionError: division by zero"):
        load_extension(file)
    with pytest.raises(UserError, match=r"other\.py: no such file"):
        load_extension(tmp_path / "other.py")
