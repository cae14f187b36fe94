"""Collects textures for synthetic scenes into two archives, DIR/train.npz and DIR/validation.npz.

    python training/prepare_textures.py -o DIR PICTURES_OR_VIDEOS ...

Sources are directories, picture files, zip archives of pictures and videos; pictures with transparency
become cut-outs. Without sources the packages named in docs/training.md are looked for where Debian installs
them. Every tenth source (by name) goes to the validation archive.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# The package beside this program, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qpwc_core.data import textures
from qpwc_core.ending import end_with

DEBIAN_SOURCES = (
    "/usr/share/tuxpaint/stamps",
    "/usr/share/games/openarena/baseoa/pak4-textures.pk3",
    "/usr/share/backgrounds",
    "/usr/share/wallpapers",
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/textures"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    missing = [str(source) for source in args.sources if not source.exists()]
    if missing:
        print(f"prepare_textures: no such file or directory: {', '.join(missing)}", file=sys.stderr)
        return 2
    sources = args.sources or [Path(source) for source in DEBIAN_SOURCES if Path(source).exists()]
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for name, bank in zip(("train", "validation"), textures.build_banks(sources, args.seed)):
            path = args.output / f"{name}.npz"
            textures.save_bank(path, bank)
            print(
                f"{path}: {len(bank.photos)} photographs and patterns, {len(bank.cutouts)} cut-outs, "
                f"{len(bank.masks)} shapes, {path.stat().st_size / 1e6:.1f} MB"
            )
    except (ValueError, OSError) as error:
        print(f"prepare_textures: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    end_with(main)
