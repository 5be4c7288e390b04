"""The table of option roles is complete, and what is taken from it fits together."""

from engine import options, roles


def test_every_option_has_exactly_one_of_the_first_two_roles():
    parser = set(vars(options.parser().parse_args([])))
    assert set(roles.ROLES) == parser, "options in one of engine/roles.py and the parser only"
    for option, own in roles.ROLES.items():
        assert len(own & {roles.RESULT, roles.PLACE}) == 1, (
            f"--{option} must change the result or say where a run happens"
        )


def test_roles_go_together():
    for role in (roles.AXIS, roles.SEED, roles.MEASURING, roles.TOLERATED, roles.FILE, roles.GROWS):
        outside = set(roles.having(role)) - set(roles.having(roles.RESULT))
        assert not outside, f"{outside}: '{role}', and yet not part of what is computed"
    assert set(roles.having(roles.OWN)) < set(roles.having(roles.PLACE))  # what is computed can be taken over
    assert set(options.FABRIC) < set(roles.having(roles.HARDWARE))
    assert set(options.MEASURE_DEFAULTS["split"]) < set(roles.having(roles.MEASURING))


def test_options_that_replace_others_are_options():
    assert {*roles.REPLACES, *(other for others in roles.REPLACES.values() for other in others)} <= set(roles.ROLES)
    lengths = set(roles.having(roles.SCHED_LENGTH))
    assert all({option, *roles.REPLACES[option]} == lengths | {"sched_delay"} for option in lengths)
