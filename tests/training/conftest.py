"""The S3 server and the small disk of the checkpoints' tests."""

from tests.checkpoint.conftest import s3, small_disk

__all__ = ["s3", "small_disk"]
