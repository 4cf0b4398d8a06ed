"""Claims: how they are read, what they select, and each verdict."""

import re

import pytest
import yaml

from heterofusion.report.claims import judge, read_claims
from report_builders import OVER, TASKS, paired_results, result


def claims(tmp_path, *entries):
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(list(entries)))
    return read_claims(path)


def noise_results(gaps, **labels):
    """Noisy results that differ from clean ones by a gap per seed."""
    results = []
    for seed, gap in enumerate(gaps):
        results.append(result("fused", (0.5, 0.5), seed, experiment="noise", case="clean", **labels))
        results.append(result("fused", (0.5 + gap, 0.5 + gap), seed, experiment="noise", case="noisy", **labels))
    return results


@pytest.mark.parametrize(
    ("gaps", "bound", "verdict", "reason"),
    [
        ((0.0, 0.001, -0.001), {"at_least": -0.01}, "agrees", ""),
        ((-0.1, -0.101, -0.099), {"at_least": -0.01}, "contradicts", ""),
        ((-0.1, 0.1, 0.0), {"at_least": -0.01}, "undecided", "the interval contains the threshold"),
        ((0.0,), {"at_least": -0.01}, "undecided", "one seed: agrees by the point value"),
        ((-0.1,), {"at_least": -0.01}, "undecided", "one seed: contradicts by the point value"),
        ((-0.1, -0.101, -0.099), {"at_most": -0.05}, "agrees", ""),
    ],
)
def test_verdict_of_a_difference(gaps, bound, verdict, reason, tmp_path):
    (claim,) = claims(tmp_path, {**OVER, **bound})
    finding = judge(claim, noise_results(gaps))
    assert (finding.verdict, finding.reason) == (verdict, reason)
    assert finding.measured.values == pytest.approx(gaps, abs=1e-12)


def test_difference_over_several_rows_is_averaged_per_seed(tmp_path):
    entry = {"text": "t", "row": {"name": "fused"}, "over": {"name": "sft"}, "at_least": 0.0, "column": "re_town"}
    finding = judge(claims(tmp_path, entry)[0], paired_results())
    assert finding.verdict == "agrees" and finding.measured.values == pytest.approx((0.04, 0.04, 0.04))
    # a seed that one of the rows lacks is no seed of the average
    finding = judge(claims(tmp_path, entry)[0], paired_results()[:-1])
    assert len(finding.measured.values) == 2 and "seed 2 lacks" in finding.reason


def test_score_and_spread(tmp_path):
    results = [
        result(scores=(0.5 + alpha / 10 + seed / 10,) * 2, seed=seed, fusion={"alpha_init": alpha}, experiment="s")
        for alpha in (0.05, 0.3, 0.9)
        for seed in (0, 1)
    ]
    score, spread, narrow = claims(
        tmp_path,
        {"text": "t", "row": {"alpha_init": 0.30}, "at_least": 0.5},
        {"text": "t", "spread": {"experiment": "s"}, "at_most": 0.1},
        {"text": "t", "spread": {"experiment": "s"}, "at_most": 0.05},
    )
    assert judge(score, results).measured.values == pytest.approx((0.53, 0.63))
    assert judge(spread, results).measured.values == pytest.approx((0.085, 0.085))
    assert [judge(claim, results).verdict for claim in (spread, narrow)] == ["agrees", "contradicts"]


def test_missing_results_leave_a_claim_undecided(tmp_path):
    (claim,) = claims(tmp_path, {**OVER, "at_least": 0})
    results = noise_results((0.1, 0.1))
    results[1] = result("fused", (0.5,), 0, tasks=TASKS[:1], experiment="noise", case="noisy")
    finding = judge(claim, results)
    assert finding.verdict == "undecided" and finding.measured.values == pytest.approx((0.1,))
    assert "one seed: agrees by the point value" in finding.reason and "lacks re_town" in finding.reason
    finding = judge(claim, results[:2])  # no seed has both sides
    assert finding.verdict == "undecided" and finding.measured is None and "lacks re_town" in finding.reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"row": {"name": "nobody"}}, "row {name: nobody} matches no result"),
        (
            {"row": {"name": "fused", "case": "noisy"}, "over": {"name": "fused", "experiment": "x"}},
            "over {experiment: x, name",
        ),
        ({"column": "other"}, "column 'other' is no data set"),
        ({"over": {"name": "sft"}}, "row and over have no value of the label 'anchor' in common (x and y)"),
    ],
)
def test_selector_that_cannot_be_right_raises(changes, words, tmp_path):
    results = [*noise_results((0.1, 0.1), anchor="x"), result("sft", seed=0, anchor="y")]
    (claim,) = claims(tmp_path, {**OVER, "at_least": 0, **changes})
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        judge(claim, results)
    assert "claim 1" in str(raised.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({**OVER, "at_least": 0, "than": 1}, "unknown key 'than'"),
        (OVER, "needs one of at_least and at_most"),
        ({**OVER, "at_least": "some"}, "a number was expected"),
        ({"text": "t", "at_least": 0}, "needs one of row and spread, and has neither"),
        ({**OVER, "spread": {"a": 1}, "at_least": 0}, "and has both"),
        ({**OVER, "at_least": 0, "text": ""}, "say in words"),
        ({"text": "t", "row": {"seed": 1}, "at_least": 0}, "selects a seed"),
        ("words", "a mapping with text"),
    ],
)
def test_claim_of_another_form_raises(entry, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        claims(tmp_path, entry)
