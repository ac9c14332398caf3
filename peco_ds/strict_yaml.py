"""YAML of plain values, read strictly: recipes, recorded settings, descriptions of machines."""

from __future__ import annotations

from pathlib import Path

import yaml

from peco_ds.schema import short

# PyYAML lets these through, beside its own error, for text of the right form without a value (a 13th month) or nested
# without end.
NOT_YAML = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)

# More than any recipe or record of settings. PyYAML takes seconds for so much, and minutes for a megabyte.
_MAX_BYTES = 1 << 17


class _StrictLoader(yaml.SafeLoader):
    """Plain values only.

    A key that stands twice and an alias are refused: the one hides a setting, the other makes gigabytes out of ten
    lines.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"alias *{event.anchor}: aliases are not read, write the value again", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {short(key.value)} stands twice", key.start_mark
                )
            seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def parse_yaml(text: str):
    """The value of a YAML text. Raises: one of `NOT_YAML`."""
    return yaml.load(text, _StrictLoader)


def parse_value(text: str):
    """As `parse_yaml`, for a value on a command line: what follows a # is not dropped, since nobody comments there."""
    # These two end behind a comment, whatever stands before it.
    ends = (yaml.StreamEndToken, yaml.BlockEndToken)
    tokens = [token for token in yaml.scan(text, _StrictLoader) if not isinstance(token, ends)]
    if text[max(token.end_mark.index for token in tokens) :].strip():
        raise ValueError(f"# begins a comment in {short(text)}")
    return parse_yaml(text)


def read_yaml(path: Path):
    """The value of a YAML file. Raises: one of `NOT_YAML`."""
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path.stat().st_size} bytes, at most {_MAX_BYTES} are read")
    return parse_yaml(path.read_text(encoding="utf-8"))
