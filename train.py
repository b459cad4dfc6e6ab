#!/usr/bin/env python3
"""Distils or fine-tunes a Moebius student.

    python train.py configs/debug.py                                   # two minutes on a laptop
    python train.py configs/distill.py data.path=train.jsonl           # the paper's run
    python train.py configs/table2.py:9 data.path=train.jsonl          # row 9 of its Table 2
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
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moebius_jax.buckets import is_bucket, reaching
from moebius_jax.cli.terminal import enable_compilation_cache, exit_without_extra, require_extra, run
from moebius_jax.cli.train import parse

if __name__ == "__main__":
    parse(None, __doc__)  # help, and mistakes in arguments, need not wait for what follows
exit_without_extra("train", "optax", "grain")  # before the imports that need them

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from moebius_jax.cluster import first_does, join_given_cluster, wait_for_all
from moebius_jax.company import Company, is_lost_connection, tell_others
from moebius_jax.data.config import open_dataset
from moebius_jax.data.samples import Batch
from moebius_jax.distillation.gradients import Balanced, balanced_gradients, teacher_bottleneck
from moebius_jax.distillation.loss import Context, Loss
from moebius_jax.errors import SharedError, UserError, first_line
from moebius_jax.files import sole_user
from moebius_jax.hardware import device_error, device_errors, peak_flops, require_memory
from moebius_jax.imaging.picture import write_image
from moebius_jax.outbox import Outbox
from moebius_jax.sharding import make_mesh, of_each_device, replicated, tree_shardings, with_mesh
from moebius_jax.training.aot import report_aot
from moebius_jax.training.batches import abstract_batch, check_batch, check_encoder, encoded, to_devices
from moebius_jax.training.checkpointing import (
    RunCheckpoints,
    first_batch,
    require_run_folder,
    require_shared_folder,
    write_run_config,
)
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.config_file import load_config
from moebius_jax.training.halting import HALTED_BY, halt, halted_by, stand_in, unless_halted
from moebius_jax.training.inputs import loss_keys, noised_inputs, step_keys
from moebius_jax.training.loading import training_loader
from moebius_jax.training.logs import Progress, RunLog, Stopwatch, Trace
from moebius_jax.training.metrics import Metrics, balance_metrics, first_bad_metric, with_former_names
from moebius_jax.training.networks import (
    TEACHER,
    FrozenNetwork,
    hint_of_range,
    load_frozen,
    load_image_codec,
)
from moebius_jax.training.optimizer import ema_update, learning_rate_schedule, run_optimizer
from moebius_jax.training.overrides import describe
from moebius_jax.training.preview import SampleGrids, preview_grid
from moebius_jax.training.result import FOLDER as MODEL
from moebius_jax.training.result import require_room_for_model, write_model
from moebius_jax.training.state import TrainState, abstract_state, bare_student, initial_state
from moebius_jax.training.stopping import Stop, close_all
from moebius_jax.training.validation import Validation
from moebius_jax.weights.tensors import Tensors

Frozen = Mapping[str, Tensors]  # tensors of the networks that are not trained, by network
_COMPILING_S = 3600  # what one process may take longer than another
_LESS = "more accumulation, a smaller batch_size, student.remat=true or fsdp"  # where a step needs too much
Update = Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]


def make_update(
    config: TrainConfig,
    mesh: Mesh,
    networks: Mapping[str, FrozenNetwork],
    optimizer: optax.GradientTransformation,
) -> Update:
    """One step of a run, jitted: it takes the state's memory over.

    The frozen networks' tensors are arguments: as constants they would be folded for minutes.
    """
    student = bare_student(config, mesh)
    schedule = learning_rate_schedule(config.optimizer, config.steps)

    def gradients_of(
        params: Tensors, statistics: Tensors, frozen: Frozen, batch: Batch, step: jax.Array
    ) -> tuple[Tensors, Tensors, Balanced]:
        """Gradient of the balanced total of all losses, new BatchNorm statistics, and the figures."""
        keys = step_keys(config.seed, step, batch.index)
        noised, inputs = noised_inputs(config, keys, batch)
        context = Context(noised=noised, hole=batch.samples.hole)
        if TEACHER in networks:
            teacher = networks[TEACHER].bare(frozen[TEACHER])
            seen = teacher(inputs.latents, inputs.timesteps, inputs.input_ids)
            context = context.replace(
                teacher=seen, bottleneck=seen.features[teacher_bottleneck(teacher.config)]
            )

        def bound(loss: Loss) -> Callable[[jax.Array], jax.Array]:
            own = networks[loss.name].bare(frozen[loss.name]) if loss.name in networks else None
            seen_by_it = context.replace(network=own, keys=loss_keys(keys, loss.name))
            return lambda prediction: loss(prediction, seen_by_it)

        return balanced_gradients(
            student,
            params,
            statistics,
            inputs,
            output_losses={loss.name: bound(loss) for loss in config.loss.output_losses},
            bottleneck_losses={loss.name: bound(loss) for loss in config.loss.bottleneck_losses},
            form=config.loss.balance,
            scales=config.loss.scales,
            all_norms=config.loss.all_norms,
        )

    if config.loss.balance_over == "device":
        gradients_of = of_each_device(gradients_of, mesh, sharded=3)

    def update(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        # What is not trained is read once a step: the compiler gathers each when it is needed.
        frozen = lax.with_sharding_constraint(frozen, replicated(mesh))

        def in_pieces(tensors: Tensors) -> Tensors:
            return lax.with_sharding_constraint(tensors, tree_shardings(mesh, tensors))

        def part_of(statistics: Tensors, part: Batch) -> tuple[Tensors, Tensors, Metrics]:
            gradients, statistics, balanced = gradients_of(state.params, statistics, frozen, part, state.step)
            return in_pieces(gradients), statistics, balance_metrics(balanced, config.loss.losses)

        def add_part(carry: tuple[Tensors, Tensors], part: Batch) -> tuple[tuple[Tensors, Tensors], Metrics]:
            gradients, statistics, metrics = part_of(carry[1], part)
            return (jax.tree.map(jnp.add, carry[0], gradients), statistics), metrics

        if config.accumulation == 1:
            gradients, statistics, metrics = part_of(state.statistics, batch)
        else:
            # [B, …] → [parts, B/parts, …], every device keeping its own samples.
            parts = jax.tree.map(
                lambda x: jnp.moveaxis(x.reshape(-1, config.accumulation, *x.shape[1:]), 1, 0), batch
            )
            zeros = in_pieces(jax.tree.map(jnp.zeros_like, state.params))
            (total, statistics), each = lax.scan(add_part, (zeros, state.statistics), parts)
            gradients = jax.tree.map(lambda g: g / config.accumulation, total)
            metrics = jax.tree.map(jnp.mean, each)

        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        new_params = optax.apply_updates(state.params, updates)
        done, ema = state.step + 1, state.ema
        if config.ema_decay:
            ema = ema_update(ema, {**new_params, **statistics}, done, config.ema_decay)
        new = TrainState(
            step=done, params=new_params, statistics=statistics, ema=ema, optimizer=optimizer_state
        )
        halted = halted_by(batch.index)
        metrics |= {"grad_norm": optax.tree.norm(gradients), "lr": schedule(state.step)}
        metrics |= {"parameter_norm": optax.tree.norm(new_params), HALTED_BY: halted}
        return unless_halted(halted, new, state), metrics

    places = tree_shardings(mesh, abstract_state(config, mesh, optimizer))
    return jax.jit(with_mesh(update, mesh), donate_argnums=0, out_shardings=(places, replicated(mesh)))


def train(args: argparse.Namespace, held: contextlib.ExitStack, company: Company) -> int:  # noqa: PLR0915, PLR0912 (long, so that it reads as a story)
    # ------------------------------------------------------------------ configuration and devices
    kind = [f"data.kind={args.dataset}"] if args.dataset else []
    verify = ["verify=false"] if args.no_verify else []
    config = load_config(args.config, [*args.overrides, *kind, *verify])
    join_given_cluster(args.distributed, args.coordinator, args.num_processes, args.process_id)
    held.enter_context(company)
    if args.print_config:
        print(*(f"{k}={v}" for k, v in describe(config).items()), sep="\n")
        return 0
    if args.aot:
        print(report_aot(config, args.aot, make_update))
        return 0
    file, _, argument = args.config.partition(":")
    workdir = args.workdir or Path("runs") / "_".join(filter(None, (Path(file).stem, argument)))
    is_first = jax.process_index() == 0

    def say(message: str) -> None:
        if is_first:
            print(message, file=sys.stderr)

    mesh = make_mesh(fsdp=config.fsdp)
    check_batch(config, mesh)
    axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    say(f"{mesh.size} x {jax.devices()[0].device_kind}, mesh {axes}")

    # ------------------------------------------------------------------ data
    dataset = open_dataset(config.data, config.student.latent_shape)
    say(f"{len(dataset.names):,} samples of kind {config.data.kind}")
    if args.preview_data:
        write_image(args.preview_data, preview_grid(dataset, config, mesh), overwrite=True)
        say(f"image | hole | what the network sees: {args.preview_data}")
        return 0
    held_out = None
    if config.log.validation:
        held_out = open_dataset(config.held_out_data, config.student.latent_shape)

    # ------------------------------------------------------------------ work folder
    require_extra("train", "clu", "tensorflow")  # the log's

    def claim() -> None:
        with reaching(workdir):
            require_room_for_model(workdir)
            require_run_folder(workdir)
        if not is_bucket(workdir):  # which has no locks
            held.enter_context(sole_user(workdir))

    first_does(claim)
    require_shared_folder(workdir)

    # ------------------------------------------------------------------ networks, optimiser, state as shapes
    stop = Stop.on(signal.SIGTERM, signal.SIGINT)
    if not args.no_compilation_cache:
        enable_compilation_cache()
    vae = load_image_codec(config, mesh)
    check_encoder(config, vae, dataset)
    networks = load_frozen(config, mesh)
    frozen = {name: network.tensors for name, network in networks.items()}
    student = bare_student(config, mesh)
    optimizer = run_optimizer(config.optimizer, config.student, config.steps, mesh)
    shapes = abstract_state(config, mesh, optimizer)
    parameters = sum(leaf.size for leaf in shapes.params.values())
    say(f"{parameters / 1e6:.1f} M parameters, losses {', '.join(config.loss.names)}")

    # ------------------------------------------------------------------ restore, or begin
    require_memory(shapes)
    checkpoints = RunCheckpoints(
        workdir, config.checkpoint, warn=lambda m: say(f"warning: {m}"), verify=config.verify
    )
    restored = checkpoints.restore(shapes, describe(config))
    if restored:
        state, samples = restored
        position = first_batch(samples, config)
        say(f"going on from step {int(state.step)} of {workdir}")
    else:
        state, position = initial_state(config, mesh, optimizer), 0
        say(f"starting from {config.init}" if config.init else "starting from random weights")
    outbox = Outbox(workdir)  # checkpoints go straight into a bucket, everything else is sent from here
    held.callback(outbox.close)
    if is_first:
        write_run_config(outbox.folder, describe(config))
        outbox.send()

    # ------------------------------------------------------------------ compile
    loader = training_loader(
        config, dataset, position, warn=lambda m: print(f"warning: {m}", file=sys.stderr)
    )
    started = time.perf_counter()
    one_step = f"a step of {config.batch_size} samples"
    update = make_update(config, mesh, networks, optimizer)
    with device_errors(one_step, less=_LESS):
        update = update.lower(state, frozen, abstract_batch(config, mesh, dataset)).compile()
    wait_for_all("compiled", _COMPILING_S)
    say(f"compiled in {time.perf_counter() - started:.0f} s")
    validation = grids = None
    if held_out and config.log.validate_every:
        validation = Validation(config, mesh, student, vae, held_out)
    if vae is not None and config.log.grid_every:
        grids = SampleGrids(config, mesh, student, vae, held_out or dataset)

    # ------------------------------------------------------------------ loop
    first = done = int(state.step)
    log, progress, trace = (
        RunLog(outbox.folder),
        Progress(done, config.steps),
        Trace(outbox.folder, args.profile, say, known_as=workdir),
    )
    watch = Stopwatch(config.batch_size, step_flops(update, config, mesh), peak_flops(mesh))
    log.text(done, "config", "\n".join(f"    {k} = {v}" for k, v in describe(config).items()))
    pending: tuple[int, Metrics] | None = None
    trouble: Exception | None = None  # why this process has no more batches

    def save() -> None:
        samples = (position + int(state.step) - first) * config.batch_size
        checkpoints.save(state, samples, describe(config))

    def is_due(every: int) -> bool:
        return done > first and every > 0 and (done % every == 0 or done == config.steps)

    def look(pending: tuple[int, Metrics] | None) -> None:
        """Checks a step's figures, and writes them down when it is time."""
        if pending is None:
            return
        step, metrics = pending
        metrics = jax.device_get(metrics)
        if halting := halt(metrics, trouble):
            if int(state.step) > first:
                save()
            raise halting
        del metrics[HALTED_BY]
        if bad := first_bad_metric(metrics):
            checkpoints.wait()
            before = f"the last checkpoint before it is {checkpoints.latest}"
            none = "there is no checkpoint yet"
            hint = hint_of_range(config)
            raise SharedError(
                f"step {step}: {bad} is {float(metrics[bad])}; {before if checkpoints.latest else none}{hint}"
            )
        if step % config.log.every == 0 or step == config.steps:
            values = {name: float(value) for name, value in metrics.items()} | watch.rates()
            log.scalars(step, with_former_names(values))
            progress.report(step, values)

    try:
        while True:
            # This order must not change. A checkpoint holds the state after `done` steps and the position
            # before the next batch; drawing first would skip that batch on resuming.
            at_end = done >= config.steps or stop.agreed(done)
            is_saved = done > first and (at_end or done % config.checkpoint.every == 0)
            is_validated = validation and is_due(config.log.validate_every)
            is_drawn = grids and is_due(config.log.grid_every)
            if is_saved or is_validated or is_drawn:  # but not a step that went wrong
                look(pending)
                pending = None
            if is_saved:
                save()
            if is_validated:
                log.scalars(done, validation(state.result))
            if is_drawn:
                log.picture(done, "samples", grids.draw(state.result))
            if is_first and (is_saved or is_validated or is_drawn):
                try:
                    outbox.send()
                except UserError as error:  # logs are no reason to end; they are sent the next time
                    say(f"warning: {error}")
            if at_end:
                break
            trace.at(done)
            with watch.waiting_for_data():
                try:
                    batch = stand_in(dataset, config) if trouble else next(loader)
                except Exception as error:
                    if stop.asked and isinstance(error, RuntimeError):
                        continue  # the loader's workers were told to stop as well
                    trouble, batch = error, stand_in(dataset, config)
                    if not isinstance(error, UserError):
                        traceback.print_exc()
                    tell_others(str(error))
            watch.tick()
            state, metrics = update(state, frozen, encoded(to_devices(batch, mesh), vae))
            # Looked at a step late: the devices are then busy with the next one already.
            look(pending)
            done += 1
            pending = (done, metrics)
            progress.step()
    except JaxRuntimeError as error:
        meant = device_error(error, one_step, less=_LESS)
        company.tell(meant or error)
        if meant:
            raise meant from None
        if jax.process_count() == 1 or not is_lost_connection(error):
            raise
        raise UserError(
            f"this process has lost the others ({first_line(error)}); when all have ended, the same command "
            f"goes on from {checkpoints.latest or 'the beginning'}"
        ) from None
    except BaseException as error:
        company.tell(error)  # first of all: what follows may wait for the others
        raise
    finally:
        # Also on the way out of an error: a checkpoint that is being written is lost otherwise (of several
        # processes, one that takes longer than they wait for each other).
        try:
            close_all(checkpoints, trace, progress, log, loader, is_failing=sys.exc_info()[1] is not None)
        finally:
            with contextlib.suppress(UserError):  # there are worse troubles, or else it is sent below
                outbox.send()
    if done < config.steps:
        say(f"stopped at step {done}, the same command goes on from there")
        return 0

    # ------------------------------------------------------------------ result
    write_model(outbox.folder, config, state, vae)
    model = workdir / MODEL
    if is_first:
        outbox.send(anew=MODEL)
    wait_for_all("finished")  # an error in writing is told to those who are still here
    say(f"finished: {model}")
    if vae is not None:
        say(f"try it: python sample.py --model {model} --image photo.jpg --mask mask.png --output result.png")
    return 0


def step_flops(update: jax.stages.Compiled, config: TrainConfig, mesh: Mesh) -> float | None:
    """Of one step on all devices, by the compiler's count; None where it does not tell."""
    costs = update.cost_analysis() or {}
    # XLA counts the body of the loop over parts once.
    return costs["flops"] * mesh.size * config.accumulation if "flops" in costs else None


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv, __doc__)
    # TensorFlow only writes events here; it need not announce itself, nor how it would multiply.
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    company = Company()

    def program() -> int:
        with contextlib.ExitStack() as held:
            return train(args, held, company)

    return company.run(lambda: run(program))


if __name__ == "__main__":
    sys.exit(main())
