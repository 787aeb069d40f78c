"""How two processes of one host meet: an abstract Unix socket over which one pool is given away.

    hello   [magic 8][bytes of the pool u64][bytes of the greeting u32][greeting: an envelope]
            with the pool's descriptor

The envelope says who speaks to whom, and which version of the protocol.

The address names the host, and both sides look at the other's user, because an abstract name can be
seen and taken by everybody.
"""

from __future__ import annotations

import array
import os
import re
import secrets
import socket
import struct
from collections.abc import Iterable

from kvtransfer.device_pool import ForeignPool, OpenPool, Pool
from kvtransfer.shared_memory import host_id
from wire.codec import Envelope, decode, encode
from wire.errors import MalformedMessage, TransferError
from wire.handoff_messages import RenewLeases
from wire.types import NodeId

HELLO = struct.Struct("<8sQI")
MAGIC = b"baton-k1"
MAX_PEERS = 256
_MAX_GREETING_BYTES = 4096
_URL = re.compile(r"(?:shm|cuda-ipc)://([0-9a-f.-]{1,80})/([0-9a-f]{32})")


def listen(scheme: str) -> tuple[socket.socket, str]:
    """A new listening socket, and its address for processes of this host."""
    name = secrets.token_hex(16)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener.bind(_abstract(name))
    listener.listen(MAX_PEERS)
    return listener, f"{scheme}://{host_id()}/{name}"


def is_here(url: str) -> bool:
    """Whether `url` is a socket of this host. Raises TransferError if it is no address at all."""
    found = _URL.fullmatch(url)
    if found is None:
        raise TransferError("transport", f"{url!r} is not an address of this transport")
    return found[1] == host_id()


def connect(url: str, me: NodeId, to: NodeId, pool: Pool) -> socket.socket:
    """Connect and give the pool away. Never waits: an abstract socket answers at once."""
    if not is_here(url):
        raise TransferError("transport", f"{url} is another host")
    try:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise TransferError("transport", f"cannot open a socket: {error.strerror}") from error
    try:
        peer.connect(_abstract(url.rpartition("/")[2]))
        if not same_user(peer):
            raise TransferError("transport", f"{url} belongs to another user")
        descriptors = array.array("i", [pool.descriptor])
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)
        greeting = encode(Envelope(me, to, RenewLeases(())))
        peer.sendmsg([HELLO.pack(MAGIC, len(pool), len(greeting)), greeting], [rights])
    except OSError as error:
        peer.close()
        raise TransferError("transport", f"cannot connect to {url}: {error.strerror}") from error
    except TransferError:
        peer.close()
        raise
    return peer


def receive_pool(connection: socket.socket, open_pool: OpenPool) -> tuple[Envelope, ForeignPool]:
    """Take what the first message brings: who it is from, and his pool.

    Raises:
        WireError: it is no hello, or what it brings is no pool.
        OSError: nothing came (yet).
    """
    room = socket.CMSG_SPACE(4 * array.array("i").itemsize)
    data, ancillary, flags, _ = connection.recvmsg(HELLO.size, room, socket.MSG_CMSG_CLOEXEC)
    descriptors = [fd for message in ancillary for fd in _descriptors(message)]
    try:
        if not data:
            raise ConnectionResetError("it was closed")
        if flags & socket.MSG_CTRUNC or len(descriptors) != 1 or len(data) != HELLO.size:
            raise MalformedMessage("no hello with one descriptor")
        magic, num_bytes, greeting_bytes = HELLO.unpack(data)
        if magic != MAGIC or not 0 < greeting_bytes <= _MAX_GREETING_BYTES:
            raise MalformedMessage("another protocol")
        greeting = decode(connection.recv(greeting_bytes))
        try:
            return greeting, open_pool(descriptors[0], num_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise MalformedMessage(f"the pool cannot be mapped: {error}") from error
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _descriptors(message: tuple[int, int, bytes]) -> Iterable[int]:
    level, kind, data = message
    if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS):
        return ()
    found = array.array("i")
    found.frombytes(data[: len(data) // found.itemsize * found.itemsize])
    return found


def _abstract(name: str) -> bytes:
    """The address of a socket without a file, in this network namespace."""
    return b"\0baton-kv-" + name.encode()


def same_user(peer: socket.socket) -> bool:
    credentials = struct.Struct("3i")  # process, user, group
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    return bool(credentials.unpack(raw)[1] == os.getuid())
