"""download.sh against downloaders that fail in every way that real ones do.

The script runs in a folder of its own, on a PATH that holds only the tools that a test gives
it; large files are sparse, so they cost nothing.
"""

import hashlib
import http.server
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
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "download.sh"
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="download.sh needs bash")

NEEDED_COMMANDS = [
    "cat",
    "dirname",
    "find",
    "grep",
    "head",
    "mkdir",
    "mktemp",
    "mv",
    "od",
    "rm",
    "tail",
    "tee",
    "tr",
    "wc",
]
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
}
BLOB_STORE = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"
# Name, size and SHA-256 (of two only the first digits are known) of what LPIPS needs.
LPIPS = {
    "alexnet-owt-7be5be79.pth": (61_100_840 * 4 + 8_000, "7be5be79"),
    "alex.pth": (6009, "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"),
    "vgg16-397923af.pth": (138_357_544 * 4 + 4_000, "397923af"),
    "vgg.pth": (7289, "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
}
# The latent model: the weights that it surely has, 4 bytes each, and where it comes from.
LDM_WEIGHTS = (387_245_827 + 387_245_829 + 53_219_486 + 3_000) * 4
LDM_URL = "https://heibox.uni-heidelberg.de/f/4d9ac7ea40c64582b7c9/?dl=1"
QUOTA_PAGE = "<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"
FACE = b"a picture of a face"
MASK = b"a mask"

# A stand-in for curl, wget and gdown: notes its arguments and what is there to resume, then
# does what the test says with the output file.
FAKE_DOWNLOADER = """#!{python}
import os, signal, sys
args = sys.argv[1:]
out = [a.split("=")[-1] for a, before in zip(args, [""] + args)
       if before in ("-O", "--output") or a.startswith("--output-document=")][0]
there = os.path.getsize(out) if os.path.exists(out) else 0
with open({calls!r}, "a") as calls:
    print("{name}", *args, "| there:", there, file=calls)
def write(size, start=b"PK"):
    with open(out, "r+b" if there else "wb") as file:
        file.write(start)
        file.truncate(size)
{behaviour}
"""

FAKE_UNZIP = """#!{python}
import sys, zipfile
from fnmatch import fnmatch
try:
    archive = zipfile.ZipFile([a for a in sys.argv[1:] if not a.startswith("-")][0])
    if "-t" in sys.argv:
        sys.exit(2 if archive.testzip() else 0)
    if "-Z1" in sys.argv:
        sys.exit(print(*archive.namelist(), sep="\\n"))
    members = archive.infolist()
    if "-j" in sys.argv:  # what matches a pattern, without its folders
        pattern = sys.argv[sys.argv.index("-d") - 1]
        members = [member for member in members if fnmatch(member.filename, pattern)]
        for member in members:
            member.filename = member.filename.split("/")[-1]
    archive.extractall(sys.argv[sys.argv.index("-d") + 1], members)
except zipfile.BadZipFile:
    sys.exit(9)
"""


class Checkout:
    """A folder with the script in it, and the commands that it can see."""

    def __init__(self, root: Path) -> None:
        self.root = root / "repo"
        self.pretrained = self.root / "data" / "pretrained"
        self.datasets = self.root / "data" / "datasets"
        self.zip = self.root / "data" / "datasets.zip"
        self.bin = root / "bin"
        self.temporary = root / "tmp"
        self.log = root / "calls"
        self.pretrained.mkdir(parents=True)
        self.bin.mkdir()
        self.temporary.mkdir()
        shutil.copy(SCRIPT, self.root)
        for command in NEEDED_COMMANDS:
            (self.bin / command).symlink_to(shutil.which(command))
        if real_unzip := shutil.which("unzip"):
            (self.bin / "unzip").symlink_to(real_unzip)
        else:
            self.command("unzip", FAKE_UNZIP.format(python=sys.executable))

    def command(self, name: str, text: str) -> None:
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def fake(self, name: str, behaviour: str) -> None:
        text = FAKE_DOWNLOADER.format(
            python=sys.executable, calls=str(self.log), name=Path(name).name, behaviour=behaviour
        )
        self.command(name, text)

    def environment(self) -> dict[str, str]:
        return {"PATH": str(self.bin), "HOME": str(self.root), "TMPDIR": str(self.temporary)}

    def run(self, *names: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BASH, str(self.root / "download.sh"), *names],
            cwd=cwd or self.root,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def checkpoints(self) -> dict[str, int]:
        """Everything in data/pretrained, with its size."""
        return {path.name: path.stat().st_size for path in self.pretrained.iterdir()}

    def place(self, name: str, size: int, start: bytes = b"PK") -> Path:
        path = self.pretrained / name
        path.write_bytes(start)
        os.truncate(path, size)
        return path


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


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


def copying(path: Path) -> str:
    return f"import shutil; shutil.copy({str(path)!r}, out)"


# --- what works ---


@pytest.mark.parametrize("target", ["imagenet", "classifier"])
@pytest.mark.parametrize("tool", ["curl", "wget"])
def test_openai_checkpoint_comes_through_curl_or_wget(checkout, target, tool):
    checkout.fake(tool, f"write({SIZES[target]})")
    result = checkout.run(target)
    assert result.returncode == 0, result.stdout + result.stderr
    assert checkout.checkpoints() == {NAMES[target]: SIZES[target]}
    (call,) = checkout.calls()
    assert call.startswith(tool) and f"{BLOB_STORE}/{NAMES[target]} |" in call


@pytest.mark.parametrize(
    "target, start", [("celeba", b"PK"), ("places", b"PK"), ("places", b"\x80\x02")]
)
def test_drive_checkpoint_comes_through_gdown(checkout, target, start):
    """A zip archive and the pickle of PyTorch before 1.6 are both what torch.save wrote."""
    checkout.fake("gdown", f"write({SIZES[target]}, {start!r})")
    result = checkout.run(target)
    assert result.returncode == 0, result.stdout + result.stderr
    assert checkout.checkpoints() == {NAMES[target]: SIZES[target]}
    (call,) = checkout.calls()
    assert "--continue" in call and f"id={DRIVE_IDS[target]} |" in call


def test_data_is_unpacked_without_touching_what_is_there(checkout, tmp_path):
    archive = example_zip(
        tmp_path / "made.zip",
        {
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
    checkout.fake("gdown", copying(archive))
    result = checkout.run("data")
    assert result.returncode == 0, result.stdout + result.stderr
    files = [path for path in (checkout.root / "data").rglob("*") if path.is_file()]
    contents = {str(path.relative_to(checkout.datasets.parent)): path for path in files}
    assert contents.pop("datasets.zip").read_bytes() == archive.read_bytes()
    assert {name: path.read_bytes() for name, path in contents.items()} == {
        "datasets/gts/face/000.png": FACE,
        "datasets/gt_keep_masks/face/000.png": MASK,
        **{f"datasets/{name}": content for name, content in own.items()},
    }
    assert f"id={DRIVE_IDS['data']} |" in checkout.calls()[0]


def test_no_argument_means_all_from_any_folder(checkout, tmp_path):
    archive = example_zip(tmp_path / "made.zip")
    by_name = {NAMES[target]: SIZES[target] for target in NAMES}
    behaviour = (
        f"sizes = {by_name}\nname = os.path.basename(out)[:-len('.part')]\n"
        f"if name in sizes: write(sizes[name])\nelse: {copying(archive)}"
    )
    checkout.fake("curl", behaviour)
    checkout.fake("gdown", behaviour)
    result = checkout.run(cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert checkout.checkpoints() == by_name
    assert (checkout.datasets / "gts/face/000.png").read_bytes() == FACE
    assert len(checkout.calls()) == 5
    assert list(checkout.temporary.iterdir()) == []
    assert result.stdout.count("licences") == 1


def test_complete_files_are_not_fetched_again(checkout):
    for target, name in NAMES.items():
        checkout.place(name, SIZES[target])
    example_zip(checkout.zip)
    for tool in ("curl", "wget", "gdown"):
        checkout.fake(tool, "sys.exit(1)")
    result = checkout.run()
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("already complete, skipped") == 5
    assert checkout.calls() == []
    assert (checkout.datasets / "gts/face/000.png").read_bytes() == FACE


@pytest.mark.parametrize("location", ["../repo/.venv/bin/gdown", "python3"])
def test_gdown_is_found_outside_the_path_too(checkout, location):
    if location == "python3":
        module = checkout.bin / "gdown.py"
        checkout.fake(module.name, f"write({SIZES['celeba']})")
        text = f'#!{BASH}\nPYTHONPATH="{checkout.bin}" exec "{sys.executable}" "$@"\n'
        module.write_text(f"if __name__ == '__main__':\n{indented(module.read_text())}")
        checkout.command(location, text)
    else:
        checkout.fake(location, f"write({SIZES['celeba']})")
    result = checkout.run("celeba")
    assert result.returncode == 0, result.stdout + result.stderr
    assert checkout.checkpoints() == {NAMES["celeba"]: SIZES["celeba"]}


def indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


# --- lpips: four files, whose digests are known ---


def fake_lpips(checkout: Checkout, damaged: str = "", digester: str = "sha256sum") -> None:
    """A downloader that brings all four, and a digester that finds one of them damaged."""
    sizes = {name: size for name, (size, _) in LPIPS.items()}
    checkout.fake("curl", f"write({sizes}[os.path.basename(out)[:-len('.part')]], b'\\x80\\x02')")
    digests = {name: digest.ljust(64, "0") for name, (_, digest) in LPIPS.items()}
    if damaged:
        digests[damaged] = "0" * 64
    text = (
        f"#!{sys.executable}\nimport os, sys\n"
        "assert 'sha256sum' in sys.argv[0] or sys.argv[1:3] == ['-a', '256']\n"
        "name = os.path.basename(sys.argv[-1]).removesuffix('.part')\n"
        f"print({digests}[name], '', sys.argv[-1])\n"
    )
    checkout.command(digester, text)


def lpips_files(checkout: Checkout) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (checkout.pretrained / "lpips").iterdir()}


@pytest.mark.parametrize("digester", ["sha256sum", "shasum"])
def test_lpips_is_four_files_from_two_places(checkout, digester):
    fake_lpips(checkout, digester=digester)
    result = checkout.run("lpips")
    assert result.returncode == 0, result.stdout + result.stderr
    assert lpips_files(checkout) == {name: size for name, (size, _) in LPIPS.items()}
    urls = [re.search(r"https://\S+", call)[0] for call in checkout.calls()]
    heads = (
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"
    )
    assert urls == [
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        f"{heads}/alex.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        f"{heads}/vgg.pth",
    ]
    again = checkout.run("lpips")
    assert again.stdout.count("already complete, skipped") == 4
    assert len(checkout.calls()) == 4


@pytest.mark.parametrize("name", LPIPS)
def test_lpips_of_other_content_is_refused_and_the_rest_is_kept(checkout, name):
    fake_lpips(checkout, damaged=name)
    result = checkout.run("lpips")
    assert result.returncode == 1
    assert f"its SHA-256 is {'0' * 64}, expected {LPIPS[name][1]};" in result.stdout
    assert f"  MISSING  data/pretrained/lpips/{name}\n" in result.stdout
    assert set(lpips_files(checkout)) == LPIPS.keys() - {name}


def test_lpips_of_another_size_is_refused(checkout):
    fake_lpips(checkout)
    checkout.fake("curl", "write(6010)")
    result = checkout.run("lpips")
    assert result.returncode == 1
    assert lpips_files(checkout) == {}
    for least in ("244403360 to 245451936", "6009", "553430176 to 554478752", "7289"):
        assert f"wrong size: 6010 bytes, expected {least};" in result.stdout


def test_lpips_needs_something_to_check_digests_with(checkout):
    checkout.fake("curl", "write(6009)")
    result = checkout.run("lpips")
    assert result.returncode == 1
    assert result.stdout.count("neither sha256sum nor shasum is installed") == 8
    assert checkout.calls() == []


def test_the_real_digester_is_understood(checkout):
    """A file of the right size that is not the published one."""
    real = shutil.which("sha256sum") or shutil.which("shasum")
    (checkout.bin / Path(real).name).symlink_to(real)
    checkout.fake("curl", "write(6009)")
    result = checkout.run("alex.pth")
    digest = hashlib.sha256(b"PK" + bytes(6007)).hexdigest()
    assert f"its SHA-256 is {digest}, expected {LPIPS['alex.pth'][1]};" in result.stdout


def test_the_published_heads_pass(checkout):
    """The file as torchmetrics has it."""
    torchmetrics = pytest.importorskip("torchmetrics")
    real = shutil.which("sha256sum") or shutil.which("shasum")
    (checkout.bin / Path(real).name).symlink_to(real)
    package = Path(torchmetrics.__file__).parent
    (checkout.pretrained / "lpips").mkdir()
    for name in ("alex.pth", "vgg.pth"):
        shutil.copy(package / "functional/image/lpips_models" / name, checkout.pretrained / "lpips")
    result = checkout.run("alex.pth", "vgg.pth")
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("already complete, skipped") == 2


# --- ldm: the checkpoint itself, or a zip that holds it ---


@pytest.fixture
def small(checkout: Checkout) -> Checkout:
    """A script that expects a tiny latent model, of 1000 weights."""
    script = checkout.root / SCRIPT.name
    text, found = re.subn(r"min_size=\$\(\(\(387.*\)\)", "min_size=4000", script.read_text())
    assert found == 1
    script.write_text(text)
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


def moving(path: Path) -> str:
    return f"os.rename({str(path)!r}, out)"  # sparse files stay sparse


@pytest.mark.parametrize(
    "names",
    [["model.ckpt"], ["a/b/my last.ckpt"], ["ldm/last.ckpt", "__MACOSX/ldm/._last.ckpt"]],
)
@pytest.mark.parametrize("tool", ["curl", "wget"])
def test_ldm_is_unpacked_from_a_zip_whatever_its_name_there(small, tmp_path, tool, names):
    small.fake(tool, copying(zip_with(tmp_path / "made.zip", *names)))
    result = small.run("ldm")
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = small.pretrained.iterdir()
    assert path.name == "inpainting_big.ckpt" and path.read_bytes() == latent_checkpoint()
    (call,) = small.calls()
    assert f" {LDM_URL} |" in call
    assert "  there    data/pretrained/inpainting_big.ckpt\n" in result.stdout
    again = small.run("ldm")
    assert "inpainting_big.ckpt: already complete, skipped" in again.stdout
    assert len(small.calls()) == 1


def test_ldm_that_is_the_checkpoint_itself_only_gets_its_name(small, tmp_path):
    (tmp_path / "made").write_bytes(latent_checkpoint())
    small.fake("curl", copying(tmp_path / "made"))
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
def test_ldm_has_at_least_its_weights(checkout, tmp_path, size, code):
    checkout.fake("curl", moving(sparse_checkpoint(tmp_path / "made", size)))
    result = checkout.run("ldm")
    assert result.returncode == code, result.stdout + result.stderr
    name = "inpainting_big.zip" if code else "inpainting_big.ckpt"
    assert checkout.checkpoints() == {name: size}
    least = f"(wrong size: {size} bytes, expected {LDM_WEIGHTS} or more): delete it and run again"
    assert (least in result.stdout) == bool(code)


@pytest.mark.parametrize("content", [b"PK" + bytes(9000), None], ids=["no archive", "zip"])
def test_wrong_ldm_under_the_final_name_is_set_aside(small, tmp_path, content):
    """Bytes of no kind, and the zip under the checkpoint's name."""
    zipped = zip_with(tmp_path / "made.zip", "model.ckpt", "second.ckpt")
    wrong = content or zipped.read_bytes()
    (small.pretrained / "inpainting_big.ckpt").write_bytes(wrong)
    (tmp_path / "made").write_bytes(latent_checkpoint())
    small.fake("curl", copying(tmp_path / "made"))
    result = small.run("ldm")
    assert result.returncode == 0, result.stdout
    assert (small.pretrained / "inpainting_big.ckpt").read_bytes() == latent_checkpoint()
    assert (small.pretrained / "inpainting_big.ckpt.bad").read_bytes() == wrong
    why = "cannot list it" if content else "it holds no data.pkl"
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
        "           why: neither curl nor wget is installed: sudo apt install curl\n"
        f"           by hand: open {LDM_URL} in a browser\n"
        f"           and save the file as {small.pretrained}/inpainting_big.zip\n"
        "           then run ./download.sh ldm again, which checks and unpacks it\n"
    )


@pytest.mark.parametrize("names", [[], ["a.ckpt", "b/a.ckpt"]])
def test_zip_of_none_or_several_checkpoints_is_said_and_kept(small, tmp_path, names):
    small.fake("curl", copying(zip_with(tmp_path / "made.zip", *names)))
    result = small.run("ldm")
    assert result.returncode == 1
    path = "data/pretrained/inpainting_big.zip"
    why = f"why: {path} holds {len(names)} *.ckpt files, not one: see unzip -l {path}\n"
    assert why in result.stdout
    assert list(small.checkpoints()) == ["inpainting_big.zip"]


@pytest.mark.parametrize(
    "content, why",
    [
        (b"text " * 1000, "unzip cannot list it"),
        (b"text", "wrong size: 4 bytes, expected 4000 or more"),
    ],
    ids=["text", "small"],
)
def test_zip_of_another_checkpoint_is_said_and_kept(small, tmp_path, content, why):
    small.fake("curl", copying(zip_with(tmp_path / "made.zip", "x.ckpt", content=content)))
    result = small.run("ldm")
    assert result.returncode == 1
    start = "why: data/pretrained/inpainting_big.zip does not hold the published checkpoint ("
    assert re.search(rf"{re.escape(start)}.*{why}\): delete it and run again\n", result.stdout)
    assert list(small.checkpoints()) == ["inpainting_big.zip"]


def test_damage_inside_the_zip_of_ldm_is_found_when_it_is_unpacked(small, tmp_path):
    archive = tmp_path / "made.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("model.ckpt", latent_checkpoint())
    archive.write_bytes(archive.read_bytes().replace(b"callbacks", b"CALLBACKS", 1))
    small.fake("curl", copying(archive))
    result = small.run("ldm")
    assert result.returncode == 1
    assert "inpainting_big.zip could not be unpacked, see the message above" in result.stdout
    assert list(small.checkpoints()) == ["inpainting_big.zip"]


def test_full_disk_is_named_and_costs_no_second_download(small, tmp_path):
    archive = zip_with(small.pretrained / "inpainting_big.zip", "model.ckpt")
    before = archive.read_bytes()
    whole = (small.bin / "unzip").rename(small.bin / "real unzip")
    half = 'mkdir -p "${@: -1}"; echo half >"${@: -1}/model.ckpt"; exit 50'
    script = f'#!{BASH}\ncase $* in *" -d "*) {half};; esac\nexec "{whole}" "$@"\n'
    small.command("unzip", script)
    result = small.run("ldm")
    assert result.returncode == 1
    assert "the disk is too full to unpack data/pretrained/inpainting_big.zip" in result.stdout
    assert {path.name: path.read_bytes() for path in small.pretrained.iterdir()} == {
        "inpainting_big.zip": before
    }


def test_unzip_killed_midway_leaves_no_half_of_a_checkpoint(small):
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
def test_ldm_is_resumed_until_its_end_is_there(small, tmp_path, zipped):
    """Of a length that is not known, the list at the end tells whether it is whole."""
    whole = latent_checkpoint()
    if zipped:
        whole = zip_with(tmp_path / "made.zip", "model.ckpt").read_bytes()
    cut = len(whole) - 100
    part = small.pretrained / "inpainting_big.zip.part"
    part.write_bytes(whole[:3000])
    rest = f"open(out, 'ab').write(open({str(tmp_path / 'whole')!r}, 'rb').read()[there:%s])"
    (tmp_path / "whole").write_bytes(whole)
    small.fake("curl", f"{rest % cut}\nsys.exit('connection lost')")
    result = small.run("ldm")
    assert result.returncode == 1
    assert "same command again to resume" in result.stdout
    assert small.checkpoints() == {part.name: cut}
    small.fake("curl", rest % "")
    result = small.run("ldm")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [call.split("| ")[1] for call in small.calls()] == ["there: 3000", f"there: {cut}"]
    (path,) = small.pretrained.iterdir()
    assert path.read_bytes() == latent_checkpoint()


@pytest.mark.parametrize(
    "content, why",
    [
        (QUOTA_PAGE.encode(), "a web page came instead of the file"),
        (bytes(5000), "damaged, or neither a checkpoint nor a zip file"),
        (latent_checkpoint()[:-30], "damaged, or neither a checkpoint nor a zip file"),
    ],
    ids=["page", "zeros", "cut off"],
)
def test_what_is_neither_ldm_nor_a_zip_is_removed(small, tmp_path, content, why):
    (tmp_path / "made").write_bytes(content)
    small.fake("curl", copying(tmp_path / "made"))
    result = small.run("ldm")
    assert result.returncode == 1
    assert f"why: {why}" in result.stdout and "starts afresh" in result.stdout
    assert small.checkpoints() == {}


# --- resuming ---


@pytest.mark.parametrize("tool, flag", [("curl", "--continue-at -"), ("wget", "--continue")])
def test_partial_file_is_resumed(checkout, tool, flag):
    checkout.place("256x256_classifier.pt.part", 1000)
    checkout.fake(tool, f"write({SIZES['classifier']})")
    assert checkout.run("classifier").returncode == 0
    (call,) = checkout.calls()
    assert f" {flag} " in call and call.endswith("| there: 1000")
    assert checkout.checkpoints() == {NAMES["classifier"]: SIZES["classifier"]}


@pytest.mark.parametrize("target, tool", [("classifier", "curl"), ("celeba", "gdown")])
def test_part_that_is_complete_only_gets_its_name(checkout, target, tool):
    checkout.place(f"{NAMES[target]}.part", SIZES[target])
    checkout.fake(tool, "sys.exit(1)")
    assert checkout.run(target).returncode == 0
    assert checkout.calls() == []
    assert checkout.checkpoints() == {NAMES[target]: SIZES[target]}


def test_downloader_killed_midway_leaves_a_part_that_the_next_run_resumes(checkout):
    checkout.fake("curl", "write(5000)\nos.kill(os.getpid(), signal.SIGKILL)")
    result = checkout.run("imagenet")
    assert result.returncode == 1
    assert checkout.checkpoints() == {"256x256_diffusion.pt.part": 5000}
    assert "MISSING  data/pretrained/256x256_diffusion.pt" in result.stdout
    checkout.fake("curl", f"write({SIZES['imagenet']})")
    assert checkout.run("imagenet").returncode == 0
    assert checkout.calls()[1].endswith("| there: 5000")
    assert checkout.checkpoints() == {NAMES["imagenet"]: SIZES["imagenet"]}


def test_script_killed_midway_leaves_nothing_under_the_final_name(checkout):
    checkout.fake("gdown", f"write({SIZES['celeba']})\nimport time; time.sleep(30)")
    process = subprocess.Popen(
        [BASH, str(checkout.root / "download.sh"), "celeba"],
        env=checkout.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 10
    while SIZES["celeba"] not in checkout.checkpoints().values() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert checkout.checkpoints() == {"celeba256_250000.pt.part": SIZES["celeba"]}


def test_gdown_that_stops_keeps_its_own_partial_file(checkout):
    checkout.fake("gdown", "out += 'abcdefgh.part'\nwrite(700)\nsys.exit('connection lost')")
    result = checkout.run("places")
    assert result.returncode == 1
    assert checkout.checkpoints() == {"places256_300000.pt.partabcdefgh.part": 700}
    assert "connection lost" in result.stderr
    assert "same command again to resume" in result.stdout


# --- what the downloader brings is not the file ---


@pytest.mark.parametrize(
    "target, size",
    [
        ("classifier", SIZES["classifier"] - 1),
        ("classifier", SIZES["classifier"] + 1),
        ("celeba", DRIVE_WEIGHTS - 1),
        ("celeba", DRIVE_WEIGHTS + 2**20 + 1),
    ],
)
def test_wrong_size_is_refused_and_removed(checkout, target, size):
    for tool in ("curl", "gdown"):
        checkout.fake(tool, f"write({size})")
    result = checkout.run(target)
    assert result.returncode == 1
    assert checkout.checkpoints() == {}
    assert f"wrong size: {size} bytes" in result.stdout
    assert "starts afresh" in result.stdout


def test_right_size_with_other_content_is_refused(checkout):
    checkout.fake("curl", f"write({SIZES['classifier']}, b'XY')")
    result = checkout.run("classifier")
    assert result.returncode == 1
    assert checkout.checkpoints() == {}
    assert "not a PyTorch file" in result.stdout


@pytest.mark.parametrize("start, size", [("PK", SIZES["classifier"] + 1), (QUOTA_PAGE, 500)])
def test_part_that_cannot_be_resumed_is_removed_first(checkout, start, size):
    checkout.place("256x256_classifier.pt.part", size, start.encode())
    checkout.fake("curl", f"write({SIZES['classifier']})")
    result = checkout.run("classifier")
    assert result.returncode == 0
    assert checkout.calls()[0].endswith("| there: 0")
    assert "removed, starting afresh" in result.stdout


@pytest.mark.parametrize("target", ["celeba", "data"])
@pytest.mark.parametrize(
    "behaviour",
    [
        f"write({len(QUOTA_PAGE)}, {QUOTA_PAGE.encode()!r})",
        "sys.exit('Error:\\n\\n\\tToo many\\n\\tusers have viewed or downloaded this file')",
        "sys.exit('\\tCannot retrieve the public link. You may have had many\\n\\taccesses.')",
    ],
)
def test_quota_of_drive_is_named_with_what_to_do(checkout, target, behaviour):
    """As a page in place of the file, and as gdown tells it, which breaks its lines anywhere."""
    checkout.fake("gdown", behaviour)
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
    checkout.fake("gdown", copying(archive))
    result = checkout.run("data")
    assert result.returncode == 1
    assert "unzip -t refuses it" in result.stdout
    assert [path for path in (checkout.root / "data").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "name", ["holiday.png", "datasets/gts/0.png", "datasets/gt_keep_masks/0.png"]
)
def test_zip_of_something_else_is_said(checkout, tmp_path, name):
    checkout.fake("gdown", copying(example_zip(tmp_path / "made.zip", {name: b"sun"})))
    result = checkout.run("data")
    assert result.returncode == 1
    assert "holds no datasets/gts" in result.stdout
    assert {path.name for path in checkout.zip.parent.iterdir()} == {"pretrained", "datasets.zip"}


def test_data_that_cannot_be_moved_in_place_is_missing(checkout):
    example_zip(checkout.zip)
    checkout.datasets.write_text("a file where the folder should be")
    result = checkout.run("data")
    assert result.returncode == 1
    assert "could not be moved to data/datasets" in result.stdout


def test_wrong_file_under_the_final_name_is_set_aside_not_lost(checkout):
    checkout.place("256x256_classifier.pt", 123)
    checkout.fake("curl", f"write({SIZES['classifier']})")
    result = checkout.run("classifier")
    assert result.returncode == 0
    assert checkout.checkpoints() == {
        "256x256_classifier.pt": SIZES["classifier"],
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
def test_second_wrong_file_is_left_alone(checkout, target, name):
    checkout.place(name, 123)
    checkout.place(f"{name}.bad", 123)
    checkout.fake("curl", f"write({SIZES['classifier']})")
    result = checkout.run(target)
    assert result.returncode == 1
    assert "move it away" in result.stdout
    assert checkout.calls() == []
    assert set(checkout.checkpoints().values()) == {123}


def test_one_failure_does_not_keep_the_others_away(checkout):
    checkout.fake("gdown", "sys.exit('no connection')")
    checkout.fake("curl", f"write({SIZES['classifier']})")
    result = checkout.run("celeba", "classifier")
    assert result.returncode == 1
    assert "  there    data/pretrained/256x256_classifier.pt" in result.stdout
    assert "  MISSING  data/pretrained/celeba256_250000.pt" in result.stdout


# --- what the machine lacks, and usage ---


@pytest.mark.parametrize(
    "target, why",
    [
        ("classifier", "neither curl nor wget is installed"),
        ("celeba", "gdown is not installed: pip install gdown"),
        ("data", "unzip is not installed"),
        ("ldm", "unzip is not installed"),
    ],
)
def test_missing_tool_is_named_with_the_way_by_hand(checkout, target, why):
    (checkout.bin / "unzip").unlink()
    result = checkout.run(target)
    assert result.returncode == 1
    assert why in result.stdout
    assert re.search(
        r"by hand: open https://\S+ in a browser\n +and save the file as /", result.stdout
    )


@pytest.mark.parametrize("name", ["imagnet", "", "celeba places"])
def test_unknown_name_stops_before_any_download(checkout, name):
    checkout.fake("curl", "write(1)")
    result = checkout.run("classifier", name)
    assert result.returncode == 2
    accepted = "celeba places imagenet classifier data ldm lpips"
    assert result.stderr == f'download.sh: unknown name "{name}"; accepted: {accepted}\n'
    assert checkout.calls() == []


def test_help_names_every_target_and_downloads_nothing(checkout):
    checkout.fake("curl", "write(1)")
    result = checkout.run("classifier", "--help")
    assert result.returncode == 0
    names = [*NAMES, "data", "ldm", "lpips"]
    assert all(re.search(rf"^  {name} ", result.stdout, re.M) for name in names)
    assert checkout.calls() == []


# --- the real downloaders understand the flags ---


class SparseFile(http.server.BaseHTTPRequestHandler):
    """Serves `size` bytes, PK and zeros; only a range is short enough to be sent whole."""

    size = 0

    def do_GET(self) -> None:
        if self.path == "/absent":
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(self.size - first))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{self.size - 1}/{self.size}")
        self.end_headers()
        self.wfile.write(bytes(self.size - first) if asked else b"PK")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SparseFile) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def redirect(checkout: Checkout, tool: str, url: str) -> None:
    """The real tool, with the script's flags, and the address replaced by `url`."""
    real = shutil.which(tool)
    if real is None:
        pytest.skip(f"{tool} is not installed")
    checkout.command(tool, f'#!{BASH}\nexec "{real}" "${{@:1:$#-1}}" "{url}"\n')


@pytest.mark.parametrize("tool", ["curl", "wget"])
def test_real_downloader_resumes(checkout, server, monkeypatch, tool):
    monkeypatch.setattr(SparseFile, "size", SIZES["classifier"])
    checkout.place("256x256_classifier.pt.part", SIZES["classifier"] - 1000)
    redirect(checkout, tool, f"{server}/present")
    result = checkout.run("classifier")
    assert result.returncode == 0, result.stdout + result.stderr
    assert checkout.checkpoints() == {NAMES["classifier"]: SIZES["classifier"]}


@pytest.mark.parametrize("tool", ["curl", "wget"])
def test_real_downloader_fails_without_a_trace(checkout, server, tool):
    redirect(checkout, tool, f"{server}/absent")
    result = checkout.run("classifier")
    assert result.returncode == 1
    assert checkout.checkpoints() == {}
    assert "404" in result.stderr


def test_real_gdown_resumes(checkout, server, monkeypatch):
    pytest.importorskip("gdown")
    monkeypatch.setattr(SparseFile, "size", SIZES["celeba"])
    checkout.place("celeba256_250000.pt.partabcdefgh.part", SIZES["celeba"] - 1000)
    text = f'#!{BASH}\nexec "{sys.executable}" -m gdown "${{@:1:$#-1}}" "{server}/present"\n'
    checkout.command("gdown", text)
    result = checkout.run("celeba")
    assert result.returncode == 0, result.stdout + result.stderr
    assert checkout.checkpoints() == {NAMES["celeba"]: SIZES["celeba"]}
