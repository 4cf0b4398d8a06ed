"""recipes/uie/prepare.py: data in the InstructUIE layout become replay, train, validation and test files."""

import functools
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from heterofusion.evaluation.metrics import UIEF1
from preparation_runner import (
    FILMS,
    check_accounts,
    check_replay_keeps_all,
    fails,
    film,
    run_uie,
    texts,
    town,
    uie,
    write_task,
    write_uie,
    written,
)
from recipe_runner import contents

pytestmark = pytest.mark.usefixtures("logging_restored", "offline_datasets")
uie_fails = functools.partial(fails, uie.main)


@pytest.fixture
def data(tmp_path) -> Path:
    return write_uie(tmp_path / "data")


# ---- what is written --------------------------------------------------------------------------------------------


def test_prompts_and_answers(data, tmp_path):
    out = tmp_path / "out"
    run_uie(data, out)
    films = {row["prompt"].split("\n")[2]: row for row in written(out, "train/NER_films")}
    assert films["Text: show Film 1 of 1960 s"] == {
        "prompt": 'Go through the text and write down each entity with its type, as "type1: word1; type2: word2"; '
        "write None without any.\nOption: title, year, actor\nText: show Film 1 of 1960 s\nAnswer:",
        "completion": " title: Film 1; year: 1960 s",
        "task": "NER_films",
        "kind": "NER",
    }
    assert films["Text: show Film 3 of 1960 s"]["completion"] == " None"
    assert written(out, "test/RE_towns")[0]["completion"] == " lives in: Ann 99, Rome"
    used = {row["prompt"].split("\n")[0] for row in films.values()}
    assert used == set(uie.INSTRUCTIONS["NER"])  # all wordings, each text always in the same
    replay = written(out, "replay/NER_films")
    assert len(replay) == 10 and all(row in films.values() for row in replay)


def test_files_and_manifest(data, tmp_path):
    out = tmp_path / "out"
    manifest, log = run_uie(data, out, num_validation=5, num_test=4)
    assert list(manifest["tasks"]) == ["NER_films", "RE_towns"] and log == ""
    films, towns = manifest["tasks"].values()
    assert [entry["records"] for entry in films["files"].values()] == [10, 24, 5, 4]
    assert [entry["records"] for entry in towns["files"].values()] == [
        10,
        27,
        3,
        2,
    ]  # without dev.json a tenth of train
    assert films["source"] == "NER/films" and films["labels"] == FILMS and films["labels_from"] == "labels.json"
    train = (data / "NER" / "films" / "train.json").read_bytes()
    assert films["inputs"]["train.json"] == hashlib.sha256(train).hexdigest() and len(films["inputs"]) == 4
    for file, entry in films["files"].items():
        assert entry["sha256"] == hashlib.sha256((out / file).read_bytes()).hexdigest()
    assert [manifest[name] for name in ("seed", "num_replay", "num_validation", "num_test")] == [42, 10, 5, 4]
    assert str(tmp_path) not in (out / "manifest.json").read_text()
    check_accounts(manifest)


def test_prepared_files_are_read_whole_and_answer_themselves(data, tmp_path):
    out = tmp_path / "out"
    awkward = [
        {"name": "Mission : Impossible", "type": "title"}, {"name": "stop ; go", "type": "title"},
        {"name": "Zoë\u2028 \n & 東京", "type": "actor"}, {"name": "None", "type": "title"},
    ]  # fmt: skip
    rows = json.loads((data / "NER" / "films" / "train.json").read_text())
    write_task(data / "NER" / "films", train=[film(50, entities=awkward), *rows])
    manifest, _ = run_uie(data, out, tasks=["NER/films", "RE/towns", "ET/films"])
    assert manifest["tasks"]["NER_films"]["splits"]["train"]["items_with_semicolon"] == 1
    check_accounts(manifest)
    check_replay_keeps_all(out)
    answers = [row for path in sorted(out.rglob("*.jsonl")) for row in written(path.parent, path.stem)]
    assert " title: Mission : Impossible; title: stop ; go; actor: Zoë & 東京; title: None" in [
        row["completion"] for row in answers
    ]
    for kind in ("NER", "RE", "ET"):
        found = sorted({row["completion"] for row in answers if row["kind"] == kind})
        for answer in found:
            scores = UIEF1(kind).compute(predictions=[answer], references=[answer])
            assert scores["sample_f1"] == 1 and scores["f1"] == (answer != " None")
            assert scores["format_failure_rate"] == ("stop ; go" in answer)
        assert UIEF1(kind).compute(predictions=found, references=found)["macro_f1"] == 1


def test_entity_typing_gives_the_entities(data, tmp_path):
    out = tmp_path / "out"
    extra = [{"name": "old", "type": "NA"}, {"name": "Film 1", "type": "actor"}]
    rows = [film(1), film(3), film(4, entities=[*film(4)["entities"], *extra, film(4)["entities"][0]])]
    write_task(data / "NER" / "films", train=rows)
    manifest, log = run_uie(data, out, tasks=["ET/films"])
    assert "ET/films has no folder of its own: it is made of NER/films" in log
    train = {row["prompt"].split("\n")[2]: row for row in written(out, "train/ET_films")}
    assert list(train) == ["Text: show Film 1 of 1960 s", "Text: show Film 4 of 1960 s"]  # film 3 has no entity
    row = train["Text: show Film 4 of 1960 s"]
    assert row["prompt"].split("\n")[0] in uie.INSTRUCTIONS["ET"]
    assert row["prompt"].endswith("\nEntities: Film 4, 1960 s, Film 1\nAnswer:") and row["kind"] == "ET"
    assert row["completion"] == " title: Film 4; year: 1960 s; actor: Film 1"
    assert manifest["tasks"]["ET_films"]["source"] == "ET/films"
    counts = manifest["tasks"]["ET_films"]["splits"]["train"]
    assert counts == {
        "read": 3, "without_answer": 1, "untyped_items": 1, "repeated_items": 1, "kept": 2,
    }  # fmt: skip


# ---- sampling ---------------------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_other_tasks_or_on_the_order(data, tmp_path):
    run_uie(data, tmp_path / "all")
    run_uie(data, tmp_path / "again")
    assert [*contents(tmp_path / "again").values()] == [*contents(tmp_path / "all").values()]
    run_uie(data, tmp_path / "seed", seed=7)
    assert texts(tmp_path / "seed", "replay/NER_films") != texts(tmp_path / "all", "replay/NER_films")
    rows = json.loads((data / "RE" / "towns" / "train.json").read_text())
    write_task(data / "RE" / "towns", train=rows[::-1])
    run_uie(data, tmp_path / "one", tasks=["towns"])
    for name in ("replay/RE_towns", "validation/RE_towns"):
        assert texts(tmp_path / "one", name) == texts(tmp_path / "all", name)[::-1]
    run_uie(data, tmp_path / "more", tasks=["towns"], num_replay=20)
    assert set(texts(tmp_path / "one", "replay/RE_towns")) < set(texts(tmp_path / "more", "replay/RE_towns"))


def test_no_text_is_in_two_splits(data, tmp_path):
    films = [film(i) for i in range(40)]
    films[0]["sentence"] = films[38]["sentence"].upper()  # of test, in other letters and spaces
    films[1]["sentence"] = f" {films[39]['sentence']}".replace(" ", "  ")
    films[2]["sentence"] = films[25]["sentence"]  # of dev
    films[26]["sentence"] = films[39]["sentence"]
    films[4] = films[5]
    films[6] = film(7, entities=[])  # the text of film 7 with another answer is no repeat
    write_task(data / "NER" / "films", train=films[:24], dev=films[24:32], test=[*films[32:], films[39]])
    out = tmp_path / "out"
    manifest, _ = run_uie(data, out, tasks=["films"], num_replay=300)
    parts = {name: {" ".join(text.casefold().split()) for text in texts(out, f"{name}/NER_films")}
             for name in ("train", "validation", "test")}  # fmt: skip
    assert not parts["train"] & parts["test"] and not parts["validation"] & parts["test"]
    assert not parts["train"] & parts["validation"]
    assert texts(out, "replay/NER_films") == texts(out, "train/NER_films")
    assert manifest["tasks"]["NER_films"]["splits"] == {
        "train": {"read": 24, "in_test": 2, "in_validation": 1, "repeated": 1, "kept": 20},
        "validation": {"read": 8, "in_test": 1, "kept": 7},
        "test": {"read": 9, "kept": 9},  # as published: its own repeats stay
    }
    check_accounts(manifest)


def test_unlabelled_prompts_are_in_no_other_file(data, tmp_path):
    write_task(data / "RE" / "towns", train=[row for i in range(30) for row in (town(i), town(i, relations=[]))])
    manifest, _ = run_uie(data, tmp_path / "out", tasks=["towns"], num_unlabelled=4)
    counts = manifest["tasks"]["RE_towns"]["splits"]["train"]
    assert counts["cut_for_unlabelled"] == 4 and manifest["num_unlabelled"] == 4
    assert all(list(row) == ["prompt", "task", "kind"] for row in written(tmp_path / "out", "unlabelled/RE_towns"))
    parts = [
        set(texts(tmp_path / "out", f"{name}/RE_towns")) for name in ("train", "validation", "test", "unlabelled")
    ]
    assert sum(map(len, parts)) == len(set().union(*parts)) and len(parts[3]) <= 4
    check_accounts(manifest)


# ---- the layout -------------------------------------------------------------------------------------------------


def test_types_are_collected_without_labels_file(data, tmp_path):
    (data / "NER" / "films" / "labels.json").unlink()
    manifest, log = run_uie(data, tmp_path / "out", tasks=["films"])
    assert "NER/films has no labels.json: its 2 types are those of the records" in log
    task = manifest["tasks"]["NER_films"]
    assert task["labels"] == ["title", "year"] and task["labels_from"] == "records" and len(task["inputs"]) == 3
    assert "\nOption: title, year\n" in written(tmp_path / "out", "test/NER_films")[0]["prompt"]
    write_task(data / "NER" / "films", ["actor", "NA", "title ", "title"])
    manifest, log = run_uie(data, tmp_path / "other", tasks=["films"])
    assert "NER/films: labels.json lacks 'year', which the records have; added to the options" in log
    task = manifest["tasks"]["NER_films"]
    assert task["labels"] == ["actor", "title", "year"] and task["labels_added"] == ["year"]


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

    def full(path, rows):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("_prepared.write_lines", full)
    uie_fails(capsys, data, "No space left on device", overwrite=True, seed=1)
    assert contents(out) == before


# ---- refused ----------------------------------------------------------------------------------------------------


def rows_of(*changes) -> str:
    return json.dumps([film(i) for i in range(1, 4)] + list(changes))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["is empty", "fill it"]),
        ("[]", ["holds no records"]),
        ('{"sentence": "a", "entities": []}\n{"sentence": "b"\n', ["is not valid JSON at line 2"]),
        (rows_of(film(5, sentence=["a"])), ["record 4", "`sentence` is of type list"]),
        (rows_of(film(5, entities=None)), ["record 4", "`entities` is null", "make it a list"]),
        (rows_of({"sentence": "a", "relations": []}), ["record 4", "`entities` is missing (found: "]),
        (rows_of(film(5, entities=["Film 5"])), ["record 4", "`entities[0]` has no `type`"]),
        (rows_of(film(5, entities=[{"type": "year", "name": 5}])), ["record 4", "`entities[0].name` is of type int"]),
        (rows_of(film(5, entities=[{"type": "a: b", "name": "c"}])), ["record 4", "has the type 'a: b'", "rename"]),
        (json.dumps([{"sentence": " "}]), ["NER_films: no record of train can be used (1 read, 1 without_text)"]),
        (rows_of().replace("Film", "FILM"), ["NER_films: no record of train can be used (3 in_test, 3 read)"]),
    ],
)  # fmt: skip
def test_bad_train_file(data, capsys, content, words):
    path = data / "NER" / "films" / "train.json"
    path.write_text(content)
    write_task(path.parent, test=[film(i) for i in range(1, 4)])
    uie_fails(capsys, data, *words, *([] if "NER_films" in words[0] else [path]))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["title", 3], ["is no list of strings"]),
        (["NA", " "], ["names no type", "remove it"]),
        (["title; year"], ["has the type 'title; year'", "rename it"]),
    ],
)
def test_bad_labels_file(data, capsys, labels, words):
    path = write_task(data / "NER" / "films", labels)
    uie_fails(capsys, data, path / "labels.json", *words)


def test_missing_files_and_folders(data, capsys):
    relation = {"head": {"name": "Ann"}, "type": "lives in"}
    towns = write_task(data / "RE" / "towns", train=[town(1), town(2, relations=[relation])])
    uie_fails(capsys, data, "towns/train.json, record 2", "`relations[0]` has no `tail`")
    write_task(towns, train=[town(1, relations=[{**relation, "tail": "Rome"}])])
    uie_fails(capsys, data, "towns/train.json, record 1", "`relations[0].tail` has no `name`")
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


def test_bad_flags(data, capsys):
    for name, value, least in (("replay", 0, 1), ("validation", -1, 0), ("test", 0, 1), ("unlabelled", -1, 0)):
        uie_fails(capsys, data, f"--num_{name} is {value}", f"at least {least}", **{f"num_{name}": value})
    uie_fails(capsys, data, "--tasks has 'film', which is not there: choose of NER/films, RE/towns", tasks=["film"])
    uie_fails(capsys, data, "'ET/towns'", tasks=["ET/towns"])  # relations have no entities to type
    shutil.copytree(data / "NER" / "films", data / "ET" / "films")
    uie_fails(capsys, data, "'films', which may be NER/films or ET/films", tasks=["films"])
