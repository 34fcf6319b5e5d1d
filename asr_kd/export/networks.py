"""Networks for whole utterances as nodes of a graph, family by family: features [batch, frames, inputs] → logits [batch, frames, units].

By hand, since torch's exporters do not carry them (torch 2.11): the one on TorchScript fixes the number of frames within attention, and knows neither
`mT` nor `unfold` of unknown length; the one on torch.export (with onnxscript, half a minute a network) fixes batches, refuses the chunked Conformer, and rounds -(-frames // n) the
wrong way, so that an Emformer loses its last frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from asr_kd.export.graph import FLOAT, Graph, axes
from asr_kd.models.chunked_conformer import ChunkedConformerModel
from asr_kd.models.conformer import ConformerModel
from asr_kd.models.conv import ConvModel
from asr_kd.models.emformer import EmformerModel
from asr_kd.models.network import AcousticModel
from asr_kd.models.separable import SeparableModel
from asr_kd.units import Units

#: to the end of an axis
END = np.iinfo(np.int64).max
#: what a score of attention is where nothing may be heard; not infinite, for a row that hears nothing
NOTHING = -1e30


def array(weight: Tensor | None) -> np.ndarray:
    """A weight as it lies in a graph."""
    assert weight is not None
    return weight.detach().cpu().numpy()


def linear(graph: Graph, hidden: str, layer: nn.Linear) -> str:
    """A linear layer over the last axis."""
    product = graph("MatMul", hidden, array(layer.weight).T)
    return product if layer.bias is None else graph("Add", product, array(layer.bias))


def norm(graph: Graph, hidden: str, layer: nn.LayerNorm) -> str:
    """Normalisation over the last axis."""
    return graph("LayerNormalization", hidden, array(layer.weight), array(layer.bias), axis=-1, epsilon=layer.eps)


def silu(graph: Graph, hidden: str) -> str:
    """x · sigmoid(x)."""
    return graph("Mul", hidden, graph("Sigmoid", hidden))


def gated(graph: Graph, hidden: str, width: int) -> str:
    """The first half of the last axis times the sigmoid of the second."""
    value, gate = graph.several("Split", 2, hidden, axes(width, width), axis=-1)
    return graph("Mul", value, graph("Sigmoid", gate))


def conditioned(graph: Graph, hidden: str, model: AcousticModel, layer: int) -> str:
    """What the next layer hears behind a layer.

    Args:
        graph: that nodes are added to.
        hidden: what comes out of the layer.
        model: the network.
        layer: its number, from 1.
    """
    if model.condition is None or layer not in getattr(model, "conditioned", ()):
        return hidden
    blank = np.zeros(model.output.out_features, np.float32)
    blank[Units.blank] = model.condition.held_back.item()
    logits = graph("Add", linear(graph, hidden, model.output), blank)
    return graph("Add", hidden, linear(graph, graph("Softmax", logits, axis=-1), model.condition.project))


def _over_time(graph: Graph, hidden: str, weight: Tensor, bias: Tensor | None, pads: list[int], group: int = 1) -> str:
    """A convolution over the frames of [batch, frames, channels], with a weight [channels, …, width]."""
    across = graph("Transpose", hidden, perm=[0, 2, 1])
    new = graph("Conv", across, array(weight), array(bias), pads=pads, group=group, kernel_shape=[weight.shape[-1]])
    return graph("Transpose", new, perm=[0, 2, 1])


def _feed_forward(graph: Graph, hidden: str, layers: Any, bend: Callable[[Graph, str], str]) -> str:
    """LayerNorm, Linear, activation, Dropout, Linear."""
    inner = bend(graph, linear(graph, norm(graph, hidden, layers[0]), layers[1]))
    return linear(graph, inner, layers[4])


def _heads(graph: Graph, hidden: str, heads: int, width: int) -> str:
    """[batch, frames, heads × width] → [batch, heads, frames, width]."""
    apart = graph("Reshape", hidden, axes(0, -1, heads, width // heads))
    return graph("Transpose", apart, perm=[0, 2, 1, 3])


def _attended(graph: Graph, query: str, key: str, value: str, scale: float, heard: str) -> str:
    """Attention of [batch, heads, frames, width], where `heard` (bool, to be broadcast) allows it: [batch, frames, heads × width]."""
    scores = graph("Mul", graph("MatMul", query, graph("Transpose", key, perm=[0, 1, 3, 2])), scale)
    said = graph("MatMul", graph("Softmax", graph("Where", heard, scores, NOTHING), axis=-1), value)
    return graph("Reshape", graph("Transpose", said, perm=[0, 2, 1, 3]), axes(0, 0, -1))


def _padded(graph: Graph, hidden: str, count: str) -> str:
    """[batch, frames, width] with so many frames of zeros behind."""
    pads = graph("Concat", axes(0, 0, 0, 0), graph.added_axis(count, 0), axes(0), axis=0)
    return graph("Pad", hidden, pads)


def _first(graph: Graph, hidden: str, count: str) -> str:
    """The first frames of [batch, frames, width]."""
    return graph("Slice", hidden, axes(0), graph.added_axis(count, 0), axes(1))


def _conv(graph: Graph, model: ConvModel, features: str, inside: str) -> str:
    hidden = features
    for convolution, normal in zip(model.convolutions, model.norms, strict=True):
        assert isinstance(convolution, nn.Conv1d) and isinstance(normal, nn.LayerNorm)
        side = convolution.kernel_size[0] // 2
        new = _over_time(graph, graph("Mul", hidden, inside), convolution.weight, convolution.bias, [side, side])
        new = graph("Relu", norm(graph, new, normal))
        hidden = graph("Add", new, hidden) if convolution.in_channels == convolution.out_channels else new
    return linear(graph, hidden, model.output)


def _causal(graph: Graph, hidden: str, layer: Any) -> str:
    """A `CausalDepthwise`."""
    weight = layer.convolution.weight
    return _over_time(graph, hidden, weight[:, :, 0], layer.convolution.bias, [layer.before, 0], len(weight))


def _separable(graph: Graph, model: SeparableModel, features: str, inside: str) -> str:
    heard = graph("Pad", graph("Mul", features, inside), axes(0, 0, 0, 0, model.delay, 0))
    hidden = linear(graph, heard, model.input)
    for number, layer in enumerate(model.layers, 1):
        any_layer: Any = layer
        new = linear(graph, _causal(graph, hidden, any_layer.over_time), any_layer.over_channels)
        hidden = graph("Add", hidden, graph("Relu", norm(graph, new, any_layer.norm)))
        hidden = conditioned(graph, hidden, model, number)
    logits = linear(graph, hidden, model.output)
    return graph("Slice", logits, axes(model.delay), axes(END), axes(1))


def _conformer(graph: Graph, model: ConformerModel, features: str, inside: str) -> str:
    hidden, width = linear(graph, features, model.input), model.input.out_features
    heard = graph(
        "Greater", graph("Transpose", graph.added_axis(inside, 1), perm=[0, 1, 3, 2]), 0.0
    )  # [batch, 1, 1, frames]
    for number, layer in enumerate(model.encoder.conformer_layers, 1):
        any_layer: Any = layer
        hidden = _half(graph, hidden, _feed_forward(graph, hidden, any_layer.ffn1.sequential, silu))
        attention = any_layer.self_attn
        rows = graph("MatMul", norm(graph, hidden, any_layer.self_attn_layer_norm), array(attention.in_proj_weight).T)
        parts = graph.several(
            "Split", 3, graph("Add", rows, array(attention.in_proj_bias)), axes(width, width, width), axis=-1
        )
        query, key, value = (_heads(graph, one, attention.num_heads, width) for one in parts)
        said = _attended(graph, query, key, value, float((width // attention.num_heads) ** -0.5), heard)
        hidden = graph("Add", hidden, linear(graph, said, attention.out_proj))
        hidden = graph("Add", hidden, _convolved(graph, hidden, any_layer.conv_module, width, inside))
        hidden = _half(graph, hidden, _feed_forward(graph, hidden, any_layer.ffn2.sequential, silu))
        hidden = conditioned(graph, norm(graph, hidden, any_layer.final_layer_norm), model, number)
    return linear(graph, hidden, model.output)


def _half(graph: Graph, hidden: str, new: str) -> str:
    return graph("Add", hidden, graph("Mul", new, 0.5))


def _convolved(graph: Graph, hidden: str, module: Any, width: int, inside: str) -> str:
    """torchaudio's convolution module; padding is not heard."""
    into, _, over, batch_norm, _, out, _ = module.sequential
    new = graph("MatMul", norm(graph, hidden, module.layer_norm), array(into.weight[:, :, 0]).T)
    new = gated(graph, graph("Add", new, array(into.bias)), width)
    side = over.kernel_size[0] // 2
    new = _over_time(graph, graph("Mul", new, inside), over.weight, over.bias, [side, side], width)
    scale = array(batch_norm.weight) / np.sqrt(array(batch_norm.running_var) + np.float32(batch_norm.eps))
    new = graph("Add", graph("Mul", new, scale), array(batch_norm.bias) - array(batch_norm.running_mean) * scale)
    return graph("Add", graph("MatMul", silu(graph, new), array(out.weight[:, :, 0]).T), array(out.bias))


def _chunked_conformer(graph: Graph, model: ChunkedConformerModel, features: str, inside: str) -> str:
    frames, width = graph.size(features, 1), model.input.out_features
    chunks = graph("Div", graph("Add", frames, model.chunk - 1), model.chunk)
    missing = graph("Sub", graph("Mul", chunks, model.chunk), frames)
    hidden = linear(graph, _padded(graph, graph("Mul", features, inside), missing), model.input)
    for number, layer in enumerate(model.layers, 1):
        any_layer: Any = layer
        hidden = _half(graph, hidden, _feed_forward(graph, hidden, _flat(any_layer.first), silu))
        heard = norm(graph, hidden, any_layer.attention_norm)
        hidden = graph("Add", hidden, _chunked_attention(graph, heard, any_layer.attention, chunks, width))
        new = gated(graph, linear(graph, norm(graph, hidden, any_layer.gated[0]), any_layer.gated[1]), width)
        new = silu(graph, norm(graph, _causal(graph, new, any_layer.over_time), any_layer.over_channels[0]))
        hidden = graph("Add", hidden, linear(graph, new, any_layer.over_channels[2]))
        hidden = _half(graph, hidden, _feed_forward(graph, hidden, _flat(any_layer.second), silu))
        hidden = conditioned(graph, norm(graph, hidden, any_layer.norm), model, number)
    return _first(graph, linear(graph, hidden, model.output), frames)


def _flat(layers: Any) -> list[nn.Module]:
    """The inner layers, then the outer: as `_feed_forward` counts them."""
    return [*layers[0], *layers[1:]]


def _chunked_attention(graph: Graph, frames: str, attention: Any, chunks: str, width: int) -> str:
    """A `ChunkedAttention`: each chunk is an item of the batch."""
    chunk, left, heads = attention.chunk, attention.left, attention.heads
    here, there = np.arange(chunk), np.arange(left + chunk)
    before = graph("Pad", linear(graph, frames, attention.key_value), axes(0, left, 0, 0, 0, 0))
    begins = graph.added_axis(graph("Mul", graph.counted(chunks), chunk), 1)
    at = graph("Add", begins, there)  # [chunks, window], with the frames before the first
    windows = graph("Gather", before, at, axis=1)  # [batch, chunks, window, 2 × size]
    pairs = graph("Reshape", windows, axes(-1, left + chunk, 2 * width))
    query = graph("Reshape", linear(graph, frames, attention.query), axes(-1, chunk, width))
    parts = [query, *graph.several("Split", 2, pairs, axes(width, width), axis=-1)]
    query, key, value = (_heads(graph, one, heads, width) for one in parts)
    scores = graph(
        "Mul", graph("MatMul", query, graph("Transpose", key, perm=[0, 1, 3, 2])), float((width // heads) ** -0.5)
    )
    scores = graph("Add", scores, array(attention.bias)[:, there - here[:, None] + chunk - 1])
    # an axis for the chunks again: [batch, chunks, heads, chunk, window]
    shape = graph("Concat", axes(-1), graph.added_axis(chunks, 0), axes(heads, chunk, left + chunk), axis=0)
    some = graph("Unsqueeze", graph("GreaterOrEqual", at, left), axes(1, 2))
    scores = graph("Where", some, graph("Reshape", scores, shape), NOTHING)
    weights = graph("Softmax", graph("Reshape", scores, axes(-1, heads, chunk, left + chunk)), axis=-1)
    said = graph("Transpose", graph("MatMul", weights, value), perm=[0, 2, 1, 3])
    whole = graph("Concat", axes(-1), graph.added_axis(graph("Mul", chunks, chunk), 0), axes(width), axis=0)
    return linear(graph, graph("Reshape", said, whole), attention.output)


def _emformer(graph: Graph, model: EmformerModel, features: str, inside: str) -> str:
    frames, width, segment = graph.size(features, 1), model.input.out_features, model.segment
    segments = graph("Div", graph("Add", frames, segment - 1), segment)
    whole = graph("Mul", segments, segment)
    missing = graph("Sub", graph("Add", whole, model.right), frames)
    heard = linear(graph, _padded(graph, graph("Mul", features, inside), missing), model.input)
    numbers = graph.counted(segments)
    hidden = _first(graph, heard, whole)
    rows, mask = [hidden], _emformer_mask(graph, model, numbers, whole)
    if model.right:
        behind = graph(
            "Add", graph.added_axis(graph("Mul", graph("Add", numbers, 1), segment), 1), np.arange(model.right)
        )
        rows.insert(0, graph("Gather", heard, graph("Reshape", behind, axes(-1)), axis=1))
    memory = _all_but_last(graph, _summaries(graph, hidden, segment, width)) if model.memory else ""
    for number, layer in enumerate(model.encoder.emformer_layers, 1):
        any_layer: Any = layer
        joined = graph("Concat", *rows, axis=1) if model.right else rows[0]
        normal = norm(graph, joined, any_layer.layer_norm_input)
        right = graph("Mul", segments, model.right)
        asked = normal
        if model.memory:
            own = graph("Slice", normal, graph.added_axis(right, 0), axes(END), axes(1))
            asked = graph("Concat", normal, _summaries(graph, own, segment, width), axis=1)
        attention = any_layer.attention
        pairs = linear(graph, graph("Concat", memory, normal, axis=1) if memory else normal, attention.emb_to_key_value)
        key, value = graph.several("Split", 2, pairs, axes(width, width), axis=-1)
        query = linear(graph, asked, attention.emb_to_query)
        query, key, value = (_heads(graph, one, attention.num_heads, width) for one in (query, key, value))
        said = linear(graph, _attended(graph, query, key, value, float(attention.scaling), mask), attention.out_proj)
        count = graph("Add", right, whole)
        if model.memory:
            told = graph("Slice", said, graph.added_axis(count, 0), axes(END), axes(1))
            memory = _all_but_last(graph, graph("Clip", told, -10.0, 10.0))
        joined = graph("Add", _first(graph, said, count), joined)
        joined = graph(
            "Add", joined, _feed_forward(graph, joined, any_layer.pos_ff, lambda graph, one: graph("Relu", one))
        )
        joined = conditioned(graph, norm(graph, joined, any_layer.layer_norm_output), model, number)
        hidden = graph("Slice", joined, graph.added_axis(right, 0), axes(END), axes(1))
        rows = [_first(graph, joined, right), hidden] if model.right else [hidden]
    return _first(graph, linear(graph, hidden, model.output), frames)


def _summaries(graph: Graph, hidden: str, segment: int, width: int) -> str:
    """Means of whole segments: [batch, segments, width]."""
    return graph("ReduceMean", graph("Reshape", hidden, axes(0, -1, segment, width)), axes=[2], keepdims=0)


def _all_but_last(graph: Graph, rows: str) -> str:
    return graph("Slice", rows, axes(0), axes(-1), axes(1))


def _emformer_mask(graph: Graph, model: EmformerModel, numbers: str, whole: str) -> str:
    """Bool [queries, keys], where a query may look; the order is that of `EmformerModel`."""
    frames = graph.counted(whole)
    right = graph("Div", graph.counted(graph("Mul", graph.size(numbers, 0), model.right)), max(1, model.right))
    of_frames = graph("Div", frames, model.segment)
    summaries = [numbers] if model.memory else []
    asks = graph.added_axis(graph("Concat", right, of_frames, *summaries, axis=0), 1)
    begins = graph("Sub", graph("Mul", asks, model.segment), model.left)
    ends = graph("Mul", graph("Add", asks, 1), model.segment)
    own = graph("And", graph("GreaterOrEqual", frames, begins), graph("Less", frames, ends))
    parts = [graph("Equal", right, asks), own]
    if model.memory:
        # a summary hears no other: it asks as the first segment does, which has none before it
        none = graph("Mul", numbers, 0)
        first = graph.added_axis(graph("Concat", right, of_frames, none, axis=0), 1)
        held = graph("Slice", numbers, axes(0), axes(-1), axes(0))
        near = graph("GreaterOrEqual", held, graph("Sub", first, model.memory))
        parts.insert(0, graph("And", graph("Less", held, first), near))
    return graph("Concat", *parts, axis=1)


FAMILIES: dict[type[AcousticModel], Callable[[Graph, Any, str, str], str]] = {
    ConvModel: _conv, SeparableModel: _separable, ConformerModel: _conformer, ChunkedConformerModel: _chunked_conformer,
    EmformerModel: _emformer,
}  # fmt: skip


def add_network(graph: Graph, model: AcousticModel, features: str, lengths: str) -> str:
    """Nodes of a network that is no LSTM; gives logits float32 [batch, frames, units].

    Args:
        graph: that they are added to.
        model: the network.
        features: float32 [batch, frames, inputs].
        lengths: int64 [batch].
    """
    within = graph("Less", graph.counted(graph.size(features, 1)), graph.added_axis(lengths, 1))
    inside = graph.added_axis(graph.cast(within, FLOAT), 2)
    return FAMILIES[type(model)](graph, model, features, inside)
