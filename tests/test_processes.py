"""Processes that live, have ended, stand still."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from masklr.callbacks import Peers
from masklr.processes import start_of, watch


@pytest.fixture
def sleepers():
    processes = [subprocess.Popen(["sleep", "600"]) for _ in range(3)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_one_that_has_ended_has_no_start_even_if_nobody_asked_for_its_exit_code(sleepers):
    started = start_of(sleepers[0].pid)
    assert started is not None
    assert int(started) >= int(start_of(os.getpid()))
    sleepers[0].kill()
    os.waitid(os.P_PID, sleepers[0].pid, os.WEXITED | os.WNOWAIT)
    assert start_of(sleepers[0].pid) is None
    sleepers[0].wait()
    assert start_of(sleepers[0].pid) is None


def test_end_of_one_is_the_end_of_all_those_that_stand_still_too(sleepers):
    starts = {process.pid: start_of(process.pid) for process in sleepers}
    sleepers[0].send_signal(signal.SIGSTOP)
    watched = [f"{pid}:{start}" for pid, start in starts.items()]
    command = [sys.executable, "-m", "masklr.processes", "inf", *watched]
    watcher = subprocess.Popen(command)
    time.sleep(1)
    assert watcher.poll() is None
    assert all(process.poll() is None for process in sleepers), "nobody has ended yet"
    sleepers[1].terminate()
    began = time.monotonic()
    assert sleepers[0].wait(60) == -signal.SIGKILL, "one that is stopped is not waited for"
    assert sleepers[2].poll() is None
    assert watcher.wait(60) == 0
    assert time.monotonic() - began >= 5, "the others may end by themselves first"
    assert [process.wait(10) for process in sleepers] == [-signal.SIGKILL, -signal.SIGTERM, -signal.SIGKILL]


def test_one_that_is_stopped_while_others_are_not_is_the_end_of_all(sleepers):
    starts = {process.pid: start_of(process.pid) for process in sleepers}
    sleepers[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    watch(starts, grace=0.5, timeout=3)
    assert [process.wait(10) for process in sleepers] == [-signal.SIGKILL] * 3
    assert time.monotonic() - began >= 2, "not before it has stood still for a while"


def test_when_work_is_done_only_one_that_stays_stopped_is_killed(sleepers):
    starts = {process.pid: start_of(process.pid) for process in sleepers}
    sleepers[0].terminate()
    sleepers[1].send_signal(signal.SIGSTOP)
    ended = threading.Timer(5, sleepers[2].terminate)
    ended.start()
    watch(starts, grace=0.5, timeout=2, finishing=lambda: True)
    assert [process.wait(10) for process in sleepers] == [-signal.SIGTERM, -signal.SIGKILL, -signal.SIGTERM]


def test_all_may_be_stopped_and_go_on(sleepers):
    watched = [f"{process.pid}:{start_of(process.pid)}" for process in sleepers]
    for process in sleepers:
        process.send_signal(signal.SIGSTOP)
    watcher = subprocess.Popen([sys.executable, "-m", "masklr.processes", "1", *watched])
    time.sleep(3)
    assert watcher.poll() is None
    assert [process.poll() for process in sleepers] == [None] * 3
    watcher.kill()
    watcher.wait()


def test_process_that_was_given_the_number_of_another_is_left_alone(sleepers):
    first, second, third = (process.pid for process in sleepers)
    watch({first: start_of(first), second: "1", third: start_of(third)}, grace=0)
    assert [process.poll() for process in sleepers[1:2]] == [None]
    assert sleepers[0].wait(10) == sleepers[2].wait(10) == -signal.SIGKILL


def test_watching_begins_when_the_others_have_been_started_and_before_anything_is_set_up(sleepers):
    launcher = SimpleNamespace(procs=[])

    def launch(function, *args, **kwargs):
        launcher.procs = sleepers
        return function(*args, **kwargs)

    launcher.launch = launch
    peers = Peers()
    peers.watch_from_launch(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)))
    assert peers._watcher is None
    assert launcher.launch(lambda value: (value, peers._watcher.poll()), 3) == (3, None)
    watcher = peers._watcher
    time.sleep(1)  # until it listens
    strategy = SimpleNamespace(launcher=launcher, barrier=lambda name: None)
    peers.teardown(SimpleNamespace(strategy=strategy), None, "fit")
    sleepers[0].terminate()
    sleepers[0].wait()
    time.sleep(1)
    assert watcher.poll() is None
    assert [process.poll() for process in sleepers[1:]] == [None] * 2, "work is done: each ends when it likes"
    watcher.kill()
    watcher.wait()
