"""A real S3 server (moto's) on loopback in a process of its own, behind a relay that fails as it is told to.

The relay passes bytes; `Faults` tells it, connection by connection, to answer 503, to break a connection in the middle
of a request, or to be slow. Run as a program it serves S3 on a free port and prints the port.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

_BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class Faults:
    """What happens to requests whose first line matches `match`, `times` more times.

    kind: "busy" answers 503; "reset" breaks the connection once `after` bytes of the request went through; "slow" waits
    `seconds` before each 256 KiB.
    """

    kind: str = ""
    match: str = "."
    times: int = 0
    after: int = 0
    seconds: float = 0.0
    seen: int = 0

    def take(self, line: str) -> str:
        """Return what is to happen to a request, and count it."""
        if not self.kind or not re.search(self.match, line):
            return ""
        self.seen += 1
        if self.times <= 0:
            return ""
        self.times -= 1
        return self.kind


class Relay:
    """Listens on a port of its own and passes on what comes, one request on each connection."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.faults = Faults()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            self._pass_on(client)
        except OSError:
            pass
        finally:
            client.close()

    def _pass_on(self, client: socket.socket) -> None:
        """Pass on one request and its answer; closing after it makes the next one a connection of its own."""
        head = b""
        while b"\r\n\r\n" not in head:
            data = client.recv(65536)
            if not data:
                return
            head += data
        head, _, body = head.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        kept = [line for line in lines if not line.lower().startswith(("connection:", "expect:"))]
        length = next((int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length:")), 0)
        if any(line.lower().startswith("expect:") for line in lines):
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        fault, faults = self.faults.take(lines[0]), self.faults
        if fault == "busy":
            self._swallow(client, length - len(body))
            answer = f"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: {len(_BUSY)}\r\n"
            client.sendall(answer.encode() + b"Connection: close\r\n\r\n" + (b"" if "HEAD" in lines[0] else _BUSY))
            return
        with socket.create_connection(("127.0.0.1", self._target)) as server:
            server.sendall("\r\n".join([*kept, "Connection: close"]).encode("latin-1") + b"\r\n\r\n")
            passed = 0
            while True:
                if fault == "reset" and passed >= faults.after:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    return
                if fault == "slow":
                    time.sleep(faults.seconds)
                server.sendall(body)
                passed += len(body)
                if passed >= length:
                    break
                body = client.recv(1 << 18)
                if not body:
                    return
            while data := server.recv(1 << 18):
                client.sendall(data)

    def _swallow(self, client: socket.socket, size: int) -> None:
        while size > 0 and (data := client.recv(1 << 18)):
            size -= len(data)

    def close(self) -> None:
        """Accept nothing more."""
        self._listener.close()


class S3Server:
    """The server and its relay; `environment` makes clients use it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), "serve"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        self.relay = Relay(int(self._process.stdout.readline()))
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.relay.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def bucket(self) -> str:
        """Make a bucket and return its URL."""
        import fsspec

        name = f"bucket-{uuid.uuid4().hex[:12]}"
        fsspec.filesystem("s3").mkdir(name)
        return f"s3://{name}"

    def faults(self, kind: str = "", **values: object) -> Faults:
        """Set what fails from now on; nothing by default."""
        self.relay.faults = Faults(kind, **values)  # type: ignore[arg-type]
        return self.relay.faults

    def close(self) -> None:
        """End the server."""
        self.relay.close()
        self._process.kill()
        self._process.wait()


@functools.cache
def shared_server() -> S3Server:
    """Return the one server of this process, which ends with it: clients keep the address that they began with."""
    server = S3Server()
    atexit.register(server.close)
    return server


def serve() -> None:
    """Serve S3 until the process is killed, or the one that started it is gone."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)


if __name__ == "__main__":
    serve()
