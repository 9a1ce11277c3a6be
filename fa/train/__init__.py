"""From a :class:`~fa.train.config.Config` to a table of measurements."""
