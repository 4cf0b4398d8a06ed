"""Builds the embedded zoo: three tiny bases, six LoRA experts each, and the manifest with their scores.

    python recipes/build_zoo.py --output_dir outputs/zoo
    python recipes/build_zoo.py --output_dir outputs/zoo --families llama --tasks ner_garden re_town
    python recipes/build_zoo.py --output_dir outputs/zoo --only experts

The whole zoo takes about 32 minutes on one CPU core: a family 10 to 11 minutes, of which its base 5 to 6 and each
expert half a minute to a minute.
"""

import argparse
import logging
import pathlib
import time

from heterofusion.zoo import FAMILIES, TASKS
from heterofusion.zoo.build import build_zoo, score_table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", type=pathlib.Path, required=True, help="Folder to write the zoo to.")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES, help="Families to build.")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="Experts to build.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of text, weights and examples.")
    parser.add_argument(
        "--only",
        choices=("base", "experts"),
        default=None,
        help="Build the bases alone, or experts on bases there are.",
    )
    parser.add_argument("--disable_tqdm", action="store_true", help="Show no progress bars.")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    start = time.perf_counter()
    manifest = build_zoo(
        args.output_dir, args.families, args.tasks, seed=args.seed, only=args.only, progress=not args.disable_tqdm
    )
    minutes = (time.perf_counter() - start) / 60
    print(score_table(manifest))
    print(f"{manifest['bytes'] / 1e6:.1f} MB in {args.output_dir}, built in {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
