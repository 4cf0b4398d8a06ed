"""What a fusion is doing: scale of the updates, how much the gates close, which sources are attended to."""

import torch

from heterofusion.modeling import HeteroFusionModel


@torch.no_grad()
def fusion_diagnostics(model: HeteroFusionModel) -> dict[str, dict[str, float]]:
    """State of the fusion, by group name: one extra forward of the hypernetworks.

    Args:
        model: the model, as it is now.

    Returns:
        Per group: `alpha`; `gate_sparsity`, the share of zeros in the sources' gates; `delta_ratio`,
        ||alpha dB|| / ||B|| over the group's modules; `attention/<i>`, the share of attention that B blocks give
        to source i (counted from 0).
    """
    report = {}
    outputs = model.updates.predict(diagnostics=True)
    for name, output in outputs.items():
        context = model.updates.contexts[name]
        assert output.attention is not None and output.source_gate is not None
        real = context.source_of_block >= 0  # (M, N_s)
        attention = output.attention.flatten(0, 1)[context.decode_index]  # (T, N_s)
        origin = context.source_of_block.repeat_interleave(output.attention.shape[1], 0)[context.decode_index]
        alpha = model.hypernetworks.alphas[name]
        # padded rows are part of the blocks but not of the update: cut them as the update does
        norm = torch.stack(
            [
                blocks.flatten(0, 1)[: item.target.out_features].square().sum()
                for item, blocks in zip(context.members, output.delta.split(context.b_blocks), strict=True)
            ]
        ).sum()
        weight = sum(float(item.target.lora_B.float().square().sum()) for item in context.members)
        report[name] = {
            "alpha": float(alpha),
            "gate_sparsity": float((output.source_gate[real] == 0).float().mean()),
            "delta_ratio": float(alpha.abs() * norm.sqrt()) / max(weight**0.5, 1e-12),
        }
        for index in range(len(model.plan.sources)):
            report[name][f"attention/{index}"] = float((attention * (origin == index)).sum(-1).mean())
    return report
