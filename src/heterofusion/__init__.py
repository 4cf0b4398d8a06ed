"""HeteroFusion: fuse LoRA experts of different model families into one LoRA adapter of a target model."""
# ruff: noqa: F401  # the names are for type checkers

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heterofusion.adapters.alignment import AlignmentPlan, plan_alignment
    from heterofusion.adapters.config import AdapterError
    from heterofusion.adapters.controls import control_sources
    from heterofusion.adapters.lora import LoraAdapter, load_adapter
    from heterofusion.method.config import MethodConfig
    from heterofusion.method.model import HeteroFusionModel
    from heterofusion.publish.hub import push_adapter
    from heterofusion.publish.write import export_adapter
    from heterofusion.training.config import HeteroFusionConfig
    from heterofusion.training.trainer import HeteroFusionTrainer

# Imported when it is asked for: torch alone takes seconds, which `heterofusion --help` does not need.
_MODULES = {
    "AdapterError": "adapters.config",
    "AlignmentPlan": "adapters.alignment",
    "HeteroFusionConfig": "training.config",
    "HeteroFusionModel": "method.model",
    "HeteroFusionTrainer": "training.trainer",
    "LoraAdapter": "adapters.lora",
    "MethodConfig": "method.config",
    "control_sources": "adapters.controls",
    "export_adapter": "publish.write",
    "load_adapter": "adapters.lora",
    "plan_alignment": "adapters.alignment",
    "push_adapter": "publish.hub",
}
__all__ = [*_MODULES]

# it complains of an optional kernel while PEFT imports it
logging.getLogger("bitsandbytes").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
