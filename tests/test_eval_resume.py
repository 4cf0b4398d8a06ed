"""Interrupted evaluations: the same answers in the end, nothing generated twice, no other settings."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from eval_runner import evaluation, expert_values, fails_inside, files, predictions, results, run, scores
from heterofusion.experts import expert
from heterofusion.zoo import zoo_path
from recipe_runner import contents, error_line, flags, succeeds

pytest_plugins = ["eval_runner"]
PART = "parts/ner_kitchen/rank-0.jsonl"


@pytest.fixture(scope="module")
def whole(test_sets, tmp_path_factory):
    """An evaluation that was not interrupted."""
    values = expert_values(test_sets["ner_kitchen"], tmp_path_factory.mktemp("whole") / "out")
    return values["output_dir"], run(values)


def same(values, whole) -> None:
    out, found = whole
    assert scores(results(values["output_dir"])) == scores(found)
    assert predictions(values["output_dir"]) == predictions(out)
    assert files(values["output_dir"]) == files(out)


@pytest.mark.parametrize("batches", [0, 2])
def test_killed_in_a_batch(values, whole, kill_after, batches):
    kill_after(batches)
    fails_inside(values)
    assert not (values["output_dir"] / "results.json").exists()
    sizes = kill_after(None)
    run(values, resume=True)
    assert sizes == [4, 4, 2][batches:]
    same(values, whole)


def test_answers_of_other_processes_count(values, whole, kill_after):
    """A launch of three processes left three files; one of them was cut, one has a line that cannot be read."""
    kill_after(2)
    fails_inside(values)
    part = values["output_dir"] / PART
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:3]))
    part.with_name("rank-1.jsonl").write_text("".join(lines[3:6]) + lines[6][:9])
    part.with_name("rank-2.jsonl").write_text("\x00\x00\n" + "".join(lines[4:6]))
    sizes = kill_after(None)
    run(values, resume=True)
    assert sum(sizes) == 4
    same(values, whole)


def test_finished_results_are_only_printed_and_may_be_called_otherwise(
    values, whole, kill_after, capsys, logging_restored
):
    shutil.copytree(whole[0], values["output_dir"])
    before = contents(values["output_dir"])
    kill_after(0)
    assert evaluation.main(flags({**values, "resume": True, "batch_size": "auto"})) == 0
    assert "| ner_kitchen |" in capsys.readouterr().out
    assert contents(values["output_dir"]) == before
    found = run(values, resume=True, names=["ours"], labels=["seed=1"])
    assert found == {**whole[1], "name": "ours", "labels": {"seed": "1"}}


def test_several_adapters_go_on_where_they_were(values, whole, kill_after):
    """The first is finished, the second was killed, the third had not begun."""
    changes = {"adapters": [zoo_path("llama", "ner_kitchen"), "none", zoo_path("llama", "re_town")]}
    kill_after(4)
    fails_inside(values, **changes)
    assert files(values["output_dir"]) == [
        f"base/{PART}", "ner_kitchen/predictions/ner_kitchen.jsonl", "ner_kitchen/results.json", "state.json"
    ]  # fmt: skip
    sizes = kill_after(None)
    succeeds(evaluation.main, flags({**values, **changes, "resume": True}))
    assert sizes == [4, 2, 4, 4, 2]
    assert scores(results(values["output_dir"] / "ner_kitchen")) == {
        **scores(whole[1]), "settings": results(values["output_dir"] / "base")["settings"]
    }  # fmt: skip


def test_other_settings_are_refused(values, whole, kill_after, test_sets, tmp_path, capsys, logging_restored):
    kill_after(1)
    fails_inside(values)
    before = contents(values["output_dir"])
    other = tmp_path / "other" / "ner_kitchen.jsonl"
    other.parent.mkdir()
    other.write_text(test_sets["ner_kitchen"].read_text().replace("tool", "tol").replace("dish", "dsh"))
    for field, changes in {
        "base": {"model_name_or_path": zoo_path("qwen2"), "adapters": ["none"]},
        "adapter: ": {"adapters": [zoo_path("llama", "re_town")]},
        "dtype: float32, this one has bfloat16": {"dtype": "bfloat16"},
        "datasets ner_kitchen sha256": {"dataset_name": [other]},
        "max_new_tokens: 40, this one has 41": {"max_new_tokens": 41},
        "metric: NER, this one has exact_match": {"metric": "exact_match"},
    }.items():
        argv = flags({**values, **changes, "resume": True})
        error_line(capsys, evaluation.main, argv, "holds an evaluation with another", field, "give the same flags")
    assert contents(values["output_dir"]) == before


def test_an_edited_adapter_is_another_one(values, kill_after, tmp_path, capsys, logging_restored):
    """Its weights are the same, but not what they are scaled by, or how prompts are written."""
    adapter = tmp_path / "adapter"
    shutil.copytree(zoo_path("llama", "ner_kitchen"), adapter)
    kill_after(1)
    fails_inside(values, adapters=[adapter])
    argv = flags({**values, "adapters": [adapter], "resume": True})
    config = adapter / "adapter_config.json"
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), "lora_alpha": 3}))
    error_line(capsys, evaluation.main, argv, "holds an evaluation with another", "adapter_config")
    config.write_text(before)
    tokenizer = AutoTokenizer.from_pretrained(zoo_path("llama"))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(adapter)
    error_line(capsys, evaluation.main, argv, "holds an evaluation with another", "tokenizer")


def test_a_large_base_is_told_by_pieces_of_every_tensor(tmp_path, monkeypatch):
    """Of a file that is too large to be hashed as a whole, a change of any tensor is seen, and no copy is another."""
    monkeypatch.setattr(expert, "_WHOLE", 0)
    shutil.copytree(zoo_path("llama"), tmp_path / "base", copy_function=shutil.copyfile)
    before = expert.base_fingerprint(str(zoo_path("llama")))
    assert expert.base_fingerprint(str(tmp_path / "base")) == before
    path = next((tmp_path / "base").glob("*.safetensors"))
    tensors = load_file(path)
    for name in (min(tensors), max(tensors)):
        save_file({**tensors, name: tensors[name] * 2}, path, {"format": "pt"})
        assert expert.base_fingerprint(str(tmp_path / "base")) != before


def test_overwrite_removes_only_what_an_evaluation_wrote(values, test_sets):
    out = values["output_dir"]
    succeeds(evaluation.main, flags({**values, "adapters": ["none", *values["adapters"]], "max_new_tokens": 2}))
    (out / "base" / "mine.txt").write_text("mine")
    run(values, overwrite=True, dataset_name=[test_sets["re_town"]], max_new_tokens=2)
    assert files(out) == ["base/mine.txt", "predictions/re_town.jsonl", "results.json", "state.json"]
    run(values, overwrite=True, max_new_tokens=2)
    assert files(out) == ["base/mine.txt", "predictions/ner_kitchen.jsonl", "results.json", "state.json"]
