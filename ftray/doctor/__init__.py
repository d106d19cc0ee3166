"""`ftray doctor`: what is wrong with this machine or cluster, one check a function, and the fix."""
