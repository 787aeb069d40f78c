"""Which device a node takes, on made-up machines; how a launcher spreads its nodes over GPUs."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from baton.config import visible_gpus
from baton.fleet_flags import count_gpus, on_its_device
from baton.serve import make_parser
from engine.device import check_device
from node.config import NodeConfig
from node.devices import is_cuda_build, num_gpus, parse_device, resolve_device, spread
from node.flags import add_arguments, from_args
from node.performance import GPU_MODES, step_limits
from wire.errors import ConfigError


@pytest.fixture
def two_gpus(tmp_path: Path) -> Path:
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    return tmp_path


@pytest.mark.parametrize("text", ["auto", "cpu", "cuda", "cuda:3"])
def test_devices_that_there_are(text: str) -> None:
    assert parse_device(text) == text


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"])
def test_others_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="neither auto, cpu, cuda nor cuda:N"):
        parse_device(text)


def test_auto_takes_a_gpu_where_there_is_one_and_torch_can_use_it(
    two_gpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert num_gpus(two_gpus) == 2
    assert resolve_device("auto", two_gpus, torch_has_cuda=True) == "cuda:0"
    assert resolve_device("auto", two_gpus, torch_has_cuda=False) == "cpu"
    nothing = tmp_path_factory.mktemp("bare")
    assert resolve_device("auto", nothing, torch_has_cuda=True) == "cpu"
    assert resolve_device("cuda", nothing) == "cuda:0", "asked for by name: torch will tell"
    assert resolve_device("cuda:1", nothing) == "cuda:1"
    assert resolve_device("cpu", two_gpus, torch_has_cuda=True) == "cpu"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("cuda: Optional[str] = '13.0'", True),
        ('cuda = "12.8"', True),
        ("cuda: Optional[str] = None", False),
        ("cudagraphs = 'x'", False),
    ],
)
def test_what_torch_is_built_for_stands_in_its_version_file(
    tmp_path: Path, line: str, found: bool
) -> None:
    file = tmp_path / "version.py"
    file.write_text(f"__version__ = '2.13.0'\n{line}\nhip = '1'\n")
    assert is_cuda_build(file) is found


def test_nodes_take_turns_unless_one_gpu_was_named() -> None:
    assert [spread("cuda", n, 2) for n in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert spread("cuda:5", 1, 2) == "cuda:5"
    assert spread("cpu", 1, 2) == "cpu"
    assert spread("cuda", 3, 0) == "cuda:0"


@pytest.mark.parametrize(
    ("text", "seen"),
    [("0", 1), ("2,5", 2), ("", 0), ("-1", 0), ("0,-1,1", 1), ("GPU-8932f937,GPU-1", 2)],
)
def test_cuda_may_be_shown_fewer_devices_than_there_are(
    text: str, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert visible_gpus() == seen
    assert count_gpus() == seen


def test_cuda_shows_one_slice_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a1,MIG-b2")
    assert visible_gpus() == 1
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() is None
    assert count_gpus() == num_gpus()


def test_a_gpu_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: int) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA k")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.mem_get_info", fails)
    with pytest.raises(ConfigError, match=r"--device cuda:0 cannot be used: .* unavailable$"):
        check_device("cuda:0")


def flags(*given: str) -> argparse.Namespace:
    return make_parser().parse_args(["m", *given])


def test_nodes_of_one_gpu_share_its_memory() -> None:
    args = flags("--device", "cuda", "--prefill", "1", "--decode", "2")
    found = [on_its_device(args, number, 2) for number in range(3)]
    assert [f.device for f in found] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [f.gpu_memory_utilization for f in found] == [0.45, 0.9, 0.45]
    assert on_its_device(flags("--device", "cpu"), 0, 2).gpu_memory_utilization == 0.9


def test_a_gpus_limits_are_its_own() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    made = from_args(parser.parse_args(["m", "--device", "cuda:1"]), role="decode", pid=1)
    assert made.device == "cuda:1"
    assert made.max_num_batched_tokens == GPU_MODES["balanced"].max_num_batched_tokens
    assert step_limits("throughput", gpu=True) == GPU_MODES["throughput"]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_of_a_gpu_is_between_nothing_and_all(share: float) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory-utilization must be above 0"):
        NodeConfig(Path("m"), "n", gpu_memory_utilization=share)
