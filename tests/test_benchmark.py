"""recipes/benchmark.py measures what it says, and kept pages are really kept."""

import json
import sys

import pytest
import torch

from recipe_runner import RECIPES, error_line, flags, recipe

pytestmark = pytest.mark.usefixtures("logging_restored")

TINY_LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY_QWEN = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    return recipe("benchmark")


@pytest.fixture
def one_row():
    """What measures one row."""
    return recipe("_benchmark")


@pytest.fixture
def recorded(benchmark, monkeypatch):
    """The rows that are asked for, with figures that follow from the settings instead of a measurement."""
    calls = []

    def run_row(asked):
        name = asked.row
        calls.append((name, asked.sources, asked.rank, asked.accumulation))
        seconds = asked.accumulation + (name != "lora") * asked.sources
        return {
            "trainable_parameters": 10, "state_bytes": 2**30, "seconds_per_step": float(seconds),
            "lm_seconds": 0.5, "hypernetwork_seconds": 0.25, "optimizer_seconds": 0.25,
            "peak_memory_bytes": 2**30 * (1 + (name != "lora") * 2),
        }  # fmt: skip

    monkeypatch.setattr(benchmark, "run_row", run_row)
    return calls


# ---- real measurements ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fusion_is_measured_beside_a_lora_step(benchmark, tmp_path, capsys):
    output = tmp_path / "benchmark.json"
    settings = {"shape": "demo", "steps": 1, "accumulation": 2, "tokens": 16, "presets": ["compact"], "output": output}
    assert benchmark.main(flags(settings)) == 0
    content = json.loads(output.read_text())
    plain, fusion = content["rows"]
    assert plain["row"] == "lora" and fusion["row"] == "compact"
    assert fusion["ratio"] == pytest.approx(fusion["seconds_per_step"] / plain["seconds_per_step"])
    parts = fusion["lm_seconds"] + fusion["hypernetwork_seconds"] + fusion["optimizer_seconds"]
    assert parts == pytest.approx(fusion["seconds_per_step"])
    assert plain["hypernetwork_seconds"] == 0 < fusion["hypernetwork_seconds"]
    for figures in (plain, fusion):
        assert len(figures["all_seconds"]) == 3  # two are not counted
        assert figures["seconds_per_step"] == figures["all_seconds"][2]
        # float32 weights, gradients and two moments; the moments have a few step counters beside them
        assert figures["state_bytes"] == pytest.approx(16 * figures["trainable_parameters"], rel=0.01)
        assert figures["peak_memory_bytes"] > 2**26
    above = fusion["peak_memory_bytes"] - plain["peak_memory_bytes"]
    assert fusion["memory_above_plain_bytes"] == above
    assert fusion["memory_above_plain_over_state"] == pytest.approx(above / fusion["state_bytes"])
    assert content["arguments"]["accumulation"] == 2 and content["device"] and content["versions"]["torch"]
    out = capsys.readouterr().out
    assert "| compact | 1,994,511 |" in out and "above / w+g+s" in out


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts bytes in /proc/net/dev")
def test_what_ranks_exchange_is_what_shapes_say(benchmark, tmp_path, capsys):
    output = tmp_path / "exchange.json"
    settings = {"shape": "demo", "steps": 3, "accumulation": 1, "tokens": 8, "presets": ["paper"], "output": output}
    assert benchmark.main(flags({**settings, "exchange": True})) == 0
    rows = json.loads(output.read_text())["exchange"]
    assert [r["ddp_reduce"] for r in rows] == ["-", "updates", "parameters"]
    plain, updates, parameters = rows
    assert parameters["computed_bytes"] == 4 * 5_670_119
    assert updates["computed_bytes"] < plain["computed_bytes"] < parameters["computed_bytes"] / 100
    for figures in rows:
        assert figures["ranks"] == 2 and len(figures["all_bytes"]) == 3
        # other traffic of this machine counts too, so more may have been seen
        assert min(figures["all_bytes"]) / 2 >= figures["computed_bytes"]
    assert min(updates["all_bytes"]) < min(parameters["all_bytes"]) / 20
    assert "| paper | updates |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["lora", "compact"])
def test_micro_batches_and_checkpointing_are_as_asked_for(one_row, tmp_path, name):
    arguments = one_row.BenchmarkArguments(
        shape="demo", tokens=8, row=name, steps=1, accumulation=2, micro_batch=3, activation_checkpointing=True
    )
    trainer = one_row.build_trainer(arguments, tmp_path, one_row.StepTimer())
    trainer.train()
    assert len(trainer.train_dataset) == 3 * 2 * 3  # two steps are not counted
    assert (trainer.state.global_step, trainer.state.epoch) == (3, 1)
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())


@pytest.mark.parametrize("name", ["lora", "paper"])
def test_bfloat16_shape_of_unequal_depth(one_row, monkeypatch, name):
    """What llama8b goes through, in small and on a CPU."""
    target = {**TINY_LLAMA, "num_hidden_layers": 3, "vocab_size": 64}
    tiny = one_row.Shape(target, {**TINY_QWEN, "num_hidden_layers": 2}, tokens=12, dtype=torch.bfloat16)
    monkeypatch.setitem(one_row.SHAPES, "llama8b", tiny)
    arguments = one_row.BenchmarkArguments(shape="llama8b", rank=4, row=name, steps=1, accumulation=1)
    figures = one_row.measure_step(arguments)
    assert figures["seconds_per_step"] > 0
    # trained weights are float32, whatever the base
    assert figures["state_bytes"] == pytest.approx(16 * figures["trainable_parameters"], rel=0.01)


# ---- tables -----------------------------------------------------------------------------------------------------


def test_vary_measures_every_setting_once(benchmark, recorded, tmp_path, capsys):
    output = tmp_path / "growth.json"
    settings = {"vary": ["sources=1,5,20", "rank=8,16", "accumulation=1,8"], "output": output}
    assert benchmark.main(flags(settings)) == 0
    assert sorted(call[1:] for call in recorded if call[0] == "lora") == [(1, 8, 1), (1, 8, 8), (1, 16, 8)]
    assert len(recorded) == 9
    growth = json.loads(output.read_text())["growth"]
    assert list(growth) == ["sources", "rank", "accumulation"]
    assert [r["sources"] for r in growth["sources"] if r["row"] == "compact"] == [1, 5, 20]
    assert [r["ratio"] for r in growth["accumulation"] if r["row"] == "compact"] == [3.0, 1.25]
    out = capsys.readouterr().out
    assert "| 20 | compact | 8.000 | 28.000 | 3.50 | 0.250 | +2.00 | 2.00 |" in out
    assert all(f"| {name} | preset | plain s / step |" in out for name in growth)


def test_rows_are_told_at_once_and_kept_when_interrupted(benchmark, recorded, monkeypatch, tmp_path, capsys):
    output = tmp_path / "benchmark.json"
    measure = benchmark.run_row

    def interrupted(asked):
        if asked.row == "paper":
            raise KeyboardInterrupt
        return measure(asked)

    monkeypatch.setattr(benchmark, "run_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(flags({"output": output}))
    assert "compact, trainable_parameters 10, " in capsys.readouterr().out and not output.exists()
    monkeypatch.setattr(benchmark, "run_row", measure)
    assert benchmark.main(flags({"output": output})) == 0
    assert [call[0] for call in recorded] == ["lora", "compact", "paper"]  # each measured once
    assert [row["row"] for row in json.loads(output.read_text())["rows"]] == ["lora", "compact", "paper"]
    table_row = "| paper | 10 | 10.000 | 1.25 | 0.500 | 0.250 | 0.250 | 3.00 | +2.00 | 1.00 | 2.00 |"
    assert table_row in capsys.readouterr().out


# ---- errors -----------------------------------------------------------------------------------------------------

BAD_FLAGS = [
    ({"presets": ["huge"]}, ["'huge'", "paper, compact"]),
    ({"vary": ["tokens=1,2"]}, ["--vary", "'tokens=1,2'", "sources, rank, accumulation"]),
    ({"vary": ["sources=0,1"]}, ["--sources is 0"]),
    ({"vary": ["rank=8,16"], "shape": "demo"}, ["--rank is 16", "--shape"]),
    ({"vary": ["rank=8,16"], "exchange": True}, ["--vary", "--exchange"]),
    ({"exchange": True, "shape": "llama8b"}, ["--exchange", "llama8b"]),
    ({"tokens": 97, "shape": "demo"}, ["--tokens is 97", "96"]),
]


@pytest.mark.parametrize(("settings", "words"), BAD_FLAGS, ids=lambda value: str(value))
def test_flag_out_of_range_raises(benchmark, recorded, capsys, settings, words):
    error_line(capsys, benchmark.main, flags(settings), *words)
    assert not recorded


@pytest.mark.parametrize("memory", [None, 24])
def test_llama8b_without_a_gpu_that_holds_it_raises(benchmark, recorded, capsys, monkeypatch, memory):
    class Gpu:
        name, total_memory = "Small GPU", (memory or 0) * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: memory is not None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Gpu)
    found = f"there are {memory or 0:.1f}"
    error_line(capsys, benchmark.main, ["--shape=llama8b"], "--shape llama8b", "34 GiB", found, "llama8b-2layers")
    assert not recorded


def test_row_that_fails_raises(benchmark, capfd):
    asked = benchmark.BenchmarkArguments(shape="demo", row="huge")  # refused in the row's own process
    with pytest.raises(ChildProcessError, match="huge did not finish: exit code 2"):
        benchmark.run_row(asked)
    assert "error: " in capfd.readouterr().err
