"""The small world in motion: drawn clips, captions, an oracle for clips, a tiny text-to-video base."""
