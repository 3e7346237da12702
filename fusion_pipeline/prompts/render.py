"""The one renderer of fusion prompts: a named, versioned template file plus hints.

A template that was released is never edited: a change is a new file (`meta-v2`). Instructions come
first and are the same for every sample, so that an engine's prefix cache serves them; what differs,
the external information, comes last.
"""

import hashlib
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

from jinja2 import FileSystemLoader, StrictUndefined, Template, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fusion_pipeline.dataset.evidence import Box
from fusion_pipeline.prompts.hints import Hints
from fusion_pipeline.prompts.untrusted import MAX_LABEL_CHARS, clean

TEMPLATES = Path(__file__).parent / "templates"

MAX_TEXT_CHARS = 1000
"""Longest text line or alt text in a prompt, whatever the hint config allowed."""


def template_names() -> list[str]:
    """Names that `render` takes; `external-…` files are parts of templates, not templates."""
    names = (path.stem for path in TEMPLATES.glob("*.jinja"))
    return sorted(name for name in names if not name.startswith("external"))


def render(template: str, hints: Hints) -> str:
    """The fusion prompt. Kinds without hints are left out, their block too when all are empty.

    Raises ValueError for an unknown template.
    """
    return _load(template).render(hints=_cleaned(hints))


def _cleaned(hints: Hints) -> Hints:
    """Hints may have been read back from a file: they are cleaned again, emptied ones go."""
    tags = (replace(tag, label=clean(tag.label, MAX_LABEL_CHARS)) for tag in hints.tags)
    objects = (replace(o, label=clean(o.label, MAX_LABEL_CHARS)) for o in hints.objects)
    text = (replace(line, text=clean(line.text, MAX_TEXT_CHARS)) for line in hints.text)
    alt_texts = (clean(alt, MAX_TEXT_CHARS) for alt in hints.alt_texts)
    counts = ((clean(label, MAX_LABEL_CHARS), int(count)) for label, count in hints.counts)
    return Hints(
        tuple(tag for tag in tags if tag.label),
        tuple(found for found in objects if found.label),
        tuple(line for line in text if line.text),
        tuple(filter(None, alt_texts)),
        tuple((label, count) for label, count in counts if label),
    )


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
    environment.filters["coordinates"] = _coordinates
    return environment


def _quoted(text: str) -> str:
    """A JSON string: the quotes inside are escaped, so the data can't end its own quotation."""
    return json.dumps(text, ensure_ascii=False)


def _coordinates(box: Box) -> str:
    return "[" + ", ".join(f"{value:.3f}" for value in box) + "]"
