"""Which network devices UCX may use, and what it makes of them.

A worker can be reached by every device that it was given, so the node's --host decides: loopback
gives `lo`, an address gives the interface that has it and the RDMA ports behind that interface.
"""

from __future__ import annotations

import fcntl
import ipaddress
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvtransfer.ucx_worker import load, new_context, settings
from wire.errors import ConfigError

_SYS = Path("/sys/class")
_SIOCGIFADDR = 0x8915  # <linux/sockios.h>
_RESOURCE = re.compile(r"resource \d+ .* (\S+/\S+)$", re.MULTILINE)
_NOT_RDMA = {"tcp", "self", "sysv", "posix", "cma"}


@dataclass(frozen=True, slots=True)
class UcxNetwork:
    """What UCX is told, and what it found."""

    options: dict[str, str]
    resources: tuple[str, ...]  # transport/device, e.g. "tcp/lo"

    @property
    def has_rdma(self) -> bool:
        return any(resource.partition("/")[0] not in _NOT_RDMA for resource in self.resources)

    def __str__(self) -> str:
        version = ".".join(map(str, load().get_ucx_version()))
        return f"UCX {version} over {', '.join(self.resources)}"


def network_of(host: str) -> UcxNetwork:
    """How UCX reaches and is reached at `host`, and no further.

    Raises:
        ConfigError: UCX is not there, or has no device at this address.
    """
    devices = devices_of(host)
    found = _look(settings(net_devices=devices))
    if found.has_rdma:  # the receiver reads, instead of the sender writing packets
        found = _look(settings(net_devices=devices, rendezvous="get_zcopy"))
    return found


def _look(options: dict[str, str]) -> UcxNetwork:
    info = new_context(options).info
    return UcxNetwork(options, tuple(_RESOURCE.findall(info)))


def devices_of(host: str, sys: Path = _SYS) -> str:
    """The devices of UCX that belong to the address a node listens on.

    Raises:
        ConfigError: no interface of this machine has it.
    """
    address = _resolve(host)
    if address.is_loopback:
        return "lo"
    if address.is_unspecified:
        return "all"
    for _, name in socket.if_nameindex():
        if address in set(_addresses(name)):
            return ",".join((name, *_rdma_ports(name, sys)))
    raise ConfigError(f"the ucx transport finds no network interface with the address {host}")


def has_rdma_hardware(sys: Path = _SYS) -> bool:
    """Whether the kernel knows an RDMA device; UCX is not asked."""
    with suppress(OSError):
        return any((sys / "infiniband").iterdir())
    return False


def _resolve(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return ipaddress.ip_address(found[0][4][0])
    except (OSError, UnicodeError, ValueError) as error:
        raise ConfigError(f"--host {host} has no address: {error}") from error


def _addresses(interface: str) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """The interface's IPv4 address (the first one, which is the one UCX takes) and IPv6 ones."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, suppress(OSError):
        request = struct.pack("256s", interface.encode()[:15])
        answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
        yield ipaddress.IPv4Address(answer[20:24])
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            if name == interface:
                yield ipaddress.IPv6Address(bytes.fromhex(digits))


def _rdma_ports(interface: str, sys: Path) -> Iterator[str]:
    """`mlx5_0:1`: the RDMA ports behind a network interface."""
    folder = sys / "net" / interface
    with suppress(OSError, ValueError):
        port = int((folder / "dev_port").read_text()) + 1
        for device in sorted((folder / "device" / "infiniband").iterdir()):
            yield f"{device.name}:{port}"
