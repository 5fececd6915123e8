"""Which part may know which: integrations -> ouroboros_llm <- storage, and no framework where it was not asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE, STORAGE, INTEGRATIONS = ROOT / "ouroboros_llm", ROOT / "storage", ROOT / "integrations"
FRAMEWORKS = {"langchain", "langchain_core", "langgraph", "llama_index", "llama_index_instrumentation"}
DATABASES = {"sqlalchemy", "psycopg", "sqlite3"}
ADAPTERS = {path.name for path in INTEGRATIONS.iterdir() if path.is_dir() and path.name != "__pycache__"}
FORBIDDEN = {
    CORE: FRAMEWORKS | DATABASES | ADAPTERS | {"ouroboros_storage"},
    STORAGE / "ouroboros_storage": FRAMEWORKS | ADAPTERS,
    INTEGRATIONS / "langchain_ouroboros": DATABASES | {"ouroboros_storage", "llama_index", "vllm_ouroboros"},
    INTEGRATIONS / "llama_index": DATABASES
    | {"ouroboros_storage", "langchain", "langchain_core", "langchain_ouroboros"},
}


def imports(path: Path) -> set[str]:
    """Top-level names of the absolute imports of a file, wherever in it they stand."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("root", FORBIDDEN, ids=lambda root: root.name)
def test_dependencies_point_one_way(root: Path) -> None:
    files = sorted(root.rglob("*.py"))
    assert files, f"{root} holds no Python file"
    wrong = {str(path.relative_to(ROOT)): sorted(imports(path) & FORBIDDEN[root]) for path in files}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from . import near\ndef late():\n    import sqlalchemy.orm as orm\n    from langchain_core.x import y\n"
    )
    assert imports(path) == {"sqlalchemy", "langchain_core"}


def test_core_imports_neither_framework_nor_database() -> None:
    code = "from ouroboros_llm import *; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "ouroboros_llm" in loaded.split()
    # sqlite3 is the standard library's own: others may load it.
    assert not (FRAMEWORKS | ADAPTERS | {"sqlalchemy", "psycopg", "ouroboros_storage"}) & set(loaded.split())


def test_llama_index_stays_a_namespace() -> None:
    """An `__init__.py` above our package would hide llama-index-core (PEP 420)."""
    assert (INTEGRATIONS / "llama_index" / "llms" / "ouroboros" / "__init__.py").exists()
    assert not (INTEGRATIONS / "llama_index" / "__init__.py").exists()
    assert not (INTEGRATIONS / "llama_index" / "llms" / "__init__.py").exists()


# Folders of the core.

FOLDERS = (
    "cli",
    "bench",
    "sessions",
    "drafting",
    "models",
    "target_model",
    "serving",
    "phrase_pool",
    "decoding",
    "chat",
    "grammar",
    "tool_parsers",
)
"""From top to bottom: a folder imports from those after it alone, and from modules of the root."""

ROOT_FILES = 14

IGNORED = {
    "build", "develop-eggs", "dist", "downloads", "eggs", ".eggs", "lib", "lib64", "parts", "sdist", "var", "wheels",
    "target", "instance", "htmlcov", "cover", "coverage", "env", "venv", "ENV", "env.bak", "venv.bak", "site", "bin",
    "obj", "out", "Debug", "Release", "node_modules", "bower_components", "vendor", "pkg", "logs", "log", "tmp",
    "temp", "cache", ".cache", "local", "private", "secrets", "results", "output", "outputs", "checkpoints", "wandb",
    "mlruns", "data", "profile_default", "__pypackages__", "__pycache__", "cython_debug", "share", "runs", "bazel-out",
}  # fmt: skip
"""Folder names in the ignore files that GitHub and others propose for Python, Node, Java, Rust, Go, C++ and machine
learning: tools that honour such a file, a wheel's builder among them, would leave the folder out."""


def folder_of(module: list[str]) -> str | None:
    """The folder of the core that a module, as parts behind the package's name, lies in; None for the root's own."""
    return module[0] if module and (CORE / module[0]).is_dir() else None


def own_imports(path: Path) -> set[str]:
    """Folders of the core that a file of it imports from, wherever in it that stands."""
    package = path.relative_to(CORE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            found |= {folder_of([part for part in [*base, alias.name] if part]) for alias in node.names}
    return {folder for folder in found if folder is not None}


def test_every_folder_has_a_place() -> None:
    there = {path.name for path in CORE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert there == {*FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_downward(folder: str) -> None:
    below = {*FOLDERS[FOLDERS.index(folder) :]}
    files = sorted((CORE / folder).rglob("*.py"))
    wrong = {str(path.relative_to(CORE)): sorted(own_imports(path) - below) for path in files}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_the_root_is_small() -> None:
    assert len(list(CORE.glob("*.py"))) <= ROOT_FILES


@pytest.mark.parametrize("root", [CORE, STORAGE, INTEGRATIONS], ids=lambda root: root.name)
def test_no_folder_is_one_that_others_ignore(root: Path) -> None:
    folders = {path.name for path in root.rglob("*") if path.is_dir() and path.name != "__pycache__"}
    assert not folders & IGNORED


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_what_it_is(folder: str) -> None:
    for package in [CORE / folder, *(path for path in (CORE / folder).rglob("*") if (path / "__init__.py").exists())]:
        assert ast.get_docstring(ast.parse((package / "__init__.py").read_text())), package
