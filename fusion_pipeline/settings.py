"""All settings that a config may have, read off the models that check it."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from experts import EXPERTS, load_expert
from fusion_pipeline.config import Config, ExpertChoice, Hosting
from fusion_pipeline.perceive.tiles import TilesConfig

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_ALIKE = {"scores": "experts", "relevance": "experts", "blur.experts": "experts",
          "caption.engines": "caption.engine"}  # fmt: skip
"""Settings below these are those below others."""


@dataclass(frozen=True)
class Setting:
    name: str
    """`select.clusters`; of an expert `experts.nanodet.score_floor`."""
    values: str
    """`int >= 1`."""
    default: str | None
    """JSON; None: it must be given."""
    meaning: str


def settings() -> Iterator[Setting]:
    """In the order of the config."""
    yield from _below(Config, "")


def _below(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        whole, inner = f"{prefix}{name}", _model_in(field)
        if inner is None or whole in _ALIKE:
            yield _setting(whole, field)
        elif inner is ExpertChoice:
            yield from _below(Hosting, f"{whole}.*.hosting.")
            yield from _below(TilesConfig, f"{whole}.*.tiles.")
            for expert in EXPERTS:
                yield from _below(load_expert(expert).Config, f"{whole}.{expert}.")
        else:
            yield from _below(inner, f"{whole}.")


def _model_in(field: FieldInfo) -> type[BaseModel] | None:
    kinds = [field.annotation, *get_args(field.annotation)]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _setting(name: str, field: FieldInfo) -> Setting:
    meaning = " ".join((field.description or "").split())
    if name in _ALIKE:
        meaning += f" Settings as below `{_ALIKE[name]}`."
    default = None
    if not field.is_required():
        value = field.get_default(call_default_factory=True)
        default = json.dumps(value, default=asdict)
    return Setting(name, _values(field), default, meaning)


def _values(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, sign in _SIGNS.items()
        if getattr(rule, name, None) is not None
    ]
    kind, null, _ = _kind(field.annotation).partition(" | null")
    return " ".join([kind, *limits]) + null


def _kind(annotation: Any) -> str:
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, parts))
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and not parts:
        return annotation.__name__
    origin = getattr(get_origin(annotation), "__name__", "")
    if origin in ("list", "tuple", "dict"):
        return "mapping" if origin == "dict" else "list"
    return " | ".join(map(_kind, parts)) or "any"
