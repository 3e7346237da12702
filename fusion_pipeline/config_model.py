"""The base of all models that a config is checked by."""

from pydantic import BaseModel, ConfigDict


class ConfigModel(BaseModel):
    """Unknown fields are errors, values never change, and the text under a field is its
    description, which `fusion settings` shows."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
