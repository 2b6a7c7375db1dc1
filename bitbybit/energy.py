"""The energy of one image, estimated from counts and published figures of single operations.

Whole circuits are not modelled: no clock, control, leakage or idle time.  The figures come from chips and simulations
of 45 to 65 nm, so a total says which part dominates and how networks compare, not what a chip would draw.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from bitbybit.costs import LayerCost, NetworkCost

_HOROWITZ = "Horowitz 2014, Computing's energy problem, ISSCC, figure 1.1.9: 45 nm, 0.9 V"


def _pj(value: float, source: str) -> Any:
    return field(default=value, metadata={"source": source})


@dataclass(frozen=True)
class EnergyConstants:
    """Picojoules of one operation; ``sources()`` says where each is from."""

    one_bit_read: float = _pj(
        0.067,
        "Satapathy and Kaur 2023, Circuits Syst. Signal Process. 42:5108: dynamic comparator, 65 nm, 1.2 V, worst case "
        "of post-layout simulation, 67 fJ a comparison",
    )
    analog_mac: float = _pj(
        0.014,
        "Bavandpour, Mahmoodi and Strukov 2017, arXiv:1711.10673: time-domain multiplier, 55 nm, 6 bits, post-layout "
        "estimate of 7 fJ an operation with input and output conversion for arrays above 200 x 200; a multiply-add "
        "is taken as two operations",
    )
    int8_multiply: float = _pj(0.2, _HOROWITZ)
    int8_add: float = _pj(0.03, _HOROWITZ)
    int32_add: float = _pj(0.1, _HOROWITZ)
    float32_multiply: float = _pj(3.7, _HOROWITZ)
    float32_add: float = _pj(0.9, _HOROWITZ)
    code_bit: float = _pj(
        0.005625,
        "derived: a full adder of the count, an eighth of int8_add, and an exclusive-or, taken as half of that",
    )
    table_byte: float = _pj(1.25, f"{_HOROWITZ}: 10 pJ for 64 bits of an 8 KiB cache; a cosine table is smaller")
    sram_byte: float = _pj(2.5, f"{_HOROWITZ}: 20 pJ for 64 bits of a 32 KiB cache")
    dram_byte: float = _pj(162.5, f"{_HOROWITZ}: 1.3 to 2.6 nJ for 64 bits; the lower end")

    @classmethod
    def sources(cls) -> dict[str, str]:
        """Where each figure is from."""
        return {f.name: f.metadata["source"] for f in fields(cls)}


DEFAULT = EnergyConstants()


@dataclass(frozen=True)
class Energy:
    """Energy of one image, in picojoules.

    Attributes:
        projections: analog multiply-adds.
        reads: 1-bit conversions.
        lookups: comparing codes and reading the cosine table.
        multiply_adds: digital.
        additions: digital additions and comparisons.
        memory: on-chip memory: activations, codes and norms once each way, weights once.
        weights_from_dram: what fetching the weights for every image would add; not in ``total``.
    """

    projections: float
    reads: float
    lookups: float
    multiply_adds: float
    additions: float
    memory: float
    weights_from_dram: float

    @property
    def total(self) -> float:
        """Energy of one image with the weights on the chip."""
        return self.projections + self.reads + self.lookups + self.multiply_adds + self.additions + self.memory

    def to_dict(self) -> dict[str, float]:
        """The parts and their total, in picojoules."""
        return asdict(self) | {"total": self.total}


def hashed_energy(costs: NetworkCost, constants: EnergyConstants = DEFAULT) -> Energy:
    """The network as it is: hashed layers on the accelerator, the rest in float32."""
    t, c = costs.total, constants
    float_mac, integer_mac = c.float32_multiply + c.float32_add, c.int8_multiply + c.int32_add
    return Energy(
        projections=t.analog_macs * c.analog_mac,
        reads=t.conversions * c.one_bit_read,
        lookups=t.lookup_bits * c.code_bit + t.table_bytes * c.table_byte,
        multiply_adds=t.float_macs * float_mac + t.integer_macs * integer_mac,
        additions=t.float_additions * c.float32_add + t.integer_additions * c.int32_add,
        memory=(t.traffic_bytes + t.weight_bytes) * c.sram_byte,
        weights_from_dram=t.weight_bytes * c.dram_byte,
    )


def float32_energy(costs: NetworkCost, constants: EnergyConstants = DEFAULT) -> Energy:
    """The same network with no layer hashed, in float32."""
    c = constants
    return _dense(costs.total, c, c.float32_multiply + c.float32_add, c.float32_add, width=4)


def int8_energy(costs: NetworkCost, constants: EnergyConstants = DEFAULT) -> Energy:
    """The same network with no layer hashed, in bytes with 32-bit sums; outputs are rescaled in float32."""
    t, c = costs.total, constants
    rescaling = t.outputs * (c.float32_multiply + c.float32_add)
    return _dense(t, c, c.int8_multiply + c.int32_add, c.int8_add, width=1, more=rescaling)


def _dense(total: LayerCost, c: EnergyConstants, mac: float, add: float, width: int, more: float = 0.0) -> Energy:
    t = total
    return Energy(
        projections=0.0,
        reads=0.0,
        lookups=0.0,
        multiply_adds=t.dense_macs * mac + more,
        additions=t.dense_additions * add,
        memory=width * (t.dense_elements + t.dense_weights) * c.sram_byte,
        weights_from_dram=width * t.dense_weights * c.dram_byte,
    )


def compare_energy(costs: NetworkCost, constants: EnergyConstants = DEFAULT) -> dict[str, Any]:
    """The network, its float32 and its int8 form, with the constants and their sources; JSON-ready.

    Returns:
        ``{"unit": "pJ", "hashed": ..., "float32": ..., "int8": ..., "constants": ..., "sources": ...}``.
    """
    return {
        "unit": "pJ",
        "hashed": hashed_energy(costs, constants).to_dict(),
        "float32": float32_energy(costs, constants).to_dict(),
        "int8": int8_energy(costs, constants).to_dict(),
        "constants": asdict(constants),
        "sources": EnergyConstants.sources(),
    }
