"""The release's folder layout: on disk, and on the Hub with a cache of converted folders."""

import contextlib
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from moebius_jax.errors import UserError, first_line
from moebius_jax.weights.convert import Track, convert_file
from moebius_jax.weights.folder import VAE_VERSION, is_outdated
from moebius_jax.weights.release_files import sha256


class HubUnreachable(UserError):
    """The Hub does not answer and its cache does not have the file."""


class NotInRepository(UserError):
    """The repository is there, the file is not in it."""


WEIGHTS = "diffusion_pytorch_model"
VARIANTS = ("pretrained", "ft_places2", "ft_celebahq", "ft_ffhq")
VAE_REPOSITORY = "hustvl/PixelHacker"
# The commits fetched where no revision is named: what is released later may be another network.
PINNED = {
    "hustvl/Moebius": "cd01f47fb648219d3fa605806c5ce00b713faa5e",
    "hustvl/PixelHacker": "012fd343158936a265b8a0ee38a791a7a2841f45",
}
_HUB = "https://huggingface.co"
_PROBE_S = 3.0  # seconds the Hub has to answer in


def find_weights(folder: Path) -> dict[str, Path]:
    """Released weight files in a folder of the Hub's layout.

    Returns:
        Subfolder name → file, "" for the folder itself. A `.safetensors` file is preferred over a `.bin`.

    Raises:
        UserError: there are none.
    """
    found = {}
    for sub in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
        for suffix in (".safetensors", ".safetensors.index.json", ".bin"):
            file = sub / (WEIGHTS + suffix)
            if file.is_file():
                found["" if sub == folder else sub.name] = file
                break
    if not found:
        raise UserError(f"{folder}: no {WEIGHTS}.bin or .safetensors here or in its subfolders")
    return found


def fetch(
    repository: str,
    subfolder: str,
    cache: Path | None = None,
    track: Track = lambda items, **_: items,
    *,
    revision: str | None = None,
) -> Path:
    """A converted folder of released weights, downloaded and converted the first time.

    Downloads go where huggingface_hub keeps them (`HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` are
    respected); converted folders go to `cache`, one per commit.

    Args:
        repository: "owner/name".
        subfolder: "pretrained", "ft_places2", …, or "vae".
        cache: None is `default_cache()`.
        track: wraps the loop over tensors, as tqdm does.
        revision: a branch, tag or commit; None is the one of `PINNED`, or "main".

    Raises:
        UserError: the file is not there, or not reachable and not cached; says what to fetch by hand.
    """
    file = _download(repository, f"{subfolder}/{WEIGHTS}.bin", revision)
    # The Hub cache's layout: models--owner--name/snapshots/COMMIT/subfolder/file.
    commit = file.parents[1].name
    folder = (cache or default_cache()) / repository.replace("/", "--") / commit / subfolder
    if folder.exists() and is_outdated(folder):
        folder = folder.with_name(f"{folder.name}-{VAE_VERSION}")
    if not folder.exists():
        _require_sound(file)
        try:
            _convert(file, folder, track)
        except UserError:
            if not folder.exists():  # else another process converted it at the same time
                raise
    return folder


def _require_sound(file: Path) -> None:
    """Raises UserError if a download is not the file the Hub holds, where the Hub has told its SHA-256: the
    cache names what it keeps after that."""
    kept = file.resolve()
    if re.fullmatch("[0-9a-f]{64}", kept.name) and (found := sha256(kept)) != kept.name:
        raise UserError(
            f"{kept}: not what the Hub holds, its SHA-256 is {found[:12]}…; remove it, and it is "
            "fetched again"
        )


def fetch_folder(
    repository: str, marker: str, patterns: Sequence[str], *, revision: str | None = None
) -> Path | None:
    """A folder of ours on the Hub, as `push_to_hub` puts it there, in huggingface_hub's cache.

    Args:
        repository: "owner/name".
        marker: the file that says that it is one; None is returned where it is missing.
        patterns: what belongs to it.
        revision: see `fetch`.

    Raises:
        UserError: no such repository, or not reachable and not cached.
    """
    from huggingface_hub import snapshot_download

    try:
        found = _download(repository, marker, revision)
    except NotInRepository:
        return None
    endpoint = os.environ.get("HF_ENDPOINT", _HUB)
    try:
        snapshot_download(
            repository,
            revision=found.parent.name,
            allow_patterns=list(patterns),
            local_files_only=not _is_reachable(endpoint),
        )
    except Exception as error:  # the HTTP client's own errors are of no common type
        raise HubUnreachable(f"{repository}: fetching it failed ({first_line(error)})") from None
    return found.parent


def with_owner(repository: str) -> str:
    """A repository's name with its owner, who is the user where none is named.

    Raises:
        UserError: not logged in, or not reachable.
    """
    from huggingface_hub import HfApi

    if "/" in repository:
        return repository
    with _uploading(repository):
        return f"{HfApi().whoami()['name']}/{repository}"


def push(folder: Path, repository: str, *, private: bool | None = None) -> str:
    """Uploads a folder of ours as a repository, which is made where there is none; returns its address.

    Raises:
        UserError: not logged in, not allowed, or not reachable.
    """
    from huggingface_hub import HfApi

    with _uploading(repository):
        api = HfApi()
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload by moebius-jax")
    return str(url)


@contextlib.contextmanager
def _uploading(repository: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the HTTP client's own errors are of no common type
        raise UserError(
            f"{repository}: cannot be uploaded ({first_line(error)}); log in with hf auth login"
        ) from None


def _convert(file: Path, folder: Path, track: Track) -> None:
    if jax.process_count() == 1:
        convert_file(file, folder, track=track)
        return
    # Folders are written by one process: a child, which is no part of the cluster.
    code = "import sys; from pathlib import Path; from moebius_jax.weights import convert_file; "
    code += "convert_file(Path(sys.argv[1]), Path(sys.argv[2]))"
    child = subprocess.run(
        [sys.executable, "-c", code, str(file), str(folder)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        reason = child.stderr.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
        raise UserError(f"{file}: conversion failed ({reason[0]})")


def default_cache() -> Path:
    """`$HF_HOME/moebius-jax`, by default in `~/.cache/huggingface`."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "moebius-jax"


def _download(repository: str, filename: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if repository.count("/") != 1:
        raise UserError(f"{repository}: neither a folder nor a Hub repository of the form owner/name")
    what = "VAE (--vae)" if repository == VAE_REPOSITORY else "model"
    endpoint, asked = os.environ.get("HF_ENDPOINT", _HUB), revision
    revision = revision or PINNED.get(repository, "main")
    try:
        local = not _is_reachable(endpoint)
        return Path(hf_hub_download(repository, filename, revision=revision, local_files_only=local))
    except LocalEntryNotFoundError:
        kept = try_to_load_from_cache(repository, filename) if asked is None else None
        if isinstance(kept, str):  # there is a sentinel, too, for what is known not to be there
            commit = Path(kept).parents[filename.count("/")].name
            warnings.warn(
                f"{repository}: the Hub cannot be reached; {filename} is of commit {_short(commit)}, which "
                f"is in its cache, in the place of {_short(revision)}",
                stacklevel=2,
            )
            return Path(kept)
        raise HubUnreachable(
            f"{repository}: the Hub cannot be reached and {filename} is not in its cache; fetch "
            f"{endpoint}/{repository}/resolve/{revision}/{filename} on a machine that can, convert it with "
            f"python convert_weights.py FILE DEST, and pass DEST as the {what}"
        ) from None
    except GatedRepoError:
        raise UserError(
            f"{repository}: its owner asks you to accept terms at {endpoint}/{repository}, and to log in "
            "(hf auth login)"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"{repository}: no such repository at {endpoint}, and no such folder here") from None
    except RevisionNotFoundError:
        raise UserError(
            f"{repository}: has no revision {revision}; expected a branch (main is the newest), tag or commit"
            f"{', or pass a converted VAE (--vae)' if repository == VAE_REPOSITORY else ''}"
        ) from None
    except EntryNotFoundError:
        raise NotInRepository(
            f"{repository}: has no {filename} at {_short(revision)}; the released variants are "
            f"{', '.join(VARIANTS)}"
        ) from None
    except HFValidationError:
        raise UserError(
            f"{repository}: neither a folder nor a Hub repository of the form owner/name"
        ) from None
    except Exception as error:  # the HTTP client's own errors are of no common type
        raise HubUnreachable(
            f"{repository}: fetching {filename} from {endpoint} failed ({first_line(error)})"
        ) from None


def _short(revision: str) -> str:
    """A commit's first digits; other names as they are."""
    return revision[:12] if re.fullmatch("[0-9a-f]{40}", revision) else revision


def _is_reachable(endpoint: str) -> bool:
    """Whether anybody answers there: without, huggingface_hub would try again for half a minute."""
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=_PROBE_S)
    except Exception:  # the HTTP client's own errors are of no common type
        return False
    return True
