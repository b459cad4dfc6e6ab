"""What the tests of hostile inputs share."""

import signal

import pytest
from PIL import Image

from moebius_jax import UserError


@pytest.fixture(autouse=True)
def limit():
    """A test that hangs fails."""

    def fail(*_):
        raise AssertionError("still running after a minute")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(message, action, *arguments, **options):
    """A UserError that says so, in one line."""
    with pytest.raises(UserError, match=message) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)


def png(path, size=(40, 30)):
    Image.new("RGB", size, (10, 20, 30)).save(path)
    return path
