"""Nothing that Windows lacks is needed to import what is here."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "guided_diffusion"
LACKING = {
    "os": "fork forkpty geteuid getpgid getuid killpg mkfifo setsid statvfs uname",
    "signal": "SIGALRM SIGHUP SIGKILL SIGQUIT SIGUSR1 SIGUSR2 alarm pause setitimer",
}
# Other packages come first: what they do on Windows is theirs.
PROGRAM = """
import importlib, os, pathlib, runpy, signal, sys
import PIL.Image, blobfile, filelock, jinja2, numpy, scipy.ndimage, torch, tqdm, yaml
import torch.distributed, torch.multiprocessing, torch.utils.data
modules, scripts = (text.splitlines() for text in sys.argv[1:3])
for name in ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios"):
    sys.modules[name] = None
for pair in sys.argv[3:]:
    module, _, names = pair.partition(":")
    for name in names.split():
        delattr(sys.modules[module], name)
for name in modules:
    importlib.import_module(name)
others = sys.path[1:]
for path in scripts:
    sys.path[:] = [os.path.dirname(path), *others]
    sys.modules.pop("make_portraits", None)  # each finds its neighbour itself
    runpy.run_path(path)
print(len(modules), len(scripts))
"""


def module_names() -> list[str]:
    paths = [path.relative_to(ROOT).with_suffix("") for path in PACKAGE.rglob("*.py")]
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


@pytest.mark.slow
def test_all_can_be_imported_without_what_windows_lacks():
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("docs/make/*.py")]
    names = module_names()
    lacking = [f"{module}:{names}" for module, names in LACKING.items()]
    arguments = ["\n".join(names), "\n".join(map(str, scripts)), *lacking]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert run.stderr == "" and run.stdout.split() == [str(len(names)), str(len(scripts))]
    assert len(names) > 40 and len(scripts) > 10
