"""Running a checkpoint one decoder block at a time, through transformers' own modules.

Knows how to build a block, fill it with the checkpoint's weights and run it, or run it just far enough to see the input
of one of its layers. Does not know about quantization: pipeline.py changes the weights. Only one block is in memory.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForCausalLM

from d2q_edge.checkpoint import Checkpoint
from d2q_edge.errors import D2QError
from d2q_edge.families import Family, Stage


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
            config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        except Exception as error:
            # There is no one exception for what can be wrong in a stranger's config.
            raise D2QError(f"transformers can't build the model of {checkpoint.directory} ({error})") from error
        self._layers = model.model.layers
        self._final_norm: nn.Module = model.model.norm
        self._norm_biases: list[RemovableHandle] = []
        # Made anew outside the meta device: its frequencies are computed, not loaded.
        self._rotary: nn.Module = type(model.model.rotary_emb)(config=config).to(device)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings of token ids [windows, context]: float32 [windows, context, hidden], on the CPU."""
        table = self.checkpoint.tensor(f"{self.family.embedding}.weight")
        return table[tokens].float()

    def load(self, index: int) -> nn.Module:
        """Block `index` with the checkpoint's weights, in float32.

        Raises:
            D2QError: a weight is NaN or infinite, or can't be read.
        """
        prefix = self.family.block_prefix(index)
        block: nn.Module = self._layers[index]
        names = [name for name in self.family.tensor_shapes() if name.startswith(prefix)]
        weights = {
            name.removeprefix(prefix): self.checkpoint.tensor(name).to(self.device, torch.float32) for name in names
        }
        block.load_state_dict(weights, assign=True)
        return block.eval().requires_grad_(False)

    def unload(self, index: int) -> None:
        """Free the weights of block `index`."""
        for handle in self._norm_biases:
            handle.remove()
        self._norm_biases.clear()
        self._layers[index].to("meta")

    def add_norm_bias(self, block: nn.Module, norm: str, bias: torch.Tensor) -> None:
        """Let a norm of the loaded block, by its name in the block, add a bias [channels] to its output."""
        self._norm_biases.append(add_bias(block.get_submodule(norm), bias.to(self.device)))

    def final_norm(self) -> nn.Module:
        """The norm before the head, with the checkpoint's weight, in float32."""
        norm = self._final_norm
        weight = self.checkpoint.tensor(f"{self.family.final_norm}.weight").to(self.device, torch.float32)
        norm.load_state_dict({"weight": weight}, assign=True)
        return norm.eval().requires_grad_(False)

    def forward(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output for hidden states [windows, context, hidden], float32 on the runner's device."""
        output: torch.Tensor = block(hidden, **self._positions(hidden))
        return output

    def stage_input(self, block: nn.Module, stage: Stage, residual: torch.Tensor) -> torch.Tensor:
        """The input of a stage's layers, float32 [windows * context, in_features].

        Args:
            block: from `load`.
            stage: of the block.
            residual: the residual stream that the stage's half of the block reads, float32 [windows, context, hidden].
        """
        if stage.norm is not None:
            normed: torch.Tensor = block.get_submodule(stage.norm)(residual)
            return normed.flatten(0, -2)
        layer = stage.linears[0]
        half = layer.split(".")[0]
        # The stages of a half are neighbours; the norm is that of its first one.
        norm = next(other.norm for other in self.family.stages if other.norm and other.linears[0].split(".")[0] == half)
        normed = block.get_submodule(norm)(residual)
        options = self._positions(residual) | {"attention_mask": None} if half == "self_attn" else {}
        with _Watch(block, (layer,), stop=True) as seen, suppress(_Reached):
            block.get_submodule(half)(normed, **options)
        return seen[layer]

    def _positions(self, hidden: torch.Tensor) -> dict[str, Any]:
        """What attention wants to know; without a mask, transformers' scaled-dot-product attention is causal."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        return {"position_embeddings": self._rotary(hidden, positions), "position_ids": positions}

    def trace(
        self, block: nn.Module, layers: tuple[str, ...], hidden: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The inputs of the named linear layers, {name: float32 [windows * context, in_features]}, and the output.

        Args:
            block: from `load`.
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
