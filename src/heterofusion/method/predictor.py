"""From hypernetworks to updates: what gives every aligned module of a plan its dB, and the regularizer of the method.

`BlockPredictor` is the published form, which reads and writes blocks. Another form of hypernetwork is another class
with its methods: `method.live` needs no more of it.
"""

import torch
from torch import Tensor

from heterofusion.adapters.alignment import AlignmentPlan
from heterofusion.method.config import MethodConfig
from heterofusion.method.contexts import GroupContext, build_contexts
from heterofusion.method.hypernet import HypernetworkOutput, HyperNetworks
from heterofusion.method.rdm import rdm_loss


class BlockPredictor:
    """Predicts the update of every group of a plan from blocks of the target's and the sources' adapters.

    Attributes:
        contexts: constants of every group, by group name.
        device: where the hypernetworks run, if that is not where their parameters lie: engines may offload those.
    """

    def __init__(self, networks: HyperNetworks, plan: AlignmentPlan, method: MethodConfig, seed: int) -> None:
        self.networks = networks
        self.method = method
        self.seed = seed
        self.device: torch.device | None = None
        self.read(plan)

    def read(self, plan: AlignmentPlan) -> None:
        """Take the constants of a plan, at first or of one whose target has other extra rows."""
        self.contexts = build_contexts(plan, self.networks.config.block_size, self.method.canonicalize)
        self._placed_on: torch.device | None = None

    def predict(self, diagnostics: bool = False) -> dict[str, HypernetworkOutput]:
        """Run every hypernetwork, in float32; for `diagnostics` with attention maps and gates. All ranks together."""
        contexts = self.placed_contexts()
        return self.networks({name: context.inputs for name, context in contexts.items()}, diagnostics)

    def placed_contexts(self) -> dict[str, GroupContext]:
        """The constants on the device of the hypernetworks, moved there once."""
        device = self.device or next(self.networks.parameters()).device
        if device != self._placed_on:
            self.contexts = {name: context.to(device) for name, context in self.contexts.items()}
            self._placed_on = device
        return self.contexts

    def module_updates(self, updates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Updates of groups, (T, b, r), as those of modules by path, (out_features, r)."""
        found: dict[str, Tensor] = {}
        for name, update in updates.items():
            context = self.contexts[name]
            for item, blocks, rows in zip(context.members, update.split(context.b_blocks), context.rows, strict=True):
                part = blocks.flatten(0, 1)[: item.target.out_features]  # padded rows dropped
                module = item.target.module
                if rows is not None:  # a role of a fused projection
                    part = part.new_zeros(module.out_features, part.shape[1]).index_copy(0, rows, part)
                found[module.path] = found[module.path] + part if module.path in found else part
        return found

    def rdm(self, outputs: dict[str, HypernetworkOutput], step: int) -> Tensor:
        """RDM of a prediction: mean over groups of target and source terms. Same draws on all ranks."""
        terms = []
        for index, (name, output) in enumerate(outputs.items()):
            context = self.contexts[name]
            generator = torch.Generator(output.update.device).manual_seed(_mix(self.seed, step, index))
            for z, mask, real in (
                (output.target_embedding, context.target_mask, context.real_blocks[0]),
                (output.source_embedding, context.inputs.source_mask, context.real_blocks[1]),
            ):
                if not context.ragged:  # all modules as one set, (1, K, e)
                    z, mask = z.flatten(0, 1).unsqueeze(0), None
                    z = z if real is None else z[:, real]
                with torch.autocast(z.device.type, enabled=False):
                    terms.append(rdm_loss(z, self.method, generator, mask))
        return torch.stack(terms).sum() / len(outputs)


def _mix(seed: int, step: int, index: int) -> int:
    """A generator's seed of (seed, optimizer step, group), far apart for neighbours."""
    return (seed * 1_000_003 + step * 10_007 + index * 101 + 17) % (2**63)
