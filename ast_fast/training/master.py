"""Narrow weights that compute, wide weights that learn.

Training in bfloat16 alone loses every update smaller than 1/256 of a weight. Here the model's parameters,
activations and gradients are bfloat16, without a cast inside the network, while an optimiser of the
caller's updates float32 masters. A step reads the gradients once, updates the masters, and copies them
back in one fused pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

OptimizerFactory = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]


class MasterWeights:
    """Float32 masters of a model's parameters, and the optimiser that updates them.

    From here on the model's parameters have the narrow dtype; buffers keep theirs. Move the model to
    its device before. Wrappers such as DistributedDataParallel come after: they then see, and reduce,
    narrow gradients.

    Args:
        model: its floating-point parameters become narrow, in place.
        optimizer_factory: makes the optimiser from masters by name, those of trainable parameters only.
        dtype: what the model computes in.

    Attributes:
        optimizer: the caller's, over the masters.
        trainable: masters that the optimiser updates, by the model's names.

    Raises:
        ValueError: a parameter holds a gradient already.

    >>> model = nn.Linear(4, 2)
    >>> make = lambda masters: torch.optim.AdamW(masters.values(), lr=1e-3, fused=True)
    >>> masters = MasterWeights(model, make)
    >>> model(torch.randn(3, 4, dtype=torch.bfloat16)).float().square().mean().backward()
    >>> norm = masters.clip_grad_norm_(1.0)
    >>> masters.step()
    >>> masters.zero_grad()
    >>> model.weight.dtype, masters.model_state_dict()["weight"].dtype
    (torch.bfloat16, torch.float32)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_factory: OptimizerFactory,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._model = model
        self._narrow: dict[str, nn.Parameter] = {}
        self._masters: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                raise ValueError(
                    f"{name} holds a gradient in {parameter.dtype}: expected none; call "
                    "model.zero_grad(set_to_none=True) before"
                )
            if not parameter.is_floating_point():
                continue
            wide = parameter.detach().to(torch.float32, copy=True)
            self._narrow[name] = parameter
            self._masters[name] = nn.Parameter(wide, requires_grad=parameter.requires_grad)
            parameter.data = parameter.data.to(dtype)
        self.trainable = {n: m for n, m in self._masters.items() if m.requires_grad}
        # made here once, so that a step allocates nothing between its gradients and its update
        self._grads = {name: torch.zeros_like(m.data) for name, m in self.trainable.items()}
        self._gathered = False
        self.optimizer = optimizer_factory(self.trainable)

    @torch.no_grad()
    def gather(self) -> list[Tensor]:
        """Widen the model's gradients into the masters'; returns those, for norms and clipping.

        A parameter without a gradient gives its master none.
        """
        wide, narrow = [], []
        for name, master in self.trainable.items():
            grad = self._narrow[name].grad
            master.grad = None if grad is None else self._grads[name]
            if grad is not None:
                wide.append(self._grads[name])
                narrow.append(grad)
        if wide:
            torch._foreach_copy_(wide, narrow)
        self._gathered = True
        return wide

    @torch.no_grad()
    def scatter(self) -> None:
        """Round the masters into the model's parameters: one fused pass, the same again if repeated."""
        names = self.trainable
        if names:
            torch._foreach_copy_([self._narrow[n] for n in names], list(names.values()))

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradients before `step`; returns their norm before clipping, float32."""
        self.gather()
        return nn.utils.clip_grad_norm_(self.trainable.values(), max_norm)

    def step(self) -> None:
        """Update the masters with the model's gradients and round them into the model."""
        if not self._gathered:
            self.gather()
        self.optimizer.step()
        self.scatter()
        self._gathered = False

    def zero_grad(self) -> None:
        """Drop the gradients of model and masters."""
        self._gathered = False
        for parameter in self._narrow.values():
            parameter.grad = None
        for master in self._masters.values():
            master.grad = None

    def model_state_dict(self) -> dict[str, Tensor]:
        """The model's state under its usual names, with the float32 masters for its weights."""
        masters = {id(p): self._masters[name] for name, p in self._narrow.items()}
        state = self._model.state_dict(keep_vars=True)
        return {name: masters.get(id(value), value).detach() for name, value in state.items()}

    @torch.no_grad()
    def load_model_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take weights of any width for masters and model; names and shapes must be the model's.

        Raises:
            RuntimeError: names or shapes differ.
        """
        self._model.load_state_dict(state, strict=True)
        own = self._model.state_dict(keep_vars=True)
        name_of = {id(p): name for name, p in self._narrow.items()}
        for key, value in own.items():
            if id(value) in name_of:
                self._masters[name_of[id(value)]].copy_(state[key])

    def state_dict(self) -> dict[str, Any]:
        """Everything a run goes on from: `model` in float32 and `optimizer`."""
        return {"model": self.model_state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, to the bit."""
        self.load_model_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def broadcast(self, source: int = 0) -> None:
        """Give every process the masters of one, as data parallelism does with the model's weights."""
        for master in self._masters.values():
            torch.distributed.broadcast(master.data, source)
        self.scatter_all()

    @torch.no_grad()
    def scatter_all(self) -> None:
        """`scatter`, and the parameters that are not trained as well."""
        for name, master in self._masters.items():
            self._narrow[name].copy_(master)

    @torch.no_grad()
    def widen(self) -> None:
        """End the arrangement: the model's parameters become float32 again, with the masters' values."""
        self.zero_grad()
        for name, master in self._masters.items():
            self._narrow[name].data = master.detach().clone()
