"""Records from files and folders: every form gives the same, and what a user reads when one cannot be read."""

import json

import datasets
import pytest

from heterofusion.data.files import load_records
from heterofusion.data.replay import build_replay
from replay_builders import CHAT, GOOD, answers, args_for, byte_level, numbered, refused, write

pytestmark = pytest.mark.usefixtures("offline_datasets")


def test_file_forms_give_the_same_records(tmp_path):
    records = [{"prompt": "ä\u2028?", "completion": "42"}, {"prompt": 'q, "q"\nq', "completion": "NA"}]
    whole_list, lines = json.dumps(records, ensure_ascii=False), [json.dumps(r, ensure_ascii=False) for r in records]
    files = {
        "list.json": whole_list,
        "bom.json": "\ufeff" + json.dumps(records, indent=1).replace("\n", "\r\n"),
        "wrapped.json": json.dumps({"version": 1, "data": records}),
        "wrapped.jsonl": json.dumps({"data": records}),
        "lines.json": "\n".join(lines),
        "lines.jsonl": "\ufeff" + "\r\n".join(["", lines[0], "", lines[1], ""]),
        "list.jsonl": whole_list,
        "table.csv": '\ufeffprompt,completion\r\nä\u2028?,42\r\n"q, ""q""\nq",NA\r\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("utf-8"))
        assert load_records(str(tmp_path / name)).rows == records, name
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "table.parquet")
    assert load_records(str(tmp_path / "table.parquet")).rows.to_list() == records


def test_folders(tmp_path):
    splits = datasets.DatasetDict({s: datasets.Dataset.from_list(numbered(3, s)) for s in ("train", "test")})
    splits.save_to_disk(tmp_path / "dict")
    splits["train"].save_to_disk(tmp_path / "single")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", numbered(3, "train"))
    write(tmp_path / "files" / "test.jsonl", numbered(2, "test"))
    assert load_records(str(tmp_path / "dict"), split="test").rows.to_list() == numbered(3, "test")
    assert load_records(str(tmp_path / "single")).rows.to_list() == numbered(3, "train")
    assert load_records(str(tmp_path / "files"), split="test").rows.to_list() == numbered(2, "test")


def test_messages_from_parquet(tmp_path):
    # Arrow fills keys that some messages lack with null: that is no error unless the key is role or content.
    turns = [{"role": "user", "content": "yes?", "name": "Ann"}, {"role": "assistant", "content": "yes"}]
    datasets.Dataset.from_list([{"messages": turns}]).to_parquet(tmp_path / "chat.parquet")
    tokenizer = byte_level(template=CHAT)
    dataset, _ = build_replay(args_for(tmp_path / "chat.parquet"), tokenizer)
    assert answers(dataset, tokenizer) == ["yes"]


UNREADABLE = [
    ("a.json", " \n\n", "is empty: leave it out or fill it"),
    ("a.jsonl", '{"text": "a"}\n\n{"text": b}\n', r"not valid JSON at line 3, column 10 \(Expecting value\)"),
    ("c.json", '[\n {"text": "a"},\n {"text" "b"}\n]', r"not valid JSON at line 3, column 10 \(Expecting ':'"),
    ("f.json", '[{"text": "a"}, "b"]', r"item at index 1 is of type str, not an object"),
    ("h.json", "3", r"is of type int: make it a list of objects"),
    ("i.json", '{"a": [{}], "b": [{}]}', r"an object with 2 lists and no known columns \(found: a, b\)"),
    ("j.json", "[" * 100_000, r"holds a value that cannot be read"),
    ("l.csv", 'text,id\na,1\n"b\nc,2\n', r"not valid CSV from line 3 on"),
    ("m.csv", "prompt,completion\na,b\na,b,c\n", r"line 3 has 3 fields, but the header has 2: quote fields"),
    ("o.parquet", "hello", r"not a readable parquet file"),
    ("t.json", b'[{"text": "\xe4"}]', r"not UTF-8 \(byte 0xe4 at offset 11\): convert it"),
]


@pytest.mark.parametrize(("name", "content", "match"), UNREADABLE)
def test_unreadable_file_raises(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(tmp_path / name, match)


def test_bad_split_or_folder_raises(tmp_path):
    path = write(tmp_path / "a.json", [GOOD])
    refused(path, r"has no splits, but --dataset_split is 'train\[:10%\]'", dataset_split="train[:10%]")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "replay folder .* holds no data set that can be read")
    splits = datasets.DatasetDict({"test": datasets.Dataset.from_list([GOOD])})
    splits.save_to_disk(tmp_path / "dict")
    refused(tmp_path / "dict", r"has no split 'train', only test: set --dataset_split to one of test")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "test.jsonl", [GOOD])
    refused(tmp_path / "files", r"no configuration None with split 'train' .* check --dataset_config")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text('{"text": \n')
    refused(tmp_path / "broken", "holds a file that cannot be read")
