"""Files that somebody else has made: opened without waiting, read with limits, and known if they change meanwhile.

Links that lead elsewhere are followed and told; a folder that a checkpoint names may be a stranger's.
"""
