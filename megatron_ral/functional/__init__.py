"""Token mathematics as pure functions on tensors: no process groups, no modules, no files.

Letters at the end of a tensor's name give its shape. They mean the same in the whole project:

    B   prompt groups (one prompt and its G responses each)
    G   responses per group
    R   response tokens, padded to the longest response
    P   prompt tokens, padded to the longest prompt
    S   P + R, the keys that a response token can attend to: the prompt, then the response's own tokens
    N   attention heads
    K   key/value heads
    D   width of one attention head
    V   vocabulary
    n, k, v (lower case)   share of N, K or V that one tensor-parallel rank holds
"""
