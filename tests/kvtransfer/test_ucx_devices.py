"""Which devices UCX gets for an address, and what it has there."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from pathlib import Path

import pytest

from kvtransfer.ucx_devices import UcxNetwork, devices_of, has_rdma_hardware, network_of
from kvtransfer.ucx_worker import settings, why_unavailable
from wire.errors import ConfigError


@pytest.mark.parametrize(
    ("host", "devices"),
    [("127.0.0.1", "lo"), ("localhost", "lo"), ("::1", "lo"), ("0.0.0.0", "all"), ("::", "all")],
)
def test_an_address_says_which_devices(host: str, devices: str) -> None:
    assert devices_of(host) == devices


def test_an_address_of_nobody() -> None:
    with pytest.raises(ConfigError, match="no network interface"):
        devices_of("192.0.2.255")
    with pytest.raises(ConfigError, match="has no address"):
        devices_of("no-such-host.invalid")


def test_an_interface_brings_its_rdma_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "net" / "eth7"
    (folder / "device" / "infiniband" / "mlx5_3").mkdir(parents=True)
    (folder / "dev_port").write_text("1\n")
    address = "203.0.113.7"
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth7")])
    monkeypatch.setattr(
        "kvtransfer.ucx_devices._addresses",
        lambda name: {"eth7": [ip_address(address)]}.get(name, []),
    )
    assert devices_of(address, tmp_path) == "eth7,mlx5_3:2"
    (folder / "dev_port").unlink()
    assert devices_of(address, tmp_path) == "eth7"


def test_rdma_hardware_is_what_the_kernel_knows(tmp_path: Path) -> None:
    assert not has_rdma_hardware(tmp_path)
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    assert has_rdma_hardware(tmp_path)


@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_what_ucx_has_on_loopback() -> None:
    found = network_of("127.0.0.1")
    assert found.resources == ("tcp/lo",)
    assert not found.has_rdma
    assert str(found).startswith("UCX 1.")
    assert found.options == settings(net_devices="lo")
    assert UcxNetwork({}, ("tcp/eth0", "rc_verbs/mlx5_0:1")).has_rdma
