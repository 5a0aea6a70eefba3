"""What this machine has, what it lacks and how to get it: doctor, and the build of Horovod."""
