"""The page of a run: what models wrote stays text, large runs are cut and say so, and a browser shows it without an error."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qprobe.report import figures, page
from qprobe.report.explored import Explored, ScoredPrompt
from qprobe.report.results import Band, Curve, LayerCurve, Results, Row

HOSTILE = "</script><img src=x onerror=\"document.title='it ran'\"><!-- <script>alert(1)</script>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def prompt(number: int, rewards: list[float], text: str = "    return {}\n") -> ScoredPrompt:
    """Candidates whose score falls with their number."""
    count = len(rewards)
    return ScoredPrompt(
        task_id=f"task/{number}",
        prompt=f"Add {number}.",
        completions=[text.format(place) for place in range(count)],
        rewards=np.array(rewards),
        verdicts=["passed" if reward else "failed" for reward in rewards],
        details=[""] * count,
        q={"policy_gradient": np.linspace(1, -1, count)},
        probability={"policy_gradient": np.full(count, 1 / count)},
    )


def split(*prompts: ScoredPrompt, **changes: Any) -> Explored:
    values: dict[str, Any] = {
        "title": "Sums",
        "protocol": "2-fold cross-validation over prompts",
        "pool": "sums",
        "k": 2,
        "prompts": len(prompts),
        "samples": sum(len(p.completions) for p in prompts),
        "samples_per_prompt": 2,
        "mixed_prompts": 0,
        "seeds": 1,
        "rows": [Row(method="pass@1", value=0.5, low=0.25, high=0.75, prompts=2, samples_per_prompt=2)],
        "notes": ["A note on L_PG."],
    }
    return Explored(Results(**values | changes), list(prompts))


def test_every_figure_has_a_caption() -> None:
    assert list(page._FIGURES) == list(figures.FIGURES)


class Elements(HTMLParser):
    """Tags with their attributes, and the text of the data element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(next(text for text in self.texts if text.startswith('{"splits"')))
        return found


def hostile_split() -> Explored:
    hostile = prompt(1, [0, 1])
    hostile = ScoredPrompt(
        HOSTILE, HOSTILE, [HOSTILE, "x"], hostile.rewards, [HOSTILE] * 2, [HOSTILE] * 2, hostile.q, hostile.q
    )
    row = Row(method=HOSTILE, value=0.5)
    curve = Curve(k=[1], series={})
    return split(
        hostile, title=HOSTILE, pool=HOSTILE, protocol=HOSTILE, notes=[HOSTILE], rows=[row], reward_against_k=curve
    )


def test_texts_of_models_and_data_sets_stay_text() -> None:
    elements = Elements(page.to_html(HOSTILE, [hostile_split()]))
    tags = [tag for tag, _ in elements.tags]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)
    data = elements.data()
    (shown,) = data["splits"][0]["prompts"]
    assert shown["id"] == HOSTILE
    assert data["texts"][shown["candidates"][0][1]][0] == HOSTILE


def test_the_page_asks_no_network() -> None:
    curve = {"k": [1, 2], "series": {"Q-probe L_PG": {"value": [0.1, 0.2], "low": [0, 0.1], "high": [0.3, 0.4]}}}
    elements = Elements(page.to_html("run", [split(prompt(1, [0, 1]), reward_against_k=Curve(**curve))]))
    sources = [attributes.get("src") or "data:" for _, attributes in elements.tags]
    assert sum(source.startswith("data:image/") for source in sources) == 1
    assert all(source.startswith("data:") for source in sources)
    assert all((attributes.get("href") or "#").startswith("#") for _, attributes in elements.tags)


def test_tables_have_captions_and_scoped_headers() -> None:
    text = page.to_html("run", [split(prompt(1, [0, 1]))])
    assert "<caption>What each method earns</caption>" in text
    assert '<tr><th scope="row">pass@1</th><td>0.500 [0.250, 0.750]</td>' in text
    assert "<li>A note on <i>L</i><sub>PG</sub>.</li>" in text


def test_the_page_compares_the_layers_as_the_other_tables_do() -> None:
    band = Band(value=[0.25, 0.5], low=[0.2, 0.4], high=[0.3, 0.6])
    layers = LayerCurve(layers=[18, 23], series={"Q-probe L_PG": band}, taken={"Q-probe L_PG": [1, 4]})
    probe = Row(method="Q-probe L_PG", value=0.5, seeds=1)
    text = page.to_html("run", [split(prompt(1, [0, 1]), rows=[probe], reward_against_layer=layers)])
    assert "<caption>What each layer earns</caption>" in text
    assert '<td class="number">23</td><td>0.500 [0.400, 0.600]</td><td class="number">4 of 5</td>' in text


def test_large_runs_show_the_ends_and_the_best_good_candidate_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_BYTES", 2000)
    monkeypatch.setattr(page, "MOST_PROMPTS", 2)
    rewards = [0.0] * 40
    rewards[20] = rewards[25] = 1.0
    text = page.to_html("run", [split(prompt(1, [0.0, 0.0]), prompt(2, rewards), prompt(3, [0.0, 1.0]))])
    assert "of 3 prompts 2 are shown" in text
    assert "the 10 with the highest and the 10 with the lowest Q" in text
    shown = Elements(text).data()["splits"][0]["prompts"]
    assert [found["id"] for found in shown] == ["task/2", "task/3"]  # where there is a choice
    assert [candidate[0] for candidate in shown[0]["candidates"]] == [*range(10), 20, *range(30, 40)]
    assert shown[0]["count"] == 40


def test_a_large_page_keeps_below_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_BYTES", 200_000)
    bodies = [f"    total = {number}\n    for item in items:\n        total += item\n" * 4 for number in range(20)]
    prompts = [prompt(n, [0.0, 1.0] * 100, body + "    # {}\n") for n, body in enumerate(bodies)]
    whole = sum(len(text) for one in prompts for text in one.completions)
    data = len(json.dumps(Elements(page.to_html("run", [split(*prompts)])).data()))
    assert data < 200_000 < whole


def browse(text: str, folder: Path) -> tuple[str, list[str]]:
    """The DOM that Chromium makes of a page, and what it says in its console."""
    assert CHROMIUM is not None
    path = folder / "page.html"
    path.write_text(text)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    more = ["--enable-logging=stderr", "--v=0", "--dump-dom", path.as_uri()]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_the_candidates_and_no_error(tmp_path: Path) -> None:
    bad_pick = prompt(1, [0, 1])
    text = page.to_html("run", [split(bad_pick, prompt(2, [1, 1])), hostile_split()])
    dom, console = browse(text, tmp_path)
    assert console == []
    elements = Elements(dom)
    assert [a.get("class") for tag, a in elements.tags if tag == "li" and "class" in a] == ["pick", ""]
    assert "<h3>task/1</h3>" in dom
    assert "probe wrong" in elements.texts
    assert '<span class="k">return</span>' in dom
    assert "<title>run: Sums</title>" in dom
    # The check can fail: a script that is not the page's own is refused, and the console says so.
    _, console = browse(text.replace("<h1>", "<script>document.title = 'it ran'</script><h1>"), tmp_path)
    assert "Content Security Policy" in console[0]
