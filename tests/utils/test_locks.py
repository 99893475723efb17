"""Two commands never fill one folder at the same time."""

import errno
import multiprocessing
import os
import shutil
import signal
import time

import pytest
from support.files import contents
from support.refusal import refused

from pra.utils.locks import LOCK, holder_of, locked

FORK = multiprocessing.get_context("fork")
fcntl = pytest.importorskip("fcntl", reason="the locks of Unix")


def test_locked_folder_refuses_a_second_holder(tmp_path):
    (tmp_path / "file").write_text("kept")
    before = contents(tmp_path)
    with locked(tmp_path, "trained", "wait"):
        assert holder_of(tmp_path) == f"process {os.getpid()} on {os.uname().nodename}"
        refused(lambda: locked(tmp_path, "filled", "wait").__enter__(), str(os.getpid()), code="busy", path=tmp_path)
    assert contents(tmp_path) == before
    assert holder_of(tmp_path) is None
    (tmp_path / LOCK).write_text("process 1 on elsewhere")  # left behind
    with locked(tmp_path, "trained", "wait"):
        assert str(os.getpid()) in (holder_of(tmp_path) or "")
    with locked(tmp_path / "new" / "run", "trained", "wait"):
        assert (tmp_path / "new" / "run" / LOCK).exists()
    assert not (tmp_path / "new").exists()  # it was made, and stayed empty


def hold(folder, pipe):
    with locked(folder, "trained", "wait"):
        if worker := os.fork():
            pipe.send(worker)
        time.sleep(60)


def test_locked_after_the_holder_was_killed(tmp_path):
    """A forked worker that outlives its parent does not keep the lock."""
    holder = FORK.Process(target=hold, args=(tmp_path, (pipe := FORK.Pipe())[1]))
    holder.start()
    worker = pipe[0].recv()
    try:
        holder.kill()
        holder.join()
        with locked(tmp_path, "trained", "wait"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_locked_holds_where_a_file_goes_between_two_calls(tmp_path, monkeypatch):
    """The former holder ends, and removes the file, after it was opened and before it is locked."""
    original, calls = fcntl.flock, [0]

    def flock(descriptor, how):
        calls[0] += 1
        if calls[0] == 1:
            (tmp_path / LOCK).unlink()
        original(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path, "trained", "wait"):
        assert (tmp_path / LOCK).exists()
        refused(lambda: locked(tmp_path, "filled", "wait").__enter__(), code="busy")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_locked_without_locks_warns_and_leaves_none(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=os.strerror(code)), locked(tmp_path, "trained", "wait"):
        pass
    assert contents(tmp_path) == {}


def test_locked_leaves_the_lock_of_a_later_holder(tmp_path):
    """The block removes its folder, and another command makes and locks it before the block ends."""
    folder = tmp_path / "out"
    first = locked(folder, "filled", "wait")
    first.__enter__()
    shutil.rmtree(folder)
    with locked(folder, "filled", "wait"):
        first.__exit__(None, None, None)
        refused(lambda: locked(folder, "filled", "wait").__enter__(), code="busy")


def test_locked_leaves_a_lock_that_it_may_not_open(tmp_path, monkeypatch):
    (tmp_path / LOCK).write_text("process 7 on elsewhere")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / LOCK))

    monkeypatch.setattr("pra.utils.locks.FileLock.acquire", refuse)
    with pytest.warns(UserWarning, match="Permission denied"), locked(tmp_path, "trained", "wait"):
        pass
    assert holder_of(tmp_path) == "process 7 on elsewhere"


def test_lock_that_is_not_a_file_is_refused(tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "run").mkdir()
    for make in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "mine"), lambda path: path.symlink_to("/dev/zero")):
        make(tmp_path / "run" / LOCK)
        do = locked(tmp_path / "run", "trained", "wait").__enter__
        refused(do, code="unwritable", path=tmp_path / "run" / LOCK)
        (tmp_path / "run" / LOCK).unlink()
    os.mkfifo(tmp_path / "run" / LOCK)
    assert holder_of(tmp_path / "run") is None
    assert (tmp_path / "mine").read_text() == "kept"
