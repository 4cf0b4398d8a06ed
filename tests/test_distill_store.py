"""Soft labels on disk: memory-mapped, written as they come, whole or not there."""

import os
import signal
import time
from collections.abc import Iterator

import numpy as np
import pyarrow
import pytest
from datasets.table import MemoryMappedTable

from heterofusion.experts.soft_labels import SoftLabel, SoftLabels, labels_path, read_labels, write_labels

IDENTITY = {"model": "a"}
Batch = list[tuple[int, SoftLabel, float]]


def answer(index: int, tokens: int, k: int = 3) -> tuple[int, SoftLabel, float]:
    generator = np.random.default_rng(index)
    ids = generator.integers(0, 2**31 - 1, (tokens, k), dtype=np.int32)
    values = generator.standard_normal((tokens, k), dtype=np.float32)
    return index, SoftLabel(ids[:, 0].copy(), ids, values), float(index) + 0.1


def batches() -> list[Batch]:
    """The longest answers first, as a teacher answers; one has no token."""
    return [[answer(2, 9), answer(0, 7)], [answer(3, 4), answer(1, 0)]]


def assert_same(labels: SoftLabels, expected: list[Batch]) -> None:
    answers = sorted((item for batch in expected for item in batch), key=lambda item: item[0])
    assert len(labels) == len(answers)
    for index, label, entropy in answers:
        assert labels.cross_entropy[index] == entropy
        for found, wanted in zip(labels.of(index), label, strict=True):
            assert found.dtype == wanted.dtype and found.tolist() == wanted.tolist()


def test_labels_are_memory_mapped_and_written_as_they_come(tmp_path):
    """20 MB, of which the process holds a batch at a time."""
    size = 4000 * 64 * 8  # bytes of a batch at least

    def made() -> Iterator[Batch]:
        for index in range(10):
            if index:
                (file,) = tmp_path.glob("*.tmp/table.arrow")
                assert file.stat().st_size > index * size
            yield [answer(index, 4000, 64)]

    before = pyarrow.total_allocated_bytes()
    write_labels(tmp_path, IDENTITY, made())
    labels = read_labels(tmp_path, IDENTITY)
    assert isinstance(labels._data.data, MemoryMappedTable)
    parts = [labels.of(index) for index in range(10)]
    assert pyarrow.total_allocated_bytes() - before < 0.1 * size
    assert not any(array.flags.owndata or array.flags.writeable for part in parts for array in part)
    assert parts[7].top_ids.tolist() == answer(7, 4000, 64)[1].top_ids.tolist()


def kill_self(*args) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("when", ["between batches", "before it is renamed"])
def test_a_kill_in_the_middle_leaves_nothing_that_is_taken_for_whole(when, tmp_path):
    def given() -> Iterator[Batch]:
        yield [answer(0, 4000)]
        if when == "between batches":
            kill_self()
        yield [answer(1, 4000)]

    if (child := os.fork()) == 0:
        if when == "before it is renamed":
            os.rename = kill_self
        write_labels(tmp_path, IDENTITY, given())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left / "table.arrow").stat().st_size > 0
    write_labels(tmp_path, IDENTITY, batches())
    assert_same(read_labels(tmp_path, IDENTITY), batches())
    assert left.exists()  # it might be that of a program that runs
    for path in (*left.iterdir(), left):
        os.utime(path, (time.time() - 2 * 24 * 3600,) * 2)
    write_labels(tmp_path, {"model": "b"}, batches())
    assert not left.exists() and len(list(tmp_path.iterdir())) == 2


def changed(folder):
    content = bytearray((folder / "table.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "table.arrow").write_bytes(content)


DAMAGES = {
    "changed": (changed, "its content is not what was written"),
    "no table": (lambda folder: (folder / "table.arrow").unlink(), "table.arrow"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_labels_are_told_and_can_be_made_anew(damage, tmp_path, caplog):
    write_labels(tmp_path, IDENTITY, batches())
    spoil, reason = DAMAGES[damage]
    spoil(labels_path(tmp_path, IDENTITY))
    with pytest.raises(ValueError, match="is missing or damaged: make these soft labels again"):
        read_labels(tmp_path, IDENTITY)
    assert "is damaged" in caplog.text and reason in caplog.text
    write_labels(tmp_path, IDENTITY, batches())
    assert_same(read_labels(tmp_path, IDENTITY), batches())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_full_disk_is_told_and_leaves_nothing(call, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"--logits_cache: .*soft-labels-.* could not be written \(no space left"):
        write_labels(tmp_path, IDENTITY, batches())
    assert not list(tmp_path.iterdir())
