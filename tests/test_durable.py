"""Durable writes: the order of system calls, and the files left after failing ones."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spairkit.errors import InputError
from spairkit.storage import durable


class SystemCalls:
    """Records writes, flushes and renames, with the path of each file descriptor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, str]] = []
        names: dict[int, str] = {}
        real_open = os.open

        def opened(path: Any, *args: Any, **kwargs: Any) -> int:
            descriptor = real_open(path, *args, **kwargs)
            names[descriptor] = str(path)
            return descriptor

        def recorded(name: str, subject: Callable[..., str]) -> None:
            real = getattr(os, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                self.made.append((name, subject(*args)))
                return real(*args, **kwargs)

            monkeypatch.setattr(os, name, call)

        monkeypatch.setattr(os, "open", opened)
        for name in ("write", "fsync"):
            recorded(name, lambda descriptor, *_: names[descriptor])
        for name in ("replace", "rename"):
            recorded(name, lambda _, target: str(target))


def write_file(folder: Path) -> None:
    durable.write_bytes(folder / "thing", b"new")


def write_folder(folder: Path) -> None:
    durable.write_folder(folder / "thing", {"a": b"new"})


def replace_link(folder: Path) -> None:
    durable.replace_link(folder / "thing", "elsewhere")


def test_file_is_flushed_before_its_rename_and_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = SystemCalls(monkeypatch)
    write_file(tmp_path)
    assert [name for name, _ in calls.made] == ["write", "fsync", "replace", "fsync"]
    (_, written), (_, flushed), (_, named), (_, folder) = calls.made
    assert written == flushed != named == str(tmp_path / "thing")
    assert folder == str(tmp_path)
    assert Path(written).parent == tmp_path


def test_folder_and_its_files_are_flushed_before_its_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = SystemCalls(monkeypatch)
    durable.write_folder(tmp_path / "thing", {"a": b"1", "b": b"2"})
    names = [name for name, _ in calls.made]
    assert names == ["write", "fsync", "write", "fsync", "fsync", "rename", "fsync"]
    subjects = [Path(subject) for _, subject in calls.made]
    assert subjects[0] == subjects[1] == subjects[4] / "a"
    assert subjects[2] == subjects[3] == subjects[4] / "b"
    assert subjects[5:] == [tmp_path / "thing", tmp_path]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, bytes(data[:3])))
    durable.write_bytes(tmp_path / "thing", b"0123456789")
    assert (tmp_path / "thing").read_bytes() == b"0123456789"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        durable.write_bytes(tmp_path / "file", b"")
        durable.append_line(tmp_path / "lines", "")
        durable.write_folder(tmp_path / "folder", {"inside": b""})
    finally:
        os.umask(before)
    for name in ("file", "lines", "folder/inside"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize(
    ("write", "call"),
    [
        (write_file, "write"),
        (write_file, "fsync"),
        (write_file, "replace"),
        (write_folder, "mkdir"),
        (write_folder, "write"),
        (write_folder, "fsync"),
        (write_folder, "rename"),
        (replace_link, "symlink"),
        (replace_link, "replace"),
    ],
)
def test_failed_write_gives_one_line_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], call: str
) -> None:
    thing = tmp_path / "thing"
    if write is write_folder:
        thing.mkdir()
        (thing / "old").write_bytes(b"old")
    elif write is write_file:
        thing.write_bytes(b"old")
    else:
        thing.symlink_to("old")
    real, made = getattr(os, call), 0

    def refuse(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        # the first rename moves the existing folder aside, the third moves it back
        if call == "rename" and made != 2:
            return real(*args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(InputError) as caught:
            write(tmp_path)
    assert str(caught.value) == (
        f"cannot write {thing}: No space left on device; free some space or write elsewhere"
    )
    assert list(tmp_path.iterdir()) == [thing]
    if write is write_folder:
        assert [path.name for path in thing.iterdir()] == ["old"]
    elif write is write_file:
        assert thing.read_bytes() == b"old"
    else:
        assert os.readlink(thing) == "old"


def test_failed_append_leaves_the_file_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines"
    durable.append_line(path, "first")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(InputError, match="No space left"):
            durable.append_line(path, "second")
    assert path.read_text() == "first\n"
    durable.append_line(path, "third")
    assert path.read_text() == "first\nthird\n"


def test_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with durable.appearing(tmp_path / "made") as folder:
        (folder / "a").write_bytes(b"1")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made" / "a").read_bytes() == b"1"
    unfinished = durable.appearing(tmp_path / "unfinished")
    (unfinished.__enter__() / "a").write_bytes(b"1")
    assert len(list(tmp_path.iterdir())) == 2
    stopped = KeyboardInterrupt()
    assert not unfinished.__exit__(KeyboardInterrupt, stopped, None)
    with (
        pytest.raises(InputError, match=r"cannot write .*made: Directory not empty"),
        durable.appearing(tmp_path / "made"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_missing_or_wrong_parent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent/thing: No such file .*; create its folder first"):
        durable.write_bytes(tmp_path / "absent" / "thing", b"")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"file/thing: Not a directory"):
        durable.write_bytes(tmp_path / "file" / "thing", b"")


def test_special_files_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("fifo", "folder", "null"):
        with pytest.raises(InputError, match="it is not a file; choose another name"):
            durable.write_bytes(tmp_path / name, b"data")
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("far/file")
    durable.write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "file").read_bytes() == b"new"


def test_links_are_relative_and_replaced(tmp_path: Path) -> None:
    for target in ("one", "two"):
        (tmp_path / target).mkdir()
        durable.replace_link(tmp_path / "last", target)
        assert os.readlink(tmp_path / "last") == target
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "one", "two"]


def killed_writes(folder: Path) -> list[Path]:
    """Leaves what a killed process leaves of the file `lost` and the folder `lost too`."""
    left: list[Path] = []
    real_replace = os.replace

    def die(source: Path, target: Path) -> None:
        left.append(Path(source))
        real_replace(source, source)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "replace", die)
        durable.write_text(folder / "lost", "lost")
        patched.setattr(os, "rename", die)
        durable.write_folder(folder / "lost too", {"inside": b""})
    assert len(left) == 2
    assert all(path.exists() for path in left)
    return left


def test_sweep_removes_only_leftovers_of_killed_processes(tmp_path: Path) -> None:
    durable.write_text(tmp_path / "kept", "kept")
    killed_writes(tmp_path)
    durable.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_sweep_beside_removes_only_leftovers_of_the_paths_named(tmp_path: Path) -> None:
    file, folder = killed_writes(tmp_path)
    durable.sweep_beside([tmp_path / "other", tmp_path / "absent" / "lost"])
    assert set(tmp_path.iterdir()) == {file, folder}
    (tmp_path / "link").symlink_to("lost")
    durable.sweep_beside([tmp_path / "link"])
    assert set(tmp_path.iterdir()) == {folder, tmp_path / "link"}
    durable.sweep_beside([tmp_path / "lost too", tmp_path / "lost"])
    assert list(tmp_path.iterdir()) == [tmp_path / "link"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="Permission denied; choose a folder that you may"):
            durable.write_bytes(tmp_path / "thing", b"")
    finally:
        tmp_path.chmod(0o700)
