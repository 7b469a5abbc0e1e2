"""Settings and fixtures of all tests."""

import gc
import os
import subprocess
from collections.abc import Generator, Iterator
from multiprocessing.process import BaseProcess
from unittest.mock import patch

import pytest
from hypothesis import settings

from tests.support.cloud_emulation import Cloud, redirect

# The same examples in every run, so that a red test means that the change broke it. To look for
# more: pytest --hypothesis-profile=default
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of several processes (-n)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch is not imported yet


def pytest_collection_finish() -> None:
    # The modules stay. To look through all their objects took most of the time of many a test
    # that collects garbage, as each does whose command ends with an error.
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test that starts a process, be it in a fixture, is marked: without the mark it fails."""
    if item.get_closest_marker("slow"):
        return (yield)

    def refuse(*_: object, **__: object) -> None:
        pytest.fail(f"{item.nodeid} starts a process: mark it, @pytest.mark.slow")

    with (
        patch.object(subprocess.Popen, "__init__", refuse),
        patch.object(BaseProcess, "start", refuse),
    ):
        return (yield)


@pytest.fixture
def cloud(tmp_path_factory, monkeypatch) -> Iterator[Cloud]:
    """Blob stores on this machine, and a user who has no credentials for them."""
    home = str(tmp_path_factory.mktemp("home"))
    for name in [name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.join(home, "cache"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # whether this machine is Google's own
    cloud = Cloud()
    undo = redirect(cloud.address)
    yield cloud
    undo()
    cloud.close()
