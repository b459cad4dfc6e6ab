"""What a caller of the programs must know beside their inputs: sizes, and the solvers' tables."""

from typing import Any

import numpy as np

from moebius_jax.diffusion.solvers import find_solver, solver_steps
from moebius_jax.export.programs import COEFFICIENTS, Program
from moebius_jax.inpaint.sampler import SamplingOptions
from moebius_jax.models import VAE, UNet

FORMAT, VERSION = "moebius-jax-export", 1
SCHEDULES = {"ddim": (10, 20, 50), "dpmpp_2m": (5, 10, 20)}  # steps, of each solver


def manifest(unet: UNet, vae: VAE, exported: list[Program], defaults: SamplingOptions) -> dict[str, Any]:
    """`manifest.json`, less what is known only of files (docs/export.md); `defaults` are the model's."""
    own = find_solver(defaults.scheduler)
    solvers = {name: find_solver(name) for name in SCHEDULES} | {own.name: own}
    steps = {name: set(SCHEDULES.get(name, ())) for name in solvers}
    steps[own.name].add(defaults.num_inference_steps)
    return {
        "format": FORMAT,
        "version": VERSION,
        "image_size": unet.config.latent_size * vae.config.factor,
        "latent_shape": list(unet.config.latent_shape),
        "factor": vae.config.factor,
        "guidance_scale": defaults.guidance_scale,
        "solver": own.name,
        "steps": defaults.num_inference_steps,
        "strength": defaults.strength,
        "noise_offset": defaults.noise_offset,
        "coefficients": list(COEFFICIENTS),
        "refine": defaults.refine,
        "schedules": {
            name: {
                str(n): _tables(defaults.changed(scheduler=solver, num_inference_steps=n))
                for n in sorted(steps[name])
                if int(n * defaults.strength)
            }
            for name, solver in solvers.items()
        },
        "programs": {
            program.name: {
                "inputs": [
                    {"name": name, "shape": list(shape), "dtype": dtype}
                    for name, (shape, dtype) in program.inputs.items()
                ],
                "outputs": [
                    {"name": name, "shape": list(shape), "dtype": "float32"}
                    for name, shape in program.outputs.items()
                ],
            }
            for program in exported
        },
    }


def _tables(options: SamplingOptions) -> dict[str, Any]:
    """A schedule and, where large holes are painted again, that of their tiles."""
    return _table(options) | ({"refining": _table(options.refining)} if options.refine else {})


def _table(options: SamplingOptions) -> dict[str, Any]:
    table = solver_steps(options.scheduler, options.num_inference_steps, options.strength)
    columns = np.stack([np.asarray(getattr(table, name), np.float64) for name in COEFFICIENTS], axis=-1)
    return {
        "timesteps": np.asarray(table.timesteps).tolist(),
        "coefficients": columns.tolist(),
        "start_alpha": float(table.start_alpha),
        "start_sigma": float(table.start_sigma),
    }
