"""The thread that runs the engine's steps, and nothing else.

The event loop adds and aborts requests under the engine's own lock, then calls `wake`; results go
back to the loop in order. Between steps the thread sleeps on a condition, so an idle node costs
nothing.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from engine.device import first_line, is_broken
from engine.engine import Engine
from engine.grammar import GrammarError
from engine.plan import OnLayers, StepResult

log = logging.getLogger(__name__)

_MAX_FAILURES = 5  # steps in a row that may fail before the node gives up


class EngineThread:
    """Owns the engine's step loop.

    Args:
        on_start: called in the thread, before its first step.
        on_result: called in the event loop after every step.
        on_layers: called in the event loop in the middle of a step (see Engine.step).
        on_failure: called in the event loop when a step raised, with the error and the ids of the
            requests to blame, which must be ended there; the next step waits for that.
        on_death: called in the event loop, with why, when steps keep failing or the device is lost.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_result: Callable[[StepResult], None],
        on_layers: OnLayers,
        on_failure: Callable[[Exception, tuple[str, ...]], None],
        on_death: Callable[[str], None],
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._on_result = on_result
        self._on_layers = on_layers
        self._on_failure = on_failure
        self._on_death = on_death
        self._on_start = on_start
        self._loop = asyncio.get_running_loop()
        self._wakeup = threading.Condition()
        self._woken = False
        self._idle = True
        self._failing = False  # a failure is not handled yet
        self._stopping = False
        self._last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There may be work now."""
        with self._wakeup:
            if self._idle and not self._woken:
                self._last_progress = time.monotonic()  # there was nothing to do until now
            self._woken = True
            self._wakeup.notify()

    def stop(self) -> None:
        """End after the current step."""
        with self._wakeup:
            self._stopping = True
            self._wakeup.notify()
        self._thread.join(timeout=30)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def stalled_s(self) -> float:
        """For how long there has been work without a finished step."""
        if not self._engine.has_work():
            return 0.0
        return max(0.0, time.monotonic() - self._last_progress)

    def _run(self) -> None:
        self._on_start()
        failures = 0
        while failures < _MAX_FAILURES and self._wait_for_work():
            began = time.monotonic()
            try:
                result = self._engine.step(partial(self._post, self._on_layers))
            except Exception as error:
                if is_broken(error):
                    self._post(self._on_death, f"the device is lost: {first_line(error)}")
                    return
                log.exception("a step failed")
                failures += not isinstance(error, GrammarError)  # its request's, not the engine's
                self._tell_failure(error)
                continue
            failures = 0
            self._last_progress = time.monotonic()
            if result is not None:
                seconds = self._last_progress - began
                self._post(self._on_result, replace(result, seconds=seconds))
            else:
                self._rest()
        if failures >= _MAX_FAILURES:
            self._post(self._on_death, "the engine fails at every step")

    def _wait_for_work(self) -> bool:
        """Sleep until there is work; False when the thread must end."""
        while not self._engine.has_work():
            with self._wakeup:
                self._idle = True
                self._wakeup.wait_for(lambda: self._woken or self._stopping)
                self._idle = self._woken = False
            if self._stopping:
                return False
        return not self._stopping

    def _tell_failure(self, error: Exception) -> None:
        """Wait until the loop has ended the requests to blame: they would fail again."""
        self._failing = True
        blamed = self._engine.step_request_ids  # any of them may have been it
        if isinstance(error, GrammarError):
            blamed = error.request_ids
        self._post(self._handle_failure, error, blamed)
        with self._wakeup:
            self._wakeup.wait_for(lambda: not self._failing or self._stopping)

    def _handle_failure(self, error: Exception, request_ids: tuple[str, ...]) -> None:
        try:
            self._on_failure(error, request_ids)
        finally:
            with self._wakeup:
                self._failing = False
                self._wakeup.notify()

    def _rest(self) -> None:
        """Work that cannot run now (no free block): wait for an event, or look again soon."""
        with self._wakeup:
            self._wakeup.wait_for(lambda: self._woken or self._stopping, timeout=0.01)
            self._woken = False

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *args)
