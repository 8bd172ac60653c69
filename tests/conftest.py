"""Every test runs in double precision, seeded, with an empty parameter store and Pyro's validation on."""

import signal
from collections.abc import Iterator

import pyro
import pytest
import torch

from pyro_sam.elbo import sentinel


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the tests in conformance/test_device_and_dtype.py")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True, scope="session")
def ctrl_c() -> None:
    """Listen to Ctrl-C, as tests of it and their processes must, even where the suite runs in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def clean_pyro() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled():
        yield
    pyro.clear_param_store()
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def sentinel_off(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the sentinel off, which would hide a difference that a test looks for; ``watched`` tests are of it."""
    if request.node.get_closest_marker("watched") is None:
        monkeypatch.setattr(sentinel, "is_due", lambda count, **_: False)
