"""What `train.py --aot` says of a compiled step; compiling one for a TPU is tests/test_cli_train.py's."""

import pathlib
import types

import jax
import pytest
from jax.experimental import topologies

from moebius_jax.errors import UserError
from moebius_jax.hardware import compile_and_read, slice_devices
from moebius_jax.training import aot

PROGRAM = """
  %all-reduce.1 = f32[4]{0} all-reduce(%x), channel_id=1, to_apply=%add
  %fused = f32[4]{0} all-reduce(%x), channel_id=1, to_apply=%add
  %all-gather-start.2 = (f32[4]{0}, f32[8]{0}) all-gather-start(%y), channel_id=2
"""
MEMORY = types.SimpleNamespace(
    temp_size_in_bytes=3e9, argument_size_in_bytes=2e9, output_size_in_bytes=1e9, alias_size_in_bytes=5e8
)
COMPILED = types.SimpleNamespace(
    cost_analysis=lambda: {"flops": 4e12, "bytes accessed": 5e9}, memory_analysis=lambda: MEMORY
)


def test_figures_are_those_of_all_parts():
    assert aot._figures(COMPILED, PROGRAM, samples=8, parts=2) == {
        "weights, optimiser, batch": "2.50 GB per device",
        "temporaries": "3.00 GB per device",
        "memory": "5.50 GB per device",
        "FLOPs": "8.00 T per device, 1.00 T a sample",
        "HBM traffic": "10 GB per device",
        "collectives": "1 all-reduce, 1 all-gather",
    }


@pytest.mark.parametrize("program", ["", "  %add = f32[4]{0} add(%x, %y)"])
def test_a_program_may_have_no_collectives(program):
    assert aot._figures(COMPILED, program, 1, 1)["collectives"] == "none"


def test_a_program_is_read_as_jax_gives_it():
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    compiled, text = compile_and_read(lowered)
    assert compiled(1.0) == 2
    assert text == lowered.compile().as_text()


def written_by_compiler(**files):
    """A step that jax cannot read, whose compiler writes these files."""

    def as_text():
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    def compile_(compiler_options):
        for name, text in files.items():
            (pathlib.Path(compiler_options["xla_dump_to"]) / f"{name}.after_codegen.txt").write_text(text)
        return types.SimpleNamespace(as_text=as_text)

    return types.SimpleNamespace(compile=compile_)


def test_a_program_jax_cannot_read_is_read_as_the_compiler_wrote_it():
    assert compile_and_read(written_by_compiler(f="small", step="the step"))[1] == "the step"


def test_a_program_nobody_can_read_is_an_error():
    with pytest.raises(jax.errors.JaxRuntimeError):
        compile_and_read(written_by_compiler())


@pytest.fixture
def describing(monkeypatch):
    """Puts a function in the place of libtpu's description of slices; the environment is left as it was."""
    for name in ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(name, "")
    return lambda describe: monkeypatch.setattr(topologies, "get_topology_desc", describe)


@pytest.mark.parametrize(
    ("topology", "options"), [("v4:2x2x4", {"chip_config_name": "megacore"}), ("v5e:4x8", {})]
)
def test_a_slices_devices_are_whole_chips(describing, topology, options):
    asked = []

    def describe(**asked_for):
        asked.append(asked_for)
        return types.SimpleNamespace(devices=(1, 2))

    describing(describe)
    assert slice_devices(topology) == [1, 2]
    assert asked == [{"platform": "tpu", "topology_name": topology, **options}]


def test_a_slice_nobody_knows_is_one_line(describing):
    def describe(**_):
        raise RuntimeError("NOT_FOUND: v99\nand a trace")

    describing(describe)
    with pytest.raises(
        UserError, match=r"^compiling for v99:1x1: NOT_FOUND: v99. It needs libtpu .*v6e:4x4$"
    ):
        slice_devices("v99:1x1")
