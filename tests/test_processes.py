"""Two processes of one jax.distributed cluster on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = """
import sys, jax
from pathlib import Path

import pytest
jax.distributed.initialize({address!r}, 2, int(sys.argv[1]))
from moebius_jax import load_unet
from moebius_jax.weights import hub
hub._download = lambda *_: Path({source!r})  # as if it had been downloaded
folder = hub.fetch("a/b", "student", Path({cache!r}))
print(float(load_unet(folder).conv_norm_out.scale[...].sum()))
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_both_may_convert_and_load_at_once(student_mini_file, tmp_path):
    """Left to itself Orbax would have them wait for each other, and write half a checkpoint each."""
    address = f"127.0.0.1:{free_port()}"
    code = CODE.format(address=address, source=str(student_mini_file), cache=str(tmp_path / "cache"))
    env = {**os.environ, "XLA_FLAGS": os.environ["FAST_COMPILE"], "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(i)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in (0, 1)
    ]
    outputs = [p.communicate(timeout=300) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    assert outputs[0][0].splitlines()[-1] == outputs[1][0].splitlines()[-1]
