"""A stack of blocks that can be run in two halves."""

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from hf_forward_inf.utils.models import evaluating


class Blocks:
    """Runs the first half of a model's blocks once, and the second half from there as often as wanted.

    Works on any transformers model with a list of equal blocks, or on one that runs its children one after the other,
    from outside: by hooks, and by blocks that return their input, both for the length of a call. Whether the two
    halves give what the whole model gives is for the caller to check ([`Adapter.with_shared`]).

    Args:
        model (`torch.nn.Module`): The model; without such a list there is no middle.
        first (`str`, *optional*): The child with which the second half begins. All children are blocks then.

    Raises:
        ValueError: If the model has no such child.
    """

    def __init__(self, model: Any, first: str | None = None):
        children = dict(model.named_children())
        if first is not None and first not in children:
            raise ValueError(f"{type(model).__name__} has no child {first!r}; it has {', '.join(children)}.")
        self.model = model
        self.stacks = _stacks(model) if first is None else [list(children.values())]
        self.found = self.stacks[0] if self.stacks else []
        self.middle = len(self.found) // 2 if first is None else list(children).index(first)
        late = {id(p) for block in self.found[self.middle :] for p in block.parameters()} if self.middle else set()
        self.before_middle: Set[str] = self._named(lambda p: id(p) not in late) if self.middle else frozenset()
        """Parameters that the first half may read: all outside the second, until `explore` has seen which."""
        self.explored = not self.middle
        self.returns_tuple = False  # whether blocks return their states in a tuple

    def _named(self, chosen: Callable[[nn.Parameter], bool]) -> Set[str]:
        return {name for name, p in self.model.named_parameters() if chosen(p)}

    @torch.no_grad()
    def explore(self, run: Callable[[], object]) -> None:
        """Run the model, once, to see which stack of blocks it goes through, and which parameters it reads before.

        Of several stacks (a vision tower's, a language model's) the longest that is run counts. Where the run fails,
        nothing is known, and there is no middle.

        Args:
            run (`Callable`): Calls the model, with any input.
        """
        if self.explored:
            return
        self.explored = True
        turns: dict[nn.Module, int] = {}  # at which call each module was called first

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            turns.setdefault(module, len(turns))

        handle = register_module_forward_pre_hook(note)
        try:
            with evaluating(self.model):
                run()
        except Exception:
            turns.clear()
        finally:
            handle.remove()
        ran = [stack for stack in self.stacks if stack[0] in turns and stack[len(stack) // 2] in turns]
        self.found = ran[0] if ran else []
        self.middle = len(self.found) // 2
        if self.middle:
            first_use = _first_uses(self.model, turns)
            self.before_middle = self._named(lambda p: first_use[id(p)] < turns[self.found[self.middle]])
        else:
            self.before_middle = frozenset()

    def run_first_half(self, run: Callable[[], object]) -> Tensor:
        """Run the first half, and return the states that the second half reads.

        Raises:
            RuntimeError: If the model doesn't reach its middle.
        """
        read: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read.append(args[0] if args else kwargs["hidden_states"])
            raise _MiddleReached

        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.returns_tuple = isinstance(output, tuple)

        handles = [
            self.found[self.middle].register_forward_pre_hook(stop, with_kwargs=True),
            self.found[0].register_forward_hook(look),
        ]
        try:
            run()
        except _MiddleReached:
            return read[0]
        finally:
            for handle in handles:
                handle.remove()
        raise RuntimeError(f"{type(self.model).__name__} doesn't run the block in its middle")

    @contextmanager
    def run_second_half(self, states: Tensor | None) -> Iterator[None]:
        """Start runs at the middle block, from these states; without states, at the beginning."""
        if states is None:
            yield
            return

        def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        def pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states,) if self.returns_tuple else hidden_states

        handle = self.found[self.middle].register_forward_pre_hook(replace, with_kwargs=True)
        early = [block.__dict__ for block in self.found[: self.middle]]
        own = [attributes.get("forward") for attributes in early]  # accelerate's hooks put one there
        try:
            for attributes in early:
                attributes["forward"] = pass_on
            yield
        finally:
            handle.remove()
            for attributes, forward in zip(early, own, strict=True):
                del attributes["forward"]
                if forward is not None:
                    attributes["forward"] = forward


class _MiddleReached(Exception):
    pass


def _stacks(model: Any) -> list[list[nn.Module]]:
    """Find the lists of blocks that transformers says must not be split, the longest first."""
    whole = set()
    for module in model.modules():
        whole |= set(getattr(module, "_no_split_modules", None) or ())
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    return sorted((one for one in lists if {type(m).__name__ for m in one} <= whole), key=len, reverse=True)


def _first_uses(model: nn.Module, turns: dict[nn.Module, int]) -> dict[int, int]:
    """Return the first turn at which each parameter, by its id, may be read.

    A parameter is read by its module, or, where that is never called (a `ParameterDict`), by the one around it.
    """
    found: dict[int, int] = {}

    def visit(module: nn.Module, around: int) -> None:
        turn = turns.get(module, around)
        for p in module.parameters(recurse=False):
            found[id(p)] = min(turn, found.get(id(p), turn))
        for child in module.children():
            visit(child, turn)

    visit(model, 0)
    return found
