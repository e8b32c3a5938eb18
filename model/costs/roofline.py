"""Record the kernels of a training step as the compiler plans them, and time each by a card's two peaks.

The step runs on fake tensors, which have shapes but no numbers, and so without a GPU. `StepTrace` records every
operation that runs uncompiled. For a compiled function it records the kernels that Inductor has fused, after its own
decompositions, partitioning into forward and backward pass (with what is recomputed) and fusion. No code is generated.

- FLOPs are those of matrix products and attention, by torch.utils.flop_counter's formulas. Attention counts in full;
  its time is that of half the work, since a fused kernel skips what the causal mask hides.
- Products, attention and uncompiled operations read their operands and write their results once.
- A fused kernel reads each buffer from outside once and writes each buffer that others read once, however many passes
  it takes. A gather or scatter touches as many elements as it has indices.

Limits: Inductor plans for a CPU here, since its plan for a GPU needs one. Triton may fuse a little more (a LayerNorm's
two weight gradients with its input's) or less. Launches, caches, communication and the host are free. The functions of
Inductor that are used here are not public; the code is written for torch 2.13.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.compile_fx import compile_fx, fx_codegen_and_compile
from torch._inductor.debug import DebugContext
from torch._inductor.dependencies import MemoryDep, StarDep
from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._ops import OpOverload
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from model.linear import LIBRARY, product

aten: Any = torch.ops.aten
ROWS = ("blocks' products", "head", "attention", "elementwise", "loss", "rest", "optimizer")
FORMULAS = {  # for what torch's registry of FLOPs lacks; on a CPU fused attention is an operation of its own
    aten.addmm_: aten.addmm,
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}
PRODUCTS = {
    aten.mm,
    aten.addmm,
    aten.addmm_,
    product.overloadpacket,
}  # everything else with FLOPs is attention, fused or written out
UNREAD = {aten.copy_, aten.fill_, aten.zero_}  # they overwrite their first operand
FREE = {aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


@dataclass(frozen=True)
class Kernel:
    """One kernel of a step. `flops` is counted in full, `work` is the part that a fused kernel computes."""

    kind: Literal["product", "attention", "other"]
    flops: int
    work: int
    num_bytes: int
    row: str = ""


@dataclass(frozen=True)
class Rates:
    """Hold what a card does in a second: FLOPs of products and of attention, and bytes of memory read or written."""

    products: float
    attention: float
    bandwidth: float

    def seconds(self, kernel: Kernel) -> tuple[float, float]:
        """Return the kernel's time by FLOP/s and by bandwidth. The larger one binds."""
        rate = self.attention if kernel.kind == "attention" else self.products
        return kernel.work / rate, kernel.num_bytes / self.bandwidth


@dataclass(frozen=True)
class Row:
    """The sums of one row's kernels, and what binds them for most of their time."""

    flops: int
    num_bytes: int
    seconds: float
    bound: str


def rows_of(kernels: Iterable[Kernel], rates: Rates) -> dict[str, Row]:
    """Return the rows that have kernels, in the order of ROWS."""
    kernels = list(kernels)
    rows = {}
    for name in ROWS:
        if not (own := [kernel for kernel in kernels if kernel.row == name]):
            continue
        times = [rates.seconds(kernel) for kernel in own]
        by_flops = sum(by_flops for by_flops, by_bytes in times if by_flops > by_bytes)
        by_bytes = sum(by_bytes for by_flops, by_bytes in times if by_flops <= by_bytes)
        rows[name] = Row(
            flops=sum(kernel.flops for kernel in own),
            num_bytes=sum(kernel.num_bytes for kernel in own),
            seconds=by_flops + by_bytes,
            bound="FLOP/s" if by_flops > by_bytes else "bandwidth",
        )
    return rows


# --- Counting ---------------------------------------------------------------------------------------------------------


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's distinct elements: an expanded dimension is stored once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


def operation_bytes(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    """Return the bytes that one operation reads and writes; 0 for a view."""
    if op.namespace not in ("aten", LIBRARY.ns) or op.is_view or op.overloadpacket in FREE:
        return 0
    operands = [*zip(op._schema.arguments, args, strict=False)]
    operands += [(argument, kwargs[argument.name]) for argument in op._schema.arguments if argument.name in kwargs]
    reads, writes = dict[int, int](), dict[int, int]()
    for index, (argument, value) in enumerate(operands):
        tensors = {id(leaf): tensor_bytes(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}
        if argument.alias_info is not None and argument.alias_info.is_write:
            writes |= tensors
        if not argument.is_out and not (index == 0 and op.overloadpacket in UNREAD):
            reads |= tensors
    writes |= {id(leaf): tensor_bytes(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
    if op.overloadpacket == aten.embedding:  # reads rows, not the table
        reads[id(args[0])] = min(tensor_bytes(args[0]), tensor_bytes(result))
    return sum(reads.values()) + sum(writes.values())


def operation_flops(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> tuple[int, int]:
    """Return an operation's FLOPs, and those left of them where a causal mask hides half of the scores."""
    packet = FORMULAS.get(op.overloadpacket, op.overloadpacket)
    if packet not in flop_registry:
        return 0, 0
    operands = [value for value in args if isinstance(value, Tensor)]
    flops: int = flop_registry[packet](*operands, out_val=result)
    named = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=False)} | kwargs
    return flops, flops // 2 if named.get("is_causal") else flops


def called(kernel: ir.ExternKernel) -> Kernel:
    """Return a kernel that Inductor calls and does not write: the operation of the graph that it stands for."""
    packet = getattr(kernel.op_overload, "overloadpacket", None)
    node = next(node for node in kernel.get_origins() if getattr(node.target, "overloadpacket", None) == packet)
    args: Any = map_arg(node.args, lambda argument: argument.meta["val"])
    kwargs: Any = map_arg(node.kwargs, lambda argument: argument.meta["val"])
    assert isinstance(node.target, OpOverload)
    return measured(node.target, args, kwargs, node.meta["val"])


def fused_bytes(node: BaseSchedulerNode) -> int:
    """Return the bytes that a kernel of Inductor reads and writes (Inductor's own count stops at 10^9 elements)."""
    inside, elements = set(node.get_nodes()), dict[str, int]()
    for dependency in (*node.read_writes.reads, *node.read_writes.writes):
        if isinstance(dependency, MemoryDep) and dependency.is_indirect():
            touched = 1
            for size in dependency.size:
                touched *= int(size)
        elif isinstance(dependency, MemoryDep) or (isinstance(dependency, StarDep) and dependency.mode is None):
            touched = int(dependency.get_numel())
        else:
            continue  # it only orders kernels, as the whole buffer of a scatter does
        elements[dependency.name] = elements.get(dependency.name, 0) + touched
    written = {name for part in inside for name in part.get_buffer_names()}
    return sum(
        min(touched, int(V.graph.get_numel(name))) * V.graph.get_dtype(name).itemsize
        for name, touched in elements.items()
        if name not in written or any(user.node not in inside for user in node.scheduler.name_to_buf[name].users)
    )


def measured(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Kernel:
    """Return one operation as a kernel that has no row yet."""
    flops, work = operation_flops(op, args, kwargs, result)
    kind: Literal["product", "attention", "other"] = "other"
    if flops:
        kind = "product" if op.overloadpacket in PRODUCTS else "attention"
    return Kernel(kind, flops, work, operation_bytes(op, args, kwargs, result))


# --- Recording --------------------------------------------------------------------------------------------------------


class PlanIsKnown(Exception):  # noqa: N818  # no error: it ends a compilation whose result is not needed
    """Leave Inductor after it has fused and before it generates code."""


class StepTrace(TorchDispatchMode):
    """Record the kernels of all that runs inside, on fake CPU tensors.

    `phase` says what runs: the model's "hidden states", their "loss" with the head, or the "update". The caller sets
    it, and the backward pass belongs to the same phases.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "hidden states"
        self.kernels: list[Kernel] = []
        self._planned: list[Kernel] = []

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Let Dynamo compile although this mode is on; it skips every function under an ordinary mode."""
        return True

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record everything inside. Whatever backend torch.compile was given, functions are planned by Inductor."""
        patches = {"_post_fusion_custom_pass": self._record_plan, "cpp.fallback_scatter_reduce_sum": False}
        stance = torch.compiler.set_stance("default", force_backend=self._compile)
        torch.compiler.reset()  # else functions that are compiled already run as they are
        with inductor_config.patch(patches), stance, self:
            yield
        torch.compiler.reset()  # what was compiled here computes nothing

    def __torch_dispatch__(
        self, op: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = op(*args, **(kwargs or {}))
        self._add(measured(op, args, kwargs or {}, result), is_compiled=False)
        return result

    def _add(self, kernel: Kernel, *, is_compiled: bool) -> None:
        """Record a kernel in the row of its phase and kind."""
        if self.phase == "update":
            row = "optimizer"
        elif self.phase == "loss":
            row = "loss" if kernel.kind == "other" else "head"
        elif kernel.kind == "other":
            row = "elementwise" if is_compiled else "rest"
        else:
            row = "blocks' products" if kernel.kind == "product" else "attention"
        if kernel.flops or kernel.num_bytes:
            self.kernels.append(replace(kernel, row=row))

    def _compile(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        """Compile a function that Dynamo has traced, as torch.compile's usual backend does."""
        inner_compile: Any = self._plan
        compiled: Any = compile_fx(graph, inputs, inner_compile=inner_compile)
        return compiled

    def _plan(self, graph: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Callable[[list[Any]], list[Any]]:
        """Return a function that records the kernels of a graph and gives empty results, as Inductor's inner compile.

        The graph is a forward or a backward pass.
        """
        outputs: Any = graph.graph.output_node().args[0]
        results = [None if node is None else node.meta["val"] for node in outputs]
        shapes = [None if x is None else (x.size(), x.stride(), x.dtype) for x in results]
        with suppress(PlanIsKnown), _disable_current_modes(), DebugContext():
            fx_codegen_and_compile(graph, inputs, inputs_to_check=(), **settings)
        kernels, self._planned = self._planned, []

        def run(arguments: list[Any]) -> list[Any]:
            arguments.clear()
            for kernel in kernels:
                self._add(kernel, is_compiled=True)
            return [None if shape is None else torch.empty_strided(*shape[:2], dtype=shape[2]) for shape in shapes]

        run._boxed_call = True  # type: ignore[attr-defined]  # AOTAutograd then passes one list
        return run

    def _record_plan(self, nodes: Iterable[BaseSchedulerNode]) -> Iterable[BaseSchedulerNode]:
        """Note the kernels of one graph. Inductor calls this after fusion."""
        for node in nodes:
            if isinstance(node.node, ir.MultiOutput) or isinstance(node, NopKernelSchedulerNode):
                continue  # it only names what another kernel made
            if isinstance(node.node, ir.ExternKernel):
                self._planned.append(called(node.node))
            else:
                self._planned.append(Kernel("other", 0, 0, fused_bytes(node)))
        raise PlanIsKnown
