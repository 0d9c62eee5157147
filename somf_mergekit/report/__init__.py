"""What a merge did: its learning, its mask, its task vectors, what was lost and gained."""
