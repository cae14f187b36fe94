"""The ROS 2 side: node `flow`, its plugins, and the replay of recordings."""
