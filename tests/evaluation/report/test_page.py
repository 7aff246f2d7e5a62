"""The page: strict HTML, nothing loaded from the network, all results in it; in a browser, where there is one."""

import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import html5lib
import pytest
from PIL import Image

from d2q_edge.errors import D2QError
from d2q_edge.evaluation.report import page as module
from d2q_edge.evaluation.report.page import check_target, page, write
from tests.evaluation.report.comparisons import comparison, conversion

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SVG = "{http://www.w3.org/2000/svg}"
HTML = "{http://www.w3.org/1999/xhtml}"


@pytest.fixture(scope="module")
def text() -> str:
    return page(comparison())


@pytest.fixture(scope="module")
def tree(text: str) -> Element:
    parsed: Element = html5lib.HTMLParser(strict=True).parse(text)
    return parsed


def words(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def test_is_strict_html_and_small(text: str, tree: Element) -> None:
    assert tree.tag == f"{HTML}html"
    assert len(text.encode()) < 400_000
    with pytest.raises(html5lib.html5parser.ParseError):
        html5lib.HTMLParser(strict=True).parse(text.replace("</table>", "</div>", 1))


def test_needs_nothing_from_outside(text: str, tree: Element) -> None:
    assert "<script" not in text
    assert re.findall(r"https?://[^\s\"'<]*|//[a-z][^\s\"'<]*", text) == []
    for element in tree.iter():
        for name, value in element.attrib.items():
            if name.rpartition("}")[2] in ("src", "href"):
                assert value == "data:," or value.startswith("#"), (element.tag, name, value)
            assert re.sub(r"url\(#[\w-]+\)", "", value).count("url(") == 0


def test_ids_are_unique_and_references_lead_somewhere(tree: Element) -> None:
    ids = [element.attrib["id"] for element in tree.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    for element in tree.iter():
        for name, value in element.attrib.items():
            wanted = re.findall(r"url\(#([\w-]+)\)", value)
            wanted += [value[1:]] if name.endswith("href") and value.startswith("#") else []
            wanted += value.split() if name == "aria-labelledby" else []
            assert set(wanted) <= set(ids)


def test_pictures_have_names_and_descriptions(tree: Element) -> None:
    pictures = list(tree.iter(f"{SVG}svg"))
    assert len(pictures) == 2 + 5
    for picture in pictures:
        title, description = (picture.find(f"{SVG}{tag}") for tag in ("title", "desc"))
        assert title is not None and description is not None
        assert picture.attrib["role"] == "img"
        assert picture.attrib["aria-labelledby"] == f"{title.attrib['id']} {description.attrib['id']}"
        assert len(words(description)) > 60
        # Text stays text, in the page's colors.
        assert [element.text for element in picture.iter(f"{SVG}text")]
        assert re.findall(r"#[0-9a-f]{6}", str([element.attrib for element in picture.iter()])) == []
    assert "mine: 2 MB, 0.3" in words(pictures[0])


def test_table(tree: Element) -> None:
    table = next(tree.iter(f"{HTML}table"))
    rows = [[words(cell) for cell in row] for row in table.iter(f"{HTML}tr")]
    assert rows[0][:5] == ["File", "Size", "Bits per weight", "Perplexity", "KL divergence"]
    assert rows[1] == ["f16 (original)", "16 MB", "16.000", "21.500 ± 0.700", "–", "–", "–", "80.0", "5.0"]
    assert rows[4] == [
        "mine", "2 MB", "2.000", "21.500 ± 0.700", "0.3000 ± 0.0150", "1.800", "75.0%", "110.0", "30.0",
    ]  # fmt: skip
    assert [row[0] for row in rows[1:]] == ["f16 (original)", "other", "Q2_K (stock)", "mine", "IQ2_XS (stock)"]
    best = [words(row[0]) for row in table.iter(f"{HTML}tr") if row.attrib.get("class") == "best"]
    assert best == ["other", "mine"]
    for row in table.iter(f"{HTML}tr"):
        assert [cell.attrib["scope"] for cell in row if cell.tag == f"{HTML}th"] in (["row"], ["col"] * 9)


def test_allocation(tree: Element) -> None:
    tables = [table for table in tree.iter(f"{HTML}table") if table.attrib.get("class") == "allocation"]
    assert len(tables) == 2, "one for each stock file; ours has one type only"
    cells = [[(words(cell), cell.attrib.get("colspan")) for cell in row] for row in tables[0].iter(f"{HTML}tr")]
    assert cells == [
        [("attn_q", None), ("q2_k in blocks 0 to 2", "3")],
        [("ffn_down", None), ("q3_k in blocks 0 to 1", "2"), ("q2_k in block 2", "1")],
    ]
    colours = [cell.attrib["class"] for row in tables[0].iter(f"{HTML}tr") for cell in row if "colspan" in cell.attrib]
    assert colours[0] == colours[2] != colours[1]
    assert words(tree).count("All matrices of the blocks: d2q2.") == 2


def test_conversion(tree: Element) -> None:
    said = words(tree)
    assert "KL divergence on 2048 validation tokens of the calibration text was 0.3125 ± 0.0100" in said
    assert said.count("No report of its conversion was found.") == 1
    rows = [[words(cell) for cell in row] for row in tree.iter(f"{HTML}tr")]
    assert ["model.layers.2.mlp.up_proj.weight", "d2q2", "0.06000"] in rows
    assert ["model.layers.0.self_attn.q_proj", "0.2000", "0.5000", "1.0000", "2.0000", "9.0000"] in rows
    norm = "model.layers.{}.post_attention_layernorm"
    assert [norm.format(0), "0.5000", "1.00%", "0.02000", "0.40%", "100"] in rows
    assert [norm.format(1), "1.5000", "2.00%", "0.02000", "0.40%", "left alone"] in rows
    errors = [row for row in rows if len(row) == 3 and row[1] == "d2q2"]
    assert [float(row[2]) for row in errors] == sorted((float(row[2]) for row in errors), reverse=True)


def test_untrusted_names_are_escaped() -> None:
    text = page(comparison(model="<script>alert(1)</script>", name='a"><img src=x onerror=alert(1)>'))
    tree = html5lib.HTMLParser(strict=True).parse(text)
    assert [element for element in tree.iter() if element.tag in (f"{HTML}script", f"{HTML}img")] == []
    assert "<script>alert(1)</script>: files compared" in words(tree)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
@pytest.mark.parametrize("name", ["$\\foo$", "$x^2$", "模型", "עברית", "_mine", "a$b", "${"])
def test_untrusted_names_in_pictures(tmp_path: Path, name: str, suffix: str) -> None:
    """They aren't parsed as formulas, and a font that lacks them gives no warning."""
    original = comparison(model=name, name=name)
    values: dict[str, Any] = conversion()
    values["layer_errors"] |= {f"model.layers.{block}.{name}.weight": 0.5 for block in range(3)}
    assert isinstance(original.rows[3].conversion, dict)
    original.rows[3].conversion.update(values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(original, tmp_path / f"x{suffix}")
    if suffix != ".png":
        text = (tmp_path / f"x{suffix}").read_text("utf-8")
        words = re.findall(r"<text [^>]*>([^<]*)</text>", text)
        assert words.count(name) == (3 if suffix == ".html" else 2), "beside both points, and in a legend"


def test_lone_surrogates(tmp_path: Path) -> None:
    """JSON can have them, UTF-8 can't."""
    original = comparison()
    assert isinstance(original.rows[3].conversion, dict)
    original.rows[3].conversion["layer_errors"]["model.layers.0.\ud800.weight"] = 0.5
    write(original, tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text("utf-8")
    assert "model.layers.0.?.weight" in text and "\\ud800" in text


def test_light_and_dark(text: str) -> None:
    assert text.count("--paper:") == 2
    assert "@media (prefers-color-scheme: dark)" in text
    used = set(re.findall(r"var\((--\w+)\)", text))
    defined = set(re.findall(r"(--\w+):", text))
    assert used <= defined


def test_without_speeds() -> None:
    original = comparison()
    for row in original.rows:
        row.speeds.clear()  # type: ignore[attr-defined]
    tree = html5lib.HTMLParser(strict=True).parse(page(original))
    assert len(next(next(tree.iter(f"{HTML}table")).iter(f"{HTML}tr"))) == 7
    assert len(list(tree.iter(f"{SVG}svg"))) == 1 + 5


def test_large_models_fit() -> None:
    original = comparison()
    big: dict[str, Any] = conversion(blocks=80)
    assert isinstance(original.rows[3].conversion, dict)
    original.rows[3].conversion.update(big)
    assert len(page(original).encode()) < 2_000_000


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_written_files(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"report{suffix}"
    write(comparison(), target)
    content = target.read_bytes()
    begins = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".html": b"<!DOCTYPE html>"}
    assert content.startswith(begins[suffix])
    again = tmp_path / f"again{suffix}"
    write(comparison(), again)
    assert again.read_bytes() == content, "the same comparison gives the same file"


class TestBadTargets:
    def test_suffix_and_directory(self, tmp_path: Path) -> None:
        with pytest.raises(D2QError, match=r"x.pdf should end in .html for a report, or in .png or .svg"):
            check_target(tmp_path / "x.pdf")
        with pytest.raises(D2QError, match="none doesn't exist"):
            check_target(tmp_path / "none" / "x.html")

    def test_without_matplotlib(self, tmp_path: Path, without_package: Callable[[str], None]) -> None:
        without_package("matplotlib")
        with pytest.raises(D2QError, match=r"need matplotlib: pip install 'd2q-edge\[report\]'"):
            check_target(tmp_path / "x.html")

    def test_unwritable(self, tmp_path: Path) -> None:
        for suffix in (".html", ".png"):
            target = tmp_path / f"folder{suffix}"
            target.mkdir()
            with pytest.raises(D2QError, match=f"can't write .*folder{suffix}"):
                write(comparison(), target)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(tmp_path: Path, dark: bool) -> None:
    """The browser logs no message; a page that loads something or has a broken style would cause some."""
    (tmp_path / "report.html").write_text(page(comparison()), "utf-8")
    (tmp_path / "bad.html").write_text(page(comparison()).replace("</main>", "<script>x</script></main>"), "utf-8")
    seen = {}
    for name in ("report", "bad"):
        seen[name] = browse(tmp_path / f"{name}.html", tmp_path / f"{name}.png", dark)
    assert seen["report"] == []
    assert len(seen["bad"]) == 1
    image = Image.open(tmp_path / "report.png").convert("L")
    background = image.getpixel((2, 2))
    assert isinstance(background, int)
    assert background < 40 if dark else background > 240
    # The table and the pictures are there: not only background.
    assert sum(image.histogram()[background - 8 : background + 8]) < 0.97 * image.width * image.height


def browse(path: Path, screenshot: Path, dark: bool) -> list[str]:
    """Take a screenshot and return the console's messages."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={screenshot.with_suffix('.profile')}", "--hide-scrollbars", "--window-size=1000,1600",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={screenshot}", path.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert screenshot.is_file(), result.stderr
    return [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def test_template_is_in_the_package() -> None:
    assert (Path(module.__file__).parent / "page.html").is_file()
