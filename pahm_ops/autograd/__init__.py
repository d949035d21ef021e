"""Each op's derivatives, its fake kernel (shapes without values) and its batching rule.

The public functions call the functions here. If nothing is differentiated, these call the op's kernel. For
plain gradients they use an autograd function outside the op, which costs the host little. The op's own
Autograd key, `OpFunction`, handles everything else: `torch.func`, forward mode, traced graphs, and direct
calls of the op.
"""
