"""Bodies and answers as clients of other servers write and read them; imports of ours the wire models alone."""
