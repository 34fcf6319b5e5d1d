"""ONNX graphs node by node: every name is made from the order of the calls, so the same network gives the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

#: versions of the operators and of the file that runtimes of 2022 and later read
OPSET, IR_VERSION = 17, 8
#: a tensor by its name, or what a constant is made of: whole numbers are int64, others float32
Value = str | int | float | np.ndarray | np.float64
FLOAT, INT32, INT64, HALF, DOUBLE = (
    TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.FLOAT16, TensorProto.DOUBLE,
)  # fmt: skip


class Graph:
    """A graph under way. Calling it adds a node and gives the name of what comes out."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._inputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """An input of the graph; an axis with a name may have any length."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def constant(self, value: int | float | np.ndarray | np.float64) -> str:
        """A constant tensor; equal ones are stored once."""
        array = np.array(value, {int: np.int64, float: np.float32}.get(type(value)), order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            name = self._known[key] = f"constant.{len(self._known)}"
            self._constants[name] = numpy_helper.from_array(array, name)
        return self._known[key]

    def __call__(self, operator: str, *inputs: Value, name: str = "", **attributes: Any) -> str:
        """Add a node with one output; empty inputs are left out."""
        return self.several(operator, 1, *inputs, name=name, **attributes)[0]

    def several(self, operator: str, outputs: int, *inputs: Value, name: str = "", **attributes: Any) -> list[str]:
        """Add a node with several outputs."""
        name = name or f"{operator}.{len(self._nodes)}"
        made = [f"{name}.{number}" if outputs > 1 else name for number in range(outputs)]
        given = [one if isinstance(one, str) else self.constant(one) for one in inputs]
        self._nodes.append(helper.make_node(operator, given, made, name=name, **attributes))
        return made

    # what is written often

    def size(self, tensor: Value, axis: int) -> str:
        """Length of an axis: int64, no axes."""
        return self("Squeeze", self("Shape", tensor, start=axis, end=axis + 1), axes(0))

    def cast(self, tensor: Value, kind: int) -> str:
        """A tensor in another type."""
        return self("Cast", tensor, to=kind)

    def counted(self, count: Value) -> str:
        """0, 1, … below `count`: int64 [count]."""
        return self("Range", 0, count, 1)

    def added_axis(self, tensor: Value, axis: int) -> str:
        """A tensor with one more axis, of length 1."""
        return self("Unsqueeze", tensor, axes(axis))

    def parts(self, tensor: Value, widths: Sequence[int]) -> list[str]:
        """A tensor [batch, sum of widths] in parts of these widths."""
        return self.several("Split", len(widths), tensor, np.array(widths, np.int64), axis=1)

    def output(self, name: str, tensor: str) -> str:
        """Give a tensor the name of an output of the graph."""
        self._nodes.append(helper.make_node("Identity", [tensor], [name], name=f"output.{name}"))
        return name

    def model(
        self, outputs: Mapping[str, tuple[int, list[Any]]], metadata: Mapping[str, str], version: str
    ) -> onnx.ModelProto:
        """The finished model.

        Args:
            outputs: name (`output`) → type and shape, as of `input`.
            metadata: kept in the file.
            version: of the program that has made it.
        """
        said = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()]
        graph = helper.make_graph(self._nodes, "asr_kd", self._inputs, said, list(self._constants.values()))
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="asr_kd", producer_version=version
        )  # fmt: skip
        helper.set_model_props(model, dict(metadata))
        return model


def axes(*numbers: int) -> np.ndarray:
    """Numbers of axes, as operators want them."""
    return np.array(numbers, np.int64)
