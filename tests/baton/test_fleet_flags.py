"""What the flags of a fleet ask for, and which of them `baton serve` passes on."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from baton.fleet_flags import check_model, given_flags, node_specs, tuner_notice
from baton.serve import make_parser
from node.flags import add_arguments as add_node_arguments
from node.flags import add_decode_arguments, add_engine_arguments
from router.flags import add_arguments as add_router_arguments
from wire.errors import ConfigError

AddArguments = Callable[[argparse.ArgumentParser], None]


def actions(add_arguments: AddArguments) -> list[argparse.Action]:
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    return parser._actions


def other_value(action: argparse.Action) -> list[str]:
    """Words for the action that mean something else than its default."""
    if action.nargs == 0:
        return []
    if action.choices is not None:
        return [next(str(c) for c in action.choices if c != action.default)]
    if action.nargs == "+":
        return ["one", "two words"]
    if action.dest == "device":
        return ["cpu"]
    if action.dest == "gpu_memory_utilization":
        return ["0.5"]
    if action.type in (int, float) or (callable(action.type) and action.metavar == "SIZE"):
        return [str((action.default or 0) + 3)]
    return ["zmq,shm"] if action.dest == "transport" else ["something else"]


@pytest.mark.parametrize(
    "add_arguments", [add_engine_arguments, add_decode_arguments, add_router_arguments]
)
def test_every_flag_arrives_at_the_child(add_arguments: AddArguments) -> None:
    for action in actions(add_arguments):
        words = [action.option_strings[-1], *other_value(action)]
        args = make_parser().parse_args(words)
        flags = given_flags(add_arguments, args)
        child = argparse.ArgumentParser()
        if add_arguments is not add_router_arguments:
            add_node_arguments(child)
            add_decode_arguments(child)
            flags = ["model", *flags]
        else:
            add_arguments(child)
        value = getattr(child.parse_args(flags), action.dest)
        assert value == getattr(args, action.dest), words
        assert value != action.default, words


@pytest.mark.parametrize("flag", ["--async-scheduling", "--no-async-scheduling"])
def test_a_flag_that_has_its_opposite(flag: str) -> None:
    args = make_parser().parse_args([flag])
    assert given_flags(add_engine_arguments, args) == [flag]


def test_what_was_not_given_is_left_to_the_child() -> None:
    args = make_parser().parse_args([])
    assert given_flags(add_engine_arguments, args) == []
    assert given_flags(add_router_arguments, args) == ["--control-port", "0"], "any free port"


def test_all_flags_at_once() -> None:
    words = [
        word
        for add in (add_engine_arguments, add_router_arguments)
        for action in actions(add)
        for word in (action.option_strings[-1], *other_value(action))
    ]
    args = make_parser().parse_args(words)
    router = argparse.ArgumentParser()
    add_router_arguments(router)
    parsed = router.parse_args(given_flags(add_router_arguments, args))
    assert vars(parsed).items() <= vars(args).items()


@pytest.mark.parametrize(
    ("flags", "begins"),
    [
        ("--flex 3", "prefill decode decode prefill decode"),
        ("--mixed 1 --flex 2", "mixed decode prefill"),
        ("--prefill 1 --decode 0 --flex 1", "prefill decode"),
        ("--prefill 0 --decode 0 --flex 1", "decode"),
    ],
)
def test_what_nodes_begin_as(flags: str, begins: str) -> None:
    args = make_parser().parse_args(flags.split())
    check_model(args)
    assert [spec.role for spec in node_specs(args)] == begins.split()


@pytest.mark.parametrize(
    "flags", ["--decode 0", "--prefill 0 --decode 0", "--prefill 3 --decode 0 --mixed 0 --flex 0"]
)
def test_a_fleet_that_could_answer_nothing(flags: str) -> None:
    args = make_parser().parse_args(flags.split())
    with pytest.raises(ConfigError, match="no node would answer requests: give --decode, --mixed"):
        check_model(args)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", False),
        ("--tune on", True),
        ("--tune dry-run --mixed 4", True),
        ("--tune on --decode 2", False),
        ("--tune on --flex 1", False),
        ("--tune on --mixed 2 --flex 3", False),
    ],
)
def test_a_tuner_without_nodes_to_move_is_told(flags: str, said: bool) -> None:
    notice = tuner_notice(make_parser().parse_args(flags.split()))
    assert (notice is not None) is said
    assert notice is None or "each role keeps its last node" in notice
