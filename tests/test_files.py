"""hf_xlstm/files.py: complete and new, or untouched and old, whatever happens."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from hf_xlstm.files import appearing, check_room, locked, replacing, replacing_file, write_text


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
OLD = {"a": "old", "b": "old", "sub/c": "old"}
NEW = {"a": "new" * 1000, "d": "new"}


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def read(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in sorted(directory.rglob("*")) if p.is_file()}


def in_child(function, *args) -> int:
    """The exit status of `function` in a process of its own; minus the signal if one ended it."""
    if (child := os.fork()) == 0:
        try:
            function(*args)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(event_number: int, function, *args) -> int:
    """As `in_child`, with kill -9 at the `event_number`-th operation on files."""

    def run():
        left = [event_number]

        def hook(event, _):
            if event.split(".")[0] in ("open", "os", "shutil", "ctypes"):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        function(*args)

    return in_child(run)


def replace(target: Path, keep=()) -> None:
    with replacing(target, keep=keep) as partial:
        write(partial, NEW)


def test_replaced_directory_is_old_or_new_when_killed_at_any_moment(tmp_path):
    statuses, kept = [], NEW | {"sub/c": "old"}
    for moment in range(1, 500):
        target = tmp_path / str(moment) / "model"
        write(target, OLD)
        statuses.append(killed_at(moment, replace, target, ["sub"]))
        assert read(target) in (OLD, kept), moment
        replace(target, ["sub"])  # the next one removes what is left
        assert os.listdir(target.parent) == ["model"]
        if statuses[-1] == 0:
            break
    assert statuses[-1] == 0 and len(statuses) > 20 and set(statuses[:-1]) == {-signal.SIGKILL}


def test_new_directory_is_whole_or_absent_when_killed_at_any_moment(tmp_path):
    def appear(target):
        with appearing(target) as partial:
            write(partial, NEW)

    for moment in range(1, 500):
        target = tmp_path / str(moment) / "model"
        status = killed_at(moment, appear, target)
        assert not target.exists() or read(target) == NEW
        if status == 0:
            break
        if not target.exists():
            appear(target)
        assert read(target) == NEW and os.listdir(target.parent) == ["model"]
    assert status == 0 and moment > 10


def test_replaced_file_is_old_or_new_when_killed_at_any_moment(tmp_path):
    for moment in range(1, 100):
        path = tmp_path / f"{moment}.json"
        path.write_text("old")
        status = killed_at(moment, write_text, path, "new" * 1000)
        assert path.read_text() in ("old", "new" * 1000)
        if status == 0:
            break
    assert status == 0 and moment > 3 and path.read_text() == "new" * 1000


def test_full_disk_leaves_the_old(tmp_path):
    resource = pytest.importorskip("resource")
    target, path, absent = tmp_path / "model", tmp_path / "file", tmp_path / "absent"
    write(target, OLD)
    path.write_text("old")

    def appear():
        with appearing(absent) as partial:
            write(partial, NEW)

    def on_a_full_disk(function, *args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        function(*args)

    assert in_child(on_a_full_disk, replace, target) == 1
    assert in_child(on_a_full_disk, write_text, path, "new" * 1000) == 1
    assert in_child(on_a_full_disk, appear) == 1
    assert read(target) == OLD and path.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["file", "model"]


def test_room_is_looked_at_before(tmp_path):
    with pytest.raises(OSError, match=r"needs 1,000,000,000,000,000,000 bytes, and the disk has"):
        check_room(tmp_path / "not" / "yet", 10**18)
    with pytest.raises(OSError, match="needs"), replacing(tmp_path / "model", nbytes=10**18):
        pytest.fail("there is no such room")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["model", "model[7b] v2"])
@pytest.mark.parametrize("writing", [appearing, replacing])
def test_two_writers_of_one_target_do_not_meet(tmp_path, writing, name):
    """The one that comes second is refused, and the first is whole."""
    target = tmp_path / name
    with writing(target) as first:
        write(first, NEW)
        with pytest.raises(FileExistsError, match="being written by another process"), writing(target):
            pytest.fail("the first is not finished")
        assert first.exists()  # what is being written is no leftover
    assert read(target) == NEW and os.listdir(tmp_path) == [name]
    with pytest.raises(FileExistsError, match=re.escape(f"{name} exists.")), appearing(target):
        pytest.fail("it exists")


def test_lock_is_one_process_at_a_time(tmp_path):
    with locked(tmp_path) as mine, locked(tmp_path) as another:
        assert mine and not another
    with locked(tmp_path) as mine, locked(tmp_path / "gone") as gone:
        assert mine and not gone


def test_links_modes_and_kept_files_stay(tmp_path):
    target, link = tmp_path / "model", tmp_path / "link"
    write(target, OLD)
    target.chmod(0o750)
    link.symlink_to(target)
    inode = (target / "b").stat().st_ino
    replace(link, ["b"])
    assert link.is_symlink() and read(target) == NEW | {"b": "old"}
    assert (target / "b").stat().st_ino == inode  # who writes to it goes on
    assert target.stat().st_mode & 0o777 == 0o750
    file = tmp_path / "file.png"
    file.write_text("old")
    file.chmod(0o604)
    with replacing_file(file) as partial:
        assert partial.suffix == ".png"
        partial.write_text("new")
    assert file.read_text() == "new" and file.stat().st_mode & 0o777 == 0o604
