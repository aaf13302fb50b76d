"""One room for each command of `pl-prune`: `run` takes the arguments after its name and returns the exit status."""
