"""prefkern in the trainers that people use. Each module here imports its trainer, and none is imported by `prefkern` itself."""
