"""Whether a weight was read by anything but its layer, seen in the graph that a backward pass differentiates.

An error that passes an operation on the weight outside of its layer passes W itself, and no rule. A penalty on the
weight sends no error, so that a gradient alone is no evidence. Evidence is an operation that joins the weight with
activity, or the weight as the input of another converted layer; for an embedding or a position, a matrix product.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_PRODUCTS = ("Addmm", "Mm", "Bmm", "Baddbmm", "Addbmm", "Linear", "Convolution", "Mv", "Addmv", "Embedding")
_PRODUCTS += ("Trilinear", "MkldnnRnn", "CudnnRnn", "ScaledDotProduct")  # names begin so
_PASSES = ("LocalBackward", "ExactBackward")  # of a converted layer
_SUMS = ("Add", "Sub", "Rsub", "Cat", "Stack")  # no product, unless a sum repeats a matrix for each sample: distances
_ADDEND = {"Addmm": 0, "Baddbmm": 0, "Addbmm": 0, "Addmv": 0, "Convolution": 2, "Linear": 2}  # nor with this input
_last: tuple[int, dict[int, str]] = (-1, {})  # the backward pass last looked at: its number, and what was found


def roots() -> list[Any]:
    """What the backward passes under way differentiate: the nodes of their outputs.

    PyTorch names these nodes nowhere but in its own call, which waits in this thread or, on a GPU, in another one.
    """
    call, found = torch.autograd.graph._engine_run_backward.__code__, []
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code is call:
                found += [getattr(out, "node", None) or out.grad_fn for out in frame.f_locals["t_outputs"]]
            frame = frame.f_back
    return [node for node in found if node is not None]


def with_constant(node: Any) -> bool:
    """Whether a node is a product with a constant, such as the data, or picks rows of a table."""
    lone = node.name().startswith("Embedding") or any(child is None for child, _ in node.next_functions)
    return lone and node.name().startswith(_PRODUCTS)


class Graph:
    """The graph of the backward passes under way.

    Attributes:
        parents: node -> (node that uses its result, at which of its inputs).
        leaves: the nodes of leaf tensors.
        products: products with a constant, which is data or part of a penalty.
        sure: nodes whose result depends on data, not on parameters alone; ``active``: the same, with products as data.
    """

    def __init__(self) -> None:
        self.parents: dict[Any, list[tuple[Any, int]]] = {}
        self.leaves, self.products, todo = [], [], roots()
        seen, sources = set(todo), []
        while todo:
            node = todo.pop()
            below = node.next_functions
            if hasattr(node, "variable"):
                self.leaves.append(node)
                if not isinstance(node.variable, nn.Parameter):
                    sources.append(node)
            elif node.name().startswith((*_PASSES, "TapBackward", "CompiledFunction")):
                sources.append(node)
            # penalties have constant vectors (power iteration), of at most one axis above 1
            elif with_constant(node) and sum(n > 1 for n in node._input_metadata[0].shape) > 1:
                self.products.append(node)
            for slot, (child, _) in enumerate(below):
                if child is not None:
                    self.parents.setdefault(child, []).append((node, slot))
                    if child not in seen:
                        seen.add(child)
                        todo.append(child)
        self.sure, self.active = self.above(sources), self.above([*sources, *self.products])

    def above(self, nodes: list[Any]) -> set[Any]:
        """These nodes, and all whose result depends on theirs."""
        found, todo = set(nodes), list(nodes)
        while todo:
            new = {node for node, _ in self.parents.get(todo.pop(), ())} - found
            found |= new
            todo += new
        return found

    def evidence(self, leaf: Any, module: nn.Module) -> str:
        """How something other than its layer read a parameter of a converted layer's weight, or any activity is
        multiplied by a matrix of another module; "" if not. ``leaf`` is the parameter's node."""
        fb = getattr(module, "feedback", None)
        # a layer under dfa is a stock layer whose input is cut, and so is a constant
        direct = hasattr(fb, "tape") and fb.traced

        def joins(child: Any) -> bool:  # W A W of constants and this weight alone is a penalty
            if child in self.sure or child not in self.active or direct:
                return child in self.active
            mine = self.above([leaf])
            return child in self.above([node for node in self.products if node not in mine])

        todo, seen = [leaf], {leaf}
        while todo:
            child = todo.pop()
            for node, slot in self.parents.get(child, ()):
                name = node.name()
                if name.startswith((*_PASSES, "TapBackward")):
                    if slot == 0 and fb:
                        return "another module reads it directly"
                    continue  # a layer's own pass has the weight at slot 1
                if name.startswith("CompiledFunction"):
                    if fb and not fb.traced:
                        return "compiled"
                    continue
                kind = name.partition("Backward")[0]
                beside = [n for i, (n, _) in enumerate(node.next_functions) if i not in (slot, _ADDEND.get(kind))]
                inner, outer = child._input_metadata[0].shape, node._input_metadata[0].shape
                repeats = kind in _SUMS[:3] and sum(n > 1 for n in inner) > 1 and math.prod(outer) > math.prod(inner)
                joining = repeats or kind not in _SUMS if fb else name.startswith(_PRODUCTS)
                if joining and any(map(joins, beside)):
                    return "another module reads it directly"
                if with_constant(node) and name[:9] != "Embedding" if direct else not fb and node in self.active:
                    continue
                small = math.prod(outer) == 1 and leaf.variable.numel() > 1
                if node not in seen and not small:  # a single number made of the weight is a penalty
                    seen.add(node)
                    todo.append(node)
        return ""


def evidence(key: int, module_of: Callable[[Tensor], nn.Module | None]) -> str:
    """:meth:`Graph.evidence` in the backward pass under way for the parameter of id ``key``; ``module_of``: its module.

    The graph is walked once for all parameters, and no part of it is kept.
    """
    global _last
    task = torch._C._current_graph_task_id()
    if _last[0] != task or key not in _last[1]:
        graph = Graph()
        pairs = [(leaf, module_of(leaf.variable)) for leaf in graph.leaves]
        _last = task, {id(leaf.variable): graph.evidence(leaf, m) for leaf, m in pairs if m is not None}
    return _last[1].get(key, "")
