"""The port at which the ranks of this machine meet, held from the moment it is chosen until the run ends.

A port that was free when somebody looked may be another run's a moment later, and ranks would then meet the wrong
rank 0. So the launcher listens there itself, and rank 0, which is forked from it, serves the socket that it inherits.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

from megatron.errors import LaunchError, Problem

VARIABLE = "DEEPY_LISTENING"
"""Names the file descriptor of the socket, in rank 0's environment."""

_BACKLOG = 2048


def hold_port(wanted: int) -> socket.socket:
    """Return a socket of this machine that listens at `wanted`, or at another port where somebody does already.

    Nobody else can listen there until it is closed. Raises LaunchError where no port is left."""
    for port in (wanted, 0):
        held = socket.socket()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that has just ended leaves its port waiting
        try:
            held.bind(("127.0.0.1", port))
            held.listen(_BACKLOG)
        except OSError:
            held.close()
            continue
        return held
    raise LaunchError(Problem(f"port {wanted}", "is taken, and no other is free.", "Set master_port to a free port."))


def port_of(held: socket.socket) -> int:
    """Return the port that a socket listens at."""
    return int(held.getsockname()[1])


def free_port(wanted: int) -> int:
    """Return `wanted` if nobody listens there, else a port that is free now, and may not be so a moment later."""
    with hold_port(wanted) as held:
        return port_of(held)


def take_inherited(environ: MutableMapping[str, str]) -> int | None:
    """Return the descriptor of the socket that the launcher holds for this process, or None; it is told once."""
    text = environ.pop(VARIABLE, "")
    if not text.isdigit():
        return None
    return os.dup(int(text))
