from setuptools import setup

setup(
    name="qpwc_example_plugin",
    version="0.1.0",
    packages=["qpwc_example_plugin"],
    entry_points={
        "qpwc_ros.outputs": [
            "mean_velocity = qpwc_example_plugin.plugins:MeanVelocityOutput",
            "faulty = qpwc_example_plugin.plugins:FaultyOutput",
        ],
        "qpwc_ros.estimators": [
            "slow = qpwc_example_plugin.plugins:SlowEstimator",
            "held = qpwc_example_plugin.plugins:HeldEstimator",
            "counting = qpwc_example_plugin.plugins:CountingEstimator",
        ],
    },
)
