"""The signals that ask a process to stop, and what they do where there is nothing to save."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask this process to stop: SIGHUP is not one where it is ignored, as `nohup` has it."""
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGTERM, signal.SIGINT, *hangup)


@contextmanager
def stopping_as_interrupts() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt within the block, as Ctrl-C does. Off the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pid = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != pid:
            die_of(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in stop_signals() if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None stands for a handler that was not installed by Python and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def die_of(number: int) -> None:
    """End this process, a forked child that inherited its parent's handlers, by the signal that it was sent."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
