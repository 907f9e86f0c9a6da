"""The real frontend: every shipped workflow as an artist meets it, nodes on the canvas and nodes by Vue."""
from __future__ import annotations

import json

import pytest

from browser import pages
from harness import browser, paths, workflows
from workflows.shipped import EVERY, NAMES, OURS, OWN_FILES, nodes

# One block four times; then as few as hold every node of ours that is in any: among them four samplers, muted nodes, and
# people on SDXL, whose files are not there. Not "17 Round after round": `pages.trees` of it would be terabytes long.
VARIED = ["5 Story strip", "8 Identity fusion", "10 Turntable", "11 Place in a background",
          "15 Many words of one picture (One2Many)", "16 Predict the mask, edit it, use it",
          "20 CustomEnhancer with PhotoMaker (SDXL)", "21 CustomEnhancer with InstantID (SDXL)"]
ALONE = {"Likeness_LoadDemo", "Likeness_PreviewGuidance"}  # a single choice


def file_of(name: str) -> dict:
    return workflows.load(paths.WORKFLOWS / f"{name}.json")


def own_nodes(name: str) -> set[str]:
    """Types of our own nodes in a workflow, inside its blocks, too."""
    return {node["type"] for node in nodes(file_of(name)) if node["type"].startswith(OURS)}


def opened(page: browser.Browser, name: str) -> dict:
    """The workflow `name`, from the template browser on the canvas."""
    workflow = file_of(name)
    pages.open_template(page, name, len(workflow["nodes"]))
    return workflow


def lacking(prompt: dict, info: dict) -> set[str]:
    """Types of nodes that name a file which is not there; a face pack is a folder, which the page does not miss."""
    return {kind for kind, _, value, choices in workflows.combos(prompt, info) if value not in choices and "." in value}


def rewritten(page: browser.Browser) -> tuple[list, dict]:
    """Widgets and prompt with another value wherever our nodes allow one."""
    shipped = pages.widgets(page)
    pages.rewrite(page)
    now = pages.widgets(page)
    ours = [pair for pair in zip(shipped, now, strict=True) if pair[1][1].startswith("Likeness_") and pair[1][2]]
    same = {after[1] for before, after in ours if before == after}
    assert len(ours) > 1 and same <= ALONE
    return now, pages.prompt(page)


def test_every_node_is_copied_and_saved_in_some_workflow():
    """A new node in a shipped workflow asks for a place in VARIED."""
    every = set().union(*(own_nodes(path.stem) for path in EVERY))
    assert every and set().union(*map(own_nodes, VARIED)) == every


def test_the_nodes_are_drawn_as_the_mode_says(page, vue):
    """Else one mode would be tried twice."""
    workflow = opened(page, NAMES[0])
    everyone = sorted(str(node["id"]) for node in workflow["nodes"])
    if vue:
        page.until("document.querySelectorAll('[data-node-id]').length === args[0]", "the nodes", len(everyone))
    assert sorted(pages.drawn_by_vue(page)) == (everyone if vue else [])


@pytest.mark.parametrize("name", NAMES)
def test_from_the_template_browser_to_the_picture(page, info, name):
    workflow = opened(page, name)
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


@pytest.mark.parametrize("name", [path.stem for path in OWN_FILES])
def test_what_wants_files_of_the_artist_opens(page, info, name):
    """Red are the nodes that name a file which is not there, and no other."""
    converted = workflows.to_prompt(opened(page, name), info)
    missed = lacking(converted, info)
    page.until("new Set(app.graph.nodes.filter(n => n.has_errors).map(n => n.type)).size >= args[0]",
               "the page to miss the files", len(missed))
    assert set(pages.red(page)) == missed and pages.unknown(page) == []
    assert pages.prompt(page) == {key: pages.plain(node) for key, node in converted.items()}
    assert pages.faults(page) == []


@pytest.mark.parametrize("name", VARIED)
def test_copy_and_paste_keep_every_value(page, name):
    count = len(opened(page, name)["nodes"])
    originals, one = rewritten(page)
    page.run("app.canvas.canvas.focus(); app.canvas.selectItems(app.graph.nodes)")
    page.press("c", control=True, command="copy")
    page.press("v", control=True, command="paste")
    page.until("app.graph.nodes.length === args[0]", "the copies", 2 * count)
    both = pages.widgets(page)
    copies = [entry for entry in both if entry not in originals]
    assert len(both) == 2 * len(originals) == 2 * len(copies)
    kinds = {kind for _, kind, _ in originals} & {kind for _, kind, _ in copies}  # a copied sub-graph has another number
    assert len(kinds) >= 8
    assert sorted(json.dumps(e[2]) for e in copies) == sorted(json.dumps(e[2]) for e in originals)
    single = pages.trees(one)
    assert pages.trees(pages.prompt(page)) == single + single, "links or values of the copy differ"


@pytest.mark.parametrize("name", VARIED)
def test_save_and_open_again_keep_every_value(page, server, info, vue, name):
    """In another browser: nothing but the file can bring them back."""
    count = len(opened(page, name)["nodes"])
    before, job = rewritten(page)
    saved = f"{name} kept {'by Vue' if vue else 'on the canvas'}"  # a template of a saved name would open the saved one
    path = pages.save(page, saved)
    assert (server.base / "user" / "default" / path).is_file()
    with browser.Browser() as fresh:
        pages.enter(fresh, server)
        pages.open_saved(fresh, saved, count)
        assert pages.widgets(fresh) == before and pages.prompt(fresh) == job
        assert pages.unknown(fresh) == [] and set(pages.red(fresh)) <= lacking(job, info)
