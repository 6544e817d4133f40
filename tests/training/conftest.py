"""The S3 server of the checkpoints' tests."""

from tests.checkpoint.conftest import s3, s3_server

__all__ = ["s3", "s3_server"]
