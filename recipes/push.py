"""Push an adapter to the Hub: exactly its files, in one commit, and nothing that tells of this machine.

    heterofusion push --adapter fused --hub_model_id NAME

It is what `--push_to_hub true` does at the end of a run, and what a failed push asks for. Fusions, merges, distilled
adapters and experts are pushed; controls are not. The folder is only read.
"""

import logging
import sys
from dataclasses import dataclass

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from heterofusion.publish.hub import push_adapter
from heterofusion.runtime.flags import flag
from heterofusion.runtime.program import command, parse_arguments, set_up_logging


@dataclass
class PushArguments:
    """What is pushed, and where to."""

    adapter: str = flag(
        help="Folder of the adapter: the --output_dir of a fusion, a merge, a distillation or an expert."
    )
    hub_model_id: str = flag(help="Repository to push to: name, or owner/name.")
    hub_private_repo: bool | None = flag(None, help="Make a new repository private; one that exists stays as it is.")
    hub_revision: str | None = flag(None, help="Branch to push to, made if there is none; the main branch by default.")
    hub_token: str | None = flag(None, help="Hub token; HF_TOKEN or the one of `hf auth login` by default.")


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((PushArguments,), argv, __doc__)
    set_up_logging(logging.INFO)
    address = push_adapter(
        options.adapter,
        options.hub_model_id,
        token=options.hub_token,
        private=options.hub_private_repo,
        revision=options.hub_revision,
    )
    print(address)


if __name__ == "__main__":
    sys.exit(main())
