"""Epochs are verified before they are read, each while the one before it is in use."""

from collections.abc import Callable, Iterable
from threading import Thread
from typing import Any

from data.store.files import StoreError
from data.store.format import num_blocks

Shown = Callable[[Iterable[str], int, str], Iterable[str]]  # items, their number, what they are


class Verifier:
    """Verifies whole epochs of a store, each once, in threads of their own."""

    def __init__(self, store: Any) -> None:
        """`store` is a reader of either layout."""
        self._store = store
        self._begun: dict[int, tuple[Thread, list[Exception]]] = {}  # by epoch, with its fault

    def begin(self, epoch: int, shown: Shown = lambda items, total, what: items) -> None:
        """Verify an epoch in a thread, unless that was begun before."""
        if epoch not in self._begun:
            found: list[Exception] = []
            # which the end of the program does not wait for
            thread = Thread(target=self._verify, args=(epoch, shown, found), daemon=True)
            self._begun[epoch] = thread, found
            thread.start()

    def wait(self, epoch: int, shown: Shown) -> None:
        """Return when an epoch is verified, with a StoreError if it is not what was sealed."""
        self.begin(epoch, shown)
        thread, found = self._begun[epoch]
        thread.join()
        if found:
            raise found[0]

    def _verify(self, epoch: int, shown: Shown, found: list[Exception]) -> None:
        blocks = num_blocks(len(self._store))
        try:
            for fault in shown(self._store.faults(epoch), blocks, f"verifying epoch {epoch}"):
                if fault:
                    raise StoreError(fault)
        except Exception as error:  # is raised where the epoch is waited for
            found.append(error)
