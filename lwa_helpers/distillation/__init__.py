"""Teachers, layer weights and students: how they are made and trained."""
