"""The verb `doctor`: whether jobs can run here, in a report that can be sent with a question."""
