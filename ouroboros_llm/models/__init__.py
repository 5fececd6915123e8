"""Names to weights: the registry of packaged models, folders, the hub.

`loading` brings a model into memory, `packaged` fetches weights that come as Python packages, `metadata` reads what is
known without the weights.
"""

from .loading import LoadedModel, load, load_tokenizer, local_context_length, local_folder, placement, resolve

__all__ = [
    "LoadedModel",
    "load",
    "load_tokenizer",
    "local_context_length",
    "local_folder",
    "placement",
    "resolve",
]
