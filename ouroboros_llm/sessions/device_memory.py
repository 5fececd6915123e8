"""How much memory an answer takes, and how much there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..decoding.decoder import PROMPT_POSITIONS
from ..decoding.draft_tree import MAX_WIDTH
from ..errors import MemoryLimitError
from ..target_model.prepared import PreparedModel

_CGROUP = Path("/sys/fs/cgroup")
_GIB = 1 << 30


def check_room(
    prepared: PreparedModel, tokens: int, held: int, spare: Callable[[], None], draft: PreparedModel | None = None
) -> None:
    """Refuse what cannot be held in memory, before anything of it is computed.

    Args:
        tokens: of prompt and output.
        held: bytes that the turn has already, from the turn before.
        spare: gives memory back that others can do without; called only where it is needed.

    Raises:
        MemoryLimitError: it names the bytes. Where they cannot be known, nothing is refused.
    """
    needed = sum(needed_bytes(model, tokens) or 0 for model in (prepared, draft) if model is not None) - held
    device = prepared.model.device
    free = free_bytes(device)
    if free is not None and needed > free:
        spare()
        free = free_bytes(device) or 0
    if free is not None and needed > free:
        raise MemoryLimitError(
            f"{tokens} tokens of prompt and output need {needed / _GIB:.2f} GiB ({needed} bytes) for keys, values and "
            f"logits, but {device} has {free / _GIB:.2f} GiB ({free} bytes) free; shorten the prompt, lower "
            "max_new_tokens, wait for other requests to end, or load the model in a smaller dtype"
        )


def needed_bytes(prepared: PreparedModel, tokens: int) -> int | None:
    """Keys and values of so many tokens, and the logits of one wide pass; None where they cannot be foretold."""
    per_token = prepared.probe.token_bytes
    if per_token is None:
        return None
    text = prepared.model.config.get_text_config(decoder=True)
    # As the model gives them, and once more in float32 for what is done with them.
    logits = (MAX_WIDTH + PROMPT_POSITIONS) * int(text.vocab_size) * (prepared.model.dtype.itemsize + 4)
    return tokens * per_token + logits


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`; None where that cannot be known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return None
    known = [number for number in (_available(Path("/proc/meminfo")), _left_in_group(_CGROUP)) if number is not None]
    return min(known, default=None)


def let_go(device: torch.device) -> None:
    """Give memory that nobody uses back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _available(path: Path) -> int | None:
    """What the kernel holds for available, page cache included."""
    try:
        lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _left_in_group(folder: Path) -> int | None:
    """What the container may still use; page cache that can be dropped is not counted as used."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return None if limit == "max" else max(0, int(limit) - used + int(pages.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None
