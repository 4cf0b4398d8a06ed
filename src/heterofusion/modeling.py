"""`HeteroFusionModel`: the target PeftModel with hypernetworks that add a live update to every aligned lora_B.

The model IS a PeftModelForCausalLM, so Trainer, accelerate and DeepSpeed treat it as one. The update of a module is
an activation, added by a forward hook on its `lora_B`: `lora_B(x) + F.linear(x, alpha * dB)`. It stays in place until
the next forward, so activation checkpointing recomputes with the same update.
"""

import logging
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModelForCausalLM, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from heterofusion.adapters import PREFIX, AdapterError, LoraAdapter
from heterofusion.config import MethodConfig
from heterofusion.contexts import GroupContext, build_contexts, sequence_lengths
from heterofusion.hypernet import HypernetworkConfig, HypernetworkOutput, HyperNetworks
from heterofusion.rdm import rdm_loss
from heterofusion.topology import AlignmentPlan, plan_alignment

logger = logging.getLogger(__name__)

ADAPTER_NAME = "default"


def target_width(plan: AlignmentPlan) -> int:
    """Hidden size of the target model, read off its adapter: what the residual stream feeds or takes."""
    widths = [
        item.target.out_features if item.target.role in ("o_proj", "down_proj") else item.target.module.in_features
        for item in plan.aligned
    ]
    return max(set(widths), key=widths.count)


def hypernetwork_config(plan: AlignmentPlan, method: MethodConfig) -> HypernetworkConfig:
    """Sizes of the hypernetworks for a plan.

    Raises:
        ValueError: sizes do not go together, or a sequence of blocks is longer than the position table.
    """
    config = HypernetworkConfig.from_preset(method.preset, target_width(plan), **method.hypernetwork_overrides())
    lengths = sequence_lengths(plan, config.block_size)
    name = max(lengths, key=lambda key: lengths[key])
    if lengths[name] > config.max_position_embeddings:
        raise ValueError(
            f"group {name} has sequences of {lengths[name]} blocks, more than --max_position_embeddings "
            f"{config.max_position_embeddings}; raise it, or raise --block_size {config.block_size}"
        )
    return config


def check_base_fits(model: nn.Module, adapter: LoraAdapter) -> None:
    """Check that every LoRA module of an adapter exists in a base model with the right shape (meta device will do).

    Raises:
        AdapterError: names the first module that does not fit.
    """
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    for path, module in adapter.modules.items():
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            raise AdapterError(
                f"base model {name} has no module {path}, which target adapter {adapter.folder} changes; "
                f"give the base it was trained on ({adapter.base_model or 'not named in its config'})"
            ) from None
        shape = _layer_shape(layer)
        if shape is not None and shape != (module.in_features, module.out_features):
            raise AdapterError(
                f"base model {name}: {path} maps {shape[0]} to {shape[1]} features, but target adapter "
                f"{adapter.folder} has {module.in_features} to {module.out_features}; "
                f"give the base it was trained on ({adapter.base_model or 'not named in its config'})"
            )


def _layer_shape(layer: nn.Module) -> tuple[int, int] | None:
    if isinstance(getattr(layer, "nf", None), int):  # Conv1D of GPT-2
        return layer.weight.shape[0], layer.nf  # type: ignore[union-attr, return-value]
    inputs, outputs = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return (inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None


class HeteroFusionModel(PeftModelForCausalLM):
    """A target model with its LoRA adapter and the hypernetworks that update it.

    Only hypernetworks and alphas are trainable, in float32 whatever the base's dtype. All dropout is off.

    Args:
        model: the target's base model; LoRA layers are injected in place.
        plan: the alignment of target and sources.
        method: settings of the method; `MethodConfig()` if None.
        seed: seed of the hypernetworks' initialization.

    Raises:
        AdapterError: the base does not fit the target adapter.
        ValueError: settings are out of range.
    """

    def __init__(
        self, model: PreTrainedModel, plan: AlignmentPlan, method: MethodConfig | None = None, seed: int = 42
    ) -> None:
        method = method or MethodConfig()
        method.check_method()
        sizes = hypernetwork_config(plan, method)
        check_base_fits(model, plan.target)
        lora_config = LoraConfig.from_pretrained(str(plan.target.folder))
        lora_config.inference_mode = True
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft 0.21 reads a name that transformers 5.23 deprecates
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            super().__init__(model, lora_config, ADAPTER_NAME)
            torch.manual_seed(seed)
            ranks = {key.name: key.rank for key in plan.groups}
            self.hypernetworks = HyperNetworks(ranks, sizes, method.alpha_init).float()
        self.plan = plan
        self.method = method
        self._load_target(plan.target)
        self._contexts = build_contexts(plan, sizes.block_size, method.canonicalize)
        device = next(model.parameters()).device
        self.hypernetworks.to(device if device.type != "meta" else "cpu")
        self.freeze_base()
        _disable_dropout_config(model)
        self._check_checkpointing()
        self._deltas: dict[str, Tensor] = {}
        self._cached_versions: tuple | None = None
        self._outputs: dict[str, HypernetworkOutput] = {}
        self.hypernetwork_seconds = 0.0
        self._hooks = [self._add_hook(path) for path in {item.target.module.path: None for item in plan.aligned}]
        self.train(self.training)

    @classmethod
    def from_adapters(
        cls,
        model: PreTrainedModel,
        target: LoraAdapter,
        sources: Sequence[LoraAdapter],
        method: MethodConfig | None = None,
        *,
        source_configs: Sequence[PretrainedConfig | None] | None = None,
        seed: int = 42,
    ) -> "HeteroFusionModel":
        """Plan the alignment and build the model.

        Args:
            model: the target's base model.
            target: the target's adapter.
            sources: source adapters, in order.
            method: settings of the method (a `HeteroFusionConfig` will do).
            source_configs: base configs of sources with fused projections, one or None each.
            seed: seed of the initialization.
        """
        method = method or MethodConfig()
        plan = plan_alignment(
            target,
            sources,
            layer_alignment=method.layer_alignment,
            transfer_ratio=method.transfer_ratio,
            target_config=model.config,
            source_configs=source_configs,
        )
        return cls(model, plan, method, seed)

    def _load_target(self, target: LoraAdapter) -> None:
        try:
            result = set_peft_model_state_dict(self, target.state_dict(), ADAPTER_NAME)
        except (RuntimeError, KeyError) as error:
            raise AdapterError(
                f"target adapter {target.weights_file} does not fit the base model: {str(error).strip().splitlines()[-1]}"
            ) from error
        missing = [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
        if missing or result.unexpected_keys:
            raise AdapterError(
                f"target adapter {target.weights_file} and its config disagree about the modules of the base model: "
                f"missing {missing[:3]}, unexpected {list(result.unexpected_keys)[:3]}"
            )

    def freeze_base(self) -> None:
        """Leave hypernetworks and alphas as the only trainable parameters (`set_adapter` thaws LoRA: call this after)."""
        self.requires_grad_(False)
        self.hypernetworks.requires_grad_(True)

    def train(self, mode: bool = True) -> "HeteroFusionModel":
        """Set the hypernetworks' mode; the base stays in eval mode, because all dropout is off during fusion.

        The decoder layers themselves carry the flag, since transformers checkpoints activations only where it is set.
        """
        super().train(False)
        self.training = mode
        self.hypernetworks.train(mode)
        for module in self.base_model.modules():
            if isinstance(module, GradientCheckpointingLayer) or hasattr(module, "gradient_checkpointing"):
                module.training = mode
        return self

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Enable non-reentrant activation checkpointing of the base.

        Raises:
            ValueError: reentrant checkpointing is asked for; it gives the hypernetworks no gradient.
        """
        settings = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if settings["use_reentrant"]:
            raise ValueError(
                "reentrant activation checkpointing gives the hypernetworks no gradient; set use_reentrant=False"
            )
        self.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs=settings, **kwargs)

    def _check_checkpointing(self) -> None:
        for module in self.base_model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get(
                "use_reentrant"
            ):
                raise ValueError(
                    "the base model has reentrant activation checkpointing enabled, which gives the hypernetworks no "
                    "gradient; enable it with use_reentrant=False"
                )

    # ---- live updates -------------------------------------------------------------------------------------------

    def forward(self, *args: Any, rdm_step: int | None = None, **kwargs: Any) -> Any:
        """The target's forward with live updates.

        Args:
            *args: of the base model's forward.
            rdm_step: optimizer step whose RDM is computed along; read it from `rdm_loss`. None for no RDM.
            **kwargs: of the base model's forward.
        """
        self.refresh()
        self.rdm_loss = None if rdm_step is None else self._rdm(rdm_step)
        return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The target's `generate` with the current updates, computed once."""
        with torch.no_grad():
            self.refresh()
        return super().generate(*args, **kwargs)

    def refresh(self) -> None:
        """Compute the updates: with their graph where gradients are on, else once until a parameter changes."""
        if torch.is_grad_enabled():
            self._cached_versions = None
        else:
            versions = tuple((id(p), p._version, p.data_ptr()) for p in self.hypernetworks.parameters())
            if versions == self._cached_versions:
                return
            self._cached_versions = versions
        start = time.perf_counter()
        outputs = self.predict()
        self._deltas.clear()
        self._deltas.update(self._module_deltas(outputs))
        self._outputs = outputs if torch.is_grad_enabled() else {}
        self.hypernetwork_seconds += time.perf_counter() - start

    def predict(self, diagnostics: bool = False) -> dict[str, HypernetworkOutput]:
        """Run every hypernetwork, in float32.

        Args:
            diagnostics: also give attention maps and gates.
        """
        networks: HyperNetworks = self.hypernetworks
        device = next(networks.parameters()).device
        outputs = {}
        with torch.autocast(device.type, enabled=False):
            for name, context in self._placed_contexts(device).items():
                outputs[name] = networks.networks[name](
                    context.target.blocks,
                    context.target.descriptors,
                    context.source.blocks,
                    context.source.descriptors,
                    context.source.mask,
                    context.decode_index,
                    shared=networks.shared,
                    diagnostics=diagnostics,
                )
        return outputs

    def module_deltas(self) -> dict[str, Tensor]:
        """The scaled updates `alpha * dB` by module path, each (out_features, rank) float32, without gradient."""
        with torch.no_grad():
            self.refresh()
            return dict(self._deltas)

    def _placed_contexts(self, device: torch.device) -> dict[str, GroupContext]:
        if any(context.decode_index.device != device for context in self._contexts.values()):
            self._contexts = {name: context.to(device) for name, context in self._contexts.items()}
        return self._contexts

    def _module_deltas(self, outputs: dict[str, HypernetworkOutput]) -> dict[str, Tensor]:
        deltas: dict[str, Tensor] = {}
        for name, output in outputs.items():
            context = self._contexts[name]
            scaled = self.hypernetworks.alphas[name] * output.delta  # (T, b, r)
            for item, blocks in zip(context.members, scaled.split(context.b_blocks), strict=True):
                rows = blocks.flatten(0, 1)[: item.target.out_features]  # (out, r): padded rows dropped
                path = item.target.module.path
                if item.target.rows is None:
                    deltas[path] = rows
                else:  # a role of a fused projection
                    whole = rows.new_zeros(item.target.module.out_features, rows.shape[1])
                    part = whole.index_copy(0, item.target.rows.to(rows.device), rows)
                    deltas[path] = deltas[path] + part if path in deltas else part
        return deltas

    def _add_hook(self, path: str) -> torch.utils.hooks.RemovableHandle:
        lora_B = self.get_base_model().get_submodule(path).lora_B[ADAPTER_NAME]
        deltas = self._deltas

        def add_delta(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            delta = deltas.get(path)
            return output if delta is None else output + F.linear(args[0], delta.to(args[0].dtype))

        return lora_B.register_forward_hook(add_delta)

    # ---- regularizer and diagnostics ----------------------------------------------------------------------------

    def _rdm(self, step: int) -> Tensor:
        """RDM of the last live prediction: mean over groups of target and source terms. Same draws on all ranks."""
        total = next(self.hypernetworks.parameters()).new_zeros(())
        method = self.method
        with torch.autocast(total.device.type, enabled=False):
            for index, (name, output) in enumerate(self._outputs.items()):
                context = self._contexts[name]
                generator = torch.Generator(total.device).manual_seed(_mix(getattr(method, "seed", 42), step, index))
                for z, mask in (
                    (output.target_embedding, context.target.mask),
                    (output.source_embedding, context.source.mask),
                ):
                    total = total + rdm_loss(
                        z,
                        mu=method.rdm_mu,
                        sigma=method.rdm_sigma,
                        num_projections=method.rdm_projections,
                        generator=generator,
                        mask=mask,
                        per_module=context.ragged,
                    )
        return total / len(self._outputs)

    @torch.no_grad()
    def diagnostics(self) -> dict[str, dict[str, float]]:
        """State of the fusion, by group name.

        Returns:
            Per group: `alpha`; `gate_sparsity`, the share of zeros in the sources' gates; `delta_ratio`,
            ||alpha dB|| / ||B|| over the group's modules; `attention/<i>`, the share of attention that B blocks give
            to source i (counted from 0).
        """
        report = {}
        outputs = self.predict(diagnostics=True)
        for name, output in outputs.items():
            context = self._contexts[name]
            assert output.attention is not None and output.source_gate is not None
            real = context.source_of_block >= 0  # (M, N_s)
            attention = output.attention.flatten(0, 1)[context.decode_index]  # (T, N_s)
            origin = context.source_of_block.repeat_interleave(output.attention.shape[1], 0)[context.decode_index]
            alpha = self.hypernetworks.alphas[name]
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
            for index in range(len(self.plan.sources)):
                report[name][f"attention/{index}"] = float((attention * (origin == index)).sum(-1).mean())
        return report

    # ---- the end ------------------------------------------------------------------------------------------------

    def fused_state_dict(self) -> dict[str, Tensor]:
        """The fused adapter under the target's file keys and in its dtypes: A unchanged, B + alpha dB where aligned.

        Rows without an update keep their bits.
        """
        state = self.plan.target.state_dict()
        for path, delta in self.module_deltas().items():
            key = f"{PREFIX}{path}.lora_B.weight"
            B = state[key]
            delta = delta.to(B.device)
            state[key] = torch.where(delta == 0, B, (B.float() + delta).to(B.dtype)).contiguous()
        return state

    def fuse(self) -> PeftModelForCausalLM:
        """Write the updates into B and become a plain PeftModel: hooks and hypernetworks are gone afterwards.

        Returns:
            This object, now a `PeftModelForCausalLM`.
        """
        state = self.fused_state_dict()
        for hook in self._hooks:
            hook.remove()
        training = self.training
        for name in ("hypernetworks", "plan", "method", "rdm_loss"):
            if hasattr(self, name):
                delattr(self, name)
        for name in ("_contexts", "_deltas", "_cached_versions", "_outputs", "_hooks", "hypernetwork_seconds"):
            delattr(self, name)
        self.__class__ = PeftModelForCausalLM  # type: ignore[assignment]
        set_peft_model_state_dict(self, state, ADAPTER_NAME)
        return self.train(training)


def _mix(seed: int, step: int, index: int) -> int:
    """One generator seed of (seed, optimizer step, group), far apart for neighbours."""
    return (seed * 1_000_003 + step * 10_007 + index * 101 + 17) % (2**63)


def _disable_dropout_config(model: nn.Module) -> None:
    """Set the dropout rates to 0 that a model's code reads from its config (Falcon's residuals, say)."""
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for name, value in vars(part).items() if part is not None else ():
            if ("dropout" in name or "pdrop" in name) and isinstance(value, float) and value > 0:
                logger.info("dropout: %s = %s is off during fusion", name, value)
                setattr(part, name, 0.0)
