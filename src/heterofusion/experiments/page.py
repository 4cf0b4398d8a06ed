"""A page of results: Markdown, with its pictures and all scores beside it."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from heterofusion.experiments.pictures import draw_alignment, draw_fusion, draw_training, read_json, save_picture
from heterofusion.publish.record import library_versions
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import write_whole

PICTURES = "pictures"


class Page:
    """Collects texts and pictures; `write` makes `report.md`, `scores.csv` and `pictures/` in a folder."""

    def __init__(self, folder: str | Path, title: str, intro: str = ""):
        self.folder = Path(folder).expanduser()
        versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
        self.parts = [f"# {title}", *([intro] if intro else []), f"Made with {versions}."]
        self.frames: list[pd.DataFrame] = []

    def add(self, *parts: str) -> None:
        """Add paragraphs, headings or tables."""
        self.parts += parts

    def add_picture(self, figure: Figure, name: str, text: str) -> None:
        """Add a picture; `text` stands for it where it cannot be shown."""
        path = self.folder / PICTURES / f"{name}.png"
        save_picture(figure, path)
        self.add(f"![{text}]({PICTURES}/{name}.png)")

    def add_fusions(self, adapters: Sequence[str | Path]) -> None:
        """Add the pictures of fused adapters: what feeds what, the fusion module by module, and the training."""
        for number, folder in enumerate(map(Path, adapters), start=1):
            if not (folder / "diagnostics.json").is_file():
                raise UserError(f"{folder} holds no diagnostics.json; name a folder that recipes/train.py wrote")
            diagnostics = read_json(folder / "diagnostics.json")
            target, count = diagnostics["target"], len(diagnostics["sources"])
            self.add(
                f"## The fusion {folder.name}",
                f"Target {target['name']} with {target['layers']} layers, {count} sources, "
                f"{len(diagnostics['modules'])} aligned modules.",
            )
            self.add_picture(
                draw_alignment(diagnostics), f"alignment-{number}", "Which source layer feeds which target layer"
            )
            self.add_picture(
                draw_fusion(diagnostics), f"fusion-{number}", "Attention, size of the update and closed gates by layer"
            )
            if (folder / "trainer_state.json").is_file():
                history = read_json(folder / "trainer_state.json")["log_history"]
                self.add_picture(draw_training(history), f"training-{number}", "Training curves")

    def write(self, document: Path | None = None) -> Path:
        """Write it all; gives the path of the Markdown."""
        document = document or self.folder / "report.md"
        write_whole(document, "\n\n".join(self.parts) + "\n")
        if self.frames:
            pd.concat(self.frames).to_csv(self.folder / "scores.csv", index=False)
        return document
