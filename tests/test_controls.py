"""Source controls: what stays and what goes of the sources, and that a control is told, resumed and pushed as none."""

import json
import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from builders import WEIGHTS
from conftest import TINY, fresh_base
from heterofusion import HeteroFusionModel, MethodConfig, control_sources, export_adapter, load_adapter, push_adapter
from heterofusion.adapters.controls import control_record, derangement, rotate_rows
from heterofusion.publish.write import ExportError
from heterofusion.zoo import zoo_path
from recipe_runner import MISTRAL, QWEN, TARGET, error_line, flags, plan, record, succeeds, train

pytestmark = pytest.mark.usefixtures("logging_restored")


def with_modules(adapter, change):
    return replace(adapter, modules={path: change(module) for path, module in adapter.modules.items()})


def in_float32(module):
    return replace(module, lora_A=module.lora_A.float(), lora_B=module.lora_B.float())


@pytest.fixture(scope="module")
def experts():
    """Real experts of two families; their files are in float16."""
    names = (("qwen2", "ner_garden"), ("mistral", "re_market"))
    return [with_modules(load_adapter(zoo_path(*name)), in_float32) for name in names]


def pairs(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.modules.keys() == other.modules.keys()
        for path, module in one.modules.items():
            yield module, other.modules[path]


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean squared cosine between the column spaces of two matrices: 1 for the same, k / rows by chance."""
    first, second = (torch.linalg.qr(matrix.double()).Q for matrix in (one, other))
    return float((first.T @ second).square().sum() / min(first.shape[1], second.shape[1]))


# ---- noise ------------------------------------------------------------------------------------------------------


def test_noise_keeps_norms_and_spectra_of_a_b_and_their_product(experts):
    for before, after in pairs(experts, control_sources(experts, "noise", 1)):
        assert (after.path, after.scaling) == (before.path, before.scaling)
        for name in ("lora_A", "lora_B"):
            old, new = getattr(before, name), getattr(after, name)
            assert (new.shape, new.dtype) == (old.shape, old.dtype) and new.is_contiguous()
            old, new = old.double(), new.double()
            assert new.norm().item() == pytest.approx(old.norm().item(), rel=1e-5)
            assert_close_spectra(new, old)
        assert_close_spectra(*(module.lora_B.double() @ module.lora_A.double() for module in (after, before)))


def assert_close_spectra(found: torch.Tensor, wanted: torch.Tensor) -> None:
    spectrum = torch.linalg.svdvals(wanted)
    torch.testing.assert_close(torch.linalg.svdvals(found), spectrum, rtol=0, atol=1e-5 * float(spectrum[0]))


def test_noise_leaves_no_direction_and_each_draw_is_another(experts):
    one, again, two = (control_sources(experts, "noise", seed) for seed in (1, 1, 2))
    for first, second in pairs(one, again):
        assert torch.equal(first.lora_A, second.lora_A) and torch.equal(first.lora_B, second.lora_B)
    for others in (experts, two):
        overlaps, chances = [], []
        for first, second in pairs(one, others):
            for A, B in ((first.lora_A.T, second.lora_A.T), (first.lora_B, second.lora_B)):
                overlaps.append(overlap(A, B))
                chances.append(A.shape[1] / A.shape[0])
        assert max(chances) < 0.5 and max(overlaps) < 0.75
        assert sum(overlaps) / len(overlaps) == pytest.approx(sum(chances) / len(chances), rel=0.1)
    twice = control_sources([experts[0], experts[0]], "noise", 1)
    assert not any(torch.equal(a.lora_B, b.lora_B) for a, b in pairs(twice[:1], twice[1:]))  # a stream per source


def test_rotation_is_haar_random():
    """Rotations of a unit vector are uniform on the sphere: mean 0, covariance I / n; det takes both signs."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.zeros(4, 1).double()
    vector[0] = 1
    draws = torch.cat([rotate_rows(vector, generator) for _ in range(4000)], dim=1)
    assert draws.mean(1).abs().max() < 5 * 0.5 / math.sqrt(4000)
    torch.testing.assert_close(draws @ draws.T / 4000, torch.eye(4).double() / 4, atol=0.02, rtol=0)
    frames = torch.stack([rotate_rows(torch.eye(2).double(), generator) for _ in range(400)])
    torch.testing.assert_close(frames.mT @ frames, torch.eye(2).double().expand(400, 2, 2))
    assert 120 < int((torch.linalg.det(frames) > 0).sum()) < 280


def test_noise_of_half_precision_and_of_zeros(experts):
    def half(module):
        return replace(module, lora_A=module.lora_A.bfloat16(), lora_B=torch.zeros_like(module.lora_B))

    halves = [with_modules(expert, half) for expert in experts]
    for before, after in pairs(halves, control_sources(halves, "noise", 0)):
        assert after.lora_A.dtype == torch.bfloat16 and not after.lora_B.any()
        assert float(after.lora_A.float().norm()) == pytest.approx(float(before.lora_A.float().norm()), rel=0.01)


# ---- shuffle ----------------------------------------------------------------------------------------------------


def test_shuffle_moves_every_pair_once_to_another_module_of_its_shapes(experts):
    shuffled = control_sources(experts, "shuffle", 1)
    for before, after in zip(experts, shuffled, strict=True):
        places = {module.lora_B.data_ptr(): path for path, module in before.modules.items()}
        origins = {path: places.pop(module.lora_B.data_ptr()) for path, module in after.modules.items()}  # each once
        assert not places
        for path, origin in origins.items():
            moved, source, there = after.modules[path], before.modules[origin], before.modules[path]
            assert moved.path == path != origin
            assert moved.lora_A is source.lora_A and moved.scaling == source.scaling
            assert (moved.lora_A.shape, moved.lora_B.shape) == (there.lora_A.shape, there.lora_B.shape)
        assert any(path.split(".")[-1] != origin.split(".")[-1] for path, origin in origins.items())
    same, other = (control_sources(experts, "shuffle", seed) for seed in (1, 2))
    assert all(one.lora_B is two.lora_B for one, two in pairs(shuffled, same))
    assert any(one.lora_B is not two.lora_B for one, two in pairs(shuffled, other))


def test_module_without_another_of_its_shapes_stays_and_is_told(experts, caplog):
    odd = replace(next(iter(experts[0].modules.values())), lora_B=torch.ones(7, 4))
    source = replace(experts[0], modules={**experts[0].modules, "odd": odd})
    shuffled = control_sources([source, experts[1]], "shuffle", 0)
    assert shuffled[0].modules["odd"].lora_B is odd.lora_B
    words = f"source {source.name}: 1 of {len(source.modules)} modules stay, no other has their shapes, such as odd"
    assert [line.getMessage() for line in caplog.records if line.levelno == logging.WARNING] == [words]
    assert control_record(shuffled) == "shuffle, seed 0"


def test_derangements_are_equally_likely():
    generator = torch.Generator().manual_seed(0)
    draws = [tuple(derangement(4, generator)) for _ in range(1800)]
    counts = {order: draws.count(order) for order in set(draws)}
    assert len(counts) == 9 and all(150 < count < 250 for count in counts.values())
    assert all(index != place for order in counts for place, index in enumerate(order))
    assert derangement(2, generator) == [1, 0]


# ---- in the library ---------------------------------------------------------------------------------------------


def test_zero_is_zero_and_bad_arguments_raise(sources):
    zeros = control_sources(sources, "zero", 0)
    assert not any(module.lora_A.any() or module.lora_B.any() for _, module in pairs(sources, zeros))
    with pytest.raises(ValueError, match=r"'random' is unknown; choose one of noise, shuffle, zero"):
        control_sources(sources, "random", 0)
    for seed in (-1, 1.5, True, None):
        with pytest.raises(ValueError, match=r"seed of the source control is .*integer of at least 0"):
            control_sources(sources, "noise", seed)
    with pytest.raises(ValueError, match=r"is a control already \(zero\)"):
        control_sources(zeros, "noise", 0)
    single = replace(sources[0], modules=dict([*sources[0].modules.items()][:1]))
    with pytest.raises(ValueError, match=r"cannot be shuffled: no two of its 1 modules .*; choose noise or zero"):
        control_sources([single], "shuffle", 0)


def test_library_users_record_and_never_push_controls(tmp_path, target, sources):
    """One real source, one noise source: the record, the card, the pictures and a refused push say which."""
    mixed = [sources[0], *control_sources(sources[1:], "noise", 5)]
    model = HeteroFusionModel.from_adapters(fresh_base(), target, mixed, MethodConfig(**TINY))
    export_adapter(model, tmp_path)
    found = record(tmp_path)
    assert found["source_control"] == "noise, seed 5"
    assert [entry["sha256"] for entry in found["sources"]] == [source.sha256 for source in sources]
    made = found["made_by"]
    assert made["source_control"] == "noise" and made["cost"].pop("peak_memory_bytes") > 0
    assert made["cost"] == {"seconds": None, "device": "cpu"}  # nothing says what the training took
    assert "tensors of source adapters were replaced by random" in (tmp_path / "README.md").read_text()
    told = json.loads((tmp_path / "diagnostics.json").read_text())["sources"]
    assert [entry.get("control") for entry in told] == [None, "noise"]
    with pytest.raises(ExportError, match=r"holds a control \(source_control noise in fusion\.json\)"):
        push_adapter(tmp_path, "fused")


# ---- in the recipes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(common, tmp_path_factory) -> SimpleNamespace:
    """One step with real sources and with each control, with a checkpoint."""
    folder = tmp_path_factory.mktemp("controls")
    adapters = {"target_adapter": TARGET, "source_adapters": [QWEN, MISTRAL]}
    values = {**common, **adapters, "max_steps": 1, "save_steps": 1, "seed": 7}
    logs = {}
    for kind in ("real", "noise", "shuffle", "zero"):
        control = None if kind == "real" else kind
        logs[kind] = succeeds(train.main, flags({**values, "output_dir": folder / kind, "source_control": control}))
    return SimpleNamespace(folder=folder, values=values, logs=logs)


@pytest.mark.parametrize(
    ("kind", "control", "words"),
    [
        ("noise", "noise, seed 7", "replaced by random directions of the same norms and spectra"),
        ("shuffle", "shuffle, seed 7", "moved to other modules of the same shapes"),
        ("zero", "zero", "replaced by zeros"),
    ],
)
def test_record_card_and_log_say_that_it_is_a_control(runs, kind, control, words):
    found, real = record(runs.folder / kind), record(runs.folder / "real")
    assert (found["source_control"], found["made_by"]["source_control"]) == (control, kind)
    assert (real["source_control"], real["made_by"]["source_control"]) == (None, None)
    assert found["sources"] == real["sources"]  # with the hashes of the files
    assert "CONTROL" not in (runs.folder / "real/README.md").read_text()
    body = (runs.folder / kind / "README.md").read_text().split("---\n")[2].strip()
    title, first = body.split("\n\n")[:2]
    assert title == f"# CONTROL ({kind}): Fused LoRA adapter"
    assert first.startswith(f"This adapter is a CONTROL: the tensors of source adapters were {words}")
    assert f"source control: the tensors of source adapters were {words} ({control})" in runs.logs[kind]
    weights = [load_file(runs.folder / name / WEIGHTS) for name in (kind, "real")]
    assert any(not torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


@pytest.mark.parametrize(
    ("folder", "words", "changed"),
    [
        ("real", ["null"], {"source_control": "noise"}),
        ("noise", ["this run has null"], {}),
        ("noise", ['"noise, seed 7"', '"zero"'], {"source_control": "zero"}),
        ("noise", ['"noise, seed 7"', '"noise, seed 8"'], {"source_control": "noise", "seed": 8}),
    ],
)
def test_resuming_with_another_control_or_draw_raises(runs, capsys, folder, words, changed):
    values = {**runs.values, "output_dir": runs.folder / folder, "resume_from_checkpoint": True, **changed}
    error_line(capsys, train.main, flags(values), runs.folder / folder, "another source_control", *words)


@pytest.mark.parametrize(("start", "control"), [("real", "noise"), ("noise", None), ("noise", "zero")])
def test_hypernetworks_of_other_sources_are_no_start_for_a_control(runs, fails, start, control):
    words = (f"of the control {'none' if start == 'real' else start}", f"this run is of {control or 'none'}")
    fails(*words, init_hypernetwork_from=runs.folder / start, source_control=control)


def test_pushing_a_control_is_refused(fails):
    words = "--push_to_hub is true together with --source_control zero"
    fails(words, source_control="zero", push_to_hub=True, target_adapter="nowhere")


def test_dry_run_and_plan_show_the_control(arguments, capsys, tmp_path):
    assert train.main(flags({**arguments, "dry_run": True, "source_control": "shuffle", "seed": 3})) == 0
    assert capsys.readouterr().out.startswith("CONTROL: the tensors of source adapters were moved")
    values = {"target_adapter": TARGET, "source_adapters": [QWEN], "output": tmp_path / "plan.json"}
    for kind in ("zero", None):
        assert plan.main(flags({**values, "source_control": kind, "seed": 3})) == 0
        assert capsys.readouterr().out.startswith("CONTROL" if kind else "target")
        assert json.loads((tmp_path / "plan.json").read_text())["source_control"] == kind
