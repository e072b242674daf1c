"""A stack of blocks that can be run in two halves."""

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Blocks:
    """Runs the first half of a model's blocks once, and the second half from there as often as wanted.

    Works on any transformers model with a list of equal blocks, or on one that runs its children one after the other,
    from outside: by hooks, and by blocks that let their input pass, both for the length of a call.

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
        self.found = _blocks(model) if first is None else list(children.values())
        self.middle = len(self.found) // 2 if first is None else list(children).index(first)
        late = {id(p) for block in self.found[self.middle :] for p in block.parameters()} if self.middle else set()
        self.model = model
        self.before_middle: Set[str] = self._named(lambda p: id(p) not in late) if self.middle else frozenset()
        """Parameters that the first half may read: all outside the second, until `look_before_middle` has looked."""
        self.looked = not self.middle  # whether that is known for sure
        self.wrapped = False  # whether blocks give their states in a tuple

    def _named(self, chosen: Callable[[nn.Parameter], bool]) -> Set[str]:
        return {name for name, p in self.model.named_parameters() if chosen(p)}

    @torch.no_grad()
    def look_before_middle(self, run: Callable[[], object]) -> None:
        """Run the first half, once, to see which parameters it reads; a final norm and an output layer come after it.

        Args:
            run (`Callable`): Calls the model, with any input.
        """
        if self.looked:
            return
        read: set[int] = set()

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            read.update(id(p) for p in module.parameters(recurse=False))

        late = {id(module) for block in self.found[self.middle :] for module in block.modules()}
        early = [module for module in self.model.modules() if id(module) not in late]
        handles = [module.register_forward_pre_hook(look) for module in early]
        try:
            self.run_first_half(run)
        finally:
            for handle in handles:
                handle.remove()
        self.before_middle, self.looked = self._named(lambda p: id(p) in read), True

    def run_first_half(self, run: Callable[[], object]) -> Tensor:
        """Run the first half: the states that the second half reads."""
        read: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read.append(args[0] if args else kwargs["hidden_states"])
            raise _MiddleReached

        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.wrapped = isinstance(output, tuple)

        handles = [
            self.found[self.middle].register_forward_pre_hook(stop, with_kwargs=True),
            self.found[0].register_forward_hook(look),
        ]
        try:
            run()
        except _MiddleReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return read[0]

    @contextmanager
    def run_second_half(self, states: Tensor | None) -> Iterator[None]:
        """Let a run begin at the middle, with these states; with none, at the beginning."""
        if states is None:
            yield
            return

        def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        def let_pass(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states,) if self.wrapped else hidden_states

        handle = self.found[self.middle].register_forward_pre_hook(replace, with_kwargs=True)
        early = [block.__dict__ for block in self.found[: self.middle]]
        own = [attributes.get("forward") for attributes in early]  # accelerate's hooks put one there
        try:
            for attributes in early:
                attributes["forward"] = let_pass
            yield
        finally:
            handle.remove()
            for attributes, forward in zip(early, own, strict=True):
                del attributes["forward"]
                if forward is not None:
                    attributes["forward"] = forward


class _MiddleReached(Exception):
    pass


def _blocks(model: Any) -> list[nn.Module]:
    """Find the longest list of blocks of one kind that transformers says must not be split."""
    whole = set()
    for module in model.modules():
        whole |= set(getattr(module, "_no_split_modules", None) or ())
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    return max((one for one in lists if {type(m).__name__ for m in one} <= whole), key=len, default=[])
