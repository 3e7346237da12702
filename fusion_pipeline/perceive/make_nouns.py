"""Writes `experts/assets/wordnet30_nouns.txt.gz` from a WordNet 3.0 database (man 5 wndb).

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wordnet
    python -m fusion_pipeline.perceive.make_nouns wordnet/usr/share/wordnet

One line a noun: the noun, a tab, the numbers of its meanings, most frequent first (at most four).
After an empty line, one line a meaning: its number, a tab, the numbers of its hypernyms. Persons,
places and other instances are left out. Numbers are WordNet's offsets: ImageNet's ids without the
`n`.
"""

import gzip
import sys
from collections.abc import Iterator
from pathlib import Path

from fusion_pipeline.perceive.labels import NOUNS

MEANINGS = 4
HYPERNYM, INSTANCE = "@", "@i"


def entries(path: Path) -> Iterator[list[str]]:
    for line in path.read_text(encoding="ascii").splitlines():
        if not line.startswith("  "):  # the licence
            yield line.partition("|")[0].split()


def main(dictionary: Path) -> None:
    above: dict[int, list[int]] = {}
    for offset, _, _, words, *rest in entries(dictionary / "data.noun"):
        pointers = rest[2 * int(words, 16) + 1 :]
        by_kind = list(zip(pointers[0::4], map(int, pointers[1::4]), strict=False))
        if not any(kind == INSTANCE for kind, _ in by_kind):
            above[int(offset)] = sorted(to for kind, to in by_kind if kind == HYPERNYM)
    lines = []
    for noun, _, count, *rest in entries(dictionary / "index.noun"):
        known = [offset for offset in map(int, rest[-int(count) :]) if offset in above]
        if known:
            lines.append(f"{noun.replace('_', ' ')}\t{' '.join(map(str, known[:MEANINGS]))}\n")
    lines.append("\n")
    lines += [f"{offset}\t{' '.join(map(str, up))}\n" for offset, up in sorted(above.items())]
    data = gzip.compress("".join(lines).encode("ascii"), 9, mtime=0)
    NOUNS.write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
