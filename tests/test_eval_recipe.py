"""recipes/eval.py as a program: its results, its flags, its errors."""

import json
import sys

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import fresh_base
from eval_runner import COUNT, TASKS, evaluation, expert_values, files, predictions, results, run, scores
from heterofusion.evaluation.metrics import UIEF1
from heterofusion.zoo import make_examples, write_dataset, zoo_path
from heterofusion.zoo.build import score_tasks
from recipe_runner import ROOT, error_line, flags, late_error, shell

pytest_plugins = ["eval_runner"]


@pytest.fixture(scope="module")
def whole(test_sets, tmp_path_factory):
    """One evaluation of an expert on two tasks: flags, folder, results."""
    flags = expert_values(test_sets["ner_kitchen"], tmp_path_factory.mktemp("whole") / "out")
    flags["dataset_name"] = [test_sets[task] for task in TASKS]
    return flags, flags["output_dir"], run(flags, labels=["experiment=single source", "seed=0"])


def test_scores_are_those_of_the_zoo(whole):
    _, folder, found = whole
    tokenizer = AutoTokenizer.from_pretrained(zoo_path("llama"))
    model = AutoModelForCausalLM.from_pretrained(zoo_path("llama"), dtype=torch.float32)
    model = PeftModel.from_pretrained(model, zoo_path("llama", "ner_kitchen"))
    expected = score_tasks(model, tokenizer, TASKS, COUNT, progress=False)
    assert {label: record["score"] for label, record in found["datasets"].items()} == expected
    assert expected["ner_kitchen"] > 0.8 > expected["re_town"]
    assert found["mean"] == pytest.approx(sum(expected.values()) / 2)
    assert files(folder) == [*(f"predictions/{task}.jsonl" for task in TASKS), "results.json", "state.json"]


def test_results_and_predictions_say_what_was_done(whole):
    _, folder, found = whole
    for task, metric in zip(TASKS, ("NER", "RE"), strict=True):
        kept, examples = predictions(folder, task), make_examples(task, "test", COUNT)
        asked = [(record["index"], record["prompt"], record["reference"]) for record in kept]
        assert asked == [(i, example["prompt"], example["completion"]) for i, example in enumerate(examples)]
        texts = {f"{key}s": [record[key] for record in kept] for key in ("prediction", "reference")}
        rescored, record = UIEF1(metric).compute(**texts), found["datasets"][task]
        assert record["scores"] == rescored
        assert (record["metric"], record["primary"], record["score"]) == (metric, "f1", rescored["f1"])
        assert record["new_tokens"] == sum(answer["new_tokens"] for answer in kept)
    assert (found["name"], found["labels"]) == ("ner_kitchen", {"experiment": "single source", "seed": "0"})
    assert (found["base_model"], found["adapter"]["name"]) == ("base", "ner_kitchen")
    assert (found["processes"], found["device"], found["dtype"]) == (1, "cpu", "float32")
    assert found["tokens_per_second"] == pytest.approx(found["new_tokens"] / found["seconds"], rel=0.01)
    assert found["settings"]["dataset_name"] == ["ner_kitchen.jsonl", "re_town.jsonl"]
    assert str(ROOT) not in json.dumps(found) and "/" not in json.dumps(found["settings"])


def test_several_adapters_of_any_kind(values, tmp_path, whole, capsys):
    """Each is on a clean base: LoRA is taken off, and what cannot be is loaded anew."""
    base = AutoModelForCausalLM.from_pretrained(zoo_path("llama"), dtype=torch.float32)
    torch.manual_seed(0)
    kinds = {
        "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[]),
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "saved": LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"], modules_to_save=["lm_head"], r=2),
    }
    for name, config in kinds.items():
        model = get_peft_model(base, config)
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data += 0.5 * torch.randn(parameter.shape) * ("lm_head" not in key)
        model.save_pretrained(tmp_path / name)
        base = AutoModelForCausalLM.from_pretrained(zoo_path("llama"), dtype=torch.float32)
    expert = zoo_path("llama", "ner_kitchen")
    out = values["output_dir"]
    names = ["expert", "bare", "ia3", "prompt", "saved", "again"]
    adapters = [expert, "none", *(tmp_path / name for name in kinds), expert]
    assert evaluation.main(flags({**values, "adapters": adapters, "names": names})) == 0
    table = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in table[2:]] == names
    assert table[0] == "|  | ner_kitchen | mean | seconds | tokens/s |"
    found = {name: predictions(out / name) for name in names}
    assert found["expert"] == found["again"] == predictions(whole[1])
    assert len({json.dumps(answers) for answers in found.values()}) == len(names) - 1
    assert results(out / "bare")["adapter"] is None
    assert not (out / "results.json").exists()


def test_merged_adapters_give_the_same_answers_each_on_a_clean_base(values, whole, capsys):
    adapters = [zoo_path("llama", "re_town"), "none", zoo_path("llama", "ner_kitchen")]
    argv = {**values, "adapters": adapters, "merge_adapters": True}
    assert evaluation.main(flags(argv)) == 0
    other, bare, expert = (predictions(values["output_dir"] / name) for name in ("re_town", "base", "ner_kitchen"))
    assert expert == predictions(whole[1])
    assert bare not in (other, expert)
    error_line(capsys, evaluation.main, flags({**argv, "overwrite": True, "load_in_4bit": True}), "quantized")


def test_metrics_of_each_data_set_and_a_config_file(values, tmp_path):
    """GLUE by its columns, exact match by a flag, of other formats; all from a YAML file."""
    glue = [{"prompt": "Sentence: fine\nAnswer:", "completion": " positive", "kind": "GLUE", "task": "sst2"}]
    Dataset.from_list(glue).to_parquet(tmp_path / "sst2.parquet")
    alpaca = [{"instruction": "Say it", "input": "now", "output": "it", "history": []}]
    (tmp_path / "exact.json").write_text(json.dumps(alpaca))
    config = {
        "dataset_name": [str(tmp_path / "sst2.parquet"), str(tmp_path / "exact.json")],
        "metric": ["auto", "exact_match"], "dataset_label": ["glue", "exact"], "max_new_tokens": 3,
    }  # fmt: skip
    (tmp_path / "eval.yaml").write_text(json.dumps(config))  # JSON is YAML
    kept = {name: value for name, value in values.items() if name not in config}
    found = run(kept, config=tmp_path / "eval.yaml", adapters=["none"])
    assert {label: (r["metric"], r["primary"]) for label, r in found["datasets"].items()} == {
        "glue": ("sst2", "accuracy"), "exact": ("exact_match", "exact_match"),
    }  # fmt: skip
    assert found["name"] == "base"
    assert predictions(values["output_dir"], "exact")[0]["prompt"] == "Say it\nnow"


def test_long_prompts_are_cut_and_counted(values, capsys, logging_restored):
    tokenizer = AutoTokenizer.from_pretrained(zoo_path("llama"))
    lengths = sorted(len(tokenizer(e["prompt"])["input_ids"]) for e in make_examples("ner_kitchen", "test", COUNT))
    limit = lengths[COUNT // 2]
    longer = sum(length > limit for length in lengths)
    assert evaluation.main(flags({**values, "max_prompt_length": limit, "max_new_tokens": 3})) == 0
    assert results(values["output_dir"])["datasets"]["ner_kitchen"]["prompts_cut"] == longer > 0
    said = f"{longer} of {COUNT} prompts of ner_kitchen were cut to {limit} tokens on the left"
    assert said in capsys.readouterr().err


@pytest.mark.distributed
def test_two_processes_give_the_same(whole, tmp_path):
    settings, folder, found = whole
    out = tmp_path / "two"
    done = shell(
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs/cpu_ddp.yaml",
        ROOT / "recipes/eval.py", *flags({**settings, "output_dir": out}),
        "--labels", "experiment=single source", "seed=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| ner_kitchen |") == 2  # header and row: only one rank prints
    two = results(out)
    assert two["processes"] == 2
    assert scores(two) == scores(found)
    assert files(out) == files(folder)
    for task in TASKS:
        assert predictions(out, task) == predictions(folder, task)


def test_adapter_that_is_damaged_or_does_not_fit(refused, values, tmp_path, capsys):
    qwen, other = zoo_path("qwen2", "ner_kitchen"), tmp_path / "other"
    refused(f"adapter {qwen} does not fit base model {zoo_path('llama')}", "give the base", adapters=["none", qwen])
    base = AutoModelForCausalLM.from_pretrained(zoo_path("llama"), dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"], r=2)
    get_peft_model(base, config).save_pretrained(other)
    found = json.loads((other / "adapter_config.json").read_text())
    for change, *reasons in (
        ({"target_modules": ["q_proj"]}, "does not fit", "missing adapter keys"),
        ({"target_modules": ["v_proj", "q_proj"]}, "layers.0.self_attn.q_proj.lora_A"),  # a place without weights
        ({"layers_to_transform": [0]}, "no place for base_model.model.model.layers.1.self_attn.v_proj.lora_A"),
        ({"peft_type": "NEW"}, "PEFT cannot read"),
        ({"task_type": "SEQ_CLS"}, "is for the task SEQ_CLS"),
    ):
        (other / "adapter_config.json").write_text(json.dumps({**found, **change}))
        refused(f"adapter {other}", *reasons, adapters=[other])
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(fresh_base(), prompt).save_pretrained(tmp_path / "prompt")  # of a base of another size
    argv = flags({**values, "adapters": [tmp_path / "prompt"]})
    late_error(capsys, evaluation.main, argv, f"adapter {tmp_path / 'prompt'} does not fit", "virtual tokens")


WRONG = {
    "labels": ({"dataset_label": ["a/b"]}, ["cannot be the name of a file", "--dataset_label"]),
    "number of names": ({"adapters": ["none", "none"], "names": ["b"]}, ["--names has 1 values for 2"]),
    "adapter per data set": ({"adapter_per_dataset": True, "adapters": ["none", "none"]}, ["--adapters has 2 values"]),
    "same names": ({"adapters": ["none", "none"]}, ["the same name 'base'", "--names"]),
    "empty adapter": ({"adapters": ["none", ""]}, ["--adapters is ['none', '']"]),
    "metric": ({"metric": ["f1"]}, ["argument --metric", "'f1'", "uie"]),
    "batch size 0": ({"batch_size": 0}, ["--batch_size is '0'", "or auto"]),
    "no room": ({"max_new_tokens": 600}, ["--max_new_tokens 600 leaves no room", "512"]),
    "long prompts": ({"max_prompt_length": 500}, ["--max_prompt_length 500", "give 472 at most"]),
    "row labels": ({"labels": ["seed"]}, ["--labels is ['seed']", "key=value"]),
    "both": ({"resume": True, "overwrite": True}, ["exclude each other"]),
    "no data": ({"dataset_name": None}, ["--dataset_name is missing"]),
    "no adapter": ({"adapters": ["none", "/no"]}, ["adapter folder", "/no", "does not exist"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values(case, refused):
    changed, words = WRONG[case]
    refused(*words, **changed)


GOOD = {"prompt": "a", "completion": "b"}
UNFIT = {
    "text": ([{"text": "a"}], ["data.jsonl has no columns of prompts and answers"]),
    "no kind": ([GOOD], ["data.jsonl: no column `kind`", "--metric"]),
    "null": ([GOOD, {"prompt": "a", "completion": None}], ["data.jsonl, line 2", "`completion` is null"]),
    "label": ([{**GOOD, "kind": "GLUE", "task": "sst2"}], ["data.jsonl: references[0] is 'b'", "negative, positive"]),
    "no answer": (
        [{"messages": [{"role": "user", "content": "a"}], "kind": "NER"}], ["data.jsonl, line 1", "no assistant turn"]
    ),
    "no prompt": ([{"prompt": "", "completion": "w4", "kind": "NER"}], ["data.jsonl, line 1: the prompt is empty"]),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_data_that_cannot_be_evaluated(case, refused, tmp_path, base_dir):
    rows, words = UNFIT[case]
    data = write_dataset(tmp_path / "data.jsonl", rows)
    no_bos = {"model_name_or_path": base_dir, "adapters": ["none"], "max_new_tokens": 2} if case == "no prompt" else {}
    refused(*words, dataset_name=[data], **no_bos)


def test_output_folder_that_is_not_empty(refused, values):
    values["output_dir"].mkdir()
    (values["output_dir"] / "mine.txt").write_text("mine")
    refused("exists and is not empty", "--resume true", "--overwrite true")
    refused("holds no evaluation", resume=True)
