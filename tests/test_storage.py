"""Files: listing, atomic writing, and the same through blobfile."""

import os
from pathlib import Path

import pytest

from guided_diffusion import storage


@pytest.fixture(params=["local", "blobfile"])
def any_backend(request, monkeypatch):
    """Run a test twice: as it is, and with local paths sent through blobfile."""
    if request.param == "blobfile":
        monkeypatch.setattr(storage, "is_remote", lambda path: True)


def make_files(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_only_a_path_with_a_scheme_is_remote():
    assert storage.is_remote("gs://bucket/x.png")
    assert not storage.is_remote("data/x.png")
    assert not storage.is_remote("C:\\data\\x.png")


def test_listing_is_recursive_sorted_by_whole_path_and_skips_hidden(tmp_path, any_backend):
    make_files(
        tmp_path,
        *("b/1.png", "b.png", "b-2.png", "a.txt", "B.png", "deep/er/x"),
        *(".hidden.png", ".ipynb_checkpoints/b.png", "b/.cache/deep/y.png", "b/.z"),
    )
    # In ASCII: capitals first, then "-" < "." < "/".
    expected = ["B.png", "a.txt", "b-2.png", "b.png", "b/1.png", "deep/er/x"]
    assert storage.list_files(str(tmp_path)) == [str(tmp_path / name) for name in expected]


def test_a_hidden_folder_that_is_asked_for_by_name_is_listed(tmp_path, any_backend):
    make_files(tmp_path / ".mine", "x.png")
    assert storage.list_files(str(tmp_path / ".mine")) == [str(tmp_path / ".mine" / "x.png")]


def test_listing_follows_links_but_not_in_circles(tmp_path):
    make_files(tmp_path / "elsewhere", "x.png")
    make_files(tmp_path / "data", "y.png")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    expected = [tmp_path / "data" / name for name in ("link/x.png", "up/elsewhere/x.png", "y.png")]
    assert storage.list_files(str(tmp_path / "data")) == [str(path) for path in expected]


def test_listing_what_is_no_folder_is_an_os_error(tmp_path, any_backend):
    with pytest.raises(OSError):
        storage.list_files(str(tmp_path / "missing"))


def test_exists_and_is_dir(tmp_path, any_backend):
    make_files(tmp_path, "x")
    assert storage.exists(str(tmp_path)) and storage.is_dir(str(tmp_path))
    assert storage.exists(str(tmp_path / "x")) and not storage.is_dir(str(tmp_path / "x"))
    assert not storage.exists(str(tmp_path / "y")) and not storage.is_dir(str(tmp_path / "y"))


def test_what_is_written_can_be_read_and_replaced(tmp_path, any_backend):
    path = str(tmp_path / "x.bin")
    for data in (b"first", b"", b"\0second"):
        storage.write_atomically(path, data)
        with storage.open_binary(path) as file:
            assert file.read() == data
    assert os.listdir(tmp_path) == ["x.bin"]


def test_writing_creates_parent_folders(tmp_path):
    storage.write_atomically(str(tmp_path / "a" / "b" / "x"), b"data")
    assert (tmp_path / "a" / "b" / "x").read_bytes() == b"data"


def test_a_relative_name_without_folder_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage.write_atomically("x", b"data")
    assert Path("x").read_bytes() == b"data"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    (tmp_path / "x").write_bytes(b"old")

    def disk_full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, failing, disk_full)
    with pytest.raises(OSError, match="no space"):
        storage.write_atomically(str(tmp_path / "x"), b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_while_writing_only_a_hidden_file_is_there(tmp_path, monkeypatch):
    seen = []
    replace = os.replace

    def spy(source, target):
        seen.append((os.listdir(tmp_path), Path(source).read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    storage.write_atomically(str(tmp_path / "x"), b"data")
    ((names, content),) = seen
    assert len(names) == 1 and names[0].startswith(".") and content == b"data"


def test_written_files_have_the_usual_permissions(tmp_path):
    storage.write_atomically(str(tmp_path / "ours"), b"")
    (tmp_path / "usual").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_check_writable_leaves_nothing_where_the_folder_will_be(tmp_path):
    storage.check_writable(str(tmp_path / "a" / "b"))
    assert os.listdir(tmp_path) == []


def test_check_writable_through_blobfile_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "is_remote", lambda path: True)
    storage.check_writable(str(tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_check_writable_refuses_what_cannot_be_a_folder(tmp_path, folder):
    make_files(tmp_path, "file")
    with pytest.raises(OSError):
        storage.check_writable(str(tmp_path / folder))


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder none can write to")
def test_check_writable_tries_to_write():
    with pytest.raises(OSError):
        storage.check_writable("/proc")


def test_a_place_that_blobfile_does_not_know_is_an_os_error():
    with pytest.raises(OSError, match="nowhere"):
        storage.exists("nowhere://bucket/x.png")
