"""Digests of source code."""

from gpt2_pl.commands.support.plugins import import_class
from gpt2_pl.utils.digests import code_digests
from gpt2_pl.utils.user_code import PACKAGES


def test_code_digests_named_modules_have_digests_and_dependencies_have_none(tmp_path, monkeypatch):
    """A configuration names torch and this library as well, such as in torch.optim.AdamW."""
    (tmp_path / "own_strategy_of_a_test.py").write_text("class Own: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = code_digests()
    for name in ("torch.optim.AdamW", "gpt2_pl.surgery.LoRA", "own_strategy_of_a_test.Own"):
        import_class(name, "model.surgery")
    found = code_digests()
    PACKAGES.remove("own_strategy_of_a_test")
    assert len(found.pop("own_strategy_of_a_test")) == 16
    assert found == before
