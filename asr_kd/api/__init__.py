"""What is offered to programs and notebooks; `asr_kd` exports it, see README.md beside this file."""
