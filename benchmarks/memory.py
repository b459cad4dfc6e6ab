"""Does memory stay flat? 300 pictures through sample.py, 500 steps of train.py, watched from outside.

    python -m benchmarks.memory
    python -m benchmarks.memory --only train --train-steps 2000

Resident memory of the process and its workers, read from /proc while it works, at a quarter, half and all of
the work; pictures are of three sizes, so every program is compiled in the first few. Status 1 where the
second half of the work added more than 3 %. Needs Linux and the `train` extra.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import Row, parser, report, told

ROOT = Path(__file__).parents[1]
SIZES = ((128, 128), (160, 128), (208, 176))
LIMIT = 0.03  # growth over the second half that counts as flat: allocators keep some of what they are given


def resident_mb(process: int) -> float:
    """Of a process and all below it; 0 where it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        tasks = [task.read_text() for task in Path(f"/proc/{process}/task").glob("*/children")]
    except FileNotFoundError:
        return 0.0
    own = next((line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")), "0")
    return int(own) / 1024 + sum(resident_mb(int(child)) for task in tasks for child in task.split())


def watch(command: list[str], work: Path, done: Callable[[str], int], total: int) -> list[tuple[int, float]]:
    """(work done, MB) twice a second; `done` counts from what the command has said."""
    seen, log = [], work / "log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file)
    while process.poll() is None:
        seen.append((done(log.read_text()), resident_mb(process.pid)))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: {log.read_text()[-2000:]}")
    return [(count, memory) for count, memory in seen if 0 < count < total]


def row(name: str, seen: list[tuple[int, float]], total: int) -> Row:
    """Highest memory of a few moments up to each part of the work."""

    def around(part: float) -> float:
        at = [memory for count, memory in seen if (part - 0.1) * total < count <= part * total]
        if not at:
            raise SystemExit(f"{name}: was too fast to be watched; ask for more")
        return max(at)

    quarter, half, end = (around(part) for part in (0.25, 0.5, 1))
    growth = end / half - 1
    return {"work": name, "25 % MB": quarter, "50 % MB": half, "100 % MB": end, "second half %": 100 * growth}


def sample(work: Path, pictures: int) -> Row:
    """`pictures` pictures of three sizes by the network that comes along."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (work / name).mkdir()
    for i in range(pictures):
        width, height = SIZES[i % len(SIZES)]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(work / f"images/{i:05}.png")
        hole = np.zeros((height, width), np.uint8)
        hole[30:90, 40:90] = 255
        Image.fromarray(hole).save(work / f"masks/{i:05}.png")
    results = work / "results"
    command = ["sample.py", "--model", "tiny", "--num-inference-steps", "2", "--output", str(results)]
    command += ["--image", str(work / "images"), "--mask", str(work / "masks")]
    seen = watch(command, work, lambda _: len(list(results.glob("*.png"))), pictures)
    return row(f"sample.py, {pictures} pictures", seen, pictures)


def train(work: Path, steps: int) -> Row:
    """`steps` steps of the debug run with all its losses, a checkpoint every fifty."""
    command = ["train.py", "configs/debug.py", "--workdir", str(work / "run"), f"steps={steps}"]
    command += ["checkpoint.every=50", "log.every=5", "log.grid_every=0", "vae=none"]

    def done(said: str) -> int:
        last = said.rpartition("\nstep ")[2].partition("/")[0]
        return int(last) if last.isdigit() else 0

    return row(f"train.py, {steps} steps", watch(command, work, done, steps), steps)


def main() -> int:
    options = parser(__doc__, timed=False)
    options.add_argument("--only", choices=("sample", "train"))
    options.add_argument("--pictures", type=int, default=300)
    options.add_argument("--train-steps", type=int, default=500)
    args = options.parse_args()
    todo = {"sample": (sample, args.pictures), "train": (train, args.train_steps)}

    def rows() -> Iterator[Row]:
        for name, (measure, amount) in todo.items():
            if args.only in (None, name):
                with tempfile.TemporaryDirectory() as folder:
                    yield measure(Path(folder), amount)

    found = told(rows())
    report(found, args)
    return 1 if any(each["second half %"] > 100 * LIMIT for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
