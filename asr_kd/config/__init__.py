"""What settings are: base classes, YAML and key=value, and the table of verbs. The settings themselves live with their owners."""
