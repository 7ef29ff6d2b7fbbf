"""SIGTERM and SIGINT: write down where the run is, and go.

The state of a run is a value, so another thread can write the last one down while the main thread is in the middle of
a step, and the process can end without unwinding it. The process is gone within `DEADLINE` seconds, whatever the main
thread does; a second signal ends it at once. Nothing written before is touched.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DEADLINE = 8.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def leaving(save: Callable[[], None], farewell: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, a signal has `save` called in a thread, `farewell` told how it went, and the process ended
    with code 128 + signal. To be entered in the main thread."""
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    old = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(woken, save, farewell), name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        wake.close()
        watcher.join()
        woken.close()


def _watch(woken: socket.socket, save: Callable[[], None], farewell: Callable[[str], None]) -> None:
    number = _next(woken)
    if number is None:
        return
    code = 128 + number
    saver = threading.Thread(target=_leave, args=(code, save, farewell), name="last checkpoint", daemon=True)
    saver.start()
    ready, _, _ = select.select([woken], [], [], DEADLINE)
    second = _next(woken) if ready else None
    if second is None and ready:
        saver.join(DEADLINE)
    os._exit(code if second is None else 128 + second)


def _next(woken: socket.socket) -> int | None:
    """The next of our signals; None once the block has ended."""
    while data := woken.recv(1):
        if data[0] in SIGNALS:
            return data[0]
    return None


def _leave(code: int, save: Callable[[], None], farewell: Callable[[str], None]) -> None:
    try:
        save()
        farewell("interrupted")
    except Exception as error:
        farewell(f"interrupted; {error}")
    finally:
        os._exit(code)
