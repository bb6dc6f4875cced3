"""Which tests go to which process when there are several: `pytest -n`.

A pytest plugin. The clusters of a variant take seconds to make and are shared by all tests of the
variant, so those stay together; the others stay with their module's.
"""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.lib.variants import VARIANTS

_LONGEST_FIRST = sorted(VARIANTS, key=len, reverse=True)


class ByVariant(LoadScopeScheduling):
    """Hands out the tests of a variant as one piece of work, the largest pieces first."""

    def _split_scope(self, nodeid: str) -> str:
        return piece_of(nodeid)


def piece_of(nodeid: str) -> str:
    """The variant among a test's parameters, else its module."""
    module, _, rest = nodeid.partition("::")
    parameters = rest.partition("[")[2].rstrip("]") + "-"
    return next((name for name in _LONGEST_FIRST if parameters.startswith(f"{name}-")), module)


@pytest.hookimpl(optionalhook=True)  # with -p no:xdist nobody calls it
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByVariant:
    """The scheduler of every run with several processes."""
    return ByVariant(config, log)
