"""What the model card of an adapter says: how it is loaded, and what of the merge it keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from della_dist.planning.adapter_output import AdapterOutput
from della_dist.report.text import format_share
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


def kept_energy(adapter: AdapterOutput, tensors: Iterable[TensorRecord]) -> float:
    """Return the share of the squared norm of all deltas that their factors keep."""
    total = _Kept()
    for _, energy, norm in _measured(adapter, tensors):
        total.add(energy, norm)
    return total.share


def _measured(
    adapter: AdapterOutput, tensors: Iterable[TensorRecord]
) -> Iterator[tuple[str, float, float]]:
    """Yield the name of every factored matrix, its energy and its norm."""
    for record in tensors:
        piece, stats = adapter.pieces[record.name], record.stats
        if piece.side == "left" and stats is not None:
            assert stats.energy is not None
            assert stats.norm is not None
            yield piece.tensor.name, stats.energy, stats.norm


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
    for name, energy, norm in _measured(adapter, tensors):
        last = name.removesuffix(".weight").rpartition(".")[2]
        for kept in (total, by_name.setdefault(last, _Kept())):
            kept.add(energy, norm)
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
        f"{format_share(total.share)}:",
        "",
        "| module | number | kept | least | most |",
        "|---|---|---|---|---|",
    ]
    for name, kept in sorted(by_name.items()):
        shares = map(format_share, (kept.share, kept.least, kept.most))
        lines.append(f"| `{name}` | {kept.num_modules} | {' | '.join(shares)} |")
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
