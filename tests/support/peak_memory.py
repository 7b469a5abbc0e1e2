"""How much memory tensors take at most, counted exactly."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the numbers in all tensors that are made meanwhile, and keeps the largest sum."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage), storage.nbytes() // tensor.element_size()
                self.alive[storage._cdata] = reference
        self.peak = max(self.peak, sum(numbers for _, numbers in self.alive.values()))
        return result
