"""Stage `curate`: decide which rows of the source are kept, and why the others are not."""
