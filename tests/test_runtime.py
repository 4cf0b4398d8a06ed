"""What every room uses: YAML with environment variables, files, errors of several ranks."""

from types import SimpleNamespace

import pytest

from heterofusion.runtime import ranks as runtime_ranks
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import read_yaml


def test_a_variable_that_is_set_to_nothing_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTHING", "")
    monkeypatch.delenv("MISSING", raising=False)
    (tmp_path / "flags.yaml").write_text("prefix: a${NOTHING}b\nother: ${NOTHING:-default}\nthird: ${MISSING:-c}\n")
    found = read_yaml(tmp_path / "flags.yaml", "--config", "a mapping of flags")
    assert found == {"prefix": "ab", "other": "", "third": "c"}
    (tmp_path / "flags.yaml").write_text("name: ${MISSING}\n")
    with pytest.raises(UserError, match=r"names \$\{MISSING\}, but the environment variable MISSING is not set"):
        read_yaml(tmp_path / "flags.yaml", "--config", "a mapping of flags")


@pytest.mark.parametrize(("other", "kind"), [(UserError("no file x"), UserError), (ValueError("a bug"), RuntimeError)])
def test_an_error_of_another_rank_is_raised_here_as_what_it_is(monkeypatch, other, kind):
    """A user's mistake of rank 1 is told by rank 0 in one line; a bug of rank 1 keeps a traceback on both."""
    monkeypatch.setattr(
        runtime_ranks, "gather_object", lambda own: [*own, (f"rank 1: {other}", isinstance(other, UserError))]
    )
    pair = SimpleNamespace(num_processes=2, process_index=0)
    with pytest.raises(kind, match=f"rank 1: {other}") as caught, runtime_ranks.all_together(pair):
        done = "own part"
    assert done and type(caught.value) is kind
    with pytest.raises(KeyError, match="own"), runtime_ranks.all_together(pair):
        raise KeyError("own")
