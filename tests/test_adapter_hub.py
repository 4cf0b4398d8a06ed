"""Adapters and base models named by their Hub id, with and without a network."""

import os
import subprocess
import sys

import pytest

from builders import tiny_config, write_adapter

PROBE = """
import sys, time
from heterofusion import load_adapter
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.loading import load_base_config
for name in ("nobody/nothing", "cached/both"):
    for read in (load_adapter, lambda name: load_base_config(name, "target adapter")):
        start = time.monotonic()
        try:
            result = type(read(name)).__name__
        except UserError as error:
            result = error
        print(time.monotonic() - start, result)
"""


@pytest.mark.parametrize("offline", ["1", None])
def test_hub_ids_without_a_network_are_settled_within_seconds(tmp_path, offline):
    """What is cached is read, the rest refused. The Hub client reads its environment when imported: a new process."""
    cache = tmp_path / "hub" / "models--cached--both"
    write_adapter(cache / "snapshots" / ("0" * 40))
    tiny_config("llama").save_pretrained(cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    hidden = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN")
    environment = {
        key: value for key, value in os.environ.items() if key not in hidden and not key.lower().endswith("_proxy")
    }
    environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there
    if offline:
        environment["HF_HUB_OFFLINE"] = offline
    result = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    seconds, answers = zip(*(line.split(" ", 1) for line in result.stdout.splitlines()), strict=True)
    assert max(map(float, seconds)) < 15
    assert "adapter 'nobody/nothing' is neither a local folder" in answers[0]
    assert str(tmp_path / "nobody" / "nothing") in answers[0]
    assert "check the name and the network" in answers[0]
    assert "config.json of base model 'nobody/nothing' cannot be read" in answers[1]
    assert answers[2:] == ("LoraAdapter", "LlamaConfig")
