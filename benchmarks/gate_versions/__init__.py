"""What gates and measuring cost in two versions of this project, in one run."""
