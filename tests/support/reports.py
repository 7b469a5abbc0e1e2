"""Reports with nasty names."""

from pathlib import Path

from PIL import Image

from guided_diffusion.output.report import Row

NASTY = (
    *("with space.png", "hash#1.png", "query?x=1&y.png", "50%41.png", "two.dots.v2.png"),
    *(
        "quotes\"'.png",
        "<script>alert(1)</script>.png",
        "Ünï – 写真.png",
        "a:b.png",
        "back\\slash.png",
    ),
    *("sub/deep er/x.png", "$title ${rows}.png", "line\nbreak.png", "-.png"),
)


def draw(path: Path | str, size: tuple[int, int] = (8, 6), colour: str = "red") -> str:
    """A picture of one colour at a path, which is returned."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return str(path)


def make_row(folder: Path | str, name: str = "x.png", samples: int = 1, **size: object) -> Row:
    stem, _, suffix = name.rpartition(".")
    names = [name] if samples == 1 else [f"{stem}_{i}.{suffix}" for i in range(samples)]
    return Row(
        name,
        draw(f"{folder}/gt/{name}", colour="blue", **size),
        draw(f"{folder}/gt_masked/{name}", colour="gray", **size),
        tuple(draw(f"{folder}/inpainted/{name}", colour="red", **size) for name in names),
        seconds=tuple(3.9 + i for i in range(samples)),
        seeds=tuple(range(samples)),
    )
