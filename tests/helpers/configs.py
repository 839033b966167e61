"""The shipped configurations."""

from conftest import ROOT

CONFIGS = ROOT / "configs"
TASKS, STRATEGIES, TRAINERS = (sorted((CONFIGS / kind).glob("*.yaml")) for kind in ("task", "strategy", "trainer"))
