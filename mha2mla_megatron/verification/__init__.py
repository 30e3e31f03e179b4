"""Two model folders checked against each other."""
