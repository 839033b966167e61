"""The built documentation, ``build/site``: no page requests anything elsewhere, links resolve, nothing is missing."""

import importlib
import inspect
import re
import zlib
from collections import defaultdict
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from helpers.configs import ROOT

from gpt2_pl.commands import _COMMANDS, _TRAINER_COMMANDS
from gpt2_pl.configs import packaged_configs

pytestmark = pytest.mark.site
SITE = ROOT / "build" / "site"
PACKAGES = ("gpt2_pl", "gpt2_pl.tasks", "gpt2_pl.datamodules", "gpt2_pl.surgery", "gpt2_pl.callbacks")
REQUEST = re.compile(r"url\(\s*['\"]?(?:https?:)?//|@import|(?:fetch|import)\(\s*['\"`](?:https?:)?//")


class Page(HTMLParser):
    """What a page loads, where it links to, its anchors and its text."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.anchors, self.words = [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        loaded = {"src", "srcset", "data", "poster", *(["href"] if tag in ("link", "use", "image") else [])}
        self.loads += [value for key, value in attrs if key in loaded and value]
        self.loads += [value for key, value in attrs if key == "style" and REQUEST.search(value or "")]
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def pages():
    assert SITE.is_dir(), "build the site first: sphinx-build -W docs build/site"
    return {path: Page(path) for path in sorted(SITE.rglob("*.html"))}


def test_site_pages_load_only_files_of_the_site(pages):
    assert len(pages) > 60
    checked = 0
    for path, page in pages.items():
        for target in page.loads:
            if target.startswith("data:"):
                continue
            checked += 1
            parts = urlsplit(target)
            assert not parts.scheme, (path, target)
            assert not parts.netloc, (path, target)
            assert (path.parent / unquote(parts.path)).exists(), (path, target)
    assert checked > 500


def test_site_style_sheets_and_scripts_request_nothing_from_another_host():
    files = [path for pattern in ("*.css", "*.js", "*.html") for path in sorted(SITE.rglob(pattern))]
    assert len(files) > 70
    assert [path for path in files if REQUEST.search(path.read_text(encoding="utf-8"))] == []


def test_site_internal_links_and_anchors_exist(pages):
    anchors = {path.resolve(): page.anchors for path, page in pages.items()}
    missing, checked = [], 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            checked += 1
            if not target.exists() or (parts.fragment and unquote(parts.fragment) not in anchors.get(target, ())):
                missing.append((path.relative_to(SITE).as_posix(), link))
    assert checked > 5000
    assert missing == []


def test_site_search_index_holds_terms_of_the_guides():
    index = (SITE / "searchindex.js").read_text(encoding="utf-8")
    assert [
        term for term in ("lora", "sonnet", "preemption", "verdict") if not re.search(rf'["{{,]{term}"?:', index)
    ] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_site_reference_describes_every_public_name(package):
    inventory = (SITE / "objects.inv").read_bytes().split(b"\n", 4)[4]
    described = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    module = importlib.import_module(package)
    public = {name: getattr(module, name) for name in module.__all__}
    public = {name: value for name, value in public.items() if inspect.isclass(value) or inspect.isfunction(value)}
    assert len(public) > 3
    for name, value in public.items():
        assert {f"{package}.{name}", f"{value.__module__}.{value.__qualname__}"} & described, name


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_site_key_tables_have_every_argument_of_public_classes(package, pages):
    found = defaultdict(set)
    heading = None
    for name in re.findall(r"<h3>(\w+)<|<p><code [^>]*><span class=\"pre\">(\w+)</span>", read_keys()):
        heading = name[0] or heading
        found[heading].add(name[1])
    module = importlib.import_module(package)
    for public in module.__all__:
        cls = getattr(module, public)
        if not inspect.isclass(cls) or not cls.__module__.startswith(package):
            continue
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        named = {one.name for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}
        assert named - found[public] == set() or getattr(cls, "_is_protocol", False), public


def test_site_shows_the_help_of_every_command(pages):
    commands = [name for name in _COMMANDS if name not in _TRAINER_COMMANDS]
    text = pages[SITE / "reference" / "commands.html"].text
    assert [name for name in commands if f"usage: gpt2-pl {name}" not in text] == []


def read_keys():
    return (SITE / "reference" / "keys.html").read_text(encoding="utf-8")


def test_site_strategy_pages_have_the_configuration_and_the_parameters_of_the_overview(pages):
    names = [name.partition("/")[2] for name in packaged_configs() if name.startswith("strategy/")]
    texts = {name: pages[SITE / "strategies" / f"{name}.html"].text for name in names}
    for name, text in texts.items():
        yaml = (ROOT / "configs" / "strategy" / f"{name}.yaml").read_text(encoding="utf-8")
        assert " ".join(yaml.split()) in text, name
    overview = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    recorded = re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", overview, re.M)  # by benchmarks/strategies.py
    assert len(recorded) > 5
    assert [pair for pair in recorded if f"small, {pair[1]} parameters train" not in texts[pair[0]]] == []


def test_site_formulas_are_mathml(pages):
    for name in ("lora", "dpo", "ulmfit"):
        source = (SITE / "strategies" / f"{name}.html").read_text(encoding="utf-8")
        assert "<math" in source
        assert "\\frac" not in source
