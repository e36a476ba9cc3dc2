"""The same examples on every run, as many threads as there is room for, and who works beside whom.

Hypothesis draws the same examples each time and keeps none between runs. Tests and the servers they start share the
machine's cores, where more threads than cores only wait for one another: set before PyTorch is imported.
"""

import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("mmtok", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("mmtok")

# Fixtures that start servers for several tests, and the parameter of which each value has servers of its own.
_SHARED_SERVERS = {"servers": "family", "chunked": "chunked", "pocket_model_of": ""}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes work (`-n 2`): long tests begin, and those that share a server stay together."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=lambda item: not (_shared_servers(item) or item.get_closest_marker("slow")))


def _group(item: pytest.Item) -> str:
    """Returns the name that all tests have in common that one process runs."""
    if shared := _shared_servers(item):
        return shared
    return item.nodeid if item.get_closest_marker("slow") else item.nodeid.partition("::")[0]


def _shared_servers(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    for fixture, parameter in _SHARED_SERVERS.items():
        if fixture in getattr(item, "fixturenames", ()):
            return f"{fixture} {callspec.params.get(parameter, '') if callspec else ''}"
    return None
