"""Ranks agree on a weight update before any of them writes.

One request may update two models, a draft and its target, one after the other: their
ranks agree before each, and once more on the end.
"""

import logging
from contextvars import ContextVar
from typing import Any, Callable, Iterable, List, Optional, Set, Tuple

import torch

logger = logging.getLogger(__name__)


class HalfMoved(RuntimeError):
    """A layer was left half rearranged. Nothing mends it: its bytes are in neither form,
    and CUDA graphs read them past every Python object that could refuse."""


class UpdateRefused(ValueError):
    """An update that the model would not take; nothing of it was written."""


class CannotCheck(UpdateRefused, RuntimeError):
    """The model's code does not run on the meta device."""


class _RankUpdate:
    """This rank's part in an update that every rank of `group` makes, or none.

    Attributes:
        may_write: the ranks agreed, so weights may have changed since.
        taken, untaken: names of tensors that some model takes, and that none does.
    """

    def __init__(self, group) -> None:
        self.group = group
        self.may_write = False
        self.taken: Set[str] = set()
        self.untaken: Set[str] = set()

    def agree(self, refusal: Optional[str]) -> Optional[str]:
        """The first refusal of any rank, or the failure that ended it. Collective."""
        refusal = next((r for _, r in self._gather(False, refusal) if r), None)
        self.may_write |= refusal is None
        return refusal

    def finish(self, failure: Optional[str]) -> Optional[str]:
        """The first failure of any rank. Collective, with those that still agree."""
        first = None
        while True:
            said = self._gather(True, failure)
            first = first or next((f for ended, f in said if ended and f), None)
            if all(ended for ended, _ in said):
                return first

    def _gather(self, ended: bool, failure: Optional[str]) -> List[Tuple[bool, Any]]:
        said = [None] * torch.distributed.get_world_size(self.group)
        torch.distributed.all_gather_object(said, (ended, failure), group=self.group)
        return said


_rank_update: ContextVar[Optional[_RankUpdate]] = ContextVar(
    "_rank_update", default=None
)


def run_weight_update(group, update: Callable, *args) -> Tuple[bool, str]:
    """(success, message) of `update(*args)` on every rank of `group`.

    A failure on one rank, also an exception, is the result of all. Where `update` calls
    `agree_to_write`, none writes unless all may. The message of a success names the
    tensors that no model took.
    """
    rank_update = _RankUpdate(group)
    token = _rank_update.set(rank_update)
    try:
        success, message = update(*args)
    except Exception as error:
        logger.exception("A weight update failed")
        success = False
        message = f"Failed to update weights: {error}. {what_was_written(error)}"
    finally:
        _rank_update.reset(token)
    failure = rank_update.finish(None if success else message)
    if failure is not None:
        return False, failure
    if rank_update.untaken:
        message = f"{message} Not taken: {shorten(sorted(rank_update.untaken))}."
    return True, message


def agree_to_write(check: Optional[Callable], *args) -> None:
    """Before a model's first write in an update: raise UpdateRefused if `check(*args)`
    raises on any rank. None is for a check that is given up.

    Outside `run_weight_update` it stands for this rank alone.
    """
    rank_update, refusal, reason = _rank_update.get(), None, None
    try:
        if check is not None:
            check(*args)
    except Exception as error:
        refusal, reason = error, str(error) or repr(error)
    if rank_update is not None:
        reason = rank_update.agree(reason)
    if reason is not None:
        raise UpdateRefused(reason) from refusal


def note_taken(taken: Iterable[str], untaken: Iterable[str]) -> bool:
    """Note what a model takes of an update. Whether any model took any of it so far."""
    update = _rank_update.get() or _RankUpdate(None)
    update.taken.update(taken)
    update.untaken = (update.untaken | set(untaken)) - update.taken
    return bool(update.taken)


def what_was_written(error: Exception) -> str:
    """What a failed update left behind, for its message; "" where nobody can tell."""
    if isinstance(error, HalfMoved):
        return "Nothing mends that."
    rank_update = _rank_update.get()
    if rank_update is not None and rank_update.may_write:
        return "The weights may be partially updated: update all of them again."
    return "Nothing was written." if isinstance(error, UpdateRefused) else ""


def shorten(names: List[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
