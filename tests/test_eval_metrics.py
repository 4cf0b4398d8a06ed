"""Which metric scores a data set, and that it is the one there is."""

import pytest

from heterofusion.evaluation.glue import GLUE_LABELS
from heterofusion.evaluation.metrics import METRICS, ExactMatch, choose_metric, primary_score, score


def test_exact_match_heeds_case_but_not_the_space_around():
    predictions, references = [" yes\n", "Yes", "a  b", ""], ["yes", "yes", "a b", ""]
    scores = ExactMatch().compute(predictions=predictions, references=references)
    assert scores == {"exact_match": 0.5, "num_examples": 4} == score("exact_match", predictions, references)


@pytest.mark.parametrize("metric", METRICS)
def test_primary_score_is_among_the_scores(metric):
    answer = {"stsb": "2.5"}.get(metric) or (GLUE_LABELS[metric][0] if metric in GLUE_LABELS else "part: bolt, nut")
    scores = score(metric, [answer, answer], [answer, answer])
    assert scores[primary_score(metric)] == (0 if metric == "stsb" else 1)  # no correlation of equal numbers


def test_answers_that_say_nothing_cannot_raise_f1():
    references = ["equivalent", "not equivalent", "not equivalent"]
    assert score("mrpc", ["equivalent", "?", ""], references)["f1"] == pytest.approx(2 / (2 + 2))
    assert score("mrpc", ["equivalent", *references[1:]], references)["f1"] == 1


@pytest.mark.parametrize(
    ("rows", "metric"),
    [
        ([{"kind": "NER", "task": "a"}, {"kind": "NER", "task": "b"}], "NER"),
        ([{"kind": "RE"}], "RE"),
        ([{"kind": "GLUE", "task": "sst2"}], "sst2"),
    ],
)
def test_records_tell_the_metric(rows, metric):
    assert choose_metric("auto", rows, "file x") == metric
    assert choose_metric("exact_match", rows, "file x") == "exact_match"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}], "file x: its records have no column `kind` that tells the metric; give --metric"),
        ([{"kind": "NER"}, {"kind": "RE"}], "file x mixes records of NER and RE"),
        ([{"kind": "NER"}, {}], "file x mixes records of NER and the kind None"),
        ([{"kind": "GLUE", "task": "rte"}, {"kind": "GLUE", "task": "cola"}], "mixes records of cola and rte"),
        ([{"kind": "GLUE", "task": "ax"}], "the GLUE task 'ax', for which there is no metric; give --metric"),
        ([{"kind": "EE"}], "the kind 'EE', for which there is no metric; give --metric"),
        ([{"kind": ["NER"]}], r"the kind \['NER'\], for which there is no metric"),
    ],
)
def test_records_that_do_not_tell_the_metric_raise(rows, message):
    with pytest.raises(ValueError, match=message):
        choose_metric("auto", rows, "file x")


def test_unknown_metric_raises():
    with pytest.raises(ValueError, match="'bleu' is not known; choose one of auto, NER, RE, ET, uie, cola"):
        score("bleu", ["a"], ["a"])
