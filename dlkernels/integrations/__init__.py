"""dlkernels inside other libraries. Each module here imports its library, and nothing imports the modules but their users."""
