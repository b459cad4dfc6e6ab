"""The folder of a whole pipeline, and where a model is to be found: here or on the Hub."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from moebius_jax.defaults import TINY
from moebius_jax.errors import UserError
from moebius_jax.files import replace_when_complete
from moebius_jax.schema import checked, read_json
from moebius_jax.weights import hub
from moebius_jax.weights.folder import read_config

DEFAULT_GUIDANCE = 2.5  # natural scenes (paper, Table 6)
PORTRAIT_GUIDANCE = 2.0
PORTRAIT_VARIANTS = ("ft_celebahq", "ft_ffhq")

_FILE, UNET, VAE = "pipeline.json", "unet", "vae"


@checked
class _PipelineFile:
    """`pipeline.json`: the model's default."""

    guidance_scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFolders:
    """Where a model's parts are.

    Attributes:
        unet, vae: converted folders.
        guidance_scale: default for the model.
        variant: the released weights it holds, where it says so.
    """

    unet: Path
    vae: Path
    guidance_scale: float
    variant: str | None


@contextlib.contextmanager
def write_model_folder(folder: Path, *, guidance_scale: float, overwrite: bool) -> Iterator[Path]:
    """Yields a folder to put `UNET` and `VAE` into; it appears under its name when complete.

    Raises:
        UserError: it exists and may not be replaced, or cannot be written.
    """
    with replace_when_complete(folder, overwrite=overwrite, ours=(_FILE, UNET, VAE)) as partial:
        partial.mkdir()
        yield partial
        (partial / _FILE).write_text(json.dumps({"guidance_scale": guidance_scale}) + "\n")


def is_here(path_or_hub_id: str | Path) -> bool:
    """Whether a model is on this machine already: a folder, or `TINY`."""
    return _folder(path_or_hub_id).exists()


def holds_one_model(path_or_hub_id: str | Path) -> bool:
    """Whether it is one model, so that no variant needs to be named."""
    return any((_folder(path_or_hub_id) / name).is_file() for name in (_FILE, "config.json"))


def _folder(path_or_hub_id: str | Path) -> Path:
    folder = Path(path_or_hub_id)
    return Path(__file__).parents[1] / TINY if str(folder) == TINY and not folder.exists() else folder


def find_model(
    path_or_hub_id: str | Path,
    *,
    variant: str | None,
    vae: str | Path | None,
    cache_dir: str | Path | None,
    track: hub.Track,
) -> ModelFolders:
    """Folders of a model's parts, fetched and converted where need be.

    Args:
        path_or_hub_id, variant, vae, cache_dir, track: see `MoebiusInpaintPipeline.from_pretrained`.

    Raises:
        UserError: nothing usable there, or not reachable.
    """
    folder, named = _folder(path_or_hub_id), variant or "pretrained"
    if not folder.exists():
        cache = Path(cache_dir) if cache_dir else None
        unet = hub.fetch(str(path_or_hub_id), named, cache, track)
        return _found(unet, Path(vae) if vae else hub.fetch(hub.VAE_REPOSITORY, "vae", cache, track), named)
    if holds_one_model(folder) and variant:
        what = "a saved pipeline holds one model" if (folder / _FILE).is_file() else "is one converted U-Net"
        raise UserError(f"{folder}: {what}; leave out variant={variant!r}")
    if (folder / _FILE).is_file():
        found = _found(folder / UNET, Path(vae or folder / VAE), None)
        return dataclasses.replace(
            found, guidance_scale=read_json(folder / _FILE, _PipelineFile).guidance_scale
        )
    if (folder / "config.json").is_file():
        unet, beside = folder, folder.parent / "vae"
    else:
        unet, beside = folder / named, folder / "vae"
        if not unet.is_dir():
            raise UserError(
                f"{folder}: holds neither a pipeline ({_FILE}), nor a converted U-Net (config.json), "
                f"nor the variant {unet.name}/"
            )
    if vae is None and not beside.is_dir():
        raise UserError(f"{folder}: no VAE beside it ({beside}); name a converted one with vae= or --vae")
    return _found(unet, Path(vae or beside), variant)


def _found(unet: Path, vae: Path, asked: str | None) -> ModelFolders:
    recorded = read_config(unet).source.get("variant")
    variant = recorded if recorded in hub.VARIANTS else None
    guidance = PORTRAIT_GUIDANCE if (asked or variant) in PORTRAIT_VARIANTS else DEFAULT_GUIDANCE
    return ModelFolders(unet=unet, vae=vae, guidance_scale=guidance, variant=variant)
