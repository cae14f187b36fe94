"""Plugins that do wrong, each in a way of its own; `install` makes them known to a node."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from qpwc_ros.parameters import ParameterSpec
from qpwc_ros.plugins.base import Output
from qpwc_ros.plugins.estimators import DisEstimator

ENTRY_POINTS = """\
[qpwc_ros.estimators]
moody = plugins_that_fail:MoodyEstimator
unimportable = plugin_that_exits:Estimator

[qpwc_ros.outputs]
exiting = plugins_that_fail:ExitingOutput
unmakeable = plugins_that_fail:UnmakeableOutput
mute = plugins_that_fail:MuteOutput
"""


def install(folder: Path) -> dict[str, str]:
    """Lay them out in an empty folder as an installed package; the environment variables with which it is found."""
    information = folder / "plugins_that_fail-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins_that_fail\nVersion: 1\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    shutil.copy(__file__, folder / "plugins_that_fail.py")
    (folder / "plugin_that_exits.py").write_text("raise SystemExit(3)\n")
    root = Path(__file__).resolve().parents[1]
    return {"PYTHONPATH": os.pathsep.join([str(root), str(folder), os.environ.get("PYTHONPATH", "")])}


class MoodyEstimator(DisEstimator):
    """DIS that does what a file says: "raises" or "exits" where there should be a flow."""

    parameters = (ParameterSpec("mood", "", "File that says it; without one all is well."),)

    def __init__(self, options):
        super().__init__({**options, "dis_preset": "fast"})
        self._mood = Path(options["mood"])
        self._matched = 0

    def match(self, prev, next):
        self._matched += 1
        mood = self._mood.read_text() if self._mood.is_file() else ""
        if mood == "raises":
            raise RuntimeError("out of sorts")
        if mood == "exits":
            sys.exit("had enough")
        return super().match(prev, next)

    def describe(self):
        return {**super().describe(), "moody_matched": self._matched, 8: None}


class ExitingOutput(Output):
    """Always wanted, and leaves when it gets its first pair."""

    def wanted(self):
        return True

    def publish(self, pair):
        sys.exit("that was it")


class UnmakeableOutput(Output):
    """Cannot be made."""

    def __init__(self, node):
        raise RuntimeError("no such device")

    def publish(self, pair):
        raise AssertionError("never made")


class MuteOutput(Output):
    """Always wanted, publishes nothing, and has no words for it."""

    def wanted(self):
        return True

    def publish(self, pair):
        pass

    def describe(self):
        raise RuntimeError("lost for words")
