"""Make a folder that `transformers serve` serves with Ouroboros: a model's files beside `custom_generate/`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

CUSTOM_GENERATE = Path(__file__).parent / "custom_generate" / "generate.py"


def prepare(model: Path, folder: Path, *, copy: bool = False) -> None:
    """Fill `folder` with the files of the folder `model`, as links unless `copy`, and with our `generate`.

    Raises:
        FileExistsError: `folder` holds a file that is neither such a link nor our `generate`; nothing is overwritten.
    """
    files = {file.name: file.resolve() for file in model.iterdir() if file.is_file()}
    taken = [name for name in files if (folder / name).exists() and not (folder / name).is_symlink()]
    if taken:
        raise FileExistsError(
            f"DIR must be new or made of links, but {folder} holds {', '.join(taken)}; choose another"
        )
    (folder / "custom_generate").mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        (folder / name).unlink(missing_ok=True)
        _place(file, folder / name, copy)
    # Copied in any case: the library hashes and copies this file, and links would lead out of the folder.
    shutil.copyfile(CUSTOM_GENERATE, folder / "custom_generate" / "generate.py")


def _place(file: Path, target: Path, copy: bool) -> None:
    if not copy:
        try:
            return target.symlink_to(file)
        except OSError:  # a file system, or a Windows user, without links
            pass
    shutil.copyfile(file, target)


def main() -> None:
    from ouroboros_llm.models.loading import resolve

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a registry name, the folder of a saved model, or a hub id")
    parser.add_argument("folder", metavar="DIR", type=Path, help="the folder to make")
    parser.add_argument("--copy", action="store_true", help="copy the model's files instead of linking them")
    arguments = parser.parse_args()
    prepare(resolve(arguments.model), arguments.folder, copy=arguments.copy)
    print(f"transformers serve {arguments.folder} --trust-remote-code")


if __name__ == "__main__":
    main()
