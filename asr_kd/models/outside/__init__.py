"""Teachers that other programs have trained, behind the contract of `AcousticModel`: a file a family."""
