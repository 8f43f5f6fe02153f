"""A walk over autograd's graph, from the outputs of a trial to the tensors that it ends in."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def nodes_of(values: Any) -> frozenset[Any]:
    """The nodes of autograd's graph that some tensors come from."""
    return frozenset(x.grad_fn for x in tree_leaves(values) if isinstance(x, Tensor))


def edges(outputs: Any, ends: Set[Any] = frozenset()) -> Iterator[tuple[Any, Any]]:
    """(node, the node of its input) of every edge in autograd's graph of some tensors, back to the nodes `ends`."""
    waiting = list(nodes_of(outputs))
    seen = {None, *ends}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is not None:
                yield node, following
                waiting.append(following)


def edges_to_leaves(outputs: Any, ends: Set[Any] = frozenset()) -> Iterator[tuple[Any, Tensor]]:
    """(node, leaf) of every edge to a leaf in autograd's graph of some tensors, back to the nodes `ends`."""
    for node, following in edges(outputs, ends):
        if hasattr(following, "variable"):
            yield node, following.variable
