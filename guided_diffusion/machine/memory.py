"""Memory: whether it ran out, and how many images fit at a time: measured, not guessed."""

import gc
from collections.abc import Callable

import torch

SHARE = 0.9  # of the memory; the rest is for what is fragmented, and for other programs' ups


def ran_out(error: Exception) -> bool:
    """Whether a call failed for want of memory, as far as its error says so."""
    # Only CUDA's allocator has a type of its own; the others raise plain RuntimeErrors.
    known = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
    return known or any(words in str(error) for words in _RAN_OUT)


_RAN_OUT = (
    "DefaultCPUAllocator: ",
    "Cannot allocate memory",  # for the mapping of a file
    "std::bad_alloc",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "_STATUS_ALLOC_FAILED",  # of cuBLAS and cuDNN
)


def release() -> None:
    """Give back what nothing refers to any more; without CUDA, to Python alone."""
    gc.collect()  # of a failed call, a cycle of error and traceback may still hold tensors
    torch.cuda.empty_cache()


def largest_batch(peak_of_one: int, peak_of_two: int, available: int, most: int) -> int:
    """The largest batch that fits, from 1 to `most`, as memory grows linearly with its size.

    peak_of_one, peak_of_two: what batches of one and of two take at most, with the weights, in
    bytes. available: what there is for that, in bytes.
    """
    per_image = max(peak_of_two - peak_of_one, 1)
    fixed = peak_of_one - per_image
    return min(max(int((SHARE * available - fixed) // per_image), 1), most)


def measure_largest_batch(
    evaluate: Callable[[int], object], device: torch.device, most: int
) -> int:
    """The largest batch that fits in the memory of a CUDA device that is free now, up to `most`.

    evaluate(n): do with n images what takes the most memory.
    """
    if most == 1:
        return 1
    # Two come first, so that what is set up only once makes images seem too large, not too small.
    peak_of_two = _peak(evaluate, 2, device)
    peak_of_one = peak_of_two and _peak(evaluate, 1, device)
    release()
    if not peak_of_two or not peak_of_one:
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    available = free + torch.cuda.memory_reserved(device)
    return largest_batch(peak_of_one, peak_of_two, available, most)


def _peak(evaluate: Callable[[int], object], number: int, device: torch.device) -> int | None:
    """Bytes that tensors take at most meanwhile; None if there is not enough memory."""
    release()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        evaluate(number)
    except torch.cuda.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated(device)
