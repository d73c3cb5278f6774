"""Open unions: kinds of dataclasses told apart by their `type`, to which anyone can add one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from fedkl.errors import ConfigError, shown

_Kind = TypeVar("_Kind")
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, str_max_length=4096)


class Kinds(Generic[_Kind]):
    """The registered classes of one noun, in the order of their registration.

    As an annotation, ``Annotated[Defense, DEFENSES]``, it lets pydantic read and write a field: the table's
    `type` says which class is meant. What is registered later is known to fields that exist already.

    Args:
        noun: What they are, for messages: "defense".
        base: What all of them derive from.
    """

    def __init__(self, noun: str, base: type[_Kind]) -> None:
        self._noun = noun
        self._base = base
        self._classes: dict[str, type[_Kind]] = {}
        self._adapters: dict[str, Any] = {}

    def register(self, kind: type[_Kind]) -> type[_Kind]:
        """Adds a class; a decorator, to be put above `dataclass`.

        Args:
            kind: A frozen dataclass with a field `type` whose default is its name in configurations. The
                other fields are its options, and need defaults and types that pydantic can read.

        Raises:
            ConfigError: It is no such class, or its name is taken.
        """
        name = self._name_of(kind)
        known = self._classes.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            kind.__module__,
            kind.__qualname__,
        ):
            raise ConfigError(
                f"{kind.__qualname__}: the {self._noun} '{name}' is there already, as "
                f"{'.'.join(_place(known))}. Choose another type."
            )
        if "__pydantic_config__" not in vars(kind):
            kind.__pydantic_config__ = _STRICT  # type: ignore[attr-defined]
        self._classes[name] = kind
        self._adapters.pop(name, None)
        return kind

    def forget(self, name: str) -> None:
        """Takes a class out again, as a test does that added one; nothing where there is none."""
        self._classes.pop(name, None)
        self._adapters.pop(name, None)

    def _name_of(self, kind: type[Any]) -> str:
        problem = None
        if not (isinstance(kind, type) and issubclass(kind, self._base) and is_dataclass(kind)):
            problem = f"expected a dataclass that derives from {self._base.__name__}"
        else:
            name = next((field.default for field in fields(kind) if field.name == "type"), None)
            if isinstance(name, str) and name.replace("-", "").isalnum():
                return name
            problem = 'expected a field `type: Literal["my-name"] = "my-name"`'
        raise ConfigError(f"register_{self._noun}: {problem}, got {shown(repr(kind))}.")

    def names(self) -> tuple[str, ...]:
        """The registered types."""
        return tuple(self._classes)

    def __iter__(self) -> Iterator[type[_Kind]]:
        return iter(tuple(self._classes.values()))

    def __getitem__(self, name: str) -> type[_Kind]:
        """The class of a type.

        Raises:
            ConfigError: There is none.
        """
        if name not in self._classes:
            raise ConfigError(f"{self._noun}: {self._unknown(name)}")
        return self._classes[name]

    def _unknown(self, name: object) -> str:
        return f"unknown type {shown(str(name))}. Choose from {', '.join(self._classes)}, or register yours."

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """How pydantic reads and writes a field of this kind."""
        return core_schema.no_info_plain_validator_function(
            self._read,
            serialization=core_schema.plain_serializer_function_ser_schema(self._written, info_arg=True),
        )

    def _read(self, value: Any) -> Any:
        if isinstance(value, self._base):
            return value
        if not isinstance(value, dict) or not isinstance(value.get("type"), str):
            raise PydanticCustomError("kind", "expected a table with a `type`")
        name = value["type"]
        if name not in self._classes:
            text = self._unknown(name).replace("{", "{{").replace("}", "}}")
            raise PydanticCustomError("kind", text)
        try:
            return self._adapter(name).validate_python(value)
        except ValidationError as error:  # with the type in the place, as pydantic names a union's members
            found = error.errors(include_url=False, include_context=False)
            raise ValidationError.from_exception_data(
                error.title, [_below(name, each) for each in found]
            ) from error

    def _written(self, value: Any, info: Any) -> Any:
        return self._adapter(value.type).dump_python(value, mode="json" if info.mode == "json" else "python")

    def _adapter(self, name: str) -> Any:
        if name not in self._adapters:
            self._adapters[name] = TypeAdapter(self._classes[name])
        return self._adapters[name]


def _below(name: str, error: Any) -> InitErrorDetails:
    return InitErrorDetails(
        type=PydanticCustomError(error["type"], "{said}", {"said": error["msg"]}),
        loc=(name, *error["loc"]),
        input=error["input"],
    )


def import_all(package: str) -> None:
    """Imports every module of a package, whose classes register themselves.

    Args:
        package: Its name.
    """
    folder = importlib.import_module(package).__path__
    for module in sorted(each.name for each in pkgutil.iter_modules(folder)):
        importlib.import_module(f"{package}.{module}")


def _place(kind: type[Any]) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__
