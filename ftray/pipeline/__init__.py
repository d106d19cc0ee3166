"""`ftray pipeline`: runs in order, each from the result of the one before, then measured, judged and published."""
