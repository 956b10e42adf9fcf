"""The page of a report: whole, escaped, self-contained, with every figure in it and beside it; also in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from left import BROWSER, EVIL, bench, evaluation, folder
from matplotlib.image import imread

from linearize.cli.main import main
from linearize.errors import UserError
from linearize.report.page import evaluated, write_page
from linearize.report.sources import read_sources

BROWSER_ITSELF = "not an origin"
"""The initiator, in chromium's log, of what the browser asks for itself, such as updates."""
VOID = {"meta", "br", "img", "hr", "link"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where a tag closes another one."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        tag = self.open[-1] if self.open else ""
        self.text[tag] = self.text.get(tag, "") + data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two conversions, one with a name of markup, an evaluation and a bench; its pictures lie beside it."""
    at = tmp_path_factory.mktemp("report")
    first, second = folder(at / "_gdn <i>$1"), folder(at / "kda", loss=3.25, mixer="kda", layers="LLL")
    bench(first / "timed.json")
    page, pictures = write_page([first, second, evaluation(at / "e.json", "runs/kda")], at / "page" / "report.html")
    assert pictures and sorted(pictures) == sorted((at / "page" / "report").iterdir())
    return page


def test_the_page_is_whole_and_loads_nothing(written: Path) -> None:
    page = Page(written.read_text())
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 100
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "data", "srcset"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:image/png;base64,")), f"<{tag} {name}={target[:60]}>"
            assert not target.startswith("#") or target == "#" or target[1:] in ids
    assert not re.search(r"url\((?!#)|@import|@font-face", written.read_text())
    assert any(attributes.get("http-equiv") == "Content-Security-Policy" for _, attributes in page.tags)


def test_markup_in_names_samples_notes_and_recipes_is_text(written: Path) -> None:
    page = Page(written.read_text())
    assert (
        EVIL in page.text["td"] and EVIL in page.text["li"] and EVIL in page.text["pre"] and "<b>Once" in page.text["p"]
    )
    assert "_gdn <i>$1" in page.text["h1"] and " _gdn <i>$1" in page.text["text"], "the legends of figures too"
    assert not {"b", "script"} & {tag for tag, _ in page.tags if tag != "b"} and "<i>$1" not in written.read_text()


def test_every_figure_has_a_name_and_a_picture(written: Path) -> None:
    text = written.read_text()
    page = Page(text)
    figures = [attributes for tag, attributes in page.tags if tag == "svg"]
    pictures = list((written.parent / "report").iterdir())
    assert len(figures) == len(pictures) > 15
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in figures)
    for picture in pictures:
        height, width, _ = imread(picture).shape
        assert width > 800 and height > 400
        assert np.ptp(imread(picture)[..., :3]) > 0.5, "not empty"
    embedded = [a["xlink:href"] for tag, a in page.tags if tag == "image"]
    for target in embedded:
        data = base64.b64decode((target or "").partition(",")[2], validate=False)
        assert min(imread(io.BytesIO(data)).shape[:2]) > 1


def test_what_stands_on_the_page(written: Path) -> None:
    text = Page(written.read_text()).text
    for title in (
        "Loss by context length",
        "Recall",
        "KL to the teacher by position",
        "Stage 1, attention_transfer: training loss",
        "Stage 2, finetune: kl",
        "Stage 1, attention_transfer: loss by layer at its end",
        "Cache of a sequence",
        "Decoding (batch 1, float32, made up)",
        "Tasks",
        "Samples",
    ):
        assert title in text["h3"], title
    assert "+0.500" in text["td"] and "+0.750" in text["td"], "the gaps of both"
    assert "0.400 ± 0.015" in text["td"] and "out of memory" in text["td"]
    assert text["text"].count("teacher") == len(re.findall(r'aria-label="(?=Loss|Recall)', written.read_text())), (
        "once each"
    )


def test_the_command_writes_into_the_folder_or_where_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, timed = folder(tmp_path / "gdn"), bench(tmp_path / "timed.json")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "gdn", "timed.json", "--output", "all.json"]) == 0
    printed = capsys.readouterr().out
    assert "gap 32" in printed and "decode tok/s" in printed and "gdn/report.html" in printed
    assert Page((made / "report.html").read_text()).text["h1"] == "gdn"
    assert len(list((made / "report").glob("*.png"))) > 10
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", "gdn", str(timed), "--html", "none"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    (again,) = read_sources(["all.json"]).models
    (model,) = read_sources(["gdn"]).models
    assert again.conversion == model.conversion
    assert main(["report", "gdn", "--html", "gdn.html"]) == 2
    assert "cannot write the pictures of gdn.html into gdn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: at / "nothing", "does not exist"),
        (lambda at: at, r"has no run/plan.json"),
        (lambda at: _file(at / "x.json", "{}"), "is no JSON that `evaluate`, `bench` or `report` wrote"),
        (lambda at: _file(at / "x.json", "{"), "is not JSON"),
    ],
)
def test_other_paths_are_refused(make, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_sources([make(tmp_path)])


def test_a_checkpoint_cannot_make_a_report_import_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = folder(tmp_path / "gdn")
    measured = made / "run" / "measurements.json"
    measured.write_text(measured.read_text().replace("kl_by_position", "intruder:Probe"))
    (tmp_path / "intruder.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    page, _ = write_page([made], tmp_path / "report.html")
    assert "intruder:Probe was measured, but cannot be shown" in page.read_text()
    with pytest.raises(SystemExit, match="imported"):
        write_page([made], tmp_path / "report.html", trust_remote_code=True)


def _file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.skipif(BROWSER is None, reason="no chromium on the path to open the page in")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_the_page_and_asks_for_nothing(written: Path, scheme: str, tmp_path: Path) -> None:
    picture, log = _browse(written, tmp_path, scheme)
    pixels = (imread(picture)[..., :3] * 255).round().astype(int)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # the bars of both models
        assert (np.abs(pixels - colour).max(-1) < 3).sum() > 2000
    back = pixels[5, 5].mean()
    assert back > 240 if scheme == "light" else back < 40
    assert log == ""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on the path to open the page in")
def test_the_browser_test_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("http said")</script>')
    _, log = _browse(page, tmp_path, "light")
    assert "http://127.0.0.1:9/x.png" in log and "http said" in log


def _browse(page: Path, at: Path, scheme: str) -> tuple[Path, str]:
    """A screenshot, and what the page said on the console and asked the network for."""
    assert BROWSER is not None
    picture, net = at / "page.png", at / "net.json"
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1300,9000"]
    command += [*quiet, "--enable-logging=stderr", f"--user-data-dir={at / 'profile'}", f"--log-net-log={net}"]
    command += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", f"--screenshot={picture}"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    events = json.loads(net.read_text())["events"]
    told = [event.get("params", {}) for event in events]
    asked = [str(it["url"]) for it in told if it.get("initiator", BROWSER_ITSELF) != BROWSER_ITSELF]
    return picture, "\n".join([*said, *(url for url in asked if not url.startswith(("file:", "data:", "chrome")))])


def test_evaluations_on_different_text_keep_their_own_teachers(tmp_path: Path) -> None:
    files = [evaluation(tmp_path / name, f"runs/{name}") for name in ("a", "b", "c")]
    for path, text in zip(files, ("novels", "novels", "news"), strict=True):
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, "settings": {"text": text}}))
    names = list(evaluated(read_sources(files)))
    assert names == ["teacher of a", "a", "b", "teacher of c", "c"]


def test_answers_stand_beside_the_teachers(tmp_path: Path) -> None:
    path = evaluation(tmp_path / "e.json", "runs/kda")
    values = json.loads(path.read_text())
    for who, right in (("student", "1100"), ("teacher", "1110")):
        values[who]["items"] = {"piqa": {"metric": "acc", "documents": "same", "right": right, "chosen": "0 1 1 0"}}
    path.write_text(json.dumps(values))
    page, _ = write_page([path], tmp_path / "page.html")
    text = Page(page.read_text()).text
    assert "Answers to the same questions: kda and its teacher" in text["h3"]
    assert "-25.0" in text["td"] and "0/1/3" in text["td"]


@pytest.mark.parametrize("name", ["page", "config.json"])
def test_a_page_has_the_name_of_a_page(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"ends with \.html"):
        write_page([folder(tmp_path / "run1")], tmp_path / name)
    assert (tmp_path / name).read_text() == "{}"
