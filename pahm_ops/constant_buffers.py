"""Buffers that depend only on how a module was built, and keep their values whatever is applied to it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class ConstantBuffers(nn.Module):
    """A module with buffers outside the state_dict that no checkpoint could restore.

    `to_empty` gives uninitialised memory to every buffer and expects a checkpoint to fill it. No checkpoint
    has these buffers, so this class restores them: from the module itself or, if it was on the meta device,
    from the values it held before. A constant that has never had values stays on the meta device.
    """

    _constants: dict[str, bool]
    """For each constant, by name: whether it is cast with the module."""
    _values_before_meta: dict[str, Tensor]

    def register_constant(self, name: str, value: Tensor, *, cast: bool = False) -> None:
        """Register `value` as a buffer. It keeps its dtype when the module is cast, unless `cast` is true."""
        self.register_buffer(name, value, persistent=False)
        self.__dict__.setdefault("_constants", {})[name] = cast
        self.__dict__.setdefault("_values_before_meta", {})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConstantBuffers:
        before: dict[str, Tensor] = {}
        for name in self._constants:
            value = self._buffers[name]
            assert value is not None
            before[name] = self._values_before_meta.get(name, value) if value.is_meta else value
        super()._apply(fn, recurse)
        self._values_before_meta = {}
        for name, cast in self._constants.items():
            source, after = before[name], self._buffers[name]
            assert after is not None
            if source.is_meta:
                self._buffers[name] = source
                continue
            self._buffers[name] = source.to(after.device, after.dtype if cast else source.dtype)
            if after.is_meta:
                self._values_before_meta[name] = source
        return self
