"""`visattn bench`: the blocks at the papers' shapes against their references, the compiler and what others install."""
