"""Making rosbag2 recordings of videos, image directories, and the sequences of well-known data sets."""
