"""RePaint: inpainting with unconditional diffusion models.

from guided_diffusion import load_inpainter

inpaint = load_inpainter("confs/demo.yml", device="cpu")
result = inpaint(image, keep_mask, seed=0)
"""

import os
from typing import Any

__all__ = ["load_inpainter"]

# Large tensors in huge pages, where Linux has them: a large network loads faster on a CPU.
# Torch reads this at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str) -> Any:
    """Import torch only when it is used, so that a mistake in a config is reported at once."""
    if name in __all__:
        from guided_diffusion.factory import load_inpainter

        return load_inpainter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
