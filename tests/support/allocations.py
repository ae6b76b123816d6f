"""What a computation allocates, seen below autograd."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Sizes(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gave, views of one tensor aside."""

    def __init__(self, given):
        super().__init__()
        self.given, self.largest = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() != self.given:
                self.largest = max(self.largest, tensor.numel())
        return result


class VocabularySized(TorchDispatchMode):
    """Counts results of operations that hold a logit for every position."""

    def __init__(self, positions, vocab_size):
        super().__init__()
        self.positions, self.vocab_size, self.count = positions, vocab_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and self.vocab_size in tensor.shape:
                self.count += tensor.numel() >= self.positions * self.vocab_size
        return result


class RowsOfLogits(TorchDispatchMode):
    """The most rows in any result of an operation that has a logit of every class in each row."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.most = vocab_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            is_real = torch.is_tensor(tensor) and not tensor.is_meta
            if is_real and tensor.shape[-1:] == (self.vocab_size,):
                self.most = max(self.most, tensor.shape[:-1].numel())
        return result
