"""What a user sees on the command line: errors in one line before weights are loaded, and what a run leaves behind."""

import contextlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from conftest import GOLDEN
from heterofusion import HeteroFusionConfig, HeteroFusionModel, MethodConfig, export, load_adapter, plan_alignment
from heterofusion.checkpoints import load_hypernetworks
from heterofusion.cli import parse_arguments
from heterofusion.config import AdapterArguments, DataArguments, ModelArguments, RunArguments
from heterofusion.loading import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
TARGET, QWEN, MISTRAL = (str(GOLDEN / name) for name in ("target_llama", "source_qwen2", "source_mistral"))
SIZES = {"block_size": 32, "embed_dim": 32, "num_heads": 4, "max_position_embeddings": 64, "rdm_projections": 16}
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


# ---- fixtures and helpers ---------------------------------------------------------------------------------------


def recipe(name: str):
    """A recipe as a module; recipes/ is not a package."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train, plan = recipe("train"), recipe("plan")


def save_tokenizer(folder: Path, prefix: str = "w", size: int = 64) -> None:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"{prefix}{i}": i for i in range(4, size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def write_replay(path: Path, count: int = 6, first: int = 4, words: int = 4) -> Path:
    rows = [
        {
            "prompt": " ".join(f"w{first + (row + i) % 40}" for i in range(words)),
            "completion": f" w{first + row} w{first + row + 1}",
        }
        for row in range(count)
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory) -> Path:
    """The golden base with a tokenizer."""
    folder = tmp_path_factory.mktemp("bases") / "llama"
    shutil.copytree(GOLDEN / "base_llama", folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def bare_base(base_dir) -> Path:
    """A base without weights: enough for every check."""
    folder = base_dir.parent / "bare"
    shutil.copytree(base_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="session")
def replay(tmp_path_factory) -> Path:
    return write_replay(tmp_path_factory.mktemp("replay") / "replay.json")


@pytest.fixture
def arguments(bare_base, replay, tmp_path) -> dict:
    """Flags of a training run that is in order, but for the weights of its base."""
    return {
        "model_name_or_path": bare_base, "target_adapter": TARGET, "source_adapters": [QWEN],
        "dataset_name": [replay], "output_dir": tmp_path / "out", "use_cpu": True, "max_steps": 1,
        "gradient_accumulation_steps": 2, "learning_rate": 0.01, **SIZES,
    }  # fmt: skip


def flags(values: dict) -> list[str]:
    """Command line of a dictionary; None leaves a flag out."""
    argv = []
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return argv


@pytest.fixture
def fails(capsys, arguments, monkeypatch):
    """Run training with some flags changed; it must fail as a user's error does. Gives the line on stderr."""

    def no_weights(*args, **kwargs):
        raise AssertionError("the base model was loaded before the error")

    monkeypatch.setattr(train, "load_base", no_weights)

    def run(*words: object, **changed: object) -> str:
        output = arguments["output_dir"]
        before = {path: path.read_bytes() for path in sorted(output.rglob("*"))} if output.exists() else None
        line = error_line(capsys, train.main, flags({**arguments, **changed}), *words)
        after = {path: path.read_bytes() for path in sorted(output.rglob("*"))} if output.exists() else None
        assert after == before
        return line

    return run


def error_line(capsys, main, argv: list[str], *words: object) -> str:
    capsys.readouterr()
    code = main(argv)
    out, err = capsys.readouterr()
    check_error(code, out, err, *words)
    return err.splitlines()[0]


def check_error(code: int, out: str, err: str, *words: object) -> None:
    assert code == 2, err
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    for word in words:
        assert str(word) in err, f"{word!r} is not in: {err}"


@contextlib.contextmanager
def logging_restored():
    """A recipe sets up logging for its whole process; here it must not outlive the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    transformers_logging.enable_default_handler()
    transformers_logging.disable_propagation()


@pytest.fixture(autouse=True)
def _logging_restored():
    with logging_restored():
        yield


def succeeds(main, argv: list[str]) -> str:
    """Run a recipe that must succeed; gives what it wrote to stderr."""
    err, out = io.StringIO(), io.StringIO()
    with logging_restored(), contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        code = main(argv)
    assert code == 0, err.getvalue()
    return err.getvalue()


def copy_adapter(folder: Path, name: str = QWEN, config: dict | None = None, tensors=None) -> Path:
    """Copy an adapter with other config fields and with `tensors(dict)` applied to its weights."""
    shutil.copytree(name, folder)
    edit_config(folder, **(config or {}))
    if tensors is not None:
        weights = load_file(folder / "adapter_model.safetensors")
        tensors(weights)
        save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def edit_config(folder: Path, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---- adapters ---------------------------------------------------------------------------------------------------


def edit_tensors(function):
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        weights = load_file(path)
        function(weights)
        save_file(weights, path, {"format": "pt"})

    return edit


def only_bin(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def rename_out_of_layers(weights: dict) -> None:
    for key in list(weights):
        weights[re.sub(r"layers\.(\d+)", r"part\1", key)] = weights.pop(key)


def set_value(key: str, value: float):
    return edit_tensors(lambda weights: weights[key].view(-1)[0].fill_(value))


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BROKEN = {
    "missing safetensors": (lambda f: (f / WEIGHTS).unlink(), [WEIGHTS, "missing", "save"]),
    "corrupt safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 64), [WEIGHTS, "again"]),
    "empty safetensors": (lambda f: (f / WEIGHTS).write_bytes(b""), [WEIGHTS, "again"]),
    "huge header": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x7f{}"), [WEIGHTS, "again"]),
    "truncated safetensors": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), [WEIGHTS, "again"]),
    "only bin": (only_bin, ["adapter_model.bin", "--allow_pickle"]),
    "no config": (lambda f: (f / CONFIG).unlink(), [CONFIG, "missing"]),
    "config is not JSON": (lambda f: (f / CONFIG).write_text("{'r': 4}"), [CONFIG, "JSON", "line 1"]),
    "config is nested without end": (lambda f: (f / CONFIG).write_text('{"r":' + "[" * 100_000), [CONFIG]),
    "config is not UTF-8": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe{}"), [CONFIG]),
    "config is a list": (lambda f: (f / CONFIG).write_text("[]"), [CONFIG, "object"]),
    "unknown peft_type": (lambda f: edit_config(f, peft_type="IA3"), [CONFIG, "peft_type", "'IA3'", "LORA"]),
    "DoRA": (lambda f: edit_config(f, use_dora=True), [CONFIG, "use_dora", "DoRA"]),
    "lora_bias": (lambda f: edit_config(f, lora_bias=True), [CONFIG, "lora_bias", "true"]),
    "bias": (lambda f: edit_config(f, bias="lora_only"), [CONFIG, "bias", "'lora_only'", "none"]),
    "a newer PEFT": (
        lambda f: edit_config(f, peft_version="9.0.0", use_newlora=7), [CONFIG, "use_newlora", "7", "9.0.0"]),
    "pissa": (lambda f: edit_config(f, init_lora_weights="pissa"), [CONFIG, "init_lora_weights", "pissa"]),
    "negative r": (lambda f: edit_config(f, r=-4), [CONFIG, "-4", "positive"]),
    "NaN": (set_value(f"{FIRST}.lora_A.weight", float("nan")), [WEIGHTS, f"{FIRST}.lora_A.weight", "NaN"]),
    "Inf": (set_value(f"{FIRST}.lora_B.weight", float("inf")), [WEIGHTS, f"{FIRST}.lora_B.weight", "Inf"]),
    "A without B": (
        edit_tensors(lambda w: w.pop(f"{FIRST}.lora_B.weight")), [WEIGHTS, "layers.0.self_attn.q_proj", "lora_B"]),
    "other rank than the config": (lambda f: edit_config(f, r=5), [WEIGHTS, "layers.0", "rank 5", CONFIG]),
    "empty tensor": (
        edit_tensors(lambda w: w.update({f"{FIRST}.lora_A.weight": torch.zeros(4, 0)})),
        [WEIGHTS, "layers.0.self_attn.q_proj", "empty", "save it again"]),
    "no tensors": (edit_tensors(lambda w: w.clear()), [WEIGHTS, "lora_A"]),
    "no layer index": (edit_tensors(rename_out_of_layers), [WEIGHTS, "layer"]),
    "a tensor of no module": (
        edit_tensors(lambda w: w.update({"stray.weight": torch.zeros(2)})), [WEIGHTS, "stray.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapter_raises(case, side, fails, tmp_path):
    folder = copy_adapter(tmp_path / "adapter", QWEN if side == "source" else TARGET)
    damage, words = BROKEN[case]
    damage(folder)
    changed = {"source_adapters": [MISTRAL, folder]} if side == "source" else {"target_adapter": folder}
    line = fails(folder, *words, **changed)
    assert len(line) < 800


def test_missing_adapter_folder_raises(fails, tmp_path):
    fails(tmp_path / "nowhere", "does not exist", source_adapters=[tmp_path / "nowhere"])


def test_file_instead_of_adapter_folder_raises(fails, replay):
    fails(replay, "folder", target_adapter=replay)


@pytest.mark.parametrize("flag", ["target_adapter", "source_adapters"])
def test_adapter_on_the_hub_that_cannot_be_reached_raises(flag, fails):
    fails("nobody/no-such-adapter", "Hub", "download", **{flag: "nobody/no-such-adapter"})


def test_no_overlapping_roles_raises(fails, tmp_path):
    def keep(role):
        return edit_tensors(lambda w: [w.pop(key) for key in list(w) if f".{role}." not in key])

    target, source = copy_adapter(tmp_path / "target", TARGET), copy_adapter(tmp_path / "source")
    keep("q_proj")(target), keep("up_proj")(source)
    fails(target, source, "q_proj", "up_proj", "target_modules", target_adapter=target, source_adapters=[source])


def test_source_that_is_the_target_raises(fails, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(TARGET)
    fails(TARGET, "target adapter itself", source_adapters=[QWEN, link])


@pytest.mark.parametrize("sources", [[], None])
def test_zero_sources_raises(sources, fails):
    fails("source_adapters", source_adapters=sources)


# ---- replay -----------------------------------------------------------------------------------------------------

GOOD = '{"prompt": "w4", "completion": "w5"}\n'
REPLAY = {
    "missing": ("r.json", None, ["does not exist"]),
    "empty": ("r.json", "", ["empty"]),
    "an empty list": ("r.json", "[]", ["no records"]),
    "unparseable": ("r.jsonl", GOOD * 2 + '{"prompt": \n', ["line 3", "JSON"]),
    "unknown columns": ("r.json", '[{"question": "w4"}]', ["question", "prompt", "messages"]),
    "null": ("r.jsonl", GOOD + '{"prompt": "w4", "completion": null}', ["line 2", "completion", "null"]),
    "a number": ("r.json", '[{"prompt": "w4", "completion": 5}]', ["record 1", "completion", "int"]),
    "too long": ("r.json", '[{"prompt": "w4 w5 w6 w7", "completion": "w8"}]', ["--max_length 3", "raise it"]),
    "an unknown extension": ("r.txt", "w4", [".txt", ".json"]),
    "a conversation without template": (
        "r.json", '[{"messages": [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"}]}]',
        ["record 1", "chat template"]),
}  # fmt: skip


@pytest.mark.parametrize("flag", ["dataset_name", "eval_dataset_name"])
@pytest.mark.parametrize("case", REPLAY)
def test_broken_replay_raises(case, flag, fails, tmp_path):
    name, content, words = REPLAY[case]
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    extra = {"max_length": 3} if case == "too long" else {}
    if extra and flag == "eval_dataset_name":
        extra["dataset_name"] = write_replay(tmp_path / "short.json", words=1)
    fails(path, *words, **{**extra, flag: [path]})


def test_replay_on_the_hub_that_cannot_be_reached_raises(fails):
    fails("nobody/no-such-data", "Hub", dataset_name=["nobody/no-such-data"])


def test_no_replay_raises(fails):
    fails("--dataset_name", dataset_name=None)


def test_evaluation_strategy_without_data_raises(fails):
    fails("--eval_strategy is steps", "--eval_dataset_name", eval_strategy="steps", eval_steps=1)


# ---- flags ------------------------------------------------------------------------------------------------------

BAD_VALUES = [
    # the method
    ("preset", "huge"), ("block_size", 0), ("embed_dim", -1), ("num_heads", 0), ("max_position_embeddings", 0),
    ("max_position_embeddings", 1), ("alpha_init", 0), ("alpha_init", "nan"), ("mu_gate", "inf"), ("rdm_weight", -1),
    ("rdm_weight", "nan"), ("rdm_mu", "nan"), ("rdm_sigma", -1), ("rdm_projections", 0), ("layer_alignment", "head"),
    ("transfer_ratio", "2/1"), ("transfer_ratio", 0), ("transfer_ratio", "half"), ("transfer_ratio", "1/0"),
    ("transfer_ratio", "nan"), ("canonicalize", "perhaps"),
    # the data
    ("max_examples", 0), ("dataset_ratio", 0), ("dataset_ratio", 1.5), ("dataset_seed", -1), ("max_length", 1),
    ("eval_max_examples", 0), ("max_examples", [1, 2]), ("dataset_split", [""]),
    # training
    ("max_steps", "many"), ("learning_rate", -1e-5), ("learning_rate", 0), ("learning_rate", "nan"),
    ("per_device_train_batch_size", 0), ("per_device_eval_batch_size", 0), ("gradient_accumulation_steps", 0),
    ("weight_decay", -1), ("max_grad_norm", -1), ("warmup_steps", -1), ("seed", -1), ("adam_beta1", 1),
    ("adam_epsilon", -1), ("lr_scheduler_type", "flat"), ("optim", "best"), ("lr_scheduler_kwargs", "{1"),
    ("eval_strategy", "often"), ("log_level", "loud"), ("deepspeed", "no-such.json"), ("report_to", "nobody"),
    # the rest
    ("dtype", "float8"), ("overwrite", "perhaps"), ("source_configs", ["none", "none"]),
    ("source_configs", ["no/such-base"]), ("no_such_flag", 1),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), BAD_VALUES, ids=lambda value: str(value))
def test_flag_out_of_range_raises(flag, value, fails):
    found = str(value) if not isinstance(value, list) else ""
    line = fails(**{flag: value})
    shown = [flag, flag.removesuffix("s"), "SchedulerType", "OptimizerNames", "IntervalStrategy", "base model"]
    assert any(name in line for name in shown), line
    numbers = [found, str(float(found))] if re.fullmatch(r"-?[\d.e-]+", found) else [found]
    assert any(number in line for number in numbers), line


def test_sizes_that_do_not_go_together_raises(fails):
    fails("embed_dim 30", "num_heads 4", embed_dim=30)


def test_no_passes_over_the_replay_raises(fails):
    fails("--num_train_epochs is 0", num_train_epochs=0, max_steps=-1)


def test_two_quantizations_raises(fails):
    fails("--load_in_4bit", "--load_in_8bit", load_in_4bit=True, load_in_8bit=True)


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
def test_quantization_without_bitsandbytes_raises(flag, fails, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fails(f"--{flag}", "bitsandbytes", "heterofusion[quantization]", **{flag: True})


def test_missing_required_flag_raises(fails):
    fails("--target_adapter", "--help", target_adapter=None)


def test_help_lists_every_flag_with_a_sentence(capsys):
    for main, types in ((train.main, train.ARGUMENTS), (plan.main, (AdapterArguments, MethodConfig))):
        capsys.readouterr()
        assert main(["--help"]) == 0
        text = capsys.readouterr().out
        for name in ("--config", "--debug", *(f"--{name}" for kind in types for name in kind.__dataclass_fields__)):
            if name != "--_n_gpu":
                assert re.search(rf"(^|[ ,]){name}\b", text, re.M), name
    own = (ModelArguments, AdapterArguments, DataArguments, RunArguments, MethodConfig)
    for field in [field for kind in own for field in kind.__dataclass_fields__.values()]:
        help_text = field.metadata["help"]
        assert help_text[0].isupper() and help_text.rstrip()[-1] in ".)", (field.name, help_text)
    assert all(field.metadata.get("help") for field in HeteroFusionConfig.__dataclass_fields__.values() if field.init)


# ---- --config and --debug ---------------------------------------------------------------------------------------


def parse(*argv: object) -> tuple:
    return parse_arguments(train.ARGUMENTS, list(map(str, argv)), "")


def write_yaml(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


YAML = """
model_name_or_path: base
target_adapter: anchor
source_adapters: [one, two]
dataset_name:
  - a.json
max_examples: 20
output_dir: out
use_cpu: true
canonicalize: yes
learning_rate: 1e-5
rdm_weight: 0
transfer_ratio: 1/2
embed_dim: null
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs:
  min_lr_rate: 0.1
warmup_steps: 0.1
"""


def test_yaml_values_pass_the_casts_of_the_command_line(tmp_path):
    path = write_yaml(tmp_path / "run.yaml", YAML)
    model, adapters, data, _, args = parse("--config", path)
    assert model.model_name_or_path == "base"
    assert adapters.source_adapters == ["one", "two"]
    assert data.dataset_name == ["a.json"] and data.max_examples == [20]
    assert args.learning_rate == 1e-5 and args.rdm_weight == 0.0 and isinstance(args.rdm_weight, float)
    assert args.canonicalize is True and args.transfer_ratio == "1/2" and args.embed_dim is None
    assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_command_line_overrides_yaml(tmp_path):
    path = write_yaml(tmp_path / "run.yaml", YAML)
    _, adapters, _, _, args = parse(
        "--source_adapters", "three", "--learning_rate", "2e-4", f"--config={path}", "--canonicalize", "false",
        "--rdm_mu", "-1e-3",
    )  # fmt: skip
    assert args.rdm_mu == -1e-3
    assert adapters.source_adapters == ["three"]
    assert args.learning_rate == 2e-4 and args.canonicalize is False


BAD_YAML = {
    "an unknown key": ("learning_rates: 1", ["learning_rates", "--help"]),
    "a list": ("- 1", ["list", "mapping"]),
    "a text": ("train", ["str", "mapping"]),
    "a syntax error": ("a: [1", ["YAML", "line 1"]),
    "a Python object": ("output_dir: !!python/object/apply:os.getcwd []", ["YAML", "python/object"]),
    "a word for a number": ("max_steps: many", ["max_steps", "many"]),
    "a flag in a list": ("source_adapters: [a, --overwrite]", ["--overwrite", "source_adapters"]),
    "an empty list of sources": ("source_adapters: []", ["source_adapters"]),
    "debug": ("debug: true", ["--debug true", "command line"]),
    "two values for one": ("learning_rate: [1, 2]", ["2"]),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_bad_yaml_raises(case, fails, tmp_path):
    text, words = BAD_YAML[case]
    path = write_yaml(tmp_path / "run.yaml", text + "\n")
    key = text.partition(":")[0]
    named = [] if case in ("a word for a number", "an empty list of sources", "two values for one") else [path]
    fails(*named, *words, config=path, **({key: None} if key in ("max_steps", "source_adapters") else {}))


def test_missing_yaml_raises(fails, tmp_path):
    fails(tmp_path / "no.yaml", "does not exist", config=tmp_path / "no.yaml")


def test_config_without_or_with_two_values_raises(capsys, tmp_path):
    error_line(capsys, plan.main, ["--config"], "--config needs")
    error_line(capsys, plan.main, ["--config", "a.yaml", "--config=b.yaml"], "a.yaml, b.yaml")


def test_debug_true_shows_the_traceback(arguments, tmp_path):
    argv = flags({**arguments, "target_adapter": tmp_path / "nowhere"})
    for debug in (["--debug", "true"], ["--debug=true"], ["--debug"]):
        with pytest.raises(ValueError, match="nowhere"):
            train.main([*argv, *debug])
    with pytest.raises(ValueError, match="nowhere"):
        plan.main(["--debug", "true", *flags({"target_adapter": tmp_path / "nowhere", "source_adapters": [QWEN]})])


def test_debug_of_transformers_passes_through(fails, monkeypatch, arguments):
    seen = {}
    monkeypatch.setattr(train, "set_seed", lambda seed: seen.update(seed=seed))
    original = train.parse_arguments
    monkeypatch.setattr(train, "parse_arguments", lambda *args: seen.setdefault("parsed", original(*args)))
    fails("nowhere", debug="underflow_overflow", target_adapter="./nowhere")
    assert [str(option.value) for option in seen["parsed"][-1].debug] == ["underflow_overflow"]
    fails("nowhere", debug=False, target_adapter="./nowhere")
    fails("sideways", debug="sideways")


# ---- base model, tokenizer, output_dir --------------------------------------------------------------------------


def test_missing_base_folder_raises(fails, tmp_path):
    fails("--model_name_or_path", tmp_path / "nowhere", model_name_or_path=tmp_path / "nowhere")


def test_base_on_the_hub_that_cannot_be_reached_raises(fails):
    fails("--model_name_or_path", "nobody/no-such-base", model_name_or_path="nobody/no-such-base")


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "no-such-type"}', "{}"])
def test_base_with_broken_config_raises(content, fails, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(content)
    fails("--model_name_or_path", tmp_path / "base", model_name_or_path=tmp_path / "base")


def change_base(bare_base: Path, folder: Path, **fields) -> Path:
    shutil.copytree(bare_base, folder)
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "fields", [{"num_hidden_layers": 2}, {"hidden_size": 64}], ids=lambda fields: next(iter(fields))
)
def test_base_that_does_not_fit_the_adapter_raises(fields, fails, bare_base, tmp_path):
    base = change_base(bare_base, tmp_path / "other", **fields)
    fails(base, TARGET, "layers.", "trained on", model_name_or_path=base)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 0},
        {"hidden_size": "wide"},
        {"hidden_act": "none"},
        {"model_type": "t5"},
        {"vocab_size": -1},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_base_with_senseless_config_raises(fields, fails, bare_base, tmp_path):
    base = change_base(bare_base, tmp_path / "other", **fields)
    fails(base, "--model_name_or_path", model_name_or_path=base)


def test_base_without_tokenizer_raises(fails):
    fails("tokenizer", GOLDEN / "base_llama", "--model_name_or_path", model_name_or_path=GOLDEN / "base_llama")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"model": {"type": "Magic"}}'])
def test_broken_tokenizer_raises(content, fails, tmp_path):
    target = copy_adapter(tmp_path / "target", TARGET)
    save_tokenizer(target)
    (target / "tokenizer.json").write_text(content)
    fails("tokenizer", target, target_adapter=target)


def test_tokenizer_with_more_tokens_than_the_base_raises(fails, tmp_path):
    target = copy_adapter(tmp_path / "target", TARGET)
    save_tokenizer(target, size=90)
    rows = write_replay(tmp_path / "large.json", first=70)
    fails("token id", "64", "--model_name_or_path", target_adapter=target, dataset_name=[rows])


def test_tokenizer_saved_with_the_adapter_is_preferred(tmp_path, bare_base):
    folder = copy_adapter(tmp_path / "target", TARGET)
    arguments = ModelArguments(str(bare_base))
    assert "w5" in load_tokenizer(arguments, load_adapter(folder)).get_vocab()
    save_tokenizer(folder, prefix="x")
    vocabulary = load_tokenizer(arguments, load_adapter(folder)).get_vocab()
    assert "x5" in vocabulary and "w5" not in vocabulary


def test_output_dir_that_is_not_empty_raises(fails, arguments):
    arguments["output_dir"].mkdir()
    (arguments["output_dir"] / "notes.txt").write_text("mine")
    fails(arguments["output_dir"], "not empty", "--resume_from_checkpoint", "--overwrite")


def test_output_dir_that_is_a_file_raises(fails, tmp_path):
    (tmp_path / "file").write_text("mine")
    fails(tmp_path / "file", "is a file", output_dir=tmp_path / "file")
    fails(tmp_path / "file", "is a file", output_dir=tmp_path / "file" / "below")


def test_resume_without_checkpoint_raises(fails, arguments):
    fails("--resume_from_checkpoint", arguments["output_dir"], "no checkpoint", resume_from_checkpoint=True)
    arguments["output_dir"].mkdir()
    fails("--resume_from_checkpoint", arguments["output_dir"], "no checkpoint", resume_from_checkpoint=True)


def test_resume_from_a_folder_that_is_no_checkpoint_raises(fails, tmp_path):
    fails(tmp_path / "nowhere", "checkpoint", resume_from_checkpoint=tmp_path / "nowhere")


def no_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def truncated_weights(base: Path) -> None:
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-100])


def lost_weights(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def other_weights(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, base / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("damage", [no_weights, truncated_weights, lost_weights, other_weights])
def test_base_with_broken_weights_raises(damage, capsys, arguments, base_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(base_dir, base)
    damage(base)
    capsys.readouterr()
    assert train.main(flags({**arguments, "model_name_or_path": base})) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and str(base) in errors[0], errors
    assert not arguments["output_dir"].exists()


def test_dry_run_prints_the_plan_and_writes_nothing(arguments, capsys):
    assert train.main(flags({**arguments, "dry_run": True})) == 0
    out = capsys.readouterr().out
    assert "model.layers.3.self_attn.q_proj" in out and "preset of this run: paper" in out
    assert not arguments["output_dir"].exists()


# ---- a run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished(base_dir, tmp_path_factory) -> SimpleNamespace:
    """A run of one step over two data sets, whose log and result several tests read."""
    folder = tmp_path_factory.mktemp("finished")
    first = write_replay(folder / "first.json", count=6)
    second = folder / "second.jsonl"
    rows = [
        {"prompt": "w4 w5", "completion": " w6 w7"},
        {"prompt": "w4 w5", "completion": " w6 w7 w8 w9 w10 w11"},  # cut
        {"prompt": "w4 w5 w6 w7 w8 w9 w10 w11", "completion": " w12"},  # dropped
    ]
    second.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model_name_or_path": base_dir, "target_adapter": TARGET, "source_adapters": [QWEN, MISTRAL],
        "dataset_name": [first, second], "max_examples": [4, 3], "max_length": 7, "output_dir": folder / "out",
        "use_cpu": True, "max_steps": 1, "gradient_accumulation_steps": 2, "learning_rate": 0.01,
        "preset": "compact", "num_heads": 2, "rdm_projections": 16, "transfer_ratio": "1/2", "alpha_init": 0.7,
        "eval_dataset_name": [first], "eval_strategy": "steps", "eval_steps": 1,
    }  # fmt: skip
    log = succeeds(train.main, flags(values))
    return SimpleNamespace(folder=folder, out=folder / "out", log=log, values=values, base=base_dir)


@pytest.fixture(scope="session")
def record(finished) -> dict:
    return json.loads((finished.out / "fusion.json").read_text())


def test_replay_report_is_logged_and_recorded(finished, record):
    assert f"{finished.folder / 'first.json'} (prompt_completion): 6 read, 4 sampled, 0 cut" in finished.log
    assert "3 read, 3 sampled, 2 cut to 7 tokens" in finished.log and "1 dropped without label tokens" in finished.log
    first, second = record["training"]["replay"]["datasets"]
    assert (first["name"], first["sampled"], first["kept"]) == ("first.json", 4, 4)
    assert (second["name"], second["cut"], second["dropped"], second["kept"]) == ("second.jsonl", 2, 1, 2)


def test_flags_override_the_preset(record):
    sizes = record["hypernetwork"]
    assert (sizes["form"], sizes["num_heads"]) == ("compact", 2)
    assert (sizes["block_size"], sizes["embed_dim"]) == (64, 128)  # the preset's, fitted to a width of 48
    assert record["method"]["alpha_init"] == 0.7
    assert record["plan"]["transfer_ratio"] == "1/2"
    assert all(abs(alpha - 0.7) < 0.05 for alpha in record["alpha"].values())
    assert record["training"]["learning_rate"] == 0.01 and record["training"]["steps"] == 1
    assert "eval_loss" in record["metrics"]


def test_model_card_and_provenance_are_fit_to_publish(finished, record):
    text = (finished.out / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["library_name"] == "peft" and header["base_model"] == "llama"
    assert "license" not in header
    for name in ("README.md", "fusion.json"):
        content = (finished.out / name).read_text()
        for path in (finished.folder, finished.base, GOLDEN, Path.home(), Path.cwd()):
            assert str(path) not in content, (name, path)
        assert not re.search(r"""["'`| ]/\w+/""", content), name
    assert [source["name"] for source in record["sources"]] == ["source_qwen2", "source_mistral"]
    assert record["sources"][0]["sha256"] == load_adapter(QWEN).sha256


def test_result_holds_the_tokenizer_and_nothing_half_written(finished):
    names = {path.name for path in finished.out.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "fusion.json"} <= names
    assert not [name for name in names if name.startswith(".")]


def test_finished_run_is_not_written_over(finished, capsys):
    error_line(capsys, train.main, flags(finished.values), finished.out, "not empty", "--overwrite true")


def test_run_resumes_only_with_its_own_adapters(finished, capsys):
    other = {**finished.values, "resume_from_checkpoint": True, "source_adapters": [QWEN]}
    error_line(capsys, train.main, flags(other), finished.out / "checkpoint-1", "source_sha256", "same adapters")


def test_damaged_checkpoint_raises(finished, capsys, tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(finished.out / "checkpoint-1", checkpoint)
    other = {**finished.values, "resume_from_checkpoint": checkpoint, "output_dir": tmp_path / "out"}
    for content in ("{", "[]"):
        (checkpoint / "fusion_state.json").write_text(content)
        error_line(capsys, train.main, flags(other), checkpoint / "fusion_state.json", "damaged")
    (checkpoint / "hypernetworks.safetensors").unlink()
    error_line(capsys, train.main, flags(other), checkpoint / "hypernetworks.safetensors", "missing")


def test_resume_and_overwrite_use_the_folder_again(finished, tmp_path):
    shutil.copytree(finished.out, tmp_path / "out")
    again = {**finished.values, "output_dir": tmp_path / "out"}
    succeeds(train.main, flags({**again, "resume_from_checkpoint": True, "max_steps": 2}))
    assert json.loads((tmp_path / "out" / "fusion.json").read_text())["training"]["steps"] == 2
    succeeds(train.main, flags({**again, "overwrite": True}))
    assert json.loads((tmp_path / "out" / "fusion.json").read_text())["training"]["steps"] == 1


def test_diverged_run_writes_no_adapter(arguments, base_dir, capsys):
    capsys.readouterr()
    code = train.main(
        flags(
            {**arguments, "model_name_or_path": base_dir, "max_steps": 2, "learning_rate": 1e30, "save_strategy": "no"}
        )
    )
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1
    assert "not finite" in errors[0] and "lora_B" in errors[0] and "--learning_rate" in errors[0]
    names = {path.name for path in arguments["output_dir"].iterdir()}
    assert names <= {"trainer_state.json"}


# ---- the Hub ----------------------------------------------------------------------------------------------------


class FakeHub:
    """Stands for HfApi: remembers what would be uploaded, or fails."""

    failure: Exception | None = None
    uploaded: list[str]

    def __init__(self, token: str | None = None):
        pass

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, **kwargs):
        if self.failure is not None:
            raise self.failure
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        type(self).uploaded = sorted(filter_repo_objects(files, allow_patterns=allow_patterns))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


def test_push_uploads_the_adapter_and_nothing_else(monkeypatch, base_dir, arguments):
    monkeypatch.setattr(export, "HfApi", FakeHub)
    log = succeeds(
        train.main,
        flags({**arguments, "model_name_or_path": base_dir, "push_to_hub": True, "hub_model_id": "fused"}),
    )
    assert "https://hub/me/fused/commit/1" in log
    assert FakeHub.uploaded == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "fusion.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip


def test_failing_push_keeps_the_adapter_and_says_how_to_push_again(monkeypatch, base_dir, arguments, capsys):
    monkeypatch.setattr(export, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "failure", OSError("no route to the Hub\nsecond line"))
    capsys.readouterr()
    code = train.main(
        flags({**arguments, "model_name_or_path": base_dir, "push_to_hub": True, "hub_model_id": "fused"})
    )
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1
    assert "no route to the Hub" in errors[0]
    assert f"hf upload fused {arguments['output_dir']}" in errors[0]
    assert len(load_adapter(arguments["output_dir"]).modules) == 28


# ---- recipes/plan.py --------------------------------------------------------------------------------------------


def written_plan(tmp_path: Path, **values) -> dict:
    output = tmp_path / "plan.json"
    succeeds(plan.main, flags({"target_adapter": TARGET, "source_adapters": [QWEN], "output": output, **values}))
    return json.loads(output.read_text())


def widen(weights: dict) -> None:
    """Rank 4 becomes rank 8 with a full spectrum."""
    generator = torch.Generator().manual_seed(0)
    for key, tensor in list(weights.items()):
        dim = 0 if "lora_A" in key else 1
        more = 0.01 * torch.randn(tensor.shape, generator=generator)
        weights[key] = torch.cat((tensor, more), dim).contiguous()


def test_plan_says_what_feeds_what(tmp_path):
    wide = copy_adapter(tmp_path / "wide", QWEN, {"r": 8, "lora_alpha": 16, "use_rslora": True}, widen)
    summary = written_plan(tmp_path, source_adapters=[wide, MISTRAL], transfer_ratio="2/3")
    target, source = load_adapter(TARGET), load_adapter(wide)
    assert [part["layer_offset"] for part in summary["sources"]] == [-2, 1]
    assert summary["target"]["layers"] == 4 and summary["target"]["lora_modules"] == 28
    rows = {row["module"]: row for row in summary["modules"]}
    # of 4 pairs with the first source 2 are kept, of 3 with the second 2: target layers 2 and 3
    assert {row["layer"] for row in rows.values()} == {2, 3} and len(rows) == 14
    for path, row in rows.items():
        role, layer = row["role"], row["layer"]
        expected = [(1, layer + 2)] + [(2, layer - 1)] * (role in ("q_proj", "v_proj", "down_proj"))
        assert [(part["source"], part["layer"]) for part in row["sources"]] == expected
        assert all(part["module"].endswith(f".{role}") for part in row["sources"])
        assert (row["rank"], row["scaling"]) == (4, 2.0)
        first = row["sources"][0]
        assert (first["rank"], first["scaling"]) == (8, pytest.approx(16 / 8**0.5))
        module = source.modules[first["module"]]
        energy = torch.linalg.svdvals((module.lora_B @ module.lora_A).double()).square()
        assert first["truncated_energy"] == pytest.approx((energy[4:].sum() / energy.sum()).item(), rel=1e-3)
        assert target.modules[path].out_features == row["out_features"]
    assert summary["sources"][0]["max_truncated_energy"] > 0 and summary["sources"][1]["max_truncated_energy"] == 0
    assert len(summary["untouched"]) == 14
    assert set(summary["untouched"]) == set(target.modules) - set(rows)
    assert all("no source" in reason for reason in summary["untouched"].values())
    assert len(summary["sources"][0]["unused"]) == 42 - 14 and all(summary["sources"][0]["unused"].values())


def test_plan_counts_layers_that_nothing_feeds(tmp_path):
    def only_q(weights):
        [weights.pop(key) for key in list(weights) if "q_proj" not in key]

    def no_q_on_top(weights):
        [weights.pop(key) for key in list(weights) if "layers.3.self_attn.q_proj" in key]

    target = copy_adapter(tmp_path / "target", TARGET, tensors=no_q_on_top)
    source = copy_adapter(tmp_path / "source", QWEN, tensors=only_q)
    summary = written_plan(tmp_path, target_adapter=target, source_adapters=[source])
    assert summary["target"]["layers"] == 4
    assert {row["layer"] for row in summary["modules"]} == {0, 1, 2}
    assert summary["untouched"]["model.layers.3.self_attn.v_proj"] == "no source has v_proj"


def test_plan_prices_the_hypernetworks_as_they_are_built(tmp_path, base):
    summary = written_plan(tmp_path)
    target, sources = load_adapter(TARGET), [load_adapter(QWEN)]
    alignment = plan_alignment(target, sources)
    state = base.state_dict()
    for preset, cost in summary["presets"].items():
        fresh = AutoModelForCausalLM.from_config(base.config)
        fresh.load_state_dict(state)
        built = HeteroFusionModel(fresh, alignment, MethodConfig(preset=preset)).hypernetworks
        count = sum(parameter.numel() for parameter in built.parameters())
        assert cost["parameters"] == count
        assert (cost["weight_bytes"], cost["gradient_bytes"], cost["optimizer_bytes"]) == (
            4 * count,
            4 * count,
            8 * count,
        )
        assert cost["delta_bytes"] == 4 * sum(module.lora_B.numel() for module in target.modules.values())
        assert cost["embed_dim"] == built.config.embed_dim and cost["block_size"] == built.config.block_size
    assert set(summary["presets"]) == {"paper", "compact"}


def test_plan_on_the_terminal(capsys):
    assert plan.main(flags({"target_adapter": TARGET, "source_adapters": [QWEN, MISTRAL]})) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "layer offset -2" in out and "layer offset +1" in out
    assert re.search(
        r"3 +q_proj +model\.layers\.3\.self_attn\.q_proj +4 +2 +1: 5 q_proj r4 s2; 2: 2 q_proj r4 s2", out
    )


def test_plan_that_cannot_be_written_raises(capsys, tmp_path):
    values = {"target_adapter": TARGET, "source_adapters": [QWEN]}
    for output in (tmp_path / "no" / "plan.json", tmp_path):
        error_line(capsys, plan.main, flags({**values, "output": output}), "--output", output, "another file")


@pytest.mark.parametrize("flag", ["transfer_ratio", "layer_alignment", "preset", "block_size", "output_dir"])
def test_plan_flag_out_of_range_raises(flag, capsys):
    error_line(capsys, plan.main, flags({"target_adapter": TARGET, "source_adapters": [QWEN], flag: "-3"}), flag)


# ---- a real shell -----------------------------------------------------------------------------------------------


def shell(*command: object, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": shell_path(), **variables}
    return subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def shell_path() -> str:
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))


CHATTY_IMPORT = """
import sys

class Chatty:
    def find_spec(self, name, path=None, target=None):
        if name == "peft":
            import logging
            logging.getLogger("some.library").warning("a kernel is missing")
sys.meta_path.insert(0, Chatty())
"""


def test_plan_error_in_a_shell(tmp_path):
    """A library that warns while it is imported must not stand beside the error."""
    (tmp_path / "sitecustomize.py").write_text(CHATTY_IMPORT)
    done = shell(
        sys.executable, "recipes/plan.py",
        *flags({"target_adapter": tmp_path / "nowhere", "source_adapters": [QWEN]}),
        PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    check_error(done.returncode, done.stdout, done.stderr, tmp_path / "nowhere", "does not exist")


def test_train_error_in_a_shell(arguments, tmp_path):
    """The error comes from the last check, after every library is imported and used."""
    path = tmp_path / "r.json"
    path.write_text('[{"prompt": "w4", "completion": null}]')
    done = shell(sys.executable, "recipes/train.py", *flags({**arguments, "dataset_name": [path]}))
    check_error(done.returncode, done.stdout, done.stderr, path, "record 1", "null")
    assert not arguments["output_dir"].exists()


WITHOUT_PACKAGE = """
import sys
sys.modules["heterofusion"] = None
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
save_file({"logits": model(torch.arange(4, 24).view(2, 10)).logits.detach()}, output)
"""


def test_launched_run_gives_an_adapter_that_plain_peft_loads(arguments, base_dir, tmp_path):
    output = arguments["output_dir"]
    values = {**arguments, "model_name_or_path": base_dir, "max_steps": 2}
    config = ("--config_file", "accelerate_configs/single.yaml")
    done = shell("accelerate", "launch", *config, "recipes/train.py", *flags(values))
    assert done.returncode == 0, done.stderr
    plain = shell(sys.executable, "-c", WITHOUT_PACKAGE, base_dir, output, tmp_path / "logits.safetensors")
    assert plain.returncode == 0, plain.stderr
    found = load_file(tmp_path / "logits.safetensors")["logits"]

    # the reference: the live model with the hypernetworks of the last checkpoint
    target = load_adapter(TARGET)
    live = HeteroFusionModel.from_adapters(
        AutoModelForCausalLM.from_pretrained(base_dir), target, [load_adapter(QWEN)], MethodConfig(**SIZES)
    ).eval()
    tokens = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        start = live(tokens).logits
        load_hypernetworks(live, output / "checkpoint-2")
        expected = live(tokens).logits
    assert not torch.allclose(start, expected, atol=1e-4)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    fused = load_adapter(output)
    for path, module in target.modules.items():
        assert torch.equal(fused.modules[path].lora_A, module.lora_A)
        assert not torch.equal(fused.modules[path].lora_B, module.lora_B)
