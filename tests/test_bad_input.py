"""Bad adapters, data and paths on the command line: one line that names them, before any weight is loaded."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from builders import CONFIG, WEIGHTS, edit_config
from conftest import GOLDEN
from recipe_runner import MISTRAL, QWEN, TARGET, copy_adapter, flags, late_error, save_tokenizer, train, write_replay

pytestmark = pytest.mark.usefixtures("logging_restored")


# ---- adapters ---------------------------------------------------------------------------------------------------


def edited_weights(function):
    def edit(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        weights = load_file(file)
        function(weights)
        save_file(weights, file, {"format": "pt"})

    return edit


def only_bin(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def rename_out_of_layers(weights: dict) -> None:
    for key in list(weights):
        weights[re.sub(r"layers\.(\d+)", r"part\1", key)] = weights.pop(key)


def set_value(key: str, value: float):
    return edited_weights(lambda weights: weights[key].view(-1)[0].fill_(value))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
BROKEN = {
    "missing safetensors": (lambda f: (f / WEIGHTS).unlink(), [WEIGHTS, "missing", "save_pretrained"]),
    "corrupt safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 64), [WEIGHTS, "damaged", "again"]),
    "empty safetensors": (lambda f: (f / WEIGHTS).write_bytes(b""), [WEIGHTS, "again"]),
    "huge header": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x7f{}"), [WEIGHTS, "again"]),
    "truncated safetensors": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), [WEIGHTS, "truncated", "again"]),
    "only bin": (only_bin, ["adapter_model.bin", "could run code", "--allow_pickle"]),
    "no config": (lambda f: (f / CONFIG).unlink(), [CONFIG, "missing"]),
    "config is not JSON": (lambda f: (f / CONFIG).write_text("{'r': 4}"), [CONFIG, "JSON", "line 1"]),
    "a number without end": (lambda f: (f / CONFIG).write_text('{"r": ' + "9" * 5000), [CONFIG, "read", "digits"]),
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
        edited_weights(lambda w: w.pop(f"{FIRST}.lora_B.weight")), [WEIGHTS, "0.self_attn.q_proj", "no lora_B"]),
    "other rank than the config": (lambda f: edit_config(f, r=5), [WEIGHTS, "layers.0", "rank 5", CONFIG]),
    "empty tensor": (
        edited_weights(lambda w: w.update({f"{FIRST}.lora_A.weight": torch.zeros(4, 0)})),
        [WEIGHTS, "layers.0.self_attn.q_proj", "empty", "save it again"]),
    "no tensors": (edited_weights(lambda w: w.clear()), [WEIGHTS, "lora_A"]),
    "no layer index": (edited_weights(rename_out_of_layers), [WEIGHTS, "layer"]),
    "a tensor of no module": (
        edited_weights(lambda w: w.update({"stray.weight": torch.zeros(2)})), [WEIGHTS, "stray.weight"]),
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


def test_record_that_makes_no_sense_raises(fails, tmp_path):
    target = copy_adapter(tmp_path / "target", TARGET)
    (target / "fusion.json").write_text('{"made_by": "me"}')
    fails(target / "fusion.json", "made_by is 'me', an object was expected", target_adapter=target)


def test_no_overlapping_roles_raises(fails, tmp_path):
    target, source = copy_adapter(tmp_path / "target", TARGET), copy_adapter(tmp_path / "source")
    for folder, role in ((target, "q_proj"), (source, "up_proj")):
        edited_weights(lambda w, role=role: [w.pop(key) for key in list(w) if f".{role}." not in key])(folder)
    words = (f"{target} (q_proj)", f"{source}: up_proj on layers [", "overlapping target_modules")
    fails(*words, target_adapter=target, source_adapters=[source])


def test_source_that_is_the_target_raises(fails, tmp_path):
    (tmp_path / "link").symlink_to(TARGET)
    fails(TARGET, "target adapter itself", source_adapters=[QWEN, tmp_path / "link"])


# ---- names of what is not there, or not what it should be --------------------------------------------------------

NOWHERE = {
    "a missing adapter folder": ({"source_adapters": ["./nowhere"]}, ["nowhere", "does not exist"]),
    "a file for an adapter": ({"target_adapter": "./file"}, ["/file", "folder"]),
    "a target on the Hub": ({"target_adapter": "no/such-adapter"}, ["no/such-adapter", "Hub", "download"]),
    "a source on the Hub": ({"source_adapters": ["no/such-adapter"]}, ["no/such-adapter", "Hub", "download"]),
    "an empty list of sources": ({"source_adapters": []}, ["source_adapters"]),
    "no sources": ({"source_adapters": None}, ["source_adapters"]),
    "a replay on the Hub": ({"dataset_name": ["no/such-data"]}, ["no/such-data", "Hub"]),
    "no replay": ({"dataset_name": None}, ["--dataset_name"]),
    "no data to evaluate on": (
        {"eval_strategy": "steps", "eval_steps": 1}, ["--eval_strategy is steps", "--eval_dataset_name"]),
    "a missing base": ({"model_name_or_path": "./nowhere"}, ["--model_name_or_path", "nowhere"]),
    "a base on the Hub": ({"model_name_or_path": "no/such-base"}, ["--model_name_or_path", "no/such-base"]),
    "a base without tokenizer": (
        {"model_name_or_path": GOLDEN / "base_llama"}, ["tokenizer", GOLDEN / "base_llama", "--model_name_or_path"]),
    "a file for a folder": ({"output_dir": "./file"}, ["/file", "is a file"]),
    "a folder below a file": ({"output_dir": "./file/below"}, ["/file", "is a file"]),
    "no checkpoint": ({"resume_from_checkpoint": True}, ["--resume_from_checkpoint", "no checkpoint"]),
    "a missing checkpoint": ({"resume_from_checkpoint": "./nowhere"}, ["nowhere", "checkpoint"]),
}  # fmt: skip


@pytest.mark.parametrize("case", NOWHERE)
def test_what_is_not_there_raises(case, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    changed, words = NOWHERE[case]
    fails(*words, **changed)


def test_output_dir_that_is_there_raises(fails, arguments):
    arguments["output_dir"].mkdir()
    fails("--resume_from_checkpoint", arguments["output_dir"], "no checkpoint", resume_from_checkpoint=True)
    (arguments["output_dir"] / "notes.txt").write_text("mine")
    fails(arguments["output_dir"], "not empty", "--resume_from_checkpoint", "--overwrite")


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


# ---- base model, tokenizer, output_dir --------------------------------------------------------------------------


BASES = {
    **{
        f"config {text}": (text, ["--model_name_or_path"])
        for text in ("{", "[]", '{"model_type": "no-such-type"}', "{}")
    },
    "fewer layers": ({"num_hidden_layers": 2}, [TARGET, "layers.", "trained on"]),
    "other sizes": ({"hidden_size": 64}, [TARGET, "layers.", "trained on"]),
    "no heads": ({"num_attention_heads": 0}, ["--model_name_or_path"]),
    "a word for a size": ({"hidden_size": "wide"}, ["--model_name_or_path"]),
    "no activation": ({"hidden_act": "none"}, ["--model_name_or_path"]),
    "no causal model": ({"model_type": "t5"}, ["--model_name_or_path"]),
    "no vocabulary": ({"vocab_size": -1}, ["--model_name_or_path"]),
}


@pytest.mark.parametrize("case", BASES)
def test_base_with_senseless_or_other_config_raises(case, fails, bare_base, tmp_path):
    content, words = BASES[case]
    shutil.copytree(bare_base, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(config.read_text()), **content})
    config.write_text(content)
    fails(tmp_path / "base", *words, model_name_or_path=tmp_path / "base")


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


BASE, MATRIX = "model.safetensors", "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "missing": lambda base: (base / BASE).unlink(),
    "truncated": lambda base: (base / BASE).write_bytes((base / BASE).read_bytes()[:-100]),
    "without a tensor": edited_weights(lambda weights: weights.pop(MATRIX)),
    "of another shape": edited_weights(lambda weights: weights.update({MATRIX: torch.zeros(3, 3)})),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_base_with_broken_weights_raises(damage, capsys, arguments, base_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(base_dir, base)
    damage(base)
    late_error(capsys, train.main, flags({**arguments, "model_name_or_path": base}), base)
    assert not arguments["output_dir"].exists()
