"""The entry points this package ships; the one place that lists them.

setup.py reads this table, and so does the registry when the package runs from its source tree without being
installed. It must import nothing.
"""

ESTIMATORS = "qpwc_ros.estimators"
OUTPUTS = "qpwc_ros.outputs"

ENTRY_POINTS = {
    ESTIMATORS: {
        "tflite": "qpwc_ros.plugins.estimators:TfliteEstimator",
        "dis": "qpwc_ros.plugins.estimators:DisEstimator",
    },
    OUTPUTS: {
        "flow": "qpwc_ros.plugins.outputs:FlowOutput",
        "interval": "qpwc_ros.plugins.outputs:IntervalOutput",
        "camera_info": "qpwc_ros.plugins.outputs:CameraInfoOutput",
        "color": "qpwc_ros.plugins.outputs:ColorOutput",
        "confidence": "qpwc_ros.plugins.outputs:ConfidenceOutput",
        "interpolated": "qpwc_ros.plugins.outputs:InterpolatedOutput",
        "motion": "qpwc_ros.plugins.motion:MotionOutput",
    },
}
