"""The extraction metric against cases computed by hand."""

import pytest

from heterofusion.evaluation.metrics import UIEF1
from heterofusion.evaluation.uie import normalize, parse_items, score_answers


def f1_of(prediction: str, reference: str) -> float:
    return score_answers([prediction], [reference])["f1"]


def test_scores_match_hand_computed_values():
    predictions = [
        " tool: zorv; plant: mipa",  # one of two right, one wrong, one missed
        " None",  # right
        " tool: kel",  # spurious
        "I do not know",  # breaks the format; one item that is wrong, one missed
    ]
    references = [" tool: zorv; plant: mipo", " None", " None", " plant: dus"]
    scores = UIEF1().compute(predictions=predictions, references=references)
    assert scores["true_positives"] == 1
    assert scores["num_predicted"] == 4
    assert scores["num_expected"] == 3
    assert scores["precision"] == pytest.approx(1 / 4)
    assert scores["recall"] == pytest.approx(1 / 3)
    assert scores["f1"] == pytest.approx(2 / 7)
    # types: tool 1 hit, 2 predicted, 1 expected; plant 0 hits; "i do not know" 0 hits
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert scores["sample_f1"] == pytest.approx((1 / 2 + 1 + 0 + 0) / 4)
    assert scores["format_failure_rate"] == pytest.approx(1 / 4)


def test_relations_need_both_spans_in_order():
    reference = "works for: Anna, Karl"
    assert f1_of("works for: Anna, Karl", reference) == 1.0
    assert f1_of("works for: Karl, Anna", reference) == 0.0
    assert f1_of("works for: Anna", reference) == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("Tool :  Zorv ;plant:mipa", "plant: mipa; tool: zorv"),  # case, spaces, order
        ("tool: zorv; tool: zorv", "tool: zorv"),  # items are a set
        ("brand: at & t ; year: 1960 's", "brand: AT&T; year: 1960's"),
        ("place: Genève", "place: Gene\u0300ve"),  # composed and decomposed letters
        ("tool\uff1azorv\uff1bplant\uff1amipa", "tool: zorv; plant: mipa"),  # full-width signs of NFKC
        ("song: ÄNDERUNG", "song: änderung"),
        ("\n tool: zorv;\n", "tool: zorv"),
        ("speed: 12 : 30", "speed: 12:30"),  # a colon in the span
    ],
)
def test_equal_after_normalization(prediction, reference):
    assert f1_of(prediction, reference) == 1.0


def test_letters_of_other_scripts_keep_their_spaces():
    assert normalize("地名 東京") == "地名 東京"
    assert f1_of("place: 東京", "place: 京都") == 0.0


def test_semicolon_in_a_span_splits_it_on_both_sides():
    assert parse_items("title: stop; go") == {"title:stop", "go"}
    assert f1_of("title: stop; go", "title: stop; go") == 1.0


@pytest.mark.parametrize("answer", ["None", " none ", "", "  ", "NONE", ";", "None;"])
def test_nothing_found(answer):
    assert parse_items(answer) == frozenset()
    scores = score_answers([answer], ["None"])
    assert scores["sample_f1"] == 1.0
    assert scores["f1"] == 0.0  # no items at all: micro F1 is 0 by convention


@pytest.mark.parametrize(
    ("answer", "failures"),
    [("None", 0), ("tool: zorv", 0), ("tool: zorv;", 0), ("zorv", 1), ("tool:", 1), ("", 1), ("a: b; c", 1)],
)
def test_format_failures(answer, failures):
    assert score_answers([answer], ["tool: zorv"])["format_failure_rate"] == failures


@pytest.mark.parametrize(
    ("answer", "failures"),
    [
        ("works for: Anna, Karl", 0),
        ("None", 0),
        ("works for: Anna, Karl, the younger; leads: Eva,Karl", 0),  # a comma in a span
        ("works for: Anna", 1),
        ("works for: Anna,", 1),
        ("works for: , Karl", 1),
        ("works for: Anna, Karl; leads: Eva", 1),
        ("Anna, Karl", 1),
        ("", 1),
    ],
)
def test_relations_without_head_or_tail_break_the_format(answer, failures):
    references = ["works for: Anna, Karl"]
    assert UIEF1("RE").compute(predictions=[answer], references=references)["format_failure_rate"] == failures
    others = UIEF1("NER").compute(predictions=[answer], references=references)
    assert others == UIEF1("ET").compute(predictions=[answer], references=references)
    assert others == score_answers([answer], references)
    assert others["f1"] == score_answers([answer], references, "RE")["f1"]


def test_macro_by_type_of_relations_and_of_equal_spans():
    # one span under two types is two items; a relation's type ends at the first colon
    references = ["part: bolt; material: bolt", "Live in: Anna, Rome : north"]
    predictions = ["part: bolt; part: bolt", "live in: Anna, Rome: north; Kill: Anna, Karl"]
    scores = score_answers(predictions, references)
    assert (scores["true_positives"], scores["num_predicted"], scores["num_expected"]) == (2, 3, 3)
    assert scores["macro_f1"] == pytest.approx((1 + 0 + 1 + 0) / 4)  # part, material, live in, kill
    assert scores["sample_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_bad_calls_raise():
    with pytest.raises(ValueError, match="'EE' is no kind of extraction; choose one of NER, RE, ET"):
        UIEF1("EE")
    with pytest.raises(ValueError, match=r"predictions\[1\] is None; give a string, '' where there is no answer"):
        UIEF1().compute(predictions=["None", None], references=["None", "None"])
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        score_answers(["None"], ["None", "None"])
    with pytest.raises(ValueError, match="no predictions"):
        score_answers([], [])
