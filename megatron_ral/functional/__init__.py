"""Pure maths on tensors: no process groups, no modules, no files.

Shape legend (suffix letters of the arguments, one for the whole project):

    B prompt groups     G responses per group     R response tokens (padded)     P prompt tokens (padded)
    S = P + R keys of a response row (prompt, then the response's own tokens)
    N attention heads   K key/value heads         D head width                   V vocabulary
    lower case (n, k, v): this tensor-parallel rank's share of the dimension
"""
