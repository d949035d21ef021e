from pahm.hand.topology import level_name


def test_levels_are_named_by_their_vertices():
    # METRO has M3 and M1 only, a network with refinements M1 several times.
    assert [level_name(count) for count in (98, 195, 389, 778)] == [
        "M4 (98)",
        "M3 (195)",
        "M2 (389)",
        "M1 (778)",
    ]
