"""Places that the environment names."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """`$OUROBOROS_CACHE`, or the user's cache folder."""
    folder = os.environ.get("OUROBOROS_CACHE")
    return Path(folder).expanduser() if folder else user_cache_path("ouroboros-llm", appauthor=False) / "models"
