"""The S3 server of the checkpoints' tests."""

from tests.checkpoint.conftest import s3

__all__ = ["s3"]
