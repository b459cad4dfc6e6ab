"""What happens on one host of several: all end soon, with its message and what is done so far, or go on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_photos
from PIL import Image
from test_processes import free_port

from moebius_jax.weights.folder import load_numpy

ROOT = Path(__file__).parents[1]
LIMIT_S = 600
RUN = ("tests/tiny_run.py", "loss.terms=task", "log.every=1")
SHARING = """
import sys, time
import jax
join = jax.distributed.initialize
jax.distributed.initialize = lambda *a, **k: join(*a, **k, shutdown_timeout_seconds=10)
from moebius_jax.cli.sample import main
from moebius_jax.inpaint import files
paint = files.inpaint_files
def slowly(*args, **options):
    time.sleep(25 * ("--process-id=0" in sys.argv and len(args[1]) == 6))
    return paint(*args, **options)
files.inpaint_files = slowly
sys.exit(main(sys.argv[1:]))
"""

LATE = """
import sys, time
from moebius_jax.cli.train import parse
from moebius_jax.cluster import first_does, join_given_cluster
args = parse(["", *sys.argv[1:]], None)
join_given_cluster(False, args.coordinator, args.num_processes, args.process_id)
time.sleep(33 * args.process_id)
first_does(lambda: None)
"""

FULL_DISK = """
import sys
import train
def fail(*_):
    raise OSError(28, "No space left on device", "model")
if "--process-id=0" in sys.argv:
    train.write_model = fail
sys.exit(train.main(sys.argv[1:]))
"""
INTERRUPTED = """
import argparse, sys
from moebius_jax.cli.arguments import add_process_arguments, part, process_share
parser = argparse.ArgumentParser()
add_process_arguments(parser)
args = parser.parse_args()
process, _ = process_share(args)
sys.exit(part(args, 130 if process else 0))
"""

pytestmark = pytest.mark.slow
# Those that wait for half a minute and more, or start their processes several times over.
long = pytest.mark.long


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Starts a command as several processes of one cluster; "@" in an argument is the process's number."""
    logs = tmp_path_factory.mktemp("logs")

    def start(*command, processes=2):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": os.environ["FAST_COMPILE"],
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        port, started = free_port(), []
        for i in range(processes):
            arguments = [str(a).replace("@", str(i)) for a in command]
            cluster = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={processes}", f"--process-id={i}"]
            log = logs / f"{port}-{i}"
            with log.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, *arguments, *cluster],
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            process.log = log  # a file: a pipe nobody empties would block what writes to it
            started.append(process)
        return started

    return start


def ends(processes):
    """Status and output of each."""
    statuses = [p.wait(timeout=LIMIT_S) for p in processes]
    return [(status, p.log.read_text()) for status, p in zip(statuses, processes, strict=True)]


def wait_for(text, process):
    deadline = time.monotonic() + LIMIT_S
    while text not in process.log.read_text():
        assert process.poll() is None, process.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw_photos(tmp_path_factory.mktemp("data") / "photos", 12)


@long
def test_data_that_one_cannot_read_end_all_and_nothing_is_lost(job, photos, tmp_path):
    """The file is met in the second step, by one process; mended, the run is as if nothing had been."""
    options = ["data.kind=images", "data.loader.max_bad_fraction=0", "batch_size=4", "steps=4"]
    broken = shutil.copytree(photos, tmp_path / "broken")
    (broken / "07.png").write_text("no picture")
    results = ends(job("train.py", *RUN, *options, f"data.path={broken}", "--workdir", tmp_path / "one"))
    for status, said in results:
        assert status == 1, said
        assert "has no more data: 1 of 12 items cannot be read, more than max_bad_fraction" in said
        assert f"{broken}/07.png: not an image" in said
        assert "Traceback" not in said
    saved = [int(p.name.removeprefix("step_")) for p in (tmp_path / "one" / "checkpoints").glob("step_*")]
    assert len(saved) == 1
    assert saved[0] in range(1, 4)

    for workdir in ("one", "undisturbed"):
        results = ends(
            job("train.py", *RUN, *options, f"data.path={photos}", "--workdir", tmp_path / workdir)
        )
        assert [status for status, _ in results] == [0, 0], results
        assert (f"going on from step {saved[0]}" in results[0][1]) == (workdir == "one")
    ours, theirs = (load_numpy(tmp_path / n / "model" / "unet") for n in ("one", "undisturbed"))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@long
def test_a_late_process_is_waited_for(job, tmp_path):
    """CPU collectives give up after 30 s where a process comes that much later to the first; here it does."""
    code = tmp_path / "late.py"
    code.write_text(LATE)
    results = ends(job(code))
    assert [status for status, _ in results] == [0, 0], results


def test_folders_of_their_own_are_refused_at_once(job, tmp_path):
    """Each would write its part of a checkpoint, and none be whole."""
    for status, said in ends(job("train.py", *RUN, "vae=none", "fsdp=2", "--workdir", tmp_path / "run_@")):
        assert status == 1, said
        assert "process 1 of 2 does not see what process 0 writes there; --workdir must be one folder" in said
        assert "Traceback" not in said


def test_what_stops_one_stops_all_with_its_message(job, tmp_path):
    """Pictures are the first process's business alone; the other is inside the next step by then."""
    (tmp_path / "samples").touch()
    pair = job("train.py", *RUN, "log.grid_every=2", "--workdir", tmp_path)
    wait_for("step 1/", pair[0])
    seen = time.monotonic()
    (_, first), (status, second) = ends(pair)
    assert time.monotonic() - seen < 120  # a minute, and what is compiled for the picture
    assert f"error: {tmp_path}/samples/step_0000002.png: cannot be written" in first
    assert status == 1
    assert f"error: process 0 has ended: {tmp_path}/samples/step_0000002.png: cannot be written" in second


@long
def test_what_stops_the_end_stops_all(job, tmp_path):
    """Only the first writes the model; the others have nothing left to do, but are still there."""
    code = tmp_path / "full.py"
    code.write_text(FULL_DISK)
    results = ends(job(code, *RUN, "vae=none", "steps=2", "--workdir", tmp_path / "run"))
    assert [status for status, _ in results] == [1, 1], results
    assert "error: model: No space left on device" in results[0][1]
    assert "process 0 has ended: [Errno 28] No space left on device: 'model'" in results[1][1]


@long
def test_who_is_interrupted_does_not_wait_for_the_others(job, tmp_path):
    code = tmp_path / "interrupted.py"
    code.write_text(INTERRUPTED)
    first, second = job(code, "--distributed")
    try:
        assert second.wait(timeout=150) == 130
        assert first.poll() is None, "it still waits"
    finally:
        first.kill()
        first.wait()


@long
def test_a_process_that_is_killed_ends_the_others_and_leaves_no_workers(job, tmp_path):
    options = ["vae=none", "steps=4000", "data.loader.workers=1", "checkpoint.every=3"]
    run = job("train.py", *RUN, *options, "--workdir", tmp_path)
    wait_for("step 5/", run[0])
    workers = [w for p in run for w in children(p.pid)]
    assert len(workers) >= 2
    run[1].send_signal(signal.SIGKILL)
    seen = time.monotonic()
    results = ends(run)
    assert time.monotonic() - seen < 60
    assert [status for status, _ in results] == [1, -signal.SIGKILL], results
    assert "this process has lost the others" in results[0][1]
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{w}").exists() for w in workers):
        assert time.monotonic() < deadline
        time.sleep(0.2)

    again = job("train.py", *RUN, *options, "--workdir", tmp_path)
    wait_for("going on from step ", again[0])
    wait_for("step 8/", again[0])
    again[1].send_signal(signal.SIGTERM)  # to one of them
    for status, said in ends(again):
        assert status == 0, said


def children(process):
    """Numbers of a process's own."""
    return [
        int(n)
        for task in Path(f"/proc/{process}/task").iterdir()
        for n in (task / "children").read_text().split()
    ]


@long
def test_a_slower_share_of_files_is_waited_for(job, photos, tmp_path):
    """Longer than jax gives a process to follow the others' end, here ten seconds."""
    masks = tmp_path / "masks"
    masks.mkdir()
    hole = np.zeros((80, 96), np.uint8)
    hole[30:50, 40:60] = 255
    for file in photos.iterdir():
        Image.fromarray(hole).save(masks / file.name)
    code = tmp_path / "sharing.py"
    code.write_text(SHARING)
    paths = ["--image", photos, "--mask", masks, "--output", tmp_path / "out"]
    options = ["--model", "tiny", "--num-inference-steps", 2, "--batch-size", 2, "--distributed"]
    for kept in (0, 7):
        results = ends(job(code, *paths, *options))
        assert [status for status, _ in results] == [0, 0], results
        assert len(list((tmp_path / "out").iterdir())) == 12
        left = 12 - kept
        for (_, said), share in zip(results, ((left + 1) // 2, left // 2), strict=True):
            assert f"{share} results in" in said, "what is left is shared out evenly"
        for i in (0, 1, 2, 4, 6):  # of the first process's share but one
            (tmp_path / "out" / f"{i:02}.png").unlink()
