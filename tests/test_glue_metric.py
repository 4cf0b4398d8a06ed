"""The metric of GLUE as verbalized question answering, against cases computed by hand."""

import warnings

import pytest

from heterofusion.evaluation.glue import GLUE_LABELS, parse_label, parse_similarity, score_glue
from heterofusion.evaluation.metrics import GLUEText

YES, NO = "acceptable", "unacceptable"


def test_cola_matches_hand_computed_values():
    predictions = [YES, YES, NO, NO, YES, "I think so"]
    references = [YES, NO, NO, YES, YES, NO]
    scores = GLUEText("cola").compute(predictions=predictions, references=references)
    assert scores["accuracy"] == pytest.approx(3 / 6)
    assert scores["format_failure_rate"] == pytest.approx(1 / 6)
    assert scores["num_examples"] == 6
    # three classes, of which the third (no label) is predicted once and never right: with s examples, c right ones,
    # p_k predicted and t_k expected per class, (c s - sum p_k t_k) / sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2))
    expected = (3 * 6 - (3 * 3 + 2 * 3)) / ((36 - (9 + 4 + 1)) * (36 - (9 + 9))) ** 0.5
    assert scores["matthews_correlation"] == pytest.approx(expected)
    assert set(scores) == {"accuracy", "matthews_correlation", "format_failure_rate", "num_examples"}


@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        ([YES, YES], [YES, NO]),
        ([YES, NO], [YES, YES]),
        ([YES, YES], [YES, YES]),
        (["?", ""], [YES, NO]),
        ([YES], [YES]),
    ],
)
def test_matthews_of_one_class_is_zero_without_a_warning(predictions, references):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score_glue("cola", predictions, references)["matthews_correlation"] == 0.0


@pytest.mark.parametrize(("task", "positive"), [("mrpc", "equivalent"), ("qqp", "duplicate")])
def test_f1_is_of_the_positive_label(task, positive):
    negative = f"not {positive}"
    predictions = [positive, positive, negative, "maybe", positive]
    references = [positive, negative, positive, positive, positive]
    scores = GLUEText(task).compute(predictions=predictions, references=references)
    assert scores["f1"] == pytest.approx(2 * 2 / (3 + 4))  # an answer that does not parse finds nothing
    assert scores["accuracy"] == pytest.approx(2 / 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score_glue(task, ["?"], [negative])["f1"] == 0.0


@pytest.mark.parametrize("task", [name for name in GLUE_LABELS if name not in ("cola", "mrpc", "qqp", "stsb")])
def test_other_tasks_have_accuracy_alone(task):
    labels = list(GLUE_LABELS[task])
    scores = GLUEText(task).compute(predictions=labels, references=labels)
    assert scores == {"accuracy": 1.0, "format_failure_rate": 0.0, "num_examples": len(labels)}
    assert GLUEText(task).compute(predictions=labels[::-1], references=labels)["accuracy"] < 1


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("entailment", "entailment"),
        (" Entailment.\n", "entailment"),
        ("NOT  ENTAILMENT", "not entailment"),
        ("**not entailment**", "not entailment"),
        ("\u201centailment\u201d!", "entailment"),
        ("'not\nentailment'", "not entailment"),
        ("", None),
        ("   ", None),
        ("None", None),
        ("...", None),
        ("yes", None),
        ("not-entailment", None),
        ("entailment, since it says so", None),
        ("The answer is entailment", None),
        ("entailment entailment", None),
        ("entailment\nSentence: next", None),
        ("entailmen", None),
    ],
)
def test_answers_are_the_label_and_nothing_else(answer, label):
    assert parse_label(answer, GLUE_LABELS["rte"]) == label
    scores = GLUEText("rte").compute(predictions=[answer], references=["entailment"])
    assert scores["accuracy"] == (label == "entailment")
    assert scores["format_failure_rate"] == (label is None)


def test_similarity_is_scored_by_correlation():
    predictions, references = ["0", "1.0", " 2.5.", "5"], ["0.0", "2.0", "3.0", "5.0"]
    scores = GLUEText("stsb").compute(predictions=predictions, references=references)
    # deviations from the means 2.125 and 2.5
    products = 2.125 * 2.5 + 1.125 * 0.5 + 0.375 * 0.5 + 2.875 * 2.5
    squares = (2.125**2 + 1.125**2 + 0.375**2 + 2.875**2) * (2.5**2 + 0.5**2 + 0.5**2 + 2.5**2)
    assert scores["pearson"] == pytest.approx(products / squares**0.5)
    assert scores["spearman"] == pytest.approx(1.0)
    assert set(scores) == {"pearson", "spearman", "format_failure_rate", "num_examples"}
    references = ["0", "5", "4"]
    unparsed, middle = (score_glue("stsb", ["0", "5", last], references) for last in ("high", "2.5"))
    assert unparsed == {**middle, "format_failure_rate": pytest.approx(1 / 3)}


@pytest.mark.parametrize("predictions", [["?", "?"], ["3", "3"], ["1", "2"]])
def test_undefined_correlation_is_zero_without_a_warning(predictions):
    references = ["4.0", "4.0"] if predictions == ["1", "2"] else ["1.0", "2.0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score_glue("stsb", predictions, references)
        assert score_glue("stsb", ["1"], ["1"])["pearson"] == 0.0
    assert (scores["pearson"], scores["spearman"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("answer", "number"),
    [("3.8", 3.8), (" 5 ", 5.0), ("0", 0.0), ("3.", 3.0), ("5.1", None), ("-1", None), ("about 3", None), ("", None),
     ("nan", None), ("1e0", None), ("3,5", None), (".5", None), ("4/5", None), ("\u0663", None)],
)  # fmt: skip
def test_similarity_is_a_number_from_0_to_5(answer, number):
    assert parse_similarity(answer) == number


def test_bad_calls_raise():
    with pytest.raises(ValueError, match="'glue' is no GLUE task; choose one of cola, "):
        GLUEText("glue")
    with pytest.raises(ValueError, match=r"references\[1\] is 'yes'; an answer of rte must be one of entailment, not"):
        score_glue("rte", ["a", "b"], ["entailment", "yes"])
    with pytest.raises(ValueError, match="must be a number from 0 to 5"):
        score_glue("stsb", ["1"], ["six"])
