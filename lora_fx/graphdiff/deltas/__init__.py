"""What adapters have become: norms and singular values of ΔW = scaling · B A."""
