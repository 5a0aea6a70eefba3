"""What this machine has, what it lacks, how to get it: doctor, Horovod's build."""
