"""Runs a whole recipe: pretraining, training, int8, figures and the model card; run again to go on.

    python training/recipe.py config/recipes/qpwc_fast.yaml
    python training/recipe.py config/recipes/qpwc_fast.yaml --check     # only reads it

What is done is skipped, what was interrupted goes on. docs/training.md says what a recipe has in it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# The package beside this program, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qpwc_core.errors import QpwcError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("-o", "--output", type=Path, help="directory of the stages' (default: out/recipes/NAME)")
    parser.add_argument("--check", action="store_true", help="check the recipe and list its stages; run nothing")
    args = parser.parse_args(arguments)

    from qpwc_core.training.recipe import read_recipe
    from qpwc_core.training.recipe_run import run_recipe

    try:
        recipe = read_recipe(args.config, args.output)
        if args.check:
            for stage in recipe.stages:
                print(f"{stage.directory}: {stage.config}")
            return 0
        run_recipe(recipe, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("recipe: interrupted; run it again to go on", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError, ImportError, QpwcError) as error:
        print(f"recipe: {error}", file=sys.stderr)
        return 1
    print(f"{recipe.name}: done, in {recipe.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
