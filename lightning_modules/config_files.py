"""Config files looked at before they are parsed: errors say which file and line, and no key is given twice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def check_config_files(arguments: Sequence[str]) -> None:
    """See that every file named by ``--config`` is a mapping in UTF-8 YAML without repeated keys.

    YAML readers take the last of two equal keys in silence. Whether keys mean anything is left to the parser, and so
    are files that are absent.

    Args:
        arguments: Of the command line.

    Raises:
        ValueError: In one line with file and line.
    """
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c"):
            path = Path(value if equals else "".join(arguments[place + 1 : place + 2]))
            if path.is_file():
                _check(path)


def _check(path: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"config: {path} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"config: {path}{line}: is not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"config: {path} must hold sections such as trainer, model and data, it holds {_kind(node)}")
    for key, value in node.value:
        if key.value == "trainer" and not isinstance(value, yaml.MappingNode):
            raise ValueError(
                f"config: {path}: trainer must hold arguments such as max_epochs: 10, it holds {_kind(value)}"
            )
    nodes: list[Any] = [node]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.value in lines and key.tag != "tag:yaml.org,2002:merge":
                    raise ValueError(
                        f"config: {path}, line {line}: key {key.value!r} is already in line {lines[key.value]}"
                    )
                lines[str(key.value)] = line
                nodes.append(value)
        elif isinstance(node, yaml.SequenceNode):
            nodes.extend(node.value)


def _kind(node: Any) -> str:
    return {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}.get(type(node), "nothing")
