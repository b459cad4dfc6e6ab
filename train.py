#!/usr/bin/env python3
"""Distils or fine-tunes a Moebius student.

    python train.py configs/debug.py                                   # two minutes on a laptop
    python train.py configs/distill.py data.path=train.jsonl           # the paper's run
    python train.py configs/distill.py --aot v5e:4x8                   # does it fit that pod? (no TPU needed)
    python train.py configs/finetune_ffhq.py data.path=ffhq/ batch_size=44 optimizer.learning_rate=1e-4

Restore policy, first match wins:
  1. checkpoints in --workdir: the run goes on where it stopped, data and all;
  2. init=FOLDER: a new run from those weights (a converted release checkpoint, or another run's model/unet);
  3. otherwise weights drawn at random.

On several hosts start the same command on each: TPU pods and SLURM are found with --distributed, elsewhere
add --coordinator HOST:PORT --num-processes N --process-id I. A run that is told to stop (SIGTERM; in a
single process Ctrl-C too) saves and exits with status 0; started again, it goes on.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from moebius_jax.cli.common import enable_compilation_cache, require_training_extra, run


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a file of configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="fields to change, e.g. batch_size=32"
    )
    parser.add_argument("--workdir", type=Path, help="everything the run writes (default: runs/CONFIG)")
    parser.add_argument("--dataset", choices=["images", "latents", "synthetic"], help="short for data.kind=")
    parser.add_argument(
        "--preview-data", type=Path, metavar="PNG", help="draw what the network will see, and stop"
    )
    parser.add_argument(
        "--aot", metavar="TOPOLOGY", help="compile for a TPU slice (v5e:4x8), report, and stop"
    )
    parser.add_argument("--print-config", action="store_true", help="show every field, and stop")
    parser.add_argument(
        "--profile", type=int, metavar="STEP", help="trace five steps from STEP on (TensorBoard)"
    )
    parser.add_argument(
        "--distributed", action="store_true", help="join the cluster this process was started in"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where no cluster is found")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--no-compilation-cache", action="store_true")
    return parser.parse_intermixed_args(argv)  # options may stand between KEY=VALUEs


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.aot:  # before jax is imported: libtpu must not look for a TPU of its own
        os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    # TensorFlow only writes events here; it need not announce itself, nor how it would multiply.
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    return run(lambda: train(args))


def train(args: argparse.Namespace) -> int:  # noqa: PLR0915 (long, so that it reads as a story)
    require_training_extra()
    from moebius_jax.training.launch import load_config, start_distributed

    # ------------------------------------------------------------------ configuration and devices
    overrides = [*args.overrides, *([f"data.kind={args.dataset}"] if args.dataset else [])]
    config = load_config(args.config, overrides)
    start_distributed(args.distributed, args.coordinator, args.num_processes, args.process_id)

    import jax

    from moebius_jax.training.overrides import describe
    from moebius_jax.training.sharding import check_batch, make_mesh

    if args.print_config:
        print(*(f"{k}={v}" for k, v in describe(config).items()), sep="\n")
        return 0
    if args.aot:
        from moebius_jax.training.aot import report_aot

        print(report_aot(config, args.aot))
        return 0
    workdir = args.workdir or Path("runs") / args.config.stem
    is_first = jax.process_index() == 0

    def say(message: str) -> None:
        if is_first:
            print(message, file=sys.stderr)

    mesh = make_mesh(config.fsdp)
    check_batch(config.batch_size, config.accumulation, mesh)
    axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    say(f"{mesh.size} x {jax.devices()[0].device_kind}, mesh {axes}")

    # ------------------------------------------------------------------ data
    from moebius_jax.data.config import open_source
    from moebius_jax.data.loader import Loader
    from moebius_jax.training.encode import check_images, latent_batch, to_devices

    source = open_source(config.data, config.student.latent_size)
    say(f"{len(source.names):,} samples of kind {config.data.kind}")

    def loader_from(position: int) -> Loader:
        return Loader(
            source,
            config.data.loader,
            seed=config.seed,
            global_batch=config.batch_size,
            process=jax.process_index(),
            processes=jax.process_count(),
            first_batch=position,
            warn=lambda message: print(f"warning: {message}", file=sys.stderr),
        )

    if args.preview_data:
        from moebius_jax.imaging.picture import write_image
        from moebius_jax.training.preview import preview_grid

        write_image(args.preview_data, preview_grid(source, config, mesh), overwrite=True)
        say(f"image | hole | what the network sees: {args.preview_data}")
        return 0

    # ------------------------------------------------------------------ networks, optimiser, state
    from moebius_jax.training.checkpointing import RunCheckpoints, first_batch, write_run_config
    from moebius_jax.training.loop import Loop, Stop
    from moebius_jax.training.networks import load_metric, load_teacher, load_vae
    from moebius_jax.training.program import Program

    stop = Stop.on(signal.SIGTERM, signal.SIGINT)
    if not args.no_compilation_cache:
        enable_compilation_cache()
    vae = load_vae(config, mesh)
    check_images(config, vae)
    program = Program(
        config,
        mesh,
        teacher=load_teacher(config, mesh, abstract=False),
        metric=load_metric(config, mesh, abstract=False),
    )
    say(f"{program.parameters / 1e6:.1f} M parameters, losses {', '.join(config.loss.terms)}")

    # ------------------------------------------------------------------ restore
    checkpoints = RunCheckpoints(workdir, config.checkpoint, warn=lambda m: say(f"warning: {m}"))
    restored = checkpoints.restore(program.abstract_state, config.seed)
    if restored:
        state, samples = restored
        position = first_batch(samples, config)
        say(f"going on from step {int(state.step)} of {workdir}")
    else:
        state, position = program.initial_state(), 0
        say(f"starting from {config.init}" if config.init else "starting from random weights")
    if is_first:
        write_run_config(workdir, describe(config))

    # ------------------------------------------------------------------ compile
    loader = loader_from(position)
    compile_started = time.perf_counter()
    step_function = program.compile(state)
    say(f"compiled in {time.perf_counter() - compile_started:.0f} s")

    # ------------------------------------------------------------------ loop
    loop = Loop(
        config,
        mesh,
        workdir=workdir,
        step=lambda state, batch: step_function(state, program.frozen, batch),
        batches=loader,
        prepare=lambda batch: latent_batch(to_devices(batch, mesh), vae),
        checkpoints=checkpoints,
        grids=program.grids(vae, source),
        flops=program.flops,
        profile_at=args.profile,
        stop=stop,
        say=say,
    )
    state = loop.run(state)
    loader.close()
    if int(state.step) < config.steps:
        say(f"stopped at step {int(state.step)}, the same command goes on from there")
        return 0

    # ------------------------------------------------------------------ result
    from moebius_jax.training.result import write_model

    model = write_model(workdir, config, program.student, state, vae)
    say(f"finished: {model}")
    if vae is not None:
        say(f"try it: python sample.py --model {model} --image photo.jpg --mask mask.png --output result.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
