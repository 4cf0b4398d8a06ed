"""Build the embedded zoo: three tiny bases, six LoRA experts each, and the manifest with their scores.

    python recipes/build_zoo.py --output_dir outputs/zoo
    python recipes/build_zoo.py --output_dir outputs/zoo --families llama --tasks ner_garden re_town
    python recipes/build_zoo.py --output_dir outputs/zoo --only experts

The whole zoo takes about 32 minutes on one CPU core: a family 10 to 11 minutes, of which its base 5 to 6 and each
expert half a minute to a minute.
"""

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from heterofusion.runtime.flags import flag
from heterofusion.runtime.program import command, parse_arguments, set_up_logging
from heterofusion.zoo import FAMILIES, TASKS
from heterofusion.zoo.build import build_zoo, score_table


@dataclass
class ZooArguments:
    """What is built."""

    output_dir: str = flag(help="Folder to write the zoo to.")
    families: list[str] = flag(default_factory=lambda: list(FAMILIES), help="Families to build.", choices=FAMILIES)
    tasks: list[str] = flag(default_factory=lambda: list(TASKS), help="Experts to build.", choices=list(TASKS))
    seed: int = flag(0, help="Seed of text, weights and examples.")
    only: str | None = flag(None, help="The bases alone, or experts on bases there are.", choices=["base", "experts"])
    disable_tqdm: bool = flag(False, help="Show no progress bars.")


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((ZooArguments,), argv, __doc__)
    set_up_logging(logging.INFO)
    start = time.perf_counter()
    folder = Path(options.output_dir)
    manifest = build_zoo(folder, options.families, options.tasks, options.seed, options.only, not options.disable_tqdm)
    print(score_table(manifest))
    print(f"{manifest['bytes'] / 1e6:.1f} MB in {folder}, built in {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    sys.exit(main())
