"""The documentation: links lead somewhere, the reference is the code's, the site builds without a warning."""

from __future__ import annotations

import ast
import html.parser
import importlib.util
import json
import posixpath
import re
import subprocess
import sys
from pathlib import Path

import pytest
from docs_pages import PAGES, ROOT

DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference.md"


def calls(function: str) -> list[tuple[Path, ast.Call]]:
    """Every call of this name (or method) in the nodes' package."""
    found = []
    for path in sorted((ROOT / "qpwc_ros").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                found += [(path, node)] * (name == function)
    return found


def test_the_reference_is_up_to_date():
    command = [sys.executable, str(DOCS / "generate_reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_reference_has_every_parameter_topic_and_launch_argument():
    text = REFERENCE.read_text(encoding="utf-8")
    cells = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
    # Read off the source, independently of how the page is made.
    parameters = {call.args[0].value for _, call in calls("ParameterSpec")}
    topics = {call.args[1].value for path, call in calls("advertise") if path.parent.name == "plugins"}
    arguments = set()
    for path in (ROOT / "launch").glob("*.launch.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ARGUMENTS":
                arguments |= {key.value for key in node.value.keys}
    assert len(parameters) >= 25 and len(topics) >= 10 and len(arguments) >= 18
    assert parameters | topics | arguments <= cells


def test_every_parameter_is_a_launch_argument_of_the_same_name_and_type():
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "import generate_reference as g; g.prepare()\n"
        "parameters = {spec.name: type(spec.default).__name__ for spec, _ in g.flow_parameters()}\n"
        "launch = {name: kind.__name__ for name, kind in g.launch_file('flow.launch.py').PARAMETERS.items()}\n"
        "print(json.dumps([parameters, launch, list(g.launch_arguments('flow.launch.py'))]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(DOCS)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    parameters, launch, arguments = json.loads(done.stdout)
    # use_sim_time is every node's.
    assert launch == {**parameters, "use_sim_time": "bool"} and set(launch) <= set(arguments)


def test_the_reference_says_what_a_parameter_is():
    lines = REFERENCE.read_text(encoding="utf-8").splitlines()
    assert any(
        re.match(r"\| `motion_threshold` \| float \| 1\.5 \| 0\.1 to 1000 \| .+ \| output `motion` \|", x)
        for x in lines
    )
    assert any(re.match(r"\| `precision` \| str \| int8 \| `int8`, `float32`", line) for line in lines)
    assert any(re.match(r"\| `autostart` \| bool \| true \|  \| .*Read-only\. \|", line) for line in lines)
    assert any(re.match(r"\| `~/flow` \| sensor_msgs/Image \| `flow` \| 32FC2", line) for line in lines)
    assert str(ROOT) not in "\n".join(lines)


def test_a_stale_reference_is_named(tmp_path):
    script = DOCS / "generate_reference.py"
    spec = importlib.util.spec_from_file_location("generate_reference", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv.pop(1))\n"
        "import generate_reference as g; g.PAGE = Path(sys.argv.pop(1)); sys.exit(g.main())"
    )
    page = tmp_path / "reference.md"
    page.write_text(
        REFERENCE.read_text(encoding="utf-8").replace("motion_threshold", "moved"), encoding="utf-8"
    )
    command = [sys.executable, "-c", code, str(DOCS), str(page), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "run: python docs/generate_reference.py" in done.stderr
    assert module.table(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them of plain ones."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES])
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)", text):
        if re.match(r"https?:", link):
            continue
        target = page if not link else Path(posixpath.normpath(page.parent / link))
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


class Links(html.parser.HTMLParser):
    """What a page loads, and what it links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag in ("script", "img") and "src" in values:
            self.loads.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loads.append(values["href"])


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (requirements/docs.txt)")
    pytest.importorskip("material", reason="mkdocs-material is not installed (requirements/docs.txt)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    expected = {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in DOCS.rglob("*.md")}
    # And what they link to outside of docs/.
    assert expected | {"repository/index.html", "repository/models/qpwc_fast.html"} <= pages
    assert not list(tmp_path.rglob("*.py"))
    for name in ("index.html", "start/pc.html", "repository/index.html"):
        loads = Links((tmp_path / name).read_text(encoding="utf-8")).loads
        assert loads and not [load for load in loads if re.match(r"(https?:)?//", load)]
        assert all(((tmp_path / name).parent / load.partition("?")[0]).is_file() for load in loads)
    text = (tmp_path / "repository" / "models" / "qpwc_fast.html").read_text(encoding="utf-8")
    assert re.search(r'href="\.\./\.\./results/[\w-]+\.csv"', text)  # from the card back into docs/


def test_links_out_of_the_docs_are_rewritten(monkeypatch):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (requirements/docs.txt)")
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    text = (
        "[a](../README.md#figures) [b](ros.md) [c](https://x.y/z.md) [d](#here) [e](../no/such.md)\n\n"
        "    [code](../README.md)\n\n`[code](../README.md)`\n"
    )
    assert hooks.rewritten("docs/start.md", text) == text.replace(
        "[a](../README.md", "[a](repository/README.md"
    )
    assert hooks.rewritten("models/card.md", "[f](../docs/ros.md)") == "[f](../../ros.md)"
    assert hooks.linked("docs/start.md", text) == {"README.md"}
