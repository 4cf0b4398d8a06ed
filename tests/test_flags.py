"""Flags of the command line: parsing, ranges, help, --config and --debug."""

import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore
from tqdm import tqdm
from transformers import TrainingArguments

from heterofusion import MethodConfig
from heterofusion.adapters.alignment import AdapterArguments
from heterofusion.cli import main as heterofusion
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.program import FIRST, command, parse_arguments
from heterofusion.training.config import FUSION_ARGUMENTS as ARGUMENTS
from recipe_runner import QWEN, ROOT, TARGET, error_line, flags, plan, shell, train

pytestmark = pytest.mark.usefixtures("logging_restored")


# ---- ranges and help --------------------------------------------------------------------------------------------

BAD_VALUES = [
    # the method
    ("preset", "huge"), ("block_size", 0), ("embed_dim", -1), ("num_heads", 0), ("max_position_embeddings", 0),
    ("max_position_embeddings", 1), ("alpha_init", 0), ("alpha_init", "nan"), ("mu_gate", "inf"), ("rdm_weight", -1),
    ("rdm_weight", "nan"), ("rdm_mu", "nan"), ("rdm_sigma", -1), ("rdm_projections", 0), ("layer_alignment", "head"),
    ("transfer_ratio", "2/1"), ("transfer_ratio", 0), ("transfer_ratio", "half"), ("transfer_ratio", "1/0"),
    ("transfer_ratio", "nan"), ("canonicalize", "perhaps"),
    # the data
    ("max_examples", -1), ("dataset_ratio", 0), ("dataset_ratio", 1.5), ("dataset_seed", -1), ("max_length", 1),
    ("eval_max_examples", -1), ("max_examples", [1, 2]), ("dataset_split", [""]),
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


def test_flags_that_do_not_go_together_raises(fails, capsys, tmp_path):
    fails("embed_dim 30", "num_heads 4", embed_dim=30)
    fails("--num_train_epochs is 0", num_train_epochs=0, max_steps=-1)
    fails("--load_in_4bit", "--load_in_8bit", load_in_4bit=True, load_in_8bit=True)
    fails("--target_adapter", "--help", target_adapter=None)
    fails(tmp_path / "no.yaml", "does not exist", config=tmp_path / "no.yaml")
    error_line(capsys, plan.main, ["--config"], "--config: expected one argument")


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
def test_quantization_without_bitsandbytes_raises(flag, fails, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fails(f"--{flag}", "bitsandbytes", "heterofusion[quantization]", **{flag: True})


@pytest.mark.parametrize(("main", "types"), [(train.main, ARGUMENTS), (plan.main, (AdapterArguments, MethodConfig))])
def test_help_lists_every_flag_in_groups_with_a_sentence(capsys, main, types):
    assert main(["--help"]) == 0
    usage, _, text = capsys.readouterr().out.partition("the flags that matter most:")
    assert usage.startswith("usage: ") and "--rdm_weight" not in usage
    fields = [field for kind in types for field in kind.__dataclass_fields__.values() if field.init]
    for name in ("--config", "--debug", *(f"--{field.name}" for field in fields)):
        assert re.search(rf"(^|[ ,]){name}\b", usage + text, re.M), name
    for field in fields:
        help_text = field.metadata["help"]
        own = field.name not in TrainingArguments.__dataclass_fields__
        assert not own or (help_text[0].isupper() and help_text.rstrip()[-1] in ".)"), (field.name, help_text)
    if main is train.main:
        matter = text[: text.index("\n\n")]
        assert all(f"--{name} " in matter for name in FIRST) and matter.count("\n  --") == len(FIRST)
        assert text.index("--rdm_weight") < text.index("transformers' TrainingArguments:") < text.index("--adam_beta1")


# ---- --config and --debug ---------------------------------------------------------------------------------------


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


def test_yaml_values_pass_the_casts_of_the_command_line_which_overrides_them(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    model, adapters, data, _, _, args = parse_arguments(ARGUMENTS, ["--config", str(path)], "")
    assert model.model_name_or_path == "base"
    assert adapters.source_adapters == ["one", "two"]
    assert data.dataset_name == ["a.json"] and data.max_examples == [20]
    assert args.learning_rate == 1e-5 and args.rdm_weight == 0.0 and isinstance(args.rdm_weight, float)
    assert args.canonicalize is True and args.transfer_ratio == "1/2" and args.embed_dim is None
    assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    argv = f"--source_adapters three --learning_rate 2e-4 --config={path} --canonicalize false --rdm_mu -1e-3"
    _, adapters, _, _, _, args = parse_arguments(ARGUMENTS, argv.split(), "")
    assert adapters.source_adapters == ["three"]
    assert (args.learning_rate, args.canonicalize, args.rdm_mu) == (2e-4, False, -1e-3)


BAD_YAML = {
    "an unknown key": ("learning_rates: 1", ["learning_rates", "--help"]),
    "a list": ("- 1", ["list", "mapping"]),
    "a text": ("train", ["str", "mapping"]),
    "a syntax error": ("a: [1", ["YAML", "line 1"]),
    "a Python object": ("output_dir: !!python/object/apply:os.getcwd []", ["YAML", "python/object"]),
    "a word for a number": ("max_steps: many", ["max_steps", "many"]),
    "an empty list of sources": ("source_adapters: []", ["source_adapters"]),
    "two values for one": ("learning_rate: [1, 2]", ["unknown flags: 2"]),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_bad_yaml_raises(case, fails, tmp_path):
    text, words = BAD_YAML[case]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    key = text.partition(":")[0]
    fails(path, *words, config=path, **({key: None} if key in ("max_steps", "source_adapters") else {}))


@pytest.mark.parametrize("debug", [["--debug", "true"], ["--debug=true"], ["--debug"]])
def test_debug_true_shows_the_traceback(debug, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        plan.main([*flags({"target_adapter": tmp_path / "nowhere", "source_adapters": [QWEN]}), *debug])


def test_an_internal_error_keeps_its_traceback():
    """Only what a user can mend is told in one line."""
    with pytest.raises(ZeroDivisionError):
        command(lambda argv: 1 // 0)([])


# ---- several processes ------------------------------------------------------------------------------------------


def test_the_first_process_with_an_error_tells_it_once(capsys, monkeypatch):
    """Whatever its rank is: the store of the launcher counts."""

    @command
    def fails(argv):
        raise UserError(f"rank {argv[0]} misses a file")

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launch = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    for name, value in {**launch, "WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert [fails(["1"]), fails(["0"])] == [2, 2]
    assert capsys.readouterr().err == "error: rank 1 misses a file\n"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the launcher starts all again
    assert fails(["0"]) == 2
    assert capsys.readouterr().err == "error: rank 0 misses a file\n"


LAUNCHED = """
import os, sys, time
from heterofusion.runtime.program import command
from heterofusion.runtime.errors import UserError

@command
def main(argv):
    if os.environ["RANK"] == "1":
        raise UserError("rank 1 misses a file")
    time.sleep(60)

sys.exit(main())
"""


@pytest.mark.distributed
def test_an_error_of_another_rank_is_seen(tmp_path):
    (tmp_path / "program.py").write_text(LAUNCHED)
    config = ("--config_file", ROOT / "accelerate_configs/cpu_ddp.yaml", "--main_process_port", 0)
    done = shell(sys.executable, "-m", "accelerate.commands.launch", *config, tmp_path / "program.py")
    assert done.returncode != 0 and done.stderr.count("error: rank 1 misses a file\n") == 1, done.stderr


# ---- the command ------------------------------------------------------------------------------------------------


def console(monkeypatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", ["heterofusion", *map(str, argv)])
    return heterofusion()


def test_command_lists_every_recipe_in_a_line(monkeypatch, capsys):
    assert console(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for name in ("train", "plan", "label", "expert", "eval", "merge", "distill", "compare", "report", "push"):
        assert re.search(rf"^  {name} +[A-Z].+\.$", text, re.M), name
    assert "benchmark_" not in text  # its parts
    assert console(monkeypatch, "fuse") == 2
    assert "'fuse' is no command; choose one of" in capsys.readouterr().err


def test_the_command_is_quick_and_its_error_line_is_alone(tmp_path):
    """torch is imported when it is needed, and what libraries say meanwhile is not shown."""
    heavy = "import sys, heterofusion.cli as c; sys.argv[1:] = ['-h']; c.main(); sys.exit('torch' in sys.modules)"
    assert shell(sys.executable, "-c", heavy).returncode == 0
    done = shell(sys.executable, "-m", "heterofusion.cli", "plan", "--target_adapter", tmp_path / "no")
    assert done.returncode == 2 and re.fullmatch("error: [^\n]+\n", done.stderr), done.stderr
    done = shell(sys.executable, "-c", "from heterofusion import load_adapter")
    assert (done.returncode, done.stderr) == (0, "")


def test_command_runs_a_recipe_here(monkeypatch, capsys):
    assert console(monkeypatch, "plan", "--target_adapter", TARGET, "--source_adapters", QWEN) == 0
    assert "q_proj" in capsys.readouterr().out


def test_command_launches_processes(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda words: calls.append(words) or 3)
    argv = ["--output_dir", "out", "--num_processes", 2, "--seed=1", "--accelerate_config", "zero3"]
    assert console(monkeypatch, "train", *argv) == 3
    launcher, config, path = calls[0][:3], calls[0][3:7], calls[0][7]
    assert launcher == [sys.executable, "-m", "accelerate.commands.launch"]
    assert config == ["--config_file", str(ROOT / "accelerate_configs/zero3.yaml"), "--num_processes", "2"]
    assert Path(path).name == "train.py" and calls[0][8:] == ["--output_dir", "out", "--seed=1"]
    assert console(monkeypatch, "train", "--accelerate_config", "zero9") == 2
    assert "'zero9'" in capsys.readouterr().err


def test_debug_of_transformers_passes_through():
    seen: list[list[str]] = []
    main = command(seen.append)
    for argv in (["--debug", "underflow_overflow"], ["--debug", "sideways", "--seed", "1"], ["--debug", "false"]):
        assert main(argv) == 0
    assert seen == [["--debug", "underflow_overflow"], ["--debug", "sideways", "--seed", "1"], []]


@pytest.mark.parametrize("bars", [0, 1, 2])
def test_error_line_begins_a_line_whatever_bars_were_cut_short(bars, capsys):
    open_bars: list[tqdm] = []  # as a traceback keeps them open

    @command
    def fails(_):
        open_bars.extend(tqdm(total=2, file=file) for file in [io.StringIO(), *[sys.stderr] * bars])
        raise UserError("w")

    assert fails([]) == 2
    text = capsys.readouterr().err
    for bar in open_bars:
        bar.close()
    assert [line for line in text.splitlines() if "error" in line] == ["error: w"]
    assert bars or text == "error: w\n"
