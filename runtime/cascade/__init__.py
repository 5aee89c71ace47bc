"""The student first, its teacher for the unsure: scores, certificates, drift."""
