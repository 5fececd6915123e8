"""From a model's name to its files, and from its files to a model in memory."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .. import progress
from ..environment import cache_folder
from ..errors import ModelDownloadError, ModelError, OptionError, UnknownModelError
from .packaged import fetch, registry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..target_model.quantization import Quantization

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
# Folders hold other formats of the same weights, and so does the file that Mistral's repositories add.
_HUB_EXTRAS = ["*/*", "consolidated*"]
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    seconds: float = 0.0
    """That it took to fetch and load it."""


def resolve(name: str | Path) -> Path:
    """The folder that holds a model's files, fetched if they are not there yet.

    Args:
        name: a registry name (upper or lower case), a local folder, or a hub id (`org/name`), tried in this order.

    Raises:
        UnknownModelError: none of the three. ModelDownloadError: known, but its weights cannot be had.
        OptionError: not a name at all.
    """
    if not isinstance(name, (str, Path)):
        raise OptionError(f"model must be a registry name, a folder or a hub id, but got {type(name).__name__}")
    packaged = registry().get(str(name).lower())
    if packaged is not None:
        return fetch(str(name).lower(), packaged)
    folder = Path(name).expanduser()
    if str(name) and folder.is_dir():
        return _saved(folder)
    if _HUB_ID.fullmatch(str(name)) and not str(name).startswith("."):
        return _from_hub(str(name))
    raise _unknown(str(name))


def _saved(folder: Path) -> Path:
    if not (folder / "config.json").exists():
        raise UnknownModelError(
            f"model folder {str(folder)!r} has no config.json; give a folder that `save_pretrained` wrote"
        )
    return folder


def _unknown(name: str) -> UnknownModelError:
    close = get_close_matches(name.lower(), registry(), 1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UnknownModelError(
        f"unknown model {name!r}.{hint} Expected one of {', '.join(sorted(registry()))}, "
        "a folder of a saved model, or a hub id such as 'org/name'"
    )


def load(
    name: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantization: Quantization | None = None,
) -> LoadedModel:
    """A model and its tokenizer, ready to run.

    Args:
        name: see `resolve`.
        device: "auto" is a CUDA device if there is one, else the CPU; or what `torch.device` takes.
        dtype: "float32", "bfloat16", "float16", or the torch dtype of that name. "auto": see `_auto_dtype`.
        quantization: "int8" or "int4" keeps the weights of linear layers in so many bits; None: as they are.

    Raises:
        OptionError: no such device, dtype or quantization. UnknownModelError, ModelDownloadError: see `resolve`.
        ModelError: cannot be loaded, or has nothing to quantize.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..target_model.quantization import check_quantization, quantize
    from ..transformers_api import without_progress_bars

    check_quantization(quantization)
    began = perf_counter()
    place = _device(torch, device)
    number = _dtype(torch, dtype, place)
    folder = resolve(name)
    kind = str(number).removeprefix("torch.") + (f", {quantization}" if quantization else "")
    with progress.step(f"loading {name} ({kind}, {place})"):
        try:
            with without_progress_bars():
                tokenizer = AutoTokenizer.from_pretrained(folder)
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=number)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"model {str(name)!r} cannot be loaded as a causal language model: {reason}") from error
        if quantization is not None:
            # Layer by layer on the device, which need not have room for the whole weights.
            quantize(model, quantization, place)
        model = model.to(place)
    return LoadedModel(model.train(False), tokenizer, str(name), perf_counter() - began)


def placement(device: str | torch.device, dtype: str | torch.dtype) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype that `load` would take; "auto" stands for bfloat16 where a checkpoint would decide.
    Raises OptionError: no such device or dtype."""
    import torch

    place = _device(torch, device)
    number = _dtype(torch, dtype, place)
    return place, torch.bfloat16 if number == "auto" else number


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A model's tokenizer, without its weights, from files that are on this machine already: nothing is fetched.

    Raises:
        UnknownModelError: see `resolve`. ModelError: no tokenizer of it is here.
    """
    from transformers import AutoTokenizer

    folder = _local(str(name))
    try:
        if folder is not None and folder.is_dir():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # broken files make the tokenizers' own code raise anything
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {str(error).partition(chr(10))[0]}") from error
    raise ModelError(f"no tokenizer of {str(name)!r} is on this machine, and none is fetched here; load the model once")


def local_context_length(name: str | Path) -> int | None:
    """Tokens that a model's context holds, from files that are on this machine already; None where they do not say."""
    try:
        folder = local_folder(name)
        config = json.loads((folder / "config.json").read_text()) if folder is not None else {}
    except (OSError, ValueError, UnknownModelError):
        return None
    for settings in (config, config.get("text_config") or {}):
        for key in ("max_position_embeddings", "n_positions"):
            if isinstance(settings.get(key), int):
                return int(settings[key])
    return None


def local_folder(name: str | Path) -> Path | None:
    """The folder of a model whose files are on this machine already, its weights perhaps not; None where they are not.

    Raises:
        UnknownModelError: see `resolve`.
    """
    folder = _local(str(name))
    return folder if folder is not None and (folder / "config.json").is_file() else None


def _local(name: str) -> Path | None:
    """Where a model's tokenizer is, or would be, on this machine. By hub id it is looked up in the hub client's cache:
    asked for by id, the library would ask the hub, too."""
    if name.lower() in registry():
        return cache_folder() / name.lower()
    if name and (folder := Path(name).expanduser()).is_dir():
        return folder
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise _unknown(name)
    from huggingface_hub import try_to_load_from_cache

    cached = (try_to_load_from_cache(name, file) for file in ("tokenizer.json", "tokenizer_config.json"))
    return next((Path(file).parent for file in cached if isinstance(file, str)), None)


def _device(torch: Any, device: Any) -> Any:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(1, device=place).item()  # some can be named without being there; "meta" holds no numbers
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', but got {device!r}: {reason}") from error
    return place


def _dtype(torch: Any, dtype: Any, device: Any) -> Any:
    if isinstance(dtype, str) and dtype == "auto":
        return _auto_dtype(torch, device)
    known = {name: getattr(torch, name) for name in _DTYPES}
    number = known.get(dtype) if isinstance(dtype, str) else dtype
    if not any(number is one for one in known.values()):
        names = ", ".join(map(repr, _DTYPES))
        raise OptionError(f"dtype must be 'auto', {names} or the torch dtype of that name, but got {dtype!r}")
    return number


def _auto_dtype(torch: Any, device: Any) -> Any:
    """The checkpoint's own on CUDA; float32 on the CPU, where no rounding stands between drafts and the same tokens."""
    return "auto" if device.type == "cuda" else torch.float32


def _from_hub(name: str) -> Path:
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    cached = None
    try:
        cached = _cached_snapshot(name)
        return _snapshot(name)
    except HFValidationError as error:
        raise _unknown(name) from error
    except RepositoryNotFoundError as error:
        raise UnknownModelError(
            f"unknown model {name!r}: there is no such folder, and the hub has no such repository, or it is private "
            f"or gated. Packaged models are {', '.join(sorted(registry()))}"
        ) from error
    except ModelError:
        raise
    except Exception as error:  # the hub client's network errors share no base class
        if cached is not None:
            return cached
        raise ModelDownloadError(
            f"cannot fetch {name!r} from the hub ({type(error).__name__}), and neither the local cache nor a folder "
            f"has it. Packaged models need no hub: {', '.join(sorted(registry()))}; or give the folder of a saved model"
        ) from error


def _snapshot(name: str) -> Path:
    """Safetensors where the repository has them, pickled weights only where it does not."""
    from huggingface_hub import snapshot_download

    from ..transformers_api import without_progress_bars

    for weights in ("*.safetensors", "*.bin"):
        files = [*_HUB_FILES, weights]
        with nullcontext() if progress.is_shown() else without_progress_bars():
            folder = Path(snapshot_download(name, allow_patterns=files, ignore_patterns=_HUB_EXTRAS))
        if any(folder.glob(weights)):
            return _saved(folder)
    raise ModelDownloadError(
        f"the hub's {name!r} has neither safetensors nor pickled weights; choose a repository that has"
    )


def _cached_snapshot(name: str) -> Path | None:
    """What transformers itself has cached: fewer files than a snapshot, which the hub client then calls incomplete."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder and any([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) else None
