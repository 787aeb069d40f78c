"""The environment: the only file that reads or changes it.

Processes are configured by flags. The environment only reaches libraries that know no other way.
"""

from __future__ import annotations

import os
from itertools import takewhile

_QUIET_LIBRARIES = {
    "OMP_WAIT_POLICY": "PASSIVE",  # a spinning pool slows its neighbours 2.5 times
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",  # a model is a folder; nothing is ever fetched
    "TRANSFORMERS_VERBOSITY": "error",
}

UCX_ENVIRONMENT = {
    "UCX_LOG_FILE": "stderr",  # not stdout, where a launcher reads who is ready
    "UCX_LOG_LEVEL": "fatal",  # else every peer that dies is an error
    "UCX_WARN_UNUSED_ENV_VARS": "n",  # else it warns of a variable that ucxx sets itself
}
"""UCX reads these when it is loaded and nowhere else; all other settings it is told by calls."""


def prepare_environment() -> None:
    """Settings that must stand before torch is imported; what the operator has set wins."""
    for name, value in (_QUIET_LIBRARIES | UCX_ENVIRONMENT).items():
        os.environ.setdefault(name, value)


def node_environment(threads: int) -> dict[str, str]:
    """The environment of a node process that may use `threads` compute threads."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment.setdefault(name, str(threads))
    return environment


def child_environment() -> dict[str, str]:
    """The environment of a process that computes nothing."""
    return dict(os.environ)


def visible_gpus() -> int | None:
    """How many GPUs CUDA_VISIBLE_DEVICES leaves; None where it is not set.

    CUDA stops at the first name that is none, and shows one slice (MIG) at most.
    """
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    known = list(takewhile(lambda name: name and name != "-1", names))
    return min(1, len(known)) if any(name.startswith("MIG-") for name in known) else len(known)
