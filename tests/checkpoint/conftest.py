"""An S3 server for the tests of checkpoints, started where a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.checkpoint.s3_server import S3Server, shared_server


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The server, with the environment of its clients and without faults."""
    server = shared_server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.faults()
    yield server
    server.faults()
