"""The downloads against servers that fail in every way that real ones do.

What https:// asks for comes from a server on this machine, what Google Drive has from a stand-in
for gdown. Large files are sparse, so they cost nothing.
"""

import hashlib
import http.server
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch

from guided_diffusion.downloads import __main__ as command
from guided_diffusion.downloads import transport
from guided_diffusion.downloads.table import DEFAULT, TABLE

REPOSITORY = Path(__file__).parents[2]
DRIVE_WEIGHTS = 552_814_086 * 4  # bytes of the unconditional network's weights, in fp32
NAMES = {
    "celeba": "celeba256_250000.pt",
    "places": "places256_300000.pt",
    "imagenet": "256x256_diffusion.pt",
    "classifier": "256x256_classifier.pt",
}
SIZES = {
    "celeba": DRIVE_WEIGHTS + 150_000,
    "places": DRIVE_WEIGHTS + 90_000,
    "imagenet": 2_215_479_544,
    "classifier": 216_496_432,
}
DRIVE_IDS = {
    "celeba": "1norNWWGYP3EZ_o05DmoW1ryKuKMmhlCX",
    "places": "1QEl-btGbzQz6IwkXiFGd49uQNTUTtHsk",
    "data": "1Q_dxuyI41AAmSv9ti3780BwaJQqwvwMv",
    "ffhq_p2": "1nlCPBqOqSeqAQ8F4noThbnmr4okriwTc",
}
BLOB_STORE = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"
HEADS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"
# Address, fewest and most bytes, and SHA-256 (or its first digits) of what LPIPS needs.
LPIPS = {
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth": (
        (244403360, 245451936),
        "7be5be79",
    ),
    f"{HEADS}/alex.pth": (
        (6009, 6009),
        "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    ),
    "https://download.pytorch.org/models/vgg16-397923af.pth": ((553430176, 554478752), "397923af"),
    f"{HEADS}/vgg.pth": (
        (7289, 7289),
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    ),
}
# The latent model: the weights that it surely has, 4 bytes each, and where it comes from.
LDM_WEIGHTS = (387_245_827 + 387_245_829 + 53_219_486 + 3_000) * 4
LDM_URL = "https://heibox.uni-heidelberg.de/f/4d9ac7ea40c64582b7c9/?dl=1"
QUOTA_PAGE = (
    b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"
)
FACE = b"a picture of a face"
MASK = b"a mask"
WHOLE = b"PK" + bytes(range(250)) * 1000  # a checkpoint, in the tables of the tests


@dataclass
class Server:
    """What the addresses bring, and how the next requests go wrong: one fault each."""

    files: dict[str, bytes] = field(default_factory=dict)  # by address; "": all others
    faults: list[str | int] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)  # the address, and a first byte if asked for
    address: str = ""

    def open(self, request: Request, **settings: object) -> object:
        moved = Request(f"{self.address}/{request.full_url}", headers=dict(request.header_items()))
        return urlopen(moved, **settings)


def handler_of(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url, first = self.path[1:], self.headers.get("Range", "")
            server.asked.append(f"{url} {first}".strip())
            fault = server.faults.pop(0) if server.faults else None
            content = server.files.get(url, server.files.get(""))
            if fault == "moved":
                self.send_response(302)
                self.send_header("Location", self.path)
                return self.end_headers()
            if isinstance(fault, int) or content is None:
                return self.send_error(fault or 404)
            start = 0 if fault == "no ranges" else int(first[len("bytes=") : -1] or 0)
            if first and start >= len(content):
                return self.send_error(416)
            self.answer(content, start, bool(first) and fault != "no ranges", fault)

        def answer(self, content: bytes, start: int, partial: bool, fault: str | None) -> None:
            self.send_response(206 if partial else 200)
            if fault != "no length":
                self.send_header("Content-Length", str(len(content) - start))
            if partial:
                shift = 1 if fault == "another part" else 0
                self.send_header("Content-Range", f"bytes {start + shift}-/{len(content)}")
            self.end_headers()
            half = fault in ("cut", "Ctrl-C")
            self.wfile.write(content[start : (start + len(content)) // 2 if half else None])
            if fault == "Ctrl-C":
                self.wfile.flush()
                time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    server = Server()
    handler = handler_of(server)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.address = f"http://127.0.0.1:{httpd.server_port}"
        monkeypatch.setattr(transport, "urlopen", server.open)
        monkeypatch.setattr(transport, "WAITS", (0, 0, 0))
        yield server
        httpd.shutdown()
        thread.join()


class Drive:
    """A stand-in for gdown: notes its arguments, then does what the test says with the file."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.behave: Callable[[Path], object] = lambda out: pytest.fail("gdown was called")

    def download(self, id: str, output: str, resume: bool, timeout: float) -> None:
        assert resume and timeout and not os.path.exists(output)
        self.asked.append(id)
        self.behave(Path(output))


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


class Checkout:
    """A repository's folder, and the command as it runs there."""

    def __init__(self, root: Path, monkeypatch, capsys) -> None:
        self.root = root / "the repo"
        self.pretrained = self.root / "data" / "pretrained"
        self.datasets = self.root / "data" / "datasets"
        self.zip = self.root / "data" / "datasets.zip"
        self.pretrained.mkdir(parents=True)
        self.drive = Drive()
        self.monkeypatch, self.capsys = monkeypatch, capsys
        monkeypatch.setitem(sys.modules, "gdown", self.drive)
        monkeypatch.setattr(command, "ROOT", self.root)
        monkeypatch.chdir(root)  # and back after the test

    def expect(self, name: str, **values: object) -> None:
        """Have another row for what goes by this name."""
        rows = [replace(row, **values) if row.name == name else row for row in command.TABLE]
        self.monkeypatch.setattr(command, "TABLE", rows)

    def run(self, *names: str) -> Result:
        code = command.main(names)
        return Result(code, *self.capsys.readouterr())

    def checkpoints(self) -> dict[str, int]:
        """Everything in data/pretrained, with its size."""
        return {path.name: path.stat().st_size for path in self.pretrained.iterdir()}

    def place(self, name: str, size: int, start: bytes = b"PK") -> Path:
        return sparse(self.pretrained / name, size, start)

    def files(self) -> list[Path]:
        return [path for path in (self.root / "data").rglob("*") if path.is_file()]


def sparse(path: Path, size: int, start: bytes = b"PK") -> Path:
    path.write_bytes(start)
    os.truncate(path, size)
    return path


@pytest.fixture
def checkout(tmp_path, monkeypatch, capsys, server) -> Checkout:
    """The network has nothing, unless a test says so."""
    return Checkout(tmp_path, monkeypatch, capsys)


@pytest.fixture
def classifier(checkout: Checkout, server: Server) -> Checkout:
    """A table whose classifier is small, and the address that brings it."""
    checkout.expect("classifier", size=(len(WHOLE), len(WHOLE)))
    server.files[f"{BLOB_STORE}/{NAMES['classifier']}"] = WHOLE
    return checkout


def example_zip(path: Path, members: dict[str, bytes] | None = None) -> Path:
    members = members or {
        "datasets/gts/face/000.png": FACE,
        "datasets/gt_keep_masks/face/000.png": MASK,
        "datasets/other/000.png": b"not asked for",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def copying(path: Path) -> Callable[[Path], object]:
    return lambda out: shutil.copy(path, out)


# ---- The table ----


def test_the_table_has_the_published_addresses_and_sizes():
    rows = {row.name: row for row in TABLE if row.name != "lpips"}
    assert {name: rows[name].address for name in DRIVE_IDS} == DRIVE_IDS
    for name in ("imagenet", "classifier"):
        assert rows[name].size == (SIZES[name], SIZES[name])
        assert rows[name].address == f"{BLOB_STORE}/{NAMES[name]}"
    for name in ("celeba", "places"):
        assert rows[name].size == (DRIVE_WEIGHTS, DRIVE_WEIGHTS + 2**20)
    assert {name: Path(rows[name].file).name for name in NAMES} == NAMES
    assert (rows["ldm"].address, rows["ldm"].size[0]) == (LDM_URL, LDM_WEIGHTS)
    lpips = [row for row in TABLE if row.name == "lpips"]
    assert {row.address: (row.size, row.sha256) for row in lpips} == LPIPS


def test_no_two_files_of_the_table_share_an_address_or_a_place():
    for values in ([row.file for row in TABLE], [row.address for row in TABLE]):
        assert len(set(values)) == len(values) == 27
    for row in TABLE:
        assert row.file.startswith("data/") and (row.on_drive or " " not in row.address)
        assert not row.on_drive or re.fullmatch(r"1[\w-]{32}", row.address)


def test_the_list_has_a_line_for_every_file(checkout):
    result = checkout.run("--list")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [[row.name, row.file] for row in TABLE]
    assert "imagenet  " in lines[2] and " 2.2 GB " in lines[2] and "OpenAI" in lines[2]
    assert " 3.3 GB or more " in lines[5] and " 6 kB " in lines[7] and "size unknown" in lines[10]


# ---- What works ----


@pytest.mark.parametrize("target", ["imagenet", "classifier", "openai64", "lsun_cat"])
@pytest.mark.parametrize("fault", [None, "no length", 503, "cut"])
def test_openai_checkpoint_comes_over_https(checkout, server, target, fault):
    """A server that is busy, or breaks off, is asked again for what is missing."""
    whole = WHOLE if target in NAMES else latent_checkpoint(60_000)
    checkout.expect(target, size=(len(whole), len(whole)) if target in NAMES else (0, float("inf")))
    (row,) = [row for row in TABLE if row.name == target]
    server.files[row.address] = whole
    server.faults = [fault] if fault else []
    result = checkout.run(target)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (checkout.root / row.file).read_bytes() == whole
    url = f"{BLOB_STORE}/{Path(row.file).name}"
    again = {None: [], "no length": [], 503: [url], "cut": [f"{url} bytes={len(whole) // 2}-"]}
    assert server.asked == [url, *again[fault]]
    assert len(checkout.checkpoints()) == 1


@pytest.mark.parametrize(
    "target, start", [("celeba", b"PK"), ("places", b"PK"), ("places", b"\x80\x02")]
)
def test_drive_checkpoint_comes_through_gdown(checkout, target, start):
    """A zip archive and the pickle of PyTorch before 1.6 are both what torch.save wrote."""
    checkout.drive.behave = lambda out: sparse(out, SIZES[target], start)
    result = checkout.run(target)
    assert result.returncode == 0, result.stdout + result.stderr
    assert checkout.checkpoints() == {NAMES[target]: SIZES[target]}
    assert checkout.drive.asked == [DRIVE_IDS[target]]


@pytest.mark.parametrize("kept, code", [(None, 0), (-30, 1)])
def test_of_a_drive_file_of_unknown_size_the_end_tells(checkout, kept, code):
    checkout.drive.behave = lambda out: out.write_bytes(latent_checkpoint()[:kept])
    result = checkout.run("ffhq_p2")
    assert result.returncode == code
    assert list(checkout.checkpoints()) == ([] if code else ["ffhq_p2.pt"])
    assert ("why: damaged or not a PyTorch file" in result.stdout) == bool(code)


def test_data_is_unpacked_without_touching_what_is_there(checkout, tmp_path):
    archive = example_zip(
        tmp_path / "made.zip",
        {
            "datasets/gts/": b"",
            "datasets/gts/face/000.png": FACE,
            "datasets/gts/face/my own.png": b"theirs",
            "datasets/gts/portraits/0.png": b"theirs",
            "datasets/gt_keep_masks/face/000.png": MASK,
            "datasets/other/000.png": b"not asked for",
        },
    )
    own = {"gts/face/my own.png": b"mine", "gts/portraits/0.png": b"shipped"}
    for name, content in own.items():
        path = checkout.datasets / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    checkout.drive.behave = copying(archive)
    result = checkout.run("data")
    assert result.returncode == 0, result.stdout + result.stderr
    contents = {str(path.relative_to(checkout.root / "data")): path for path in checkout.files()}
    assert contents.pop("datasets.zip").read_bytes() == archive.read_bytes()
    assert {name: path.read_bytes() for name, path in contents.items()} == {
        "datasets/gts/face/000.png": FACE,
        "datasets/gt_keep_masks/face/000.png": MASK,
        **{f"datasets/{name}": content for name, content in own.items()},
    }
    assert not (checkout.root / "data/datasets.zip.unpacked").exists()
    assert checkout.drive.asked == [DRIVE_IDS["data"]]


def test_no_argument_means_all_of_the_original_from_any_folder(checkout, server, tmp_path):
    archive = example_zip(tmp_path / "made.zip")
    for name in ("imagenet", "classifier"):
        checkout.expect(name, size=(len(WHOLE), len(WHOLE)))
    server.files[""] = WHOLE
    by_name = {NAMES[target]: SIZES[target] for target in ("celeba", "places")}
    checkout.drive.behave = lambda out: (
        shutil.copy(archive, out) if "zip" in out.name else sparse(out, by_name[out.stem])
    )
    os.chdir(tmp_path)
    result = checkout.run()
    assert result.returncode == 0, result.stdout + result.stderr
    assert checkout.checkpoints() == by_name | {
        NAMES[name]: len(WHOLE) for name in ("imagenet", "classifier")
    }
    assert (checkout.datasets / "gts/face/000.png").read_bytes() == FACE
    assert len(server.asked) == 2 and len(checkout.drive.asked) == 3
    assert result.stdout.count("licences") == 1


def test_complete_files_are_not_fetched_again(checkout, server):
    for target, name in NAMES.items():
        checkout.place(name, SIZES[target])
    example_zip(checkout.zip)
    result = checkout.run()
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("already complete, skipped") == 5
    assert server.asked == checkout.drive.asked == []
    assert (checkout.datasets / "gts/face/000.png").read_bytes() == FACE


# ---- lpips: four files, whose digests are known ----


@pytest.fixture
def lpips(checkout: Checkout, server: Server) -> dict[str, bytes]:
    """A table whose four files are small, and what their addresses bring."""
    contents = {url: b"\x80\x02" + url.encode() * 20 for url in LPIPS}
    rows = [
        replace(
            row,
            size=(len(contents[row.address]),) * 2,
            sha256=hashlib.sha256(contents[row.address]).hexdigest()[: len(row.sha256)],
        )
        for row in TABLE
        if row.name == "lpips"
    ]
    checkout.monkeypatch.setattr(command, "TABLE", rows)
    server.files = dict(contents)
    return contents


def lpips_files(checkout: Checkout) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (checkout.pretrained / "lpips").iterdir()}


def test_lpips_is_four_files_from_two_places(checkout, server, lpips):
    result = checkout.run("lpips")
    assert result.returncode == 0, result.stdout + result.stderr
    assert lpips_files(checkout) == {Path(url).name: content for url, content in lpips.items()}
    assert server.asked == list(LPIPS)
    again = checkout.run("lpips")
    assert again.stdout.count("already complete, skipped") == 4
    assert len(server.asked) == 4


@pytest.mark.parametrize("url", LPIPS, ids=lambda url: Path(url).name)
def test_lpips_of_other_content_is_refused_and_the_rest_is_kept(checkout, server, lpips, url):
    server.files[url] = damaged = lpips[url][:-1] + b"?"
    result = checkout.run("lpips")
    assert result.returncode == 1
    (row,) = [row for row in command.TABLE if row.address == url]
    digest = hashlib.sha256(damaged).hexdigest()
    assert f"its SHA-256 is {digest}, expected {row.sha256};" in result.stdout
    assert f"  MISSING  {row.file}\n" in result.stdout
    assert set(lpips_files(checkout)) == {Path(other).name for other in LPIPS} - {Path(url).name}


def test_lpips_of_another_size_is_refused(checkout, server):
    server.files[""] = b"PK" + bytes(6008)
    result = checkout.run("lpips")
    assert result.returncode == 1
    assert lpips_files(checkout) == {}
    for least in ("244403360 to 245451936", "6009", "553430176 to 554478752", "7289"):
        assert f"wrong size: 6010 bytes, expected {least};" in result.stdout


def test_the_published_heads_pass(checkout):
    """The file as torchmetrics has it."""
    found = importlib.util.find_spec("torchmetrics")  # without torch's seconds
    if found is None:
        pytest.skip("torchmetrics is not installed")
    package = Path(found.origin).parent
    (checkout.pretrained / "lpips").mkdir()
    for name in ("alex.pth", "vgg.pth"):
        shutil.copy(package / "functional/image/lpips_models" / name, checkout.pretrained / "lpips")
    result = checkout.run("lpips")
    assert result.returncode == 1  # the other two are missing
    assert result.stdout.count("already complete, skipped") == 2
    assert result.stdout.count("  there    ") == 2


# ---- ldm: the checkpoint itself, or a zip that holds it ----


@pytest.fixture
def small(checkout: Checkout) -> Checkout:
    """A table that expects a tiny latent model, of 1000 weights."""
    checkout.expect("ldm", size=(4000, float("inf")))
    return checkout


@cache
def latent_checkpoint(weights: int = 1000) -> bytes:
    """What Lightning writes, made by the real torch.save."""
    contents = {"state_dict": {"betas": torch.rand(weights)}, "epoch": 6, "callbacks": {}}
    torch.save(contents, file := io.BytesIO())
    return file.getvalue()


def zip_with(path: Path, *checkpoints: str, content: bytes | None = None) -> Path:
    """A deflated zip of small files and of checkpoints by these names."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ldm/project.yaml", "model: {}\n")
        archive.writestr("ldm/model.ckpt.txt", "no checkpoint, by its name")
        archive.writestr("ldm/pictures/data.pkl", "of a checkpoint only with one folder above it")
        for name in checkpoints:
            archive.writestr(name, content or latent_checkpoint())
    return path


@pytest.mark.parametrize(
    "names",
    [["model.ckpt"], ["a/b/my last.ckpt"], ["ldm/last.ckpt", "__MACOSX/ldm/._last.ckpt"]],
)
def test_ldm_is_unpacked_from_a_zip_whatever_its_name_there(small, server, tmp_path, names):
    server.files[LDM_URL] = zip_with(tmp_path / "made.zip", *names).read_bytes()
    result = small.run("ldm")
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = small.pretrained.iterdir()
    assert path.name == "inpainting_big.ckpt" and path.read_bytes() == latent_checkpoint()
    assert server.asked == [LDM_URL]
    assert "  there    data/pretrained/inpainting_big.ckpt\n" in result.stdout
    again = small.run("ldm")
    assert "inpainting_big.ckpt: already complete, skipped" in again.stdout
    assert len(server.asked) == 1


def test_ldm_that_is_the_checkpoint_itself_only_gets_its_name(small, server):
    server.files[LDM_URL] = latent_checkpoint()
    result = small.run("ldm")
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = small.pretrained.iterdir()
    assert path.name == "inpainting_big.ckpt" and path.read_bytes() == latent_checkpoint()


def sparse_checkpoint(path: Path, size: int) -> Path:
    """A torch archive of so many bytes: a hole between its pickle and the list at its end."""
    length_of_list = 0
    for _ in range(2):  # the first time tells how long the list is
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}.")
            archive.start_dir = size - length_of_list
        length_of_list += path.stat().st_size - size
    return path


@pytest.mark.parametrize("size, code", [(LDM_WEIGHTS - 1, 1), (LDM_WEIGHTS, 0), (10**10, 0)])
def test_ldm_has_at_least_its_weights(checkout, size, code):
    sparse_checkpoint(checkout.pretrained / "inpainting_big.zip", size)
    result = checkout.run("ldm")
    assert result.returncode == code, result.stdout + result.stderr
    name = "inpainting_big.zip" if code else "inpainting_big.ckpt"
    assert checkout.checkpoints() == {name: size}
    least = f"(wrong size: {size} bytes, expected {LDM_WEIGHTS} or more): delete it and run again"
    assert (least in result.stdout) == bool(code)


@pytest.mark.parametrize("content", [b"PK" + bytes(9000), None], ids=["no archive", "zip"])
def test_wrong_ldm_under_the_final_name_is_set_aside(small, server, tmp_path, content):
    """Bytes of no kind, and the zip under the checkpoint's name."""
    zipped = zip_with(tmp_path / "made.zip", "model.ckpt", "second.ckpt")
    wrong = content or zipped.read_bytes()
    wrong += bytes(4000)[: max(0, 4000 - len(wrong))]
    (small.pretrained / "inpainting_big.ckpt").write_bytes(wrong)
    server.files[LDM_URL] = latent_checkpoint()
    result = small.run("ldm")
    assert result.returncode == 0, result.stdout
    assert (small.pretrained / "inpainting_big.ckpt").read_bytes() == latent_checkpoint()
    assert (small.pretrained / "inpainting_big.ckpt.bad").read_bytes() == wrong
    why = "it is no zip archive with a data.pkl"
    assert f"{why}; moved to data/pretrained/inpainting_big.ckpt.bad" in result.stdout


def test_zip_of_ldm_that_was_saved_by_hand_is_unpacked_without_a_download(small):
    zip_with(small.pretrained / "inpainting_big.zip", "model.ckpt")
    result = small.run("ldm")
    assert result.returncode == 0, result.stdout + result.stderr
    assert small.checkpoints() == {"inpainting_big.ckpt": len(latent_checkpoint())}
    assert "data/pretrained/inpainting_big.zip is not needed any more, removed" in result.stdout


def test_way_by_hand_of_ldm_leads_to_the_zip(small):
    result = small.run("ldm")
    assert result.returncode == 1
    summary = result.stdout.partition("Summary\n")[2]
    assert summary == (
        "  MISSING  data/pretrained/inpainting_big.ckpt\n"
        "           why: the download failed: HTTP Error 404: Not Found\n"
        f"           by hand: open {LDM_URL} in a browser\n"
        f"           and save the file as {small.pretrained}/inpainting_big.zip\n"
        "           then run the same command again, which checks and unpacks it\n"
    )


@pytest.mark.parametrize("names", [[], ["a.ckpt", "b/a.ckpt"]])
def test_zip_of_none_or_several_checkpoints_is_said_and_kept(small, server, tmp_path, names):
    server.files[LDM_URL] = zip_with(tmp_path / "made.zip", *names).read_bytes()
    result = small.run("ldm")
    assert result.returncode == 1
    path = "data/pretrained/inpainting_big.zip"
    why = f"why: {path} holds {len(names)} *.ckpt files, not one: see python -m zipfile -l {path}\n"
    assert why in result.stdout
    assert list(small.checkpoints()) == ["inpainting_big.zip"]


@pytest.mark.parametrize(
    "content, why",
    [
        (b"text " * 1000, "not a PyTorch file: it starts with the bytes 7465"),
        (b"text", "wrong size: 4 bytes, expected 4000 or more"),
    ],
    ids=["text", "small"],
)
def test_zip_of_another_checkpoint_is_said_and_kept(small, server, tmp_path, content, why):
    archive = zip_with(tmp_path / "made.zip", "x.ckpt", content=content)
    server.files[LDM_URL] = archive.read_bytes()
    result = small.run("ldm")
    assert result.returncode == 1
    start = "why: data/pretrained/inpainting_big.zip does not hold the published checkpoint ("
    assert f"{start}{why}): delete it and run again\n" in result.stdout
    assert list(small.checkpoints()) == ["inpainting_big.zip"]


def test_damage_inside_the_zip_of_ldm_is_found(small, server, tmp_path):
    archive = tmp_path / "made.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("model.ckpt", latent_checkpoint())
    server.files[LDM_URL] = archive.read_bytes().replace(b"callbacks", b"CALLBACKS", 1)
    result = small.run("ldm")
    assert result.returncode == 1
    assert "why: damaged zip file: model.ckpt in it is not whole; removed" in result.stdout
    assert small.checkpoints() == {}


def test_full_disk_is_named_and_costs_no_second_download(small, monkeypatch):
    archive = zip_with(small.pretrained / "inpainting_big.zip", "model.ckpt")
    before = archive.read_bytes()

    def half(self: zipfile.ZipFile, name: str, folder: str) -> str:
        Path(folder).mkdir()
        (Path(folder) / name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extract", half)
    result = small.run("ldm")
    assert result.returncode == 1
    path = "data/pretrained/inpainting_big.ckpt"
    assert f"why: cannot write {path}: No space left on device\n" in result.stdout
    assert {path.name: path.read_bytes() for path in small.pretrained.iterdir()} == {
        "inpainting_big.zip": before
    }


def test_unpacking_killed_midway_leaves_no_half_of_a_checkpoint(small):
    """What it leaves in its own folder is gone after the next run."""
    zip_with(small.pretrained / "inpainting_big.zip", "model.ckpt")
    staging = small.pretrained / "inpainting_big.zip.unpacked"
    staging.mkdir()
    (staging / "model.ckpt").write_bytes(latent_checkpoint()[:3000])
    (staging / "of yesterday.ckpt").write_bytes(b"")
    result = small.run("ldm")
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = small.pretrained.iterdir()
    assert path.read_bytes() == latent_checkpoint()


@pytest.mark.parametrize("zipped", [True, False])
def test_ldm_is_resumed_until_its_end_is_there(small, server, tmp_path, zipped):
    """Of a length that is not known, the server tells whether it is whole."""
    whole = latent_checkpoint()
    if zipped:
        whole = zip_with(tmp_path / "made.zip", "model.ckpt").read_bytes()
    part = small.pretrained / "inpainting_big.zip.part"
    part.write_bytes(whole[:3000])
    cut = (3000 + len(whole)) // 2
    server.files[LDM_URL] = whole
    server.faults = ["cut", 404]
    result = small.run("ldm")
    assert result.returncode == 1
    assert "same command again to resume" in result.stdout
    assert small.checkpoints() == {part.name: cut}
    result = small.run("ldm")
    assert result.returncode == 0, result.stdout + result.stderr
    assert server.asked == [f"{LDM_URL} bytes={n}-" for n in (3000, cut, cut)]
    (path,) = small.pretrained.iterdir()
    assert path.read_bytes() == latent_checkpoint()


@pytest.mark.parametrize(
    "content, why",
    [
        (QUOTA_PAGE, "a web page came instead of the file"),
        (bytes(5000), "damaged or not a zip file"),
        (latent_checkpoint()[:-30], "damaged or not a zip file"),
    ],
    ids=["page", "zeros", "cut off"],
)
def test_what_is_neither_ldm_nor_a_zip_is_removed(small, server, content, why):
    server.files[LDM_URL] = content
    result = small.run("ldm")
    assert result.returncode == 1
    assert f"why: {why}" in result.stdout and "starts afresh" in result.stdout
    assert small.checkpoints() == {}


# ---- Resuming ----


@pytest.mark.parametrize("faults", [[], ["moved"]])
def test_partial_file_is_resumed(classifier, server, faults):
    (classifier.pretrained / "256x256_classifier.pt.part").write_bytes(WHOLE[:1000])
    server.faults = list(faults)
    assert classifier.run("classifier").returncode == 0
    asked = f"{BLOB_STORE}/256x256_classifier.pt bytes=1000-"
    assert server.asked == [asked] * (1 + len(faults))
    (path,) = classifier.pretrained.iterdir()
    assert path.name == NAMES["classifier"] and path.read_bytes() == WHOLE


def test_server_without_ranges_sends_the_whole_file_again(classifier, server):
    (classifier.pretrained / "256x256_classifier.pt.part").write_bytes(b"PK" + bytes(999))
    server.faults = ["no ranges"]
    assert classifier.run("classifier").returncode == 0
    (path,) = classifier.pretrained.iterdir()
    assert path.read_bytes() == WHOLE


def test_another_part_than_asked_for_is_not_appended(classifier, server):
    (classifier.pretrained / "256x256_classifier.pt.part").write_bytes(WHOLE[:1000])
    server.faults = ["another part"] * 4
    result = classifier.run("classifier")
    assert result.returncode == 1 and "another part of the file" in result.stdout
    assert classifier.checkpoints() == {"256x256_classifier.pt.part": 1000}


@pytest.mark.parametrize("target", ["classifier", "celeba"])
def test_part_that_is_complete_only_gets_its_name(checkout, server, target):
    checkout.place(f"{NAMES[target]}.part", SIZES[target])
    assert checkout.run(target).returncode == 0
    assert server.asked == checkout.drive.asked == []
    assert checkout.checkpoints() == {NAMES[target]: SIZES[target]}


def test_of_unknown_size_the_server_says_that_a_part_is_complete(checkout, server):
    """A pickle of PyTorch before 1.6 has no list at its end."""
    old = b"\x80\x02" + bytes(1000)
    server.files[f"{BLOB_STORE}/lsun_cat.pt"] = old
    for there in (500, len(old)):
        (checkout.pretrained / "lsun_cat.pt.part").write_bytes(old[:there])
        assert checkout.run("lsun_cat").returncode == 0
        assert (checkout.pretrained / "lsun_cat.pt").read_bytes() == old
        (checkout.pretrained / "lsun_cat.pt").unlink()


def test_download_that_breaks_off_leaves_a_part_that_the_next_run_resumes(classifier, server):
    server.faults = ["cut"] * 4
    result = classifier.run("classifier")
    assert result.returncode == 1
    ((name, size),) = classifier.checkpoints().items()
    assert name == "256x256_classifier.pt.part" and 0.9 * len(WHOLE) < size < len(WHOLE)
    assert "MISSING  data/pretrained/256x256_classifier.pt" in result.stdout
    assert "the connection broke off" in result.stdout
    assert "run the same command again to resume" in result.stdout
    assert classifier.run("classifier").returncode == 0
    assert server.asked[-1].endswith(f" bytes={size}-")
    (path,) = classifier.pretrained.iterdir()
    assert path.read_bytes() == WHOLE


def test_ctrl_c_leaves_a_part_that_the_next_run_resumes(classifier, server):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    server.faults = ["Ctrl-C"]
    result = classifier.run("classifier")
    assert result.returncode == 130
    assert "Interrupted. Run the same command again to resume." in result.stdout
    ((name, size),) = classifier.checkpoints().items()
    assert name == "256x256_classifier.pt.part" and 0 < size < len(WHOLE)
    assert classifier.run("classifier").returncode == 0
    assert server.asked[-1].endswith(f" bytes={size}-")
    (path,) = classifier.pretrained.iterdir()
    assert path.read_bytes() == WHOLE


def test_gdown_that_stops_keeps_its_own_partial_file(checkout):
    def stop(out: Path) -> None:
        sparse(out.with_name(f"{out.name}abcdefgh.part"), 700)
        raise OSError(ConnectionError("connection\nlost"))

    checkout.drive.behave = stop
    result = checkout.run("places")
    assert result.returncode == 1
    assert checkout.checkpoints() == {"places256_300000.pt.partabcdefgh.part": 700}
    assert "gdown failed: connection lost; run the" in result.stdout
    assert "same command again to resume" in result.stdout


class SparseFile(http.server.BaseHTTPRequestHandler):
    """Serves a celeba of PK and zeros; only a range is short enough to be sent whole."""

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first, size = int(asked[1]) if asked else 0, SIZES["celeba"]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(size - first))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        self.end_headers()
        self.wfile.write(bytes(size - first) if asked else b"PK")

    def log_message(self, *args: object) -> None:
        pass


def test_real_gdown_resumes(checkout, monkeypatch):
    monkeypatch.delitem(sys.modules, "gdown")
    gdown = pytest.importorskip("gdown")
    checkout.place("celeba256_250000.pt.partabcdefgh.part", SIZES["celeba"] - 1000)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SparseFile) as httpd:
        threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}).start()
        url, real = f"http://127.0.0.1:{httpd.server_port}/", gdown.download
        monkeypatch.setattr(gdown, "download", lambda id, **settings: real(url=url, **settings))
        result = checkout.run("celeba")
        httpd.shutdown()
    assert result.returncode == 0, result.stdout + result.stderr
    assert checkout.checkpoints() == {NAMES["celeba"]: SIZES["celeba"]}


# ---- What comes is not the file ----


@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_size_from_https_is_refused_and_removed(classifier, server, change):
    content = (WHOLE + b"?")[: len(WHOLE) + change]
    server.files[f"{BLOB_STORE}/{NAMES['classifier']}"] = content
    result = classifier.run("classifier")
    assert result.returncode == 1
    assert classifier.checkpoints() == {}
    expected = f"wrong size: {len(WHOLE) + change} bytes, expected {len(WHOLE)};"
    assert expected in result.stdout
    assert "starts afresh" in result.stdout


@pytest.mark.parametrize("size", [DRIVE_WEIGHTS - 1, DRIVE_WEIGHTS + 2**20 + 1])
def test_wrong_size_from_drive_is_refused_and_removed(checkout, size):
    checkout.drive.behave = lambda out: sparse(out, size)
    result = checkout.run("celeba")
    assert result.returncode == 1
    assert checkout.checkpoints() == {}
    assert f"wrong size: {size} bytes" in result.stdout
    assert "starts afresh" in result.stdout


def test_right_size_with_other_content_is_refused(classifier, server):
    server.files[f"{BLOB_STORE}/{NAMES['classifier']}"] = b"XY" + WHOLE[2:]
    result = classifier.run("classifier")
    assert result.returncode == 1
    assert classifier.checkpoints() == {}
    assert "not a PyTorch file" in result.stdout


@pytest.mark.parametrize("part", [WHOLE + b"?", QUOTA_PAGE], ids=["long", "page"])
def test_part_that_cannot_be_resumed_is_removed_first(classifier, server, part):
    (classifier.pretrained / "256x256_classifier.pt.part").write_bytes(part)
    result = classifier.run("classifier")
    assert result.returncode == 0
    assert server.asked == [f"{BLOB_STORE}/256x256_classifier.pt"]
    assert "removed, starting afresh" in result.stdout


def failing(message: str) -> Callable[[Path], object]:
    def fail(out: Path) -> None:
        raise RuntimeError(message)

    return fail


@pytest.mark.parametrize("target", ["celeba", "data"])
@pytest.mark.parametrize(
    "behave",
    [
        lambda out: out.write_bytes(QUOTA_PAGE),
        failing("Error:\n\n\tToo many\n\tusers have viewed or downloaded this file"),
        failing("\tCannot retrieve the public link. You may have had many\n\taccesses."),
    ],
)
def test_quota_of_drive_is_named_with_what_to_do(checkout, target, behave):
    """As a page in place of the file, and as gdown tells it, which breaks its lines anywhere."""
    checkout.drive.behave = behave
    result = checkout.run(target)
    assert result.returncode == 1
    place = checkout.pretrained / NAMES[target] if target == "celeba" else checkout.zip
    assert "Google Drive's daily quota for this file is used up" in result.stdout
    assert f"open https://drive.google.com/file/d/{DRIVE_IDS[target]}/view" in result.stdout
    assert f"save the file as {place}\n" in result.stdout
    assert checkout.checkpoints() == {}
    assert not checkout.zip.exists()


def test_corrupt_zip_is_not_unpacked(checkout, tmp_path):
    archive = example_zip(tmp_path / "made.zip")
    archive.write_bytes(archive.read_bytes().replace(FACE, FACE.upper()))
    checkout.drive.behave = copying(archive)
    result = checkout.run("data")
    assert result.returncode == 1
    assert "damaged zip file: datasets/gts/face/000.png in it is not whole" in result.stdout
    assert checkout.files() == []


def test_zip_whose_list_points_before_its_start_is_damaged(checkout, tmp_path):
    archive = bytearray(example_zip(tmp_path / "made.zip").read_bytes())
    archive[-5] += 4  # where the list begins: 1024 bytes later than it does
    checkout.drive.behave = lambda out: out.write_bytes(archive)
    result = checkout.run("data")
    assert result.returncode == 1 and "why: damaged or not a zip file" in result.stdout
    assert checkout.files() == []


@pytest.mark.parametrize(
    "name", ["holiday.png", "datasets/gts/0.png", "datasets/gt_keep_masks/0.png"]
)
def test_zip_of_something_else_is_said(checkout, tmp_path, name):
    checkout.drive.behave = copying(example_zip(tmp_path / "made.zip", {name: b"sun"}))
    result = checkout.run("data")
    assert result.returncode == 1
    assert "holds no datasets/gts" in result.stdout
    assert {path.name for path in checkout.zip.parent.iterdir()} == {"pretrained", "datasets.zip"}


def test_a_zip_cannot_write_outside_of_data(checkout, tmp_path):
    names = ["datasets/gts/a.png", "datasets/gt_keep_masks/a.png", "datasets/gts/../../../out.png"]
    archive = example_zip(tmp_path / "made.zip", dict.fromkeys(names, b"?"))
    checkout.drive.behave = copying(archive)
    result = checkout.run("data")
    assert result.returncode == 1
    assert f"holds the unsafe name {names[2]}" in result.stdout
    assert checkout.files() == [checkout.zip] and not list(tmp_path.rglob("out.png"))


def test_data_that_cannot_be_moved_in_place_is_missing(checkout):
    example_zip(checkout.zip)
    checkout.datasets.write_text("a file where the folder should be")
    result = checkout.run("data")
    assert result.returncode == 1
    assert "cannot write data/datasets/gts" in result.stdout


def test_wrong_file_under_the_final_name_is_set_aside_not_lost(classifier):
    classifier.place("256x256_classifier.pt", 123)
    result = classifier.run("classifier")
    assert result.returncode == 0
    assert classifier.checkpoints() == {
        "256x256_classifier.pt": len(WHOLE),
        "256x256_classifier.pt.bad": 123,
    }


@pytest.mark.parametrize(
    "target, name",
    [
        ("classifier", "256x256_classifier.pt"),
        ("ldm", "inpainting_big.ckpt"),
        ("ldm", "inpainting_big.zip"),
    ],
)
def test_second_wrong_file_is_left_alone(classifier, server, target, name):
    classifier.place(name, 123)
    classifier.place(f"{name}.bad", 123)
    result = classifier.run(target)
    assert result.returncode == 1
    assert "move it away" in result.stdout
    assert server.asked == []
    assert set(classifier.checkpoints().values()) == {123}


def test_one_failure_does_not_keep_the_others_away(classifier):
    classifier.drive.behave = failing("no connection")
    result = classifier.run("celeba", "classifier")
    assert result.returncode == 1
    assert "  there    data/pretrained/256x256_classifier.pt" in result.stdout
    assert "  MISSING  data/pretrained/celeba256_250000.pt" in result.stdout


# ---- What the machine lacks, and usage ----


@pytest.mark.parametrize("target, package", [("classifier", "tqdm"), ("celeba", "gdown")])
def test_missing_package_is_named_with_the_way_by_hand(classifier, monkeypatch, target, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = classifier.run(target)
    assert result.returncode == 1
    assert f"{package} is not installed: pip install {package}" in result.stdout
    assert re.search(
        r"by hand: open https://\S+ in a browser\n +and save the file as /", result.stdout
    )


def test_without_a_network_each_file_has_a_line_and_the_way_by_hand(checkout, monkeypatch):
    def unreachable(*_: object, **__: object) -> None:
        raise URLError(OSError(-3, "Temporary failure in name resolution"))

    monkeypatch.setattr(transport, "urlopen", unreachable)
    checkout.drive.behave = failing("no connection")
    result = checkout.run()
    assert result.returncode == 1
    why = "the download failed: Temporary failure in name resolution"
    assert result.stdout.count(f"why: {why}\n") == 2
    assert result.stdout.count("why: gdown failed: no connection\n") == 3
    assert result.stdout.count("by hand: open https://") == len(DEFAULT) == 5


def test_absent_file_is_asked_for_once(classifier, server):
    server.files.clear()
    result = classifier.run("classifier")
    assert result.returncode == 1
    assert classifier.checkpoints() == {}
    assert "why: the download failed: HTTP Error 404: Not Found\n" in result.stdout
    assert len(server.asked) == 1


def test_folder_that_cannot_be_made_is_named(classifier):
    classifier.pretrained.rmdir()
    classifier.pretrained.write_text("a file where the folder should be")
    result = classifier.run("classifier")
    assert result.returncode == 1
    assert "why: cannot write data/pretrained: File exists\n" in result.stdout


@pytest.mark.parametrize("name", ["imagnet", "", "celeba places"])
def test_unknown_name_stops_before_any_download(classifier, server, name):
    result = classifier.run("classifier", name)
    assert result.returncode == 2
    accepted = "celeba places imagenet classifier data ldm lpips openai64 "
    start = f'download.sh: unknown name "{name}"; accepted: {accepted}'
    assert result.stderr.startswith(start) and result.stderr.count("\n") == 1
    assert server.asked == []


def test_help_names_every_target_and_downloads_nothing(classifier, server):
    with pytest.raises(SystemExit) as ended:
        classifier.run("classifier", "--help")
    assert ended.value.code == 0
    text = classifier.capsys.readouterr().out
    assert all(re.search(rf"^  {row.name} ", text, re.M) for row in TABLE)
    assert server.asked == []


# ---- The commands ----

COMMANDS = {
    "sh": ["sh", "download.sh"],
    "bash": ["bash", "download.sh"],
    "module": [sys.executable, "-m", "guided_diffusion.downloads"],
}


@pytest.fixture
def repository(tmp_path) -> SimpleNamespace:
    """A copy of the program, with a stand-in for gdown, in a path with spaces."""
    root = tmp_path / "the repo"
    shutil.copytree(REPOSITORY / "guided_diffusion", root / "guided_diffusion")
    shutil.copy(REPOSITORY / "download.sh", root)
    python = root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH=fake exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (root / "fake").mkdir()
    (root / "data/pretrained").mkdir(parents=True)
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(root / "fake")}
    return SimpleNamespace(
        root=root, pretrained=root / "data/pretrained", settings={"env": environment, "cwd": root}
    )


def fake_gdown(repository: SimpleNamespace, body: str) -> None:
    text = f"import os, time\ndef download(id, output, resume, timeout):\n    {body}\n"
    (repository.root / "fake/gdown.py").write_text(text)


WRITE = f"open(output, 'wb').write(b'PK'); os.truncate(output, {SIZES['celeba']})"


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_brings_files_and_says_what_is_wrong(repository, command):
    fake_gdown(repository, WRITE)
    sparse(repository.pretrained / NAMES["classifier"], SIZES["classifier"])
    words = COMMANDS[command]
    settings = repository.settings | {"capture_output": True, "text": True, "timeout": 60}
    run = subprocess.run([*words, "classifier", "celeba"], **settings)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "256x256_classifier.pt: already complete, skipped" in run.stdout
    assert {path.name for path in repository.pretrained.iterdir()} == {
        NAMES["celeba"],
        NAMES["classifier"],
    }
    run = subprocess.run([*words, "nonsense"], **settings)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith('download.sh: unknown name "nonsense"')


@pytest.mark.slow
def test_the_script_starts_from_any_folder_and_brings_no_torch(repository, tmp_path):
    fake_gdown(repository, f"import sys; assert 'torch' not in sys.modules; {WRITE}")
    run = subprocess.run(
        ["sh", "the repo/download.sh", "celeba"],
        **repository.settings | {"cwd": tmp_path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert [path.name for path in repository.pretrained.iterdir()] == [NAMES["celeba"]]


@pytest.mark.slow
def test_the_script_takes_a_python_that_is_new_enough_and_rather_one_with_gdown(repository):
    """Without gdown it takes any other; without any it says what is needed."""
    tools = repository.root / "bin"
    tools.mkdir()
    (tools / "dirname").symlink_to(shutil.which("dirname"))
    shutil.rmtree(repository.root / ".venv")
    settings = {"cwd": repository.root, "capture_output": True, "text": True}
    sh, environment = shutil.which("sh"), {"PATH": str(tools)}

    def python(name: str, answer: str) -> None:
        (tools / name).write_text(f"#!{sh}\n{answer}\n")
        (tools / name).chmod(0o755)

    python("python3", "exit 1")  # too old
    run = subprocess.run([sh, "download.sh", "celeba"], env=environment, **settings)
    assert run.returncode == 1 and "needs Python 3.10 or newer" in run.stderr
    python("python3", 'case $2 in *gdown*) exit 1;; esac; echo "three $*"')
    run = subprocess.run([sh, "download.sh", "a b", "c"], env=environment, **settings)
    assert run.stdout.endswith("three -m guided_diffusion.downloads a b c\n")
    python("python", 'echo "with gdown $*"')
    run = subprocess.run([sh, "download.sh", "a b", "c"], env=environment, **settings)
    assert run.stdout.endswith("with gdown -m guided_diffusion.downloads a b c\n")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_script_stopped_midway_leaves_nothing_under_the_final_name(repository, number):
    fake_gdown(repository, f"{WRITE}; time.sleep(30)")
    process = subprocess.Popen(
        ["sh", "download.sh", "celeba"],
        **repository.settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    part = repository.pretrained / f"{NAMES['celeba']}.part"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if part.exists() and part.stat().st_size == SIZES["celeba"]:
            break
        time.sleep(0.01)
    os.killpg(process.pid, number)
    text, _ = process.communicate()
    assert list(repository.pretrained.iterdir()) == [part]
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert ("Interrupted. Run the same command again" in text) == (number == signal.SIGINT)
