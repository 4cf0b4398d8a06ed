"""recipes/label.py as a user sees it, on experts of two families of the embedded zoo."""

import json
import os
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from transformers import AutoTokenizer

from eval_runner import evaluation, predictions
from heterofusion.experts import soft_labels
from heterofusion.runtime.errors import UserError
from heterofusion.zoo import make_examples, write_dataset, zoo_path
from label_runner import COUNT, label, label_killed, read_labels, run_label
from recipe_runner import ROOT, Killed, contents, error_line, flags, shell, succeeds

pytest_plugins = ["label_runner"]
SERVED = {"ner_garden": "qwen2", "re_market": "mistral"}


@pytest.fixture
def garden_map(tmp_path) -> Path:
    """A routing that scores nothing."""
    path = tmp_path / "garden.yaml"
    path.write_text("ner_garden: ner_garden")
    return path


def same_labels(folder: Path, other: Path) -> None:
    for task in SERVED:
        assert read_labels(folder, task) == read_labels(other, task)
    for name in ("tasks", "labels", "routing", "sources"):
        assert (
            json.loads((folder / "labels.json").read_text())[name]
            == json.loads((other / "labels.json").read_text())[name]
        )


# ---- what comes out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", SERVED)
def test_labels_are_the_answers_of_the_right_expert(whole, label_data, tmp_path, task):
    _, folder, _ = whole
    family = SERVED[task]
    settings = {
        "model_name_or_path": zoo_path(family), "adapters": [zoo_path(family, task)], "max_new_tokens": 40,
        "dataset_name": [label_data / "truth" / f"{task}.jsonl"], "output_dir": tmp_path / "eval", "use_cpu": True,
    }  # fmt: skip
    succeeds(evaluation.main, flags(settings))
    answers = predictions(tmp_path / "eval", task)
    records = read_labels(folder, task)
    truth = make_examples(task, "unlabelled", COUNT)
    assert [record["prompt"] for record in records] == [example["prompt"] for example in truth]
    # eval decodes an answer alone, where a tokenizer may drop its first space
    assert [r["completion"].strip() for r in records] == [a["prediction"].strip() for a in answers]
    assert all(record["completion"].startswith(" ") for record in records)
    for record in records:
        assert list(record) == ["prompt", "completion", "task", "kind", "source", "log_probability", "format_ok"]
        assert (record["task"], record["kind"], record["source"]) == (task, truth[0]["kind"], task)
        assert record["log_probability"] < 0 and record["format_ok"] is True


def test_experts_of_other_tasks_are_not_routed(whole):
    _, folder, found = whole
    routing = json.loads((folder / "routing.json").read_text())
    assert routing == found["routing"]
    chosen = {task: record["chosen"] for task, record in routing["tasks"].items()}
    assert chosen == {"ner_garden": ["ner_garden"], "re_market": ["re_market"], "ner_kitchen": []}
    garden = routing["tasks"]["ner_garden"]["scores"]
    assert garden["ner_garden"] > 0.7 > 0.3 > max(garden["anchor"], garden["re_market"])
    assert routing["tasks"]["ner_kitchen"]["scores"]["anchor"] > 0.7 and not (folder / "ner_kitchen.jsonl").exists()
    assert (folder / "routing.png").is_file()


def test_record_tells_what_was_done_without_local_paths(whole):
    _, folder, found = whole
    assert found["labels"] == 2 * COUNT
    garden = found["tasks"]["ner_garden"]
    assert garden["sources"] == {"ner_garden": COUNT} and garden["format_failure_rate"] == 0.0
    records = read_labels(folder, "ner_garden")
    assert garden["mean_log_probability"] == pytest.approx(np.mean([r["log_probability"] for r in records]))
    assert found["tasks"]["ner_kitchen"]["labels"] == 0
    assert found["cost"]["seconds"] > 0 and found["versions"]["heterofusion"]
    for name in ("labels.json", "routing.json", "soft/index.json"):
        text = (folder / name).read_text()
        assert str(folder.parent) not in text and str(zoo_path("llama").parent) not in text


def test_soft_labels_are_of_the_labels(whole):
    """In the store's own format; of the token that was generated, the log-probability is that of the label."""
    _, folder, _ = whole
    index = json.loads((folder / "soft" / "index.json").read_text())
    assert index["top_k"] == 4 and list(index["sources"]) == list(SERVED)
    for name, entry in index["sources"].items():
        stored = soft_labels.read_labels(folder / "soft", entry["identity"])
        tokenizer = AutoTokenizer.from_pretrained(folder / "soft" / entry["tokenizer"])
        assert len(stored) == len(entry["labels"]) == COUNT
        for place, (task, line) in enumerate(entry["labels"]):
            record = read_labels(folder, task)[line]
            tokens, top_ids, top_log_probs = stored.of(place)
            assert record["source"] == name
            assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == record["completion"].strip()
            assert tokens.tolist() == top_ids[:, 0].tolist()  # greedy
            assert top_log_probs[:, 0].mean() == pytest.approx(record["log_probability"], abs=1e-4)


# ---- other prompts, maps, formats -------------------------------------------------------------------------------


def test_without_replay_the_map_routes_and_prompt_files_name_tasks(labelling, label_data, whole, tmp_path):
    (tmp_path / "map.yaml").write_text("ner_garden: ner_garden\nner_kitchen: none\n")
    prompts = [label_data / "prompts" / f"{task}.jsonl" for task in ("ner_garden", "ner_kitchen")]
    changes = {"model_name_or_path": None, "target_adapter": None, "dataset_name": None, "prompts": prompts}
    found = run_label(labelling, **changes, routing=tmp_path / "map.yaml")
    assert found["anchor"] is None and found["tasks"]["ner_garden"]["metric"] is None
    expected = [{k: v for k, v in r.items() if k != "kind"} for r in read_labels(whole[1], "ner_garden")]
    assert read_labels(labelling["output_dir"], "ner_garden") == expected
    assert not (labelling["output_dir"] / "ner_kitchen.jsonl").exists()


def test_of_several_sources_the_most_confident_labels_a_prompt(labelling, tmp_path):
    """Two experts of one task, of different families and tokenizers."""
    (tmp_path / "map.yaml").write_text("ner_garden: [qwen, mistral]")
    changes = {
        "source_adapters": [zoo_path("qwen2", "ner_garden"), zoo_path("mistral", "ner_garden")],
        "source_names": ["qwen", "mistral"], "routing": tmp_path / "map.yaml",
        "dataset_name": labelling["dataset_name"][:1], "prompts": "replay",
    }  # fmt: skip
    run_label(labelling, **changes)
    both = read_labels(labelling["output_dir"], "ner_garden")
    alone = {}
    for name in ("qwen", "mistral"):
        (tmp_path / "map.yaml").write_text(f"ner_garden: {name}")
        run_label(labelling, **changes, resume=True)
        alone[name] = read_labels(labelling["output_dir"], "ner_garden")
    assert [r["prompt"] for r in both] == [e["prompt"] for e in make_examples("ner_garden", "replay", COUNT)]
    for index, record in enumerate(both):
        assert record == alone[record["source"]][index]


def test_chat_data_comes_back_as_messages(labelling, tmp_path):
    """The expert brings its own chat template."""
    own = tmp_path / "own"
    shutil.copytree(zoo_path("qwen2", "ner_garden"), own)
    tokenizer = AutoTokenizer.from_pretrained(zoo_path("qwen2"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer.save_pretrained(own)
    examples = make_examples("ner_garden", "unlabelled", 3)
    rows = [{"messages": [{"role": "user", "content": e["prompt"]}]} for e in examples]
    (tmp_path / "map.yaml").write_text("chat: own")
    changes = {"source_models": [zoo_path("qwen2")], "source_adapters": [own], "dataset_name": None}
    found = run_label(
        labelling, **changes, prompts=[write_dataset(tmp_path / "chat.jsonl", rows)], routing=tmp_path / "map.yaml"
    )
    assert found["labels"] == 3
    for row, record in zip(rows, read_labels(labelling["output_dir"], "chat"), strict=True):
        *asked, answer = record["messages"]
        assert asked == row["messages"] and answer["role"] == "assistant"
        assert answer["content"] == answer["content"].strip() != ""
        assert (record["task"], record["source"]) == ("chat", "own")


def test_self_prompt_invents_inputs_of_the_task(labelling, garden_map):
    garden_map.write_text("ner_garden: ner_garden\nre_market: re_market")
    changes = {
        "prompts": None, "self_prompt": 6, "dataset_name": labelling["dataset_name"][:2], "top_p": 0.9,
        "batch_size": 8,
    }  # fmt: skip
    found = run_label(labelling, **changes, routing=garden_map)
    for task in SERVED:
        counts = found["tasks"][task]["invented"]
        assert counts["drawn"] == 6 and counts["kept"] == found["tasks"][task]["labels"] > 0
        replay = make_examples(task, "replay", COUNT)
        beginning = replay[0]["prompt"].partition("\nText:")[0] + "\nText: "
        prompts = [record["prompt"] for record in read_labels(labelling["output_dir"], task)]
        assert len(set(prompts)) == len(prompts) == counts["kept"]
        assert not set(prompts) & {example["prompt"] for example in replay}
        for prompt in prompts:
            assert prompt.startswith(beginning) and prompt.endswith("\nAnswer:")
            assert prompt[len(beginning) :].removesuffix("\nAnswer:").strip() and prompt.count("\n") == 3


# ---- interruptions ----------------------------------------------------------------------------------------------


def test_killed_and_resumed(whole, tmp_path, kill_after):
    """While prompts are labelled; the last line was cut while it was written. What was asked for routing is there."""
    _, folder, _ = whole
    values = {**whole[0], "output_dir": tmp_path / "out", "resume": True}
    shutil.copytree(folder / "parts", tmp_path / "out" / "parts")
    parts = sorted((tmp_path / "out" / "parts").iterdir(), key=lambda part: (part / "rank-0.jsonl").stat().st_mtime_ns)
    assert len(parts) == 11  # of three models on three replays and two sources on their prompts
    for part in parts[-2:]:
        shutil.rmtree(part)
    kill_after(1)
    label_killed(values)
    assert not (tmp_path / "out" / "labels.json").exists()
    part = parts[-2] / "rank-0.jsonl"
    part.write_bytes(part.read_bytes()[:-7])
    sizes = kill_after(None)
    run_label(values)
    assert sorted(sizes) == [1, COUNT]  # what was cut, and what was left
    same_labels(tmp_path / "out", folder)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_another_routing_of_what_is_there_runs_no_model(whole, tmp_path, kill_after, monkeypatch, capsys):
    values, folder, _ = whole
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    kill_after(0)
    monkeypatch.setattr("heterofusion.experts.expert.ExpertRunner.load", None)
    changes = {"output_dir": out, "resume": True, "dataset_label": ["a", "b", "c"], "routing_margin": 0.05}
    assert label.main(flags({**values, **changes})) == 0
    assert list(json.loads((out / "labels.json").read_text())["tasks"]) == ["a", "b", "c"]
    assert not (out / "ner_garden.jsonl").exists() and len(read_labels(out, "a")) == COUNT
    assert not (out / "soft" / "index.json").exists()  # not asked for this time
    printed, told = capsys.readouterr()
    assert "| ner_garden | **" in printed and f"| a | {COUNT} | ner_garden {COUNT} |" in printed
    assert "NO LABELS FOR c: no source is better at it than the anchor" in told


def test_overwrite_removes_what_an_earlier_run_wrote_and_nothing_else(whole, tmp_path, garden_map, capsys):
    values, folder, _ = whole
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.MonkeyPatch.context() as patch:  # it loses nothing to a base that cannot be loaded
        patch.setattr("heterofusion.experts.expert.load_base", Mock(side_effect=UserError("weights are missing")))
        error_line(capsys, label.main, flags({**values, "output_dir": out, "overwrite": True}), "weights are missing")
    assert contents(out) == before
    garden_map.write_text("a: ner_garden")
    changes = {"dataset_name": values["dataset_name"][:1], "prompts": values["prompts"][:1], "dataset_label": ["a"]}
    run_label(values, output_dir=out, overwrite=True, routing=garden_map, max_prompts=2, **changes)
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "ner_garden.jsonl").exists() and not (out / "soft").exists()
    assert len(read_labels(out, "a")) == 2
    assert len([*(out / "parts").iterdir()]) == 1


@pytest.mark.distributed
def test_two_processes_give_the_same(whole, tmp_path, garden_map):
    values, folder, _ = whole
    out = tmp_path / "two"
    changes = {"dataset_name": values["dataset_name"][:1], "prompts": values["prompts"][:1], "routing": garden_map}
    done = shell(
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs/cpu_ddp.yaml",
        ROOT / "recipes/label.py", *flags({**values, **changes, "output_dir": out}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"| ner_garden | {COUNT} |") == 1  # only one rank prints
    assert json.loads((out / "labels.json").read_text())["processes"] == 2
    shares = [len(path.read_text().splitlines()) for path in sorted((out / "parts").glob("*/rank-*.jsonl"))]
    assert shares == [COUNT // 2] * 2
    for one, other in zip(read_labels(out, "ner_garden"), read_labels(folder, "ner_garden"), strict=True):
        assert one.pop("log_probability") == pytest.approx(other.pop("log_probability"), abs=1e-5)
        assert one == other


# ---- errors -----------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(labelling, capsys, logging_restored, monkeypatch):
    """Run with some flags changed; it must fail as a user's error does, with no model loaded and nothing written."""

    def no_weights(*args, **kwargs):
        raise AssertionError("a model was loaded before the error")

    monkeypatch.setattr("heterofusion.experts.expert.ExpertRunner.load", no_weights)

    def run(*words, **changes):
        before = contents(labelling["output_dir"])
        line = error_line(capsys, label.main, flags({**labelling, **changes}), *words)
        assert contents(labelling["output_dir"]) == before
        return line

    return run


def test_flags_that_do_not_fit_together(refused, labelling):
    prompts = labelling["prompts"]
    refused("--source_adapters is missing", source_adapters=None)
    refused("--source_models has 2 values", "has 1", source_adapters=labelling["source_adapters"][:1])
    refused("same name 'a'", "--source_names", source_names=["a", "a"])
    refused("'anchor' cannot be the name", source_names=["anchor", "b"])
    refused("--target_adapter", "give --model_name_or_path", model_name_or_path=None)
    refused("--target_adapter is missing", "ner_garden, re_market, ner_kitchen", target_adapter=None)
    refused("either --prompts", "or --self_prompt", prompts=None)
    refused("--prompts has 2 values", "--dataset_name has 3", prompts=prompts[:2])
    refused("--prompts replay", "give --dataset_name", prompts="replay", dataset_name=None)
    refused("without --dataset_name", "--routing", "lacks ner_garden", dataset_name=None)
    refused("--routing_margin is 2.0", routing_margin=2)
    refused("--dataset_label has 1 values for 3 of them", dataset_name=None, dataset_label=["a"])
    refused("source ner_garden (--source_models", "/no/base", source_models=["/no/base"])
    refused("--resume and --overwrite", resume=True, overwrite=True)
    labelling["output_dir"].mkdir()
    (labelling["output_dir"] / "notes.txt").write_text("mine")
    refused("exists and is not empty", "--overwrite true")
    refused("holds no labels", resume=True)


def test_labels_are_not_written_over_what_is_read(refused, labelling, label_data, tmp_path):
    """A task has the name of its file, so its labels would have that of the replay, or of the prompts."""
    folder = tmp_path / "data"
    shutil.copytree(label_data, folder)
    replay = [folder / "replay" / f"{task}.jsonl" for task in (*SERVED, "ner_kitchen")]
    labelling["output_dir"] = folder / "replay"
    words = ("labels would be written over", replay[0], "which is read; name another")
    refused(*words, dataset_name=replay, overwrite=True)
    labelling["output_dir"] = folder / "prompts"
    refused("would be written over", prompts=[folder / "prompts" / file.name for file in replay], overwrite=True)


def test_a_kill_between_files_leaves_no_record_of_other_labels(labelling, label_data, monkeypatch):
    run_label(labelling)
    folder, moves = labelling["output_dir"], []

    def killed(source, target, real=os.replace):
        if Path(target).parent == folder and Path(target).name in ("ner_garden.jsonl", "re_market.jsonl"):
            moves.append(target)
            if len(moves) == 2:
                raise Killed
        real(source, target)

    monkeypatch.setattr("os.replace", killed)
    label_killed(labelling, control="anchor", resume=True)
    assert len(moves) == 2 and not (folder / "labels.json").exists()
    monkeypatch.undo()
    assert run_label(labelling, control="anchor", resume=True)["routing"]["control"] == "anchor"


def test_files_that_are_wrong(refused, labelling, tmp_path):
    missing = tmp_path / "no.jsonl"
    others = labelling["prompts"][1:]
    refused("prompt file", missing, "does not exist", prompts=[missing, *others])
    bad = write_dataset(tmp_path / "bad.jsonl", [{"prompt": "fine"}, {"prompt": ""}])
    refused(bad, "line 2", "`prompt` is empty", prompts=[bad, *others])
    texts = write_dataset(tmp_path / "texts.jsonl", [{"text": "fine"}])
    refused(texts, "no column of prompts (found: text)", prompts=[texts, *others])
    (tmp_path / "map.yaml").write_text("ner_garden: nobody")
    refused("--routing", "'nobody' is no source", routing=tmp_path / "map.yaml")
    (tmp_path / "map.yaml").write_text("ner_garden: none\nre_market: none\nner_kitchen: none")
    line = refused("--routing", "gives no task to any source", routing=tmp_path / "map.yaml", target_adapter=None)
    assert str(tmp_path / "map.yaml") in line
    wrong = [zoo_path("qwen2", "ner_garden"), zoo_path("llama", "re_market")]
    refused("source re_market (", "does not fit", source_adapters=wrong)
    refused("source no (", "does not exist", source_adapters=[tmp_path / "no", wrong[0]])
    chats = [{"messages": [{"role": "user", "content": "a"}]}]
    chat = write_dataset(tmp_path / "chat.jsonl", chats)
    refused("ner_garden:", chat, "has none", prompts=[chat, *others])
    plain = [{"prompt": f"{word} one", "completion": " x", "kind": "NER"} for word in "abc"]
    replay = write_dataset(tmp_path / "plain.jsonl", plain)
    refused("--self_prompt:", replay, "no common beginning", prompts=None, self_prompt=3, dataset_name=[replay])


def test_nobody_beats_the_anchor(labelling, capsys, logging_restored):
    changes = {
        "source_models": [zoo_path("mistral")], "source_adapters": [zoo_path("mistral", "re_market")],
        "dataset_name": labelling["dataset_name"][:1], "prompts": labelling["prompts"][:1], "max_examples": 2,
    }  # fmt: skip
    assert label.main(flags({**labelling, **changes})) == 2
    err = capsys.readouterr().err
    assert "error: no source labels any task: ner_garden: no source is better at it than the anchor" in err
    assert json.loads((labelling["output_dir"] / "routing.json").read_text())["tasks"]["ner_garden"]["chosen"] == []
    assert not (labelling["output_dir"] / "labels.json").exists()
