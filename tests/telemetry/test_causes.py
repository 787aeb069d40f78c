"""Causes: one table, closed against what peers say, and complete over what the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from telemetry.causes import CAUSES, known_cause

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kvtransfer", "node", "prefill_node", "decode_node", "router")
SAYS_A_CAUSE = {
    "TransferError",
    "AttemptFailed",
    "AttemptEnded",
    "LeaseEnded",
    "ReleaseLease",
    "Refused",
    "abort",
    "fail",
    "fail_all",
    "end_unit",
    "_end",
    "_drop",
    "_fail",
    "_fail_pending",
    "_fail_running",
    "_fail_those",
    "_refuse",
    "_attempt_over",
}


def said() -> dict[str, str]:
    """Every literal cause in the code, and where it stands."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    for cause in _causes(node):
                        found[cause] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def _causes(call: ast.Call) -> list[str]:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name not in SAYS_A_CAUSE:
        return []
    values = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
    return [v for v in values if isinstance(v, str) and re.fullmatch(r"[a-z_]+", v)]


def test_every_cause_that_the_code_says_stands_in_the_table() -> None:
    found = said()
    assert {"digest", "stale", "expired", "gone", "drained", "unreachable"} <= found.keys()
    missing = {cause: where for cause, where in found.items() if cause not in CAUSES}
    assert not missing


def test_a_peers_own_word_becomes_no_label() -> None:
    assert known_cause("digest") == "digest"
    assert known_cause("user-42 was here") == "other"
    assert "other" in CAUSES
