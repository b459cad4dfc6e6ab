"""Downloads through huggingface_hub itself, from a server on this machine.

Each download runs in a process of its own: huggingface_hub reads its environment when it is imported.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import synth
from hub_server import COMMIT, serve
from safetensors.numpy import save_file

from moebius_jax import UserError
from moebius_jax.inpaint.model_folder import find_model
from moebius_jax.weights import hub
from moebius_jax.weights.hub import _require_sound

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]
FETCH = "from moebius_jax.weights import hub; print(hub.fetch({!r}, {!r}))"
RELEASED = hub.PINNED["hustvl/Moebius"]


def run(code_or_args, home, endpoint, **changes):
    """Python code or command-line arguments, with the Hub at `endpoint` and its caches in `home`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XLA_"))}
    env |= {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        **changes,
    }
    args = ["-c", code_or_args] if isinstance(code_or_args, str) else code_or_args
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=env, cwd=ROOT, check=False
    )


def last_line(text):
    return text.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """hustvl/Moebius and hustvl/PixelHacker with small networks."""
    root = tmp_path_factory.mktemp("hub")
    for repository, subfolder, name in (
        ("hustvl/Moebius", "ft_ffhq", "student_mini"),
        ("hustvl/PixelHacker", "vae", "vae_mini"),
    ):
        folder = root / repository / subfolder
        folder.mkdir(parents=True)
        tensors = {k: torch.from_numpy(v) for k, v in synth.state_dict(name).items()}
        torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    return root


@pytest.fixture(scope="module")
def server(repositories):
    with serve(repositories) as (endpoint, log):
        yield endpoint, log


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hf_home")


@pytest.mark.slow
def test_fetched_and_converted_once(server, home):
    endpoint, log = server
    first = run(FETCH.format("hustvl/Moebius", "ft_ffhq"), home, endpoint)
    assert first.returncode == 0, first.stderr
    folder = Path(last_line(first.stdout))
    assert folder == home / "moebius-jax/hustvl--Moebius" / RELEASED / "ft_ffhq"
    assert json.loads((folder / "config.json").read_text())["source"]["commit"] == RELEASED
    written = (folder / "config.json").stat().st_mtime_ns
    assert any(line.startswith(f"GET /hustvl/Moebius/resolve/{RELEASED}/ft_ffhq") for line in log)
    log.clear()
    second = run(FETCH.format("hustvl/Moebius", "ft_ffhq"), home, endpoint)
    assert last_line(second.stdout) == str(folder)
    assert not [line for line in log if line.startswith("GET") and "resolve" in line], "downloaded twice"
    assert (folder / "config.json").stat().st_mtime_ns == written, "converted twice"


def test_a_damaged_download_is_noticed(tmp_path):
    """The cache's files bear the SHA-256 the Hub states, where it states one."""
    content = b"weights"
    kept = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    kept.parent.mkdir()
    (tmp_path / "file.bin").symlink_to(kept)
    kept.write_bytes(content)
    _require_sound(tmp_path / "file.bin")
    kept.write_bytes(b"weighty")
    with pytest.raises(UserError, match=f"{kept}: not what the Hub holds"):
        _require_sound(tmp_path / "file.bin")


@pytest.mark.slow
def test_offline_uses_the_cache(server, home):
    fetched = run(FETCH.format("hustvl/Moebius", "ft_ffhq"), home, server[0])
    assert fetched.returncode == 0, fetched.stderr
    offline = run(FETCH.format("hustvl/Moebius", "ft_ffhq"), home, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert last_line(offline.stdout) == last_line(fetched.stdout)


@pytest.mark.slow
def test_without_the_hub_another_commit_in_its_cache_is_taken_and_said(server, tmp_path):
    code = "from moebius_jax.weights import hub; print(hub.fetch('hustvl/Moebius', 'ft_ffhq', revision={!r}))"
    newest = run(code.format("main"), tmp_path, server[0])
    assert newest.returncode == 0, newest.stderr
    assert COMMIT in newest.stdout
    offline = {"HF_HUB_OFFLINE": "1"}
    found = run(FETCH.format("hustvl/Moebius", "ft_ffhq"), tmp_path, server[0], **offline)
    assert last_line(found.stdout) == last_line(newest.stdout)
    assert f"is of commit {COMMIT[:12]}, which is in its cache" in found.stderr
    named = run(code.format(RELEASED), tmp_path, server[0], **offline)
    assert "HubUnreachable" in named.stderr


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("tiny", "main", "tiny: is on this machine; a revision (main) is one of a repository"),
        ("hustvl/Moebius", "", "the revision is empty; expected a branch, tag or commit"),
    ],
)
def test_revisions_that_mean_nothing(model, revision, message):
    with pytest.raises(UserError, match=re.escape(message)):
        find_model(model, revision=revision)


@pytest.mark.parametrize(
    ("repository", "of_vae"), [("hustvl/Moebius", None), ("hustvl/PixelHacker", "v2"), ("a/b", None)]
)
def test_a_revision_is_of_the_models_repository(repository, of_vae, monkeypatch):
    """Which of the teacher is the VAE's as well."""
    asked = []
    monkeypatch.setattr(hub, "fetch_folder", lambda *_, revision: asked.append(revision))
    monkeypatch.setattr(hub, "fetch", lambda name, sub, *_, revision: asked.append((name, sub, revision)))
    monkeypatch.setattr("moebius_jax.inpaint.model_folder._found", lambda *_: None)
    find_model(repository, revision="v2")
    folder = ["v2"] if repository != "hustvl/Moebius" else []
    both = [(repository, "pretrained", "v2"), ("hustvl/PixelHacker", "vae", of_vae)]
    assert asked == [*folder, *both]


@pytest.mark.slow
def test_a_pipeline_from_the_hub(server, home):
    code = (
        "from moebius_jax import MoebiusInpaintPipeline as P; import numpy as np;"
        "p = P.from_pretrained('hustvl/Moebius', variant='ft_ffhq', revision='main');"
        "print(p.defaults.guidance_scale, p.sampler.image_size)"
    )
    endpoint, log = server
    log.clear()
    result = run(code, home, endpoint)
    assert result.returncode == 0, result.stderr
    assert last_line(result.stdout) == "2.0 256"
    assert any("/hustvl/Moebius/resolve/main/ft_ffhq" in line for line in log)
    assert not any("/hustvl/PixelHacker/resolve/main" in line for line in log), "the VAE stays pinned"


PUSH = """
from moebius_jax import MoebiusInpaintPipeline as Pipeline
pipe = Pipeline.from_pretrained("tiny")
pipe.defaults = pipe.defaults.changed(guidance_scale=1.5, scheduler="dpmpp_2m")
print(pipe.push_to_hub("alone"))
print(pipe.push_to_hub("someone/painter", license="apache-2.0"))
"""
LOAD = """
from moebius_jax import MoebiusInpaintPipeline as Pipeline
pipe = Pipeline.from_pretrained("someone/painter")
print(pipe.defaults.guidance_scale, pipe.defaults.scheduler, pipe.unet.config.channels)
"""


@pytest.mark.slow
def test_pushed_by_one_and_loaded_by_another(server, repositories, tmp_path):
    endpoint, log = server
    pushed = run(PUSH, tmp_path / "one", endpoint, HF_TOKEN="hf_test", HF_HUB_OFFLINE="0")
    assert pushed.returncode == 0, pushed.stderr
    assert last_line(pushed.stdout) == f"{endpoint}/someone/painter"
    card = (repositories / "someone/painter/README.md").read_text()
    assert card.startswith("---\nlibrary_name: moebius-jax\n")
    assert "license: apache-2.0" in card
    for repository in ("someone/painter", "me/alone"):
        assert f'from_pretrained("{repository}")' in (repositories / repository / "README.md").read_text()
    loaded = run(LOAD, tmp_path / "other", endpoint, HF_HUB_OFFLINE="0")
    assert loaded.returncode == 0, loaded.stderr
    assert last_line(loaded.stdout) == "1.5 dpmpp_2m (64, 128, 256)"
    log.clear()
    offline = run(LOAD, tmp_path / "other", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert last_line(offline.stdout) == "1.5 dpmpp_2m (64, 128, 256)"
    assert not log


@pytest.mark.slow
def test_a_vae_kept_by_an_older_version_is_converted_again(server, home):
    fetch = FETCH.format("hustvl/PixelHacker", "vae")
    folder = Path(last_line(run(fetch, home, server[0]).stdout))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "version": 1}))
    again = run(fetch, home, server[0])
    assert again.returncode == 0, again.stderr
    assert last_line(again.stdout) == f"{folder}-2"
    assert json.loads((Path(f"{folder}-2") / "config.json").read_text())["version"] == 2


SAMPLE = ["sample.py", "--image", "{0}/i.png", "--mask", "{0}/m.png", "--output", "{0}/o.png"]


@pytest.fixture
def pictures(photo, mask, tmp_path):
    from PIL import Image

    Image.fromarray(photo).save(tmp_path / "i.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    return [argument.format(tmp_path) for argument in SAMPLE]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "changes", "expected"),
    [
        (
            ["--variant", "ft_cats"],
            {},
            "error: hustvl/Moebius: has no ft_cats/diffusion_pytorch_model.bin at cd01f47fb648; the released",
        ),
        (["--model", "hustvl/Nothing"], {}, "error: hustvl/Nothing: no such repository at http://127.0.0.1"),
        (
            ["--variant", "pretrained"],
            {"HF_HUB_OFFLINE": "1"},
            "error: hustvl/Moebius: the Hub cannot be reached and pretrained/",
        ),
        (
            ["--revision", "main"],
            {"HF_HUB_OFFLINE": "1"},
            "error: hustvl/Moebius: the Hub cannot be reached and",
        ),
        (
            ["--variant", "pretrained"],
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "error: hustvl/Moebius: the Hub cannot be reached",
        ),
        (["--revision", "nowhere"], {}, "error: hustvl/Moebius: has no revision nowhere; expected"),
        (["--model", "a/b/c"], {}, "error: a/b/c: neither a folder nor a Hub repository"),
    ],
)
def test_failures_are_one_line(server, home, pictures, arguments, changes, expected, tmp_path):
    result = run(pictures + arguments, home, server[0], **changes)
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith(expected), result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "o.png").exists()


def test_offline_message_says_what_to_fetch_and_where_to_put_it(home, pictures):
    named = [*pictures, "--model", "hustvl/Moebius"]
    result = run(named, home, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    line = last_line(result.stderr)
    assert f"/hustvl/Moebius/resolve/{RELEASED}/pretrained/diffusion_pytorch_model.bin" in line
    assert "convert_weights.py FILE DEST" in line


@pytest.mark.slow
def test_a_folder_of_the_hubs_layout_converts_whole(repositories, tmp_path):
    save_file(
        synth.state_dict("student_mini"),
        repositories / "hustvl/PixelHacker/diffusion_pytorch_model.safetensors",
    )
    from moebius_jax.cli.convert import main

    source = repositories / "hustvl/Moebius"
    assert main([str(source), str(tmp_path / "all"), "--verify"]) == 0
    assert (tmp_path / "all/ft_ffhq/config.json").is_file()
