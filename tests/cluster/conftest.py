"""Three hosts with one Ray, for the tests of a real cluster. They are namespaces on this machine: tools/hosts.py."""

import pytest

from cluster.on_hosts import started


@pytest.fixture(scope="session")
def hosts():
    """Three hosts that ask for a token, with a bucket. A test that breaks something repairs it."""
    yield from started(3, bucket=True)
