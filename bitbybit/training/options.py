"""What a training run is told, as one frozen record that is stored beside its results."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from bitbybit.errors import ConfigError
from bitbybit.noise import NoiseSpec
from bitbybit.spec import INTEGER
from bitbybit.utils.devices import pick_device

BY_NETWORK: Any = None  # replaced by what suits the network, as soon as the options are made


@dataclass(frozen=True)
class TrainOptions:
    """Settings of one run; ``bitbybit train`` has the same defaults.

    Attributes:
        model: a backbone's name, as ``get_backbone`` takes it.
        dataset: a data set's name; from the model's name when empty.
        data_dir: folder of the data set.
        weights: state dict to start from; the float teacher of a hashed run. Empty: whatever
            ``get_backbone`` finds for a hashed run, random initialisation for a float run.
        start: state dict of a hashed network to start from, as ``bitbybit convert`` makes it; empty: the float
            network is converted first.
        hash_config: configuration for ``patch_model``; None trains the float network.
        epochs: passes over the training images.
        batch_size: images in a step.
        optimizer: ``"adam"`` or ``"sgd"`` (Nesterov, momentum 0.9); sgd for a float network, else adam.
        lr: peak learning rate of weights, biases and batch norm; 0.2 for a float network, else 0.001.
        lr_projection: peak learning rate of learned projections; 0 in integer arithmetic, else 0.0005.
        lr_codes: peak learning rate of latent weight codes (integer arithmetic).
        code_share: share of a batch's images that the gradient of weight codes is taken from (integer arithmetic);
            the rest adds what a straight line through the signs tells. 1 on a GPU, else 0.25.
        weight_decay: L2 penalty on convolution and linear weights; 0.0005 for a float network, else 0.
        warmup: share of the steps in which the rate rises linearly; then it falls as a cosine. 0.2 for a float
            network, else 0.05.
        label_smoothing: of the cross entropy.
        distill: weight of the float teacher's soft targets in the loss, 0..1.
        hints: weight of the mean square error of each block's output against the float network's, in units of its
            variance; see ``bitbybit.training.hints``.
        temperature: of the distillation's softmax.
        teachers: more float networks, whose soft targets are averaged with those of the one that was hashed: a state
            dict of the same backbone, or ``NAME=PATH`` for one of another.
        repeat_epochs: epochs after which batches come again, crops and all, and the float networks' answers to them
            are read from files; 0: every epoch has its own crops, and asks.
        answers_dir: folder of those files, which runs may share; empty: the run's own.
        holdout: training images held out to choose the epoch, at most a fifth of all; 0 trains on all, keeps the last.
        calibration: training images from which centres and batch-norm statistics are taken, and to which layers are
            fitted.
        projection_steps: of fitting each layer's learned projections before the first epoch (integer arithmetic).
        frozen_norms: batch norm uses the float network's statistics, and learns its scale and shift alone. An estimate
            fitted to data has less variance than what it estimates; batch statistics would make it, noise and all,
            as large again. By default in integer arithmetic.
        noise: fields of ``bitbybit.noise.NoiseSpec``: errors of an analog array to train under, a new chip at every
            step; None: exact. Held-out and test accuracy are measured without.
        seed: of initialisation, order and augmentation.
        device: ``"cpu"``, ``"cuda"``; empty takes CUDA where there is one.
        precision: of products in the forward and backward pass, ``"float32"`` or ``"bfloat16"``
            (sums, weights and statistics stay float32); empty takes bfloat16 where the processor
            has it, and a run keeps to what it took. Held-out and test accuracy are always measured in float32.

    Raises:
        ConfigError: a value is out of range, or does not go with another.
    """

    model: str
    dataset: str = ""
    data_dir: str = "data"
    weights: str = ""
    start: str = ""
    hash_config: dict[str, Any] | None = None
    epochs: int = 10
    batch_size: int = 128
    optimizer: str = BY_NETWORK
    lr: float = BY_NETWORK
    lr_projection: float = BY_NETWORK
    lr_codes: float = 1e-2
    code_share: float = BY_NETWORK
    weight_decay: float = BY_NETWORK
    warmup: float = BY_NETWORK
    label_smoothing: float = 0.0
    distill: float = 0.0
    hints: float = 0.0
    temperature: float = 4.0
    teachers: tuple[str, ...] = ()
    repeat_epochs: int = 0
    answers_dir: str = ""
    holdout: int = 5000
    calibration: int = 1024
    projection_steps: int = 150
    frozen_norms: bool = BY_NETWORK
    noise: dict[str, Any] | None = None
    seed: int = 0
    device: str = ""
    precision: str = ""

    def __post_init__(self) -> None:
        if not self.dataset:
            object.__setattr__(self, "dataset", self.model.split("_")[0])
        if isinstance(self.teachers, str):
            raise ConfigError(f"teachers: expected a list of files, got the text {self.teachers!r}")
        object.__setattr__(self, "teachers", tuple(self.teachers))  # a list where it was read from JSON
        for name, value in self._suited().items():
            if getattr(self, name) is BY_NETWORK:
                object.__setattr__(self, name, value)
        for name in ("epochs", "batch_size", "calibration"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in (
            "lr",
            "lr_projection",
            "lr_codes",
            "weight_decay",
            "holdout",
            "hints",
            "repeat_epochs",
            "projection_steps",
        ):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: expected a value of 0 or more, got {getattr(self, name)}")
        for name in ("distill", "warmup", "label_smoothing", "code_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature: expected a value above 0, got {self.temperature}")
        if self.hash_config is None:
            self._check_float()
        if self.teachers and self.distill == 0:
            raise ConfigError("teachers: expected a weight for their answers, got distill 0; pass --distill 0.7")
        if self.repeat_epochs and self.distill == 0:
            raise ConfigError("repeat_epochs: expected a float network to ask, got none; pass --distill 0.7")
        if self.repeat_epochs and self.hints > 0:
            raise ConfigError(
                f"repeat_epochs: expected hints 0, got {self.hints}: they look inside the float network at every step; "
                "leave one of the two out"
            )
        if self.optimizer not in ("adam", "sgd"):
            raise ConfigError(f"optimizer: expected 'adam' or 'sgd', got {self.optimizer!r}")
        if self.precision not in ("", "float32", "bfloat16"):
            raise ConfigError(f"precision: expected 'float32' or 'bfloat16', got {self.precision!r}")
        if self.noise is not None:
            try:
                NoiseSpec(**self.noise)
            except TypeError as e:
                raise ConfigError(f"noise: expected fields of NoiseSpec, got {self.noise!r}") from e

    def _suited(self) -> dict[str, Any]:
        """What suits the network, for each option that is left to it."""
        if self.hash_config is None:
            found: dict[str, Any] = {"optimizer": "sgd", "lr": 0.2, "weight_decay": 5e-4, "warmup": 0.2}
        else:
            found = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "warmup": 0.05}
        layers = [layer for layer in (self.hash_config or {}).values() if isinstance(layer, dict)]  # refused later
        integer = any(layer.get("arithmetic") == INTEGER for layer in layers)
        found |= {"lr_projection": 0.0 if integer else 5e-4, "frozen_norms": integer}
        if self.code_share is BY_NETWORK:
            found["code_share"] = 1.0 if pick_device(self.device).type == "cuda" else 0.25
        return found

    def _check_float(self) -> None:
        """Refuses what a float network has no use for."""
        for name in ("start", "teachers", "distill", "hints", "repeat_epochs", "noise"):
            if value := getattr(self, name):
                raise ConfigError(
                    f"{name}: expected a hashed network, got a float one, which has no use for {value!r}; leave it out"
                )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainOptions:
        """Reads what ``to_dict`` wrote.

        Raises:
            ConfigError: a key is unknown, or a value is out of range.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown training option {unknown[0]!r}; expected some of {', '.join(sorted(known))}")
        return cls(**values)
