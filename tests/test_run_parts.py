"""Parts of a run by themselves: its speed, its trace, how it ends, which checkpoints it keeps."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.debug import get_config
from moebius_jax.errors import UserError
from moebius_jax.sharding import make_mesh, replicated
from moebius_jax.training import logs
from moebius_jax.training.checkpointing import RunCheckpoints
from moebius_jax.training.config import CheckpointConfig
from moebius_jax.training.state import TrainState
from moebius_jax.training.stopping import close_all
from train import step_flops


@pytest.fixture
def clock(monkeypatch):
    """The time as the test says it, in seconds."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(logs.time, "perf_counter", lambda: now.seconds)
    return now


def test_rates_are_of_the_time_since_the_last_report(clock):
    watch = logs.Stopwatch(batch_size=4, flops=30.0, peak=100.0)
    assert watch.rates() == {}

    def steps(count, seconds, waiting):
        for _ in range(count):
            with watch.waiting_for_data():
                clock.seconds += waiting
            clock.seconds += seconds - waiting
            watch.tick()

    watch.tick()
    assert watch.rates() == {}, "no step was finished"
    steps(5, 2.0, 0.5)
    expected = {"images_per_second": 4 / 2, "data_wait_share": 0.25, "fraction_of_peak": 0.15}
    assert watch.rates() == pytest.approx(expected)
    steps(3, 1.0, 0.1)
    expected = {"images_per_second": 4 / 1, "data_wait_share": 0.1, "fraction_of_peak": 0.3}
    assert watch.rates() == pytest.approx(expected)
    assert watch.rates() == {}


def test_without_a_known_peak_no_fraction_of_it(clock):
    watch = logs.Stopwatch(batch_size=4, flops=30.0, peak=None)
    watch.tick()
    clock.seconds += 1
    watch.tick()
    assert set(watch.rates()) == {"images_per_second", "data_wait_share"}


def test_flops_of_a_step_are_of_all_devices_and_parts():
    config = dataclasses.replace(get_config(), accumulation=2)
    mesh = make_mesh(jax.devices()[:4])
    assert step_flops(SimpleNamespace(cost_analysis=lambda: {"flops": 10.0}), config, mesh) == 80
    assert step_flops(SimpleNamespace(cost_analysis=lambda: None), config, mesh) is None


def test_a_trace_is_of_five_steps(monkeypatch, tmp_path):
    done, said = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: done.append((step, folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: done.append((step, "stopped")))
    for first, steps, expected in (
        (7, 20, [(7, str(tmp_path / "profile")), (12, "stopped")]),
        (7, 10, [(7, str(tmp_path / "profile")), (9, "stopped")]),  # the run is at its end
        (None, 10, []),
    ):
        trace = logs.Trace(tmp_path, first, said.append, known_as=tmp_path / "there")
        for step in range(steps):
            trace.at(step)
        trace.close()
        assert done == expected
        assert said == [f"profile: tensorboard --logdir {tmp_path}/there/profile"] * bool(expected)
        done.clear()
        said.clear()


class TestClosing:
    @pytest.fixture
    def parts(self):
        """Three of them, the first of which fails, and the order they are closed in."""
        order = []

        def closes(number, error=None):
            def close():
                order.append(number)
                if error:
                    raise error

            return SimpleNamespace(close=close)

        return [closes(0, UserError("disk full")), closes(1), closes(2)], order

    def test_all_are_closed_whatever_one_meets(self, parts):
        parts, order = parts
        with pytest.raises(UserError, match="disk full"):
            close_all(*parts, is_failing=False)
        assert order == [0, 1, 2]

    def test_an_error_on_its_way_stays_the_one_that_is_told(self, parts, capsys):
        parts, order = parts
        close_all(*parts, is_failing=True)
        assert order == [0, 1, 2]
        assert capsys.readouterr().err == "warning: disk full\n"


def test_some_checkpoints_are_kept_for_good(tmp_path):
    config = CheckpointConfig(keep=1, keep_every=2)
    checkpoints = RunCheckpoints(tmp_path, config, warn=pytest.fail)
    leaf = {"x": jnp.zeros(2)}
    for step in range(1, 6):
        state = TrainState(step=jnp.int32(step), params=leaf, statistics=leaf, ema=leaf, optimizer=leaf)
        checkpoints.save(state, step, {"seed": 0})
    checkpoints.close()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_2", "step_4", "step_5"]


def test_small_tensors_are_not_cut_for_every_device(tmp_path, monkeypatch):
    """Eight devices hold the same: each writes its part of a large one, the first small ones whole."""
    cut, slice_in_dim = [], jax.lax.slice_in_dim
    monkeypatch.setattr(
        jax.lax, "slice_in_dim", lambda x, *a, **k: cut.append(x.shape) or slice_in_dim(x, *a, **k)
    )
    everywhere = replicated(make_mesh())
    small, large = (jax.device_put(jnp.ones((8, n)), everywhere) for n in (1 << 10, 1 << 18))
    state = TrainState(
        step=jnp.int32(1), params={"small": small, "large": large}, statistics={}, ema={}, optimizer={}
    )
    checkpoints = RunCheckpoints(tmp_path, CheckpointConfig(), warn=pytest.fail)
    checkpoints.save(state, 1, {"seed": 0})
    restored, _ = checkpoints.restore(state, {"seed": 0})
    checkpoints.close()
    assert cut == [large.shape] * 8
    jax.tree.map(np.testing.assert_array_equal, restored, state)
