"""Several processes give what one gives, on every engine: losses, gradients, adapters, checkpoints. CPU, gloo."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from forked import Server

ROOT = Path(__file__).parent.parent
PARITY = {
    "accumulation-1": {"accumulation": 1},
    "accumulation-4-checkpointing": {"accumulation": 4, "checkpointing": True},
}
# what a fusion with source labels has in place of the published method, and beside it
EXPANDED = {
    "accumulation": 2, "preset": "compact", "num_heads": 2, "extra_rank": 5, "extra_basis": "activations",
    "residual_scale": 0.5, "mixture": True,
}  # fmt: skip
# the highest loss is taken for the best, so that the first checkpoint is and not the last
BEST = {
    "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}  # fmt: skip
EVERYWHERE = {
    "accumulation-4-checkpointing": PARITY["accumulation-4-checkpointing"],
    "resume": {"kind": "resume"},
    "nan": {"kind": "poisoned", "steps": [1], "save_strategy": "steps", "save_steps": 1, "logging_steps": 100},
}
TRAINED = {
    "accumulation-1": PARITY["accumulation-1"],
    "expanded": EXPANDED,
    "clipped": {"accumulation": 2, "max_grad_norm": 0.1},
    "bf16": {"accumulation": 2, "bf16": True},
}
ALL = {**TRAINED, **EVERYWHERE, "best": {"kind": "resume", **BEST}, "resume-expanded": {"kind": "resume", **EXPANDED}}
# ZeRO-3 gathers every parameter of tiny layers by itself: it gets what ZeRO-2 and FSDP2 do not tell of it
SLOW = EVERYWHERE | {name: ALL[name] for name in ("expanded", "bf16")}
TWO = ["--num_processes", "2", "--mixed_precision", "no"]
# engine: flags of the launch, cases, share of base and of hypernetworks that a rank holds
ENGINES = {
    "single": (None, TRAINED | EVERYWHERE, 1, 1),
    "ddp": (["--config_file", "cpu_ddp.yaml"], ALL, 1, 1),
    "zero2": (["--config_file", "zero2.yaml", *TWO], ALL, 1, 1),
    "zero3": (["--config_file", "zero3.yaml", *TWO], SLOW, 0.5, 0.5),
    "fsdp2": (["--config_file", "fsdp2.yaml", *TWO], ALL, 0.5, 0.5),
}
SEVERAL = [engine for engine in ENGINES if engine != "single"]
FULL = ["ddp", "zero2", "fsdp2"]


def cases_of(cases: Iterable[str], engines: Iterable[str] = ENGINES) -> list[tuple[str, str]]:
    return [(engine, case) for engine in engines for case in cases if case in ENGINES[engine][1]]


def launch(server: Server, folder: Path, flags: list[str] | None, cases: dict) -> dict:
    """The worker's cases on one engine, in forks of a process that has imported everything."""
    if flags is not None:
        flags = [str(ROOT / "accelerate_configs" / flag) if flag.endswith(".yaml") else flag for flag in flags]
    for _ in range(2):  # gloo's native code aborts, once in some dozens of runs
        folder.mkdir()
        done = server.ask(folder=str(folder), cases=cases, launch=flags)
        if done.code == 0:
            return json.loads((folder / "results.json").read_text())
        if done.code != 6:
            break
        folder.rename(folder.with_name(f"{folder.name}-aborted"))
    pytest.fail(f"{flags}: {done.code} {done.log[-8000:]}")


@pytest.fixture(scope="module")
def server():
    server = Server(ROOT / "tests" / "engine_worker.py")
    yield server
    server.close()


@pytest.fixture(scope="module")
def runs(server, tmp_path_factory):
    """Results of an engine and its folder, launched when they are first asked for; one launch for all cases."""
    folder = tmp_path_factory.mktemp("engines")
    results: dict[str, dict | None] = {}

    def run(engine: str) -> tuple[dict, Path]:
        if engine not in results:
            results[engine] = None
            results[engine] = launch(server, folder / engine, *ENGINES[engine][:2])
        if results[engine] is None:
            pytest.fail(f"{engine} failed before")
        return results[engine], folder / engine

    return run


pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.mark.parametrize("engine", ENGINES)
def test_engine_really_is_what_it_is_called(runs, engine):
    *_, base, hypernetworks = ENGINES[engine]
    for _, name in cases_of(PARITY, [engine]):
        result = runs(engine)[0][name]
        assert result["engine"] == {"single": "plain", "ddp": "plain"}.get(engine, engine)
        assert result["world"] == (1 if engine == "single" else 2)
        assert result["wrapped"] == (engine == "ddp")
        assert result["held_share"]["base"] == pytest.approx(base, abs=1e-3)
        assert result["held_share"]["hypernetworks"] == pytest.approx(hypernetworks, abs=1e-3)


@pytest.mark.parametrize(("engine", "case"), cases_of(PARITY))
def test_losses_and_gradients_do_not_depend_on_ranks_or_accumulation(runs, engine, case):
    """Labels per micro-batch are uneven and RDM is on; the reference is one process without accumulation."""
    assert len(runs(engine)[0][case]["gradients"]) > 50
    check_same_training(runs("single")[0]["accumulation-1"], runs(engine)[0][case])


@pytest.mark.parametrize(("engine", "case"), cases_of(["expanded", "clipped"], SEVERAL))
def test_expanded_compact_form_source_labels_and_clipped_gradients_agree_too(runs, engine, case):
    reference, found = runs("single")[0][case], runs(engine)[0][case]
    if case == "clipped":  # DeepSpeed clips inside its step, so its gradients are seen before, others' after
        reference, found = {**reference, "gradients": {}}, {**found, "gradients": {}}
    check_same_training(reference, found)
    assert len(found["part_losses"]) == (12 if case == "expanded" else 0)
    assert found["part_losses"] == pytest.approx(reference["part_losses"], abs=1e-5)


def test_zero1_agrees_as_zero2_does(runs, server, tmp_path):
    """It differs from ZeRO-2 in where gradients lie: one case tells."""
    case = {"accumulation-2": {"accumulation": 2}}
    found = launch(server, tmp_path / "zero1", ["--config_file", "zero1.yaml", *TWO], case)["accumulation-2"]
    assert found["engine"] == "zero1" and found["rank_spread"] == [0] * 5
    check_same_training(runs("single")[0]["accumulation-1"], found)


def test_clipping_changes_the_run(runs):
    single = runs("single")[0]
    # AdamW hardly minds a factor that all gradients have, so the difference is small; parity is ten times closer
    assert single["clipped"]["losses"][2:] != pytest.approx(single["accumulation-1"]["losses"][2:], abs=5e-5)


def check_same_training(reference: dict, found: dict) -> None:
    for name in ("losses", "lm_losses", "rdm_losses"):
        assert len(found[name]) == 4
        assert found[name] == pytest.approx(reference[name], abs=1e-5), name
    assert found["grad_norms"] == pytest.approx(reference["grad_norms"], abs=1e-4)
    assert found["eval_loss"] == pytest.approx(reference["eval_loss"], abs=1e-5)
    assert found["gradients"].keys() == reference["gradients"].keys()
    for name, values in reference["gradients"].items():
        torch.testing.assert_close(
            torch.tensor(found["gradients"][name]), torch.tensor(values), atol=1e-5, rtol=0, msg=name
        )


@pytest.mark.parametrize(("engine", "case"), [*cases_of(PARITY), *cases_of(["expanded"], SEVERAL)])
def test_exported_adapters_agree(runs, engine, case):
    """With extra rows too: sharded or not, all ranks see the inputs of the same examples."""
    reference = "expanded" if case == "expanded" else "accumulation-1"
    wanted = load_file(runs("single")[1] / reference / "adapter_model.safetensors")
    found = load_file(runs(engine)[1] / case / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=0, msg=name)
    basis = json.loads((runs(engine)[1] / case / "fusion.json").read_text()).get("basis")
    assert case != "expanded" or (basis["scaled_by"], basis["examples"]) == ("inputs", 24)


@pytest.mark.parametrize(("engine", "case"), cases_of([*PARITY, "expanded", "clipped", "bf16"], SEVERAL))
def test_all_ranks_have_the_same_hypernetworks_after_every_step(runs, engine, case):
    """After each step, before the ranks are aligned at the end, and then."""
    assert runs(engine)[0][case]["rank_spread"] == [0] * 5


@pytest.mark.parametrize(("engine", "case"), cases_of([*PARITY, "expanded", "bf16"]))
def test_hypernetworks_run_once_per_optimizer_step(runs, engine, case):
    """One forward with gradient, followed by one backward; with accumulation one without gradient."""
    result = runs(engine)[0][case]
    assert result["live_forwards"] == [0, 1, 2, 3]
    assert result["other_forwards"] == ([] if case == "accumulation-1" else [0, 1, 2, 3])


@pytest.mark.parametrize(("engine", "case"), cases_of(["bf16"]))
def test_bf16_leaves_the_hypernetworks_in_float32(runs, engine, case):
    """DeepSpeed and FSDP would cast every parameter: here they get a bfloat16 base; one process and DDP autocast."""
    result = runs(engine)[0][case]
    assert result["update_dtypes"] == ["torch.float32"]
    cast = engine in ("zero2", "zero3", "fsdp2")
    assert ("torch.bfloat16" in result["base_dtypes"]) == cast
    assert result["losses"] == pytest.approx(runs("single")[0]["accumulation-1"]["losses"], abs=0.02)
    assert result["losses"] != runs("single")[0]["accumulation-1"]["losses"]


@pytest.mark.parametrize(("engine", "case"), cases_of(["resume", "resume-expanded"]))
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(runs, engine, case):
    """The newest checkpoint was cut short, so it goes on from the one before."""
    result = runs(engine)[0][case]
    assert result["steps_made"] == 1 and result["steps"] == 3
    assert result["different"] == []
    assert not [name for name in result["files"] if name.startswith(("adapter_model", "model"))]


@pytest.mark.parametrize("engine", FULL)
def test_best_hypernetworks_are_restored(runs, engine):
    result = runs(engine)[0]["best"]
    assert result["eval_loss"] == pytest.approx(result["best_metric"], abs=1e-6)
    assert result["last_metric"] != pytest.approx(result["best_metric"], abs=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_on_one_rank_stops_all_with_step_and_role(runs, engine):
    result = runs(engine)[0]["nan"]
    assert result["error"].startswith("step 2: ")
    assert "q_proj_r4" in result["error"] and "is not finite" in result["error"]
    assert result["checkpoints"] == ["checkpoint-1"]
    assert "checkpoint-1. Lower --learning_rate" in result["error"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="FSDP2 through accelerate on GPUs needs two of them")
def test_fsdp2_on_gpus_agrees_with_one_process(tmp_path):
    """With one process on a GPU: RDM draws its noise on the device, and a CPU would draw another."""
    server = Server(ROOT / "tests" / "engine_worker.py", ENGINE_WORKER_ON_GPU="1", DS_ACCELERATOR="cuda")
    result = launch(server, tmp_path / "two", ["--config_file", "fsdp2.yaml", *TWO], PARITY)
    one = launch(server, tmp_path / "one", None, PARITY)
    server.close()
    for case in PARITY:
        assert result[case]["engine"] == "fsdp2" and result[case]["held_share"]["base"] == pytest.approx(0.5, abs=1e-3)
        assert result[case]["losses"] == pytest.approx(one["accumulation-1"]["losses"], abs=1e-4)
