"""A page of results: Markdown, with its pictures and all scores beside it."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from heterofusion.experiments.pictures import draw_alignment, draw_fusion, draw_training, save_picture
from heterofusion.publish.record import library_versions
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import write_whole


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
        save_picture(figure, self.folder / "pictures" / f"{name}.png")
        self.add(f"![{text}](pictures/{name}.png)")

    def add_fusions(self, adapters: Sequence[str | Path]) -> None:
        """Add the pictures of fused adapters: what feeds what, the fusion module by module, and the training."""
        for number, folder in enumerate(map(Path, adapters), start=1):
            if not (folder / "diagnostics.json").is_file():
                raise UserError(f"{folder} holds no diagnostics.json; name a folder that recipes/train.py wrote")
            read = json.loads((folder / "diagnostics.json").read_text(encoding="utf-8"))
            told = "Target {name} with {layers} layers, ".format_map(read["target"])
            told += f"{len(read['sources'])} sources, {len(read['modules'])} aligned modules."
            self.add(f"## The fusion {folder.name}", told)
            text = "Which source layer feeds which target layer"
            self.add_picture(draw_alignment(read), f"alignment-{number}", text)
            text = "Attention, size of the update and closed gates by layer"
            self.add_picture(draw_fusion(read), f"fusion-{number}", text)
            if (state := folder / "trainer_state.json").is_file():
                history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
                self.add_picture(draw_training(history), f"training-{number}", "Training curves")

    def write(self) -> Path:
        """Write it all; gives the path of the Markdown."""
        write_whole(self.folder / "report.md", "\n\n".join(self.parts) + "\n")
        if self.frames:
            pd.concat(self.frames).to_csv(self.folder / "scores.csv", index=False)
        return self.folder / "report.md"
