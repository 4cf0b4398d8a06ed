"""Small files of tensors that several runs share: written whole, checked when read, made anew when damaged."""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import TEMPORARY

logger = logging.getLogger(__name__)

_CONTENT = "content_sha256"
_RECORD = "record"


def cache_folder(logits_cache: str | None) -> Path:
    """The folder of `--logits_cache`, by default `heterofusion/soft_labels` in HF_HOME.

    Args:
        logits_cache: the flag's value.

    Raises:
        ValueError: it cannot be one.
    """
    folder = Path(logits_cache or Path(constants.HF_HOME) / "heterofusion" / "soft_labels").expanduser()
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        kind = "not writable" if nearest.is_dir() else "a file"
        raise UserError(f"--logits_cache {folder.absolute()}: {nearest} is {kind}; name another folder")
    return folder


def cache_key(identity: Mapping[str, Any]) -> str:
    """A short name for plain values: it differs when one of them does."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> None:
    """Write tensors and a record of plain values as one safetensors file, so that it is there whole or not at all.

    Several programs may write the same file at once.

    Args:
        path: the file; its folder is made.
        tensors: arrays by name.
        record: plain values.

    Raises:
        OSError: it cannot be written; names the file.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    metadata = {_RECORD: json.dumps(dict(record), sort_keys=True), _CONTENT: _digest(arrays)}
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(save(arrays, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"--logits_cache: {path} could not be written ({error}); name another folder") from error


def read_tensors(path: Path, names: set[str]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
    """Read what `write_tensors` wrote.

    Args:
        path: the file.
        names: the arrays that it must hold.

    Returns:
        Arrays and record; None if there is no such file, or (with a warning) if it is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if tensors.keys() != names:
            raise UserError(f"it holds {', '.join(sorted(tensors)) or 'nothing'}")
        if _digest(tensors) != metadata[_CONTENT]:
            raise UserError("its content is not what was written")
        return tensors, dict(json.loads(metadata[_RECORD]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s): it is made anew", path, " ".join(str(error).split()))
        return None


def _digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape} ".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()
