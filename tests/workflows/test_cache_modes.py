"""The host's four ways to keep results: the same pictures in each, and nothing runs twice that need not."""
from __future__ import annotations

import pytest

from harness import workflows
from workflows.shipped import NAMES, light, of_type, prompt, same, saved

MODES = {"default": [], "classic": ["--cache-classic"], "lru": ["--cache-lru", "100"], "none": ["--cache-none"]}
# a sub-graph, and several subjects in one model
CHOSEN = [NAMES[0], NAMES[1]]


def jobs(server) -> dict[str, dict]:
    workflows.copy_inputs(server.input)
    info = server.object_info(fresh=True)
    return {name: light(prompt(name, info), seed=41) for name in CHOSEN}


@pytest.fixture(scope="module")
def expected(server):
    """Pictures of the session's server."""
    out = {}
    for name, job in jobs(server).items():
        result = server.run(job)
        assert result.ok, result.error
        out[name] = saved(result, job)
    return out


@pytest.mark.parametrize("mode", MODES)
def test_same_pictures_in_each_mode(request, make_server, expected, mode):
    server = make_server(flags=MODES[mode]) if MODES[mode] else request.getfixturevalue("server")
    try:
        for name, job in jobs(server).items():
            first, again = server.run(job), server.run(job)
            assert first.ok and again.ok, first.error + again.error
            assert same(saved(first, job), expected[name]) and same(saved(again, job), expected[name])
            assert set(again.executed) == (set(job) if mode == "none" else set())
            other = light(job, seed=42)
            result = server.run(other)
            assert result.ok and not same(saved(result, other), expected[name])
            kept = {key for key, node in job.items() if node["class_type"].startswith("Likeness_")}
            assert kept & set(result.executed) == (kept if mode == "none" else set())
            assert set(of_type(job, "KSampler")) <= set(result.executed)
    finally:
        if MODES[mode]:
            server.stop()
