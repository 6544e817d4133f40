from __future__ import annotations

import os
import threading
from pathlib import Path

from megatron.launch import flight


def test_a_rank_that_listens_writes_its_record(tmp_path: Path) -> None:
    """A thread stands for torch's: it takes a byte from the pipe of rank 3 and writes the file that was named."""
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TORCH_FR_BUFFER_SIZE": "50"}
    flight.record(tmp_path, environ)
    assert environ["TORCH_FR_BUFFER_SIZE"] == "50"
    assert environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "2000"
    pipe = environ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] + "3.pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    wanted = environ["TORCH_FR_DUMP_TEMP_FILE"] + "3"

    def answer() -> None:
        while True:
            try:
                if os.read(reader, 1):
                    break
            except BlockingIOError:
                pass
        Path(wanted).write_bytes(b"collectives")

    thread = threading.Thread(target=answer)
    thread.start()
    assert flight.ask(tmp_path, [3, 4]) == {3: wanted}
    thread.join()
    os.close(reader)
    assert flight.ask(tmp_path, [3, 4]) == {}


def test_without_a_recorder_nobody_waits(tmp_path: Path) -> None:
    assert flight.ask(tmp_path, [0], seconds=60) == {}
