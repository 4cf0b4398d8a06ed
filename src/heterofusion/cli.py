"""The `heterofusion` command: runs a recipe, through `accelerate launch` where its flags are given."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

from heterofusion.runtime.errors import USER_ERROR, UserError
from heterofusion.runtime.flags import take_flags


def _shipped(folder: str) -> Path:
    """A folder of the checkout that an installed package has within itself."""
    inside = Path(__file__).parent / folder
    return inside if inside.is_dir() else Path(__file__).parents[2] / folder


def _commands() -> dict[str, Path]:
    """The recipes; one with an underscore in its name is a part of another, or maintains the package."""
    return {path.stem: path for path in sorted(_shipped("recipes").glob("*.py")) if "_" not in path.stem}


def _overview() -> str:
    lines = ["usage: heterofusion COMMAND [--accelerate_config NAME] [--num_processes N] [FLAGS]", "", "commands:"]
    for name, path in _commands().items():
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:<12} {doc.partition(chr(10))[0]}")
    names = ", ".join(sorted(path.stem for path in _shipped("accelerate_configs").glob("*.yaml")))
    lines += ["", f"--accelerate_config is the path of a file of `accelerate config`, or one of {names}."]
    return "\n".join([*lines, "`heterofusion COMMAND --help` lists the flags of a command."])


def _run(name: str, argv: list[str]) -> int:
    commands = _commands()
    if name not in commands:
        raise UserError(f"{name!r} is no command; choose one of {', '.join(commands)}")
    path = str(commands[name])
    configs, argv = take_flags(argv, "accelerate_config")
    processes, argv = take_flags(argv, "num_processes")
    launch = []
    for config in configs[-1:]:
        named = _shipped("accelerate_configs") / f"{config}.yaml"
        file = named if named.is_file() else Path(config).expanduser()
        if not file.is_file():
            raise UserError(f"--accelerate_config {config!r} is no file and no name; see heterofusion --help")
        launch += ["--config_file", str(file)]
    for count in processes[-1:]:
        launch += ["--num_processes", count]
    if launch:
        return subprocess.call([sys.executable, "-m", "accelerate.commands.launch", *launch, path, *argv])
    sys.argv = [path, *argv]
    runpy.run_path(path, run_name="__main__")
    return 0


def main() -> int:
    """Run the command line; gives the exit code."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    try:
        return _run(argv[0], argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except SystemExit as end:  # of a recipe
        return int(end.code or 0)


if __name__ == "__main__":
    sys.exit(main())
