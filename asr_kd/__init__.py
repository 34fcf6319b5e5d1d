"""Knowledge distillation for speech recognition: teacher, unlabelled audio, small streaming student, WER report."""
