"""`baton run-batch`: a file of requests in OpenAI's batch format in, a file of answers out.

Against a server that runs (`--url`), or against a fleet of its own that starts for the batch and
ends with it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from baton.fleet_flags import add_fleet_arguments, check_model
from baton.launcher import Launcher
from router.flags import add_arguments as add_router_arguments
from tuner.batch import BatchFiles, BatchSettings, Tally, run_batch
from tuner.client import Target, base_url
from wire.errors import ConfigError

_DESCRIPTION = """\
Answer a file of requests in OpenAI's batch format: one JSON object per line, with custom_id,
method (POST), url (/v1/chat/completions, /v1/completions, /v1/responses or /v1/embeddings) and
body. Each result is a line of the output, in the order in which they come, with its custom_id.

  baton run-batch -i in.jsonl -o out.jsonl                        starts its own fleet
  baton run-batch -i in.jsonl -o out.jsonl ./my-model --decode 2
  baton run-batch -i in.jsonl -o out.jsonl --url http://127.0.0.1:8000

Interrupted or killed, the same command goes on: what has a result in the output is not asked again.
Exit codes: 0 all lines were answered with 200, 3 some were not, 1 none was or the run had to stop,
130 interrupted."""
_SOME_FAILED = 3


def main(argv: Sequence[str]) -> int:
    """Run the batch; returns the exit code."""
    args = make_parser().parse_args(argv)
    if args.url is None:
        check_model(args)
    settings = settings_from(args)
    files = BatchFiles(settings)
    if files.num_known:
        _say(f"{files.num_known} of {files.tally.total} lines are done already")
    try:
        asyncio.run(_answer(args, settings, files))
    except KeyboardInterrupt:
        _say(f"interrupted after {files.tally.done} of {files.tally.total} lines; run it again")
        return 130
    finally:
        files.close()
    return _report(files.tally)


def make_parser() -> argparse.ArgumentParser:
    """The flags of `baton run-batch`."""
    parser = argparse.ArgumentParser(
        prog="baton run-batch",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-i", "--input", type=Path, required=True, metavar="FILE", help="requests")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="results; grows")
    add("-e", "--errors", type=Path, metavar="FILE", help="failures (they go to the output)")
    add("--retry-failed", action="store_true", help="try again what failed on the server's side")
    _add_client_arguments(parser.add_argument_group("asking"))
    add_fleet_arguments(parser)
    return parser


def _add_client_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--url", help="a running server (default: start MODEL's own fleet)")
    add("--api-key", help="sent as a bearer token; needs --url")
    add("--concurrency", type=_count, default=32, metavar="N", help="at a time (%(default)s)")
    add(
        "--max-retries",
        type=int,
        default=10,
        metavar="N",
        help="of a line while the server is busy (429, 503) or away (%(default)s)",
    )
    add(
        "--timeout-s",
        type=float,
        default=600.0,
        metavar="S",
        help="for one answer (%(default)g)",
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def settings_from(args: argparse.Namespace) -> BatchSettings:
    """Raises ConfigError where flags contradict each other."""
    if args.api_key is not None and args.url is None:
        raise ConfigError("--api-key is for the server at --url; a fleet of its own needs none")
    headers = {} if args.api_key is None else {"Authorization": f"Bearer {args.api_key}"}
    url = base_url(args.url or "")
    return BatchSettings(
        input=args.input,
        output=args.output,
        errors=args.errors,
        target=Target(url, None, headers=headers, timeout_s=args.timeout_s),
        concurrency=args.concurrency,
        max_retries=max(0, args.max_retries),
        retry_failed=args.retry_failed,
    )


async def _answer(args: argparse.Namespace, settings: BatchSettings, files: BatchFiles) -> None:
    if args.url is not None:
        await run_batch(settings, files)
    elif files.num_known < files.tally.total:
        await _on_own_fleet(args, settings, files)


async def _on_own_fleet(
    args: argparse.Namespace, settings: BatchSettings, files: BatchFiles
) -> None:
    """Raises ConfigError if the fleet does not start, or cannot go on."""
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def on_ready(ready_url: str, what: str) -> None:
        url.set_result(ready_url)
        _say(f"{what}")

    launcher = Launcher(_fleet_args(args), on_ready)
    fleet = asyncio.create_task(launcher.run())
    batch = asyncio.create_task(_when_ready(url, settings, files))
    try:
        await asyncio.wait((fleet, batch), return_when=asyncio.FIRST_COMPLETED)
        if not batch.done():
            fleet.result()  # or the error that ended it
            raise ConfigError("the fleet has ended before the batch; run it again to go on")
        batch.result()
    finally:
        for task in (fleet, batch):
            task.cancel()
        await asyncio.gather(fleet, batch, return_exceptions=True)
        await launcher.stop()


async def _when_ready(url: asyncio.Future[str], settings: BatchSettings, files: BatchFiles) -> None:
    target = replace(settings.target, url=await url)
    await run_batch(replace(settings, target=target), files)


def _fleet_args(args: argparse.Namespace) -> argparse.Namespace:
    """As `baton serve` has them: nobody else knows of this fleet, so any free ports do."""
    parser = argparse.ArgumentParser()
    add_router_arguments(parser)
    router = vars(parser.parse_args(["--port", "0", "--control-port", "0"]))
    return argparse.Namespace(**{**vars(args), **router, "log_level": "warning"})


def _report(tally: Tally) -> int:
    """One line about all of it; the exit code."""
    _say(f"{tally.done - tally.failed} of {tally.total} lines answered, {tally.failed} failed")
    if tally.failed:
        _say(f"the first failure: {tally.first_failure or 'of an earlier run'}")
    if tally.failed == tally.total:
        return 1
    return _SOME_FAILED if tally.failed else 0


def _say(text: str) -> None:
    print(f"baton run-batch: {text}", file=sys.stderr, flush=True)
