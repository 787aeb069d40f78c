"""A simulated engine: the real scheduler, block pool and prefix cache, and time for a model.

Steps that only decode are not simulated one by one. While nothing can come in between, the node
knows when each of them ends; it looks at the clock only when somebody asks for its state, and skips
what has passed inside the scheduler:

    start        step ends |    |    |    |    |    |    |         end of the run
      |--------------------+----+----+----+----+----+----+----------------|
                                           ^ a request comes: the run ends with this step
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from baton.simulation.clock import VirtualClock
from baton.simulation.machine import SharedMachine
from baton.simulation.setup import Setup
from engine.block_pool import BlockPool
from engine.plan import RequestProgress, StepPlan, StepShape
from engine.prefix_cache import CacheChanges, PrefixCache
from engine.request import Request
from engine.reservations import Reservation
from engine.scheduler import Scheduler
from tuner.latency import StepWork
from wire.types import NodeId, NodeLoad, StepSums

FINGERPRINT = "simulated"
OnProgress = Callable[[RequestProgress], None]


@dataclass(slots=True)
class _Run:
    """Steps that only decode, from `start` on."""

    start: float
    num_steps: int
    batch: int
    context: int  # of the first step
    num_done: int = 0


class SimulatedEngine:
    """What a node's engine does, and when. Whoever owns it hears of each request's progress."""

    def __init__(
        self,
        id: NodeId,
        setup: Setup,
        clock: VirtualClock,
        machine: SharedMachine | None,
        on_progress: OnProgress,
    ) -> None:
        """With a `machine` it computes slower while others there do; then steps are not skipped."""
        config = setup.engine
        self.id = id
        self.config = config
        self.busy_s = 0.0
        self.num_steps = 0
        self.step_began = 0.0
        self._sums_up = setup.tuning is not None  # nobody else looks at them
        self._prefill_steps = self._decode_steps = StepSums()
        self._machine = machine
        self._overheads = setup.overheads
        self._model = setup.step_model
        self._clock = clock
        self._on_progress = on_progress
        self._pool = BlockPool(config.num_blocks, epoch=1)
        self._cache = PrefixCache(
            self._pool, config.block_size, FINGERPRINT, enabled=config.enable_prefix_caching
        )
        self._scheduler = Scheduler(config, self._pool, self._cache, frozenset())
        self._run: _Run | None = None
        self._stepping = False
        self._stopped = False
        self._turn = 0  # actions that were set for an earlier one are void

    # ------------------------------------------------------------ what nodes ask of it

    def add(self, request: Request, *, only_with_room: bool = False) -> None:
        self._catch_up()
        self._scheduler.add(request, only_with_room=only_with_room)
        self._wake()

    def reserve(self, tokens: tuple[int, ...], most: int, hashes: list[bytes]) -> Reservation:
        self._catch_up()
        return self._scheduler.reserve(tokens, most, hashes)

    def rebind(self, reservation: int, tokens: tuple[int, ...], hashes: list[bytes]) -> Reservation:
        self._catch_up()
        return self._scheduler.rebind(reservation, tokens, hashes)

    def adopt(self, reservation: int, request: Request) -> None:
        self._catch_up()
        self._scheduler.adopt(reservation, request)
        self._wake()

    def cancel_reservation(self, reservation: int) -> None:
        self._catch_up()
        self._scheduler.cancel_reservation(reservation)
        self._wake()

    def abort(self, request_id: str) -> None:
        self._catch_up()
        self._scheduler.abort(request_id)
        self._wake()

    def load(self) -> NodeLoad:
        self._catch_up()
        load = self._scheduler.load(self.num_steps)
        if not self._sums_up:
            return load
        return replace(load, prefill_steps=self._prefill_steps, decode_steps=self._decode_steps)

    def take_cache_events(self) -> CacheChanges:
        return self._cache.take_events()

    @property
    def stopped(self) -> bool:
        return self._stopped

    def stop(self) -> None:
        """The node is dead: nothing happens here any more."""
        self._stopped = True
        self._turn += 1

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()

    # ------------------------------------------------------------ time

    def _set(self, time: float, action: Callable[[], None]) -> None:
        """Do `action` at `time`, unless something else is set before."""
        self._turn += 1
        turn = self._turn

        def act() -> None:
            if turn == self._turn:
                action()

        self._clock.at(time, act)

    def _wake(self) -> None:
        """There may be something new to schedule: begin, or let a run end with its present step."""
        if self._stopped or self._stepping:
            return
        if self._run is None:
            self._begin()
        elif self._run.num_done + 1 < self._run.num_steps:
            self._run.num_steps = self._run.num_done + 1
            self._set(self._end_of(self._run.num_steps), self._run_over)

    def _begin(self) -> None:
        """The next step, or the next run of steps that only decode."""
        if num_steps := self._num_plain_steps():
            batch, context = self._scheduler.num_running, self._scheduler.num_running_tokens
            self._run = _Run(self._clock.now, num_steps, batch, context)
            self._set(self._end_of(num_steps), self._run_over)
            return
        if not self._scheduler.has_work:
            return
        plan = self._scheduler.plan()
        if plan.scheduled:
            self._stepping = True
            self.step_began = self._clock.now
            self._compute(StepWork(*plan.shape), lambda: self._step_over(plan))

    def _num_plain_steps(self) -> int:
        if self.config.kv_overcommit > 1 or self._machine is not None:
            return 0
        return self._scheduler.num_plain_steps()

    def _compute(self, work: StepWork, done: Callable[[], None]) -> None:
        seconds = self._model.step_s(work)
        if self._machine is None:
            self._set(self._clock.now + seconds, done)
            return
        over = self._overheads
        slowdown = over.prefill_slowdown if work.prefill_tokens else over.decode_slowdown
        self._machine.compute(seconds, slowdown, done)

    def _step_over(self, plan: StepPlan) -> None:
        if self._stopped:
            return
        seconds = self._clock.now - self.step_began
        self.busy_s += seconds
        if self._sums_up:
            self._sum_up(plan.shape, seconds)
        tokens = [item.request.tokens[-1] for item in plan.scheduled if item.samples]
        self.num_steps += 1
        progress = self._scheduler.commit(plan, tokens)
        for one in progress:
            if one.new_tokens or one.finished_blocks:
                self._on_progress(one)
        self._stepping = False
        if not self._stopped:
            self._begin()

    def _sum_up(self, work: StepShape, seconds: float) -> None:
        """As `node.stats` does: steps of both kinds at once do not tell what took the time."""
        if not work.decode_batch:
            sums = self._prefill_steps
            self._prefill_steps = sums.plus(work.prefill_tokens, work.prefill_squares, seconds)
        elif not work.prefill_tokens:
            sums = self._decode_steps
            self._decode_steps = sums.plus(work.decode_context, work.decode_batch, seconds)

    # ------------------------------------------------------------ runs

    def _end_of(self, num_steps: int) -> float:
        run = self._run
        assert run is not None
        return run.start + self._model.decode_steps_s(num_steps, run.batch, run.context)

    def _run_over(self) -> None:
        assert self._run is not None
        ended = self._skip_to(self._run.num_steps)
        self._run = None
        for progress in ended:
            self._on_progress(progress)
        self._begin()

    def _catch_up(self) -> None:
        """Bring the scheduler to the present; the run's last step, which may end requests, is
        over with the run.
        """
        run = self._run
        if run is None or self._clock.now < self._end_of(run.num_done + 1):
            return
        low, high = run.num_done + 1, run.num_steps - 1  # `low` steps are over
        if low > high:
            return
        while low < high:
            middle = (low + high + 1) // 2
            if self._end_of(middle) <= self._clock.now:
                low = middle
            else:
                high = middle - 1
        self._skip_to(low)

    def _skip_to(self, num_done: int) -> tuple[RequestProgress, ...]:
        run = self._run
        assert run is not None
        seconds = self._end_of(num_done) - self._end_of(run.num_done)
        steps = num_done - run.num_done
        self.busy_s += seconds
        self.num_steps += steps
        if self._sums_up:
            grown = steps * (run.num_done + num_done - 1) // 2  # by a token per request and step
            context = run.context * steps + run.batch * grown
            self._decode_steps = self._decode_steps.plus(context, run.batch * steps, seconds, steps)
        run.num_done = num_done
        return self._scheduler.skip_plain_steps(steps)
