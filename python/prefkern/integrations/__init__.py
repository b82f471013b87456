"""prefkern inside other libraries' trainers: one module for each, which imports that library when it is itself imported."""
