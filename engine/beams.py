"""Beam searches as rows of the common steps: forks share blocks, and copy the one they write to.

    prompt ............| beam 0 ....|..          full blocks: shared by reference, nobody writes
                       └ beam 1 ....|..          the last, partly filled block: each its own copy

A request with a beam search is one entry in every queue and takes as many seats as it has beams.
Once its prompt is computed, its search tells after each step which rows go on. Those that do not
are let go at once; a row that goes on twice is forked when the next step is planned, since only
the planner may take blocks. The copy is made at the beginning of that step, on the device.

A fork after the first needs no block that the rows let go did not leave: so many copies are made as
rows ended. Blocks of output are not published: few of them would be asked for again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.beam_search import BeamSearch, continuations, num_continuations
from engine.block_pool import BlockPool, Owner
from engine.config import EngineConfig
from engine.queues import Queues
from engine.request import BeamGroup, Request
from engine.stops import end_tokens
from wire.logprobs import Logprobs
from wire.types import Hypothesis


class Beams:
    """Begins, forks and ends the searches of one engine."""

    def __init__(
        self,
        config: EngineConfig,
        pool: BlockPool,
        queues: Queues,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._config = config
        self._pool = pool
        self._queues = queues
        self._eos_token_ids = eos_token_ids

    # ------------------------------------------------------------ the search

    def prepare(self, request: Request) -> None:
        """Say how many continuations of each row are wanted. ValueError for too many beams."""
        beam = request.sampling.beam
        if beam is None:
            return
        if request.width > self._queues.max_running:
            raise ValueError(f"request {request.request_id} has more beams than there are seats")
        ends = end_tokens(request.sampling, self._eos_token_ids)
        request.num_continuations = num_continuations(beam, ends)

    def first(self, request: Request, row: bytes) -> BeamSearch:
        """The search after its first step, whose continuations are in a packed `row`."""
        sampling = request.sampling
        assert sampling.beam is not None
        search = BeamSearch(
            sampling.beam,
            max_tokens=request.token_limit - request.num_prompt_tokens,
            min_tokens=sampling.min_tokens,
            end_tokens=end_tokens(sampling, self._eos_token_ids),
        )
        search.advance([continuations(row)])
        return search

    def begin(self, request: Request, row: bytes) -> tuple[Hypothesis, ...]:
        """Go on from the computed prompt; the results if the first step is the last."""
        search = self.first(request, row)
        if search.over:
            return self._end(request, search)
        table, request.block_table = request.block_table, []
        trunk = self._row(request, list(request.tokens), table)
        request.beams = BeamGroup(search, [trunk], [0] * len(search.running))
        return ()

    def advance(self, request: Request, logprobs: Mapping[str, Logprobs]) -> tuple[Hypothesis, ...]:
        """Enter a step's continuations; the results if it was the last."""
        group = request.beams
        assert group is not None
        for row in group.rows:
            row.num_computed_tokens = row.num_tokens
            row.copied_block = None
        rows = [continuations(logprobs[row.request_id].tokens[0]) for row in group.rows]
        parents = group.search.advance(rows)
        if group.search.over:
            return self._end(request, group.search)
        self._let_go(group, parents)
        return ()

    def _end(self, request: Request, search: BeamSearch) -> tuple[Hypothesis, ...]:
        self._queues.drop(request)
        return tuple(search.finished)

    def _let_go(self, group: BeamGroup, parents: Sequence[int]) -> None:
        """Free the rows that nothing continues."""
        alive = sorted(set(parents))
        for number, row in enumerate(group.rows):
            if number not in alive:
                self._queues.release_blocks(row, Owner.RUNNING)
        group.rows = [group.rows[number] for number in alive]
        group.parents = [alive.index(parent) for parent in parents]

    # ------------------------------------------------------------ the blocks

    def num_copies(self, group: BeamGroup) -> int:
        """Blocks that the fork, which is still to be made, will take."""
        if group.parents is None or not self._num_partial(group.rows[0]):
            return 0
        return len(group.parents) - len(group.rows)

    def fork(self, request: Request) -> None:
        """Make the rows be the search's beams; there are blocks for `num_copies`."""
        group = request.beams
        assert group is not None
        if group.parents is None:
            return
        rows: list[Request] = []
        for parent, beam in zip(group.parents, group.search.running, strict=True):
            row = group.rows[parent]
            token = beam.tokens[-1]
            if row in rows:
                rows.append(self._forked(request, row, token))
            else:
                row.tokens.append(token)
                rows.append(row)
        for number, row in enumerate(rows):
            row.request_id = f"{request.request_id}*{number}"
        group.rows, group.parents = rows, None

    def _forked(self, request: Request, row: Request, token: int) -> Request:
        """Another continuation of a row that one continues already."""
        num_computed = row.num_computed_tokens
        num_full = num_computed // self._config.block_size
        table = row.block_table[:num_full]
        self._pool.acquire(table, Owner.RUNNING)
        copied = None
        if self._num_partial(row):
            table += self._pool.allocate(1, Owner.RUNNING)
            copied = (row.block_table[num_full], table[-1])
        fork = self._row(request, [*row.tokens[:num_computed], token], table)
        fork.num_computed_tokens, fork.copied_block = num_computed, copied
        return fork

    def _num_partial(self, row: Request) -> int:
        return row.num_computed_tokens % self._config.block_size

    def _row(self, request: Request, tokens: list[int], table: list[int]) -> Request:
        return Request(
            request_id=request.request_id,
            tokens=tokens,
            num_prompt_tokens=request.num_prompt_tokens,
            sampling=request.sampling,
            max_num_tokens=request.max_num_tokens,
            cache_salt=request.cache_salt,
            block_table=table,
            block_hashes=request.block_hashes,  # of the prompt
            num_computed_tokens=len(tokens),
            num_continuations=request.num_continuations,
            beam_of=request,
        )
