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

from jinja2 import (
    FileSystemLoader,
    StrictUndefined,
    Template,
    TemplateError,
    TemplateNotFound,
    TemplateSyntaxError,
    meta,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fusion_pipeline.dataset.evidence import Box, DetectedObject, Tag, TextLine
from fusion_pipeline.prompts.hints import Hints
from fusion_pipeline.prompts.untrusted import MAX_LABEL_CHARS, clean

TEMPLATES = Path(__file__).parent / "templates"

MAX_TEXT_CHARS = 1000
"""Longest text line or alt text in a prompt, whatever the hint config allowed."""


def template_names() -> list[str]:
    """Names that `render` takes; `external-…` files are parts of templates, not templates."""
    names = (path.stem for path in TEMPLATES.glob("*.jinja"))
    return sorted(name for name in names if not name.startswith("external"))


def template_name(template: str) -> str:
    """Of a template that is a file, the file's, without `.jinja`: tables are called after it."""
    return Path(template).stem if _is_file(template) else template


def check_template(template: str) -> None:
    """Raises ValueError for a template that is not there, or that fails."""
    box = DetectedObject("cat", 0.9, (0.1, 0.2, 0.3, 0.4))
    line = TextLine("EXIT", 0.9, (0.1, 0.1, 0.2, 0.1, 0.2, 0.2, 0.1, 0.2))
    every = Hints((Tag("cat", 0.9),), (box,), (line,), ("A cat.",), (("cat", 2),))
    try:
        for hints in (every, Hints()):
            if not render(template, hints).strip():
                raise ValueError(f"template {template!r} renders to nothing")
    except TemplateSyntaxError as error:
        raise ValueError(f"{template}, line {error.lineno}: {error.message}") from error
    except TemplateNotFound as error:
        raise ValueError(f"template {template!r}: there is no file {error.name!r}") from error
    except TemplateError as error:
        raise ValueError(f"{template}: {error}; what there is, is `hints`") from error


def render(template: str, hints: Hints) -> str:
    """The fusion prompt. Kinds without hints are left out, their block too when all are empty.
    `template`: a name of `template_names`, or the path of a file `*.jinja`.

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
    environment = _environment(_folder(template))
    assert environment.loader is not None
    digest = hashlib.sha256()
    queue, seen = [f"{template_name(template)}.jinja"], set[str]()
    while queue:
        name = queue.pop(0)
        if name in seen:
            continue
        seen.add(name)
        source = Path(str(environment.loader.get_source(environment, name)[1])).read_bytes()
        digest.update(hashlib.sha256(source).digest())
        found = meta.find_referenced_templates(environment.parse(source.decode()))
        queue += sorted(part for part in found if part)
    return "sha256:" + digest.hexdigest()[:16]


def _is_file(template: str) -> bool:
    return template.endswith(".jinja")


def _folder(template: str) -> Path:
    return Path(template).expanduser().parent if _is_file(template) else TEMPLATES


def _load(template: str) -> Template:
    if not _is_file(template) and template not in template_names():
        known = ", ".join(template_names())
        raise ValueError(
            f"no template is called {template!r}; known: {known}. One of your own is the path of a "
            "file that ends in .jinja"
        )
    return _environment(_folder(template)).get_template(f"{template_name(template)}.jinja")


@cache
def _environment(folder: Path) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader([folder, TEMPLATES]),  # what is shipped can be included
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
