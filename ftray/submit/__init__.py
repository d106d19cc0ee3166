"""`ftray submit`: jobs on a cluster by name, and the supervisor of a job's driver."""
