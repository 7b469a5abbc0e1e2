"""Blob stores: what goes wrong there, checkpoints from there, and whole runs.

Against an emulation of the stores' own protocols on this machine, see cloud_emulation: blobfile is
the real one, and so is HTTP. What no emulation can show is whether the stores' rules are as we
read them; whatever `storage` does with a store when all is well is tested in test_storage.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import filelock
import pytest
import torch
import yaml
from blobfile import _common

from guided_diffusion.checkpoints import loading
from guided_diffusion.config import UserError
from guided_diffusion.images.pairs import find_pairs
from guided_diffusion.machine import storage
from guided_diffusion.networks.unet import UNet
from tests.support.checkpoints import TINY, TINY_FILE, checked, loaded
from tests.support.cloud_emulation import Answer, Cloud, Request, Silence

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
pytestmark = pytest.mark.filterwarnings("ignore:downloading")

EMULATION = ROOT / "tests" / "support" / "cloud_emulation.py"
STORES = {
    "gs://bucket": "gs://bucket",
    "az://account/box": "az://account/box",
    "https://account.blob.core.windows.net/box": "az://account/box",
}


@pytest.fixture(params=STORES)
def store(request, cloud) -> str:
    """Where paths begin in a store."""
    return request.param


@pytest.fixture
def few_retries(monkeypatch) -> None:
    monkeypatch.setattr(storage, "RETRIES", 2)


def put(cloud: Cloud, path: str, data: bytes) -> None:
    root = next(root for root in STORES if path.startswith(root))
    cloud.put(path.replace(root, STORES[root]), data)


def failure(path: str, kind: type[OSError] = OSError) -> str:
    """Why a path cannot be read, in one line; told for whatever is done with it."""
    reasons = set()
    for do in (storage.exists, storage.open_binary, storage.list_files, storage.list_sizes):
        with pytest.raises(kind) as raised:
            do(path)
        assert raised.value.filename == path and path in str(raised.value)
        reasons.add(raised.value.strerror)
    (reason,) = reasons
    assert "\n" not in reason
    return reason


# ---- Paths of other kinds ----


@pytest.mark.parametrize(
    "path",
    [
        *("s3://bucket/x", "ftp://host/x", "http://host/x", "https://host/x", "file:///data/x"),
        *("nowhere://x", "GS://bucket/x", "gs://", "gs:///x", "az://account", "az://account//x"),
        *("https://account.blob.core.windows.net", "https://account.blob.core.windows.net/"),
        *("https://blob.core.windows.net/box/x", "http://account.blob.core.windows.net/box/x"),
        "https://account.blob.core.windows.net/box/x?sv=2020&sig=secret",
        "https://host/account.blob.core.windows.net/box/x",
    ],
)
def test_a_path_of_another_kind_is_refused_with_what_is_accepted(cloud, path):
    reason = failure(path)
    assert reason.startswith("this kind of path is not supported; accepted: a path on this machine")
    assert "gs://BUCKET/PATH" in reason and "download first and give the file's path" in reason
    for write in (storage.check_writable, lambda p: storage.append_line(p, "x"), storage.remove):
        with pytest.raises(OSError, match="this kind of path is not supported"):
            write(path)
    with pytest.raises(OSError, match="this kind of path is not supported"):
        storage.move("gs://bucket/x", path)
    assert cloud.requests == []


def test_a_folder_with_wildcards_in_its_name_is_refused_rather_than_misread(cloud):
    cloud.put("gs://bucket/ab/x", b"")
    for folder in ("gs://bucket/a*", "gs://bucket/a?", "gs://bucket/[a]"):
        with pytest.raises(OSError, match="may not have any of"):
            storage.list_sizes(folder)


def test_a_folder_that_is_opened_as_a_file_is_an_error_that_names_it(cloud, store):
    with pytest.raises(OSError) as raised:
        storage.open_binary(f"{store}/folder/")
    assert raised.value.filename == f"{store}/folder/" and raised.value.strerror


# ---- Credentials ----


def test_missing_credentials_are_named_with_how_to_log_in(cloud, store):
    put(cloud, f"{store}/x", b"secret")
    cloud.private.add(STORES[store])
    reason = failure(f"{store}/x", PermissionError)
    if store.startswith("gs"):
        assert reason.startswith("access denied (HTTP 401); log in with `gcloud auth")
        assert "GOOGLE_APPLICATION_CREDENTIALS" in reason
    else:
        assert "credentials that grant access to storage account: 'account'" in reason
        assert "log in with `az login`" in reason and "AZURE_STORAGE_KEY" in reason
    with pytest.raises(PermissionError):
        storage.check_writable(f"{store}/out")


def test_with_credentials_what_is_private_is_read_and_written(cloud, store, tmp_path, monkeypatch):
    cloud.private.add(STORES[store])
    keys = {"client_id": "c", "client_secret": "s", "refresh_token": "r"}
    (tmp_path / "key.json").write_text(json.dumps(keys))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a2V5")
    storage.write_atomically(f"{store}/x", b"mine")
    with storage.open_binary(f"{store}/x") as file:
        assert file.read() == b"mine"


def test_no_token_is_left_on_the_disk(cloud, store):
    """Else one that says "no credentials" would outlive a log-in."""
    storage.write_atomically(f"{store}/x", b"")
    assert os.listdir(os.environ["HOME"]) == []


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json", "not found at /nowhere/key.json"),
        ("GOOGLE_APPLICATION_CREDENTIALS", __file__, "JSONDecodeError"),
        ("AZURE_APPLICATION_CREDENTIALS", "/nowhere/key.json", "not found at '/nowhere/key.json'"),
        ("AZURE_STORAGE_CONNECTION_STRING", "nonsense", "KeyError: 'accountname'"),
        ("AZURE_STORAGE_KEY", "abcde", "Error: "),
        ("AZURE_CLIENT_ID", "me", "KeyError: 'AZURE_CLIENT_SECRET'"),
        ("AZURE_USE_IDENTITY", "1", "install the azure-identity package"),
    ],
)
def test_damaged_credentials_are_one_clear_line(cloud, monkeypatch, variable, value, said):
    monkeypatch.setenv(variable, value)
    reason = failure("gs://bucket/x" if variable.startswith("G") else "az://account/box/x")
    assert said in reason and "log in" in reason


# ---- The network ----

BUSY = Answer(503)


@pytest.mark.parametrize("trouble", [BUSY, Answer(429), Answer(500), Silence])
def test_an_error_that_passes_is_only_a_warning(cloud, store, trouble):
    storage.write_atomically(f"{store}/x", b"data")
    cloud.fail(trouble, trouble, trouble)
    with (
        pytest.warns(UserWarning, match=f"{store}/x: no answer, or an error that may pass; trying"),
        storage.open_binary(f"{store}/x") as file,
    ):
        assert file.read() == b"data"
    cloud.fail(trouble, trouble, trouble)
    with pytest.warns(UserWarning, match="trying again"):
        storage.write_atomically(f"{store}/y", b"more")
    with storage.open_binary(f"{store}/y") as file:
        assert file.read() == b"more"


def test_one_error_that_passes_is_not_worth_a_word(cloud, store):
    storage.write_atomically(f"{store}/x", b"data")
    cloud.fail(BUSY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert storage.exists(f"{store}/x")


def test_an_error_that_stays_is_reported_with_the_path(cloud, store, few_retries):
    cloud.before = lambda request: BUSY
    with pytest.warns(UserWarning):
        assert failure(f"{store}/x") == "the server answers HTTP 503, tried 3 times"


def test_what_is_no_answer_is_reported_with_the_path(cloud, store, few_retries):
    def fall_silent(_: Request) -> None:
        raise Silence

    cloud.before = fall_silent
    with pytest.warns(UserWarning):
        reason = failure(f"{store}/x")
    assert "Remote end closed connection" in reason and reason.endswith("tried 3 times")


def test_a_server_that_does_not_answer_in_time_is_not_waited_for(cloud, store, monkeypatch):
    monkeypatch.setattr(storage, "RETRIES", 1)
    monkeypatch.setattr(storage, "READ_SECONDS", 0.1)
    storage.write_atomically(f"{store}/x", b"")
    cloud.before = lambda request: time.sleep(0.5)
    with pytest.raises(OSError, match="Read timed out. .*, tried 2 times") as raised:
        storage.open_binary(f"{store}/x")
    assert raised.value.filename == f"{store}/x"


def test_an_unreachable_server_is_reported_with_the_path(cloud, store, few_retries):
    cloud.close()
    with pytest.warns(UserWarning):
        reason = failure(f"{store}/x")
    assert "Connection refused" in reason and reason.endswith("tried 3 times")


def test_waits_grow_and_come_to_about_a_minute(cloud, monkeypatch):
    waits = []
    monkeypatch.setattr(_common.time, "sleep", waits.append)
    monkeypatch.setattr(_common.rng, "random", lambda: 1.0)  # the longest
    cloud.before = lambda request: BUSY
    with pytest.warns(UserWarning), pytest.raises(OSError):
        storage.exists("gs://bucket/x")
    assert waits == sorted(waits) and waits[-1] > 2 * sum(waits[:5])
    assert 20 < sum(waits) < 90


def test_an_error_that_will_stay_is_not_tried_again(cloud, store):
    answer = Answer(400, headers={"x-ms-error-code": "InvalidResourceName"})
    cloud.before = lambda request: answer if len(cloud.requests) > 1 else None
    with pytest.raises(OSError, match="HTTP 400 .x-ms-error-code: InvalidResourceName") as raised:
        storage.remove(f"{store}/x") or storage.remove(f"{store}/y")
    assert raised.value.strerror.count("tried") == 0
    assert len(cloud.requests) == 2


def test_a_bucket_that_does_not_exist_is_not_found(cloud, store):
    cloud.buckets.clear()
    with pytest.raises(OSError):
        storage.check_writable(f"{store}/out")
    if store.startswith("gs"):
        assert not storage.exists(f"{store}/x")
        with pytest.raises(FileNotFoundError):
            storage.open_binary(f"{store}/x")


# ---- Copies of checkpoints ----


@pytest.fixture(autouse=True)
def fresh_process():
    """A process looks once for each checkpoint; each test stands for one."""
    loading._copy.cache_clear()


def cached(name: str = "*") -> list[Path]:
    """Files in the cache, besides locks."""
    folder = Path(os.environ["XDG_CACHE_HOME"], "repaint", "checkpoints")
    return [path for path in folder.glob(f"*/{name}") if path.name != "lock"]


def downloads(cloud: Cloud) -> int:
    """Requests for data."""
    return sum("range" in request.headers for request in cloud.requests)


def denoiser() -> UNet:
    with torch.device("meta"):
        return UNet(TINY.params)


def test_a_remote_checkpoint_is_downloaded_once_and_loaded_like_a_file(cloud, store):
    path = f"{store}/models/tiny32.pt"
    put(cloud, path, TINY_FILE.read_bytes())
    expected = torch.load(TINY_FILE, weights_only=True)
    size = f"{len(TINY_FILE.read_bytes()) / 1e6:.1f} MB"
    for times in (1, 2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            checked(denoiser(), path)
            weights = loaded(denoiser(), path).state_dict()
        assert all(torch.equal(weights[key], expected[key].float()) for key in expected)
        local = Path(loading.local_path(path))
        assert local.read_bytes() == TINY_FILE.read_bytes() and cached() == [local]
        line = f"downloading {path} ({size}) to {local.parent}"
        assert [str(warning.message) for warning in said] == ([line] if times == 1 else [])
        assert downloads(cloud) == 1
        loading._copy.cache_clear()


def test_a_local_checkpoint_stays_where_it_is(tmp_path):
    assert loading.local_path("data/x.pt") == "data/x.pt"


def test_the_cache_is_where_other_programs_have_theirs(cloud, monkeypatch):
    cloud.put("gs://bucket/x.pt", b"")
    monkeypatch.delenv("XDG_CACHE_HOME")
    home = Path(os.environ["HOME"])
    local = loading.local_path("gs://bucket/x.pt")
    assert Path(local).parents[1] == home / ".cache" / "repaint" / "checkpoints"


def test_a_changed_checkpoint_is_downloaded_again_and_replaces_the_old_copy(cloud, store):
    other = f"{store}/other.pt"
    put(cloud, other, b"other")
    loading.local_path(other)
    for data in (b"1st", b"2nd", b"third"):
        put(cloud, f"{store}/x.pt", data)
        loading._copy.cache_clear()
        local = loading.local_path(f"{store}/x.pt")
        assert Path(local).read_bytes() == data
        assert sorted(path.read_bytes() for path in cached()) == sorted([data, b"other"])


def test_in_one_process_a_checkpoint_stays_the_same(cloud, store):
    put(cloud, f"{store}/x.pt", b"first")
    local = loading.local_path(f"{store}/x.pt")
    put(cloud, f"{store}/x.pt", b"second")
    assert loading.local_path(f"{store}/x.pt") == local


def test_a_state_that_a_run_saved_is_read_as_it_is_now_and_not_kept(cloud, store):
    for value in (1.0, 2.0):
        with storage.create_atomically(f"{store}/state.pt") as file:
            torch.save({"x": torch.tensor(value)}, file)
        assert loading.load_state_dict(f"{store}/state.pt")["x"] == value
    assert cached() == []


def test_a_public_file_in_a_container_that_may_not_be_listed(cloud):
    path = "https://account.blob.core.windows.net/box/x.pt"
    put(cloud, path, b"weights")
    cloud.unlisted.add("az://account/box")
    assert Path(loading.local_path(path)).read_bytes() == b"weights"


def test_without_credentials_a_private_checkpoint_is_refused_in_one_line(cloud, store):
    put(cloud, f"{store}/x.pt", b"weights")
    cloud.private.add(STORES[store])
    with pytest.raises(UserError) as raised:
        loading.local_path(f"{store}/x.pt")
    message = str(raised.value)
    assert message.startswith(f"{store}/x.pt: cannot read this checkpoint: ")
    assert "log in with `" in message


def test_a_missing_remote_checkpoint(cloud, store):
    for do in (loading.local_path, loading.load_state_dict):
        with pytest.raises(UserError, match="^[^ ]*/x.pt: no such checkpoint; check the path$"):
            do(f"{store}/x.pt")
    with pytest.raises(UserError, match="no such checkpoint; check the path$"):
        loading.local_path(f"{store}/256x256_diffusion.pt")  # which download.sh knows
    assert cached() == []


def test_a_checkpoint_at_another_kind_of_address(cloud):
    with pytest.raises(UserError) as raised:
        checked(denoiser(), "https://example.org/x.pt")
    message = str(raised.value)
    assert message.startswith("https://example.org/x.pt: cannot read this checkpoint: this kind of")
    assert message.endswith("what is elsewhere, download first and give the file's path")


def test_a_damaged_remote_checkpoint_is_called_by_its_own_name(cloud, store):
    put(cloud, f"{store}/256x256_diffusion.pt", TINY_FILE.read_bytes()[:-1000])
    for do in (lambda path: checked(denoiser(), path), loading.load_state_dict):
        with pytest.raises(UserError) as raised:
            do(f"{store}/256x256_diffusion.pt")
        message = str(raised.value)
        assert message.startswith(f"{store}/256x256_diffusion.pt: the file is incomplete")
        assert "download.sh" not in message


def test_a_download_goes_on_after_an_error_that_passes(cloud, store):
    data = os.urandom(2 * storage.PIECE + 1000)
    put(cloud, f"{store}/x.pt", data)
    troubles = [BUSY, Silence, BUSY]

    def fail_for_the_second_piece(request: Request) -> Answer | None:
        if request.headers.get("range", "").startswith(f"bytes={storage.PIECE}-") and troubles:
            if (trouble := troubles.pop()) is Silence:
                raise Silence
            return trouble
        return None

    cloud.before = fail_for_the_second_piece
    with pytest.warns(UserWarning, match="trying again"):
        assert Path(loading.local_path(f"{store}/x.pt")).read_bytes() == data
    assert not troubles
    assert downloads(cloud) == 3 + 3


def test_a_download_that_fails_leaves_nothing(cloud, store, few_retries):
    put(cloud, f"{store}/x.pt", bytes(2 * storage.PIECE))
    first = f"bytes=0-{storage.PIECE - 1}"
    cloud.before = lambda r: BUSY if r.headers.get("range", first) != first else None
    with pytest.warns(UserWarning), pytest.raises(UserError) as raised:
        loading.local_path(f"{store}/x.pt")
    reason = "cannot read this checkpoint: the server answers HTTP 503, tried 3 times"
    assert str(raised.value) == f"{store}/x.pt: {reason}"
    assert cached() == cached(".*") == []


@pytest.mark.parametrize("size", [2 * storage.PIECE, 2 * storage.PIECE - 10])
def test_a_checkpoint_that_changes_while_it_is_downloaded_is_no_mixture(cloud, store, size):
    put(cloud, f"{store}/x.pt", bytes(2 * storage.PIECE))

    def change_after_the_first_piece(request: Request) -> None:
        if request.headers.get("range", "").startswith(f"bytes={storage.PIECE}-"):
            put(cloud, f"{store}/x.pt", os.urandom(size))

    cloud.before = change_after_the_first_piece
    with pytest.raises(UserError, match="changed while it was downloaded|HTTP 412"):
        loading.local_path(f"{store}/x.pt")
    assert cached() == cached(".*") == []
    cloud.before = lambda request: None
    assert Path(loading.local_path(f"{store}/x.pt")).stat().st_size == size


def test_a_download_that_ends_early_is_not_kept(cloud, store):
    put(cloud, f"{store}/x.pt", bytes(2 * storage.PIECE))
    second = f"bytes={storage.PIECE}-"
    cloud.before = lambda r: Answer(416) if r.headers.get("range", "").startswith(second) else None
    with pytest.raises(UserError, match="it changed while it was downloaded; start again"):
        loading.local_path(f"{store}/x.pt")
    assert cached() == cached(".*") == []


def test_where_nothing_can_be_locked_no_download_of_another_is_disturbed(cloud, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(filelock, "lock_descriptor", refuse)
    cloud.put("gs://bucket/x.pt", b"first")
    folder = Path(loading.local_path("gs://bucket/x.pt")).parent
    (folder / ".another.tmp").touch()
    cloud.put("gs://bucket/x.pt", b"second")
    loading._copy.cache_clear()
    assert Path(loading.local_path("gs://bucket/x.pt")).read_bytes() == b"second"
    assert (folder / ".another.tmp").exists()


def test_what_cannot_be_kept_says_where_and_what_to_do(cloud, monkeypatch, tmp_path):
    cloud.put("gs://bucket/x.pt", b"weights")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError) as raised:
        loading.local_path("gs://bucket/x.pt")
    message = str(raised.value)
    begin = (
        "gs://bucket/x.pt: cannot read this checkpoint: a copy of its 7 bytes cannot be kept in "
    )
    assert message.startswith(begin + str(tmp_path / "file" / "repaint" / "checkpoints"))
    assert message.endswith(
        "Not a directory; make room there, or set XDG_CACHE_HOME to another folder"
    )


# ---- Several processes ----

FETCH = """
import os, sys
from guided_diffusion.machine import storage
path, limit = sys.argv[1:]
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    print(storage.local_copy(path, os.environ["XDG_CACHE_HOME"] + "/repaint/checkpoints"))
except OSError as error:
    print(error.strerror)
"""


def fetch(cloud: Cloud, folder: Path, path: str, limit: str = "") -> subprocess.Popen:
    """Start a process that prints where the copy of a remote file is, or why there is none.

    limit: bytes that a file may have.
    """
    (folder / "fetch.py").write_text(FETCH)
    script = [str(folder / "fetch.py"), path, limit]
    command = [sys.executable, str(EMULATION), cloud.address, *script]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_of_three_processes_one_downloads_and_the_others_wait(cloud, tmp_path):
    data = os.urandom(storage.PIECE + 1000)
    cloud.put("gs://bucket/x.pt", data)
    describing = "GET storage.googleapis.com/storage/v1/b/bucket/o/x.pt?"

    def wait_for_all(request: Request) -> None:
        deadline = time.monotonic() + 30
        while "range" in request.headers and time.monotonic() < deadline:
            if [str(r) for r in cloud.requests].count(describing) >= 3:
                return
            time.sleep(0.01)

    cloud.before = wait_for_all
    processes = [fetch(cloud, tmp_path, "gs://bucket/x.pt") for _ in range(3)]
    finished = [process.communicate(timeout=60) for process in processes]
    (local,) = {out.strip() for out, _ in finished}
    assert Path(local).read_bytes() == data
    assert sum("downloading" in err for _, err in finished) == 1
    assert downloads(cloud) == 2 and cached() == [Path(local)]


@pytest.mark.slow
def test_a_process_killed_in_a_download_leaves_nothing_for_good(cloud, tmp_path):
    data = os.urandom(storage.PIECE + 1000)
    cloud.put("gs://bucket/x.pt", data)
    process = fetch(cloud, tmp_path, "gs://bucket/x.pt")

    def kill_in_the_second_piece(request: Request) -> None:
        if request.headers.get("range", "").startswith(f"bytes={storage.PIECE}-"):
            process.kill()

    cloud.before = kill_in_the_second_piece
    process.communicate()
    assert process.returncode == -9
    assert [path.name[-4:] for path in cached(".*")] == [".tmp"]
    cloud.before = lambda request: None
    assert Path(loading.local_path("gs://bucket/x.pt")).read_bytes() == data
    assert cached(".*") == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_is_told_and_nothing_half_written_is_left(cloud, tmp_path):
    cloud.put("gs://bucket/x.pt", bytes(storage.PIECE))
    out, _ = fetch(cloud, tmp_path, "gs://bucket/x.pt", str(2**20)).communicate()
    assert out.startswith(f"a copy of its {storage.PIECE:,} bytes cannot be kept in ")
    assert "File too large; make room there, or set XDG_CACHE_HOME" in out
    assert cached() == cached(".*") == []


# ---- Whole runs ----

INPUTS = GOLDEN / "e2e" / "resample"
QUICK = {  # five evaluations an image
    "timestep_respacing": "3",
    "schedule_jump_params": {"t_T": 3, "n_sample": 1, "jump_length": 1, "jump_n_sample": 2},
    "device": "cpu",
}


def run(folder: Path, root: str, cloud: Cloud | None = None) -> subprocess.CompletedProcess:
    """`python test.py` with all paths under a root, its config in a folder."""
    config = yaml.safe_load((INPUTS / "conf.yml").read_text()) | QUICK
    config["model_path"] = f"{root}/tiny32.pt"
    dataset = config["data"]["eval"]["resample"]
    dataset |= {"gt_path": f"{root}/gts", "mask_path": f"{root}/masks"}
    dataset["paths"] = {key: f"{root}/{path}" for key, path in dataset["paths"].items()}
    (folder / "conf.yml").write_text(yaml.safe_dump(config))
    script = [str(ROOT / "test.py"), "--conf_path", str(folder / "conf.yml")]
    return subprocess.run(
        [sys.executable, *([str(EMULATION), cloud.address] if cloud else []), *script],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A checkpoint, two images and their masks."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copy(TINY_FILE, folder)
    for kind in ("gts", "masks"):
        (folder / kind).mkdir()
        for path in sorted((INPUTS / kind).iterdir())[:2]:
            shutil.copy(path, folder / kind)
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory, inputs) -> dict[str, bytes]:
    """All pictures after a run on this machine, by name."""
    folder = tmp_path_factory.mktemp("local")
    shutil.copytree(inputs, folder / "data")
    local = run(folder, str(folder / "data"))
    assert local.returncode == 0, local.stderr
    pictures = (folder / "data").rglob("*.png")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in pictures}


@pytest.mark.slow
@pytest.mark.parametrize(
    "store", ["gs://bucket", "https://account.blob.core.windows.net/box"], indirect=True
)
def test_a_run_with_all_paths_in_a_store_gives_what_a_local_run_gives(
    cloud, store, tmp_path, inputs, expected
):
    root = STORES[store]
    cloud.put_folder(f"{root}/data", inputs)

    def pictures() -> dict[str, bytes]:
        names = [name for name in cloud.names(root) if name.endswith(".png")]
        return {name: cloud.blobs[f"{root}/{name}"].data for name in names}

    first = run(tmp_path, f"{store}/data", cloud)
    assert first.returncode == 0, first.stderr
    assert f"results: {store}/data/out/inpainted" in first.stdout
    assert first.stderr.count(f"downloading {store}/data/tiny32.pt") == 1
    assert pictures() == expected and len(expected) == 4 + 8
    record = json.loads(cloud.blobs[f"{root}/data/out/run.json"].data)
    assert record["finished"] and record["checkpoints"][0]["path"] == f"{store}/data/tiny32.pt"

    lost = sorted(name for name in expected if "inpainted" in name)[1]
    del cloud.blobs[f"{root}/{lost}"]
    before = {name: cloud.blobs[f"{root}/{name}"] for name in pictures()}
    again = run(tmp_path, f"{store}/data", cloud)
    assert again.returncode == 0, again.stderr
    assert "1 of 2 are finished and skipped" in again.stdout
    assert "downloading" not in again.stderr
    assert pictures() == expected
    finished = [name for name in before if Path(name).name != Path(lost).name]
    assert len(finished) == 2 + 4
    assert all(cloud.blobs[f"{root}/{name}"] is before[name] for name in finished)


@pytest.mark.slow
def test_a_run_without_credentials_ends_with_one_line_and_status_2(cloud, tmp_path, inputs):
    cloud.put_folder("gs://bucket/data", inputs)
    cloud.private.add("gs://bucket")
    start = time.monotonic()
    refused = run(tmp_path, "gs://bucket/data", cloud)
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ") and "gs://bucket/data" in line and "log in with" in line
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_a_run_on_an_unknown_kind_of_path_ends_with_one_line_and_status_2(cloud, tmp_path):
    refused = run(tmp_path, "s3://bucket/data", cloud)
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ") and "s3://bucket/data" in line and "not supported" in line


def test_remote_images_and_masks_are_paired_like_local_ones(cloud, store):
    for name in ("b/x.png", "a.jpg", "c.txt", ".hidden/y.png"):
        put(cloud, f"{store}/gts/{name}", b"")
    put(cloud, f"{store}/masks/m.png", b"")
    pairs = find_pairs(f"{store}/gts", f"{store}/masks/m.png")
    assert [(pair.image_path, pair.name) for pair in pairs] == [
        (f"{store}/gts/a.jpg", "a.png"),
        (f"{store}/gts/b/x.png", "b/x.png"),
    ]
    assert {pair.mask_path for pair in pairs} == {f"{store}/masks/m.png"}
    (single,) = find_pairs(f"{store}/gts/a.jpg", f"{store}/masks/m.png")
    assert single.name == "a.png"
