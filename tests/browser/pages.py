"""What the tests of the page share: a person's ways through it, and graphs in a form that can be compared."""
from __future__ import annotations

import io
import json
from collections import Counter
from typing import Any

import numpy as np
from PIL import Image

from harness import paths
from harness.browser import Browser

# `nodes`: where each node is and the node, of the graph and of its sub-graphs; a pasted copy has the order of its original.
NODES = """const nodes = [];
    const look = (graph, where) => { for (const n of graph.nodes) {
        nodes.push([where + n.id, n]);
        if (n.subgraph) look(n.subgraph, where + n.id + ':');
    } };
    look(app.graph, '');"""


def choose(server: Any, **settings: Any) -> None:
    """Write settings of the page, as its own dialog does."""
    for name, value in settings.items():
        server.post(f"/settings/{name}", value)


def enter(page: Browser, server: Any) -> None:
    """Open the address, wait for the page and listen to the ends of its runs."""
    page.open(server.url + "/")
    page.until("!!(window.app && app.vueAppReady && app.graph && app.extensionManager)", "the page")
    page.run("""window.ends = [];
        for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
            app.api.addEventListener(kind, e => window.ends.push([kind, e.detail.prompt_id, e.detail.exception_message]))""")


def open_template(page: Browser, name: str, count: int) -> None:
    """Through the template browser by mouse; `count` nodes will be on the canvas."""
    page.click("document.querySelector('button[aria-label=Templates]')", "the button Templates")
    page.click("[...document.querySelectorAll('[role=dialog] span')].find(e => e.innerText === args[0])",
               "our pack in the list", paths.PACK_FOLDER)
    page.click("document.querySelector(`[data-testid='template-workflow-${args[0]}']`)", f"the picture of {name}", name)
    page.until("app.extensionManager.workflow.activeWorkflow?.path.includes(args[0]) && app.graph.nodes.length === args[1]"
               " && !document.querySelector('[data-testid=template-workflows-content]')", f"{name} on the canvas", name, count)
    page.run("await app.extensionManager.command.execute('Comfy.Canvas.FitView')")


def drawn_by_vue(page: Browser) -> list[str]:
    """Ids of the nodes that Vue made elements of; on the canvas a node has none."""
    return page.run("return [...document.querySelectorAll('[data-node-id]')].map(e => e.dataset.nodeId)")


def unknown(page: Browser) -> list[str]:
    """Types of nodes that the page does not know."""
    return page.run(NODES + """return nodes.map(([_, n]) => n).filter(
        n => n.isMissing || (!n.subgraph && !LiteGraph.registered_node_types[n.type])).map(n => n.type)""")


def red(page: Browser) -> list[str]:
    """Types of nodes with a red frame."""
    return page.run(NODES + "return nodes.filter(([_, n]) => n.has_errors).map(([_, n]) => n.type)")


def complaints(page: Browser) -> list[str]:
    """Unknown types, red nodes and whatever dialog or overlay tells of an error."""
    return unknown(page) + red(page) + page.run("""const out = [];
        for (const e of document.querySelectorAll('[data-testid=error-overlay], [role=dialog]'))
            if (e.getBoundingClientRect().width) out.push(e.innerText);
        if (app.extensionManager.lastNodeErrors) out.push(JSON.stringify(app.extensionManager.lastNodeErrors));
        return out""")


def faults(page: Browser) -> list[str]:
    """What the console says about us; the bare frontend has noise of its own."""
    return [e for e in page.errors if f"/extensions/{paths.PACK_FOLDER}" in e or "Likeness" in e]


def prompt(page: Browser) -> dict:
    """What the page would queue: class and inputs of each node."""
    output = page.run("return (await app.graphToPrompt()).output")
    return {key: plain(node) for key, node in output.items()}


def plain(node: dict) -> dict:
    return {"class_type": node["class_type"], "inputs": node["inputs"]}


def trees(job: dict) -> Counter:
    """Each node with all that leads to it, without numbers: the same for a copy as for its original."""
    def tree(key: str) -> str:
        node = job[key]
        inputs = {name: [tree(value[0]), value[1]] if isinstance(value, list) and len(value) == 2 and value[0] in job else value
                  for name, value in node["inputs"].items()}
        return json.dumps([node["class_type"], inputs], sort_keys=True)
    return Counter(tree(key) for key in job)


def queue(page: Browser, steps: int = 2) -> None:
    """Few steps, then a click on Run; returns when the run has ended well."""
    page.run("""window.ends.length = 0;
        for (const n of app.graph.nodes) for (const w of n.widgets || [])
            if (n.type === 'KSampler' && w.name === 'steps') w.value = args[0]""", steps)
    page.click("document.querySelector('[data-testid=queue-button]')", "the button Run")
    kind, _, text = page.until("window.ends[0]", "the end of the run", timeout=300)
    assert kind == "execution_success", text


def shown(page: Browser, kind: str) -> int:
    """How many colours stand on the screen where the first node of this type is that is not muted."""
    x, y, width, height = page.run("""const n = app.graph.nodes.find(n => n.type === args[0] && !n.mode), d = app.canvas.ds;
        const r = app.canvas.canvas.getBoundingClientRect();
        return [(n.pos[0] + d.offset[0]) * d.scale + r.x, (n.pos[1] + d.offset[1]) * d.scale + r.y,
                n.size[0] * d.scale, n.size[1] * d.scale]""", kind)
    picture = np.asarray(Image.open(io.BytesIO(page.picture())).convert("RGB"))
    part = picture[max(0, int(y)):int(y + height), max(0, int(x)):int(x + width)]
    return len(np.unique(part.reshape(-1, 3), axis=0))


def pictures(page: Browser) -> list[int]:
    """Widths of the pictures on the first Save Image that is not muted, on the canvas or as Vue node, once all are there."""
    return page.until("""(() => { const n = app.graph.nodes.find(n => n.type === 'SaveImage' && !n.mode);
        const all = [...(n.imgs || []), ...document.querySelectorAll(`[data-node-id="${n.id}"] img`)];
        return all.length && all.every(i => i.complete && i.naturalWidth && i.src.includes('type=output'))
            && all.map(i => i.naturalWidth) })()""", "the picture on Save Image")


def rewrite(page: Browser) -> None:
    """Give each widget of our nodes another value that it allows."""
    page.run(NODES + """for (const [_, n] of nodes)
            if (n.type.startsWith('Likeness_')) for (const w of n.widgets || []) {
                const o = w.options || {};
                if (w.type === 'combo') w.value = (typeof o.values === 'function' ? o.values() : o.values).at(-1);
                else if (typeof w.value === 'number') {
                    const step = 2 * (o.step2 || 1);
                    w.value = +(w.value + (w.value + step <= o.max ? step : -step)).toFixed(4);
                }
                else if (typeof w.value === 'string') w.value += ' [\\u00e9\\u00e8] (\\u72d0:1.2) "x"\\n\\\\(y\\\\)';
                else if (typeof w.value === 'boolean') w.value = !w.value;
            }""")


def widgets(page: Browser) -> list:
    """Place, type, and name and value of each widget, of every node; a preview on the canvas ($$) comes when it is loaded."""
    return page.run(NODES + """return nodes.map(([at, n]) =>
        [at, n.type, (n.widgets || []).filter(w => !w.name.startsWith('$$')).map(w => [w.name, w.value])])""")


def save(page: Browser, name: str) -> str:
    """Ctrl+S, and `name` and Enter in the dialog that asks for one; the path below the user's folder."""
    page.press("s", control=True)
    page.until("!!document.querySelector('[role=dialog] input')", "the dialog for the name")
    page.run("const e = document.querySelector('[role=dialog] input'); e.focus(); e.select()")
    page.write(name)
    page.enter()
    page.until("!app.extensionManager.workflow.activeWorkflow.isTemporary && !document.querySelector('[role=dialog] input')",
               "the file to be saved")
    return page.run("return app.extensionManager.workflow.activeWorkflow.path")


def open_saved(page: Browser, name: str, count: int) -> None:
    """From the list of saved workflows by mouse; `count` nodes will be on the canvas."""
    page.click("document.querySelector('button[aria-label^=Workflows]')", "the button Workflows")
    page.click("[...document.querySelectorAll('[role=treeitem]')].find(e => e.innerText.trim() === args[0])",
               f"{name} in the list", name)
    page.until("app.extensionManager.workflow.activeWorkflow?.filename === args[0] && app.graph.nodes.length === args[1]",
               f"{name} on the canvas", name, count)
