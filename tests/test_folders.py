"""Folders that one run at a time writes."""

import os
import socket
import time

import pytest

from dmoerm_trl.files import LOCK, locked_folder


def hold(folder, seconds):
    """What a child process of these tests does."""
    with locked_folder(folder):
        (folder / "in").touch()
        time.sleep(seconds)


def wait_for(path):
    while not path.exists():
        time.sleep(0.01)


def test_the_second_run_of_a_folder_is_told_who_holds_it(start, tmp_path):
    process = start(hold, tmp_path, 60)
    wait_for(tmp_path / "in")
    for _ in range(2):  # a refusal leaves the lock and its owner's name as they are
        with pytest.raises(
            ValueError, match=rf"process {process.pid} on {socket.gethostname()} is writing.*another folder"
        ):
            with locked_folder(tmp_path):
                pass


def test_a_lock_ends_with_a_killed_process(start, tmp_path):
    process = start(hold, tmp_path, 60)
    wait_for(tmp_path / "in")
    process.kill()
    process.join()
    assert (tmp_path / LOCK).exists()  # it had no time to remove it
    with locked_folder(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_lock_ends_with_its_block_and_leaves_nothing(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), locked_folder(tmp_path / "new" / "folder") as folder:
            raise KeyError
        assert os.listdir(folder) == []


def test_one_process_cannot_hold_a_folder_twice(tmp_path):
    with locked_folder(tmp_path):
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"), locked_folder(tmp_path):
            pass
        assert (tmp_path / LOCK).exists()
    with locked_folder(tmp_path):
        pass


def test_of_launched_processes_the_first_alone_holds_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0")
    with locked_folder(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with locked_folder(tmp_path):
            pass
        assert (tmp_path / LOCK).exists()


def test_a_folder_that_cannot_be_made_is_an_error_that_says_why(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file/run: got a folder that cannot be written .*name another folder"):
        with locked_folder(tmp_path / "file" / "run"):
            pass


def test_a_link_in_the_lock_s_place_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="cannot be written"), locked_folder(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"
