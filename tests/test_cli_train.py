"""`train.py` as a person types it: results, resuming, being told to stop, several processes, wrong input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from logged import scalars
from PIL import Image
from test_processes import free_port

from moebius_jax.weights.folder import load_numpy
from train import main

ROOT = Path(__file__).parents[1]
TINY = "tests/tiny_run.py"
LIMIT_S = 600
FAST_COMPILE = os.environ["FAST_COMPILE"]  # see conftest.py


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One CPU device; programs compiled once are found again."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": FAST_COMPILE,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


@pytest.fixture(scope="module")
def train(environment):
    def start(*arguments, program="train.py", env=None):
        return subprocess.Popen(
            [sys.executable, program, *map(str, arguments)],
            cwd=ROOT,
            env=environment | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finish(process):
    out, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, out, err


def wait_for(path, process):
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
    """A run of 60 steps without a break."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    status, _, err = finish(train(TINY, "--workdir", workdir))
    assert status == 0, err
    return workdir, err


def checkpoint(workdir, step):
    """Every leaf of a checkpoint's state."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(workdir / "checkpoints" / f"step_{step}" / "state")


def assert_same_run(ours, theirs):
    mine, other = checkpoint(ours, 60), checkpoint(theirs, 60)
    assert set(mine) == set(other)
    for name in mine:
        np.testing.assert_array_equal(mine[name], other[name], err_msg=name)
    mine, other = (load_numpy(w / "model" / "unet") for w in (ours, theirs))
    for name in mine:
        np.testing.assert_array_equal(mine[name], other[name], err_msg=name)


class TestResults:
    def test_what_a_run_leaves(self, straight):
        workdir, err = straight
        assert "step 60/60" in err
        assert f"--model {workdir}/model" in err
        assert list(workdir.glob("events.out.tfevents.*"))
        assert json.loads((workdir / "config.json").read_text())["batch_size"] == 8
        kept = sorted(p.name for p in (workdir / "checkpoints").iterdir())
        assert kept == ["step_30", "step_45", "step_60"]

    def test_events_bear_the_releases_names(self, straight):
        tags = set(scalars(straight[0]))
        losses = {"loss", "loss_task", "loss_outkd", "loss_featkd", "loss_elatentlpips"}
        assert losses <= tags
        assert {"weight_outkd", "weight_elatentlpips", "weight_cross", "learning_rate"} <= tags
        assert {"grad_norm_theta_f_task", "grad_norm_theta_c_featkd", "grad_norm_theta_c_output"} <= tags
        assert {"images_per_second", "data_wait_share", "gradient_norm"} <= tags

    def test_sample_takes_the_model_as_it_is(self, straight, train, tmp_path):
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 255, (64, 80, 3), np.uint8)).save(tmp_path / "image.png")
        grey = np.zeros((64, 80), np.uint8)
        grey[20:40, 20:40] = 255
        Image.fromarray(grey).save(tmp_path / "mask.png")
        arguments = ["--model", straight[0] / "model", "--num-inference-steps", "2"]
        for name in ("image", "mask", "output"):
            arguments += [f"--{name}", tmp_path / f"{name}.png"]
        status, _, err = finish(train(*arguments, program="sample.py"))
        assert status == 0, err
        assert Image.open(tmp_path / "output.png").size == (80, 64)

    def test_export_turns_it_into_the_releases_format(self, straight, train, tmp_path):
        target = tmp_path / "back.safetensors"
        model = straight[0] / "model" / "unet"
        status, _, err = finish(train(model, "--export", target, program="convert_weights.py"))
        assert status == 0, err
        assert target.exists()

    def test_a_finished_run_is_left_alone_and_weights_alone_start_another(self, straight, train, tmp_path):
        status, _, err = finish(train(TINY, "--workdir", straight[0]))
        assert status == 0, err
        assert "going on from step 60" in err
        options = ["--workdir", tmp_path / "next", f"init={straight[0]}/model", "steps=1"]
        status, _, err = finish(train(TINY, *options))
        assert status == 0, err
        assert f"starting from {straight[0]}/model" in err


class TestResuming:
    def test_killed_and_started_again_is_the_same_run(self, straight, train, tmp_path):
        workdir = tmp_path / "killed"
        process = train(TINY, "--workdir", workdir, "vae=none")
        wait_for(workdir / "checkpoints" / "step_15", process)
        process.send_signal(signal.SIGKILL)
        assert finish(process)[0] == -signal.SIGKILL
        # Other threads, and another checkpoint rhythm: none of it matters.
        status, _, err = finish(train(TINY, "--workdir", workdir, "vae=none", "data.loader.threads=3"))
        assert status == 0, err
        assert "going on from step" in err
        assert_same_run(workdir, straight[0])

    def test_told_to_stop_it_saves_and_goes_on_later(self, straight, train, tmp_path):
        workdir = tmp_path / "stopped"
        process = train(TINY, "--workdir", workdir, "vae=none", "checkpoint.every=7")
        wait_for(workdir / "checkpoints" / "step_7", process)
        process.send_signal(signal.SIGTERM)
        status, _, err = finish(process)
        assert status == 0, err
        assert "the same command goes on from there" in err
        assert not (workdir / "model").exists()
        status, _, err = finish(train(TINY, "--workdir", workdir, "vae=none"))
        assert status == 0, err
        assert_same_run(workdir, straight[0])

    def test_a_damaged_checkpoint_is_passed_over(self, straight, train, tmp_path):
        workdir = tmp_path / "damaged"
        shutil.copytree(straight[0], workdir)
        for path in (workdir / "checkpoints" / "step_60" / "state").rglob("*"):
            if path.is_file() and path.stat().st_size > 100:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        status, _, err = finish(train(TINY, "--workdir", workdir))
        assert status == 0, err
        assert "step_60: damaged, going back to the one before" in err
        assert "going on from step 45" in err
        assert "Traceback" not in err
        assert_same_run(workdir, straight[0])

    def test_another_number_of_devices_and_another_mesh(self, straight, train, tmp_path):
        workdir = tmp_path / "moved"
        shutil.copytree(straight[0], workdir)
        env = {"XLA_FLAGS": f"{FAST_COMPILE} --xla_force_host_platform_device_count=4"}
        status, _, err = finish(train(TINY, "--workdir", workdir, "fsdp=2", "steps=62", env=env))
        assert status == 0, err
        assert "mesh data=2 fsdp=2" in err
        assert "going on from step 60" in err


def test_two_processes_are_one_run(train, tmp_path):
    """Losses of a run over two processes, and its model, against those of one process."""
    address = f"127.0.0.1:{free_port()}"
    options = ["steps=5", "log.every=1", "checkpoint.every=5"]
    cluster = ["--workdir", tmp_path / "two", "--coordinator", address, "--num-processes", 2]
    pair = [train(TINY, *options, *cluster, "--process-id", i) for i in (0, 1)]
    results = [finish(p) for p in pair]
    assert [r[0] for r in results] == [0, 0], results
    status, _, alone = finish(train(TINY, *options, "--workdir", tmp_path / "one"))
    assert status == 0, alone

    def losses(text):
        return [float(line.split()[3]) for line in text.splitlines() if line.startswith("step ")]

    assert len(losses(alone)) == 5
    np.testing.assert_allclose(losses(results[0][2]), losses(alone), rtol=2e-3)
    assert losses(results[1][2]) == [], "only the first process reports"
    ours, theirs = (load_numpy(tmp_path / n / "model" / "unet") for n in ("two", "one"))
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-2, atol=1e-3, err_msg=name)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    y, x = np.mgrid[:80, :96]
    for i in range(6):
        waves = [127 + 100 * np.sin(x / (5 + i) + y / a) for a in (9, 14, 23)]
        Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def test_photographs_cached_latents_and_pictures(train, photos, tmp_path):
    """The same few images directly and from a cache; grids and previews can be looked at."""
    task = ["loss.terms=task", "steps=2", "log.grid_every=2", "log.grid_images=2"]
    held_out = [f"log.validation={photos}", "log.validate_every=1", "log.validation_samples=8"]
    status, _, err = finish(
        train(TINY, "--workdir", tmp_path / "a", "data.kind=images", f"data.path={photos}", *task, *held_out)
    )
    assert status == 0, err
    measured = scalars(tmp_path / "a")["validation_loss_task"]
    assert len(measured) == 2
    assert np.isfinite(measured).all()
    grid = Image.open(tmp_path / "a" / "samples" / "step_0000002.png")
    assert grid.size == (3 * 64 + 16, 2 * 64 + 8)
    latents = tmp_path / "latents"
    status, out, err = finish(
        train(TINY, latents, f"data.path={photos}", "--draws", 3, program="cache_latents.py")
    )
    assert status == 0, err
    assert "18 samples of 6 images" in out
    cached = ["data.kind=latents", f"data.path={latents}"]
    status, _, err = finish(train(TINY, "--workdir", tmp_path / "b", *cached, *task))
    assert status == 0, err
    for kind, options in (("images", ["data.kind=images", f"data.path={photos}"]), ("latents", cached)):
        preview = tmp_path / f"{kind}.png"
        assert main([TINY, *options, "--preview-data", str(preview), "--no-compilation-cache"]) == 0
        assert Image.open(preview).width == 3 * 64 + 16
    status, _, err = finish(train(TINY, latents, f"data.path={photos}", program="cache_latents.py"))
    assert status == 1
    assert "exists already" in err


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
        ([TINY, "data.kind=images", "data.path=docs", "data.augment.image_size=32"], "no images"),
        ([TINY, "fsdp=3"], "divisor of the 8 devices"),
        ([TINY, "batch_size=12"], "multiple of the 8 devices"),
        ([TINY, "--coordinator", "x:1"], "go together"),
        ([TINY, "vae=none", "data.kind=images", "data.path=docs"], "no images"),
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
    [(["--distributed"], "no cluster could be joined"), (["--aot", "v99:1x1"], "--aot v99:1x1: ")],
)
def test_wrong_surroundings_are_one_line(arguments, message, train):
    status, _, err = finish(train(TINY, *arguments))
    assert status == 1
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("ema_decay=0", "of another configuration"),
        ("seed=5", "of a run with seed=0"),
        ("batch_size=7", "no whole number of such batches"),
    ],
)
def test_checkpoints_of_another_run_are_refused(change, message, straight, train):
    status, _, err = finish(train(TINY, "--workdir", straight[0], "vae=none", change))
    assert status == 1
    assert message in err
    assert "Traceback" not in err
    assert (straight[0] / "checkpoints" / "step_60").exists()


def test_sizes_that_do_not_fit_and_places_that_cannot_be_written(train, photos, tmp_path):
    images = ["data.kind=images", f"data.path={photos}"]
    status, _, err = finish(train(TINY, *images, "data.augment.image_size=32", "--workdir", tmp_path / "a"))
    assert status == 1
    assert "data.augment.image_size is 32; expected 64" in err
    status, _, err = finish(train(TINY, *images, "--preview-data", tmp_path / "picture"))
    assert status == 1
    assert "found no suffix" in err
    (tmp_path / "file").touch()
    status, _, err = finish(
        train(TINY, "vae=none", "loss.terms=task", "--workdir", tmp_path / "file" / "run")
    )
    assert status == 1
    assert "cannot be written" in err
    assert "Traceback" not in err


def test_numbers_that_explode_end_the_run(train, tmp_path):
    """The step, the term, and where to go back to are named; nothing bad is saved."""
    options = [
        "loss.terms=task",
        "optimizer.name=adamw",
        "optimizer.learning_rate=1e30",
        "checkpoint.every=1",
    ]
    status, _, err = finish(train(TINY, "--workdir", tmp_path / "run", *options))
    assert status == 1
    assert "loss_task is" in err
    assert "the last checkpoint before it is" in err
    assert "Traceback" not in err


AOT_PYTHON = ROOT / ".venv-aot" / "bin" / "python"


@pytest.mark.skipif(not AOT_PYTHON.exists(), reason="libtpu is not installed (make .venv-aot/.installed)")
def test_the_step_compiles_for_a_tpu_slice(environment):
    """A real TPU program of the small run, on data and FSDP meshes."""
    for fsdp in (1, 2):
        process = subprocess.run(
            [AOT_PYTHON, "train.py", TINY, "--aot", "v5e:2x2", "dtype=bfloat16", f"fsdp={fsdp}"],
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
        assert ("all-gather" in process.stdout) or fsdp == 1
