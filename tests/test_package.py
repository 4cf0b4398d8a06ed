"""What the package declares and ships: every module that is imported, every room, the recipes."""

import ast
import re
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).parents[1]
CONTENT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = CONTENT["project"]
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml"}  # where a module is not called as its package


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", text)[0].lower().replace("_", "-") for text in requirements}


def imported(folder: str) -> set[str]:
    """Packages that the Python files of a folder import, but for the standard library and their own."""
    found: set[str] = set()
    files = list((ROOT / folder).rglob("*.py"))
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    own = {"heterofusion"} if folder == "src" else {"heterofusion", *(file.stem for file in files)}
    packages = {DISTRIBUTIONS.get(module, module) for module in found - sys.stdlib_module_names - own}
    return {name.replace("_", "-") for name in packages}


def test_every_imported_module_is_declared_and_has_a_tested_version():
    needed, extras = names(PROJECT["dependencies"]), PROJECT["optional-dependencies"]
    declared = needed.union(*(names(extras[name]) for name in extras if name != "dev"))
    assert needed <= imported("src") <= declared and imported("recipes") <= declared
    pinned = names((ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines())
    assert declared | names(extras["dev"]) <= pinned
    # the trainer overrides private methods of transformers'
    assert any(re.fullmatch(r"transformers>=[\d.]+,\s*<6", text) for text in PROJECT["dependencies"])


def test_every_room_and_the_recipes_are_shipped():
    rooms = {file.parent.relative_to(ROOT / "src") for file in (ROOT / "src").rglob("__init__.py")}
    recipes = {"heterofusion" / file.parent.relative_to(ROOT) for file in (ROOT / "recipes").rglob("*.py")}
    wanted = {".".join(folder.parts) for folder in rooms | recipes} | {"heterofusion.accelerate_configs"}
    assert set(CONTENT["tool"]["setuptools"]["packages"]) == wanted
