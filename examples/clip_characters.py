# SPDX-License-Identifier: Apache-2.0
"""CLIP on real pairs: pictures of characters and their Unicode names, with open_clip's call.

    python examples/clip_characters.py
    python examples/clip_characters.py --font /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

Without --font the characters are those of DejaVu Sans, which matplotlib brings along: about 3000
letters, digits and signs. With NotoColorEmoji (Debian: fonts-noto-color-emoji) they are emoji. A fifth
of the pairs is held out. What to expect (12 epochs, about a minute on two cores): of 606 held-out
pictures about half find their name among the 606 names; of 256 emoji, a few.
"""

import argparse
import math
import time
import unicodedata

import torch
from torch import Tensor, nn

from sslkernels.integrations.open_clip import ClipLoss
from sslkernels.metrics import contrastive_accuracy

try:
    import numpy as np
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"clip_characters.py needs {missing.name}: pip install matplotlib pillow"
    ) from None

LENGTH = 48  # letters of a name that are read
RANGES = ((0x21, 0x52F), (0x1E00, 0x1FFF), (0x2100, 0x2BFF))
EMOJI = ((0x1F300, 0x1FAFF), (0x2600, 0x27BF))


def pairs(font_file: str, limit: int) -> tuple[Tensor, Tensor]:
    """Pictures [N, 3, 32, 32] from 0 to 1 and names [N, LENGTH] as letter codes."""
    emoji = "emoji" in font_file.lower()
    size = 109 if emoji else 24  # NotoColorEmoji has this size only
    font = ImageFont.truetype(font_file, size)
    pictures, names, seen = [], [], {font.getmask("\uffff").getbbox()}
    for first, last in EMOJI if emoji else RANGES:
        for code in range(first, last + 1):
            name = unicodedata.name(chr(code), "")
            if not name or unicodedata.category(chr(code))[0] in "CZM":
                continue
            image = Image.new("RGB", (136, 128) if emoji else (32, 32), "white")
            draw = ImageDraw.Draw(image)
            middle = (image.width // 2, image.height // 2)
            draw.text(middle, chr(code), "black", font, anchor="mm", embedded_color=emoji)
            pixels = np.asarray(image.resize((32, 32)), np.float32).transpose(2, 0, 1) / 255
            if pixels.min() == 1 or (key := pixels.tobytes()) in seen:
                continue  # not in the font, or one that looks the same
            seen.add(key)
            pictures.append(torch.from_numpy(pixels))
            names.append(torch.tensor([min(ord(c), 95) - 31 for c in name.ljust(LENGTH)[:LENGTH]]))
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:limit]
    return torch.stack(pictures)[order], torch.stack(names)[order]


class Towers(nn.Module):
    """An image tower and a name tower, both convolutions, and the scale of CLIP."""

    def __init__(self, dim: int = 96) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Flatten(), nn.Linear(128 * 16, dim),
        )  # fmt: skip
        self.letters = nn.Embedding(65, 64)
        self.name = nn.Sequential(
            nn.Conv1d(64, 128, 5, 1, 2), nn.ReLU(), nn.Conv1d(128, dim, 5, 1, 2)
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, pictures: Tensor, names: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit rows of both towers, and the scale."""
        texts = self.name(self.letters(names).transpose(1, 2)).amax(2)
        unit = nn.functional.normalize
        return unit(self.image(pictures)), unit(texts), self.log_scale.exp()


def main() -> None:
    """Train, and find names of held-out pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--font", default=f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--limit", type=int, default=10**6, help="use at most so many pairs")
    args = parser.parse_args()
    pictures, names = pairs(args.font, args.limit)
    n = len(pictures) * 4 // 5
    torch.manual_seed(0)
    model, criterion = Towers(), ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    begin = time.perf_counter()
    for epoch in range(args.epochs):
        for batch in torch.randperm(n).split(256):
            loss = criterion(*model(pictures[batch], names[batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 4 == 0 or epoch == args.epochs - 1:
            print(
                f"epoch {epoch}: loss {loss.item():.3f}, scale {model.log_scale.exp().item():.1f}"
            )
    with torch.no_grad():
        images, texts, _ = model.eval()(pictures[n:], names[n:])
    top1, top5 = contrastive_accuracy(images, texts)
    held = len(images)
    print(f"{n} pairs trained in {time.perf_counter() - begin:.0f} s, {held} held out: the name is")
    print(f"found by {top1.item():.1%}, among five by {top5.item():.1%}; by chance {5 / held:.1%}")


if __name__ == "__main__":
    main()
