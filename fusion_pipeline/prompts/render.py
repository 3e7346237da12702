"""The one renderer of fusion prompts: a named, versioned template file plus hints.

A template is never edited after it has been used for a data set: a change is a new file
(`meta-v2`). Instructions come first and are the same for every sample, so that an engine's prefix
cache serves them; what differs, the external information, comes last.
"""

import hashlib
import json
from functools import cache
from pathlib import Path

from jinja2 import FileSystemLoader, StrictUndefined, Template, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fusion_pipeline.dataset.evidence import Box
from fusion_pipeline.prompts.hints import MAX_LABEL_CHARS, Hints, clean

TEMPLATES = Path(__file__).parent / "templates"

MAX_TEXT_CHARS = 1000
"""Longest text line or alt text in a prompt, whatever the hint config allowed."""


def template_names() -> list[str]:
    """Names that `render` takes; `external-…` files are parts of templates, not templates."""
    names = (path.stem for path in TEMPLATES.glob("*.jinja"))
    return sorted(name for name in names if not name.startswith("external"))


def render(template: str, hints: Hints) -> str:
    """The fusion prompt. Kinds without hints are left out, their block too when all are empty.

    Raises ValueError for an unknown template. Hints are cleaned again: they may have been read
    back from a file.
    """
    return _load(template).render(hints=hints)


@cache
def template_revision(template: str) -> str:
    """`sha256:` and 16 hex digits over the template's file and the files that it includes."""
    _load(template)  # the check of the name
    environment = _environment()
    digest = hashlib.sha256()
    queue, seen = [f"{template}.jinja"], set[str]()
    while queue:
        name = queue.pop(0)
        if name in seen:
            continue
        seen.add(name)
        source = (TEMPLATES / name).read_bytes()
        digest.update(hashlib.sha256(source).digest())
        found = meta.find_referenced_templates(environment.parse(source.decode()))
        queue += sorted(part for part in found if part)
    return "sha256:" + digest.hexdigest()[:16]


def _load(template: str) -> Template:
    if template not in template_names():
        known = ", ".join(template_names())
        raise ValueError(f"unknown prompt template {template!r}; there are: {known}")
    return _environment().get_template(f"{template}.jinja")


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=False,  # plain text: "&" and quotes must reach the model as they are
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["quoted"] = _quoted
    environment.filters["label"] = _label
    environment.filters["coordinates"] = _coordinates
    return environment


def _quoted(text: str) -> str:
    """A JSON string: the quotes inside are escaped, so the data can't end its own quotation."""
    return json.dumps(clean(text, MAX_TEXT_CHARS), ensure_ascii=False)


def _label(label: str) -> str:
    return clean(label, MAX_LABEL_CHARS)


def _coordinates(box: Box) -> str:
    return "[" + ", ".join(f"{value:.3f}" for value in box) + "]"
