"""Runs small fusions on the engine it is launched on and writes what rank 0 saw; started by test_distributed.py."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from conftest import GOLDEN, TINY, TokenRows, perturb
from heterofusion import HeteroFusionConfig, HeteroFusionModel, HeteroFusionTrainer, load_adapter
from heterofusion.export import export_adapter

EXAMPLES_PER_STEP = 8


def run_case(folder: Path, accumulation: int, checkpointing: bool, steps: int, world: int) -> dict:
    """Train on the same examples per optimizer step whatever accumulation and number of ranks."""
    args = HeteroFusionConfig(
        **TINY, output_dir=str(folder), max_steps=steps, learning_rate=1e-3, rdm_weight=0.5, use_cpu=True,
        per_device_train_batch_size=EXAMPLES_PER_STEP // (accumulation * world), save_strategy="no",
        gradient_accumulation_steps=accumulation, activation_checkpointing=checkpointing, logging_steps=1,
        train_sampling_strategy="sequential", disable_tqdm=True, max_grad_norm=1e9,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / "base_llama")
    sources = [load_adapter(GOLDEN / name) for name in ("source_qwen2", "source_mistral")]
    model = perturb(HeteroFusionModel.from_adapters(base, load_adapter(GOLDEN / "target_llama"), sources, args))
    trainer = HeteroFusionTrainer(model, args, train_dataset=TokenRows(16))
    gradients: dict[str, list] = {}

    def keep(*_, **__):
        if not gradients:
            gradients.update({name: p.grad.flatten().tolist() for name, p in model.hypernetworks.named_parameters()})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    forwards = []
    network = model.hypernetworks.networks["q_proj_r4"]
    network.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "lm_loss" in entry]
    flat = torch.cat([p.detach().flatten() for p in model.hypernetworks.parameters()])
    spread = 0.0
    if world > 1:
        highest, lowest = flat.clone(), flat.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        spread = float((highest - lowest).max())
    if trainer.is_world_process_zero():
        export_adapter(model, folder)
    return {
        "engine": trainer.accelerator.distributed_type.value,
        "wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "world": world,
        "zero_stage": trainer.accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else None,
        "losses": [entry["loss"] for entry in log],
        "lm_losses": [entry["lm_loss"] for entry in log],
        "rdm_losses": [entry["rdm_loss"] for entry in log],
        "grad_norms": [entry["grad_norm"] for entry in log],
        "gradients": gradients,
        "rank_spread": spread,
        "forwards_with_gradient": forwards.count(True),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    cases = json.loads(sys.argv[2])
    from accelerate import PartialState

    state = PartialState(cpu=True)
    results = {name: run_case(folder / name, world=state.num_processes, **case) for name, case in cases.items()}
    if state.is_main_process:
        (folder / "results.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
