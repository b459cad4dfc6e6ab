"""Does distillation help? A teacher and small students, trained on photographs and compared on others.

    python examples/tiny/photographs.py WORK             # squares of photographs; some held out
    python -m benchmarks.learn train --work WORK         # latents, a metric of them, teacher, students
    python -m benchmarks.learn score --work WORK         # the table: means over seeds, and their spread

In the manner of the paper's Table 5 and of Table 2's rows 9 and 10: students of one architecture, the same
number of steps and the same data, with different losses. A seed decides initial weights, noise and the order
of the data; autoencoder (tiny's), metric and teacher are the same for all. What is there already is not made
again: the same command goes on. Scored on the held-out photographs: the task loss, and L1 and LPIPS of images
whose hole was inpainted. Needs the `train` and `eval` extras.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Row, parser, report, told
from benchmarks.learn_config import SIZE, get_config
from benchmarks.learn_perceptual import train_perceptual
from moebius_jax.files import replace_when_complete
from moebius_jax.weights.folder import read_config

Figures = dict[str, float]
ROOT = Path(__file__).parents[1]
STUDENTS = {
    "task (Table 2, row 10)": "task",
    "coarse (Table 5, row 1)": "coarse",
    "coarse + fine (row 2)": "coarse,fine",
    "coarse + fine + task (row 3)": "coarse,fine,task",
    "all four (row 4; Table 2, row 9)": "coarse,fine,task,perceptual",
}
TASK_ALONE = next(iter(STUDENTS))


def parse() -> argparse.Namespace:
    options = parser(__doc__, timed=False)
    add = options.add_argument
    add("stage", choices=STAGES)
    add("--work", type=Path, required=True)
    add("--perceptual-steps", type=int, default=600)
    add("--teacher-steps", type=int, default=3000)
    add("--student-steps", type=int, default=1500)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students to train (default 0 1 2)")
    places = range(len(STUDENTS))
    add("--only", type=int, nargs="+", default=places, choices=places, help="students, by place in the table")
    return options.parse_args()


def run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def train(args: argparse.Namespace) -> int:
    """Seed by seed, so that there is a whole table early."""
    work, config = args.work.resolve(), "benchmarks/learn_config.py"
    for name in ("train", "held_out"):
        if not (latents := work / f"learn_latents_{name}").exists():
            run("cache_latents.py", config, latents, f"data.path={work / name}", "--draws", "1")
    metric, teacher = work / "learn_perceptual", work / "learn_teacher"
    if not metric.exists():
        train_perceptual(work / "train", work / "held_out", metric, args.perceptual_steps)
    common = [
        f"data.path={work / 'learn_latents_train'}",
        f"log.validation={work / 'learn_latents_held_out'}",
    ]
    if not is_trained(teacher, args.teacher_steps):
        own = f"steps={args.teacher_steps}"
        run("train.py", "benchmarks/learn_teacher.py", "--workdir", teacher, *common, own)
    common += [f"teacher={teacher / 'model' / 'unet'}", f"loss.perceptual.network={metric}"]
    for seed, i in itertools.product(args.seeds, args.only):
        student, terms = work / f"learn_student_{i}_seed_{seed}", list(STUDENTS.values())[i]
        if not is_trained(student, args.student_steps):
            own = [f"loss.terms={terms}", f"seed={seed}", f"steps={args.student_steps}"]
            run("train.py", config, "--workdir", student, *common, *own)
    return 0


def is_trained(workdir: Path, steps: int) -> bool:
    """Whether a run has ended; one of another length is no part of this table."""
    unet = workdir / "model" / "unet"
    if not unet.exists():
        return False
    if (found := read_config(unet).source["step"]) != steps:
        sys.exit(f"{workdir}: trained for {found} steps; expected {steps}. Take another --work")
    return True


def score(args: argparse.Namespace) -> int:
    """Task loss, and LPIPS and L1 inside the hole of inpainted held-out squares."""
    return report(told(scores(args.work)), args)


def scores(work: Path) -> Iterator[Row]:
    """A row for the teacher, and one for each student, over the seeds whose training has ended."""
    runs = {"the teacher, task": "learn_teacher"}
    runs |= {name: f"learn_student_{i}_seed_*" for i, name in enumerate(STUDENTS)}
    alone: dict[str, Figures] = {}
    for name, folders in runs.items():
        models = sorted(work.glob(f"{folders}/model"))
        found = {model.parent.name.rpartition("_")[2]: score_one(model.parent, work) for model in models}
        if found:
            yield {"trained on": name, "seeds": len(found)} | summary(found, alone)
        if name == TASK_ALONE:
            alone = found


def summary(found: dict[str, Figures], alone: dict[str, Figures]) -> Row:
    """Mean and standard deviation (of a sample) over seeds, and the same of differences.

    Args:
        found: figures by seed.
        alone: those of students of the same seeds, and so the same first weights, noise and data, that were
            trained on the task loss alone.
    """

    def cell(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.4f}{spread}"

    keys, both = next(iter(found.values())), sorted(found.keys() & alone.keys())
    row = {key: cell([one[key] for one in found.values()]) for key in keys}
    if both:
        row |= {f"{key} - task's": cell([found[s][key] - alone[s][key] for s in both]) for key in keys}
    return row


def score_one(folder: Path, work: Path) -> Figures:
    """The figures of a finished run, which are kept beside its model."""
    if (kept := folder / "score.json").exists():
        return json.loads(kept.read_text())
    from moebius_jax import MoebiusInpaintPipeline, evaluate
    from moebius_jax.data.datasets import LatentDataset, Source
    from moebius_jax.sharding import make_mesh
    from moebius_jax.training.state import bare_student
    from moebius_jax.training.validation import Validation
    from moebius_jax.weights.tensors import network_tensors

    pipeline = MoebiusInpaintPipeline.from_pretrained(folder / "model")
    config, mesh = get_config().replace(student=pipeline.unet.config), make_mesh()
    held_out = LatentDataset(
        Source(path=work / "learn_latents_held_out", latent_shape=config.student.latent_shape)
    )
    validation = Validation(config, mesh, bare_student(config, mesh), None, held_out)
    found = evaluate(
        pipeline,
        work / "held_out",
        metrics=("lpips", "l1"),
        size=SIZE,
        mask_kind="lama_medium",
        guidance_scale=1.0,  # these networks were never shown foreground samples
    ).summary
    figures = validation(network_tensors(pipeline.unet)) | {k: found[k]["hole"] for k in ("lpips_alex", "l1")}
    with replace_when_complete(kept, overwrite=True) as partial:
        partial.write_text(json.dumps(figures))
    return figures


STAGES = {"train": train, "score": score}

if __name__ == "__main__":
    arguments = parse()
    sys.exit(STAGES[arguments.stage](arguments))
