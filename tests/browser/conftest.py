"""One page of the real frontend in Chromium a mode, on the session's server."""
from __future__ import annotations

import os

import pytest

from browser import pages
from harness import browser, workflows

MODES = {"canvas": False, "vue": True}


@pytest.fixture(scope="session")
def info(server):
    """Every node that the server knows; the pictures of the workflows lie in its input folder."""
    workflows.copy_inputs(server.input)
    return server.object_info(fresh=True)


@pytest.fixture(scope="module", params=list(MODES))
def vue(request):
    """Whether Vue draws the nodes."""
    return MODES[request.param]


@pytest.fixture(scope="module")
def page(vue, server, info):
    """A page that is ready for work, nodes drawn on the canvas or by Vue."""
    if not os.environ.get("LIKENESS_BROWSER"):
        pytest.skip("dev.py test --browser tries the page itself in Chromium; it takes ten minutes")
    if browser.program() is None:
        pytest.skip("there is no Chromium or Chrome on this machine, so the page itself was not tried")
    pages.choose(server, **{"Comfy.VueNodes.Enabled": vue, "Comfy.Workflow.Persist": False,
                            "Comfy.TutorialCompleted": True})
    with browser.Browser() as made:
        pages.enter(made, server)
        yield made
