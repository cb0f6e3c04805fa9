"""Dollars per million tokens: the purchase, written off over the working life, and the energy.

``hours of a million tokens * (price / (life * busy) + kW * PUE * $/kWh)``. MoE-CAP's released code charges
the whole purchase to every run and multiplies by constants that are swapped; this does neither.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

HOURS_A_YEAR = 8766.0


@dataclass(frozen=True)
class Listing:
    """A device with its price and power.

    Attributes:
        usd: Price of one device alone, without server or network.
        watts: The maker's limit for the device, not what it draws.
        source: Source of both.
        date: Date of the source.
    """

    usd: float
    watts: float
    source: str
    date: str


_CAP = "cost table of Auto-CAP/MoE-CAP e9e0d88; makers' power limits"
_DATE = "2026-08"
# Keys match the whole of torch.cuda.get_device_name(). Street prices move: give your own with --price-usd.
LISTINGS: dict[str, Listing] = {
    r"NVIDIA A100-SXM4-40GB": Listing(12_000, 400, _CAP, _DATE),
    r"NVIDIA A100-SXM4-80GB": Listing(19_000, 400, _CAP, _DATE),
    r"NVIDIA A100 80GB PCIe": Listing(19_000, 300, _CAP, _DATE),
    r"NVIDIA H100 PCIe": Listing(28_000, 350, _CAP, _DATE),
    r"NVIDIA H100 80GB HBM3": Listing(38_000, 700, _CAP, _DATE),
    r"NVIDIA H200": Listing(35_000, 700, _CAP, _DATE),
    r"NVIDIA RTX A6000": Listing(4_500, 300, _CAP, _DATE),
    r"NVIDIA RTX A5000": Listing(2_400, 230, _CAP, _DATE),
}
USD_PER_KWH, KWH_SOURCE, KWH_DATE = 0.15, "cost_utils.py of Auto-CAP/MoE-CAP e9e0d88", "2026-08"


@dataclass(frozen=True)
class Prices:
    """Costs given by the user; None for those taken from the table.

    Attributes:
        price_usd: Purchase of everything that the systems run on.
        power_watts: Power under load, where energy cannot be measured.
        usd_per_kwh: Electricity.
        pue: Power of the building per watt of the machine.
        life_years: Over which the purchase is written off.
        busy: Share of its life in which the machine works.
    """

    price_usd: float | None = None
    power_watts: float | None = None
    usd_per_kwh: float | None = None
    pue: float = 1.2
    life_years: float = 4.0
    busy: float = 0.5


@dataclass(frozen=True)
class Rates:
    """Costs of an hour, with the source and date of every number.

    Attributes:
        price_usd: Price; None where unknown.
        price_source: Source with its date, or the reason why there is no price.
        power_watts: Power where energy was not measured; None where unknown.
        power_source: Source with its date, or the reason why there is no power.
        usd_per_kwh: Electricity.
        kwh_source: With its date.
        prices: The assumptions.
    """

    price_usd: float | None
    price_source: str
    power_watts: float | None
    power_source: str
    usd_per_kwh: float
    kwh_source: str
    prices: Prices

    def figures(self) -> dict[str, Any]:
        """Returns the figures for programs."""
        assumed = {name: getattr(self.prices, name) for name in ("pue", "life_years", "busy")}
        return {name: value for name, value in vars(self).items() if name != "prices"} | assumed


def find_rates(device: str, prices: Prices, devices: int = 1) -> Rates:
    """Returns the user's numbers, else the table's for this device, else None: no price is guessed.

    Args:
        device: Its name.
        prices: The user's, of everything together.
        devices: Number of devices of the table.
    """
    listing = next((row for pattern, row in LISTINGS.items() if re.fullmatch(pattern, device)), None)
    unknown = f"the table of {_DATE} does not know {device!r}"
    price, price_source = prices.price_usd, "given by the user"
    watts, power_source = prices.power_watts, "given by the user"
    if price is None:
        price, price_source = None, unknown
        if listing is not None:
            price = devices * listing.usd
            price_source = f"{devices} x the device alone; {listing.source}, {listing.date}"
    if watts is None:
        watts, power_source = None, unknown
        if listing is not None:
            watts = devices * listing.watts
            power_source = f"{devices} x the maker's limit, not measured; {listing.source}, {listing.date}"
    kwh, kwh_source = prices.usd_per_kwh, "given by the user"
    if kwh is None:
        kwh, kwh_source = USD_PER_KWH, f"{KWH_SOURCE}, {KWH_DATE}"
    return Rates(price, price_source, watts, power_source, kwh, kwh_source, prices)


def cost_figures(rates: Rates, tokens_per_s: float | None, measured_watts: float | None) -> dict[str, Any]:
    """Computes the dollars per million tokens; None, with the reason, where a part is unknown.

    Args:
        rates: Costs of an hour.
        tokens_per_s: Written, of the whole batch, prefill counted in the time.
        measured_watts: Energy over time where it was measured; goes before the rates' power.
    """
    watts = rates.power_watts if measured_watts is None else measured_watts
    source = rates.power_source if measured_watts is None else "measured"
    prices, reason = rates.prices, None
    purchase = energy = None
    if tokens_per_s is None:
        reason = "nothing was measured"
    else:
        hours = 1e6 / tokens_per_s / 3600
        if rates.price_usd is not None:
            purchase = hours * rates.price_usd / (prices.life_years * HOURS_A_YEAR * prices.busy)
        if watts is not None:
            energy = hours * watts / 1000 * prices.pue * rates.usd_per_kwh
        if purchase is None:
            reason = f"no purchase price: {rates.price_source}; give --price-usd"
        elif energy is None:
            reason = f"no power: {rates.power_source}; give --power-watts"
    total = None if purchase is None or energy is None else purchase + energy
    return {
        "usd_per_mtok": total,
        "purchase_usd_per_mtok": purchase,
        "energy_usd_per_mtok": energy,
        "watts": watts,
        "watts_source": source,
        "reason": reason,
    }
