"""What a run shows in TensorBoard beside its series: the custom-scalar charts, the hparams table, and two pictures.

Pictures are drawn with Pillow, in some milliseconds: a run's start waits for them.
"""

import argparse
import importlib.util
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import series
from engine import checks, cmdline, options, roles
from optim import OPTIMIZERS
from schedules import SCHEDULES
from series import SERIES

REPORT_FIGURES = {
    **{series.VAL_ACC: "figures 4-6, 13-15", series.COS_CLEAN_ALL: "figures 7-9, 16"},
    **{series.ACC_NOISY: "figures 10-12, 17", series.LR: "figure 3", series.MOMENTUM: "figure 3"},
}
# Charts of the custom-scalar page by group: title -> tags, regular expressions. `chart_layout` takes from them what a
# run will log.
CHARTS = {
    "the report": {f"{SERIES[tag].label} ({numbers})": [tag] for tag, numbers in REPORT_FIGURES.items()},
    "gradients": {
        "cosines": [series.COS_CLEAN_ALL, series.COS_CLEAN_NOISY],
        "norms": [series.NORM_CLEAN, series.NORM_NOISY, series.NORM_ALL],
        "accuracy, clean and noisy": [series.ACC_CLEAN, series.ACC_NOISY],
    },
    "beside their nulls": {
        **{
            f"cos({pair.replace('_', ', ')}) and random masks": [
                *(f"grad/cos_{pair}", f"null/cos_{pair}", f"null/permuted_cos_{pair}$", f"corrected/cos_{pair}$"),
            ]
            for pair in ("clean_all", "clean_noisy")
        },
        "corrected cosine of clean and noisy, and its interval": [series.CORRECTED_COS],  # _low and _high, too
        "difference of the mean gradients, 0 for random masks": ["grad/difference$", "grad/difference_norm"],
        "label noise's share of the gradients' variance": ["grad/label_share"],
        "memorized, recovered, other": [series.MEMORIZED, series.RECOVERED, series.OTHER],
        "effective dimension, label noise and clean sampling": ["isotropy/dimension$", "isotropy/clean_dimension"],
        "participation ratio and isotropic": ["isotropy/participation", "isotropy/isotropic"],
        # In a run that an earlier version began also that version's 2/lr, the edge without momentum.
        "sharpness and the edge of stability": ["curvature/top$", "curvature/(edge|two_over_lr)"],
    },
}
FIRST_HPARAMS = ("noise", "lr", "sched", "bs", "seed")  # the five that TensorBoard shows unasked
HPARAM_METRICS = (series.VAL_ACC, series.TEST_ACC, series.ACC_NOISY, series.MEMORIZED)


# ------------------------------------------------------------------------------------------------- custom scalars


def will_log(tag: str, given: dict, noisy: bool, plan: dict) -> bool:
    """Whether a run logs `tag`, one of `CHARTS`.

    `given` are its options, `noisy` says whether it has noisy examples, and `plan` holds what `--measure full` spaces:
    {family: number of steps or epochs between its measurements, None where the budget leaves it out}.
    """
    tag = tag.rstrip("$")
    if tag in (series.LR, series.MOMENTUM):  # a constant is in the table of options
        warm = tag == series.LR and (given.get("warmup_steps") or given.get("warmup_epochs"))
        return bool(warm) or tag.removeprefix("optim/") in SCHEDULES[given["sched"]].moves
    if tag.startswith("curvature/(edge") and not OPTIMIZERS[given.get("optimizer", "sgd")].heavy_ball:
        return False
    about, split, full = SERIES[tag], given["measure"] != "off", given["measure"] == "full"
    if (about.needs and not noisy) or (about.needs == series.WRONG and given["fake_mask"] is not None):
        return False
    if about.when in (series.PROBE, series.EPOCHS):
        return bool(plan.get(tag.partition("/")[0], full))
    controls = full and bool(plan.get("steps", True))
    masks = split and given["permutations"] != 0 and (controls or not full)  # a split may bring masks of its own
    measured = {series.SPLIT: split, series.MASKS: masks, series.CONTROLS: controls, series.QUARTERS: controls}
    return measured.get(about.when, True)


def chart_layout(given: dict, noisy: bool, plan: dict) -> dict:
    """The layout for `SummaryWriter.add_custom_scalars`: `CHARTS` without the tags that this run will not log, without
    the charts that are then empty, and without comparisons of which one side is missing. Arguments as in `will_log`."""
    layout = {}
    for group, charts in CHARTS.items():
        for title, tags in charts.items():
            there = [tag for tag in tags if will_log(tag, given, noisy, plan)]
            if len(there) >= (2 if len(tags) > 1 else 1):
                layout.setdefault(group, {})[title] = ["Multiline", there]
    return layout


# --------------------------------------------------------------------------------------------------------- hparams


def hparams_summary(tag: str, **content):
    """The summary that holds one message of the hparams plugin and, unlike `SummaryWriter.add_hparams`, no point."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    described = metadata.create_summary_metadata(HParamsPluginData(**content))
    return Summary(value=[Summary.Value(tag=tag, metadata=described, tensor=metadata.NULL_TENSOR)])


def hparams_start(config: dict) -> list:
    """The summaries that list a run in the hparams table from its start on: columns, and the run's own row.

    The plugin reads the columns from any one run of the folder, so all runs name the same: every option that decides
    what is computed, `FIRST_HPARAMS` first, and `HPARAM_METRICS`, whose last values it reads from the series.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import SessionStartInfo

    actions = {a.dest: a for a in options.parser()._actions if a.option_strings and a.dest != "help"}
    rest = [key for key in actions if key not in (*roles.having(roles.PLACE), *FIRST_HPARAMS)]
    columns = []
    for key in (*FIRST_HPARAMS, *rest):
        column = api_pb2.HParamInfo(name=key, type=hparam_type(actions[key]))
        if key in FIRST_HPARAMS and hasattr(column, "differs"):  # it sorts those that differ to the front
            column.differs = True
        if actions[key].choices:
            column.domain_discrete.extend(map(str, actions[key].choices))
        columns.append(column)
    metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in HPARAM_METRICS]
    row = SessionStartInfo(start_time_secs=time.time())
    resolved = {"noise": config["noise"]["nominal"], "sched_steps": config["resolved"]["sched_steps"]}
    for key, value in (config["options"] | resolved).items():
        if key not in actions or key in roles.having(roles.PLACE) or value is None:
            continue
        kind = hparam_type(actions[key])
        if kind == api_pb2.DATA_TYPE_BOOL:
            row.hparams[key].bool_value = bool(value)
        elif kind == api_pb2.DATA_TYPE_STRING or isinstance(value, str):  # 48x64 pixels
            row.hparams[key].string_value = encodable(str(value))
        elif math.isfinite(value):
            row.hparams[key].number_value = value
    experiment = api_pb2.Experiment(hparam_infos=columns, metric_infos=metrics)
    return [
        hparams_summary(metadata.EXPERIMENT_TAG, experiment=experiment),
        hparams_summary(metadata.SESSION_START_INFO_TAG, session_start_info=row),
    ]


def hparam_type(action: argparse.Action) -> int:
    """The plugin's data type of an option: switch, text or number."""
    from tensorboard.plugins.hparams import api_pb2

    if action.nargs == 0:
        return api_pb2.DATA_TYPE_BOOL
    text = action.choices or isinstance(action.default, str) or action.type in (None, cmdline.path, checks.model)
    return api_pb2.DATA_TYPE_STRING if text else api_pb2.DATA_TYPE_FLOAT64


def hparams_end(status: str):
    """The summary that gives a run its status in the hparams table: `finished` or `failed`.

    The plugin keeps the first status it reads: a run that goes on or may go on has none, and is listed as unknown.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import SessionEndInfo

    code = {"finished": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}[status]
    end = SessionEndInfo(status=code, end_time_secs=time.time())
    return hparams_summary(metadata.SESSION_END_INFO_TAG, session_end_info=end)


# -------------------------------------------------------------------------------------------------------- pictures

BLACK, RED, GREY, DARK = (0, 0, 0), (200, 0, 0), (200, 200, 200), (8, 48, 107)


def font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's font, which knows more alphabets than Pillow's own, found without importing matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    try:
        return ImageFont.truetype(str(Path(spec.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"), size)
    except (AttributeError, OSError, ImportError):
        return ImageFont.load_default(size)


def fit_text(draw: ImageDraw.ImageDraw, text: str, width: float, letters) -> str:
    """`text` in at most `width` pixels, cut with an ellipsis where it is longer."""
    text = " ".join(encodable(text[:200]).split())
    if draw.textlength(text, letters) <= width:
        return text
    while text and draw.textlength(text + "...", letters) > width:
        text = text[:-1]
    return text + "..."


def channels_first(image: Image.Image) -> Tensor:
    """(3, h, w) uint8, as `SummaryWriter.add_image` wants it."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def label_picture(images: Tensor, true: Tensor, given: Tensor, classes: tuple[str, ...]) -> Tensor:
    """Up to 16 uint8 images (m, H, W, C) under their labels, as one picture (3, h, w) uint8.

    A changed label is red: the true one, and below it the given one. `true`, `given`: (m,) int64.
    """
    columns, rows, side, gap, line = 4, 4, 96, 16, 20  # pixels; large letters, for TensorBoard shows it scaled down
    tile, height = side + gap, side + gap + 2 * line
    sheet = Image.new("RGB", (columns * tile + gap, rows * height + gap), "white")
    draw, letters = ImageDraw.Draw(sheet), font(15)
    for i in range(min(len(images), columns * rows)):
        x, y = gap + i % columns * tile, gap + i // columns * height
        t, g = int(true[i]), int(given[i])
        lines = [classes[t]] if t == g else [classes[t], f"\u2192 {classes[g]}"]
        for j, text in enumerate(lines):
            at = x, y + (j + 2 - len(lines)) * line
            draw.text(at, fit_text(draw, text, side + gap - 4, letters), BLACK if t == g else RED, letters)
        pixels = images[i].expand(-1, -1, 3).contiguous().numpy()
        h, w = (max(1, round(side * edge / max(pixels.shape[:2]))) for edge in pixels.shape[:2])
        small = Image.fromarray(pixels).resize((w, h), Image.Resampling.NEAREST)
        sheet.paste(small, (x, y + 2 * line + 2))
    return channels_first(sheet)


def matrix_picture(matrix: list[list[float]], classes: tuple[str, ...]) -> Tensor:
    """A transition matrix (K rows of K shares by true class) as a picture (3, h, w) uint8: white is 0, dark blue 1.

    With class names, thinned out beyond 40 classes, and up to 20 classes the share in each square.
    """
    K = len(matrix)
    side = max(6, 560 // K)  # pixels of a square
    letters, small = font(16), font(min(16, max(8, side // 3)))
    every = 1 if K <= 40 else 10
    names = letters if K <= 20 else small if every == 1 else font(11)
    sheet = Image.new("RGB", (1, 1))
    draw = ImageDraw.Draw(sheet)
    labels = [fit_text(draw, name, 150, names) for name in classes]
    edge = 40 + math.ceil(max(draw.textlength(label, names) for label in labels))  # room for names beside and below
    sheet = Image.new("RGB", (edge + K * side + 12, 12 + K * side + edge), "white")
    sheet.paste(squares(matrix, side), (edge, 12))
    draw = ImageDraw.Draw(sheet)
    for i in range(0, K, every):
        middle = i * side + side // 2
        draw.text((edge - 6, 12 + middle), labels[i], BLACK, names, anchor="rm")
        sheet.paste(upright(labels[i], names), (edge + middle - (names.size + 4) // 2, 12 + K * side + 6))
    if K <= 20:
        for i, row in enumerate(matrix):
            for j, share in enumerate(row):
                at = edge + j * side + side // 2, 12 + i * side + side // 2
                text = f"{share:.2f}" if 0.005 <= share < 0.995 else "0" if share == 0 else f"{share:.1g}"
                draw.text(at, text, (255, 255, 255) if share > 0.3 else BLACK, small, anchor="mm")
    draw.text((edge + K * side // 2, sheet.height - 4), "label given", BLACK, letters, anchor="ms")
    sheet.paste(upright("true class", letters), (4, 12 + K * side // 2 - 40))
    return channels_first(sheet)


def squares(matrix: list[list[float]], side: int) -> Image.Image:
    """The matrix alone, `side` pixels to a square, grey lines between."""
    share = torch.tensor(matrix, dtype=torch.float64).sqrt()[..., None]  # the root, for rare transitions to be seen
    dark = torch.tensor(DARK, dtype=torch.float64)
    colors = (255 + share * (dark - 255)).round().to(torch.uint8)  # (K, K, 3)
    colors = colors.repeat_interleave(side, 0).repeat_interleave(side, 1)
    colors[::side], colors[:, ::side] = 200, 200
    return Image.fromarray(colors.numpy())


def upright(text: str, letters) -> Image.Image:
    """`text` in black on white, read from below."""
    line = Image.new("RGB", (math.ceil(letters.getlength(text)) + 2, letters.size + 4), "white")
    ImageDraw.Draw(line).text((1, (letters.size + 4) // 2), text, BLACK, letters, anchor="lm")
    return line.rotate(90, expand=True)


def encodable(text: str) -> str:
    """`text` with what UTF-8 cannot say, odd bytes of a path, spelled out: event files and pictures take no others."""
    return text.encode("utf-8", "backslashreplace").decode()
