"""Functions on several processes: what they return, and what is said of those that fail."""

import os
import time
from pathlib import Path

import pytest
import torch
from regrad_testing import run_on_processes
from torch import distributed


def sum_over_ranks(rank, offset):
    total = torch.tensor(float(rank + offset))
    distributed.all_reduce(total)
    return {"total": total.item(), "rank": rank, "world": distributed.get_world_size()}


def raise_on_the_second(rank):
    if rank == 1:
        raise ValueError("no such luck")


def die_on_the_second(rank):
    os.write(1, b"before the end")
    distributed.barrier()  # or the other may fail as it connects
    if rank == 1:
        os._exit(3)
    time.sleep(60)


def abort_once(rank, folder):
    """Abort, as a thread of gloo does now and then; the next attempt finds the file."""
    file = Path(folder) / str(rank)
    distributed.barrier()
    if rank == 1 and not file.exists():
        file.touch()
        os.abort()
    return file.exists()


def abort_always(rank):
    distributed.barrier()
    os.abort()


def sleep(rank):
    time.sleep(60)


def variables(rank):
    return [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "REGRAD_TEST")]


def test_every_process_gets_the_arguments_and_its_value_is_returned_by_rank():
    one, other = run_on_processes(sum_over_ranks, 10)
    assert one == {"total": 21.0, "rank": 0, "world": 2}
    assert other == {"total": 21.0, "rank": 1, "world": 2}


def test_there_may_be_more_processes_than_two():
    seen = run_on_processes(sum_over_ranks, 0, processes=3)
    assert [one["total"] for one in seen] == [3.0, 3.0, 3.0]


def test_an_exception_on_one_process_is_raised_with_its_traceback():
    with pytest.raises(AssertionError, match="raise_on_the_second raised on a process") as caught:
        run_on_processes(raise_on_the_second)
    assert "ValueError: no such luck" in str(caught.value)


def test_a_process_that_dies_is_said_with_what_was_printed_and_ends_the_others_soon():
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=r"2 processes ended with \[None, 3\]") as caught:
        run_on_processes(die_on_the_second)
    assert "before the end" in str(caught.value)
    assert time.monotonic() - begin < 55


def test_a_process_that_native_code_aborted_is_started_once_more(tmp_path):
    assert run_on_processes(abort_once, str(tmp_path)) == [False, True]


def test_what_aborts_every_time_is_said_with_the_place():
    with pytest.raises(AssertionError, match=r"2 processes ended with \[-6, -6\]") as caught:
        run_on_processes(abort_always)
    assert "Fatal Python error: Aborted" in str(caught.value)
    assert "in abort_always" in str(caught.value)


def test_processes_that_take_too_long_are_ended():
    with pytest.raises(AssertionError, match=r"ended with \[None, None\] \(None: timed out\)"):
        run_on_processes(sleep, patience=1)


def test_processes_have_the_variables_of_torchrun_and_of_the_caller(monkeypatch):
    monkeypatch.setenv("REGRAD_TEST", "as it is now")
    assert run_on_processes(variables) == [[rank, rank, "2", "as it is now"] for rank in ("0", "1")]


def test_what_is_not_written_in_a_file_is_refused():
    with pytest.raises(TypeError, match="function must be written in a Python file, got <built-in"):
        run_on_processes(len)
