"""For the site alone: what a code host does by itself, or cannot do.

Formulas, ``$…$`` and fences of ``math``, become MathML when the site is built, which browsers show
without a script or a network, in a font that the site has. Links to the source of a public name
lead to its reference, which stands in comments that a code host does not show. Other links out of
docs/ become text, for only the repository has their ends.
"""

import re
import runpy
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import ziamath
from fontTools import subset
from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor


def mathml(formula: str, display: str) -> str:
    """Raises a ValueError where the converter leaves what it does not know as it is."""
    made: str = convert(formula, display=display)
    if "\\" in made or ">&<" in made or "merror" in made:
        raise ValueError(f"no MathML for the formula {formula!r}")
    made = made.replace('<mn mathvariant="bold">1<', "<mn>𝟏<")  # browsers know no variants
    return made.replace("<mi>&#x000B1;</mi>", "<mo>±</mo>")  # an operator, and spaced as one


class _Displayed(Preprocessor):
    """Fences of ``math``."""

    fence = re.compile(r"^```math\n(.*?)^```$", re.M | re.S)

    def run(self, lines: list[str]) -> list[str]:
        def stashed(fence: re.Match[str]) -> str:
            made = f'<div class="formula">{mathml(fence[1], "block")}</div>'
            return self.md.htmlStash.store(made)

        return self.fence.sub(stashed, "\n".join(lines)).split("\n")


class _Inline(InlineProcessor):
    """``$…$`` on one line, no space within its ends."""

    def handleMatch(  # type: ignore[override]
        self, m: re.Match[str], data: str
    ) -> tuple[str | Element, int, int]:
        return self.md.htmlStash.store(mathml(m[1], "inline")), m.start(), m.end()


class Formulas(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Displayed(md), "formula", 26)  # before fences of code, 25
        md.inlinePatterns.register(  # after spans of code, 190, before escapes, 180
            _Inline(r"\$(?!\s)([^$\n]+?)(?<!\s)\$", md), "formula", 185
        )


# Letters, upright and italic, upright and italic Greek, and what stands between and above them.
LETTERS = ((0x20, 0x17F), (0x2B0, 0x3FF), (0x1D434, 0x1D467), (0x1D6E2, 0x1D71B))
SIGNS = ((0x2010, 0x206F), (0x2100, 0x22FF), (0x2308, 0x230B), (0x27E8, 0x27EB), (0x1D7CF, 0x1D7CF))


def on_post_build(config: Any) -> None:
    """The letters that formulas use of STIX Two Math (SIL Open Font License)."""
    font = Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf"
    kept = [f"U+{first:X}-{last:X}" for first, last in LETTERS + SIGNS]
    to = Path(config["site_dir"]) / "math.ttf"
    options = ["--name-IDs=*", f"--unicodes={','.join(kept)}", f"--output-file={to}"]
    subset.main([str(font), *options])  # with all its names, of which one is the licence


def on_config(config: Any) -> Any:
    config["markdown_extensions"].append(Formulas())
    config["repo_url"] = runpy.run_path("tools/address.py")["here"]()  # of the clone at hand
    config["repo_name"] = "Source"
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    markdown = re.sub(r"^<!--\n(:::.*)\n-->$", r"\1", markdown, flags=re.M | re.S)
    markdown = re.sub(
        r"\[`(\w+)`\]\(\.\./(monokernel/[\w/]+?)\.py\)",
        lambda link: f"[`{link[1]}`][{link[2].replace('/', '.')}.{link[1]}]",
        markdown,
    )
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)
