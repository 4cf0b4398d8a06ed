"""`HeteroFusionModel`: the target PeftModel with hypernetworks that add a live update to every aligned lora_B.

The model IS a PeftModelForCausalLM, so Trainer, accelerate and DeepSpeed treat it as one. How the updates are computed
and installed stands in `live.py`.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM, set_peft_model_state_dict
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from heterofusion.adapters.alignment import AlignmentPlan, plan_alignment
from heterofusion.adapters.lora import PREFIX, AdapterError, LoraAdapter, check_base_fits
from heterofusion.method.base_model import disable_dropout_config, refuse_reentrant_checkpointing
from heterofusion.method.config import HypernetworkConfig, MethodConfig
from heterofusion.method.contexts import predicted_blocks, sequence_lengths
from heterofusion.method.expansion import ExpandedAdapter, expand_plan, fit_basis, set_ranks, with_target
from heterofusion.method.hypernet import HyperNetworks
from heterofusion.method.live import LiveLinear, LiveUpdates
from heterofusion.method.predictor import BlockPredictor
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.sharding import is_sharded, load_whole_tensors

ADAPTER_NAME = "default"


def target_width(plan: AlignmentPlan) -> int:
    """Hidden size of the target model, read off its adapter: what the residual stream feeds or takes."""
    widths = [
        item.target.out_features if item.target.role in ("o_proj", "down_proj") else item.target.module.in_features
        for item in plan.aligned
    ]
    return max(set(widths), key=widths.count)


def hypernetwork_config(plan: AlignmentPlan, method: MethodConfig) -> HypernetworkConfig:
    """Sizes of the hypernetworks for a plan, whose sequences of blocks must fit the position table."""
    config = HypernetworkConfig.fitted(method.form, target_width(plan), method)
    lengths = sequence_lengths(plan, config.block_size)
    name = max(lengths, key=lambda key: lengths[key])
    if lengths[name] > config.max_position_embeddings:
        raise UserError(
            f"group {name} has sequences of {lengths[name]} blocks, more than --max_position_embeddings "
            f"{config.max_position_embeddings}; raise it, or raise --block_size {config.block_size}"
        )
    return config


class HeteroFusionModel(PeftModelForCausalLM):
    """A target model with its LoRA adapter and the hypernetworks that update it.

    Only hypernetworks and alphas are trainable, in float32 whatever the base's dtype. All dropout is off.

    Args:
        model: the target's base model; LoRA layers are injected in place.
        plan: the alignment of target and sources.
        method: settings of the method; `MethodConfig()` if None.
        seed: seed of the hypernetworks' initialization and of RDM; that of a `HeteroFusionConfig`, else 42, if None.

    Attributes:
        hypernetworks: the only trainable part.
        rdm_loss: RDM of the last forward that was given an `rdm_step`, else None.
        updates: the live updates.

    Raises:
        AdapterError: the base does not fit the target adapter.
        UserError: sizes do not go together, or the base checkpoints activations with reentrance.
    """

    hypernetworks: HyperNetworks
    rdm_loss: Tensor | None
    updates: LiveUpdates

    def __init__(
        self,
        model: PreTrainedModel,
        plan: AlignmentPlan,
        method: MethodConfig | None = None,
        seed: int | None = None,
    ) -> None:
        method = method or MethodConfig()
        seed = getattr(method, "seed", 42) if seed is None else seed
        plan = expand_plan(plan, method, seed)
        sizes = hypernetwork_config(plan, method)
        check_base_fits(model, plan.target)
        with _building(seed):
            super().__init__(model, _lora_config(plan.target), ADAPTER_NAME)
            torch.default_generator.manual_seed(seed)  # whatever PEFT drew
            ranks = {key.name: key.rank for key in plan.groups}
            blocks = predicted_blocks(plan, sizes.block_size)
            self.hypernetworks = HyperNetworks(ranks, sizes, method.alpha_init, blocks).float()
        self.method = method
        self.seed = seed
        self._mode_set = self._anchor_alone = False
        _load_adapter(self, plan.target.state_dict(), plan.target)
        self._live: dict[str, Tensor] = {}
        base: Any = self.get_base_model()
        for path in plan.target.modules:
            layer = base.get_submodule(path)
            layer.lora_B[ADAPTER_NAME] = LiveLinear(layer.lora_B[ADAPTER_NAME], path, self._live)
        self.plan = plan
        self.updates = LiveUpdates(BlockPredictor(self.hypernetworks, plan, method, seed), self._live)
        device = next(model.parameters()).device
        self.hypernetworks.to(device if device.type != "meta" else "cpu")
        self.freeze_base()
        self._dropout = disable_dropout_config(model)
        refuse_reentrant_checkpointing(model)
        self.rdm_loss = None
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
        seed: int | None = None,
    ) -> "HeteroFusionModel":
        """Plan the alignment and build the model.

        Args:
            model: the target's base model.
            target: the target's adapter.
            sources: source adapters, in order.
            method: settings of the method (a `HeteroFusionConfig` will do).
            source_configs: base configs of sources with fused projections, else read from where they come from.
            seed: see the class.
        """
        method = method or MethodConfig()
        plan = plan_alignment(
            target, sources,
            layer_alignment=method.layer_alignment, transfer_ratio=method.transfer_ratio,
            target_config=model.config, source_configs=source_configs,
        )  # fmt: skip
        return cls(model, plan, method, seed)

    # ---- extra rank ---------------------------------------------------------------------------------------------

    def fit_basis(self, examples: Sequence[Tensor]) -> None:
        """Fit the rows of `extra_rank` to inputs, see `method.expansion`. All ranks together, before training."""
        target = self.plan.target
        assert isinstance(target, ExpandedAdapter), "the model was made without extra_rank"
        self._anchor_alone = True
        self._live.clear()
        try:
            fitted = fit_basis(self, target, examples)
        finally:
            self._anchor_alone = False
            self.updates.invalidate()
        self.set_basis(fitted)

    def set_basis(self, target: ExpandedAdapter) -> None:
        """Take a target that differs from this one in its extra rows alone. All ranks together."""
        base: Any = self.get_base_model()
        for path, module in target.modules.items():
            load_whole_tensors(base.get_submodule(path).lora_A[ADAPTER_NAME], {"weight": module.lora_A})
        self.plan = with_target(self.plan, target)
        self.updates.predictor.read(self.plan)
        self.updates.invalidate()

    # ---- modes --------------------------------------------------------------------------------------------------

    def freeze_base(self) -> None:
        """Leave hypernetworks and alphas alone trainable (`set_adapter` thaws LoRA: call this after it)."""
        self.requires_grad_(False)
        self.hypernetworks.requires_grad_(True)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's `set_adapter`, without the thawing of LoRA weights that comes with it."""
        super().set_adapter(*args, **kwargs)
        if "hypernetworks" in self._modules:
            self.freeze_base()

    def train(self, mode: bool = True) -> "HeteroFusionModel":
        """Set the hypernetworks' mode; the base stays in eval mode, because all dropout is off during fusion.

        The decoder layers themselves carry the flag, since transformers checkpoints activations only where it is set.
        """
        settled = self.training == mode == self.hypernetworks.training
        base: Any = self.get_base_model()
        if settled and self._mode_set and not base.get_input_embeddings().training:
            return self  # Trainer calls this in every micro-batch
        super().train(False)
        self._mode_set = True
        self.training = mode
        self.hypernetworks.train(mode)
        for module in self.base_model.modules():
            if isinstance(module, GradientCheckpointingLayer) or hasattr(module, "gradient_checkpointing"):
                module.training = mode
        return self

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Enable activation checkpointing of the base, without reentrance."""
        settings = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        base: Any = self.get_base_model()
        self._mode_set = False
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=settings, **kwargs)
        refuse_reentrant_checkpointing(base)

    # ---- live updates -------------------------------------------------------------------------------------------

    def forward(self, *args: Any, rdm_step: int | None = None, **kwargs: Any) -> Any:
        """The target's forward with live updates, and RDM for the optimizer step `rdm_step`: see `rdm_loss`."""
        if not self._anchor_alone:
            self.updates.refresh()
        self.rdm_loss = None if rdm_step is None else self.updates.rdm(rdm_step)
        return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The target's `generate` with the current updates, computed once."""
        with torch.no_grad():
            self.updates.refresh()
        return super().generate(*args, **kwargs)

    def module_deltas(self) -> dict[str, Tensor]:
        """The updates U (see `method.live`) by module path, each (out_features, rank) float32, without gradient.

        Always computed anew, so that an export never depends on what was cached. All ranks together.
        """
        with torch.no_grad():
            self.updates.invalidate()
            self.updates.refresh()
            return dict(self._live)

    # ---- the end ------------------------------------------------------------------------------------------------

    def fused_state_dict(self) -> dict[str, Tensor]:
        """The fused adapter under the target's file keys and in its dtypes; rows without an update keep their bits."""
        state = self.plan.target.state_dict()
        for path, delta in self.module_deltas().items():
            key = f"{PREFIX}{path}.lora_B.weight"
            B = state[key]
            delta = delta.to(B.device)
            state[key] = torch.where(delta == 0, B, (B.float() + delta).to(B.dtype)).contiguous()
        return state

    def fuse(self) -> PeftModelForCausalLM:
        """A plain PeftModel of the same base model, in eval mode, with the updates in its B.

        The base has only this adapter then: do not use the fusion afterwards. Not where ZeRO-3 or FSDP2 shards.
        """
        if is_sharded(self):
            raise RuntimeError("parameters are sharded over ranks; export the adapter and load it with PEFT instead")
        state = self.fused_state_dict()
        for config, name, rate in self._dropout:
            setattr(config, name, rate)
        base: Any = self.get_base_model()
        del base.peft_config  # PEFT would take the adapter, which it replaces, for a second one
        with _building(self.seed):
            plain = PeftModelForCausalLM(base, _lora_config(self.plan.target), ADAPTER_NAME)
        _load_adapter(plain, state, self.plan.target)
        return plain.eval()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """Fuse, then merge the fused adapter into the base (PEFT's `merge_and_unload`)."""
        return self.fuse().merge_and_unload(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "save_pretrained would save the anchor without the live updates; use export_adapter(model, folder) or "
            "trainer.save_model() for the fused adapter, or model.fuse().save_pretrained(folder)"
        )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("merge_adapter would leave out the live updates; use model.fuse().merge_adapter()")

    def __deepcopy__(self, memo: dict) -> Any:
        raise TypeError("a HeteroFusionModel cannot be copied, its updates belong to it; copy model.fuse()")


def _lora_config(target: LoraAdapter) -> LoraConfig:
    config = LoraConfig.from_pretrained(str(target.folder))
    set_ranks(config, target)
    config.inference_mode = True
    return config


def _load_adapter(model: PeftModelForCausalLM, state: dict[str, Tensor], target: LoraAdapter) -> None:
    """Load a state like the target's into a model with its config."""
    try:
        result: Any = set_peft_model_state_dict(model, state, ADAPTER_NAME)
    except (RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise AdapterError(f"target adapter {target.weights_file} does not fit the base model: {reason}") from error
    missing = [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    if missing or result.unexpected_keys:
        raise AdapterError(
            f"target adapter {target.weights_file} and its config disagree about the modules of the base model: "
            f"missing {missing[:3]}, unexpected {list(result.unexpected_keys)[:3]}"
        )


@contextlib.contextmanager
def _building(seed: int) -> Iterator[None]:
    """What is drawn on the CPU in here depends on the seed alone, and leaves the generators of all devices alone.

    `torch.manual_seed` would reseed those of GPUs too. Without a warning: peft 0.21 reads a name that transformers
    5.23 deprecates.
    """
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is dep", category=FutureWarning)
            yield
    finally:
        torch.default_generator.set_state(state)
