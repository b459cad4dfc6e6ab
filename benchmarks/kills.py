"""What is left after random kills: is a command, run again, equal to one nobody disturbed?

    python -m benchmarks.kills --count 200            # over convert, sample, evaluate and train in turn
    python -m benchmarks.kills --count 20 --only train

Each trial starts a command (for "sample 2" and "train 2" two processes, both killed; for "one of 4" a run
over four: one is killed once they have found each other, and the others must end within a minute), sends
SIGKILL at a random moment of the time it takes, runs the same command again to its end, and compares
pictures, tables of scores and weights with those of an undisturbed run, to the bit. Nothing half-written may
be left over. Small networks on whatever device there is; a trial takes ten to forty seconds, with four
processes a few minutes. Needs the `train` and `eval` extras.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from benchmarks.common import parser, report
from moebius_jax.weights.folder import load_numpy, read_config, save

ROOT = Path(__file__).parents[1]
TINY = ROOT / "moebius_jax" / "tiny"
PICTURES = 5
LIMIT_S = 600
OUTLIVE_S = 75  # a process that is killed is missed after 50 s at the latest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
    """A command that can go on.

    Attributes:
        commands: of its processes, given an output folder and a free port.
        compare: what differs between two finished folders.
        kills: "all" its processes, or "one" of them, which the others must not outlive for long.
    """

    commands: Callable[[Path, int], list[list[str]]]
    compare: Callable[[Path, Path], list[str]]
    kills: Literal["all", "one"] = "all"


def scenarios(work: Path) -> dict[str, Scenario]:
    images, masks, released = work / "images", work / "masks", work / "released.safetensors"
    folders = ["--image", str(images), "--mask", str(masks), "--num-inference-steps", "2"]

    def sample(out: Path, processes: int) -> list[list[str]]:
        command = ["sample.py", "--model", "tiny", *folders, "--output", str(out / "results")]
        share = ["--num-processes", f"{processes}", "--process-id"]
        return [[*command, *share, f"{i}"] for i in range(processes)]

    def evaluate(out: Path, _: int) -> list[list[str]]:
        command = ["evaluate.py", "custom", "--images", str(images), "--masks", str(masks), "--size", "128"]
        command += ["--metrics", "psnr", "l1", "--model", "tiny", "--num-inference-steps", "2"]
        return [[*command, "--output", str(out / "results")]]

    def train(out: Path, port: int, processes: int = 1) -> list[list[str]]:
        command = ["train.py", "configs/debug.py", "--workdir", str(out / "run"), "checkpoint.every=5"]
        command += ["log.grid_every=0", "loss.terms=task", "vae=none", "student.layers_per_block=1"]
        command += ["student.channels=64", "student.transformers=true"]  # one level: half as long to load
        if processes == 1:
            return [command]
        cluster = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", f"{processes}"]
        return [[*command, *cluster, "--process-id", f"{i}"] for i in range(processes)]

    return {
        "convert": Scenario(
            commands=lambda out, _: [["convert_weights.py", str(released), str(out / "unet")]],
            compare=lambda a, b: tensors(a / "unet", b / "unet"),
        ),
        "sample": Scenario(commands=lambda out, _: sample(out, 1), compare=files),
        "sample 2": Scenario(commands=lambda out, _: sample(out, 2), compare=files),
        "evaluate": Scenario(commands=evaluate, compare=files),
        "train": Scenario(commands=train, compare=models),
        "train 2": Scenario(commands=lambda out, port: train(out, port, 2), compare=models),
        "one of 4": Scenario(commands=lambda out, port: train(out, port, 4), compare=models, kills="one"),
    }


def models(ours: Path, theirs: Path) -> list[str]:
    """`tensors` of two runs' results."""
    return tensors(ours / "run/model/unet", theirs / "run/model/unet")


def tensors(ours: Path, theirs: Path) -> list[str]:
    """Names of tensors that are not the same to the bit."""
    mine, other = load_numpy(ours), load_numpy(theirs)
    return [name for name in mine.keys() | other.keys() if not _same(mine.get(name), other.get(name))]


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and a.tobytes() == b.tobytes()


def files(ours: Path, theirs: Path) -> list[str]:
    """Names of pictures and tables that are not the same to the byte, or are there in one folder only."""
    names = {p.relative_to(top) for top in (ours, theirs) for p in top.rglob("*") if p.is_file()}
    compared = {name for name in names if name.suffix in (".png", ".csv")}

    def same(name: Path) -> bool:
        return all((top / name).is_file() for top in (ours, theirs)) and (
            (ours / name).read_bytes() == (theirs / name).read_bytes()
        )

    return sorted(str(name) for name in compared if not same(name))


def remains(folder: Path) -> list[str]:
    """What no finished command leaves."""
    return [
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.name.startswith(".partial") or "-tmp" in p.name
    ]


def start(commands: list[list[str]], log: Path) -> list[subprocess.Popen]:
    with log.open("ab") as file:
        return [
            subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )
            for command in commands
        ]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def finish(scenario: Scenario, out: Path) -> bool:
    """Whether the command came to its end, or found its work done."""
    processes = start(scenario.commands(out, free_port()), out / "log")
    codes = [process.wait(LIMIT_S) for process in processes]
    return all(code == 0 for code in codes) or "exists already" in (out / "log").read_text()


def trial(scenario: Scenario, out: Path, reference: Path, seconds: float, which: int) -> str:
    """Kills once and goes on; returns what is wrong then, or nothing.

    Of a scenario that kills one, it is process `which` (modulo their number).
    """
    processes = start(scenario.commands(out, free_port()), out / "log")
    if scenario.kills == "one":  # before that, the others wait for a process that may start late
        while "mesh" not in (out / "log").read_text():
            time.sleep(0.1)
    time.sleep(seconds)
    victims = processes if scenario.kills == "all" else [processes[which % len(processes)]]
    for process in victims:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    until = time.monotonic() + OUTLIVE_S
    for process in processes:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            for left in processes:
                left.kill()
            return f"others still ran {OUTLIVE_S} s later"
    if not finish(scenario, out):
        return f"did not go on: {(out / 'log').read_text().splitlines()[-1:]}"
    if different := scenario.compare(out, reference):
        return f"{len(different)} differ, such as {different[0]}"
    left = remains(out)
    return f"left over: {left[0]}" if left else ""


def prepare(work: Path) -> None:
    """Pictures with holes, and a released file."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (work / name).mkdir()
    for i in range(PICTURES):
        Image.fromarray(rng.integers(0, 256, (128, 128, 3), np.uint8)).save(work / f"images/{i}.png")
        mask = np.zeros((128, 128), np.uint8)
        mask[30 : 60 + 5 * i, 40:90] = 255
        Image.fromarray(mask).save(work / f"masks/{i}.png")
    # tiny's weights as if they predicted the noise: a released file cannot say that they do not.
    config = read_config(TINY / "unet").architecture.replace(prediction_type="epsilon")
    save(work / "unet", config, load_numpy(TINY / "unet"), dtype="float16", source={})
    command = ["convert_weights.py", str(work / "unet"), "--export", str(work / "released.safetensors")]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    options = parser(__doc__, timed=False)
    options.add_argument("--count", type=int, default=200, help="kills in all")
    options.add_argument("--only", help="one kind of command")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    rng = np.random.default_rng(args.seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work)
        todo = {name: s for name, s in scenarios(work).items() if args.only in (None, name)}
        if not todo:
            options.error(f"--only is {args.only!r}; expected one of {', '.join(scenarios(work))}")
        share = -(-args.count // len(todo))
        for name, scenario in todo.items():
            reference = work / "reference"
            reference.mkdir()
            finish(scenario, reference)  # compiles
            shutil.rmtree(reference)
            reference.mkdir()
            started = time.perf_counter()
            if not finish(scenario, reference):
                raise SystemExit(f"{name}: {(reference / 'log').read_text()}")
            duration = time.perf_counter() - started
            wrong = []
            for i in range(share):
                out = work / "out"
                out.mkdir()
                moment = rng.uniform(0, duration)
                if problem := trial(scenario, out, reference, moment, int(rng.integers(16))):
                    wrong.append(problem)
                print(f"{name}, kill {i}: {problem or 'equal'}", file=sys.stderr, flush=True)
                shutil.rmtree(out)
            shutil.rmtree(reference)
            row = {"command": name, "kills": share, "undisturbed s": duration, "unequal": len(wrong)}
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    report(rows, args)
    return 1 if any(row["unequal"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
