"""README and docs against the repository: links, the tree with its layers, the training loop,
differences from the paper, an observation. test_commands.py checks the commands, files and keys
that they name.
"""

import ast
import pathlib
import re

import pytest
from test_layering import LAYERS, layer_of, side_of

from configs import base
from stepsearch_jax.prompting import templates
from stepsearch_jax.records import Document

REPO = pathlib.Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(REPO)): path.read_text()
    for path in (*sorted(REPO.glob("*.md")), *sorted((REPO / "docs").glob("*.md")))
}
ADDRESS = re.compile(r"[a-z]+:")  # https:, mailto:


def cut_code(text: str) -> str:
    """A page without its code: blocks and spans."""
    return re.sub(r"`[^`\n]+`", "``", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def list_anchors(text: str) -> list[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles]


def list_links(text: str) -> list[str]:
    """Targets of links and images, addresses left out."""
    found = re.findall(r"\]\(([^)\s]+)\)|\b(?:src|href|srcset)=\"([^\"]+)\"", cut_code(text))
    return [target for pair in found for target in pair if target and not ADDRESS.match(target)]


def find_broken(page: str, text: str) -> list[str]:
    """The links of a page that lead to no file or to no heading."""
    broken = []
    for link in list_links(text):
        name, _, anchor = link.partition("#")
        target = (REPO / page).parent / name
        anchors = list_anchors(text)
        if name:
            is_page = target.suffix == ".md" and target.is_file()
            anchors = list_anchors(target.read_text()) if is_page else []
        if not target.exists() or anchor and anchor not in anchors:
            broken.append(link)
    return broken


def test_broken_links_are_found():
    text = "# A b: c\n```\n# code\n[x](no)\n```\n`[x](no)` [a](#a-b-c) [b](../README.md)\n"
    assert find_broken("docs/data.md", text) == []
    assert list_anchors(text) == ["a-b-c"]
    broken = ["#code", "../README.md#nowhere", "no.png", "no.md#a", "data.md#nowhere"]
    text += " ".join(f"[x]({link})" for link in broken) + '<img src="none.svg">[d](http://e.f)'
    assert find_broken("docs/data.md", text) == [*broken, "none.svg"]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    assert find_broken(page, PAGES[page]) == []
    assert len(set(list_anchors(PAGES[page]))) == len(list_anchors(PAGES[page]))


def test_the_index_names_every_page_once():
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    links = list_links(PAGES["docs/README.md"])
    assert len(pages) > 10 and sorted(links) == sorted(pages - {"README.md"})


def list_tree() -> dict[str, str]:
    """Path -> side of the tree in docs/architecture.md."""
    (tree,) = re.findall(
        r"^```\n(stepsearch_jax/\n.*?)^```", PAGES["docs/architecture.md"], re.M | re.S
    )
    paths, folder = {}, ""
    for line in tree.splitlines():
        name, side = [*line.split(), ""][:2]
        folder = folder if line.startswith(" ") else name
        paths[folder + name if line.startswith(" ") else name] = side
    return paths


def test_every_path_of_the_tree_exists():
    assert [path for path in list_tree() if not (REPO / path).exists()] == []


def test_every_package_and_module_is_in_the_tree():
    here = [
        path
        for path in (REPO / "stepsearch_jax").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    ]
    names = {f"stepsearch_jax/{path.name}{'/' * path.is_dir()}" for path in here}
    names.remove("stepsearch_jax/__init__.py")
    assert len(names) > 20 and names <= set(list_tree())


def test_the_tree_has_the_order_and_the_sides_of_the_layers():
    inside = {
        pathlib.Path(path).stem: side
        for path, side in list_tree().items()
        if path.startswith("stepsearch_jax/") and path != "stepsearch_jax/"
    }
    places = [LAYERS.index(layer_of(module)) for module in inside]
    assert places == sorted(places) and set(places) == set(range(len(LAYERS)))
    for module, side in inside.items():
        expected = side_of(module) or "both"
        assert side == ("command" if layer_of(module) == "commands" else expected), module


def test_differences_name_the_defaults():
    """The last cell of each row holds the values that base.py gives the keys of its first cell."""
    config, lines = base.get_config(), PAGES["docs/reference.md"].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if re.match(r"\| `\w+(\.|`)", line)]
    assert len(rows) > 12 and {len(row) for row in rows} == {4}
    named = set()
    for keys, _, _, default in rows:
        words = re.findall(r"[\w.-]*\w", default)
        numbers = [float(word) for word in words if re.fullmatch(r"[\d.]+(e-?\d+)?", word)]
        for key in re.findall(r"`([\w.]+)`", keys):
            section, _, name = key.rpartition(".")
            value = config[section][name] if section else config[name]
            assert str(value) in words if isinstance(value, str | bool) else value in numbers, (
                key,
                value,
            )
            named.add(key)
    assert set(base.REFERENCE) <= named


def is_loop(node: ast.AST) -> bool:
    return isinstance(node, ast.For) and ast.unparse(node.target) == "iteration"


def test_the_loop_is_that_of_train_py():
    """Every statement of a loop that a page shows stands in train.py's, in this order."""
    tree = ast.parse((REPO / "stepsearch_jax/train.py").read_text())
    (loop,) = filter(is_loop, ast.walk(tree))
    of_train = [ast.unparse(node) for node in loop.body if hasattr(node, "value")]
    blocks = [
        block
        for text in PAGES.values()
        for block in re.findall(r"^```python\n(for iteration .*?)^```", text, re.M | re.S)
    ]
    lengths = []
    for block in blocks:
        (shown,) = ast.parse(block).body
        assert is_loop(shown)
        lengths.append(len(shown.body))
        statements = iter(of_train)
        assert [ast.unparse(n) for n in shown.body if ast.unparse(n) not in statements] == []
    assert lengths and max(lengths) > 8


def test_the_observation_shown_is_the_environments():
    text = PAGES["docs/models.md"].split("```python\n")[2].split("```")[0]
    shown = ast.literal_eval(text.removeprefix("observation = "))
    documents = re.findall(r"## Title: (.+?) ##> (.+?)\n", shown)
    assert len(documents) == 2
    parts = [
        templates.RANK.format(rank=rank) + templates.render_document(Document(0, title, content))
        for rank, (title, content) in enumerate(documents, start=1)
    ]
    assert shown == templates.OBSERVATION_HEAD + "".join(parts) + templates.OBSERVATION_TAIL


def test_the_readme_stays_short():
    text = (REPO / "README.md").read_text()
    assert len(text.splitlines()) <= 180 and len(text.encode()) <= 14 * 1024
