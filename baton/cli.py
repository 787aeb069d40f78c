"""The `baton` command: picks the subcommand and loads only what it needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata

from baton.config import prepare_environment
from wire.errors import BatonError

Main = Callable[[Sequence[str]], int]


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: `module` has `entry(argv)`, or `add_arguments(parser)` and `run(args)`."""

    module: str
    help: str
    entry: str = "main"


COMMANDS = {
    "serve": Command("baton.serve", "start router and nodes on this machine with one command"),
    "router": Command("baton.router", "start a router: the HTTP API, in front of the nodes"),
    "prefill": Command("baton.node", "start a prefill node", entry="prefill"),
    "decode": Command("baton.node", "start a decode node", entry="decode"),
    "mixed": Command("baton.node", "start a node that serves requests alone", entry="mixed"),
    "keygen": Command("baton.keygen", "make the key that routers and nodes of a fleet share"),
    "run-batch": Command("baton.run_batch", "answer a file of requests in OpenAI's batch format"),
    "bench": Command("baton.bench", "measure any OpenAI-compatible server, or the engine alone"),
    "profile": Command("baton.profile", "measure what an engine's steps take, for the planner"),
    "plan": Command("baton.plan", "divide nodes into prefill and decode for a workload and limits"),
    "doctor": Command("baton.doctor", "tell what this machine has and what Baton would choose"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"baton {metadata.version('baton-serve')}")
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        print(f"baton: there is no command {words[0]!r}; see `baton --help`", file=sys.stderr)
        return 2
    prepare_environment()
    try:
        return _entry(words[0], command)(words[1:])
    except BatonError as error:
        print(f"baton {words[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def usage() -> str:
    """The text of `baton --help`."""
    rows = "\n".join(f"  {name:<11}{command.help}" for name, command in COMMANDS.items())
    return f"""\
Baton serves large language models with prefill and decode on separate nodes.

usage: baton COMMAND [flags]

{rows}

`baton COMMAND --help` explains a command. To begin: `baton serve`"""


def _entry(name: str, command: Command) -> Main:
    module = import_module(command.module)
    if hasattr(module, command.entry):
        entry: Main = getattr(module, command.entry)
        return entry

    def run(argv: Sequence[str]) -> int:
        parser = argparse.ArgumentParser(
            prog=f"baton {name}",
            description=command.help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        result: int = module.run(parser.parse_args(argv))
        return result

    return run
