"""Digests of source code."""

from gpt2_pl.utils import digests


def test_code_digests_named_modules_have_digests_and_dependencies_have_none(tmp_path, monkeypatch):
    """A configuration names torch and this library as well, such as in torch.optim.AdamW."""
    (tmp_path / "own_strategy_of_a_test.py").write_text("RANK = 4\n")
    monkeypatch.syspath_prepend(tmp_path)
    import own_strategy_of_a_test  # noqa: F401

    alone = digests.code_digests()
    monkeypatch.setattr(digests, "PACKAGES", {"gpt2_pl", "torch", "own_strategy_of_a_test"})
    found = digests.code_digests()
    assert set(found) == {"gpt2_pl", "own_strategy_of_a_test"}
    assert found["gpt2_pl"] == alone["gpt2_pl"]
