"""Training teachers and students: one trainer, a schedule of phases, exact resume."""
