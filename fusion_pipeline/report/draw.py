"""Which samples a report shows: drawn by hash, spread over strata, in bounded memory."""

import hashlib
from heapq import heappushpop
from itertools import zip_longest


class Draw:
    """Draws up to `size` keys from a stream of any length.

    The result depends on the set of (stratum, key) pairs and on the seed, not on their order.
    Every stratum is drawn from before any is drawn from again; of more strata than places, some
    are left out. A key may lie in several strata and is drawn once. Memory: O(size * size) keys.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._lots: dict[str, list[tuple[int, str]]] = {}  # heaps, the largest lot first
        self._order: dict[str, int] = {}

    def add(self, stratum: str, key: str) -> None:
        """Another candidate; the same one again changes nothing."""
        if self._size == 0:
            return
        if stratum not in self._lots:
            self._lots[stratum], self._order[stratum] = [], self._lot(stratum)
            if len(self._lots) > self._size:  # more strata than places: the last ones go
                last = max(self._order, key=lambda name: (self._order[name], name))
                del self._lots[last], self._order[last]
        lots = self._lots.get(stratum)
        lot = (-self._lot(key), key)
        if lots is None or lot in lots:
            return
        if len(lots) < self._size:
            lots.append(lot)
            lots.sort()
        else:
            heappushpop(lots, lot)

    def _lot(self, text: str) -> int:
        digest = hashlib.sha256(f"{self._seed}\0{text}".encode()).digest()
        return int.from_bytes(digest[:8], "big")

    def keys(self) -> list[str]:
        """The drawn keys: first one of each stratum, then a second one of each, ..."""
        strata = sorted(self._lots, key=lambda name: (self._order[name], name))
        columns = ([key for _, key in sorted(self._lots[name], reverse=True)] for name in strata)
        rounds = zip_longest(*columns)
        drawn = (key for keys in rounds for key in keys if key is not None)
        return list(dict.fromkeys(drawn))[: self._size]
