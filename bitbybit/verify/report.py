"""What a parity check found, and when it counts as passed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

MAX_RELATIVE_ERROR = 1e-5  # of a layer's output, given equal codes, against its largest value
MAX_BIT_RATE = 1e-5  # code bits that may differ
MAX_BIT_MARGIN = 1e-5  # |P x| / (|P| |x|) up to which rounding may decide a bit
MIN_AGREEMENT = 0.9999  # top-1, end to end
MAX_REST_ERROR = 1e-4  # of logits against the largest one: what float layers behind the last hashed one may round


@dataclass
class LayerParity:
    """One layer of one program against PyTorch.

    Attributes:
        name: module path.
        bits: code bits compared.
        differing_bits: of them, those that differ.
        bit_margin: largest ``|P x| / (|P| |x|)`` among those.
        max_error: largest absolute difference of the output, given equal codes.
        max_value: largest absolute output.
        integer: whether the layer is in integer arithmetic: codes and norms must be equal.
        exact_output: whether its outputs must be, too.
        differing_norms: norms that differ.
        input_error: largest absolute difference of the input that the layer was given from PyTorch's.
        input_value: largest absolute input.
    """

    name: str
    bits: int = 0
    differing_bits: int = 0
    bit_margin: float = 0.0
    max_error: float = 0.0
    max_value: float = 0.0
    integer: bool = False
    exact_output: bool = False
    differing_norms: int = 0
    input_error: float = 0.0
    input_value: float = 0.0

    def add_codes(self, bits: int, differing: int, margin: float) -> None:
        """Counts the code bits of a batch."""
        self.bits += bits
        self.differing_bits += differing
        self.bit_margin = max(self.bit_margin, margin)

    def add_output(self, ours: Tensor, theirs: Tensor) -> None:
        """Measures the outputs of a batch; a value that is not finite counts as an infinite error."""
        self.max_error = max(self.max_error, _error(ours, theirs))
        self.max_value = max(self.max_value, float(ours.abs().max()))

    def add_input(self, ours: Tensor, theirs: Tensor) -> None:
        """Measures the inputs of a batch, alike."""
        self.input_error = max(self.input_error, _error(ours, theirs))
        self.input_value = max(self.input_value, float(ours.abs().max()))

    @property
    def relative_error(self) -> float:
        """Largest error over the largest value."""
        return self.max_error / self.max_value if self.max_value else self.max_error

    @property
    def problem(self) -> str:
        """Why the layer fails, or an empty string."""
        if self.integer:
            return self._integer_problem
        if self.differing_bits and self.bit_margin > MAX_BIT_MARGIN:
            return f"a code bit differs at {self.bit_margin:.1e} of the full projection, beyond rounding"
        if self.differing_bits > 1 and self.differing_bits > MAX_BIT_RATE * self.bits:
            return f"{self.differing_bits} of {self.bits} code bits differ"
        if not self.relative_error <= MAX_RELATIVE_ERROR:
            return f"output differs by {self.relative_error:.1e} of its largest value, given equal codes"
        return ""

    @property
    def _integer_problem(self) -> str:
        """Why a layer in integer arithmetic fails: a tolerance is left to what exact layers made of the input."""
        if not self.input_error <= MAX_RELATIVE_ERROR * self.input_value:
            return f"input differs by {self.input_error / (self.input_value or 1):.1e} of its largest value"
        if self.differing_bits:
            return f"{self.differing_bits} of {self.bits} code bits differ, given an equal input"
        if self.differing_norms:
            return f"{self.differing_norms} norms differ, given an equal input"
        limit = 0.0 if self.exact_output else MAX_RELATIVE_ERROR
        if not self.relative_error <= limit:
            return f"output differs by {self.relative_error:.1e} of its largest value, given equal codes and norms"
        return ""


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max()) if torch.isfinite(theirs).all() else float("inf")


@dataclass
class ProgramParity:
    """One program against PyTorch, end to end and by layer.

    Attributes:
        name: of the program.
        accuracy: top-1, 0..1; None without labels.
        agreement: share of samples with PyTorch's top-1.
        disagreements: indices of the other samples (the first 100).
        max_logit_error: largest absolute difference of a logit.
        max_logit: largest absolute logit.
        rounding_ties: samples that agree once PyTorch quantises the program's own float values: an exact layer's
            sum lay within rounding of the middle between two levels.
        integer: whether every hashed layer is in integer arithmetic: logits must agree, up to exact layers' rounding.
        rest_error: largest difference of a logit over the largest logit, given the program's own hashed layers: what
            the layers behind the last of them differ by.
        samples: compared end to end.
        layer_samples: compared layer by layer.
        layers: in graph order.
    """

    name: str
    accuracy: float | None
    agreement: float
    disagreements: list[int]
    max_logit_error: float
    samples: int
    layer_samples: int
    layers: list[LayerParity] = field(default_factory=list)
    max_logit: float = 0.0
    rounding_ties: int = 0
    integer: bool = False
    rest_error: float = 0.0

    @property
    def first_departing_layer(self) -> str:
        """The first layer with a problem, or an empty string."""
        return next((layer.name for layer in self.layers if layer.problem), "")

    @property
    def problems(self) -> list[str]:
        """Why the program fails; empty where it passes."""
        found = [f"{self.name}: layer {layer.name}: {layer.problem}" for layer in self.layers if layer.problem]
        if self.agreement < MIN_AGREEMENT:
            lost = round((1 - self.agreement) * self.samples)
            found.append(f"{self.name}: top-1 differs from PyTorch on {lost} of {self.samples} samples")
        if not self.rest_error <= MAX_REST_ERROR:
            found.append(
                f"{self.name}: logits differ by {self.rest_error:.1e} of the largest, given equal hashed layers"
            )
        if self.integer and not self.max_logit_error <= MAX_RELATIVE_ERROR * self.max_logit:
            share = self.max_logit_error / (self.max_logit or 1)
            found.append(f"{self.name}: logits differ by {share:.1e} of the largest")
        return found


@dataclass
class ParityReport:
    """The whole check.

    Attributes:
        artifact: file name.
        artifact_sha256: of the file.
        checkpoint_sha256: of the network it was compared with.
        torch_accuracy: top-1 of the hashed network in PyTorch, in the artifact's arithmetic, 0..1;
            None without labels.
        float32_accuracy: the same in PyTorch's plain float32, where rounding decides ties.
        float32_agreement: share of samples on which those two have the same top-1.
        programs: one entry for each program.
    """

    artifact: str
    artifact_sha256: str
    checkpoint_sha256: str
    torch_accuracy: float | None
    float32_accuracy: float | None
    float32_agreement: float
    programs: list[ProgramParity]

    @property
    def passed(self) -> bool:
        """Whether every program passed."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """All reasons for failure."""
        return [problem for program in self.programs for problem in program.problems]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        programs = []
        for program in self.programs:
            entry = asdict(program)
            for layer, row in zip(program.layers, entry["layers"], strict=True):
                row |= {"relative_error": layer.relative_error, "problem": layer.problem}
            entry |= {"first_departing_layer": program.first_departing_layer, "problems": program.problems}
            programs.append(entry)
        return {
            "artifact": self.artifact,
            "artifact_sha256": self.artifact_sha256,
            "checkpoint_sha256": self.checkpoint_sha256,
            "passed": self.passed,
            "torch_accuracy": self.torch_accuracy,
            "float32_accuracy": self.float32_accuracy,
            "float32_agreement": self.float32_agreement,
            "programs": programs,
        }
