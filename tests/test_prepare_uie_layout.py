"""recipes/uie/prepare.py: the forms that data in the InstructUIE layout come in, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest

from preparation_runner import film, prepare, run_uie, texts, town, uie, uie_fails, write_task, write_uie, written
from recipe_runner import contents, error_line, flags

pytestmark = pytest.mark.usefixtures("logging_restored")


@pytest.fixture
def data(tmp_path) -> Path:
    return write_uie(tmp_path / "data")


# ---- the layout -------------------------------------------------------------------------------------------------


def test_types_are_collected_without_labels_file(data, tmp_path):
    (data / "NER" / "films" / "labels.json").unlink()
    manifest, log = run_uie(data, tmp_path / "out", tasks=["films"])
    assert "NER/films has no labels.json: its 2 types are those of the records" in log
    task = manifest["tasks"]["NER_films"]
    assert task["labels"] == ["title", "year"] and task["labels_from"] == "records" and len(task["inputs"]) == 3
    assert "\nOption: title, year\n" in written(tmp_path / "out", "test/NER_films")[0]["prompt"]


def test_types_that_labels_file_lacks_are_added(data, tmp_path):
    write_task(data / "NER" / "films", ["actor", "NA", "title ", "title"])
    manifest, log = run_uie(data, tmp_path / "out", tasks=["films"])
    assert "NER/films: labels.json lacks 'year', which the records have; added to the options" in log
    assert manifest["tasks"]["NER_films"]["labels"] == ["actor", "title", "year"]
    assert manifest["tasks"]["NER_films"]["labels_added"] == ["year"]


@pytest.mark.parametrize("form", ["lines", "one line", "byte order mark", "wrapped", "Windows line ends"])
def test_forms_of_json(data, tmp_path, form):
    path = data / "RE" / "towns" / "test.json"
    rows = [town(99)] if form == "one line" else [town(99), town(100)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if form == "wrapped":
        text = json.dumps({"data": rows})
    text = ("\ufeff" if form == "byte order mark" else "") + text
    path.write_bytes((text.replace("\n", "\r\n") if form == "Windows line ends" else text).encode())
    run_uie(data, tmp_path / "out", tasks=["towns"])
    expected = [f"Text: {row['sentence']}" for row in rows]
    assert texts(tmp_path / "out", "test/RE_towns") == expected


def test_records_without_a_sentence_are_counted(data, tmp_path):
    rows = [town(99), {"relations": []}, town(1, sentence=None), town(2, sentence="\n"), town(100)]
    write_task(data / "RE" / "towns", test=rows)
    manifest, _ = run_uie(data, tmp_path / "out", tasks=["towns"])
    assert manifest["tasks"]["RE_towns"]["splits"]["test"] == {"read": 5, "without_text": 3, "kept": 2}


def test_names_with_spaces_and_slashes(data, tmp_path):
    shutil.move(data / "NER" / "films", data / "NER" / "ACE 2004 en")
    shutil.copytree(data / "NER" / "ACE 2004 en", data / "NER" / "group" / "films")
    (data / "EE" / "events").mkdir(parents=True)
    (data / "NER" / ".cache").mkdir()
    (data / "NER" / "empty").mkdir()
    manifest, log = run_uie(data, tmp_path / "out")
    assert list(manifest["tasks"]) == ["NER_ACE_2004_en", "NER_group_films", "RE_towns"]
    assert (tmp_path / "out" / "replay" / "NER_group_films.jsonl").is_file()
    assert "EE: its name is none of NER, RE, ET" in log and ".cache" not in log
    assert "empty: it holds none of train.json, dev.json, test.json" in log
    manifest, _ = run_uie(data, tmp_path / "some", tasks=["NER/group/films/", "NER/ACE 2004 en", "group/films"])
    assert list(manifest["tasks"]) == ["NER_group_films", "NER_ACE_2004_en"]


def test_flags_may_stand_in_a_file(data, tmp_path):
    config = tmp_path / "prepare.yaml"
    config.write_text(f"dataset_path: {data}\ntasks: [towns]\nnum_replay: 4\nseed: 1\n")
    manifest, _ = prepare(uie.main, tmp_path / "out", config=config, num_replay=5)
    assert (manifest["num_replay"], manifest["seed"], list(manifest["tasks"])) == (5, 1, ["RE_towns"])


def test_overwrite_replaces_what_was_prepared_before(data, tmp_path, capsys):
    out = tmp_path / "out"
    run_uie(data, out)
    mine = out / "replay" / "mine.jsonl"
    mine.write_text("{}\n")
    uie_fails(capsys, data, f"--output_dir {out} exists and is not empty", "--overwrite true")
    run_uie(data, out, tasks=["towns"], overwrite=True)
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {
        "manifest.json", "replay/mine.jsonl", "replay/RE_towns.jsonl", "train/RE_towns.jsonl",
        "validation/RE_towns.jsonl", "test/RE_towns.jsonl",
    }  # fmt: skip
    (tmp_path / "mine.txt").write_text("")
    (out / "manifest.json").write_text('{"tasks": {"a": {"files": ["../mine.txt"]}}}')
    run_uie(data, out, overwrite=True)
    assert (tmp_path / "mine.txt").is_file()


def test_a_failed_write_leaves_nothing_half_done(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    run_uie(data, out)
    before = contents(out)

    def full(path, task, name):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("heterofusion.data.prepared._write_examples", full)
    uie_fails(capsys, data, "No space left on device", overwrite=True, seed=1)
    assert contents(out) == before


# ---- refused ----------------------------------------------------------------------------------------------------


def rows_of(*changes) -> str:
    return json.dumps([film(i) for i in range(1, 4)] + list(changes))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["is empty", "fill it"]),
        ("\ufeff \n", ["is empty"]),
        ("[]", ["holds no records"]),
        (b'[{"sentence": "caf\xe9"}]', ["is not UTF-8 (byte 0xe9 at offset 18)", "convert it"]),
        ("[{", ["is not valid JSON at line 1, column 3"]),
        ('{"sentence": "a", "entities": []}\n{"sentence": "b"\n', ["is not valid JSON at line 2"]),
        ("[1]", ["item at index 0", "not an object"]),
        (rows_of(film(5, sentence=["a"])), ["record 4", "`sentence` is of type list"]),
        (rows_of(film(5, sentence="\ud800")), ["record 4", "`sentence` holds half a surrogate pair"]),
        (rows_of(film(5, entities=None)), ["record 4", "`entities` is null", "make it a list"]),
        (rows_of({"sentence": "a", "relations": []}), ["record 4", "`entities` is missing (found: "]),
        (rows_of(film(5, entities=["Film 5"])), ["record 4", "`entities[0]` has no `type`"]),
        (rows_of(film(5, entities=[{"type": "year"}])), ["record 4", "`entities[0]` has no `name`"]),
        (rows_of(film(5, entities=[{"type": "year", "name": 5}])), ["record 4", "`entities[0].name` is of type int"]),
        (rows_of(film(5, entities=[{"type": "a: b", "name": "c"}])), ["record 4", "has the type 'a: b'", "rename"]),
        (json.dumps([{"sentence": " "}]), ["NER_films: no record of train can be used (1 read, 1 without_text)"]),
        (rows_of().replace("Film", "FILM"), ["NER_films: no record of train can be used (3 in_test, 3 read)"]),
    ],
)  # fmt: skip
def test_bad_train_file(data, capsys, content, words):
    path = data / "NER" / "films" / "train.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    write_task(path.parent, test=[film(i) for i in range(1, 4)])
    uie_fails(capsys, data, *words, *([] if "NER_films" in words[0] else [path]))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"title": 0}, ["is no list of strings", '["person", "place"]']),
        (["title", 3], ["is no list of strings"]),
        (["NA", " "], ["names no type", "remove it"]),
        (["title; year"], ["has the type 'title; year'", "rename it"]),
    ],
)
def test_bad_labels_file(data, capsys, labels, words):
    path = write_task(data / "NER" / "films", labels)
    uie_fails(capsys, data, path / "labels.json", *words)


def test_bad_relations(data, capsys):
    relation = {"head": {"name": "Ann"}, "type": "lives in"}
    write_task(data / "RE" / "towns", train=[town(1), town(2, relations=[relation])])
    uie_fails(capsys, data, "towns/train.json, record 2", "`relations[0]` has no `tail`")
    write_task(data / "RE" / "towns", train=[town(1, relations=[{**relation, "tail": "Rome"}])])
    uie_fails(capsys, data, "towns/train.json, record 1", "`relations[0].tail` has no `name`")


def test_missing_files_and_folders(data, capsys):
    films = data / "NER" / "films"
    (films / "test.json").unlink()
    uie_fails(capsys, data, "NER/films has no test.json", "leave the task out with --tasks")
    write_task(films, train=[film(1, entities=[])], dev=[film(4, entities=[])], test=[film(2, entities=[])])
    (films / "labels.json").unlink()
    uie_fails(capsys, data, films / "labels.json", "no record has a type")
    uie_fails(capsys, data / "NER", "holds no task", "NER/mit-movie")
    uie_fails(capsys, data / "nowhere", "is no folder")
    line_break = write_task(data / "RE" / "a\nb", train=[town(1)])
    uie_fails(capsys, data, "'RE/a\\nb'", "rename it")
    shutil.rmtree(line_break)


def test_bad_task_names(data, capsys):
    uie_fails(capsys, data, "--tasks has 'film', which is not there: choose of NER/films, RE/towns", tasks=["film"])
    uie_fails(capsys, data, "'ET/towns'", tasks=["ET/towns"])  # relations have no entities to type
    shutil.copytree(data / "NER" / "films", data / "ET" / "films")
    uie_fails(capsys, data, "'films', which may be NER/films or ET/films", tasks=["films"])
    shutil.copytree(data / "NER" / "films", data / "NER" / "my films")
    shutil.copytree(data / "NER" / "films", data / "NER" / "my_films")
    uie_fails(capsys, data, "'NER/my films' and 'NER/my_films'", "'NER_my_films'")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_replay": 0}, ["--num_replay is 0", "at least 1"]),
        ({"num_validation": -1}, ["--num_validation is -1", "at least 0"]),
        ({"num_test": 0}, ["--num_test is 0"]),
        ({"num_replay": "many"}, ["--num_replay"]),
    ],
)
def test_bad_numbers(data, capsys, values, words):
    uie_fails(capsys, data, *words, **values)


def test_output_folder_must_not_be_a_file(data, capsys):
    (data.parent / "file").write_text("")
    argv = flags({"dataset_path": data, "output_dir": data.parent / "file"})
    error_line(capsys, uie.main, argv, "--output_dir", "is a file")
