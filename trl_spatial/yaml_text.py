"""Reads YAML that a user wrote; a repeated key is an error."""

from typing import Any

import yaml


class _UniqueKeysLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                problem = f"{key.value!r} appears on line {lines[key.value]} and again on line {line}: keep one"
                raise yaml.constructor.ConstructorError(problem=problem)
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """
    Reads YAML as `yaml.safe_load` does, except that a key that appears twice in a mapping raises `yaml.YAMLError`, where
    `safe_load` silently keeps the last value.
    """
    return yaml.load(text, _UniqueKeysLoader)
