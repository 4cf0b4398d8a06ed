"""An adapter goes to the Hub: exactly its files, in one commit, and nothing that tells of this machine.

The local folder is only read. What names a local folder there (PEFT loads the base model from it) is cut to a name in
what is uploaded; `heterofusion push` uploads the same again.
"""

import json
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import TrainingArguments

from heterofusion.adapters.lora import CONFIG_FILE, TOKENIZER_FILES, WEIGHTS_FILE, load_adapter
from heterofusion.method.diagnostics import DIAGNOSTICS_FILE
from heterofusion.publish.card import CARD_FILE
from heterofusion.publish.record import FILE_OF_KIND, find_record, publishable, record_control, without_tokens
from heterofusion.publish.write import ExportError
from heterofusion.runtime.errors import UserError, one_line
from heterofusion.runtime.files import display_name

logger = logging.getLogger(__name__)


def push_output(args: TrainingArguments, **given: Any) -> str:
    """Push the adapter in a run's `output_dir`; the run's Hub settings hold where an argument is None or missing."""
    folder = Path(str(args.output_dir))
    settings: dict[str, Any] = {
        "token": args.hub_token,
        "private": args.hub_private_repo,
        "revision": args.hub_revision,
    }
    settings |= {name: value for name, value in given.items() if value is not None}
    return push_adapter(folder, args.hub_model_id or folder.resolve().name, **settings)


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
        folder: what `export_adapter` or a recipe (fusion, merge, distillation, expert) wrote.
        repo_id: `name` or `owner/name`; the repository is made if there is none.
        token: Hub token; HF_TOKEN or the one of `hf auth login` by default.
        private: whether a new repository is private; one that exists stays as it is.
        revision: branch to push to, made if there is none; the main branch by default.
        commit_message: first line of the commit; by default it says what kind of adapter it is.

    Returns:
        Address of the commit.

    Raises:
        ExportError: no complete adapter, a control, or the Hub refused: the message says how to push again.
    """
    folder = Path(folder).expanduser().absolute()
    files = hub_files(folder)
    message = commit_message or next(f"Upload {kind} adapter" for kind, name in FILE_OF_KIND.items() if name in files)
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision not in (None, "main") and not str(revision).startswith("refs/"):
            api.create_branch(repo, branch=str(revision), exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        return api.create_commit(repo, operations, commit_message=message, revision=revision).commit_url
    except Exception as error:  # whatever the Hub or the network says, the adapter is safe and the user must hear so
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code == 401
        login = " with a token in HF_TOKEN, or after `hf auth login`" if token or refused else ""
        name = "NAME" if isinstance(error, HFValidationError) else repo_id
        raise ExportError(
            f"the push to {repo_id!r} failed ({_reason(error, token)}); the adapter is safe in {folder}. "
            f"Push again{login}: {push_command(folder, name, private, revision)}"
        ) from error


def push_command(folder: Path, repo_id: str, private: bool | None = None, revision: str | None = None) -> str:
    """The shell command that pushes a folder, from anywhere. It holds no token."""
    program = ["heterofusion"] if shutil.which("heterofusion") else [sys.executable, "-m", "heterofusion.cli"]
    words = [*program, "push", "--adapter", str(folder.absolute()), "--hub_model_id", repo_id]
    words += [] if private is None else ["--hub_private_repo", str(private).lower()]
    words += [] if revision is None else ["--hub_revision", revision]
    return shlex.join(words)


def hub_files(folder: Path) -> dict[str, Path | bytes]:
    """What is uploaded of a folder, by its path there: a file, or a content from which paths and tokens are gone."""
    if not (folder / WEIGHTS_FILE).is_file():  # a pickle is not pushed
        raise ExportError(f"{folder} holds no {WEIGHTS_FILE}; export an adapter there first")
    try:
        found, base = find_record(folder), load_adapter(folder).base_model or ""
    except (UserError, OSError) as error:
        raise ExportError(f"{folder} holds no complete adapter ({error}); export it again") from error
    if found is None:
        raise ExportError(
            f"{folder} holds no {' or '.join(FILE_OF_KIND.values())} of these weights; export the adapter again"
        )
    record_file, record = found
    if control := record_control(record):
        told = f"{folder} holds a control (source_control {control} in {record_file}), which is not published"
        raise ExportError(f"{told}; push what the real sources made")
    patterns = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, DIAGNOSTICS_FILE, record_file, *TOKENIZER_FILES)
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
    roots = [str(folder), str(folder.resolve()), base]
    scanned = (CONFIG_FILE, "tokenizer_config.json", CARD_FILE, record_file)
    cleaned = {name: clean for name in scanned if name in files and (clean := _cleaned(folder / name, roots))}
    if base and (base != display_name(base) or os.path.isdir(base)):
        told = "the base model was a local folder, so the repository names it %r; edit that in %s and %s to its Hub id"
        logger.warning(told, display_name(base), CONFIG_FILE, CARD_FILE)
    return files | cleaned


def _cleaned(path: Path, roots: list[str]) -> bytes | None:
    """A text without local paths and tokens, None if there are none in the file."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else text
        clean = publishable(content, roots)
    except (OSError, ValueError, RecursionError) as error:  # no permission, not UTF-8, not JSON, nested without end
        raise ExportError(f"{path} cannot be read ({_reason(error)}); export the adapter again") from error
    whole = clean if isinstance(clean, str) else json.dumps(clean, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    return None if clean == content else whole.encode("utf-8")


def _reason(error: Exception, token: str | None = None) -> str:
    """What the Hub client says, in one line and without a token: some errors quote the header it is sent in."""
    text = f"{type(error).__name__}: {one_line(error)}"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading", and no word why
        text = f"{text} {_reason(error.__cause__)}"  # type: ignore[arg-type]
    return without_tokens(text.replace((token or "").strip() or "<token>", "<token>"))
