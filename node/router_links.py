"""The routers of one node: those it was given, and those that work beside one of them.

Routers that share an HTTP port (`baton router --workers N`) tell all their control ports in each
Welcome, and the node connects to the others by itself, on the host where it found the first one. An
operator names one address, whatever N is. A port that is told no longer is given up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from node.router_link import RouterLink
from wire.fleet_messages import Goodbye

log = logging.getLogger(__name__)


class RouterLinks:
    """Args:
    on_lost: called with a registered link that is given up.
    """

    def __init__(self, on_lost: Callable[[RouterLink], None]) -> None:
        self._on_lost = on_lost
        self._connect: Callable[[str], RouterLink]
        self._links: dict[str, RouterLink] = {}
        self._told_by: dict[str, str] = {}  # url of a router nobody gave → of the one that told it
        self._num_malformed = 0  # of links that were given up

    def open(self, urls: Sequence[str], connect: Callable[[str], RouterLink]) -> None:
        """Connect to these, and with `connect` to those that they tell."""
        self._connect = connect
        for url in urls:
            if url not in self._links:
                self._links[url] = connect(url)

    def __iter__(self) -> Iterator[RouterLink]:
        return iter(list(self._links.values()))  # a Welcome may change them at any time

    @property
    def all_registered(self) -> bool:
        return all(link.registered for link in self._links.values())

    @property
    def any_registered(self) -> bool:
        return any(link.registered for link in self._links.values())

    @property
    def num_malformed(self) -> int:
        return self._num_malformed + sum(link.num_malformed for link in self._links.values())

    def welcomed(self, link: RouterLink) -> None:
        """Connect to the routers that `link`'s has told, give up those that it tells no more."""
        host = link.url.rpartition(":")[0]
        told = [f"{host}:{port}" for port in link.control_ports]
        for url in told:
            if url not in self._links:
                log.info("router %s works beside %s", url, link.url)
                self._links[url] = self._connect(url)
                self._told_by[url] = link.url
        for url in [u for u, by in self._told_by.items() if by == link.url and u not in told]:
            self._give_up(url)

    def close(self) -> None:
        for link in self._links.values():
            link.close()

    def _give_up(self, url: str) -> None:
        log.info("router %s is no more", url)
        del self._told_by[url]
        link = self._links.pop(url)
        if link.registered:
            link.send(Goodbye())
            self._on_lost(link)
        self._num_malformed += link.num_malformed
        link.close()
