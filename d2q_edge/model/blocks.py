"""Run a checkpoint one decoder block at a time, through transformers' modules; nothing else of the model is in memory.

transformers is imported on first use, because that takes seconds.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from d2q_edge.errors import D2QError
from d2q_edge.model.attention import attention_for
from d2q_edge.model.block_reader import BlockReader
from d2q_edge.model.carried_state import CarriedState, KeyValues
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.experts import separate_experts
from d2q_edge.model.families import Family, LinearGroup, Sublayer
from d2q_edge.model.linear import use_bfloat16
from d2q_edge.model.per_layer import PerLayerEmbeddings
from d2q_edge.quantize.matmul import has_bfloat16

ATTENTION = "self_attn"
"""The module of a block that wants positions and a mask."""
PER_LAYER = "per_layer"
"""The module that wants the block's own embeddings of the tokens."""


def model_config(checkpoint: Checkpoint) -> Any:
    """Return transformers' config of a checkpoint; it raises all kinds of exceptions for an invalid config.json."""
    from transformers import AutoConfig

    rope = checkpoint.config.get("rope_scaling")
    if isinstance(rope, dict) and rope.get("type") == "su":
        # The first Phi-3 configs call longrope "su", which transformers doesn't know.
        settings = {**checkpoint.config, "rope_scaling": {**rope, "type": "longrope"}}
        return AutoConfig.for_model(**settings)
    if checkpoint.gguf is not None:
        return AutoConfig.for_model(**checkpoint.config)
    config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True, trust_remote_code=False)
    # The config itself, unless the checkpoint is multimodal.
    config = config.get_text_config()
    if config.model_type != checkpoint.config.get("model_type", config.model_type):
        # The checkpoint is shown as another architecture's (granite4.py).
        return AutoConfig.for_model(**checkpoint.config)
    # Weights are dequantized when they are read: transformers must not look for a quantizer.
    vars(config).pop("quantization_config", None)
    return config


def empty_model(config: Any, attention: str, family: Family) -> Any:
    """Build transformers' model without weights, with separate experts and a named attention implementation."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    separate_experts(model, family.expert_parts)
    return model


def rotary_module(model: Any, config: Any, family: Family) -> nn.Module | None:
    """Build the rotary embedding of a model on the meta device anew: its frequencies are computed, not loaded.

    `model` is transformers' base model; None where its attention knows no positions.
    """
    kind = type(getattr(model, family.rotary))
    module: nn.Module | None = None if kind is type(None) else kind(config=config)
    return module


def add_bias(norm: nn.Module, bias: torch.Tensor) -> RemovableHandle:
    """Add a bias [channels] to the output of a norm, which has none in transformers, until the handle is removed."""
    return norm.register_forward_hook(lambda _module, _arguments, output: output + bias)


class _InputsReached(Exception):
    """End a forward pass at the last layer of which something was wanted."""


class BlockRunner:
    """Load and run the decoder blocks of one checkpoint on one device, in float32 but for some products on CUDA."""

    def __init__(self, checkpoint: Checkpoint, family: Family, device: torch.device) -> None:
        """Build the model without weights; raise D2QError if transformers can't make sense of config.json."""
        self.checkpoint, self.family, self.device = checkpoint, family, device
        try:
            config = model_config(checkpoint)
            model = empty_model(config, attention_for(device), family)
        except Exception as error:
            raise D2QError(f"transformers can't build the model of {checkpoint.directory} ({error})") from error
        self._carried = CarriedState(family)
        self._per_layer = PerLayerEmbeddings(checkpoint, family, device) if family.per_layer_width else None
        self._reader = BlockReader(checkpoint, family, ahead=device.type == "cuda")
        self._layers = model.model.layers
        self._final_norm: nn.Module = model.get_submodule(family.final_norm)
        self._layer_types: list[str] = getattr(config, "layer_types", None) or []
        rotary = rotary_module(model.model, config, family)
        self._rotary = None if rotary is None else rotary.to(device)
        self._reader.begin(0)

    @property
    def capturable(self) -> bool:
        """Whether a block runs on a GPU without anything that depends on the values it computes (CUDA graphs)."""
        kinds = getattr(self._rotary, "rope_type", "")
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        lengths = any("dynamic" in kind or kind == "longrope" for kind in kinds)
        plain = {ATTENTION, "mlp"} >= {
            sublayer.module
            for index in range(self.family.num_layers)
            for sublayer in self.family.block_sublayers(index)
        }
        return self.device.type == "cuda" and plain and not self.family.num_experts and not lengths

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the hidden states in front of the first block for token ids [windows, context]: float32.

        They are the embeddings [windows, context, hidden], where blocks read nothing else (`Family.stream_width`).
        """
        return next(self.embed_all([tokens]))

    def embed_all(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the hidden states of one batch of token ids after another, as `embed`; the table is read once."""
        table = self.checkpoint.tensor(f"{self.family.embedding}.weight")
        for tokens in batches:
            # Moved before the cast to float32: half the bytes.
            yield self.begin(nn.functional.embedding(tokens, table).to(self.device), tokens)

    def begin(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return `embed` for rows of the table [windows, context, hidden], those of these token ids."""
        return self._carried.begin(rows.float() * self.family.embedding_scale, tokens)

    def stream(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the residual stream [..., hidden] of hidden states; what they carry besides is left out."""
        return self._carried.stream(hidden)

    def load(self, index: int, following: int | None = None) -> nn.Module:
        """Return block `index` in float32; raise D2QError if a weight is NaN or infinite, or can't be read.

        `following` is the block that will be loaded next, by default the one after it.
        """
        block: nn.Module = copy.deepcopy(self._layers[index])
        self.family.adapt_block(index, block)
        if has_bfloat16(self.device):
            use_bfloat16(block, self.family.block_linears(index))
        # Moved before the cast to float32: half the bytes.
        weights = {name: tensor.to(self.device).float() for name, tensor in self._reader.read(index)}
        self._reader.begin(index + 1 if following is None else following)
        block.load_state_dict(weights, assign=True)
        if self._per_layer is not None:
            block.per_layer_input = self._per_layer.of_block(index)  # type: ignore[assignment]
        return block.eval().requires_grad_(False)

    def share(self, block: nn.Module) -> nn.Module:
        """Copy a block; its tensors are the original's until one of them is replaced."""
        return copy.deepcopy(block, {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())})

    def final_norm(self) -> nn.Module:
        """Return the norm before lm_head with the checkpoint's weight, in float32."""
        norm = self._final_norm
        weight = self.checkpoint.tensor(f"{self.family.final_norm}.weight").to(self.device, torch.float32)
        norm.load_state_dict({"weight": weight}, assign=True)
        return norm.eval().requires_grad_(False)

    def head(self) -> torch.Tensor:
        """Return the weight of lm_head times the scale of the logits, float32 [vocabulary, hidden]."""
        name = self.family.embedding if self.family.tied_embeddings else self.family.head
        weight = self.checkpoint.tensor(f"{name}.weight").to(self.device)
        return weight.float() if self.family.logit_scale == 1 else weight.float() * self.family.logit_scale

    def forward(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Return a block's output for its input, both float32 [windows, context, channels] on the runner's device.

        The channels are `Family.stream_width`: the residual stream's, and what is carried besides.
        """
        keys = self._carried.keys(hidden)
        inputs = self._attention_inputs(block, hidden, keys) | self._per_layer_inputs(block, hidden)
        return self._carried.advance(block(self.stream(hidden), **inputs), hidden, keys)

    def sublayer_forward(self, block: nn.Module, sublayer: Sublayer, residual: torch.Tensor) -> torch.Tensor:
        """Return the hidden states after a sublayer for those before it, both as of `forward`."""
        output, keys = self._run_module(block, sublayer, residual)
        return self._add_output(block, sublayer, output, residual, keys)

    def puts_out(self, block: nn.Module, sublayer: Sublayer, layer: str) -> bool:
        """Tell whether a sublayer's module puts out what `layer` does and no more, as `finish_sublayer` needs it."""
        outputs: list[torch.Tensor] = []
        handle = block.get_submodule(layer).register_forward_hook(lambda *call: outputs.append(call[2]))
        try:
            token = torch.zeros(1, 1, self.family.stream_width, device=self.device)
            before = self._carried.keys(token)
            result, keys = self._run_module(block, sublayer, token, dict(before))
        finally:
            handle.remove()
        leaves_keys = any(keys[kind] is not before[kind] for kind in keys)
        return not leaves_keys and any(result is output for output in outputs)

    def finish_sublayer(
        self, block: nn.Module, sublayer: Sublayer, layer: str, inputs: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        """Return `sublayer_forward`, to the last bit, given the input of the layer that puts out the module's result.

        Args:
            block, sublayer, residual: as for `sublayer_forward`.
            layer: for which `puts_out` is true.
            inputs: what `group_input` returned for it, float32 [windows * context, in_features].
        """
        output: torch.Tensor = block.get_submodule(layer)(inputs.view(*residual.shape[:-1], -1))
        return self._add_output(block, sublayer, output, residual, self._carried.keys(residual))

    def group_input(
        self, block: nn.Module, sublayer: Sublayer, group: LinearGroup, residual: torch.Tensor
    ) -> torch.Tensor:
        """Return what the layers of a linear group read, float32 [windows * context, in_features], and compute no more.

        `residual` are the hidden states before the group's sublayer, as of `forward`.
        """
        if group.reads_stream:
            return self.stream(residual).flatten(0, -2)
        if group.norm is not None:
            return self.normed(block, group.norm, residual).flatten(0, -2)
        layer = group.linears[0]
        with _captured_inputs(block, (layer,), stop=True) as inputs:
            self._run_module(block, sublayer, residual)
        return inputs[layer]

    def normed(self, block: nn.Module, norm: str, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output of a norm of a block that reads the residual stream: float32 [windows, context, hidden]."""
        output: torch.Tensor = block.get_submodule(norm)(self.stream(hidden))
        return output

    def sublayer_trace(
        self, block: nn.Module, sublayer: Sublayer, layers: tuple[str, ...], residual: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the inputs of some linear layers of a sublayer, as `trace`, and the result of `sublayer_forward`."""
        with _captured_inputs(block, layers) as inputs:
            return inputs, self.sublayer_forward(block, sublayer, residual)

    def routes(
        self, block: nn.Module, sublayer: Sublayer, router: str, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the router of a sublayer decides, without computing anything after it.

        `residual` is the stream before the sublayer, float32 [windows, context, hidden].

        Returns:
            The experts' logits, float32 [tokens, experts], and the chosen experts, int64 [tokens, top_k].
        """
        found: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found.append((output[0], output[2]))
            raise _InputsReached

        handle = block.get_submodule(router).register_forward_hook(keep)
        try:
            with suppress(_InputsReached):
                self._run_module(block, sublayer, residual)
        finally:
            handle.remove()
        return found[0]

    def inputs_of(self, block: nn.Module, layers: tuple[str, ...], hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the inputs of some linear layers, as `trace`, without computing anything after the last of them."""
        with _captured_inputs(block, layers, stop=True) as inputs:
            self.forward(block, hidden)
        return inputs

    def trace(
        self, block: nn.Module, layers: tuple[str, ...], hidden: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Run a block on its input, as `forward`, and capture the inputs of some linear layers.

        Returns:
            The inputs by the layers' names in the block, float32 [tokens, in_features] (a routed expert sees only its
            own tokens), and the output of the block, as of `forward`.
        """
        with _captured_inputs(block, layers) as inputs:
            return inputs, self.forward(block, hidden)

    def input_of(self, block: nn.Module, layer: str, hidden: torch.Tensor) -> torch.Tensor:
        """Return the input of one linear layer, as `trace`, without computing anything after it."""
        return self.inputs_of(block, (layer,), hidden)[layer]

    def _add_output(
        self, block: nn.Module, sublayer: Sublayer, output: torch.Tensor, residual: torch.Tensor, keys: KeyValues
    ) -> torch.Tensor:
        if sublayer.output_norm is not None:
            output = block.get_submodule(sublayer.output_norm)(output)
        stream = self.stream(residual) + self.family.residual_scale * output
        if sublayer.stream_scale is not None:
            stream = stream * block.get_buffer(sublayer.stream_scale)
        return self._carried.advance(stream, residual, keys)

    def _run_module(
        self, block: nn.Module, sublayer: Sublayer, residual: torch.Tensor, keys: KeyValues | None = None
    ) -> tuple[torch.Tensor, KeyValues]:
        """Return the output of a sublayer's module, and the keys and values that later blocks share after it."""
        keys = self._carried.keys(residual) if keys is None else keys
        read = self.stream(residual) if sublayer.norm is None else self.normed(block, sublayer.norm, residual)
        inputs = {}
        if sublayer.module == ATTENTION:
            inputs = self._attention_inputs(block, residual, keys)
        elif sublayer.module == PER_LAYER:
            inputs = self._per_layer_inputs(block, residual)
        output: torch.Tensor | tuple[torch.Tensor, ...] = block.get_submodule(sublayer.module)(read, **inputs)
        # Attention also returns its weights, and a mixture of experts its router's output.
        return output[0] if isinstance(output, tuple) else output, keys

    def _per_layer_inputs(self, block: nn.Module, hidden: torch.Tensor) -> dict[str, Any]:
        """Return the block's own embeddings of the tokens, where blocks have them."""
        if self._per_layer is None:
            return {}
        embeddings: Any = block.per_layer_input
        return {"per_layer_input": embeddings(self._carried.tokens(hidden))}

    def _attention_inputs(self, block: nn.Module, hidden: torch.Tensor, keys: KeyValues) -> dict[str, Any]:
        """Return positions and mask, and shared keys and values, where there are any; attention may replace these.

        Without a mask, transformers' scaled-dot-product attention is causal.
        """
        context = hidden.shape[1]
        positions = torch.arange(context, device=hidden.device)
        attention: Any = getattr(block, ATTENTION, None)
        # Blocks without attention, such as convolutions, get positions as well, and make nothing of them.
        index: int | None = None if attention is None else attention.layer_idx
        # A model whose layer types have different ropes has one module for all of them.
        by_type = isinstance(getattr(self._rotary, "rope_type", None), dict)
        kind = (self._layer_types[index],) if by_type and index is not None else ()
        mask = None
        window = None if index is None else self.family.sliding_window(index)
        if window is not None and window < context:
            distance = positions[:, None] - positions
            mask = ((distance >= 0) & (distance < window))[None, None]
        embeddings = None if self._rotary is None else self._rotary(hidden, positions[None], *kind)
        shared = {} if self.family.shared_keys is None else {"shared_kv_states": keys}
        return {
            "position_embeddings": embeddings,
            "position_ids": positions[None],
            "attention_mask": mask,
            **shared,
        }


@contextmanager
def _captured_inputs(
    block: nn.Module, layers: tuple[str, ...], *, stop: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """Capture the inputs of some layers of a block; with `stop` the forward pass ends when all are known."""
    inputs: dict[str, torch.Tensor] = {}

    def hook(name: str, _: nn.Module, arguments: Any) -> None:
        inputs[name] = arguments[0].reshape(-1, arguments[0].shape[-1])
        if stop and len(inputs) == len(layers):
            raise _InputsReached

    handles = [block.get_submodule(name).register_forward_pre_hook(partial(hook, name)) for name in layers]
    try:
        with suppress(_InputsReached):
            yield inputs
    finally:
        for handle in handles:
            handle.remove()
