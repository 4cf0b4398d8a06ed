"""Show what a fusion would do, without training and without base weights.

    python recipes/plan.py --target_adapter ANCHOR --source_adapters EXPERT1 EXPERT2 [--output plan.json]

Prints which source module feeds which target module, what stays untouched and why, layer offsets, ranks, scalings,
truncated energy, and the size of the hypernetworks in each preset. `--output` writes the same for machines.
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from heterofusion.adapters.alignment import AdapterArguments, load_plan
from heterofusion.method.config import MethodConfig
from heterofusion.method.plan import format_plan, plan_summary
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import flag
from heterofusion.runtime.program import command, parse_arguments, set_up_logging


@dataclass
class PlanArguments:
    """Where the plan goes."""

    model_name_or_path: str | None = flag(
        None, help="Base model of the target; only its config.json is read, and only for fused projections."
    )
    model_revision: str | None = flag(None, help="Hub revision of the base model.")
    seed: int = flag(42, help="Seed of --source_control, as that of the fusion.")
    output: str | None = flag(None, help="Also write the plan to this JSON file.")


@command
def main(argv: list[str]) -> None:
    adapters, method, options = parse_arguments((AdapterArguments, MethodConfig, PlanArguments), argv, __doc__)
    set_up_logging(logging.WARNING, hold=True)
    plan = load_plan(
        adapters,
        options.model_name_or_path,
        options.model_revision,
        layer_alignment=method.layer_alignment,
        transfer_ratio=method.transfer_ratio,
        seed=options.seed,
    )
    summary = plan_summary(plan, method)
    if options.output:
        path = Path(options.output).absolute()
        try:
            path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output {path} cannot be written ({error.strerror}); name another file") from error
    print(format_plan(summary))


if __name__ == "__main__":
    sys.exit(main())
