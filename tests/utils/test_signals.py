"""Signals in blocks of the main thread, which get them back as they were, and in threads, which handle none."""

import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import pytest

from pra.utils.signals import ENDS, STOPS, Interrupted, caught_signals, deferred, ended_by_sigterm, handled
from studies.run import ending


def handlers():
    return [signal.getsignal(number) for number in STOPS]


def test_a_handler_holds_in_its_block_only():
    before, seen = handlers(), []

    def work():
        with handled(STOPS, lambda signum, _: seen.append(signum)):
            for number in STOPS:
                signal.raise_signal(number)
            with handled((signal.SIGINT,), signal.SIG_IGN):
                signal.raise_signal(signal.SIGINT)
            raise MemoryError

    with pytest.raises(MemoryError):
        work()
    assert seen == [*STOPS]
    assert handlers() == before


def test_a_block_ends_by_sigterm_where_nothing_else_is_arranged():
    before, seen = handlers(), []
    with handled((signal.SIGTERM,), signal.SIG_DFL):
        for number in ENDS:  # SIGHUP comes when a terminal is closed
            with pytest.raises(SystemExit) as ended, ended_by_sigterm():
                signal.raise_signal(number)
            assert ended.value.code == 128 + number
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with handled((signal.SIGTERM,), lambda signum, _: seen.append(signum)), ended_by_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert seen == [signal.SIGTERM]
    with handled((signal.SIGHUP,), signal.SIG_IGN), caught_signals() as caught:  # as nohup leaves it
        signal.raise_signal(signal.SIGHUP)
    assert caught.received == []
    assert handlers() == before


def test_signal_ends_what_may_be_left_and_nothing_else():
    done = []

    def wait():
        signal.raise_signal(signal.SIGTERM)
        time.sleep(1000)

    with caught_signals() as caught:
        assert caught.until_signal(lambda: 3) == 3
        assert caught.until_signal(wait) is None
        assert caught.until_signal(lambda: done.append("not begun")) is None
        signal.raise_signal(signal.SIGHUP)
        done.append("all")
    assert (done, caught.received) == (["all"], [signal.SIGTERM, signal.SIGHUP])


def test_signal_deferred_comes_at_the_end_of_the_block():
    done = []

    def work():
        with deferred():
            signal.raise_signal(signal.SIGINT)
            done.append("all")

    with handled((signal.SIGINT,), signal.default_int_handler):  # a shell's background job ignores it
        before = handlers()
        with pytest.raises(KeyboardInterrupt):
            work()
        assert (done, handlers()) == (["all"], before)


def test_a_study_ends_by_a_signal_with_its_processes():
    before = handlers()
    with pytest.raises(Interrupted) as ended, ProcessPoolExecutor(1) as pool, ending(pool):
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.signum == signal.SIGTERM
    assert handlers() == before
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(int)


BLOCKS = {
    "any": lambda: handled(STOPS, signal.SIG_IGN),
    "training": caught_signals,
    "evaluation": ended_by_sigterm,
    "study": lambda: ending(ProcessPoolExecutor(1)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_thread_of_a_notebook_works_without_them(name):
    before, found = handlers(), []

    def work():
        with BLOCKS[name]():
            found.append(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert found == [before]
