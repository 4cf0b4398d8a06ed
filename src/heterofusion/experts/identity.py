"""What tells bases and tokenizers apart, wherever their files lie and whenever they were copied."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from heterofusion.runtime.files import file_sha256

# what a base's answers depend on beside configuration and weights: beginnings of file names
_ANSWER_FILES = (
    "config.json",
    "generation_config",
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "vocab.",
    "merges.",
)


_WHOLE = 64 << 20  # weight files up to this size are hashed as a whole


_PIECE = 4096


def base_fingerprint(name: str) -> str | None:
    """Hash of a local base model's files, the same for every copy; None for a Hub id, which its commit tells."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin"):
            digest.update(f"{path.name} {_weights_sha256(path)}".encode())
        elif path.is_file() and path.name.startswith(_ANSWER_FILES):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _weights_sha256(path: Path) -> str:
    """Hash of a weight file; of a large safetensors file, of its header and three pieces of every tensor.

    That takes a moment where all of a large model would take minutes, and no training leaves all of a tensor's
    beginning, middle and end as they were.
    """
    size = path.stat().st_size
    if size <= _WHOLE or path.suffix != ".safetensors":
        return file_sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = file.read(length)
        digest.update(header)
        spans = [entry["data_offsets"] for key, entry in json.loads(header).items() if key != "__metadata__"]
        for start, end in sorted(spans):
            for place in (start, (start + end) // 2, max(start, end - _PIECE)):
                file.seek(8 + length + place)
                digest.update(file.read(min(_PIECE, end - place)))
    return digest.hexdigest()


def tokenizer_identity(tokenizer: Any) -> str:
    """What a tokenizer makes of texts and messages, and which token ends an answer."""
    words = [tokenizer_fingerprint(tokenizer), tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells tokenizers apart whose tokens are not the same: a hash of the fast tokenizer and its special ids."""
    # a chat template writes texts, it changes no token; how batches are padded and cut is not the tokenizer's own
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = {**json.loads(backend.to_str()), "padding": None, "truncation": None} if backend else tokenizer.get_vocab()
    parts = [words, sorted(tokenizer.all_special_ids)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
