"""A small web-like data set, made offline: real photos, rendered pictures, copies, broken files."""

from .make import DemoSummary, make_demo_data

__all__ = ["DemoSummary", "make_demo_data"]
