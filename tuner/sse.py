"""Server-sent events out of a byte stream, however the network has cut it.

Follows "interpreting an event stream" of the HTML standard as far as a client of this API needs it:
the `data` lines of an event are joined by newlines, comments (`: …`) and other fields are skipped.
"""

from __future__ import annotations

MAX_EVENT_BYTES = 16 << 20


class SseError(ValueError):
    """The stream is not one of server-sent events, or one event is too large."""


class SseParser:
    """Feed bytes, get the data of the events that they complete."""

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._line = bytearray()  # the line not yet ended
        self._data: list[bytes] = []  # data lines of the event not yet ended
        self._num_bytes = 0  # held in `_data`
        self._after_cr = False  # the last byte was CR: an LF that follows belongs to it
        self._at_start = True  # a byte order mark may still come

    def feed(self, chunk: bytes) -> list[str]:
        """The data of each event that `chunk` completes, in order.

        Raises:
            SseError: an event exceeds the limit or is not UTF-8.
        """
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._after_cr = False
        if not chunk:
            return []
        self._after_cr = chunk.endswith(b"\r")
        *ended, rest = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        events = [data for part in ended if (data := self._end_line(part)) is not None]
        self._line += rest
        self._check_size()
        return events

    def _end_line(self, part: bytes) -> str | None:
        """Complete the current line with `part`; an empty line ends the event."""
        self._line += part
        line = bytes(self._line)
        self._line.clear()
        if self._at_start:
            line = line.removeprefix(b"\xef\xbb\xbf")
            self._at_start = False
        if not line:
            return self._end_event()
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._num_bytes += len(value) + 1  # an empty line costs memory too
            self._check_size()
        return None

    def _end_event(self) -> str | None:
        data = b"\n".join(self._data)
        self._data.clear()
        self._num_bytes = 0
        try:
            return data.decode() or None
        except UnicodeDecodeError as error:
            raise SseError(f"an event is not UTF-8: {error}") from error

    def _check_size(self) -> None:
        if self._num_bytes + len(self._line) > self._max_event_bytes:
            raise SseError(f"an event is larger than {self._max_event_bytes} bytes")
