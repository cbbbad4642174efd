# SPDX-License-Identifier: Apache-2.0
"""Make a set of real image-text pairs for ``ssltrain clip``: emoji and what they are called.

    apt-get install fonts-noto-color-emoji unicode-cldr-core     # pictures and names, on Debian
    python examples/emoji_pairs.py runs/emoji
    ssltrain clip --data runs/emoji --recipe clip-emoji

Writes a PNG for each emoji that the font has, and ``metadata.csv`` with its file and its text: the name and
the keywords of Unicode's CLDR in English, in one line.  What to expect: 1846 pairs with the font and names of
Debian 12; docs/training.md says what a run on them retrieves.
"""

import argparse
import csv
import sys
from pathlib import Path
from xml.etree import ElementTree

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
CLDR = "/usr/share/unicode/cldr/common"
SIZE = 109  # the one size that the font's pictures have
CANVAS = (136, 128)


def texts(cldr: Path) -> dict[str, str]:
    """The name of each emoji, and its keywords after it."""
    names: dict[str, str] = {}
    words: dict[str, str] = {}
    for part in ("annotations", "annotationsDerived"):
        for item in ElementTree.parse(cldr / part / "en.xml").iter("annotation"):
            target = names if item.get("type") == "tts" else words
            target[item.attrib["cp"]] = (item.text or "").strip()
    return {
        emoji: ", ".join(
            [name, *(w for w in words.get(emoji, "").split(" | ") if w not in ("", name))]
        )
        for emoji, name in names.items()
    }


def main() -> None:
    """Draw the emoji and write their texts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--font", default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--cldr", type=Path, default=Path(CLDR), help="folder common of CLDR")
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument(
        "--tones", action="store_true", help="also emoji that differ in skin tone only"
    )
    options = parser.parse_args()
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        sys.exit("emoji_pairs.py needs Pillow: pip install pillow")
    for path, package in (
        (Path(options.font), "fonts-noto-color-emoji"),
        (options.cldr / "annotations/en.xml", "unicode-cldr-core"),
    ):
        if not path.is_file():
            sys.exit(f"emoji_pairs.py: no {path}; Debian's {package} has it (or say where: --help)")
    font = ImageFont.truetype(options.font, SIZE)
    options.out.mkdir(parents=True, exist_ok=False)
    seen: set[bytes] = set()
    lines = []
    for emoji, text in texts(options.cldr).items():
        if not options.tones and any("\U0001f3fb" <= letter <= "\U0001f3ff" for letter in emoji):
            continue
        left, top, right, bottom = font.getbbox(emoji)
        if (
            right - left > CANVAS[0] or bottom <= top
        ):  # drawn as several: the font lacks the sequence
            continue
        image = Image.new("RGB", CANVAS, "white")
        draw = ImageDraw.Draw(image)
        middle = (CANVAS[0] // 2, CANVAS[1] // 2)
        draw.text(middle, emoji, "black", font, anchor="mm", embedded_color=True)
        image = image.resize((options.size, options.size), Image.Resampling.LANCZOS)
        pixels = image.tobytes()
        if pixels in seen or set(pixels) == {255}:  # drawn like another, or not at all
            continue
        seen.add(pixels)
        name = "-".join(f"{ord(letter):x}" for letter in emoji) + ".png"
        image.save(options.out / name)
        lines.append((name, text))
    with (options.out / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "text"), *lines])
    print(f"wrote {len(lines)} pairs into {options.out}")


if __name__ == "__main__":
    main()
