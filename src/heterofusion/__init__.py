"""HeteroFusion: fuse LoRA experts of different model families into one LoRA adapter of a target model."""

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

__all__ = [
    "AdapterError",
    "AlignmentPlan",
    "HeteroFusionConfig",
    "HeteroFusionModel",
    "HeteroFusionTrainer",
    "LoraAdapter",
    "MethodConfig",
    "control_sources",
    "export_adapter",
    "load_adapter",
    "plan_alignment",
    "push_adapter",
]
