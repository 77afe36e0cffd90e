"""The pages: links lead somewhere, commands are accepted, and the site builds."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mllm_align.cli.verbs import named, parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


def prose(page: Path) -> str:
    """A page without its blocks and pieces of code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(
        r"`[^`\n]*`", lambda code: "x" * len(code.group()) if "](" in code.group() else code.group(), text
    )


def anchors(page: Path) -> set[str]:
    """The names that headings get: lower case, dashes for spaces, letters and digits alone."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Within the repository: to a file, and to a heading of it."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        url = urlsplit(link)
        if url.scheme:
            continue
        target = (page.parent / url.path).resolve() if url.path else page
        assert target.is_file(), link
        assert not url.fragment or url.fragment in anchors(target), link


def listed(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for each in (nav.values() if isinstance(nav, dict) else nav) for page in listed(each)]


def test_every_page_is_in_the_navigation():
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed(nav)) == sorted(pages)


def commands() -> list[tuple[str, str]]:
    """Every complete mllm-align command of the pages, in blocks and in README's table. Those with a user's
    own my_FILE.py are run by test_extending.py."""
    found: list[tuple[str, str]] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += re.findall(r"^\|[^|]*\| `(mllm-align [^`]*)` \|", text, flags=re.MULTILINE)
        whole = [line for line in lines if not re.search(r"\.\.\.|\$|my_\w+\.py", line)]
        name = str(page.relative_to(ROOT))
        found += [(name, line) for line in whole if line.startswith("mllm-align ")]
    return found


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with configs/, mine.yaml and a user's files as the pages show them."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    extending = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for name, example in re.findall(
        r"^```python\n# (\w+\.py)\n(.*?)^```", extending, re.MULTILINE | re.DOTALL
    ):
        (tmp_path / name).write_text(example)
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```yaml\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.yaml").write_text(example)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page, line", commands())
def test_commands_are_accepted(checkout, page, line):
    """Names of verbs and options, values, what is required; nothing is run."""
    words = shlex.split(line, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    if not words[1].startswith("--"):
        parse(*named(words[1:]))


def test_the_pages_have_commands_of_most_verbs():
    verbs = {line.split()[1] for _, line in commands()}
    assert verbs >= {"train", "bdhs", "judge", "score", "generate", "inspect", "export", "plan"}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    zensical = Path(sys.executable).with_name("zensical")
    done = subprocess.run([zensical, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "<title>" in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert (tmp_path / "site" / "running" / "slurm" / "index.html").is_file()
