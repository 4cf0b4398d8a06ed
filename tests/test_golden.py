"""Parity with the published method on small inputs (numbers only; METHOD section "Golden data").

`HETEROFUSION_GOLDEN` may name another folder with the same files and other numbers.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

from heterofusion import HeteroFusionConfig, HeteroFusionModel, HeteroFusionTrainer, load_adapter, plan_alignment
from heterofusion.method.config import HypernetworkConfig
from heterofusion.method.contexts import build_contexts, context_blocks, describe_blocks, source_factors
from heterofusion.method.hypernet import HyperNetwork, HypernetworkInput
from heterofusion.method.rdm import sliced_distance

GOLDEN = Path(os.environ.get("HETEROFUSION_GOLDEN") or Path(__file__).parent / "golden")
TRAJECTORIES = json.loads((GOLDEN / "trajectories.json").read_text())
CASES = sorted(TRAJECTORIES)
TOLERANCE = 1e-5


def close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def published_to_ours(published: dict[str, torch.Tensor], block_size: int, rank: int) -> dict[str, torch.Tensor]:
    """Published names and layouts to ours: row and column projection are one matrix over row-major blocks."""
    column = published["encoder.proj_col.0.weight"]  # (e, r * b), column-major input
    column = column.view(-1, rank, block_size).transpose(1, 2).reshape(column.shape)
    ours = {
        "features.norm_weight": published["encoder.input_norm.weight"],
        "features.norm_bias": published["encoder.input_norm.bias"],
        "features.views.weight": torch.cat([published["encoder.proj_row.0.weight"], column]),
        "features.views.bias": torch.cat([published["encoder.proj_row.0.bias"], published["encoder.proj_col.0.bias"]]),
        "positions.weight": published["pos_embed.weight"],
    }
    for kind in ("weight", "bias"):
        ours[f"fusion_norm.{kind}"] = published[f"encoder.fusion_norm.{kind}"]
        for layer in (0, 2):
            ours[f"gate.{layer}.{kind}"] = published[f"encoder.gate_net.{layer}.{kind}"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            ours[f"{name}.{kind}"] = published[f"attention.{name}.{kind}"]
        ours[f"decoder.hidden.{kind}"] = published[f"decoder_layer.0.{kind}"]
        ours[f"decoder.output.{kind}"] = published[f"decoder_layer.2.{kind}"]
    return ours


def load_case(case: str):
    config = TRAJECTORIES[case]["config"]
    target = load_adapter(GOLDEN / "target_llama")
    sources = [load_adapter(GOLDEN / name) for name in config["sources"]]
    return config, target, sources


def test_hypernetwork_forward():
    data = load_file(GOLDEN / "hypernet.safetensors")
    net = {name.removeprefix("net."): tensor for name, tensor in data.items() if name.startswith("net.")}
    embed_dim, positions = net["encoder.fusion_norm.weight"], net["pos_embed.weight"]
    blocks = data["in.target_blocks"]
    config = HypernetworkConfig(
        block_size=blocks.shape[2], embed_dim=len(embed_dim), num_heads=4, max_position_embeddings=len(positions)
    )
    network = HyperNetwork(blocks.shape[3], config)
    ours = published_to_ours(net, blocks.shape[2], blocks.shape[3])
    network.load_state_dict({**ours, "alpha": torch.ones(1)})
    target, target_singular = describe_blocks(data["in.target_blocks"])
    source, source_singular = describe_blocks(data["in.source_blocks"])
    close(target_singular, data["in.target_singular_values"])
    close(source_singular, data["in.source_singular_values"])
    blocks, descriptors = (
        torch.cat([first.flatten(0, 1), second.flatten(0, 1)])
        for first, second in ((target, source), (target_singular, source_singular))
    )
    inputs = HypernetworkInput(blocks, descriptors, *target.shape[:2])
    out = network(inputs, diagnostics=True)
    close(out.target_embedding, data["out.target_embedding"])
    close(out.source_embedding, data["out.source_embedding"])
    close(out.attention, data["out.attention"])
    close(out.update.view_as(data["out.delta"]), data["out.delta"])
    assert data["out.delta"].abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("index", range(3))
def test_rdm_value_and_gradient(index):
    data = {k.split(".", 1)[1]: v for k, v in load_file(GOLDEN / "rdm.safetensors").items() if k[0] == str(index)}
    z = data["z"].requires_grad_()
    mu, sigma = data["mu_sigma"].tolist()
    flat = z.flatten(0, 1).unsqueeze(0)
    loss = sliced_distance(flat, data["standard_normal"].unsqueeze(0), data["directions_unnormalized"], mu, sigma)
    loss.backward()
    close(loss.detach().view(1), data["loss"])
    close(z.grad, data["grad_z"])


@pytest.mark.parametrize("case", CASES)
def test_alignment(case):
    config, target, sources = load_case(case)
    plan = plan_alignment(target, sources, transfer_ratio=config["transfer_ratio"])
    expected = TRAJECTORIES[case]["groups"]
    assert {key.role for key in plan.groups} == set(expected)
    for key, members in plan.groups.items():
        group = expected[key.role]
        assert key.rank == group["rank"]
        assert [item.target.module.path for item in members] == group["modules"]
        found = [
            [[config["sources"][i], f"base_model.model.{s.module.path}.lora_B.weight"] for i, s in item.sources]
            for item in members
        ]
        assert found == group["sources"]
    contexts = build_contexts(plan, config["block_size"])
    for key, members in plan.groups.items():
        context = contexts[key.name]
        blocks = expected[key.role]["blocks"]
        assert list(context.b_blocks) == [block["num_blocks_B"] for block in blocks]
        assert [item.target.out_features for item in members] == [block["orig_rows"] for block in blocks]
        assert context.ragged is not expected[key.role]["batched"]
        assert context.inputs.target_length == max(b["num_blocks_A"] + b["num_blocks_B"] for b in blocks)


@pytest.mark.parametrize("case", CASES)
def test_token_contexts(case):
    config, target, sources = load_case(case)
    tokens = load_file(GOLDEN / f"{case}.q_proj_first_module_tokens.safetensors")
    plan = plan_alignment(target, sources, transfer_ratio=config["transfer_ratio"])
    key, members = next((key, members) for key, members in plan.groups.items() if key.role == "q_proj")
    first, b = members[0], config["block_size"]
    blocks = context_blocks(first.target.module.lora_A, first.target.lora_B, b)
    close(blocks.flatten(-2), tokens["tgt_flat"], 0)
    parts = []
    for _, source in first.sources:
        A, B, truncated = source_factors(source, key.rank, first.target.module.scaling, canonicalize=False)
        assert truncated == 0
        parts.append(context_blocks(A, B, b))
    close(torch.cat(parts).flatten(-2), tokens["src_flat"], 0)
    context = build_contexts(plan, b)[key.name]
    target, source = context.inputs.split(context.inputs.descriptors)
    close(target[0], tokens["tgt_s"])
    close(source[0, : len(tokens["src_s"])], tokens["src_s"])


class MicroBatches(Dataset):
    """The golden micro-batches in their order, one per item."""

    def __init__(self):
        data = load_file(GOLDEN / "batches.safetensors")
        count = len({key.split(".")[0] for key in data})
        self.items = [{k: data[f"{i}.{k}"] for k in ("input_ids", "attention_mask", "labels")} for i in range(count)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class RecordingTrainer(HeteroFusionTrainer):
    """Keeps the LM loss of every micro-batch as the mean over its own labels."""

    losses: list[float]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        own = inputs["labels"][:, 1:].ne(-100).sum()
        self.losses.append(float(loss.detach() * num_items_in_batch / own))
        return loss


@pytest.mark.parametrize("case", CASES)
def test_training_trajectory_and_fused_adapter(case, tmp_path):
    config, target, sources = load_case(case)
    args = HeteroFusionConfig(
        output_dir=str(tmp_path),
        preset="paper",
        block_size=config["block_size"],
        embed_dim=config["embed_dim"],
        num_heads=config["num_heads"],
        max_position_embeddings=config["max_position_embeddings"],
        alpha_init=config["alpha_init"],
        mu_gate=config["mu_gate"],
        rdm_weight=config["lambda_rdm"],
        transfer_ratio=str(config["transfer_ratio"]),
        learning_rate=config["lr"],
        num_train_epochs=config["num_epochs"],
        gradient_accumulation_steps=config["gradient_accumulation_steps"],
        train_sampling_strategy="sequential",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / "base_llama")
    model = HeteroFusionModel.from_adapters(base, target, sources, args)
    initial = load_file(GOLDEN / f"{case}.initial_hypernets.safetensors")
    for key in model.plan.groups:
        published = {k.removeprefix(f"{key.role}."): v for k, v in initial.items() if k.startswith(f"{key.role}.")}
        ours = published_to_ours(published, config["block_size"], key.rank)
        network = model.hypernetworks.networks[key.name]
        network.load_state_dict({**ours, "alpha": network.alpha})
    trainer = RecordingTrainer(
        model, args, train_dataset=MicroBatches(), data_collator=lambda batches: dict(batches[0])
    )
    trainer.losses = []
    trainer.train()
    close(torch.tensor(trainer.losses), torch.tensor(TRAJECTORIES[case]["lm_loss_per_micro_batch"]))
    for key in model.plan.groups:
        close(model.hypernetworks.alphas[key.name].item(), TRAJECTORIES[case]["final_alpha"][key.role])
    trainer.save_model()
    fused, expected = (
        load_file(tmp_path / "adapter_model.safetensors"),
        load_file(GOLDEN / f"{case}.fused_adapter.safetensors"),
    )
    assert fused.keys() == expected.keys()
    for name, tensor in expected.items():
        close(fused[name], tensor)
