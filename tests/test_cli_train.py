"""`train.py` as a person types it: results, resuming, being told to stop, several processes, wrong input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import draw_photos, not_as_written
from logged import RELEASED_NAMES, scalars
from PIL import Image
from test_processes import free_port

import train as train_program
from moebius_jax.cli.cache_latents import main as cache_latents
from moebius_jax.cli.convert import main as convert
from moebius_jax.cli.sample import main as sample
from moebius_jax.weights.folder import load_numpy
from train import main

ROOT = Path(__file__).parents[1]
TINY = "tests/tiny_run.py"
TASK = "loss.terms=task"  # no teacher: a third of the time
ALL_LOSSES = ("sampling.num_inference_steps=7", "steps=3", "log.every=1", "checkpoint.every=3")
LOOKS = ("log.validate_every=2", "log.grid_every=2", "log.validation=held_out")
LIMIT_S = 600
FAST_COMPILE = os.environ["FAST_COMPILE"]  # see conftest.py


@pytest.fixture(scope="module")
def environment():
    """One CPU device, whatever the tests themselves have; small programs are kept too."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": FAST_COMPILE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


@pytest.fixture(scope="module")
def train(environment):
    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "train.py", *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finish(process):
    out, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, out, err


def run_here(*arguments):
    """Status of the small run within the tests' own process, on eight devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)  # pytest's own handlers stay
        return main([TINY, *map(str, arguments), "--no-compilation-cache"])


@pytest.fixture
def in_process(capfd):
    """`run_here`, and what it said."""
    return lambda *arguments: (run_here(*arguments), capfd.readouterr().err)


@pytest.fixture(scope="module")
def all_losses(tmp_path_factory):
    """Three steps with all four losses, on eight devices: the folder, and the tensors `seen` on the way.

    What measures and draws them is stood in for; it is compiled elsewhere.
    """
    run = SimpleNamespace(folder=tmp_path_factory.mktemp("runs") / "all", seen=[])
    opened, open_dataset = [], train_program.open_dataset

    class Looks:
        def __init__(self, *arguments):
            assert arguments[-1] is opened[1], "not the held-out data"

        def __call__(self, tensors):
            run.seen.append(jax.device_get(tensors))
            return {"validation_loss_task": 0.5}

        def draw(self, tensors):
            self(tensors)
            return Image.new("RGB", (8, 8))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_program, "open_dataset", lambda *a: opened.append(open_dataset(*a)) or opened[-1])
        for name in ("Validation", "SampleGrids"):
            patch.setattr(train_program, name, Looks)
        assert run_here(*ALL_LOSSES, *LOOKS, "--workdir", run.folder) == 0
    return run


def wait_for(path, process):
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
    """A run of 24 steps without a break."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    status, _, err = finish(train(TINY, TASK, "--workdir", workdir))
    assert status == 0, err
    return workdir, err


def checkpoint(workdir, step):
    """Every leaf of a checkpoint's state."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(workdir / "checkpoints" / f"step_{step}" / "state")


def assert_same_run(ours, theirs):
    mine, other = checkpoint(ours, 24), checkpoint(theirs, 24)
    assert set(mine) == set(other)
    for name in mine:
        np.testing.assert_array_equal(mine[name], other[name], err_msg=name)
    mine, other = (load_numpy(w / "model" / "unet") for w in (ours, theirs))
    for name in mine:
        np.testing.assert_array_equal(mine[name], other[name], err_msg=name)


@pytest.mark.slow
class TestResults:
    def test_what_a_run_leaves(self, straight):
        workdir, err = straight
        assert "step 24/24" in err
        assert f"--model {workdir}/model" in err
        assert list(workdir.glob("events.out.tfevents.*"))
        assert json.loads((workdir / "config.json").read_text())["batch_size"] == 8
        kept = sorted(p.name for p in (workdir / "checkpoints").iterdir())
        assert kept == ["step_12", "step_18", "step_24"]
        # The model is the average.
        model, last = load_numpy(workdir / "model/unet"), checkpoint(workdir, 24)
        for name, value in model.items():
            np.testing.assert_array_equal(value, last[f"ema/{name}"], err_msg=name)
        assert any(
            (value != last[f"params/{name}"]).any()
            for name, value in model.items()
            if f"params/{name}" in last
        )

    def test_the_model_is_sampled_as_the_configuration_says(self, all_losses):
        said = json.loads((all_losses.folder / "model/pipeline.json").read_text())
        assert said == {"guidance_scale": 2.5, "num_inference_steps": 7}

    def test_events_bear_the_releases_names(self, all_losses):
        tags = set(scalars(all_losses.folder))
        losses = {"loss", "loss_task", "loss_outkd", "loss_featkd", "loss_elatentlpips"}
        assert losses <= tags
        assert tags >= RELEASED_NAMES - {"feat_gnorm_task", "feat_gnorm_outkd", "feat_gnorm_elatentlpips"}
        assert {"weight_outkd", "weight_elatentlpips", "weight_cross", "learning_rate"} <= tags
        assert {"grad_norm_theta_f_task", "grad_norm_theta_c_featkd", "gradient_norm"} <= tags
        assert {"images_per_second", "data_wait_share", "feat_gnorm_output"} <= tags

    def test_sample_takes_the_model_as_it_is(self, straight, tmp_path):
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 255, (64, 80, 3), np.uint8)).save(tmp_path / "image.png")
        grey = np.zeros((64, 80), np.uint8)
        grey[20:40, 20:40] = 255
        Image.fromarray(grey).save(tmp_path / "mask.png")
        arguments = ["--model", str(straight[0] / "model"), "--num-inference-steps", "2"]
        for name in ("image", "mask", "output"):
            arguments += [f"--{name}", str(tmp_path / f"{name}.png")]
        assert sample(arguments) == 0
        assert Image.open(tmp_path / "output.png").size == (80, 64)

    def test_what_is_looked_at_on_the_way(self, all_losses):
        """The averages, on held-out data, when it is time and in the end."""
        assert scalars(all_losses.folder)["validation_loss_task"] == [0.5, 0.5]
        pictures = sorted(file.name for file in (all_losses.folder / "samples").iterdir())
        assert pictures == ["step_0000002.png", "step_0000003.png"]
        model = load_numpy(all_losses.folder / "model/unet")
        assert len(all_losses.seen) == 4
        for last in all_losses.seen[2:]:
            for name, value in model.items():
                np.testing.assert_array_equal(last[name], value, err_msg=name)

    def test_export_turns_it_into_the_releases_format(self, straight, tmp_path):
        target = tmp_path / "back.safetensors"
        assert convert([str(straight[0] / "model" / "unet"), "--export", str(target)]) == 0
        assert target.exists()

    def test_a_finished_run_is_left_alone_and_weights_alone_start_another(
        self, straight, in_process, tmp_path
    ):
        status, err = in_process(TASK, "vae=none", "--workdir", straight[0])
        assert status == 0, err
        assert "going on from step 24" in err
        shutil.copytree(straight[0] / "model", tmp_path / "model")
        not_as_written(tmp_path / "model/unet/config.json")
        options = [TASK, "--workdir", tmp_path / "next", f"init={tmp_path}/model", "vae=none", "steps=1"]
        status, err = in_process(*options)
        assert status == 1
        assert "config.json: not what was written" in err
        status, err = in_process(*options, "--no-verify")
        assert status == 0, err
        assert f"starting from {tmp_path}/model" in err
        assert "step 1/1" in err  # the last step's figures are told, whether it is time or not


@pytest.mark.slow
class TestResuming:
    def test_told_to_stop_and_killed_and_started_again_is_the_same_run(self, straight, train, tmp_path):
        workdir = tmp_path / "interrupted"
        process = train(TINY, TASK, "--workdir", workdir, "vae=none", "checkpoint.every=5")
        wait_for(workdir / "checkpoints" / "step_5", process)
        process.send_signal(signal.SIGTERM)
        status, _, err = finish(process)
        assert status == 0, err
        assert "the same command goes on from there" in err
        assert not (workdir / "model").exists()
        process = train(TINY, TASK, "--workdir", workdir, "vae=none")
        wait_for(workdir / "checkpoints" / "step_18", process)
        process.send_signal(signal.SIGKILL)
        assert finish(process)[0] == -signal.SIGKILL
        # Other threads, and another checkpoint rhythm: none of it matters.
        options = [TASK, "vae=none", "data.loader.threads=3", "checkpoint.every=7"]
        status, _, err = finish(train(TINY, "--workdir", workdir, *options))
        assert status == 0, err
        assert "going on from step 18" in err
        assert_same_run(workdir, straight[0])

    def test_damaged_checkpoints_are_passed_over(self, straight, train, tmp_path):
        workdir = tmp_path / "damaged"
        shutil.copytree(straight[0], workdir)
        for path in (workdir / "checkpoints" / "step_24" / "state").rglob("*"):
            if path.is_file() and path.stat().st_size > 100:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        state = workdir / "checkpoints" / "step_18" / "state"
        weights = max((p for p in state.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
        status, _, err = finish(train(TINY, TASK, "--workdir", workdir, "vae=none"))
        assert status == 0, err
        assert "step_24: damaged, going back to the one before" in err
        assert f"{weights}: not what was written" in err
        assert "going on from step 12" in err
        assert "Traceback" not in err
        assert_same_run(workdir, straight[0])

    def test_another_number_of_devices_and_another_mesh(self, straight, in_process, tmp_path):
        workdir = tmp_path / "moved"
        shutil.copytree(straight[0], workdir)
        not_as_written(workdir / "checkpoints/step_24/data/metadata")
        options = [TASK, "--workdir", workdir, "fsdp=2", "vae=none", "steps=26"]
        status, err = in_process(*options, "--no-verify")
        assert status == 0, err
        assert "mesh data=4 fsdp=2" in err
        assert "going on from step 24" in err


@pytest.mark.slow
def test_two_processes_end_together(train, tmp_path):
    """What only the first of them finds out ends both at once; the other would wait for minutes."""
    (tmp_path / "config.json").write_text("mine")
    cluster = ["--workdir", tmp_path, "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2]
    options = ["loss.terms=task", "vae=none"]
    pair = [train(TINY, *options, *cluster, "--process-id", i) for i in (0, 1)]
    started = time.monotonic()
    for status, _, err in [finish(process) for process in pair]:
        assert status == 1
        assert f"error: {tmp_path}/config.json: not replaced, it is of no run" in err
    assert time.monotonic() - started < 120


def run_of_two(train, workdir, *arguments):
    """What each of two processes said that made one run."""
    cluster = ["--workdir", workdir, "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2]
    pair = [train(TINY, *arguments, *cluster, "--process-id", i) for i in (0, 1)]
    results = [finish(p) for p in pair]
    assert [r[0] for r in results] == [0, 0], results
    return [err for _, _, err in results]


@pytest.mark.slow
def test_two_processes_are_one_run(train, straight, tmp_path):
    """Of seven steps that each depend on those before, what is measured at the eighth."""
    first, second = run_of_two(train, tmp_path, TASK, "steps=8")
    assert "step 8/8" in first
    assert "step " not in second, "only the first process reports"
    ours, theirs = scalars(tmp_path), scalars(straight[0])
    for name in ("loss_task", "gradient_norm", "parameter_norm"):
        assert len(ours[name]) == 2
        np.testing.assert_allclose(ours[name], theirs[name][:2], rtol=1e-3, err_msg=name)


@pytest.mark.long
def test_two_processes_are_one_run_of_all_losses(train, all_losses, tmp_path):
    """Losses of a run over two processes, and its model, against those of one process."""
    run_of_two(train, tmp_path, *ALL_LOSSES, "vae=none")
    ours, theirs = scalars(tmp_path), scalars(all_losses.folder)
    # The terms by themselves: the total is weighted by gradients' norms, and those jump where an activation
    # changes sides of zero.
    names = [name for name in theirs if name.startswith("loss_")]
    assert len(names) == 4
    for name in names:
        assert len(ours[name]) == 3
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, err_msg=name)
    ours, theirs = (load_numpy(folder / "model" / "unet") for folder in (tmp_path, all_losses.folder))
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-2, atol=1e-3, err_msg=name)


@pytest.fixture
def photos(tmp_path):
    return draw_photos(tmp_path / "photos", 6)


@pytest.mark.long
def test_photographs_cached_latents_and_pictures(photos, tmp_path, in_process, capfd):
    """The same few images directly and from a cache; grids and previews can be looked at."""
    images, latents = f"data.path={photos}", tmp_path / "latents"
    task = ["loss.terms=task", "steps=2", "log.grid_every=2", "log.grid_images=2"]
    held_out = [f"log.validation={photos}", "log.validate_every=1", "log.validation_samples=8"]
    status, err = in_process("--workdir", tmp_path / "a", "data.kind=images", images, *task, *held_out)
    assert status == 0, err
    measured = scalars(tmp_path / "a")["validation_loss_task"]
    assert len(measured) == 2
    assert np.isfinite(measured).all()
    grid = Image.open(tmp_path / "a" / "samples" / "step_0000002.png")
    assert grid.size == (3 * 64 + 16, 2 * 64 + 8)
    assert cache_latents([TINY, str(latents), images, "--draws", "3"]) == 0
    assert "18 samples of 6 images" in capfd.readouterr().out
    cached = ["data.kind=latents", f"data.path={latents}"]
    status, err = in_process("--workdir", tmp_path / "b", *cached, *task)
    assert status == 0, err
    for kind, options in (("images", ["data.kind=images", images]), ("latents", cached)):
        preview = tmp_path / f"{kind}.png"
        assert in_process(*options, "--preview-data", preview)[0] == 0
        assert Image.open(preview).width == 3 * 64 + 16
    assert cache_latents([TINY, str(latents), images]) == 1
    assert "exists already" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "no such configuration"),
        ([TINY, "batchsize=3"], "did you mean batch_size?"),
        ([TINY, "data.kind=images"], "no data: pass data.path=FOLDER"),
        ([TINY, "data.kind=images", "data.path=nowhere"], "nowhere: no such folder"),
        ([TINY, "data.kind=latents", "data.path=tests"], "not a folder of cached latents"),
        ([TINY, "teacher=nowhere", "vae=none"], "nowhere: no such folder"),
        ([TINY, "metric=none"], "CC-BY-NC"),
        ([TINY, "init=nowhere", "loss.terms=task", "vae=none"], "nowhere: no such folder"),
        ([TINY, "data.kind=images", "data.path=configs", "data.augment.image_size=32"], "no images"),
        ([TINY, "fsdp=3"], "divisor of the 8 devices"),
        ([TINY, "batch_size=12"], "multiple of the 8 devices"),
        ([TINY, "--coordinator", "x:1"], "go together"),
        ([TINY, "vae=none", "data.kind=images", "data.path=configs"], "no images"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, tmp_path, capsys):
    status = main([*arguments, "--workdir", str(tmp_path / "run"), "--no-compilation-cache"])
    err = capsys.readouterr().err
    assert status == 1
    assert message in err
    assert [line for line in err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--distributed"], "no cluster could be joined"), (["--aot", "v99:1x1"], "compiling for v99:1x1: ")],
)
def test_wrong_surroundings_are_one_line(arguments, message, train):
    status, _, err = finish(train(TINY, *arguments))
    assert status == 1
    assert message in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("ema_decay=0", "of another configuration"),
        ("seed=5", "of a run with seed=0"),
        ("batch_size=40", "no whole number of such batches"),
    ],
)
def test_checkpoints_of_another_run_are_refused(change, message, straight, in_process):
    status, err = in_process(TASK, "--workdir", straight[0], "vae=none", change)
    assert status == 1
    assert message in err
    assert "Traceback" not in err
    assert (straight[0] / "checkpoints" / "step_24").exists()


def test_sizes_that_do_not_fit_and_places_that_cannot_be_written(photos, in_process, tmp_path):
    images = ["data.kind=images", f"data.path={photos}"]
    status, err = in_process(*images, "data.augment.image_size=32", "--workdir", tmp_path / "a")
    assert status == 1
    assert "data.augment.image_size is 32; expected 64" in err
    status, err = in_process(*images, "--preview-data", tmp_path / "picture")
    assert status == 1
    assert "found no suffix" in err
    (tmp_path / "file").touch()
    status, err = in_process("vae=none", "loss.terms=task", "--workdir", tmp_path / "file" / "run")
    assert status == 1
    assert "cannot be written" in err
    assert "Traceback" not in err
    assert "M parameters" not in err, "networks are drawn for minutes, and all for nothing"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "said", "message"),
    [
        ("jax.stages.Lowered.compile", "Shared memory size limit exceeded", ": a kernel of ours does not"),
        ("jax.stages.Lowered.compile", "Ran out of memory", " does not fit in the device's memory; use more"),
        ("train.to_devices", "Out of memory", " does not fit in the device's memory; use more accumulation"),
    ],
)
def test_too_large_a_step_is_one_line(where, said, message, in_process, monkeypatch, tmp_path):
    def fails(*_args):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")

    monkeypatch.setattr(where, fails)
    status, err = in_process(TASK, "vae=none", "--workdir", tmp_path)
    assert status == 1
    assert f"error: a step of 8 samples{message}" in err
    assert "Traceback" not in err


@pytest.mark.long
def test_numbers_that_explode_end_the_run(in_process, tmp_path):
    """The step, the term, and where to go back to are named; nothing bad is saved."""
    status, err = in_process(
        "--workdir", tmp_path / "run", "vae=none", "loss.terms=task", "optimizer.name=adamw",
        "optimizer.learning_rate=1000", "checkpoint.every=1",
    )  # fmt: skip
    assert status == 1
    assert "loss_task is" in err
    assert "the last checkpoint before it is" in err
    assert "Traceback" not in err


AOT_PYTHON = ROOT / ".venv-aot" / "bin" / "python"


@pytest.mark.long
@pytest.mark.skipif(not AOT_PYTHON.exists(), reason="libtpu is not installed (make .venv-aot/.installed)")
def test_the_step_compiles_for_a_tpu_slice(environment):
    """A real TPU program of the small run, its data and its weights both cut in two."""
    process = subprocess.run(
        [AOT_PYTHON, "train.py", TINY, "--aot", "v5e:2x2", "dtype=bfloat16", "fsdp=2"],
        cwd=ROOT,
        env=environment | {"XLA_FLAGS": ""},  # the TPU compiler has flags of its own
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert process.returncode == 0, process.stderr
    assert "4 x TPU v5 lite" in process.stdout
    assert "all-reduce" in process.stdout
    assert "all-gather" in process.stdout
