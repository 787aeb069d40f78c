"""Why handoffs, attempts and units end badly: the one table of these names.

They are labels of metrics, words of messages and of `/debug/requests`. A name means one thing, and
nothing that another process says becomes a label unless it stands here.
"""

from __future__ import annotations

CAUSES = {
    # of handoffs, leases and attempts
    "committed": "the decode node verified every block and owns the request: no failure",
    "finished": "the first token ended the request, so nothing had to be committed: no failure",
    "expired": "the lease's TTL or the request's deadline passed; of a unit: its lease had ended",
    "revoked": "the router gave the attempt up, or is gone itself",
    "superseded": "a later attempt of the request is known",
    "rebound": "another prefill node fills the reservation from here on",
    "stale": "a block was given to somebody else meanwhile: its generation differs",
    "digest": "a unit's bytes are not what the prefill node sealed",
    "manifest": "the commit names other units or tokens than the lease",
    "transport": "the bytes could not be sent, or did not all come",
    "refused": "the claim, unit or grant is not the sender's or does not fit",
    "layout": "the two nodes cannot exchange blocks",
    "gone": "the other process has ended or forgotten the attempt",
    "drained": "the node shuts down or changes roles and hands back what it has",
    "capacity": "there are not enough free blocks",
    "too_long": "the request is more than the node can ever hold",
    "invalid": "the message asks for something that the model does not have",
    "internal": "a bug, told in the node's log",
    # of units alone
    "duplicate": "the unit was written before",
    "malformed": "the unit's header or size makes no sense",
    # of reservations
    "draining": "the node shuts down and takes nothing new",
    # what the router itself finds out about an attempt
    "aborted": "a node ended the attempt without a failure of its own",
    "divergence": "an attempt contradicted the tokens that the client has",
    "node_lost": "a node of the attempt died or stands still",
    "reserve_lost": "the same, before the reservation was answered",
    "reserve_timeout": "the decode node did not answer the reservation in time",
    "unreachable": "a node does not take messages",
    # whatever a peer says beyond this table
    "other": "a name that this table does not have",
}


def known_cause(cause: str) -> str:
    """`cause` if it stands in the table, else `other`: labels must not come from the network."""
    return cause if cause in CAUSES else "other"
