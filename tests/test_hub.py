"""Pushing with the real Hub client to a server on loopback: what arrives, what does not, what a failure leaves."""

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.utils import _http
from transformers import AutoModelForCausalLM

from conftest import TINY, perturb
from heterofusion import HeteroFusionModel, push_adapter
from heterofusion.method.config import MethodConfig
from heterofusion.publish.record import FILE_OF_KIND
from heterofusion.publish.write import ExportError, export_adapter
from heterofusion.runtime.files import file_sha256
from hub_server import CLOSE, LOSE, OWNER, STAGES, TOKEN, HubServer
from recipe_runner import contents, flags, recipe, save_tokenizer, shell, train

pytestmark = pytest.mark.usefixtures("logging_restored")
push = recipe("push").main

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FILES = {WEIGHTS, CONFIG, "README.md", "fusion.json", "diagnostics.json", "tokenizer.json", "tokenizer_config.json"}
# What lies in the folder of a run, or was put there by its owner, and is nobody's business.
CLUTTER = (
    "checkpoint-1/adapter_model.safetensors", "checkpoint-1/tokenizer.json", "optimizer.pt", "trainer_state.json",
    ".env", ".export-xyz/adapter_config.json", "runs/today/events.out.tfevents.1", "tokenizer_backup/tokenizer.json",
    "tokenizer.json.bak", "adapter_model.bin", "additional_chat_templates/notes.txt", "tokenizer.model/secret",
)  # fmt: skip


@pytest.fixture
def hub(monkeypatch):
    """A server that the client in this process takes for the Hub. It does not wait between its retries."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield server
        close_session()
    assert not server.unknown


@pytest.fixture(scope="module")
def exported(base_dir, target, sources, tmp_path_factory) -> Path:
    """An exported adapter on a local base, with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("exported") / "fused"
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    export_adapter(perturb(HeteroFusionModel.from_adapters(base, target, sources, MethodConfig(**TINY))), folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def adapter(exported, tmp_path) -> Path:
    """A copy of the exported adapter in a folder that holds more."""
    folder = tmp_path / "run of mine's" / "fused"
    shutil.copytree(exported, folder)
    for name in CLUTTER:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"HF_TOKEN={TOKEN}")
    return folder


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_nothing_private(hub: HubServer, *secrets: object) -> None:
    for content in [*hub.received, *(file for repo in hub.repos for file in hub.files(repo).values())]:
        for secret in (*secrets, Path.home(), TOKEN):
            assert str(secret).encode() not in content, (secret, content[:200])


def test_push_uploads_the_adapter_whatever_lies_beside_it(hub, adapter, base_dir, tmp_path):
    (adapter / "additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    before = contents(tmp_path)
    assert push_adapter(adapter, "you/fused") == f"{hub.url}/you/fused/commit/{1:040x}"
    received = hub.files("you/fused")
    assert received.keys() == FILES | {"additional_chat_templates/tools.jinja"}
    for name in received.keys() - {CONFIG}:
        assert received[name] == (adapter / name).read_bytes(), name
    local, pushed = json.loads((adapter / CONFIG).read_text()), json.loads(received[CONFIG])
    assert local["base_model_name_or_path"] == str(base_dir)  # PEFT loads the base from there
    assert pushed == {**local, "base_model_name_or_path": "llama"}
    assert_nothing_private(hub, tmp_path, base_dir, "run of mine")
    assert contents(tmp_path) == before
    assert [commit["summary"] for commit in hub.repos["you/fused"].commits] == ["Upload fusion adapter"]


def test_tokenizer_card_and_provenance_lose_paths_and_tokens_and_nothing_else(hub, adapter, base_dir):
    kept = {
        "eos_token": "/think", "extra_special_tokens": ["/a/b"], "added_tokens_decoder": {"5": {"content": "/usr/x"}},
        "chat_template": "/{{ m }}", "model_max_length": 10**30, "is_local": True, "note": "either/or",
    }  # fmt: skip
    dropped = {"use_auth_token": TOKEN, "token": None}
    paths = {
        "name_or_path": str(base_dir), "vocab_file": r"C:\Users\jane\vocab.txt",
        "tokenizer_file": str(adapter / "tokenizer.json"), "comment": f"from {Path.home()}/x, ok",
        "auto_map": {"AutoTokenizer": [f"{base_dir}--tokenization.Own", None]},
    }  # fmt: skip
    edit(adapter / "tokenizer_config.json", **kept, **dropped, **paths)
    card = (adapter / "README.md").read_text()
    (adapter / "README.md").write_text(f"{card}\nMade of {base_dir} in `{adapter}/log.txt` with {TOKEN}.\n")
    edit(adapter / "fusion.json", extra={"notes": [f"file://{Path.home()}/notes.txt"]})
    push_adapter(adapter, "fused")
    received = hub.files(f"{OWNER}/fused")
    config = json.loads(received["tokenizer_config.json"])
    assert {name: config[name] for name in kept} == kept
    assert not dropped.keys() & config.keys()
    assert {name: config[name] for name in paths} == {
        "name_or_path": "llama", "vocab_file": "vocab.txt", "tokenizer_file": "tokenizer.json",
        "comment": "from x, ok", "auto_map": {"AutoTokenizer": ["llama--tokenization.Own", None]},
    }  # fmt: skip
    assert received["README.md"].decode() == f"{card}\nMade of llama in `log.txt` with <token>.\n"
    assert json.loads(received["fusion.json"])["extra"] == {"notes": ["notes.txt"]}
    assert_nothing_private(hub, adapter, base_dir)


@pytest.mark.parametrize("kind", ["merge", "distillation", "tuning"])
def test_adapters_of_other_methods_are_pushed_with_their_record(hub, adapter, base_dir, tmp_path, kind):
    """An earlier fusion's record is of other weights."""
    edit(adapter / "fusion.json", weights_sha256="0" * 64)
    (adapter / "diagnostics.json").unlink()
    name = FILE_OF_KIND[kind]
    sha256 = file_sha256(adapter / WEIGHTS)
    content = {"experts": [{"name": "/data/jane/one"}], "note": TOKEN, "weights_sha256": sha256}
    (adapter / name).write_text(json.dumps(content))
    push_adapter(adapter, "lab/made")
    received = hub.files("lab/made")
    assert received.keys() == FILES - {"fusion.json", "diagnostics.json"} | {name}
    assert json.loads(received[name]) == {**content, "experts": [{"name": "one"}], "note": "<token>"}
    assert_nothing_private(hub, tmp_path, base_dir, "jane")
    assert [commit["summary"] for commit in hub.repos["lab/made"].commits] == [f"Upload {kind} adapter"]


INCOMPLETE = {
    "that of others": ("fusion.json", b'{"weights_sha256": "0"}', "holds no fusion.json or .* of these weights"),
    "half a fusion.json": ("fusion.json", b'{"target', "fusion.json is not JSON"),
    "a control": ("fusion.json", b'{"made_by": {"source_control": "noise"}}', r"a control \(source_control noise"),
    "half the weights": (WEIGHTS, b"\x00\x01", "damaged or truncated"),
    "no config": (CONFIG, None, f"{CONFIG} is missing"),
    "a card that is no text": ("README.md", b"\xff\xfe\x00", r"README.md cannot be read \(UnicodeDecodeError"),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_incomplete_adapter_raises_before_anything_is_sent(hub, adapter, case):
    name, content, message = INCOMPLETE[case]
    (adapter / name).unlink()
    if content is not None:
        (adapter / name).write_bytes(content)
    with pytest.raises(ExportError, match=rf"{re.escape(str(adapter))}.*{message}"):
        push_adapter(adapter, "fused")
    assert not hub.calls


FAILURES = [(stage, failure) for stage in STAGES for failure in (403, 503, CLOSE)] + [("commit", LOSE)]


@pytest.mark.parametrize(("stage", "failure"), FAILURES, ids=str)
def test_failing_stage_loses_nothing_and_the_command_pushes_again(hub, adapter, tmp_path, capsys, stage, failure):
    before = contents(tmp_path)
    hub.failures[stage] = failure
    with pytest.raises(ExportError, match="the push to 'lab/fused' failed") as raised:
        push_adapter(adapter, "lab/fused", private=True, revision="v1")
    message = str(raised.value)
    assert hub.calls.count(stage) in (1, 6)  # the client tries some stages six times
    assert str(adapter) in message and "\n" not in message
    assert (str(failure) if isinstance(failure, int) else "disconnected") in message
    assert contents(tmp_path) == before

    assert TOKEN not in message
    hub.failures.clear()
    command = shlex.split(message[message.index("Push again") :].partition(": ")[2])
    assert push(command[command.index("push") + 1 :]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/lab/fused/commit/")
    repo = hub.repos["lab/fused"]
    assert (repo.visibility, len(repo.commits), repo.branches["main"]) == ("private", 1, {})
    assert hub.files("lab/fused", "v1").keys() == FILES
    assert contents(tmp_path) == before


def test_failing_push_of_a_run_is_one_line_and_its_command_works_in_a_shell(
    hub, base_dir, arguments, capsys, tmp_path
):
    hub.failures["commit"] = 503
    run = {"model_name_or_path": base_dir, "push_to_hub": True, "hub_model_id": "fused", "hub_private_repo": True,
           "save_strategy": "steps", "save_steps": 1}  # fmt: skip
    capsys.readouterr()
    code, output = train.main(flags({**arguments, **run})), arguments["output_dir"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and "503" in line and f"safe in {output}. Push again: " in line
    before = contents(output)
    hub.failures.clear()
    done = shell("sh", "-c", line.partition("Push again: ")[2], **hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.url}/{OWNER}/fused/commit/{1:040x}\n"
    received = hub.files(f"{OWNER}/fused")
    assert received.keys() == FILES and hub.repos[f"{OWNER}/fused"].visibility == "private"
    assert_nothing_private(hub, tmp_path, base_dir)
    assert contents(output) == before


@pytest.mark.parametrize("given", ["hf_" + "WrongTokenOfTheTests" * 2, f"{TOKEN}\n", None])
def test_bad_token_is_refused_and_not_shown(hub, adapter, monkeypatch, tmp_path, given):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ExportError, match="Push again with a token in HF_TOKEN, or after `hf auth login`: ") as raised:
        push_adapter(adapter, "fused", token=given)
    assert "hf_" not in re.sub(r"hf_token", "", str(raised.value), flags=re.IGNORECASE)
    assert not hub.repos
