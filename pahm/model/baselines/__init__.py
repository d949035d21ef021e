"""The networks of the paper's tables that are not its own, made of the parts in `pahm.model.network`.

`pahm.model.build_network` picks them by the configuration.
"""
