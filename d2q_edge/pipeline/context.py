"""Bundle what the steps of the block loop share."""

from dataclasses import dataclass, field

import torch

from d2q_edge.calibration.hidden_states import StreamPair
from d2q_edge.distributed.process_group import ProcessGroup
from d2q_edge.errors import D2QError
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.families import Family
from d2q_edge.pipeline.guidance import Guidance
from d2q_edge.pipeline.kept_inputs import KeptInputs
from d2q_edge.pipeline.report import Report


@dataclass(frozen=True)
class Context:
    """The model, the calibration tokens' hidden states in front of the present block, and who does the work.

    Attributes:
        runner: of the original model's blocks.
        streams: hidden states in the original and in the quantized model.
        processes: that share the batches and the rows of every matrix.
        report: what is measured.
        guidance: weights of the calibration tokens; None counts all alike.
        kept: what a sublayer's last layer reads in the quantized model, until it is solved.
    """

    runner: BlockRunner
    streams: StreamPair
    processes: ProcessGroup
    report: Report
    guidance: Guidance | None = None
    kept: KeptInputs = field(default_factory=lambda: KeptInputs(0))

    @property
    def family(self) -> Family:
        """The model's family."""
        return self.runner.family

    @property
    def device(self) -> torch.device:
        """The computing device."""
        return self.runner.device


class FiniteCheck:
    """Notice activations that are NaN or infinite without waiting for the GPU after every batch."""

    def __init__(self, device: torch.device) -> None:
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    def add(self, hidden: torch.Tensor) -> None:
        """Look at a batch of activations."""
        self._finite &= hidden.isfinite().all()

    def require(self, model: str, layer: str) -> None:
        """Raise D2QError if any of them was NaN or infinite; `model` and `layer` say where."""
        if not bool(self._finite):
            raise D2QError(f"the activations of the {model} model are NaN or infinite after {layer}")


def check_sums(sums: list[torch.Tensor], name: str) -> None:
    """Refuse input statistics that have overflowed, which can happen to finite inputs.

    Raises:
        D2QError: those of the layer `name` have.
    """
    if not all(bool(each.isfinite().all()) for each in sums):
        raise D2QError(
            f"the inputs of {name} are too large to calculate with; the checkpoint may be damaged, or not a language "
            "model's"
        )
