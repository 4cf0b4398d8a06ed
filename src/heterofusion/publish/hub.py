"""An adapter goes to the Hub: exactly its files, in one commit, and nothing that tells of this machine.

The local folder stays as it is. What names a local folder there (PEFT loads the base model from it) is cut to a name
in the uploaded copy; `python -m heterofusion.publish.push` uploads the same again.
"""

import json
import logging
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments

from heterofusion.adapters.config import AdapterError
from heterofusion.adapters.lora import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from heterofusion.method.diagnostics import DIAGNOSTICS_FILE
from heterofusion.publish.record import (
    CARD_FILE,
    DISTILLATION_FILE,
    EXPERT_FILE,
    MERGE_FILE,
    PROVENANCE_FILE,
    RECORD_FILES,
    find_record,
    record_control,
)
from heterofusion.publish.write import ExportError
from heterofusion.runtime.files import display_name

logger = logging.getLogger(__name__)

# Tokenizer files by their full names: whatever else a user keeps beside the adapter is not ours to publish.
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
HUB_PATTERNS = (
    WEIGHTS_FILE,
    CONFIG_FILE,
    CARD_FILE,
    TOKENIZER_CONFIG_FILE,
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_COMMITS = {
    PROVENANCE_FILE: "Upload fused adapter",
    MERGE_FILE: "Upload merged adapter",
    DISTILLATION_FILE: "Upload distilled adapter",
    EXPERT_FILE: "Upload LoRA expert",
}
_BASE_KEY = "base_model_name_or_path"
_PATH_KEY = re.compile(r"(name_or_path|_file|_path|_dir)$")
_ABSOLUTE = re.compile(r"(file:|~?/|\\\\|[A-Za-z]:[\\/]).*")  # of Linux, macOS and Windows: adapters travel
# Texts of a tokenizer that must stay as they are: a token may well be a slash.
_VERBATIM_KEY = re.compile(r"(_tokens?|_template|_schema|_decoder)$")
_SECRET_KEY = re.compile(r"(|use_auth_|auth_|access_)token")  # old versions kept how the tokenizer was downloaded
_TOKEN = re.compile(r"\b(hf_oauth_[\w.-]{20,}|(hf|api_org)_[A-Za-z0-9]{20,})")


def push_output(
    args: TrainingArguments,
    commit_message: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
) -> str:
    """Push the adapter in `output_dir` under `hub_model_id`, or the folder's name; see `push_adapter`.

    Args:
        args: of the run; its Hub settings hold where an argument is None.
        commit_message: see `push_adapter`.
        token: see `push_adapter`.
        revision: see `push_adapter`.
        private: see `push_adapter`.
    """
    folder = Path(str(args.output_dir))
    return push_adapter(
        folder,
        args.hub_model_id or folder.resolve().name,
        token=token or args.hub_token,
        private=args.hub_private_repo if private is None else private,
        revision=revision or args.hub_revision,
        commit_message=commit_message,
    )


def push_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload what a recipe wrote to the Hub: adapter, config, tokenizer, card and record, nothing else.

    All files arrive in one commit or not at all. The local folder is only read.

    Args:
        folder: what `export_adapter` or a recipe (fusion, merge, distillation, expert) wrote; it may hold anything
            besides.
        repo_id: `name` or `owner/name`; the repository is made if there is none.
        token: Hub token; HF_TOKEN or the one of `hf auth login` by default.
        private: whether a new repository is private; one that exists stays as it is.
        revision: branch to push to, made if there is none; the main branch by default.
        commit_message: first line of the commit; by default it says what kind of adapter it is.

    Returns:
        Address of the commit.

    Raises:
        ExportError: the folder holds no complete adapter, or a control with other sources than it names; the name is
            none for a repository, or the Hub refused: the message says how to push again.
    """
    folder = Path(folder).expanduser().absolute()
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        again = push_command(folder, "NAME", private, revision)
        raise ExportError(
            f"{repo_id!r} is no name for a repository on the Hub ({_one_line(error)}); the adapter is in {folder}. "
            f"Push it under a --hub_model_id of letters, digits, '-', '_' and '.': {again}"
        ) from error
    files = hub_files(folder)
    if commit_message is None:
        commit_message = next(message for name, message in _COMMITS.items() if name in files)
    api = HfApi(token=token)
    try:
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision not in (None, "main") and not str(revision).startswith("refs/"):
            api.create_branch(repo, branch=str(revision), exist_ok=True)
        return api.create_commit(repo, operations, commit_message=commit_message, revision=revision).commit_url
    except Exception as error:  # whatever the Hub or the network says, the adapter is safe and the user must hear so
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code == 401
        login = " with a token in HF_TOKEN, or after `hf auth login`" if token or refused else ""
        raise ExportError(
            f"the push to {repo_id} failed ({_reason(error, token)}); the adapter is safe in {folder}. "
            f"Push again{login}: {push_command(folder, repo_id, private, revision)}"
        ) from error


def push_command(folder: Path, repo_id: str, private: bool | None = None, revision: str | None = None) -> str:
    """The shell command that pushes a folder with this Python, from anywhere. It holds no token."""
    words = [sys.executable or "python", "-m", "heterofusion.publish.push", "--adapter", str(folder.absolute())]
    words += ["--hub_model_id", repo_id]
    if private is not None:
        words += ["--hub_private_repo", str(private).lower()]
    if revision is not None:
        words += ["--hub_revision", revision]
    return shlex.join(words)


def hub_files(folder: Path) -> dict[str, Path | bytes]:
    """What is uploaded of a folder.

    Args:
        folder: what `export_adapter` or a recipe wrote.

    Returns:
        Local file by its path in the repository, or the content where local paths or tokens had to be taken out.

    Raises:
        ExportError: the adapter there is missing, incomplete or damaged, or a control.
    """
    if not any((folder / name).is_file() for name in RECORD_FILES):
        names = f"{', '.join(RECORD_FILES[:-1])} or {RECORD_FILES[-1]}"
        raise ExportError(f"{folder} holds no {names}, which tells what made it; export an adapter there first")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ExportError(f"{folder} holds no {name}; export an adapter there first")
    try:
        provenance, record = find_record(folder)
        base = load_adapter(folder).base_model or ""
    except AdapterError as error:
        raise ExportError(f"{folder} holds no complete adapter ({error}); export it again") from error
    control = record_control(record)
    if control is not None:
        raise ExportError(
            f"{folder} holds a control (source_control {control} in {provenance}): it was made without what its "
            "sources know, so it is not pushed as a fusion of them; push that of the real sources"
        )
    own = [provenance, DIAGNOSTICS_FILE] if provenance == PROVENANCE_FILE else [provenance]
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for pattern in (*HUB_PATTERNS, *own)
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
    cleaned = []
    private_paths = _private_paths(folder, base)
    for name in (CONFIG_FILE, provenance, TOKENIZER_CONFIG_FILE, CARD_FILE):
        if name in files and (content := _cleaned(folder / name, private_paths)) is not None:
            files[name] = content
            cleaned.append(name)
    if cleaned:
        logger.info("local paths and tokens are taken out of the uploaded copy of %s", ", ".join(cleaned))
    if base and (base != display_name(base) or os.path.isdir(base)):
        logger.warning(
            "the base model was a local folder, so the repository names it %r; edit %s in %s and base_model in %s "
            "there to its Hub id",
            display_name(base),
            _BASE_KEY,
            CONFIG_FILE,
            CARD_FILE,
        )
    return files


def _cleaned(path: Path, private_paths: re.Pattern[str]) -> bytes | None:
    """A text without local paths and tokens, None if there are none in the file."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            clean = _clean_text(text, private_paths)
        else:
            content = json.loads(text)
            new = _clean_json(content, private_paths)
            clean = text if new == content else json.dumps(new, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    except (OSError, ValueError, RecursionError) as error:  # no permission, not UTF-8, not JSON, nested without end
        raise ExportError(f"{path} cannot be read ({_one_line(error)}); export the adapter again") from error
    return None if clean == text else clean.encode("utf-8")


def _clean_json(value: Any, private_paths: re.Pattern[str], key: str = "") -> Any:
    if isinstance(value, dict):
        return {
            name: item if _VERBATIM_KEY.search(name) else _clean_json(item, private_paths, name)
            for name, item in value.items()
            if not _SECRET_KEY.fullmatch(name)
        }
    if isinstance(value, list):
        return [_clean_json(item, private_paths, key) for item in value]
    if not isinstance(value, str):
        return value
    if _PATH_KEY.search(key) or _ABSOLUTE.fullmatch(value):
        return display_name(value)
    return _clean_text(value, private_paths)


def _clean_text(text: str, private_paths: re.Pattern[str]) -> str:
    return _TOKEN.sub("<token>", private_paths.sub(lambda match: display_name(match.group()), text))


def _private_paths(folder: Path, base: str) -> re.Pattern[str]:
    """Matches paths under the user's home, the adapter's folder and a local base model, wherever they stand."""
    places = {os.path.expanduser("~"), str(folder), str(folder.resolve()), base}
    roots = [re.escape(place.rstrip("/")) for place in places if os.path.isabs(place) and place.strip("/")]
    if not roots:
        return re.compile(r"(?!)")
    roots.sort(key=len, reverse=True)
    return re.compile(rf"(?<![\w./-])({'|'.join(roots)})(/[^\s\"'`|<>()\[\]{{}},;]*)?(?![\w-])")


def _reason(error: Exception, token: str | None) -> str:
    """What the Hub client says, in one line and without a token: some errors quote the header it is sent in."""
    text = _one_line(error)
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading", and no word why
        text = f"{text} {_one_line(error.__cause__)}"
    if token and token.strip():
        text = text.replace(token.strip(), "<token>")
    return _TOKEN.sub("<token>", text)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
