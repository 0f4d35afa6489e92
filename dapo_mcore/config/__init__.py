"""What may be set, and how files and overrides become a checked `Config`. Change here: a setting, its default, a rule."""
