"""Files: listing, writing, locking; on this machine and in blob stores, see cloud_emulation."""

import errno
import fcntl
import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guided_diffusion.machine import storage

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["local", "google", "azure", "azure by its URL"])
def place(request, tmp_path) -> str:
    """A folder that does not exist yet, on this machine or in a store."""
    if request.param == "local":
        return str(tmp_path / "folder")
    request.getfixturevalue("cloud")
    stores = {
        "google": "gs://bucket",
        "azure": "az://account/box",
        "azure by its URL": "https://account.blob.core.windows.net/box",
    }
    return f"{stores[request.param]}/folder"


def read(path: str) -> bytes:
    with storage.open_binary(path) as file:
        return file.read()


def make_files(folder: Path | str, *names: str) -> None:
    for name in names:
        storage.write_atomically(f"{folder}/{name}", b"x")


def test_only_a_path_with_a_scheme_is_remote():
    assert storage.is_remote("gs://bucket/x.png")
    assert not storage.is_remote("data/x.png")
    assert not storage.is_remote("C:\\data\\x.png")


NAMES = (
    *("b/1.png", "b.png", "b-2.png", "a.txt", "B.png", "deep/er/x"),
    *(".hidden.png", ".ipynb_checkpoints/b.png", "b/.cache/deep/y.png", "b/.z"),
)
# In ASCII: capitals first, then "-" < "." < "/".
VISIBLE = ("B.png", "a.txt", "b-2.png", "b.png", "b/1.png", "deep/er/x")


def test_listing_is_recursive_sorted_by_whole_path_and_skips_hidden(place):
    make_files(place, *NAMES)
    assert storage.list_files(place) == [f"{place}/{name}" for name in VISIBLE]
    assert storage.list_files(f"{place}/") == [f"{place}/{name}" for name in VISIBLE]


def test_sizes_are_those_of_the_files_that_are_listed(place):
    make_files(place, *NAMES)
    storage.write_atomically(f"{place}/deep/er/empty", b"")
    storage.write_atomically(f"{place}/a.txt", b"four")
    sizes = {f"{place}/{name}": 1 for name in VISIBLE}
    changed = {f"{place}/deep/er/empty": 0, f"{place}/a.txt": 4}
    assert storage.list_sizes(place) == sizes | changed
    assert storage.list_sizes(f"{place}/none") == {}
    assert storage.list_sizes(f"{place}/a.txt") == {}


def test_sizes_of_many_files_are_known_at_once(tmp_path):
    for folder in range(20):
        (tmp_path / str(folder)).mkdir()
        for name in range(500):
            (tmp_path / str(folder) / str(name)).touch()
    start = time.perf_counter()
    assert len(storage.list_sizes(str(tmp_path))) == 10_000
    assert time.perf_counter() - start < 1


def test_a_link_to_nowhere_has_no_size(tmp_path):
    (tmp_path / "x").symlink_to(tmp_path / "nowhere")
    assert storage.list_sizes(str(tmp_path)) == {}


def test_a_hidden_folder_that_is_asked_for_by_name_is_listed(place):
    make_files(f"{place}/.mine", "x.png")
    assert storage.list_files(f"{place}/.mine") == [f"{place}/.mine/x.png"]


def test_listing_follows_links_but_not_in_circles(tmp_path):
    make_files(tmp_path / "elsewhere", "x.png")
    make_files(tmp_path / "data", "y.png")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    expected = [tmp_path / "data" / name for name in ("link/x.png", "up/elsewhere/x.png", "y.png")]
    assert storage.list_files(str(tmp_path / "data")) == [str(path) for path in expected]


def test_listing_what_is_no_folder_is_an_os_error(place):
    make_files(place, "x")
    for path in (f"{place}/missing", f"{place}/x"):
        with pytest.raises(OSError):
            storage.list_files(path)


def test_exists_and_is_dir(place):
    assert not storage.exists(place) and not storage.is_dir(place)
    make_files(place, "x")
    assert storage.exists(place) and storage.is_dir(place)
    assert storage.exists(f"{place}/x") and not storage.is_dir(f"{place}/x")
    assert not storage.exists(f"{place}/y") and not storage.is_dir(f"{place}/y")


def test_what_is_written_can_be_read_and_replaced(place):
    for data in (b"first", b"", b"\0second", bytes(2**20)):
        storage.write_atomically(f"{place}/x.bin", data)
        assert read(f"{place}/x.bin") == data
    assert list(storage.list_sizes(place).values()) == [2**20]


def test_reading_what_is_not_there_is_an_error_that_says_so(place):
    with pytest.raises(FileNotFoundError) as raised:
        storage.open_binary(f"{place}/x")
    assert raised.value.filename == f"{place}/x" and raised.value.strerror


def test_a_write_that_is_broken_off_changes_nothing(place):
    storage.write_atomically(f"{place}/x", b"old")
    for name in ("x", "y"):
        with (
            pytest.raises(KeyboardInterrupt),
            storage.create_atomically(f"{place}/{name}") as file,
        ):
            file.write(b"new, but not all of it")
            raise KeyboardInterrupt
    assert read(f"{place}/x") == b"old"
    assert storage.list_files(place) == [f"{place}/x"]


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


@pytest.mark.parametrize("size", [0, 3, 2**20, 2**21 + 5])
def test_the_digest_of_a_file(tmp_path, size):
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    assert storage.file_digest(str(tmp_path / "file")) == (size, expected)


def test_written_files_have_the_usual_permissions(tmp_path):
    storage.write_atomically(str(tmp_path / "ours"), b"")
    (tmp_path / "usual").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_check_writable_leaves_nothing_where_the_folder_will_be(tmp_path):
    storage.check_writable(str(tmp_path / "a" / "b"))
    assert os.listdir(tmp_path) == []


def test_check_writable_leaves_nothing_in_a_store(cloud):
    storage.check_writable("gs://bucket/out")
    assert cloud.blobs == {}
    assert {request.method for request in cloud.requests} >= {"PUT", "DELETE"}


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_check_writable_refuses_what_cannot_be_a_folder(tmp_path, folder):
    make_files(tmp_path, "file")
    with pytest.raises(OSError):
        storage.check_writable(str(tmp_path / folder))


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder none can write to")
def test_check_writable_tries_to_write():
    with pytest.raises(OSError):
        storage.check_writable("/proc")


# ---- Lines, one after another ----


def test_lines_are_appended_in_order_to_a_file_that_may_be_missing(place):
    for line in ("one", "zwei: ü", "", "four"):
        storage.append_line(f"{place}/deep/log", line)
    assert read(f"{place}/deep/log").decode() == "one\nzwei: ü\n\nfour\n"


def test_a_torn_line_does_not_swallow_the_next(place):
    storage.write_atomically(f"{place}/log", b'{"whole": 1}\n{"torn')
    storage.append_line(f"{place}/log", "next")
    storage.append_line(f"{place}/log", "last")
    assert read(f"{place}/log") == b'{"whole": 1}\n{"torn\nnext\nlast\n'


def test_a_folder_that_was_deleted_comes_back_with_the_next_line(tmp_path):
    for line in ("one", "two"):
        storage.append_line(str(tmp_path / "run" / "log"), line)
        assert (tmp_path / "run" / "log").read_text() == f"{line}\n"
        (tmp_path / "run" / "log").unlink()
        (tmp_path / "run").rmdir()


def test_a_line_is_one_write_and_safe_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    for line in ("a", "bc"):
        storage.append_line(str(tmp_path / "log"), line)
    assert synced == [2, 5]  # all of the line was with the system when it was told to write


# ---- Moving, removing ----


def test_moving_creates_folders_and_replaces(place):
    storage.write_atomically(f"{place}/a", b"first")
    storage.move(f"{place}/a", f"{place}/old/a")
    storage.write_atomically(f"{place}/a", b"second")
    storage.move(f"{place}/a", f"{place}/old/a")
    assert read(f"{place}/old/a") == b"second"
    assert storage.list_files(place) == [f"{place}/old/a"]


def test_moving_between_this_machine_and_a_store(cloud, tmp_path):
    make_files(tmp_path, "x")
    storage.move(f"{tmp_path}/x", "gs://bucket/deep/x")
    assert cloud.names("gs://bucket") == ["deep/x"] and os.listdir(tmp_path) == []
    storage.move("gs://bucket/deep/x", f"{tmp_path}/y")
    assert cloud.names("gs://bucket") == [] and read(f"{tmp_path}/y") == b"x"


def test_moving_what_is_not_there_is_an_error_and_harms_nothing(place):
    make_files(place, "there")
    with pytest.raises(FileNotFoundError):
        storage.move(f"{place}/missing", f"{place}/there")
    assert read(f"{place}/there") == b"x"


def test_removing_twice_is_no_error(place):
    make_files(place, "x", "y")
    for _ in range(2):
        storage.remove(f"{place}/x")
        assert storage.list_files(place) == [f"{place}/y"]


# ---- Locks ----

TAKE = """
import sys
from guided_diffusion.machine import storage
try:
    lock = storage.lock(sys.argv[1])
except BlockingIOError as error:
    print(error)
else:
    print("taken", flush=True)
    sys.stdin.read()
"""


def take_in_another_process(path: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", TAKE, path]
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


@pytest.mark.slow
def test_a_lock_keeps_others_out_and_says_who_has_it(tmp_path):
    path = str(tmp_path / "run" / "lock")
    with take_in_another_process(path) as other:
        assert other.stdout.readline() == "taken\n"
        with pytest.raises(BlockingIOError, match=f"^process {other.pid} on "):
            storage.lock(path)
        other.kill()
    with storage.lock(path), take_in_another_process(path) as other:
        assert other.communicate()[0].startswith(f"process {os.getpid()} on ")
    storage.lock(path).close()


def test_who_has_a_lock_is_read_without_the_byte_that_windows_locks(tmp_path):
    with storage.lock(str(tmp_path / "lock")):
        (tmp_path / "lock").write_bytes(b"\xff" + (tmp_path / "lock").read_bytes()[1:])
        with pytest.raises(BlockingIOError, match=f"^process {os.getpid()} on "):
            storage.lock(str(tmp_path / "lock"))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_nothing_can_be_locked_a_warning_says_so(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="nothing can be locked there, .* do not start a second"):
        storage.lock(str(tmp_path / "lock")).close()


@pytest.mark.slow
def test_where_python_has_no_locks_a_warning_says_so(tmp_path):
    command = [sys.executable, "-c", f"import sys; sys.modules['fcntl'] = None{TAKE}"]
    run = subprocess.run(
        [*command, str(tmp_path / "lock")], cwd=ROOT, input="", capture_output=True, text=True
    )
    assert run.stdout == "taken\n" and "lock: nothing can be locked there" in run.stderr


def test_in_a_store_nothing_can_be_locked(cloud):
    with pytest.warns(UserWarning, match="gs://bucket/lock: nothing can be locked there"):
        storage.lock("gs://bucket/lock").close()
    assert cloud.requests == []


def test_another_error_of_a_lock_is_an_error(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="input/output"):
        storage.lock(str(tmp_path / "lock"))
