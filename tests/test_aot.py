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


@pytest.mark.parametrize(
    "files", [{}, {"0.f.after_codegen.txt": "small", "1.step.after_codegen.txt": "the step"}]
)
def test_a_program_jax_cannot_read_is_read_as_the_compiler_wrote_it(files):
    def as_text():
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    def compile_(compiler_options):
        for name, text in files.items():
            (pathlib.Path(compiler_options["xla_dump_to"]) / name).write_text(text)
        return types.SimpleNamespace(as_text=as_text)

    lowered = types.SimpleNamespace(compile=compile_)
    if files:
        assert compile_and_read(lowered)[1] == "the step"
    else:
        with pytest.raises(jax.errors.JaxRuntimeError):
            compile_and_read(lowered)


@pytest.mark.parametrize(
    ("topology", "options"), [("v4:2x2x4", {"chip_config_name": "megacore"}), ("v5e:4x8", {})]
)
def test_a_slices_devices_are_whole_chips(monkeypatch, topology, options):
    for name in ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(name, "")
    asked = []

    def describe(**asked_for):
        asked.append(asked_for)
        return types.SimpleNamespace(devices=(1, 2))

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    assert slice_devices(topology) == [1, 2]
    assert asked == [{"platform": "tpu", "topology_name": topology, **options}]


def test_a_slice_nobody_knows_is_one_line(monkeypatch):
    for name in ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(name, "")

    def describe(**_):
        raise RuntimeError("NOT_FOUND: v99\nand a trace")

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    with pytest.raises(
        UserError, match=r"^compiling for v99:1x1: NOT_FOUND: v99. It needs libtpu .*v6e:4x4$"
    ):
        slice_devices("v99:1x1")
