"""What becomes of a packet, step by step and in words: from the plan, the kernel and a trial."""
