"""Speed as a run reports it."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from configs.debug import get_config
from moebius_jax.sharding import make_mesh
from moebius_jax.training import logs
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
