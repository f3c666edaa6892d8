"""How a state dict lies in its file: key prefix, and modules that are registered twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from converters.pickles import quoted
from converters.tables import same_bytes


@dataclasses.dataclass(frozen=True)
class Layout:
    """`prefix`: what stands before every key of the table. `aliases`: prefixes under which the same
    tensors stand again, seen from where the prefix's last part stands: {"decoder.": "decoder."}
    with the prefix "backbone." says that `decoder.X` is `backbone.decoder.X`. `table`: which of a
    family's key tables, where it has more than one.
    """

    prefix: str = ""
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    table: str = ""

    @property
    def outer(self) -> str:
        """The prefix without its last part: where the aliases stand."""
        parts = self.prefix.split(".")
        return "".join(part + "." for part in parts[:-2])

    def strip(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
        """The state dict under the table's keys, the keys dropped as equal copies (with the
        reason), and problems.
        """
        stripped: dict[str, Any] = {}
        copies: dict[str, str] = {}
        problems: list[str] = []
        for key, value in state.items():
            if key.startswith(self.prefix):
                stripped[key[len(self.prefix) :]] = value
                continue
            original = self._original(key)
            if original is None:
                problems.append(
                    f"{quoted(key)}: no rule matches (every other key starts with "
                    f"{quoted(self.prefix)})"
                )
            elif not same_bytes(value, state.get(original)):
                problems.append(
                    f"{quoted(key)}: differs from {quoted(original)}, of which it should be a copy"
                )
            else:
                copies[key] = f"the same tensor as {original}, byte for byte"
        return stripped, copies, problems

    def covers(self, key: str) -> bool:
        """Tell whether a key is of the table or a copy of one, by its beginning."""
        return key.startswith(self.prefix) or self._original(key) is not None

    def _original(self, key: str) -> str | None:
        for alias, target in self.aliases.items():
            if key.startswith(self.outer + alias):
                return self.prefix + target + key[len(self.outer + alias) :]
        return None

    def dress(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `strip`."""
        out = {self.prefix + key: value for key, value in state.items()}
        for alias, target in self.aliases.items():
            out |= {
                self.outer + alias + k[len(target) :]: v
                for k, v in state.items()
                if k.startswith(target)
            }
        return out
