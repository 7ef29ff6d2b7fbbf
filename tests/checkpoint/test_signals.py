"""What SIGTERM and SIGINT do. The scripts load no torch, so that a process takes no time to start."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_SCRIPT = """
import sys, time
from pathlib import Path
from esper.checkpoint import signals

signals.DEADLINE = 1.5

def save():
    time.sleep({slow})
    if {broken}:
        raise OSError("the disk is gone")
    Path({saved!r}).write_text("saved")

with signals.leaving(save, lambda what: print(what, flush=True)):
    print("ready", flush=True)
    {work}
print("left alone", flush=True)
"""


def start(tmp_path: Path, *, slow: float = 0.0, broken: bool = False, work: str = "time.sleep(60)") -> subprocess.Popen:
    script = _SCRIPT.format(slow=slow, broken=broken, saved=str(tmp_path / "saved"), work=work)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen) -> tuple[int, str, float]:
    begun = time.monotonic()
    # Not `communicate`, which forgets what came together with the first line.
    assert process.stdout is not None
    with process.stdout:
        said = process.stdout.read()
    return process.wait(timeout=20), said, time.monotonic() - begun


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("work", ["time.sleep(60)", "[i for i in iter(int, 1)]"], ids=["waiting", "computing"])
def test_a_signal_saves_and_ends_the_process(tmp_path: Path, number: int, code: int, work: str) -> None:
    process = start(tmp_path, work=work)
    process.send_signal(number)
    returned, said, _ = end(process)
    assert (returned, said) == (code, "interrupted\n")
    assert (tmp_path / "saved").exists()


def test_a_save_that_hangs_does_not_hold_the_process(tmp_path: Path) -> None:
    process = start(tmp_path, slow=60.0)
    process.send_signal(signal.SIGTERM)
    returned, said, seconds = end(process)
    assert (returned, said) == (143, "")
    assert 1.0 < seconds < 5.0


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, slow=60.0)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    returned, _, seconds = end(process)
    assert returned == 143
    assert seconds < 1.0
    assert not (tmp_path / "saved").exists()


def test_a_save_that_fails_is_said(tmp_path: Path) -> None:
    process = start(tmp_path, broken=True)
    process.send_signal(signal.SIGTERM)
    returned, said, _ = end(process)
    assert (returned, said) == (143, "interrupted; the disk is gone\n")


def test_without_a_signal_nothing_happens(tmp_path: Path) -> None:
    process = start(tmp_path, work="pass")
    assert end(process)[:2] == (0, "left alone\n")
    assert not (tmp_path / "saved").exists()
