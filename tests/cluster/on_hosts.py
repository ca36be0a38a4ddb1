"""What the tests of a cluster share: hosts for a fixture, and notebooks and Python on them."""

import sys

import pytest

from hosts import Hosts, unavailable


def started(count, **options):
    """Start hosts for a fixture, or skip the tests that ask for it."""
    if reason := unavailable():
        pytest.skip(reason)
    with Hosts(count, **options) as hosts:
        yield hosts


def notebook(hosts, storage, **others):
    """Return the variables of a notebook on the first host, whose storage is in a `folder`, a `bucket` or a `uri`."""
    places = {
        "folder": {"TUTORIAL_STORAGE": f"{hosts.folder}/storage"},
        "bucket": {"TUTORIAL_STORAGE": f"{hosts.bucket}/storage", **hosts.credentials},
        "uri": {"TUTORIAL_STORAGE": hosts.bucket_with_query},  # with the credentials in it
    }
    return {"RAY_ADDRESS": "10.77.0.11", **places[storage], **others}


def python(hosts, code, *arguments, timeout=300, **variables):
    """Run Python code on the first host, and return what it printed."""
    return hosts.run(1, [sys.executable, "-u", "-c", code, *arguments], timeout=timeout, **variables).stdout
