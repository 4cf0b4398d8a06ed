"""Which engines can carry a fusion, and mixed precision that they would apply to the hypernetworks."""

import functools
import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, DynamoBackend
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

from conftest import make_args
from heterofusion.method.base_model import cast_base
from heterofusion.runtime.ranks import set_zero_init_dtype
from heterofusion.training.engines import check_engine, exclude_from_reduction


def accelerator(kind: DistributedType, precision: str = "no", **plugins) -> SimpleNamespace:
    """What check_engine reads of an Accelerator: real ones of these kinds start on several GPUs only."""
    return SimpleNamespace(distributed_type=kind, mixed_precision=precision, state=SimpleNamespace(**plugins))


def of_fsdp(precision: str = "no", **changes) -> SimpleNamespace:
    good = {"fsdp_version": 2, "auto_wrap_policy": transformer_auto_wrap_policy, "cpu_ram_efficient_loading": False}
    return accelerator(DistributedType.FSDP, precision, fsdp_plugin=SimpleNamespace(**(good | changes)))


def of_zero(**config) -> SimpleNamespace:
    return accelerator(
        DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(zero_stage=2, deepspeed_config=config)
    )


def in_parallel(backend: DynamoBackend = DynamoBackend.NO, cp: bool = False) -> SimpleNamespace:
    """What comes from the accelerate config, past the flags."""
    engine = accelerator(DistributedType.MULTI_GPU, dynamo_plugin=SimpleNamespace(backend=backend))
    engine.parallelism_config = SimpleNamespace(tp_enabled=False, cp_enabled=cp, sp_enabled=False)
    return engine


def test_good_engines_pass():
    partial = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={})
    check_engine(accelerator(DistributedType.NO, "fp16"))
    check_engine(accelerator(DistributedType.MULTI_GPU, "bf16"))
    for engine in (in_parallel(), of_fsdp(), of_fsdp(auto_wrap_policy=partial), of_zero(bf16={"enabled": "auto"})):
        check_engine(engine)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (of_fsdp(fsdp_version=1), "fsdp_version: 2"),
        (of_fsdp(auto_wrap_policy=size_based_auto_wrap_policy), "TRANSFORMER_BASED_WRAP"),
        (of_fsdp(auto_wrap_policy=None), "TRANSFORMER_BASED_WRAP"),
        (of_fsdp(cpu_ram_efficient_loading=True), "fsdp_cpu_ram_efficient_loading"),
        (of_fsdp("bf16"), "FSDP with mixed precision would cast"),
        (of_zero(bf16={"enabled": True}), "DeepSpeed with mixed precision would cast"),
        (of_zero(fp16={"enabled": True}), "DeepSpeed with mixed precision would cast"),
        (in_parallel(DynamoBackend.INDUCTOR), "INDUCTOR"),
        (in_parallel(cp=True), "context and sequence parallelism"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_engine_that_cannot_carry_a_fusion_raises(engine, message):
    with pytest.raises(ValueError, match=message):
        check_engine(engine)


def test_fsdp_that_became_ddp_is_said(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_engine(accelerator(DistributedType.MULTI_CPU))
    assert "this is plain DDP" in caplog.text


@pytest.mark.parametrize("flag", ["bf16_full_eval", "fp16_full_eval", "torch_compile"])
def test_flags_that_would_cast_or_compile_the_hypernetworks_raise(tmp_path, flag):
    with pytest.raises(ValueError, match=f"--{flag}"):
        make_args(tmp_path, **{flag: True})


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP"])
def test_bf16_of_a_sharding_engine_goes_to_the_base(tmp_path, monkeypatch, engine):
    """By flag or by the launcher; what the launcher said is there again for the next run of the process."""
    monkeypatch.setattr("transformers.training_args.TrainingArguments.__post_init__", lambda self: None)
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    args = make_args(tmp_path)
    assert not args.base_in_bf16
    args = make_args(tmp_path, bf16=True)
    assert args.base_in_bf16 and not args.bf16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for _ in range(2):
        assert make_args(tmp_path).base_in_bf16
        assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="float16 mixed precision is not supported with DeepSpeed and FSDP"):
        make_args(tmp_path)


def test_cast_base_leaves_lora_and_hypernetworks_alone(model):
    cast_base(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        kept = "lora_" in name or name.startswith("hypernetworks.")
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name


def test_zero_init_takes_the_dtype_of_the_base(monkeypatch):
    config = {"zero_optimization": {"stage": 3}}
    monkeypatch.setattr("heterofusion.runtime.ranks.deepspeed_integration.deepspeed_config", lambda: config)
    set_zero_init_dtype(torch.bfloat16)
    assert config["bf16"] == {"enabled": True} and config["fp16"] == {"enabled": False}
    set_zero_init_dtype(torch.float32)
    assert config["bf16"] == {"enabled": False} and config["fp16"] == {"enabled": False}
    monkeypatch.setattr("heterofusion.runtime.ranks.deepspeed_integration.deepspeed_config", lambda: None)
    set_zero_init_dtype(torch.float16)  # no DeepSpeed, nothing to do


def test_ddp_reduces_the_kept_parameters_only(model):
    exclude_from_reduction(model, model.hypernetworks, model.hypernetworks.alphas.values())
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    reduced = {name for name, p in model.named_parameters() if p.requires_grad} - ignored
    assert reduced == {f"hypernetworks.networks.{name}.alpha" for name in model.hypernetworks.networks}
    exclude_from_reduction(model, model.hypernetworks, model.hypernetworks.parameters())
    assert not list(model._ddp_params_and_buffers_to_ignore)
