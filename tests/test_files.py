"""Files and folders appear whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moebius_jax.errors import UserError
from moebius_jax.files import AlreadyThere, remove_remains, replace_when_complete

_WRITE_AND_WAIT = """
import sys, time
from pathlib import Path
from moebius_jax.files import replace_when_complete
with replace_when_complete(Path(sys.argv[1]), overwrite=False) as partial:
    partial.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path):
    """Another process, in the middle of writing `out/a.png`."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITE_AND_WAIT, str(out / "a.png")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    yield out, process
    process.kill()
    process.wait()


def test_a_block_that_raises_leaves_everything_as_it_was(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("before")

    def write_half():
        with replace_when_complete(file, overwrite=True) as partial:
            partial.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]
    assert file.read_text() == "before"


def test_replaces_only_when_told(tmp_path):
    file = tmp_path / "a.txt"
    for _ in range(2):
        with replace_when_complete(file, overwrite=True) as partial:
            partial.write_text("whole")
    with (
        pytest.raises(UserError, match=r"a\.txt: exists already; pass --overwrite"),
        replace_when_complete(file, overwrite=False),
    ):
        pass
    assert [f.read_text() for f in tmp_path.iterdir()] == ["whole"]


def test_who_comes_second_does_not_replace(tmp_path):
    """What another process finished meanwhile stays."""

    def write(dest, make):
        with replace_when_complete(dest, overwrite=False) as partial:
            make(partial)
            make(dest)  # the other process
            (tmp_path / "theirs").touch()

    for name, make in (("a.txt", Path.touch), ("b", Path.mkdir)):
        with pytest.raises(AlreadyThere, match=f"{name}: exists already"):
            write(tmp_path / name, make)
        assert sorted(f.name for f in tmp_path.iterdir()) == sorted({"a.txt", "theirs", name})


def test_remains_of_a_killed_process_are_removed(writer):
    out, process = writer
    (partial,) = out.iterdir()
    remove_remains(out)
    assert list(out.iterdir()) == [partial]  # it still runs
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(out.iterdir()) == [partial]
    other = out / partial.name.replace(partial.name.split("-")[1], "0" * 8)  # of another machine
    other.write_text("half")
    replaced = partial.with_suffix(".old")  # what a killed process was about to replace
    replaced.mkdir()
    remove_remains(out)
    assert sorted(out.iterdir()) == sorted([other, replaced])


def test_remains_of_a_folder_that_does_not_exist(tmp_path):
    remove_remains(tmp_path / "nothing")
    assert not os.listdir(tmp_path)
