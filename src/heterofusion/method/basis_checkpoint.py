"""The extra rows of an expanded adapter in a checkpoint: a resumed run has those of the run that it goes on with."""

import json
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from heterofusion.adapters.lora import LoraAdapter
from heterofusion.method.expansion import ExpandedAdapter, Expansion, with_rows
from heterofusion.runtime.errors import UserError

BASIS_FILE = "extra_rows.safetensors"


def write_rows(folder: Path, adapter: LoraAdapter) -> None:
    """Write the extra rows of an adapter, and where they are from; nothing of one that was not expanded.

    Raises:
        OSError: the file cannot be written.
    """
    if not isinstance(adapter, ExpandedAdapter):
        return
    file = folder / BASIS_FILE
    partial = file.with_name(f"{file.name}.partial")
    try:
        expansion = json.dumps(adapter.expansion.to_dict())
        save_file(adapter.extra_rows(), partial, metadata={"format": "pt", "expansion": expansion})
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{file} could not be written ({error})") from error
    partial.replace(file)


def read_rows(folder: str | Path, adapter: ExpandedAdapter) -> ExpandedAdapter:
    """The adapter with the extra rows that `write_rows` wrote.

    Raises:
        ValueError: the file is missing, damaged, or of another adapter.
    """
    file = Path(folder).absolute() / BASIS_FILE
    try:
        with safe_open(file, "pt") as content:
            rows = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            recorded = json.loads((content.metadata() or {})["expansion"])
        expansion = Expansion(**{item.name: recorded[item.name] for item in fields(Expansion)})
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); resume from another checkpoint") from error
    expected = {path: tuple(part.shape) for path, part in adapter.extra_rows().items()}
    if {path: tuple(part.shape) for path, part in rows.items()} != expected:
        raise UserError(f"{file} has other modules or shapes than the adapter; resume from another checkpoint")
    return with_rows(adapter, rows, expansion)
