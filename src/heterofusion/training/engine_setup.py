"""A fusion is told which engine is about to wrap it."""

from accelerate import Accelerator
from accelerate.utils import DistributedType

from heterofusion.method.model import HeteroFusionModel
from heterofusion.training.engines import DATA_PARALLEL, exclude_from_reduction, wrap_hypernetworks_apart


def set_up_engine(model: HeteroFusionModel, accelerator: Accelerator, once_per_window: bool, ddp_reduce: str) -> None:
    """Get a model ready for its engine; call it before the model is wrapped.

    Args:
        model: the model; where its hypernetworks run and what its ranks exchange is set.
        accelerator: of the run.
        once_per_window: whether the hypernetworks backpropagate once per accumulation window.
        ddp_reduce: `updates` if DDP ranks are to exchange the gradient of the updates, where the engine allows it.
    """
    updates, hypernetworks, engine = model.updates, model.hypernetworks, accelerator.distributed_type
    offloads = engine in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    updates.device = accelerator.device if offloads else None
    updates.average_over_ranks = once_per_window and engine in DATA_PARALLEL and ddp_reduce == "updates"
    kept = hypernetworks.alphas.values() if updates.average_over_ranks else hypernetworks.parameters()
    exclude_from_reduction(model, hypernetworks, kept)
    if engine == DistributedType.FSDP:
        wrap_hypernetworks_apart(accelerator, model.get_base_model(), type(hypernetworks).__name__)
