"""Windows of batches, made ahead in a background thread."""

import threading
from collections import deque
from typing import NamedTuple, Self

import torch

from fastdistil.data.batches import Batches, Counts, Window


class Made(NamedTuple):
    epoch: int
    update: int
    window: Window
    denominators: Counts


class Prefetched:
    """Iterates over (epoch, update, window, denominators), made ahead in a thread; a context manager. See `prefetched`."""

    def __init__(
        self, batches: Batches, epoch: int, update: int, epochs: int | None, windows: int, pin_for: torch.device | None
    ) -> None:
        self._batches, self._windows, self._pin_for = batches, windows, pin_for
        self._ready: deque[Made] = deque()
        self._changed = threading.Condition()
        self._closed = self._done = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(epoch, update, epochs), name="fastdistil-batches", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Made:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._done or self._closed)
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        """Drop what was made and wait until the thread is gone: at most until it has finished one window."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _work(self, epoch: int, update: int, epochs: int | None) -> None:
        try:
            if self._pin_for is not None:
                # The current device is a property of the thread; without this, pinning would open a context on device 0.
                torch.cuda.set_device(self._pin_for)
            while epochs is None or epoch < epochs:
                for number in range(update, self._batches.updates_per_epoch(epoch)):
                    window, denominators = self._batches.window(epoch, number)
                    if self._pin_for is not None:
                        window = [batch.pin_memory() for batch in window]
                    if not self._put(Made(epoch, number, window, denominators)):
                        return
                epoch, update = epoch + 1, 0
        except BaseException as error:  # noqa: BLE001  (whatever it is, the consumer has to hear of it)
            self._error = error
        finally:
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def _put(self, made: Made) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._windows or self._closed)
            if not self._closed:
                self._ready.append(made)
                self._changed.notify_all()
            return not self._closed


def prefetched(
    batches: Batches, epoch: int = 0, update: int = 0, *, epochs: int | None = None, pin_for: torch.device | None = None
) -> Prefetched:
    """Windows from (epoch, update) on, `data.prefetch` of them made ahead in a background thread.

    epochs: stop before this epoch; None: go on until closed. pin_for: a CUDA device; batches are page-locked, so that
    `Batch.to(device, non_blocking=True)` does not wait. What the thread raises is raised again by the iterator, in its turn.
    """
    return Prefetched(batches, epoch, update, epochs, batches.data.prefetch, pin_for)
