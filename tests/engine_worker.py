"""Runs small fusions on an engine and writes what rank 0 saw; started by test_distributed.py."""

import importlib
import importlib.util
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, TrainerCallback

from conftest import GOLDEN, TINY, TokenRows, perturb
from forked import serve
from heterofusion import HeteroFusionConfig, HeteroFusionModel, HeteroFusionTrainer, load_adapter
from heterofusion.runtime.sharding import whole_tensors
from heterofusion.training.checkpoints import COMPLETE_FILE
from heterofusion.training.engines import engine_name
from heterofusion.training.mixture import Mixture
from heterofusion.training.nonfinite import NonFiniteError
from test_soft_labels_training import SoftRows

EXAMPLES_PER_STEP = 8
ON_GPU = os.environ.get("ENGINE_WORKER_ON_GPU") == "1"


class PoisonedTrainer(HeteroFusionTrainer):
    """The loss of the last rank is NaN at the given optimizer steps, counted from 0."""

    poisoned: tuple[int, ...] = ()

    def _loss(self, model, inputs, num_items_in_batch):
        loss, outputs = super()._loss(model, inputs, num_items_in_batch)
        if self.state.global_step in self.poisoned and self.args.process_index == self.args.world_size - 1:
            loss = loss * float("nan")
        return loss, outputs


def make_trainer(
    folder: Path, accumulation: int = 1, checkpointing: bool = False, mixture: bool = False, **more
) -> PoisonedTrainer:
    """A fusion of the same examples per optimizer step whatever accumulation and number of ranks."""
    world = PartialState().num_processes
    settings = {
        **TINY, "output_dir": str(folder), "max_steps": 4, "learning_rate": 1e-3, "rdm_weight": 0.5,
        "per_device_train_batch_size": EXAMPLES_PER_STEP // (accumulation * world), "save_strategy": "no",
        "gradient_accumulation_steps": accumulation, "activation_checkpointing": checkpointing, "logging_steps": 1,
        "train_sampling_strategy": "sequential", "disable_tqdm": True, "max_grad_norm": 1e9, "use_cpu": not ON_GPU,
    }  # fmt: skip
    if mixture:  # 3 of 8 are replay, an epoch has three steps
        settings["train_sampling_strategy"] = "random"
    rows = Mixture(TokenRows(9), SoftRows(15), 0.375, 0.3) if mixture else TokenRows(16)
    args = HeteroFusionConfig(**(settings | more))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not ON_GPU:
        # accelerate takes its FSDP path on GPUs only; on gloo it would be DDP without a word
        assert args.world_size == world
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / "base_llama")
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":  # transformers partitions it while it is loaded
        assert all(hasattr(parameter, "ds_id") for parameter in base.parameters())
    sources = [load_adapter(GOLDEN / name) for name in ("source_qwen2", "source_mistral")]
    model = perturb(HeteroFusionModel.from_adapters(base, load_adapter(GOLDEN / "target_llama"), sources, args))
    trainer = PoisonedTrainer(model, args, train_dataset=rows, eval_dataset=TokenRows(4, seed=5))
    if engine_name(trainer.accelerator) == "zero3":  # else parameters this small stay whole
        config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return trainer


class KeepGradients(TrainerCallback):
    """The hypernetworks' gradients at the first optimizer step, whole, whatever engine holds them."""

    def __init__(self, trainer: HeteroFusionTrainer):
        self.trainer = trainer
        self.gradients: dict[str, list] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.is_deepspeed_enabled:
            engine = self.trainer.accelerator.deepspeed_engine_wrapped.engine
            step = engine.step
            engine.step = lambda: (self.keep(), step())

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.trainer.is_deepspeed_enabled:
            self.keep()

    def keep(self):
        if self.gradients:
            return
        for name, parameter in self.trainer.fusion_model.hypernetworks.named_parameters():
            if self.trainer.is_deepspeed_enabled:
                from deepspeed.utils import safe_get_full_grad

                gradient = safe_get_full_grad(parameter)
            else:
                gradient = parameter.grad
            if isinstance(gradient, DTensor):
                gradient = gradient.full_tensor()
            self.gradients[name] = gradient.flatten().tolist()


def train(folder: Path, **case) -> dict:
    trainer = make_trainer(folder, **case)
    model = trainer.fusion_model
    gradients = KeepGradients(trainer)
    trainer.add_callback(gradients)
    spread = Spread(model)
    trainer.add_callback(spread)
    forwards, dtypes = [], set()

    def count(module, args, kwargs, output):
        dtypes.add(str(output.update.dtype))
        if not kwargs["diagnostics"]:  # a log line runs the hypernetworks once more
            forwards.append((torch.is_grad_enabled(), trainer.state.global_step))

    name = next(name for name in model.hypernetworks.networks if name.startswith("q_proj_r"))
    handle = model.hypernetworks.networks[name].register_forward_hook(count, with_kwargs=True)
    trainer.train()
    handle.remove()
    log = [entry for entry in trainer.state.log_history if "lm_loss" in entry]
    trainer.save_model()
    return {
        "engine": engine_name(trainer.accelerator),
        "wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "world": PartialState().num_processes,
        "held_share": held_share(model),
        "losses": [entry["loss"] for entry in log],
        "lm_losses": [entry["lm_loss"] for entry in log],
        "rdm_losses": [entry["rdm_loss"] for entry in log],
        "part_losses": [
            entry[name] for entry in log for name in ("loss_replay", "loss_labels", "loss_soft") if name in entry
        ],
        "grad_norms": [entry["grad_norm"] for entry in log],
        "gradients": gradients.gradients,
        "rank_spread": [*spread.steps, rank_spread(model)],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "live_forwards": [step for live, step in forwards if live],
        "other_forwards": [step for live, step in forwards if not live],
        "update_dtypes": sorted(dtypes),
        "base_dtypes": sorted({str(p.dtype) for n, p in model.named_parameters() if not p.requires_grad}),
    }


def resume(folder: Path, **case) -> dict:
    """An uninterrupted run; then one that goes on from its second step, past a newer checkpoint that is cut short."""
    case = {"accumulation": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 3, **case}
    whole = make_trainer(folder, **case)
    whole.train()
    wanted = parameters(whole.fusion_model)
    if case.get("load_best_model_at_end"):
        evaluations = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
        return {
            "eval_loss": whole.evaluate()["eval_loss"],
            "best_metric": whole.state.best_metric,
            "last_metric": evaluations[-1],
        }
    if PartialState().is_main_process:
        (folder / "checkpoint-3" / COMPLETE_FILE).unlink()
    PartialState().wait_for_everyone()
    again = make_trainer(folder, **case)
    spread = Spread(again.fusion_model)
    again.add_callback(spread)
    again.train(resume_from_checkpoint=True)
    found = parameters(again.fusion_model)
    return {
        "steps_made": len(spread.steps),
        "steps": again.state.global_step,
        "different": [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)],
        "files": sorted(path.name for path in (folder / "checkpoint-2").iterdir()),
    }


class Spread(TrainerCallback):
    """Largest difference between ranks after every optimizer step."""

    def __init__(self, model: HeteroFusionModel):
        self.model = model
        self.steps: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(rank_spread(self.model))


def poisoned(folder: Path, steps: list[int], **case) -> dict:
    trainer = make_trainer(folder, accumulation=2, **case)
    trainer.poisoned = tuple(steps)
    error = None
    try:
        trainer.train()
    except NonFiniteError as raised:
        error = str(raised)
    return {"error": error, "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*"))}


def parameters(model: HeteroFusionModel) -> dict[str, torch.Tensor]:
    return whole_tensors(model.hypernetworks.named_parameters())


def rank_spread(model: HeteroFusionModel) -> float:
    """Largest difference of a hypernetwork's parameter between ranks."""
    flat = torch.cat([tensor.flatten() for tensor in parameters(model).values()])
    if not dist.is_initialized():
        return 0.0
    flat = flat.to(PartialState().device)  # NCCL reduces nothing on the CPU
    highest, lowest = flat.clone(), flat.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    return float((highest - lowest).max())


def held_share(model: torch.nn.Module) -> dict[str, float]:
    """Share of the elements that this rank holds, of the frozen base and of the hypernetworks."""
    held = {"base": 0, "hypernetworks": 0}
    total = dict(held)
    for parameter in model.parameters():
        part = "hypernetworks" if parameter.requires_grad else "base"
        if hasattr(parameter, "ds_tensor"):
            held[part] += parameter.ds_tensor.numel()
            total[part] += parameter.ds_numel
        else:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            held[part] += local.numel()
            total[part] += parameter.numel()
    return {part: held[part] / total[part] for part in held}


def run(folder: str, cases: dict[str, dict]) -> int:
    state = PartialState(cpu=not ON_GPU)
    kinds = {"train": train, "resume": resume, "poisoned": poisoned}
    results = {}
    for name, case in cases.items():
        results[name] = kinds[case.pop("kind", "train")](Path(folder, name), **case)
    if state.is_main_process:
        Path(folder, "results.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    importlib.import_module("transformers.models.llama.modeling_llama")
    if importlib.util.find_spec("deepspeed"):
        importlib.import_module("deepspeed")
    serve(run)
