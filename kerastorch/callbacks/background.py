"""Background: work that is done by a thread while training goes on, one thing at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Calls functions in a thread. It is there as long as one of them runs, and the process does not end before it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, function: Callable[[], None]) -> None:
        """Has a function called; `wait` comes before the next one."""
        self._thread = threading.Thread(target=self._call, args=(function,), name="kerastorch-background")
        self._thread.start()

    def wait(self) -> None:
        """Until the function has returned.

        Raises:
            Exception: what it raised, once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _call(self, function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:  # for the one who waits
            self._error = error
