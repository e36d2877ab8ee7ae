"""Maps that a pass makes in the memory of maps that it is the last to read: a state-space block needs one, not two.

Row r of the new map may be written as soon as no later step reads row r of the old one. The order of the steps is
known, so this is looked up, not assumed.
"""

from xrk.errors import MemoryBudgetError
from xrk.runtime.graph import Plain, Value
from xrk.runtime.schedule import Pass

__all__ = ["overlay", "overlay_rest"]


def overlay(p: Pass) -> None:
    """Sets `Store.over` wherever a pass allows it. The network's outputs have memory of their own."""
    segment = p.segment
    out_of_order = {n.inputs[i] for n in segment.nodes for i in n.whole_inputs}
    ending = set(segment.sources) & set(segment.last_use) - out_of_order
    free = [s for s in p.stores if s.value in ending and _by_rows(s.value)]
    for store in p.stores:
        if store.value not in segment.whole or store.value in segment.outputs:
            continue
        for old in free:
            if _alike(old.value, store.value) and _read_in_time(p, old.index, store.index):
                store.over = old.value
                free.remove(old)
                break
    p.measure()


def overlay_rest(rest: Pass, p: Pass) -> None:
    """The same for the rest of a pass that goes on in other bands, where some rows are overwritten already.

    Raises:
        MemoryBudgetError: the other order would read rows that are gone.
    """
    of = {store.value: store for store in rest.stores}
    for store in p.stores:
        if store.over is None:
            continue
        of[store.value].over = store.over
        if not _read_in_time(rest, of[store.over].index, of[store.value].index):
            raise MemoryBudgetError("Memory ran out where lower bands cannot go on; plan with a smaller memory=.")


def _by_rows(value: Value) -> bool:
    return not isinstance(value.producer, Plain) or value.producer.by_rows


def _alike(a: Value, b: Value) -> bool:
    """Whether the rows of both lie at the same places: a map may be (1, H, W, C) here and (1, C, H, W) there."""
    return (a.rows, a.bytes, a.dtype) == (b.rows, b.bytes, b.dtype)


def _read_in_time(p: Pass, old: int, new: int) -> bool:
    """Whether no step reads a row of one store after an earlier step has written that row of the other."""
    lowest = p.stores[old].value.rows
    for step in reversed(p.steps):
        if step.store == new and step.r1 > lowest:
            return False
        lowest = min([lowest, *(a for _, k, a, _ in step.reads if k == old)])
    return True
