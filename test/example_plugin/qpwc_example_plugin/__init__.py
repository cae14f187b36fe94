"""A third-party package with plugins for node flow."""
