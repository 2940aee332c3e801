"""What gradient corrections cost, beside the peers that ship the same."""
