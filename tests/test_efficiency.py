"""Counting: against formulas of small programs, and against the paper's tables."""

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY_UNET

from benchmarks.efficiency import NETWORKS, measure, multiply_adds
from benchmarks.multiply_adds import count
from benchmarks.profile import NAMES, main
from moebius_jax.weights.tensors import count_parameters


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


class TestMultiplyAdds:
    def test_matrix_product(self):
        found = count(lambda w, x: x @ w, shape(5, 7), shape(3, 5))
        assert (found.layers, found.elementwise, found.products) == (3 * 5 * 7, 0, 0)
        assert found.flops == 2 * 3 * 5 * 7

    def test_batched_product_of_activations(self):
        found = count(lambda _, x: jnp.einsum("bij,bkj->bik", x, x), shape(1), shape(2, 3, 5))
        assert (found.layers, found.products) == (0, 2 * 3 * 3 * 5)

    @pytest.mark.parametrize(("groups", "stride"), [(1, 1), (4, 1), (1, 2)])
    def test_convolution(self, groups, stride):
        def convolve(w, x):
            return jax.lax.conv_general_dilated(
                x,
                w,
                (stride, stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )

        found = count(convolve, shape(3, 3, 8 // groups, 16), shape(2, 10, 10, 8))
        positions = (10 // stride) ** 2
        assert found.layers == 2 * positions * 16 * 9 * 8 // groups

    def test_work_on_weights_alone_is_free(self):
        found = count(lambda w, x: x @ (w @ w), shape(6, 6), shape(1, 6))
        assert found.layers == 36

    def test_scale_counts_and_a_constant_does_not(self):
        found = count(lambda w, x: 2.0 * (x * w), shape(6), shape(4, 6))
        assert (found.layers, found.elementwise) == (0, 24)

    def test_loops_count_each_turn_and_branches_are_refused(self):
        def scan(w, x):
            return jax.lax.scan(lambda c, _: (c @ w, None), x, length=5)[0]

        assert count(scan, shape(6, 6), shape(1, 6)).layers == 5 * 36

        # What varies only from the second turn on varies.
        def late(w, x):
            return jax.lax.scan(lambda c, _: (c @ w + x, None), jnp.zeros((1, 6)), length=5)[0]

        assert count(late, shape(6, 6), shape(1, 6)).layers == 5 * 36

        # What is carried along and never varies does not count.
        def beside(w, x):
            return jax.lax.scan(lambda c, _: ((c[0] @ w, c[1] @ w), None), (x, w), length=5)[0]

        assert count(beside, shape(6, 6), shape(1, 6)).layers == 5 * 36
        with pytest.raises(NotImplementedError, match="while"):
            count(
                lambda _, x: jax.lax.while_loop(lambda c: c.sum() < 1, lambda c: c + x, x), shape(1), shape(3)
            )


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_the_papers_columns(name):
    """Parameters to the million (the paper rounds or cuts), multiply-adds with weights to 0.1 %."""
    network = NETWORKS[name]
    assert abs(count_parameters(network.config) / 1e6 - network.parameters) < 0.6
    assert multiply_adds(network.config).with_weights / 1e9 == pytest.approx(network.gflops, rel=1e-3)


@pytest.mark.slow
def test_measure_runs_the_network():
    found = measure(TINY_UNET, repeats=1)
    assert found.pass_ms > 0
    assert found.step_ms > 0
    assert found.weights_bytes > 4 * 0.9 * count_parameters(TINY_UNET)
    assert found.temporary_bytes > 0
    assert found.xla_flops == pytest.approx(multiply_adds(TINY_UNET).flops, rel=0.5)


def test_help_names_every_network():
    assert tuple(NETWORKS) == NAMES


@pytest.mark.slow
def test_command(capsys, tmp_path):
    file = tmp_path / "out.json"
    assert main(["--count-only", "--networks", "student", "exp8", "--output", str(file)]) == 0
    out = capsys.readouterr().out
    assert "| student | 9, 10 | 226.04 | 226 | 153.99 | 154 | -0.01% |" in out
    assert "exp8" in out
    assert file.is_file()
    assert main(["--count-only", "--networks", "student", "--output", str(tmp_path)]) == 1
    assert "is a folder, expected a file to write" in capsys.readouterr().err
