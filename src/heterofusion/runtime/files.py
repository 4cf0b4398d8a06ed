"""Files that are there as a whole or not at all: a text in one step, or a folder that is filled beside its place."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from safetensors import SafetensorError

from heterofusion.runtime.errors import UserError

TEMPORARY = ".tmp"  # suffix of a file that is being written


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object; a `UserError` names the file if it does not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; name a folder that holds it") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}; download the file again"
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, a number of 5,000 digits, nested without end
        raise UserError(f"{path} cannot be read: {error}; download or save it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, a JSON object was expected")
    return content


def write_whole(path: Path, parts: str | Iterable[str]) -> None:
    """Write a text so that the file is there as a whole or, after a kill or on a full disk, as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY)
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.writelines([parts] if isinstance(parts, str) else parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def staging_folder(folder: Path, prefix: str) -> Iterator[Path]:
    """An empty folder `<folder>/<prefix>...`, gone afterwards; what killed programs left of such goes first.

    `folder` itself goes where it is new and still empty afterwards.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{prefix}*"):
        shutil.rmtree(left)
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def is_failed_write(error: BaseException) -> bool:
    """Whether an error is of a full disk or the like: safetensors has one of its own, tokenizers no type at all."""
    return isinstance(error, (OSError, SafetensorError)) or type(error) is Exception


@contextlib.contextmanager
def told_writes(what: str, outcome: str = "") -> Iterator[None]:
    """A failed write becomes an `OSError` that begins with what it was for and ends with what is left, or to do."""
    try:
        yield
    except Exception as error:
        if not is_failed_write(error):
            raise
        raise OSError(f"{what} ({error})" + (f"; {outcome}" if outcome else "")) from error


def check_output_dir(
    output_dir: str, resuming: bool, overwrite: bool, resume_flag: str | None = "--resume_from_checkpoint"
) -> None:
    """Refuse to write over another run, or where nothing can be written. The folder is not made yet."""
    folder = Path(output_dir).absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--output_dir {folder}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {folder}: {nearest} is not writable; name another folder")
    if folder == nearest and any(folder.iterdir()) and not (resuming or overwrite):
        resume = f"resume with {resume_flag} true, " if resume_flag else ""
        raise UserError(
            f"--output_dir {folder} exists and is not empty; name another, {resume}or pass --overwrite true"
        )


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def display_name(name: str) -> str:
    """A Hub id as it is; of anything else (local paths, a stranger's text) the last part, in harmless characters."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.exists(name):  # unlike Path.exists, takes long names
        return name
    return re.sub(r"[^\w.-]", "_", PureWindowsPath(name).name)  # which knows both kinds of slashes


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that the file is there as a whole or not at all."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, so that the file is there as a whole or not at all."""
    write_whole(path, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object that `write_json` wrote; None where there is no file."""
    try:
        return read_json_object(path) if path.is_file() else None
    except UserError as error:
        raise UserError(f"{error}, or start anew with --overwrite true") from error
