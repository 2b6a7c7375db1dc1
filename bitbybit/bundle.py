"""What is submitted: checkpoints, artifacts and a manifest, validated before anything leaves."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bitbybit.checkpoint import Checkpoint, card_path, load_checkpoint
from bitbybit.errors import BitbybitError, ConfigError
from bitbybit.patching import hash_layers
from bitbybit.utils.files import sha256, write_json
from bitbybit.utils.score import count_operations, score_from_operations
from bitbybit.version import __version__

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """One submitted network.

    Attributes:
        checkpoint: the loaded state dict.
        artifact: the compiled file beside it, or None.
        report: its parity report as JSON, or None.
        score: of the hackathon, or None where the accuracies are not known.
    """

    checkpoint: Checkpoint
    artifact: Path | None
    report: dict[str, Any] | None
    score: float | None

    def files(self) -> list[Path]:
        """Every file of the entry, the checkpoint first."""
        own = self.checkpoint.path
        candidates = [own, card_path(own), own.with_suffix(".onnx"), own.with_suffix(".verify.json")]
        return [path for path in candidates if path.is_file()]


def gather(source: Path) -> list[Entry]:
    """Loads and validates every checkpoint of a folder, with what lies beside it.

    Raises:
        BitbybitError: nothing to submit; a checkpoint is damaged; a card, artifact or report
            belongs to another checkpoint; parity failed; hdops are below flops.
        ArtifactError: an artifact is damaged.
    """
    if not source.is_dir():
        raise BitbybitError(f"{source}: no such folder; expected one with MODEL.pth files (pass --source)")
    checkpoints = sorted(source.glob("*.pth"))
    if not checkpoints:
        raise BitbybitError(f"{source}: no .pth files; save a state dict there, or pass --source")
    return [_entry(path) for path in checkpoints]


def _entry(path: Path) -> Entry:
    checkpoint = load_checkpoint(path)
    if not hash_layers(checkpoint.model):
        raise BitbybitError(f"{path}: hashes no layer; submit a patched and fine-tuned network")
    if card_path(path).name == MANIFEST:
        raise BitbybitError(f"{path}: its card would be the bundle's {MANIFEST}; rename the checkpoint")
    artifact = path.with_suffix(".onnx")
    report_path = path.with_suffix(".verify.json")
    report = None
    if artifact.is_file():
        _check_artifact(artifact, checkpoint)
    if report_path.is_file():
        report = _read_report(report_path, artifact)
        _check_accuracy(path, checkpoint, report)
    return Entry(checkpoint, artifact if artifact.is_file() else None, report, _score(path, checkpoint))


def _check_artifact(artifact: Path, checkpoint: Checkpoint) -> None:
    from runtime.loader import load_model

    compiled_from = load_model(artifact).metadata.checkpoint_sha256
    if compiled_from != checkpoint.sha256:
        raise BitbybitError(
            f"{artifact}: expected an artifact of {checkpoint.path.name} ({checkpoint.sha256[:12]}...), got one of "
            f"{compiled_from[:12] or 'no file'}...; compile it again"
        )


def _read_report(path: Path, artifact: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        passed, digest = report["passed"], report["artifact_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BitbybitError(f"{path}: not a parity report ({e}); run 'bitbybit verify' again") from e
    if not artifact.is_file() or digest != sha256(artifact):
        raise BitbybitError(f"{path}: made for another artifact; run 'bitbybit verify' again")
    if passed is not True:
        raise BitbybitError(f"{path}: parity failed; a network that answers differently is not submitted")
    return report


def _check_accuracy(path: Path, checkpoint: Checkpoint, report: dict[str, Any]) -> None:
    """Refuses a card whose accuracy is not that of the parity report, within four standard errors of its images."""
    claimed, measured = _accuracy(path, checkpoint, "test_accuracy"), report.get("torch_accuracy")
    samples = max((program.get("samples", 0) for program in report.get("programs", ())), default=0)
    if claimed is not None and measured is not None and samples and abs(claimed - measured) > 2 / samples**0.5:
        raise BitbybitError(
            f"{card_path(path)}: expected test_accuracy near {measured:.4f}, as 'bitbybit verify' found on {samples} "
            f"images, got {claimed:.4f}; export the checkpoint again"
        )


def _score(path: Path, checkpoint: Checkpoint) -> float | None:
    hashed, exact = (_accuracy(path, checkpoint, key) for key in ("test_accuracy", "float_test_accuracy"))
    drop = None if hashed is None or exact is None else exact - hashed
    try:
        value = score_from_operations(count_operations(checkpoint.model), drop or 0.0)
    except ValueError as e:
        raise ConfigError(f"{path}: {e}") from e
    return None if drop is None else value


def _accuracy(path: Path, checkpoint: Checkpoint, key: str) -> float | None:
    """What a card says of an accuracy, or None."""
    value = checkpoint.card.get(key)
    if value is not None and not 0 <= value <= 1:
        raise BitbybitError(f"{card_path(path)}: expected {key} from 0 to 1, got {value}; export the checkpoint again")
    return value


def manifest(entries: list[Entry], team_name: str) -> dict[str, Any]:
    """The manifest: for each network its files with SHA-256, configuration, scores and parity."""
    models = []
    for entry in entries:
        card = entry.checkpoint.card
        operations = count_operations(entry.checkpoint.model)
        models.append(
            {
                "model": entry.checkpoint.name,
                "files": {path.name: {"sha256": sha256(path), "bytes": path.stat().st_size} for path in entry.files()},
                "hash_config": entry.checkpoint.hash_config,
                "accuracy": card.get("test_accuracy"),
                "float_accuracy": card.get("float_test_accuracy"),
                "hdops": operations.hdops,
                "flops": operations.flops,
                "score": entry.score,
                "parity": entry.report,
            }
        )
    return {
        "format_version": 1,
        "team_name": team_name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "bitbybit": __version__,
        "models": models,
    }


def write_bundle(entries: list[Entry], team_name: str, output: Path) -> Path:
    """Copies every file and the manifest into a folder, which appears whole or not at all.

    Returns:
        The manifest's path.

    Raises:
        BitbybitError: ``output`` holds something that is no bundle.
        OSError: it cannot be written.
    """
    place = output.resolve()
    if place.exists() and not _replaceable(place):
        raise BitbybitError(f"{output}: exists and is no bundle; pass another --output")
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.partial")
    earlier = place.with_name(f".{place.name}.earlier")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        for entry in entries:
            for path in entry.files():
                shutil.copyfile(path, partial / path.name)
        write_json(partial / MANIFEST, manifest(entries, team_name))
        if place.exists():
            shutil.rmtree(earlier, ignore_errors=True)
            place.rename(earlier)
        try:
            partial.rename(place)
        except OSError:
            if earlier.exists():
                earlier.rename(place)
            raise
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output / MANIFEST


def _replaceable(folder: Path) -> bool:
    """Whether a folder is empty, or a bundle and nothing else: every file is in its manifest."""
    if not folder.is_dir():
        return False
    present = {path.name for path in folder.iterdir()}
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = {name for model in content["models"] for name in model["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return not present
    return present <= listed | {MANIFEST}
