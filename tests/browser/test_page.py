"""The real frontend: every shipped workflow as an artist meets it, nodes on the canvas and nodes by Vue."""
from __future__ import annotations

import json

import pytest

from browser import pages
from harness import paths, workflows
from workflows.shipped import NAMES


def file_of(name: str) -> dict:
    return workflows.load(paths.WORKFLOWS / f"{name}.json")


@pytest.mark.parametrize("name", NAMES)
def test_from_the_template_browser_to_the_picture(page, info, name):
    workflow = file_of(name)
    pages.open_template(page, name, len(workflow["nodes"]))
    page.until("![...document.querySelectorAll('[data-testid=error-overlay]')].some(e => e.getBoundingClientRect().width)",
               "the complaint about the host's own first graph to go")
    assert pages.complaints(page) == []
    converted = workflows.to_prompt(workflow, info)
    assert pages.prompt(page) == {key: pages.plain(node) for key, node in converted.items()}
    before = pages.shown(page, "SaveImage")
    pages.queue(page)
    assert min(pages.pictures(page)) >= 256
    assert pages.shown(page, "SaveImage") > 10 * before, "nothing is painted there"
    assert pages.complaints(page) == [] and pages.faults(page) == []


def test_copy_and_paste_keep_every_value(page):
    name = NAMES[0]
    pages.open_template(page, name, len(file_of(name)["nodes"]))
    pages.rewrite(page)
    originals, one = pages.widgets(page), pages.prompt(page)
    page.run("app.canvas.canvas.focus(); app.canvas.selectItems(app.graph.nodes)")
    page.press("c", control=True, command="copy")
    page.press("v", control=True, command="paste")
    page.until("app.graph.nodes.length === args[0]", "the copies", 2 * len(file_of(name)["nodes"]))
    both = pages.widgets(page)
    copies = [entry for entry in both if entry not in originals]
    assert len(both) == 2 * len(originals) == 2 * len(copies)
    kinds = {kind for _, kind, _ in originals} & {kind for _, kind, _ in copies}  # a copied sub-graph has another number
    assert len(kinds) >= 8
    assert sorted(json.dumps(e[2]) for e in copies) == sorted(json.dumps(e[2]) for e in originals)
    single = pages.trees(one)
    assert pages.trees(pages.prompt(page)) == single + single, "links or values of the copy differ"


def test_save_and_reload_keep_every_value(page, server):
    name = NAMES[0]
    pages.open_template(page, name, len(file_of(name)["nodes"]))
    shipped = pages.widgets(page)
    pages.rewrite(page)
    before, job = pages.widgets(page), pages.prompt(page)
    ours = [(was, now) for was, now in zip(shipped, before, strict=True) if now[1].startswith("Likeness_") and now[2]]
    same = [now[1] for was, now in ours if was == now]
    assert len(ours) > 3 and set(same) <= {"Likeness_LoadDemo"}, "that one has a single choice"
    path = pages.save(page)
    saved = json.loads((server.base / "user" / "default" / path).read_text(encoding="utf-8"))
    pages.enter(page, server)
    assert pages.widgets(page) != before
    page.run("await app.loadGraphData(args[0])", saved)
    page.until("app.graph.nodes.length === args[0]", "the saved graph", len(saved["nodes"]))
    assert pages.widgets(page) == before and pages.prompt(page) == job
    assert pages.complaints(page) == []
