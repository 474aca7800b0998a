"""The stand-ins bear the names of the upstream files they stand in for, which pytest would otherwise collect."""

collect_ignore = ["standins"]
