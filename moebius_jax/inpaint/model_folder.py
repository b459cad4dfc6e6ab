"""The folder of a whole pipeline, and where a model is to be found: here or on the Hub."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from moebius_jax.buckets import fetched, is_bucket
from moebius_jax.defaults import (
    DEFAULT_GUIDANCE,
    DEFAULT_MODEL,
    PORTRAIT_GUIDANCE,
    TEACHER_GUIDANCE,
    TINY,
)
from moebius_jax.diffusion.solvers import SOLVERS, find_solver
from moebius_jax.errors import UserError
from moebius_jax.files import replace_when_complete
from moebius_jax.inpaint.sampler import SamplingOptions
from moebius_jax.models import UNetConfig
from moebius_jax.schema import checked, one_of, read_json
from moebius_jax.weights import hub
from moebius_jax.weights.folder import FolderConfig, is_ours, read_config

PORTRAIT_VARIANTS = ("ft_celebahq", "ft_ffhq")

PARTS = _FILE, UNET, VAE, CARD = "pipeline.json", "unet", "vae", "README.md"


@checked
class _PipelineFile:
    """`pipeline.json`: the model's defaults, named as in `SamplingOptions`."""

    guidance_scale: float
    num_inference_steps: int = SamplingOptions().num_inference_steps
    strength: float = SamplingOptions().strength
    scheduler: Annotated[str, one_of(SOLVERS)] = SamplingOptions().scheduler
    noise_offset: float = SamplingOptions().noise_offset
    refine: float = SamplingOptions().refine

    def __post_init__(self) -> None:
        _ = self.sampling

    @property
    def sampling(self) -> SamplingOptions:
        return SamplingOptions(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFolders:
    """Where a model's parts are.

    Attributes:
        unet, vae: converted folders.
        sampling: how the model is meant to be sampled.
        variant: the released weights it holds, where it says so.
    """

    unet: Path
    vae: Path
    sampling: SamplingOptions
    variant: str | None


@contextlib.contextmanager
def write_model_folder(
    folder: Path,
    *,
    sampling: SamplingOptions,
    overwrite: bool,
    license: str | None = None,
    known_as: str | None = None,
) -> Iterator[Path]:
    """Yields a folder to put `UNET` and `VAE` into; it appears under its name, with a card, when complete.

    Args:
        folder: to make.
        sampling: the model's defaults.
        overwrite: replace an existing folder.
        license: of the weights, an identifier the Hub knows ("apache-2.0"), for the card.
        known_as: what `from_pretrained` will load it by, for the card; None is the folder's path.

    Raises:
        UserError: it exists and may not be replaced, or cannot be written.
    """
    said = _described(folder, sampling)
    require_replaceable(folder)
    with replace_when_complete(folder, overwrite=overwrite, ours=PARTS) as partial:
        partial.mkdir()
        yield partial
        (partial / _FILE).write_text(json.dumps(said) + "\n")
        (partial / CARD).write_text(
            _card(folder.name, known_as or f"path/to/{folder.name}", read_config(partial / UNET), license)
        )


def _described(folder: Path, sampling: SamplingOptions) -> dict[str, Any]:
    """What is not as everywhere, and the guidance, which people look for."""
    solver = find_solver(sampling.scheduler)
    if SOLVERS.get(solver.name) != solver:
        raise UserError(f"{folder}: the scheduler {solver} has no name others know; it cannot be saved")
    values = {field.name: getattr(sampling, field.name) for field in dataclasses.fields(_PipelineFile)}
    usual = dataclasses.asdict(SamplingOptions())
    return {
        name: value
        for name, value in (values | {"scheduler": solver.name}).items()
        if name == "guidance_scale" or value != usual[name]
    }


def require_replaceable(folder: Path) -> None:
    """Raises UserError if there is something else than a pipeline we wrote."""
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _is_ours(folder))):
        raise UserError(f"{folder}: not replaced, it is no pipeline we wrote")


def _is_ours(folder: Path) -> bool:
    return (folder / _FILE).is_file() and is_ours(folder / UNET / "config.json")


def _card(name: str, known_as: str, unet: FolderConfig, license: str | None) -> str:
    """A model card: what the Hub reads at its top, what it is, how to load it."""
    config = unet.architecture
    source = "".join(
        f"- {key}: {value}\n" for key, value in unet.source.items() if not isinstance(value, dict)
    )
    return f"""\
---
library_name: moebius-jax
pipeline_tag: image-to-image
tags: [inpainting, jax, flax]
{f"license: {license}" if license else "# license: say under which one these weights come"}
---
# {name}

An inpainting network of moebius-jax: {config.describe()}, channels
{config.channels}, latents of {config.latent_size} x {config.latent_size}.

{source}
```python
from moebius_jax import MoebiusInpaintPipeline

pipe = MoebiusInpaintPipeline.from_pretrained("{known_as}")
result = pipe(image, mask).images[0]
```
"""


def is_here(path_or_hub_id: str | Path) -> bool:
    """Whether a model is on this machine already: a folder, or `TINY`."""
    return _folder(path_or_hub_id).exists()


def holds_one_model(path_or_hub_id: str | Path) -> bool:
    """Whether it is one model, so that no variant needs to be named."""
    return _is_model(_folder(path_or_hub_id))


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (_FILE, "config.json"))


def _folder(path_or_hub_id: str | Path) -> Path:
    folder = fetched(path_or_hub_id)
    # A folder that merely has the name is not meant.
    return Path(__file__).parents[1] / TINY if str(folder) == TINY and not _is_model(folder) else folder


def find_model(
    path_or_hub_id: str | Path,
    *,
    variant: str | None = None,
    vae: str | Path | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    track: hub.Track = lambda items, **_: items,
) -> ModelFolders:
    """Folders of a model's parts, fetched and converted where need be.

    Args:
        path_or_hub_id, variant, vae, revision, cache_dir, track: as for
            `MoebiusInpaintPipeline.from_pretrained`.

    Raises:
        UserError: nothing usable there, or not reachable.
    """
    folder, named = _folder(path_or_hub_id), variant or "pretrained"
    if revision == "":
        raise UserError("the revision is empty; expected a branch, tag or commit")
    if not folder.exists():
        options = {"revision": revision, "cache_dir": cache_dir, "track": track}
        return _find_on_hub(str(path_or_hub_id), variant, vae, **options)
    if revision is not None:
        raise UserError(
            f"{path_or_hub_id}: is on this machine; a revision ({revision}) is one of a repository on the Hub"
        )
    if holds_one_model(folder) and variant:
        what = "a saved pipeline holds one model" if (folder / _FILE).is_file() else "is one converted U-Net"
        raise UserError(f"{folder}: {what}; leave out variant={variant!r}")
    if (folder / _FILE).is_file():
        found = _found(folder / UNET, fetched(vae or folder / VAE), None)
        return dataclasses.replace(found, sampling=read_json(folder / _FILE, _PipelineFile).sampling)
    if (folder / "config.json").is_file():
        unet, beside = folder, folder.parent / "vae"
        if is_bucket(path_or_hub_id) and vae is None:
            beside = fetched(f"{str(path_or_hub_id).rstrip('/').rpartition('/')[0]}/vae")
    else:
        unet, beside = folder / named, folder / "vae"
        if not unet.is_dir():
            raise UserError(
                f"{folder}: holds neither a pipeline ({_FILE}), nor a converted U-Net (config.json), "
                f"nor the variant {unet.name}/"
            )
    if vae is None and not beside.is_dir():
        raise UserError(f"{folder}: no VAE beside it ({beside}); name a converted one with vae= or --vae")
    return _found(unet, fetched(vae or beside), variant)


def _find_on_hub(
    repository: str,
    variant: str | None,
    vae: str | Path | None,
    *,
    revision: str | None,
    cache_dir: str | Path | None,
    track: hub.Track,
) -> ModelFolders:
    """A saved pipeline in a repository, else released weights, and their VAE, which is in another one."""
    if variant is None and repository != DEFAULT_MODEL:
        parts = (_FILE, f"{UNET}/**", f"{VAE}/**")
        saved = hub.fetch_folder(repository, _FILE, parts, revision=revision)
        if saved is not None:
            return find_model(saved, vae=vae)
    named, cache = variant or "pretrained", Path(cache_dir) if cache_dir else None
    unet = hub.fetch(repository, named, cache, track, revision=revision)
    if vae:
        return _found(unet, fetched(vae), named)
    of_both = revision if repository == hub.VAE_REPOSITORY else None
    return _found(unet, hub.fetch(hub.VAE_REPOSITORY, "vae", cache, track, revision=of_both), named)


def _found(unet: Path, vae: Path, asked: str | None) -> ModelFolders:
    config = read_config(unet)
    recorded = config.source.get("variant")
    variant = recorded if recorded in hub.VARIANTS else None
    guidance = PORTRAIT_GUIDANCE if (asked or variant) in PORTRAIT_VARIANTS else DEFAULT_GUIDANCE
    if config.architecture.to_dict() == UNetConfig.teacher().to_dict():
        guidance = TEACHER_GUIDANCE
    sampling = SamplingOptions(guidance_scale=guidance)
    return ModelFolders(unet=unet, vae=vae, sampling=sampling, variant=variant)
