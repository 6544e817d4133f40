"""Through which network interface other hosts reach this one, and what keeps a host from answering.

gloo listens at the address that the host's own name resolves to. Where that is the loopback, as on Debian's 127.0.1.1
and in many containers, ranks on other hosts would connect to themselves.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of netdevice(7): the IPv4 address of an interface
PROBE_SECONDS = 3.0


def address_towards(host: str, port: int) -> str:
    """Return the address by which this machine reaches `host`; "" where it has no way there. Nothing is sent."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def is_loopback(address: str) -> bool:
    """Whether an address is only this machine's own; True for "" as well, which no other host can use either."""
    return not address or ipaddress.ip_address(address.partition("%")[0]).is_loopback


def own_name_is_loopback() -> bool:
    """Whether this host's name resolves to its loopback, or to nothing."""
    try:
        address = str(socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return True
    return is_loopback(address)


def interfaces() -> dict[str, str]:
    """Return the IPv4 address of each interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it is down, or has no such address
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def interface_of(address: str) -> str | None:
    """Return the interface that has this address, or None."""
    return next((name for name, own in interfaces().items() if own == address), None)


def why_unreachable(host: str, port: int, seconds: float = PROBE_SECONDS) -> str:
    """Return why nothing can be had from a host's port, found by one connection: "" where somebody listens."""
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return ""
    except socket.gaierror:
        return f"the name {host} cannot be resolved on this machine"
    except ConnectionRefusedError:
        return f"{host} answers, but nobody listens at port {port}"
    except TimeoutError:
        return f"{host} does not answer: it is down, the address is another machine's, or a firewall drops port {port}"
    except OSError as error:
        return f"{host} cannot be reached ({error.strerror or error})"
