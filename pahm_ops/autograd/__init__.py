"""Each op's derivatives, its fake kernel (shapes without values) and its batching rule.

The functions here are what the public ones call. Where nothing is differentiated they call the op's kernel.
For plain gradients they go through an autograd function outside the op, whose host cost is small. The op's
own Autograd key, `OpFunction`, serves everything else: `torch.func`, forward mode, a graph that is traced,
and calls of the op itself.
"""
