"""Draw the pictures of the README from the code itself.

    python records/pictures.py           # writes records/mask.png
"""

import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Patch, Rectangle  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "data")]
from text import Parser  # noqa: E402

from train_gpt2 import MASK_BLOCK, block_mask, first_visible_key, interval_rule  # noqa: E402

TOKENS, WINDOW, DOCUMENTS = 1536, 511, (0, 300, 384, 1100)  # a query and the 511 tokens before it
SEEN, WHOLE, TESTED, INK = "#4c78a8", "#54a24b", "#e45756", "#222222"


def draw_mask(path: Path) -> None:
    """Which keys each query sees in one row of four documents, and what the kernel does with each block."""
    starts = torch.zeros(1, TOKENS, dtype=torch.bool)
    starts[0, list(DOCUMENTS)] = True
    first_key = first_visible_key(starts, WINDOW)
    position = torch.arange(TOKENS)
    visible = interval_rule(first_key)(0, 0, position[:, None], position)
    blocks = block_mask(first_key)

    figure, axes = plt.subplots(figsize=(7, 7.4), facecolor="white")
    axes.imshow(visible, cmap=matplotlib.colors.ListedColormap(["white", SEEN]), alpha=0.55, interpolation="nearest")
    for counts, numbers, colour in ((blocks.kv_num_blocks, blocks.kv_indices, TESTED),
                                    (blocks.full_kv_num_blocks, blocks.full_kv_indices, WHOLE)):
        for query, count in enumerate(counts[0, 0].tolist()):
            for key in numbers[0, 0, query, :count].tolist():
                axes.add_patch(Rectangle((key * MASK_BLOCK + 5, query * MASK_BLOCK + 5), MASK_BLOCK - 10,
                                         MASK_BLOCK - 10, fill=False, edgecolor=colour, linewidth=1.8))
    for start in DOCUMENTS[1:]:
        axes.axhline(start, color=INK, linewidth=0.8, linestyle=":")
        axes.axvline(start, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlabel("key position (tokens)", color=INK)
    axes.set_ylabel("query position (tokens)", color=INK)
    axes.set_xticks(range(0, TOKENS + 1, 256))
    axes.set_yticks(range(0, TOKENS + 1, 256))
    axes.tick_params(colors=INK)
    axes.set_title(f"One row, documents at {', '.join(map(str, DOCUMENTS))}, window {WINDOW} tokens back", color=INK,
                   fontsize=11)
    axes.legend(handles=[Patch(facecolor=SEEN, alpha=0.55, label="query sees key"),
                         Patch(fill=False, edgecolor=WHOLE, linewidth=1.8, label="block wholly visible: no test"),
                         Patch(fill=False, edgecolor=TESTED, linewidth=1.8, label="block tested per token"),
                         Patch(facecolor="white", edgecolor="#bbbbbb", label="never visited")],
                loc="upper right", fontsize=9, labelcolor=INK, facecolor="white")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    Parser(description=__doc__.splitlines()[0]).parse_args()
    draw_mask(HERE / "mask.png")
    print("wrote records/mask.png")
