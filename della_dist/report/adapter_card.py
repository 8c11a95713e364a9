"""What the model card of an adapter says: how it is loaded, and what of the merge it keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from della_dist.planning.adapter_output import AdapterOutput
from della_dist.storage.manifest import TensorRecord
from della_dist.wording import plural


@dataclass(slots=True)
class _Kept:
    """What is kept of the deltas of modules of one name."""

    num_modules: int = 0
    squares: float = 0.0
    kept: float = 0.0
    least: float = 1.0
    most: float = 0.0

    def add(self, energy: float, norm: float) -> None:
        self.num_modules += 1
        self.squares += norm * norm
        self.kept += energy * norm * norm
        self.least = min(self.least, energy)
        self.most = max(self.most, energy)

    @property
    def share(self) -> float:
        return self.kept / self.squares if self.squares else 1.0


def adapter_lines(adapter: AdapterOutput, tensors: Iterable[TensorRecord], base: str) -> list[str]:
    """Return the lines of the card.

    Parameters
    ----------
    adapter
        What was written.
    tensors
        Records of it.
    base
        What the base is called.
    """
    total, by_name = _Kept(), dict[str, _Kept]()
    for record in tensors:
        piece, stats = adapter.pieces[record.name], record.stats
        if piece.side != "left" or stats is None:
            continue
        assert stats.energy is not None
        assert stats.norm is not None
        name = piece.tensor.name.removesuffix(".weight").rpartition(".")[2]
        for kept in (total, by_name.setdefault(name, _Kept())):
            kept.add(stats.energy, stats.norm)
    lines = [
        f"A LoRA adapter of `{base}`:",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        f'model = PeftModel.from_pretrained(base, "...")  # base: {base}',
        "```",
        "",
        "It is the merged delta, factored. Of its squared norm the factors keep "
        f"{_percent(total.share)}:",
        "",
        "| module | number | kept | least | most |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {kept.num_modules} | {_percent(kept.share)} | {_percent(kept.least)} | "
        f"{_percent(kept.most)} |"
        for name, kept in sorted(by_name.items())
    ]
    whole = sum(piece.side is None for piece in adapter.pieces.values())
    if whole:
        lines += [
            "",
            f"{plural(whole, 'tensor')} beside them are as merged: norms, biases, tables.",
        ]
    if any(piece.side and not piece.is_sum for piece in adapter.pieces.values()):
        lines += [
            "",
            "A truncated SVD is the same to the bit on machines of one kind, not on all: where "
            "processor or libraries are others, last digits may differ.",
        ]
    return lines


def _percent(share: float) -> str:
    """Return a share with so many digits that what is lost can be seen, and never rounded away."""
    if share == 1:
        return "100 %"
    digits = 2 if share < 0.99 else min(8, 1 - math.floor(math.log10(100 * (1 - share))))
    return f"{math.floor(100 * share * 10**digits) / 10**digits:.{digits}f} %"
