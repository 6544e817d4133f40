"""A line of JSON messages between two processes, over a socket that the kernel closes when either of them is gone."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]
LOST_AFTER = 30
"""Seconds after which a machine that no longer answers counts as gone; a process that ended is known at once."""
_PROBE_EVERY = 5
_SEND_SECONDS = 5


class Link:
    """One end. `messages` never waits; `send` does for a moment where the other end does not read."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self.is_open = True
        self._received = b""
        end.settimeout(None)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_SECONDS, 0))
        if end.family != socket.AF_UNIX:
            _notice_silence(end)

    @property
    def pending(self) -> int:
        """The bytes of a message of which the end has not come yet."""
        return len(self._received)

    def fileno(self) -> int:
        """Return the descriptor, for select."""
        return self.socket.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; one that cannot arrive closes the link."""
        if not self.is_open:
            return
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.is_open = False

    def messages(self, wait: bool = False) -> list[Message]:
        """Return what has come since; `is_open` tells whether more may come. wait: until something comes."""
        try:
            arrived = self.socket.recv(1 << 16, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            arrived = b""
        if not arrived:
            self.is_open = False
        *lines, self._received = (self._received + arrived).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Close it; the other end notices."""
        self.is_open = False
        with contextlib.suppress(OSError):
            self.socket.close()


def _notice_silence(end: socket.socket) -> None:
    """Let the kernel ask a silent machine whether it is there, and give up on one that does not answer."""
    tcp = socket.IPPROTO_TCP
    end.setsockopt(tcp, socket.TCP_NODELAY, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    end.setsockopt(tcp, socket.TCP_KEEPIDLE, _PROBE_EVERY)
    end.setsockopt(tcp, socket.TCP_KEEPINTVL, _PROBE_EVERY)
    end.setsockopt(tcp, socket.TCP_KEEPCNT, max(1, LOST_AFTER // _PROBE_EVERY - 1))
    end.setsockopt(tcp, socket.TCP_USER_TIMEOUT, 1000 * LOST_AFTER)


def listen() -> socket.socket:
    """Return a socket that listens at a port of its own, on all addresses of this machine."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)
