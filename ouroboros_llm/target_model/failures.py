"""Failures of passes: those that mean that memory ran out, and how failures are named."""

from __future__ import annotations

import torch

from ..errors import MemoryLimitError

_MESSAGES = ("out of memory", "DefaultCPUAllocator")
"""What the messages of allocators say that have no exception of their own."""


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an allocation failed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return not isinstance(error, MemoryLimitError)
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MESSAGES)


def reason_of(error: BaseException) -> str:
    """Name a failure in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
