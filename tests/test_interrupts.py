"""Signals and readers that go away: the unit in hand is finished, a second wish is granted at once."""

import io
import os
import signal
import sys
import threading

import pytest

from sd_hyena import interrupts
from sd_hyena.interrupts import Interrupted

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
pytestmark = pytest.mark.reliability(10)


@pytest.fixture(autouse=True)
def _as_in_a_terminal():
    """What runs in the background ignores SIGINT."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_a_unit_at_once_and_within_after_it(number, caplog):
    done = []
    with interrupts.handled():
        with pytest.raises(Interrupted) as wish:
            signal.raise_signal(number)
        assert wish.value.number == number
    with interrupts.handled():
        caplog.set_level("INFO")
        with pytest.raises(Interrupted), interrupts.unit("picture"):  # noqa: PT012
            signal.raise_signal(number)
            done.append(1)
        assert done == [1]
        assert "stopping after this picture" in caplog.text
    assert interrupts.asked() == 0
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_second_signal_ends_the_unit_and_a_third_does_not_disturb_what_cleans_up():
    cleaned = []
    with interrupts.handled(), pytest.raises(Interrupted), interrupts.unit("step"):  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(1)
    assert cleaned == [1]


def test_a_second_signal_waits_for_what_has_no_name(caplog):
    caplog.set_level("INFO")
    done = []
    with interrupts.handled(), pytest.raises(Interrupted), interrupts.unit("file"):  # noqa: PT012
        with interrupts.unit():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            done.append("short")
        done.append("file")
    assert done == ["short", "file"]
    assert not caplog.records


def test_a_unit_that_looks_for_itself_is_not_ended():
    with interrupts.handled():
        with interrupts.deferred("step") as asked:
            signal.raise_signal(signal.SIGHUP)
            assert asked() == signal.SIGHUP
        assert interrupts.asked() == signal.SIGHUP


def test_what_is_ignored_stays_so_and_other_threads_leave_signals_alone():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    seen = []

    def elsewhere():
        with interrupts.handled():
            seen.append(signal.getsignal(signal.SIGTERM))

    with interrupts.handled():
        signal.raise_signal(signal.SIGHUP)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


class Gone(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left")])
def test_output_that_cannot_be_written(monkeypatch, error):
    monkeypatch.setattr(sys, "stdout", Gone(error))
    done, wishes = [], []
    with interrupts.guarded_output(), interrupts.handled():
        try:
            with interrupts.unit("step"):
                print("a line")
                done.append(1)
        except Interrupted as wish:
            wishes.append(wish.number)
    assert done == [1]
    assert wishes == ([signal.SIGPIPE] if isinstance(error, BrokenPipeError) else [])


def test_a_reader_that_is_gone_is_not_written_to_again(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with interrupts.guarded_output(), interrupts.handled():
            with pytest.raises(Interrupted):
                print("a line", flush=True)
            print("another", flush=True)  # goes nowhere
