"""A hash of the fields that must agree for the figures of two evaluations to compare."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from pra.evaluation.metrics import KID_SUBSETS, NEIGHBOURS, SEED

PREFIX = 12
"""Characters of a SHA-256 that are shown."""


def known(values: Any, *path: str) -> Any:
    """Return a nested value of a report's provenance; None where a part of the path is missing."""
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def basis(provenance: dict[str, Any], reference: str = "images_sha256") -> dict[str, Any]:
    """Return the fields that must agree for figures to compare; None for fields that a report lacks.

    The reference is the hash of its prepared images, which covers how they were prepared. Reports written before that
    hash existed have the one of the statistics. Protocol fields missing from older reports had a single possible value.
    """
    sha256 = known(provenance, "features", "sha256")
    return {
        "features": sha256 and f"{known(provenance, 'features', 'name')} {sha256}",
        "packages of the features": known(provenance, "features", "versions"),
        "reference": known(provenance, "reference", reference) or known(provenance, "reference", "sha256"),
        "number of images": known(provenance, "count"),
        "subsets of KID": known(provenance, "kid", "subsets") or KID_SUBSETS,
        "seed of the subsets": known(provenance, "seed_of_subsets") or SEED,
        "neighbours of precision and recall": known(provenance, "precision_recall", "neighbours") or NEIGHBOURS,
    }


def comparable_sha256(provenance: dict[str, Any]) -> str:
    """Return the hash under which a report compares: stored in it, or made of its fields."""
    stored = provenance.get("comparable_sha256")
    return stored or hashlib.sha256(json.dumps(basis(provenance), sort_keys=True).encode()).hexdigest()


def differing(first: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields that keep two reports from being compared, with both values; empty where they compare.

    A report that does not name its features or reference does not compare. Where one of two was written before
    references were known by their images, both are known by their statistics.
    """
    if comparable_sha256(first) == comparable_sha256(other) and basis(first)["features"] and basis(first)["reference"]:
        return {}
    by_images = all(known(values, "reference", "images_sha256") for values in (first, other))
    here, there = (basis(values, "images_sha256" if by_images else "sha256") for values in (first, other))
    found = {name: (here[name], there[name]) for name in here if here[name] != there[name] or here[name] is None}
    if None in found.get("packages of the features", ()):
        del found["packages of the features"]
    if "features" in found and not by_images:
        found.pop("reference", None)  # statistics differ by their features already
    return found


def shown(value: Any) -> str:
    """Return a value for a message, hashes shortened."""
    if isinstance(value, dict):
        value = ", ".join(f"{name} {part}" for name, part in value.items())
    return re.sub(rf"\b([0-9a-f]{{{PREFIX}}})[0-9a-f]{{52}}\b", r"\1", "unknown" if value is None else str(value))
