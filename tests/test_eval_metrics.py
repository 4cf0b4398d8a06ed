"""The metrics of extraction and of GLUE as text against cases computed by hand, and which one scores a data set."""

import warnings

import pytest

from heterofusion.evaluation.glue import GLUE_LABELS, parse_label, parse_similarity, score_glue
from heterofusion.evaluation.metrics import METRICS, UIEF1, GLUEText, choose_metric, primary_score, score
from heterofusion.evaluation.uie import normalize, score_answers


@pytest.fixture(autouse=True)
def no_warnings():
    """What is undefined is 0, without a word of scipy or sklearn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("metric", METRICS)
def test_primary_score_is_among_the_scores(metric):
    answer = {"stsb": "2.5"}.get(metric) or (GLUE_LABELS[metric][0] if metric in GLUE_LABELS else "part: bolt, nut")
    scores = score(metric, [answer, answer], [answer, answer])
    assert scores[primary_score(metric)] == (0 if metric == "stsb" else 1)  # no correlation of equal numbers


def test_records_tell_the_metric():
    assert choose_metric("auto", [{"kind": "NER", "task": "a"}, {"kind": "NER", "task": "b"}], "x") == "NER"
    assert choose_metric("auto", [{"kind": "GLUE", "task": "sst2"}], "x") == "sst2"
    assert choose_metric("exact_match", [{"kind": "RE"}], "x") == "exact_match"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}], r"file x: no column `kind` that tells the metric \(found: None\); give --metric"),
        ([{"kind": "NER"}, {}], "file x mixes records of NER and None"),
        ([{"kind": "GLUE", "task": "rte"}, {"kind": "GLUE", "task": "cola"}], "mixes records of cola and rte"),
        ([{"kind": "GLUE", "task": "ax"}], r"\(found: ax\)"),
        ([{"kind": ["NER"]}], r"\(found: \['NER'\]\)"),
    ],
)
def test_records_that_do_not_tell_the_metric_raise(rows, message):
    with pytest.raises(ValueError, match=message):
        choose_metric("auto", rows, "file x")


def test_bad_calls_raise():
    with pytest.raises(ValueError, match="'EE' is no kind of extraction; choose one of NER, RE, ET"):
        UIEF1("EE").compute(predictions=["a"], references=["a"])
    with pytest.raises(ValueError, match="no strings; give '' where there is no answer"):
        UIEF1().compute(predictions=["None", None], references=["None", "None"])
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        score_answers(["None"], ["None", "None"])
    with pytest.raises(ValueError, match="'glue' is no GLUE task; choose one of cola, "):
        GLUEText("glue").compute(predictions=["a"], references=["a"])
    with pytest.raises(ValueError, match=r"references\[1\] is 'yes'; an answer of rte must be one of entailment, not"):
        score_glue("rte", ["a", "b"], ["entailment", "yes"])


def test_extraction_matches_hand_computed_values():
    predictions = [
        " tool: zorv; plant: mipa",  # one of two right, one wrong, one missed
        " None",  # right
        " tool: kel",  # spurious
        "I do not know",  # breaks the format; one item that is wrong, one missed
    ]
    references = [" tool: zorv; plant: mipo", " None", " None", " plant: dus"]
    scores = UIEF1().compute(predictions=predictions, references=references)
    assert (scores["true_positives"], scores["num_predicted"], scores["num_expected"]) == (1, 4, 3)
    assert (scores["precision"], scores["recall"]) == (pytest.approx(1 / 4), pytest.approx(1 / 3))
    assert scores["f1"] == pytest.approx(2 / 7)
    # types: tool 1 hit, 2 predicted, 1 expected; plant 0 hits; "i do not know" 0 hits
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert scores["sample_f1"] == pytest.approx((1 / 2 + 1 + 0 + 0) / 4)
    assert scores["format_failure_rate"] == pytest.approx(1 / 4)


def test_macro_by_type_of_relations_and_of_equal_spans():
    # one span under two types is two items; a relation's type ends at the first colon
    references = ["part: bolt; material: bolt", "Live in: Anna, Rome : north"]
    predictions = ["part: bolt; part: bolt", "live in: Anna, Rome: north; Kill: Anna, Karl"]
    scores = score_answers(predictions, references)
    assert (scores["true_positives"], scores["num_predicted"], scores["num_expected"]) == (2, 3, 3)
    assert scores["macro_f1"] == pytest.approx((1 + 0 + 1 + 0) / 4)  # part, material, live in, kill
    assert scores["sample_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("Tool :  Zorv ;plant:mipa", "plant: mipa; tool: zorv"),  # case, spaces, order
        ("tool: zorv; tool: zorv", "tool: zorv"),  # items are a set
        ("brand: at & t ; year: 1960 's", "brand: AT&T; year: 1960's"),
        ("place: Genève", "place: Gene\u0300ve"),  # composed and decomposed letters
        ("tool\uff1azorv\uff1bplant\uff1amipa", "tool: zorv; plant: mipa"),  # full-width signs of NFKC
        ("title: stop; go", "title: stop; go"),  # a semicolon splits it, on both sides
    ],
)
def test_equal_after_normalization(prediction, reference):
    assert score_answers([prediction], [reference])["f1"] == 1.0
    assert normalize("地名 東京") == "地名 東京"  # letters of other scripts keep their spaces


@pytest.mark.parametrize("answer", [" none ", "", "NONE", ";", "None;"])
def test_nothing_found(answer):
    scores = score_answers([answer], ["None"])
    assert (scores["sample_f1"], scores["f1"]) == (1.0, 0.0)  # no items at all: micro F1 is 0 by convention


@pytest.mark.parametrize(
    ("answer", "failures", "of_relations"),
    [
        ("None", 0, 0),
        ("works for: Anna, Karl, the younger; leads: Eva,Karl;", 0, 0),  # a comma in a span
        ("works for: Anna", 0, 1),
        ("works for: Anna, Karl; leads: Eva", 0, 1),
        ("", 1, 1),
        ("a: b; c", 1, 1),
    ],
)
def test_format_failures(answer, failures, of_relations):
    references = ["works for: Anna, Karl"]
    others, relations = (UIEF1(kind).compute(predictions=[answer], references=references) for kind in ("NER", "RE"))
    assert (others["format_failure_rate"], relations["format_failure_rate"]) == (failures, of_relations)
    assert others["f1"] == relations["f1"]
    assert others == UIEF1("ET").compute(predictions=[answer], references=references)


YES, NO = "acceptable", "unacceptable"


def test_cola_matches_hand_computed_values():
    predictions = [YES, YES, NO, NO, YES, "I think so"]
    references = [YES, NO, NO, YES, YES, NO]
    scores = GLUEText("cola").compute(predictions=predictions, references=references)
    assert (scores["accuracy"], scores["format_failure_rate"], scores["num_examples"]) == (3 / 6, 1 / 6, 6)
    # three classes, of which the third (no label) is predicted once and never right: with s examples, c right ones,
    # p_k predicted and t_k expected per class, (c s - sum p_k t_k) / sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2))
    expected = (3 * 6 - (3 * 3 + 2 * 3)) / ((36 - (9 + 4 + 1)) * (36 - (9 + 9))) ** 0.5
    assert scores["matthews_correlation"] == pytest.approx(expected)


@pytest.mark.parametrize(("task", "positive"), [("mrpc", "equivalent"), ("qqp", "duplicate")])
def test_f1_is_of_the_positive_label(task, positive):
    negative = f"not {positive}"
    predictions = [positive, positive, negative, "maybe", positive]
    scores = score_glue(task, predictions, [positive, negative, positive, positive, positive])
    assert scores["f1"] == pytest.approx(2 * 2 / (3 + 4))  # an answer that does not parse finds nothing
    assert scores["accuracy"] == pytest.approx(2 / 5)
    assert score_glue(task, ["?"], [negative])["f1"] == 0.0
    # nor can it raise F1 by saying nothing
    assert score_glue(task, [positive, "?", ""], [positive, negative, negative])["f1"] == pytest.approx(2 / (2 + 2))


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (" Entailment.\n", "entailment"),
        ("NOT  ENTAILMENT", "not entailment"),
        ("\u201centailment\u201d!", "entailment"),
        ("'not\nentailment'", "not entailment"),
        ("", None),
        ("not-entailment", None),
        ("entailment, since it says so", None),
        ("entailment\nSentence: next", None),
    ],
)
def test_answers_are_the_label_and_nothing_else(answer, label):
    assert parse_label(answer, GLUE_LABELS["rte"]) == label
    scores = score_glue("rte", [answer], ["entailment"])
    assert (scores["accuracy"], scores["format_failure_rate"]) == (label == "entailment", label is None)


def test_similarity_is_scored_by_correlation():
    predictions, references = ["0", "1.0", " 2.5.", "5"], ["0.0", "2.0", "3.0", "5.0"]
    scores = GLUEText("stsb").compute(predictions=predictions, references=references)
    # deviations from the means 2.125 and 2.5
    products = 2.125 * 2.5 + 1.125 * 0.5 + 0.375 * 0.5 + 2.875 * 2.5
    squares = (2.125**2 + 1.125**2 + 0.375**2 + 2.875**2) * (2.5**2 + 0.5**2 + 0.5**2 + 2.5**2)
    assert scores["pearson"] == pytest.approx(products / squares**0.5)
    assert scores["spearman"] == pytest.approx(1.0)
    assert set(scores) == {"pearson", "spearman", "format_failure_rate", "num_examples"}
    unparsed, middle = (score_glue("stsb", ["0", "5", last], ["0", "5", "4"]) for last in ("high", "2.5"))
    assert unparsed == {**middle, "format_failure_rate": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("task", "predictions", "references"),
    [("cola", [YES, YES], [YES, NO]), ("cola", [YES, NO], [YES, YES]), ("cola", ["?", ""], [YES, NO]),
     ("stsb", ["?", "?"], ["1.0", "2.0"]), ("stsb", ["1", "2"], ["4.0", "4.0"]), ("stsb", ["1"], ["1"])],
)  # fmt: skip
def test_undefined_correlation_is_zero(task, predictions, references):
    scores = score_glue(task, predictions, references)
    undefined = {"cola": ["matthews_correlation"], "stsb": ["pearson", "spearman"]}[task]
    assert all(scores[name] == 0.0 for name in undefined)


@pytest.mark.parametrize(
    ("answer", "number"),
    [("3.8", 3.8), (" 5 ", 5.0), ("0", 0.0), ("3.", 3.0), ("5.1", None), ("-1", None), ("about 3", None), ("", None),
     ("nan", None), ("1e0", None), ("3,5", None), (".5", None), ("4/5", None), ("\u0663", None)],
)  # fmt: skip
def test_similarity_is_a_number_from_0_to_5(answer, number):
    assert parse_similarity(answer) == number
