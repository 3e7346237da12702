"""Cuts the fonts beside this file: the glyphs of `line_texts` alone, from Debian's packages.

apt-get download fonts-noto-cjk fonts-noto-core
for package in *.deb; do dpkg -x $package FOLDER; done
python -m tests.experts.fonts.make FOLDER
"""

import sys
from pathlib import Path

from fontTools.subset import Options, Subsetter, load_font, save_font

from tests.experts.line_texts import VISIBLE

HERE = Path(__file__).parent
FONTS = "usr/share/fonts/"
FACES = {
    "NotoSansCJKsc.otf": (f"{FONTS}opentype/noto/NotoSansCJK-Regular.ttc", 2, "Hani Jpan Hang"),
    "NotoSansCJKsc-Bold.otf": (f"{FONTS}opentype/noto/NotoSansCJK-Bold.ttc", 2, "Hani Jpan Hang"),
    "NotoSerifCJKsc.otf": (f"{FONTS}opentype/noto/NotoSerifCJK-Regular.ttc", 2, "Hani Jpan Hang"),
    "NotoSansThai.ttf": (f"{FONTS}truetype/noto/NotoSansThai-Regular.ttf", 0, "Thai"),
    "NotoSansDevanagari.ttf": (f"{FONTS}truetype/noto/NotoSansDevanagari-Regular.ttf", 0, "Deva"),
}
"""The file here: source, its face, and the scripts whose lines it can draw."""


def main(folder: Path) -> None:
    for name, (source, face, scripts) in FACES.items():
        options = Options(font_number=face, layout_features=[], notdef_outline=True)
        options.drop_tables += ["GSUB", "GPOS", "GDEF", "BASE", "vhea", "vmtx", "VORG", "DSIG"]
        font = load_font(str(folder / source), options)
        subsetter = Subsetter(options)
        lines = [line for script in scripts.split() for line in VISIBLE[script]]
        subsetter.populate(text="".join(lines) + " 0123456789")
        subsetter.subset(font)
        save_font(font, str(HERE / name), options)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
