"""An S3 server for the tests of checkpoints, started where a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.checkpoint.s3_server import S3Server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The server, with the environment of its clients and without faults."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    s3_server.faults()
    yield s3_server
    s3_server.faults()
