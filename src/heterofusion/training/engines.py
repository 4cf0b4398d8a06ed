"""Which engines (DDP, ZeRO, FSDP2) can carry a fusion, and how a fusion is made ready for its engine."""

import logging
import os
from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from heterofusion.method.model import HeteroFusionModel
from heterofusion.runtime.errors import UserError

logger = logging.getLogger(__name__)

DATA_PARALLEL = {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
# Engines on which one backward of the hypernetworks per window is tested to give the same gradient.
ONCE_PER_WINDOW = {*DATA_PARALLEL, DistributedType.NO, DistributedType.DEEPSPEED, DistributedType.FSDP}
_CASTS = (
    "{engine} with mixed precision would cast the hypernetworks, which must stay float32; leave bf16 and fp16 out of "
    "its config: with --bf16 true, or --dtype bfloat16, the frozen base alone is bfloat16"
)


def engine_name(accelerator: Accelerator) -> str:
    """`plain` (one process, DDP), `zero1`, `zero2`, `zero3` or `fsdp2`: who can read whose optimizer states."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    return "fsdp2" if accelerator.distributed_type == DistributedType.FSDP else "plain"


def engine_record(accelerator: Accelerator) -> dict[str, Any]:
    """What must agree for optimizer states to be read: ZeRO writes them in as many parts as there are ranks."""
    name = engine_name(accelerator)
    return {"engine": name, "processes": accelerator.num_processes if name.startswith("zero") else None}


def refuse_data_parallel(args: TrainingArguments) -> None:
    """Refuse several GPUs in one process: replicas of DataParallel do not see the live updates of a fusion."""
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs in one process would use DataParallel, which is not supported; "
            "start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU"
        )


def check_engine(accelerator: Accelerator) -> None:
    """Refuse engines that cannot carry a fusion, or would cast the hypernetworks."""
    dynamo = getattr(accelerator.state, "dynamo_plugin", None)
    if dynamo is not None and dynamo.backend != DynamoBackend.NO:
        raise UserError(
            f"compiling the model ({dynamo.backend.value}) is not supported: the micro-batches of an accumulation "
            "window pass the compiled wrapper by; leave dynamo_config out of the accelerate config"
        )
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled):
        raise UserError("tensor, context and sequence parallelism are not supported; leave parallelism_config out")
    if accelerator.distributed_type in DATA_PARALLEL and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        logger.warning("accelerate runs FSDP on GPUs only: this is plain DDP, every rank holds the whole base")
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)
        wanted = {  # what the config has to say, whether it does, and why
            "fsdp_version: 2": (plugin.fsdp_version == 2, "FSDP1 does not keep single parameters"),
            "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP": (
                policy is transformer_auto_wrap_policy, "the hypernetworks are gathered apart from the base"
            ),
            "fsdp_cpu_ram_efficient_loading: false": (
                not plugin.cpu_ram_efficient_loading, "else all ranks but one leave the target adapter unread"
            ),
        }  # fmt: skip
        for setting, (good, reason) in wanted.items():
            if not good:
                raise UserError(f"set {setting} in the accelerate config: {reason}")
        if accelerator.mixed_precision != "no":
            raise UserError(_CASTS.format(engine="FSDP"))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        if any(config.get(name, {}).get("enabled") is True for name in ("bf16", "fp16")):
            raise UserError(_CASTS.format(engine="DeepSpeed"))


def exclude_from_reduction(model: nn.Module, excluded: nn.Module, kept: Iterable[Tensor]) -> None:
    """Let DDP leave the gradients of a part of a model alone, but for those `kept`: it refuses to wrap nothing."""
    keep = {id(parameter) for parameter in kept}
    part = {id(parameter) for parameter in excluded.parameters()} - keep
    names = [name for name, parameter in model.named_parameters() if id(parameter) in part]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def set_up_engine(model: HeteroFusionModel, accelerator: Accelerator, once_per_window: bool, ddp_reduce: str) -> None:
    """Get a model ready for its engine, before it is wrapped; hypernetworks may backpropagate once per window.

    `ddp_reduce` is `updates` if DDP ranks are to exchange the gradient of the updates, where the engine allows it.
    """
    updates, hypernetworks, engine = model.updates, model.hypernetworks, accelerator.distributed_type
    offloads = engine in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    updates.predictor.device = accelerator.device if offloads else None
    updates.average_over_ranks = once_per_window and engine in DATA_PARALLEL and ddp_reduce == "updates"
    kept = hypernetworks.alphas.values() if updates.average_over_ranks else hypernetworks.parameters()
    exclude_from_reduction(model, hypernetworks, kept)
    if engine == DistributedType.FSDP:  # a unit of their own can run outside the base's forward
        plugin = accelerator.state.fsdp_plugin
        names = plugin.transformer_cls_names_to_wrap or getattr(model.get_base_model(), "_no_split_modules", None)
        plugin.transformer_cls_names_to_wrap = sorted({*(names or []), type(hypernetworks).__name__})
