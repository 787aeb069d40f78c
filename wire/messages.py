"""Every message that two processes exchange, and its tag.

    router ◀── fleet_messages, request_messages ──▶ node ◀── handoff_messages ──▶ node

`docs/protocol.md` tells the story; `TAGS` is the table. A tag is never used twice.
"""

from __future__ import annotations

from typing import TypeAlias

from wire.fleet_messages import (
    CacheEvents,
    Draining,
    FetchCacheSnapshot,
    FetchTokenizer,
    Gone,
    Goodbye,
    Heartbeat,
    Register,
    RouterHeartbeat,
    SwitchRefused,
    SwitchRole,
    TokenizerFiles,
    Unwelcome,
    Welcome,
)
from wire.handoff_messages import (
    Commit,
    Committed,
    LeaseEnded,
    ReleaseLease,
    RenewLeases,
    UnitHeader,
    UnitsReceived,
)
from wire.request_messages import (
    Abort,
    Ack,
    AttemptFailed,
    BeamsFound,
    Embedding,
    Generate,
    Granted,
    HandoffDone,
    Prefill,
    Rebind,
    Refused,
    Resend,
    Reserve,
    Tokens,
)

PROTOCOL_VERSION = 2

Message: TypeAlias = (
    Register
    | Welcome
    | Unwelcome
    | Heartbeat
    | RouterHeartbeat
    | Draining
    | Goodbye
    | Gone
    | FetchTokenizer
    | TokenizerFiles
    | CacheEvents
    | FetchCacheSnapshot
    | SwitchRole
    | SwitchRefused
    | Reserve
    | Rebind
    | Granted
    | Refused
    | Prefill
    | Tokens
    | AttemptFailed
    | Abort
    | Ack
    | Resend
    | HandoffDone
    | Embedding
    | BeamsFound
    | Generate
    | UnitHeader
    | UnitsReceived
    | Commit
    | Committed
    | LeaseEnded
    | ReleaseLease
    | RenewLeases
)

TAGS: dict[int, type[Message]] = {
    1: Register,
    2: Welcome,
    3: Unwelcome,
    4: Heartbeat,
    5: RouterHeartbeat,
    6: Draining,
    7: Goodbye,
    8: Gone,
    9: FetchTokenizer,
    10: TokenizerFiles,
    11: CacheEvents,
    12: FetchCacheSnapshot,
    13: SwitchRole,
    14: SwitchRefused,
    20: Reserve,
    21: Granted,
    22: Refused,
    23: Prefill,
    24: Tokens,
    25: AttemptFailed,
    26: Abort,
    27: Ack,
    28: Resend,
    29: Rebind,
    30: HandoffDone,
    31: Embedding,
    32: BeamsFound,
    33: Generate,
    40: UnitHeader,
    41: UnitsReceived,
    42: Commit,
    43: Committed,
    44: LeaseEnded,
    45: ReleaseLease,
    46: RenewLeases,
}
