"""Settings of a recipe: one flat frozen dataclass whose fields are the flags and the keys of its YAML file.

`--config x.yaml` gives the defaults and flags win. A field's type says how a value is read: bool, int, float, str,
Literal, `X | None`, tuple, list, dict[str, Any]; `setting` gives it a default and a line in `--help`.
"""

import argparse
import dataclasses
import reprlib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from timm_igkd.errors import InputError, MissingFileError, nearest
from timm_igkd.files import dump_yaml, load_yaml, write_atomic

Config = TypeVar("Config")

_SHORT = reprlib.Repr()  # of a value in a message; the whole of one can be endless
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlist, _SHORT.maxdict = 200, 200, 20, 20
_NONE_TEXTS = ("none", "null")


def setting(text: str, default: Any, **more: Any) -> Any:
    """Return a field of a dataclass of settings.

    Args:
        text: its line in `--help`.
        default: its value where none is given; of a dict or list every instance gets a copy.
        more: what else its metadata holds.
    """
    metadata = {"help": text, **more}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are an InputError of one line, without a usage dump."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise InputError(f"{message}; see --help")


def parse_config(
    cls: type[Config], argv: Sequence[str], prog: str | None = None, description: str | None = None
) -> Config:
    """Return an instance of the dataclass `cls` from its defaults, the file of `--config`, and flags, the last winning.

    Args:
        cls: dataclass; a field without a default must be given by the file or a flag.
        argv: arguments without the program's name, e.g. `sys.argv[1:]`; `--batch-size` and `--batch_size` are one.
        prog: program name in `--help`.
        description: first lines of `--help`.

    Raises:
        InputError: unknown, missing or repeated key, unknown flag, or a value that does not fit its field's type.
        MissingFileError: the file of `--config` does not exist.
    """
    annotations = get_type_hints(cls)
    flags, unknown = _create_parser(cls, annotations, prog, description).parse_known_args(with_hyphens(argv))
    names = [field.name for field in _fields(cls)]
    if unknown:
        options = ["--config", *(flag_of(name) for name in names)]
        raise InputError(f"unknown argument {unknown[0]!r}{nearest(unknown[0].partition('=')[0], options)}; see --help")
    given = vars(flags)
    config_path = given.pop("config", None)
    values = {} if config_path is None else _read_file(Path(config_path), annotations, names)
    values |= {name: convert_value(flag_of(name), text, annotations[name]) for name, text in given.items()}
    for field in _fields(cls):
        if field.name not in values and _is_required(field):
            raise InputError(f"{flag_of(field.name)} is required: {_type_name(annotations[field.name])}; see --help")
    return cls(**values)


def save_config(config: Any, path: str | Path) -> None:
    """Write every field of the dataclass `config` as YAML that `parse_config` reads back to an equal instance."""
    values = {field.name: _plain(getattr(config, field.name)) for field in _fields(config)}
    write_atomic(Path(path), dump_yaml(values).encode())


def _create_parser(cls: type, annotations: dict[str, Any], prog: str | None, description: str | None) -> OneLineParser:
    parser = OneLineParser(
        prog=prog,
        usage="%(prog)s [--config YAML] [--name value …]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="YAML", help="file of settings; flags win over it")
    for field in _fields(cls):
        annotation = annotations[field.name]
        kinds = [get_origin(member) or member for member in _members(annotation)]
        help_text = f"{field.metadata.get('help', '')} {_default_text(field)}".strip().replace("%", "%%")
        metavar = _type_name(annotation).removesuffix(" …")
        options: dict[str, Any] = {"dest": field.name, "metavar": metavar, "help": help_text}
        if bool in kinds:
            parser.add_argument(flag_of(field.name), nargs="?", const="true", **options)
            negation = f"--no{flag_of(field.name)[1:]}"
            parser.add_argument(negation, dest=field.name, action="store_const", const="false", help=argparse.SUPPRESS)
        elif {tuple, list, dict} & set(kinds):
            parser.add_argument(flag_of(field.name), nargs="*", action="extend", **options)
        else:
            bare = field.metadata.get("bare")
            parser.add_argument(flag_of(field.name), **options, **({"nargs": "?", "const": bare} if bare else {}))
    return parser


def with_hyphens(argv: Sequence[str]) -> list[str]:
    """Write the flags of `argv` with hyphens; values stay."""
    parts = [argument.partition("=") for argument in argv]
    return [
        flag_of(name[2:]) + "".join(rest) if name.startswith("--") else name + "".join(rest) for name, *rest in parts
    ]


def flag_of(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


def _fields(config: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(config) if field.init]


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default_text(field: dataclasses.Field[Any]) -> str:
    if _is_required(field):
        return "(required)"
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    parts = [f"{key}={value}" for key, value in default.items()] if isinstance(default, dict) else default
    shown = " ".join(map(str, parts)) if isinstance(parts, tuple | list) else str(parts)
    shown = shown.lower() if default is None or isinstance(default, bool) else shown
    return f"(default: {shown or 'empty'})"


def _read_file(path: Path, annotations: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the converted settings of a YAML file."""
    if not path.is_file():
        raise MissingFileError(f"--config must be a YAML file, {str(path)!r} does not exist or is no file")
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold `name: value` lines, found {type(content).__name__}")
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise InputError(f"{path} has an unknown key {str(key)!r}{nearest(name, names)}")
        if name in values:
            raise InputError(f"{path} gives {name!r} twice, with a hyphen and with an underscore; remove one")
        values[name] = convert_value(f"{name} in {path}", value, annotations[name])
    return values


def convert_value(name: str, value: Any, annotation: Any) -> Any:
    """Convert a value; the error names it, the expected type and the value."""
    try:
        return _convert(value, annotation)
    except (ValueError, OverflowError) as error:
        is_text = annotation in (str, str | None) and not isinstance(value, str)
        raise wrong_value(name, value, annotation, "; put it in quotes" if is_text else "") from error


def wrong_value(name: str, value: Any, annotation: Any, hint: str = "") -> InputError:
    """Return the error of a value that does not fit its type; it ends with a hint, or the nearest of choices."""
    words = isinstance(value, list) and all(isinstance(part, str) for part in value)
    found = " ".join(_SHORT.repr(" ".join(value) if words else value).splitlines())
    literals = [inner for member in _members(annotation) for inner in (member, *get_args(member))]
    choices = [str(choice) for inner in literals if get_origin(inner) is Literal for choice in get_args(inner)]
    ending = hint or nearest(found.strip("'"), choices)
    return InputError(f"{name} must be {_type_name(annotation)}, got {found}{ending}")


def _convert(value: Any, annotation: Any) -> Any:
    """Convert text of a flag, or a value of YAML, to a type.

    Raises:
        ValueError: the value does not fit the type.
    """
    origin = get_origin(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, annotation)
    if origin is Literal:
        return _choose(value, get_args(annotation))
    if (origin or annotation) in (tuple, list):
        return _convert_sequence(value, annotation)
    if (origin or annotation) is dict:
        return _convert_dict(value, annotation)
    return _convert_scalar(value, annotation)


def _choose(value: Any, choices: Sequence[Any]) -> Any:
    for choice in choices:
        if str(choice) == str(value):
            return choice
    raise ValueError(value)


def _convert_union(value: Any, annotation: Any) -> Any:
    members = get_args(annotation)
    text = value[0] if isinstance(value, list) and len(value) == 1 else value
    if types.NoneType in members and (text is None or (isinstance(text, str) and text.lower() in _NONE_TEXTS)):
        return None
    for member in _members(annotation):
        try:
            return _convert(value, member)
        except ValueError:
            continue
    raise ValueError(value)


def _convert_sequence(value: Any, annotation: Any) -> Any:
    kind = get_origin(annotation) or annotation
    if not isinstance(value, list):
        raise ValueError(value)
    arguments = get_args(annotation) or (Any, ...)
    if kind is list or arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    return kind(_convert(part, argument) for part, argument in zip(value, arguments, strict=True))  # strict: ValueError


def read_value(text: str) -> Any:
    """Return the value of `key=value` on a command line, read as YAML; `none` is None."""
    return None if text.lower() in _NONE_TEXTS else load_yaml(text)


def _convert_dict(value: Any, annotation: Any) -> dict[str, Any]:
    """Convert a mapping of YAML, or the words `key=value …` of a flag, whose values are YAML."""
    if isinstance(value, list):
        pairs = [part.partition("=") for part in value if isinstance(part, str)]
        if len(pairs) != len(value) or not all(key and equals for key, equals, _ in pairs):
            raise ValueError(value)
        texts = {key: text for key, _, text in pairs}
        if len(texts) != len(pairs):
            raise ValueError(value)
        value = {key: read_value(text) for key, text in texts.items()}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(value)
    item = (get_args(annotation) or (str, Any))[1]
    return {key: _convert(part, item) for key, part in value.items()}


def _convert_scalar(value: Any, kind: type) -> Any:
    if kind is bool:
        return _choose(str(value).lower(), ("false", "true")) == "true"
    if kind not in (int, float, str):
        raise TypeError(f"parse_config reads no fields of type {kind}")
    if not isinstance(value, str) and (kind is str or type(value) not in (int, kind)):
        raise ValueError(value)
    if kind is str and b"\0" in value.encode():  # no path holds it; what is not UTF-8 is a ValueError of its own
        raise ValueError(value)
    return kind(value)


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union without None, or the type itself."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return (annotation,)
    return tuple(member for member in get_args(annotation) if member is not types.NoneType)


def _type_name(annotation: Any) -> str:
    """Return the words for a type in errors and help."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is types.NoneType:
        return "none"
    if annotation is bool:
        return "true|false"
    if origin in (Union, types.UnionType):
        return "|".join(_type_name(member) for member in arguments)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if (origin or annotation) is dict:
        return "key=value …"
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return f"{_type_name(arguments[0])} …"
    if origin is tuple:
        return " ".join(map(_type_name, arguments))
    return str(getattr(annotation, "__name__", annotation))


def _plain(value: Any) -> Any:
    """Return lists for tuples, at any depth."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value
