"""HeteroFusion: fuse LoRA experts of different model families into one LoRA adapter of a target model."""

from heterofusion.adapter_config import AdapterError
from heterofusion.adapters import LoraAdapter, load_adapter
from heterofusion.config import HeteroFusionConfig, MethodConfig
from heterofusion.controls import control_sources
from heterofusion.export import export_adapter
from heterofusion.hub import push_adapter
from heterofusion.modeling import HeteroFusionModel
from heterofusion.topology import AlignmentPlan, plan_alignment
from heterofusion.trainer import HeteroFusionTrainer

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
