"""One trainer per run folder; a dead one holds nothing."""

import os

import pytest

from warploom.checkpoint.lock import FolderLock
from warploom.errors import UserError


def test_second_lock_is_refused_and_names_the_holder(tmp_path):
    run_dir = tmp_path / "new" / "run"
    with FolderLock(run_dir):
        for _ in range(2):
            with pytest.raises(UserError, match=f"{run_dir} is in use by process {os.getpid()}; stop it"):
                with FolderLock(run_dir):
                    pass
        with FolderLock(tmp_path / "other"):
            pass
    with FolderLock(run_dir):
        pass


@pytest.mark.parametrize("with_surviving_child", [False, True])
def test_lock_of_a_killed_process_is_taken_over(in_forks, with_surviving_child):
    result = in_forks("hold_lock", with_surviving_child=with_surviving_child)
    while_held, after_kill = result["results"]
    assert f"is in use by process {result['pid']};" in while_held
    assert after_kill == "locked"


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        with FolderLock(tmp_path / "file" / "run"):
            pass
