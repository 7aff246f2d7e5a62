"""Running a checkpoint one decoder block at a time, through transformers' own modules.

Knows how to build a block, fill it with the checkpoint's weights and run it, whole or by sublayers (families/base.py says
what a sublayer is), or just far enough to see the input of one of its layers. Does not know about quantization: pipeline.py
changes the weights. A block lives as long as its caller keeps it; nothing else of the model is in memory. transformers'
models are imported by the first that needs them, because that takes seconds (ahead.py).
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from d2q_edge.errors import D2QError
from d2q_edge.model.block_reader import BlockReader
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.experts import separate_experts
from d2q_edge.model.families import Family, LinearGroup, Sublayer


def model_config(checkpoint: Checkpoint) -> Any:
    """transformers' config of a checkpoint; whatever it raises is the config's fault."""
    from transformers import AutoConfig

    rope = checkpoint.config.get("rope_scaling")
    if isinstance(rope, dict) and rope.get("type") == "su":
        # What Phi-3 called longrope at first; transformers knows the new name only.
        settings = {**checkpoint.config, "rope_scaling": {**rope, "type": "longrope"}}
        return AutoConfig.for_model(**settings)
    config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True, trust_remote_code=False)
    # Itself, unless the model also takes images (text_part.py).
    return config.get_text_config()


def empty_model(config: Any, attention: str) -> Any:
    """transformers' model without weights, its experts apart; `attention` is the name of an implementation."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    separate_experts(model)
    return model


def add_bias(norm: nn.Module, bias: torch.Tensor) -> RemovableHandle:
    """Let a norm, which has none in transformers, add a bias [channels] to its output, until the handle is removed."""
    return norm.register_forward_hook(lambda _module, _arguments, output: output + bias)


class _Reached(Exception):
    """Ends a forward pass at the layer whose input was wanted."""


class BlockRunner:
    """Decoder blocks of one checkpoint, in float32 on one device."""

    def __init__(self, checkpoint: Checkpoint, family: Family, device: torch.device) -> None:
        """Build the model without weights.

        Raises:
            D2QError: transformers can't make sense of config.json.
        """
        self.checkpoint = checkpoint
        self.family = family
        self.device = device
        try:
            config = model_config(checkpoint)
            model = empty_model(config, _attention(device))
        except Exception as error:
            # There is no one exception for what can be wrong in a stranger's config.
            raise D2QError(f"transformers can't build the model of {checkpoint.directory} ({error})") from error
        self._reader = BlockReader(checkpoint, family, ahead=device.type == "cuda")
        self._layers = model.model.layers
        self._final_norm: nn.Module = model.model.norm
        self._layer_types: list[str] = getattr(config, "layer_types", None) or []
        # Made anew outside the meta device: its frequencies are computed, not loaded.
        self._rotary: nn.Module = type(model.model.rotary_emb)(config=config).to(device)
        self._reader.begin(0)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings of token ids [windows, context]: float32 [windows, context, hidden]."""
        return next(self.embed_all([tokens]))

    def embed_all(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The same for one batch after another; the table is read once."""
        table = self.checkpoint.tensor(f"{self.family.embedding}.weight")
        for tokens in batches:
            # First there, then float32: half the bytes to move.
            rows = nn.functional.embedding(tokens, table).to(self.device)
            yield rows.float() * self.family.embedding_scale

    def load(self, index: int) -> nn.Module:
        """Block `index` with the checkpoint's weights, in float32.

        Raises:
            D2QError: a weight is NaN or infinite, or can't be read.
        """
        block: nn.Module = copy.deepcopy(self._layers[index])
        # First there, then float32: half the bytes to move.
        weights = {name: tensor.to(self.device).float() for name, tensor in self._reader.read(index)}
        self._reader.begin(index + 1)
        block.load_state_dict(weights, assign=True)
        return block.eval().requires_grad_(False)

    def share(self, block: nn.Module) -> nn.Module:
        """A copy of a block whose parameters are the block's own tensors, until one of them is replaced."""
        return copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})

    def add_norm_bias(self, block: nn.Module, norm: str, bias: torch.Tensor) -> None:
        """Let a norm of a block, by its name in the block, add a bias [channels] to its output from now on."""
        add_bias(block.get_submodule(norm), bias.to(self.device))

    def final_norm(self) -> nn.Module:
        """The norm before the head, with the checkpoint's weight, in float32."""
        norm = self._final_norm
        weight = self.checkpoint.tensor(f"{self.family.final_norm}.weight").to(self.device, torch.float32)
        norm.load_state_dict({"weight": weight}, assign=True)
        return norm.eval().requires_grad_(False)

    def forward(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output for hidden states [windows, context, hidden], float32 on the runner's device."""
        output: torch.Tensor = block(hidden, **self._positions(block, hidden))
        return output

    def sublayer_forward(self, block: nn.Module, sublayer: Sublayer, residual: torch.Tensor) -> torch.Tensor:
        """The residual stream behind one half of a block, float32 [windows, context, hidden].

        Args:
            block: from `load` or `share`.
            sublayer: of the block.
            residual: the stream before that sublayer, float32 [windows, context, hidden].
        """
        output = self._run_module(block, sublayer, residual)
        if sublayer.output_norm is not None:
            output = block.get_submodule(sublayer.output_norm)(output)
        return residual + output

    def group_input(self, block: nn.Module, group: LinearGroup, residual: torch.Tensor) -> torch.Tensor:
        """The input of a linear group's layers, float32 [windows * context, in_features]; nothing behind it is computed.

        Args:
            block: from `load` or `share`.
            group: of the block.
            residual: the residual stream that the linear group's sublayer of the block reads, float32 [windows, context, hidden].
        """
        if group.norm is not None:
            normed: torch.Tensor = block.get_submodule(group.norm)(residual)
            return normed.flatten(0, -2)
        layer = group.linears[0]
        with _Watch(block, (layer,), stop=True) as seen, suppress(_Reached):
            self._run_module(block, self.family.sublayer_of(group), residual)
        return seen[layer]

    def sublayer_trace(
        self, block: nn.Module, sublayer: Sublayer, layers: tuple[str, ...], residual: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The inputs of the named linear layers of one half, as in `group_input`, and what `sublayer_forward` returns."""
        with _Watch(block, layers) as seen:
            return seen, self.sublayer_forward(block, sublayer, residual)

    def trace(
        self, block: nn.Module, layers: tuple[str, ...], hidden: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The inputs of the named linear layers, {name: float32 [windows * context, in_features]}, and the output.

        Args:
            block: from `load` or `share`.
            layers: names relative to the block.
            hidden: the block's input, float32 [windows, context, hidden].
        """
        with _Watch(block, layers) as seen:
            return seen, self.forward(block, hidden)

    def input_of(self, block: nn.Module, layer: str, hidden: torch.Tensor) -> torch.Tensor:
        """The input of one linear layer, as in `trace`; nothing behind that layer is computed."""
        with _Watch(block, (layer,), stop=True) as seen, suppress(_Reached):
            self.forward(block, hidden)
        return seen[layer]

    def _run_module(self, block: nn.Module, sublayer: Sublayer, residual: torch.Tensor) -> torch.Tensor:
        normed = block.get_submodule(sublayer.norm)(residual)
        module = block.get_submodule(sublayer.module)
        # Attention returns its weights too, and an mlp with experts what its router said.
        output = (
            module(normed, **self._positions(block, residual)) if sublayer.module == "self_attn" else module(normed)
        )
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _positions(self, block: nn.Module, hidden: torch.Tensor) -> dict[str, Any]:
        """What attention wants to know; without a mask, transformers' scaled-dot-product attention is causal."""
        index, context = _number(block), hidden.shape[1]
        positions = torch.arange(context, device=hidden.device)
        # A model with different ropes has one object for all.
        kind = (self._layer_types[index],) if isinstance(getattr(self._rotary, "rope_type", None), dict) else ()
        mask = None
        window = self.family.sliding_window(index)
        if window is not None and window < context:
            distance = positions[:, None] - positions
            mask = ((distance >= 0) & (distance < window))[None, None]
        embeddings = self._rotary(hidden, positions[None], *kind)
        return {"position_embeddings": embeddings, "position_ids": positions[None], "attention_mask": mask}


def _attention(device: torch.device) -> str:
    """The implementation to ask transformers for: on CUDA devices one in bfloat16, whose kernels are ten times as fast
    as those for float32."""
    if device.type != "cuda":
        return "sdpa"
    from transformers import AttentionInterface

    AttentionInterface.register("sdpa_bfloat16", _bfloat16_attention)
    return "sdpa_bfloat16"


def _bfloat16_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output, _ = sdpa_attention_forward(module, query.bfloat16(), key.bfloat16(), value.bfloat16(), *rest, **options)
    return output.to(query.dtype), None


class _Watch:
    """Collects what reaches some layers of a block during a with block."""

    def __init__(self, block: nn.Module, layers: tuple[str, ...], *, stop: bool = False) -> None:
        self.block, self.layers, self.stop = block, layers, stop

    def __enter__(self) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}

        def hook_for(name: str) -> Callable[[nn.Module, Any], None]:
            def hook(_: nn.Module, arguments: Any) -> None:
                seen[name] = arguments[0].reshape(-1, arguments[0].shape[-1])
                if self.stop:
                    raise _Reached

            return hook

        self.handles = [
            self.block.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in self.layers
        ]
        return seen

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _number(block: nn.Module) -> int:
    """Which block of the model this is."""
    number = block.get_submodule("self_attn").layer_idx
    if not isinstance(number, int):
        raise TypeError("an attention layer doesn't know its number")
    return number
