"""What a run of a plan will take, known before it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from della_dist.errors import ConfigError
from della_dist.planning.balance_memory import BalanceSize, balance_size
from della_dist.planning.build import MergePlan
from della_dist.planning.factor_memory import factor_size
from della_dist.planning.layout import ShardLayout
from della_dist.planning.memory import MemoryBudget, block_size, copy_block, records_mem
from della_dist.specs.balancing import balancing
from della_dist.specs.dtypes import num_elements
from della_dist.specs.factoring import factoring
from della_dist.specs.reading import bytes_to_read, gathered, piece_bytes
from della_dist.specs.recipe import TensorRecipe, joining, of_deltas
from della_dist.specs.rows import row_view
from della_dist.specs.sources import (
    Balanced,
    Factor,
    Merged,
    Rows,
    Same,
    Source,
    Stored,
    columns,
)

#: Rates behind the estimated time; the benchmarks of the repository measure both.
EXPERT_ELEMENTS_PER_S_A_THREAD = 300e6
BYTES_PER_S = 1e9
#: Of factoring, and of merging matrices as a whole, in float64.
OPERATIONS_PER_S_A_THREAD = 10e9
#: Of those as many as take as long as moving a byte, to the scheduler: more than a thread does in
#: that time, fewer than a GPU, so that a task on either is usual and none is taken for hung.
OPERATIONS_A_BYTE = 200


@dataclass(frozen=True, slots=True)
class Projection:
    """What a run will take."""

    buffers_mem: int
    """Bytes of buffers at the peak, all workers together."""
    allowed_mem: int
    """For the buffers."""
    records_mem: int
    """Bytes of the plan and of what is recorded of every tensor, in each process."""
    device_mem: int
    """Bytes of device memory at the peak, of each process that has a device; 0 without."""
    allowed_device_mem: int
    beside_device: str
    """The first matrix that is too large for the device, and multiplied on the host."""
    largest_tensor: str
    """The tensor that needs the largest buffers; empty if the files beside the weights do."""
    bytes_to_read: int
    """Tensor data read at least, repeated passes included."""
    most_bytes_to_read: int
    """As many, or more where the values decide how often a tensor is read: for the k-th largest
    magnitude."""
    bytes_to_write: int
    expert_elements: int
    estimated_s: float
    """At `EXPERT_ELEMENTS_PER_S_A_THREAD` and `OPERATIONS_PER_S_A_THREAD`, or at `BYTES_PER_S`,
    whichever is slower."""

    @property
    def projected_mem(self) -> int:
        """Bytes at the peak, beyond the interpreter and its libraries."""
        return self.buffers_mem + self.records_mem


def memory_notes(projection: Projection) -> tuple[str, ...]:
    """Return what a person should know of the memory of a run: what is not as it was allowed."""
    notes = []
    if projection.beside_device:
        notes.append(
            f"{projection.beside_device} is multiplied on the CPU, and so is what is as large: its "
            "matrices take more than half of --gpu-memory."
        )
    if projection.buffers_mem <= projection.allowed_mem:
        return tuple(notes)
    if not projection.largest_tensor:
        notes.append(
            "the JSON files beside the weights need more memory than allowed, which the run will "
            "use: each is read whole. A larger --memory says so beforehand."
        )
    else:
        notes.append(
            f"{projection.largest_tensor} needs more memory than allowed, which the run will use: "
            "it cannot be cut into smaller blocks, what is ranked or factored together must be "
            "read together. Fewer --threads and --workers need less."
        )
    return tuple(notes)


def _no_device(recipe: TensorRecipe, block_elements: int) -> int:
    del recipe, block_elements
    return 0


@dataclass(slots=True)
class _Device:
    """What is used of a device's memory at the peak, as tensors are added."""

    allowed: int
    device_bytes: Callable[[TensorRecipe, int], int]
    chunks: int = 0
    matrices: int = 0
    beside: str = ""

    def add(self, name: str, recipe: TensorRecipe, block_elements: int) -> None:
        """Count a tensor that is merged in blocks of so many elements."""
        self.chunks = max(self.chunks, self.device_bytes(recipe, block_elements))
        if self.chunks + self.matrices > self.allowed:
            needs = -(-(self.chunks + self.matrices) // (1 << 20))
            raise ConfigError(
                f"--gpu-memory is {self.allowed >> 20} MiB, and merging {name} takes {needs} MiB "
                "of the GPU: what is ranked together is not cut. Give more, or --device cpu."
            )

    def add_matrices(self, name: str, source: Balanced, size: BalanceSize) -> None:
        """Count a tensor that is merged as a whole."""
        self.matrices = max(self.matrices, size.device_mem)
        if self.allowed and size.how.device_bytes and not size.device_mem:
            self.beside = self.beside or name
        elements = max(size.block_elements, size.step_rows * size.how.cols)
        self.add(name, of_deltas(source.of.recipe), elements)
        self.add(name, joining(source.of.recipe), elements)


def _refuse_too_large(matrices: Mapping[str, BalanceSize], budget: MemoryBudget) -> None:
    """Refuse a memory that some matrix does not fit, by what the largest takes."""
    name, size = max(matrices.items(), key=lambda one: one[1].projected_mem, default=("", None))
    if size is not None and size.projected_mem > budget.block_mem:
        beside = budget.allowed_mem - budget.block_mem
        needs = -(-(size.projected_mem + beside) // (1 << 20))
        raise ConfigError(
            f"--memory is {budget.allowed_mem >> 20} MiB, and merging {name} takes {needs} MiB: "
            f"{size.how.holds}. Give more."
        )


def task_cost(plan: MergePlan, shard: ShardLayout) -> int:
    """Return the bytes that one task reads and writes (see `Projection.bytes_to_read`).

    Operations on whole matrices count as bytes: `OPERATIONS_A_BYTE`.
    """
    cost = shard.size_bytes
    for tensor in shard.tensors:
        source = plan.source(tensor)
        cost += bytes_to_read(source)[0] + sum(operations_of(source)) // OPERATIONS_A_BYTE
    return cost


def task_bytes_to_read(plan: MergePlan, shard: ShardLayout) -> int:
    """Return the bytes that one task reads, at least."""
    return sum(bytes_to_read(plan.source(tensor))[0] for tensor in shard.tensors)


def operations_of(source: Source) -> tuple[int, int]:
    """Return the operations on whole matrices, and more that one thread does alone."""
    match source:
        case Balanced():
            how = balancing(source)
            return how.operations, how.lone_operations
        case Factor(of) if source.side == "left" and not source.is_sum:
            return factoring(of.recipe, source.rank).operations, 0
        case _:
            return 0, 0


def project(
    plan: MergePlan,
    budget: MemoryBudget,
    scratch_bytes: Callable[[TensorRecipe, int], int],
    companions_mem: int = 0,
    device_bytes: Callable[[TensorRecipe, int], int] = _no_device,
) -> Projection:
    """Return what running `plan` within `budget` will take.

    Parameters
    ----------
    scratch_bytes
        Bytes that a kernel of the backend needs for a block of so many elements.
    companions_mem
        Bytes at the peak of carrying the files beside the weights.
    device_bytes
        Bytes of device memory that the backend takes for blocks of so many elements.

    Raises
    ------
    ConfigError
        If a matrix that is merged as a whole does not fit into the memory, or what cannot be cut
        of a tensor into that of the device.
    """
    peak, largest = 0, ""
    device = _Device(budget.device_mem, device_bytes)
    to_read = most_to_read = operations = lone_operations = 0
    matrices: dict[str, BalanceSize] = {}
    blocks: dict[object, int] = {}  # tensors of one shape and recipe are cut alike
    for shard in plan.shards:
        for tensor in shard.tensors:
            source = plan.source(tensor)
            least, most = bytes_to_read(source)
            to_read += least
            most_to_read += most
            counted = operations_of(source)
            operations, lone_operations = operations + counted[0], lone_operations + counted[1]
            match source:
                case Merged(recipe):
                    dtypes = (recipe.base_dtype, recipe.expert_dtypes, recipe.out_dtype)
                    beside = (gathered(source), piece_bytes(source))
                    kind = (recipe.shape, dtypes, recipe.settings, beside)
                    if kind not in blocks:
                        unit = row_view(recipe).unit
                        size = block_size(recipe, unit, scratch_bytes, budget, *beside)
                        blocks[kind] = size.projected_mem
                        device.add(tensor.name, recipe, size.elements)
                    held = blocks[kind]
                case Balanced():
                    balance = matrices[tensor.name] = balance_size(source, scratch_bytes, budget)
                    held = balance.projected_mem
                    device.add_matrices(tensor.name, source, balance)
                case Factor(of):
                    held = factor_size(source, scratch_bytes, budget).projected_mem
                    device.add(tensor.name, of_deltas(of.recipe), num_elements(of.recipe.shape))
                case Stored() | Same() | Rows():
                    num_sources, pieces = len(columns(source)), piece_bytes(source)
                    held = copy_block(num_sources, tensor.size_bytes, budget, pieces).projected_mem
            if held > peak:
                peak, largest = held, tensor.name
    _refuse_too_large(matrices, budget)
    lone = [one for one in matrices.values() if one.how.leaves_threads]
    shared = max((one.shared_mem for one in lone), default=0)
    own = [one.own_mem for one in lone]  # of those that can be merged at the same time
    at_once = min(budget.workers, len(plan.shards))
    together = shared + sum(sorted(own)[-at_once:])
    peak = max(peak, min(budget.block_mem, together))
    elements = plan.expert_elements
    if companions_mem > peak:
        peak, largest = companions_mem, ""
    in_shards = sorted(len(shard.tensors) for shard in plan.shards)[-budget.workers :]
    compute_s = elements / (EXPERT_ELEMENTS_PER_S_A_THREAD * budget.threads)
    compute_s += operations / (OPERATIONS_PER_S_A_THREAD * budget.threads)
    alone_s = lone_operations / OPERATIONS_PER_S_A_THREAD
    compute_s += alone_s / min(at_once, budget.threads) if together <= budget.block_mem else alone_s
    return Projection(
        # The files beside the weights are read before and after the shards, never meanwhile.
        buffers_mem=peak + budget.allowed_mem - budget.block_mem,
        allowed_mem=budget.allowed_mem,
        records_mem=records_mem(plan.num_tensors, sum(in_shards), len(plan.inputs)),
        device_mem=device.chunks + device.matrices,
        allowed_device_mem=budget.device_mem,
        beside_device=device.beside,
        largest_tensor=largest,
        bytes_to_read=to_read,
        most_bytes_to_read=most_to_read,
        bytes_to_write=plan.output_bytes,
        expert_elements=elements,
        estimated_s=max(compute_s, (to_read + plan.output_bytes) / BYTES_PER_S),
    )
