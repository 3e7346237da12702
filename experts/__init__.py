"""Vision experts: one file an expert, one line here.

`EXPERTS` maps the name used in configs and table names to `module:class`; the module is imported
when the expert is used, so that a heavy dependency costs nothing until then.
"""

EXPERTS: dict[str, str] = {
    "efficientnet-lite2": "experts.tagging.efficientnet_lite2:EfficientNetLite2Tagger",
    "nanodet": "experts.detection.nanodet:NanoDet",
    "rapidocr": "experts.ocr.rapidocr:RapidOcr",
}
