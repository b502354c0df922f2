"""Which networks that nobody here wrote `catode.describe` can describe, and whether what it says is true."""
