"""The roles of each option of train.py, in one table: what it decides, and who treats it apart from others.

Names of a run, `--resume`, `--config`, sweeps and reports take their lists of options from here.
"""

# The roles. Every option has exactly one of the first two.
RESULT = "changes the result"  # in a run's name; compared when a run is resumed or found again
PLACE = "where and on what a run happens"  # not in its name; may differ when it is resumed

OWN = "of this run alone"  # not taken over by --config
HARDWARE = "hardware"  # recorded for each segment of a run
FILE = "file of labels or of their law"  # may lie elsewhere when a run is resumed: its labels are compared
AXIS = "axis"  # tells the cells of one setting apart in a report
SEED = "seed"  # tells the runs of one cell apart
SCHED_LENGTH = "length of the schedule"  # of these a command gives one
MEASURING = "measurement"  # runs that differ in these train alike, and stand together in a report
GROWS = "may grow"  # when a run is resumed
ENDING = "when a run ends"  # runs that differ in these train alike as far as they go, and stand together in a report
TOLERATED = "tolerated beside the report's curves"  # changes neither training nor the report's three series

ROLES: dict[str, frozenset[str]] = {
    option: frozenset(roles)
    for option, *roles in (
        # data
        ("dataset", RESULT),
        ("data_dir", PLACE),
        ("image_size", RESULT),
        ("val_frac", RESULT),
        ("subset", RESULT),
        ("synthetic_train", RESULT),
        ("synthetic_test", RESULT),
        ("no_augment", RESULT),
        # noise
        ("noise", RESULT, AXIS),
        ("noise_type", RESULT),
        ("noise_matrix", RESULT, FILE),
        ("noise_file", RESULT, FILE),
        ("noise_labels", RESULT),
        # model
        ("model", RESULT),
        ("width", RESULT),
        ("norm", RESULT),
        # optimization
        ("bs", RESULT, AXIS),
        ("optimizer", RESULT),
        ("loss", RESULT),
        ("lr", RESULT, AXIS),
        ("momentum", RESULT, AXIS),
        ("wd", RESULT, AXIS),
        ("epochs", RESULT, GROWS),
        ("max_steps", RESULT, GROWS),
        ("end", RESULT, GROWS, ENDING),
        ("sched", RESULT, AXIS),
        ("sched_steps", RESULT, AXIS, SCHED_LENGTH),
        ("sched_epochs", RESULT, AXIS, SCHED_LENGTH),
        ("sched_examples", RESULT, AXIS, SCHED_LENGTH),
        ("sched_milestones", RESULT),
        ("sched_factor", RESULT),
        ("sched_cycles", RESULT),
        ("sched_delay", RESULT),
        ("warmup_steps", RESULT),
        ("warmup_epochs", RESULT),
        # measurement
        ("measure", RESULT, MEASURING),
        ("measure_every", RESULT, MEASURING),
        ("measure_bn", RESULT, TOLERATED),  # it changes cosines: they are labelled with it
        ("measure_budget", RESULT, MEASURING),
        ("permutations", RESULT, MEASURING),
        ("null_every", RESULT, MEASURING),
        ("stratify", RESULT, TOLERATED),
        ("chunks", RESULT, TOLERATED),
        ("window", RESULT, TOLERATED),
        ("fake_mask", RESULT, AXIS),
        # randomness
        ("seed", RESULT, SEED),
        ("noise_seed", RESULT, SEED),
        ("split_seed", RESULT, SEED),
        # hardware and speed
        ("accelerator", PLACE, HARDWARE, OWN),
        ("devices", PLACE, HARDWARE, OWN),
        ("strategy", PLACE, HARDWARE, OWN),
        ("num_nodes", PLACE, HARDWARE, OWN),
        ("precision", RESULT, HARDWARE),
        ("sync_bn", RESULT, TOLERATED),
        ("threads", PLACE, HARDWARE, OWN),
        ("compile", PLACE, HARDWARE, OWN),
        ("graph", PLACE, HARDWARE, OWN),
        ("deterministic", PLACE, HARDWARE, OWN),
        ("profile", PLACE, OWN),
        # run folder
        ("runs", PLACE, OWN),
        ("name", PLACE, OWN),
        ("resume", PLACE, OWN),
        ("checkpoint_minutes", PLACE, OWN),
        ("best", PLACE, OWN),
        ("examples", PLACE, OWN),
        ("config", PLACE, OWN),
    )
}

# Options that belong together: one on the left, given on the command line, replaces those on the right in --config FILE.
REPLACES = {
    "dataset": ("model", "width", "norm", "image_size"),
    "model": ("width", "norm"),
    "noise_type": ("noise_file", "noise_labels", "noise_matrix"),
    "sched": ("sched_milestones", "sched_factor", "sched_cycles", "sched_delay"),
    "sched_steps": ("sched_epochs", "sched_examples", "sched_delay"),  # the delay is in the unit of the length
    "sched_epochs": ("sched_steps", "sched_examples", "sched_delay"),
    "sched_examples": ("sched_steps", "sched_epochs", "sched_delay"),
    "warmup_steps": ("warmup_epochs",),
    "warmup_epochs": ("warmup_steps",),
}


def having(*roles: str) -> tuple[str, ...]:
    """Every option that has any of `roles`, in the order of the table."""
    return tuple(option for option, own in ROLES.items() if own & set(roles))
